//! `NBD_OPT_STARTTLS` and the three modes of a server towards TLS.

use super::{Case, reads};
use crate::context::{Context, TlsTarget, starttls};
use crate::haggle::{Haggle, UNKNOWN_OPTION, greeting};
use crate::probe::TlsMode;
use crate::session::{Mode, Request};
use crate::stop::{Check, Stop, ensure, fail, skip};
use crate::transport::Ending;
use crate::wire::{self, cmd, errno, handshake, info_data, opt, rep, tf};

pub(super) const CASES: &[Case] = &[
    reads("tls.notls-starttls", "without TLS, STARTTLS gets an error and haggling goes on", notls_starttls),
    reads("tls.starttls-not-fixed", "a client without fixed newstyle gets no TLS", starttls_not_fixed),
    reads("tls.starttls-data", "STARTTLS with data gets an error", starttls_data),
    reads("tls.forced-options", "before forced TLS, options get ERR_TLS_REQD and no items", forced_options),
    reads("tls.forced-export-name", "before forced TLS, EXPORT_NAME ends the connection", forced_export_name),
    reads(
        "tls.selective-options",
        "with TLS by choice, only INFO and GO may get ERR_TLS_REQD",
        selective_options,
    ),
    reads("tls.handshake", "after the ACK TLS starts and everything is sent over it", tls_handshake),
    reads("tls.version-12", "TLS 1.2 is supported", version_12),
    reads("tls.starttls-twice", "STARTTLS under TLS gets ERR_INVALID", starttls_twice),
    reads("tls.no-tls-reqd", "under TLS no option gets ERR_TLS_REQD", no_tls_reqd),
    reads("tls.forgets-structured", "STARTTLS forgets structured replies", forgets_structured),
    reads("tls.forgets-contexts", "STARTTLS forgets metadata contexts", forgets_contexts),
    reads("tls.failed-handshake", "a TLS handshake that fails ends the connection", failed_handshake),
    reads("tls.disc-close-notify", "DISC shuts TLS down before the connection closes", disc_close_notify),
];

fn tls<'a>(context: &Context<'a>) -> Check<&'a TlsTarget> {
    match &context.target.tls {
        Some(tls) => Ok(tls),
        None => skip("the URI does not ask for TLS"),
    }
}

fn mode(context: &Context<'_>, wanted: TlsMode) -> Check {
    let found = context.facts.tls;
    if found == wanted { Ok(()) } else { skip(format!("the TLS mode is {found:?}, not {wanted:?}")) }
}

fn notls_starttls(context: &Context<'_>) -> Check {
    mode(context, TlsMode::None)?;
    let mut haggle = context.plain()?;
    let last = haggle.ask(opt::STARTTLS, &[])?.last;
    let permitted = [rep::ERR_UNSUP, rep::ERR_POLICY, rep::ERR_PLATFORM, rep::ERR_SHUTDOWN, rep::ERR_INVALID];
    ensure(permitted.contains(&last), || format!("STARTTLS gets {}", rep::name(last)))?;
    haggle.in_step("STARTTLS")?;
    for option in [opt::LIST, opt::STRUCTURED_REPLY, UNKNOWN_OPTION] {
        let last = haggle.ask(option, &[])?.last;
        ensure(last != rep::ERR_TLS_REQD, || format!("option {option:#x} gets ERR_TLS_REQD"))?;
    }
    Ok(())
}

/// Closing is an answer too: such a client may send no option but EXPORT_NAME.
fn starttls_not_fixed(context: &Context<'_>) -> Check {
    let mut haggle = Haggle::begin(context.open()?, handshake::FIXED_NEWSTYLE)?;
    match haggle.ask(opt::STARTTLS, &[]) {
        Ok(answer) if answer.last == rep::ACK => fail("STARTTLS gets an ACK"),
        Ok(_) | Err(Stop::Closed(_)) => Ok(()),
        Err(stop) => Err(stop),
    }
}

fn starttls_data(context: &Context<'_>) -> Check {
    let mut haggle = context.plain()?;
    let last = haggle.ask(opt::STARTTLS, b"unwanted")?.last;
    context.should(last & rep::ERROR_BIT != 0, || format!("STARTTLS with data gets {}", rep::name(last)));
    match haggle.in_step("STARTTLS with data") {
        _ if last == rep::ACK => Ok(()),
        // The client broke a rule, so the server may leave.
        Err(Stop::Closed(_)) => {
            context.note("STARTTLS with data gets an error and then the end");
            Ok(())
        }
        answered => answered,
    }
}

fn forced_options(context: &Context<'_>) -> Check {
    mode(context, TlsMode::Forced)?;
    let mut haggle = context.plain()?;
    let named = info_data(context.export(), &[]);
    let options = [
        (opt::LIST, vec![]),
        (opt::INFO, named.clone()),
        (opt::GO, named),
        (opt::STRUCTURED_REPLY, vec![]),
        (UNKNOWN_OPTION, vec![1; 9]),
    ];
    for (option, data) in options {
        let answer = haggle.ask(option, &data)?;
        let last = answer.last;
        ensure(last == rep::ERR_TLS_REQD, || format!("option {option:#x} gets {}", rep::name(last)))?;
        ensure(answer.items.is_empty(), || format!("option {option:#x} gets items before ERR_TLS_REQD"))?;
    }
    Ok(())
}

fn forced_export_name(context: &Context<'_>) -> Check {
    mode(context, TlsMode::Forced)?;
    let mut haggle = context.plain()?;
    haggle.send(opt::EXPORT_NAME, context.export().as_bytes())?;
    haggle.stream.closed("EXPORT_NAME without TLS").map(|_| ())
}

fn selective_options(context: &Context<'_>) -> Check {
    mode(context, TlsMode::Selective)?;
    let mut haggle = context.plain()?;
    for option in [opt::LIST, opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS, UNKNOWN_OPTION] {
        let last = haggle.ask(option, &[])?.last;
        ensure(last != rep::ERR_TLS_REQD, || format!("option {option:#x} gets ERR_TLS_REQD"))?;
    }
    Ok(())
}

fn tls_handshake(context: &Context<'_>) -> Check {
    tls(context)?;
    context.haggle()?.in_step("STARTTLS")?;
    context.session(Mode::Simple)?.in_step("GO under TLS")
}

fn version_12(context: &Context<'_>) -> Check {
    let tls = tls(context)?;
    starttls(context.plain()?, tls.config_12.clone(), &tls.host)?.in_step("STARTTLS with TLS 1.2")
}

fn starttls_twice(context: &Context<'_>) -> Check {
    tls(context)?;
    let mut haggle = context.haggle()?;
    let last = haggle.ask(opt::STARTTLS, &[])?.last;
    ensure(last == rep::ERR_INVALID, || format!("the second STARTTLS gets {}", rep::name(last)))?;
    haggle.in_step("the second STARTTLS")
}

fn no_tls_reqd(context: &Context<'_>) -> Check {
    tls(context)?;
    let mut haggle = context.haggle()?;
    let named = info_data(context.export(), &[]);
    for (option, data) in [(opt::LIST, vec![]), (opt::STRUCTURED_REPLY, vec![]), (opt::INFO, named)] {
        let last = haggle.ask(option, &data)?.last;
        ensure(last != rep::ERR_TLS_REQD, || format!("option {option:#x} gets ERR_TLS_REQD"))?;
    }
    Ok(())
}

/// A connection that tells the server about `mode` (and a context), and upgrades to TLS only then.
fn upgraded(context: &Context<'_>, mode_before: Mode, query: Option<&str>) -> Check<Haggle> {
    let tls = tls(context)?;
    mode(context, TlsMode::Selective)?;
    let mut haggle = context.plain()?;
    context.negotiate(&mut haggle, mode_before)?;
    if let Some(query) = query {
        context.select(&mut haggle, &[query])?;
    }
    starttls(haggle, tls.config.clone(), &tls.host)
}

fn forgets_structured(context: &Context<'_>) -> Check {
    let haggle = upgraded(context, Mode::Structured, None)?;
    let mut session = context.go(haggle, Mode::Simple)?;
    ensure(session.flags & tf::DF == 0, || "SEND_DF is still set".into())?;
    session.in_step("STARTTLS after STRUCTURED_REPLY")
}

fn forgets_contexts(context: &Context<'_>) -> Check {
    let mut haggle = upgraded(context, Mode::Structured, Some(super::meta::ALLOCATION))?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    let mut session = context.go(haggle, Mode::Structured)?;
    let len = session.unit().min(session.size);
    session.refuses_in_step(Request::new(cmd::BLOCK_STATUS, 0, len), &[errno::EINVAL])
}

fn failed_handshake(context: &Context<'_>) -> Check {
    tls(context)?;
    let mut stream = context.open()?;
    greeting(&mut stream)?;
    let mut bytes = u32::from(handshake::FIXED_NEWSTYLE).to_be_bytes().to_vec();
    bytes.extend(wire::option_request(opt::STARTTLS, &[]));
    stream.send(&bytes, "STARTTLS")?;
    stream.receive_vec(20, "the ACK of STARTTLS")?;
    stream.send(&[0x4e; 64], "bytes that are not TLS")?;
    // The server may send a TLS alert first; its few bytes are read, then the end must come.
    for _ in 0..1024 {
        match stream.receive_vec(1, "the end") {
            Ok(_) => {}
            Err(Stop::Closed(_)) => return Ok(()),
            Err(Stop::Silent(_)) => return fail("the server keeps the connection open"),
            Err(stop) => return Err(stop),
        }
    }
    fail("the server goes on sending")
}

fn disc_close_notify(context: &Context<'_>) -> Check {
    tls(context)?;
    let ending = context.session(Mode::Simple)?.disconnect()?;
    ensure(ending == Ending::Orderly, || "the connection closes without close_notify".into())
}
