//! Payloads up to the advertised limit and a little beyond.

use super::write::{holds, pattern, writer};
use super::{Case, reads, writes};
use crate::context::Context;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, Stop, skip};
use crate::wire::errno;

/// Payloads up to this length should never count as an attack.
const NEVER_ATTACK: u64 = 1 << 25;

pub(super) const CASES: &[Case] = &[
    reads("limits.read-max", "a read of the longest payload works", read_max),
    writes("limits.write-max", "a write of the longest payload works", write_max),
    reads("limits.read-over-max", "a read over the advertised limit keeps the connection", read_over_max),
    writes(
        "limits.write-over-max",
        "a write over the advertised limit is skipped, the connection stays",
        write_over_max,
    ),
];

/// The longest payload that fits the export, in bytes.
fn longest(session: &Session) -> u64 {
    session.size.min(session.payload_max()) / session.unit() * session.unit()
}

fn read_max(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = longest(&session);
        match session.call(Request::read(0, len)) {
            Ok(reply) if reply.error == 0 => {}
            Ok(reply) => context.note(format!("READ of {len} bytes gets {}", errno::name(reply.error))),
            Err(Stop::Closed(_)) => context.note(format!("READ of {len} bytes closes the connection")),
            Err(stop) => return Err(stop),
        }
    }
    Ok(())
}

fn write_max(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Simple)?;
    let data = pattern(1, longest(&session));
    match session.call(Request::write(0, &data)) {
        Ok(reply) if reply.error == 0 => return holds(&mut session, 0, &data, "a long WRITE"),
        Ok(reply) => context.note(format!("WRITE of {} bytes gets {}", data.len(), errno::name(reply.error))),
        Err(Stop::Closed(_)) => context.note(format!("WRITE of {} bytes closes the connection", data.len())),
        Err(stop) => return Err(stop),
    }
    session.in_step("a long WRITE that fails")
}

/// A session whose export and advertised limit leave room for a payload over the limit; its length.
fn over(context: &Context<'_>, mode: Mode) -> Check<(Session, u64)> {
    let session = context.session(mode)?;
    let Some(blocks) = session.blocks else { return skip("the server advertises no limit") };
    let len = u64::from(blocks.maximum) + session.unit();
    match len <= NEVER_ATTACK && len <= session.size {
        true => Ok((session, len)),
        false => skip("a payload over the limit would be over 32 MiB or over the export"),
    }
}

fn read_over_max(context: &Context<'_>) -> Check {
    let (mut session, len) = over(context, Mode::Simple)?;
    session.survives(Request::read(0, len))
}

fn write_over_max(context: &Context<'_>) -> Check {
    context.needs_writable()?;
    let (mut session, len) = over(context, Mode::Simple)?;
    session.survives(Request::write(0, &pattern(2, len)))
}
