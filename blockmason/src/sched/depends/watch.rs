//! What is known of a request that others depend on.

use crate::error::{Error, Kind, Result};
use crate::graph::Instance;
use crate::request::{Op, Reply};
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Poll, Waker};

/// Requests that a check for circles looks at, at the most.
const WALK: usize = 1024;

/// An independent request, as those see it that depend on it.
pub(crate) struct Watch {
    pub(super) id: u64,
    op: Op,
    offset: u64,
    /// The element that made the dependency.
    element: Box<str>,
    /// What this request is a child of, if others depend on that too. Weak: if nobody holds it any
    /// more, nobody waits for it.
    parent: Weak<Watch>,
    /// True if what this one reaches counts for its parent: a flush of more would be of no use.
    counts_above: bool,
    issued: AtomicBool,
    /// True once others depend on it.
    awaited: AtomicBool,
    state: Mutex<State>,
}

/// What has become of a request; None as long as that is open.
type Outcome = Option<Result<()>>;

#[derive(Default)]
struct State {
    outcome: Outcome,
    durable: bool,
    /// What it waits for itself; empty once it has ended.
    predecessors: Vec<Arc<Watch>>,
    /// Its children on the out ports of elements that duplicate it.
    legs: Vec<Leg>,
    /// What has to be flushed for it to be durable.
    reached: Vec<Arc<Instance>>,
    /// Where it has its place among overlapping requests: by whose map.
    passed: Vec<Arc<Instance>>,
    wakers: Vec<Waker>,
}

/// An out port of an element that duplicates requests.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) element: Arc<Instance>,
    pub(super) port: usize,
}

impl PartialEq for Place {
    fn eq(&self, other: &Place) -> bool {
        Arc::ptr_eq(&self.element, &other.element) && self.port == other.port
    }
}

struct Leg {
    place: Place,
    /// False if it is that of a piece: there may be others to come.
    whole: bool,
    watch: Arc<Watch>,
}

impl Watch {
    pub(super) fn new(req: &crate::Request, element: &str, parent: Weak<Watch>, counts_above: bool) -> Watch {
        Watch {
            id: req.id,
            op: req.op,
            offset: req.offset,
            element: element.into(),
            parent,
            counts_above,
            issued: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This one and those whose child it is, as far as anybody depends on them.
    pub(super) fn lineage(self: &Arc<Self>) -> impl Iterator<Item = Arc<Watch>> {
        std::iter::successors(Some(self.clone()), |watch| watch.parent.upgrade())
    }

    /// True for the first one who asks: it sees the request to its end.
    pub(super) fn issue(&self) -> bool {
        !self.issued.swap(true, Ordering::AcqRel)
    }

    fn is_issued(&self) -> bool {
        self.issued.load(Ordering::Acquire)
    }

    /// It has ended; the first one to say so is right.
    fn settle(&self, outcome: Result<()>) {
        let (wakers, _free) = {
            let mut state = self.state();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome);
            (std::mem::take(&mut state.wakers), std::mem::take(&mut state.predecessors))
        };
        wakers.into_iter().for_each(Waker::wake);
        self.wake_above();
    }

    /// Whoever waits for a leg of a request waits at the request itself.
    fn wake_above(&self) {
        let mut above = self.parent.upgrade();
        while let Some(watch) = above {
            let wakers = std::mem::take(&mut watch.state().wakers);
            wakers.into_iter().for_each(Waker::wake);
            above = watch.parent.upgrade();
        }
    }

    /// Others depend on it from now on.
    pub(super) fn await_it(&self) {
        self.awaited.store(true, Ordering::Release);
    }

    pub(super) fn add_predecessor(&self, watch: &Arc<Watch>) {
        let mut state = self.state();
        if state.outcome.is_none() {
            state.predecessors.push(watch.clone());
        }
    }

    pub(super) fn add_leg(&self, place: Place, whole: bool, watch: Arc<Watch>) {
        let wakers = {
            let mut state = self.state();
            state.legs.push(Leg { place, whole, watch });
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
        self.wake_above();
    }

    /// Remembers where it went.
    pub(super) fn reach(self: &Arc<Self>, point: &Arc<Instance>) {
        let mut counts = true;
        for watch in self.lineage() {
            if !counts {
                return;
            }
            let mut state = watch.state();
            if !state.reached.iter().any(|known| Arc::ptr_eq(known, point)) {
                state.reached.push(point.clone());
            }
            counts = watch.counts_above;
        }
    }

    /// Remembers that it has its place among overlapping requests.
    pub(super) fn pass(&self, leader: &Arc<Instance>) {
        let wakers = {
            let mut state = self.state();
            state.passed.push(leader.clone());
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// True if this one waits for one of `others`, directly or not.
    ///
    /// # Errors
    /// There is too much to look at.
    pub(super) fn waits_for(self: &Arc<Self>, others: &[Arc<Watch>]) -> Result<bool> {
        if others.iter().any(|other| Arc::ptr_eq(other, self)) {
            return Ok(true);
        }
        if !others.iter().any(|other| other.awaited.load(Ordering::Acquire)) {
            // Nobody waits for any of them, so this one does not.
            return Ok(false);
        }
        let mut seen = vec![self.clone()];
        let mut next = 0;
        while let Some(watch) = seen.get(next).cloned() {
            next += 1;
            if others.iter().any(|other| Arc::ptr_eq(other, &watch)) {
                return Ok(true);
            }
            for predecessor in &watch.state().predecessors {
                if !seen.iter().any(|known| Arc::ptr_eq(known, predecessor)) {
                    seen.push(predecessor.clone());
                }
            }
            if seen.len() > WALK {
                return Err(Error::invalid(format!("more than {WALK} requests depend on each other")));
            }
        }
        Ok(false)
    }

    /// What has become of it on the way along `path`; None if that is open.
    fn outcome(&self, path: &[Place]) -> Outcome {
        let (own, legs) = self.legs(path);
        let Some((_, rest)) = path.split_first().filter(|_| !legs.is_empty()) else { return own };
        let mut open = false;
        for (_, leg) in &legs {
            match leg.outcome(rest) {
                Some(Err(error)) => return Some(Err(error)),
                Some(Ok(())) => {}
                None => open = true,
            }
        }
        // After pieces others may come, until the request itself has ended.
        match legs.iter().any(|(whole, _)| *whole) {
            _ if open => None,
            true => Some(Ok(())),
            false => own,
        }
    }

    /// What has become of it as a whole, and its children at the first place of a path.
    fn legs(&self, path: &[Place]) -> (Outcome, Vec<(bool, Arc<Watch>)>) {
        let state = self.state();
        let here = |leg: &&Leg| path.first() == Some(&leg.place);
        let legs = state.legs.iter().filter(here).map(|leg| (leg.whole, leg.watch.clone()));
        (state.outcome.clone(), legs.collect())
    }

    /// What has to be flushed for it to be durable on the way along `path`.
    fn reached(&self, path: &[Place], points: &mut Vec<Arc<Instance>>) {
        let before = points.len();
        if let Some((_, rest)) = path.split_first() {
            self.legs(path).1.iter().for_each(|(_, leg)| leg.reached(rest, points));
        }
        if points.len() == before {
            points.extend(self.state().reached.iter().cloned());
        }
    }

    /// The error of whoever depends on this one, which has failed.
    fn failed(&self, error: &Error) -> Error {
        let kind = match error.kind() {
            // That was wrong with the other request, not with this one.
            Kind::Invalid | Kind::Unsupported | Kind::Denied => Kind::Io,
            kind => kind,
        };
        let Watch { id, op, offset, element, .. } = self;
        let message =
            format!("not issued: it depends on {op} at {offset} of {element} (request {id}): {error}");
        Error::new(kind, message).with_source(error.to_string())
    }
}

/// What makes a request one that others depend on. Its clones and children share it; when all are gone
/// and none was issued, whoever waits is told.
pub(crate) struct Token(pub(super) Arc<Watch>);

impl Drop for Token {
    fn drop(&mut self) {
        if !self.0.is_issued() {
            self.0.settle(Err(gone("it was dropped before it was issued")));
        }
    }
}

fn gone(message: &'static str) -> Error {
    Error::new(Kind::Unavailable, message)
}

/// Held while an independent request is on its way: says what has become of it, also if its flow is
/// dropped.
pub(super) struct Issue(pub(super) Arc<Watch>);

impl Issue {
    pub(super) fn end(self, reply: &Reply) {
        self.0.settle(reply.as_ref().map(drop).map_err(Clone::clone));
    }
}

impl Drop for Issue {
    fn drop(&mut self) {
        self.0.settle(Err(gone("it was cancelled before it ended")));
    }
}

/// How far a request must have come before one that depends on it is issued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Until {
    /// It has been answered: in order across the death of this process.
    Completed,
    /// It has been answered, and then what it reached was flushed: in order across a loss of power.
    Durable,
}

/// One thing that a request depends on.
#[derive(Clone)]
pub(super) struct After {
    pub(super) watch: Arc<Watch>,
    pub(super) until: Until,
    /// The legs that the dependent has gone down since.
    pub(super) path: Vec<Place>,
}

impl After {
    fn look(&self) -> Outcome {
        self.watch.outcome(&self.path)
    }

    /// True if nothing is left to wait for.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.look(), Some(Ok(()))) && !self.wants_flush()
    }

    fn wants_flush(&self) -> bool {
        self.until == Until::Durable && !self.watch.state().durable
    }

    /// Waits until it has ended.
    pub(super) async fn ended(&self) -> Result<()> {
        self.until(|| false).await
    }

    /// True if what depends on it can take its own place where overlapping requests are ordered.
    pub(super) fn has_passed(&self, leader: &Arc<Instance>) -> bool {
        let here = |known: &Arc<Instance>| Arc::ptr_eq(known, leader);
        self.path.is_empty() && self.watch.state().passed.iter().any(here)
            || matches!(self.look(), Some(Ok(())))
    }

    /// Waits for that.
    pub(super) async fn passed(&self, leader: &Arc<Instance>) -> Result<()> {
        self.until(|| self.has_passed(leader)).await
    }

    /// Waits until it has ended or `enough` says so.
    async fn until(&self, enough: impl Fn() -> bool) -> Result<()> {
        poll_fn(|task| {
            let mut state = self.watch.state();
            if !state.wakers.iter().any(|known| known.will_wake(task.waker())) {
                state.wakers.push(task.waker().clone());
            }
            drop(state);
            // Looked at after the waker is in, so that no end is missed.
            match self.look() {
                None if enough() => Poll::Ready(Ok(())),
                Some(outcome) => Poll::Ready(outcome.map_err(|error| self.watch.failed(&error))),
                None => Poll::Pending,
            }
        })
        .await
    }

    /// What has yet to be flushed.
    pub(super) fn unflushed(&self, points: &mut Vec<Arc<Instance>>) {
        if self.wants_flush() {
            self.watch.reached(&self.path, points);
        }
    }

    /// A flush has covered it.
    pub(super) fn flushed(&self) {
        if self.until == Until::Durable && self.path.is_empty() {
            self.watch.state().durable = true;
        }
    }

    pub(super) fn not_durable(&self, error: &Error) -> Error {
        self.watch.failed(error)
    }
}
