//! The map in its file: what is there before a change is issued, what is taken back when, and how it is found again.

use super::bits::{Bits, mask, words};
use super::format::{Layout, this_boot};
use super::regions::Resting;
use super::store::{Opened, Store, get, put};
use super::{DirtyMap, Flights, overlap};
use blockmason::{Error, Kind, Result};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// What is being made durable.
struct Begun {
    wanted: Vec<usize>,
    resting: Vec<Resting>,
    /// What the file calls frozen was dirty before.
    stale: bool,
}

impl DirtyMap {
    /// Opens the file, if there is one, or makes it: from then on changes may be announced. Waits for disks.
    ///
    /// # Errors
    /// It cannot be used; nothing of it has been overwritten.
    pub fn open(&self) -> Result<()> {
        let (Some(place), None) = (&self.place, self.store.get()) else { return Ok(()) };
        let known = self.known.get().ok_or_else(|| Error::internal("a map of no disk is opened"))?;
        let Opened { store, found, same_boot } = place.open(known.layout, &known.bits)?;
        let mut flights = self.flights();
        if found {
            let kept = same_boot && !self.forgetful.load(Ordering::Relaxed);
            let loaded = store.load(kept);
            for ix in 0..loaded.words.len() {
                let own = if flights.inherited { known.bits.word(ix) } else { 0 };
                known.bits.put(ix, loaded.word(ix) | own);
            }
            self.find_loose(&store, &mut flights, known.layout);
            flights.stale = true;
        }
        self.write_all_marks(&store, &flights);
        self.set_dirty_regions(&store, known.layout.regions(), known.layout.region);
        store.adopt(this_boot())?;
        let regions = (0..known.layout.regions()).map(|region| store.has_region(region));
        flights.regions.reset(known.layout.region, regions);
        let _ = self.store.set(store);
        drop(flights);
        self.work.notify_one();
        Ok(())
    }

    /// What was not flushed before is not now.
    fn find_loose(&self, store: &Store, flights: &mut Flights, layout: Layout) {
        for region in (0..layout.regions()).filter(|region| store.has_region(*region)) {
            let start = region as u64 * layout.region;
            flights.loose.add(self.touched(&(start..start + layout.region)), layout.granules());
        }
    }

    /// Sets the regions of which everything is dirty: what a loss of power would make of their marks is true. They are
    /// made durable at once, so that none of them waits for that when it is first changed.
    pub(super) fn set_dirty_regions(&self, store: &Store, regions: usize, bytes: u64) {
        for region in (0..regions).filter(|region| self.is_all_dirty(*region as u64 * bytes, bytes)) {
            store.set_region(region, true);
        }
    }

    fn is_all_dirty(&self, from: u64, bytes: u64) -> bool {
        let region = from..(from + bytes).min(self.size());
        self.next_dirty(region.clone()) == Some(region)
    }

    /// True if the map outlives this process by itself.
    pub fn is_kept(&self) -> bool {
        self.place.is_some()
    }

    /// What is set for a word: dirty, on its way, or frozen and not yet durable as such.
    fn marks_of(&self, bits: &Bits, ix: usize, flying: &[Range<u64>], flights: &Flights) -> u64 {
        let freezing =
            flights.frozen.as_ref().filter(|_| flights.freezing).map_or(0, |frozen| frozen.word(ix));
        flying.iter().fold(bits.word(ix) | freezing, |word, granules| word | mask(ix, granules))
    }

    fn write_all_marks(&self, store: &Store, flights: &Flights) {
        let Some(bits) = self.bits() else { return };
        let flying: Vec<_> = flights.list.iter().map(|flight| self.touched(&flight.range)).collect();
        for ix in 0..bits.words.len() {
            put(&store.marks()[ix], self.marks_of(bits, ix, &flying, flights));
        }
    }

    /// Takes back the marks of granules that are clean and of which no change is on its way any more.
    pub(super) fn lower(&self, flights: &mut Flights, range: &Range<u64>) {
        let (Some(store), Some(bits)) = (self.store.get(), self.bits()) else { return };
        let words = words(&self.touched(range));
        let all = words.start as u64 * 64..words.end as u64 * 64;
        let flying = flights.list.iter().map(|flight| self.touched(&flight.range));
        let flying: Vec<_> = flying.filter(|granules| overlap(granules, &all)).collect();
        for ix in words {
            put(&store.marks()[ix], self.marks_of(bits, ix, &flying, flights));
        }
        flights.regions.touch(range);
    }

    /// Has the regions of a range set, durably.
    pub(super) async fn mark(&self, range: &Range<u64>) -> Result<()> {
        if self.store.get().is_none() {
            return Err(Error::internal("a change came before the map was opened"));
        }
        self.flights().regions.want(range);
        self.work.notify_one();
        self.write().await
    }

    /// Makes everything durable that was stored before now; sets regions that are wanted and takes back those
    /// that rest.
    async fn write(&self) -> Result<()> {
        let Some(store) = self.store.get() else { return Ok(()) };
        self.writing.run(async || self.write_now(store).await).await
    }

    async fn write_now(&self, store: &Store) -> Result<()> {
        let begun = self.begin_write(store);
        let disk = store.disk();
        let synced = blockmason::rt::blocking(move || disk.sync()).await;
        let lost = || Err(Error::internal("marks were not made durable"));
        self.end_write(store, begun, synced.unwrap_or_else(lost))
    }

    fn begin_write(&self, store: &Store) -> Begun {
        let mut flights = self.flights();
        let wanted = std::mem::take(&mut flights.regions.wanted);
        let resting = std::mem::take(&mut flights.regions.resting);
        if flights.suspect {
            self.write_everything(store, &flights);
        }
        wanted.iter().for_each(|region| store.set_region(*region, true));
        Begun { wanted, resting, stale: flights.stale }
    }

    fn end_write(&self, store: &Store, begun: Begun, synced: Result<()>) -> Result<()> {
        let mut flights = self.flights();
        flights.suspect = synced.is_err();
        if synced.is_err() {
            // Nothing has been announced there.
            for region in begun.wanted.into_iter().filter(|region| !flights.regions.is_durable(*region)) {
                store.set_region(region, false);
            }
            return synced;
        }
        begun.wanted.into_iter().for_each(|region| flights.regions.set_durable(region));
        for resting in begun.resting {
            if flights.regions.take_back(resting) {
                store.set_region(resting.region, false);
            }
        }
        // What was frozen once is dirty, durably.
        if begun.stale && std::mem::take(&mut flights.stale) {
            self.write_frozen(store, &flights);
        }
        Ok(())
    }

    fn is_flying(&self, flights: &Flights, region: usize) -> bool {
        let bytes = flights.regions.bytes_of(region);
        flights.list.iter().any(|flight| overlap(&flight.range, &bytes))
    }

    /// Stores every word anew: the kernel may have forgotten some of them.
    fn write_everything(&self, store: &Store, flights: &Flights) {
        self.write_all_marks(store, flights);
        if flights.frozen.is_some() {
            self.write_frozen(store, flights);
        }
        // Stored as they are: what is cleared there must not be so before marks are durable.
        store.regions().iter().chain(store.frozen()).for_each(|word| put(word, get(word)));
    }

    fn write_frozen(&self, store: &Store, flights: &Flights) {
        for (ix, word) in store.frozen().iter().enumerate() {
            let frozen = flights.frozen.as_ref().filter(|frozen| ix < frozen.words.len());
            put(word, frozen.map_or(0, |frozen| frozen.word(ix)));
        }
    }

    /// Resolves when regions may have to be set or taken back.
    pub async fn has_work(&self) {
        self.work.notified().await;
    }

    /// True as long as there are regions to take back, or to set.
    pub fn is_at_work(&self) -> bool {
        let flights = self.flights();
        flights.regions.any_durable() || !flights.regions.wanted.is_empty()
    }

    /// Regions in which nothing has happened since this was asked last, or if `all`, in which nothing happens now. To
    /// be [taken back](Self::rest) when the disk below has been flushed.
    pub fn resting(&self, all: bool) -> Vec<Resting> {
        let mut flights = self.flights();
        let mut found = flights.regions.untouched(all);
        found.retain(|resting| !self.is_flying(&flights, resting.region));
        // Nothing is won where everything is dirty, and the next change there would wait.
        let region = |resting: &Resting| flights.regions.bytes_of(resting.region);
        let all_dirty = |bytes: Range<u64>| self.is_all_dirty(bytes.start, bytes.end - bytes.start);
        found.retain(|resting| all || !all_dirty(region(resting)));
        found
    }

    /// Takes back the regions, of which the disk below has been flushed since they were found, unless something has
    /// been announced there meanwhile; sets those that are wanted.
    ///
    /// # Errors
    /// The file could not be made durable. They stay set.
    pub async fn rest(&self, regions: Vec<Resting>) -> Result<()> {
        if self.queue(regions) { self.write().await } else { Ok(()) }
    }

    /// True if there is something to write.
    fn queue(&self, regions: Vec<Resting>) -> bool {
        let mut flights = self.flights();
        flights.regions.resting.extend(regions);
        !flights.regions.resting.is_empty() || !flights.regions.wanted.is_empty() || flights.stale
    }

    /// Changes that are announced here go to a second disk, too, which is flushed apart: from now on no region is taken
    /// back before that disk has been flushed. The map would else call clean what a loss of power has undone there
    /// and not here.
    pub fn mirror(&self) {
        self.flights().regions.mirror();
    }

    /// A flush of the second disk begins. When it has succeeded, its number is to be given to
    /// [`flushed`](Self::flushed).
    pub fn flush_begins(&self) -> u64 {
        self.flights().regions.begin_flush()
    }

    /// A flush of the second disk has succeeded.
    pub fn flushed(&self, number: u64) {
        self.flights().regions.end_flush(number);
    }

    /// Begins a backup: what is dirty becomes frozen, and all is clean but for what is on its way.
    ///
    /// # Errors
    /// There is one that has not ended, or the file could not be made durable: then nothing is frozen.
    pub async fn freeze(&self) -> Result<()> {
        self.begin_freeze()?;
        let written = self.write().await;
        let mut flights = self.flights();
        flights.freezing = false;
        if written.is_ok() {
            self.lower(&mut flights, &(0..self.size()));
        } else {
            self.put_back(&mut flights);
            flights.stale = true;
        }
        written
    }

    pub(super) fn begin_freeze(&self) -> Result<()> {
        let mut flights = self.flights();
        if flights.frozen.is_some() {
            return Err(Error::new(Kind::Busy, "a backup has begun already: wait for its end"));
        }
        let Some(bits) = self.bits() else { return Err(Error::internal("a map of no disk is frozen")) };
        let frozen = bits.take();
        for flight in &flights.list {
            bits.change(self.touched(&flight.range), true);
        }
        (flights.frozen, flights.freezing) = (Some(frozen), true);
        if let Some(store) = self.store.get() {
            flights.stale = false;
            self.write_frozen(store, &flights);
        }
        Ok(())
    }

    /// What was frozen is dirty again.
    fn put_back(&self, flights: &mut Flights) {
        let Some(frozen) = flights.frozen.take() else { return };
        let mut at = 0..self.size();
        while let Some(run) = self.run_in(&frozen, &at) {
            at.start = run.end;
            self.spoil(flights, &run, None);
        }
    }

    /// True between the begin of a backup and its end.
    pub fn is_frozen(&self) -> bool {
        self.flights().frozen.is_some()
    }

    /// As [`next_dirty`](Self::next_dirty), of what was frozen.
    pub fn frozen_next(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.run_in(self.flights().frozen.as_ref()?, &range)
    }

    /// Ends a backup. If it has failed, what was frozen is dirty again; if not, what it has read was flushed on the
    /// disk before this is called, or a loss of power might leave there what the backup has not.
    ///
    /// # Errors
    /// The file could not be made durable: it says more than is dirty, and never less.
    pub async fn thaw(&self, failed: bool) -> Result<()> {
        self.end_frozen(failed);
        if failed { self.write().await } else { Ok(()) }
    }

    fn end_frozen(&self, failed: bool) {
        let mut flights = self.flights();
        if failed {
            self.put_back(&mut flights);
        }
        flights.frozen = None;
        if let Some(store) = self.store.get() {
            // What was put back must be durable before it is no longer called frozen.
            flights.stale = failed;
            if !failed {
                self.write_frozen(store, &flights);
            }
        }
    }

    /// Takes over what another map of the same disk knows; what it cannot know is dirty. To be called before this one
    /// is opened, while nothing is on its way in either.
    pub fn inherit(&self, old: &DirtyMap) {
        let mut flights = self.flights();
        if self.keeps_the_file_of(old) {
            return;
        }
        let Some(bits) = self.bits() else { return };
        let known = if old.known.get().is_some() { self.touched(&(0..old.size())) } else { 0..0 };
        bits.change(known.clone(), false);
        bits.change(known.end..self.touched(&(0..self.size())).end, true);
        let theirs = old.flights();
        for set in [old.bits(), theirs.frozen.as_ref()].into_iter().flatten() {
            let mut at = 0..old.size();
            while let Some(run) = old.run_in(set, &at) {
                at.start = run.end;
                bits.change(self.touched(&run), true);
            }
        }
        flights.inherited = true;
    }

    fn keeps_the_file_of(&self, old: &DirtyMap) -> bool {
        matches!((&self.place, &old.place), (Some(own), Some(other)) if own.is(other))
    }

    /// The words of the map, what is frozen among what is dirty, for another process. Nothing is on its way.
    pub fn words(&self) -> Vec<u64> {
        let (flights, Some(bits)) = (self.flights(), self.bits()) else { return Vec::new() };
        let frozen = |ix| flights.frozen.as_ref().map_or(0, |frozen| frozen.word(ix));
        (0..bits.words.len()).map(|ix| bits.word(ix) | frozen(ix)).collect()
    }

    /// Takes the words of another process.
    ///
    /// # Errors
    /// They are those of another disk.
    pub fn set_words(&self, found: &[u64]) -> Result<()> {
        let _flights = self.flights();
        let Some(bits) = self.bits().filter(|bits| bits.words.len() == found.len()) else {
            return Err(Error::invalid("the map that was handed over is that of another disk"));
        };
        let all = self.touched(&(0..self.size()));
        found.iter().enumerate().for_each(|(ix, word)| bits.put(ix, word & mask(ix, &all)));
        Ok(())
    }
}
