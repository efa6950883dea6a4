//! A disk: a named graph that serves, and the next ones that replace it.

use super::{Budget, Host, Shard};
use crate::element::Open;
use crate::error::{Error, Result};
use crate::graph::{Graph, Instance};
use crate::request::Request;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Waker;

/// Bytes of requests in flight that a disk admits, over all its clients.
const BUDGET_BYTES: u64 = 256 << 20;

/// A graph that serves. Its shards' view of it is a [`Slot`] each.
pub struct Disk {
    id: u64,
    host: Arc<Host>,
    graph: Mutex<Arc<Graph>>,
    budget: Arc<Budget>,
    /// Held by whoever serves a client, until the last reply has been sent.
    attending: Arc<()>,
}

impl Disk {
    /// A disk served by `graph`, known to every shard when this returns.
    pub async fn new(host: &Arc<Host>, graph: Arc<Graph>) -> Result<Arc<Disk>> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let disk = Arc::new(Disk {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            host: host.clone(),
            graph: Mutex::new(graph.clone()),
            budget: Budget::new(BUDGET_BYTES),
            attending: Arc::default(),
        });
        let id = disk.id;
        host.on_every(move |shard| {
            let slot = Rc::new(Slot::new(graph.clone()));
            shard.slots.borrow_mut().insert(id, slot);
        })
        .await?;
        Ok(disk)
    }

    /// The graph that takes new requests.
    pub fn graph(&self) -> Arc<Graph> {
        self.graph.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// This shard's view. Called on a shard.
    pub(crate) fn slot(&self) -> Result<Rc<Slot>> {
        let shard = Shard::current().ok_or_else(|| Error::internal("this thread is no shard"))?;
        let slot = shard.slots.borrow().get(&self.id).cloned();
        slot.ok_or_else(|| Error::new(crate::Kind::Unavailable, "the disk has been closed"))
    }

    /// New requests enter `next` from now on, and those in flight end where they are. When this
    /// returns, no shard admits into the graph before; [`drained`](Self::drained) waits for its end.
    pub async fn swap(&self, next: Arc<Graph>) -> Result<Arc<Graph>> {
        let before =
            std::mem::replace(&mut *self.graph.lock().unwrap_or_else(PoisonError::into_inner), next.clone());
        let id = self.id;
        self.host
            .on_every(move |shard| {
                if let Some(slot) = shard.slots.borrow().get(&id) {
                    slot.swap(next.clone());
                }
            })
            .await?;
        Ok(before)
    }

    /// Closes the gate: no source admits a request until [`open_gate`](Self::open_gate).
    pub async fn close_gate(&self) -> Result<()> {
        self.set_gate(true).await
    }

    /// Opens the gate.
    pub async fn open_gate(&self) -> Result<()> {
        self.set_gate(false).await
    }

    async fn set_gate(&self, closed: bool) -> Result<()> {
        let id = self.id;
        self.host
            .on_every(move |shard| {
                if let Some(slot) = shard.slots.borrow().get(&id) {
                    slot.gate.set(closed);
                    slot.wake_all();
                }
            })
            .await
    }

    /// Ends every stream once its requests in flight are answered, and waits for that.
    pub async fn close(&self) -> Result<()> {
        let id = self.id;
        self.graph().announce_closing();
        self.host
            .on_every(move |shard| {
                if let Some(slot) = shard.slots.borrow_mut().remove(&id) {
                    slot.closing.set(true);
                    slot.wake_all();
                }
            })
            .await
    }

    /// Opens every element of the graph and starts what has work of its own. Returns what the exports
    /// announce: element and URI. On an error everything that was opened is closed again.
    pub async fn start(self: &Arc<Self>) -> Result<Vec<(String, String)>> {
        let graph = self.graph();
        let mut announced = Vec::new();
        let mut opened: Vec<Arc<Instance>> = Vec::new();
        for instance in graph.instances() {
            let open = Open { host: &self.host, disk: self, name: &instance.name };
            match instance.element.open(&open) {
                Ok(uri) => announced.extend(uri.map(|uri| (instance.name.clone(), uri))),
                Err(error) => {
                    opened.iter().for_each(|instance| instance.element.close());
                    return Err(error.in_element(&instance.name));
                }
            }
            opened.push(instance.clone());
        }
        for node in 0..graph.nodes.len() {
            let graph = graph.clone();
            self.host.on(node, move |shard| {
                drop(tokio::task::spawn_local(super::run_node(graph, shard.clone(), node)));
            })?;
        }
        Ok(announced)
    }

    /// Ends service: exports close, idle streams end, requests in flight are answered, what was
    /// written is flushed, sinks close. Returns the first flush that failed.
    pub async fn stop(&self) -> Result<()> {
        let graph = self.graph();
        let (sources, others): (Vec<_>, Vec<_>) =
            graph.instances().partition(|instance| !instance.ty.ports.input);
        sources.iter().for_each(|instance| instance.element.close());
        self.close().await?;
        Disk::drained(&graph, 1 + 1).await;
        // Replies are still being sent, for as long as their clients' patience lasts.
        while Arc::strong_count(&self.attending) > 1 {
            crate::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
        let mut flushed = Ok(());
        for node in (0..graph.nodes.len()).filter(|node| !graph.nodes[*node].instance.ty.ports.input) {
            if graph.nodes[node].edge_count > 0 {
                let reply = self.host.submit(&graph, node, 0, Request::flush()).await;
                flushed = flushed.and(reply.map(drop));
            }
        }
        others.iter().for_each(|instance| instance.element.close());
        flushed
    }

    /// Waits until nothing of `graph` is in flight: until only `holders` are left that hold it, the caller one of
    /// them.
    pub async fn drained(graph: &Arc<Graph>, holders: usize) {
        // Epochs hold the graph for as long as they have requests; there is no count to fall out of
        // step with them. Control plane only, so looking again and again costs nobody anything.
        while Arc::strong_count(graph) > holders {
            crate::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
}

/// One shard's view of a disk.
pub struct Slot {
    pub(crate) graph: RefCell<Arc<Graph>>,
    /// Counts the swaps.
    pub(crate) epoch: Cell<u64>,
    pub(crate) gate: Cell<bool>,
    pub(crate) closing: Cell<bool>,
    /// Roots in flight on this shard, over all epochs.
    pub(crate) in_flight: Cell<usize>,
    /// The streams of this shard, by their number.
    waiters: RefCell<Vec<(u64, Waker)>>,
    next_waiter: Cell<u64>,
}

impl Slot {
    fn new(graph: Arc<Graph>) -> Slot {
        Slot {
            graph: RefCell::new(graph),
            epoch: Cell::new(0),
            gate: Cell::new(false),
            closing: Cell::new(false),
            in_flight: Cell::new(0),
            waiters: RefCell::default(),
            next_waiter: Cell::new(0),
        }
    }

    fn swap(&self, next: Arc<Graph>) {
        *self.graph.borrow_mut() = next;
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
