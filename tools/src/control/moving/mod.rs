//! Moving a disk to another store while it is in use (Block Mason, section 3.1).
//!
//! `graph` makes the graphs of a move, `record` is what a later process must know, `begin` starts one, `job` attends to
//! it until it is over, `files` looks at its images, `cut` is the cut-over, `resume` goes on after a restart.
//!
//! Which of the two stores is the disk is said by the heads of their volumes, and by nothing else. See
//! docs/decisions/0008-migration.md.

mod begin;
mod cut;
mod files;
mod graph;
mod job;
mod record;
mod resume;

pub(super) use begin::same;
pub(crate) use cut::cut_over;
pub(crate) use graph::Target;
pub(crate) use job::Job;
pub(crate) use resume::Resumed;

use super::daemon::Served;
use super::refusal::Refusal;
use crate::view::{MoveState, MoveView};
use blockmason::lang::Spec;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// The moves of a graph: those that go on, and the last one of each disk that is over.
#[derive(Default)]
pub(crate) struct Moves(Mutex<Vec<Arc<Job>>>);

impl Moves {
    fn all(&self) -> Vec<Arc<Job>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn active(&self) -> impl Iterator<Item = Arc<Job>> + use<> {
        self.all().into_iter().filter(|job| !job.state().is_over())
    }

    /// The heads of the volumes that are on the move.
    pub(super) fn heads(&self) -> Vec<PathBuf> {
        self.active().flat_map(|job| job.record().heads.all()).collect()
    }

    /// In the place of one of the same disk that is over.
    fn add(&self, job: Arc<Job>) {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        jobs.retain(|other| other.disk() != job.disk());
        jobs.push(job);
    }
}

impl Served {
    /// Every move of this graph.
    pub(crate) fn moves(&self) -> Vec<MoveView> {
        self.moves.all().iter().map(|job| job.view(self)).collect()
    }

    /// The move of a disk, which may be over.
    ///
    /// # Errors
    /// There is none.
    pub(crate) fn move_of(&self, disk: &str) -> Result<Arc<Job>, Refusal> {
        let found = self.moves.all().into_iter().find(|job| job.disk() == disk);
        found.ok_or_else(|| Refusal::not_found(format!("{disk} of {} is not being moved", self.live.name())))
    }

    /// The graph may not be saved, tried or put on trial meanwhile: the file would name what goes again.
    pub(super) fn not_moving(&self) -> Result<(), Refusal> {
        match self.moves.active().next() {
            None => Ok(()),
            Some(job) => Err(Refusal::busy(self.on_the_move(&job))),
        }
    }

    /// A change that is no part of a move leaves its elements as they are.
    pub(super) fn keeps_moves(&self, running: &Spec, next: &Spec) -> Result<(), Refusal> {
        match self.moves.active().find(|job| !job.names().untouched(running, next)) {
            None => Ok(()),
            Some(job) => Err(Refusal::busy(self.on_the_move(&job))),
        }
    }

    fn on_the_move(&self, job: &Job) -> String {
        let (graph, disk) = (self.live.name(), job.disk());
        match job.state() {
            MoveState::Mirroring => {
                format!("{disk} has a mirror: `mason migrate abort {graph} {disk}` lets go of it first")
            }
            _ => format!(
                "{disk} is on its way to {}: wait for its end, or give it up by `mason migrate abort {graph} {disk}`",
                job.to()
            ),
        }
    }
}
