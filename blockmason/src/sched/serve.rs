//! Serving a stream of requests: admission, parked flows, epochs, and what happens when an element
//! panics.

use super::cx::Lane;
use super::detach::Done;
use super::disk::{Census, InFlight};
use super::flows::Flows;
use super::handover::Working;
use super::trace::Open;
use super::{Cx, Disk, Shard, Slot};
use crate::element::{Flow, LocalBoxFuture};
use crate::error::{Error, Kind, Result};
use crate::events::{Event, EventKind};
use crate::geometry::{Geometry, MAX_REQUEST};
use crate::graph::Graph;
use crate::request::{Op, Reply, Request};
use std::cell::Cell;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::time::Instant;

/// Requests from outside, in order of arrival: a connection, a virtqueue.
///
/// Everything takes `&self`: while a graph is replaced, two epochs answer to one stream.
pub trait Stream {
    /// What the stream needs to answer a request: a cookie, a descriptor's index.
    type Tag;

    /// The next request that is here in full. Pending registers the task, as ever.
    fn poll_next(&self, task: &mut Context<'_>) -> Poll<Admit<Self::Tag>>;

    /// The reply to a request, once for each, in any order. The stream may have ended meanwhile; the
    /// reply is then dropped.
    fn reply(&self, tag: Self::Tag, reply: Reply);

    /// Ready once the stream has nothing more, so far as that shows without taking up a request. Asked in place of
    /// [`poll_next`](Self::poll_next) while the gate is closed, which may be for hours: whoever waits there may leave.
    fn poll_end(&self, _task: &mut Context<'_>) -> Poll<()> {
        Poll::Pending
    }

    /// Called when everything that was ready has been submitted and answered: one write for a whole
    /// turn. A stream that cannot send any more ends at the next `poll_next`.
    fn poll_flush(&self, task: &mut Context<'_>) -> Poll<()>;
}

/// What a stream has next.
pub enum Admit<T> {
    /// A request.
    Request(T, Request),
    /// Nothing, ever.
    End,
}

/// Why serving ended. Every admitted request has been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The stream said so.
    Ended,
    /// The disk closes.
    Closing,
    /// The graph that serves now has no such source.
    Gone,
}

/// Requests that one poll admits at the most before other tasks of the shard have their turn.
const BATCH: usize = 256;

/// Serves `stream` as requests that enter at the element `source`, until the stream ends, the disk
/// closes or the source is gone. Must be called on a shard.
pub async fn serve<S: Stream>(disk: &Disk, source: &str, stream: &S) -> Result<Served> {
    let shard = Shard::current().ok_or_else(|| Error::internal("this thread is no shard"))?;
    let slot = disk.slot()?;
    let joined = Joined { slot: &slot, number: slot.join() };
    let end = Cell::new(None);
    let mut epochs: Vec<(Arc<Graph>, LocalBoxFuture<'_, ()>)> = Vec::new();
    let mut newest = None;
    let mut known: Option<std::task::Waker> = None;
    poll_fn(|task| {
        if !known.as_ref().is_some_and(|waker| waker.will_wake(task.waker())) {
            slot.watch(joined.number, task.waker());
            known = Some(task.waker().clone());
        }
        if slot.closing.get() && end.get().is_none() {
            end.set(Some(Served::Closing));
        }
        if newest != Some(slot.epoch.get()) && end.get().is_none() {
            newest = Some(slot.epoch.get());
            if let Some(graph) = slot.graph.borrow().clone() {
                let serving = Serving { slot: &slot, source, stream, end: &end };
                epochs.push((graph.clone(), Box::pin(serving.epoch(shard.clone(), graph))));
            }
        }
        epochs.retain_mut(|(_, epoch)| epoch.as_mut().poll(task).is_pending());
        let gated = end.get().is_none() && slot.graph.borrow().is_none();
        if gated && stream.poll_end(task).is_ready() {
            end.set(Some(Served::Ended));
        }
        // Nobody waits at the end for what was left behind.
        let over = slot.closing.get() && epochs.iter().all(|(graph, _)| graph.is_left());
        match end.get() {
            Some(end) if over || epochs.is_empty() => Poll::Ready(Ok(end)),
            _ => Poll::Pending,
        }
    })
    .await
}

struct Joined<'a> {
    slot: &'a Slot,
    number: u64,
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        self.slot.leave(self.number);
    }
}

/// What all epochs of one stream share.
struct Serving<'s, S> {
    slot: &'s Rc<Slot>,
    source: &'s str,
    stream: &'s S,
    end: &'s Cell<Option<Served>>,
}

/// Who waits for a flow.
enum Owner<T> {
    Root { tag: T, id: u64, op: Op, offset: u64, len: u64, since: Instant },
    Detached(Done),
}

impl<T> Owner<T> {
    fn may_be_left(&self, lane: &Lane) -> bool {
        matches!(self, Owner::Detached(done) if lane.graph.leaves_behind(done.node))
    }
}

impl<'s, S: Stream> Serving<'s, S> {
    /// One epoch: owns its graph, admits while it is the newest, and ends when it is not and nothing
    /// is in flight.
    async fn epoch(self, shard: Rc<Shard>, graph: Arc<Graph>) {
        let number = self.slot.epoch.get();
        let Some(node) = graph.source(self.source) else { return self.end.set(Some(Served::Gone)) };
        let below = match graph.below(node) {
            Ok(below) => below,
            Err(_) => return self.end.set(Some(Served::Gone)),
        };
        let lane = Lane::new(graph, shard);
        let mut turn = Turn { serving: self, cx: lane.cx(node), below, flows: Flows::new() };
        poll_fn(|task| turn.poll(number, task)).await;
    }
}

struct Turn<'s, 'a, S: Stream> {
    serving: Serving<'s, S>,
    cx: Cx<'a>,
    below: Geometry,
    flows: Flows<'a, Owner<S::Tag>>,
}

impl<'s, 'a, S: Stream> Turn<'s, 'a, S> {
    fn poll(&mut self, number: u64, task: &mut Context<'_>) -> Poll<()> {
        let slot = self.serving.slot;
        let mut left = BATCH;
        loop {
            self.abandon_if_failed();
            let mut progress = self.poll_flows(task);
            if slot.epoch.get() == number && left > 0 {
                progress |= self.admit(task, &mut left);
            }
            progress |= self.take_up_detached();
            if !progress || left == 0 {
                break;
            }
        }
        if let Some(census) = slot.census.borrow().as_ref() {
            self.count_into(census);
        }
        // Whether everything could be sent or not, nothing here waits for it.
        let _ = self.serving.stream.poll_flush(task);
        if left == 0 {
            task.waker().wake_by_ref();
        }
        let over = slot.epoch.get() != number || self.serving.end.get().is_some();
        if over && self.flows.len() == 0 {
            return Poll::Ready(());
        }
        if over && left > 0 && self.flows.owners().all(|owner| owner.may_be_left(self.cx.lane)) {
            self.cx.lane.only_left();
        }
        Poll::Pending
    }

    /// Lists what is in flight.
    fn count_into(&self, census: &Census) {
        let now = crate::rt::now();
        for owner in self.flows.owners() {
            let Owner::Root { id, op, offset, len, since, .. } = owner else { continue };
            let source = self.serving.source.to_owned();
            let (op, age) = (op.name(), now - *since);
            // Whoever asked may have gone.
            let _ = census.send(InFlight { source, id: *id, op, offset: *offset, len: *len, age });
        }
    }

    /// Submits what the stream has. True if there was anything.
    fn admit(&mut self, task: &mut Context<'_>, left: &mut usize) -> bool {
        let since = crate::rt::now();
        let mut any = false;
        while *left > 0 && self.serving.end.get().is_none() {
            match self.serving.stream.poll_next(task) {
                Poll::Pending => break,
                Poll::Ready(Admit::End) => self.serving.end.set(Some(Served::Ended)),
                Poll::Ready(Admit::Request(tag, req)) => {
                    any = true;
                    *left -= 1;
                    self.start(tag, req, since);
                }
            }
        }
        any
    }

    fn start(&mut self, tag: S::Tag, mut req: Request, since: Instant) {
        req.id = self.cx.lane.shard.next_id();
        req.root = req.id;
        let slot = self.serving.slot;
        slot.in_flight.set(slot.in_flight.get() + 1);
        let owner = Owner::Root { tag, id: req.id, op: req.op, offset: req.offset, len: req.len, since };
        let refused = self.refuse(&req).map_err(|error| error.at(req.op.name(), req.offset));
        if slot.sampler.choose(&self.cx.lane.shard) {
            return self.start_traced(req, owner, since, refused);
        }
        match refused {
            Ok(()) => {
                let cx = self.cx;
                self.start_flow(owner, move || cx.forward(0, req));
            }
            Err(error) => self.finish(owner, Some(Err(error))),
        }
    }

    /// As for any other request, and its way through the graph is recorded.
    #[cold]
    fn start_traced(&mut self, mut req: Request, owner: Owner<S::Tag>, since: Instant, refused: Result<()>) {
        let cx = self.cx;
        let hop = Open::root(cx, &self.serving.slot.sampler, &mut req, since);
        match refused {
            Ok(()) => self.start_flow(owner, move || hop.watch(cx.forward(0, req))),
            Err(error) => self.finish(owner, Some(hop.end(Err(error)))),
        }
    }

    /// What no element need check: the framework hands down no range that lies outside.
    fn refuse(&self, req: &Request) -> Result<()> {
        if self.cx.lane.graph.is_failed() {
            return Err(Error::internal("an element of this graph has panicked; reload it"));
        }
        if req.op.has_range() && req.offset.checked_add(req.len).is_none_or(|end| end > self.below.size) {
            let kind = if req.op == Op::Write { Kind::NoSpace } else { Kind::Invalid };
            let message = format!("{} bytes reach past the end, {}", req.len, self.below.size);
            return Err(Error::new(kind, message));
        }
        if matches!(req.op, Op::Read | Op::Write) && req.len > u64::from(MAX_REQUEST) {
            return Err(Error::invalid(format!("{} bytes are more than a request may have", req.len)));
        }
        if self.below.read_only && req.op.changes_data() {
            return Err(Error::new(Kind::Denied, "the disk is read-only"));
        }
        Ok(())
    }

    #[inline]
    fn start_flow(&mut self, owner: Owner<S::Tag>, make: impl FnOnce() -> Flow<'a>) {
        match catch_unwind(AssertUnwindSafe(make)) {
            Ok(Flow::Now(reply)) => self.finish(owner, Some(reply)),
            Ok(Flow::Later(flow)) => self.flows.insert(flow, owner),
            Err(_) => self.finish(owner, None),
        }
    }

    fn poll_flows(&mut self, task: &Context<'_>) -> bool {
        if self.flows.len() == 0 {
            return false;
        }
        let (cx, serving) = (self.cx, &self.serving);
        self.flows.poll(task, |owner, reply| finish(cx, serving, owner, reply))
    }

    fn take_up_detached(&mut self) -> bool {
        let mut any = false;
        loop {
            let Some(task) = self.cx.lane.take_detached() else { return any };
            any = true;
            let (make, done) = task.start(self.cx.lane);
            self.start_flow(Owner::Detached(done), make);
        }
    }

    /// Once an element has panicked nobody knows who will ever wake the flows that wait for it.
    fn abandon_if_failed(&mut self) {
        if self.cx.lane.graph.is_failed() && self.flows.len() > 0 {
            for owner in self.flows.abandon() {
                let error = Error::internal("an element of this graph panicked while this was in flight");
                self.finish(owner, Some(Err(error)));
            }
        }
    }

    fn finish(&self, owner: Owner<S::Tag>, reply: Option<Reply>) {
        finish(self.cx, &self.serving, owner, reply);
    }
}

fn finish<S: Stream>(cx: Cx<'_>, serving: &Serving<'_, S>, owner: Owner<S::Tag>, reply: Option<Reply>) {
    let reply = reply.unwrap_or_else(|| {
        cx.lane.fail();
        Err(Error::internal("an element panicked; the graph answers errors until it is reloaded"))
    });
    match owner {
        Owner::Detached(done) => done.send(reply),
        Owner::Root { tag, id, op, len, since, .. } => {
            let slot = serving.slot;
            slot.in_flight.set(slot.in_flight.get() - 1);
            if let Err(error) = &reply {
                report(cx, serving.source, id, error);
            }
            let took = crate::rt::now() - since;
            cx.lane.tally.root(cx.node as usize, op, len, reply.is_err(), took);
            serving.stream.reply(tag, reply);
        }
    }
}

/// Says what a guest was told. A client's own misuse is its business; the rest is the operator's.
#[cold]
fn report(cx: Cx<'_>, source: &str, id: u64, error: &Error) {
    let (graph, cause) = (cx.graph_name(), std::error::Error::source(error).map(ToString::to_string));
    let cause = cause.unwrap_or_default();
    match error.kind() {
        Kind::Invalid | Kind::Unsupported | Kind::Denied => {
            tracing::info!(graph, source, "{error}");
        }
        _ => {
            tracing::warn!(graph, source, cause, "{error}");
            let element = error.element().unwrap_or(source);
            let event = Event::new(EventKind::Error, graph, error).of(element);
            let event = event.with("source", source).with("kind", error.kind().name());
            cx.lane.shard.events().publish(if cause.is_empty() {
                event
            } else {
                event.with("cause", &cause)
            });
            for hop in cx.lane.shard.recorder.borrow().hops().filter(|hop| hop.root == id) {
                tracing::warn!(graph, "on its way: {hop}");
            }
        }
    }
}

/// Runs an element's work of its own to its end, in one epoch.
pub(super) async fn run_node(lane: Lane, node: usize, working: Working) {
    let element = lane.graph.nodes[node].element.clone();
    let cx = lane.cx(node);
    let mut flows: Flows<'_, Done> = Flows::new();
    let Some(mut body) = element.run(cx) else { return };
    let mut over = false;
    let mut closing = pin!(cx.closing());
    let mut closed = false;
    poll_fn(|task| {
        closed = closed || closing.as_mut().poll(task).is_ready();
        if closed && lane.graph.is_failed() {
            // After a panic nobody knows who would ever wake what is left.
            return Poll::Ready(());
        }
        if !over {
            match catch_unwind(AssertUnwindSafe(|| body.as_mut().poll(task))) {
                Ok(poll) => over = poll.is_ready(),
                Err(_) => {
                    lane.fail();
                    over = true;
                }
            }
        }
        carry_on(&lane, &mut flows, task);
        if over && flows.len() == 0 {
            return Poll::Ready(());
        }
        if over && flows.owners().all(|done| lane.graph.leaves_behind(done.node)) {
            lane.only_left();
            working.only_left();
        }
        Poll::Pending
    })
    .await;
}

/// Does one request and all that it leaves to be done when it has been answered, then gives the reply.
pub(super) async fn run_one(lane: &Lane, node: usize, port: usize, req: Request) -> Reply {
    let mut flows: Flows<'_, Done> = Flows::new();
    let mut flow = lane.cx(node).forward(port, req);
    let mut reply = None;
    poll_fn(|task| {
        if reply.is_none()
            && let Poll::Ready(found) = std::pin::Pin::new(&mut flow).poll(task)
        {
            reply = Some(found);
        }
        carry_on(lane, &mut flows, task);
        // After a panic nobody knows who would ever wake what is left.
        let over = flows.len() == 0 || lane.graph.is_failed();
        if over { reply.take().map_or(Poll::Pending, Poll::Ready) } else { Poll::Pending }
    })
    .await
}

/// Takes up what has been detached and polls it, until nothing more comes of it now.
fn carry_on<'a>(lane: &'a Lane, flows: &mut Flows<'a, Done>, task: &Context<'_>) {
    loop {
        while let Some(task) = lane.take_detached() {
            let (make, done) = task.start(lane);
            match catch_unwind(AssertUnwindSafe(make)) {
                Ok(Flow::Now(reply)) => done.send(reply),
                Ok(Flow::Later(flow)) => flows.insert(flow, done),
                Err(_) => lane.fail(),
            }
        }
        flows.poll(task, |done, reply| {
            done.send(reply.unwrap_or_else(|| {
                lane.fail();
                Err(Error::internal("an element panicked"))
            }));
        });
        if lane.detached.borrow().is_empty() {
            break;
        }
    }
}
