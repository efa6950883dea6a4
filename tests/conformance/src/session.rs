//! The transmission phase: requests out, replies in, and the rules every reply must keep.

use crate::haggle::Blocks;
use crate::pending::{DATA_MAX, Pending, Reply};
use crate::stop::{Check, Notes, Stop, ensure, fail};
use crate::transport::{Ending, Stream};
use crate::wire::{self, In, Out, cf, chunk, cmd, errno};
use std::collections::HashMap;

/// The kind of headers the connection negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    Simple,
    Structured,
    Extended,
}

/// Every mode, the plainest first.
pub(crate) const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A request to send.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    /// The length of the range to work on, in bytes.
    pub(crate) effect: u64,
    /// Bytes that follow the header; the header's length is theirs when there are any.
    pub(crate) payload: Vec<u8>,
    /// The cookie, or none for one of the session's own.
    pub(crate) cookie: Option<u64>,
    /// The contexts a status reply shall describe, or none for all that were negotiated.
    pub(crate) only: Option<Vec<u32>>,
    /// Leaves out the flag that extended headers want on writes.
    pub(crate) bare: bool,
}

impl Request {
    /// A request without payload.
    pub(crate) fn new(command: u16, offset: u64, effect: u64) -> Self {
        Self { command, offset, effect, ..Self::default() }
    }

    pub(crate) fn read(offset: u64, len: u64) -> Self {
        Self::new(cmd::READ, offset, len)
    }

    pub(crate) fn write(offset: u64, data: &[u8]) -> Self {
        Self { payload: data.to_vec(), ..Self::new(cmd::WRITE, offset, data.len() as u64) }
    }

    pub(crate) fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    pub(crate) fn cookie(self, cookie: u64) -> Self {
        Self { cookie: Some(cookie), ..self }
    }

    pub(crate) fn payload(self, payload: Vec<u8>) -> Self {
        Self { payload, ..self }
    }

    /// A short description for messages.
    pub(crate) fn describe(&self) -> String {
        let flags = if self.flags == 0 { String::new() } else { format!(" flags {:#x}", self.flags) };
        format!("{} {}+{}{flags}", cmd::name(self.command), self.offset, self.effect)
    }
}

/// A connection in the transmission phase.
pub(crate) struct Session {
    pub(crate) stream: Stream,
    pub(crate) mode: Mode,
    /// The size of the export in bytes.
    pub(crate) size: u64,
    /// Transmission flags.
    pub(crate) flags: u16,
    /// The advertised size constraints.
    pub(crate) blocks: Option<Blocks>,
    /// The metadata contexts negotiated: ids and names.
    pub(crate) contexts: Vec<(u32, String)>,
    pub(crate) notes: Notes,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
}

impl Session {
    pub(crate) fn new(stream: Stream, mode: Mode, (size, flags): (u64, u16), notes: Notes) -> Self {
        let (contexts, pending) = (Vec::new(), HashMap::new());
        Self {
            stream,
            mode,
            size,
            flags,
            blocks: None,
            contexts,
            notes,
            pending,
            next_cookie: 0x6d61_736f_6e00,
        }
    }

    /// Sends a request and remembers what its reply may be; returns its cookie.
    pub(crate) fn submit(&mut self, request: Request) -> Check<u64> {
        self.next_cookie += 1;
        let cookie = request.cookie.unwrap_or(self.next_cookie);
        let mut flags = request.flags;
        if self.mode == Mode::Extended && request.command == cmd::WRITE && !request.bare {
            flags |= cf::PAYLOAD_LEN;
        }
        let len = if request.payload.is_empty() { request.effect } else { request.payload.len() as u64 };
        let out = match self.mode {
            Mode::Extended => Out::new().u32(wire::EXT_REQUEST_MAGIC),
            _ => Out::new().u32(wire::REQUEST_MAGIC),
        };
        let out = out.u16(flags).u16(request.command).u64(cookie).u64(request.offset);
        let out = match (self.mode, u32::try_from(len)) {
            (Mode::Extended, _) => out.u64(len),
            (_, Ok(len)) => out.u32(len),
            (_, Err(_)) => return fail(format!("the suite cannot send {len} bytes in a compact header")),
        };
        let what = request.describe();
        if request.command != cmd::DISC {
            let contexts = request.only.unwrap_or_else(|| self.contexts.iter().map(|(id, _)| *id).collect());
            let pending = Pending::new(request.command, flags, request.offset, request.effect, contexts);
            self.pending.insert(cookie, pending);
        }
        self.stream.send(&out.bytes(&request.payload).done(), &what)?;
        Ok(cookie)
    }

    /// Receives messages until one request is answered in full.
    pub(crate) fn next(&mut self) -> Check<Reply> {
        loop {
            let magic = In(&self.stream.receive_vec(4, &self.waiting())?).u32().unwrap_or(0);
            let finished = match (magic, self.mode) {
                (wire::SIMPLE_MAGIC, Mode::Simple | Mode::Structured) => Some(self.simple()?),
                (wire::STRUCTURED_MAGIC, Mode::Structured) => self.chunk(16)?,
                (wire::EXT_REPLY_MAGIC, Mode::Extended) => self.chunk(28)?,
                (wire::SIMPLE_MAGIC | wire::STRUCTURED_MAGIC | wire::EXT_REPLY_MAGIC, mode) => {
                    return fail(format!(
                        "a reply with magic {magic:#x} although {mode:?} headers were negotiated"
                    ));
                }
                (other, _) => {
                    return fail(format!("no reply has magic {other:#x}: the stream is out of step"));
                }
            };
            if let Some(reply) = finished {
                return Ok(reply);
            }
        }
    }

    fn waiting(&self) -> String {
        let names: Vec<_> = self.pending.values().map(|pending| cmd::name(pending.command)).collect();
        match names.as_slice() {
            [] => "nothing".into(),
            [one] => one.clone(),
            many => format!("{} requests", many.len()),
        }
    }

    fn simple(&mut self) -> Check<Reply> {
        let head = self.stream.receive_vec(12, &self.waiting())?;
        let mut input = In(&head);
        let (error, cookie) = (input.u32().unwrap_or(0), input.u64().unwrap_or(0));
        let mut pending = self.take_pending(cookie)?;
        let name = cmd::name(pending.command);
        ensure(self.mode == Mode::Simple || pending.command != cmd::READ, || {
            "a simple reply to READ although structured replies were negotiated".into()
        })?;
        if error != 0 {
            pending.fails_with(error, &self.notes)?;
            return pending.finish(cookie, false);
        }
        ensure(pending.command != cmd::BLOCK_STATUS, || format!("{name} succeeds with a simple reply"))?;
        if pending.command == cmd::READ {
            let effect = pending.effect;
            ensure(effect <= DATA_MAX, || format!("READ of {effect} bytes claims success"))?;
            pending.simple_data(self.stream.receive_vec(effect as usize, &name)?);
        }
        pending.finish(cookie, false)
    }

    fn take_pending(&mut self, cookie: u64) -> Check<Pending> {
        match self.pending.remove(&cookie) {
            Some(pending) => Ok(pending),
            None => fail(format!("a reply with cookie {cookie:#x}, which no request in flight has")),
        }
    }

    /// Receives the rest of a structured or extended chunk, whose header has `len` bytes after the magic.
    fn chunk(&mut self, len: usize) -> Check<Option<Reply>> {
        let head = self.stream.receive_vec(len, &self.waiting())?;
        let mut input = In(&head);
        let (flags, kind) = (input.u16().unwrap_or(0), input.u16().unwrap_or(0));
        let cookie = input.u64().unwrap_or(0);
        let mut pending = self.take_pending(cookie)?;
        let len = if self.mode == Mode::Extended {
            let (offset, len) = (input.u64(), input.u64());
            ensure(offset == Some(pending.offset), || {
                format!("an extended reply has offset {offset:?}, the request had {}", pending.offset)
            })?;
            len.unwrap_or(u64::MAX)
        } else {
            u64::from(input.u32().unwrap_or(u32::MAX))
        };
        let most = pending.payload_max(kind);
        ensure(len <= most, || format!("a chunk of type {kind} claims {len} bytes, {most} are possible"))?;
        if let Some(blocks) = self.blocks
            && kind == chunk::OFFSET_DATA
        {
            ensure(len <= u64::from(blocks.maximum) + 8, || {
                format!("an OFFSET_DATA chunk of {len} bytes is over the advertised {}", blocks.maximum)
            })?;
        }
        let data = self.stream.receive_vec(len as usize, &cmd::name(pending.command))?;
        if pending.take(flags, kind, &data, self.mode, &self.notes)? {
            return pending.finish(cookie, true).map(Some);
        }
        self.pending.insert(cookie, pending);
        Ok(None)
    }

    /// Sends a request with nothing else in flight and receives its reply.
    pub(crate) fn call(&mut self, request: Request) -> Check<Reply> {
        let what = request.describe();
        let answered = self.submit(request).and_then(|_| self.next());
        answered.map_err(|stop| match stop {
            Stop::Closed(_) => Stop::Closed(what),
            Stop::Silent(_) => Stop::Silent(what),
            other => other,
        })
    }

    /// Sends a request that must succeed.
    pub(crate) fn works(&mut self, request: Request) -> Check<Reply> {
        let what = request.describe();
        self.call(request)?.ok(&what)
    }

    /// Sends a request that a server SHOULD refuse with one of `errors`. What else it does is noted, not
    /// failed; false when it closed the connection, which a server may do to a client that breaks rules.
    pub(crate) fn should_refuse(&mut self, request: Request, errors: &[u32]) -> Check<bool> {
        let what = request.describe();
        let wanted: Vec<_> = errors.iter().map(|&error| errno::name(error)).collect();
        let wanted = wanted.join(" or ");
        let note = match self.call(request) {
            Ok(reply) if errors.contains(&reply.error) => return Ok(true),
            Ok(reply) if reply.error == 0 => (format!("{what} succeeds, {wanted} is expected"), true),
            Ok(reply) => (format!("{what} gets {}, {wanted} is expected", errno::name(reply.error)), true),
            Err(Stop::Closed(_)) => (format!("{what} closes the connection, {wanted} is expected"), false),
            Err(stop) => return Err(stop),
        };
        self.notes.add(note.0);
        Ok(note.1)
    }

    /// As `should_refuse`, then shows that the next request is still understood.
    pub(crate) fn refuses_in_step(&mut self, request: Request, errors: &[u32]) -> Check {
        let what = request.describe();
        if self.should_refuse(request, errors)? {
            self.in_step(&what)?;
        }
        Ok(())
    }

    /// Sends a request of no effect; its outcome is free but for the connection, which SHOULD stay.
    pub(crate) fn survives(&mut self, request: Request) -> Check {
        let what = request.describe();
        match self.call(request) {
            Ok(_) => self.in_step(&what),
            Err(Stop::Closed(_)) => {
                self.notes.add(format!("{what} closes the connection"));
                Ok(())
            }
            Err(stop) => Err(stop),
        }
    }

    /// Shows that the stream is in step: a read of the first bytes works.
    pub(crate) fn in_step(&mut self, after: &str) -> Check {
        let len = self.unit().min(self.size);
        let read = self.works(Request::read(0, len));
        read.map(|_| ()).map_err(|stop| match stop {
            Stop::Fail(text) => Stop::Fail(format!("after {after}: {text}")),
            Stop::Closed(_) => Stop::Closed(format!("the request after {after}")),
            Stop::Silent(_) => Stop::Silent(format!("the request after {after}")),
            skip => skip,
        })
    }

    /// A length and alignment every server takes, in bytes.
    pub(crate) fn unit(&self) -> u64 {
        self.blocks.map_or(512, |blocks| u64::from(blocks.minimum.max(512)))
    }

    /// The longest payload of one request, in bytes: the advertised one or the default, and never over
    /// the 32 MiB that portable clients keep to.
    pub(crate) fn payload_max(&self) -> u64 {
        self.blocks.map_or(1 << 25, |blocks| u64::from(blocks.maximum).min(1 << 25))
    }

    /// Sends `NBD_CMD_DISC` and waits for the end of the connection.
    pub(crate) fn disconnect(mut self) -> Check<Ending> {
        self.submit(Request::new(cmd::DISC, 0, 0))?;
        self.stream.closed("DISC")
    }
}
