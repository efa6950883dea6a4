//! The greeting, the client's flags, and `NBD_OPT_EXPORT_NAME`.

use super::{Case, reads};
use crate::context::{Context, NO_SUCH_EXPORT};
use crate::haggle::{Haggle, greeting};
use crate::session::{Mode, Session};
use crate::stop::{Check, Stop, ensure, skip};
use crate::wire::{self, handshake, opt, tf};

pub(super) const CASES: &[Case] = &[
    reads("handshake.greeting", "the server greets first, with both newstyle magics", magics),
    reads("handshake.fixed-newstyle", "the flag for fixed newstyle is set", fixed_newstyle),
    reads("handshake.known-flags-only", "no handshake flag is set that has no meaning", known_flags_only),
    reads("handshake.unknown-client-flag", "an unknown client flag ends the connection", unknown_client_flag),
    reads(
        "handshake.unoffered-client-flag",
        "a client flag the server did not offer ends the connection",
        unoffered_client_flag,
    ),
    reads("handshake.not-fixed-client", "a client without fixed newstyle gets its export", not_fixed_client),
    reads("export-name.zeroes", "124 zeroes follow without NO_ZEROES, then replies", export_name_zeroes),
    reads("export-name.no-zeroes", "nothing follows with NO_ZEROES but replies", export_name_no_zeroes),
    reads("export-name.unknown", "an unknown export ends the connection", export_name_unknown),
    reads("export-name.after-options", "EXPORT_NAME works after other options", export_name_after_options),
    reads(
        "export-name.structured",
        "EXPORT_NAME keeps negotiated structured replies",
        export_name_structured,
    ),
    reads("flags.has-flags", "the transmission flags have bit 0 set", has_flags),
    reads("flags.df-needs-chunks", "SEND_DF is clear without structured replies", df_needs_chunks),
    reads("flags.fast-zero-needs-zeroes", "FAST_ZERO is set only with WRITE_ZEROES", fast_zero_needs_zeroes),
    reads(
        "flags.payload-needs-extended",
        "BLOCK_STATUS_PAYLOAD is set only with extended headers",
        payload_needs_extended,
    ),
];

fn magics(context: &Context<'_>) -> Check {
    greeting(&mut context.open()?).map(|_| ())
}

fn fixed_newstyle(context: &Context<'_>) -> Check {
    let flags = greeting(&mut context.open()?)?;
    ensure(flags & handshake::FIXED_NEWSTYLE != 0, || format!("handshake flags {flags:#x}"))
}

fn known_flags_only(context: &Context<'_>) -> Check {
    let flags = greeting(&mut context.open()?)?;
    let known = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    ensure(flags & !known == 0, || format!("handshake flags {flags:#x} have unknown bits"))
}

/// Greets with `flags`, asks an option and expects the end of the connection instead of an answer.
fn flag_ends_connection(context: &Context<'_>, flags: u32) -> Check {
    let mut stream = context.open()?;
    greeting(&mut stream)?;
    let mut bytes = flags.to_be_bytes().to_vec();
    bytes.extend(wire::option_request(opt::LIST, &[]));
    match stream.send(&bytes, "the client flags") {
        Err(Stop::Closed(_)) => return Ok(()),
        sent => sent?,
    }
    stream.closed(&format!("client flags {flags:#x}")).map(|_| ())
}

fn unknown_client_flag(context: &Context<'_>) -> Check {
    let fixed = u32::from(handshake::FIXED_NEWSTYLE);
    flag_ends_connection(context, fixed | 1 << 7)?;
    flag_ends_connection(context, fixed | 1 << 31)
}

fn unoffered_client_flag(context: &Context<'_>) -> Check {
    if context.facts.handshake & handshake::NO_ZEROES != 0 {
        return skip("the server offers every flag a client can set");
    }
    flag_ends_connection(context, u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES))
}

fn not_fixed_client(context: &Context<'_>) -> Check {
    if context.target.tls.is_some() {
        return skip("TLS needs a client with fixed newstyle");
    }
    let mut haggle = context.haggle_without(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES)?;
    match haggle.export_name(context.export(), true) {
        Ok(found) => reply_follows(context, haggle, found, Mode::Simple),
        Err(Stop::Closed(_)) => {
            context.note("a client without fixed newstyle is turned away");
            Ok(())
        }
        Err(stop) => Err(stop),
    }
}

/// Shows that the next bytes after the negotiation are the reply to a request, not padding.
fn reply_follows(context: &Context<'_>, haggle: Haggle, found: (u64, u16), mode: Mode) -> Check {
    let (size, flags) = (context.facts.size, context.facts.flags);
    ensure(found.0 == size, || format!("EXPORT_NAME says {} bytes, GO said {size}", found.0))?;
    ensure(found.1 & tf::HAS_FLAGS != 0, || format!("transmission flags {:#x} lack bit 0", found.1))?;
    let differs = (found.1 ^ flags) & !tf::DF;
    context.should(differs == 0, || format!("EXPORT_NAME gives flags {:#x}, GO gave {flags:#x}", found.1));
    let mut session = Session::new(haggle.stream, mode, found, context.notes.clone());
    session.blocks = context.facts.blocks;
    session.in_step("EXPORT_NAME")
}

/// A server may insist on `NBD_OPT_GO` for its block sizes, and refuses this option by closing.
fn enter(context: &Context<'_>, mut haggle: Haggle, zeroes: bool, mode: Mode) -> Check {
    match haggle.export_name(context.export(), zeroes) {
        Ok(found) => reply_follows(context, haggle, found, mode),
        Err(Stop::Closed(_)) if context.facts.go => {
            skip("the server refuses EXPORT_NAME for an export GO opens")
        }
        Err(stop) => Err(stop),
    }
}

fn export_name_zeroes(context: &Context<'_>) -> Check {
    let haggle = context.haggle_without(handshake::NO_ZEROES)?;
    enter(context, haggle, true, Mode::Simple)
}

fn export_name_no_zeroes(context: &Context<'_>) -> Check {
    if context.facts.handshake & handshake::NO_ZEROES == 0 {
        return skip("the server does not offer NO_ZEROES");
    }
    enter(context, context.haggle()?, false, Mode::Simple)
}

fn export_name_unknown(context: &Context<'_>) -> Check {
    context.needs_unknown_name()?;
    let mut haggle = context.haggle()?;
    haggle.send(opt::EXPORT_NAME, NO_SUCH_EXPORT.as_bytes())?;
    haggle.stream.closed("EXPORT_NAME of an unknown export").map(|_| ())
}

fn zeroes_of(haggle: &Haggle) -> bool {
    haggle.server_flags & handshake::NO_ZEROES == 0
}

fn export_name_after_options(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    haggle.ask(opt::LIST, &[])?;
    haggle.in_step("LIST")?;
    let zeroes = zeroes_of(&haggle);
    enter(context, haggle, zeroes, Mode::Simple)
}

fn export_name_structured(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    let zeroes = zeroes_of(&haggle);
    enter(context, haggle, zeroes, Mode::Structured)
}

fn has_flags(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let flags = context.session(mode)?.flags;
        ensure(flags & tf::HAS_FLAGS != 0, || format!("transmission flags {flags:#x} in {mode:?} mode"))?;
    }
    Ok(())
}

fn df_needs_chunks(context: &Context<'_>) -> Check {
    let flags = context.session(Mode::Simple)?.flags;
    ensure(flags & tf::DF == 0, || format!("transmission flags {flags:#x} have SEND_DF"))
}

fn fast_zero_needs_zeroes(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let flags = context.session(mode)?.flags;
        let alone = flags & tf::FAST_ZERO != 0 && flags & tf::WRITE_ZEROES == 0;
        ensure(!alone, || format!("transmission flags {flags:#x} in {mode:?} mode"))?;
    }
    Ok(())
}

fn payload_needs_extended(context: &Context<'_>) -> Check {
    for mode in context.modes().filter(|&mode| mode != Mode::Extended) {
        let flags = context.session(mode)?.flags;
        ensure(flags & tf::STATUS_PAYLOAD == 0, || {
            format!("transmission flags {flags:#x} in {mode:?} mode")
        })?;
    }
    Ok(())
}
