//! What is left of the graphs before the present one, and the work of elements' own.

use super::close;
use crate::error::Result;
use crate::graph::Graph;
use crate::sched::serve::run_node;
use crate::sched::{Disk, Lane};
use std::cell::Cell;
use std::sync::Arc;

/// What is left of the graphs before, and whether the work of its own of the present one goes on.
#[derive(Default)]
pub(in crate::sched) struct Past {
    /// Graphs that may have requests in flight.
    pub(super) graphs: Vec<Arc<Graph>>,
    /// Graphs of which only that is in flight that was left behind.
    pub(super) left: Vec<Arc<Graph>>,
    /// True if [`Element::run`](crate::Element::run) has been started for the present graph.
    pub(super) running: bool,
    /// Only the sources of the present graph are open.
    pub(super) standby: bool,
    pub(super) stopped: bool,
}

impl Past {
    pub(super) fn is_settled(&self) -> bool {
        self.stopped || (self.running && self.graphs.is_empty() && self.left.is_empty())
    }

    /// The graph that has to end next; none if work of the present one has to.
    pub(super) fn waited_for(&self) -> Option<Arc<Graph>> {
        self.graphs.first().or(self.left.first().filter(|_| self.running)).cloned()
    }

    /// Closes elements that no graph needs any more.
    pub(super) fn close_drained(&mut self, now: &Arc<Graph>) {
        let mut over: Vec<_> = self.graphs.extract_if(.., |graph| graph.is_drained()).collect();
        over.extend(self.left.extract_if(.., |graph| graph.is_drained()));
        over.iter().for_each(|graph| self.close(graph, now));
    }

    /// Closes what nobody has but a graph of which nothing is left.
    pub(super) fn close(&self, over: &Graph, now: &Arc<Graph>) {
        for gone in over.instances() {
            let others = self.graphs.iter().chain(&self.left).chain([now]);
            if !others.into_iter().any(|other| other.has(gone)) {
                close(gone);
            }
        }
    }
}

/// Starts what has work of its own: one job for each shard, so that a change wakes each once.
pub(super) fn start_work(disk: &Disk, graph: &Arc<Graph>) -> Result<()> {
    let shards = disk.host.shards();
    for first in 0..shards.min(graph.nodes.len()) {
        let nodes = (first..graph.nodes.len()).step_by(shards);
        let working: Vec<_> = nodes.map(|node| (node, Working::new(graph))).collect();
        disk.host.on(first, move |shard| {
            for (node, working) in working {
                let lane = Lane::new(working.0.clone(), shard.clone());
                drop(tokio::task::spawn_local(run_node(lane, node, working)));
            }
        })?;
    }
    Ok(())
}

/// An element's work of its own goes on, or is about to begin, while this lives.
pub(in crate::sched) struct Working(Arc<Graph>, Cell<bool>);

impl Working {
    fn new(graph: &Arc<Graph>) -> Working {
        graph.runs.enter();
        graph.lanes.enter();
        graph.needed.enter();
        Working(graph.clone(), Cell::new(true))
    }

    /// It has ended but for what may be left behind.
    pub(in crate::sched) fn only_left(&self) {
        if self.1.replace(false) {
            self.0.needed.leave();
        }
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.only_left();
        self.0.runs.leave();
        self.0.lanes.leave();
    }
}
