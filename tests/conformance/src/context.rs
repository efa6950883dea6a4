//! What a test is given: the way to the server, what was found out about it, and the notes it may leave.

use crate::haggle::{Haggle, Info};
use crate::probe::Facts;
use crate::session::{Mode, Session};
use crate::stop::{Check, Notes, Stop, ensure, fail, skip};
use crate::transport::{Limits, Stream};
use crate::uri::Uri;
use crate::wire::{self, info, opt, rep, tf};
use rustls::ClientConfig;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The server under test and how to reach it.
pub(crate) struct Target {
    pub(crate) uri: Uri,
    /// TLS settings with every version and with TLS 1.2 alone; none for a plain URI.
    pub(crate) tls: Option<TlsTarget>,
    /// The time for one step.
    pub(crate) step: Duration,
    /// The time for one test.
    pub(crate) test: Duration,
    /// Whether tests may write to the export.
    pub(crate) write: bool,
}

/// How to speak TLS to the server.
pub(crate) struct TlsTarget {
    pub(crate) host: String,
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) config_12: Arc<ClientConfig>,
}

/// The surroundings of one test.
pub(crate) struct Context<'a> {
    pub(crate) target: &'a Target,
    pub(crate) facts: &'a Facts,
    pub(crate) notes: Notes,
    limits: Limits,
}

/// The export name no server should know.
pub(crate) const NO_SUCH_EXPORT: &str = "nbd-conformance: no such export";

impl<'a> Context<'a> {
    /// The surroundings of a test that starts now.
    pub(crate) fn new(target: &'a Target, facts: &'a Facts) -> Self {
        let limits = Limits { step: target.step, end: Instant::now() + target.test };
        Self { target, facts, notes: Notes::default(), limits }
    }

    /// Leaves a note about a broken SHOULD.
    pub(crate) fn note(&self, text: impl Into<String>) {
        self.notes.add(text);
    }

    /// Leaves the note unless `good`.
    pub(crate) fn should(&self, good: bool, text: impl FnOnce() -> String) {
        if !good {
            self.note(text());
        }
    }

    /// The name of the export under test.
    pub(crate) fn export(&self) -> &str {
        &self.target.uri.export
    }

    /// A connection on which nothing was said.
    pub(crate) fn open(&self) -> Check<Stream> {
        Stream::open(&self.target.uri, self.limits)
    }

    /// A connection after the greeting, without TLS.
    pub(crate) fn plain(&self) -> Check<Haggle> {
        Haggle::begin(self.open()?, 0)
    }

    /// A connection in the handshake phase, under TLS if the URI wants it.
    pub(crate) fn haggle(&self) -> Check<Haggle> {
        self.haggle_without(0)
    }

    /// As `haggle`, without the handshake flags in `without`.
    pub(crate) fn haggle_without(&self, without: u16) -> Check<Haggle> {
        let haggle = Haggle::begin(self.open()?, without)?;
        match &self.target.tls {
            None => Ok(haggle),
            Some(tls) => starttls(haggle, tls.config.clone(), &tls.host),
        }
    }

    /// A session in `mode` without metadata contexts.
    pub(crate) fn session(&self, mode: Mode) -> Check<Session> {
        self.session_with(mode, &[])
    }

    /// A session in `mode` that selected metadata contexts by `queries`.
    pub(crate) fn session_with(&self, mode: Mode, queries: &[&str]) -> Check<Session> {
        let mut haggle = self.haggle()?;
        self.negotiate(&mut haggle, mode)?;
        let contexts = if queries.is_empty() { Vec::new() } else { self.select(&mut haggle, queries)? };
        let mut session = self.go(haggle, mode)?;
        session.contexts = contexts;
        Ok(session)
    }

    /// Negotiates the headers of `mode`; skips when the server has not got them.
    pub(crate) fn negotiate(&self, haggle: &mut Haggle, mode: Mode) -> Check {
        let (option, name) = match mode {
            Mode::Simple => return Ok(()),
            Mode::Structured => (opt::STRUCTURED_REPLY, "structured replies"),
            Mode::Extended => (opt::EXTENDED_HEADERS, "extended headers"),
        };
        match haggle.ask(option, &[])?.last {
            rep::ACK => Ok(()),
            rep::ERR_UNSUP | rep::ERR_POLICY | rep::ERR_PLATFORM => skip(format!("the server has no {name}")),
            other => fail(format!("negotiating {name} gets {}", rep::name(other))),
        }
    }

    /// Selects metadata contexts; skips when the server selects none.
    pub(crate) fn select(&self, haggle: &mut Haggle, queries: &[&str]) -> Check<Vec<(u32, String)>> {
        let answer = haggle.ask(opt::SET_META, &wire::meta_data(self.export(), queries))?;
        if answer.last == rep::ERR_UNSUP || answer.last == rep::ERR_POLICY {
            return skip("the server has no metadata contexts");
        }
        ensure(answer.last == rep::ACK, || {
            format!("SET_META_CONTEXT {queries:?} gets {}", rep::name(answer.last))
        })?;
        let contexts = answer.contexts()?;
        if contexts.is_empty() {
            skip(format!("the server has no context for {queries:?}"))
        } else {
            Ok(contexts)
        }
    }

    /// Enters transmission, with `NBD_OPT_GO` if the server has it.
    pub(crate) fn go(&self, mut haggle: Haggle, mode: Mode) -> Check<Session> {
        if !self.facts.go {
            let zeroes = haggle.server_flags & wire::handshake::NO_ZEROES == 0;
            let found = haggle.export_name(self.export(), zeroes)?;
            return Ok(Session::new(haggle.stream, mode, found, self.notes.clone()));
        }
        let (last, info) = haggle.info(opt::GO, self.export(), &[info::BLOCK_SIZE])?;
        ensure(last == rep::ACK, || format!("GO gets {}", rep::name(last)))?;
        self.enter(haggle, mode, &info)
    }

    /// The session after a successful `NBD_OPT_GO` that said `info`.
    pub(crate) fn enter(&self, haggle: Haggle, mode: Mode, info: &Info) -> Check<Session> {
        let Some(found) = info.export else { return fail("GO succeeds without INFO_EXPORT") };
        let mut session = Session::new(haggle.stream, mode, found, self.notes.clone());
        session.blocks = info.blocks;
        Ok(session)
    }

    /// Every mode the server has.
    pub(crate) fn modes(&self) -> impl Iterator<Item = Mode> + Clone + '_ {
        crate::session::MODES.into_iter().filter(|&mode| self.facts.has(mode))
    }

    /// The richest of structured and extended mode; skips when there is neither.
    pub(crate) fn chunked(&self) -> Check<Mode> {
        match self.modes().filter(|&mode| mode != Mode::Simple).max() {
            Some(mode) => Ok(mode),
            None => skip("the server has neither structured replies nor extended headers"),
        }
    }

    /// Skips unless the export has a transmission flag.
    pub(crate) fn needs_flag(&self, flag: u16, name: &str) -> Check {
        if self.facts.flags & flag == 0 {
            skip(format!("the export does not advertise {name}"))
        } else {
            Ok(())
        }
    }

    /// Skips when the export is read-only.
    pub(crate) fn needs_writable(&self) -> Check {
        if self.facts.flags & tf::READ_ONLY != 0 { skip("the export is read-only") } else { Ok(()) }
    }

    /// Skips unless the export has at least `bytes`.
    pub(crate) fn needs_size(&self, bytes: u64) -> Check {
        match self.facts.size >= bytes {
            true => Ok(()),
            false => skip(format!("the export has {} bytes, {bytes} are needed", self.facts.size)),
        }
    }

    /// Skips when the server takes every export name, so that there is no unknown one.
    pub(crate) fn needs_unknown_name(&self) -> Check {
        if self.facts.any_name { skip("the server accepts every export name") } else { Ok(()) }
    }

    /// Skips when the server has no `NBD_OPT_INFO`; the test of the baseline fails for that.
    pub(crate) fn needs_go(&self) -> Check {
        if self.facts.go { Ok(()) } else { skip("the server has no INFO and GO") }
    }
}

/// Upgrades a connection to TLS.
pub(crate) fn starttls(mut haggle: Haggle, config: Arc<ClientConfig>, host: &str) -> Check<Haggle> {
    let last = haggle.ask(opt::STARTTLS, &[])?.last;
    ensure(last == rep::ACK, || format!("STARTTLS gets {}", rep::name(last)))?;
    let stream = haggle.stream.start_tls(config, host).map_err(|stop| match stop {
        Stop::Fail(text) => Stop::Fail(format!("TLS: {text}")),
        other => other,
    })?;
    Ok(Haggle { stream, ..haggle })
}
