//! A graph that serves and can be changed: what it was read from, what runs, and the way from one to
//! the next (Block Mason, section 2.3).
//!
//! Starting is a change from the empty graph. Elements with the same name, type and parameters are the
//! same instance before and after; of the others new ones are built, and [`Disk::replace`] hands over.

mod diff;
mod process;
mod standby;
#[cfg(test)]
mod tests;

pub use diff::{Diff, ElementDiff, Fate, ParamDiff};
pub use process::{Arriving, Departing};

use crate::describe::{self, Catalogue};
use crate::error::{Error, Result};
use crate::events::{Event, EventKind};
use crate::graph::build::{Builder, connections};
use crate::graph::tally::Histogram;
use crate::graph::{Graph, Instance};
use crate::heads::{self, Finding, Names, Volume};
use crate::lang::Spec;
use crate::sched::{CalledOff, Change, Changed, Commit, Disk, Host, Setting, contained, knows_disk};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a graph is built with, from its start to its end.
#[derive(Clone)]
pub struct Setup {
    /// The table of types.
    pub catalogue: Catalogue,
    /// The graph's name: the stem of its file.
    pub name: String,
    /// Where state is kept.
    pub state_dir: PathBuf,
}

/// How a change is to be made.
#[derive(Clone)]
pub struct Options {
    /// How long requests in flight may take to end before the change is given up.
    pub deadline: Duration,
    /// Clients that cannot live with the new graph are sent away, instead of the change refused.
    pub disconnect: bool,
    /// No client may stay connected: see [`Change::alone`]. What elements between exports and disks know they find out
    /// anew.
    pub alone: bool,
    /// What the heads of volumes have to say.
    pub heads: Heads,
    /// Elements that go on under another name: the one before, and the one from now on. Type and parameters must
    /// be the same.
    pub renames: Vec<(String, String)>,
    /// The marks of volumes stay: whoever makes the change attends to them. See [`heads::Unkept`].
    pub keeps_marks: bool,
    /// See [`Change::commit`].
    pub commit: Option<Commit>,
    /// See [`Change::flush_by`].
    pub flush_by: Option<Vec<(String, String)>>,
    /// See [`Change::leave_behind`].
    pub leave_behind: Vec<String>,
    /// See [`Change::called_off`].
    pub called_off: Option<CalledOff>,
    /// See [`Change::unasked`].
    pub unasked: Vec<String>,
}

/// What the heads of volumes have to say to a graph; see [`heads`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Heads {
    /// A volume is served through no other layout than its head names; new ones are signed.
    #[default]
    Verify,
    /// The same, but the volumes with these heads may be on the move: the graph is what moves them.
    Moving(Vec<PathBuf>),
    /// Nothing. They stay as they are.
    Ignore,
    /// The layout of the graph becomes that of the volumes.
    Sign,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            deadline: Duration::from_secs(5),
            disconnect: false,
            alone: false,
            heads: Heads::Verify,
            renames: Vec::new(),
            keeps_marks: false,
            commit: None,
            flush_by: None,
            leave_behind: Vec::new(),
            called_off: None,
            unasked: Vec::new(),
        }
    }
}

/// What a change has come to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// What has changed.
    pub diff: Diff,
    /// For how long no request was admitted, in seconds.
    pub pause_seconds: f64,
    /// How long all of it took, in seconds.
    pub took_seconds: f64,
    /// Requests that are still on their way in the graph before, in words.
    pub left: Vec<String>,
}

/// A graph that serves and can be changed.
pub struct Live {
    setup: Setup,
    disk: Arc<Disk>,
    /// One change at a time, from the comparison to its end.
    changing: Arc<tokio::sync::Mutex<()>>,
    state: Mutex<State>,
    pauses: Mutex<Histogram>,
    reloads: AtomicU64,
    failed: AtomicU64,
}

struct State {
    spec: Arc<Spec>,
    /// Each export's element and URI.
    exports: Vec<(String, String)>,
    /// What heads will have to say when a graph that stands by is activated.
    standby: Option<Heads>,
}

impl Live {
    /// Serves a checked graph.
    ///
    /// # Errors
    /// The first element that cannot be built or opened; everything is closed again.
    pub async fn start(host: &Arc<Host>, setup: Setup, spec: Spec, heads: Heads) -> Result<Arc<Live>> {
        Live::begin(host, setup, spec, heads, false).await
    }

    async fn begin(
        host: &Arc<Host>,
        setup: Setup,
        spec: Spec,
        heads: Heads,
        may_stand_by: bool,
    ) -> Result<Arc<Live>> {
        let live = Live::empty(host, setup, &spec).await?;
        match live.begin_with(spec, heads, may_stand_by).await {
            Ok(()) => Ok(Arc::new(live)),
            Err(error) => {
                live.disk.stop().await?;
                Err(error)
            }
        }
    }

    async fn begin_with(&self, spec: Spec, heads: Heads, may_stand_by: bool) -> Result<()> {
        let (diff, next) = (self.diff(&spec), Arc::new(spec));
        let graph = self.build(&next, &diff, &self.disk.graph(), &Options::default()).await?;
        if may_stand_by && graph.instances().any(|instance| instance.element.stands_by()) {
            let exports = self.disk.stand_by(Arc::new(graph)).await?;
            *self.state() = State { spec: next, exports, standby: Some(heads) };
            self.publish(EventKind::StandsBy, "the graph listens, and waits to be activated", &[]);
        } else {
            self.change_to(next, graph, &diff, &Options { heads, ..Options::default() }).await?;
            self.publish(EventKind::Loaded, "the graph serves", &[]);
        }
        Ok(())
    }

    /// One that serves nothing yet.
    async fn empty(host: &Arc<Host>, setup: Setup, spec: &Spec) -> Result<Live> {
        let disk = Disk::new(host, &setup.name).await?;
        let empty = Arc::new(Spec::empty(spec.sources.clone()));
        Ok(Live {
            setup,
            disk,
            changing: Arc::default(),
            state: Mutex::new(State { spec: empty, exports: Vec::new(), standby: None }),
            pauses: Mutex::default(),
            reloads: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The graph as it runs now, with what handlers have set.
    pub fn spec(&self) -> Arc<Spec> {
        self.state().spec.clone()
    }

    /// What serves.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// The name: the stem of the graph's file.
    pub fn name(&self) -> &str {
        &self.setup.name
    }

    /// What the exports announce: element and URI.
    pub fn exports(&self) -> Vec<(String, String)> {
        self.state().exports.clone()
    }

    /// What a reload would change. Opens nothing.
    pub fn diff(&self, next: &Spec) -> Diff {
        Diff::between(&self.spec(), next, self.setup.catalogue)
    }

    /// Replaces the graph by another checked one. When this returns all new requests enter it, or
    /// nothing has changed and the old graph has never stopped serving. Others that want to change it
    /// meanwhile wait.
    ///
    /// # Errors
    /// What could not be built, opened or taken over; what did not end in time; what a connected
    /// client could not live with.
    pub async fn reload(&self, next: Spec, options: &Options) -> Result<Report> {
        self.reload_with(options, |_| Ok::<_, Error>(next), |_, _| Ok(())).await
    }

    /// As [`reload`](Self::reload), to a graph that is made from the one that runs: what others change
    /// meanwhile is not lost. `before` is called with the graph that is about to serve and the
    /// difference before anything else is done.
    ///
    /// # Errors
    /// Those of `make` and `before`, and those of [`reload`](Self::reload).
    pub async fn reload_with<E: From<Error>>(
        &self,
        options: &Options,
        make: impl FnOnce(&Spec) -> std::result::Result<Spec, E>,
        before: impl FnOnce(&Spec, &Diff) -> std::result::Result<(), E>,
    ) -> std::result::Result<Report, E> {
        let _changing = self.changing.lock().await;
        let next = make(&self.spec())?;
        before(&next, &self.diff(&next))?;
        let report = self.change(next, options).await;
        match &report {
            Ok(report) if report.diff.is_empty() => {}
            Ok(report) => {
                self.reloads.fetch_add(1, Ordering::Relaxed);
                let ns = Duration::from_secs_f64(report.pause_seconds).as_nanos() as u64;
                self.pauses.lock().unwrap_or_else(PoisonError::into_inner).record(ns);
                let times = [("pause_seconds", report.pause_seconds), ("took_seconds", report.took_seconds)];
                self.publish(EventKind::Reload, "the graph was changed", &times);
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.publish(EventKind::ReloadFailed, format!("the graph serves on as it was: {error}"), &[]);
            }
        }
        report.map_err(E::from)
    }

    /// Called by whoever holds `changing`.
    async fn change(&self, next: Spec, options: &Options) -> Result<Report> {
        self.not_standing_by()?;
        let since = crate::rt::now();
        let diff = self.diff(&next);
        let next = Arc::new(next);
        if diff.is_empty() {
            self.state().spec = next;
            let took_seconds = (crate::rt::now() - since).as_secs_f64();
            return Ok(Report { diff, pause_seconds: 0.0, took_seconds, left: Vec::new() });
        }
        let before = self.disk.graph();
        let graph = self.build(&next, &diff, &before, options).await?;
        let changed = self.change_to(next, graph, &diff, options).await?;
        Ok(Report {
            diff,
            pause_seconds: changed.pause.as_secs_f64(),
            took_seconds: (crate::rt::now() - since).as_secs_f64(),
            left: changed.left.iter().map(ToString::to_string).collect(),
        })
    }

    /// The graph has been built.
    async fn change_to(
        &self,
        next: Arc<Spec>,
        graph: Graph,
        diff: &Diff,
        options: &Options,
    ) -> Result<Changed> {
        let signed = Signing::begin(&next, &graph, &options.heads, options.keeps_marks)?;
        let settings = settings(diff, &graph);
        let Options { deadline, disconnect, alone, .. } = *options;
        let (commit, flush_by) = (options.commit.clone(), options.flush_by.clone());
        let unasked = options.unasked.clone();
        let (leave_behind, called_off) = (options.leave_behind.clone(), options.called_off.clone());
        let change = Change {
            deadline,
            disconnect,
            alone,
            settings,
            commit,
            flush_by,
            leave_behind,
            called_off,
            unasked,
        };
        let changed = self.disk.replace(Arc::new(graph), &change).await;
        let changed = changed.inspect_err(|_| signed.plan.withdraw())?;
        signed.complete();
        let now = self.disk.graph();
        for instance in now.instances().filter(|it| options.renames.iter().any(|(_, to)| *to == it.name)) {
            instance.element.renamed(&instance.name);
        }
        self.adopt(next, &changed);
        Ok(changed)
    }

    /// Builds what is new, on a thread where waiting harms nobody: files and sockets are opened.
    async fn build(
        &self,
        next: &Arc<Spec>,
        diff: &Diff,
        before: &Arc<Graph>,
        options: &Options,
    ) -> Result<Graph> {
        let before = before.clone();
        let stays = |name: &str| matches!(diff.fate(name), Some(Fate::Kept | Fate::Set));
        let forgets = |instance: &Instance| options.alone && knows_disk(instance.ty);
        let kept = before.instances().filter(|instance| stays(&instance.name) && !forgets(instance));
        let mut kept: HashMap<String, Arc<Instance>> =
            kept.map(|instance| (instance.name.clone(), instance.clone())).collect();
        kept.extend(self.renamed(next, &before, &options.renames)?);
        let (setup, next, shards) = (self.setup.clone(), next.clone(), self.disk.host().shards());
        let build = move || {
            let (name, state_dir) = (&*setup.name, &*setup.state_dir);
            let builder = Builder { catalogue: setup.catalogue, name, state_dir, shards };
            let mut graph =
                contained(|| builder.assemble(&builder.instances(&next, &kept)?, &connections(&next)))?;
            graph.continue_counting(&before);
            Ok(graph)
        };
        crate::rt::blocking(build)
            .await
            .unwrap_or_else(|| Err(Error::internal("building the graph was given up")))
    }

    /// The instances that go on under other names.
    fn renamed(
        &self,
        next: &Spec,
        before: &Graph,
        renames: &[(String, String)],
    ) -> Result<Vec<(String, Arc<Instance>)>> {
        let running = self.spec();
        let rename = |(from, to): &(String, String)| {
            let instance = before.instances().find(|instance| instance.name == *from)?;
            let (was, is) = (&running.elements[running.find(from)?], &next.elements[next.find(to)?]);
            let renamed = instance.renamed(to, next.place(is).to_string());
            diff::alike(was, is, self.setup.catalogue).then(|| (to.clone(), renamed))
        };
        let wrong = |(from, to): &(String, String)| {
            Error::internal(format!("{from} is to be {to} from now on, and that is another element"))
        };
        renames.iter().map(|names| rename(names).ok_or_else(|| wrong(names))).collect()
    }

    fn adopt(&self, next: Arc<Spec>, changed: &Changed) {
        let mut state = self.state();
        let known = std::mem::take(&mut state.exports);
        let uri = |name: &String| {
            let all = changed.announced.iter().chain(&known);
            all.clone().find(|(element, _)| element == name).map(|(_, uri)| (name.clone(), uri.clone()))
        };
        state.exports = next.elements.iter().filter_map(|element| uri(&element.name)).collect();
        state.spec = next;
    }

    /// The value of a handler.
    pub fn get(&self, element: &str, handler: &str) -> Result<String> {
        self.disk.graph().get(element, handler)
    }

    /// Calls a handler.
    pub fn call(&self, element: &str, handler: &str, argument: &str) -> Result<String> {
        self.not_standing_by()?;
        self.disk.graph().call(element, handler, argument)
    }

    /// Sets a handler. One that is named as a parameter is that parameter: the graph as it runs has
    /// changed.
    pub async fn set(&self, element: &str, handler: &str, value: &str) -> Result<()> {
        let _changing = self.changing.lock().await;
        let spec = self.spec();
        self.disk.graph().set(element, handler, value)?;
        let Some(ix) = spec.find(element) else { return Ok(()) };
        let ty = describe::find(self.setup.catalogue, &spec.elements[ix].ty);
        if ty.is_some_and(|ty| ty.params.iter().any(|param| param.name == handler)) {
            let mut next = (*spec).clone();
            next.elements[ix].params.set(handler, value);
            self.state().spec = Arc::new(next);
        }
        Ok(())
    }

    /// Reloads that have changed something, and those that could not be made.
    pub fn reloads(&self) -> (u64, u64) {
        (self.reloads.load(Ordering::Relaxed), self.failed.load(Ordering::Relaxed))
    }

    /// The pauses of all reloads, by bucket (see [`Histogram::upper_ns`]), and together in nanoseconds.
    pub fn pauses(&self) -> (Vec<u64>, u64) {
        let pauses = self.pauses.lock().unwrap_or_else(PoisonError::into_inner);
        (pauses.read(), pauses.sum_ns())
    }

    /// Ends service. Returns the first flush that failed.
    pub async fn stop(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        let stopped = self.disk.stop().await;
        match &stopped {
            Ok(()) => self.publish(EventKind::Unloaded, "the graph serves no longer", &[]),
            Err(error) => {
                let message = format!("the graph serves no longer, and not all was flushed: {error}");
                self.publish(EventKind::Unloaded, message, &[]);
            }
        }
        stopped
    }

    fn publish(&self, kind: EventKind, message: impl std::fmt::Display, fields: &[(&str, f64)]) {
        let event = Event::new(kind, self.name(), message);
        let event = fields.iter().fold(event, |event, (key, value)| event.with(key, value));
        self.disk.host().events().publish(event);
    }
}

/// The heads that a change writes, and those that it removes.
struct Signing {
    plan: heads::Plan,
    needless: Vec<Volume>,
}

impl Signing {
    /// Before anything of the graph is opened.
    fn begin(spec: &Spec, graph: &Graph, heads: &Heads, keeps_marks: bool) -> Result<Signing> {
        let mut signed = Signing::of(spec, graph, heads)?;
        if !keeps_marks {
            let unkept = heads::Unkept::of(spec, graph);
            // Whatever happens then, no mark is untrue.
            unkept.forget()?;
            signed.plan = signed.plan.without_marks(&unkept);
        }
        signed.plan.begin()?;
        Ok(signed)
    }

    /// Changes nothing yet.
    fn of(spec: &Spec, graph: &Graph, heads: &Heads) -> Result<Signing> {
        let none = Vec::new();
        match heads {
            Heads::Verify => Ok(Signing { plan: heads::verify(&[(spec, graph)], &[])?, needless: none }),
            Heads::Moving(moving) => {
                Ok(Signing { plan: heads::verify(&[(spec, graph)], moving)?, needless: none })
            }
            Heads::Ignore => Ok(Signing { plan: heads::Plan::default(), needless: none }),
            Heads::Sign => {
                let volumes = heads::survey(&[(spec, graph)], Names::Adopt)?;
                if let Some((volume, why)) = volumes.iter().find_map(|it| Some((it, it.elsewhere()?))) {
                    return Err(
                        Error::invalid(format!("it cannot be signed: {why}")).in_element(&volume.element)
                    );
                }
                let plan = heads::Plan::of(volumes.iter());
                let needless = |volume: &Volume| {
                    volume.wanted().is_none()
                        && !volume.at.read_only
                        && !matches!(volume.finding, Finding::Plain)
                };
                Ok(Signing { plan, needless: volumes.into_iter().filter(needless).collect() })
            }
        }
    }

    /// The graph serves. What cannot be written now is at the next start, or refused then.
    fn complete(&self) {
        let removed = || self.needless.iter().try_for_each(heads::remove);
        if let Err(error) = self.plan.complete().and_then(|()| removed()) {
            tracing::warn!("{error}; it is tried again at the next start");
        }
    }
}

/// What is changed in place.
fn settings(diff: &Diff, graph: &Graph) -> Vec<Setting> {
    let instances: HashMap<_, _> =
        graph.instances().map(|instance| (instance.name.as_str(), instance)).collect();
    let set = diff.elements.iter().filter(|element| element.fate == Fate::Set);
    let of = |element: &ElementDiff| -> Vec<Setting> {
        let Some(instance) = instances.get(element.name.as_str()) else { return Vec::new() };
        let setting = |param: &ParamDiff| {
            let (value, before) = (param.after.clone()?, param.before.clone()?);
            Some(Setting { instance: (*instance).clone(), handler: param.key.clone(), value, before })
        };
        element.parameters.iter().filter_map(setting).collect()
    };
    set.flat_map(of).collect()
}
