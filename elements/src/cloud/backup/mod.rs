//! Backups of volumes, object by object, while their owners go on; and new volumes made of them.
//! docs/formats/bucket.md says why that can be: what is there has always been so, or is gone.

pub(super) mod points;
mod run;

use super::format::{Backup, Checkpoint, Claim, Description, Id, LARGEST, Point, renamed};
use super::found::{Found, Needed, Reasons, Seen, backup_of, describe};
use super::key;
use super::open;
use super::store::Bucket;
use crate::calendar::seconds;
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use futures::StreamExt;
use points::Keep;
use run::Run;
use std::collections::BTreeMap;

/// Bytes that are on their way at once, at most; one object in any case.
const ON_THE_WAY: u64 = 64 << 20;

/// How often a volume is looked at anew because its owner has deleted what was to be copied.
const PASSES: u32 = 50;

/// Whoever wants to know how many objects are there, and of how many.
pub(super) type Progress = dyn Fn(u64, u64) + Send + Sync;

/// Who makes a backup.
#[derive(Clone, Default)]
pub(super) struct By {
    pub(super) claim: Claim,
    /// Whoever was at it before is dead.
    pub(super) take: bool,
}

/// What a backup has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Copied {
    /// The number of its point.
    pub(super) point: u64,
    /// Objects that were copied, and their bytes.
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// Objects that were there before and are part of it.
    pub(super) kept: u64,
    pub(super) pruned: Pruned,
    /// What is not as it should be with points before it.
    pub(super) problems: Vec<String>,
}

/// What was deleted: points of a backup, and objects that no point leads to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pruned {
    pub(super) points: Vec<u64>,
    pub(super) objects: u64,
    pub(super) bytes: u64,
}

/// Adds to a backup what the volume is at some instant after the call, as a point; makes the backup where there is none. Then deletes
/// the points that are not to be kept. The volume may be open meanwhile, and is not written.
///
/// # Errors
/// [`Kind::Busy`] if something else is at the target, somebody else works on the backup, or the owner deletes objects faster than they are
/// copied; what the stores say. The points before are what they were, but for those that were to go.
pub(super) async fn back_up(
    source: &Bucket,
    target: &Bucket,
    keep: Keep,
    by: By,
    progress: &Progress,
) -> Result<Copied> {
    let (description, _) = describe(source).await?;
    begin(target, &description).await?;
    let run = Run::begin(target, by.claim, by.take).await?;
    let done = add_point(source, target, &description, keep, &run, progress).await;
    // One that failed is over, too.
    let ended = run.end().await;
    done.and_then(|copied| ended.map(|()| copied))
}

async fn add_point(
    source: &Bucket,
    target: &Bucket,
    description: &Description,
    keep: Keep,
    run: &Run<'_>,
    progress: &Progress,
) -> Result<Copied> {
    let before = objects(target).await?;
    let mut copies = Copies { from: source, to: target, there: before.clone(), objects: 0, bytes: 0 };
    for _ in 0..PASSES {
        let time = seconds();
        let (found, last, needed) = settled(source).await?;
        if !copies.all(&found.description, &last, &needed, progress).await? {
            continue;
        }
        let (number, commit) = (run.number, needed.commit);
        let point = Point { number, time, size: found.size, epoch: last.epoch, n: last.n, commit };
        complete(target, description, &point).await?;
        run.is_ours().await?;
        points::put(target, &point).await?;
        let mut copied = Copied {
            point: number,
            objects: copies.objects,
            bytes: copies.bytes,
            kept: needed.keys().filter(|key| before.contains_key(*key)).count() as u64,
            ..Copied::default()
        };
        tidy(target, keep, run, &before, &mut copied).await?;
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

/// What is there, and the bytes of each.
async fn objects(bucket: &Bucket) -> Result<BTreeMap<String, u64>> {
    let (mut all, mut pages) = (BTreeMap::new(), bucket.pages(""));
    while let Some(listed) = pages.next().await? {
        let ours = listed.into_iter().filter(|listed| key::is_ours(&listed.key));
        all.extend(ours.map(|listed| (listed.key, listed.len)));
    }
    Ok(all)
}

/// The newest state of a volume, read as a whole: nothing that it needs was deleted before its reading ended. Later it may be.
async fn settled(source: &Bucket) -> Result<(Found, Checkpoint, Needed)> {
    for _ in 0..PASSES {
        let mut found = Found::look(source).await?;
        let Some(last) = found.last.clone() else {
            let why = match found.is_backup {
                true => "the backup was never completed",
                false => "nobody has opened the volume yet: there is nothing to copy",
            };
            return Err(Error::new(Kind::Unavailable, why));
        };
        let needed = found.needed(source).await?;
        // Commits are deleted once a later checkpoint is durable, and not before.
        let now = match found.is_backup {
            true => Some(last.clone()),
            false => open::last_checkpoint(source, found.id).await?,
        };
        if now.as_ref() == Some(&last) {
            sound(&found)?;
            return Ok((found, last, needed));
        }
    }
    Err(Error::new(Kind::Busy, "its checkpoints follow each other faster than they are read: try again"))
}

fn sound(found: &Found) -> Result<()> {
    match found.problems.first() {
        None => Ok(()),
        Some(problem) => Err(Error::new(Kind::Io, format!("it is damaged: {problem}"))),
    }
}

/// Copies of objects, of which some are there.
struct Copies<'a> {
    from: &'a Bucket,
    to: &'a Bucket,
    there: BTreeMap<String, u64>,
    objects: u64,
    bytes: u64,
}

impl Copies<'_> {
    /// Copies what a point needs and the target lacks. False if something has gone from the source.
    async fn all(
        &mut self,
        of: &Description,
        last: &Checkpoint,
        needed: &Needed,
        progress: &Progress,
    ) -> Result<bool> {
        // What has another length than it should is damaged, and copied once more.
        let lacks = |key: &String, len: Option<u64>| {
            self.there.get(key).is_none_or(|there| len.is_some_and(|len| len != *there))
        };
        let plain = needed.plain.iter().filter(|(key, len)| lacks(key, **len));
        let plain: Vec<String> = plain.map(|(key, _)| key.clone()).collect();
        let root = key::map(last.epoch, last.n);
        let commits = needed.commits.iter().filter(|(key, len)| lacks(key, Some(*len)));
        let mut others: Vec<String> = commits.map(|(key, _)| key.clone()).collect();
        others.extend(lacks(&root, None).then_some(root));
        let all = needed.keys().count() as u64 + 1;
        let mut done = all - (plain.len() + others.len()) as u64;
        // A commit is larger than a block.
        for (keys, most) in [(plain, largest(of)), (others, longest(needed))] {
            let (from, to) = (self.from, self.to);
            let copies = keys.into_iter().map(|key| async move {
                let copied = copy_one(from, to, &key, None).await?;
                Ok::<_, Error>((key, copied))
            });
            let mut copies = futures::stream::iter(copies).buffer_unordered(at_once(most));
            while let Some(one) = copies.next().await {
                let (key, Some(len)) = one? else { return Ok(false) };
                self.there.insert(key, len);
                self.objects += 1;
                self.bytes += len;
                done += 1;
                progress(done, all);
            }
        }
        Ok(true)
    }
}

/// The longest commit, or what a checkpoint usually has at the most.
fn longest(needed: &Needed) -> u64 {
    needed.commits.iter().map(|(_, len)| *len).max().unwrap_or(0).max(1 << 20)
}

/// The largest block or part.
fn largest(description: &Description) -> u64 {
    description.block.max(1 << 20)
}

/// How many such objects may be in memory.
fn at_once(most: u64) -> usize {
    (ON_THE_WAY / most).clamp(1, 16) as usize
}

/// Copies an object, for another volume with `ids`, its own and that one's. Its bytes; None if it has gone.
async fn copy_one(from: &Bucket, to: &Bucket, key: &str, ids: Option<(Id, Id)>) -> Result<Option<u64>> {
    let Some(data) = from.get_whole(key, LARGEST).await? else { return Ok(None) };
    let data = match ids {
        Some((id, new)) if key::blocked(key).is_none() => {
            Data::shared(renamed(&data.to_vec(), id, new).map_err(|error| error.with_path(key))?)
        }
        _ => data,
    };
    let len = data.len() as u64;
    to.put(key, data).await?;
    Ok(Some(len))
}

/// # Errors
/// Not all that a new point leads to is there.
async fn complete(target: &Bucket, description: &Description, point: &Point) -> Result<()> {
    let mut reasons = Reasons::default();
    reasons.contents(target, description, point).await?;
    let seen = Seen::list(target, &reasons).await?;
    match reasons.problems.iter().chain(&seen.problems).next() {
        None => Ok(()),
        Some(problem) => Err(Error::new(Kind::Io, format!("the backup is not what it should be: {problem}"))),
    }
}

/// Deletes the points that do not stay, and what no point leads to of what was there `before`. A key that goes is never needed
/// again: what the volume once had and the newest point has not, the volume never has again.
async fn tidy(
    target: &Bucket,
    keep: Keep,
    run: &Run<'_>,
    before: &BTreeMap<String, u64>,
    copied: &mut Copied,
) -> Result<()> {
    copied.pruned.points = drop_points(target, keep, run).await?;
    let reasons = Reasons::of(target).await?;
    let seen = Seen::list(target, &reasons).await?;
    copied.problems = [reasons.problems, seen.problems].concat();
    run.is_ours().await?;
    let old: Vec<(String, u64)> =
        seen.stray.into_iter().filter(|(key, _)| before.contains_key(key)).collect();
    copied.pruned.objects = old.len() as u64;
    copied.pruned.bytes = old.iter().map(|(_, len)| len).sum();
    target.delete_many(old.into_iter().map(|(key, _)| key)).await
}

/// Deletes the points that do not stay, and returns their numbers.
async fn drop_points(target: &Bucket, keep: Keep, run: &Run<'_>) -> Result<Vec<u64>> {
    let all = points::points(target).await?;
    let gone = going(&all, keep, &[])?;
    run.is_ours().await?;
    target.delete_many(gone.iter().map(|point| key::point(point.number))).await?;
    Ok(gone.iter().map(|point| point.number).collect())
}

/// The points that do not stay, or are named.
///
/// # Errors
/// The newest one, or one that is not there, is named.
fn going(all: &[Point], keep: Keep, named: &[u64]) -> Result<Vec<Point>> {
    if let Some(number) = named.iter().find(|number| !all.iter().any(|point| point.number == **number)) {
        return Err(Error::new(Kind::Unavailable, format!("the backup has no point {number}")));
    }
    if all.first().is_some_and(|newest| named.contains(&newest.number)) {
        let message = "the newest point stays: the next backup goes on from it. `mason bucket delete` deletes the whole backup";
        return Err(Error::invalid(message));
    }
    let kept = keep.of(all);
    let goes = |point: &&Point| named.contains(&point.number) || !kept.contains(&point.number);
    Ok(all.iter().filter(goes).cloned().collect())
}

/// Deletes points of a backup, and what no other point leads to. With `dry` it says only what would go.
///
/// # Errors
/// There is no backup; somebody works on it; a point is named that is not there, or is the newest.
pub(super) async fn prune(target: &Bucket, keep: Keep, named: &[u64], by: By, dry: bool) -> Result<Pruned> {
    let description = backup_of(target).await?.ok_or_else(|| Error::invalid("that is no backup"))?;
    let all = points::points(target).await?;
    let gone = going(&all, keep, named)?;
    let mut kept = Reasons::default();
    for point in all.iter().filter(|point| !gone.contains(point)) {
        kept.point(target, &description, point).await?;
    }
    let mut old = Reasons::default();
    for point in &gone {
        old.point(target, &description, point).await?;
    }
    let doomed: Vec<String> = old.keys().filter(|key| !kept.has(key)).cloned().collect();
    let points: Vec<u64> = gone.iter().map(|point| point.number).collect();
    let pruned = Pruned { points, objects: doomed.len() as u64, bytes: old.bytes(|key| !kept.has(key)) };
    if dry || gone.is_empty() {
        return Ok(pruned);
    }
    let run = Run::begin(target, by.claim, by.take).await?;
    let done = delete(target, &all, doomed, &run).await;
    // One that failed is over, too.
    let ended = run.end().await;
    done.and(ended).map(|()| pruned)
}

/// Deletes points, and then what they led to: a point that is there is whole. `all` are those that were looked at.
async fn delete(target: &Bucket, all: &[Point], keys: Vec<String>, run: &Run<'_>) -> Result<()> {
    if points::points(target).await? != all {
        return Err(Error::new(Kind::Busy, "somebody else has changed the backup meanwhile: try again"));
    }
    let (points, rest): (Vec<String>, Vec<String>) =
        keys.into_iter().partition(|key| key::pointed(key).is_some());
    for keys in [points, rest] {
        run.is_ours().await?;
        target.delete_many(keys).await?;
    }
    Ok(())
}

/// The points of a backup, the newest first, with the bytes that each leads to, and that it alone leads to; maps are not counted.
///
/// # Errors
/// There is no backup, or it is damaged.
pub(super) async fn list(backup: &Bucket) -> Result<Vec<(Point, u64, u64)>> {
    let of = backup_of(backup).await?.ok_or_else(|| Error::invalid("that is no backup"))?;
    let all = points::points(backup).await?;
    let reasons = Reasons::of(backup).await?;
    let mut listed = Vec::new();
    for point in all {
        let mut own = Reasons::default();
        own.contents(backup, &of, &point).await?;
        let alone = own.bytes(|key| reasons.is_alone(key));
        listed.push((point, own.bytes(|_| true), alone));
    }
    Ok(listed)
}

/// Makes a volume of a point of a backup, the newest if none is named, where there is none.
///
/// # Errors
/// [`Kind::Busy`] if something is at the target; the backup is damaged; [`Kind::Unsupported`] if `fenced` and the store
/// ignores conditions.
pub(super) async fn restore(
    backup: &Bucket,
    target: &Bucket,
    number: Option<u64>,
    claim: Claim,
    fenced: bool,
    progress: &Progress,
) -> Result<(Description, Point, u64)> {
    let of = backup_of(backup).await?;
    let of = of.ok_or_else(|| Error::invalid("that is no backup; `mason bucket copy` copies volumes"))?;
    let point = points::find(backup, number).await?;
    let mut found = Found::at(backup, &of, &point).await?;
    let needed = found.needed(backup).await?;
    sound(&found)?;
    open::vacant(target, &[key::VOLUME, key::BACKUP, key::RESTORING]).await?;
    let description = open::draw(target, found.size, found.description.block, fenced).await?;
    let ids = (found.id, description.id()?);
    if !target.put_if_absent(key::RESTORING, Data::copy_of(description.id.as_bytes())).await? {
        return Err(Error::new(Kind::Busy, "somebody else restores to that place"));
    }
    let all = needed.keys().count() as u64;
    let (mut done, mut bytes) = (0, 0);
    let longest = longest(&needed);
    let plain: Vec<String> = needed.plain.into_keys().collect();
    let commits = needed.commits.into_iter().map(|(key, _)| key).collect();
    for (keys, most) in [(plain, largest(&of)), (commits, longest)] {
        let copies = keys.into_iter().map(|key| async move {
            let copied = copy_one(backup, target, &key, Some(ids)).await?;
            copied.ok_or_else(|| Error::new(Kind::Io, "it is missing in the backup").with_path(key))
        });
        let mut copies = futures::stream::iter(copies).buffer_unordered(at_once(most));
        while let Some(len) = copies.next().await {
            bytes += len?;
            done += 1;
            progress(done, all);
        }
    }
    if let Some(last) = &found.last {
        leave(target, last, ids.1, claim).await?;
    }
    if !target.put_if_absent(key::VOLUME, Data::copy_of(&description.encode())).await? {
        return Err(Error::new(Kind::Busy, "somebody else has made a volume there meanwhile"));
    }
    target.delete_many([key::RESTORING.to_owned()]).await?;
    Ok((description, point, bytes))
}

/// The checkpoint of a restored volume: nobody has it open, and the next who opens it goes on after its epoch.
async fn leave(target: &Bucket, last: &Checkpoint, id: Id, claim: Claim) -> Result<()> {
    let claim = Claim { epoch: last.epoch, time: seconds(), ..claim };
    let claim = serde_json::to_vec(&claim).map_err(|_| Error::internal("a claim cannot be written"))?;
    target.put(&key::claim(last.epoch), Data::copy_of(&claim)).await?;
    let root = Checkpoint { closed: true, gone: Default::default(), ..last.clone() };
    target.put(&key::map(last.epoch, last.n), Data::shared(root.encode(id))).await
}
