//! A connection on its way to another process.

use super::receive::Draining;
use super::{Connection, Rules};
use crate::nbd::meta::{MAX_CONTEXTS, Selected};
use crate::nbd::stream::Stream as Socket;
use crate::nbd::wire::{MAX_PAYLOAD, ReplyStyle, TransmissionFlags};
use blockmason::geometry::MAX_REQUEST;
use blockmason::sched::Budget;
use blockmason::{Data, Error, Result, Segment};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};

/// The most bytes of either direction that are believed to be on their way: what a connection may have in
/// flight, and a request beyond.
const MOST: u64 = super::CONNECTION_BYTES + 2 * MAX_REQUEST as u64;

/// What a connection has agreed on and has not done yet.
#[derive(Serialize, Deserialize)]
pub(crate) struct Carried {
    /// Bytes that the client was told.
    pub(crate) size: u64,
    /// Transmission flags that it was told.
    pub(crate) flags: u16,
    style: Style,
    contexts: Vec<(u32, String)>,
    max_payload: u32,
    /// Bytes that have arrived and not been taken up.
    #[serde(default, skip_serializing_if = "is_zero")]
    received: u64,
    /// Bytes of replies that have not been sent.
    #[serde(default, skip_serializing_if = "is_zero")]
    unsent: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    draining: Option<Draining>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Style {
    Simple,
    Structured,
    Extended,
}

impl From<ReplyStyle> for Style {
    fn from(style: ReplyStyle) -> Style {
        match style {
            ReplyStyle::Simple => Style::Simple,
            ReplyStyle::Structured => Style::Structured,
            ReplyStyle::Extended => Style::Extended,
        }
    }
}

impl From<Style> for ReplyStyle {
    fn from(style: Style) -> ReplyStyle {
        match style {
            Style::Simple => ReplyStyle::Simple,
            Style::Structured => ReplyStyle::Structured,
            Style::Extended => ReplyStyle::Extended,
        }
    }
}

fn lost(error: std::io::Error) -> Error {
    Error::io(error, "what is on its way on a connection cannot be kept")
}

/// Bytes of both directions, one behind the other.
struct Bytes(File);

impl Bytes {
    fn new() -> Result<Bytes> {
        let fd = rustix::fs::memfd_create(c"connection", MemfdFlags::CLOEXEC);
        fd.map(|fd| Bytes(File::from(fd))).map_err(|errno| lost(errno.into()))
    }

    fn put(&mut self, segment: Segment<'_>) -> std::io::Result<()> {
        match segment {
            Segment::Bytes(bytes) => self.0.write_all(bytes),
            Segment::Zeros(len) => self.0.seek(SeekFrom::Current(len as i64)).map(drop),
            Segment::Foreign(_) => Err(std::io::Error::other("a guest's memory in a reply")),
        }
    }

    fn position(&mut self) -> std::io::Result<u64> {
        self.0.stream_position()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// True if the client has left, or cannot be served any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get() || self.broken.get()
    }

    /// True under TLS, whose keys cannot be passed on.
    pub(crate) fn is_tls(&self) -> bool {
        self.socket.borrow().is_tls()
    }

    /// Looks at what it is connected by.
    pub(crate) fn with_socket<T>(&self, look: impl FnOnce(&Socket<S>) -> T) -> T {
        look(&self.socket.borrow())
    }

    /// What another process needs to go on, and the bytes that are on their way, if there are any. Nothing of
    /// the connection may be in flight.
    pub(crate) fn carry(&self) -> Result<(Carried, Option<OwnedFd>)> {
        if self.requests.get() > 0 {
            return Err(Error::internal("a connection has requests in flight behind the gate"));
        }
        // What is read from here on, the other process would miss.
        self.carried.set(true);
        let (receiver, mut sender) = (self.receiver.borrow(), self.sender.borrow_mut());
        let mut carried = Carried {
            size: self.rules.size,
            flags: self.rules.transmission.0,
            style: self.style.into(),
            contexts: self.contexts.iter().map(|context| (context.id, context.name.clone())).collect(),
            max_payload: self.rules.max_payload,
            received: 0,
            unsent: sender.len() as u64,
            draining: receiver.draining(self.rules.extended),
        };
        if receiver.is_empty() && sender.is_empty() {
            return Ok((carried, None));
        }
        let mut bytes = Bytes::new()?;
        let mut put = Ok(());
        receiver.waiting(self.rules.extended, |segment| {
            if put.is_ok() {
                put = bytes.put(segment);
            }
        });
        carried.received = bytes.position().map_err(lost)?;
        sender.unsent(|segment| {
            if put.is_ok() {
                put = bytes.put(segment);
            }
        });
        put.map_err(lost)?;
        // Zeros at the end were only skipped.
        let end = bytes.position().map_err(lost)?;
        bytes.0.set_len(end).map_err(lost)?;
        if end != carried.received + carried.unsent {
            return Err(Error::internal("a connection has other bytes on their way than it says"));
        }
        Ok((carried, Some(bytes.0.into())))
    }

    /// A connection that another process has served so far.
    ///
    /// # Errors
    /// It contradicts itself.
    pub(crate) fn resume(
        carried: Carried,
        bytes: Option<OwnedFd>,
        socket: S,
        budget: Arc<Budget>,
    ) -> Result<Connection<S>> {
        let damaged = |what: &str| Error::invalid(format!("a connection was handed over with {what}"));
        if carried.received > MOST || carried.unsent > 2 * MOST || carried.contexts.len() > MAX_CONTEXTS {
            return Err(damaged("more than one can have"));
        }
        let (mut received, mut unsent) = (Vec::new(), Vec::new());
        if carried.received + carried.unsent > 0 {
            let mut file =
                bytes.map(File::from).ok_or_else(|| damaged("bytes on their way, and none are here"))?;
            file.rewind().map_err(lost)?;
            // Memory follows what is there, not what was announced.
            let mut take = |count, to: &mut Vec<u8>| (&mut file).take(count).read_to_end(to).map_err(lost);
            take(carried.received, &mut received)?;
            take(carried.unsent, &mut unsent)?;
        }
        if received.len() as u64 != carried.received || unsent.len() as u64 != carried.unsent {
            return Err(damaged("fewer bytes on their way than it says"));
        }
        let style = ReplyStyle::from(carried.style);
        let connection = Connection {
            rules: Rules {
                size: carried.size,
                transmission: TransmissionFlags(carried.flags),
                extended: style == ReplyStyle::Extended,
                contexts: !carried.contexts.is_empty(),
                max_payload: carried.max_payload.min(MAX_PAYLOAD),
            },
            style,
            contexts: carried.contexts.into_iter().map(|(id, name)| Selected { id, name }).collect(),
            ..Connection::over(Socket::Plain(socket), budget)
        };
        connection.receiver.borrow_mut().resume(received, carried.draining, style == ReplyStyle::Extended)?;
        if !unsent.is_empty() {
            connection.sender.borrow_mut().push(Data::shared(unsent), Default::default());
        }
        Ok(connection)
    }
}
