//! What a daemon serves: graphs, which come and go while it runs.

use super::backing::{Backups, Interrupted, forget_maps};
use super::graph_file::Sum;
use super::moving::{Moves, Resumed};
use super::refusal::Refusal;
use super::server::Ended;
use super::trial::Trial;
use crate::active::Active;
use crate::faults::faults;
use crate::graphs::{CATALOGUE, GraphFile, Reader};
use crate::left::{Choice, Left};
use crate::view::{ExportView, GraphSummary, GraphView, LiveView, SourceView};
use blockmason::Host;
use blockmason::live::{Heads, Live, Setup};
use blockmason_elements::migrate::copy::Progress;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::{Notify, watch};
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
    /// Where the control socket is, and its device and inode.
    control: OnceLock<(PathBuf, (u64, u64))>,
    /// Set once another process serves.
    gone: watch::Sender<Option<Gone>>,
}

/// Another process serves, and this one has to end.
#[derive(Clone)]
pub(crate) struct Gone {
    /// Its number.
    pub(crate) to: u32,
    /// Whoever has asked for it has been answered when this ends.
    pub(crate) told: Ended,
}

/// Stands for all graphs among those that are being loaded or unloaded: no graph has this name.
const ALL: &str = "";

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
    pub(crate) live: Arc<Live>,
    /// Its file, as messages call it.
    pub(crate) file: String,
    /// Its file, absolute.
    pub(crate) path: PathBuf,
    /// What the next start must know.
    pub(crate) left: Left,
    /// What the file is known to say; none where there is no file, but a pipe.
    known: Mutex<Option<Sum>>,
    /// Held while that and the file are brought up to date.
    pub(crate) saving: tokio::sync::Mutex<()>,
    /// Set while a graph is being tried.
    trial: Mutex<Option<Trial>>,
    /// Disks on their way to other stores.
    pub(super) moves: Moves,
    /// Disks of which backups are made.
    pub(super) backups: Backups,
}

/// A name that nobody else may load or unload until this goes.
pub(crate) struct Changing<'a> {
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
        let (graphs, changed, control, gone) = Default::default();
        Daemon { started: blockmason::rt::now(), host, reader, graphs, changed, control, gone }
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
        let found = graphs.served.iter().find(|served| served.live.name() == name).cloned();
        found.ok_or_else(|| {
            let names: Vec<_> = graphs.served.iter().map(|served| served.live.name()).collect();
            let there = match names.as_slice() {
                [] => "none is served".to_owned(),
                names => format!("served are: {}", names.join(", ")),
            };
            Refusal::not_found(format!("no graph {name} is served; {there}"))
        })
    }

    /// Builds a graph and serves it. When this returns, its exports accept.
    pub(crate) async fn load(
        self: &Arc<Self>,
        file: GraphFile,
        choice: Choice,
        heads: Heads,
    ) -> Result<Arc<Served>, Refusal> {
        let changing = self.reserve(&file.name)?;
        let served = self.start(file, choice, heads).await?;
        self.graphs().served.push(served.clone());
        drop(changing);
        Ok(served)
    }

    /// Ends service of a graph: its exports close, requests in flight end, everything is flushed. What only a cache on this
    /// machine has must have gone below before, unless `undrained` says that it may stay.
    pub(crate) async fn unload(&self, name: &str, undrained: bool) -> Result<(), Refusal> {
        let (served, changing) = {
            let served = self.find(name)?;
            if !undrained {
                served.may_be_left().map_err(|mut refusal| {
                    refusal.message +=
                        "; --undrained leaves it here, for when the graph is loaded here again";
                    refusal
                })?;
            }
            let mut graphs = self.graphs();
            graphs.not_leaving()?;
            // Somebody else may have been faster.
            let Some(at) = graphs.served.iter().position(|other| Arc::ptr_eq(other, &served)) else {
                return Err(Refusal::busy(format!("{name} is being unloaded")));
            };
            graphs.changing.push(name.to_owned());
            (graphs.served.remove(at), Changing { daemon: self, name: name.to_owned() })
        };
        // First: whatever ends the process meanwhile, the next start does not serve what another host is about to.
        if let Err(error) = Active::of(self.host.state_dir(), &served.path).forget() {
            tracing::warn!("{name}: that it was activated cannot be forgotten: {error}");
        }
        let stopped = served.stop().await;
        drop(changing);
        // Guests may have written until then.
        let ended = stopped.and_then(|()| if undrained { Ok(()) } else { served.may_be_left() });
        ended.map_err(|refusal| Refusal {
            message: format!("{name} is not served any more, and not all is well: {}", refusal.message),
            ..refusal
        })
    }

    /// Ends service of every graph, and loads no more. The first refusal is returned when all have ended.
    pub(crate) async fn stop(&self) -> Result<(), Refusal> {
        self.settle().await;
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

    fn reserve(&self, name: &str) -> Result<Changing<'_>, Refusal> {
        let mut graphs = self.graphs();
        if graphs.stopping {
            return Err(Refusal::new("unavailable", "the daemon is about to end"));
        }
        if graphs.served.iter().any(|served| served.live.name() == name) {
            return Err(Refusal::busy(format!(
                "a graph {name} is served already; `mason unload {name}` ends it"
            )));
        }
        graphs.not_leaving()?;
        if graphs.changing.iter().any(|other| other == name) {
            return Err(Refusal::busy(format!("a graph {name} is being loaded or unloaded")));
        }
        graphs.changing.push(name.to_owned());
        Ok(Changing { daemon: self, name: name.to_owned() })
    }

    async fn start(
        self: &Arc<Self>,
        file: GraphFile,
        choice: Choice,
        heads: Heads,
    ) -> Result<Arc<Served>, Refusal> {
        let source = file.spec.sources.get(0);
        let path = source.map_or_else(|| file.path.clone(), |source| source.opened().to_owned());
        // By the file itself, whatever links lead to it.
        let path = path.canonicalize().unwrap_or(path);
        let known = source.filter(|_| path.is_file()).map(|source| Sum::of(source.text().as_bytes()));
        let left = Left::of(self.host.state_dir(), &path);
        let trial = Trial::read(self, &path)?;
        let (file, interrupted) = Interrupted::of(self, &path, file, &left, choice)?;
        let (file, mut resumed) = match interrupted {
            // A graph has either.
            Some(_) => (file, None),
            None => Resumed::of(self, &path, file, &left, choice)
                .map_err(|refusal| on_trial(refusal, trial.is_some()))?,
        };
        forget_maps(self, &path, &file.spec)?;
        let trial = self.resumed(trial, &file, &path, choice)?;
        file.make_folders().map_err(|failure| Refusal::new("unavailable", failure))?;
        // Over overlays heads have nothing to say.
        let heads = if trial.is_some() || interrupted.is_some() { Heads::Ignore } else { heads };
        let shown = file.path.display().to_string();
        for line in blockmason_elements::advice(&file.spec) {
            tracing::warn!("{line}");
        }
        let live = match resumed.take_if(|resumed| resumed.goes_on()) {
            None => self.start_live(&path, &file, heads).await?,
            Some(moves) => {
                let (live, rest) = self.start_moving(&path, &file, heads, moves).await?;
                resumed = Some(rest);
                live
            }
        };
        if choice == Choice::File
            && let Err(error) = left.forget()
        {
            tracing::warn!("what the graph left behind cannot be forgotten: {error}");
        }
        if choice == Choice::File {
            Trial::forget(self, &path);
        }
        let (trial, known, saving) = (Mutex::new(trial), Mutex::new(known), Default::default());
        let (moves, backups) = Default::default();
        let served = Arc::new(Served { live, file: shown, path, left, known, saving, trial, moves, backups });
        if let Some(resumed) = resumed {
            // What was left of the graph before is not what serves now.
            if let Err(refusal) = served.remember_anew(self).await {
                tracing::warn!("{}", refusal.message);
            }
            resumed.attend(&served, self);
        }
        if let Some(interrupted) = interrupted {
            interrupted.attend(&served, self);
        }
        Ok(served)
    }

    /// Serves a graph in which disks move; or, if that cannot be, the old disks alone.
    async fn start_moving(
        &self,
        path: &Path,
        file: &GraphFile,
        heads: Heads,
        mut moves: Resumed,
    ) -> Result<(Arc<Live>, Resumed), Refusal> {
        let heads = moves.heads(heads);
        let refusal = match self.start_live(path, file, heads.clone()).await {
            Ok(live) => return Ok((live, moves)),
            Err(refusal) => refusal,
        };
        let alone = moves.alone(self, path, file)?;
        match self.start_live(path, &alone, heads).await {
            Ok(live) => Ok((live, moves.fell_back(self, path, &alone.spec, &refusal.message))),
            Err(_) => {
                moves.goes_on_later(self, path)?;
                Err(refusal)
            }
        }
    }

    async fn start_live(&self, path: &Path, file: &GraphFile, heads: Heads) -> Result<Arc<Live>, Refusal> {
        let state_dir = self.host.state_dir().to_owned();
        let active = Active::of(&state_dir, path).is_set();
        let setup = Setup { catalogue: CATALOGUE, name: file.name.clone(), state_dir };
        let refused = match active {
            false => None,
            true => match Live::start(&self.host, setup.clone(), file.spec.clone(), heads.clone()).await {
                Ok(live) => return Ok(live),
                Err(error) => Some(error),
            },
        };
        match (Live::stand_by(&self.host, setup, file.spec.clone(), heads).await, refused) {
            (Ok(live), None) => Ok(live),
            // Its guest may be elsewhere by now.
            (Ok(live), Some(error)) if live.stands_by() => {
                tracing::warn!("{}: it stands by, though it was activated before: {error}", file.name);
                Ok(live)
            }
            (Ok(_), Some(error)) | (Err(_), Some(error)) | (Err(error), None) => {
                Err(Refusal::in_graph(&error, &file.spec))
            }
        }
    }
}

impl Daemon {
    /// The trial that goes on with a graph that is about to start. Nothing is forgotten here.
    fn resumed(
        &self,
        trial: Option<Trial>,
        file: &GraphFile,
        path: &Path,
        choice: Choice,
    ) -> Result<Option<Trial>, Refusal> {
        let Some(trial) = trial else { return Ok(None) };
        let refused = |what: String| Refusal::busy(format!("{}: {what}", path.display()));
        if trial.is_in(&file.spec) {
            let missing = trial.missing(self, path);
            let gone = |overlay: PathBuf| {
                refused(format!("{}: what was written while a graph was tried is gone", overlay.display()))
            };
            return missing.map_or(Ok(Some(trial)), |overlay| Err(gone(overlay)));
        }
        match (trial.is_committing(), choice) {
            // The overlays were out: everything is in the disks.
            (true, Choice::Ask | Choice::Left) => {
                Trial::forget(self, path);
                Ok(None)
            }
            (true, Choice::File) => Err(refused(
                "a commit of a trial was under way, and its disks may be half merged: `--as-left` goes on".to_owned(),
            )),
            (false, Choice::File) => Ok(None),
            (false, Choice::Ask | Choice::Left) => Err(refused(
                "a graph was being tried, and its record is there but not the graph: `--as-file` serves the file \
                 and forgets what was written meanwhile"
                    .to_owned(),
            )),
        }
    }
}

impl Graphs {
    fn not_leaving(&self) -> Result<(), Refusal> {
        match self.changing.iter().any(|name| name == ALL) {
            true => Err(Refusal::busy("the daemon is being handed over to another process")),
            false => Ok(()),
        }
    }
}

/// For another process that goes on, and for the one that has come.
impl Daemon {
    /// Keeps graphs from coming and going.
    ///
    /// # Errors
    /// One is, or all of them are being handed over already, or the daemon ends.
    pub(crate) fn begin_handover(&self) -> Result<Changing<'_>, Refusal> {
        let mut graphs = self.graphs();
        graphs.not_leaving()?;
        if graphs.stopping {
            return Err(Refusal::new("unavailable", "the daemon is about to end"));
        }
        if let Some(name) = graphs.changing.first() {
            return Err(Refusal::busy(format!("a graph {name} is being loaded or unloaded: try again")));
        }
        graphs.changing.push(ALL.to_owned());
        Ok(Changing { daemon: self, name: ALL.to_owned() })
    }

    /// Another process serves.
    pub(crate) fn go(&self, gone: Gone) {
        self.gone.send_replace(Some(gone));
    }

    /// Waits until another process serves, which it mostly never does.
    pub(crate) async fn gone(&self) -> Gone {
        let mut watch = self.gone.subscribe();
        let gone = watch.wait_for(Option::is_some).await.ok().and_then(|gone| gone.clone());
        match gone {
            Some(gone) => gone,
            // The sender is ours: it does not go.
            None => std::future::pending().await,
        }
    }

    /// Nothing is loaded or handed over any more; waits for what has begun.
    pub(crate) async fn settle(&self) {
        self.graphs().stopping = true;
        loop {
            let changed = self.changed.notified();
            if self.graphs().changing.is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Where the control socket is, and its device and inode.
    pub(crate) fn control(&self) -> Option<(PathBuf, (u64, u64))> {
        self.control.get().cloned()
    }

    /// Remembers that, once.
    pub(crate) fn set_control(&self, path: PathBuf, identity: (u64, u64)) {
        let _ = self.control.set((path, identity));
    }

    /// A graph that has come from another process, as it ran there.
    pub(crate) fn arrived(
        &self,
        live: Arc<Live>,
        file: &str,
        path: &Path,
        known: Option<Sum>,
    ) -> Result<Arc<Served>, Refusal> {
        let (file, path) = (file.to_owned(), path.to_owned());
        let left = Left::of(self.host.state_dir(), &path);
        // Older programs do not say.
        let known = known.or_else(|| Sum::read(&path));
        let trial =
            Trial::read(self, &path)?.filter(|trial| trial.is_in(&live.spec()) || trial.is_committing());
        let (trial, known, saving) = (Mutex::new(trial), Mutex::new(known), Default::default());
        let (moves, backups) = Default::default();
        Ok(Arc::new(Served { live, file, path, left, known, saving, trial, moves, backups }))
    }

    /// It serves.
    ///
    /// # Errors
    /// What is left of its moves cannot be understood; it serves all the same, and they stand still.
    pub(crate) fn adopt(self: &Arc<Self>, served: Arc<Served>) -> Result<(), Refusal> {
        self.graphs().served.push(served.clone());
        let (path, spec) = (&served.path, served.live.spec());
        Resumed::arrived(self, path, &spec)?.attend(&served, self);
        Interrupted::arrived(self, path, &spec)?.attend(&served, self);
        Ok(())
    }
}

/// A refusal that says what `--as-file` would cost.
fn on_trial(refusal: Refusal, tried: bool) -> Refusal {
    if !tried {
        return refusal;
    }
    let message = format!("{}; `--as-file` forgets what was written while it was tried", refusal.message);
    Refusal { message, ..refusal }
}

impl Served {
    /// # Errors
    /// An element has what nobody finds who opens the disk elsewhere.
    fn may_be_left(&self) -> Result<(), Refusal> {
        for instance in self.live.disk().graph().instances() {
            if let Err(error) = instance.element.may_be_left() {
                let error = error.in_element(&instance.name);
                return Err(Refusal::in_graph(&error, &self.live.spec()));
            }
        }
        Ok(())
    }

    async fn stop(&self) -> Result<(), Refusal> {
        self.live.stop().await.map_err(|error| Refusal::in_graph(&error, &self.live.spec()))
    }

    /// Claims what the graph needs, and serves; false if it serves already.
    pub(crate) async fn activate(&self, daemon: &Daemon) -> Result<bool, Refusal> {
        if !self.live.stands_by() {
            return Ok(false);
        }
        // Before: whatever ends the process from here on, the next start serves, for a guest may have been answered.
        let active = Active::of(daemon.host.state_dir(), &self.path);
        active.remember(&self.path).map_err(|error| {
            Refusal::new(
                "unavailable",
                format!("that the graph is active cannot be kept for the next start: {error}"),
            )
        })?;
        let activated = self.live.activate().await;
        if activated.is_err()
            && let Err(error) = active.forget()
        {
            tracing::warn!("{}: that it is not active cannot be kept: {error}", self.path.display());
        }
        activated.map_err(|error| Refusal::in_graph(&error, &self.live.spec()))
    }

    /// The trial that goes on, if one does.
    pub(crate) fn trial(&self) -> Option<Trial> {
        self.trial.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_trial(&self, trial: Option<Trial>) {
        *self.trial.lock().unwrap_or_else(PoisonError::into_inner) = trial;
    }

    /// What the graph file is known to say.
    pub(crate) fn known(&self) -> Option<Sum> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_known(&self, known: Option<Sum>) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// The value of a handler.
    pub(crate) fn get(&self, element: &str, handler: &str) -> Result<String, Refusal> {
        if self.live.stands_by() {
            let name = self.live.name();
            let message = format!("{name} stands by: nothing is known of what it has not opened yet");
            return Err(Refusal::new("unavailable", message));
        }
        self.live.get(element, handler).map_err(|error| self.refused(element, &error))
    }

    /// What a copier says of itself; None if it is not there.
    pub(super) fn copier(&self, element: &str) -> Option<Progress> {
        serde_json::from_str(&self.live.get(element, "progress").ok()?).ok()
    }

    /// Sets a handler; when this returns, the new value counts.
    pub(crate) async fn set(
        &self,
        daemon: &Daemon,
        element: &str,
        handler: &str,
        value: &str,
    ) -> Result<(), Refusal> {
        let before = self.live.spec();
        self.live.set(element, handler, value).await.map_err(|error| self.refused(element, &error))?;
        // One that is a parameter has changed the graph.
        if Arc::ptr_eq(&before, &self.live.spec()) { Ok(()) } else { self.remember_anew(daemon).await }
    }

    /// Calls a handler.
    pub(crate) fn call(&self, element: &str, handler: &str, argument: &str) -> Result<String, Refusal> {
        if self.trial().is_some_and(|trial| trial.owns(element)) {
            return Err(self.on_trial());
        }
        if self.backups.own(element) {
            self.not_backing_up()?;
        }
        self.live.call(element, handler, argument).map_err(|error| self.refused(element, &error))
    }

    /// A handler's error: about the element, if there is one of that name.
    fn refused(&self, element: &str, error: &blockmason::Error) -> Refusal {
        let spec = self.live.spec();
        let found = spec.find(element).map(|ix| &spec.elements[ix]);
        let place = found.map(|found| spec.place(found).to_string());
        let element = found.map(|found| found.name.clone());
        Refusal { element, place, ..Refusal::of(error) }
    }

    /// For a list of graphs.
    pub(crate) fn summary(&self) -> GraphSummary {
        GraphSummary {
            name: self.live.name().to_owned(),
            file: self.file.clone(),
            path: self.path.clone(),
            failed: self.live.disk().graph().is_failed(),
            standby: self.live.stands_by(),
            exports: self.exports(),
        }
    }

    /// Everything that is to be seen.
    pub(crate) fn view(&self) -> GraphView {
        let graph = self.live.disk().graph();
        let sources = graph.instances().enumerate().filter(|(_, instance)| !instance.ty.ports.input);
        let live = LiveView {
            failed: graph.is_failed(),
            standby: self.live.stands_by(),
            in_flight_bytes: self.live.disk().budget().used(),
            gated: self.live.disk().gated(),
            exports: self.exports(),
            faults: faults(&graph),
            sources: sources.map(|(node, instance)| SourceView::read(&graph, node, &instance.name)).collect(),
        };
        let view = GraphView::of_spec(self.live.name(), &self.live.spec());
        GraphView {
            file: self.file.clone(),
            live: Some(live),
            ..view.with_geometry(&graph).with_counters(&graph)
        }
    }

    fn exports(&self) -> Vec<ExportView> {
        self.live.exports().into_iter().map(|(element, uri)| ExportView { element, uri }).collect()
    }
}
