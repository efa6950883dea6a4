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

/// Extents that are given away at once, at most: 256 MiB of them, for which room is set aside.
const MOST_GRANT: u64 = 128;

/// Kept for what makes room: deletions, checkpoints.
const LEAST_SLOP: u64 = (16 << 20) / BLOCK;
const MOST_SLOP: u64 = (256 << 20) / BLOCK;

/// Blocks that somebody wants in a row.
#[derive(Clone, Copy)]
pub(super) struct Want {
    pub(super) least: u64,
    pub(super) most: u64,
}

/// An extent of ours.
struct Ours {
    epoch: u64,
    used: Map,
    committed: Map,
    /// Free blocks in it.
    free: u16,
    /// What the pool is on has room for all of it.
    backed: bool,
}

impl Ours {
    /// What the table says of it.
    fn record(&self, owner: u32) -> ExtentRecord {
        ExtentRecord { owner, epoch: self.epoch, used: self.committed, backed: self.backed }
    }
}

/// A pool has a million of them for each 2 TiB: those that are not ours take next to nothing.
enum Extent {
    Nobodys,
    /// Somebody else's, or not to be given away.
    Foreign,
    Ours(Box<Ours>),
}

impl Extent {
    fn of(record: &ExtentRecord, owner: u32) -> Extent {
        match record.owner {
            0 => Extent::Nobodys,
            other if other == owner => Extent::Ours(Box::new(Ours {
                epoch: record.epoch,
                used: record.used,
                committed: record.used,
                free: (EXTENT - ones(&record.used)) as u16,
                backed: record.backed,
            })),
            _ => Extent::Foreign,
        }
    }

    fn ours(&self) -> Option<&Ours> {
        match self {
            Extent::Ours(ours) => Some(ours),
            Extent::Nobodys | Extent::Foreign => None,
        }
    }

    fn ours_mut(&mut self) -> Option<&mut Ours> {
        match self {
            Extent::Ours(ours) => Some(ours),
            Extent::Nobodys | Extent::Foreign => None,
        }
    }
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
    /// Free blocks in extents of ours for which there is room.
    free: u64,
    /// Free blocks in extents of ours for which room has to be set aside first.
    hollow: u64,
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

/// Reads the table of extents, and tells of each record, or of none where both copies are damaged.
async fn read_table(
    label: &Label,
    below: Below<'_>,
    mut each: impl FnMut(Option<ExtentRecord>),
) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let bytes = label.extents * EXTENT_RECORD;
    let [first, second] = label.record(0);
    for at in (0..bytes).step_by(PIECE as usize) {
        let len = PIECE.min(bytes - at);
        let (piece, mut copy) = match below.read(first + at, len).await {
            // Nobody's, as most are in a pool that is new or large.
            Ok(piece) if piece.is_zero() => {
                (0..len / EXTENT_RECORD).for_each(|_| each(Some(ExtentRecord::default())));
                continue;
            }
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
            each(found);
        }
    }
    Ok(())
}

/// Sets room aside for the first of these extents, as many as there is room for. Which those are.
///
/// # Errors
/// [`Kind::NoSpace`] if there is none for the first.
async fn allocate(mut extents: Range<u64>, below: Below<'_>) -> Result<Range<u64>> {
    loop {
        let count = extents.end - extents.start;
        match below.allocate(extents.start * EXTENT..extents.end * EXTENT).await {
            Err(error) if error.kind() == Kind::NoSpace && count > 1 => {
                extents.end = extents.start + count / 2
            }
            done => return done.map(|()| extents),
        }
    }
}

/// Says on the device that the pool has so many extents. The label that it has then.
///
/// # Errors
/// [`Kind::Invalid`] if it would be smaller, or larger than it can be.
pub(super) async fn write_size(mut label: Label, extents: u64, below: Below<'_>) -> Result<Label> {
    if extents < label.extents || extents > label.capacity {
        let size = |extents: u64| extents * EXTENT * BLOCK;
        let (now, most) = (size(label.extents), size(label.capacity));
        return Err(Error::invalid(match extents < label.extents {
            true => format!("the pool has {now} bytes, and pools do not shrink"),
            false => format!("the pool was made so that it can have {most} bytes at most; it has {now}"),
        }));
    }
    (label.extents, label.sequence) = (extents, label.sequence + 1);
    for place in Label::PLACES {
        below.write(place * BLOCK, Data::shared(label.encode())).await?;
        below.flush().await?;
    }
    Ok(label)
}

impl Space {
    /// Reads the space of a pool whose journal says this of some extents. One whose record is damaged counts as full, as
    /// ours.
    pub(super) async fn read(
        label: Label,
        owner: u32,
        epoch: u64,
        journal: &[(u64, ExtentRecord)],
        below: Below<'_>,
    ) -> Result<Space> {
        let mut extents = Vec::with_capacity(label.extents as usize);
        let full = ExtentRecord { owner, epoch: 0, used: [u64::MAX; 8], backed: true };
        read_table(&label, below, |record| extents.push(Extent::of(&record.unwrap_or(full), owner))).await?;
        for (extent, record) in journal {
            if let Some(extent) = extents.get_mut(*extent as usize) {
                // Room may have been given back since the journal was written; then the table says so.
                let backed = record.backed && extent.ours().is_some_and(|ours| ours.backed);
                *extent = Extent::of(&ExtentRecord { backed, ..*record }, owner);
            }
        }
        let first = label.first();
        extents.iter_mut().take(first as usize).for_each(|extent| *extent = Extent::Foreign);
        let free = |backed: bool| {
            let ours = extents.iter().filter_map(Extent::ours).filter(|ours| ours.backed == backed);
            ours.map(|ours| u64::from(ours.free)).sum()
        };
        let (free, hollow) = (free(true), free(false));
        let unowned = extents.iter().filter(|extent| matches!(extent, Extent::Nobodys)).count() as u64;
        let state = State { label, extents, free, hollow, unowned, reserved: 0, last: first };
        Ok(Space { owner, epoch, state: Mutex::new(state), granting: tokio::sync::Mutex::default() })
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
        (blocks / 64).clamp(LEAST_SLOP, MOST_SLOP).min(blocks / 8)
    }

    /// Free blocks, promised ones among them.
    pub(super) fn free(&self) -> u64 {
        self.state().all_free()
    }

    /// Free blocks for which room has been set aside.
    pub(super) fn backed(&self) -> u64 {
        self.state().free
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

    /// Promises blocks. So many others are kept for somebody else. False if more has to be [backed](Self::back) first.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if there are not so many beside those, and beside the slop, which only what makes room may use.
    pub(super) fn reserve(&self, blocks: u64, kept: u64, makes_room: bool) -> Result<bool> {
        let slop = if makes_room { self.slop() / 4 } else { self.slop() };
        let kept = if makes_room { 0 } else { kept };
        let mut state = self.state();
        if !state.has(blocks + slop + kept) {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let backed = state.reserved + blocks + slop <= state.free;
        state.reserved += if backed { blocks } else { 0 };
        Ok(backed)
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
            self.back(self.backed(), below).await?;
        }
    }

    /// What is kept for what makes room can be written, if that can be.
    ///
    /// # Errors
    /// Others than that there is no room.
    pub(super) async fn back_slop(&self, below: Below<'_>) -> Result<()> {
        loop {
            let had = self.backed();
            if had >= self.slop() {
                return Ok(());
            }
            match self.back(had, below).await {
                Err(error) if error.kind() == Kind::NoSpace => return Ok(()),
                done => done?,
            }
        }
    }

    /// The same of extents that are ours already; none if there are none.
    pub(super) fn take_now(&self, near: Option<u64>, want: Want) -> Option<Range<u64>> {
        self.state().take(near, want)
    }

    /// Takes everything that is free in the first extent of ours at or behind this one that has anything and is backed, as
    /// long as more than the slop is left. That extent, and the blocks, used from now on; the extent is not backed any more.
    pub(super) fn hollow_out(&self, from: u64) -> Option<(u64, Vec<Range<u64>>)> {
        let slop = self.slop();
        let mut state = self.state();
        let spare = state.free.saturating_sub(state.reserved + slop);
        let fits = |extent: &Extent| {
            extent.ours().is_some_and(|ours| ours.backed && (1..=spare).contains(&u64::from(ours.free)))
        };
        let at = (from..state.extents.len() as u64).find(|at| fits(&state.extents[*at as usize]))?;
        let (mut runs, mut next) = (Vec::new(), 0);
        let extent = state.extents[at as usize].ours_mut()?;
        while let Some(run) = free_run(&extent.used, next, Want { least: 1, most: EXTENT }) {
            if run.start < next {
                break;
            }
            next = run.end;
            let run = at * EXTENT + run.start..at * EXTENT + run.end;
            each_word(run.clone(), |_, word, mask| extent.used[word] |= mask);
            runs.push(run);
        }
        extent.backed = false;
        let taken = u64::from(std::mem::take(&mut extent.free));
        state.free -= taken;
        Some((at, runs))
    }

    /// Writes to the table what is known of extents.
    pub(super) async fn write_known(&self, extents: &[u64], below: Below<'_>) -> Result<()> {
        let records: Vec<(u64, ExtentRecord)> = {
            let state = self.state();
            let record = |at: &u64| Some((*at, state.extents[*at as usize].ours()?.record(self.owner)));
            extents.iter().filter_map(record).collect()
        };
        self.write_records(&records, below).await
    }

    /// Makes the pool larger, durably.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it would be smaller, or larger than it can be.
    pub(super) async fn grow(&self, extents: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let label = write_size(self.label(), extents, below).await?;
        let mut state = self.state();
        while (state.extents.len() as u64) < extents {
            state.extents.push(Extent::Nobodys);
            state.unowned += 1;
        }
        state.label = label;
        Ok(())
    }

    /// Marks blocks as used that a log or a tree knows of.
    pub(super) fn mark(&self, blocks: Range<u64>) -> Result<()> {
        let mut state = self.state();
        let (mut taken, mut hollow, mut foreign) = (0, 0, false);
        let all = state.extents.len() as u64;
        if blocks.end > all * EXTENT {
            return Err(damaged("a block lies outside the pool"));
        }
        each_word(blocks, |extent, word, mask| {
            let Some(extent) = state.extents[extent as usize].ours_mut() else {
                foreign = true;
                return;
            };
            let new = (mask & !extent.used[word]).count_ones();
            extent.used[word] |= mask;
            extent.free -= new as u16;
            *if extent.backed { &mut taken } else { &mut hollow } += u64::from(new);
        });
        state.free -= taken;
        state.hollow -= hollow;
        if foreign { Err(damaged("a block lies in an extent of somebody else")) } else { Ok(()) }
    }

    /// What was used is free.
    pub(super) fn give(&self, blocks: Range<u64>) {
        let mut state = self.state();
        let (mut freed, mut hollow) = (0, 0);
        each_word(blocks, |extent, word, mask| {
            let Some(extent) = state.extents.get_mut(extent as usize).and_then(Extent::ours_mut) else {
                return;
            };
            let old = (mask & extent.used[word]).count_ones();
            extent.used[word] &= !mask;
            extent.free += old as u16;
            *if extent.backed { &mut freed } else { &mut hollow } += u64::from(old);
        });
        state.free += freed;
        state.hollow += hollow;
    }

    /// Sets room aside for more extents: for those of ours that have something free, else for some that are nobody's and are
    /// ours from then on, durably. Returns at once if there is more free than whoever asks has seen.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn back(&self, had: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let (hollow, unowned) = {
            let state = self.state();
            if state.free > had {
                return Ok(());
            }
            let want = (state.label.extents / 16).clamp(1, MOST_GRANT);
            (state.hollow_near(want), state.unowned_near(want))
        };
        if !hollow.is_empty() {
            let hollow = allocate(hollow, below).await?;
            let mut state = self.state();
            for extent in hollow {
                let Some(extent) = state.extents[extent as usize].ours_mut().filter(|ours| !ours.backed)
                else {
                    continue;
                };
                extent.backed = true;
                let free = u64::from(extent.free);
                state.hollow -= free;
                state.free += free;
            }
            return Ok(());
        }
        if unowned.is_empty() {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let unowned = allocate(unowned, below).await?;
        self.grant(unowned, below).await
    }

    /// Makes extents ours that are nobody's, durably.
    async fn grant(&self, chosen: Range<u64>, below: Below<'_>) -> Result<()> {
        let record = ExtentRecord { owner: self.owner, epoch: self.epoch, used: [0; 8], backed: true };
        let bytes = record.encode().repeat((chosen.end - chosen.start) as usize);
        for place in self.label().record(chosen.start) {
            below.write(place, Data::copy_of(&bytes)).await?;
        }
        below.flush().await?;
        let mut state = self.state();
        for extent in chosen {
            state.extents[extent as usize] = Extent::of(&record, self.owner);
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
            let Some(now) = state.extents.get(*extent as usize).and_then(Extent::ours) else { continue };
            let used = std::array::from_fn(|ix| (now.committed[ix] | added[ix]) & !removed[ix]);
            more += ones(&used) as i64 - ones(&now.committed) as i64;
            records.push((*extent, ExtentRecord { used, ..now.record(self.owner) }));
        }
        (records, more)
    }

    /// The checkpoint is durable: these records are what counts. Writes them to the table.
    pub(super) async fn commit(&self, records: &[(u64, ExtentRecord)], below: Below<'_>) -> Result<()> {
        {
            let mut state = self.state();
            for (extent, record) in records {
                if let Some(extent) = state.extents[*extent as usize].ours_mut() {
                    extent.committed = record.used;
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

    /// Looks at both copies of the table, and writes records anew that are damaged in one. A sentence for each. The caller keeps
    /// checkpoints off.
    ///
    /// # Errors
    /// Neither copy can be read.
    pub(super) async fn examine(&self, below: Below<'_>) -> Result<Vec<String>> {
        const PIECE: u64 = 1 << 20;
        let _nobody_grants = self.granting.lock().await;
        let label = self.label();
        let (places, bytes) = (label.record(0), label.extents * EXTENT_RECORD);
        let mut problems = Vec::new();
        for at in (0..bytes).step_by(PIECE as usize) {
            let len = PIECE.min(bytes - at);
            let one = below.read(places[0] + at, len).await?.to_vec();
            let other = below.read(places[1] + at, len).await?.to_vec();
            if one == other {
                continue;
            }
            let each = EXTENT_RECORD as usize;
            for (ix, (one, other)) in one.chunks(each).zip(other.chunks(each)).enumerate() {
                let extent = at / EXTENT_RECORD + ix as u64;
                let (first, second) = (ExtentRecord::decode(one), ExtentRecord::decode(other));
                let Some(record) = first.or(second).filter(|_| one != other) else { continue };
                // Both are sound where a process has died between the two: nothing relies on that record yet.
                if first.is_none() || second.is_none() {
                    problems.push(format!(
                        "a copy of the record of extent {extent} was damaged, and is written anew"
                    ));
                }
                self.write_records(&[(extent, record)], below).await?;
            }
        }
        Ok(problems)
    }

    /// What is reachable, as the table says: blocks of ours that are used, by extent.
    pub(super) fn committed(&self) -> Vec<(u64, Map)> {
        let state = self.state();
        let maps = state.extents.iter().enumerate();
        maps.filter_map(|(ix, extent)| Some((ix as u64, extent.ours()?.committed))).collect()
    }

    /// Blocks that are promised: after a checkpoint, while nobody writes, none.
    #[cfg(test)]
    pub(super) fn promised(&self) -> u64 {
        self.state().reserved
    }

    /// Blocks that are used and not committed, but for these: after a checkpoint that nobody has seen the time before, none.
    #[cfg(test)]
    pub(super) fn leaked(&self, known: &[u64]) -> Vec<u64> {
        let state = self.state();
        let maps = state.extents.iter().enumerate().filter_map(|(ix, extent)| Some((ix, extent.ours()?)));
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
        self.reserved + blocks <= self.all_free()
    }

    fn all_free(&self) -> u64 {
        self.free + self.hollow + self.unowned * EXTENT
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
            let found = self.extents[extent as usize].ours_mut();
            let found = found.filter(|found| found.free > 0 && found.backed);
            let Some(found) = found else { continue };
            let Some(run) = free_run(&found.used, from, want) else { continue };
            let run = extent * EXTENT + run.start..extent * EXTENT + run.end;
            each_word(run.clone(), |_, word, mask| found.used[word] |= mask);
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
        self.row_near(want, |extent| matches!(extent, Extent::Nobodys))
    }

    /// The same of those of ours that are not backed, and have something free.
    fn hollow_near(&self, want: u64) -> Range<u64> {
        match self.hollow {
            0 => 0..0,
            _ => {
                self.row_near(want, |extent| extent.ours().is_some_and(|ours| !ours.backed && ours.free > 0))
            }
        }
    }

    fn row_near(&self, want: u64, is: impl Fn(&Extent) -> bool) -> Range<u64> {
        let is = |ix: &u64| is(&self.extents[*ix as usize]);
        let count = self.extents.len() as u64;
        let Some(start) = (self.last..count).chain(0..self.last).find(is) else { return 0..0 };
        let end = count.min(start + want);
        start..(start..end).find(|ix| !is(ix)).unwrap_or(end)
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
