//! `NBD_CMD_WRITE`, `NBD_CMD_FLUSH` and FUA: read back, flags, read-only exports, several connections.

use super::{Case, reads, writes};
use crate::context::Context;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, Stop, ensure, fail, skip};
use crate::wire::{cf, cmd, errno, tf};

pub(super) const CASES: &[Case] = &[
    writes("write.read-back", "what is written is read back, in every mode", read_back),
    writes("write.last-bytes", "the last unit of the export can be written", last_bytes),
    writes("write.neighbours", "a write leaves its neighbours alone", neighbours),
    writes("write.unaligned", "a write off the minimum block size works or gets EINVAL", unaligned),
    writes("write.in-flight", "sixteen writes in flight are all answered and all done", in_flight),
    writes("write.zero-length", "a write of no bytes keeps the connection", zero_length),
    writes(
        "write.other-connection",
        "a new connection reads what an old one wrote and flushed",
        other_connection,
    ),
    reads("flush.works", "FLUSH succeeds", flush_works),
    writes("flush.after-write", "FLUSH after writes succeeds", flush_after_write),
    writes("fua.write", "a write with FUA succeeds and is read back", fua_write),
    reads("fua.on-reading-commands", "FUA is accepted on commands that only read", fua_on_reading_commands),
    writes(
        "fua.on-writing-commands",
        "FUA is accepted on every command that writes",
        fua_on_writing_commands,
    ),
    writes("read-only.write", "a read-only export refuses WRITE, with EPERM", read_only_write),
    writes("read-only.trim", "a read-only export refuses TRIM, with EPERM", read_only_trim),
    writes("read-only.write-zeroes", "a read-only export refuses WRITE_ZEROES, with EPERM", read_only_zeroes),
    writes("multi-conn.flush-here", "a write flushed on its connection is seen on another", flush_here),
    writes(
        "multi-conn.flush-there",
        "a flush on one connection covers finished writes of others",
        flush_there,
    ),
    writes("multi-conn.fua", "a write with FUA is seen on another connection", multi_conn_fua),
];

/// Bytes that differ with `seed` and with the place.
pub(super) fn pattern(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ seed.wrapping_mul(101)) as u8 | 1).collect()
}

/// A session that may write.
pub(super) fn writer(context: &Context<'_>, mode: Mode) -> Check<Session> {
    context.needs_writable()?;
    context.session(mode)
}

/// Fails unless `offset` holds `wanted`.
pub(super) fn holds(session: &mut Session, offset: u64, wanted: &[u8], after: &str) -> Check {
    let found = session.works(Request::read(offset, wanted.len() as u64))?.data;
    let first = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
    match first {
        None if found.len() == wanted.len() => Ok(()),
        at => fail(format!("after {after}, byte {} is not as written", offset + at.unwrap_or(0) as u64)),
    }
}

fn read_back(context: &Context<'_>) -> Check {
    for (seed, mode) in context.modes().enumerate() {
        let mut session = writer(context, mode)?;
        let unit = session.unit();
        for (step, units) in [1, 3, 16, 128].into_iter().enumerate() {
            let len = units * unit;
            if len > session.size || len > session.payload_max() {
                break;
            }
            let data = pattern((seed * 8 + step) as u64, len);
            session.works(Request::write(0, &data))?;
            holds(&mut session, 0, &data, "WRITE")?;
        }
    }
    Ok(())
}

fn last_bytes(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let unit = session.unit();
        context.needs_size(unit)?;
        let offset = (session.size / unit - 1) * unit;
        let data = pattern(7, unit);
        session.works(Request::write(offset, &data))?;
        holds(&mut session, offset, &data, "WRITE of the last unit")?;
    }
    Ok(())
}

fn neighbours(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Simple)?;
    let unit = session.unit();
    context.needs_size(3 * unit)?;
    let mut data = pattern(1, 3 * unit);
    session.works(Request::write(0, &data))?;
    let middle = pattern(2, unit);
    session.works(Request::write(unit, &middle))?;
    data[unit as usize..2 * unit as usize].copy_from_slice(&middle);
    holds(&mut session, 0, &data, "WRITE between two blocks")
}

fn unaligned(context: &Context<'_>) -> Check {
    context.needs_size(8192)?;
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        if session.blocks.is_some_and(|blocks| blocks.minimum > 1) {
            let data = pattern(3, session.unit());
            session.refuses_in_step(Request::write(1, &data), &[errno::EINVAL])?;
            session.refuses_in_step(Request::write(0, &data[1..]), &[errno::EINVAL])?;
            continue;
        }
        let mut whole = pattern(4, 4096);
        session.works(Request::write(0, &whole))?;
        for (seed, (offset, len)) in [(1, 3), (511, 2), (513, 1500), (4095, 1)].into_iter().enumerate() {
            let part = pattern(seed as u64, len);
            session.works(Request::write(offset, &part))?;
            whole[offset as usize..(offset + len) as usize].copy_from_slice(&part);
            holds(&mut session, 0, &whole, "an unaligned WRITE")?;
        }
    }
    Ok(())
}

fn in_flight(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let unit = session.unit();
        context.needs_size(16 * unit)?;
        for place in 0..16 {
            session.submit(Request::write(place * unit, &pattern(place, unit)))?;
        }
        for _ in 0..16 {
            session.next()?.ok("WRITE")?;
        }
        for place in 0..16 {
            holds(&mut session, place * unit, &pattern(place, unit), "16 writes in flight")?;
        }
    }
    Ok(())
}

fn zero_length(context: &Context<'_>) -> Check {
    context.modes().try_for_each(|mode| writer(context, mode)?.survives(Request::write(0, &[])))
}

fn other_connection(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Simple)?;
    let data = pattern(11, session.unit());
    session.works(Request::write(0, &data))?;
    if session.flags & tf::FLUSH != 0 {
        session.works(Request::new(cmd::FLUSH, 0, 0))?;
    }
    session.disconnect()?;
    holds(&mut context.session(Mode::Simple)?, 0, &data, "WRITE, FLUSH and DISC on another connection")
}

fn flush_works(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FLUSH, "SEND_FLUSH")?;
    for mode in context.modes() {
        context.session(mode)?.works(Request::new(cmd::FLUSH, 0, 0))?;
    }
    Ok(())
}

fn flush_after_write(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FLUSH, "SEND_FLUSH")?;
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let data = pattern(5, session.unit());
        session.works(Request::write(0, &data))?;
        session.works(Request::new(cmd::FLUSH, 0, 0))?;
        holds(&mut session, 0, &data, "WRITE and FLUSH")?;
    }
    Ok(())
}

fn fua_write(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FUA, "SEND_FUA")?;
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let data = pattern(6, session.unit());
        session.works(Request::write(0, &data).flags(cf::FUA))?;
        holds(&mut session, 0, &data, "WRITE with FUA")?;
    }
    Ok(())
}

fn fua_on_reading_commands(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FUA, "SEND_FUA")?;
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = session.unit().min(session.size);
        session.works(Request::read(0, len).flags(cf::FUA))?;
        if session.flags & tf::FLUSH != 0 {
            session.works(Request::new(cmd::FLUSH, 0, 0).flags(cf::FUA))?;
        }
        if session.flags & tf::CACHE != 0 {
            same_with_fua(&mut session, Request::new(cmd::CACHE, 0, len))?;
        }
    }
    let mode = context.chunked()?;
    let Ok(mut session) = context.session_with(mode, &[super::meta::ALLOCATION]) else { return Ok(()) };
    let len = session.unit().min(session.size);
    session.works(Request::new(cmd::BLOCK_STATUS, 0, len).flags(cf::FUA)).map(|_| ())
}

/// A command that may fail by itself must not fail because of FUA.
fn same_with_fua(session: &mut Session, request: Request) -> Check {
    let what = request.describe();
    if session.call(request.clone())?.error == 0 {
        session.call(request.flags(cf::FUA))?.ok(&format!("{what} with FUA"))?;
    }
    Ok(())
}

fn fua_on_writing_commands(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FUA, "SEND_FUA")?;
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let unit = session.unit();
        for (flag, command) in [(tf::TRIM, cmd::TRIM), (tf::WRITE_ZEROES, cmd::WRITE_ZEROES)] {
            if session.flags & flag != 0 {
                same_with_fua(&mut session, Request::new(command, 0, unit))?;
            }
        }
    }
    Ok(())
}

/// A request that a read-only export must refuse, and should with EPERM.
fn read_only(context: &Context<'_>, make: fn(u64) -> Request) -> Check {
    if context.facts.flags & tf::READ_ONLY == 0 {
        return skip("the export is not read-only");
    }
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let request = make(session.unit().min(session.size));
        let what = request.describe();
        match session.call(request) {
            Ok(reply) => {
                ensure(reply.error != 0, || format!("{what} succeeds on a read-only export"))?;
                let name = errno::name(reply.error);
                context.should(reply.error == errno::EPERM, || format!("{what} gets {name}, not EPERM"));
                session.in_step(&what)?;
            }
            Err(Stop::Closed(_)) => return fail(format!("{what} closes the connection instead of an error")),
            Err(stop) => return Err(stop),
        }
    }
    Ok(())
}

fn read_only_write(context: &Context<'_>) -> Check {
    read_only(context, |len| Request::write(0, &pattern(9, len)))
}

fn read_only_trim(context: &Context<'_>) -> Check {
    read_only(context, |len| Request::new(cmd::TRIM, 0, len))
}

fn read_only_zeroes(context: &Context<'_>) -> Check {
    read_only(context, |len| Request::new(cmd::WRITE_ZEROES, 0, len))
}

/// Two connections of an export that promises coherence.
fn pair(context: &Context<'_>) -> Check<(Session, Session)> {
    context.needs_flag(tf::MULTI_CONN, "CAN_MULTI_CONN")?;
    Ok((writer(context, Mode::Simple)?, writer(context, Mode::Simple)?))
}

/// Writes on the first connection, lets `settle` make it visible, reads on the second; several rounds, each
/// after the second has read (and may have cached) the old bytes.
fn coherent(context: &Context<'_>, flags: u16, settle: fn(&mut Session, &mut Session) -> Check) -> Check {
    let (mut here, mut there) = pair(context)?;
    for round in 0..8 {
        there.in_step("connecting")?;
        let data = pattern(20 + round, here.unit());
        here.works(Request::write(0, &data).flags(flags))?;
        settle(&mut here, &mut there)?;
        holds(&mut there, 0, &data, "a write on the other connection")?;
    }
    Ok(())
}

fn flush_here(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FLUSH, "SEND_FLUSH")?;
    coherent(context, 0, |here, _| here.works(Request::new(cmd::FLUSH, 0, 0)).map(|_| ()))
}

fn flush_there(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FLUSH, "SEND_FLUSH")?;
    coherent(context, 0, |_, there| there.works(Request::new(cmd::FLUSH, 0, 0)).map(|_| ()))
}

fn multi_conn_fua(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FUA, "SEND_FUA")?;
    coherent(context, cf::FUA, |_, _| Ok(()))
}
