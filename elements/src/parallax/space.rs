//! The block store: whose each extent is, and which blocks are free.
//!
//! Two maps for each extent: what is *used* now, from which blocks are given out, and what is *committed*, which is what
//! the extent's record says: reachable from the newest root. A block is used before it is committed, and stays used
//! until nobody can read it any more.

use super::below::Below;
use super::format::{BLOCK, EXTENT, EXTENT_RECORD, ExtentRecord, Label, damaged};
use blockmason::{Data, Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Map = [u64; 8];

/// Extents that are given away at once, at most: 2 GiB of them.
const MOST_GRANT: u64 = 1024;

/// Kept for what makes room: deletions, checkpoints.
const LEAST_SLOP: u64 = (16 << 20) / BLOCK;

/// Blocks that somebody wants in a row.
#[derive(Clone, Copy)]
pub(super) struct Want {
    pub(super) least: u64,
    pub(super) most: u64,
}

#[derive(Clone, Copy)]
struct Maps {
    used: Map,
    committed: Map,
}

/// One extent: of somebody else, or free, if there are no maps.
struct Extent {
    record: ExtentRecord,
    maps: Option<Box<Maps>>,
    /// Free blocks in it.
    free: u16,
}

/// What changes in the records of extents with a checkpoint.
#[derive(Default)]
pub(super) struct Difference {
    /// By extent: blocks that have become reachable, and blocks that are not any more.
    extents: BTreeMap<u64, (Map, Map)>,
}

impl Difference {
    pub(super) fn add(&mut self, blocks: Range<u64>) {
        each_word(blocks, |extent, word, mask| self.extents.entry(extent).or_default().0[word] |= mask);
    }

    pub(super) fn remove(&mut self, blocks: Range<u64>) {
        each_word(blocks, |extent, word, mask| self.extents.entry(extent).or_default().1[word] |= mask);
    }
}

/// Splits blocks into words of the maps of extents.
fn each_word(blocks: Range<u64>, mut each: impl FnMut(u64, usize, u64)) {
    let mut at = blocks.start;
    while at < blocks.end {
        let end = blocks.end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
        each(at / EXTENT, (at % EXTENT / 64) as usize, mask);
        at = end;
    }
}

struct State {
    label: Label,
    extents: Vec<Extent>,
    /// Free blocks in extents of ours.
    free: u64,
    /// Extents that are nobody's.
    unowned: u64,
    /// Blocks that are promised to what is not written yet.
    reserved: u64,
    /// The extent from which blocks were given out last.
    last: u64,
}

pub(super) struct Space {
    owner: u32,
    epoch: u64,
    state: Mutex<State>,
    granting: tokio::sync::Mutex<()>,
}

/// Reads the table of extents: records, or none where both copies are damaged.
pub(super) async fn read_table(label: &Label, below: Below<'_>) -> Result<Vec<Option<ExtentRecord>>> {
    const PIECE: u64 = 1 << 20;
    let mut records = Vec::with_capacity(label.extents as usize);
    let bytes = label.extents * EXTENT_RECORD;
    let [first, second] = label.record(0);
    let mut at = 0;
    while at < bytes {
        let len = PIECE.min(bytes - at);
        let (piece, mut copy) = match below.read(first + at, len).await {
            Ok(piece) => (piece.to_vec(), None),
            // There is no other copy left to compare with.
            Err(_) => (below.read(second + at, len).await?.to_vec(), Some(Vec::new())),
        };
        for (ix, record) in piece.chunks(EXTENT_RECORD as usize).enumerate() {
            let mut found = ExtentRecord::decode(record);
            if found.is_none() {
                if copy.is_none() {
                    let other = below.read(second + at, len).await;
                    copy = Some(other.map(|other| other.to_vec()).unwrap_or_default());
                }
                let place = ix * EXTENT_RECORD as usize;
                let other = copy.as_ref().and_then(|copy| copy.get(place..place + EXTENT_RECORD as usize));
                found = other.and_then(ExtentRecord::decode);
            }
            records.push(found);
        }
        at += len;
    }
    Ok(records)
}

impl Space {
    /// Of a pool with this table. An extent whose record is damaged counts as full, as ours.
    pub(super) fn new(label: Label, owner: u32, epoch: u64, table: Vec<Option<ExtentRecord>>) -> Space {
        let first = label.first();
        let (extents, last) = (Vec::new(), first);
        let mut state = State { label, extents, free: 0, unowned: 0, reserved: 0, last };
        for (ix, record) in table.into_iter().enumerate() {
            let record = record.unwrap_or(ExtentRecord { owner, epoch: 0, used: [u64::MAX; 8] });
            let mut extent = Extent { record, maps: None, free: 0 };
            if (ix as u64) < first {
                extent.record.owner = 1;
            } else if record.owner == owner {
                extent.maps = Some(Box::new(Maps { used: record.used, committed: record.used }));
                extent.free = (EXTENT - ones(&record.used)) as u16;
                state.free += u64::from(extent.free);
            } else if record.owner == 0 {
                state.unowned += 1;
            }
            state.extents.push(extent);
        }
        Space { owner, epoch, state: Mutex::new(state), granting: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn label(&self) -> Label {
        self.state().label.clone()
    }

    /// Blocks that nobody but the pool itself may use.
    pub(super) fn slop(&self) -> u64 {
        let blocks = self.state().extents.len() as u64 * EXTENT;
        (blocks / 64).max(LEAST_SLOP).min(blocks / 8)
    }

    /// Free blocks, promised ones among them.
    pub(super) fn free(&self) -> u64 {
        let state = self.state();
        state.free + state.unowned * EXTENT
    }

    /// Blocks of the pool that can hold anything.
    pub(super) fn all(&self) -> u64 {
        let label = self.label();
        (label.extents - label.first()) * EXTENT
    }

    /// True if so many blocks could be promised.
    pub(super) fn has_room(&self, blocks: u64) -> bool {
        let slop = self.slop();
        self.state().has(blocks + slop)
    }

    /// Promises blocks. So many others are kept for somebody else.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if there are not so many beside those, and beside the slop, which only what makes room may use.
    pub(super) fn reserve(&self, blocks: u64, kept: u64, makes_room: bool) -> Result<()> {
        let apart = if makes_room { self.slop() / 4 } else { self.slop() + kept };
        let mut state = self.state();
        if !state.has(blocks + apart) {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        state.reserved += blocks;
        Ok(())
    }

    /// Takes a promise back: it is kept, or not needed.
    pub(super) fn release(&self, blocks: u64) {
        let mut state = self.state();
        state.reserved = state.reserved.saturating_sub(blocks);
    }

    /// Free blocks in a row, as many as are wanted if that can be, close behind `near`. Used from now on.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn take(&self, near: Option<u64>, want: Want, below: Below<'_>) -> Result<Range<u64>> {
        loop {
            if let Some(found) = self.take_now(near, want) {
                return Ok(found);
            }
            self.grant(below).await?;
        }
    }

    /// The same of extents that are ours already; none if there are none.
    pub(super) fn take_now(&self, near: Option<u64>, want: Want) -> Option<Range<u64>> {
        self.state().take(near, want)
    }

    /// Takes everything that is free in the first extent of ours at or behind this one that has anything. That extent, and the
    /// blocks, used from now on.
    pub(super) fn take_free(&self, from: u64) -> Option<(u64, Vec<Range<u64>>)> {
        let mut state = self.state();
        let has = |extent: &Extent| extent.maps.is_some() && extent.free > 0;
        let at = (from..state.extents.len() as u64).find(|at| has(&state.extents[*at as usize]))?;
        let (mut runs, mut next) = (Vec::new(), 0);
        let extent = &mut state.extents[at as usize];
        let maps = extent.maps.as_mut()?;
        while let Some(run) = free_run(&maps.used, next, Want { least: 1, most: EXTENT }) {
            if run.start < next {
                break;
            }
            next = run.end;
            let run = at * EXTENT + run.start..at * EXTENT + run.end;
            each_word(run.clone(), |_, word, mask| maps.used[word] |= mask);
            runs.push(run);
        }
        let taken = u64::from(std::mem::take(&mut extent.free));
        state.free -= taken;
        Some((at, runs))
    }

    /// Makes the pool larger, durably.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it would be smaller, or larger than it can be.
    pub(super) async fn grow(&self, extents: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let mut label = self.label();
        if extents < label.extents || extents > label.capacity {
            let size = |extents: u64| extents * EXTENT * BLOCK;
            let (now, most) = (size(label.extents), size(label.capacity));
            let message = format!("the pool has {now} bytes, and can have {most} at most: it was made so");
            return Err(Error::invalid(message));
        }
        (label.extents, label.sequence) = (extents, label.sequence + 1);
        for place in Label::PLACES {
            below.write(place * BLOCK, Data::shared(label.encode())).await?;
            below.flush().await?;
        }
        let mut state = self.state();
        while (state.extents.len() as u64) < extents {
            state.extents.push(Extent { record: ExtentRecord::default(), maps: None, free: 0 });
            state.unowned += 1;
        }
        state.label = label;
        Ok(())
    }

    /// Marks blocks as used that a log or a tree knows of.
    pub(super) fn mark(&self, blocks: Range<u64>) -> Result<()> {
        let mut state = self.state();
        let (mut taken, mut foreign) = (Vec::new(), false);
        let all = state.extents.len() as u64;
        if blocks.end > all * EXTENT {
            return Err(damaged("a block lies outside the pool"));
        }
        each_word(blocks, |extent, word, mask| {
            let extent = &mut state.extents[extent as usize];
            match &mut extent.maps {
                Some(maps) => {
                    let new = (mask & !maps.used[word]).count_ones();
                    maps.used[word] |= mask;
                    extent.free -= new as u16;
                    taken.push(u64::from(new));
                }
                None => foreign = true,
            }
        });
        state.free -= taken.into_iter().sum::<u64>();
        if foreign { Err(damaged("a block lies in an extent of somebody else")) } else { Ok(()) }
    }

    /// What was used is free.
    pub(super) fn give(&self, blocks: Range<u64>) {
        let mut state = self.state();
        let mut freed = 0;
        each_word(blocks, |extent, word, mask| {
            let Some(extent) = state.extents.get_mut(extent as usize) else { return };
            let Some(maps) = &mut extent.maps else { return };
            let old = (mask & maps.used[word]).count_ones();
            maps.used[word] &= !mask;
            extent.free += old as u16;
            freed += u64::from(old);
        });
        state.free += freed;
    }

    /// Makes extents ours that are nobody's, durably.
    async fn grant(&self, below: Below<'_>) -> Result<()> {
        let had = self.state().free;
        let _alone = self.granting.lock().await;
        let label = self.label();
        let chosen = {
            let state = self.state();
            if state.free > had {
                return Ok(());
            }
            let want = (label.extents / 64).clamp(1, MOST_GRANT);
            state.unowned_near(want)
        };
        if chosen.is_empty() {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let record = ExtentRecord { owner: self.owner, epoch: self.epoch, used: [0; 8] };
        let bytes = record.encode().repeat((chosen.end - chosen.start) as usize);
        for place in label.record(chosen.start) {
            below.write(place, Data::copy_of(&bytes)).await?;
        }
        below.flush().await?;
        let mut state = self.state();
        for extent in chosen {
            let extent = &mut state.extents[extent as usize];
            extent.record = record;
            extent.maps = Some(Box::new(Maps { used: [0; 8], committed: [0; 8] }));
            extent.free = EXTENT as u16;
            state.free += EXTENT;
            state.unowned -= 1;
        }
        Ok(())
    }

    /// The records as a checkpoint makes them, and how many more blocks are used by them.
    pub(super) fn records(&self, difference: &Difference) -> (Vec<(u64, ExtentRecord)>, i64) {
        let state = self.state();
        let (mut records, mut more) = (Vec::new(), 0);
        for (extent, (added, removed)) in &difference.extents {
            let Some(now) = state.extents.get(*extent as usize) else { continue };
            let Some(maps) = &now.maps else { continue };
            let used = std::array::from_fn(|ix| (maps.committed[ix] | added[ix]) & !removed[ix]);
            more += ones(&used) as i64 - ones(&maps.committed) as i64;
            records.push((*extent, ExtentRecord { used, ..now.record }));
        }
        (records, more)
    }

    /// The checkpoint is durable: these records are what counts. Writes them to the table.
    pub(super) async fn commit(&self, records: &[(u64, ExtentRecord)], below: Below<'_>) -> Result<()> {
        {
            let mut state = self.state();
            for (extent, record) in records {
                let extent = &mut state.extents[*extent as usize];
                extent.record = *record;
                if let Some(maps) = &mut extent.maps {
                    maps.committed = record.used;
                }
            }
        }
        self.write_records(records, below).await
    }

    /// Writes records to both copies of the table, neighbours at once.
    pub(super) async fn write_records(
        &self,
        records: &[(u64, ExtentRecord)],
        below: Below<'_>,
    ) -> Result<()> {
        let label = self.label();
        for row in records.chunk_by(|one, other| one.0 + 1 == other.0) {
            let bytes: Vec<u8> = row.iter().flat_map(|(_, record)| record.encode()).collect();
            let data = Data::shared(bytes);
            for place in label.record(row[0].0) {
                below.write(place, data.clone()).await?;
            }
        }
        Ok(())
    }

    /// What is reachable, as the table says: blocks of ours that are used, by extent.
    pub(super) fn committed(&self) -> Vec<(u64, Map)> {
        let state = self.state();
        let maps = state.extents.iter().enumerate();
        maps.filter_map(|(ix, extent)| Some((ix as u64, extent.maps.as_ref()?.committed))).collect()
    }

    /// Blocks that are used and not committed, but for these: after a checkpoint that nobody has seen the time before, none.
    #[cfg(test)]
    pub(super) fn leaked(&self, known: &[u64]) -> Vec<u64> {
        let state = self.state();
        let maps =
            state.extents.iter().enumerate().filter_map(|(ix, extent)| Some((ix, extent.maps.as_ref()?)));
        let blocks = maps.flat_map(|(extent, maps)| {
            let differs = move |ix: &u64| {
                let (word, bit) = ((ix / 64) as usize, ix % 64);
                (maps.used[word] ^ maps.committed[word]) >> bit & 1 == 1
            };
            (0..EXTENT).filter(differs).map(move |ix| extent as u64 * EXTENT + ix)
        });
        blocks.filter(|block| !known.contains(block)).collect()
    }
}

impl State {
    /// So many blocks are free and promised to nobody.
    fn has(&self, blocks: u64) -> bool {
        self.reserved + blocks <= self.free + self.unowned * EXTENT
    }

    fn take(&mut self, near: Option<u64>, want: Want) -> Option<Range<u64>> {
        if self.free == 0 {
            return None;
        }
        let near = near.unwrap_or(self.last * EXTENT);
        let (start, count) = (near / EXTENT, self.extents.len() as u64);
        // The neighbour's extent from there on, then all others, then what lies before the neighbour.
        let places = (0..=count).map(|ix| ((start + ix) % count, if ix == 0 { near % EXTENT } else { 0 }));
        for (extent, from) in places {
            let found = &mut self.extents[extent as usize];
            let Some(maps) = found.maps.as_mut().filter(|_| found.free > 0) else { continue };
            let Some(run) = free_run(&maps.used, from, want) else { continue };
            let run = extent * EXTENT + run.start..extent * EXTENT + run.end;
            each_word(run.clone(), |_, word, mask| maps.used[word] |= mask);
            let len = run.end - run.start;
            found.free -= len as u16;
            self.free -= len;
            self.last = extent;
            return Some(run);
        }
        None
    }

    /// Extents in a row that are nobody's, at most `want`, the first such row behind the last one used.
    fn unowned_near(&self, want: u64) -> Range<u64> {
        let free =
            |ix: u64| self.extents[ix as usize].maps.is_none() && self.extents[ix as usize].record.owner == 0;
        let count = self.extents.len() as u64;
        let start = (self.last..count).chain(0..self.last).find(|ix| free(*ix));
        let Some(start) = start else { return 0..0 };
        let end = (start..count.min(start + want)).find(|ix| !free(*ix)).unwrap_or(count.min(start + want));
        start..end
    }
}

fn ones(map: &Map) -> u64 {
    map.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The first free blocks at or behind `from` of which there are enough.
fn free_run(used: &Map, from: u64, want: Want) -> Option<Range<u64>> {
    let next = |at: u64, set: bool| {
        let mut at = at;
        while at < EXTENT {
            let word = used[(at / 64) as usize];
            let word = (if set { word } else { !word }) >> (at % 64);
            if word != 0 {
                return (at + u64::from(word.trailing_zeros())).min(EXTENT);
            }
            at = (at / 64 + 1) * 64;
        }
        EXTENT
    };
    let mut start = next(from, false);
    while start < EXTENT {
        let end = next(start, true);
        if end - start >= want.least {
            return Some(start..end.min(start + want.most));
        }
        start = next(end, false);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_free_run_is_the_first(
            bits in prop::collection::vec(any::<bool>(), 512), from in 0u64..512, least in 1u64..6, more in 0u64..9,
        ) {
            let mut map = [0; 8];
            (0..512).filter(|ix| bits[*ix]).for_each(|ix| map[ix / 64] |= 1 << (ix % 64));
            let free = |start: u64| (start..512).take_while(|ix| !bits[*ix as usize]).count() as u64;
            let start = (from..512).find(|start| free(*start) >= least);
            let wanted = start.map(|start| start..start + free(start).min(least + more));
            prop_assert_eq!(free_run(&map, from, Want { least, most: least + more }), wanted);
        }
    }
}
