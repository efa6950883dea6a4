//! What goes to the bucket, and when: commits, blocks, checkpoints, deletions. One task for each open volume.

use super::claims::taken_over;
use super::format::{Checkpoint, Commit, Entry, Gone, Span, encode_part};
use super::key;
use super::pieces::{Fill, Pieces};
use super::volume::{BATCH, Batch, ENTRIES, State, Volume};
use blockmason::data::Data;
use blockmason::{Result, rt};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Commits that may be on their way at once.
pub(super) const COMMITS: usize = 4;
/// A second commit begins beside the first only if it has so much.
const WORTH: u64 = BATCH / 4;
/// Objects that are put at once for one commit, or when blocks are settled.
const PUTS: usize = 16;
/// Commits after which there is a checkpoint, so that opening has an end.
const MOST_COMMITS: u64 = 1024;
/// What nothing leads to any more, and waits for a checkpoint to be deleted.
const MOST_DOOMED: usize = 4096;
/// The most blocks that a checkpoint names as gone; the rest comes with later ones.
const MOST_NAMED: usize = 1 << 20;
/// Blocks that are settled before there is a checkpoint.
const SETTLE_AT_ONCE: usize = 256;

/// A batch on its way.
struct Sealed {
    number: u64,
    pieces: Pieces,
    /// Whole blocks, each with the version that its object gets; 0 where it becomes a hole.
    blocks: BTreeMap<u64, u64>,
    commit: Commit,
    /// Bytes of the commit's object.
    len: u64,
}

/// Runs until the volume is left or lost.
pub(crate) async fn keep(volume: Arc<Volume>) {
    let mut commits = FuturesUnordered::new();
    let mut arrived: BTreeMap<u64, Sealed> = BTreeMap::new();
    let mut settling: Option<BoxFuture<'static, Result<()>>> = None;
    loop {
        match seal(&volume, commits.len() + arrived.len()) {
            Ok(Some(sealed)) => {
                // The next batch has room for those who found this one full.
                volume.progress.send_modify(|progress| progress.freed += 1);
                commits.push(commit(volume.clone(), sealed).boxed());
                continue;
            }
            Ok(None) => {}
            Err(error) => volume.die(error.kind(), &error.to_string()),
        }
        if settling.is_none() && wants_settling(&volume) {
            settling = Some(settle(volume.clone()).boxed());
        }
        if is_over(&volume, commits.is_empty() && settling.is_none()) {
            return;
        }
        let settled = async {
            match &mut settling {
                Some(settling) => settling.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            done = commits.next(), if !commits.is_empty() => match done {
                Some(Ok(sealed)) => {
                    arrived.insert(sealed.number, sealed);
                    in_order(&volume, &mut arrived);
                }
                Some(Err(error)) => volume.die(error.kind(), &error.to_string()),
                None => {}
            },
            done = settled => {
                settling = None;
                if let Err(error) = done {
                    volume.die(error.kind(), &error.to_string());
                }
            }
            () = volume.work.notified() => {}
            () = rt::sleep(Duration::from_secs(1)) => {}
        }
    }
}

fn is_over(volume: &Volume, idle: bool) -> bool {
    let state = volume.state();
    state.dead.is_some()
        || (state.closing && idle && state.asked == state.answered && state.open.pieces.is_empty())
}

/// Closes the open batch, if it is time. Of those under way, one may be missing in the bucket while all others are there: more than
/// [`COMMITS`] would be taken for a loss.
fn seal(volume: &Volume, under_way: usize) -> Result<Option<Sealed>> {
    let mut state = volume.state();
    let batch = &state.open;
    let wanted = batch.due || state.closing;
    let now = under_way == 0 || (under_way < COMMITS && batch.pieces.bytes() >= WORTH);
    if state.dead.is_some() || batch.pieces.is_empty() || !wanted || !now {
        return Ok(None);
    }
    let batch = std::mem::take(&mut state.open);
    state.sealed += 1;
    state.serial += 1;
    state.committer = volume.epoch;
    build(volume, &mut state, batch).map(Some)
}

/// What a batch says, and which objects it needs.
fn build(volume: &Volume, state: &mut State, batch: Batch) -> Result<Sealed> {
    let number = state.sealed;
    let mut blocks = BTreeMap::new();
    // Many small pieces of one block stand in a row: it is looked at once.
    let mut looked = None;
    for (offset, piece) in batch.pieces.iter().filter(|(_, piece)| matches!(piece.fill, Fill::Data(_))) {
        for part in volume.by_block(offset..offset + piece.len) {
            let block = part.start / volume.block;
            if looked.replace(block) != Some(block) && batch.pieces.covers(volume.range_of(block, state.size))
            {
                let zero = contents(&batch.pieces, volume.range_of(block, state.size)).is_zero();
                let version = if zero { 0 } else { state.version(volume.epoch)? };
                blocks.insert(block, version);
            }
        }
    }
    let entries = entries(volume, state.size, &batch.pieces, &blocks);
    let commit = Commit { epoch: volume.epoch, n: number, serial: state.serial, entries };
    Ok(Sealed { number, pieces: batch.pieces, blocks, commit, len: 0 })
}

fn entries(volume: &Volume, size: u64, pieces: &Pieces, blocks: &BTreeMap<u64, u64>) -> Vec<Entry> {
    let mut entries: Vec<Entry> = blocks
        .iter()
        .map(|(block, version)| match version {
            0 => {
                let range = volume.range_of(*block, size);
                Entry::Zeros { offset: range.start, len: range.end - range.start }
            }
            version => Entry::Block { block: *block, version: *version },
        })
        .collect();
    for (offset, piece) in pieces.iter() {
        match &piece.fill {
            // Where a block of its own covers part of it, this says the same, or comes to nothing.
            Fill::Zeros => entries.extend(zeros(volume, offset..offset + piece.len, blocks)),
            Fill::Data(data) => {
                for part in volume.by_block(offset..offset + piece.len) {
                    if !blocks.contains_key(&(part.start / volume.block)) {
                        let data = data.slice((part.start - offset) as usize..(part.end - offset) as usize);
                        entries.push(Entry::Piece { offset: part.start, data });
                    }
                }
            }
        }
    }
    entries
}

/// A range of zeros but for the blocks that have an entry of their own.
fn zeros(volume: &Volume, range: Range<u64>, blocks: &BTreeMap<u64, u64>) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = range.start;
    let within = blocks.range(range.start / volume.block..range.end.div_ceil(volume.block));
    for block in within.map(|(block, _)| *block) {
        let start = (block * volume.block).max(range.start);
        if at < start {
            entries.push(Entry::Zeros { offset: at, len: start - at });
        }
        at = ((block + 1) * volume.block).min(range.end);
    }
    if at < range.end {
        entries.push(Entry::Zeros { offset: at, len: range.end - at });
    }
    entries
}

/// What the pieces hold of a range that they cover.
fn contents(pieces: &Pieces, range: Range<u64>) -> Data {
    let parts = pieces.over(range);
    Data::concat(parts.into_iter().map(|(part, fill)| {
        let len = part.end - part.start;
        fill.unwrap_or(Fill::Zeros).data(len)
    }))
}

/// Does not give up: what was taken from guests is to get there, and only then are they answered.
async fn insist<T, F>(volume: &Volume, what: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    let mut said = false;
    loop {
        let error = match what().await {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        volume.state().alive()?;
        if !std::mem::replace(&mut said, true) {
            (volume.say)(&format!("{error}; it is tried again"));
        }
        rt::sleep(Duration::from_secs(2)).await;
    }
}

/// Puts objects, some at once.
async fn put_all(volume: &Arc<Volume>, objects: Vec<(String, Data)>) -> Result<()> {
    let puts = objects.into_iter().map(|(key, body)| {
        let volume = volume.clone();
        async move { insist(&volume, || volume.bucket.put(&key, body.clone())).await }
    });
    futures::stream::iter(puts).buffer_unordered(PUTS).try_collect().await
}

/// Puts the objects of a batch, then its commit.
async fn commit(volume: Arc<Volume>, mut sealed: Sealed) -> Result<Sealed> {
    let size = volume.state().size;
    let mut objects = Vec::new();
    for (block, version) in sealed.blocks.iter().filter(|(_, version)| **version != 0) {
        let body = contents(&sealed.pieces, volume.range_of(*block, size));
        objects.push((key::block(*block, *version), body));
    }
    put_all(&volume, objects).await?;
    let body = Data::shared(sealed.commit.encode(volume.id));
    sealed.len = body.len() as u64;
    let key = key::wal(volume.epoch, sealed.number);
    let ours = insist(&volume, || volume.bucket.put_if_absent(&key, body.clone())).await?;
    if ours { Ok(sealed) } else { Err(taken_over(&volume.bucket).await) }
}

/// Lets commits count, each after those before it.
fn in_order(volume: &Volume, arrived: &mut BTreeMap<u64, Sealed>) {
    let mut state = volume.state();
    while let Some(sealed) = arrived.remove(&(state.committed + 1)) {
        for entry in &sealed.commit.entries {
            apply(volume, &mut state, entry, sealed.number);
        }
        state.committed = sealed.number;
        state.logged.insert(sealed.number, sealed.len);
        state.covered.remove(&sealed.number);
    }
    let committed = state.committed;
    drop(state);
    volume.progress.send_modify(|progress| {
        progress.committed = committed;
        progress.freed += 1;
    });
}

/// What an entry of a commit means for the map. Pieces that it covers and that are no newer go.
pub(crate) fn apply(volume: &Volume, state: &mut State, entry: &Entry, batch: u64) {
    match entry {
        Entry::Piece { .. } => {}
        Entry::Block { block, version } => {
            state.settling.entry(*block).and_modify(|brought| *brought = true);
            let before = state.map.set(*block, *version);
            if before != *version {
                state.doom(*block, before);
            }
            state.pieces.cut_until(volume.range_of(*block, state.size), batch);
        }
        Entry::Zeros { offset, len } => {
            let end = offset + len;
            let last = if end == state.size { end.div_ceil(volume.block) } else { end / volume.block };
            let blocks = offset.div_ceil(volume.block)..last;
            if blocks.is_empty() {
                return;
            }
            state.settling.range_mut(blocks.clone()).for_each(|(_, brought)| *brought = true);
            let mut gone = Vec::new();
            state.map.clear(blocks.clone(), |block, version| gone.push((block, version)));
            for (block, version) in gone {
                state.doom(block, version);
            }
            let range = blocks.start * volume.block..(blocks.end * volume.block).min(state.size);
            state.pieces.cut_until(range, batch);
        }
    }
}

fn wants_settling(volume: &Volume) -> bool {
    let state = volume.state();
    if state.dead.is_some() {
        return false;
    }
    // At rest it is put off for as long as it can be. Writes find room all the same: the longest one waits only where more than
    // three quarters of the memory are in use, of which there are three batches at least.
    let (memory, times) = if state.rests { (volume.memory / 4 * 3, 2) } else { (volume.memory / 2, 1) };
    let many = state.pieces.bytes() > memory
        || state.pieces.len() > times * ENTRIES
        || state.committed - state.done > times as u64 * MOST_COMMITS
        || state.doomed.len() > times * MOST_DOOMED;
    let some = state.committed > state.done || !state.replays.is_empty();
    let idle = !state.rests && state.touched.elapsed() >= volume.idle;
    state.asked > state.answered || (state.settled != Some(state.committed) && (many || (some && idle)))
}

/// Brings committed pieces into their blocks, the oldest first, and makes a checkpoint.
async fn settle(volume: Arc<Volume>) -> Result<()> {
    let (asked, wanted) = {
        let mut state = volume.state();
        state.settled = Some(state.committed);
        (state.asked, state.asked > state.answered)
    };
    loop {
        let blocks = oldest_blocks(&volume);
        let last = blocks.len() < SETTLE_AT_ONCE;
        let settled = blocks.into_iter().map(|block| settle_block(volume.clone(), block));
        let () = futures::stream::iter(settled).buffer_unordered(PUTS).try_collect().await?;
        if last || !wanted {
            break;
        }
    }
    checkpoint(&volume).await?;
    volume.state().answered = asked;
    volume.progress.send_modify(|progress| progress.settled = asked);
    Ok(())
}

/// Blocks with committed pieces: those whose pieces are the oldest, so that the log may be cut.
fn oldest_blocks(volume: &Volume) -> Vec<u64> {
    let state = volume.state();
    let mut oldest: BTreeMap<u64, u64> = BTreeMap::new();
    for (offset, piece) in state.pieces.iter().filter(|(_, piece)| piece.batch <= state.committed) {
        for part in volume.by_block(offset..offset + piece.len) {
            let batch = oldest.entry(part.start / volume.block).or_insert(piece.batch);
            *batch = piece.batch.min(*batch);
        }
    }
    let mut blocks: Vec<(u64, u64)> = oldest.into_iter().map(|(block, batch)| (batch, block)).collect();
    blocks.sort_unstable();
    blocks.into_iter().take(SETTLE_AT_ONCE).map(|(_, block)| block).collect()
}

/// Writes one block anew, from what it was and what is committed since.
///
/// Its version is drawn before anything is waited for: if a commit brings a whole block meanwhile, that one counts.
async fn settle_block(volume: Arc<Volume>, block: u64) -> Result<()> {
    let volume = &volume;
    let (range, until, before, version, over) = {
        let mut state = volume.state();
        let (range, until) = (volume.range_of(block, state.size), state.committed);
        let over = committed_over(&state.pieces, range.clone(), until);
        if over.iter().all(|(_, fill)| fill.is_none()) {
            return Ok(());
        }
        let (before, version) = (state.map.get(block), state.version(volume.epoch)?);
        state.settling.insert(block, false);
        (range, until, before, version, over)
    };
    let whole = over.iter().all(|(_, fill)| fill.is_some());
    let base = if whole || before == 0 { None } else { Some(base_of(volume, block, before, &range).await?) };
    let body = Data::concat(over.into_iter().map(|(part, fill)| {
        let len = part.end - part.start;
        let of_base =
            |base: &Data| base.slice((part.start - range.start) as usize..(part.end - range.start) as usize);
        match (fill, &base) {
            (Some(fill), _) => fill.data(len),
            (None, Some(base)) => of_base(base),
            (None, None) => Data::zeros(len as usize),
        }
    }));
    let version = if body.is_zero() { 0 } else { version };
    if version != 0 {
        let key = key::block(block, version);
        insist(volume, || volume.bucket.put(&key, body.clone())).await?;
    }
    let mut state = volume.state();
    let brought = state.settling.remove(&block).unwrap_or(true);
    if !brought {
        state.map.set(block, version);
        state.doom(block, before);
        state.pieces.cut_until(range, until);
    } else {
        state.doom(block, version);
    }
    drop(state);
    volume.progress.send_modify(|progress| progress.freed += 1);
    Ok(())
}

/// What a block's object holds.
async fn base_of(volume: &Arc<Volume>, block: u64, version: u64, range: &Range<u64>) -> Result<Data> {
    let (key, len) = (key::block(block, version), range.end - range.start);
    match insist(volume, || volume.bucket.get_range(&key, 0..len)).await? {
        Some(data) => Ok(data),
        None => Err(volume.missing(&key)),
    }
}

/// What is committed of a range; what is newer counts as a gap.
fn committed_over(pieces: &Pieces, range: Range<u64>, until: u64) -> Vec<(Range<u64>, Option<Fill>)> {
    let mut committed = Pieces::default();
    for (offset, piece) in pieces.within(range.clone()).filter(|(_, piece)| piece.batch <= until) {
        committed.put(offset, piece.clone());
    }
    committed.over(range)
}

/// Makes the map durable, then deletes what nothing leads to any more.
async fn checkpoint(volume: &Arc<Volume>) -> Result<()> {
    let Drawn { mut root, parts, stay } = draw(volume, &mut volume.state())?;
    let mut objects = Vec::new();
    for (part, version, versions) in &parts {
        objects.push((key::part(*part, *version), Data::shared(encode_part(volume.id, *part, versions))));
    }
    put_all(volume, objects).await?;
    root.closed = volume.state().closing;
    let key = key::map(volume.epoch, root.n);
    let body = Data::shared(root.encode(volume.id));
    if !insist(volume, || volume.bucket.put_if_absent(&key, body.clone())).await? {
        return Err(taken_over(&volume.bucket).await);
    }
    {
        let mut state = volume.state();
        (state.done, state.checkpoint) = (root.done, root.n);
        state.logged = state.logged.split_off(&(root.done + 1));
        state.doomed.extend(stay);
    }
    let before = (root.n > 1).then(|| key::map(root.epoch, root.n - 1));
    match volume.bucket.delete_many(keys_of(&root.gone).chain(before)).await {
        Ok(()) => volume.state().gone = Gone::default(),
        // What is not deleted costs money, and nothing else: the next checkpoint names it again.
        Err(error) => (volume.say)(&format!("what is not needed any more stays in the bucket: {error}")),
    }
    Ok(())
}

/// A checkpoint of one instant.
struct Drawn {
    root: Checkpoint,
    /// Parts that are to be stored before: number, version, contents.
    parts: Vec<(u64, u64, Vec<u64>)>,
    /// What is doomed and must not go yet.
    stay: Vec<(u64, u64, u64)>,
}

/// The checkpoint of this instant.
fn draw(volume: &Volume, state: &mut State) -> Result<Drawn> {
    let oldest = state.oldest();
    let done = oldest.map_or(state.committed, |oldest| oldest.saturating_sub(1).min(state.committed));
    let replayed = oldest != Some(0);
    if done > state.done {
        state.gone.wals.push(Span { epoch: volume.epoch, first: state.done + 1, last: done });
    }
    let replays = if replayed { std::mem::take(&mut state.replays) } else { Vec::new() };
    state.gone.wals.extend(replays);
    let mut stay = Vec::new();
    for (block, version, after) in std::mem::take(&mut state.doomed) {
        if replayed && after <= done && state.gone.blocks.len() < MOST_NAMED {
            state.gone.blocks.push((block, version));
        } else {
            stay.push((block, version, after));
        }
    }
    let mut gone = std::mem::take(&mut state.gone.parts);
    let (epoch, mut next) = (volume.epoch, state.next);
    let parts = state.map.take_changed(
        || {
            next += 1;
            super::format::version(epoch, next - 1)
        },
        &mut gone,
    )?;
    (state.next, state.gone.parts) = (next, gone);
    let root = Checkpoint {
        epoch,
        n: state.checkpoint + 1,
        size: state.size,
        done,
        next,
        serial: state.serial,
        closed: false,
        replays: state.replays.clone(),
        parts: state.map.stored(),
        gone: state.gone.clone(),
    };
    Ok(Drawn { root, parts, stay })
}

/// The keys of what is gone.
pub(crate) fn keys_of(gone: &Gone) -> impl Iterator<Item = String> {
    let wals = gone.wals.iter().flat_map(|span| (span.first..=span.last).map(|n| key::wal(span.epoch, n)));
    let parts = gone.parts.iter().map(|(part, version)| key::part(*part, *version));
    let blocks = gone.blocks.iter().map(|(block, version)| key::block(*block, *version));
    wals.chain(parts).chain(blocks)
}
