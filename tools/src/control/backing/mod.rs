//! Backing up a disk while it is in use: the disk as it is at one instant.
//!
//! `graph` makes the graphs of a backup, `sides` are its volumes and their heads, `account` counts backups, `record` is what
//! a later process must know, `begin` starts one, `job` attends to it until it is over, `resume` gives it up after a restart.
//!
//! For the time of a backup what guests write is kept in an overlay, and the disk below it stands still. What they
//! write is in the overlay alone until it is merged: it must not be lost, whatever ends the process.

mod account;
mod begin;
mod graph;
mod job;
mod record;
mod resume;
mod sides;

pub(crate) use job::Job;
pub(super) use resume::forget_maps;
pub(crate) use resume::{Interrupted, discard};

use super::daemon::Served;
use super::refusal::Refusal;
use crate::view::BackupView;
use blockmason_elements::migrate::map::DirtyMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The backups of a graph: the one that goes on, and the last one of each disk that is over.
#[derive(Default)]
pub(crate) struct Backups(Mutex<Vec<Arc<Job>>>);

impl Backups {
    fn all(&self) -> Vec<Arc<Job>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn active(&self) -> Option<Arc<Job>> {
        self.all().into_iter().find(|job| !job.state().is_over())
    }

    /// True for the elements that a backup has put in: they are its own to call.
    pub(super) fn own(&self, element: &str) -> bool {
        self.active().is_some_and(|job| job.record().names.between().contains(&element))
    }

    /// In the place of one of the same disk that is over.
    fn add(&self, job: Arc<Job>) {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|other| other.disk() != job.disk());
        jobs.push(job);
    }
}

impl Served {
    /// Every backup of this graph.
    pub(crate) fn backups(&self) -> Vec<BackupView> {
        self.backups.all().iter().map(|job| job.view(self)).collect()
    }

    /// The backup of a disk, which may be over.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn backup_of(&self, disk: &str) -> Result<Arc<Job>, Refusal> {
        let found = self.backups.all().into_iter().find(|job| job.disk() == disk);
        found.ok_or_else(|| {
            Refusal::not_found(format!("{disk} of {} is not being backed up", self.live.name()))
        })
    }

    /// The graph may not change otherwise meanwhile.
    pub(crate) fn not_backing_up(&self) -> Result<(), Refusal> {
        match self.backups.active() {
            None => Ok(()),
            Some(job) => Err(Refusal::busy(self.on_backup(&job.disk()))),
        }
    }

    pub(super) fn on_backup(&self, disk: &str) -> String {
        let graph = self.live.name();
        format!(
            "{disk} is being backed up: wait for its end, or give it up by `mason backup abort {graph} {disk}`"
        )
    }

    /// The map of an element of the graph as it runs.
    fn map_of(&self, element: &str) -> Option<Arc<DirtyMap>> {
        let graph = self.live.disk().graph();
        let found = graph.instances().find(|instance| instance.name == element)?;
        found.element.provide("dirty_map")?.downcast::<Arc<DirtyMap>>().ok().map(|map| *map)
    }
}
