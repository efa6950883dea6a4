//! Recording the way of sampled requests: which are sampled, how a hop knows the one above it, and who is
//! told.
//!
//! A sampled request carries a [`Trace`] among its rarities, which its children inherit with the rest. All
//! others pay for one comparison on each edge, and that is shared with other rarities
//! (`Edge::takes`). Sampling changes nothing of what becomes of a request.

use super::cx::Lane;
use super::recorder::{Hop, LONGEST_ERROR, Way};
use super::{Cx, Disk, Shard};
use crate::element::Flow;
use crate::error::{Error, Kind, Result};
use crate::graph::edge::Edge;
use crate::request::{Reply, Request};
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// For the flight recorder, one root request in so many is sampled, on average.
pub const EVERY: u64 = 1024;

/// Hops that wait for one tracer; more are dropped and counted.
const QUEUE: usize = 4096;

/// Tracers of one disk at a time.
const MOST_TRACERS: usize = 16;

/// Marks a request whose way through the graph is recorded, and everything that is made of it.
#[derive(Clone, Debug)]
pub struct Trace {
    /// The client's request.
    root: u64,
    /// The hop that it is in.
    hop: u64,
    /// The request that came over the edge of that hop.
    request: u64,
    to: Arc<Sampling>,
}

/// How often is sampled, and who is told.
#[derive(Debug)]
struct Sampling {
    every: u64,
    taps: Vec<Arc<Tap>>,
}

/// The shards' end of a tracer.
#[derive(Debug)]
struct Tap {
    number: u64,
    every: u64,
    hops: mpsc::Sender<Hop>,
    dropped: Arc<AtomicU64>,
}

impl Sampling {
    fn of(taps: &[Arc<Tap>]) -> Sampling {
        let wanted = taps.iter().map(|tap| tap.every).min();
        Sampling { every: wanted.map_or(EVERY, |every| every.min(EVERY)), taps: taps.to_vec() }
    }
}

/// One shard's choice of the requests of a disk to be sampled.
pub(crate) struct Sampler {
    /// Requests to go before the next one that is.
    left: Cell<u64>,
    now: RefCell<Arc<Sampling>>,
}

impl Default for Sampler {
    fn default() -> Self {
        Sampler { left: Cell::new(EVERY - 1), now: RefCell::new(Arc::new(Sampling::of(&[]))) }
    }
}

impl Sampler {
    /// Whether the request that is admitted now is sampled.
    #[inline]
    pub(super) fn choose(&self, shard: &Shard) -> bool {
        match self.left.get() {
            0 => {
                // Not every n-th: a client that flushes after each n writes would show nothing else.
                let most = 2 * (self.now.borrow().every - 1);
                self.left.set(shard.random(|rng| rng.u64(0..=most)));
                true
            }
            left => {
                self.left.set(left - 1);
                false
            }
        }
    }

    fn set(&self, sampling: Arc<Sampling>) {
        self.left.set(self.left.get().min(sampling.every - 1));
        *self.now.borrow_mut() = sampling;
    }
}

/// What an edge keeps for the hops of sampled requests.
#[derive(Default)]
pub(crate) struct Traced {
    way: OnceLock<Arc<Way>>,
    hops: AtomicU64,
    ns: AtomicU64,
}

impl Traced {
    /// Sampled hops that have ended, and how long they took together in nanoseconds.
    pub(crate) fn read(&self) -> (u64, u64) {
        (self.hops.load(Ordering::Relaxed), self.ns.load(Ordering::Relaxed))
    }
}

/// A hop that has begun. It is recorded when it ends, also when its flow is dropped without a reply.
pub(super) struct Open<'a> {
    lane: &'a Lane,
    edge: Option<&'a Edge>,
    /// None once it has been recorded.
    hop: Option<Hop>,
    to: Arc<Sampling>,
}

impl<'a> Open<'a> {
    /// The hop of a client's request into the source `cx`; from now on the request is traced.
    pub(super) fn root(cx: Cx<'a>, sampler: &Sampler, req: &mut Request, since: Instant) -> Open<'a> {
        let way = Way { graph: cx.graph_name().to_owned(), from: None, to: cx.name().to_owned() };
        let number = cx.shard().next_id();
        let hop = Hop::new(Arc::new(way), req, number, cx.shard().id(), since);
        let to = sampler.now.borrow().clone();
        let trace = Trace { root: req.root, hop: number, request: req.id, to: to.clone() };
        req.extra.get_or_insert_default().trace = Some(trace);
        Open { lane: cx.lane, edge: None, hop: Some(hop), to }
    }

    /// The hop of a request over an edge, if it is traced.
    pub(super) fn edge(below: Cx<'a>, edge: &'a Edge, req: &mut Request) -> Option<Open<'a>> {
        let trace = req.extra.as_mut()?.trace.as_mut()?;
        let (number, to) = (below.shard().next_id(), trace.to.clone());
        let (root, parent) = (trace.root, Some(trace.hop));
        (trace.hop, trace.request) = (number, req.id);
        let way = edge.traced.way.get_or_init(|| Arc::new(way(below.lane, edge))).clone();
        let hop = Hop::new(way, req, number, below.shard().id(), below.now());
        let hop = Some(Hop { root, parent, ..hop });
        Some(Open { lane: below.lane, edge: Some(edge), hop, to })
    }

    /// The hop of a request that the framework has made of the one that came over the edge.
    pub(super) fn part(below: Cx<'a>, edge: &'a Edge, req: &mut Request) -> Option<Open<'a>> {
        let came = req.extra.as_ref()?.trace.as_ref()?.request;
        if came == req.id { None } else { Open::edge(below, edge, req) }
    }

    /// Records the hop when the flow ends.
    pub(super) fn watch(self, flow: Flow<'a>) -> Flow<'a> {
        flow.then(move |reply| self.end(reply))
    }

    /// Records the hop with its reply.
    pub(super) fn end(mut self, reply: Reply) -> Reply {
        self.record(reply.as_ref().err().map(said));
        reply
    }

    fn record(&mut self, error: Option<Box<str>>) {
        let Some(hop) = self.hop.take() else { return };
        let hop = Hop { took: crate::rt::now().saturating_duration_since(hop.start), error, ..hop };
        if let Some(Traced { hops, ns, .. }) = self.edge.map(|edge| &*edge.traced) {
            hops.fetch_add(1, Ordering::Relaxed);
            ns.fetch_add(hop.took.as_nanos() as u64, Ordering::Relaxed);
        }
        for tap in &self.to.taps {
            if tap.hops.try_send(hop.clone()).is_err() {
                tap.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.lane.shard.recorder.borrow_mut().record(hop);
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.record(Some("dropped without a reply".into()));
    }
}

fn way(lane: &Lane, edge: &Edge) -> Way {
    let name = |node: u32| lane.graph.nodes[node as usize].instance.name.clone();
    Way {
        graph: lane.graph.name().to_owned(),
        from: Some((name(edge.from), edge.port.to_string())),
        to: name(edge.to),
    }
}

/// An error's text, cut where it gets long.
fn said(error: &Error) -> Box<str> {
    let mut text = error.to_string();
    text.truncate(text.floor_char_boundary(LONGEST_ERROR));
    text.into()
}

/// The tracers of a disk.
#[derive(Default)]
pub(super) struct Tracers {
    taps: Vec<Arc<Tap>>,
    next: u64,
    closed: bool,
}

/// Receives the hops of sampled requests of one disk. Dropping it ends that.
pub struct Tracer {
    disk: Weak<Disk>,
    number: u64,
    hops: mpsc::Receiver<Hop>,
    dropped: Arc<AtomicU64>,
}

impl Disk {
    /// Samples one client's request in `every` from now on, for as long as the tracer lives; of several
    /// tracers, all get what the most curious one asks for. What a tracer does not take in time is dropped
    /// and counted: no request waits for it.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if `every` is 0, [`Kind::Busy`] if there are sixteen tracers,
    /// [`Kind::Unavailable`] if the disk has been stopped.
    pub async fn trace(self: &Arc<Self>, every: u64) -> Result<Tracer> {
        if every == 0 {
            return Err(Error::invalid("one request in none cannot be sampled"));
        }
        let (tx, hops) = mpsc::channel(QUEUE);
        let (disk, dropped) = (Arc::downgrade(self), Arc::new(AtomicU64::new(0)));
        let number = self.change_tracers(|tracers| {
            if tracers.closed {
                return Err(Error::new(Kind::Unavailable, "the disk has been stopped"));
            }
            if tracers.taps.len() == MOST_TRACERS {
                let message = format!("{MOST_TRACERS} tracers watch it already: end one");
                return Err(Error::new(Kind::Busy, message));
            }
            tracers.next += 1;
            let number = tracers.next;
            tracers.taps.push(Arc::new(Tap { number, every, hops: tx, dropped: dropped.clone() }));
            Ok(number)
        })?;
        let tracer = Tracer { disk, number, hops, dropped };
        // Jobs of a shard are done in order: this one comes after the change.
        self.host.on_every(|_| ()).await?;
        Ok(tracer)
    }

    /// One client's request in so many is sampled now, on average.
    pub fn sampled_every(&self) -> u64 {
        Sampling::of(&self.tracers().taps).every
    }

    /// Ends every tracer once what is in flight has ended.
    pub(super) fn end_tracers(&self) -> Result<()> {
        self.change_tracers(|tracers| {
            tracers.closed = true;
            tracers.taps.clear();
            Ok(())
        })
    }

    fn tracers(&self) -> std::sync::MutexGuard<'_, Tracers> {
        self.tracers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change_tracers<T>(&self, change: impl FnOnce(&mut Tracers) -> Result<T>) -> Result<T> {
        let mut tracers = self.tracers();
        let changed = change(&mut tracers)?;
        let sampling = Arc::new(Sampling::of(&tracers.taps));
        // Under the lock, so that every shard hears of changes in the same order.
        for shard in 0..self.host.shards() {
            let (id, sampling) = (self.id(), sampling.clone());
            self.host.on(shard, move |shard| {
                if let Some(slot) = shard.slots.borrow().get(&id) {
                    slot.sampler.set(sampling);
                }
            })?;
        }
        Ok(changed)
    }
}

impl Tracer {
    /// The next hop, in the order in which they end on a shard: a request's own comes after those below it.
    /// None when the disk has been stopped.
    pub async fn next(&mut self) -> Option<Hop> {
        self.hops.recv().await
    }

    /// The next hop if it is here already.
    pub fn try_next(&mut self) -> Option<Hop> {
        self.hops.try_recv().ok()
    }

    /// Hops that were dropped so far, since they were not taken in time.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        if let Some(disk) = self.disk.upgrade() {
            let forgotten = disk.change_tracers(|tracers| {
                tracers.taps.retain(|tap| tap.number != self.number);
                Ok(())
            });
            // Without shards there is nothing to be sampled.
            drop(forgotten);
        }
    }
}

#[cfg(test)]
mod tests;
