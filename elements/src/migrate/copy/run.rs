//! What is done next, and who does it.
//!
//! As many workers as chunks may be under way take turns: whoever has the turn waits until there is something to do
//! and it may be done, and hands the turn on before doing it.

use super::chunk::{self, FROM, Failed, Moved, Place, Step, request};
use super::pace::{BUSY_DEPTH, Pace, STEP_BACK, Troubles};
use super::silence::{Asked, SILENCE};
use super::verify::{self, Findings};
use super::{Copy, MOST, Settings, State, Way};
use blockmason::{Answer, Cx, Flags, Op};
use futures::future::{join, join_all, select};
use std::cell::RefCell;
use std::future::pending;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How far it looks ahead for holes, and the most that is made zero at once.
const AHEAD: u64 = 1 << 30;

/// How often a disk that does not answer is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Something to do.
enum Task {
    /// The second says whether all of it was data.
    Copy(Range<u64>, bool),
    /// The range is known to be a hole.
    Zero(Range<u64>),
    Verify(Range<u64>, bool),
    Flush,
}

/// What whoever has the turn does.
enum Next {
    Do(Task),
    /// Until then, or until something has changed.
    Wait(Option<Instant>),
    /// Looks again.
    Look,
    End,
}

/// How far it has come. Whoever has the turn has it.
#[derive(Default)]
struct Walk {
    /// What of this pass has not been looked at.
    rest: Range<u64>,
    /// What has been found ahead, and whether it is a hole.
    ahead: (Range<u64>, bool),
    /// Where the comparison goes on, if there is one.
    verify: Option<u64>,
}

/// What all workers share.
struct Desk {
    under_way: usize,
    pace: Pace,
    troubles: Troubles,
    findings: Findings,
    /// Why the comparison has ended early.
    broken: Option<Failed>,
    /// What was copied is durable.
    flushed: bool,
    closing: bool,
}

struct Run<'a> {
    copy: &'a Copy,
    cx: Cx<'a>,
    place: &'a Place,
    asked: Asked,
    turn: Mutex<Walk>,
    desk: RefCell<Desk>,
}

/// Copies until the graph closes, and finishes what it holds.
pub(super) async fn work(copy: &Copy, cx: Cx<'_>) {
    let place: &Arc<Place> = cx.prepared();
    copy.now().place = Some(place.clone());
    if let Some(changes) = copy.only.as_ref().filter(|_| place.frozen) {
        if !changes.is_frozen() {
            let mut now = copy.now();
            now.error = "no backup has frozen what has changed".to_owned();
            now.state = State::Waiting;
            return;
        }
        place.fill(changes);
    }
    let desk = Desk {
        under_way: 0,
        pace: Pace::new(cx.guest_requests(), cx.now()),
        troubles: Troubles::new(),
        findings: Findings::default(),
        broken: None,
        flushed: false,
        closing: false,
    };
    let asked = Asked::new(cx.now());
    let run = Run { copy, cx, place, asked, turn: Mutex::default(), desk: RefCell::new(desk) };
    let close = async {
        cx.closing().await;
        run.desk.borrow_mut().closing = true;
        copy.wake.notify_one();
    };
    join(close, join_all((0..MOST).map(|_| run.worker()))).await;
}

impl Run<'_> {
    async fn worker(&self) {
        while let Some(task) = self.next().await {
            let (since, moved) = (self.cx.now(), Moved::default());
            self.perform(&task, &moved).await;
            let now = self.cx.now();
            let busy = self.desk.borrow_mut().pace.look(self.cx.guest_requests(), now);
            if busy {
                let back = pin!(self.cx.sleep(((now - since) / 4).min(STEP_BACK)));
                select(pin!(self.cx.closing()), back).await;
            }
            self.desk.borrow_mut().under_way -= 1;
            self.copy.counters.under_way.fetch_sub(1, Ordering::Relaxed);
            self.copy.wake.notify_one();
        }
    }

    /// What this worker does next, when it may; none when the graph closes.
    async fn next(&self) -> Option<Task> {
        let mut walk = self.turn.lock().await;
        loop {
            // Before anything is looked at, so that no change is missed.
            let mut changed = pin!(self.place.map.changed());
            changed.as_mut().enable();
            match self.choose(&mut walk).await {
                Next::End => {
                    // The next one sees it, too.
                    self.copy.wake.notify_one();
                    return None;
                }
                Next::Look => {}
                Next::Do(task) => {
                    self.desk.borrow_mut().under_way += 1;
                    self.copy.counters.under_way.fetch_add(1, Ordering::Relaxed);
                    return Some(task);
                }
                Next::Wait(until) => {
                    let alarm = async {
                        match until {
                            Some(until) => self.cx.sleep(until - self.cx.now()).await,
                            None => pending().await,
                        }
                    };
                    select(select(pin!(self.copy.wake.notified()), changed), pin!(alarm)).await;
                }
            }
        }
    }

    async fn choose(&self, walk: &mut Walk) -> Next {
        let (settings, now) = (*self.copy.settings(), self.cx.now());
        if self.desk.borrow().closing {
            return Next::End;
        }
        let (verify, differs) = self.orders();
        if settings.paused {
            return self.wait(State::Paused, None);
        }
        if differs && !verify {
            return self.wait(State::Differs, None);
        }
        if verify && walk.verify.is_none() {
            (walk.verify, walk.ahead) = (Some(0), Default::default());
            self.begin_verify();
        }
        let state = if verify { State::Verifying } else { State::Copying };
        if let Some(next) = self.silent(state, now) {
            return next;
        }
        if let Some(until) = self.held_back(&settings, now) {
            return self.wait(state, until);
        }
        match walk.verify {
            Some(at) => self.choose_verify(walk, at).await,
            None => self.choose_copy(walk, now).await,
        }
    }

    /// Some as long as the disk at `to` does not answer: what was begun would only keep guests waiting.
    fn silent(&self, state: State, now: Instant) -> Option<Next> {
        let since = self.asked.silent_since(&self.place.map);
        let waits = since.is_some_and(|since| now.saturating_duration_since(since) >= SILENCE);
        let mut told = self.copy.now();
        if waits {
            told.error = Failed::Silent.to_string();
        } else if !told.error.is_empty() && told.error == Failed::Silent.to_string() {
            told.error.clear();
        }
        drop(told);
        since?;
        Some(self.wait(if waits { State::Waiting } else { state }, Some(now + LOOK)))
    }

    /// Takes notice of what the operator wants. Whether the disks are to be compared, and whether something differs.
    fn orders(&self) -> (bool, bool) {
        let mut now = self.copy.now();
        if std::mem::take(&mut now.retry) {
            self.desk.borrow_mut().troubles.retry();
        }
        (now.verify, now.differs)
    }

    fn wait(&self, state: State, until: Option<Instant>) -> Next {
        self.copy.now().state = state;
        Next::Wait(until)
    }

    /// Nothing is left to do. That is said once.
    fn clean(&self) -> Next {
        if !std::mem::replace(&mut self.copy.now().clean, true) {
            self.cx.notice("everything is copied");
        }
        self.wait(State::Clean, None)
    }

    /// Some if nothing may begin now: until when, if that is known.
    fn held_back(&self, settings: &Settings, now: Instant) -> Option<Option<Instant>> {
        let mut desk = self.desk.borrow_mut();
        let busy = desk.pace.look(self.cx.guest_requests(), now);
        let depth = if busy { settings.depth.0.min(BUSY_DEPTH) } else { settings.depth.0 };
        let limit = |rate: Option<u64>| rate.unwrap_or(u64::MAX);
        let rate = limit(settings.rate.0).min(if busy { limit(settings.busy_rate.0) } else { u64::MAX });
        let debt = desk.pace.debt((rate != u64::MAX).then_some(rate), now);
        if desk.under_way >= depth {
            return Some(None);
        }
        (!debt.is_zero()).then_some(Some(now + debt))
    }

    async fn choose_copy(&self, walk: &mut Walk, now: Instant) -> Next {
        let (clean, until, many) = self.troubles(now);
        if clean {
            self.copy.now().error.clear();
        }
        if many && until.is_some() {
            return self.wait(State::Waiting, until);
        }
        let mut run = self.find(walk, now);
        if run.is_none() {
            if self.desk.borrow().under_way > 0 {
                return self.wait(State::Copying, None);
            }
            // What was a hole in the last pass need not be one any more.
            (walk.rest, walk.ahead) = (0..self.place.end, Default::default());
            run = self.find(walk, now);
            if run.is_some() {
                self.copy.counters.passes.fetch_add(1, Ordering::Relaxed);
            }
        }
        match run {
            Some(run) => {
                self.goes_on();
                Next::Do(self.cut(walk, run).await)
            }
            None if self.place.map.is_dirty(0..self.place.end) => self.wait(State::Waiting, until),
            None if self.place.frozen => self.choose_flush(),
            None => self.clean(),
        }
    }

    /// Everything is copied, and nothing is under way.
    fn choose_flush(&self) -> Next {
        if self.desk.borrow().flushed {
            return self.clean();
        }
        self.goes_on();
        Next::Do(Task::Flush)
    }

    fn goes_on(&self) {
        let mut now = self.copy.now();
        (now.state, now.clean) = (State::Copying, false);
    }

    /// Whether what had failed is clean now, when the rest is tried again, and whether that is too much.
    fn troubles(&self, now: Instant) -> (bool, Option<Instant>, bool) {
        let troubles = &mut self.desk.borrow_mut().troubles;
        (troubles.settle(&self.place.map), troubles.until(now), troubles.are_many())
    }

    /// The next dirty run of this pass, none that has to wait. It is not taken yet.
    fn find(&self, walk: &mut Walk, now: Instant) -> Option<Range<u64>> {
        let Place { map, .. } = self.place;
        loop {
            let run = match self.copy.order {
                Way::Up => map.next_dirty(walk.rest.clone())?,
                Way::Down => map.last_dirty(walk.rest.clone())?,
            };
            if !self.desk.borrow().troubles.block(&self.chunk(&run), now) {
                return Some(run);
            }
            self.take(walk, &self.chunk(&run));
        }
    }

    /// The chunk of a run that comes first.
    fn chunk(&self, run: &Range<u64>) -> Range<u64> {
        match self.copy.order {
            Way::Up => run.start..run.end.min(run.start + self.place.chunk),
            Way::Down => {
                let whole = run.end.next_multiple_of(self.place.map.granule());
                whole.saturating_sub(self.place.chunk).max(run.start)..run.end
            }
        }
    }

    /// The pass goes on behind it.
    fn take(&self, walk: &mut Walk, range: &Range<u64>) {
        match self.copy.order {
            Way::Up => walk.rest.start = range.end,
            Way::Down => walk.rest.end = range.start,
        }
    }

    /// Takes a chunk of the run, or a large hole.
    async fn cut(&self, walk: &mut Walk, run: Range<u64>) -> Task {
        self.desk.borrow_mut().flushed = false;
        let chunk = self.chunk(&run);
        // What is known is known upwards.
        let up = self.copy.order == Way::Up;
        let dense = up && self.is_dense(walk, &chunk).await;
        if up && !dense && self.place.to_fast && walk.ahead.1 {
            let end =
                self.place.down(walk.ahead.0.end.min(self.place.from)).min(run.end).min(run.start + AHEAD);
            if end.saturating_sub(run.start) > self.place.chunk {
                let hole = run.start..end;
                self.take(walk, &hole);
                return Task::Zero(hole);
            }
        }
        self.take(walk, &chunk);
        self.desk.borrow_mut().pace.take(chunk.end - chunk.start);
        Task::Copy(chunk, dense)
    }

    /// Sees to it that it is known what the disk at `from` has at the start of a range. True if all of it is data.
    async fn is_dense(&self, walk: &mut Walk, range: &Range<u64>) -> bool {
        if !walk.ahead.0.contains(&range.start) {
            walk.ahead = self.look_ahead(range.start..self.place.from.min(range.start + AHEAD)).await;
        }
        let (known, hole) = &walk.ahead;
        !*hole && known.end >= range.end.min(self.place.from)
    }

    async fn look_ahead(&self, range: Range<u64>) -> (Range<u64>, bool) {
        if range.is_empty() || !self.place.from_extents {
            return (range, false);
        }
        let mut asked = request(Op::Extents, &range);
        asked.flags = Flags::ONE;
        let known = self.cx.forward(FROM, asked).await.and_then(Answer::into_extents);
        match known.ok().and_then(|known| known.first().copied()) {
            Some(extent) => (range.start..range.start.saturating_add(extent.len), extent.state.zero),
            // Whoever reads it is told why.
            None => (range, false),
        }
    }

    fn begin_verify(&self) {
        let mut desk = self.desk.borrow_mut();
        (desk.findings, desk.broken) = (Findings::default(), None);
        self.copy.counters.verified.store(0, Ordering::Relaxed);
        self.copy.now().error.clear();
    }

    async fn choose_verify(&self, walk: &mut Walk, at: u64) -> Next {
        let (broken, under_way) = {
            let desk = self.desk.borrow();
            (desk.broken.is_some(), desk.under_way)
        };
        if at < self.place.from && !broken {
            let mut chunk = at..self.place.from.min(at + self.place.chunk);
            self.copy.now().state = State::Verifying;
            let dense = self.is_dense(walk, &chunk).await;
            let hole = at..walk.ahead.0.end.min(self.place.from).min(at + AHEAD);
            if walk.ahead.1 && hole.end > chunk.end {
                let both = verify::hole_of_both(self.place, self.cx, &self.asked, &hole).await;
                chunk.end = chunk.end.max(both);
            }
            walk.verify = Some(chunk.end);
            if chunk.end - at <= self.place.chunk {
                self.desk.borrow_mut().pace.take(chunk.end - at);
            }
            return Next::Do(Task::Verify(chunk, dense));
        }
        if under_way > 0 {
            return self.wait(State::Verifying, None);
        }
        walk.verify = None;
        self.end_verify(&self.desk.borrow());
        Next::Look
    }

    fn end_verify(&self, desk: &Desk) {
        let Desk { findings, broken, .. } = desk;
        let said = match broken {
            Some(failed) => format!("the comparison has ended early, call `verify` again: {failed}"),
            None if findings.differ > 0 => findings.sentence(self.place.map.granule()),
            None if findings.dirty > 0 => format!(
                "{} bytes are alike, and {} are still to be copied: call `verify` again when that is done",
                findings.alike, findings.dirty
            ),
            None => format!("all {} bytes are alike", findings.alike),
        };
        self.cx.notice(&said);
        let mut now = self.copy.now();
        now.verify = false;
        now.differs = findings.differ > 0;
        if now.differs || broken.is_some() {
            now.error = said;
        }
        now.state = if now.differs { State::Differs } else { State::Copying };
    }

    async fn perform(&self, task: &Task, moved: &Moved) {
        let step = |dense: bool| Step { place: self.place, cx: self.cx, moved, asked: &self.asked, dense };
        match task {
            Task::Copy(range, dense) => {
                let done = chunk::copy(&step(*dense), range).await;
                self.count(moved, range.end - range.start);
                self.end(range, done);
            }
            Task::Zero(range) => {
                let done = chunk::zero(&step(false), range).await;
                self.count(moved, 0);
                self.end(range, done);
            }
            Task::Flush => self.end_flush(chunk::flush(&step(false)).await),
            Task::Verify(range, dense) => self.end_part(range, verify::verify(&step(*dense), range).await),
        }
    }

    /// Counts what has moved, of which so much has been paid for.
    fn count(&self, moved: &Moved, paid: u64) {
        let (copied, skipped) = (moved.copied.get(), moved.skipped.get());
        self.copy.counters.copied.fetch_add(copied, Ordering::Relaxed);
        self.copy.counters.skipped.fetch_add(skipped, Ordering::Relaxed);
        self.copy.now().recent.add(self.cx.now(), copied);
        self.desk.borrow_mut().pace.give(paid.saturating_sub(copied));
    }

    fn end(&self, range: &Range<u64>, done: Result<(), Failed>) {
        // What does not answer is looked at before anything else begins, and nothing of it has failed.
        let Some(failed) = done.err().filter(|failed| !matches!(failed, Failed::Silent)) else { return };
        let now = self.cx.now();
        let first = self.desk.borrow().troubles.until(now).is_none();
        let wait = self.desk.borrow_mut().troubles.add(range.clone(), now);
        let seconds = wait.as_secs_f64().ceil();
        if first {
            let (graph, element) = (self.cx.graph_name(), self.cx.name());
            tracing::warn!(graph, element, "a chunk waits: {failed}");
        }
        self.copy.now().error = format!("{failed}; tried again within {seconds} s, or call `retry`");
    }

    /// What was copied and is perhaps not durable has to be copied again.
    fn end_flush(&self, done: Result<(), Failed>) {
        self.desk.borrow_mut().flushed = done.is_ok();
        if done.is_ok() {
            return;
        }
        match &self.copy.only {
            Some(changes) => self.place.fill(changes),
            None => self.place.map.set(0..self.place.end),
        }
        self.end(&(0..self.place.end), done);
    }

    fn end_part(&self, range: &Range<u64>, done: Result<Findings, Failed>) {
        let mut desk = self.desk.borrow_mut();
        match done {
            Ok(found) => {
                self.copy.counters.verified.fetch_add(found.alike, Ordering::Relaxed);
                desk.findings.add(found);
            }
            Err(failed) => {
                tracing::warn!(element = self.cx.name(), at = range.start, "not compared: {failed}");
                desk.broken.get_or_insert(failed);
            }
        }
    }
}
