//! The client's transmission phase: connections that outlive breaks.
//!
//! A [`Client`] stands for one export of one server. On every shard that talks to it lives a link: one
//! task that owns a socket, encodes what was submitted, sends it in one vectored write a turn, and wakes
//! whoever waits for the replies that came. The task ends when the client is closed.
//!
//! **When a connection breaks** (the server goes, or sends what is no legal reply), the link connects
//! again, with growing pauses, for as long as it lives. Requests without a reply are kept and sent
//! again, in their order; changes among them keep later overlapping changes waiting (the rule stands in `fence.rs`).
//! What has waited longer than the deadline fails, and then every new request at once, until there is a
//! connection again. An outage ends with the first reply, not with the handshake, so that a server that
//! accepts and breaks forever keeps nobody waiting. A disk that comes back with another size or other
//! abilities is refused: every request fails, until somebody has looked at it and calls `reconnect`.
//!
//! **What a reconnect cannot mend**: writes that were answered and not flushed when the server itself
//! died are the server's to keep or lose. Whoever in this process can write them again is told by its next
//! flush (see `losses.rs`); a guest is not, as it could only give up its disk. And a server that goes on with the requests of a connection
//! which is gone may do one of them after what was sent on the next.

mod calls;
mod fence;
mod losses;
mod receive;
mod send;
mod socket;
mod task;
#[cfg(test)]
mod tests;

use super::client::{ClientTls, Server, Wanted as Handshake, connect};
use super::handshake::BlockSizes;
use super::meta::ALLOCATION;
use super::uri::Uri;
use super::wire::{
    Command, CommandFlags, ReplyStyle, RequestHeader, TransmissionFlags, encode_request,
    encode_request_extended,
};
use blockmason::events::{Event, EventKind};
use blockmason::{Answer, Data, Error, Flags, Kind, Op, Origin, Reply, Request, Result, Shard, rt};
use calls::{Calls, Wanted};
use fence::Fence;
use losses::Losses;
use receive::{Manner, Receiver};
use send::Sender;
use socket::Socket;
use std::cell::{Cell, RefCell};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;
use task::{Answered, Link};
use tokio::sync::watch;
use tokio::time::Instant;

/// How long a server may take from the first byte to the transmission phase.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What it may take at the least, however short requests wait: a server that is well needs some time, too.
const SHORTEST: Duration = Duration::from_secs(1);

/// How long a closing client waits for what is in flight.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause before the second attempt to connect; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Where a server is and how to talk to it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Whose client it is, for events: the graph, and the element as it is called at first.
    pub owner: (String, String),
    /// The export.
    pub uri: Uri,
    /// Whether to use TLS.
    pub tls: ClientTls,
    /// How long requests wait for the server to come back. Zero: not at all.
    pub reconnect: Duration,
    /// How long the server may take for one request before the connection counts as broken.
    pub timeout: Option<Duration>,
}

/// What a server has offered. It must offer the same each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Its block sizes, if it said so.
    pub blocks: Option<BlockSizes>,
    /// How replies look.
    pub style: ReplyStyle,
    /// True if it tells what is allocated.
    pub allocation: bool,
}

impl Offer {
    fn of(server: &Server<Socket>) -> Offer {
        let Server { size, flags, blocks, style, .. } = *server;
        Offer { size, flags, blocks, style, allocation: allocation(server).is_some() }
    }
}

fn allocation(server: &Server<Socket>) -> Option<u32> {
    server.contexts.iter().find(|context| context.name == ALLOCATION).map(|context| context.id)
}

/// What is asked of all links.
#[derive(Clone, Copy, Default)]
struct Orders {
    /// Finish and leave.
    close: bool,
    /// How often somebody has asked for new connections.
    reconnect: u64,
}

/// One export of one server, shared by all shards.
pub struct Client {
    id: u64,
    target: Target,
    /// What its element is called.
    name: Mutex<String>,
    offer: Offer,
    /// The connection that told us the offer, until a link takes it.
    first: Mutex<Option<Server<Socket>>>,
    orders: watch::Sender<Orders>,
    fence: Fence,
    losses: Losses,
    /// Why nothing goes on: the disk has changed.
    changed: Mutex<Option<Error>>,
    is_changed: AtomicBool,
    links: AtomicUsize,
    connected: AtomicUsize,
    reconnects: AtomicU64,
    /// The operator was told that the server is lost, and not yet that it is back.
    is_lost: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they hold is replaced whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long an attempt to connect may take: no longer than requests wait for it.
fn handshake(target: &Target) -> Duration {
    target.reconnect.clamp(SHORTEST, HANDSHAKE)
}

/// Connects, up to the transmission phase.
async fn dial(target: &Target) -> Result<Server<Socket>> {
    let wanted = Handshake {
        export: &target.uri.export,
        style: ReplyStyle::Extended,
        contexts: &[ALLOCATION],
        tls: target.tls.clone(),
    };
    let attempt = async {
        let socket = Socket::dial(&target.uri.address).await.map_err(|error| {
            Error::new(Kind::Unavailable, format!("{} cannot be reached: {error}", target.uri))
        })?;
        connect(socket, &wanted).await.map_err(Error::from)
    };
    let late = || Error::new(Kind::Unavailable, format!("{} does not answer", target.uri));
    rt::timeout(handshake(target), attempt).await.unwrap_or_else(|| Err(late()))
}

impl Client {
    /// Connects to a server, on a thread of its own, since the caller may be part of a runtime; blocks
    /// until the handshake is done, as long as requests wait for a lost server, or ten seconds. The connection is kept for the first shard
    /// that wants one.
    pub fn new(target: Target) -> Result<Arc<Client>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let first = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                let runtime = runtime.map_err(|error| Error::io(error, "cannot make a runtime"))?;
                runtime.block_on(async {
                    let mut server = dial(&target).await?;
                    let parked = server.stream.socket_mut().park();
                    parked.map_err(|error| Error::io(error, "the connection cannot be kept"))?;
                    Ok(server)
                })
            });
            let thread = thread.map_err(|error| Error::io(error, "cannot start a thread"))?;
            thread.join().unwrap_or_else(|_| Err(Error::internal("connecting panicked")))
        })?;
        Ok(Arc::new(Client {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: Mutex::new(target.owner.1.clone()),
            target,
            offer: Offer::of(&first),
            first: Mutex::new(Some(first)),
            orders: watch::Sender::new(Orders::default()),
            fence: Fence::default(),
            losses: Losses::new(),
            changed: Mutex::default(),
            is_changed: AtomicBool::new(false),
            links: AtomicUsize::new(0),
            connected: AtomicUsize::new(0),
            reconnects: AtomicU64::new(0),
            is_lost: AtomicBool::new(false),
        }))
    }

    /// Tells the operator. Called on a shard.
    fn notice(&self, message: impl std::fmt::Display) {
        if let Some(shard) = Shard::current() {
            let event = Event::new(EventKind::Notice, &self.target.owner.0, message);
            shard.events().publish(event.of(&lock(&self.name)));
        }
    }

    /// Its element has another name from now on.
    pub fn renamed(&self, name: &str) {
        name.clone_into(&mut lock(&self.name));
    }

    /// Of all links that lose the server, the first says so.
    fn tell_lost(&self, why: &str) {
        if !self.is_lost.swap(true, Ordering::Relaxed) {
            self.notice(format!("{} is lost: {why}", self.target.uri));
        }
    }

    /// And the first that gets an answer again.
    fn tell_back(&self) {
        if self.is_lost.swap(false, Ordering::Relaxed) {
            self.notice(format!("{} answers again", self.target.uri));
        }
    }

    /// What the server offers.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// A number of this client's own.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// How many connections there are now.
    pub fn connections(&self) -> usize {
        self.connected.load(Ordering::Relaxed) + usize::from(lock(&self.first).is_some())
    }

    /// How often a connection was made anew.
    pub fn reconnects(&self) -> u64 {
        self.reconnects.load(Ordering::Relaxed)
    }

    /// One word: `connected`, `connecting`, or `changed` if the disk is not the one that it was.
    pub fn state(&self) -> &'static str {
        let links = self.links.load(Ordering::Relaxed);
        if self.is_changed.load(Ordering::Relaxed) {
            "changed"
        } else if self.connected.load(Ordering::Relaxed) < links || self.connections() == 0 {
            "connecting"
        } else {
            "connected"
        }
    }

    /// Drops every connection and makes new ones. What is in flight is sent again.
    pub fn reconnect(&self) {
        self.is_changed.store(false, Ordering::Release);
        *lock(&self.changed) = None;
        self.orders.send_modify(|orders| orders.reconnect += 1);
    }

    /// Ends every connection politely once what is in flight is answered.
    pub fn close(&self) {
        self.orders.send_modify(|orders| orders.close = true);
        let first = lock(&self.first).take();
        if let Some(mut server) = first.filter(|server| !server.stream.is_tls()) {
            let (bytes, len) = encode(server.style, &goodbye());
            server.stream.socket_mut().say(&bytes[..len]);
        }
    }

    /// Sends a request over this shard's connection, which is made when it is first needed. The request
    /// lies within the disk and keeps its block sizes. Called on a shard.
    pub fn submit(self: &Arc<Self>, shard: &Rc<Shard>, req: &Request) -> impl Future<Output = Reply> + use<> {
        let link = Link::of(self, shard);
        let begun = self.begin(&link, req);
        let flushing = (req.op == Op::Flush).then(|| self.losses.begin());
        let (client, tell) = (self.clone(), req.origin != Origin::Guest);
        async move {
            let Some((answered, flush)) = begun? else { return Ok(Answer::Done) };
            let answer = answered.await?;
            if flush {
                link.submit(Wanted::flush())?.await?;
            }
            if let Some(flushing) = flushing {
                client.losses.end(flushing, tell, &client.target.uri)?;
            }
            Ok(answer)
        }
    }

    /// Queues a request; with it comes whether a flush must follow. None if there is nothing to do.
    fn begin(&self, link: &Rc<Link>, req: &Request) -> Result<Option<(Answered, bool)>> {
        let has = |flag| self.offer.flags.contains(flag);
        if req.op == Op::Flush && !has(TransmissionFlags::SEND_FLUSH) {
            return Ok(None);
        }
        let mut wanted = wanted(req)?;
        let emulated = wanted.flags.contains(CommandFlags::FUA) && !has(TransmissionFlags::SEND_FUA);
        if emulated {
            wanted.flags = wanted.flags.without(CommandFlags::FUA);
        }
        let answered = link.submit(wanted)?;
        Ok(Some((answered, emulated && has(TransmissionFlags::SEND_FLUSH))))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

/// A request as the protocol has it.
fn wanted(req: &Request) -> Result<Wanted> {
    let command = match req.op {
        Op::Read => Command::READ,
        Op::Write => Command::WRITE,
        Op::Flush => Command::FLUSH,
        Op::Discard => Command::TRIM,
        Op::WriteZeroes => Command::WRITE_ZEROES,
        Op::Cache => Command::CACHE,
        Op::Extents => Command::BLOCK_STATUS,
        Op::Control => return Err(Error::unsupported("there is nothing to control here")),
    };
    let flag = |set: bool, flag| if set { flag } else { CommandFlags::NONE };
    let zeroes = req.op == Op::WriteZeroes;
    let flags = flag(req.is_fua() && req.op.changes_data(), CommandFlags::FUA)
        | flag(zeroes && !req.flags.has(Flags::MAY_UNMAP), CommandFlags::NO_HOLE)
        | flag(zeroes && req.flags.has(Flags::FAST_ONLY), CommandFlags::FAST_ZERO)
        | flag(req.op == Op::Extents && req.flags.has(Flags::ONE), CommandFlags::REQ_ONE);
    // It may be sent twice, and must be the same both times.
    let data = if req.op == Op::Write { req.data.stable() } else { Data::empty() };
    Ok(Wanted { command, flags, offset: req.offset, len: req.len, data })
}

fn goodbye() -> RequestHeader {
    RequestHeader { flags: CommandFlags::NONE, command: Command::DISC, cookie: 0, offset: 0, len: 0 }
}

/// A request's header: so many of these bytes. A compact one holds 32 bits of length, which the
/// framework has cut requests to.
fn encode(style: ReplyStyle, header: &RequestHeader) -> ([u8; 32], usize) {
    if style == ReplyStyle::Extended {
        let payload =
            if header.command == Command::WRITE { CommandFlags::PAYLOAD_LEN } else { CommandFlags::NONE };
        return (encode_request_extended(&RequestHeader { flags: header.flags | payload, ..*header }), 32);
    }
    let mut bytes = [0; 32];
    let compact = encode_request(header);
    debug_assert!(compact.is_some(), "a compact request is shorter than 4 GiB");
    bytes[..28].copy_from_slice(&compact.unwrap_or([0; 28]));
    (bytes, 28)
}
