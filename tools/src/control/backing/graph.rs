//! The graphs of a backup: the one in which the disk stands still below an overlay, and the ones before and after.
//!
//! All of them are made from the graph as it runs.

use crate::control::moving::Target;
use crate::control::refusal::Refusal;
use crate::graphs::CATALOGUE;
use crate::places::in_words;
use blockmason::lang::{Edit, Spec, edit};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What the elements of a backup are called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Names {
    /// The disk.
    pub(super) disk: String,
    /// What keeps account of changes since the last backup; it stays.
    pub(super) changes: String,
    pub(super) cow: String,
    pub(super) overlay: String,
    pub(super) copy: String,
    /// Where the backup goes.
    pub(super) to: String,
}

/// What is known of a backup when its graph is made.
pub(super) struct Plan<'a> {
    /// The file of the overlay, and its bytes.
    pub(super) overlay: (&'a Path, u64),
    /// Only what has changed since the last one.
    pub(super) incremental: bool,
    /// Parameters of the copier: `(rate 50M/s)`.
    pub(super) copy: &'a str,
}

impl Names {
    pub(super) fn of(disk: &str, target: &Target) -> Names {
        let name = |role: &str| format!("{disk}_{role}");
        Names {
            disk: disk.to_owned(),
            changes: name("changes"),
            cow: name("cow"),
            overlay: name("overlay"),
            copy: name("copy"),
            to: target.top(&name("backup")),
        }
    }

    /// The elements that are there only for the time of a backup.
    pub(super) fn between(&self) -> [&str; 4] {
        [&self.cow, &self.overlay, &self.copy, &self.to]
    }

    /// True if the overlay is there: what guests have written is in it.
    pub(super) fn are_in(&self, spec: &Spec) -> bool {
        spec.find(&self.cow).is_some()
    }

    /// Whether something keeps account of changes of the disk.
    ///
    /// # Errors
    /// It does, and not of all: there is a way past it.
    pub(super) fn keep_account(&self, spec: &Spec) -> Result<bool, Refusal> {
        let Names { disk, changes, .. } = self;
        let Some(log) = spec.find(changes) else { return Ok(false) };
        let place = spec.find(disk);
        let above = spec.edges.iter().filter(|edge| Some(edge.to) == place);
        if spec.elements[log].ty == "log_dirty" && above.clone().all(|edge| edge.from == log) {
            return Ok(true);
        }
        let message =
            format!("{changes} does not see all changes of {disk}: take it out, or lead all ways through it");
        Err(Refusal::invalid(message))
    }

    /// The graph in which account is kept of changes of the disk.
    pub(super) fn with_changes(&self, spec: &Spec, map: &Path, account: &str) -> Result<Spec, Refusal> {
        let Names { disk, changes, .. } = self;
        let map = map.display();
        let by = format!(
            "element {changes} (type log_dirty) (file \"{map}\") (initially dirty) (written dirty) (account {account})\n\
             {changes} -> {disk}\n"
        );
        self.edited(spec, &[Edit::Replace { element: disk.clone(), by }], Path::new("/"))
    }

    /// The graph in which the disk stands still and is copied.
    pub(super) fn with_backup(
        &self,
        spec: &Spec,
        target: &Target,
        plan: &Plan<'_>,
        folder: &Path,
    ) -> Result<Spec, Refusal> {
        let Names { disk, changes, cow, overlay, copy, to } = self;
        let ((path, size), options) = (plan.overlay, plan.copy);
        let path = path.display();
        let only = if plan.incremental { format!("(only {changes}) ") } else { String::new() };
        let by = format!(
            "element {cow} (type cow)\n\
             element {overlay} (type file) (path \"{path}\") (size {size})\n\
             element {copy} (type copy) (frozen yes) {only}{options}\n\
             ({cow}, base) -> {disk}\n\
             ({cow}, overlay) -> {overlay}\n\
             ({copy}, from) -> {disk}\n\
             ({copy}, to) -> {to}\n"
        );
        let by = Edit::Replace { element: disk.clone(), by };
        let new = Edit::Add { text: target.statements(to) };
        self.edited(spec, &[by, new], folder)
    }

    /// The graph that copies no more, and has the overlay still.
    pub(super) fn without_copy(&self, spec: &Spec) -> Result<Spec, Refusal> {
        self.edited(spec, &self.remove_copy(spec), Path::new("/"))
    }

    /// The graph without a backup.
    pub(super) fn without_backup(&self, spec: &Spec) -> Result<Spec, Refusal> {
        let cow = spec.find(&self.cow);
        let above = spec.edges.iter().filter(|edge| Some(edge.to) == cow);
        let connect = |edge: &blockmason::lang::EdgeSpec| Edit::Connect {
            edge: format!("({}, {}) -> {}", spec.elements[edge.from].name, edge.from_port, self.disk),
        };
        let mut edits: Vec<_> = above.map(connect).collect();
        edits.extend(self.remove_copy(spec));
        self.edited(spec, &edits, Path::new("/"))
    }

    fn remove_copy(&self, spec: &Spec) -> Vec<Edit> {
        let copy = spec.find(&self.copy);
        copy.map(|_| Edit::Remove { element: self.copy.clone() }).into_iter().collect()
    }

    /// What the graph with a backup is called.
    fn graph(&self) -> String {
        format!("backing up {}", self.disk)
    }

    /// A refusal of that graph in the words of the command line: nobody has written it.
    pub(super) fn in_words(&self, refusal: Refusal) -> Refusal {
        let said = in_words(&refusal.message, &self.graph(), |_| "--to");
        let said = in_words(&said, "edit", |_| "--to");
        let said = said
            .replace(&format!("{} (--to): ", self.copy), "")
            .replace(&format!("{} (--to)", self.to), "--to");
        let message = said.replace("the disk at `from`", &self.disk).replace("that at `from`", &self.disk);
        Refusal { message, place: None, ..refusal }
    }

    fn edited(&self, spec: &Spec, edits: &[Edit], folder: &Path) -> Result<Spec, Refusal> {
        let name = self.graph();
        edit(spec, edits, &name, folder, CATALOGUE)
            .map_err(|diagnostics| self.in_words(Refusal::graph(&diagnostics)))
    }
}
