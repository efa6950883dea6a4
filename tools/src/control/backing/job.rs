//! A backup that goes on: looks at the copier, and at its end, whatever it is, merges the overlay and takes it out.

use super::account::Account;
use super::record::{Place, Record};
use crate::control::change::How;
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::Refusal;
use crate::view::{BackupState, BackupView};
use blockmason::events::{Event, EventKind};
use blockmason::live::{Heads, Options};
use blockmason::rt;
use blockmason_elements::migrate::copy::Progress;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How often the copier is looked at.
const EVERY: Duration = Duration::from_millis(50);

/// How long requests in flight may take to end when the overlay is taken out: guests wait so long at the most.
const GATE: Duration = Duration::from_secs(2);

/// How long that waits when it could not be done, at first and at last.
const AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What was asked for.
#[derive(Clone, Copy, Default)]
pub(super) struct Asked {
    /// The graph file is written anew at the end.
    pub(super) save: bool,
    /// How long the target may fail.
    pub(super) patience: Duration,
}

/// A backup, from its begin or from a restart until it is over.
pub(crate) struct Job {
    asked: Asked,
    now: Mutex<Now>,
    /// Told when an operator has asked for something.
    wake: Notify,
    began: Instant,
    pause: Duration,
}

/// What is known of a backup.
struct Now {
    record: Record,
    state: BackupState,
    message: String,
    progress: Progress,
    /// The most that was ever to be copied.
    total: u64,
    took: Option<Duration>,
    abort: bool,
    /// Why there is no backup.
    failed: Option<String>,
    /// Since when the target fails.
    failing: Option<Instant>,
    /// When the overlay may be taken out, and how long to wait the next time.
    again: Option<Instant>,
    wait: Duration,
}

/// What comes next while it copies.
enum Next {
    Look,
    Complete,
    GiveUp(String),
}

impl Job {
    /// Attends to a backup that has begun.
    pub(super) fn start(
        record: Record,
        (asked, pause): (Asked, Duration),
        served: &Arc<Served>,
        daemon: &Arc<Daemon>,
    ) -> Arc<Job> {
        let job = Job::new(record, asked, pause);
        job.attended(served, daemon);
        job
    }

    /// Ends a backup that was interrupted by the end of a process.
    pub(super) fn give_up(record: Record, served: &Arc<Served>, daemon: &Arc<Daemon>) -> Arc<Job> {
        let failed = (!record.is_complete()).then(|| "the daemon ended meanwhile".to_owned());
        let job = Job::new(record, Asked::default(), Duration::ZERO);
        job.merge(failed);
        let said = job.now().message.clone();
        tracing::warn!("{}: {said}", served.file);
        job.say(served, said);
        job.attended(served, daemon);
        job
    }

    fn new(record: Record, asked: Asked, pause: Duration) -> Arc<Job> {
        let now = Now {
            record,
            state: BackupState::Copying,
            message: String::new(),
            progress: Progress::default(),
            total: 0,
            took: None,
            abort: false,
            failed: None,
            failing: None,
            again: None,
            wait: AGAIN[0],
        };
        Arc::new(Job { asked, now: Mutex::new(now), wake: Notify::new(), began: rt::now(), pause })
    }

    fn attended(self: &Arc<Job>, served: &Arc<Served>, daemon: &Arc<Daemon>) {
        let attended = attend(self.clone(), Arc::downgrade(served), Arc::downgrade(daemon));
        drop(crate::control::server::spawn(attended));
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Every change is complete before anything can panic.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk that is backed up.
    pub(crate) fn disk(&self) -> String {
        self.now().record.names.disk.clone()
    }

    pub(super) fn record(&self) -> Record {
        self.now().record.clone()
    }

    pub(crate) fn state(&self) -> BackupState {
        self.now().state
    }

    /// As the control socket shows it.
    pub(crate) fn view(&self, served: &Served) -> BackupView {
        let now = self.now();
        let progress = &now.progress;
        BackupView {
            graph: served.live.name().to_owned(),
            element: now.record.names.disk.clone(),
            to: now.record.to.clone(),
            incremental: now.record.incremental,
            state: now.state,
            message: now.message.clone(),
            total: now.total,
            remaining: progress.remaining,
            copied: progress.copied,
            skipped: progress.skipped,
            rate: progress.rate_now,
            pause_seconds: self.pause.as_secs_f64(),
            seconds: now.took.unwrap_or_else(|| rt::now() - self.began).as_secs_f64(),
        }
    }

    /// Tells the operator, as an event.
    pub(super) fn say(&self, served: &Served, message: impl std::fmt::Display) {
        let (disk, state) = (self.disk(), self.state().name());
        let event = Event::new(EventKind::Notice, served.live.name(), message).of(&disk);
        served.live.disk().host().events().publish(event.with("backup", state));
    }

    /// Asks for the end of the backup.
    ///
    /// # Errors
    /// There is nothing left to be given up.
    pub(crate) fn abort(&self) -> Result<(), Refusal> {
        let mut now = self.now();
        if now.state == BackupState::Merging {
            // What waits is tried at once.
            now.again = None;
        } else if now.state != BackupState::Copying {
            let disk = &now.record.names.disk;
            return Err(Refusal::invalid(format!("{disk}: the backup is over: {}", now.message)));
        } else {
            now.abort = true;
        }
        drop(now);
        self.wake.notify_one();
        Ok(())
    }

    /// What comes next, from what the copier says.
    fn decide(&self, progress: Progress) -> Next {
        let mut now = self.now();
        let seen = match now.record.incremental {
            true => progress.remaining + progress.copied + progress.skipped,
            false => progress.total,
        };
        now.total = now.total.max(seen);
        now.progress = progress;
        if now.abort {
            return Next::GiveUp("it was given up".to_owned());
        }
        match &*now.progress.state {
            "clean" => Next::Complete,
            "waiting" => {
                let error = now.progress.error.clone();
                now.message.clone_from(&error);
                let since = *now.failing.get_or_insert_with(rt::now);
                if rt::now() - since < self.asked.patience {
                    return Next::Look;
                }
                // It is not tried again.
                Next::GiveUp(error.split("; tried again").next().unwrap_or_default().to_owned())
            }
            _ => {
                now.failing = None;
                now.message.clear();
                Next::Look
            }
        }
    }

    /// Nothing is copied any more: what guests have written goes to the disk.
    fn merge(&self, failed: Option<String>) {
        let mut now = self.now();
        now.state = BackupState::Merging;
        let (disk, to) = (&now.record.names.disk, &now.record.to);
        let what = "what was written meanwhile is being merged";
        now.message = match &failed {
            None => format!("{to} is complete; {what}"),
            Some(why) => format!("{disk} was not backed up: {why}; {what}"),
        };
        now.failed = failed;
    }

    async fn step(&self, served: &Arc<Served>, daemon: &Arc<Daemon>) {
        match self.state() {
            BackupState::Copying => self.copying(served).await,
            BackupState::Merging => self.merging(served, daemon).await,
            BackupState::Done | BackupState::Failed => {}
        }
    }

    async fn copying(&self, served: &Arc<Served>) {
        let names = self.record().names;
        let Some(progress) = served.copier(&names.copy) else { return };
        let failed = match self.decide(progress) {
            Next::Look => return,
            Next::Complete => self.complete().err().map(|refusal| refusal.message),
            Next::GiveUp(why) => Some(why),
        };
        if failed.is_some() {
            // What is under way ends; nothing else begins.
            if let Err(error) = served.live.set(&names.copy, "paused", "yes").await {
                tracing::warn!("{}: it cannot be paused: {error}", names.copy);
            }
        }
        // Both sides have been flushed by the copier.
        if let Some(map) = served.map_of(&names.changes)
            && let Err(error) = map.thaw(failed.is_some()).await
        {
            tracing::warn!("{}: the map says more than has changed: {error}", names.changes);
        }
        self.merge(failed);
    }

    /// Says durably that the target holds the backup, and that changes are counted from it.
    fn complete(&self) -> Result<(), Refusal> {
        let record = self.record();
        let gone = || Refusal::new("internal", "the account of changes is gone");
        let account = Account::read(&record.map)?.filter(|account| account.name == record.account);
        let account = account.ok_or_else(gone)?;
        // In this order: an account that says so relies on a head that does.
        record.stand_complete().map_err(|error| Refusal::of(&error))?;
        account.holding(record.number).write(&record.map)
    }

    async fn merging(&self, served: &Arc<Served>, daemon: &Arc<Daemon>) {
        let names = self.record().names;
        let cow = names.cow;
        // It is opened a moment after the graph has begun to serve.
        let Ok(state) = served.live.get(&cow, "state") else { return };
        match state.as_str() {
            "overlaying" => {
                // From here on nothing is added to the overlay, and its map may still need room.
                Place::of(daemon, &served.path, &names.disk).release_reserve();
                if let Err(error) = served.live.call(&cow, "commit", "") {
                    tracing::warn!("{cow}: {error}");
                }
            }
            "committed" => {
                let due = self.now().again.is_none_or(|again| again <= rt::now());
                if due
                    && self.copies_no_more(served)
                    && let Err(refusal) = self.take_out(served, daemon).await
                {
                    let mut now = self.now();
                    let folder = Place::of(daemon, &served.path, &now.record.names.disk);
                    now.message = format!(
                        "the overlay cannot be taken out yet: {}; its folder is {}; `mason backup abort` tries it again at once",
                        refusal.message,
                        folder.shown()
                    );
                    if now.again.is_none() {
                        tracing::warn!("{}: {}", served.file, now.message);
                    }
                    now.again = Some(rt::now() + now.wait);
                    now.wait = (now.wait * 2).min(AGAIN[1]);
                }
            }
            _ => {
                let error = served.live.get(&cow, "error").unwrap_or_default();
                if !error.is_empty() {
                    self.now().message = format!("the overlay cannot be merged yet: {error}");
                }
            }
        }
    }

    /// True if nothing is on its way to the target any more: guests would wait for that behind the gate.
    fn copies_no_more(&self, served: &Served) -> bool {
        let copy = self.record().names.copy;
        if served.live.spec().find(&copy).is_none() {
            return true;
        }
        let none = served.copier(&copy).is_some_and(|progress| progress.under_way == 0);
        if !none {
            self.now().message = "the target has not answered yet".to_owned();
        }
        none
    }

    /// Takes overlay and copier out: everything is in the disk.
    async fn take_out(&self, served: &Arc<Served>, daemon: &Daemon) -> Result<(), Refusal> {
        let saving = served.saving.lock().await;
        let names = self.record().names;
        let running = served.live.spec();
        let next = names.without_backup(&running)?;
        // A `cow` of the target keeps what was written to it.
        let all = running.elements.iter().map(|element| element.name.clone());
        let unasked = all.filter(|name| *name != names.cow && next.find(name).is_none()).collect();
        let options = Options {
            deadline: GATE,
            heads: Heads::Ignore,
            // The target has been flushed, or need not be; what was merged has been.
            flush_by: Some(Vec::new()),
            unasked,
            keeps_marks: true,
            ..Options::default()
        };
        let how = How { options, dry_run: false, save: false, moves: true };
        served.change(&saving, daemon, |_| Ok(next), how).await?;
        Place::of(daemon, &served.path, &names.disk).forget(&self.record());
        let saved = if self.asked.save { served.write_file(&served.live.spec()) } else { Ok(()) };
        drop(saving);
        self.end(served, saved.err());
        Ok(())
    }

    fn end(&self, served: &Served, not_saved: Option<Refusal>) {
        let mut now = self.now();
        now.took = Some(rt::now() - self.began);
        let (disk, to) = (&now.record.names.disk, &now.record.to);
        let (state, mut message) = match &now.failed {
            None => (BackupState::Done, format!("{to} is {disk} as it was when the backup began")),
            Some(why) => (BackupState::Failed, format!("{disk} was not backed up: {why}")),
        };
        if let Some(refusal) = not_saved {
            message += &format!("; {}", refusal.message);
        }
        (now.state, now.message) = (state, message.clone());
        drop(now);
        self.say(served, message);
    }
}

/// Attends to a backup until it is over or its graph is gone.
async fn attend(job: Arc<Job>, served: Weak<Served>, daemon: Weak<Daemon>) {
    while !job.state().is_over() {
        let (Some(served), Some(daemon)) = (served.upgrade(), daemon.upgrade()) else { return };
        job.step(&served, &daemon).await;
        drop((served, daemon));
        let _ = rt::timeout(EVERY, job.wake.notified()).await;
    }
}
