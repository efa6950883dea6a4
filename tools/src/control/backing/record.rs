//! What a later process must know of a backup, below STATE/backup/GRAPH/DISK: `backup.json` and the overlay as long as it
//! goes on, and the map of changes since.

use super::account::Account;
use super::graph::Names;
use crate::control::daemon::Daemon;
use crate::control::refusal::Refusal;
use crate::record;
use blockmason::io::remove_file;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The newest form of the record.
const VERSION: u32 = 1;

const NAME: &str = "backup.json";

/// Room for what has to be written when the overlay goes, while that may have filled the file system.
const RESERVE: &str = "reserve";

/// Bytes of it: a graph as it runs, a record, and what the file system itself needs.
const RESERVED: u64 = 4 << 20;

/// A backup that has begun and is not over.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    pub(super) names: Names,
    /// Where it goes, as it was asked for.
    pub(super) to: String,
    pub(super) incremental: bool,
    /// The account that it belongs to, its number there, and the map of that.
    #[serde(default)]
    pub(super) account: String,
    #[serde(default)]
    pub(super) number: u64,
    #[serde(default)]
    pub(super) map: PathBuf,
    /// The heads of the disk's volumes, and of those of the target that are written.
    #[serde(default)]
    pub(super) disk_heads: Vec<PathBuf>,
    #[serde(default)]
    pub(super) target_heads: Vec<PathBuf>,
}

/// Where everything of the backups of one disk is.
#[derive(Clone)]
pub(super) struct Place(PathBuf);

impl Place {
    /// By the path of the graph file, and by the disk.
    pub(super) fn of(daemon: &Daemon, file: &Path, disk: &str) -> Place {
        Place::below(daemon.host.state_dir(), file, disk)
    }

    /// The same without a daemon, in the folder for state.
    pub(super) fn below(state: &Path, file: &Path, disk: &str) -> Place {
        Place(folder(state, file).join(disk))
    }

    /// The record that is there, if one is.
    pub(super) fn read(&self) -> Result<Option<Record>, Refusal> {
        Record::read(&self.0.join(NAME))
    }

    pub(super) fn map(&self) -> PathBuf {
        self.0.join("changes.map")
    }

    pub(super) fn overlay(&self) -> PathBuf {
        self.0.join("overlay.cow")
    }

    /// Makes an empty overlay, durably: from now on one that is missing is one that was lost. Beside it room is kept for
    /// what has to be written when it goes.
    pub(super) fn make_overlay(&self, size: u64) -> Result<(), Refusal> {
        let path = self.overlay();
        let make = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
            remove_file(&path)?;
            let new = |path: &Path| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
            let file = new(&path)?;
            file.set_len(size).and_then(|()| file.sync_all())?;
            let reserve = self.0.join(RESERVE);
            remove_file(&reserve)?;
            allocate(&new(&reserve)?)?;
            File::open(&self.0)?.sync_all()
        };
        make().map_err(|error: std::io::Error| {
            Refusal::new("unavailable", format!("{}: the overlay cannot be made: {error}", path.display()))
        })
    }

    /// Gives back the room that was kept: the overlay, which may have taken all of the rest, is about to go.
    pub(super) fn release_reserve(&self) {
        let path = self.0.join(RESERVE);
        if let Err(error) = remove_file(&path) {
            tracing::warn!("{}: it cannot be removed: {error}", path.display());
        }
    }

    /// The folder.
    pub(super) fn shown(&self) -> std::path::Display<'_> {
        self.0.display()
    }

    /// Forgets what is known of changes: nobody keeps account of them now.
    pub(super) fn forget_map(&self) -> Result<(), Refusal> {
        let path = self.map();
        Account::forget(&path).and_then(|()| remove_file(&path)).map_err(|error| {
            Refusal::new("unavailable", format!("{}: it cannot be removed: {error}", path.display()))
        })
    }

    /// Forgets a backup that is over, with its overlay, of which nothing is left to be merged.
    pub(super) fn forget(&self, record: &Record) {
        if let Err(error) = record.stand_merged() {
            // The next start does it.
            tracing::warn!("{}: its head cannot be written: {error}", record.names.disk);
            return;
        }
        self.forget_files();
    }

    /// The same of one that never began.
    pub(super) fn forget_files(&self) {
        for path in [self.0.join(NAME), self.overlay(), self.0.join(RESERVE)] {
            // The record first: an overlay alone means nothing.
            if let Err(error) = remove_file(&path) {
                tracing::warn!("{}: what a backup left cannot be removed: {error}", path.display());
                return;
            }
        }
    }

    /// Writes the record, durably.
    pub(super) fn write(&self, record: &Record) -> Result<(), Refusal> {
        let path = self.0.join(NAME);
        let cannot = |error: std::io::Error| {
            Refusal::new("unavailable", format!("{}: the backup cannot be noted: {error}", path.display()))
        };
        record::write(&path, record).map_err(cannot)
    }
}

impl Record {
    pub(super) fn new(names: Names, to: String, incremental: bool, map: PathBuf) -> Record {
        let (account, number, disk_heads, target_heads) = Default::default();
        Record { version: VERSION, names, to, incremental, account, number, map, disk_heads, target_heads }
    }

    /// True if the backup is complete and durable, and only the overlay is left to be merged: its account says so.
    pub(super) fn is_complete(&self) -> bool {
        let account = Account::read(&self.map).ok().flatten();
        let counted = account.filter(|account| account.name == self.account);
        self.number > 0 && counted.is_some_and(|account| account.last == Some(self.number))
    }

    /// All disks of a graph file of which there is something, each with its backup if that is not over.
    pub(super) fn read_all(daemon: &Daemon, file: &Path) -> Result<Vec<(String, Option<Record>)>, Refusal> {
        let folder = folder(daemon.host.state_dir(), file);
        let bad = |error: std::io::Error| {
            Refusal::invalid(format!("{}: what backups left cannot be read: {error}", folder.display()))
        };
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(bad)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(bad)?;
            let disk = entry.file_name().to_string_lossy().into_owned();
            found.push((disk, Record::read(&entry.path().join(NAME))?));
        }
        Ok(found)
    }

    fn read(path: &Path) -> Result<Option<Record>, Refusal> {
        let bad = |what: &dyn std::fmt::Display| {
            Refusal::invalid(format!("{}: the record of a backup {what}", path.display()))
        };
        record::read(path, VERSION, bad)
    }
}

/// Takes the room of the reserve.
fn allocate(file: &File) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, RESERVED) {
        Err(Errno::OPNOTSUPP) => {
            let zeros = vec![0; 1 << 20];
            let mut file = file;
            (0..RESERVED / zeros.len() as u64).try_for_each(|_| file.write_all(&zeros))?;
        }
        allocated => allocated?,
    }
    file.sync_all()
}

fn folder(state: &Path, file: &Path) -> PathBuf {
    state.join("backup").join(crate::left::key(file))
}
