//! What an element is given along with a request: its place in the graph, and the framework's services.

use super::{Shard, detach};
use crate::element::Flow;
use crate::error::Error;
use crate::events::{Event, EventKind};
use crate::geometry::Geometry;
use crate::graph::tally::Tally;
use crate::graph::{Graph, edge::Edge};
use crate::request::{Reply, Request};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// One epoch of one stream on one shard: what all of its flows share and borrow from.
pub(crate) struct Lane {
    pub(crate) graph: Arc<Graph>,
    pub(crate) shard: Rc<Shard>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) detached: RefCell<VecDeque<detach::Task>>,
    closing: watch::Receiver<bool>,
    /// It has something in flight that a change of graph must wait for, or may have.
    needed: Cell<bool>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.only_left();
        self.graph.lanes.leave();
    }
}

impl Lane {
    pub(crate) fn new(graph: Arc<Graph>, shard: Rc<Shard>) -> Lane {
        graph.lanes.enter();
        graph.needed.enter();
        let (tally, closing) = (graph.tallies[shard.id()].clone(), graph.closing());
        Lane { graph, shard, tally, detached: RefCell::default(), closing, needed: Cell::new(true) }
    }

    /// From now on it has nothing in flight but what may be left behind.
    pub(crate) fn only_left(&self) {
        if self.needed.replace(false) {
            self.graph.needed.leave();
        }
    }

    /// An element has panicked: the graph answers errors until it is replaced.
    #[cold]
    pub(crate) fn fail(&self) {
        if self.graph.fail() {
            let message = "an element has panicked: the graph answers errors until it is reloaded";
            self.shard.events().publish(Event::new(EventKind::Failed, self.graph.name(), message));
        }
    }

    pub(crate) fn take_detached(&self) -> Option<detach::Task> {
        self.detached.borrow_mut().pop_front()
    }

    pub(crate) fn cx(&self, node: usize) -> Cx<'_> {
        Cx { lane: self, node: node as u32 }
    }
}

/// The place of an element in the graph of a request, and the services of the framework. A small
/// copy; it lives as long as the flows of its epoch.
#[derive(Clone, Copy)]
pub struct Cx<'a> {
    pub(crate) lane: &'a Lane,
    pub(crate) node: u32,
}

impl<'a> Cx<'a> {
    /// Hands a request to whatever is connected to an out port, by the port's index in the order of
    /// the type's names or, for variadic types, of the edges. The only way a request moves.
    ///
    /// # Panics
    /// If there is no such port: a mistake of the element, contained as any panic is.
    #[inline]
    pub fn forward(self, port: usize, req: Request) -> Flow<'a> {
        let (edge, ix) = self.edge(port);
        self.lane.tally.edges[ix].add(req.op, req.len);
        let below = Cx { lane: self.lane, node: edge.to };
        if edge.takes(&req) { below.submit(req) } else { super::fit::forward(below, edge, req) }
    }

    #[inline]
    pub(crate) fn submit(self, req: Request) -> Flow<'a> {
        self.lane.graph.nodes[self.node as usize].element.submit(req, self)
    }

    #[inline]
    pub(super) fn edge(self, port: usize) -> (&'a Edge, usize) {
        let node = &self.lane.graph.nodes[self.node as usize];
        assert!(port < node.edge_count as usize, "{} has no out port {port}", node.instance.name);
        let ix = node.first_edge as usize + port;
        (&self.lane.graph.edges[ix], ix)
    }

    /// A request made on behalf of `parent`: a copy with an id of its own and the same root.
    pub fn child(self, parent: &Request) -> Request {
        Request { id: self.lane.shard.next_id(), ..parent.clone() }
    }

    /// A flow from an async body that answers `req`; an error of it is given the element's name, the
    /// operation and the offset.
    pub fn later(self, req: &Request, body: impl Future<Output = Reply> + 'a) -> Flow<'a> {
        let (op, offset) = (req.op, req.offset);
        Flow::later(
            async move { body.await.map_err(|error| error.in_element(self.name()).at(op.name(), offset)) },
        )
    }

    /// As [`later`](Self::later), for a body that seldom waits: it begins here and now, and what it answers without waiting is
    /// answered at once.
    pub fn begun(self, req: &Request, body: impl Future<Output = Reply> + 'a) -> Flow<'a> {
        match self.later(req, body) {
            // Whoever is given the rest polls it with a waker of his own before he waits.
            Flow::Later(mut flow) => match flow.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(reply) => Flow::Now(reply),
                Poll::Pending => Flow::Later(flow),
            },
            now => now,
        }
    }

    /// Answers `req` with an error that carries the element's name, the operation and the offset.
    #[cold]
    pub fn fail(self, req: &Request, error: Error) -> Flow<'a> {
        Flow::fail(error.in_element(self.name()).at(req.op.name(), req.offset))
    }

    /// Answers `req` with a reply made here and now.
    pub fn answer(self, req: &Request, reply: Reply) -> Flow<'a> {
        match reply {
            Ok(answer) => Flow::Now(Ok(answer)),
            Err(error) => self.fail(req, error),
        }
    }

    /// The element's name.
    pub fn name(self) -> &'a str {
        &self.lane.graph.nodes[self.node as usize].instance.name
    }

    /// The name of the graph.
    pub fn graph_name(self) -> &'a str {
        self.lane.graph.name()
    }

    /// What this element looks like from above.
    pub fn geometry(self) -> &'a Geometry {
        &self.lane.graph.nodes[self.node as usize].geometry
    }

    /// How many out ports this element has.
    pub fn outs(self) -> usize {
        self.lane.graph.nodes[self.node as usize].edge_count as usize
    }

    /// What the element's `prepare` kept for this graph.
    ///
    /// # Panics
    /// If it kept nothing, or something of another type: a mistake of the element.
    #[inline]
    pub fn prepared<T: 'static>(self) -> &'a T {
        let node = &self.lane.graph.nodes[self.node as usize];
        let state = node.prepared.as_deref().and_then(|state| state.downcast_ref());
        state.unwrap_or_else(|| panic!("{} kept no {}", node.instance.name, std::any::type_name::<T>()))
    }

    /// How many shards carry this graph; [`Shard::id`] is below it.
    pub fn shards(self) -> usize {
        self.lane.graph.tallies.len()
    }

    /// The shard that this request lives on.
    pub fn shard(self) -> &'a Rc<Shard> {
        &self.lane.shard
    }

    /// How many requests of clients have entered this graph so far, on all shards. Where it grows, guests are
    /// active: what can wait steps back.
    pub fn guest_requests(self) -> u64 {
        self.lane.graph.guest_requests()
    }

    /// Tells the operator something about this element, as an event: not for every request.
    #[cold]
    pub fn notice(self, message: impl std::fmt::Display) {
        let event = Event::new(EventKind::Notice, self.graph_name(), message).of(self.name());
        self.lane.shard.events().publish(event);
    }

    /// Now, on the clock that tests can stop.
    pub fn now(self) -> Instant {
        crate::rt::now()
    }

    /// Resolves after `time`.
    pub async fn sleep(self, time: Duration) {
        crate::rt::sleep(time).await;
    }

    /// A random number generator, seeded in tests.
    pub fn rng<T>(self, f: impl FnOnce(&mut fastrand::Rng) -> T) -> T {
        self.lane.shard.random(f)
    }

    /// Resolves when work of one's own must end, because the graph closes or is replaced.
    pub async fn closing(self) {
        let mut closing = self.lane.closing.clone();
        // An error means that the graph is gone, which is closing too.
        let _ = closing.wait_for(|closing| *closing).await;
    }
}
