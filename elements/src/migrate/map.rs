//! Which parts of a disk differ from its copy elsewhere, and which changes are on their way there.
//!
//! A bit for each granule, set while the copy may hold something else. A change of the copy is announced by an
//! [`Intent`] before anything is issued, on either side: as long as one covers a granule, whoever
//! asks whether all has [settled](DirtyMap::settled) there waits. Only a change that has succeeded on a whole
//! granule makes it clean, and not if another one that touches the granule has failed meanwhile: in what order the
//! two have reached the copy is not known.

use blockmason::lang::value::Service;
use blockmason::{Error, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

/// The map of a disk, shared by all that refer to it.
pub struct DirtyMap {
    /// Bytes of a granule, a power of two.
    granule: u64,
    /// What is known of a granule before anything has happened.
    initially_dirty: bool,
    /// Set when the size of the disk is known.
    bits: OnceLock<Bits>,
    flights: Mutex<Flights>,
    /// Told whenever an intent ends.
    landed: Notify,
    /// Told whenever something has become dirty.
    spoilt: Notify,
}

impl Service for DirtyMap {
    const NAME: &'static str = "dirty_map";
}

/// Read without a lock, changed only by whoever holds `flights`.
struct Bits {
    /// Bytes of the disk.
    size: u64,
    words: Box<[AtomicU64]>,
    /// How many are set.
    count: AtomicU64,
}

/// Changes on their way.
#[derive(Default)]
struct Flights {
    next: u64,
    list: Vec<Flight>,
}

struct Flight {
    number: u64,
    range: Range<u64>,
    /// Another change of its granules has failed meanwhile.
    tainted: bool,
}

impl DirtyMap {
    /// The map of a disk whose size is not known yet. Granules are `granule` bytes, a power of two.
    pub fn new(granule: u64, initially_dirty: bool) -> DirtyMap {
        let (bits, flights, landed, spoilt) = Default::default();
        DirtyMap { granule, initially_dirty, bits, flights, landed, spoilt }
    }

    /// Says how large the disk is.
    ///
    /// # Errors
    /// It was another size before.
    pub fn cover(&self, size: u64) -> Result<()> {
        let bits =
            self.bits.get_or_init(|| Bits::new(size, size.div_ceil(self.granule), self.initially_dirty));
        if bits.size == size {
            return Ok(());
        }
        Err(Error::invalid(format!("the map is that of a disk of {} bytes, not of {size}", bits.size)))
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        // Every change is complete before anything can panic.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of a granule.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Bytes of the disk; 0 before it is known.
    pub fn size(&self) -> u64 {
        self.bits.get().map_or(0, |bits| bits.size)
    }

    /// Bytes of all dirty granules, and of the last one only what the disk has of it.
    pub fn dirty_bytes(&self) -> u64 {
        let Some(bits) = self.bits.get() else { return 0 };
        let (last, short) = ((bits.size / self.granule), bits.size % self.granule);
        let missing = if short > 0 && bits.has(last) { self.granule - short } else { 0 };
        bits.count.load(Ordering::Acquire) * self.granule - missing
    }

    /// The granules that a range touches.
    fn touched(&self, range: &Range<u64>) -> Range<u64> {
        let Some(bits) = self.bits.get().filter(|_| !range.is_empty()) else { return 0..0 };
        range.start.min(bits.size) / self.granule..range.end.min(bits.size).div_ceil(self.granule)
    }

    /// The granules of which a range covers all that the disk has.
    fn covered(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end >= self.size() { self.touched(range).end } else { range.end / self.granule };
        let start = range.start.div_ceil(self.granule);
        start..end.max(start)
    }

    /// The first run of dirty bytes of a range, in whole granules but for the ends of the range. What lies behind
    /// the end of the disk is not dirty.
    pub fn next_dirty(&self, range: Range<u64>) -> Option<Range<u64>> {
        let (bits, granules) = (self.bits.get()?, self.touched(&range));
        let start = bits.find(true, granules.clone());
        let end = bits.find(false, start..granules.end);
        let run = (start * self.granule).max(range.start)..(end * self.granule).min(range.end).min(bits.size);
        (start < end).then_some(run)
    }

    /// The last run of dirty bytes of a range, as [`next_dirty`](Self::next_dirty).
    pub fn last_dirty(&self, range: Range<u64>) -> Option<Range<u64>> {
        let (bits, granules) = (self.bits.get()?, self.touched(&range));
        let end = bits.find_last(true, granules.clone());
        let start = bits.find_last(false, granules.start..end);
        let run = (start * self.granule).max(range.start)..(end * self.granule).min(range.end).min(bits.size);
        (start < end).then_some(run)
    }

    /// True if something of a range is dirty.
    pub fn is_dirty(&self, range: Range<u64>) -> bool {
        self.next_dirty(range).is_some()
    }

    /// Announces a change of `range` on its way to the copy, to be called before it is issued on either side.
    /// What the map remembers over a crash says from then on that the range is dirty.
    ///
    /// # Errors
    /// That could not be made sure of: the change must not be issued.
    pub async fn intend(self: &Arc<Self>, range: Range<u64>) -> Result<Intent> {
        Ok(self.announce(range))
    }

    /// As [`intend`](Self::intend), if nothing has to be waited for.
    pub fn intend_now(self: &Arc<Self>, range: Range<u64>) -> Option<Intent> {
        Some(self.announce(range))
    }

    fn announce(self: &Arc<Self>, range: Range<u64>) -> Intent {
        let mut flights = self.flights();
        let number = flights.next;
        flights.next += 1;
        flights.list.push(Flight { number, range: range.clone(), tainted: false });
        drop(flights);
        Intent { map: self.clone(), number, range }
    }

    /// Waits until no change of the range is on its way that was announced before. Whoever calls this keeps new
    /// ones away.
    pub async fn settled(&self, range: Range<u64>) {
        loop {
            let landed = self.landed.notified();
            let mut landed = std::pin::pin!(landed);
            landed.as_mut().enable();
            if !self.flights().list.iter().any(|flight| overlap(&flight.range, &range)) {
                return;
            }
            landed.await;
        }
    }

    /// Resolves when something has been made dirty since this was called, whether it was before or not.
    pub fn changed(&self) -> Notified<'_> {
        self.spoilt.notified()
    }

    /// Says that a range of the copy may hold something else than the disk.
    pub fn set(&self, range: Range<u64>) {
        self.spoil(&mut self.flights(), &range, None);
    }

    /// Sets what a range touches. Others that are on their way there must not clear it.
    fn spoil(&self, flights: &mut Flights, range: &Range<u64>, but: Option<u64>) {
        let granules = self.touched(range);
        for flight in flights.list.iter_mut().filter(|flight| Some(flight.number) != but) {
            flight.tainted |= overlap(&self.touched(&flight.range), &granules);
        }
        if let Some(bits) = self.bits.get() {
            bits.change(granules, true);
        }
        self.spoilt.notify_waiters();
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Bits {
    fn new(size: u64, granules: u64, set: bool) -> Bits {
        let words = (0..granules.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let bits = Bits { size, words, count: AtomicU64::new(0) };
        if set {
            bits.change(0..granules, true);
        }
        bits
    }

    fn has(&self, granule: u64) -> bool {
        self.words[granule as usize / 64].load(Ordering::Acquire) >> (granule % 64) & 1 != 0
    }

    /// The first granule of a range that is set or not, or the end of the range.
    fn find(&self, set: bool, range: Range<u64>) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let word = self.words[at as usize / 64].load(Ordering::Acquire);
            let rest = if set { word } else { !word } >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(range.end);
            }
            at = (at / 64 + 1) * 64;
        }
        range.end
    }

    /// Where the last granule of a range that is set or not ends, or the start of the range.
    fn find_last(&self, set: bool, range: Range<u64>) -> u64 {
        let mut at = range.end;
        while at > range.start {
            let word = self.words[(at - 1) as usize / 64].load(Ordering::Acquire);
            let rest = if set { word } else { !word } << (63 - (at - 1) % 64);
            if rest != 0 {
                return (at - u64::from(rest.leading_zeros())).max(range.start);
            }
            at = (at - 1) / 64 * 64;
        }
        range.start
    }

    fn change(&self, range: Range<u64>, set: bool) {
        let mut at = range.start;
        while at < range.end {
            let end = ((at / 64 + 1) * 64).min(range.end);
            let mask = u64::MAX >> (64 - (end - at)) << (at % 64);
            let word = &self.words[at as usize / 64];
            if set {
                let before = word.fetch_or(mask, Ordering::AcqRel);
                self.count.fetch_add(u64::from((mask & !before).count_ones()), Ordering::AcqRel);
            } else {
                let before = word.fetch_and(!mask, Ordering::AcqRel);
                self.count.fetch_sub(u64::from((mask & before).count_ones()), Ordering::AcqRel);
            }
            at = end;
        }
    }
}

/// A change that is on its way to the copy, or about to be. It ends when this is dropped; what has come of it is
/// said before.
pub struct Intent {
    map: Arc<DirtyMap>,
    number: u64,
    range: Range<u64>,
}

impl Intent {
    /// The change has succeeded: the granules that it covers as a whole are clean, if nothing has failed there
    /// meanwhile.
    pub fn synced(&self) {
        let flights = self.map.flights();
        let own = flights.list.iter().find(|flight| flight.number == self.number);
        if let (Some(bits), false) = (self.map.bits.get(), own.is_none_or(|flight| flight.tainted)) {
            bits.change(self.map.covered(&self.range), false);
        }
    }

    /// The change has failed, and may have been done in part: the granules that it touches are dirty.
    pub fn failed(&self) {
        self.map.spoil(&mut self.map.flights(), &self.range, Some(self.number));
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        let mut flights = self.map.flights();
        if let Some(ix) = flights.list.iter().position(|flight| flight.number == self.number) {
            flights.list.swap_remove(ix);
        }
        drop(flights);
        self.map.landed.notify_waiters();
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one run of dirty bytes is meant")]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    fn map(size: u64, dirty: bool) -> Arc<DirtyMap> {
        let map = Arc::new(DirtyMap::new(16, dirty));
        map.cover(size).unwrap();
        map
    }

    fn runs(map: &DirtyMap) -> Vec<Range<u64>> {
        let (mut runs, mut at) = (Vec::new(), 0);
        while let Some(run) = map.next_dirty(at..map.size()) {
            at = run.end;
            runs.push(run);
        }
        runs
    }

    #[test]
    fn only_whole_granules_become_clean_and_the_last_one_is_what_the_disk_has_of_it() {
        let map = map(40, true);
        assert_eq!((map.dirty_bytes(), runs(&map)), (40, vec![0..40]));
        for (range, left) in
            [(1..32, vec![0..16, 32..40]), (0..15, vec![0..16, 32..40]), (32..40, vec![0..16])]
        {
            map.intend_now(range).unwrap().synced();
            assert_eq!(runs(&map), left);
        }
        map.set(39..40);
        assert_eq!((map.dirty_bytes(), runs(&map)), (24, vec![0..16, 32..40]));
        map.intend_now(0..48).unwrap().synced();
        assert_eq!(map.dirty_bytes(), 0);
        assert!(map.cover(41).is_err() && map.cover(40).is_ok());
    }

    #[test]
    fn what_fails_beside_a_change_keeps_it_from_cleaning() {
        let map = map(64, true);
        let (one, other) = (map.intend_now(0..32).unwrap(), map.intend_now(20..24).unwrap());
        other.failed();
        drop(other);
        one.synced();
        drop(one);
        assert_eq!(map.dirty_bytes(), 64, "in what order the two came there is not known");
        map.intend_now(0..32).unwrap().synced();
        assert_eq!(runs(&map), [32..64]);
        map.intend_now(0..1).unwrap().failed();
        assert_eq!(runs(&map), [0..16, 32..64]);
    }

    #[test]
    fn runs_are_found_from_either_end() {
        let map = map(200, true);
        map.intend_now(32..96).unwrap().synced();
        assert_eq!((map.next_dirty(0..200), map.last_dirty(0..200)), (Some(0..32), Some(96..200)));
        assert_eq!((map.last_dirty(0..104), map.last_dirty(0..96)), (Some(96..104), Some(0..32)));
        assert_eq!((map.last_dirty(8..96), map.last_dirty(32..96)), (Some(8..32), None));
    }

    #[test]
    fn whoever_watches_is_told_of_what_becomes_dirty() {
        let map = map(64, false);
        let mut changed = Box::pin(map.changed());
        assert!((&mut changed).now_or_never().is_none());
        map.intend_now(0..16).unwrap().synced();
        assert!((&mut changed).now_or_never().is_none());
        map.intend_now(0..1).unwrap().failed();
        assert!(changed.now_or_never().is_some());
    }

    #[tokio::test]
    async fn it_has_settled_when_nothing_is_on_its_way() {
        let map = map(64, false);
        let (one, far) = (map.intend_now(0..32).unwrap(), map.intend_now(32..64).unwrap());
        let mut settled = Box::pin(map.settled(16..20));
        assert!((&mut settled).now_or_never().is_none());
        drop(far);
        assert!((&mut settled).now_or_never().is_none());
        drop(one);
        settled.await;
    }

    proptest! {
        #[test]
        fn bits_are_like_a_vector(changes in prop::collection::vec((0u64..200, 0u64..200, any::<bool>()), 0..30)) {
            let bits = Bits::new(200, 200, false);
            let mut model = [false; 200];
            for (a, b, set) in changes {
                let range = a.min(b)..a.max(b);
                bits.change(range.clone(), set);
                model[range.start as usize..range.end as usize].fill(set);
                let find = |set| model[range.start as usize..].iter().position(|bit| *bit == set);
                for set in [false, true] {
                    let found = find(set).map_or(200, |at| at as u64 + range.start);
                    prop_assert_eq!(bits.find(set, range.start..200), found);
                    let last = model[..range.end as usize].iter().rposition(|bit| *bit == set);
                    prop_assert_eq!(bits.find_last(set, 0..range.end), last.map_or(0, |at| at as u64 + 1));
                }
            }
            prop_assert_eq!(bits.count.load(Ordering::Relaxed), model.iter().filter(|bit| **bit).count() as u64);
        }
    }
}
