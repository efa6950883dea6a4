//! What administrators do with pools: the same in the process that serves a pool and where nobody does.

pub use super::admin::{NewSettings, Settings};
use super::below::Below;
use super::check::check;
use super::format::{BLOCK, Entry, EntryKind};
use super::pool::{Core, Pool};
use super::shared::{self, Shared};
use super::volume::unix_seconds;
use blockmason::{Error, Result};
use futures::executor::block_on;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// Memory for the map where nobody says anything else, in bytes.
const MEMORY: u64 = 256 << 20;

/// Something to do with a pool that is there. Sizes are in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do", deny_unknown_fields)]
pub enum Operation {
    /// What is in the pool; see also [`list`].
    List,
    /// Looks at everything: whether what the pool says of itself is true.
    Check,
    /// Makes an empty volume.
    CreateVolume {
        /// Its name.
        name: String,
        /// A multiple of 4096.
        size: u64,
        /// How it is made.
        #[serde(default)]
        settings: Settings,
    },
    /// Changes how much room a volume may take, and what is left of it after a loss of power.
    Set {
        /// The volume.
        name: String,
        /// What changes.
        settings: NewSettings,
    },
    /// Deletes a volume without snapshots that nobody serves.
    DeleteVolume {
        /// Its name.
        name: String,
    },
    /// Takes snapshots of volumes at one instant.
    Snapshot {
        /// Their names.
        volumes: Vec<String>,
        /// The snapshots' name.
        name: String,
    },
    /// Deletes a snapshot that has no clone and that nobody serves.
    DeleteSnapshot {
        /// Of this volume.
        volume: String,
        /// Its name.
        name: String,
    },
    /// Makes a volume that begins as a snapshot.
    Clone {
        /// The volume of the snapshot.
        volume: String,
        /// The snapshot.
        snapshot: String,
        /// The clone's name.
        name: String,
    },
    /// Makes a volume that nobody serves what one of its snapshots is.
    Rollback {
        /// The volume.
        volume: String,
        /// The snapshot.
        snapshot: String,
        /// What the volume of what it was until now is called.
        keep: String,
    },
    /// Gives a clone its origin and all before that.
    Promote {
        /// The clone.
        name: String,
    },
    /// Gives a volume that nobody serves another name.
    Rename {
        /// The old name.
        name: String,
        /// The new one.
        to: String,
    },
    /// Makes a volume larger.
    Resize {
        /// The volume.
        name: String,
        /// Its new size.
        size: u64,
    },
    /// What has changed in a volume since one of its snapshots.
    Diff {
        /// The volume.
        volume: String,
        /// The snapshot.
        since: String,
    },
}

/// Makes a pool in a new file, or on an empty block device, whose own size counts if none is given. Blocks.
///
/// # Errors
/// [`blockmason::Kind::Busy`] if there is something already.
pub fn create(path: &Path, size: Option<u64>) -> Result<()> {
    shared::make(path, size, std::array::from_fn(|_| fastrand::u8(..)))
}

/// What is in a pool, which is not changed by that. Blocks.
///
/// # Errors
/// As [`open`].
pub fn list(path: &Path) -> Result<Value> {
    Shared::look(path, |pool| Ok(listed(pool)))
}

/// A pool that this process has open.
pub struct Open(Arc<Shared>);

/// Opens a pool, if this process has not done so yet. Blocks.
///
/// # Errors
/// [`blockmason::Kind::Busy`] if another process has it open: that one can do whatever is to be done.
pub fn open(path: &Path) -> Result<Open> {
    Shared::open(path, MEMORY).map(Open)
}

impl Open {
    /// Does something. What was found out, or null. Blocks, and not on a shard: those serve the pool meanwhile.
    ///
    /// # Errors
    /// Why it was not done. Then nothing has changed.
    pub fn carry_out(&self, operation: &Operation) -> Result<Value> {
        carry_out(&self.0, operation)
    }
}

fn carry_out(shared: &Shared, operation: &Operation) -> Result<Value> {
    let (pool, below) = (&shared.pool, shared.blocking());
    match operation {
        Operation::List => return Ok(listed(pool)),
        Operation::Check => {
            block_on(pool.checkpoint(below))?;
            let found = block_on(check(pool, below))?;
            return Ok(json!({
                "problems": found.problems, "volumes": found.volumes, "snapshots": found.snapshots,
                "nodes": found.nodes, "bytes": found.blocks * BLOCK,
            }));
        }
        Operation::CreateVolume { name, size, settings } => {
            block_on(pool.make_volume(name, *size, *settings, below))?;
        }
        Operation::Set { name, settings } => block_on(pool.set(name, *settings, below))?,
        Operation::DeleteVolume { name } => {
            block_on(pool.delete_volume(name, below))?;
            shared.move_head(name, None);
            end_deletion(pool, below)?;
        }
        Operation::Snapshot { volumes, name } => {
            super::admin::check_name(name)?;
            let wanted = |volume: &String| Ok((pool.core().find(volume, None)?, name.clone()));
            let wanted = volumes.iter().map(wanted).collect::<Result<Vec<_>>>()?;
            block_on(pool.snapshot(&wanted, unix_seconds(), below))?;
        }
        Operation::DeleteSnapshot { volume, name } => {
            block_on(pool.delete_snapshot(volume, name, below))?;
            end_deletion(pool, below)?;
        }
        Operation::Clone { volume, snapshot, name } => {
            block_on(pool.clone_volume(volume, snapshot, name, below))?;
        }
        Operation::Rollback { volume, snapshot, keep } => {
            block_on(pool.rollback(volume, snapshot, keep, below))?
        }
        Operation::Promote { name } => block_on(pool.promote(name, below))?,
        Operation::Rename { name, to } => {
            block_on(pool.rename(name, to, below))?;
            shared.move_head(name, Some(to));
        }
        Operation::Resize { name, size } => block_on(pool.grow(name, *size, below))?,
        Operation::Diff { volume, since } => {
            let number = pool.core().find(volume, None)?;
            let birth = birth_of(&pool.core(), volume, since)?;
            let changed = block_on(pool.changed_since(number, birth, below))?;
            let range = |range: &std::ops::Range<u64>| {
                json!([range.start * BLOCK, (range.end - range.start) * BLOCK])
            };
            return Ok(changed.iter().map(range).collect());
        }
    }
    Ok(Value::Null)
}

/// Where a graph serves something of the pool, it gets the room back in the background.
fn end_deletion(pool: &Pool, below: Below<'_>) -> Result<()> {
    let served = !pool.core().served.is_empty();
    if served { Ok(()) } else { block_on(pool.delete_all(below)) }
}

fn birth_of(core: &Core, volume: &str, snapshot: &str) -> Result<u64> {
    let number = core.find(volume, Some(snapshot))?;
    match core.catalog.get(&number).map(|entry| &entry.kind) {
        Some(EntryKind::Snapshot { birth, .. }) => Ok(*birth),
        _ => Err(Error::internal("a snapshot was expected")),
    }
}

fn listed(pool: &Pool) -> Value {
    let core = pool.core();
    let name_of = |number: &u32| core.catalog.get(number).map(|entry| entry.name.clone());
    let origin = |snapshot: &u32| {
        let entry = core.catalog.get(snapshot)?;
        match &entry.kind {
            EntryKind::Snapshot { volume, .. } => Some(format!("{}@{}", name_of(volume)?, entry.name)),
            EntryKind::Volume { .. } => None,
        }
    };
    let snapshots = |number: u32| -> Vec<Value> {
        let of = |entry: &&Entry| {
            !entry.deleting && matches!(entry.kind, EntryKind::Snapshot { volume, .. } if volume == number)
        };
        let said = |entry: &Entry| json!({ "name": entry.name, "size": entry.size, "made": entry.made });
        core.catalog.values().filter(of).map(said).collect()
    };
    let volume = |(number, entry): (&u32, &Entry)| match &entry.kind {
        EntryKind::Volume { origin: (from, _), limits, .. } if !entry.deleting => Some(json!({
            "name": entry.name, "size": entry.size, "made": entry.made, "checksums": entry.checksums,
            "ordered": entry.ordered, "quota": limits.quota, "reserve": limits.reserve,
            "mapped": entry.mapped * BLOCK, "origin": origin(from),
            "served": core.served.contains_key(number), "snapshots": snapshots(*number),
        })),
        EntryKind::Volume { .. } | EntryKind::Snapshot { .. } => None,
    };
    let volumes: Vec<Value> = core.catalog.iter().filter_map(volume).collect();
    drop(core);
    json!({ "size": pool.space.all() * BLOCK, "free": pool.space.free() * BLOCK, "volumes": volumes })
}
