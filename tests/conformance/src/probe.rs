//! What is found out about a server before the tests, so that each can tell whether it applies.

use crate::context::{Context, NO_SUCH_EXPORT, Target};
use crate::haggle::{Answer, Blocks, Haggle, server_names};
use crate::session::Mode;
use crate::stop::{Check, ensure, fail};
use crate::wire::{self, handshake, info, opt, rep};

/// How a server treats TLS.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum TlsMode {
    #[default]
    None,
    Selective,
    Forced,
}

/// What the server offers, asked with the richest negotiation it takes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// Handshake flags.
    pub(crate) handshake: u16,
    pub(crate) tls: TlsMode,
    /// Whether `NBD_OPT_GO` works.
    pub(crate) go: bool,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
    /// Whether a made-up export name is accepted.
    pub(crate) any_name: bool,
    /// Export names from `NBD_OPT_LIST`.
    pub(crate) exports: Vec<String>,
    /// Metadata contexts from `NBD_OPT_LIST_META_CONTEXT`.
    pub(crate) contexts: Vec<String>,
    /// The size of the export in bytes.
    pub(crate) size: u64,
    /// Transmission flags without structured replies.
    pub(crate) flags: u16,
    pub(crate) blocks: Option<Blocks>,
}

impl Facts {
    /// Asks the server.
    pub(crate) fn probe(target: &Target) -> Check<Self> {
        let mut facts = Facts::default();
        let blank = Facts::default();
        let context = Context::new(target, &blank);
        facts.greeting(&context)?;
        if facts.tls == TlsMode::Forced && target.tls.is_none() {
            return fail("the server insists on TLS: give an nbds:// URI and --ca");
        }
        facts.options(&context);
        facts.export(&context)?;
        Ok(facts)
    }

    /// Asks what can be asked before TLS. The connection is closed again: some servers take one at a time.
    fn greeting(&mut self, context: &Context<'_>) -> Check {
        let mut plain = context.plain()?;
        self.handshake = plain.server_flags;
        if self.handshake & handshake::FIXED_NEWSTYLE == 0 {
            return fail("the server does not speak fixed newstyle; there is nothing more to test");
        }
        self.tls = tls_mode(&mut plain)?;
        Ok(())
    }

    /// Asks what is optional. A server that answers nonsense here counts as one that does not offer it; the
    /// tests of the options say what is wrong.
    fn options(&mut self, context: &Context<'_>) {
        if let Ok(list) = ask(context, &[(opt::LIST, vec![])]) {
            self.exports = server_names(&list).unwrap_or_default();
        }
        let made_up = wire::info_data(NO_SUCH_EXPORT, &[]);
        self.any_name = ask(context, &[(opt::INFO, made_up)]).is_ok();
        self.structured = ask(context, &[(opt::STRUCTURED_REPLY, vec![])]).is_ok();
        self.extended = ask(context, &[(opt::EXTENDED_HEADERS, vec![])]).is_ok();
        let first = if self.extended { opt::EXTENDED_HEADERS } else { opt::STRUCTURED_REPLY };
        let meta = wire::meta_data(context.export(), &[]);
        if let Ok(answer) = ask(context, &[(first, vec![]), (opt::LIST_META, meta)]) {
            self.contexts = answer.contexts().unwrap_or_default().into_iter().map(|(_, name)| name).collect();
        }
    }

    fn export(&mut self, context: &Context<'_>) -> Check {
        let mut haggle = context.haggle()?;
        let (last, info) = haggle.info(opt::GO, context.export(), &[info::BLOCK_SIZE])?;
        self.go = last != rep::ERR_UNSUP;
        let found = if self.go {
            ensure(last == rep::ACK, || {
                format!("GO for export '{}' gets {}", context.export(), rep::name(last))
            })?;
            self.blocks = info.blocks;
            info.export.unwrap_or_default()
        } else {
            let zeroes = self.handshake & handshake::NO_ZEROES == 0;
            haggle.export_name(context.export(), zeroes)?
        };
        (self.size, self.flags) = found;
        Ok(())
    }

    /// Whether the server has the headers of `mode`.
    pub(crate) fn has(&self, mode: Mode) -> bool {
        match mode {
            Mode::Simple => true,
            Mode::Structured => self.structured,
            Mode::Extended => self.extended,
        }
    }

    /// A length and alignment every server takes, in bytes.
    pub(crate) fn unit(&self) -> u64 {
        self.blocks.map_or(512, |blocks| u64::from(blocks.minimum.max(512)))
    }
}

/// Sends options over a new connection; the answer to the last one, if all were acknowledged.
fn ask(context: &Context<'_>, options: &[(u32, Vec<u8>)]) -> Check<Answer> {
    let mut haggle = context.haggle()?;
    let mut answer = Answer { items: Vec::new(), last: rep::ACK };
    for (option, data) in options {
        answer = haggle.ask(*option, data)?;
        ensure(answer.last == rep::ACK, || format!("option {option} gets {}", rep::name(answer.last)))?;
    }
    Ok(answer)
}

/// Tells the TLS mode from the outside: what LIST gets before TLS, and what STARTTLS gets.
fn tls_mode(plain: &mut Haggle) -> Check<TlsMode> {
    if plain.ask(opt::LIST, &[])?.last == rep::ERR_TLS_REQD {
        return Ok(TlsMode::Forced);
    }
    let last = plain.ask(opt::STARTTLS, &[])?.last;
    Ok(if last == rep::ACK { TlsMode::Selective } else { TlsMode::None })
}
