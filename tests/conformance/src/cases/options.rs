//! Option haggling in general: echo, unknown options, LIST, ABORT, structured replies.

use super::{Case, reads};
use crate::context::Context;
use crate::haggle::{UNKNOWN_OPTION, lying_option, server_names};
use crate::session::Mode;
use crate::stop::{Check, Stop, ensure, skip};
use crate::wire::{opt, rep};

/// Data with an unknown option: longer than any string of the protocol, short enough to be no attack.
const OVERSIZED: usize = 8 * 1024;
/// Options sent in a row. A server may call many an attack, but not as many as a thorough client needs.
const MANY: usize = 100;
const MANY_ENOUGH: usize = 16;

pub(super) const CASES: &[Case] = &[
    reads("option.unknown", "an unknown option gets ERR_UNSUP, echoing its number", unknown),
    reads("option.unknown-with-data", "the data of an unknown option is skipped", unknown_with_data),
    reads("option.withdrawn", "the withdrawn PEEK_EXPORT counts as unknown", withdrawn),
    reads("option.oversized", "8 KiB of data with an unknown option leave the stream in step", oversized),
    reads("option.huge-length", "an option that claims 4 GiB gets an error or the end", huge_length),
    reads("option.many", "many options in a row are answered one by one", many),
    reads("option.split", "an option that arrives in pieces is understood", split),
    reads("option.tls-reqd-consistent", "without forced TLS only exports may want TLS", tls_reqd_consistent),
    reads("option.abort", "ABORT gets an ACK", abort),
    reads("option.abort-data", "data with ABORT is ignored", abort_data),
    reads("option.abort-and-leave", "a client that leaves after ABORT does no harm", abort_and_leave),
    reads("option.list", "LIST gets SERVER replies and an ACK", list),
    reads("option.list-twice", "LIST leaves the session as it was", list_twice),
    reads("option.list-data", "LIST with data gets ERR_INVALID", list_data),
    reads("option.structured-reply", "STRUCTURED_REPLY gets an ACK", structured_reply),
    reads(
        "option.structured-reply-data",
        "STRUCTURED_REPLY with data gets ERR_INVALID",
        structured_reply_data,
    ),
    reads("option.structured-reply-twice", "a second STRUCTURED_REPLY does no harm", structured_reply_twice),
];

fn unknown(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    for option in [UNKNOWN_OPTION, u32::MAX, 0] {
        let last = haggle.ask(option, &[])?.last;
        ensure(last == rep::ERR_UNSUP, || format!("unknown option {option:#x} gets {}", rep::name(last)))?;
    }
    haggle.in_step("three unknown options")
}

fn unknown_with_data(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(UNKNOWN_OPTION, &[0x49; 100])?.last;
    ensure(last == rep::ERR_UNSUP, || format!("an unknown option with data gets {}", rep::name(last)))?;
    haggle.in_step("an unknown option with data")
}

fn withdrawn(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::PEEK_EXPORT, context.export().as_bytes())?.last;
    ensure(last == rep::ERR_UNSUP, || format!("PEEK_EXPORT gets {}", rep::name(last)))
}

fn oversized(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(UNKNOWN_OPTION, &[0x55; OVERSIZED])?.last;
    ensure(last & rep::ERROR_BIT != 0, || format!("an unknown option gets {}", rep::name(last)))?;
    haggle.in_step("an oversized option")
}

/// The server may call this an attack and close, or answer; it must not take the claim for success.
fn huge_length(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    haggle.stream.send(&lying_option(UNKNOWN_OPTION, u32::MAX, &[0; 64]), "an option that claims 4 GiB")?;
    match haggle.answer(UNKNOWN_OPTION) {
        Ok(answer) => {
            ensure(answer.last & rep::ERROR_BIT != 0, || format!("it gets {}", rep::name(answer.last)))
        }
        Err(Stop::Closed(_) | Stop::Silent(_)) => {
            drop(haggle);
            context.haggle()?.in_step("a new connection")
        }
        Err(stop) => Err(stop),
    }
}

fn many(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    for sent in 0..MANY {
        match haggle.in_step("an unknown option") {
            Err(Stop::Closed(_)) if sent >= MANY_ENOUGH => {
                context.note(format!("the connection closes after {sent} options"));
                return Ok(());
            }
            answered => answered?,
        }
    }
    Ok(())
}

fn split(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    for piece in crate::wire::option_request(UNKNOWN_OPTION, &[1; 9]).chunks(5) {
        haggle.stream.send(piece, "a piece of an option")?;
    }
    let last = haggle.answer(UNKNOWN_OPTION)?.last;
    ensure(last & rep::ERROR_BIT != 0, || format!("an unknown option gets {}", rep::name(last)))
}

fn tls_reqd_consistent(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    for option in [opt::LIST, opt::STRUCTURED_REPLY, UNKNOWN_OPTION, opt::LIST] {
        let last = haggle.ask(option, &[])?.last;
        ensure(last != rep::ERR_TLS_REQD, || format!("option {option:#x} gets ERR_TLS_REQD"))?;
    }
    Ok(())
}

fn abort(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::ABORT, &[])?.last;
    ensure(last == rep::ACK, || format!("ABORT gets {}", rep::name(last)))
}

fn abort_data(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::ABORT, b"bye")?.last;
    context.should(last == rep::ACK, || format!("ABORT with data gets {}", rep::name(last)));
    Ok(())
}

fn abort_and_leave(context: &Context<'_>) -> Check {
    context.haggle()?.send(opt::ABORT, &[])?;
    context.haggle()?.in_step("another client's ABORT")
}

fn list(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let answer = haggle.ask(opt::LIST, &[])?;
    if answer.last == rep::ERR_POLICY {
        return skip("the server's policy forbids LIST");
    }
    ensure(answer.last == rep::ACK, || format!("LIST gets {}", rep::name(answer.last)))?;
    server_names(&answer).map(|_| ())
}

fn list_twice(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let first = haggle.ask(opt::LIST, &[])?;
    let second = haggle.ask(opt::LIST, &[])?;
    context.should(first == second, || {
        format!("a second LIST gets {} and other replies than the first", rep::name(second.last))
    });
    haggle.in_step("LIST twice")
}

fn list_data(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::LIST, b"unwanted")?.last;
    context.should(last == rep::ERR_INVALID, || format!("LIST with data gets {}", rep::name(last)));
    haggle.in_step("LIST with data")
}

fn structured_reply(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    haggle.in_step("STRUCTURED_REPLY")?;
    context.go(haggle, Mode::Structured)?.in_step("GO")
}

fn structured_reply_data(context: &Context<'_>) -> Check {
    if !context.facts.structured {
        return skip("the server has no structured replies");
    }
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::STRUCTURED_REPLY, b"unwanted")?.last;
    context
        .should(last == rep::ERR_INVALID, || format!("STRUCTURED_REPLY with data gets {}", rep::name(last)));
    haggle.in_step("STRUCTURED_REPLY with data")
}

fn structured_reply_twice(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    let last = haggle.ask(opt::STRUCTURED_REPLY, &[])?.last;
    let allowed = [rep::ACK, rep::ERR_INVALID].contains(&last);
    ensure(allowed, || format!("the second STRUCTURED_REPLY gets {}", rep::name(last)))?;
    context.go(haggle, Mode::Structured)?.in_step("the second STRUCTURED_REPLY")
}
