//! A graph that goes to another process, as it runs, and one that has come from there.

use super::{Live, Options, Setup, State};
use crate::error::{Error, Kind, Result};
use crate::events::EventKind;
use crate::lang::Spec;
use crate::luggage::Luggage;
use crate::sched::{Entering, Host, Leaving};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedMutexGuard;

/// A graph that is about to go: it does not change any more, and serves until its gate is closed.
pub struct Departing {
    live: Arc<Live>,
    _unchanged: OwnedMutexGuard<()>,
}

impl Live {
    /// Keeps the graph from being changed, so that it can be handed over.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is being changed; what an element has that would be lost.
    pub fn depart(self: &Arc<Self>) -> Result<Departing> {
        let unchanged = self.changing.clone().try_lock_owned();
        let unchanged = unchanged.map_err(|_| {
            Error::new(Kind::Busy, format!("{} is being changed: try again when that is done", self.name()))
        })?;
        self.not_standing_by()?;
        self.disk.may_hand_over()?;
        Ok(Departing { live: self.clone(), _unchanged: unchanged })
    }

    /// Builds and opens a graph that another process has handed over, behind a closed gate.
    ///
    /// # Errors
    /// The first element that cannot be built or opened, or what `built` says, which is called in between.
    /// Nothing is closed again: the process must end.
    pub async fn arrive(
        host: &Arc<Host>,
        setup: Setup,
        spec: Spec,
        built: impl FnOnce() -> Result<()>,
    ) -> Result<Arriving> {
        let live = Live::empty(host, setup, &spec).await?;
        let spec = Arc::new(spec);
        let graph = live.build(&spec, &live.diff(&spec), &live.disk.graph(), &Options::default()).await?;
        built()?;
        let entering = live.disk.enter(Arc::new(graph)).await?;
        *live.state() = State { spec, exports: entering.announced.clone(), standby: None };
        Ok(Arriving { live: Arc::new(live), entering })
    }
}

impl Departing {
    /// The graph.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// The graph as it runs.
    pub fn spec(&self) -> Arc<Spec> {
        self.live.spec()
    }

    /// Flushes while requests go on, so that the pause is shorter.
    ///
    /// # Errors
    /// It cannot be flushed.
    pub async fn flush(&self, deadline: Duration) -> Result<()> {
        self.live.disk.flush_before_leaving(deadline).await
    }

    /// Closes the gate. The graph must stay unchanged until the handover is over.
    ///
    /// # Errors
    /// It has been stopped.
    pub async fn close_gate(&self) -> Result<Leaving> {
        self.live.disk.leave().await
    }
}

/// A graph that has been opened and does not serve yet.
pub struct Arriving {
    live: Arc<Live>,
    entering: Entering,
}

impl Arriving {
    /// The graph.
    pub fn live(&self) -> &Arc<Live> {
        &self.live
    }

    /// Gives an element what the one in its place has handed over.
    ///
    /// # Errors
    /// It cannot go on from there.
    pub async fn take_over(&self, element: &str, luggage: Luggage) -> Result<()> {
        self.entering.take_over(element, luggage).await
    }

    /// Opens the gate.
    ///
    /// # Errors
    /// A shard has ended.
    pub async fn begin(self) -> Result<Arc<Live>> {
        self.entering.begin().await?;
        self.live.publish(EventKind::HandedOver, "the graph serves, handed over by another process", &[]);
        Ok(self.live)
    }
}
