//! Handing a disk over to a successor in another process, and being that successor.
//!
//! The one side closes the gate, drains and asks each element for its luggage; everything can be undone.
//! The other opens the elements of the graph behind a closed gate and gives each its luggage; what it
//! must not do before the other side has let go, admit requests and start elements' own work, comes last.

use super::{Change, Past, Step, contained, log, start_work, stuck};
use crate::element::Open;
use crate::error::{Error, Kind, Result};
use crate::graph::{Graph, Instance};
use crate::io::Registry;
use crate::luggage::Luggage;
use crate::sched::Disk;
use futures::FutureExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

impl Disk {
    /// Whether the graph can be handed over to another process.
    ///
    /// # Errors
    /// What an element has that would be lost.
    pub fn may_hand_over(&self) -> Result<()> {
        self.graph().instances().try_for_each(|instance| {
            contained(|| instance.element.may_hand_over()).map_err(|e| e.in_element(&instance.name))
        })
    }

    /// Flushes while requests go on, so that less is left to flush behind the gate.
    ///
    /// # Errors
    /// The flush has failed, or has not ended in time.
    pub async fn flush_before_leaving(&self, deadline: Duration) -> Result<()> {
        let graph = self.graph();
        flushed(&graph, crate::rt::timeout(deadline, self.flush(&graph)).await)
    }

    /// Closes the gate, so that another process can take over. What is in flight goes on.
    ///
    /// # Errors
    /// The disk has been stopped.
    pub async fn leave(self: &Arc<Self>) -> Result<Leaving> {
        let past = self.changing.clone().lock_owned().await;
        if past.stopped {
            return Err(Error::new(Kind::Unavailable, "the disk has been stopped"));
        }
        let graph = self.graph();
        self.gated.fetch_add(1, Ordering::Relaxed);
        let leaving = Leaving { disk: self.clone(), graph, past, since: crate::rt::now() };
        match self.admit_into(None).await {
            Ok(()) => {
                leaving.graph.announce_closing();
                Ok(leaving)
            }
            Err(error) => {
                leaving.stay().await?;
                Err(error)
            }
        }
    }

    /// Opens the first graph of a disk whose gate stays closed until [`Entering::begin`]. What fails is not
    /// closed again: whatever it has opened belongs to another process, too.
    ///
    /// # Errors
    /// What the first element says that cannot be opened.
    pub async fn enter(self: &Arc<Self>, graph: Arc<Graph>) -> Result<Entering> {
        let past = self.changing.clone().lock_owned().await;
        let change = Change::default();
        let step = Step { disk: self, before: self.graph(), next: graph.clone(), change: &change };
        // Clients that are taken over are held against it.
        self.set_graph(graph.clone());
        let mut announced = Vec::new();
        for instance in step.coming() {
            let open = Open { host: &self.host, disk: self, name: &instance.name };
            let uri = contained(|| instance.element.open(&open)).map_err(|e| e.in_element(&instance.name))?;
            announced.extend(uri.map(|uri| (instance.name.clone(), uri)));
        }
        Ok(Entering { disk: self.clone(), graph, past, announced })
    }
}

/// A disk whose gate is closed until it [stays](Leaving::stay), or the process ends.
pub struct Leaving {
    disk: Arc<Disk>,
    graph: Arc<Graph>,
    past: OwnedMutexGuard<Past>,
    /// When the gate was closed.
    pub since: Instant,
}

impl Leaving {
    /// Waits until nothing is in flight, and flushes.
    ///
    /// # Errors
    /// [`Kind::Busy`] with the requests that have not ended in time; a flush that failed.
    pub async fn drain(&self, deadline: Duration) -> Result<()> {
        let body = async {
            for graph in self.past.graphs.iter().chain([&self.graph]) {
                graph.drained().await;
            }
            self.disk.flush(&self.graph).await
        };
        match crate::rt::timeout(deadline, body).await {
            Some(result) => flushed(&self.graph, Some(result)),
            None => Err(stuck(&self.disk, deadline, "the program has not been replaced").await),
        }
    }

    /// What each element gives to its successor, where that is anything.
    ///
    /// # Errors
    /// What the first element says that cannot give it.
    pub async fn luggage(&self) -> Result<Vec<(String, Luggage)>> {
        let mut all = Vec::new();
        for instance in self.graph.instances() {
            let open = self.open(instance);
            // Made and awaited under one roof: either may panic.
            let asked = AssertUnwindSafe(async { instance.element.hand_over(&open).await }).catch_unwind();
            let given = asked.await.unwrap_or_else(|_| Err(Error::internal("the element panicked")));
            let luggage = given.map_err(|error| error.in_element(&instance.name))?;
            if !luggage.is_none() {
                all.push((instance.name.clone(), luggage));
            }
        }
        Ok(all)
    }

    fn open<'a>(&'a self, instance: &'a Instance) -> Open<'a> {
        Open { host: &self.disk.host, disk: &self.disk, name: &instance.name }
    }

    /// The successor is about to serve: tells what could not be passed on goodbye. Returns when that has been
    /// said, as far as nobody has to be waited for.
    pub async fn part(&self) {
        for instance in self.graph.instances() {
            let parted = contained(|| {
                instance.element.part();
                Ok(())
            });
            parted.unwrap_or_else(|error| log(instance, &error));
        }
        // A shard that has ended has nobody to tell.
        let _ = self.disk.host.turn().await;
    }

    /// The handover is undone: the gate opens, as if nothing had been.
    ///
    /// # Errors
    /// A shard has ended.
    pub async fn stay(mut self) -> Result<()> {
        self.graph.forget_closing();
        self.past.running = false;
        self.disk.admit_into(Some(self.graph.clone())).await?;
        self.disk.settle(&mut self.past)?;
        if !self.past.is_settled() {
            self.disk.finish_later();
        }
        Ok(())
    }
}

/// A flush that failed is a reason to stay, unless that is known already: it goes along then, and only another
/// graph heals a graph that has failed.
fn flushed(graph: &Graph, result: Option<Result<()>>) -> Result<()> {
    let late =
        || Err(Error::new(Kind::Busy, "a flush has not ended in time; the program has not been replaced"));
    match result.unwrap_or_else(late) {
        Err(error) if graph.is_failed() || Registry::of_process().has_failed() => {
            tracing::warn!(graph = graph.name(), "handed over without a flush: {error}");
            Ok(())
        }
        flushed => flushed,
    }
}

/// A disk that has been opened behind a closed gate.
pub struct Entering {
    disk: Arc<Disk>,
    graph: Arc<Graph>,
    past: OwnedMutexGuard<Past>,
    /// What the exports announce: element and URI.
    pub announced: Vec<(String, String)>,
}

impl Entering {
    /// Gives an element what the one in its place has handed over.
    ///
    /// # Errors
    /// There is no such element, or it cannot go on from there.
    pub async fn take_over(&self, element: &str, luggage: Luggage) -> Result<()> {
        let Some(instance) = self.graph.instances().find(|instance| instance.name == element) else {
            return Err(
                Error::invalid("it has luggage, and the graph has no such element").in_element(element)
            );
        };
        let open = Open { host: &self.disk.host, disk: &self.disk, name: &instance.name };
        let asked =
            AssertUnwindSafe(async { instance.element.take_over(luggage, &open).await }).catch_unwind();
        let taken = asked.await.unwrap_or_else(|_| Err(Error::internal("the element panicked")));
        taken.map_err(|error| error.in_element(element))
    }

    /// Opens the gate, and starts elements' own work. The other process is not heard of any more.
    ///
    /// # Errors
    /// A shard has ended.
    pub async fn begin(mut self) -> Result<()> {
        self.disk.admit_into(Some(self.graph.clone())).await?;
        self.past.running = true;
        start_work(&self.disk, &self.graph)
    }
}
