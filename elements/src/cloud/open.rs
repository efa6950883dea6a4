//! Making a volume, and becoming its owner: docs/formats/bucket.md, "Opening".

use super::claims::{self, last_claim, may_be_taken, taken_over};
use super::format::{
    Checkpoint, Commit, Description, END_LEN, End, Entry, Gone, Id, LARGEST, Link, Span, decode_part, unhex,
};
use super::keeper::{self, keys_of};
use super::map::Map;
use super::pieces::{Fill, Piece, Pieces};
use super::store::{Bucket, Listed};
use super::volume::{Batch, Opening, State, Volume};
use super::{holds, key};
use crate::calendar::seconds;
use blockmason::data::Data;
use blockmason::{Error, Kind, Result, rt};
use futures::stream::{StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// What is said where a volume was to be made.
const THERE: &str = "there is a volume already: choose another prefix, or `mason bucket delete` it first";

/// Requests at once while a volume is opened.
const AT_ONCE: usize = 16;

/// The same of commits, which may be large.
pub(super) const COMMITS_AT_ONCE: usize = 4;

/// How often a store is asked again that lists less than it has, and how long after.
const STALE: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// What is in a bucket, before anything is claimed.
pub(crate) async fn describe(bucket: &Bucket) -> Result<Description> {
    match bucket.get_whole(key::VOLUME, 1 << 16).await? {
        Some(bytes) => Description::decode(&bytes.to_vec()),
        None if bucket.get_whole(key::BACKUP, 1 << 16).await?.is_some() => Err(Error::new(
            Kind::Unavailable,
            "there is a backup, and no volume: `mason bucket restore` makes one of it",
        )),
        None => Err(Error::new(Kind::Unavailable, "there is no volume in that bucket, below that prefix")),
    }
}

/// Makes a volume. Fails where there is one, and with `fenced` where the store does not take conditions seriously.
pub(crate) async fn create(bucket: &Bucket, size: u64, block: u64, fenced: bool) -> Result<Description> {
    vacant(bucket, &[key::VOLUME, key::BACKUP, key::RESTORING]).await?;
    let description = draw(bucket, size, block, fenced).await?;
    // A claim or a checkpoint of another volume would be taken for one of this.
    for left in [key::CLAIMS, key::MAPS, key::WALS] {
        if !bucket.list(left, "", 1).await?.is_empty() {
            let message = "there is what is left of another volume: `mason bucket delete --force` it first, or choose another prefix";
            return Err(Error::new(Kind::Busy, message));
        }
    }
    match bucket.put_if_absent(key::VOLUME, Data::copy_of(&description.encode())).await? {
        true => Ok(description),
        false => Err(Error::new(Kind::Busy, THERE)),
    }
}

/// # Errors
/// [`Kind::Busy`] if one of these says that something is there.
pub(super) async fn vacant(bucket: &Bucket, roots: &[&str]) -> Result<()> {
    if let Some(name) = bucket.is_within() {
        let message =
            format!("keys of a disk one level higher may begin with `{name}`: choose another prefix");
        return Err(Error::invalid(message));
    }
    for root in roots {
        if bucket.get_whole(root, 1 << 16).await?.is_some() {
            let what = match *root {
                key::VOLUME => THERE,
                key::BACKUP => {
                    "there is a backup already: choose another prefix, or `mason bucket delete` it first"
                }
                _ => "there is what a restore has left that did not end: `mason bucket delete` it first",
            };
            return Err(Error::new(Kind::Busy, what));
        }
    }
    Ok(())
}

/// The description of a new volume, which is not there yet.
///
/// # Errors
/// Sizes that no volume has; with `fenced`, a store that ignores conditions.
pub(super) async fn draw(bucket: &Bucket, size: u64, block: u64, fenced: bool) -> Result<Description> {
    let id = unhex(&format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)));
    let description = Description::new(id.unwrap_or_default(), size, block, seconds(), fenced);
    description.check()?;
    let is_fenced = bucket.probe().await?;
    if fenced && !is_fenced {
        let message = "this store ignores `If-None-Match`: two hosts that open the volume would destroy it, and nothing can keep them from it";
        return Err(Error::unsupported(message));
    }
    Ok(description)
}

/// The newest checkpoint, if there is any.
pub(crate) async fn last_checkpoint(bucket: &Bucket, id: Id) -> Result<Option<Checkpoint>> {
    let mut after = String::new();
    loop {
        let found = bucket.list(key::MAPS, &after, 16).await?;
        let Some(last) = found.last() else { return Ok(None) };
        after = last.key.clone();
        for listed in &found {
            match read_map(bucket, id, &listed.key).await? {
                Some(Link::One(checkpoint)) => return Ok(Some(checkpoint)),
                Some(Link::End) => {}
                // It has gone since: there is a newer one.
                None => {
                    after.clear();
                    break;
                }
            }
        }
    }
}

async fn read_map(bucket: &Bucket, id: Id, key: &str) -> Result<Option<Link<Checkpoint>>> {
    match bucket.get_whole(key, LARGEST).await? {
        Some(bytes) => {
            Checkpoint::decode(&bytes.to_vec(), id).map(Some).map_err(|error| error.with_path(key))
        }
        None => Ok(None),
    }
}

/// That checkpoint, if it is there.
pub(super) async fn checkpoint(bucket: &Bucket, id: Id, epoch: u64, n: u64) -> Result<Option<Checkpoint>> {
    match read_map(bucket, id, &key::map(epoch, n)).await? {
        Some(Link::One(found)) if (found.epoch, found.n) == (epoch, n) => Ok(Some(found)),
        _ => Ok(None),
    }
}

/// Becomes the owner of a volume, and starts what keeps it.
pub(crate) async fn open(
    bucket: Bucket,
    opening: Opening,
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Arc<Volume>> {
    let description = describe(&bucket).await?;
    let id = description.id()?;
    let (base, last) = (last_checkpoint(&bucket, id).await?, last_claim(&bucket).await?);
    may_be_taken(base.as_ref(), last.as_ref(), &opening.claim, opening.take)?;
    let newest = last.map_or(0, |last| last.epoch).max(base.as_ref().map_or(0, |base| base.epoch));
    let epoch = claims::next(&bucket, newest, &opening.claim).await?;
    let base = end_checkpoints(&bucket, id, base, epoch).await?;
    begun(&bucket, base.as_ref()).await?;
    let base = base.unwrap_or_else(|| Checkpoint { size: description.size, ..Checkpoint::default() });
    let mut state = load(&bucket, id, &description, &base).await?;
    state.gone = base.gone.clone();
    let served = bucket.with_patience(opening.patience);
    let holds = holds::all(&bucket).await?;
    let volume = Volume::new(served, description, epoch, &opening, state, holds, say)?;
    // One after the other: together they may be far more than what is left of them.
    let spans = replay(&bucket, id, &base, epoch, |commit| bring_back(&volume, &commit)).await?;
    volume.state().replays = spans;
    let volume = Arc::new(volume);
    first_checkpoint(&bucket, &volume, &base).await?;
    Ok(volume)
}

/// # Errors
/// Something has been written, and there is no checkpoint: it is lost.
pub(super) async fn begun(bucket: &Bucket, base: Option<&Checkpoint>) -> Result<()> {
    if base.is_some() {
        return Ok(());
    }
    for place in [key::PARTS, key::BLOCKS, key::WALS] {
        // Nothing is put before the first checkpoint, and commits that have ended were never begun.
        let listed = bucket.list(place, "", 16).await?;
        let is_data = |listed: &Listed| key::logged(&listed.key).is_none() || listed.len > END_LEN;
        if listed.iter().any(|listed| key::is_ours(&listed.key) && is_data(listed)) {
            return Err(Error::new(
                Kind::Io,
                "the volume has been written, and its newest checkpoint is missing",
            ));
        }
    }
    Ok(())
}

/// Whether an epoch's commits end with the one before `n`, which was not there; false if it is there by now.
///
/// # Errors
/// It is lost: there are more after it than can have been under way with it.
pub(super) async fn ends(bucket: &Bucket, epoch: u64, n: u64) -> Result<bool> {
    let (key, after) = (key::wal(epoch, n), key::wal(epoch, n + keeper::COMMITS as u64 - 1));
    let listed = bucket.list(key::WALS, &after, 1).await?;
    let later = listed.first().and_then(|listed| key::logged(&listed.key));
    if later.is_none_or(|(other, _)| other != epoch) {
        return Ok(true);
    }
    match bucket.get_whole(&key, LARGEST).await? {
        Some(_) => Ok(false),
        None => Err(Error::new(Kind::Io, "it is missing, and later commits are there").with_path(key)),
    }
}

/// Ends the chains of checkpoints of all earlier epochs that may be alive, and returns the last checkpoint.
///
/// An owner that is alive deletes checkpoints that it has followed by others; so the place of an end may have been taken before. Then
/// there is a later one, for which the listing is looked through each time.
async fn end_checkpoints(
    bucket: &Bucket,
    id: Id,
    mut base: Option<Checkpoint>,
    by: u64,
) -> Result<Option<Checkpoint>> {
    let mut epoch = base.as_ref().map_or(1, |base| base.epoch);
    let mut stale = 0;
    while epoch < by {
        let n = base.as_ref().filter(|base| base.epoch == epoch).map_or(1, |base| base.n + 1);
        let end = Data::shared(End { epoch, by }.encode(id));
        let ended = bucket.put_if_absent(&key::map(epoch, n), end).await?
            || matches!(read_map(bucket, id, &key::map(epoch, n)).await?, Some(Link::End));
        let last = last_checkpoint(bucket, id).await?;
        let place = |base: &Option<Checkpoint>| base.as_ref().map(|base| (base.epoch, base.n));
        if place(&last) > place(&base) {
            epoch = last.as_ref().map_or(epoch, |last| last.epoch);
            base = last;
        } else if ended {
            epoch += 1;
        } else if stale == STALE {
            let message = "the store goes on listing what it had before: nothing can be found there";
            return Err(Error::new(Kind::Unavailable, message));
        } else {
            stale += 1;
            rt::sleep(PAUSE).await;
        }
    }
    Ok(base)
}

/// What is in memory of a volume at the instant of a checkpoint.
async fn load(bucket: &Bucket, id: Id, description: &Description, base: &Checkpoint) -> Result<State> {
    let mut map = Map::new(base.size.div_ceil(description.block));
    let damaged = |why: String| Error::new(Kind::Io, why);
    let parts = base.parts.clone().into_iter().map(|(part, version)| async move {
        let key = key::part(part, version);
        let bytes = bucket.get_whole(&key, 1 << 20).await?;
        let bytes =
            bytes.ok_or_else(|| Error::new(Kind::Io, "a part of the map is missing").with_path(&key))?;
        let versions = decode_part(&bytes.to_vec(), id, part).map_err(|error| error.with_path(&key))?;
        Ok::<_, Error>((part, version, versions))
    });
    let mut parts = futures::stream::iter(parts).buffer_unordered(AT_ONCE);
    while let Some((part, version, versions)) = parts.try_next().await? {
        if part >= map.parts() {
            return Err(damaged(format!("the map has a part {part}, beyond the end of the disk")));
        }
        map.load(part, version, versions);
    }
    Ok(State {
        size: base.size,
        map,
        pieces: Pieces::default(),
        covered: BTreeMap::new(),
        settling: BTreeMap::new(),
        open: Batch::default(),
        sealed: 0,
        committer: base.epoch,
        committed: 0,
        next: 1,
        serial: base.serial,
        replays: Vec::new(),
        done: 0,
        checkpoint: 0,
        doomed: Vec::new(),
        gone: Gone::default(),
        dead: None,
        touched: rt::now(),
        closing: false,
        asked: 0,
        answered: 0,
        settled: None,
        logged: BTreeMap::new(),
        rests: false,
    })
}

/// Tells the commits that are not in the map of the base, in their order, and returns where they are; ends the chain of the base's epoch.
async fn replay(
    bucket: &Bucket,
    id: Id,
    base: &Checkpoint,
    by: u64,
    mut tell: impl FnMut(Commit),
) -> Result<Vec<Span>> {
    let mut spans = base.replays.clone();
    for span in base.replays.clone() {
        let found = (span.first..=span.last).map(|n| read_commit(bucket, id, base.size, span.epoch, n));
        let mut found = futures::stream::iter(found).buffered(COMMITS_AT_ONCE);
        while let Some(found) = found.try_next().await? {
            match found {
                Some(Link::One(commit)) => tell(commit),
                _ => return Err(Error::new(Kind::Io, "a commit that is not in the map is missing")),
            }
        }
    }
    // Before its first checkpoint an open commits nothing.
    if base.epoch == 0 {
        return Ok(spans);
    }
    let mut n = base.done + 1;
    loop {
        match read_commit(bucket, id, base.size, base.epoch, n).await? {
            Some(Link::One(commit)) => tell(commit),
            Some(Link::End) => break,
            None => {
                // Before it has an end: that is for ever.
                if !ends(bucket, base.epoch, n).await? {
                    continue;
                }
                let end = Data::shared(End { epoch: base.epoch, by }.encode(id));
                if bucket.put_if_absent(&key::wal(base.epoch, n), end).await? {
                    break;
                }
                continue;
            }
        }
        n += 1;
    }
    if n > base.done + 1 {
        spans.push(Span { epoch: base.epoch, first: base.done + 1, last: n - 1 });
    }
    Ok(spans)
}

async fn read_commit(bucket: &Bucket, id: Id, size: u64, epoch: u64, n: u64) -> Result<Option<Link<Commit>>> {
    let key = key::wal(epoch, n);
    let Some(bytes) = bucket.get_whole(&key, LARGEST).await? else { return Ok(None) };
    let link = Commit::decode(&bytes, id, size).map_err(|error| error.with_path(&key))?;
    match &link {
        Link::One(commit) if (commit.epoch, commit.n) != (epoch, n) => {
            Err(Error::new(Kind::Io, "it is another commit than its name says").with_path(&key))
        }
        _ => Ok(Some(link)),
    }
}

/// What a commit of an earlier epoch says, as if it had just come.
fn bring_back(volume: &Volume, commit: &Commit) {
    let mut state = volume.state();
    for entry in &commit.entries {
        match entry {
            Entry::Piece { offset, data } => {
                // In memory of its own: the rest of its commit goes.
                let fill = Fill::Data(Data::copy_of(&data.to_vec()));
                state.pieces.put(*offset, Piece::new(data.len() as u64, fill, 0));
            }
            Entry::Zeros { offset, len } => {
                state.pieces.put(*offset, Piece::new(*len, Fill::Zeros, 0));
            }
            Entry::Block { .. } => {}
        }
        keeper::apply(volume, &mut state, entry, 0);
    }
    state.serial = commit.serial.max(state.serial);
    state.committer = commit.epoch;
}

/// The checkpoint that begins this epoch: the map of the base, and what has to be replayed. From then on it may be written.
async fn first_checkpoint(bucket: &Bucket, volume: &Arc<Volume>, base: &Checkpoint) -> Result<()> {
    let root = {
        let mut state = volume.state();
        // What a replayed commit named may have been taken away by one before it, and given back.
        let doomed = std::mem::take(&mut state.doomed);
        state.doomed =
            doomed.into_iter().filter(|(block, version, _)| state.map.get(*block) != *version).collect();
        state.checkpoint = 1;
        Checkpoint {
            epoch: volume.epoch,
            n: 1,
            done: 0,
            next: state.next,
            closed: false,
            replays: state.replays.clone(),
            parts: base.parts.clone(),
            ..base.clone()
        }
    };
    let body = Data::shared(root.encode(volume.id));
    if !bucket.put_if_absent(&key::map(volume.epoch, 1), body).await? {
        return Err(taken_over(bucket).await);
    }
    let before = (base.epoch > 0).then(|| key::map(base.epoch, base.n));
    let gone = keys_of(&base.gone).chain(before);
    if bucket.delete_many(gone).await.is_ok() {
        volume.state().gone = Gone::default();
    }
    Ok(())
}

/// Leaves a volume in order: everything is durable in its block, and other hosts may open it. Gives up after `time`, and then
/// all that was acknowledged is in commits.
pub(crate) async fn close(volume: &Arc<Volume>, time: Duration) -> Result<()> {
    let leave = async {
        volume.flush().await?;
        volume.state().closing = true;
        volume.settle().await
    };
    let left = rt::timeout(time, leave).await;
    let late =
        || Error::new(Kind::Unavailable, "the store does not take what is left in time: it stays in commits");
    let left = left.unwrap_or_else(|| Err(late()));
    volume.leave();
    left
}
