//! A disk that waits for its turn: its clients are connected and know how large it is, and nothing below them has been
//! opened. For virtual machines that move between hosts: the host that they move to connects before the other lets go.

use super::{close, contained, start_work};
use crate::element::Open;
use crate::error::{Error, Kind, Result};
use crate::graph::{Graph, Instance};
use crate::sched::Disk;
use std::sync::Arc;

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

    /// Opens the rest of a graph that [stands by](Self::stand_by), and then the gate.
    ///
    /// # Errors
    /// The first element that cannot be opened; what was opened is closed again, and the disk stands by as before.
    pub async fn activate(self: &Arc<Self>) -> Result<()> {
        let mut past = self.changing.lock().await;
        if past.stopped {
            return Err(Error::new(Kind::Unavailable, "the disk has been stopped"));
        }
        let graph = self.graph();
        self.open_some(&graph, |instance| instance.ty.ports.input)?;
        (past.standby, past.running) = (false, true);
        self.admit_into(Some(graph.clone())).await?;
        start_work(self, &graph)
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
