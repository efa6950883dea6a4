//! Handing a disk over from one graph to the next while clients use it (Block Mason, section 2.3).
//!
//! There are two ways. *Without a pause*, where the graphs differ only in elements that need not see
//! every request: new requests enter the new graph, those in flight end in the old one. *With a gate*:
//! sources admit nothing, what is in flight ends, what an element has learnt is taken over, then the
//! gate opens on the new graph. Everything that can fail happens before requests enter the new graph,
//! and is undone in reverse order; the old graph then goes on as if nothing had been.
//!
//! Starting is the same: the graph before is the empty one.

mod past;
mod process;
mod standby;

use past::start_work;
pub(super) use past::{Past, Working};
pub use process::{Entering, Leaving};

use super::Disk;
use super::disk::InFlight;
use crate::describe::{ElementType, Family, Handover};
use crate::element::{BoxFuture, Element, Open};
use crate::error::{Error, Kind, Result};
use crate::geometry::Geometry;
use crate::graph::{Graph, Instance};
use crate::request::{Origin, Request};
use futures::future::{Either, select};
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// How a graph is to be replaced.
#[derive(Clone)]
pub struct Change {
    /// How long requests in flight may take to end before the change is given up.
    pub deadline: Duration,
    /// Clients that cannot live with the new graph are sent away, instead of the change refused.
    pub disconnect: bool,
    /// No client may stay connected, whatever it was promised: the disk goes back to an earlier state,
    /// which a mounted file system must not see.
    pub alone: bool,
    /// Handlers of elements that stay, to be set when the graph changes.
    pub settings: Vec<Setting>,
    /// What makes the change one that cannot be taken back, done last of all behind a closed gate: nothing is in
    /// flight, what leaves the graph has been flushed. If it fails, the change is undone. A change with this goes
    /// through the gate.
    pub commit: Option<Commit>,
    /// Sources and their ports by which everything is flushed that has to be durable before the change; without
    /// it, by all ports of all sources, if anything leaves the graph that may hold something back.
    pub flush_by: Option<Vec<(String, String)>>,
    /// Elements whose [detached](crate::Cx::detach_with) work need not have ended: it goes on in the graph before,
    /// whose elements stay open as long. For a disk that leaves and may not answer.
    pub leave_behind: Vec<String>,
    /// Called off by true here: nothing that may take long is waited for any more. Once the commit has begun it is
    /// too late.
    pub called_off: Option<CalledOff>,
    /// Elements that are not asked whether they may leave: what only they know how to read is to stay as it is.
    pub unasked: Vec<String>,
}

/// See [`Change::called_off`].
pub type CalledOff = tokio::sync::watch::Receiver<bool>;

/// See [`Change::commit`].
pub type Commit = Arc<dyn Fn() -> BoxFuture<'static, Result<()>> + Send + Sync>;

impl Default for Change {
    fn default() -> Change {
        Change {
            deadline: Duration::from_secs(5),
            disconnect: false,
            alone: false,
            settings: Vec::new(),
            commit: None,
            flush_by: None,
            leave_behind: Vec::new(),
            called_off: None,
            unasked: Vec::new(),
        }
    }
}

/// A parameter that changes while its element stays.
#[derive(Clone)]
pub struct Setting {
    /// The element.
    pub instance: Arc<Instance>,
    /// The handler, named as the parameter.
    pub handler: String,
    /// Its value from now on.
    pub value: String,
    /// Its value so far.
    pub before: String,
}

/// What a change came to.
#[derive(Clone, Debug)]
pub struct Changed {
    /// The way it went.
    pub way: Handover,
    /// For how long no request was admitted; zero for a change without a pause.
    pub pause: Duration,
    /// What the exports that are new announce: element and URI.
    pub announced: Vec<(String, String)>,
    /// Requests that are still on their way in the graph before; only after a change without a pause.
    pub left: Vec<InFlight>,
}

/// The way from one graph to the other: without a pause if, without the elements that need not see
/// every request, they are equal.
pub fn way(before: &Graph, next: &Graph) -> Handover {
    if before.contracted() == next.contracted() { Handover::Free } else { Handover::Gate }
}

impl Disk {
    /// Replaces the graph. When this returns, all new requests enter `next`, or nothing has changed.
    /// One change at a time: others wait.
    ///
    /// # Errors
    /// [`Kind::Busy`] if clients cannot live with the new graph or requests in flight do not end in
    /// time (the error lists them); else what the element said that could not be opened or did not
    /// take over.
    pub async fn replace(self: &Arc<Self>, next: Arc<Graph>, change: &Change) -> Result<Changed> {
        let mut past = self.changing.lock().await;
        if past.stopped {
            return Err(Error::new(Kind::Unavailable, "the disk has been stopped"));
        }
        let step = Step { disk: self, before: self.graph(), next: next.clone(), change };
        self.expect(Some(next), change.alone);
        let changed = match way(&step.before, &step.next) {
            Handover::Free if change.commit.is_none() => step.without_pause(&mut past).await,
            Handover::Free | Handover::Gate => step.with_gate(&mut past).await,
        };
        self.expect(None, false);
        self.settle(&mut past)?;
        if !past.is_settled() {
            self.finish_later();
        }
        changed
    }

    /// Closes elements that no graph needs any more; starts the work of its own of the present graph
    /// once nothing is in flight in those before.
    fn settle(self: &Arc<Self>, past: &mut Past) -> Result<()> {
        let now = self.graph();
        past.close_drained(&now);
        if past.graphs.is_empty() && !past.running && now.runs.is_empty() && !past.stopped {
            past.running = true;
            start_work(self, &now)?;
        }
        Ok(())
    }

    /// True while something goes on that a change of graph has left behind.
    pub async fn has_left_behind(self: &Arc<Self>) -> Result<bool> {
        let mut past = self.changing.lock().await;
        self.settle(&mut past)?;
        Ok(!past.left.is_empty())
    }

    /// Settles when what is in flight has ended.
    fn finish_later(self: &Arc<Self>) {
        let disk = self.clone();
        #[expect(clippy::disallowed_methods, reason = "this waits for requests, it carries none")]
        tokio::spawn(async move {
            loop {
                let old = disk.changing.lock().await.waited_for();
                match old {
                    Some(graph) => graph.drained().await,
                    None => disk.graph().runs.emptied().await,
                }
                let mut past = disk.changing.lock().await;
                match disk.settle(&mut past) {
                    Ok(()) if past.is_settled() => return,
                    Ok(()) => {}
                    Err(error) => {
                        return tracing::warn!("what an old graph has left cannot be settled: {error}");
                    }
                }
            }
        });
    }

    /// Ends service: exports close, idle streams end, requests in flight are answered, what was
    /// written is flushed, sinks close. Returns the first flush that failed.
    pub async fn stop(self: &Arc<Self>) -> Result<()> {
        let mut past = self.changing.lock().await;
        past.stopped = true;
        let graph = self.graph();
        let (sources, others): (Vec<_>, Vec<_>) =
            graph.instances().partition(|instance| !instance.ty.ports.input);
        sources.into_iter().for_each(|instance| close(instance));
        graph.announce_closing();
        self.end_streams().await?;
        for graph in past.graphs.iter().chain([&graph]) {
            graph.drained().await;
        }
        // Replies are still being sent, for as long as their clients' patience lasts.
        while Arc::strong_count(&self.attending) > 1 {
            crate::rt::sleep(Duration::from_millis(1)).await;
        }
        if past.standby {
            // Nothing else is open, and nobody has written anything.
            return self.end_tracers();
        }
        let flushed = self.flush(&graph).await;
        self.settle(&mut past)?;
        // Nobody has waited for what was left behind, nor does this.
        while let Some(left) = past.left.pop() {
            past.close(&left, &graph);
        }
        others.into_iter().for_each(|instance| close(instance));
        self.end_tracers()?;
        flushed
    }

    /// Flushes through every port of every source of a graph that admits nothing: by a copier's comes what
    /// clients' flushes do not reach.
    async fn flush(&self, graph: &Arc<Graph>) -> Result<()> {
        let mut flushed = Ok(());
        for node in graph.sources() {
            for port in 0..graph.nodes[node].edge_count as usize {
                let reply = self.host.submit(graph, node, port, Request::flush()).await;
                flushed = flushed.and(reply.map(drop));
            }
        }
        flushed
    }
}

/// True of an element that may keep in memory what is on the disks below it.
pub(crate) fn knows_disk(ty: &ElementType) -> bool {
    !matches!(ty.family, Family::Export | Family::Route | Family::Fault | Family::Sink)
}

/// One change of graph.
struct Step<'a> {
    disk: &'a Arc<Disk>,
    before: Arc<Graph>,
    next: Arc<Graph>,
    change: &'a Change,
}

/// What has been done and would have to be undone, the last first.
type Undo<'a> = Vec<Box<dyn FnOnce() + Send + 'a>>;

impl Step<'_> {
    async fn without_pause(&self, past: &mut Past) -> Result<Changed> {
        let (disk, change) = (self.disk, self.change);
        self.ask_clients()?;
        let mut undo = Undo::new();
        let opened = self.open(&mut undo);
        let announced = self.undo_if_failed(opened, undo)?;
        disk.set_graph(self.next.clone());
        disk.admit_into(Some(self.next.clone())).await?;
        self.before.announce_closing();
        past.graphs.push(self.before.clone());
        past.running = false;
        self.dismiss_clients();
        let drained = crate::rt::timeout(change.deadline, self.before.drained()).await;
        let left = if drained.is_some() { Vec::new() } else { disk.in_flight().await? };
        Ok(Changed { way: Handover::Free, pause: Duration::ZERO, announced, left })
    }

    async fn with_gate(&self, past: &mut Past) -> Result<Changed> {
        let (disk, change) = (self.disk, self.change);
        self.ask_clients()?;
        // What only routes holds nothing back.
        let holds = |ty: &ElementType| !matches!(ty.family, Family::Export | Family::Route | Family::Fault);
        let flush = change.flush_by.is_some() || self.leaving().any(|instance| holds(instance.ty));
        if flush {
            // Most of what has to be flushed is flushed while requests go on.
            self.flush_or_fail(self.in_time(change.deadline, self.flush()).await)?;
        }
        let since = crate::rt::now();
        if self.before.sources().next().is_some() {
            disk.gated.fetch_add(1, Ordering::Relaxed);
        }
        for graph in past.graphs.iter().chain([&self.before]) {
            graph.leave_behind(&change.leave_behind);
        }
        disk.admit_into(None).await?;
        self.before.announce_closing();
        let changed = self.behind_the_gate(past, since, flush).await;
        match &changed {
            Ok(_) => {
                self.dismiss_clients();
                past.graphs.push(self.before.clone());
                if !change.leave_behind.is_empty() {
                    past.graphs.iter().for_each(|graph| graph.set_left());
                    let Past { graphs, left, .. } = past;
                    left.append(graphs);
                }
                disk.set_graph(self.next.clone());
            }
            Err(_) => self.before.forget_closing(),
        }
        past.running = false;
        let entering = disk.graph();
        disk.admit_into(Some(entering)).await?;
        let pause = crate::rt::now() - since;
        changed.map(|announced| Changed { way: Handover::Gate, pause, announced, left: Vec::new() })
    }

    async fn behind_the_gate(
        &self,
        past: &Past,
        since: Instant,
        flush: bool,
    ) -> Result<Vec<(String, String)>> {
        let body = async {
            for graph in past.graphs.iter().chain([&self.before]) {
                match self.change.leave_behind.is_empty() {
                    true => graph.drained().await,
                    false => graph.only_left().await,
                }
            }
            if flush && !self.before.is_failed() { Some(self.flush().await) } else { None }
        };
        let left = self.change.deadline.saturating_sub(crate::rt::now() - since);
        match self.in_time(left, body).await {
            Some(Some(flushed)) => self.flush_or_fail(Some(flushed))?,
            Some(None) => {}
            None if self.is_called_off() => return Err(called_off()),
            None => {
                let waited = self.change.deadline;
                return Err(stuck(self.disk, waited, "the graph has not been changed").await);
            }
        }
        let mut undo = Undo::new();
        let opened = self.take_over().and_then(|()| self.open(&mut undo));
        let committed = match (opened, &self.change.commit) {
            (Ok(announced), Some(commit)) => commit().await.map(|()| announced),
            (opened, _) => opened,
        };
        self.undo_if_failed(committed, undo)
    }

    /// None if it takes longer, or the change is called off.
    async fn in_time<T>(&self, time: Duration, body: impl Future<Output = T>) -> Option<T> {
        let body = pin!(crate::rt::timeout(time, body));
        let Some(mut watch) = self.change.called_off.clone() else { return body.await };
        let off = pin!(async move { watch.wait_for(|off| *off).await.is_ok() });
        match select(body, off).await {
            Either::Left((done, _)) => done,
            Either::Right((true, _)) => None,
            // Whoever could call it off is gone.
            Either::Right((false, body)) => body.await,
        }
    }

    fn is_called_off(&self) -> bool {
        self.change.called_off.as_ref().is_some_and(|off| *off.borrow())
    }

    /// What could not be flushed is a reason to keep the graph, unless it has failed: only another graph
    /// heals that.
    fn flush_or_fail(&self, flushed: Option<Result<()>>) -> Result<()> {
        let late = || {
            if self.is_called_off() {
                return Err(called_off());
            }
            let waited = self.change.deadline;
            let message = format!(
                "what leaves the graph was not flushed in {waited:?}; the graph has not been changed"
            );
            Err(Error::new(Kind::Busy, message))
        };
        match flushed.unwrap_or_else(late) {
            Err(error) if self.before.is_failed() => {
                tracing::warn!(graph = self.before.name(), "replaced without a flush: {error}");
                Ok(())
            }
            flushed => flushed,
        }
    }

    /// Makes durable what has to be before the change.
    async fn flush(&self) -> Result<()> {
        let (disk, graph) = (self.disk, &self.before);
        let Some(ways) = &self.change.flush_by else { return disk.flush(graph).await };
        for (source, port) in ways {
            let node = graph.source(source).ok_or_else(|| Error::internal("it is no source"));
            let node = node.map_err(|error| error.in_element(source))?;
            // Not a guest's: it is told, too, if something was lost that had not been flushed.
            let flush = Request { origin: Origin::Internal, ..Request::flush() };
            disk.host.submit(graph, node, graph.port(node, port)?, flush).await?;
        }
        Ok(())
    }

    /// Instances of the graph before that the next one has not.
    fn leaving(&self) -> impl Iterator<Item = &Arc<Instance>> {
        self.before.instances().filter(|instance| !self.next.has(instance))
    }

    /// Instances of the next graph that are new, those that requests enter at last.
    fn coming(&self) -> impl Iterator<Item = &Arc<Instance>> {
        let new = |instance: &&Arc<Instance>| !self.before.has(instance);
        let source = |instance: &&Arc<Instance>| !instance.ty.ports.input;
        let others = self.next.instances().filter(new).filter(move |instance| !source(instance));
        others.chain(self.next.instances().filter(new).filter(source))
    }

    /// Each source of the graph before, with what will lie below it.
    fn sources(&self) -> impl Iterator<Item = (&Arc<Instance>, Option<Geometry>)> {
        self.before.sources().map(|node| {
            let instance = &self.before.nodes[node].instance;
            let next = self.next.source(&instance.name);
            let same = next.filter(|next| std::ptr::eq(self.next.nodes[*next].instance.ty, instance.ty));
            let below = same.and_then(|node| self.next.below(node).ok());
            (instance, below.filter(|_| !self.change.alone))
        })
    }

    fn ask_clients(&self) -> Result<()> {
        let asked =
            |leaving: &&Arc<Instance>| !self.change.alone && !self.change.unasked.contains(&leaving.name);
        for leaving in self.leaving().filter(asked) {
            contained(|| leaving.element.may_leave()).map_err(|e| e.in_element(&leaving.name))?;
        }
        if self.change.disconnect {
            return Ok(());
        }
        self.sources().try_for_each(|(source, below)| {
            contained(|| source.element.keeps_clients(below.as_ref())).map_err(|e| e.in_element(&source.name))
        })
    }

    fn dismiss_clients(&self) {
        for (source, below) in self.sources().filter(|_| self.change.disconnect) {
            done(source, |element| element.dismiss_clients(below.as_ref()));
        }
    }

    /// Elements of the same name and type take over what those before have learnt.
    fn take_over(&self) -> Result<()> {
        let olds: HashMap<_, _> = self.leaving().map(|old| (&old.name, old)).collect();
        // What those before know of a disk that goes back to an earlier state is not so any more.
        let may_learn = |new: &&Arc<Instance>| !(self.change.alone && knows_disk(new.ty));
        for new in self.coming().filter(may_learn) {
            if let Some(old) = olds.get(&new.name).filter(|old| std::ptr::eq(old.ty, new.ty)) {
                contained(|| new.element.take_state(&*old.element)).map_err(|e| e.in_element(&new.name))?;
            }
        }
        Ok(())
    }

    /// Opens what is new, closes the sources that go, changes what is changed in place.
    fn open<'s>(&'s self, undo: &mut Undo<'s>) -> Result<Vec<(String, String)>> {
        let mut announced = Vec::new();
        let goes = |source: &Arc<Instance>| self.next.source(&source.name).is_none();
        for source in self.leaving().filter(|old| !old.ty.ports.input && goes(old)) {
            close(source);
            undo.push(Box::new(|| self.open_again(source)));
        }
        for instance in self.coming() {
            let open = Open { host: &self.disk.host, disk: self.disk, name: &instance.name };
            let uri = contained(|| instance.element.open(&open)).map_err(|e| e.in_element(&instance.name))?;
            announced.extend(uri.map(|uri| (instance.name.clone(), uri)));
            undo.push(Box::new(|| self.close_again(instance)));
        }
        for Setting { instance, handler, value, before } in &self.change.settings {
            contained(|| instance.element.set(handler, value)).map_err(|e| e.in_element(&instance.name))?;
            undo.push(Box::new(move || {
                let put_back = contained(|| instance.element.set(handler, before));
                put_back.unwrap_or_else(|error| log(instance, &error));
            }));
        }
        Ok(announced)
    }

    fn undo_if_failed<T>(&self, result: Result<T>, undo: Undo<'_>) -> Result<T> {
        if result.is_err() {
            undo.into_iter().rev().for_each(|undo| undo());
        }
        result
    }

    fn open_again(&self, source: &Arc<Instance>) {
        // It asks for the graph that it is opened in: that is the one before again.
        self.disk.expect(None, false);
        let open = Open { host: &self.disk.host, disk: self.disk, name: &source.name };
        contained(|| source.element.open(&open).map(drop)).unwrap_or_else(|error| log(source, &error));
    }

    /// Closes what was opened. Where a source has taken the place of one of the same name, that takes
    /// it back before.
    fn close_again(&self, instance: &Arc<Instance>) {
        let replaced = self.leaving().find(|old| !old.ty.ports.input && old.name == instance.name);
        if let Some(source) = replaced.filter(|_| !instance.ty.ports.input) {
            self.open_again(source);
        }
        close(instance);
    }
}

fn called_off() -> Error {
    Error::new(Kind::Busy, "it was called off; the graph has not been changed")
}

/// The error that says what did not end in time, and what follows from it.
async fn stuck(disk: &Disk, waited: Duration, outcome: &str) -> Error {
    const MOST: usize = 8;
    let list = disk.in_flight().await.unwrap_or_default();
    let mut lines: Vec<_> = list.iter().take(MOST).map(ToString::to_string).collect();
    if list.len() > MOST {
        lines.push(format!("and {} more", list.len() - MOST));
    }
    let what = match list.len() {
        0 => "requests of the graph itself, or a flush,".to_owned(),
        _ => format!("these requests ({})", lines.join("; ")),
    };
    let claims = disk.graph().conflicts();
    let mut ranges: Vec<_> = claims.iter().take(MOST).map(|claim| format!("; {claim}")).collect();
    if claims.len() > MOST {
        ranges.push(format!("; and {} more ranges", claims.len() - MOST));
    }
    let message = format!("{what} have not ended in {waited:?}; {outcome}{}", ranges.concat());
    Error::new(Kind::Busy, message)
}

fn close(instance: &Instance) {
    done(instance, |element| element.close());
}

/// Does what cannot fail; a panic is logged.
fn done(instance: &Instance, call: impl FnOnce(&dyn Element)) {
    let called = contained(|| {
        call(&*instance.element);
        Ok(())
    });
    called.unwrap_or_else(|error| log(instance, &error));
}

fn log(instance: &Instance, error: &Error) {
    tracing::error!("{} could not be closed or put back: {error}", instance.name);
}

/// Calls into an element; a panic in it is an error.
pub(crate) fn contained<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(Error::internal("the element panicked")))
}
