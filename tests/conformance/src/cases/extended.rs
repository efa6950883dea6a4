//! Extended headers: negotiation, 64-bit lengths, payload lengths, filtered block status.

use super::meta::ALLOCATION;
use super::write::{holds, pattern, writer};
use super::{Case, reads, writes};
use crate::context::Context;
use crate::session::{Mode, Request, Session};
use crate::stop::{Check, Stop, ensure, fail, skip};
use crate::wire::{Out, REQUEST_MAGIC, cf, cmd, errno, info, opt, rep, tf};

/// More than a compact header can say.
const OVER_32_BITS: u64 = (1 << 32) + (1 << 20);

/// The very last test, because servers have died of it.
pub(super) const LAST: &[Case] = &[reads(
    "extended.filter-unoffered",
    "a filter that was not offered is skipped, with EINVAL",
    filter_unoffered,
)];

pub(super) const CASES: &[Case] = &[
    reads("extended.negotiate", "EXTENDED_HEADERS gets an ACK, and GO works after it", negotiate),
    reads("extended.data", "EXTENDED_HEADERS with data gets ERR_INVALID", data),
    reads("extended.after-structured", "EXTENDED_HEADERS works after structured replies", after_structured),
    reads(
        "extended.before-structured",
        "STRUCTURED_REPLY after extended headers is turned down",
        before_structured,
    ),
    reads("extended.go-not-unsup", "GO after extended headers never gets ERR_UNSUP", go_not_unsup),
    reads("extended.read", "reads get extended chunks that echo cookie and offset", read),
    reads("extended.every-reply", "replies without payload are extended too", every_reply),
    writes("extended.write", "writes get extended replies and are read back", write),
    writes("extended.write-bare", "a write without PAYLOAD_LEN has no payload and gets EINVAL", write_bare),
    reads("extended.payload-on-read", "a payload on READ is skipped, with EINVAL", payload_on_read),
    reads("extended.payload-on-unknown", "a payload on an unknown command is skipped", payload_on_unknown),
    reads("extended.payload-too-long", "a payload over the limit ends the connection", payload_too_long),
    reads("extended.long-read", "a read of more than 4 GiB is refused in step or answered", long_read),
    reads("extended.status", "BLOCK_STATUS gets descriptors of 64 bits", status),
    reads("extended.status-long", "BLOCK_STATUS takes lengths over 4 GiB", status_long),
    writes("extended.zeroes-long", "WRITE_ZEROES takes lengths over 4 GiB", zeroes_long),
    writes("extended.trim-long", "TRIM takes lengths over 4 GiB", trim_long),
    reads("extended.filter", "BLOCK_STATUS with a payload answers for the contexts named", filter),
    reads("extended.filter-broken", "unknown, doubled or cut context ids get EINVAL", filter_broken),
    reads("extended.filter-flag", "the filter is not offered without contexts", filter_flag),
    reads("extended.compact-magic", "a compact request is not answered with success", compact_magic),
];

fn session(context: &Context<'_>) -> Check<Session> {
    context.session(Mode::Extended)
}

fn needs(context: &Context<'_>) -> Check {
    if context.facts.extended { Ok(()) } else { skip("the server has no extended headers") }
}

fn negotiate(context: &Context<'_>) -> Check {
    session(context)?.in_step("EXTENDED_HEADERS and GO")
}

fn data(context: &Context<'_>) -> Check {
    needs(context)?;
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::EXTENDED_HEADERS, b"unwanted")?.last;
    context
        .should(last == rep::ERR_INVALID, || format!("EXTENDED_HEADERS with data gets {}", rep::name(last)));
    haggle.in_step("EXTENDED_HEADERS with data")
}

fn after_structured(context: &Context<'_>) -> Check {
    needs(context)?;
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    context.negotiate(&mut haggle, Mode::Extended)?;
    context.go(haggle, Mode::Extended)?.in_step("EXTENDED_HEADERS after STRUCTURED_REPLY")
}

fn before_structured(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Extended)?;
    let last = haggle.ask(opt::STRUCTURED_REPLY, &[])?.last;
    context.should(last == rep::ERR_EXT_HEADER_REQD, || {
        format!("STRUCTURED_REPLY after EXTENDED_HEADERS gets {}", rep::name(last))
    });
    context.go(haggle, Mode::Extended)?.in_step("STRUCTURED_REPLY after EXTENDED_HEADERS")
}

fn go_not_unsup(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Extended)?;
    for option in [opt::INFO, opt::GO] {
        let (last, _) = haggle.info(option, context.export(), &[info::BLOCK_SIZE])?;
        ensure(last != rep::ERR_UNSUP, || format!("option {option} gets ERR_UNSUP"))?;
    }
    Ok(())
}

fn read(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let unit = session.unit();
    for offset in [0, session.size / 2 / unit * unit, (session.size / unit).saturating_sub(1) * unit] {
        let len = unit.min(session.size);
        let reply = session.works(Request::read(offset, len).cookie(offset ^ u64::MAX))?;
        ensure(reply.data.len() as u64 == len, || format!("READ {offset}+{len} gives {}", reply.data.len()))?;
    }
    Ok(())
}

fn every_reply(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let len = session.unit().min(session.size);
    for (flag, command, effect) in [(tf::FLUSH, cmd::FLUSH, 0), (tf::CACHE, cmd::CACHE, len)] {
        if session.flags & flag != 0 {
            session.call(Request::new(command, 0, effect))?;
        }
    }
    // An error too, and one whose offset is not zero.
    let beyond = session.size.next_multiple_of(session.unit());
    session.refuses_in_step(Request::read(beyond, len), &[errno::EINVAL])
}

fn write(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Extended)?;
    let data = pattern(1, session.unit());
    session.works(Request::write(0, &data))?;
    holds(&mut session, 0, &data, "WRITE")
}

/// By the header there is no payload. The client breaks a rule, so what the server does is open; but one that
/// waits for a payload trusts the command more than the header.
fn write_bare(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Extended)?;
    let request = Request { bare: true, ..Request::new(cmd::WRITE, 0, session.unit()) };
    match session.refuses_in_step(request, &[errno::EINVAL]) {
        Err(Stop::Silent(_)) => {
            context.note("a WRITE without PAYLOAD_LEN makes the server wait for a payload");
            Ok(())
        }
        other => other,
    }
}

fn payload_on_read(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let len = session.unit().min(session.size);
    let request = Request::read(0, len).flags(cf::PAYLOAD_LEN).payload(vec![0x25; len as usize]);
    session.refuses_in_step(request, &[errno::EINVAL])
}

fn payload_on_unknown(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let request = Request::new(0x4d42, 0, 0).flags(cf::PAYLOAD_LEN).payload(vec![0x60; 4096]);
    session.refuses_in_step(request, &[errno::EINVAL])
}

fn payload_too_long(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    session.submit(Request::new(0x4d42, 0, 1 << 40).flags(cf::PAYLOAD_LEN))?;
    match session.next() {
        Err(Stop::Closed(_)) => Ok(()),
        Err(Stop::Silent(_)) => {
            context.note("a payload of 1 TiB is awaited");
            Ok(())
        }
        Ok(reply) => {
            context.note(format!("a payload of 1 TiB gets {}", errno::name(reply.error)));
            ensure(reply.error != 0, || "a request whose payload never came succeeds".into())
        }
        Err(stop) => Err(stop),
    }
}

fn long_read(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let fits = session.size > OVER_32_BITS;
    if fits {
        // The server may send all of it; that is too much to ask for in a test.
        return skip("the export is so large that the read might succeed");
    }
    session.refuses_in_step(Request::read(0, OVER_32_BITS), &[errno::EINVAL, errno::EOVERFLOW])
}

fn status(context: &Context<'_>) -> Check {
    let mut session = context.session_with(Mode::Extended, &[ALLOCATION])?;
    let len = session.size / session.unit() * session.unit();
    let reply = session.works(Request::new(cmd::BLOCK_STATUS, 0, len))?;
    let high = reply.statuses.iter().flat_map(|(_, extents)| extents).any(|(_, flags)| flags >> 32 != 0);
    ensure(!high, || "base:allocation sets flags above bit 31".into())
}

fn status_long(context: &Context<'_>) -> Check {
    let mut session = context.session_with(Mode::Extended, &[ALLOCATION])?;
    let request = |len| Request::new(cmd::BLOCK_STATUS, 0, len);
    if session.size < OVER_32_BITS {
        return session.refuses_in_step(request(OVER_32_BITS), &[errno::EINVAL]);
    }
    session.works(request(session.size / session.unit() * session.unit())).map(|_| ())
}

/// A request over more than 4 GiB; what it did is returned with the session.
fn long(context: &Context<'_>, flag: u16, name: &str, command: u16) -> Check<(Session, u32)> {
    context.needs_flag(flag, name)?;
    let mut session = writer(context, Mode::Extended)?;
    let request = Request::new(command, 0, OVER_32_BITS);
    if session.size < OVER_32_BITS {
        session.refuses_in_step(request, &[errno::EINVAL, errno::ENOSPC, errno::EOVERFLOW])?;
        return Ok((session, errno::EINVAL));
    }
    session.works(Request::write(OVER_32_BITS - session.unit(), &pattern(3, session.unit())))?;
    let error = session.call(request)?.error;
    let fits = [0, errno::EOVERFLOW, errno::EINVAL].contains(&error);
    context.should(fits, || format!("a length over 4 GiB gets {}", errno::name(error)));
    session.in_step("a length over 4 GiB")?;
    Ok((session, error))
}

fn zeroes_long(context: &Context<'_>) -> Check {
    let (mut session, error) = long(context, tf::WRITE_ZEROES, "SEND_WRITE_ZEROES", cmd::WRITE_ZEROES)?;
    if error != 0 {
        return Ok(());
    }
    let unit = session.unit();
    for offset in [0, 1 << 31, OVER_32_BITS - unit] {
        holds(&mut session, offset, &vec![0; unit as usize], "WRITE_ZEROES over 4 GiB")?;
    }
    Ok(())
}

fn trim_long(context: &Context<'_>) -> Check {
    long(context, tf::TRIM, "SEND_TRIM", cmd::TRIM).map(|_| ())
}

/// The payload of a filtered block status: a length of its own and the ids.
fn filter_payload(effect: u64, ids: &[u32]) -> Vec<u8> {
    ids.iter().fold(Out::new().u64(effect), |out, &id| out.u32(id)).done()
}

/// A filtered block status over the first unit for the contexts `ids`.
fn filtered(session: &Session, ids: &[u32]) -> Request {
    let effect = session.unit().min(session.size);
    let request = Request::new(cmd::BLOCK_STATUS, 0, effect).flags(cf::PAYLOAD_LEN);
    Request { only: Some(ids.to_vec()), ..request.payload(filter_payload(effect, ids)) }
}

/// A session with every context of the server.
fn with_contexts(context: &Context<'_>) -> Check<Session> {
    needs(context)?;
    let all: Vec<_> = context.facts.contexts.iter().map(String::as_str).collect();
    if all.is_empty() {
        skip("the server lists no metadata contexts")
    } else {
        context.session_with(Mode::Extended, &all)
    }
}

fn filter(context: &Context<'_>) -> Check {
    let mut session = with_contexts(context)?;
    if session.flags & tf::STATUS_PAYLOAD == 0 {
        return skip("the export does not advertise BLOCK_STATUS_PAYLOAD");
    }
    let ids: Vec<_> = session.contexts.iter().map(|(id, _)| *id).collect();
    for id in &ids {
        session.works(filtered(&session, &[*id]))?;
    }
    session.works(filtered(&session, &ids))?;
    session.in_step("a filtered BLOCK_STATUS")
}

fn filter_broken(context: &Context<'_>) -> Check {
    let mut session = with_contexts(context)?;
    if session.flags & tf::STATUS_PAYLOAD == 0 {
        return skip("the export does not advertise BLOCK_STATUS_PAYLOAD");
    }
    let known = session.contexts[0].0;
    let unknown = (0..).find(|id| !session.contexts.iter().any(|(known, _)| known == id)).unwrap_or(0);
    let cut = filtered(&session, &[known]);
    let cut = Request { payload: cut.payload[..11].to_vec(), ..cut };
    let short = Request { payload: vec![0; 4], ..cut.clone() };
    let requests = [
        ("an unknown id", filtered(&session, &[unknown])),
        ("one id twice", filtered(&session, &[known, known])),
    ];
    for (what, request) in requests.into_iter().chain([("a cut id", cut), ("no effect length", short)]) {
        refused(&mut session, request, what)?;
    }
    Ok(())
}

/// A request that must get EINVAL and leave the stream in step.
fn refused(session: &mut Session, request: Request, what: &str) -> Check {
    match session.call(request)?.error {
        errno::EINVAL => session.in_step(what),
        0 => fail(format!("{what} succeeds")),
        error => fail(format!("{what} gets {}", errno::name(error))),
    }
}

fn filter_unoffered(context: &Context<'_>) -> Check {
    needs(context)?;
    let mut session = session(context)?;
    if session.flags & tf::STATUS_PAYLOAD != 0 {
        return skip("the export advertises BLOCK_STATUS_PAYLOAD");
    }
    let request = filtered(&session, &[0]);
    refused(&mut session, request, "a filter that was not offered")
}

fn filter_flag(context: &Context<'_>) -> Check {
    let flags = session(context)?.flags;
    context.should(flags & tf::STATUS_PAYLOAD == 0, || "BLOCK_STATUS_PAYLOAD is set without contexts".into());
    Ok(())
}

fn compact_magic(context: &Context<'_>) -> Check {
    let mut session = session(context)?;
    let len = session.unit().min(session.size) as u32;
    let header = Out::new().u32(REQUEST_MAGIC).u16(0).u16(cmd::READ).u64(9).u64(0).u32(len).u32(0).done();
    session.stream.send(&header, "a compact request")?;
    match session.stream.receive_vec(8, "a compact request") {
        Ok(head) if super::refuse::tells_error(&head) => Ok(()),
        Err(Stop::Closed(_)) => Ok(()),
        Err(Stop::Silent(_)) => {
            context.note("a compact request keeps the connection open");
            Ok(())
        }
        Err(stop) => Err(stop),
        Ok(_) => fail("a compact request is answered although extended headers were negotiated"),
    }
}
