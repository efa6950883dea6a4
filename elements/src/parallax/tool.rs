//! What administrators do with pools: the same in the process that serves a pool and where nobody does.

use super::account::Account;
use super::below::{Below, block_on};
use super::check::{Findings, check};
use super::examine::Said;
use super::format::{BLOCK, Entry, EntryKind, Receiving, SnapshotId};
pub use super::format::{Compress, Format};
use super::history::Point;
use super::open::Lacking;
use super::pool::{Core, Pool};
use super::repair::Repaired;
pub use super::repair::Repairing;
use super::scrub::Stage;
pub use super::settings::{NewSettings, Settings};
use super::shared::{self, Shared};
use super::streams::Stream;
use super::tidy::Tidying;
use super::volume::{Full, Volume};
use crate::calendar::seconds;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason::{Data, Error, Kind, Op, Request, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Memory for the map where nobody says anything else, in bytes.
const MEMORY: u64 = 256 << 20;

/// Bytes that are read or written at once, at most.
pub const MOST_BYTES: u64 = 1 << 20;

/// Something to do with a pool that is there. Sizes are in bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do", deny_unknown_fields)]
pub enum Operation {
    /// What is in the pool; see also [`list`].
    List,
    /// Looks at everything: whether what the pool says of itself is true.
    Check,
    /// Looks at the next piece of all that can be read, and mends what is damaged in one copy.
    Scrub {
        /// What was said of it when the piece before was looked at; none: from the beginning on.
        #[serde(default)]
        at: Option<ScrubbedTo>,
    },
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
    /// Keeps a snapshot from being deleted, or does not any more.
    Hold {
        /// Of this volume.
        volume: String,
        /// Its name.
        name: String,
        /// Whether it is held from now on.
        held: bool,
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
    /// What has changed in a volume, or up to one of its snapshots, since another one; or what it has.
    Diff {
        /// The volume.
        volume: String,
        /// Up to this snapshot; none: until now.
        #[serde(default)]
        until: Option<String>,
        /// The snapshot.
        since: Option<String>,
        /// The number that what has changed has in [`Operation::List`]; refused if it is another one by now.
        #[serde(default)]
        number: Option<u32>,
        /// The same of the snapshot.
        #[serde(default)]
        since_number: Option<u32>,
    },
    /// The room that a volume or snapshot takes; or the pool.
    Stat {
        /// The volume; none: the pool.
        #[serde(default)]
        volume: Option<String>,
        /// A snapshot of it.
        #[serde(default)]
        snapshot: Option<String>,
    },
    /// The same of a volume and each of its snapshots, with what has changed from one to the next.
    History {
        /// The volume.
        volume: String,
    },
    /// Bytes of a volume or snapshot, in base64; null if all are zero.
    Read {
        /// The volume.
        volume: String,
        /// A snapshot of it.
        #[serde(default)]
        snapshot: Option<String>,
        /// The first, a multiple of 4096.
        offset: u64,
        /// How many, a multiple of 4096, at most [`MOST_BYTES`].
        len: u64,
        /// The number that it has in [`Operation::List`]; refused if it is another one by now.
        #[serde(default)]
        number: Option<u32>,
    },
    /// Writes to a volume that nobody serves.
    Write {
        /// The volume.
        volume: String,
        /// The first byte, a multiple of 4096.
        offset: u64,
        /// The bytes, in base64: a multiple of 4096, at most [`MOST_BYTES`].
        data: String,
        /// If it is being received: who does so.
        #[serde(default)]
        receiver: Option<u64>,
    },
    /// Makes a range of a volume zero that nobody serves; it takes no room then.
    Punch {
        /// The volume.
        volume: String,
        /// The first byte, a multiple of 4096.
        offset: u64,
        /// How many, a multiple of 4096.
        len: u64,
        /// As in [`Operation::Write`].
        #[serde(default)]
        receiver: Option<u64>,
    },
    /// Begins to receive a snapshot of another pool, or goes on with it: `receiver` of the result is who does so from now on, and nobody
    /// else; what comes before `offset` is there.
    Receive {
        /// The volume, which nobody serves.
        volume: String,
        /// Its number in [`Operation::List`].
        number: u32,
        /// The snapshot's identity, 32 hexadecimal digits.
        id: String,
        /// That of the volume's newest snapshot, since which it is received.
        since: Option<String>,
        /// The volume is made so large, if it is smaller.
        size: u64,
    },
    /// What comes before that is there, durably.
    Fill {
        /// The volume.
        volume: String,
        /// Who receives it.
        receiver: u64,
        /// None: what is there is wrong, and can only be given up.
        offset: Option<u64>,
    },
    /// A volume that is being received has all of it, and what it is now is that snapshot.
    Filled {
        /// The volume.
        volume: String,
        /// Who receives it.
        receiver: u64,
        /// The snapshot's identity.
        id: String,
        /// Its name.
        snapshot: String,
        /// Seconds since 1970 at which it was made.
        made: u64,
    },
    /// Puts some of a volume in a row that lies here and there in the pool. Says what was done, and as `next` where to go on; what
    /// takes turns with others goes on after as much time as it took.
    Defrag {
        /// The volume.
        volume: String,
        /// From there on.
        #[serde(default)]
        offset: u64,
        /// What others see is copied, too.
        #[serde(default)]
        unshare: bool,
    },
    /// Makes holes of what holds only zeros, in the same way.
    Trim {
        /// The volume.
        volume: String,
        /// From there on.
        #[serde(default)]
        offset: u64,
    },
    /// Gives up what is half received: the volume is what its newest snapshot is, or gone if it has none.
    GiveUp {
        /// The volume.
        volume: String,
    },
    /// Makes the pool larger.
    Grow {
        /// Its new size; a device is used as it is without one.
        size: Option<u64>,
    },
    /// Ends what is being deleted, and gives free room back to the file system that the pool is on.
    Gc,
}

/// How far a scrub has come.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubbedTo {
    /// The owner whose trees are looked at.
    owner: u32,
    stage: Stage,
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
    Shared::look(path, |trees, lacking| Ok(listed(trees, lacking)))
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

/// Whether people may call a snapshot that, and no schedule takes it for one of its own.
///
/// # Errors
/// Why not.
pub fn check_snapshot_name(name: &str) -> Result<()> {
    super::schedule::check_taken_name(name)
}

/// Makes a pool larger that is so full that [`open`] fails. Its new size. Blocks.
///
/// # Errors
/// As those of [`Operation::Grow`].
pub fn grow_closed(path: &Path, size: Option<u64>) -> Result<Value> {
    Shared::grow_closed(path, size).map(|size| json!({ "size": size }))
}

/// Repairs a pool that nobody has open, or says what would be done. Blocks.
///
/// # Errors
/// [`blockmason::Kind::Busy`] if somebody has it open; it cannot be opened, or written.
pub fn repair(path: &Path, how: Repairing) -> Result<Value> {
    let Repaired { problems, steps, left, after } = Shared::repair_closed(path, how)?;
    let said = |said: Said| json!({ "problems": said.all, "more": said.more });
    Ok(json!({ "found": said(problems), "steps": steps, "left": left, "after": after.map(said) }))
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
    let below = shared.blocking();
    match operation {
        Operation::List => return Ok(listed(&shared.trees(), &shared.lacking)),
        Operation::Check => {
            let mut all = Findings::default();
            for trees in shared.trees() {
                if trees.check().is_ok() {
                    block_on(trees.checkpoint(below))?;
                }
                all += block_on(check(&trees, below))?;
            }
            unusable(&shared.lacking).into_iter().for_each(|what| all.said.say(what));
            return Ok(json!({
                "problems": all.said.all, "more": all.said.more, "volumes": all.volumes, "snapshots": all.snapshots,
                "nodes": all.nodes, "bytes": all.blocks * BLOCK, "notes": half_received(&shared.trees()),
            }));
        }
        Operation::Scrub { at } => return scrub(shared, *at),
        Operation::CreateVolume { name, size, settings } => {
            let naming = shared.name(name)?;
            let trees = shared.of_format(settings.format, &naming)?;
            let number = block_on(trees.make_volume(name, *size, *settings, below))?;
            return Ok(json!({ "number": number }));
        }
        Operation::Set { name, settings } => block_on(shared.having(name)?.set(name, *settings, below))?,
        Operation::DeleteVolume { name } => {
            let trees = shared.having(name)?;
            block_on(trees.delete_volume(name, below))?;
            shared.move_head(name, None);
            end_deletion(&trees, below)?;
        }
        Operation::Snapshot { volumes, name } => {
            super::admin::check_name(name)?;
            volumes.iter().try_for_each(|volume| shared.is_whole(volume))?;
            let Some(first) = volumes.first() else { return Ok(Value::Null) };
            let trees = shared.having(first)?;
            for volume in volumes {
                if !Arc::ptr_eq(&shared.having(volume)?, &trees) {
                    return Err(Error::unsupported(format!(
                        "{first} and {volume} are of different formats or keys: no snapshot of both is at one instant"
                    )));
                }
            }
            let wanted = |volume: &String| {
                let core = trees.core();
                let number = core.find(volume, None)?;
                core.need_whole(number).map(|()| (number, name.clone()))
            };
            let wanted = volumes.iter().map(wanted).collect::<Result<Vec<_>>>()?;
            block_on(trees.snapshot(&wanted, seconds(), below))?;
        }
        Operation::DeleteSnapshot { volume, name } => {
            let trees = shared.having(volume)?;
            block_on(trees.delete_snapshot(volume, name, below))?;
            end_deletion(&trees, below)?;
        }
        Operation::Hold { volume, name, held } => {
            block_on(shared.having(volume)?.hold(volume, name, *held, below))?;
        }
        Operation::Clone { volume, snapshot, name } => {
            let _naming = shared.name(name)?;
            block_on(shared.having(volume)?.clone_volume(volume, snapshot, name, below))?;
        }
        Operation::Rollback { volume, snapshot, keep } => {
            let _naming = shared.name(keep)?;
            block_on(shared.having(volume)?.rollback(volume, snapshot, keep, below))?;
        }
        Operation::Promote { name } => block_on(shared.having(name)?.promote(name, below))?,
        Operation::Rename { name, to } => {
            let _naming = shared.name(to)?;
            block_on(shared.having(name)?.rename(name, to, below))?;
            shared.move_head(name, Some(to));
        }
        Operation::Resize { name, size } => block_on(shared.having(name)?.grow(name, *size, below))?,
        Operation::Stat { volume: None, .. } => return Ok(stat(shared)),
        Operation::Stat { volume: Some(volume), snapshot } => {
            let trees = shared.having(volume)?;
            let number = trees.core().find(volume, snapshot.as_deref())?;
            let account = block_on(trees.account(number, below))?;
            let Account { mapped, shared, freed, packed } = account;
            let entry = trees.core().catalog.get(&number).cloned();
            let mut said = entry.map_or(Value::Null, |entry| settings_of(&entry));
            if snapshot.is_none() {
                said["name"] = json!(volume);
            }
            said["format"] = json!(trees.format);
            said["mapped"] = json!(mapped * BLOCK);
            said["shared"] = json!(shared * BLOCK);
            said["freed_if_deleted"] = json!(freed * BLOCK);
            said["compressed"] = json!({ "data": packed[0] * BLOCK, "takes": packed[1] * BLOCK });
            return Ok(said);
        }
        Operation::History { volume } => {
            let trees = shared.having(volume)?;
            let number = trees.core().find(volume, None)?;
            let points = block_on(trees.history(number, below))?;
            return Ok(points.iter().map(point).collect());
        }
        Operation::Read { volume, snapshot, offset, len, number } => {
            return read(
                &shared.having(volume)?,
                (volume, snapshot.as_deref(), *number),
                *offset..offset.saturating_add(*len),
                below,
            );
        }
        Operation::Write { volume, offset, data, receiver } => {
            let bytes = BASE64_STANDARD.decode(data).map_err(|_| Error::invalid("the data is not base64"))?;
            let request = Request::write(*offset, Data::shared(bytes));
            block_on(change(&shared.having(volume)?, (volume, *receiver), request, below))?;
        }
        Operation::Punch { volume, offset, len, receiver } => {
            let request = Request::new(Op::Discard, *offset, *len);
            block_on(change(&shared.having(volume)?, (volume, *receiver), request, below))?;
        }
        Operation::Receive { volume, number, id, since, size } => {
            let since = since.as_deref().map(identity).transpose()?;
            let stream = Stream { volume, id: identity(id)?, since, size: *size };
            let (receiver, offset) = block_on(shared.having(volume)?.receive(*number, &stream, below))?;
            return Ok(json!({ "receiver": receiver, "offset": offset }));
        }
        Operation::Fill { volume, receiver, offset } => {
            block_on(shared.having(volume)?.fill((volume, *receiver), *offset, below))?;
        }
        Operation::Filled { volume, receiver, id, snapshot, made } => {
            let taken = (snapshot.as_str(), &identity(id)?, *made);
            block_on(shared.having(volume)?.filled((volume, *receiver), taken, below))?;
        }
        Operation::GiveUp { volume } => {
            let trees = shared.having(volume)?;
            if block_on(trees.give_up(volume, below))? {
                shared.move_head(volume, None);
            }
            end_deletion(&trees, below)?;
        }
        Operation::Defrag { volume, offset, unshare } => {
            let order = Tidying::Rows { unshare: *unshare };
            return tidy(&shared.having(volume)?, volume, (*offset, order), below);
        }
        Operation::Trim { volume, offset } => {
            return tidy(&shared.having(volume)?, volume, (*offset, Tidying::Holes), below);
        }
        Operation::Grow { size } => return shared.grow(*size).map(|size| json!({ "size": size })),
        Operation::Gc => {
            let mut given = Some(0);
            for trees in shared.trees() {
                let more = block_on(trees.collect(below))?;
                given = given.zip(more).map(|(given, more)| given + more);
            }
            return Ok(json!({ "given_back": given }));
        }
        Operation::Diff { volume, until, since, number, since_number } => {
            let trees = shared.having(volume)?;
            let number = find_same(&trees.core(), (volume, until.as_deref()), *number)?;
            let since_birth = |since: &String| birth_of(&trees.core(), (volume, since), *since_number);
            let birth = since.as_ref().map_or(Ok(0), since_birth)?;
            if let (Some(until), Some(since)) = (until, since)
                && birth_of(&trees.core(), (volume, until), None)? < birth
            {
                return Err(Error::invalid(format!("{volume}@{until} is older than {volume}@{since}")));
            }
            let changed = block_on(async {
                match trees.check() {
                    Ok(()) => trees.changed_since(number, birth, below).await,
                    // What is in no tree will not get there.
                    Err(_) => Volume::new(trees.clone(), number).born_after(birth, below).await,
                }
            })?;
            let range = |range: &std::ops::Range<u64>| {
                json!([range.start * BLOCK, (range.end - range.start) * BLOCK])
            };
            return Ok(changed.iter().map(range).collect());
        }
    }
    Ok(Value::Null)
}

/// Looks at one piece.
fn scrub(shared: &Shared, at: Option<ScrubbedTo>) -> Result<Value> {
    let mut trees: Vec<(u32, Arc<Pool>)> =
        shared.trees().into_iter().map(|trees| (trees.space.owner(), trees)).collect();
    trees.sort_by_key(|(owner, _)| *owner);
    let (from, stage) = at.map_or((0, Stage::FIRST), |at| (at.owner, at.stage));
    let mut left = trees.into_iter().filter(|(owner, _)| *owner >= from);
    let Some((owner, trees)) = left.next() else { return Ok(Value::Null) };
    let stage = if owner == from || from == 0 { stage } else { Stage::Heads };
    let mut piece = block_on(trees.scrub(stage, shared.blocking()))?;
    // The table is one for all.
    let behind = left.next().map(|(owner, _)| ScrubbedTo { owner, stage: Stage::Heads });
    let next = piece.next.map(|stage| ScrubbedTo { owner, stage }).or(behind);
    if next.is_none() {
        unusable(&shared.lacking).into_iter().for_each(|what| piece.said.say(what));
    }
    Ok(json!({
        "problems": piece.said.all, "more": piece.said.more, "bytes": piece.bytes, "what": piece.what, "next": next,
    }))
}

/// What is said of volumes that are being received.
fn half_received(trees: &[Arc<Pool>]) -> Vec<String> {
    let of = |trees: &Arc<Pool>| {
        let core = trees.core();
        let there = core.catalog.iter().filter(|(_, entry)| !entry.deleting);
        let all = there.filter_map(|(number, _)| core.need_whole(*number).err());
        all.map(|error| error.message().to_string()).collect::<Vec<_>>()
    };
    trees.iter().flat_map(of).collect()
}

/// Where a graph serves something of the pool, it gets the room back in the background.
fn end_deletion(pool: &Pool, below: Below<'_>) -> Result<()> {
    let served = !pool.core().served.is_empty();
    if served { Ok(()) } else { block_on(pool.delete_all(below)) }
}

/// How much room there is, and what for.
fn stat(shared: &Shared) -> Value {
    let (mut deleting, mut kept) = (Vec::new(), 0);
    let all = shared.trees();
    for trees in &all {
        let core = trees.core();
        kept += core.kept();
        deleting.extend(being_deleted(&core));
    }
    let space = &all[0].space;
    let slop = space.slop() * all.len() as u64;
    let (all, free) = (space.blocks.all(), space.blocks.free());
    json!({
        "size": all * BLOCK, "used": (all - free) * BLOCK, "free": free * BLOCK,
        "reserved": kept * BLOCK, "kept_back": slop * BLOCK,
        "available": free.saturating_sub(kept + slop) * BLOCK, "deleting": deleting,
        "set_aside": space.blocks.backed() * BLOCK, "file_system_free": shared.room_below(),
        "foreign": space.blocks.foreign() * BLOCK,
    })
}

/// Names of what is being deleted.
fn being_deleted(core: &Core) -> Vec<String> {
    core.catalog.values().filter(|entry| entry.deleting).map(|entry| core.title(entry)).collect()
}

/// # Errors
/// A range that is none of that volume, or too long.
fn check_range(core: &Core, number: u32, range: &Range<u64>, most: u64) -> Result<()> {
    let size = core.catalog.get(&number).map_or(0, |entry| entry.size);
    let whole = range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK);
    let fits = range.start < range.end && range.end <= size && range.end - range.start <= most;
    match whole && fits {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "expected blocks of 4096 bytes inside the {size} bytes there are, {most} bytes at most"
        ))),
    }
}

/// The number of a volume or snapshot that can be read, which has that one still.
fn find_same(core: &Core, (volume, snapshot): (&str, Option<&str>), number: Option<u32>) -> Result<u32> {
    let found = core.find(volume, snapshot)?;
    core.need_whole(found)?;
    match number.is_none_or(|number| number == found) {
        true => Ok(found),
        false => {
            let name = snapshot.map_or(volume.to_owned(), |snapshot| format!("{volume}@{snapshot}"));
            let message = format!("{name} is another one by now: it has been deleted and made anew");
            Err(Error::new(Kind::Busy, message))
        }
    }
}

fn read(
    pool: &Arc<Pool>,
    (volume, snapshot, number): (&str, Option<&str>, Option<u32>),
    range: Range<u64>,
    below: Below<'_>,
) -> Result<Value> {
    let same = |core: &Core| find_same(core, (volume, snapshot), number);
    let volume = block_on(Volume::open(pool.clone(), Full::ERROR, None, same))?;
    check_range(&pool.core(), volume.number(), &range, MOST_BYTES)?;
    let request = Request::read(range.start, range.end - range.start);
    let data = block_on(volume.read_pieces(request, below))?.into_data()?;
    Ok(if data.is_zero() { Value::Null } else { BASE64_STANDARD.encode(data.to_vec()).into() })
}

/// Changes a volume that nobody serves, and that nobody else receives, before anybody else does anything with it.
async fn change(
    pool: &Arc<Pool>,
    (volume, receiver): (&str, Option<u64>),
    request: Request,
    below: Below<'_>,
) -> Result<()> {
    let _settled = pool.administering.read().await;
    let number = {
        let core = pool.core();
        let number = core.find(volume, None)?;
        core.need_free(number, volume)?;
        core.need_receiver(number, receiver)?;
        number
    };
    let volume = Volume::new(pool.clone(), number);
    let range = request.offset..request.offset.saturating_add(request.len);
    let is_write = request.op == Op::Write;
    check_range(&pool.core(), volume.number(), &range, if is_write { MOST_BYTES } else { u64::MAX })?;
    let done = match is_write {
        true => volume.write_pieces(request, below).await,
        false => volume.punch(request, below).await,
    };
    done.map(drop)
}

/// Puts the next part of a volume in order.
fn tidy(pool: &Arc<Pool>, name: &str, (offset, order): (u64, Tidying), below: Below<'_>) -> Result<Value> {
    let whole = |core: &Core| {
        let number = core.find(name, None)?;
        core.need_whole(number).map(|()| number)
    };
    let volume = block_on(Volume::open(pool.clone(), Full::ERROR, None, whole))?;
    let (done, next) = block_on(volume.tidy(offset, order, below))?;
    let mut said = json!(done);
    said["next"] = json!(next);
    Ok(said)
}

fn birth_of(core: &Core, (volume, snapshot): (&str, &str), number: Option<u32>) -> Result<u64> {
    let number = find_same(core, (volume, Some(snapshot)), number)?;
    core.birth(number).ok_or_else(|| Error::internal("a snapshot was expected"))
}

/// Digits of an identity, or of its beginning.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn identity(digits: &str) -> Result<SnapshotId> {
    let digits: Option<Vec<u8>> = digits.chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect();
    let digits = digits.filter(|digits| digits.len() == 32);
    let digits = digits.ok_or_else(|| Error::invalid("an identity has 32 hexadecimal digits"))?;
    Ok(std::array::from_fn(|ix| digits[2 * ix] << 4 | digits[2 * ix + 1]))
}

/// One line of a volume's history.
fn point(point: &Point) -> Value {
    let Account { mapped, shared, freed, .. } = point.account;
    let mut said = json!({
        "mapped": mapped * BLOCK, "changed": point.changed * BLOCK, "shared": shared * BLOCK,
        "freed_if_deleted": freed * BLOCK,
    });
    if let Some(entry) = &point.snapshot {
        (said["snapshot"], said["made"], said["held"]) =
            (json!(entry.name), json!(entry.made), json!(entry.held));
    }
    said
}

/// How a volume, or a snapshot, is made.
fn settings_of(entry: &Entry) -> Value {
    let mut said = json!({
        "name": entry.name, "size": entry.size, "made": entry.made, "checksums": entry.checksums,
        "ordered": entry.ordered, "compress": entry.compress,
    });
    if let EntryKind::Volume { limits, receiving, .. } = &entry.kind {
        (said["quota"], said["reserve"]) = (json!(limits.quota), json!(limits.reserve));
        if let Some(Receiving { id, blocks }) = receiving {
            said["receiving"] = match *blocks {
                Receiving::SPOILT => json!({ "id": hex(id), "offset": null }),
                blocks => json!({ "id": hex(id), "offset": blocks * BLOCK }),
            };
        }
    }
    said
}

/// What is said of volumes that cannot be opened.
fn unusable(lacking: &[Lacking]) -> Vec<String> {
    let said = |lacking: &Lacking| {
        format!("{} cannot be used, and are left as they are: {}", lacking.what(), lacking.why)
    };
    lacking.iter().map(said).collect()
}

fn listed(all: &[Arc<Pool>], lacking: &[Lacking]) -> Value {
    let blocks = &all[0].space.blocks;
    let volumes: Vec<Value> = all.iter().flat_map(|trees| volumes_of(trees)).collect();
    json!({ "size": blocks.all() * BLOCK, "free": blocks.free() * BLOCK, "volumes": volumes, "unusable": unusable(lacking) })
}

fn volumes_of(trees: &Pool) -> Vec<Value> {
    let core = trees.core();
    let name_of = |number: &u32| core.catalog.get(number).map(|entry| core.called(&entry.name));
    let origin = |snapshot: &u32| {
        let entry = core.catalog.get(snapshot)?;
        match &entry.kind {
            EntryKind::Snapshot { volume, .. } => Some(format!("{}@{}", name_of(volume)?, entry.name)),
            EntryKind::Volume { .. } => None,
        }
    };
    let snapshots = |number: u32| -> Vec<Value> {
        let of = |(_, entry): &(&u32, &Entry)| {
            !entry.deleting && matches!(entry.kind, EntryKind::Snapshot { volume, .. } if volume == number)
        };
        let said = |(number, entry): (&u32, &Entry)| {
            let served = core.served.contains_key(number);
            let id = core.identity(*number).map(|id| hex(&id));
            json!({
                "name": entry.name, "number": number, "size": entry.size, "made": entry.made, "served": served, "id": id,
                "held": entry.held,
            })
        };
        core.catalog.iter().filter(of).map(said).collect()
    };
    let volume = |(number, entry): (&u32, &Entry)| match &entry.kind {
        EntryKind::Volume { origin: (from, _), .. } if !entry.deleting => {
            let mut said = settings_of(entry);
            (said["name"], said["format"]) = (json!(core.called(&entry.name)), json!(trees.format));
            (said["mapped"], said["origin"]) = (json!(entry.mapped * BLOCK), json!(origin(from)));
            (said["number"], said["served"]) = (json!(number), json!(core.served.contains_key(number)));
            said["snapshots"] = json!(snapshots(*number));
            Some(said)
        }
        EntryKind::Volume { .. } | EntryKind::Snapshot { .. } => None,
    };
    core.catalog.iter().filter_map(volume).collect()
}
