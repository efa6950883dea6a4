//! A disk that waits for its turn: its clients are connected and know how large it is, and nothing below them has been
//! opened. For virtual machines that move between hosts: the host that they move to connects before the other lets go.

use super::{close, contained, start_work};
use crate::element::Open;
use crate::error::{Error, Kind, Result};
use crate::graph::{Graph, Instance};
use crate::request::{Origin, Request};
use crate::sched::Disk;
use std::sync::Arc;
use std::time::Duration;

/// What is read of a disk before it serves, in bytes, and how long that may take.
const FIRST: u64 = 4096;
const LONGEST: Duration = Duration::from_secs(30);

impl Disk {
    /// Opens the sources of the first graph and nothing else, behind a closed gate. Returns what they announce.
    ///
    /// # Errors
    /// The first source that cannot be opened; the others are closed again.
    pub async fn stand_by(self: &Arc<Self>, graph: Arc<Graph>) -> Result<Vec<(String, String)>> {
        let mut past = self.changing.lock().await;
        let before = self.graph();
        // Clients are told of this one as soon as a source is open.
        self.set_graph(graph.clone());
        let announced = self.open_some(&graph, |instance| !instance.ty.ports.input);
        match &announced {
            Ok(_) => past.standby = true,
            Err(_) => self.set_graph(before),
        }
        announced
    }

    /// Opens the rest of a graph that [stands by](Self::stand_by), and then the gate, once a first block could be read.
    ///
    /// # Errors
    /// The first element that cannot be opened, or that does not do its work: a key that opens nothing, say. What was opened is closed
    /// again, and the disk stands by as before.
    pub async fn activate(self: &Arc<Self>) -> Result<()> {
        let mut past = self.changing.lock().await;
        if past.stopped {
            return Err(Error::new(Kind::Unavailable, "the disk has been stopped"));
        }
        let graph = self.graph();
        self.open_some(&graph, |instance| instance.ty.ports.input)?;
        if let Err(error) = self.read_some(&graph).await {
            let opened: Vec<_> = graph.instances().filter(|instance| instance.ty.ports.input).collect();
            opened.into_iter().rev().for_each(|instance| close(instance));
            return Err(error);
        }
        (past.standby, past.running) = (false, true);
        self.admit_into(Some(graph.clone())).await?;
        start_work(self, &graph)
    }

    /// Reads what each source begins with: elements that open what they have below when they are first asked are asked. A block that
    /// cannot be read is what it would have been before, and so is a disk that takes long.
    async fn read_some(&self, graph: &Arc<Graph>) -> Result<()> {
        for (node, instance) in graph.instances().enumerate().filter(|(_, instance)| !instance.ty.ports.input)
        {
            let below = graph.below(node).map_err(|error| error.in_element(&instance.name))?;
            let first = Request { origin: Origin::Internal, ..Request::read(0, below.size.min(FIRST)) };
            match crate::rt::timeout(LONGEST, self.host.submit(graph, node, 0, first)).await {
                Some(Err(error)) if !matches!(error.kind(), Kind::Io | Kind::Internal) => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    fn open_some(
        self: &Arc<Self>,
        graph: &Graph,
        which: impl Fn(&Instance) -> bool,
    ) -> Result<Vec<(String, String)>> {
        let (mut opened, mut announced) = (Vec::new(), Vec::new());
        for instance in graph.instances().filter(|instance| which(instance)) {
            let open = Open { host: &self.host, disk: self, name: &instance.name };
            match contained(|| instance.element.open(&open)) {
                Ok(uri) => announced.extend(uri.map(|uri| (instance.name.clone(), uri))),
                Err(error) => {
                    opened.into_iter().rev().for_each(close);
                    return Err(error.in_element(&instance.name));
                }
            }
            opened.push(&**instance);
        }
        Ok(announced)
    }
}
