//! What a server should refuse: ranges beyond the end, unknown commands, flags out of place.

use super::write::{pattern, writer};
use super::{Case, reads, writes};
use crate::context::Context;
use crate::session::{Mode, Request};
use crate::stop::{Check, Stop, fail};
use crate::wire::{EXT_REPLY_MAGIC, In, SIMPLE_MAGIC, STRUCTURED_MAGIC, cf, chunk, cmd, errno, tf};

/// A command number no version of the protocol has given a meaning.
const UNKNOWN_COMMAND: u16 = 0x4d42;

pub(super) const CASES: &[Case] = &[
    reads("refuse.read-beyond", "READ beyond the end gets EINVAL", read_beyond),
    reads("refuse.cache-beyond", "CACHE beyond the end gets an error", cache_beyond),
    writes("refuse.write-beyond", "WRITE beyond the end gets ENOSPC, its payload is skipped", write_beyond),
    writes("refuse.trim-beyond", "TRIM beyond the end gets EINVAL", trim_beyond),
    writes("refuse.zeroes-beyond", "WRITE_ZEROES beyond the end gets ENOSPC", zeroes_beyond),
    reads("refuse.unknown-command", "an unknown command gets EINVAL", unknown_command),
    reads("refuse.unknown-flag", "an unknown flag on READ gets EINVAL", unknown_flag),
    reads("refuse.read-flags", "flags of other commands on READ get EINVAL", read_flags),
    reads("refuse.df-without-chunks", "DF without structured replies gets EINVAL", df_without_chunks),
    writes(
        "refuse.write-flags",
        "flags of other commands on WRITE get EINVAL, its payload is skipped",
        write_flags,
    ),
    writes("refuse.fua-unoffered", "FUA that was not offered gets EINVAL", fua_unoffered),
    reads(
        "refuse.status-without-context",
        "BLOCK_STATUS without a context gets EINVAL",
        status_without_context,
    ),
    reads("refuse.wrong-magic", "a request with a wrong magic is not answered with success", wrong_magic),
    reads("refuse.option-after-go", "an option after GO is not answered as one", option_after_go),
];

/// Ranges that begin or end beyond an export of `size` bytes, in multiples of `unit`.
fn beyond(size: u64, unit: u64) -> Vec<(u64, u64)> {
    let end = size.next_multiple_of(unit);
    let mut ranges =
        vec![(end, unit), (end + (1 << 40), unit), (u64::MAX - unit + 1, unit), (1 << 63, 2 * unit)];
    if end >= unit {
        ranges.push((end - unit, 2 * unit));
    }
    ranges
}

/// Sends `make` for each range beyond the end, in each mode, and expects one of `errors`.
fn refused(context: &Context<'_>, errors: &[u32], make: impl Fn(u64, u64) -> Request) -> Check {
    for mode in context.modes() {
        for (offset, len) in beyond(context.facts.size, context.facts.unit()) {
            context.session(mode)?.refuses_in_step(make(offset, len), errors)?;
        }
    }
    Ok(())
}

fn read_beyond(context: &Context<'_>) -> Check {
    refused(context, &[errno::EINVAL], Request::read)
}

fn cache_beyond(context: &Context<'_>) -> Check {
    context.needs_flag(tf::CACHE, "SEND_CACHE")?;
    refused(context, &[errno::EINVAL, errno::ENOSPC], |offset, len| Request::new(cmd::CACHE, offset, len))
}

fn write_beyond(context: &Context<'_>) -> Check {
    context.needs_writable()?;
    let errors = [errno::ENOSPC, errno::EINVAL];
    refused(context, &errors, |offset, len| Request::write(offset, &pattern(1, len)))
}

fn trim_beyond(context: &Context<'_>) -> Check {
    context.needs_flag(tf::TRIM, "SEND_TRIM")?;
    context.needs_writable()?;
    refused(context, &[errno::EINVAL], |offset, len| Request::new(cmd::TRIM, offset, len))
}

fn zeroes_beyond(context: &Context<'_>) -> Check {
    context.needs_flag(tf::WRITE_ZEROES, "SEND_WRITE_ZEROES")?;
    context.needs_writable()?;
    let errors = [errno::ENOSPC, errno::EINVAL];
    refused(context, &errors, |offset, len| Request::new(cmd::WRITE_ZEROES, offset, len))
}

fn unknown_command(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        for command in [UNKNOWN_COMMAND, u16::MAX] {
            context.session(mode)?.refuses_in_step(Request::new(command, 0, 0), &[errno::EINVAL])?;
        }
    }
    Ok(())
}

/// READ with each of `flags`, in each mode.
fn read_with(context: &Context<'_>, flags: &[u16]) -> Check {
    for mode in context.modes() {
        for &flag in flags {
            let mut session = context.session(mode)?;
            let len = session.unit().min(session.size);
            session.refuses_in_step(Request::read(0, len).flags(flag), &[errno::EINVAL])?;
        }
    }
    Ok(())
}

fn unknown_flag(context: &Context<'_>) -> Check {
    read_with(context, &[cf::UNKNOWN, 1 << 15])
}

fn read_flags(context: &Context<'_>) -> Check {
    read_with(context, &[cf::NO_HOLE, cf::REQ_ONE, cf::FAST_ZERO])
}

fn df_without_chunks(context: &Context<'_>) -> Check {
    let mut session = context.session(Mode::Simple)?;
    let len = session.unit().min(session.size);
    session.refuses_in_step(Request::read(0, len).flags(cf::DF), &[errno::EINVAL])
}

fn write_flags(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        for flag in [cf::DF, cf::REQ_ONE, cf::FAST_ZERO, cf::UNKNOWN] {
            let mut session = writer(context, mode)?;
            let data = pattern(2, session.unit());
            session.refuses_in_step(Request::write(0, &data).flags(flag), &[errno::EINVAL])?;
        }
    }
    Ok(())
}

fn fua_unoffered(context: &Context<'_>) -> Check {
    if context.facts.flags & tf::FUA != 0 {
        return crate::stop::skip("the export offers FUA");
    }
    let mut session = writer(context, Mode::Simple)?;
    let data = pattern(3, session.unit());
    session.refuses_in_step(Request::write(0, &data).flags(cf::FUA), &[errno::EINVAL])
}

fn status_without_context(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = session.unit().min(session.size);
        session.refuses_in_step(Request::new(cmd::BLOCK_STATUS, 0, len), &[errno::EINVAL])?;
    }
    Ok(())
}

/// Whether the first eight bytes of a reply, of any kind, are those of an error.
pub(super) fn tells_error(head: &[u8]) -> bool {
    let mut input = In(head);
    match input.u32() {
        Some(SIMPLE_MAGIC) => input.u32() != Some(0),
        Some(STRUCTURED_MAGIC | EXT_REPLY_MAGIC) => {
            input.u16().zip(input.u16()).is_some_and(|(_, kind)| kind & chunk::ERROR_BIT != 0)
        }
        _ => false,
    }
}

fn wrong_magic(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        session.stream.send(&[0x5a; 32], "a request with a wrong magic")?;
        match session.stream.receive_vec(8, "a request with a wrong magic") {
            Err(Stop::Closed(_)) => {}
            Ok(head) if tells_error(&head) => {}
            Err(Stop::Silent(_)) => {
                context.note(format!("in {mode:?} mode a wrong magic keeps the connection open"))
            }
            Err(stop) => return Err(stop),
            Ok(head) => return fail(format!("in {mode:?} mode a wrong magic is answered with {head:02x?}")),
        }
    }
    Ok(())
}

fn option_after_go(context: &Context<'_>) -> Check {
    let mut session = context.session(Mode::Simple)?;
    session
        .stream
        .send(&crate::wire::option_request(crate::wire::opt::LIST, &[0; 12]), "an option after GO")?;
    match session.stream.receive_vec(8, "an option after GO") {
        Ok(head) if head == crate::wire::OPTION_REPLY_MAGIC.to_be_bytes() => {
            fail("an option after GO is answered")
        }
        Ok(_) | Err(Stop::Closed(_) | Stop::Silent(_)) => Ok(()),
        Err(stop) => Err(stop),
    }
}
