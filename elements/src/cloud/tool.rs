//! What `mason bucket` does with volumes that this process does not serve. Everything here blocks.

pub use super::backup::points::Keep;
use super::backup::{self, By};
use super::claims::{LOST, claim, has_died, last_claim};
use super::client::{S3, Target, read_ca};
use super::credentials::{Source, profile};
use super::format::{Claim, END_LEN, hex};
use super::found::{Found, Reasons, Seen};
use super::key;
use super::open;
use super::price::STANDARD;
use super::shared::{PATIENCE, block_on, guarded, runtime};
use super::store::{Bucket, prefix};
use super::volume::{Opening, Volume};
use super::{grow, holds};
use blockmason::{Error, Kind, Op, Origin, Request, Result};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Where a volume is.
#[derive(Clone, Debug, Default)]
pub struct Place {
    /// The bucket.
    pub bucket: String,
    /// What its keys begin with.
    pub prefix: String,
    /// The server; None for Amazon's.
    pub endpoint: Option<String>,
    /// The region that requests are signed for.
    pub region: String,
    /// The bucket is in the host's name, though there is an endpoint; or in the path, though there is none.
    pub by_path: Option<bool>,
    /// A file of keys.
    pub credentials: Option<PathBuf>,
    /// The profile in it.
    pub profile: Option<String>,
    /// Certificates to trust.
    pub ca: Option<PathBuf>,
}

impl Place {
    fn bucket(&self) -> Result<Bucket> {
        let bucket = Bucket::new(Arc::new(self.store()?), &prefix(&self.prefix), Some(PATIENCE));
        let place = self.endpoint.clone().unwrap_or_else(|| "Amazon".to_owned());
        bucket.tell(move |message| tracing::warn!("{place}: {message}"));
        Ok(bucket)
    }

    fn store(&self) -> Result<S3> {
        let profile = self.profile.clone().unwrap_or_else(profile);
        let target = Target {
            bucket: self.bucket.clone(),
            region: self.region.clone(),
            by_path: self.by_path.unwrap_or(self.endpoint.is_some()),
            credentials: self.credentials.clone().map_or(Source::Any, |path| Source::File { path, profile }),
            ca: self.ca.as_ref().map(|path| read_ca(path)).transpose()?,
            endpoint: self.endpoint.clone(),
        };
        S3::new(&target)
    }
}

/// Makes the bucket itself; that it is there, and is ours, is no error.
///
/// # Errors
/// The name is somebody else's; the keys do not allow it.
pub fn make_bucket(place: &Place) -> Result<()> {
    let store = place.store()?;
    block_on(async move { store.make_bucket().await })
}

/// Makes a volume of so many bytes in objects of `block` bytes.
///
/// # Errors
/// [`Kind::Busy`] if there is one; [`Kind::Unsupported`] if `fenced` and the store ignores conditions.
pub fn create(place: &Place, size: u64, block: u64, fenced: bool) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let made = open::create(&bucket, size, block, fenced).await?;
        Ok(json!({ "id": made.id, "size": made.size, "block": made.block, "fenced": made.fenced }))
    })
}

/// What is known of a volume, from a few requests.
///
/// # Errors
/// There is none, or it is damaged.
pub fn stat(place: &Place) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let found = Found::look(&bucket).await?;
        let (present, stored) = found.stored();
        let (commits, logged) = commits(&bucket).await?;
        let holds = holds::all(&bucket).await?;
        let last = found.last.as_ref();
        let claim = last_claim(&bucket).await?;
        let closed =
            last.is_none_or(|last| last.closed && claim.as_ref().is_some_and(|it| it.epoch == last.epoch));
        Ok(json!({
            "id": found.description.id,
            "size": found.size,
            "block": found.description.block,
            "fenced": found.description.fenced,
            "backup": found.is_backup,
            "epoch": claim.as_ref().map_or(0, |claim| claim.epoch),
            "open": !closed && claim.is_some(),
            "host": claim.as_ref().map(|claim| claim.host.clone()),
            "process": claim.as_ref().map(|claim| claim.process),
            "since": claim.as_ref().map(|claim| claim.time),
            "objects": present,
            "bytes": stored,
            "commits": commits,
            "commit_bytes": logged,
            "caches": holds.iter().map(|hold| hold.place.clone()).collect::<Vec<_>>(),
            "month": STANDARD.storage(stored + logged),
        }))
    })
}

/// Commits that are there, and their bytes: changes that are not in their blocks yet, or not deleted yet since they are.
async fn commits(bucket: &Bucket) -> Result<(u64, u64)> {
    let (mut count, mut bytes, mut pages) = (0, 0, bucket.pages(key::WALS));
    while let Some(listed) = pages.next().await? {
        for commit in
            listed.iter().filter(|listed| key::logged(&listed.key).is_some() && listed.len > END_LEN)
        {
            (count, bytes) = (count + 1, bytes + commit.len);
        }
    }
    Ok((count, bytes))
}

/// What a check will cost, in dollars at the prices of S3 Standard, and of how many objects: known before it begins.
///
/// # Errors
/// As [`stat`].
pub fn cost_of_check(place: &Place) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let found = Found::look(&bucket).await?;
        let (objects, _) = found.stored();
        let lists = objects.div_ceil(1000) + 2;
        Ok(json!({ "objects": objects, "lists": lists, "dollars": lists as f64 * STANDARD.put / 1000.0 }))
    })
}

/// Looks at every object of a volume by listing them. What nothing leads to is counted, and deleted with `mend`, which needs a volume
/// that nobody has open.
///
/// # Errors
/// The store does not answer; with `mend`, somebody has the volume open.
pub fn check(place: &Place, mend: bool) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let dangers = bucket.dangers().await?;
        let found = Found::look(&bucket).await?;
        let claim = last_claim(&bucket).await?;
        let closed = match (&found.last, &claim) {
            _ if found.is_backup => true,
            (Some(last), Some(claim)) => last.closed && last.epoch == claim.epoch,
            (None, None) => true,
            _ => false,
        };
        let mut reasons = Reasons::of(&bucket).await?;
        let mut seen = Seen::list(&bucket, &reasons).await?;
        reasons.problems.append(&mut seen.problems);
        let claimed = claim.as_ref().map_or(0, |claim| claim.epoch);
        if !found.is_backup && found.last.as_ref().is_some_and(|last| last.epoch > claimed) {
            reasons.problems.push(LOST.to_owned());
        }
        if mend && !closed {
            let message = "somebody has the volume open: what nothing leads to may be just on its way";
            return Err(Error::new(Kind::Busy, message));
        }
        if mend {
            bucket.delete_many(seen.stray.iter().map(|(key, _)| key.clone())).await?;
        }
        Ok(json!({
            "problems": reasons.problems,
            "dangers": dangers,
            "objects": seen.objects,
            "bytes": seen.bytes,
            "stray": seen.stray.len(),
            "stray_bytes": seen.stray.iter().map(|(_, len)| len).sum::<u64>(),
            "deleted": mend,
            "open": !closed,
            "dollars": STANDARD.counted(&bucket.counts),
            "month": STANDARD.storage(seen.bytes),
        }))
    })
}

fn opening(take: bool) -> Opening {
    Opening { claim: claim(), memory: 0, idle: Duration::from_secs(10), take, patience: Some(PATIENCE) }
}

async fn opened(bucket: Bucket, take: bool) -> Result<Arc<Volume>> {
    let volume =
        open::open(bucket, opening(take), Arc::new(|message: &str| tracing::warn!("{message}"))).await?;
    runtime()?.spawn(guarded(volume.clone()));
    Ok(volume)
}

/// Says that the host that has the volume open is dead, and what caches have is lost that the bucket has not: the volume is opened,
/// brought in order and left. If that host lives, its disk ends.
/// `force` goes on although it is a process of this host, and lives.
///
/// # Errors
/// The store does not answer, or the volume is damaged; its owner is known to live.
pub fn take(place: &Place, force: bool) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let before = last_claim(&bucket).await?;
        let here = |owner: &&Claim| owner.machine == claim().machine && !has_died(owner, &claim());
        if let Some(owner) = before.as_ref().filter(here).filter(|_| !force)
            && !is_closed(&bucket, owner).await?
        {
            let message = format!(
                "the process {} of this host has it open, and lives: stop it, or unload its graph",
                owner.process
            );
            return Err(Error::new(Kind::Busy, message));
        }
        let volume = opened(bucket.with_patience(Some(PATIENCE)), true).await?;
        open::close(&volume, Duration::from_secs(600)).await?;
        // Those that there were then: the next owner may have some of its own by now.
        bucket.delete_many(volume.holds.iter().map(|hold| hold.key.clone())).await?;
        let caches: Vec<_> = volume.holds.iter().map(|hold| hold.place.clone()).collect();
        Ok(json!({ "epoch": volume.epoch, "host": before.map(|claim| claim.host), "caches": caches }))
    })
}

/// Makes a volume larger that nobody has open. What is new reads as zeros.
///
/// # Errors
/// It is larger already; somebody has it open; the store does not answer.
pub fn grow(place: &Place, size: u64) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let volume = opened(bucket, false).await?;
        let before = volume.state().size;
        let grown = grow::grow(&volume, size).await;
        let left = open::close(&volume, Duration::from_secs(60)).await;
        grown.and(left)?;
        Ok(json!({ "before": before, "size": size }))
    })
}

/// Whether whoever claimed the volume last has left it in order.
async fn is_closed(bucket: &Bucket, owner: &Claim) -> Result<bool> {
    let id = open::describe(bucket).await?.id()?;
    let last = open::last_checkpoint(bucket, id).await?;
    Ok(last.is_some_and(|last| last.closed && last.epoch == owner.epoch))
}

/// What says that something is at a place: a volume, a backup, or what a restore has left that did not end.
///
/// # Errors
/// There is nothing.
async fn root(bucket: &Bucket) -> Result<&'static str> {
    for root in [key::VOLUME, key::BACKUP, key::RESTORING] {
        if bucket.get_whole(root, 1 << 16).await?.is_some() {
            return Ok(root);
        }
    }
    Err(Error::new(Kind::Unavailable, "there is no volume in that bucket, below that prefix, and no backup"))
}

/// Adds a point to a backup of a volume, which may be open: what the volume is now; makes the backup where there is none. What the backup has
/// already is not copied again. Then deletes the points that `keep` does not name. Tells `progress` how many objects are there, and of how
/// many. `take` says that whoever was at work on the backup is dead.
///
/// # Errors
/// [`Kind::Busy`] if something else is at the other place, somebody works on the backup, or the volume is written faster than it is copied; a
/// store does not answer. The points before are there then.
pub fn backup(
    from: &Place,
    to: &Place,
    keep: Keep,
    take: bool,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Value> {
    let (source, target) = (from.bucket()?, to.bucket()?);
    block_on(async move {
        let by = By { claim: claim(), take };
        let done = backup::back_up(&source, &target, keep, by, &progress).await?;
        let dollars = STANDARD.counted(&source.counts) + STANDARD.counted(&target.counts);
        Ok(json!({
            "point": done.point, "objects": done.objects, "bytes": done.bytes, "kept": done.kept,
            "pruned": done.pruned.points, "deleted": done.pruned.objects, "problems": done.problems,
            "dollars": dollars,
        }))
    })
}

/// The points of a backup, the newest first.
///
/// # Errors
/// There is no backup, or it is damaged; the store does not answer.
pub fn points(place: &Place) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        let listed = backup::list(&bucket).await?;
        let points = listed.into_iter().map(|(point, bytes, alone)| {
            json!({
                "point": point.number, "time": point.time, "size": point.size, "bytes": bytes, "own": alone,
            })
        });
        Ok(json!({ "points": points.collect::<Vec<_>>() }))
    })
}

/// Deletes the points of a backup that `keep` does not name, or that are `named`, and what only they lead to. With `dry` it says only
/// what would go.
///
/// # Errors
/// There is no backup; somebody works on it; a point is named that is not there, or is the newest.
pub fn prune(place: &Place, keep: Keep, named: &[u64], take: bool, dry: bool) -> Result<Value> {
    let (bucket, named) = (place.bucket()?, named.to_vec());
    block_on(async move {
        let by = By { claim: claim(), take };
        let gone = backup::prune(&bucket, keep, &named, by, dry).await?;
        Ok(json!({ "pruned": gone.points, "objects": gone.objects, "bytes": gone.bytes, "dry": dry }))
    })
}

/// Makes a volume of a point of a backup, the newest if none is named, at a place where there is none.
///
/// # Errors
/// There is no such point; something is at the other place, the backup is damaged, a store does not answer. What is there then is to be
/// deleted.
pub fn restore(
    from: &Place,
    to: &Place,
    point: Option<u64>,
    fenced: bool,
    progress: impl Fn(u64, u64) + Send + Sync + 'static,
) -> Result<Value> {
    let (source, target) = (from.bucket()?, to.bucket()?);
    block_on(async move {
        let (made, point, bytes) =
            backup::restore(&source, &target, point, claim(), fenced, &progress).await?;
        Ok(json!({
            "id": made.id, "size": made.size, "point": point.number, "time": point.time, "bytes": bytes,
        }))
    })
}

/// Deletes a volume or a backup, its description last: what is broken off can be done again. A host that has it open loses it before; it is refused
/// without `force` then. With `dry` it only says what would go.
///
/// # Errors
/// There is none; another host has it open; the store does not answer.
pub fn delete(place: &Place, force: bool, dry: bool) -> Result<Value> {
    let bucket = place.bucket()?;
    block_on(async move {
        // The last to go.
        let root = match root(&bucket).await {
            // What was put after the volume had been deleted.
            Err(error) if force && error.kind() == Kind::Unavailable => "",
            found => found?,
        };
        if root == key::VOLUME && !dry {
            match opened(bucket.with_patience(Some(PATIENCE)), force).await {
                Ok(volume) => open::close(&volume, Duration::from_secs(600)).await?,
                // A volume that cannot be read can be deleted all the same.
                Err(error) if force && error.kind() != Kind::Busy => tracing::warn!("{error}"),
                Err(error) => return Err(error),
            }
        }
        let (mut count, mut pages) = (0u64, bucket.pages(""));
        while let Some(listed) = pages.next().await? {
            let keys: Vec<String> = listed
                .into_iter()
                .map(|listed| listed.key)
                .filter(|key| key != root && key::is_ours(key))
                .collect();
            count += keys.len() as u64;
            if !dry {
                bucket.delete_many(keys).await?;
            }
        }
        let last = (!root.is_empty() && !dry).then(|| root.to_owned());
        bucket.delete_many(last).await?;
        Ok(json!({ "what": root, "objects": count + u64::from(!root.is_empty()), "dry": dry }))
    })
}

/// Copies a volume that nobody has open to a place where there is none; what was never written takes no room there either. Tells
/// `progress` how far it is, and how far it goes, in bytes of the disk.
///
/// # Errors
/// There is a volume at the other place; a store does not answer. What is there of the copy then is to be deleted.
pub fn copy(
    from: &Place,
    to: &Place,
    block: Option<u64>,
    fenced: bool,
    progress: impl Fn(u64, u64) + Send + 'static,
) -> Result<Value> {
    let (source, target) = (from.bucket()?, to.bucket()?);
    block_on(async move {
        let source = opened(source, false).await?;
        if let Err(error) = source.may_be_read() {
            open::close(&source, Duration::from_secs(60)).await?;
            return Err(error);
        }
        let size = source.state().size;
        let block = block.unwrap_or(source.block);
        let made = open::create(&target, size, block, fenced).await?;
        let target = opened(target, false).await?;
        let done = copy_all(&source, &target, size, progress).await;
        let left = open::close(&source, Duration::from_secs(60)).await;
        let closed = open::close(&target, Duration::from_secs(600)).await;
        let copied = done?;
        left.and(closed)?;
        Ok(json!({ "id": made.id, "size": size, "bytes": copied, "from": hex(&source.id) }))
    })
}

/// Bytes that are copied between two flushes.
const STRETCH: u64 = 16 << 20;

async fn copy_all(
    source: &Arc<Volume>,
    target: &Arc<Volume>,
    size: u64,
    progress: impl Fn(u64, u64),
) -> Result<u64> {
    let mut copied = 0;
    let mut at = 0;
    while at < size {
        let len = STRETCH.min(size - at);
        let extents = source.clone().serve(Request::new(Op::Extents, at, len)).await?.into_extents()?;
        let end = at + len;
        for extent in extents {
            let len = extent.len.min(end - at);
            if !extent.state.zero {
                let data = source.clone().serve(Request::read(at, len)).await?.into_data()?;
                let mut write = Request::write(at, data);
                write.origin = Origin::WriteBack;
                target.clone().serve(write).await?;
                copied += len;
            }
            at += len;
        }
        target.flush().await?;
        progress(at, size);
    }
    Ok(copied)
}
