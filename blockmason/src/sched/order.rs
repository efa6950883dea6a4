//! Overlapping requests of several streams are ordered once, above any fan-out: the later one waits.
//!
//! Where that is done, see [`crate::graph::places`]. A request that comes to such a place claims its
//! range, rounded to whole blocks, until it is answered; reads share theirs. What becomes of it below, parts
//! and copies, passes no further place. A serialiser claims ranges itself ([`Cx::hold`]) and its requests
//! pass under its guard.

use super::{Cx, Holder, Mode, RangeGuard, RangeLock, Waiting, depends};
use crate::element::Flow;
use crate::error::Error;
use crate::graph::Instance;
use crate::graph::edge::Edge;
use crate::request::Request;
use std::ops::Range;
use std::sync::Arc;

/// What orders overlapping requests at some edges.
#[derive(Clone)]
pub(crate) struct Order {
    /// Whose map it is.
    leader: Arc<Instance>,
    /// Ranges are rounded to multiples of this, less one.
    mask: u64,
}

impl Order {
    /// By the map of `leader`, in blocks of `block` bytes, a power of two.
    pub(crate) fn new(leader: Arc<Instance>, block: u64) -> Order {
        Order { leader, mask: block - 1 }
    }

    /// Whose map it is.
    pub(super) fn leader(&self) -> &Arc<Instance> {
        &self.leader
    }

    fn map(&self) -> &RangeLock {
        &self.leader.order
    }

    /// The whole blocks around a range.
    fn round(&self, range: Range<u64>) -> Range<u64> {
        range.start & !self.mask..range.end.saturating_add(self.mask) & !self.mask
    }

    fn claim(&self, req: &Request) -> Waiting<'_> {
        let mode = if req.op.changes_data() { Mode::Exclusive } else { Mode::Shared };
        self.map().claim(Holder::of(req), mode, &[self.round(req.offset..req.end())])
    }
}

/// Orders `req` if this edge is the place for that, then does `go`.
pub(super) fn ordered<'a>(
    edge: &'a Edge,
    req: Request,
    go: impl FnOnce(Request) -> Flow<'a> + 'a,
) -> Flow<'a> {
    let Some(order) = edge.order.as_ref().filter(|_| req.op.locks() && req.len > 0) else { return go(req) };
    match order.claim(&req).now() {
        Ok(held) => go(req).then(move |reply| {
            drop(held);
            reply
        }),
        Err(waiting) => Flow::later(async move {
            let _held = waiting.await;
            go(req).await
        }),
    }
}

impl<'a> Cx<'a> {
    /// Claims a range for work that a serialiser does on its own account, copying it, say: comes once no
    /// request that came before overlaps it, and keeps out those that come later until the guard is
    /// dropped. Addresses are those below the element's ports.
    ///
    /// Whoever holds ranges does not ask for further ones, nor for any on behalf of a request that came in:
    /// two such would wait for each other.
    ///
    /// # Panics
    /// If the type of the element does not say that it serialises: a mistake of the element, contained as any
    /// panic is.
    pub async fn hold(self, range: Range<u64>) -> Held<'a> {
        self.hold_all([range]).await
    }

    /// As [`Cx::hold`], for several ranges, which all come at once.
    pub async fn hold_all(self, ranges: impl IntoIterator<Item = Range<u64>>) -> Held<'a> {
        let order = self.lane.graph.nodes[self.node as usize].order.as_ref();
        let order = order.unwrap_or_else(|| panic!("the type of {} does not serialise", self.name()));
        let root = self.lane.shard.next_id();
        let ranges: Vec<_> = ranges.into_iter().map(|range| order.round(range)).collect();
        let holder = Holder { root, doing: "hold" };
        let guard = order.map().claim(holder, Mode::Exclusive, &ranges).await;
        Held { cx: self, root, ranges, _guard: guard }
    }

    /// The way to both disks past all who hold ranges or wait for them, for a serialiser of which nobody changes the
    /// disk that it reads, or uses the one that it writes: it holds nothing, and nobody waits for it.
    ///
    /// # Panics
    /// As [`Cx::hold`].
    pub async fn hold_none(self) -> Held<'a> {
        let held = self.hold_all([]).await;
        // Every request is within.
        let all = 0..u64::MAX;
        Held { ranges: vec![all], ..held }
    }
}

/// Ranges that a serialiser holds, or the leave to do without. Its flows cannot outlive it.
pub struct Held<'a> {
    cx: Cx<'a>,
    root: u64,
    /// In whole blocks.
    ranges: Vec<Range<u64>>,
    _guard: RangeGuard<'a>,
}

impl Held<'_> {
    /// The root id of the requests that are made under it, for what is logged.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Hands a request to an out port as [`Cx::forward`] does, past everybody who waits for these ranges.
    /// Requests under one guard are not ordered among themselves.
    ///
    /// # Errors
    /// [`crate::Kind::Internal`] if it reads or changes what is not held: to wait for that while holding
    /// something else could last forever.
    pub fn forward(&self, port: usize, mut req: Request) -> Flow<'_> {
        let within = |range: &Range<u64>| range.start <= req.offset && req.end() <= range.end;
        if req.op.locks() && req.len > 0 && !self.ranges.iter().any(within) {
            return self.cx.fail(&req, Error::internal("it asks for more than the range that it holds"));
        }
        let tied = depends::is_tied(&req);
        if !tied {
            // Others know a request that is tied by its id.
            req.id = self.cx.lane.shard.next_id();
        }
        req.root = self.root;
        let (edge, ix) = self.cx.edge(port);
        self.cx.lane.tally.edges[ix].add(req.op, req.len);
        let below = Cx { lane: self.cx.lane, node: edge.to };
        if tied {
            return depends::hold(below, edge, req, move |req| super::fit::hand_on(below, edge, req));
        }
        super::fit::hand_on(below, edge, req)
    }
}
