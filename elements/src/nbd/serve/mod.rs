//! The server's transmission phase: a connection as a stream of requests into a graph.

pub(super) mod carry;
pub(crate) mod dirty;
mod receive;
mod send;

use super::meta::{CHANGED_SINCE, Selected, Status, StatusQuery};
use super::server::Negotiated;
use super::stream::Stream as Socket;
use super::wire::{Command, CommandFlags, ErrorCode, ReplyStyle, ReplyTo, RequestHeader, Rules};
use blockmason::geometry::Geometry;
use blockmason::rt::Timer;
use blockmason::sched::{Admit, Budget, Permit, Stream};
use blockmason::{Answer, Data, Errno, Error, Extent, ExtentState, Extra, Flags, Op, Reply, Request};
use dirty::Maps;
use receive::{Received, Receiver};
use send::Sender;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes of requests in flight on one connection, replies that wait to be sent among them.
const CONNECTION_BYTES: u64 = 128 << 20;

/// Requests in flight on one connection.
const CONNECTION_REQUESTS: usize = 4096;

/// A client that moves less than [`PROGRESS`] for so long, while others wait for the memory that it holds, is dropped.
const PATIENCE: Duration = Duration::from_secs(10);

/// What counts as moving, in bytes: one a second would hold the memory for ever.
const PROGRESS: u64 = 64 << 10;

/// The length of the shortest run of zeros that is sent as a hole, in bytes.
const HOLE: usize = 512;

/// A connection whose handshake is done.
pub struct Connection<S> {
    socket: RefCell<Socket<S>>,
    rules: Rules,
    style: ReplyStyle,
    contexts: Vec<Selected>,
    /// Of the contexts that say what has changed.
    maps: Maps,
    receiver: RefCell<Receiver>,
    sender: RefCell<Sender>,
    budget: Arc<Budget>,
    bytes: Cell<u64>,
    requests: Cell<usize>,
    /// No more requests: the client said goodbye, broke the protocol, or the connection is gone.
    ended: Cell<bool>,
    /// Nothing can be sent any more.
    broken: Cell<bool>,
    /// Another process has got all that was received, and goes on from there, unless the gate opens here again.
    carried: Cell<bool>,
    stalled: RefCell<Option<Stalled>>,
    /// Block status of which the graph has to be asked again, for the next context.
    again: RefCell<VecDeque<(Tag, Request)>>,
}

/// Watches a client that we wait for.
struct Stalled {
    moved: u64,
    timer: Timer,
}

/// What a reply needs of its request.
pub struct Tag {
    header: RequestHeader,
    permit: Permit,
    query: Option<StatusQuery>,
    /// Block status: what the graph has said of the contexts that it knows of, in their order.
    found: Vec<Vec<Extent>>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// A connection into a disk with this budget.
    pub fn new<H>(negotiated: Negotiated<S, H>, budget: Arc<Budget>) -> Connection<S> {
        Connection {
            rules: negotiated.rules(),
            style: negotiated.style,
            contexts: negotiated.contexts,
            ..Connection::over(negotiated.stream, budget)
        }
    }

    /// Answers what has changed from these.
    pub(crate) fn with_maps(self, maps: Maps) -> Connection<S> {
        Connection { maps, ..self }
    }

    /// One that has agreed on nothing yet.
    fn over(socket: Socket<S>, budget: Arc<Budget>) -> Connection<S> {
        Connection {
            rules: Rules {
                size: 0,
                transmission: super::wire::TransmissionFlags::NONE,
                extended: false,
                contexts: false,
                max_payload: 0,
            },
            style: ReplyStyle::Simple,
            contexts: Vec::new(),
            maps: Rc::new(|_| None),
            socket: RefCell::new(socket),
            receiver: RefCell::default(),
            sender: RefCell::default(),
            budget,
            bytes: Cell::new(0),
            requests: Cell::new(0),
            ended: Cell::new(false),
            broken: Cell::new(false),
            carried: Cell::new(false),
            stalled: RefCell::default(),
            again: RefCell::default(),
        }
    }

    /// Sends what is left to send, for as long as the client takes it, and says goodbye.
    pub async fn finish(&self) {
        let goodbye = async {
            std::future::poll_fn(|task| self.poll_send(task)).await;
            if !self.broken.get() {
                // Under TLS a connection that just closes could be an attacker's doing.
                let shut =
                    |task: &mut Context<'_>| Pin::new(&mut *self.socket.borrow_mut()).poll_shutdown(task);
                let _ = std::future::poll_fn(shut).await;
            }
        };
        let _ = blockmason::rt::timeout(PATIENCE, goodbye).await;
    }

    fn is_full(&self) -> bool {
        self.bytes.get() + self.sender.borrow().len() as u64 >= CONNECTION_BYTES
            || self.requests.get() >= CONNECTION_REQUESTS
    }

    /// Admits nothing more; what is in flight is answered.
    pub fn end(&self) {
        self.ended.set(true);
    }

    fn break_off(&self, why: &dyn std::fmt::Display) {
        if !self.broken.replace(true) {
            tracing::info!("an NBD connection ends: {why}");
        }
        self.end();
    }

    fn poll_send(&self, task: &mut Context<'_>) -> Poll<()> {
        let mut sender = self.sender.borrow_mut();
        if self.broken.get() {
            sender.clear();
            return Poll::Ready(());
        }
        let mut socket = self.socket.borrow_mut();
        match sender.poll_send(Pin::new(&mut *socket), task) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(error)) => {
                self.break_off(&error);
                sender.clear();
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Drops a client that holds memory which others wait for, and moves nothing.
    fn watch_stall(&self, task: &mut Context<'_>) {
        let moved = self.receiver.borrow().moved() + self.sender.borrow().moved();
        let waits = self.receiver.borrow().awaits_payload() || !self.sender.borrow().is_empty();
        let mut stalled = self.stalled.borrow_mut();
        if !waits {
            *stalled = None;
            return;
        }
        let state = stalled.get_or_insert_with(|| Stalled { moved, timer: Timer::new(PATIENCE) });
        if moved - state.moved >= PROGRESS {
            state.moved = moved;
            state.timer.reset(PATIENCE);
        }
        if state.timer.poll(task).is_ready() {
            if self.budget.is_contended() {
                self.break_off(&"the client stalls while others wait for memory");
                task.waker().wake_by_ref();
            }
            state.timer.reset(PATIENCE);
            // Registers the timer again.
            let _ = state.timer.poll(task);
        }
    }

    /// The next thing that arrived in full.
    fn receive(&self, task: &mut Context<'_>) -> Poll<Received> {
        let mut receiver = self.receiver.borrow_mut();
        let mut socket = self.socket.borrow_mut();
        receiver.poll(Pin::new(&mut *socket), &self.rules, &self.budget, task)
    }

    /// What to do with a request: hand it to the graph, or answer it here.
    fn admit(&self, header: RequestHeader, permit: Permit, data: Data) -> Option<Admit<Tag>> {
        let mut query = None;
        if header.is_status_query() {
            match self.status_query(&header, &data) {
                Ok(parsed) => query = Some(parsed),
                Err(code) => {
                    self.answer_error(&header, code, "not a legal block status request");
                    return None;
                }
            }
        }
        let len = query.as_ref().map_or(header.len, |query| query.len);
        if len == 0 && header.command != Command::FLUSH {
            self.answer_empty(&header);
            return None;
        }
        let mut request = request(&header, len, data);
        let tag = Tag { header, permit, query, found: Vec::new() };
        if tag.header.command == Command::BLOCK_STATUS {
            let Some(place) = self.next_of_graph(&tag) else {
                self.answer_status(&tag);
                return None;
            };
            self.ask_for(&mut request, place);
        }
        self.count(&tag);
        Some(Admit::Request(tag, request))
    }

    fn count(&self, tag: &Tag) {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + tag.permit.bytes());
    }

    fn status_query(&self, header: &RequestHeader, payload: &Data) -> Result<StatusQuery, ErrorCode> {
        let query = StatusQuery::parse(&payload.to_vec(), &self.contexts)?;
        self.rules.check_range(header.command, header.offset, query.len)?;
        Ok(query)
    }

    /// The contexts that are wanted, by their places.
    fn wanted<'a>(&'a self, tag: &'a Tag) -> impl Iterator<Item = usize> + use<'a, S> {
        (0..self.contexts.len()).filter(|place| tag.query.as_ref().is_none_or(|query| query.wants(*place)))
    }

    /// The next context that is wanted, that the graph knows of, and of which it has not been asked yet.
    fn next_of_graph(&self, tag: &Tag) -> Option<usize> {
        self.wanted(tag)
            .filter(|place| !dirty::is_in_memory(&self.contexts[*place].name))
            .nth(tag.found.len())
    }

    /// Makes a request for block status one for that context.
    fn ask_for(&self, request: &mut Request, place: usize) {
        let name = &self.contexts[place].name;
        let map = name.starts_with(CHANGED_SINCE).then(|| name.clone());
        request.extra = map.map(|map| Box::new(Extra { map: Some(map), ..Extra::default() }));
    }

    /// The graph has said something of one context. Asks it of the next one, or answers.
    fn collect(&self, mut tag: Tag, extents: Vec<Extent>) {
        tag.found.push(extents);
        match self.next_of_graph(&tag) {
            // After the end nothing is asked any more: of the rest it is said that anything may have changed.
            Some(place) if !self.ended.get() => {
                let len = tag.query.as_ref().map_or(tag.header.len, |query| query.len);
                let mut request = request(&tag.header, len, Data::empty());
                self.ask_for(&mut request, place);
                self.count(&tag);
                self.again.borrow_mut().push_back((tag, request));
            }
            _ => self.answer_status(&tag),
        }
    }

    fn reply_to(&self, header: &RequestHeader) -> ReplyTo {
        ReplyTo::new(header, self.style == ReplyStyle::Extended)
    }

    fn answer_error(&self, header: &RequestHeader, code: ErrorCode, message: &str) {
        let mut sender = self.sender.borrow_mut();
        let structured = match self.style {
            ReplyStyle::Simple => false,
            // Commands without content may be answered simply, and clients expect it.
            ReplyStyle::Structured => matches!(header.command, Command::READ | Command::BLOCK_STATUS),
            ReplyStyle::Extended => true,
        };
        if structured {
            self.reply_to(header).put_error(sender.head(), true, code, message, None);
        } else {
            super::wire::put_simple_reply(sender.head(), code, header.cookie);
        }
    }

    /// Success without content.
    fn answer_done(&self, header: &RequestHeader) {
        let mut sender = self.sender.borrow_mut();
        match self.style {
            ReplyStyle::Extended => self.reply_to(header).put_none(sender.head()),
            _ => super::wire::put_simple_reply(sender.head(), ErrorCode::OK, header.cookie),
        }
    }

    /// Success of a request for no bytes.
    fn answer_empty(&self, header: &RequestHeader) {
        if header.command == Command::READ && self.style == ReplyStyle::Structured {
            self.reply_to(header).put_none(self.sender.borrow_mut().head());
        } else {
            self.answer_done(header);
        }
    }

    fn answer_read(&self, tag: Tag, data: Data) {
        let mut sender = self.sender.borrow_mut();
        let header = &tag.header;
        if data.len() as u64 != header.len {
            drop(sender);
            return self.answer_error(header, ErrorCode::IO, "a read of another length came back");
        }
        if self.style == ReplyStyle::Simple {
            super::wire::put_simple_reply(sender.head(), ErrorCode::OK, header.cookie);
            return sender.push(data, tag.permit);
        }
        let to = self.reply_to(header);
        let pieces =
            if header.flags.contains(CommandFlags::DF) { vec![(0, data.len(), false)] } else { holes(&data) };
        let last = pieces.len() - 1;
        for (ix, (start, end, hole)) in pieces.into_iter().enumerate() {
            let offset = header.offset + start as u64;
            let len = (end - start) as u32;
            if hole {
                to.put_hole(sender.head(), ix == last, offset, len);
            } else {
                to.put_data(sender.head(), ix == last, offset, len);
                sender.push(data.slice(start..end), Permit::default());
            }
        }
        sender.keep(tag.permit);
    }

    fn answer_status(&self, tag: &Tag) {
        let header = &tag.header;
        let len = tag.query.as_ref().map_or(header.len, |query| query.len);
        let one = header.flags.contains(CommandFlags::REQ_ONE);
        let extended = self.style == ReplyStyle::Extended;
        let wanted: Vec<_> = self.wanted(tag).collect();
        let mut found = tag.found.iter();
        let mut sender = self.sender.borrow_mut();
        for place in &wanted {
            let (mut status, context) = (Status::new(len, one, extended), &self.contexts[*place]);
            let range = header.offset..header.offset + len;
            if dirty::is_in_memory(&context.name) {
                let map = (self.maps)(&context.name);
                dirty::collect(&mut status, map.as_deref(), range);
            } else if let Some(extents) = found.next() {
                // All that are pushed, up to the first that is of no use.
                let _ = extents.iter().all(|extent| status.push(extent.len, status_of(extent.state)));
            } else {
                dirty::collect(&mut status, None, range);
            }
            let done = Some(place) == wanted.last();
            status.put(sender.head(), &self.reply_to(header), done, context.id);
        }
    }
}

/// The bits of `base:allocation`, or that of a map of changes.
fn status_of(state: ExtentState) -> u64 {
    let hole = if state.hole { super::meta::STATE_HOLE } else { 0 };
    let zero = if state.zero { super::meta::STATE_ZERO } else { 0 };
    u64::from(hole | zero) | if state.dirty { super::meta::STATE_DIRTY } else { 0 }
}

/// Start, end and kind of the pieces in which a read is answered: runs of known zeros are holes.
fn holes(data: &Data) -> Vec<(usize, usize, bool)> {
    let mut pieces: Vec<(usize, usize, bool)> = Vec::new();
    let mut at = 0;
    data.for_each(|segment| {
        let (start, end) = (at, at + segment.len());
        at = end;
        let hole = matches!(segment, blockmason::Segment::Zeros(len) if len >= HOLE);
        match pieces.last_mut() {
            Some(last) if last.2 == hole => last.1 = end,
            _ => pieces.push((start, end, hole)),
        }
    });
    pieces
}

/// A request for the graph.
fn request(header: &RequestHeader, len: u64, data: Data) -> Request {
    let op = match header.command {
        Command::READ => Op::Read,
        Command::WRITE => Op::Write,
        Command::FLUSH => Op::Flush,
        Command::TRIM => Op::Discard,
        Command::CACHE => Op::Cache,
        Command::WRITE_ZEROES => Op::WriteZeroes,
        _ => Op::Extents,
    };
    let mut request = Request::new(op, header.offset, len);
    let has = |flag| header.flags.contains(flag);
    if has(CommandFlags::FUA) && op.changes_data() {
        request.flags = request.flags.with(Flags::FUA);
    }
    if op == Op::WriteZeroes && !has(CommandFlags::NO_HOLE) {
        request.flags = request.flags.with(Flags::MAY_UNMAP);
    }
    if has(CommandFlags::FAST_ZERO) {
        request.flags = request.flags.with(Flags::FAST_ONLY);
    }
    if has(CommandFlags::REQ_ONE) {
        request.flags = request.flags.with(Flags::ONE);
    }
    if op == Op::Write {
        request.data = data;
    }
    request
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream for Connection<S> {
    type Tag = Tag;

    fn poll_next(&self, task: &mut Context<'_>) -> Poll<Admit<Tag>> {
        self.carried.set(false);
        loop {
            if let Some((tag, request)) = self.again.borrow_mut().pop_front() {
                return Poll::Ready(Admit::Request(tag, request));
            }
            if self.ended.get() {
                return Poll::Ready(Admit::End);
            }
            if self.is_full() {
                // Sending makes room; so does every reply, which comes with another turn.
                let _ = self.poll_send(task);
                if self.is_full() {
                    return Poll::Pending;
                }
            }
            let received = match self.receive(task) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(received) => received,
            };
            match received {
                Received::Request(header, permit, data) => {
                    if let Some(admit) = self.admit(header, permit, data) {
                        return Poll::Ready(admit);
                    }
                }
                Received::Refused(header, code) => {
                    tracing::info!(command = %header.command, offset = header.offset, len = header.len,
                        "an NBD request is refused: {code}");
                    self.answer_error(&header, code, "the request is not legal here");
                }
                Received::Goodbye => self.end(),
                Received::Broken(why) => self.break_off(&why),
            }
        }
    }

    fn poll_end(&self, task: &mut Context<'_>) -> Poll<()> {
        if self.carried.get() {
            return Poll::Pending;
        }
        if !self.ended.get() {
            let (mut receiver, mut socket) = (self.receiver.borrow_mut(), self.socket.borrow_mut());
            ready!(receiver.poll_end(Pin::new(&mut *socket), self.rules.extended, task));
        }
        self.end();
        Poll::Ready(())
    }

    fn reply(&self, tag: Tag, reply: Reply) {
        self.requests.set(self.requests.get() - 1);
        self.bytes.set(self.bytes.get() - tag.permit.bytes());
        if self.broken.get() {
            return;
        }
        match reply {
            Ok(Answer::Data(data)) if tag.header.command == Command::READ => self.answer_read(tag, data),
            Ok(Answer::Extents(extents)) if !extents.is_empty() => self.collect(tag, extents),
            Ok(Answer::Done | Answer::Text(_))
                if !matches!(tag.header.command, Command::READ | Command::BLOCK_STATUS) =>
            {
                self.answer_done(&tag.header);
            }
            Ok(_) => self.answer_error(&tag.header, ErrorCode::IO, "an answer of another kind came back"),
            Err(error) => self.answer_failure(&tag.header, &error),
        }
    }

    fn poll_flush(&self, task: &mut Context<'_>) -> Poll<()> {
        let sent = self.poll_send(task);
        self.watch_stall(task);
        sent
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    #[cold]
    fn answer_failure(&self, header: &RequestHeader, error: &Error) {
        let errno: Errno = error.errno();
        self.answer_error(header, ErrorCode::for_errno(errno, header), &error.to_string());
    }
}

/// What clients are told of a disk of this geometry.
pub fn flags_of(below: &Geometry) -> super::wire::TransmissionFlags {
    use super::wire::TransmissionFlags as T;
    let mut flags = T::HAS_FLAGS
        | T::SEND_FLUSH
        | T::SEND_FUA
        | T::SEND_TRIM
        | T::SEND_WRITE_ZEROES
        | T::SEND_FAST_ZERO
        | T::SEND_CACHE
        | T::SEND_DF
        | T::CAN_MULTI_CONN
        | T::BLOCK_STATUS_PAYLOAD;
    if below.read_only {
        flags = flags | T::READ_ONLY;
    }
    if below.rotational {
        flags = flags | T::ROTATIONAL;
    }
    flags
}
