//! Backups of volumes, object by object, while their owners go on; and new volumes made of them.
//! docs/formats/bucket.md says why that can be: what is there has always been so, or is gone.

use super::format::{Backup, Checkpoint, Claim, Description, Id, LARGEST, key, renamed};
use super::found::{Found, Needed, Seen, backup_of, describe};
use super::open;
use super::store::Bucket;
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use futures::StreamExt;
use std::collections::BTreeSet;

/// Bytes that are on their way at once, at most; one object in any case.
const ON_THE_WAY: u64 = 64 << 20;

/// How often a volume is looked at anew because its owner has deleted what was to be copied.
const PASSES: u32 = 50;

/// What a backup has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    /// Objects that were copied, and their bytes.
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// Objects that were there before and are part of it.
    pub(super) kept: u64,
    /// Objects of the backup before that are not part of this one, and have been deleted.
    pub(super) deleted: u64,
}

/// Whoever wants to know how many objects are there, and of how many.
pub(super) type Progress = dyn Fn(u64, u64) + Send + Sync;

/// Brings a backup to what the volume is at some instant after the call; makes it where there is none. Until that is done, the
/// backup is what it was, or a later commit of what is copied. The volume may be open meanwhile, and is not written.
///
/// # Errors
/// [`Kind::Busy`] if something else is at the target, or the owner deletes objects faster than they are copied; what
/// the stores say.
pub(super) async fn back_up(source: &Bucket, target: &Bucket, progress: &Progress) -> Result<Copied> {
    let (description, _) = describe(source).await?;
    begin(target, &description).await?;
    let before = keys(target).await?;
    let mut there = before.clone();
    let mut copied = Copied::default();
    for _ in 0..PASSES {
        let (found, needed) = settled(source).await?;
        if !copy_missing(source, target, &found, &needed, &mut there, &mut copied, progress).await? {
            continue;
        }
        copied.kept = needed.keys().filter(|key| before.contains(*key)).count() as u64;
        copied.deleted = tidy(target, &before).await?;
        return Ok(copied);
    }
    let message = "its owner deletes objects faster than they are copied: try again when less is written";
    Err(Error::new(Kind::Busy, message))
}

/// Says what the backup is of, before anything is there; or finds that it is a backup of the same volume.
async fn begin(target: &Bucket, description: &Description) -> Result<()> {
    if backup_of(target).await?.is_none() {
        open::vacant(target, &[key::VOLUME, key::RESTORING]).await?;
        let backup = Backup::of(description.clone()).encode();
        // If somebody else was faster: whose it is shows below.
        target.put_if_absent(key::BACKUP, Data::copy_of(&backup)).await?;
    }
    match backup_of(target).await? {
        Some(of) if of.id == description.id => Ok(()),
        Some(of) => {
            let message =
                format!("there is a backup of another volume: of {}, not of {}", of.id, description.id);
            Err(Error::new(Kind::Busy, message))
        }
        None => Err(Error::new(Kind::Busy, "the backup has been deleted meanwhile")),
    }
}

async fn keys(bucket: &Bucket) -> Result<BTreeSet<String>> {
    let (mut all, mut after) = (BTreeSet::new(), String::new());
    loop {
        let listed = bucket.list("", &after, 1000).await?;
        let Some(last) = listed.last() else { return Ok(all) };
        after = last.key.clone();
        all.extend(listed.into_iter().map(|listed| listed.key).filter(|key| key::is_ours(key)));
    }
}

/// The newest state of a volume, read as a whole: nothing that it needs was deleted before its reading ended. Later it may be.
async fn settled(source: &Bucket) -> Result<(Found, Needed)> {
    for _ in 0..PASSES {
        let mut found = Found::look(source).await?;
        if found.last.is_none() {
            let why = match found.is_backup {
                true => "the backup was never completed",
                false => "nobody has opened the volume yet: there is nothing to copy",
            };
            return Err(Error::new(Kind::Unavailable, why));
        }
        let needed = found.needed(source).await?;
        // Commits are deleted once a later checkpoint is durable, and not before.
        if open::last_checkpoint(source, found.id).await? == found.last {
            return match found.problems.first() {
                None => Ok((found, needed)),
                Some(problem) => Err(Error::new(Kind::Io, format!("the volume is damaged: {problem}"))),
            };
        }
    }
    Err(Error::new(Kind::Busy, "its checkpoints follow each other faster than they are read: try again"))
}

/// Copies what the target lacks, its checkpoint last. False if something has gone from the source.
async fn copy_missing(
    source: &Bucket,
    target: &Bucket,
    found: &Found,
    needed: &Needed,
    there: &mut BTreeSet<String>,
    copied: &mut Copied,
    progress: &Progress,
) -> Result<bool> {
    let plain: Vec<String> = needed.plain.iter().filter(|key| !there.contains(*key)).cloned().collect();
    let all = (needed.plain.len() + needed.commits.len()) as u64;
    let mut done = all - plain.len() as u64;
    let most = largest(&found.description);
    let mut copies = futures::stream::iter(plain)
        .map(|key| async move { copy_one(source, target, &key, most).await.map(|len| (key, len)) })
        .buffer_unordered(at_once(most));
    let mut complete = true;
    while let Some(one) = copies.next().await {
        let (key, len) = one?;
        done += 1;
        progress(done, all);
        complete &= count(&key, len, there, copied);
    }
    drop(copies);
    if !complete {
        return Ok(false);
    }
    // In their order: a backup with the same checkpoint is at each instant what the disk was at one of them.
    let last = found.last.iter().map(|last| key::map(last.epoch, last.n));
    for key in needed.commits.iter().cloned().chain(last) {
        if !there.contains(&key) {
            let len = copy_one(source, target, &key, LARGEST).await?;
            if !count(&key, len, there, copied) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The largest block or part.
fn largest(description: &Description) -> u64 {
    description.block.max(1 << 20)
}

/// How many such objects may be in memory.
fn at_once(most: u64) -> usize {
    (ON_THE_WAY / most).clamp(1, 16) as usize
}

/// Its bytes; None if it has gone.
async fn copy_one(source: &Bucket, target: &Bucket, key: &str, most: u64) -> Result<Option<u64>> {
    let Some(data) = source.get_whole(key, most).await? else { return Ok(None) };
    let len = data.len() as u64;
    target.put(key, data).await?;
    Ok(Some(len))
}

fn count(key: &str, len: Option<u64>, there: &mut BTreeSet<String>, copied: &mut Copied) -> bool {
    let Some(len) = len else { return false };
    there.insert(key.to_owned());
    copied.objects += 1;
    copied.bytes += len;
    true
}

/// Looks whether everything is there, and deletes what only the backup before had: nothing that somebody else has put meanwhile.
async fn tidy(target: &Bucket, before: &BTreeSet<String>) -> Result<u64> {
    let mut found = Found::look(target).await?;
    let needed = found.needed(target).await?;
    let seen = Seen::list(target, &found, &needed).await?;
    let missing = seen.missing(&needed).map(|key| format!("{key} is missing"));
    if let Some(problem) = found.problems.iter().chain(&seen.problems).cloned().chain(missing).next() {
        return Err(Error::new(Kind::Io, format!("the backup is not what it should be: {problem}")));
    }
    let old: Vec<String> =
        seen.stray.into_iter().map(|(key, _)| key).filter(|key| before.contains(key)).collect();
    let count = old.len() as u64;
    target.delete_many(old).await?;
    Ok(count)
}

/// Makes a volume of a backup, where there is none.
///
/// # Errors
/// [`Kind::Busy`] if something is at the target; the backup is damaged; [`Kind::Unsupported`] if `fenced` and the store
/// ignores conditions.
pub(super) async fn restore(
    backup: &Bucket,
    target: &Bucket,
    claim: Claim,
    fenced: bool,
    progress: &Progress,
) -> Result<(Description, Copied)> {
    if backup_of(backup).await?.is_none() {
        return Err(Error::invalid("that is no backup; `mason bucket copy` copies volumes"));
    }
    let (found, needed) = settled(backup).await?;
    open::vacant(target, &[key::VOLUME, key::BACKUP, key::RESTORING]).await?;
    let description = open::draw(target, found.size, found.description.block, fenced).await?;
    let id = description.id()?;
    if !target.put_if_absent(key::RESTORING, Data::copy_of(description.id.as_bytes())).await? {
        return Err(Error::new(Kind::Busy, "somebody else restores to that place"));
    }
    let mut copied = Copied::default();
    let all = needed.keys().count() as u64;
    let (from, most) = (found.id, largest(&found.description));
    let mut copies = futures::stream::iter(needed.plain.clone())
        .map(|key| async move { restore_one(backup, target, &key, most, from, id).await })
        .buffer_unordered(at_once(most));
    while let Some(len) = copies.next().await {
        copied.bytes += len?;
        copied.objects += 1;
        progress(copied.objects, all);
    }
    drop(copies);
    for key in &needed.commits {
        copied.bytes += restore_one(backup, target, key, LARGEST, from, id).await?;
        copied.objects += 1;
        progress(copied.objects, all);
    }
    if let Some(last) = &found.last {
        // Nobody has it open, and the next who opens it goes on after its epoch.
        let claim = Claim { epoch: last.epoch, time: open::seconds(), ..claim };
        let claim = serde_json::to_vec(&claim).map_err(|_| Error::internal("a claim cannot be written"))?;
        target.put(&key::claim(last.epoch), Data::copy_of(&claim)).await?;
        let root = Checkpoint { closed: true, gone: Default::default(), ..last.clone() };
        target.put(&key::map(last.epoch, last.n), Data::shared(root.encode(id))).await?;
    }
    if !target.put_if_absent(key::VOLUME, Data::copy_of(&description.encode())).await? {
        return Err(Error::new(Kind::Busy, "somebody else has made a volume there meanwhile"));
    }
    target.delete_many([key::RESTORING.to_owned()]).await?;
    Ok((description, copied))
}

async fn restore_one(
    backup: &Bucket,
    target: &Bucket,
    key: &str,
    most: u64,
    from: Id,
    to: Id,
) -> Result<u64> {
    let data = backup.get_whole(key, most).await?;
    let data = data.ok_or_else(|| Error::new(Kind::Io, "it is missing in the backup").with_path(key))?;
    let data = match key::blocked(key) {
        Some(_) => data,
        None => Data::shared(renamed(&data.to_vec(), from, to).map_err(|error| error.with_path(key))?),
    };
    let len = data.len() as u64;
    target.put(key, data).await?;
    Ok(len)
}
