//! What a daemon serves: graphs, which come and go while it runs.

use super::refusal::Refusal;
use crate::graphs::{GraphFile, Reader};
use crate::view::{ExportView, GraphSummary, GraphView, LiveView, SourceView};
use blockmason::{Disk, Graph, Host};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::time::Instant;

/// What is served, and with what.
pub(crate) struct Daemon {
    pub(crate) started: Instant,
    pub(crate) host: Arc<Host>,
    /// How graph files are understood: the folders, and the `-D` of `mason run`.
    pub(crate) reader: Reader,
    graphs: Mutex<Graphs>,
    /// Told when a graph has left `changing`.
    changed: Notify,
}

#[derive(Default)]
struct Graphs {
    /// In the order in which they were loaded.
    served: Vec<Arc<Served>>,
    /// Names of graphs that are being loaded or unloaded: nobody else may touch them.
    changing: Vec<String>,
    /// Nothing is loaded any more.
    stopping: bool,
}

/// A graph that serves.
pub(crate) struct Served {
    pub(crate) file: GraphFile,
    pub(crate) disk: Arc<Disk>,
    /// Each export's element and URI.
    pub(crate) exports: Vec<(String, String)>,
}

/// A name that nobody else may load or unload until this goes.
struct Changing<'a> {
    daemon: &'a Daemon,
    name: String,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.daemon.graphs().changing.retain(|name| *name != self.name);
        self.daemon.changed.notify_waiters();
    }
}

impl Daemon {
    pub(crate) fn new(host: Arc<Host>, reader: Reader) -> Daemon {
        let (graphs, changed) = Default::default();
        Daemon { started: blockmason::rt::now(), host, reader, graphs, changed }
    }

    fn graphs(&self) -> MutexGuard<'_, Graphs> {
        // Every change of it is complete before anything can panic.
        self.graphs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All graphs that serve, in the order in which they were loaded.
    pub(crate) fn served(&self) -> Vec<Arc<Served>> {
        self.graphs().served.clone()
    }

    /// The graph of that name.
    ///
    /// # Errors
    /// There is none; the sentence says which there are.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Served>, Refusal> {
        let graphs = self.graphs();
        let found = graphs.served.iter().find(|served| served.file.name == name).cloned();
        found.ok_or_else(|| {
            let names: Vec<_> = graphs.served.iter().map(|served| served.file.name.as_str()).collect();
            let there = match names.as_slice() {
                [] => "none is served".to_owned(),
                names => format!("served are: {}", names.join(", ")),
            };
            Refusal::not_found(format!("no graph {name} is served; {there}"))
        })
    }

    /// Builds a graph and serves it. When this returns, its exports accept.
    pub(crate) async fn load(&self, file: GraphFile) -> Result<Arc<Served>, Refusal> {
        let changing = self.reserve(&file)?;
        let graph = self.build(&file)?;
        let served = self.open(file, graph).await?;
        self.graphs().served.push(served.clone());
        drop(changing);
        Ok(served)
    }

    /// Builds all graphs before the first of them serves. On a failure those that serve are stopped.
    pub(crate) async fn load_all(&self, files: Vec<GraphFile>) -> Result<(), Refusal> {
        let mut built = Vec::with_capacity(files.len());
        for file in files {
            let changing = self.reserve(&file)?;
            let graph = self.build(&file)?;
            built.push((file, graph, changing));
        }
        for (file, graph, changing) in built {
            match self.open(file, graph).await {
                Ok(served) => self.graphs().served.push(served),
                Err(refusal) => {
                    drop(changing);
                    self.stop_served().await?;
                    return Err(refusal);
                }
            }
        }
        Ok(())
    }

    /// Ends service of a graph: its exports close, requests in flight end, everything is flushed.
    pub(crate) async fn unload(&self, name: &str) -> Result<(), Refusal> {
        let (served, changing) = {
            let served = self.find(name)?;
            let mut graphs = self.graphs();
            // Somebody else may have been faster.
            let Some(at) = graphs.served.iter().position(|other| Arc::ptr_eq(other, &served)) else {
                return Err(Refusal::busy(format!("{name} is being unloaded")));
            };
            graphs.changing.push(name.to_owned());
            (graphs.served.remove(at), Changing { daemon: self, name: name.to_owned() })
        };
        let stopped = served.stop().await;
        drop(changing);
        stopped
    }

    /// Ends service of every graph, and loads no more. The first refusal is returned when all have ended.
    pub(crate) async fn stop(&self) -> Result<(), Refusal> {
        self.graphs().stopping = true;
        loop {
            let changed = self.changed.notified();
            if self.graphs().changing.is_empty() {
                break;
            }
            changed.await;
        }
        self.stop_served().await
    }

    async fn stop_served(&self) -> Result<(), Refusal> {
        let all = std::mem::take(&mut self.graphs().served);
        let mut stopped = Ok(());
        for served in all {
            stopped = stopped.and(served.stop().await);
        }
        stopped
    }

    fn reserve(&self, file: &GraphFile) -> Result<Changing<'_>, Refusal> {
        let name = file.name.clone();
        let mut graphs = self.graphs();
        if graphs.stopping {
            return Err(Refusal::new("unavailable", "the daemon is about to end"));
        }
        if graphs.served.iter().any(|served| served.file.name == name) {
            return Err(Refusal::busy(format!(
                "a graph {name} is served already; `mason unload {name}` ends it"
            )));
        }
        if graphs.changing.contains(&name) {
            return Err(Refusal::busy(format!("a graph {name} is being loaded or unloaded")));
        }
        graphs.changing.push(name.clone());
        Ok(Changing { daemon: self, name })
    }

    /// Files are opened here, and that may take long.
    fn build(&self, file: &GraphFile) -> Result<Graph, Refusal> {
        let failed = |failure: crate::failure::Failure| Refusal::new("unavailable", failure);
        file.make_folders().map_err(failed)?;
        tokio::task::block_in_place(|| file.build(self.host.state_dir(), self.host.shards()))
            .map_err(|error| Refusal::in_graph(&error, &file.spec))
    }

    async fn open(&self, file: GraphFile, graph: Graph) -> Result<Arc<Served>, Refusal> {
        let failed = |error| Refusal::in_graph(&error, &file.spec);
        let disk = Disk::new(&self.host, Arc::new(graph)).await.map_err(failed)?;
        let exports = disk.start().await.map_err(failed)?;
        Ok(Arc::new(Served { file, disk, exports }))
    }
}

impl Served {
    async fn stop(&self) -> Result<(), Refusal> {
        self.disk.stop().await.map_err(|error| Refusal::in_graph(&error, &self.file.spec))
    }

    /// The value of a handler.
    pub(crate) fn get(&self, element: &str, handler: &str) -> Result<String, Refusal> {
        self.disk.graph().get(element, handler).map_err(|error| self.refused(element, &error))
    }

    /// Sets a handler; when this returns, the new value counts.
    pub(crate) async fn set(&self, element: &str, handler: &str, value: &str) -> Result<(), Refusal> {
        self.disk.graph().set(element, handler, value).map_err(|error| self.refused(element, &error))
    }

    /// Calls a handler.
    pub(crate) fn call(&self, element: &str, handler: &str, argument: &str) -> Result<String, Refusal> {
        self.disk.graph().call(element, handler, argument).map_err(|error| self.refused(element, &error))
    }

    /// A handler's error: about the element, if there is one of that name.
    fn refused(&self, element: &str, error: &blockmason::Error) -> Refusal {
        let spec = &self.file.spec;
        let found = spec.find(element).map(|ix| &spec.elements[ix]);
        let place = found.map(|found| spec.place(found).to_string());
        let element = found.map(|found| found.name.clone());
        Refusal { element, place, ..Refusal::of(error) }
    }

    /// For a list of graphs.
    pub(crate) fn summary(&self) -> GraphSummary {
        GraphSummary {
            name: self.file.name.clone(),
            file: self.file.path.display().to_string(),
            path: self.file.opened().to_owned(),
            failed: self.disk.graph().is_failed(),
            exports: self.exports(),
        }
    }

    /// Everything that is to be seen.
    pub(crate) fn view(&self) -> GraphView {
        let graph = self.disk.graph();
        let sources = graph.instances().enumerate().filter(|(_, instance)| !instance.ty.ports.input);
        let live = LiveView {
            failed: graph.is_failed(),
            in_flight_bytes: self.disk.budget().used(),
            exports: self.exports(),
            sources: sources.map(|(node, instance)| SourceView::read(&graph, node, &instance.name)).collect(),
        };
        let view = GraphView::of_file(&self.file).with_geometry(&graph).with_counters(&graph);
        GraphView { live: Some(live), ..view }
    }

    fn exports(&self) -> Vec<ExportView> {
        let view =
            |(element, uri): &(String, String)| ExportView { element: element.clone(), uri: uri.clone() };
        self.exports.iter().map(view).collect()
    }
}
