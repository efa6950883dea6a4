//! A move that goes on: looks at the copier, decides what comes next, and does what an operator asks for.

use super::cut::cut_over;
use super::files;
use super::graph::{Names, Side};
use super::record::{Options as Wanted, Phase, Record};
use crate::control::change::How;
use crate::control::daemon::{Daemon, Served};
use crate::control::graph_file::is_edited;
use crate::control::refusal::Refusal;
use crate::view::{MoveState, MoveView};
use blockmason::events::{Event, EventKind};
use blockmason::live::Options as Change;
use blockmason::{Error, rt};
use blockmason_elements::migrate::copy::Progress;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How often the copier is looked at, and how often where nobody waits for it.
const EVERY: Duration = Duration::from_millis(50);
const AT_LEISURE: Duration = Duration::from_secs(1);

/// How long a cut-over, or an end, that could not be made waits before it is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// How long guests may wait behind the gate for a new disk that is given up, and may not answer.
const GIVING_UP: Duration = Duration::from_secs(5);

/// How often a comparison that has ended early begins anew.
const COMPARISONS: u32 = 3;

/// A move, from its begin or from a restart until it is over.
pub(crate) struct Job {
    now: Mutex<Now>,
    /// Told when an operator has asked for something.
    wake: Notify,
}

/// What is known of a move, and asked of it.
struct Now {
    record: Record,
    state: MoveState,
    message: String,
    progress: Progress,
    /// Of the move, once the copier is that of a mirror.
    moved: Option<Progress>,
    pause: Option<Duration>,
    /// Since when it goes on; of a mirror, since when it is to end.
    since: Instant,
    took: Option<Duration>,
    asked: Option<Asked>,
    /// Somebody wants to go back to the mirror.
    goes_back: bool,
    /// Why it is being given up, if nobody has asked for that.
    why: Option<String>,
    /// Since when the new side fails.
    failing: Option<Instant>,
    /// When what could not be done may be tried again.
    again: Option<Instant>,
    /// What has become of an image that is not what its name leads to.
    lost: Option<String>,
    /// What is wrong with the graph file.
    trouble: Option<String>,
    /// Calls off the cut-over that is under way.
    off: Option<watch::Sender<bool>>,
    comparing: Comparing,
    /// Comparisons that have ended early, by an error.
    ended_early: u32,
}

impl Now {
    /// What fails, and why.
    fn trouble(&self) -> String {
        let heads = &self.record.heads;
        match (self.progress.unreadable(), self.progress.error.as_str()) {
            (Some(error), _) => format!("{} cannot be read: {error}", heads.old_called),
            (None, "") => format!("{} fails: a change", heads.new_called),
            (None, error) => format!("{} fails: {error}", heads.new_called),
        }
    }

    /// How long it took, from the begin, or of a mirror from when its end was asked for.
    fn took(&self) -> Duration {
        rt::now() - self.since
    }
}

/// What an operator has asked for.
#[derive(Clone, Copy, PartialEq)]
enum Asked {
    Cutover,
    Abort,
}

/// How far the comparison of both sides is.
#[derive(Clone, Copy, PartialEq)]
enum Comparing {
    No,
    Begun,
    Done,
}

/// What comes next.
enum Next {
    Look,
    Verify,
    Cut,
    Abort(String),
    Over,
}

impl Job {
    /// Attends to a move whose mirror is in place.
    pub(super) fn start(record: Record, served: &Arc<Served>, daemon: &Arc<Daemon>) -> Arc<Job> {
        let progress = served.copier(&record.names.copy).unwrap_or_default();
        let (state, message) = match record.options.is_mirror {
            true => (MoveState::Mirroring, format!("{} is kept as its mirror", record.heads.new_called)),
            false => (MoveState::Copying, String::new()),
        };
        let job = Arc::new(Job {
            now: Mutex::new(Now {
                record,
                state,
                message,
                progress,
                moved: None,
                pause: None,
                since: rt::now(),
                took: None,
                asked: None,
                goes_back: false,
                why: None,
                failing: None,
                again: None,
                lost: None,
                trouble: None,
                off: None,
                comparing: Comparing::No,
                ended_early: 0,
            }),
            wake: Notify::new(),
        });
        let attended = attend(job.clone(), Arc::downgrade(served), Arc::downgrade(daemon));
        drop(crate::control::server::spawn(attended));
        let watched = files::watch(job.clone(), Arc::downgrade(served), Arc::downgrade(daemon));
        drop(crate::control::server::spawn(watched));
        job
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Every change is complete before anything can panic.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk that moves.
    pub(crate) fn disk(&self) -> String {
        self.now().record.names.disk.clone()
    }

    pub(super) fn to(&self) -> String {
        self.now().record.heads.new_called.clone()
    }

    pub(super) fn names(&self) -> Names {
        self.now().record.names.clone()
    }

    pub(super) fn record(&self) -> Record {
        self.now().record.clone()
    }

    /// Changes the record. Whoever does that holds `saving` of the graph.
    pub(super) fn revise(&self, change: impl FnOnce(&mut Record)) -> Record {
        let mut now = self.now();
        change(&mut now.record);
        now.record.clone()
    }

    /// An image of the move is not what its name leads to: the move is given up.
    pub(super) fn lost(&self, names: &Names, error: &Error) {
        let mut now = self.now();
        // It may have cut over meanwhile, or lost it before.
        if now.record.names == *names && now.lost.is_none() {
            now.lost = Some(error.to_string());
            drop(now);
            self.wake.notify_one();
        }
    }

    /// How often it is looked at.
    pub(super) fn every(&self) -> Duration {
        match self.state() {
            MoveState::Mirroring | MoveState::Paused => AT_LEISURE,
            _ => EVERY,
        }
    }

    pub(crate) fn state(&self) -> MoveState {
        self.now().state
    }

    fn set(&self, state: MoveState, message: impl Into<String>) {
        let mut now = self.now();
        (now.state, now.message) = (state, message.into());
    }

    /// As the control socket shows it.
    pub(crate) fn view(&self, served: &Served) -> MoveView {
        let now = self.now();
        let moved = now.moved.as_ref().filter(|_| now.state == MoveState::Mirroring);
        let progress = moved.unwrap_or(&now.progress);
        MoveView {
            graph: served.live.name().to_owned(),
            element: now.record.names.disk.clone(),
            to: now.record.to.clone(),
            state: now.state,
            message: now.message.clone(),
            trouble: now.trouble.clone(),
            total: progress.total,
            remaining: progress.remaining,
            copied: progress.copied,
            skipped: progress.skipped,
            rate: progress.rate_now,
            verified: progress.verified,
            passes: progress.passes,
            pause_seconds: now.pause.map(|pause| pause.as_secs_f64()),
            seconds: now.took.unwrap_or_else(|| now.took()).as_secs_f64(),
        }
    }

    /// Tells the operator, as an event.
    pub(super) fn say(&self, served: &Served, message: impl std::fmt::Display) {
        let event = Event::new(EventKind::Notice, served.live.name(), message).of(&self.disk());
        served.live.disk().host().events().publish(event.with("move", self.state().name()));
    }

    /// Stops the copier for a while, or lets it go on. Guests' changes go to both sides all the same.
    pub(crate) async fn pause(&self, served: &Served, daemon: &Daemon, pause: bool) -> Result<(), Refusal> {
        self.goes_on()?;
        let copy = self.names().copy;
        served.set(daemon, &copy, "paused", if pause { "yes" } else { "no" }).await?;
        self.wake.notify_one();
        Ok(())
    }

    /// Asks for the end of the move: the old disk is the disk, as before.
    pub(crate) fn abort(&self) -> Result<(), Refusal> {
        self.ask(Asked::Abort)
    }

    /// Asks for the cut-over as soon as both sides are the same.
    pub(crate) fn cut(&self) -> Result<(), Refusal> {
        self.ask(Asked::Cutover)
    }

    fn ask(&self, what: Asked) -> Result<(), Refusal> {
        self.goes_on()?;
        let mut now = self.now();
        if now.state == MoveState::Mirroring {
            now.since = rt::now();
        }
        now.goes_back = now.record.options.is_mirror && what == Asked::Cutover;
        (now.asked, now.trouble) = (Some(what), None);
        if what == Asked::Abort
            && let Some(off) = &now.off
        {
            off.send_replace(true);
        }
        drop(now);
        self.wake.notify_one();
        Ok(())
    }

    /// # Errors
    /// It is over.
    pub(crate) fn goes_on(&self) -> Result<(), Refusal> {
        let now = self.now();
        match now.state.is_over() {
            true => {
                Err(Refusal::invalid(format!("{}: the move is over: {}", now.record.names.disk, now.message)))
            }
            false => Ok(()),
        }
    }

    /// True if both sides are the same and stay so, before the cut-over.
    pub(crate) fn is_ready(&self) -> bool {
        self.state() == MoveState::Ready
    }

    /// The cut-over is under way, which nobody else may begin. `off` calls it off.
    pub(super) fn cutting(&self, off: &watch::Sender<bool>) {
        let mut now = self.now();
        (now.off, now.trouble) = (Some(off.clone()), None);
        if now.state == MoveState::Mirroring && now.asked.is_none() {
            now.since = rt::now();
        }
        drop(now);
        self.set(MoveState::Cutting, "the new disk takes over");
    }

    /// The cut-over could not be made. It is tried again if it was not asked for at this instant.
    pub(super) fn not_cut(&self, refusal: &Refusal) {
        let mut now = self.now();
        if now.state != MoveState::Cutting {
            return;
        }
        (now.state, now.message, now.off) = (MoveState::Copying, refusal.message.clone(), None);
        let Wanted { manual, is_mirror, .. } = now.record.options;
        // Who has said when it is to be has been told, and says so again.
        if (manual || is_mirror) && now.asked != Some(Asked::Cutover) {
            return;
        }
        now.again = Some(rt::now() + AGAIN);
        now.failing.get_or_insert_with(rt::now);
    }

    /// The cut-over has to wait for somebody who sees to the graph file. It is not tried again before they say so.
    pub(super) fn held_up(&self, refusal: &Refusal) {
        let mut now = self.now();
        if now.state.is_over() {
            return;
        }
        (now.trouble, now.message) = (Some(refusal.message.clone()), refusal.message.clone());
        if !now.record.options.is_mirror {
            now.state = MoveState::Ready;
        }
        if now.asked == Some(Asked::Cutover) {
            now.asked = None;
        }
    }

    /// The new disk is the disk; with a record of its mirror, if the old one is that now. `trouble` with the graph file
    /// that does not say so.
    pub(super) fn has_cut(&self, pause: Duration, mirror: Option<Record>, trouble: Option<String>) {
        let mut now = self.now();
        now.pause = Some(pause);
        now.took = Some(now.took());
        (now.asked, now.failing) = (None, None);
        let to = now.record.heads.new_called.clone();
        (now.state, now.message) = match &mirror {
            None => (MoveState::Done, format!("the disk is {to} now")),
            Some(mirror) => {
                let old = &mirror.heads.new_called;
                (MoveState::Mirroring, format!("the disk is {to} now, and {old} is kept as its mirror"))
            }
        };
        if let Some(trouble) = &trouble {
            now.message += &format!("; {trouble}");
        }
        (now.trouble, now.off, now.lost) = (trouble, None, None);
        if let Some(mirror) = mirror {
            now.moved = Some(now.progress.clone());
            now.record = mirror;
        }
    }

    /// What comes next, from what the copier and the leg of the mirror say.
    fn decide(&self, progress: Progress, given_up: bool) -> Next {
        let mut now = self.now();
        let Wanted { verify, manual, is_mirror, patience_seconds, .. } = now.record.options;
        now.progress = progress;
        if now.state.is_over() {
            return Next::Over;
        }
        if now.asked == Some(Asked::Abort) {
            // Requests of guests wait during each attempt.
            return match now.again {
                Some(again) if rt::now() < again => Next::Look,
                _ => Next::Abort(now.why.clone().unwrap_or_else(|| "it was given up".to_owned())),
            };
        }
        if let Some(lost) = &now.lost {
            return Next::Abort(lost.clone());
        }
        if now.progress.state == "differs" {
            return Next::Abort(format!("the two sides differ: {}", now.progress.error));
        }
        let fails = given_up || now.progress.state == "waiting";
        // While it tries again what has failed, that may fail again.
        if !fails && now.again.is_none() && now.progress.error.is_empty() {
            now.failing = None;
        }
        if fails {
            let since = *now.failing.get_or_insert_with(rt::now);
            now.message = now.trouble();
            if rt::now() - since > Duration::from_secs_f64(patience_seconds) {
                return Next::Abort(now.message.clone());
            }
            return Next::Look;
        }
        if now.progress.state == "paused" {
            (now.state, now.message) = (MoveState::Paused, "until `mason migrate resume`".to_owned());
            return Next::Look;
        }
        if now.progress.state == "verifying" {
            (now.state, now.message) = (MoveState::Verifying, String::new());
            return Next::Look;
        }
        if now.progress.remaining > 0 || now.progress.state != "clean" {
            if now.state != MoveState::Mirroring {
                now.state = MoveState::Copying;
                now.message.clear();
            }
            return Next::Look;
        }
        if now.comparing == Comparing::Begun {
            // One that has ended early, or left out what was dirty, begins anew.
            let whole = now.progress.verified >= now.progress.total;
            now.comparing = if whole { Comparing::Done } else { Comparing::No };
            now.ended_early += u32::from(!now.progress.error.is_empty());
            if now.ended_early > COMPARISONS {
                return Next::Abort(format!("the two sides cannot be compared: {}", now.progress.error));
            }
        }
        if verify && now.comparing == Comparing::No && !is_mirror {
            now.comparing = Comparing::Begun;
            return Next::Verify;
        }
        if let Some(again) = now.again {
            if rt::now() < again {
                return Next::Look;
            }
            let since = now.failing.unwrap_or(again);
            if rt::now() - since > Duration::from_secs_f64(patience_seconds) {
                return Next::Abort(now.message.clone());
            }
            now.again = None;
            return Next::Cut;
        }
        if (manual || is_mirror || now.trouble.is_some()) && now.asked != Some(Asked::Cutover) {
            now.state = if is_mirror { MoveState::Mirroring } else { MoveState::Ready };
            if let Some(trouble) = now.trouble.clone() {
                now.message = trouble;
            } else if !is_mirror {
                now.message = "both disks are the same: `mason migrate cutover` goes on".to_owned();
            }
            return Next::Look;
        }
        Next::Cut
    }

    async fn step(self: &Arc<Self>, served: &Arc<Served>, daemon: &Arc<Daemon>) -> bool {
        // Somebody else is about to cut several over.
        if self.state() == MoveState::Cutting {
            return true;
        }
        let names = self.names();
        let progress = served.copier(&names.copy);
        // The graph is being changed by a move of another disk, or has failed.
        let Some(progress) = progress else { return !self.state().is_over() };
        let given_up = served.live.get(&names.retry, "state").is_ok_and(|state| state == "given_up");
        match self.decide(progress, given_up) {
            Next::Look => {}
            Next::Verify => {
                if let Err(error) = served.live.call(&names.copy, "verify", "") {
                    tracing::warn!("{}: the two sides cannot be compared: {error}", names.disk);
                }
            }
            Next::Cut => {
                let disks = [(served.clone(), self.clone())];
                // Why it could not be is its message.
                let _ = cut_over(daemon, &disks, None, false).await;
            }
            Next::Abort(why) => self.give_up(served, daemon, &why).await,
            Next::Over => return false,
        }
        true
    }

    /// Changes the graph to that of the old disk alone.
    async fn take_out(
        &self,
        served: &Served,
        daemon: &Daemon,
        saving: &tokio::sync::MutexGuard<'_, ()>,
        record: &mut Record,
    ) -> Result<(), Refusal> {
        let (next, _) = record.names.without_mirror(&served.live.spec(), Side::Old, &served.path)?;
        // Once the gate is open again the map learns of nothing: who starts after a crash must not go by it.
        record.phase = Phase::GivingUp;
        record.write(daemon, &served.path)?;
        // The other disk need not keep anything, and may be gone, or not answer.
        let names = &record.names;
        let leave_behind = [&names.tee, &names.dirty, &names.copy].map(String::clone).to_vec();
        let options =
            Change { deadline: GIVING_UP, flush_by: Some(Vec::new()), leave_behind, ..Change::default() };
        let how = How { options, dry_run: false, save: false, moves: true };
        let changed = served.change(saving, daemon, |_| Ok(next), how).await;
        if changed.is_err() {
            record.phase = Phase::Copying;
            record.write(daemon, &served.path)?;
        }
        changed.map(drop)
    }

    /// Takes the mirror out again.
    async fn give_up(&self, served: &Served, daemon: &Daemon, why: &str) {
        let saving = served.saving.lock().await;
        let mut record = self.record();
        let changed = self.take_out(served, daemon, &saving, &mut record).await;
        if let Err(refusal) = changed {
            let mut now = self.now();
            now.message = format!("{why}; it cannot be given up yet: {}", refusal.message);
            now.why = Some(why.to_owned());
            (now.asked, now.again) = (Some(Asked::Abort), Some(rt::now() + AGAIN));
            return;
        }
        let heads = &record.heads;
        let stands = if record.options.is_mirror { heads.part() } else { heads.stay() };
        if let Err(error) = stands {
            tracing::warn!(
                "{}: its head cannot say that it does not move any more: {error}",
                record.names.disk
            );
        }
        // The file has had the mirror since the cut-over.
        let trouble = if record.options.is_mirror { served.save_without_mirror().err() } else { None };
        record.forget(daemon, &served.path);
        let (disk, other) = (&heads.old_called, &heads.new_called);
        let (state, message) = match record.options.is_mirror {
            true => {
                // Who has asked for the way back has not got it.
                let state = if self.now().goes_back { MoveState::Aborted } else { MoveState::Done };
                (state, format!("the disk is {disk}, and {other} is its mirror no more: {why}"))
            }
            false => (MoveState::Aborted, format!("the disk is {disk}, as before: {why}")),
        };
        let message = match &trouble {
            Some(refusal) => format!("{message}; {}", refusal.message),
            None => message,
        };
        let mut now = self.now();
        now.took = Some(now.took());
        now.trouble = trouble.map(|refusal| refusal.message);
        drop(now);
        self.set(state, message.clone());
        drop(saving);
        self.say(served, message);
    }
}

impl Served {
    /// Makes the graph file say what is served, unless somebody has edited it: then the next start asks.
    fn save_without_mirror(&self) -> Result<(), Refusal> {
        match is_edited(&self.path, self.known()) {
            _ if self.known().is_none() => Ok(()),
            Some(edited) => Err(Refusal::busy(format!("{edited}, and still has the mirror in it"))),
            None => self.write_file(&self.live.spec()),
        }
    }
}

/// Attends to a move until it is over or its graph is gone.
async fn attend(job: Arc<Job>, served: Weak<Served>, daemon: Weak<Daemon>) {
    loop {
        let (Some(served), Some(daemon)) = (served.upgrade(), daemon.upgrade()) else { return };
        if !job.step(&served, &daemon).await {
            return;
        }
        drop((served, daemon));
        let _ = rt::timeout(job.every(), job.wake.notified()).await;
    }
}
