//! Which parts of a disk differ from its copy elsewhere, and which changes are on their way there.
//!
//! A bit for each granule, set while the copy may hold something else. A change of the copy is announced by an
//! [`Intent`] before anything is issued, on either side: as long as one covers a granule, whoever
//! asks whether all has [settled](DirtyMap::settled) there waits. Only a change that has succeeded on a whole
//! granule makes it clean, and not if another one that touches the granule has failed meanwhile: in what order the
//! two have reached the copy is not known.
//!
//! `bits` are those in memory; `kept` is the map in a file, whose form is `format` (docs/formats/dirty.md), whose
//! words are `store` in a `mapping`, and whose `regions` are what a loss of power leaves of it. `loose` is what the
//! copy may still forget.

mod bits;
mod format;
mod kept;
mod loose;
mod mapping;
mod regions;
mod store;
#[cfg(test)]
mod tests;

use crate::services::Test;
use bits::Bits;
use blockmason::lang::value::Service;
use blockmason::sched::Coalesced;
use blockmason::{Error, Request, Result, rt};
use format::Layout;
pub use loose::CopyFlush;
use loose::Loose;
use regions::Regions;
pub use regions::Resting;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use store::{Place, Store};
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::Instant;

/// The map of a disk, shared by all that refer to it.
pub struct DirtyMap {
    /// Bytes of a granule, a power of two.
    granule: u64,
    /// What is known of a granule before anything has happened.
    initially_dirty: bool,
    /// Set when the size of the disk is known.
    known: OnceLock<Known>,
    /// Where the file is, if there is one.
    place: Option<Place>,
    /// Set when it is open.
    store: OnceLock<Store>,
    /// The copy may forget what was not flushed while this machine goes on.
    forgetful: AtomicBool,
    flights: Mutex<Flights>,
    /// Told whenever an intent ends.
    landed: Notify,
    /// Whoever makes something durable does it for all.
    writing: Coalesced,
    /// Told when there is something to take back, or to make durable.
    work: Notify,
    /// Told whenever something has become dirty.
    spoilt: Notify,
}

impl Service for DirtyMap {
    const NAME: &'static str = "dirty_map";
}

impl Test for DirtyMap {
    fn test(&self, req: &Request, at: u64) -> (bool, u64) {
        match self.next_dirty(at..req.end()) {
            Some(run) if run.start == at => (true, run.end),
            Some(run) => (false, run.start),
            None => (false, req.end()),
        }
    }
}

/// Read without a lock, changed only by whoever holds `flights`.
struct Known {
    layout: Layout,
    bits: Bits,
}

/// Changes on their way, and what else changes with them.
#[derive(Default)]
struct Flights {
    next: u64,
    list: Vec<Flight>,
    /// What was dirty when a backup began.
    frozen: Option<Bits>,
    /// And the file does not say so yet, durably.
    freezing: bool,
    regions: Regions,
    /// What has landed and was not flushed there, and whether a flush that counts is on its way.
    loose: Loose,
    flushing_copy: bool,
    /// What is known was taken over, and not what a file says.
    inherited: bool,
    /// The file may not say what was last written there: making it durable has failed.
    suspect: bool,
    /// What the file calls frozen is dirty, and frozen no longer.
    stale: bool,
    /// How many have been let go and have not ended, and when that has last become more or fewer.
    astray: usize,
    heard: Option<Instant>,
}

struct Flight {
    number: u64,
    range: Range<u64>,
    /// Another change of its granules has failed meanwhile, or may come in before it or after it.
    tainted: bool,
    /// Nobody waits for it, or keeps others behind it: see [`DirtyMap::let_go`].
    astray: bool,
}

impl DirtyMap {
    /// The map of a disk whose size is not known yet. Granules are `granule` bytes, a power of two.
    pub fn new(granule: u64, initially_dirty: bool) -> DirtyMap {
        let (known, place, store, forgetful, flights) = Default::default();
        let (landed, writing, work, spoilt) = Default::default();
        DirtyMap {
            granule,
            initially_dirty,
            known,
            place,
            store,
            forgetful,
            flights,
            landed,
            writing,
            work,
            spoilt,
        }
    }

    /// The same, kept in a file by an element of a graph. Nothing is changed before [`open`](Self::open).
    ///
    /// # Errors
    /// There is a file, and it is no map with such granules, or somebody else's.
    pub fn in_file(
        granule: u64,
        initially_dirty: bool,
        path: &Path,
        graph: &str,
        element: &str,
    ) -> Result<DirtyMap> {
        let place = Some(Place::new(path, graph, element, granule)?);
        Ok(DirtyMap { place, ..DirtyMap::new(granule, initially_dirty) })
    }

    /// Says how large the disk is.
    ///
    /// # Errors
    /// It was another size before, or the file is the map of a disk of another size.
    pub fn cover(&self, size: u64) -> Result<()> {
        let layout = Layout::new(size, self.granule)?;
        if let Some(place) = &self.place {
            place.fits(layout)?;
        }
        let new = || Known { layout, bits: Bits::new(layout.granules(), self.initially_dirty) };
        let known = self.known.get_or_init(new).layout;
        if known.size == size {
            return Ok(());
        }
        Err(Error::invalid(format!("the map is that of a disk of {} bytes, not of {size}", known.size)))
    }

    /// Says that the copy may forget what was not flushed while this machine goes on: what a file says of that is
    /// not believed when it is opened.
    pub fn may_be_forgotten(&self) {
        self.forgetful.store(true, Ordering::Relaxed);
    }

    fn flights(&self) -> MutexGuard<'_, Flights> {
        // Every change is complete before anything can panic.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn bits(&self) -> Option<&Bits> {
        self.known.get().map(|known| &known.bits)
    }

    /// Bytes of a granule.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Bytes of the disk; 0 before it is known.
    pub fn size(&self) -> u64 {
        self.known.get().map_or(0, |known| known.layout.size)
    }

    /// Bytes of all dirty granules, and of the last one only what the disk has of it.
    pub fn dirty_bytes(&self) -> u64 {
        let Some(bits) = self.bits() else { return 0 };
        let (last, short) = (self.size() / self.granule, self.size() % self.granule);
        let missing = if short > 0 && bits.has(last) { self.granule - short } else { 0 };
        (bits.count() * self.granule).saturating_sub(missing)
    }

    /// The granules that a range touches.
    fn touched(&self, range: &Range<u64>) -> Range<u64> {
        if range.is_empty() {
            return 0..0;
        }
        let end = range.end.min(self.size()).div_ceil(self.granule);
        (range.start / self.granule).min(end)..end
    }

    /// The granules of which a range covers all that the disk has.
    fn covered(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end >= self.size() { self.touched(range).end } else { range.end / self.granule };
        let start = range.start.div_ceil(self.granule);
        start..end.max(start)
    }

    /// The first run of bytes of a range that are set, in whole granules but for the ends of the range.
    fn run_in(&self, bits: &Bits, range: &Range<u64>) -> Option<Range<u64>> {
        let run = bits.run(self.touched(range));
        let bytes = (run.start * self.granule).max(range.start)
            ..(run.end * self.granule).min(range.end).min(self.size());
        (!run.is_empty()).then_some(bytes)
    }

    /// The first run of dirty bytes of a range, in whole granules but for the ends of the range. What lies behind
    /// the end of the disk is not dirty.
    pub fn next_dirty(&self, range: Range<u64>) -> Option<Range<u64>> {
        self.run_in(self.bits()?, &range)
    }

    /// The last run of dirty bytes of a range, as [`next_dirty`](Self::next_dirty).
    pub fn last_dirty(&self, range: Range<u64>) -> Option<Range<u64>> {
        let (bits, granules) = (self.bits()?, self.touched(&range));
        let end = bits.find_last(true, granules.clone());
        let start = bits.find_last(false, granules.start..end);
        let run =
            (start * self.granule).max(range.start)..(end * self.granule).min(range.end).min(self.size());
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
        loop {
            if let Some(intent) = self.intend_now(range.clone()) {
                return Ok(intent);
            }
            self.mark(&range).await?;
        }
    }

    /// As [`intend`](Self::intend), if nothing has to be waited for.
    pub fn intend_now(self: &Arc<Self>, range: Range<u64>) -> Option<Intent> {
        let mut flights = self.flights();
        let open = self.place.is_none() || self.store.get().is_some();
        (open && flights.regions.are_durable(&range)).then(|| self.announce(&mut flights, range))
    }

    fn announce(self: &Arc<Self>, flights: &mut Flights, range: Range<u64>) -> Intent {
        let number = flights.next;
        flights.next += 1;
        let tainted = self.meets_astray(flights, &range);
        if tainted {
            self.spoil(flights, &range, None);
        }
        flights.list.push(Flight { number, range: range.clone(), tainted, astray: false });
        if let Some(store) = self.store.get() {
            flights.regions.touch(&range);
            store.raise(&self.touched(&range));
        }
        Intent { map: self.clone(), number, range }
    }

    /// True if a change that was let go is on its way to a granule of the range: which of the two comes last nobody
    /// knows.
    fn meets_astray(&self, flights: &Flights, range: &Range<u64>) -> bool {
        let granules = self.touched(range);
        let meets = |flight: &Flight| flight.astray && overlap(&self.touched(&flight.range), &granules);
        flights.astray > 0 && flights.list.iter().any(meets)
    }

    /// Says that nobody keeps other changes behind those that are on their way in a range: the copy does not answer.
    /// They may land at any time. Until they have, no other change makes anything clean there, and after one has
    /// come neither do they.
    pub fn let_go(&self, range: &Range<u64>) {
        let mut flights = self.flights();
        let mut count = 0;
        for flight in flights.list.iter_mut().filter(|flight| overlap(&flight.range, range)) {
            count += usize::from(!std::mem::replace(&mut flight.astray, true));
        }
        flights.astray += count;
        flights.heard = Some(rt::now());
    }

    /// If something is on its way that was let go: when something of that has ended last, or was let go.
    pub fn let_go_since(&self) -> Option<Instant> {
        let flights = self.flights();
        flights.heard.filter(|_| flights.astray > 0)
    }

    /// As [`settled`](Self::settled), as long as changes of the range, or others, land at least once in `silence`.
    /// False if they do not, or what is on its way there was let go.
    pub async fn settles(&self, range: Range<u64>, silence: Duration) -> bool {
        loop {
            let mut landed = std::pin::pin!(self.landed.notified());
            landed.as_mut().enable();
            match self.on_the_way(&range) {
                None => return true,
                Some(astray) if astray || rt::timeout(silence, landed).await.is_none() => return false,
                Some(_) => {}
            }
        }
    }

    /// If something is on its way to a range: whether something of that was let go.
    fn on_the_way(&self, range: &Range<u64>) -> Option<bool> {
        let flights = self.flights();
        let there = flights.list.iter().filter(|flight| overlap(&flight.range, range));
        there.map(|flight| flight.astray).reduce(|one, other| one || other)
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

    /// Says that a range of the copy may hold something else than the disk. What is not announced by an intent
    /// outlives a loss of power only some seconds later.
    pub fn set(&self, range: Range<u64>) {
        let mut flights = self.flights();
        self.spoil(&mut flights, &range, None);
        flights.regions.touch(&range);
        flights.regions.want(&range);
        drop(flights);
        self.work.notify_one();
    }

    /// Sets what a range touches. Others that are on their way there must not clear it.
    fn spoil(&self, flights: &mut Flights, range: &Range<u64>, but: Option<u64>) {
        let granules = self.touched(range);
        for flight in flights.list.iter_mut().filter(|flight| Some(flight.number) != but) {
            flight.tainted |= overlap(&self.touched(&flight.range), &granules);
        }
        if let Some(store) = self.store.get() {
            store.raise(&granules);
        }
        if let Some(bits) = self.bits() {
            bits.change(granules, true);
        }
        self.spoilt.notify_waiters();
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
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
        let mut flights = self.map.flights();
        let own = flights.list.iter().find(|flight| flight.number == self.number);
        let tainted = own.is_none_or(|flight| flight.tainted);
        let Some(Known { layout, bits }) = self.map.known.get() else { return };
        if !tainted {
            bits.change(self.map.covered(&self.range), false);
        }
        flights.loose.add(self.map.touched(&self.range), layout.granules());
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
            let ended = flights.list.swap_remove(ix);
            if ended.astray {
                flights.astray -= 1;
                flights.heard = Some(rt::now());
            }
        }
        self.map.lower(&mut flights, &self.range);
        drop(flights);
        self.map.landed.notify_waiters();
    }
}
