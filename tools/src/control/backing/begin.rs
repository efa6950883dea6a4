//! How a backup begins.

use super::account::{self, Account};
use super::graph::{Names, Plan};
use super::job::{Asked, Job};
use super::record::{Place, Record};
use super::sides::Sides;
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
use std::path::PathBuf;
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
        let (account, map, with_account) = accounted(&running, &names, &place, kept)?;
        let rate = request.rate.as_ref().map(|rate| format!("(rate {rate})")).unwrap_or_default();
        let overlay = place.overlay();
        let plan = Plan { overlay: (&overlay, room(size)), incremental: request.incremental, copy: &rate };
        let mut next = names.with_backup(&with_account, &target, &plan, &request.folder)?;
        self.size_of_new(&mut next, &names.disk, &names.to);
        place.make_overlay(room(size)).inspect_err(|_| place.forget_files())?;
        let sides = self.sides(daemon, &next, &names, request.incremental).await.map_err(|refusal| {
            let message = refusal.message.replace("the disk at `to`", request.to.trim());
            Refusal { message, ..refusal }
        });
        let may = |sides: &Sides| {
            sides.may_write(request.force)?;
            if request.incremental { sides.may_follow(&account, &names, request.force) } else { Ok(()) }
        };
        let sides =
            sides.and_then(|sides| may(&sides).map(|()| sides)).inspect_err(|_| place.forget_files())?;
        let record = Record::new(names, request.to.trim().to_owned(), request.incremental, map);
        let begun = self.begin(&saving, daemon, record, (with_account, next), (kept, account, &sides)).await;
        let (record, pause) = begun.inspect_err(|_| place.forget_files())?;
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
        mut record: Record,
        (with_account, next): (Spec, Spec),
        (kept, mut account, sides): (bool, Account, &Sides),
    ) -> Result<(Record, Duration), Refusal> {
        let place = Place::of(daemon, &self.path, &record.names.disk);
        if !kept {
            // What is known there is not of all changes.
            place.forget_map()?;
        }
        // Does nothing where account is kept already.
        let changed = self.change_to(saving, daemon, with_account, Heads::Ignore).await?;
        let mut pause = changed.pause_seconds.unwrap_or(0.0);
        let gone = || Refusal::new("internal", "what keeps account of changes is gone");
        let map = self.map_of(&record.names.changes).ok_or_else(gone)?;
        if !sides.are_kept(&account) {
            // Whatever becomes of this backup: no other one can be counted from.
            account.last = None;
        }
        account.used += 1;
        account.write(&record.map)?;
        (record.account, record.number) = (account.name.clone(), account.used);
        [record.disk_heads, record.target_heads] = sides.heads();
        place.write(&record)?;
        let called = format!("{} of {} (a backup)", record.names.disk, self.live.name());
        let stood = sides.stand(&account, record.incremental, called, &place.overlay());
        let begun = match stood.map_err(|error| Refusal::of(&error)) {
            Ok(()) => {
                let commit = Some(freezing(map));
                let options =
                    Options { heads: Heads::Ignore, keeps_marks: true, commit, ..Options::default() };
                let how = How { options, dry_run: false, save: false, moves: true };
                self.change(saving, daemon, |_| Ok(next), how).await
            }
            Err(refusal) => Err(refusal),
        };
        pause += begun.inspect_err(|_| sides.restore())?.pause_seconds.unwrap_or(0.0);
        Ok((record, patience(pause)))
    }
}

/// The account of a disk's changes, its map, and the graph in which it is kept: a new one if none is.
fn accounted(
    running: &Spec,
    names: &Names,
    place: &Place,
    kept: bool,
) -> Result<(Account, PathBuf, Spec), Refusal> {
    let known = if kept { Account::of(running, names)? } else { None };
    match (known, account::map(running, names).filter(|_| kept)) {
        (Some(account), Some(map)) => Ok((account, map, running.clone())),
        // It has had no name, or nobody knows how many backups it has.
        (None, Some(map)) => {
            let (account, mut spec) = (Account::begin()?, running.clone());
            if let Some(log) = spec.find(&names.changes) {
                spec.elements[log].params.set("account", &account.name);
            }
            Ok((account, map, spec))
        }
        (_, None) if kept => Err(Refusal::invalid(format!(
            "{} has no file, so what it knows ends with the daemon: take it out, or give it one",
            names.changes
        ))),
        (_, None) => {
            let (account, map) = (Account::begin()?, place.map());
            let spec = names.with_changes(running, &map, &account.name)?;
            Ok((account, map, spec))
        }
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
