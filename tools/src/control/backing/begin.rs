//! How a backup begins.

use super::graph::{Names, Plan};
use super::job::{Asked, Job};
use super::record::{Place, Record};
use crate::control::change::How;
use crate::control::daemon::{Daemon, Served};
use crate::control::moving::Target;
use crate::control::refusal::Refusal;
use crate::control::trial::room;
use crate::view::{BackupRequest, BackupView};
use blockmason::lang::Spec;
use blockmason::live::{Heads, Options};
use blockmason::sched::Commit;
use blockmason_elements::migrate::map::DirtyMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::MutexGuard;

/// How long the target may fail if nothing else is said, in seconds.
const PATIENCE: f64 = 30.0;

impl Served {
    /// Makes a disk stand still below an overlay, and begins to copy it. When this returns, guests go on.
    ///
    /// # Errors
    /// It cannot be backed up there. What guests see has not changed; account may be kept of their changes.
    pub(crate) async fn begin_backup(
        self: &Arc<Self>,
        daemon: &Arc<Daemon>,
        request: &BackupRequest,
    ) -> Result<BackupView, Refusal> {
        let saving = self.saving.lock().await;
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        self.not_moving()?;
        self.not_backing_up()?;
        let running = self.live.spec();
        let size = self.size_of(&running, &request.element)?;
        let target = Target::new(&request.to);
        let names = Names::of(&request.element, &target);
        let place = Place::of(daemon, &self.path, &names.disk);
        let kept = names.keep_account(&running)?;
        if request.incremental {
            self.has_backup(&names, kept)?;
        }
        let with_account = match kept {
            true => (*running).clone(),
            false => names.with_changes(&running, &place.map())?,
        };
        let rate = request.rate.as_ref().map(|rate| format!("(rate {rate})")).unwrap_or_default();
        let overlay = place.overlay();
        let plan = Plan { overlay: (&overlay, room(size)), incremental: request.incremental, copy: &rate };
        let mut next = names.with_backup(&with_account, &target, &plan, &request.folder)?;
        self.size_of_new(&mut next, &names.disk, &names.to);
        place.make_overlay(room(size))?;
        let record = Record::new(names, request.to.trim().to_owned(), request.incremental);
        let begun = self.begin(&saving, daemon, &record, (with_account, next), (kept, request.force)).await;
        let pause = begun.inspect_err(|_| place.forget())?;
        let asked =
            Asked { save: request.save, patience: patience(request.patience_seconds.unwrap_or(PATIENCE)) };
        let job = Job::start(record, (asked, pause), self, daemon);
        self.backups.add(job.clone());
        job.say(self, format!("{} is being backed up to {}", job.disk(), job.record().to));
        Ok(job.view(self))
    }

    /// The bytes of a disk.
    fn size_of(&self, running: &Spec, disk: &str) -> Result<u64, Refusal> {
        let place = running.find(disk).ok_or_else(|| {
            Refusal::not_found(format!("there is no element {disk} in {}", self.live.name()))
        })?;
        if running.edges.iter().all(|edge| edge.to != place) {
            return Err(Refusal::invalid(format!("{disk} is where requests enter, and no disk")));
        }
        let graph = self.live.disk().graph();
        let node = graph.node(disk).ok_or_else(|| Refusal::busy("the graph is being changed"))?;
        Ok(graph.geometry(node).size)
    }

    /// # Errors
    /// There is no earlier backup that is complete.
    fn has_backup(&self, names: &Names, kept: bool) -> Result<(), Refusal> {
        let Names { disk, changes, .. } = names;
        let map = if kept { self.map_of(changes) } else { None };
        let Some(map) = map else {
            let message =
                format!("no account is kept of changes of {disk}: begin with a backup without --incremental");
            return Err(Refusal::invalid(message));
        };
        if map.dirty_bytes() < map.size() {
            return Ok(());
        }
        let message = format!(
            "by {changes} all of {disk} has changed, or no backup was ever complete: begin with one without --incremental"
        );
        Err(Refusal::invalid(message))
    }

    /// Changes the graph, twice where account has to be kept first. Returns how long requests waited.
    async fn begin(
        &self,
        saving: &MutexGuard<'_, ()>,
        daemon: &Daemon,
        record: &Record,
        (with_account, next): (Spec, Spec),
        (kept, force): (bool, bool),
    ) -> Result<Duration, Refusal> {
        let (names, place) = (&record.names, Place::of(daemon, &self.path, &record.names.disk));
        if !kept {
            // What is known there is not of all changes.
            place.forget_map()?;
        }
        let sides = self.survey(daemon, &next, &names.disk, &names.to).await;
        sides.map_err(|error| Refusal::in_graph(&error, &next))?.check_new(force)?;
        let mut pause = 0.0;
        if !kept {
            let changed = self.change_to(saving, daemon, with_account, Heads::Ignore).await?;
            pause += changed.pause_seconds.unwrap_or(0.0);
        }
        let gone = || Refusal::new("internal", "what keeps account of changes is gone");
        let map = self.map_of(&names.changes).ok_or_else(gone)?;
        place.write(record)?;
        let options = Options { heads: Heads::Ignore, commit: Some(freezing(map)), ..Options::default() };
        let how = How { options, dry_run: false, save: false, moves: true };
        let changed = self.change(saving, daemon, |_| Ok(next), how).await?;
        Ok(patience(pause + changed.pause_seconds.unwrap_or(0.0)))
    }
}

/// Behind the closed gate, where no change is on its way: what has changed so far belongs to this backup, and what
/// changes from now on to the next one.
fn freezing(map: Arc<DirtyMap>) -> Commit {
    Arc::new(move || {
        let map = map.clone();
        Box::pin(async move { map.freeze().await })
    })
}

fn patience(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
