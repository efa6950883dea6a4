//! `NBD_CMD_READ` and `NBD_CMD_CACHE`: content, chunks, DF, cookies, requests in flight together.

use super::{Case, reads};
use crate::context::Context;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, ensure, fail, skip};
use crate::wire::{cf, cmd, errno, tf};
use std::collections::BTreeMap;

/// A read without fragments of this length must be supported.
const DF_SUPPORTED: u64 = 65536;

pub(super) const CASES: &[Case] = &[
    reads("read.simple", "without negotiation reads get simple replies", simple),
    reads("read.structured", "with structured replies reads get chunks that cover the request", structured),
    reads("read.same-in-every-mode", "every kind of reply gives the same bytes", same_in_every_mode),
    reads("read.whole-chunks", "long reads keep the rules for chunks", whole_chunks),
    reads("read.last-bytes", "the last unit of the export can be read", last_bytes),
    reads("read.unaligned", "a read off the minimum block size works or gets EINVAL", unaligned),
    reads("read.df", "DF gets one content chunk, up to 65536 bytes without fail", df),
    reads("read.df-long", "DF on a long read gets one content chunk or EOVERFLOW", df_long),
    reads("read.error-simple", "a failed read has no payload in a simple reply", error_simple),
    reads("read.error-structured", "a failed read gets chunks, never a simple reply", error_structured),
    reads("read.cookies", "any cookie comes back as it was", cookies),
    reads("read.in-flight", "sixteen reads in flight are all answered, each with its bytes", in_flight),
    reads("read.zero-length", "a read of no bytes keeps the connection", zero_length),
    reads("cache.works", "CACHE succeeds or fails and changes nothing", cache_works),
    reads("cache.flags", "CACHE with a flag the server does not know is refused", cache_flags),
];

/// The length of a read that fits every export and every limit.
fn small(session: &Session) -> u64 {
    (session.unit() * 8).min(session.size).min(session.payload_max())
}

fn read_in(context: &Context<'_>, mode: Mode) -> Check {
    let mut session = context.session(mode)?;
    let len = small(&session);
    let first = session.works(Request::read(0, len))?;
    let second = session.works(Request::read(0, len))?;
    ensure(first.data.len() as u64 == len, || format!("READ of {len} bytes gives {}", first.data.len()))?;
    ensure(first.data == second.data, || "two reads of the same bytes differ".into())
}

fn simple(context: &Context<'_>) -> Check {
    read_in(context, Mode::Simple)
}

fn structured(context: &Context<'_>) -> Check {
    read_in(context, Mode::Structured)
}

fn same_in_every_mode(context: &Context<'_>) -> Check {
    let mut seen: Option<Vec<u8>> = None;
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = (1u64 << 20).min(session.size / session.unit() * session.unit()).min(session.payload_max());
        let data = session.works(Request::read(0, len))?.data;
        match &seen {
            Some(first) => ensure(*first == data, || format!("{mode:?} mode reads other bytes"))?,
            None => seen = Some(data),
        }
    }
    Ok(())
}

fn whole_chunks(context: &Context<'_>) -> Check {
    context.chunked()?;
    for mode in context.modes().filter(|&mode| mode != Mode::Simple) {
        let mut session = context.session(mode)?;
        let step = session.payload_max().min(4 << 20) / session.unit() * session.unit();
        let end = session.size.min(64 << 20) / session.unit() * session.unit();
        let mut offset = 0;
        while offset < end {
            let len = step.min(end - offset);
            session.works(Request::read(offset, len))?;
            offset += len;
        }
    }
    Ok(())
}

fn last_bytes(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let unit = session.unit();
        let start = (session.size / unit).saturating_sub(1) * unit;
        session.works(Request::read(start, unit.min(session.size)))?;
    }
    Ok(())
}

fn unaligned(context: &Context<'_>) -> Check {
    context.needs_size(4096)?;
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        if session.blocks.is_some_and(|blocks| blocks.minimum > 1) {
            session.refuses_in_step(Request::read(1, session.unit()), &[errno::EINVAL])?;
            session.refuses_in_step(Request::read(0, session.unit() - 1), &[errno::EINVAL])?;
            continue;
        }
        let whole = session.works(Request::read(0, 2048))?.data;
        for (offset, len) in [(1, 511), (511, 2), (513, 1), (1, 1030)] {
            let part = session.works(Request::read(offset, len))?.data;
            let wanted = &whole[offset as usize..(offset + len) as usize];
            ensure(part == wanted, || format!("READ {offset}+{len} gives other bytes than an aligned read"))?;
        }
    }
    Ok(())
}

/// Runs `test` in each mode that may set DF; skips when there is none.
fn each_df(context: &Context<'_>, test: impl Fn(&mut Session) -> Check) -> Check {
    let mut any = false;
    for mode in context.modes().filter(|&mode| mode != Mode::Simple) {
        let mut session = context.session(mode)?;
        if session.flags & tf::DF != 0 {
            any = true;
            test(&mut session)?;
        }
    }
    if any { Ok(()) } else { skip("the export does not advertise SEND_DF") }
}

fn df(context: &Context<'_>) -> Check {
    each_df(context, |session| {
        let unit = session.unit();
        let most = DF_SUPPORTED.min(session.size).min(session.payload_max()) / unit * unit;
        for (offset, len) in [(0, unit.min(session.size)), (0, most), (session.size / 2, most / 2)] {
            let reply =
                session.works(Request::read(offset / unit * unit, len / unit * unit).flags(cf::DF))?;
            ensure(reply.contents <= 1, || format!("{} content chunks despite DF", reply.contents))?;
        }
        Ok(())
    })
}

fn df_long(context: &Context<'_>) -> Check {
    context.needs_size(1 << 20)?;
    each_df(context, |session| {
        let len = session.size.min(session.payload_max()).min(8 << 20) / session.unit() * session.unit();
        let reply = session.call(Request::read(0, len).flags(cf::DF))?;
        let fits = [0, errno::EOVERFLOW].contains(&reply.error);
        ensure(fits, || format!("READ of {len} bytes with DF gets {}", errno::name(reply.error)))?;
        session.in_step("a long read with DF")
    })
}

/// A read beyond the end fails; the session checks the form of the reply.
fn failing_read(session: &mut Session) -> Check {
    let unit = session.unit();
    let beyond = session.size.next_multiple_of(unit) + unit;
    let reply = session.call(Request::read(beyond, unit));
    match reply {
        Ok(reply) if reply.error == 0 => fail("a read beyond the end succeeds"),
        Ok(_) => session.in_step("a failed read"),
        Err(crate::stop::Stop::Closed(_)) => {
            skip("the server closes the connection on a read beyond the end")
        }
        Err(stop) => Err(stop),
    }
}

fn error_simple(context: &Context<'_>) -> Check {
    failing_read(&mut context.session(Mode::Simple)?)
}

fn error_structured(context: &Context<'_>) -> Check {
    failing_read(&mut context.session(Mode::Structured)?)?;
    let mut session = context.session(Mode::Structured)?;
    let len = small(&session);
    session.refuses_in_step(Request::read(0, len).flags(cf::UNKNOWN), &[errno::EINVAL])
}

fn cookies(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = small(&session);
        for cookie in [0, 1, u64::MAX, 0x0102_0304_0506_0708, 0x6744_6698_668e_33ef, 0xff00_0000_0000_0000] {
            let reply = session.works(Request::read(0, len).cookie(cookie))?;
            ensure(reply.cookie == cookie, || {
                format!("cookie {cookie:#x} comes back as {:#x}", reply.cookie)
            })?;
        }
    }
    Ok(())
}

fn in_flight(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let unit = session.unit();
        let places = (session.size / unit).clamp(1, 16);
        let mut wanted = BTreeMap::new();
        for place in 0..places {
            wanted.insert(place, session.works(Request::read(place * unit, unit))?.data);
        }
        let mut sent = BTreeMap::new();
        for at in 0..16 {
            let place = at % places;
            sent.insert(session.submit(Request::read(place * unit, unit))?, place);
        }
        while !sent.is_empty() {
            let reply = session.next()?.ok("READ")?;
            let Some(place) = sent.remove(&reply.cookie) else { return fail("a request is answered twice") };
            ensure(wanted[&place] == reply.data, || format!("a read at {} got other bytes", place * unit))?;
        }
    }
    Ok(())
}

fn zero_length(context: &Context<'_>) -> Check {
    context.modes().try_for_each(|mode| context.session(mode)?.survives(Request::read(0, 0)))
}

fn cache_works(context: &Context<'_>) -> Check {
    context.needs_flag(tf::CACHE, "SEND_CACHE")?;
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = small(&session);
        let before = session.works(Request::read(0, len))?.data;
        session.call(Request::new(cmd::CACHE, 0, len))?;
        let after = session.works(Request::read(0, len))?.data;
        ensure(before == after, || "CACHE changes what is read".into())?;
    }
    Ok(())
}

fn cache_flags(context: &Context<'_>) -> Check {
    context.needs_flag(tf::CACHE, "SEND_CACHE")?;
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = small(&session);
        let reply = session.call(Request::new(cmd::CACHE, 0, len).flags(cf::UNKNOWN))?;
        ensure(reply.error != 0, || "CACHE with an unknown flag succeeds".into())?;
        session.in_step("CACHE with an unknown flag")?;
    }
    Ok(())
}
