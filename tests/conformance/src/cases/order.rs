//! Requests in flight, and the end of the transmission phase.

use super::write::{holds, pattern, writer};
use super::{Case, reads, writes};
use crate::context::Context;
use crate::session::{Mode, Request};
use crate::stop::{Check, Stop, ensure, fail};
use crate::wire::{cmd, errno};
use std::collections::BTreeMap;

/// Runs near the end, because servers have died of it, some a little later.
pub(super) const LAST: &[Case] = &[reads(
    "order.vanishing-client",
    "a client that vanishes with requests in flight does no harm",
    vanishing_client,
)];

pub(super) const CASES: &[Case] = &[
    reads("disc.closes", "DISC gets no reply, and the server closes the connection", disc_closes),
    reads(
        "disc.replies-first",
        "requests before DISC are answered before the connection closes",
        replies_first,
    ),
    writes("disc.writes-done", "writes before DISC are done", writes_done),
    reads("order.split-request", "a request that arrives in pieces is understood", split_request),
    writes("order.mixed", "reads and writes of different places in flight do not mix", mixed),
];

fn disc_closes(context: &Context<'_>) -> Check {
    context.modes().try_for_each(|mode| context.session(mode)?.disconnect().map(|_| ()))
}

/// Several rounds: whether a server gets its last replies out may be a matter of luck.
fn replies_first(context: &Context<'_>) -> Check {
    for mode in context.modes().cycle().take(24) {
        let mut session = context.session(mode)?;
        let len = session.unit().min(session.size);
        for _ in 0..8 {
            session.submit(Request::read(0, len))?;
        }
        session.submit(Request::new(cmd::DISC, 0, 0))?;
        for answered in 0..8 {
            match session.next() {
                Ok(reply) if reply.error == 0 => {}
                Ok(reply) => context.note(format!("a READ before DISC gets {}", errno::name(reply.error))),
                Err(Stop::Closed(_)) => {
                    return fail(format!("{mode:?} mode: {answered} of 8 reads before DISC answered"));
                }
                Err(stop) => return Err(stop),
            }
        }
        session.stream.closed("DISC")?;
    }
    Ok(())
}

/// A write that got an error need not be done; one that got no answer must be, as DISC waits for it.
fn writes_done(context: &Context<'_>) -> Check {
    let mut session = writer(context, Mode::Simple)?;
    let unit = session.unit();
    context.needs_size(8 * unit)?;
    let mut places = BTreeMap::new();
    for place in 0..8 {
        places.insert(session.submit(Request::write(place * unit, &pattern(40 + place, unit)))?, place);
    }
    session.submit(Request::new(cmd::DISC, 0, 0))?;
    for _ in 0..8 {
        match session.next() {
            Ok(reply) if reply.error == 0 => {}
            Ok(reply) => {
                places.remove(&reply.cookie);
                context.note(format!("a WRITE before DISC gets {}", errno::name(reply.error)));
            }
            Err(Stop::Closed(_)) => break,
            Err(stop) => return Err(stop),
        }
    }
    session.stream.closed("DISC")?;
    let mut session = context.session(Mode::Simple)?;
    places.into_values().try_for_each(|place| {
        holds(&mut session, place * unit, &pattern(40 + place, unit), "WRITE and DISC at once")
    })
}

fn split_request(context: &Context<'_>) -> Check {
    let mut session = context.session(Mode::Simple)?;
    let len = session.unit().min(session.size);
    let header = crate::wire::Out::new().u32(crate::wire::REQUEST_MAGIC).u16(0).u16(cmd::READ);
    let header = header.u64(7).u64(0).u32(len as u32).done();
    for piece in header.chunks(3) {
        session.stream.send(piece, "a piece of a request")?;
    }
    let reply = session.stream.receive_vec(16 + len as usize, "a request in pieces")?;
    let wanted = crate::wire::Out::new().u32(crate::wire::SIMPLE_MAGIC).u32(0).u64(7).done();
    ensure(reply[..16] == wanted, || format!("the reply starts with {:02x?}", &reply[..16]))
}

fn mixed(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = writer(context, mode)?;
        let unit = session.unit();
        context.needs_size(16 * unit)?;
        for place in 0..8 {
            session.works(Request::write(place * unit, &pattern(place, unit)))?;
        }
        let mut wanted = BTreeMap::new();
        for place in 0..8 {
            wanted.insert(session.submit(Request::read(place * unit, unit))?, Some(place));
            let data = pattern(50 + place, unit);
            wanted.insert(session.submit(Request::write((8 + place) * unit, &data))?, None);
        }
        while !wanted.is_empty() {
            let reply = session.next()?.ok("a request among others")?;
            let Some(expected) = wanted.remove(&reply.cookie) else {
                return fail("a request is answered twice");
            };
            let Some(place) = expected else { continue };
            ensure(reply.data == pattern(place, unit), || {
                format!("the read of unit {place} got other bytes")
            })?;
        }
        for place in 0..8 {
            holds(&mut session, (8 + place) * unit, &pattern(50 + place, unit), "mixed requests")?;
        }
    }
    Ok(())
}

fn vanishing_client(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut session = context.session(mode)?;
        let len = session.payload_max().min(session.size) / session.unit() * session.unit();
        for _ in 0..4 {
            session.submit(Request::read(0, len))?;
        }
        drop(session);
        context.session(mode)?.in_step("another client's end")?;
    }
    Ok(())
}
