//! `NBD_CMD_WRITE_ZEROES` and `NBD_CMD_TRIM`.

use super::write::{holds, pattern, writer};
use super::{Case, writes};
use crate::context::Context;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, ensure};
use crate::wire::{cf, cmd, errno, tf};

/// Runs near the end, because servers have died of it.
pub(super) const LAST: &[Case] =
    &[writes("zeroes.fast-unoffered", "FAST_ZERO that was not offered gets EINVAL", fast_unoffered)];

pub(super) const CASES: &[Case] = &[
    writes("zeroes.read-back", "WRITE_ZEROES reads back as zeroes", read_back),
    writes("zeroes.no-hole", "NO_HOLE is accepted and reads back as zeroes", no_hole),
    writes("zeroes.neighbours", "WRITE_ZEROES leaves its neighbours alone", neighbours),
    writes("zeroes.fast", "FAST_ZERO succeeds with zeroes or gets ENOTSUP", fast),
    writes("zeroes.not-fast", "without FAST_ZERO there is no ENOTSUP", not_fast),
    writes("zeroes.zero-length", "WRITE_ZEROES of no bytes keeps the connection", zeroes_zero_length),
    writes("zeroes.long", "WRITE_ZEROES beyond the longest payload keeps the connection", zeroes_long),
    writes("trim.works", "TRIM succeeds and the range can be written again", trim_works),
    writes("trim.neighbours", "TRIM leaves its neighbours alone", trim_neighbours),
    writes("trim.zero-length", "TRIM of no bytes keeps the connection", trim_zero_length),
    writes("trim.long", "TRIM beyond the longest payload keeps the connection", trim_long),
];

fn zeroer(context: &Context<'_>, mode: Mode) -> Check<Session> {
    context.needs_flag(tf::WRITE_ZEROES, "SEND_WRITE_ZEROES")?;
    writer(context, mode)
}

fn trimmer(context: &Context<'_>, mode: Mode) -> Check<Session> {
    context.needs_flag(tf::TRIM, "SEND_TRIM")?;
    writer(context, mode)
}

/// Fills four units, zeroes the second and third, and checks all four.
fn zero_middle(context: &Context<'_>, mode: Mode, flags: u16) -> Check {
    let mut session = zeroer(context, mode)?;
    let unit = session.unit();
    context.needs_size(4 * unit)?;
    let mut data = pattern(1, 4 * unit);
    session.works(Request::write(0, &data))?;
    session.works(Request::new(cmd::WRITE_ZEROES, unit, 2 * unit).flags(flags))?;
    data[unit as usize..3 * unit as usize].fill(0);
    holds(&mut session, 0, &data, "WRITE_ZEROES")
}

fn read_back(context: &Context<'_>) -> Check {
    context.modes().try_for_each(|mode| zero_middle(context, mode, 0))
}

fn no_hole(context: &Context<'_>) -> Check {
    context.modes().try_for_each(|mode| zero_middle(context, mode, cf::NO_HOLE))
}

fn neighbours(context: &Context<'_>) -> Check {
    let mut session = zeroer(context, Mode::Simple)?;
    context.needs_size(256 << 10)?;
    let mut data = pattern(2, 256 << 10);
    session.works(Request::write(0, &data))?;
    let unit = session.unit() as usize;
    for (start, units) in [(unit, 1), (70 << 10, 3), (128 << 10, 9)] {
        let start = start / unit * unit;
        let len = units * unit;
        session.works(Request::new(cmd::WRITE_ZEROES, start as u64, len as u64))?;
        data[start..start + len].fill(0);
    }
    holds(&mut session, 0, &data, "three WRITE_ZEROES")
}

fn fast(context: &Context<'_>) -> Check {
    context.needs_flag(tf::FAST_ZERO, "SEND_FAST_ZERO")?;
    for mode in context.modes() {
        let mut session = zeroer(context, mode)?;
        let unit = session.unit();
        let data = pattern(3, unit);
        session.works(Request::write(0, &data))?;
        let reply = session.call(Request::new(cmd::WRITE_ZEROES, 0, unit).flags(cf::FAST_ZERO))?;
        match reply.error {
            0 => holds(&mut session, 0, &vec![0; unit as usize], "WRITE_ZEROES with FAST_ZERO")?,
            errno::ENOTSUP => {
                let kept = session.works(Request::read(0, unit))?.data == data;
                context.should(kept, || "a FAST_ZERO that got ENOTSUP changed the bytes".into());
            }
            error => crate::stop::fail(format!("FAST_ZERO gets {}", errno::name(error)))?,
        }
    }
    Ok(())
}

fn not_fast(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = zeroer(context, mode)?;
        let unit = session.unit();
        for flags in [0, cf::NO_HOLE] {
            let error = session.call(Request::new(cmd::WRITE_ZEROES, 0, unit).flags(flags))?.error;
            ensure(error != errno::ENOTSUP, || format!("WRITE_ZEROES with flags {flags} gets ENOTSUP"))?;
        }
    }
    Ok(())
}

fn fast_unoffered(context: &Context<'_>) -> Check {
    if context.facts.flags & tf::FAST_ZERO != 0 {
        return crate::stop::skip("the export offers FAST_ZERO");
    }
    let mut session = zeroer(context, Mode::Simple)?;
    let unit = session.unit();
    session.refuses_in_step(Request::new(cmd::WRITE_ZEROES, 0, unit).flags(cf::FAST_ZERO), &[errno::EINVAL])
}

fn zeroes_zero_length(context: &Context<'_>) -> Check {
    zeroer(context, Mode::Simple)?.survives(Request::new(cmd::WRITE_ZEROES, 0, 0))
}

/// The whole export in one request, when that is more than a payload may be.
fn long(context: &Context<'_>, mut session: Session, command: u16) -> Check {
    let len = session.size.min(1 << 31) / session.unit() * session.unit();
    if len <= session.payload_max() {
        return crate::stop::skip("the export is not longer than a payload");
    }
    let Some(reply) = session.call(Request::new(command, 0, len)).map(Some).or_else(closed_is_none)? else {
        context.note(format!("{} of {len} bytes closes the connection", cmd::name(command)));
        return Ok(());
    };
    let fits = [0, errno::EOVERFLOW, errno::EINVAL].contains(&reply.error);
    context.should(fits, || format!("{len} bytes get {}", errno::name(reply.error)));
    if reply.error == 0 && command == cmd::WRITE_ZEROES {
        for offset in [0, len / 2 / session.unit() * session.unit(), len - session.unit()] {
            let zeroes = vec![0; session.unit() as usize];
            holds(&mut session, offset, &zeroes, "a long WRITE_ZEROES")?;
        }
    }
    session.in_step("a long request")
}

fn closed_is_none<T>(stop: crate::stop::Stop) -> Check<Option<T>> {
    match stop {
        crate::stop::Stop::Closed(_) => Ok(None),
        other => Err(other),
    }
}

fn zeroes_long(context: &Context<'_>) -> Check {
    let session = zeroer(context, Mode::Simple)?;
    long(context, session, cmd::WRITE_ZEROES)
}

fn trim_works(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = trimmer(context, mode)?;
        let unit = session.unit();
        session.works(Request::new(cmd::TRIM, 0, unit))?;
        session.works(Request::read(0, unit))?;
        let data = pattern(4, unit);
        session.works(Request::write(0, &data))?;
        holds(&mut session, 0, &data, "TRIM and WRITE")?;
    }
    Ok(())
}

fn trim_neighbours(context: &Context<'_>) -> Check {
    let mut session = trimmer(context, Mode::Simple)?;
    context.needs_size(256 << 10)?;
    let data = pattern(5, 256 << 10);
    session.works(Request::write(0, &data))?;
    let unit = session.unit();
    let (start, end) = (64u64 << 10, 128u64 << 10);
    session.works(Request::new(cmd::TRIM, start + unit, end - start - 2 * unit))?;
    holds(&mut session, 0, &data[..(start + unit) as usize], "TRIM of what follows")?;
    holds(&mut session, end - unit, &data[(end - unit) as usize..], "TRIM of what goes before")
}

fn trim_zero_length(context: &Context<'_>) -> Check {
    trimmer(context, Mode::Simple)?.survives(Request::new(cmd::TRIM, 0, 0))
}

fn trim_long(context: &Context<'_>) -> Check {
    let session = trimmer(context, Mode::Simple)?;
    long(context, session, cmd::TRIM)
}
