//! Whether the images of a move are the files that their names lead to: a disk that has moved into a file without a
//! name would be gone with the daemon.

use super::job::Job;
use super::record::Record;
use crate::control::daemon::{Daemon, Served};
use blockmason::io::Opened;
use blockmason::{Error, rt};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::error::Error as _;
use std::sync::{Arc, Weak};

/// The files of both sides, for a later process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Files {
    pub(super) old: Vec<Opened>,
    pub(super) new: Vec<Opened>,
}

impl Files {
    /// The same, once the disk has moved.
    pub(super) fn reversed(&self) -> Files {
        Files { old: self.new.clone(), new: self.old.clone() }
    }

    /// What has become of one that is not there any more, or another one: what the map says is not about that.
    pub(super) fn lost(&self) -> Option<Error> {
        self.old.iter().chain(&self.new).find_map(|file| file.is_still_there().err())
    }
}

impl Served {
    /// The files that an element and all that it leads to have open.
    fn opened(&self, element: &str) -> Vec<Opened> {
        let (spec, graph) = (self.live.spec(), self.live.disk().graph());
        let reached = spec.find(element).into_iter().flat_map(|ix| spec.reached(ix));
        let names: HashSet<&str> = reached.map(|ix| spec.elements[ix].name.as_str()).collect();
        let reached = graph.instances().filter(|instance| names.contains(instance.name.as_str()));
        reached.filter_map(|instance| instance.element.opened()).collect()
    }

    /// Whether the new disk of a move is what its name leads to, and the old one if it is to be a mirror. Asks file
    /// systems, which may not answer.
    ///
    /// # Errors
    /// What has become of the first that is not.
    pub(super) fn are_in_place(&self, record: &Record) -> Result<(), Error> {
        // An old disk that goes need not have a name any more: the guest's data are moved out of there.
        let mirror = record.options.keep_mirror.then_some(&record.names.disk);
        let elements = [Some(&record.names.new), mirror].into_iter().flatten();
        elements.flat_map(|element| self.opened(element)).try_for_each(|file| file.is_in_place())
    }

    fn files(&self, record: &Record) -> Files {
        Files { old: self.opened(&record.names.disk), new: self.opened(&record.names.new) }
    }
}

/// Looks at the files of a move until it is over, beside all else.
pub(super) async fn watch(job: Arc<Job>, served: Weak<Served>, daemon: Weak<Daemon>) {
    loop {
        let (Some(served), Some(daemon)) = (served.upgrade(), daemon.upgrade()) else { return };
        if job.state().is_over() {
            return;
        }
        let _ = rt::blocking({
            let (job, served) = (job.clone(), served.clone());
            move || {
                let record = job.record();
                let found = served.are_in_place(&record);
                // Where the system says why, nothing is known: it may answer later, and a cut-over asks again.
                if let Some(error) = found.err().filter(|error| error.source().is_none()) {
                    job.lost(&record.names, &error);
                }
            }
        })
        .await;
        if job.record().heads.files.is_none() {
            note(&job, &served, &daemon).await;
        }
        drop((served, daemon));
        rt::sleep(job.every()).await;
    }
}

/// Notes which files a move has begun with.
async fn note(job: &Arc<Job>, served: &Arc<Served>, daemon: &Arc<Daemon>) {
    // What else writes the record waits, and this for it.
    let saving = served.saving.lock().await;
    let (job, noted) = (job.clone(), served.clone());
    let daemon = daemon.clone();
    let _ = rt::blocking(move || {
        if job.state().is_over() {
            return;
        }
        let files = noted.files(&job.record());
        let record = job.revise(|record| record.heads.files = Some(files));
        // Without it the next start copies all anew.
        if let Err(refusal) = record.write(&daemon, &noted.path) {
            tracing::warn!("{}", refusal.message);
        }
    })
    .await;
    drop(saving);
}
