//! A queue of a device as a stream of requests into a graph.

use super::blk::{self, Job, Range};
use super::chain::{Chain, Pieces};
use super::device::{Claim, Device};
use super::fault;
use super::polling::Polling;
use super::port::{Logs, Port};
use super::ring::Ring;
use blockmason::data::Foreign;
use blockmason::sched::{Admit, Permit, Served, Stream, serve};
use blockmason::{Answer, Data, Flags, Kind, Op, Reply, Request, Segment};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::pin::pin;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};

/// Memory that requests may make elements use is taken from the disk's budget in steps of so many bytes: one lock for
/// many requests.
const STEP: u64 = 1 << 20;

/// What a request costs of the budget that moves so many bytes. One that moves none has a place in the graph, too.
fn cost(bytes: u64) -> u64 {
    bytes.max(512)
}

/// Everything that a queue starts with.
pub(crate) struct Start {
    pub(crate) index: usize,
    pub(crate) device: Arc<Device>,
    pub(crate) claim: Arc<Claim>,
    pub(crate) port: Port,
    pub(crate) kick: OwnedFd,
    pub(crate) err: Option<Arc<OwnedFd>>,
    pub(crate) rules: Rules,
    pub(crate) enabled: bool,
}

/// What was negotiated, as far as a queue cares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) indirect: bool,
    /// The driver knows flushes: without them every write is durable when it is answered.
    pub(crate) flush: bool,
    pub(crate) poll: Duration,
}

/// What a session tells a running queue.
pub(crate) enum Command {
    Call(Option<Arc<OwnedFd>>),
    Err(Option<Arc<OwnedFd>>),
    Enable(bool),
    /// Answered when that is so.
    Logs(Logs, oneshot::Sender<()>),
    /// Take nothing more. Answered with the place that comes next when nothing is in flight.
    Pause(oneshot::Sender<u16>),
    /// Go on, in other memory if there is some.
    Resume(Option<Ring>),
    /// Take nothing more, ever. Answered as a pause is.
    Stop(oneshot::Sender<u16>),
    /// Behind a closed gate: where would another process go on?
    Carry(oneshot::Sender<Option<Position>>),
}

/// Where another process goes on with a queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Position {
    /// The place in the available ring that comes next.
    pub(crate) next: u16,
    /// Requests that were taken and that the graph has never seen.
    pub(crate) again: Vec<u16>,
    /// It makes no sense any more.
    pub(crate) broken: bool,
}

/// What a queue tells its session.
#[derive(Debug)]
pub(crate) enum News {
    /// It serves no longer: the disk closes, or the source is gone.
    Ended(Served),
    /// It cannot serve: memory that it needs was taken away, or a descriptor is of no use.
    Lost,
}

/// Where news go, with the queue's number.
pub(crate) type Reporter = mpsc::UnboundedSender<(usize, News)>;

/// Serves a queue until it is stopped, or whoever has `commands` is gone. Runs on a shard.
pub(crate) async fn run(start: Start, mut commands: mpsc::UnboundedReceiver<Command>, news: Reporter) {
    let (index, device) = (start.index, start.device.clone());
    let _attending = device.disk.attend();
    // Whoever is told may have gone.
    let tell = |what| drop(news.send((index, what)));
    let queue = match Queue::new(start, news.clone()) {
        Ok(queue) => queue,
        Err(error) => {
            tracing::warn!(export = device.source, queue = index, "its kicks cannot be waited for: {error}");
            return tell(News::Lost);
        }
    };
    let mut serving = pin!(serve(&device.disk, &device.source, &queue));
    let mut connected = true;
    let served = loop {
        tokio::select! {
            biased;
            command = commands.recv(), if connected => match command {
                Some(command) => queue.state.borrow_mut().command(command),
                None => {
                    connected = false;
                    queue.state.borrow_mut().abandon();
                }
            },
            served = &mut serving => break served,
        }
    };
    match served {
        Ok(served) => tell(News::Ended(served)),
        Err(error) => {
            tracing::warn!(export = device.source, queue = index, "the queue cannot be served: {error}");
            tell(News::Lost);
        }
    }
}

/// What answers a request of the driver.
pub(crate) struct Tag {
    head: u16,
    status: NonNull<u8>,
    /// Of a read: where its data goes.
    dest: Data,
    len: u64,
    /// Of one that is made of several.
    group: Option<Rc<Group>>,
}

/// A request of several ranges.
struct Group {
    left: Cell<usize>,
    status: Cell<u8>,
}

struct Queue {
    index: usize,
    device: Arc<Device>,
    kick: AsyncFd<OwnedFd>,
    rules: Rules,
    news: Reporter,
    state: RefCell<State>,
}

struct State {
    port: Port,
    err: Option<Arc<OwnedFd>>,
    chain: Chain,
    enabled: bool,
    paused: bool,
    /// It makes no sense any more.
    broken: bool,
    /// Takes nothing more, ever.
    ended: bool,
    /// The front-end has gone: the guest's memory is the business of whoever serves the queue next.
    abandoned: bool,
    /// Requests of the driver that were taken and are not completed.
    taken: usize,
    /// Requests in the graph, and their bytes.
    admitted: usize,
    bytes: u64,
    /// Requests that were taken and are not in the graph yet.
    ready: VecDeque<(Tag, Request)>,
    reserve: Permit,
    /// Told when nothing is in flight.
    waiting: Vec<oneshot::Sender<u16>>,
    /// How many mappings of this process had been lost when we looked last.
    lost: usize,
    claim: Option<Arc<Claim>>,
    polling: Polling,
}

impl State {
    fn command(&mut self, command: Command) {
        match command {
            Command::Call(call) => self.port.set_call(call),
            Command::Err(err) => self.err = err,
            Command::Enable(enabled) => self.enabled = enabled,
            Command::Logs(logs, done) => {
                self.port.set_logs(logs);
                // Whoever waited may have gone.
                let _ = done.send(());
            }
            Command::Pause(answer) => {
                self.paused = true;
                self.waiting.push(answer);
            }
            Command::Resume(ring) => {
                ring.into_iter().for_each(|ring| self.port.move_to(ring));
                self.paused = false;
            }
            Command::Stop(answer) => {
                self.ended = true;
                self.waiting.push(answer);
            }
            // Whoever asks may have gone.
            Command::Carry(answer) => drop(answer.send(self.position())),
        }
        self.settle();
    }

    /// None if requests are in the graph.
    fn position(&mut self) -> Option<Position> {
        if self.admitted > 0 {
            return None;
        }
        self.port.publish();
        let mut again: Vec<_> = self.ready.iter().map(|(tag, _)| tag.head).collect();
        // Neighbours are parts of one request.
        again.dedup();
        again.extend(self.port.not_taken_again());
        Some(Position { next: self.port.next(), again, broken: self.broken })
    }

    /// The front-end has gone. What is in the graph runs to its end; whoever serves the queue next executes again
    /// what was not published.
    fn abandon(&mut self) {
        (self.ended, self.abandoned) = (true, true);
        self.ready.clear();
        self.port.forget();
        self.settle();
    }

    /// Tells whoever waits for nothing to be in flight, if that is so.
    fn settle(&mut self) {
        let in_flight = if self.abandoned { self.admitted } else { self.taken };
        if in_flight > 0 {
            return;
        }
        let next = self.port.next();
        for answer in self.waiting.drain(..) {
            // Whoever waited may have gone.
            let _ = answer.send(next);
        }
        if self.ended {
            self.claim = None;
        }
    }

    /// Answers a request of the driver.
    #[inline]
    fn finish(&mut self, head: u16, status: NonNull<u8>, code: u8, written: u32, moved: u64) {
        self.taken -= 1;
        if self.abandoned {
            return;
        }
        // SAFETY: the byte is in the guest's memory, which the ring keeps mapped.
        unsafe { status.as_ptr().write_volatile(code) };
        self.port.mark(status, 1);
        self.port.complete(head, written + 1, moved);
    }

    /// Memory that was taken for requests and is of no use now goes to others.
    fn give_back(&mut self) {
        if self.admitted == 0 && self.reserve.bytes() > 0 {
            self.reserve = Permit::default();
        }
    }
}

impl Queue {
    fn new(start: Start, news: Reporter) -> std::io::Result<Queue> {
        // SAFETY: the descriptor is open for as long as the AsyncFd owns it.
        let kick = unsafe { AsyncFd::register_with_interest(start.kick, tokio::io::Interest::READABLE)? };
        start.port.ask_for_no_kick();
        let state = State {
            port: start.port,
            err: start.err,
            chain: Chain::default(),
            enabled: start.enabled,
            paused: false,
            broken: false,
            ended: false,
            abandoned: false,
            taken: 0,
            admitted: 0,
            bytes: 0,
            ready: VecDeque::new(),
            reserve: Permit::default(),
            waiting: Vec::new(),
            lost: fault::lost(),
            claim: Some(start.claim),
            polling: Polling::new(start.rules.poll),
        };
        let (index, device, rules) = (start.index, start.device, start.rules);
        Ok(Queue { index, device, kick, rules, news, state: RefCell::new(state) })
    }

    /// Nothing of the queue can be believed any more: it stops, and the others go on.
    #[cold]
    fn break_off(&self, state: &mut State, why: &str) {
        tracing::warn!(export = self.device.source, queue = self.index, "a guest's queue is stopped: {why}");
        state.broken = true;
        if let Some(err) = &state.err {
            // An event counter that does not block: a full one has been told already.
            let _ = rustix::io::write(err, &1u64.to_ne_bytes());
        }
    }

    /// True if the memory is still there.
    #[inline]
    fn keeps_memory(&self, state: &mut State) -> bool {
        let lost = fault::lost();
        if lost != state.lost {
            state.lost = lost;
            if state.port.is_lost() {
                self.break_off(state, "its front-end has taken its memory away");
                // Whoever is told may have gone.
                let _ = self.news.send((self.index, News::Lost));
                return false;
            }
        }
        true
    }

    /// Takes a request of the driver apart: into requests for the graph, or answers it.
    fn take(&self, state: &mut State, head: u16) -> Result<(), &'static str> {
        // One chain may be offered any number of times, and a request may cost nothing of the disk's budget.
        if state.taken >= usize::from(state.port.ring().size()) {
            return Err("more requests in flight than the ring has room for");
        }
        let mut chain = std::mem::take(&mut state.chain);
        let parsed =
            chain.read(state.port.ring(), head, self.rules.indirect).and_then(|()| blk::parse(&mut chain));
        let (job, status) = parsed?;
        state.taken += 1;
        let tag = |dest: Data, len: u64| Tag { head, status, dest, len, group: None };
        let fua = if self.rules.flush && !self.device.is_write_through() { Flags::NONE } else { Flags::FUA };
        match job {
            Job::Read { offset, len } => {
                let dest = self.foreign(state, &chain.writable);
                let mut request = Request::read(offset, len);
                request.data = dest.clone();
                state.ready.push_back((tag(dest, len), request));
            }
            Job::Write { .. } | Job::Discard(_) | Job::WriteZeroes(_) if self.device.is_read_only() => {
                state.finish(head, status, blk::IOERR, 0, 0);
            }
            Job::Write { offset, len } => {
                let request = Request::write(offset, self.foreign(state, &chain.readable)).with(fua);
                state.ready.push_back((tag(Data::empty(), len), request));
            }
            Job::Flush => state.ready.push_back((tag(Data::empty(), 0), Request::flush())),
            Job::Discard(ranges) => self.several(state, tag(Data::empty(), 0), Op::Discard, fua, &ranges),
            Job::WriteZeroes(ranges) => {
                self.several(state, tag(Data::empty(), 0), Op::WriteZeroes, fua, &ranges)
            }
            Job::Id => {
                let written = self.write_serial(state, &chain.writable);
                state.finish(head, status, blk::OK, written, 0);
            }
            Job::Answer(code) => state.finish(head, status, code, 0, 0),
        }
        state.chain = chain;
        Ok(())
    }

    fn foreign(&self, state: &State, pieces: &Pieces) -> Data {
        // SAFETY: the pieces were found in this memory, which owns its mappings and lends them to nobody.
        Data::foreign(unsafe { Foreign::new(pieces, state.port.ring().memory().clone()) })
    }

    fn several(&self, state: &mut State, tag: Tag, op: Op, flags: Flags, ranges: &[Range]) {
        let group = Rc::new(Group { left: Cell::new(ranges.len()), status: Cell::new(blk::OK) });
        for range in ranges {
            let unmap = if range.unmap { Flags::MAY_UNMAP } else { Flags::NONE };
            let request = Request::new(op, range.offset, range.len).with(flags).with(unmap);
            let tag = Tag { dest: Data::empty(), group: Some(group.clone()), ..tag };
            state.ready.push_back((tag, request));
        }
    }

    /// The serial number, cut or padded to what there is room for. Returns how many bytes that were.
    fn write_serial(&self, state: &State, pieces: &Pieces) -> u32 {
        const BYTES: usize = virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES as usize;
        let mut id = [0; BYTES];
        let serial = self.device.terms().serial;
        let n = serial.len().min(BYTES);
        id[..n].copy_from_slice(&serial.as_bytes()[..n]);
        let mut rest = &id[..];
        for (at, len) in pieces {
            let (now, later) = rest.split_at(rest.len().min(*len));
            // SAFETY: the piece has at least so many bytes, in the guest's memory; `id` is ours.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), at.as_ptr(), now.len()) };
            state.port.mark(*at, now.len());
            rest = later;
        }
        (BYTES - rest.len()) as u32
    }

    /// A request that was taken goes into the graph, once there is memory for what it may cost.
    #[inline]
    fn admit(&self, state: &mut State, task: &mut Context<'_>) -> Poll<(Tag, Request)> {
        let need =
            state.ready.front().map_or(0, |(_, request)| cost(request.data.len() as u64)) + state.bytes;
        if need > state.reserve.bytes() {
            state.give_back();
            let more = (need - state.reserve.bytes()).max(STEP);
            let budget = self.device.disk.budget();
            std::task::ready!(budget.poll_grow(&mut state.reserve, more, task));
        }
        match state.ready.pop_front() {
            Some((tag, request)) => {
                state.admitted += 1;
                state.bytes += cost(request.data.len() as u64);
                Poll::Ready((tag, request))
            }
            None => Poll::Pending,
        }
    }

    /// Nothing is there: looks again for a while, or waits for a kick. Ready if something has come.
    fn idle(&self, state: &mut State, task: &mut Context<'_>) -> Poll<()> {
        if state.polling.goes_on(task) {
            return Poll::Pending;
        }
        loop {
            if state.port.ask_for_kick() {
                return Poll::Ready(());
            }
            // Never read: the counter tells of every kick by an event of its own.
            match self.kick.poll_read_ready(task) {
                Poll::Ready(Ok(mut guard)) => guard.clear_ready(),
                Poll::Ready(Err(_)) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

impl Stream for Queue {
    type Tag = Tag;

    fn poll_next(&self, task: &mut Context<'_>) -> Poll<Admit<Tag>> {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        loop {
            if !state.ready.is_empty() {
                let (tag, request) = std::task::ready!(self.admit(state, task));
                return Poll::Ready(Admit::Request(tag, request));
            }
            if state.ended {
                return Poll::Ready(Admit::End);
            }
            if state.paused || state.broken || !state.enabled || !self.keeps_memory(state) {
                return Poll::Pending;
            }
            match state.port.take() {
                Ok(Some(head)) => {
                    state.polling.found();
                    if let Err(why) = self.take(state, head) {
                        self.break_off(state, why);
                    }
                }
                Ok(None) => std::task::ready!(self.idle(state, task)),
                Err(why) => self.break_off(state, why),
            }
        }
    }

    fn reply(&self, tag: Tag, reply: Reply) {
        let mut state = self.state.borrow_mut();
        state.admitted -= 1;
        state.bytes -= cost(tag.len.max(tag.dest.len() as u64));
        let mut code = if state.abandoned { blk::OK } else { code(&state, &tag, reply) };
        if let Some(group) = &tag.group {
            if code != blk::OK {
                group.status.set(code);
            }
            code = group.status.get();
            group.left.set(group.left.get() - 1);
            if group.left.get() > 0 {
                return;
            }
        }
        state.finish(tag.head, tag.status, code, tag.dest.len() as u32, tag.len);
    }

    fn poll_flush(&self, _task: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.borrow_mut();
        state.port.publish();
        state.give_back();
        state.settle();
        Poll::Ready(())
    }
}

/// Puts a read's data where it belongs. Returns the status.
#[inline]
fn code(state: &State, tag: &Tag, reply: Reply) -> u8 {
    match reply {
        Ok(Answer::Data(data)) if !tag.dest.is_empty() && data.len() == tag.dest.len() => {
            tag.dest.fill_from(&data);
            if state.port.is_logged() {
                tag.dest.for_each(|segment| {
                    if let (Segment::Foreign(part), len) = (segment, segment.len()) {
                        NonNull::new(part.as_ptr()).into_iter().for_each(|at| state.port.mark(at, len));
                    }
                });
            }
            blk::OK
        }
        Ok(Answer::Done | Answer::Text(_)) if tag.dest.is_empty() => blk::OK,
        Ok(_) => blk::IOERR,
        Err(error) if error.kind() == Kind::Unsupported => blk::UNSUPP,
        Err(_) => blk::IOERR,
    }
}
