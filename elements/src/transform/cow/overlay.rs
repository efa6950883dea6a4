//! An overlay that has been opened: which blocks are in it, and how its maps on disk are kept in step.
//!
//! Locks are taken in this order: a range of the disk, `flushing`, a map sector.

use super::bitmap::{Bitmap, join, mask, sectors};
use super::format::{Header, Layout, Map, PER_SECTOR, REGION, SECTOR, State, WORDS};
use super::io::{BASE, Io, OVERLAY};
use blockmason::sched::{Mode, RangeGuard, RangeLock};
use blockmason::{Data, Error, Flags, Kind, Result};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Bytes of a map that are read at once.
const MAP_READ: u64 = 1 << 20;

pub(super) struct Overlay {
    pub(super) layout: Layout,
    /// As it is on disk.
    header: Mutex<Header>,
    /// The header's state, to be read without a lock.
    state: AtomicU32,
    /// True if the header's incarnation is known.
    known: bool,
    /// Blocks that are in the overlay.
    pub(super) claimed: Bitmap,
    /// Those of them whose data and bit in the durable map are durable.
    pub(super) durable: Bitmap,
    /// Bytes of the disk: shared by changes of blocks where they are, held alone where blocks are copied,
    /// in all where the state changes. Reads hold nothing: what they find is never taken away, only
    /// copied and no longer looked for.
    pub(super) ranges: RangeLock,
    /// Map sectors that are being written.
    sectors: RangeLock,
    /// Blocks whose data has been written, but whose bit has not.
    pending: Mutex<BTreeSet<u64>>,
    /// Map sectors with blocks that are claimed and may not be durable.
    dirty: Mutex<BTreeSet<u64>>,
    /// Sectors of the claiming map of which a write has failed: they may say more than `claimed`.
    unsure: Mutex<BTreeSet<u64>>,
    /// Held by whoever changes the durable map.
    flushing: tokio::sync::Mutex<()>,
    broken: OnceLock<&'static str>,
    /// Changes and flushes from above so far.
    pub(super) served: AtomicU64,
}

/// A map is being written. If nobody sees the end of it, because the graph has failed, it may yet undo what
/// is written next.
struct Unknown<'a>(&'a OnceLock<&'static str>);

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        let _ = self.0.set("a write of the overlay's map was given up half-way; start the graph anew");
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change behind these locks is a single step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Overlay {
    /// Opens the overlay, and formats it first if it is new.
    pub(super) async fn open(io: &Io<'_>, layout: Layout) -> Result<Overlay> {
        let incarnation = io.incarnation().await;
        let region = io.read(OVERLAY, 0, REGION).await?.to_vec();
        let header = match Header::decode(&region, layout)? {
            Some(header) => header,
            None => format(io, layout).await?,
        };
        let (claimed, durable) = (Bitmap::new(layout.sectors()), Bitmap::new(layout.sectors()));
        load(io, &header, Map::Durable, &[&claimed, &durable]).await?;
        let mut next = Header { generation: header.generation + 1, incarnation, ..header.clone() };
        if next.incarnation.is_some() && next.incarnation == header.incarnation {
            load(io, &header, Map::Claimed, &[&claimed]).await?;
        } else {
            next.maps[Map::Claimed as usize] += 1;
        }
        // What was read of the durable map may not have been flushed; with this it is.
        write_header(io, &next).await?;
        let dirty = (0..layout.sectors()).filter(|sector| claimed.sector(*sector) != durable.sector(*sector));
        Ok(Overlay {
            layout,
            dirty: Mutex::new(dirty.collect()),
            state: AtomicU32::new(next.state as u32),
            known: next.incarnation.is_some(),
            header: Mutex::new(next),
            claimed,
            durable,
            ranges: RangeLock::default(),
            sectors: RangeLock::default(),
            pending: Mutex::default(),
            unsure: Mutex::default(),
            flushing: tokio::sync::Mutex::default(),
            broken: OnceLock::new(),
            served: AtomicU64::new(0),
        })
    }

    /// True if the overlay disk of another graph is this one, still as this opened it.
    pub(super) async fn is_at(&self, io: &Io<'_>, layout: Layout) -> Result<bool> {
        let header = lock(&self.header).clone();
        if self.check().is_err() || layout != self.layout || io.incarnation().await != header.incarnation {
            return Ok(false);
        }
        let region = io.read(OVERLAY, 0, REGION).await?.to_vec();
        let found = Header::decode(&region, layout)?;
        Ok(found.is_some_and(|found| found.id == header.id && found.generation == header.generation))
    }

    pub(super) fn state(&self) -> State {
        State::from(self.state.load(Ordering::Acquire)).unwrap_or(State::Overlaying)
    }

    /// Refuses to go on with an overlay that on disk may not be what it is in memory.
    pub(super) fn check(&self) -> Result<()> {
        match self.broken.get() {
            Some(why) => Err(Error::new(Kind::Io, *why)),
            None => Ok(()),
        }
    }

    /// What the data of a new block must be before its bit is written.
    pub(super) fn first_flags(&self) -> Flags {
        if self.known { Flags::NONE } else { Flags::FUA }
    }

    fn claiming(&self) -> Map {
        if self.known { Map::Claimed } else { Map::Durable }
    }

    async fn write_map(&self, io: &Io<'_>, map: Map, sector: u64, words: &[u64; WORDS]) -> Result<()> {
        let bytes = lock(&self.header).encode_map(map, sector, words);
        let outcome = Unknown(&self.broken);
        let written =
            io.write(OVERLAY, self.layout.place(map, sector), Data::shared(bytes), Flags::NONE).await;
        std::mem::forget(outcome);
        written
    }

    /// Puts blocks into the overlay: their data has been written. Their bits have been when this returns.
    pub(super) async fn claim(&self, io: &Io<'_>, blocks: Range<u64>) -> Result<()> {
        for sector in sectors(&blocks) {
            let part = blocks.start.max(sector * PER_SECTOR)..blocks.end.min((sector + 1) * PER_SECTOR);
            lock(&self.pending).extend(part.clone().filter(|block| !self.claimed.has(*block)));
            let place = sector..sector + 1;
            let _alone = self.sectors.claim(io.holder("claim"), Mode::Exclusive, &[place]).await;
            // Whoever had the sector before has written this along with his own.
            if self.claimed.all(part.clone()) {
                continue;
            }
            let all = sector * PER_SECTOR..(sector + 1) * PER_SECTOR;
            let taken: BTreeSet<u64> = lock(&self.pending).range(all).copied().collect();
            let new = taken.iter().fold([0; WORDS], |words, block| {
                join(&words, &mask(sector, &(*block..block + 1)), |a, b| a | b)
            });
            let image = join(&self.claimed.sector(sector), &new, |a, b| a | b);
            if let Err(error) = self.write_map(io, self.claiming(), sector, &image).await {
                lock(&self.unsure).insert(sector);
                lock(&self.pending).retain(|block| !part.contains(block));
                return Err(error);
            }
            self.claimed.insert(sector, &new);
            lock(&self.dirty).insert(sector);
            lock(&self.unsure).remove(&sector);
            let mut pending = lock(&self.pending);
            pending.retain(|block| !taken.contains(block));
        }
        Ok(())
    }

    /// Makes durable what was answered before: data first, then what says that it is there.
    pub(super) async fn persist(&self, io: &Io<'_>) -> Result<()> {
        let _alone = self.flushing.lock().await;
        let sectors: Vec<u64> = lock(&self.dirty).iter().copied().collect();
        let new: Vec<_> = sectors
            .iter()
            .map(|sector| join(&self.claimed.sector(*sector), &self.durable.sector(*sector), |a, b| a & !b))
            .collect();
        io.flush(OVERLAY).await?;
        if self.known && !sectors.is_empty() {
            self.check_incarnation(io).await?;
            for (sector, new) in sectors.iter().zip(&new) {
                let image = join(&self.durable.sector(*sector), new, |a, b| a | b);
                self.write_map(io, Map::Durable, *sector, &image).await?;
            }
            io.flush(OVERLAY).await?;
        }
        for (sector, new) in sectors.into_iter().zip(new) {
            self.durable.insert(sector, &new);
            let mut dirty = lock(&self.dirty);
            // A block that was claimed meanwhile set its bit before it came for `dirty`.
            if self.claimed.sector(sector) == self.durable.sector(sector) {
                dirty.remove(&sector);
            }
        }
        Ok(())
    }

    /// Blocks whose data went with the power must not be called durable.
    async fn check_incarnation(&self, io: &Io<'_>) -> Result<()> {
        let expected = lock(&self.header).incarnation.clone();
        if io.incarnation().await != expected {
            let why = "the overlay's disk has lost its power or is another one, and what was not flushed may \
                       be lost; start the graph anew to go on with what was";
            let _ = self.broken.set(why);
        }
        self.check()
    }

    /// Takes blocks out of the overlay: the base has them, durably. The caller holds their ranges, and no
    /// block is being claimed. Nothing on disk speaks for them when this returns, whatever crashes.
    pub(super) async fn release(&self, io: &Io<'_>, blocks: &[Range<u64>]) -> Result<()> {
        let _alone = self.flushing.lock().await;
        let touched: BTreeSet<u64> = blocks.iter().flat_map(sectors).collect();
        let masks = touched.into_iter().map(|sector| {
            let masks = blocks.iter().map(|run| mask(sector, run));
            (sector, masks.fold([0; WORDS], |all, mask| join(&all, &mask, |a, b| a | b)))
        });
        let gone: Vec<(u64, [u64; WORDS])> = masks.collect();
        let undurable = self.release_durable(io, &gone).await;
        let released = match (undurable, self.known) {
            (Ok(()), true) => self.release_claimed(io, &gone).await,
            // The claims still stand; the next flush makes them durable again.
            (Err(error), true) => return Err(error),
            (undurable, false) => undurable,
        };
        if released.is_err() {
            let why = "the overlay's map could not be written and may say that blocks are in the base that \
                       are not; start the graph anew";
            let _ = self.broken.set(why);
        } else {
            gone.iter().for_each(|(sector, gone)| self.claimed.remove(*sector, gone));
        }
        released
    }

    async fn release_durable(&self, io: &Io<'_>, gone: &[(u64, [u64; WORDS])]) -> Result<()> {
        for (sector, gone) in gone {
            self.durable.remove(*sector, gone);
            lock(&self.dirty).insert(*sector);
            let left = if self.known { self.durable.sector(*sector) } else { self.claimed.sector(*sector) };
            let left = join(&left, gone, |a, b| a & !b);
            self.write_map(io, Map::Durable, *sector, &left).await?;
        }
        io.flush(OVERLAY).await
    }

    async fn release_claimed(&self, io: &Io<'_>, gone: &[(u64, [u64; WORDS])]) -> Result<()> {
        for (sector, gone) in gone {
            let left = join(&self.claimed.sector(*sector), gone, |a, b| a & !b);
            self.write_map(io, Map::Claimed, *sector, &left).await?;
        }
        Ok(())
    }

    /// Holds all of the disk: nothing is being changed meanwhile.
    async fn everything(&self, io: &Io<'_>, doing: &'static str) -> RangeGuard<'_> {
        let all = 0..u64::MAX;
        self.ranges.claim(io.holder(doing), Mode::Exclusive, &[all]).await
    }

    /// Writes the header as `change` makes it, durably. The caller holds all ranges.
    async fn change_header(&self, io: &Io<'_>, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut next = lock(&self.header).clone();
        change(&mut next);
        if let Err(error) = write_header(io, &next).await {
            let why = "the overlay's header could not be written and may be the old or the new one; start \
                       the graph anew to find out";
            let _ = self.broken.set(why);
            return Err(error);
        }
        self.state.store(next.state as u32, Ordering::Release);
        *lock(&self.header) = next;
        Ok(())
    }

    /// From now on blocks only leave the overlay; what is not in it is the base's.
    pub(super) async fn start_commit(&self, io: &Io<'_>) -> Result<()> {
        let _all = self.everything(io, "commit").await;
        self.check()?;
        // The base must not be written under a claim that failed in memory and succeeded on disk.
        let unsure: Vec<u64> = lock(&self.unsure).iter().copied().collect();
        for sector in unsure {
            self.write_map(io, self.claiming(), sector, &self.claimed.sector(sector)).await?;
            lock(&self.unsure).remove(&sector);
        }
        self.change_header(io, |header| header.state = State::Committing).await
    }

    /// Ends a commit if nothing is left to do.
    pub(super) async fn end_commit(&self, io: &Io<'_>) -> Result<()> {
        let _all = self.everything(io, "commit").await;
        self.check()?;
        self.change_header(io, |header| header.state = State::Committed).await
    }

    /// Forgets all blocks, durably. What was written to the base since a commit is durable too: it is what the
    /// disk is from now on.
    pub(super) async fn discard(&self, io: &Io<'_>) -> Result<()> {
        let _all = self.everything(io, "discard").await;
        let _alone = self.flushing.lock().await;
        self.check()?;
        io.flush(BASE).await?;
        self.change_header(io, |header| {
            header.state = State::Overlaying;
            header.maps.iter_mut().for_each(|generation| *generation += 1);
        })
        .await?;
        self.claimed.clear();
        self.durable.clear();
        lock(&self.dirty).clear();
        lock(&self.unsure).clear();
        Ok(())
    }

    /// Bytes of the blocks in the overlay.
    pub(super) fn bytes(&self) -> u64 {
        let (last, short) = (self.layout.blocks().saturating_sub(1), self.layout.size % self.layout.block);
        let missing = if short > 0 && self.claimed.has(last) { self.layout.block - short } else { 0 };
        self.claimed.count() * self.layout.block - missing
    }

    /// Counts a request from above.
    pub(super) fn count(&self) {
        self.served.fetch_add(1, Ordering::Relaxed);
    }
}

async fn write_header(io: &Io<'_>, header: &Header) -> Result<()> {
    io.write(OVERLAY, 0, Data::shared(header.encode()), Flags::NONE).await?;
    io.flush(OVERLAY).await
}

/// Makes an overlay without blocks. Until the header is there, last, it is a new one.
async fn format(io: &Io<'_>, layout: Layout) -> Result<Header> {
    let maps = layout.data() - REGION;
    if maps > 0 {
        io.zero(OVERLAY, REGION, maps).await?;
        io.flush(OVERLAY).await?;
    }
    let mut id = [0; 16];
    io.cx.rng(|rng| rng.fill(&mut id));
    let header =
        Header { layout, id, generation: 0, maps: [1, 1], state: State::Overlaying, incarnation: None };
    write_header(io, &header).await?;
    Ok(header)
}

/// Adds the blocks of a map on disk to maps in memory.
async fn load(io: &Io<'_>, header: &Header, map: Map, into: &[&Bitmap]) -> Result<()> {
    let all = header.layout.sectors();
    for first in (0..all).step_by((MAP_READ / SECTOR) as usize) {
        let count = (all - first).min(MAP_READ / SECTOR);
        let bytes = io.read(OVERLAY, header.layout.place(map, first), count * SECTOR).await?.to_vec();
        for (sector, bytes) in (first..first + count).zip(bytes.chunks_exact(SECTOR as usize)) {
            let words = header.decode_map(map, sector, bytes)?;
            into.iter().for_each(|bitmap| bitmap.insert(sector, &words));
        }
    }
    Ok(())
}
