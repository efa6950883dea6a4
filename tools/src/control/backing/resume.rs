//! What becomes of a backup that was under way when the process ended: it is given up, and what guests have written
//! meanwhile is merged into the disk.

use super::job::Job;
use super::record::{Place, Record};
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::Refusal;
use crate::graphs::GraphFile;
use crate::left::{Choice, Left};
use blockmason::io::{Access, Registry};
use blockmason::lang::Spec;
use std::path::Path;
use std::sync::Arc;

/// What a graph starts with that was being backed up.
pub(crate) struct Interrupted(Vec<Record>);

impl Interrupted {
    /// The graph that follows, with the overlay and without what copies. None if no overlay is left.
    ///
    /// # Errors
    /// What is left cannot be understood, or it is not what is to be served.
    pub(crate) fn of(
        daemon: &Daemon,
        path: &Path,
        file: GraphFile,
        left: &Left,
        choice: Choice,
    ) -> Result<(GraphFile, Option<Interrupted>), Refusal> {
        let records: Vec<_> =
            Record::read_all(daemon, path)?.into_iter().filter_map(|(_, record)| record).collect();
        if records.is_empty() {
            return Ok((file, None));
        }
        let mut spec = left.choose(file.clone(), Choice::Left)?.spec;
        let (here, gone): (Vec<_>, Vec<_>) =
            records.into_iter().partition(|record| record.names.are_in(&spec));
        // It had not begun, or all was merged.
        gone.iter().for_each(|record| Place::of(daemon, path, &record.names.disk).forget(record));
        for record in &here {
            record.may_start(daemon, path, choice)?;
            spec = record.names.without_copy(&spec)?;
        }
        Ok(match here.is_empty() {
            true => (file, None),
            false => (file.with(spec), Some(Interrupted(here))),
        })
    }

    /// Of a graph that has come from another process.
    pub(crate) fn arrived(daemon: &Daemon, path: &Path, spec: &Spec) -> Result<Interrupted, Refusal> {
        let records = Record::read_all(daemon, path)?.into_iter().filter_map(|(_, record)| record);
        Ok(Interrupted(records.filter(|record| record.names.are_in(spec)).collect()))
    }

    /// The graph serves: merges what guests have written, and says what has become of the backup.
    pub(crate) fn attend(self, served: &Arc<Served>, daemon: &Arc<Daemon>) {
        for record in self.0 {
            served.backups.add(Job::give_up(record, served, daemon));
        }
    }
}

impl Record {
    /// # Errors
    /// What guests have written would be lost.
    fn may_start(&self, daemon: &Daemon, path: &Path, choice: Choice) -> Result<(), Refusal> {
        let overlay = Place::of(daemon, path, &self.names.disk).overlay();
        let (shown, disk) = (overlay.display(), &self.names.disk);
        if !overlay.exists() {
            let message = format!("{shown}: what was written while {disk} was backed up is gone");
            return Err(Refusal::busy(message));
        }
        match choice {
            Choice::File => Err(Refusal::busy(format!(
                "{shown} has what was written while {disk} was backed up: it is merged by a start without `--as-file`"
            ))),
            Choice::Ask | Choice::Left => Ok(()),
        }
    }
}

/// Drops what was written to a disk while it was backed up by a daemon that has ended.
///
/// # Errors
/// There is nothing, it cannot be understood, or it is in use.
pub(crate) fn discard(state: &Path, file: &Path, disk: &str) -> Result<(), Refusal> {
    let place = Place::below(state, file, disk);
    let record = place.read()?.ok_or_else(|| {
        Refusal::not_found(format!("nothing is left of a backup of {disk} of {}", file.display()))
    })?;
    let of = |error| Refusal::of(&error);
    let overlay = place.overlay();
    let _alone = match overlay.exists() {
        true => Some(
            Registry::of_process().open(&overlay, Access { write: true, direct: false }, disk).map_err(of)?,
        ),
        false => None,
    };
    // First: a start that finds the record, and not the overlay in its graph, takes all as merged.
    Left::of(state, file).revise(|spec| match record.names.are_in(spec) {
        true => record.names.without_backup(spec),
        false => Ok(spec.clone()),
    })?;
    record.stand_dropped().map_err(of)?;
    place.forget_files();
    Ok(())
}

/// Forgets what is known of changes of disks of which nobody keeps account any more: some are not in it.
pub(in crate::control) fn forget_maps(daemon: &Daemon, path: &Path, spec: &Spec) -> Result<(), Refusal> {
    for (disk, _) in Record::read_all(daemon, path)? {
        if spec.find(&format!("{disk}_changes")).is_none() {
            Place::of(daemon, path, &disk).forget_map()?;
        }
    }
    Ok(())
}
