//! What a later process must know of a move, below STATE/moving/GRAPH/DISK: `move.json`, and the map of what
//! differs.

use super::files::Files;
use super::graph::{Names, Side};
use crate::control::daemon::Daemon;
use crate::control::graph_file::Sum;
use crate::control::refusal::Refusal;
use crate::record;
use blockmason::Error;
use blockmason::heads::{self, Standing};
use blockmason::lang::Spec;
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The newest form of the record.
const VERSION: u32 = 1;

/// A move that has begun and is not over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) names: Names,
    /// Where it moves to, as it was asked for.
    pub(super) to: String,
    pub(super) heads: Heads,
    pub(super) phase: Phase,
    pub(super) options: Options,
    /// What the graph file is known to say.
    #[serde(default)]
    pub(super) graph_file: Option<Sum>,
}

/// The heads of the volumes on both sides: what decides which of them is the disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Heads {
    /// How often the disk has moved before.
    pub(super) generation: u64,
    /// Of the volume that moves, or several.
    pub(super) old: Vec<PathBuf>,
    pub(super) new: Vec<PathBuf>,
    /// What the two sides are called by people.
    pub(super) old_called: String,
    pub(super) new_called: String,
    /// The images; None until that is noted.
    #[serde(default)]
    pub(super) files: Option<Files>,
}

impl Heads {
    /// The same, once the disk has moved.
    pub(super) fn reversed(&self) -> Heads {
        Heads {
            generation: self.generation + 1,
            old: self.new.clone(),
            new: self.old.clone(),
            old_called: self.new_called.clone(),
            new_called: self.old_called.clone(),
            files: self.files.as_ref().map(Files::reversed),
        }
    }

    /// Those of both sides.
    pub(super) fn all(&self) -> Vec<PathBuf> {
        [&self.old[..], &self.new[..]].concat()
    }

    /// True if the new side is the disk: its heads say so.
    pub(super) fn have_cut(&self) -> bool {
        let is_disk = |path: &PathBuf| {
            let head = heads::read(path).ok().flatten();
            head.is_some_and(|head| {
                head.generation > self.generation
                    && matches!(head.standing, Standing::Active | Standing::Moving(_))
            })
        };
        !self.new.is_empty() && self.new.iter().all(is_disk)
    }

    /// What has become of a file that is not there, or another one. A new one would be made anew, empty, while the
    /// map knows of what the lost one had. Where it was not noted which files they are, the map is not believed either.
    pub(super) fn lost(&self) -> Option<String> {
        self.files.as_ref()?.lost().map(|error| error.to_string())
    }

    /// The move has been given up: the old side is the disk.
    pub(super) fn stay(&self) -> Result<(), Error> {
        self.old.iter().try_for_each(|path| heads::restand(path, self.generation, Standing::Active))
    }

    /// The mirror has been given up: the old side is the disk, and the other one what it was before.
    pub(super) fn part(&self) -> Result<(), Error> {
        let moved = || Standing::Moved(self.old_called.clone());
        self.stay()?;
        self.new.iter().try_for_each(|path| heads::restand(path, self.generation, moved()))
    }

    /// Makes the new side the disk. When this returns well, it is durable, and
    /// [`finish_cut`](Self::finish_cut) says so on the old side.
    ///
    /// # Errors
    /// The old side is the disk, as before.
    pub(super) fn cut(&self, keep_mirror: bool) -> Result<(), Error> {
        let new = match keep_mirror {
            true => Standing::Moving(self.old_called.clone()),
            false => Standing::Active,
        };
        let taken =
            self.new.iter().try_for_each(|path| heads::restand(path, self.generation + 1, new.clone()));
        let Err(error) = taken else { return Ok(()) };
        let undone = self.take_back();
        // A head that says that it is the disk, durably, decides. Where not all of several can be taken back, some
        // were never written, and the next start takes the old side.
        if undone.is_ok() || !self.have_cut() {
            return Err(error);
        }
        tracing::error!("the new disk's head was written and could not be taken back: it is the disk");
        Ok(())
    }

    /// Undoes [`cut`](Self::cut), behind the same closed gate.
    ///
    /// # Errors
    /// The new side says still that it is the disk.
    pub(super) fn take_back(&self) -> Result<(), Error> {
        let new = Standing::Filling(self.old_called.clone());
        self.new.iter().try_for_each(|path| heads::restand(path, self.generation, new.clone()))
    }

    /// Writes down on the old side what it is from now on: a mirror, or what the disk was before.
    ///
    /// # Errors
    /// It cannot be written. It says that its disk is on the move: nobody serves it by mistake.
    pub(super) fn finish_cut(&self, keep_mirror: bool) -> Result<(), Error> {
        let old = match keep_mirror {
            true => Standing::Filling(self.new_called.clone()),
            false => Standing::Moved(self.new_called.clone()),
        };
        self.old.iter().try_for_each(|path| heads::restand(path, self.generation + 1, old.clone()))
    }
}

/// How far it has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// The old disk is the disk.
    Copying,
    /// The new one is the disk if its heads say so; else the old one, and this graph goes on.
    Cutting {
        /// The graph with the mirror, as a graph file with absolute paths.
        graph: String,
    },
    /// The old disk is the disk, and guests may have gone on with it alone: what the map says means nothing.
    GivingUp,
}

/// What was asked for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Options {
    /// Both sides are compared before the cut-over.
    pub(super) verify: bool,
    /// The cut-over comes when somebody says so.
    pub(super) manual: bool,
    /// The old disk stays, as a mirror.
    pub(super) keep_mirror: bool,
    /// The disk has moved already, and what was the old one is its mirror.
    pub(super) is_mirror: bool,
    /// How long the new disk may fail before the move is given up.
    pub(super) patience_seconds: f64,
}

impl Record {
    pub(super) fn new(names: Names, to: String, heads: Heads, options: Options) -> Record {
        let (phase, graph_file) = (Phase::Copying, None);
        Record { version: VERSION, names, to, heads, phase, options, graph_file }
    }

    /// What the graph file is to say of a graph in which these moves go on: a mirror stands there since its cut-over,
    /// and a disk on its way is where it was.
    ///
    /// # Errors
    /// That is no graph.
    pub(super) fn as_saved(spec: &Spec, moves: &[Record], file: &Path) -> Result<Spec, Refusal> {
        let mut going = moves.iter().filter(|it| !it.options.is_mirror && it.names.are_in(spec));
        going.try_fold(spec.clone(), |spec, it| Ok(it.names.without_mirror(&spec, Side::Old, file)?.0))
    }

    /// By the path of the graph file, and by the disk: several of one graph may move.
    pub(super) fn folder(daemon: &Daemon, file: &Path, disk: &str) -> PathBuf {
        folder(daemon, file).join(disk)
    }

    /// Where the map is. A mirror has one of its own, since that of the move may still be in use when it begins.
    pub(super) fn map(daemon: &Daemon, file: &Path, names: &Names) -> PathBuf {
        Record::folder(daemon, file, &names.disk).join(format!("{}.map", names.dirty))
    }

    /// Writes it, durably.
    pub(super) fn write(&self, daemon: &Daemon, file: &Path) -> Result<(), Refusal> {
        let path = Record::folder(daemon, file, &self.names.disk).join("move.json");
        let cannot = |error: std::io::Error| {
            Refusal::new("unavailable", format!("{}: the move cannot be noted: {error}", path.display()))
        };
        record::write(&path, self).map_err(cannot)
    }

    /// Forgets it, durably, with its map.
    pub(super) fn forget(&self, daemon: &Daemon, file: &Path) {
        Record::clear(daemon, file, &self.names.disk);
    }

    /// Removes what is kept of a move of `disk`, if there is anything.
    pub(super) fn clear(daemon: &Daemon, file: &Path, disk: &str) {
        let folder = Record::folder(daemon, file, disk);
        // The record first: a map alone means nothing.
        let removed = blockmason::io::remove_file(&folder.join("move.json"));
        let removed = removed.and_then(|()| std::fs::remove_dir_all(&folder));
        match removed {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!("{}: what a move left cannot be removed: {error}", folder.display());
            }
            // That of the graph stays while other disks of it move.
            _ => drop(folder.parent().map(std::fs::remove_dir)),
        }
    }

    /// Removes what a process left that died before a move had begun, or after it was over.
    pub(super) fn sweep(daemon: &Daemon, file: &Path) {
        let Ok(entries) = std::fs::read_dir(folder(daemon, file)) else { return };
        for entry in entries.filter_map(Result::ok) {
            if !entry.path().join("move.json").exists() {
                Record::clear(daemon, file, &entry.file_name().to_string_lossy());
            }
        }
        // Unless there are records in it.
        let _ = std::fs::remove_dir(folder(daemon, file));
    }

    /// All moves of a graph file that are not over.
    pub(super) fn read_all(daemon: &Daemon, file: &Path) -> Result<Vec<Record>, Refusal> {
        let folder = folder(daemon, file);
        let bad = |path: &Path, what: &dyn std::fmt::Display| {
            Refusal::invalid(format!("{}: the record of a move {what}", path.display()))
        };
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| bad(&folder, &format!("cannot be read: {error}")))?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| bad(&folder, &format!("cannot be read: {error}")))?;
            let path = entry.path().join("move.json");
            // A folder without one: the move had not begun, or was over.
            records.extend(record::read::<Record>(&path, VERSION, |what| bad(&path, what))?);
        }
        records.sort_by(|one, other| one.names.disk.cmp(&other.names.disk));
        Ok(records)
    }
}

fn folder(daemon: &Daemon, file: &Path) -> PathBuf {
    daemon.host.state_dir().join("moving").join(crate::left::key(file))
}
