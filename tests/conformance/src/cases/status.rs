//! `NBD_CMD_BLOCK_STATUS`. The session checks the form of every status chunk; here is the rest.

use super::meta::ALLOCATION;
use super::write::{pattern, writer};
use super::{Case, reads, writes};
use crate::context::Context;
use crate::pending::Reply;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, ensure, skip};
use crate::wire::{STATE_HOLE, STATE_ZERO, cf, cmd, errno, tf};

/// The most of the export that is walked, in bytes, and the most requests for it.
const WALK_MAX: u64 = 256 << 20;
const WALK_STEPS_MAX: usize = 4096;

pub(super) const CASES: &[Case] = &[
    reads("status.one-chunk-each", "every selected context gets one status chunk", one_chunk_each),
    reads("status.walk", "following the descriptors reaches the end of the export", walk),
    reads("status.req-one", "REQ_ONE gets one descriptor no longer than the request", req_one),
    reads("status.zero-is-zero", "extents flagged zero read as zeroes", zero_is_zero),
    reads("status.reserved-flags", "the reserved flags of base:allocation are clear", reserved_flags),
    reads("status.aligned", "descriptors are multiples of the minimum block size", aligned),
    reads("status.within-export", "descriptors end with the export", within_export),
    reads("status.beyond", "BLOCK_STATUS beyond the end gets EINVAL", status_beyond),
    reads("status.zero-length", "BLOCK_STATUS of no bytes keeps the connection", zero_length),
    reads("status.in-flight", "status requests and reads in flight are told apart", in_flight),
    writes("status.written-is-data", "written bytes are not reported as zeroes", written_is_data),
    writes("status.after-trim", "after TRIM and WRITE_ZEROES the status still tells the truth", after_trim),
];

fn session(context: &Context<'_>, mode: Mode) -> Check<Session> {
    context.session_with(mode, &[ALLOCATION])
}

/// Runs `test` in each mode with chunks; skips when there is none.
fn each(context: &Context<'_>, test: impl Fn(&mut Session) -> Check) -> Check {
    context.chunked()?;
    for mode in context.modes().filter(|&mode| mode != Mode::Simple) {
        test(&mut session(context, mode)?)?;
    }
    Ok(())
}

fn status(offset: u64, len: u64) -> Request {
    Request::new(cmd::BLOCK_STATUS, offset, len)
}

/// The extents of the first context.
fn extents(reply: &Reply) -> &[(u64, u64)] {
    reply.statuses.first().map_or(&[], |(_, extents)| extents)
}

fn one_chunk_each(context: &Context<'_>) -> Check {
    context.chunked()?;
    let all: Vec<_> = context.facts.contexts.iter().map(String::as_str).collect();
    if all.is_empty() {
        return skip("the server lists no metadata contexts");
    }
    for mode in context.modes().filter(|&mode| mode != Mode::Simple) {
        let mut session = context.session_with(mode, &all)?;
        let len = session.size.min(1 << 20) / session.unit() * session.unit();
        let reply = session.works(status(0, len))?;
        let (got, wanted) = (reply.statuses.len(), session.contexts.len());
        ensure(got == wanted, || format!("{mode:?} mode: {got} status chunks for {wanted} contexts"))?;
    }
    Ok(())
}

/// Calls `visit` for every extent from the start of the export, as far as `WALK_MAX`. Returns how far it came
/// and how far it should have come.
fn walked(
    session: &mut Session,
    mut visit: impl FnMut(&mut Session, u64, u64, u64) -> Check,
) -> Check<(u64, u64)> {
    let end = session.size.min(WALK_MAX) / session.unit() * session.unit();
    // A server may answer with extents finer than its minimum block; requests may not be.
    let minimum = session.blocks.map_or(1, |blocks| u64::from(blocks.minimum.max(1)));
    let mut offset = 0;
    for _ in 0..WALK_STEPS_MAX {
        if offset >= end {
            break;
        }
        let reply = session.works(status(offset, end - offset))?;
        let mut next = offset;
        for &(len, flags) in extents(&reply) {
            visit(session, next, len, flags)?;
            next = next.saturating_add(len);
        }
        offset = next / minimum * minimum;
    }
    Ok((offset, end))
}

fn walk(context: &Context<'_>) -> Check {
    each(context, |session| {
        let (reached, end) = walked(session, |_, _, _, _| Ok(()))?;
        context.should(reached >= end, || format!("{WALK_STEPS_MAX} requests reach {reached} of {end}"));
        Ok(())
    })
}

fn req_one(context: &Context<'_>) -> Check {
    each(context, |session| {
        let unit = session.unit();
        for len in [unit, 8 * unit, session.size / unit * unit] {
            let len = len.min(session.size).min(1 << 31) / unit * unit;
            session.works(status(0, len).flags(cf::REQ_ONE))?;
        }
        Ok(())
    })
}

fn zero_is_zero(context: &Context<'_>) -> Check {
    each(context, |session| {
        walked(session, |session, offset, len, flags| {
            if flags & STATE_ZERO == 0 {
                return Ok(());
            }
            let end = offset.saturating_add(len).min(session.size);
            let unit = session.unit();
            let (start, end) = (offset.next_multiple_of(unit), end / unit * unit);
            let most = (1u64 << 20).min(session.payload_max()) / unit * unit;
            for at in [start, end.saturating_sub(most).max(start) / unit * unit] {
                let len = most.min(end.saturating_sub(at));
                if len == 0 {
                    continue;
                }
                let data = session.works(Request::read(at, len))?.data;
                ensure(data.iter().all(|&byte| byte == 0), || format!("{at}+{len} is not zero as reported"))?;
            }
            Ok(())
        })
        .map(|_| ())
    })
}

fn reserved_flags(context: &Context<'_>) -> Check {
    each(context, |session| {
        walked(session, |session, offset, _, flags| {
            let reserved = flags & !(STATE_HOLE | STATE_ZERO);
            ensure(session.mode != Mode::Extended || reserved >> 32 == 0, || {
                format!("the high 32 bits of the flags at {offset} are not zero: {flags:#x}")
            })?;
            context.should(reserved == 0, || format!("the flags at {offset} have reserved bits: {flags:#x}"));
            Ok(())
        })
        .map(|_| ())
    })
}

fn aligned(context: &Context<'_>) -> Check {
    each(context, |session| {
        let minimum = session.blocks.map_or(1, |blocks| u64::from(blocks.minimum.max(1)));
        walked(session, |session, offset, len, _| {
            let last = offset.saturating_add(len) >= session.size;
            context.should(len.is_multiple_of(minimum) || last, || {
                format!("a descriptor of {len} bytes with a minimum block of {minimum}")
            });
            Ok(())
        })
        .map(|_| ())
    })
}

fn within_export(context: &Context<'_>) -> Check {
    each(context, |session| {
        walked(session, |session, offset, len, _| {
            let inside = offset.saturating_add(len) <= session.size;
            context.should(inside, || format!("a descriptor {offset}+{len} ends after the export"));
            Ok(())
        })
        .map(|_| ())
    })
}

fn status_beyond(context: &Context<'_>) -> Check {
    each(context, |session| {
        let unit = session.unit();
        let end = session.size.next_multiple_of(unit);
        session.refuses_in_step(status(end, unit), &[errno::EINVAL])?;
        session.refuses_in_step(status(end.saturating_sub(unit), 2 * unit), &[errno::EINVAL])
    })
}

fn zero_length(context: &Context<'_>) -> Check {
    each(context, |session| session.survives(status(0, 0)))
}

fn in_flight(context: &Context<'_>) -> Check {
    each(context, |session| {
        let len = (session.unit() * 4).min(session.size) / session.unit() * session.unit();
        for _ in 0..8 {
            session.submit(Request::read(0, len))?;
            session.submit(status(0, len))?;
        }
        for _ in 0..16 {
            session.next()?.ok("READ or BLOCK_STATUS")?;
        }
        Ok(())
    })
}

/// The first `len` bytes hold data: no extent over them may be flagged zero.
fn told_as_data(session: &mut Session, len: u64) -> Check {
    let reply = session.works(status(0, len))?;
    let mut offset = 0;
    for &(length, flags) in extents(&reply) {
        let zero = offset < len && flags & STATE_ZERO != 0;
        ensure(!zero, || format!("{offset}+{length} was written and is reported as zeroes"))?;
        offset = offset.saturating_add(length);
    }
    Ok(())
}

fn written_is_data(context: &Context<'_>) -> Check {
    context.needs_writable()?;
    each(context, |session| {
        let len = 4 * session.unit();
        context.needs_size(len)?;
        session.works(Request::write(0, &pattern(1, len)))?;
        told_as_data(session, len)
    })
}

fn after_trim(context: &Context<'_>) -> Check {
    writer(context, Mode::Simple)?;
    let len = 256 << 10;
    context.needs_size(len)?;
    each(context, |session| {
        let half = len / 2 / session.unit() * session.unit();
        session.works(Request::write(0, &pattern(2, half)))?;
        for (flag, command) in [(tf::TRIM, cmd::TRIM), (tf::WRITE_ZEROES, cmd::WRITE_ZEROES)] {
            if session.flags & flag != 0 {
                session.works(Request::new(command, half, half))?;
            }
        }
        told_as_data(session, half)
    })?;
    zero_is_zero(context)
}
