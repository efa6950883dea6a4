//! Trying a graph: it runs over copies on write of all disks, until what it wrote is merged or forgotten
//! (Block Mason, section 5: "wrap complicated operations with a COW module").
//!
//! What a later process must know lies in STATE/try/NAME: `trial.json`, and an overlay for each disk.

use super::change::{How, Stop};
use super::daemon::{Daemon, Served};
use super::refusal::Refusal;
use crate::graphs::{CATALOGUE, GraphFile};
use crate::record;
use crate::view::{ChangeOptions, ChangeView};
use blockmason::describe::Outs;
use blockmason::graph::Graph;
use blockmason::graph::build::Builder;
use blockmason::heads;
use blockmason::lang::{Defines, Edit, NoFiles, Spec, edit, parse_checked, print};
use blockmason::rt;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The newest form of the record.
const VERSION: u32 = 1;

/// What the overlay of a disk needs beyond its size: maps of two bits for each block of 64 KiB, headers, and
/// room to spare.
pub(super) fn room(size: u64) -> u64 {
    size + (size >> 16) + (1 << 20)
}

/// A graph that is being tried.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Trial {
    version: u32,
    /// The graph before, as a graph file with absolute paths.
    before: String,
    /// The disks that have an overlay.
    disks: Vec<String>,
    /// Blocks are on their way to the disks: the way back is closed.
    committing: bool,
}

impl Trial {
    /// By the path of the graph file: names may be the same.
    fn folder(daemon: &Daemon, file: &Path) -> PathBuf {
        daemon.host.state_dir().join("try").join(crate::left::key(file))
    }

    /// The record of a graph file, if its graph was being tried when it ran last.
    pub(crate) fn read(daemon: &Daemon, file: &Path) -> Result<Option<Trial>, Refusal> {
        let path = Trial::folder(daemon, file).join("trial.json");
        record::read(&path, VERSION, |what| {
            Refusal::invalid(format!("{}: the record of a trial {what}", path.display()))
        })
    }

    fn write(&self, daemon: &Daemon, file: &Path) -> Result<(), Refusal> {
        let path = Trial::folder(daemon, file).join("trial.json");
        let cannot = |error: std::io::Error| {
            Refusal::new("unavailable", format!("{}: the trial cannot be noted: {error}", path.display()))
        };
        record::write(&path, self).map_err(cannot)
    }

    /// Forgets a trial, with its overlays.
    pub(crate) fn forget(daemon: &Daemon, file: &Path) {
        match std::fs::remove_dir_all(Trial::folder(daemon, file)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!("{}: what a trial left cannot be removed: {error}", file.display());
            }
            _ => {}
        }
    }

    /// True if blocks may be on their way to the disks.
    pub(crate) fn is_committing(&self) -> bool {
        self.committing
    }

    /// True if `spec` has the overlays: without them the disks are as they were before, or, after a
    /// commit, have everything.
    pub(crate) fn is_in(&self, spec: &Spec) -> bool {
        self.disks.iter().any(|disk| spec.find(&cow(disk)).is_some())
    }

    /// An overlay that is gone: without it a new one would be made, and what was written would be lost.
    pub(crate) fn missing(&self, daemon: &Daemon, file: &Path) -> Option<PathBuf> {
        let folder = Trial::folder(daemon, file);
        let mut overlays = self.disks.iter().map(|disk| folder.join(format!("{disk}.cow")));
        overlays.find(|overlay| !overlay.exists())
    }

    /// True for the elements that a trial has put in: they are its own to call.
    pub(crate) fn owns(&self, element: &str) -> bool {
        self.disks.iter().any(|disk| cow(disk) == element)
    }
}

fn cow(disk: &str) -> String {
    format!("{disk}_try")
}

/// The disks of a graph that can be written, with their sizes.
fn disks(graph: &Graph) -> Vec<(String, u64)> {
    let sinks = graph.instances().enumerate().filter(|(_, instance)| instance.ty.ports.out == Outs::None);
    let writable = sinks.filter(|(node, _)| !graph.geometry(*node).read_only);
    writable.map(|(node, instance)| (instance.name.clone(), graph.geometry(node).size)).collect()
}

/// The graph with an overlay above each disk.
fn covered(spec: &Spec, disks: &[(String, u64)], folder: &Path, name: &str) -> Result<Spec, Refusal> {
    let over = |(disk, size): &(String, u64)| {
        let (cow, path) = (cow(disk), folder.join(format!("{disk}.cow")));
        let by = format!(
            "element {cow} (type cow)\nelement {cow}_overlay (type file) (path \"{}\") (size {})\n\
             ({cow}, base) -> {disk}\n({cow}, overlay) -> {cow}_overlay\n",
            path.display(),
            room(*size)
        );
        Edit::Replace { element: disk.clone(), by }
    };
    let edits: Vec<_> = disks.iter().map(over).collect();
    edit(spec, &edits, &format!("{name} (on trial)"), Path::new("/"), CATALOGUE)
        .map_err(|d| Refusal::graph(&d))
}

/// The graph without them.
fn uncovered(spec: &Spec, disks: &[String], name: &str) -> Result<Spec, Refusal> {
    let mut edits = Vec::new();
    for disk in disks {
        let cow = spec.find(&cow(disk));
        for edge in spec.edges.iter().filter(|edge| Some(edge.to) == cow) {
            let from = &spec.elements[edge.from].name;
            edits.push(Edit::Connect { edge: format!("({from}, {}) -> {disk}", edge.from_port) });
        }
    }
    edit(spec, &edits, &format!("{name} (tried)"), Path::new("/"), CATALOGUE).map_err(|d| Refusal::graph(&d))
}

impl Served {
    /// Runs a graph over copies on write of its disks.
    pub(crate) async fn try_graph(
        &self,
        daemon: &Daemon,
        file: GraphFile,
        options: &ChangeOptions,
    ) -> Result<ChangeView, Refusal> {
        let saving = self.saving.lock().await;
        if self.trial().is_some() {
            return Err(self.on_trial());
        }
        self.not_moving()?;
        self.not_backing_up()?;
        let name = self.live.name();
        // Built once as it is: what is wrong with it shows now, and the sizes are known.
        let (state_dir, shards) = (daemon.host.state_dir().to_owned(), daemon.host.shards());
        let next = file.spec.clone();
        let (own, verify) = (name.to_owned(), !options.force && !options.sign);
        let build = move || {
            let builder = Builder { catalogue: CATALOGUE, name: &own, state_dir: &state_dir, shards };
            let graph = builder.build(&file.spec)?;
            // Before anything is written: what is merged through a wrong layout is lost.
            if verify {
                heads::verify(&[(&file.spec, &graph)], &[])?;
            }
            Ok(disks(&graph))
        };
        let built = rt::blocking(build).await;
        let disks = built.unwrap_or_else(|| Err(blockmason::Error::internal("an element panicked")));
        let disks = disks.map_err(|error| Refusal::in_graph(&error, &next))?;
        let folder = Trial::folder(daemon, &self.path);
        let tried = covered(&next, &disks, &folder, name)?;
        let trial = Trial {
            version: VERSION,
            before: print(&self.live.spec(), CATALOGUE, Path::new("/")),
            disks: disks.into_iter().map(|(disk, _)| disk).collect(),
            committing: false,
        };
        if !options.dry_run {
            Trial::forget(daemon, &self.path);
            trial.write(daemon, &self.path)?;
        }
        // The disks are not written: their heads have nothing to say yet.
        let how = ChangeOptions { force: true, sign: false, save: false, ..options.clone() };
        let changed = self.change(&saving, daemon, |_| Ok(tried), How::asked(&how)).await;
        match &changed {
            Ok(view) if view.done => self.set_trial(Some(trial)),
            Ok(_) => {}
            Err(_) => Trial::forget(daemon, &self.path),
        }
        changed
    }

    /// Merges what was written, while the graph runs, and takes the overlays out.
    pub(crate) async fn commit(
        &self,
        daemon: &Daemon,
        options: &ChangeOptions,
    ) -> Result<ChangeView, Refusal> {
        let saving = self.saving.lock().await;
        let Some(mut trial) = self.trial() else { return Err(self.not_on_trial()) };
        let name = self.live.name();
        let after = uncovered(&self.live.spec(), &trial.disks, name)?;
        if !options.dry_run && trial.is_in(&self.live.spec()) {
            trial.committing = true;
            trial.write(daemon, &self.path)?;
            self.set_trial(Some(trial.clone()));
            for disk in &trial.disks {
                let begun = self.live.call(&cow(disk), "commit", "");
                begun.map_err(|error| Refusal::of(&error))?;
            }
            for disk in &trial.disks {
                self.merged(&cow(disk)).await?;
            }
        }
        // The file comes last: that it cannot be written does not keep the trial from ending.
        let how = ChangeOptions { save: false, ..options.clone() };
        let mut changed = self.change(&saving, daemon, |_| Ok(after), How::asked(&how)).await?;
        if changed.done {
            self.set_trial(None);
            Trial::forget(daemon, &self.path);
            if options.save {
                self.write_file(&self.live.spec())?;
                changed.differs_from_file = false;
            }
        }
        Ok(changed)
    }

    /// Waits until everything of an overlay is in its disk.
    async fn merged(&self, cow: &str) -> Result<(), Refusal> {
        while self.get(cow, "state")? != "committed" {
            let error = self.get(cow, "error")?;
            if !error.is_empty() {
                let message = format!("{cow}: {error}; `mason commit` goes on when it is mended");
                return Err(Refusal::new("io", message));
            }
            rt::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Goes back to the graph before; what was written meanwhile is forgotten.
    pub(crate) async fn discard(
        &self,
        daemon: &Daemon,
        options: &ChangeOptions,
    ) -> Result<ChangeView, Refusal> {
        let saving = self.saving.lock().await;
        let Some(trial) = self.trial() else { return Err(self.not_on_trial()) };
        if trial.committing {
            let message =
                "a commit has begun, and what is merged cannot be taken back: `mason commit` ends it";
            return Err(Refusal::busy(message));
        }
        let name = self.live.name();
        let (path, opened) =
            (PathBuf::from(format!("{name} (before the trial)")), Path::new("/before.mason"));
        let none = Defines::new();
        let before =
            parse_checked(&NoFiles, &path, opened.to_owned(), trial.before.clone(), &none, CATALOGUE);
        let before = before.map_err(|diagnostics| Refusal::graph(&diagnostics))?;
        let mut how = How::asked(options);
        how.options.alone = true;
        let changed = self.change(&saving, daemon, |_| Ok(before), how).await?;
        if changed.done {
            self.set_trial(None);
            Trial::forget(daemon, &self.path);
        }
        Ok(changed)
    }

    /// The graph may not change otherwise while it is being tried.
    pub(super) fn on_trial(&self) -> Refusal {
        let name = self.live.name();
        Refusal::busy(format!("{name} is being tried: `mason commit` or `mason discard` ends that first"))
    }

    fn not_on_trial(&self) -> Refusal {
        Refusal::invalid(format!("{} is not being tried", self.live.name()))
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Stop {
        Stop::Refused(refusal)
    }
}
