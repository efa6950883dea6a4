//! A disk: what serves under a name, while its graphs come and go.

use super::trace::{Sampler, Tracers};
use super::{Budget, Host, Shard};
use crate::error::{Error, Result};
use crate::graph::Graph;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Bytes of requests in flight that a disk admits, over all its clients.
const BUDGET_BYTES: u64 = 256 << 20;

/// What serves. Its shards' view of it is a [`Slot`] each; its graph is replaced by
/// [`replace`](Disk::replace).
pub struct Disk {
    id: u64,
    pub(super) host: Arc<Host>,
    graphs: Mutex<Graphs>,
    /// Counts the changes of the graph that takes new requests.
    changes: watch::Sender<u64>,
    budget: Arc<Budget>,
    /// See [`gated`](Disk::gated).
    pub(super) gated: AtomicU64,
    /// Held by whoever serves a client, until the last reply has been sent.
    pub(super) attending: Arc<()>,
    /// Held while the graph is being replaced: one change at a time.
    pub(super) changing: Arc<tokio::sync::Mutex<super::handover::Past>>,
    pub(super) tracers: Mutex<Tracers>,
}

struct Graphs {
    /// Takes new requests, or will when the gate opens.
    now: Arc<Graph>,
    /// Is about to take its place.
    next: Option<Arc<Graph>>,
    /// Clients that come now are turned away.
    turns_away: bool,
}

impl Disk {
    /// A disk that serves nothing yet: its graph is empty. Known to every shard when this returns.
    pub async fn new(host: &Arc<Host>, name: &str) -> Result<Arc<Disk>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let empty = Arc::new(Graph::assemble(name, &[], &[], host.shards())?);
        let disk = Arc::new(Disk {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            host: host.clone(),
            graphs: Mutex::new(Graphs { now: empty, next: None, turns_away: false }),
            changes: watch::channel(0).0,
            budget: Budget::new(BUDGET_BYTES),
            gated: AtomicU64::new(0),
            attending: Arc::default(),
            changing: Arc::default(),
            tracers: Mutex::default(),
        });
        let id = disk.id;
        host.on_every(move |shard| {
            shard.slots.borrow_mut().insert(id, Rc::new(Slot::default()));
        })
        .await?;
        Ok(disk)
    }

    /// A disk that serves `graph`.
    pub async fn serve(host: &Arc<Host>, graph: Arc<Graph>) -> Result<Arc<Disk>> {
        let disk = Disk::new(host, graph.name()).await?;
        disk.replace(graph, &super::Change::default()).await?;
        Ok(disk)
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The graph that takes new requests.
    pub fn graph(&self) -> Arc<Graph> {
        self.graphs().now.clone()
    }

    /// The graph that is about to take its place. Whoever promises something to a client, a size,
    /// remembers the promise first and then holds it against both: whichever comes first, the promise
    /// or the change, one of the two is seen by the other.
    pub fn next_graph(&self) -> Option<Arc<Graph>> {
        self.graphs().next.clone()
    }

    /// Tells of every change of [`graph`](Disk::graph), unlike events, which are thinned out.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn set_graph(&self, graph: Arc<Graph>) {
        self.graphs().now = graph;
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// False while a change goes on that no client may see: to be asked after a promise was remembered.
    pub fn takes_clients(&self) -> bool {
        !self.graphs().turns_away
    }

    pub(super) fn expect(&self, next: Option<Arc<Graph>>, turns_away: bool) {
        let mut graphs = self.graphs();
        (graphs.next, graphs.turns_away) = (next, turns_away);
    }

    /// The process that serves it.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// To be held while a client is served: the disk does not stop before its replies have been sent.
    pub fn attend(&self) -> Arc<()> {
        self.attending.clone()
    }

    /// The bytes in flight.
    pub fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// How often clients have had to wait at the gate: for changes that were made, and for those that were
    /// given up behind it.
    pub fn gated(&self) -> u64 {
        self.gated.load(Ordering::Relaxed)
    }

    /// This shard's view. Called on a shard.
    pub(crate) fn slot(&self) -> Result<Rc<Slot>> {
        let shard = Shard::current().ok_or_else(|| Error::internal("this thread is no shard"))?;
        let slot = shard.slots.borrow().get(&self.id).cloned();
        slot.ok_or_else(|| Error::new(crate::Kind::Unavailable, "the disk has been closed"))
    }

    /// From now on new requests enter `graph`, or wait if there is none: the gate is closed. Those in
    /// flight end where they are. When this returns, no shard admits into another graph.
    pub(super) async fn admit_into(&self, graph: Option<Arc<Graph>>) -> Result<()> {
        self.on_slots(move |slot| slot.admit_into(graph.clone())).await
    }

    async fn on_slots(&self, job: impl Fn(&Slot) + Clone + Send + 'static) -> Result<()> {
        let id = self.id;
        self.host
            .on_every(move |shard| {
                let slot = shard.slots.borrow().get(&id).cloned();
                slot.iter().for_each(|slot| job(slot));
            })
            .await
    }

    /// Ends every stream once its requests in flight are answered; does not wait for that.
    pub(super) async fn end_streams(&self) -> Result<()> {
        let id = self.id;
        self.host
            .on_every(move |shard| {
                if let Some(slot) = shard.slots.borrow_mut().remove(&id) {
                    slot.closing.set(true);
                    slot.admit_into(None);
                }
            })
            .await
    }

    /// How many requests of clients are in flight now.
    pub async fn count_in_flight(&self) -> Result<usize> {
        let sum = Arc::new(AtomicUsize::new(0));
        let to = sum.clone();
        self.on_slots(move |slot| {
            to.fetch_add(slot.in_flight.get(), Ordering::Relaxed);
        })
        .await?;
        Ok(sum.load(Ordering::Relaxed))
    }

    /// The requests of clients that are in flight now, the oldest first.
    pub async fn in_flight(&self) -> Result<Vec<InFlight>> {
        let (census, mut found) = mpsc::unbounded_channel();
        self.on_slots(move |slot| {
            *slot.census.borrow_mut() = Some(census.clone());
            slot.wake_all();
        })
        .await?;
        self.host.turn().await?;
        self.on_slots(|slot| drop(slot.census.borrow_mut().take())).await?;
        let mut all = Vec::new();
        while let Ok(one) = found.try_recv() {
            all.push(one);
        }
        all.sort_by_key(|one| one.id);
        all.dedup_by_key(|one| one.id);
        all.sort_by_key(|one| std::cmp::Reverse(one.age));
        Ok(all)
    }
}

/// A client's request that has not been answered yet.
#[derive(Clone, Debug)]
pub struct InFlight {
    /// The element at which it entered.
    pub source: String,
    /// Its number.
    pub id: u64,
    /// What it asks for.
    pub op: &'static str,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// For how long it has been in flight.
    pub age: Duration,
}

impl fmt::Display for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InFlight { source, op, offset, len, age, .. } = self;
        write!(f, "{source}: {op}")?;
        if *len > 0 {
            write!(f, " of {len} at {offset}")?;
        }
        write!(f, ", for {age:.1?}")
    }
}

/// Where streams say what they have in flight.
pub(crate) type Census = mpsc::UnboundedSender<InFlight>;

/// One shard's view of a disk.
#[derive(Default)]
pub struct Slot {
    /// Takes new requests; none while the gate is closed.
    pub(crate) graph: RefCell<Option<Arc<Graph>>>,
    /// Counts the changes of `graph`.
    pub(crate) epoch: Cell<u64>,
    pub(crate) closing: Cell<bool>,
    /// Roots in flight on this shard, over all epochs.
    pub(crate) in_flight: Cell<usize>,
    pub(crate) census: RefCell<Option<Census>>,
    pub(super) sampler: Sampler,
    /// The streams of this shard, by their number.
    waiters: RefCell<Vec<(u64, Waker)>>,
    next_waiter: Cell<u64>,
}

impl Slot {
    fn admit_into(&self, graph: Option<Arc<Graph>>) {
        *self.graph.borrow_mut() = graph;
        self.epoch.set(self.epoch.get() + 1);
        self.wake_all();
    }

    pub(crate) fn wake_all(&self) {
        for (_, waker) in self.waiters.borrow().iter() {
            waker.wake_by_ref();
        }
    }

    /// A number for a stream that wants to be woken.
    pub(crate) fn join(&self) -> u64 {
        let number = self.next_waiter.get();
        self.next_waiter.set(number + 1);
        number
    }

    /// Remembers whom to wake for that stream.
    pub(crate) fn watch(&self, number: u64, waker: &Waker) {
        let mut waiters = self.waiters.borrow_mut();
        match waiters.iter_mut().find(|(other, _)| *other == number) {
            Some((_, known)) => known.clone_from(waker),
            None => waiters.push((number, waker.clone())),
        }
    }

    /// Forgets a stream.
    pub(crate) fn leave(&self, number: u64) {
        self.waiters.borrow_mut().retain(|(other, _)| *other != number);
    }
}
