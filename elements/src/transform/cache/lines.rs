//! Lines of the disk that are kept: which of them, what of each is valid, and who is just reading one from below or
//! changing it.
//!
//! Which lines stay is decided by a segmented LRU. A line comes in *on probation*; only one that is asked for again is
//! *protected*. So a scan drives out what was read once, and not what is read again and again. Asking for the bytes
//! right behind those asked for last is no second time: it is how a stream reads a line in pieces.
//!
//! Why nothing stale stays, whatever runs at the same time:
//!
//! - A line is filled by one *flight*, which is registered before the read below is sent. A change takes the flights of its
//!   lines out when it begins and again when it ends, and a flight that is no longer registered installs nothing. A read below
//!   that began before a change was answered may return what was there before; it installs nothing, and whoever asks
//!   after the answer does not join it.
//! - A change also makes its range invalid when it begins. While it is below, its lines are *busy* and nothing is installed
//!   in them, so what a read finds meanwhile is what the disk below has.
//! - What a change has written is put into its lines when it ends, unless another one was below for the same line
//!   at any moment: nobody knows which of the two came last.
//! - A change whose end nobody has seen leaves its lines busy for ever: it may still happen.

use blockmason::{Data, PoolBuf, Result};
use lru::LruCache;
use std::collections::HashMap;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::Notify;

/// Bytes that a line takes in memory beside its own, about: its places in a table and a list, its reference count, and
/// what the allocator keeps.
pub(super) const OVERHEAD: u64 = 320;

/// Validity is known of this many parts of a line, the bits of [`Line::valid`].
const UNITS: u64 = 128;

/// The smallest part of a line of which validity is known.
const SECTOR: u64 = 512;

/// The most parts, each with a lock of its own.
const PARTS: usize = 16;

/// The fewest lines that a part has: with fewer the least recently used of a part is no longer old.
const PART_LINES: usize = 64;

/// A change of more lines goes through those that there are instead of through its own.
const SWEEP: u64 = 4096;

/// Of the lines of a part, how many may be protected.
const PROTECTED: f64 = 0.8;

/// Where the bytes of a line are.
#[derive(Clone, Debug)]
pub(super) enum Place {
    Memory(Data),
    Slot(Slot),
}

/// A place on the SSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) number: u32,
    /// Checksum of all of it.
    pub(super) sum: u32,
    /// It has been compared with its checksum, or written by this process.
    pub(super) proven: bool,
}

pub(super) struct Line {
    pub(super) place: Place,
    /// A bit for each unit.
    pub(super) valid: u128,
    /// Where the last access ended, in the line.
    next: u64,
    /// Tells this from whatever had the line before or has it later.
    stamp: u64,
}

/// A line that was found.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) place: Place,
    pub(super) stamp: u64,
}

/// What is known of a line.
pub(super) enum Look {
    Here(Found),
    /// Somebody reads it from below.
    Coming(Arc<Flight>),
    /// It is to be read from below; nobody does yet.
    Missing,
}

/// A line on its way from below. Whoever wants it waits for the same one.
#[derive(Default)]
pub(super) struct Flight {
    /// None if it was given up.
    outcome: OnceLock<Option<Result<Data>>>,
    ended: Notify,
}

impl Flight {
    /// The line's bytes, as far as the disk goes; None if it was given up, and has to be tried again.
    pub(super) async fn outcome(&self) -> Option<Result<Data>> {
        loop {
            let mut ended = pin!(self.ended.notified());
            ended.as_mut().enable();
            if let Some(outcome) = self.outcome.get() {
                return outcome.clone();
            }
            ended.await;
        }
    }

    fn end(&self, outcome: Option<Result<Data>>) {
        let _ = self.outcome.set(outcome);
        self.ended.notify_waiters();
    }
}

/// Changes of a line that are below.
struct Busy {
    changes: u32,
    /// There was more than one at some moment.
    contended: bool,
}

struct Part {
    probation: LruCache<u64, Line>,
    protected: LruCache<u64, Line>,
    /// The most lines.
    capacity: usize,
    flights: HashMap<u64, Arc<Flight>>,
    busy: HashMap<u64, Busy>,
    /// Slots that hold nothing.
    spare: Vec<u32>,
}

impl Part {
    fn len(&self) -> usize {
        self.probation.len() + self.protected.len()
    }

    fn get(&self, line: u64) -> Option<&Line> {
        self.protected.peek(&line).or_else(|| self.probation.peek(&line))
    }

    fn get_mut(&mut self, line: u64) -> Option<&mut Line> {
        match self.protected.peek_mut(&line) {
            Some(found) => Some(found),
            None => self.probation.peek_mut(&line),
        }
    }

    /// A line of which these units are valid.
    fn find(&self, line: u64, wanted: u128) -> Option<Found> {
        let found = self.get(line).filter(|found| found.valid & wanted == wanted)?;
        Some(Found { place: found.place.clone(), stamp: found.stamp })
    }

    /// Somebody asks for `within`, which is valid.
    fn touch(&mut self, line: u64, within: &Range<u64>) {
        if self.protected.promote(&line) {
            return;
        }
        let Some(found) = self.probation.peek_mut(&line) else { return };
        let goes_on = found.next == within.start;
        found.next = within.end;
        if goes_on {
            return;
        }
        let Some(found) = self.probation.pop(&line) else { return };
        self.protected.put(line, found);
        if self.protected.len() as f64 > self.capacity as f64 * PROTECTED
            && let Some((line, old)) = self.protected.pop_lru()
        {
            self.probation.put(line, old);
        }
    }

    /// Makes a line go, the one that is needed least.
    fn evict(&mut self) {
        let least = self.probation.pop_lru().or_else(|| self.protected.pop_lru());
        if let Some((_, line)) = least {
            self.release(line);
        }
    }

    fn release(&mut self, line: Line) {
        if let Place::Slot(slot) = line.place {
            self.spare.push(slot.number);
        }
    }

    fn remove(&mut self, line: u64) {
        if let Some(found) = self.probation.pop(&line).or_else(|| self.protected.pop(&line)) {
            self.release(found);
        }
    }

    /// Puts a line in the place of what there was of it.
    fn put(&mut self, number: u64, line: Line) {
        if let Some(place) = self.get_mut(number) {
            let old = std::mem::replace(place, line);
            return self.release(old);
        }
        while self.len() >= self.capacity {
            self.evict();
        }
        self.probation.put(number, line);
    }

    /// Takes the flight of a line out: what it brings may be old.
    fn spoil(&mut self, line: u64) {
        self.flights.remove(&line);
    }
}

pub(super) struct Lines {
    /// Bytes of a line, a power of two.
    pub(super) size: u64,
    unit: u64,
    parts: Vec<Mutex<Part>>,
    stamps: AtomicU64,
    /// Sweeps under way: nothing is installed meanwhile.
    sweeping: AtomicUsize,
    /// Sweeps that have begun.
    sweeps: AtomicU64,
}

/// A change that has begun.
pub(super) struct Change {
    range: Range<u64>,
    /// The sweeps that had begun by then; none if one was under way, or it is one.
    sweeps: Option<u64>,
    sweep: bool,
}

impl Lines {
    /// Room for that many lines; with slots to keep them in if they are not kept in memory.
    pub(super) fn new(size: u64, capacity: usize, slots: bool) -> Lines {
        let count = (capacity / PART_LINES).clamp(1, PARTS);
        let count = 1 << count.ilog2();
        let part = |ix: usize| {
            let spare =
                if slots { (ix as u32..capacity as u32).step_by(count).collect() } else { Vec::new() };
            let capacity = if slots { spare.len() } else { capacity / count };
            Mutex::new(Part {
                probation: LruCache::unbounded(),
                protected: LruCache::unbounded(),
                capacity,
                flights: HashMap::new(),
                busy: HashMap::new(),
                spare,
            })
        };
        Lines {
            size,
            unit: (size / UNITS).max(SECTOR),
            parts: (0..count).map(part).collect(),
            stamps: AtomicU64::new(0),
            sweeping: AtomicUsize::new(0),
            sweeps: AtomicU64::new(0),
        }
    }

    fn part(&self, line: u64) -> MutexGuard<'_, Part> {
        let ix = (line.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % self.parts.len();
        // Every change of a part is complete before anything can panic.
        self.parts[ix].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> impl Iterator<Item = MutexGuard<'_, Part>> {
        self.parts.iter().map(|part| part.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The lines that a range touches, each with which of its bytes.
    pub(super) fn of(&self, range: &Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + use<> {
        let (size, range) = (self.size, range.clone());
        let lines = if range.is_empty() { 0..0 } else { range.start / size..range.end.div_ceil(size) };
        lines.map(move |line| {
            let start = line * size;
            (line, range.start.max(start) - start..range.end.min(start + size) - start)
        })
    }

    /// The units that a part of a line touches.
    pub(super) fn touched(&self, within: &Range<u64>) -> u128 {
        bits(within.start / self.unit, within.end.div_ceil(self.unit))
    }

    /// The units that lie in a part of a line as a whole. What is left of a unit at the end of the disk is never valid:
    /// a disk that grows would make more of it.
    pub(super) fn covered(&self, within: &Range<u64>) -> u128 {
        bits(within.start.div_ceil(self.unit), within.end / self.unit)
    }

    fn stamp(&self) -> u64 {
        self.stamps.fetch_add(1, Ordering::Relaxed)
    }

    /// Looks for a part of a line, on behalf of somebody who wants it.
    pub(super) fn look(&self, line: u64, within: &Range<u64>) -> Look {
        let mut part = self.part(line);
        if let Some(found) = part.find(line, self.touched(within)) {
            part.touch(line, within);
            return Look::Here(found);
        }
        part.flights.get(&line).map_or(Look::Missing, |flight| Look::Coming(flight.clone()))
    }

    /// The same on behalf of somebody who may not take it: whoever does says so with [`Lines::touch`].
    pub(super) fn peek(&self, line: u64, within: &Range<u64>) -> Option<Found> {
        self.part(line).find(line, self.touched(within))
    }

    /// Somebody has taken what `peek` found.
    pub(super) fn touch(&self, line: u64, within: &Range<u64>) {
        self.part(line).touch(line, within);
    }

    /// Registers a flight, unless there is one; or, if all of the line up to `len` is valid, none is needed.
    pub(super) fn lead(self: &Arc<Self>, line: u64, len: u64) -> Option<Lead> {
        let mut part = self.part(line);
        let whole = self.covered(&(0..len));
        let valid = part.get(line).is_some_and(|found| found.valid & whole == whole);
        if part.flights.contains_key(&line) || valid && self.touched(&(0..len)) == whole {
            return None;
        }
        let flight = Arc::new(Flight::default());
        part.flights.insert(line, flight.clone());
        Some(Lead { lines: self.clone(), line, flight })
    }

    /// A slot for a line: one that is empty, or that of the line that is needed least.
    pub(super) fn slot(&self, line: u64) -> Option<u32> {
        let mut part = self.part(line);
        if part.spare.is_empty() {
            part.evict();
        }
        part.spare.pop()
    }

    /// A slot that was not used after all.
    pub(super) fn give_back(&self, line: u64, slot: u32) {
        self.part(line).spare.push(slot);
    }

    /// True if what was found is still there: nothing else has been put into its place since.
    pub(super) fn is_still(&self, line: u64, found: &Found) -> bool {
        self.part(line).get(line).is_some_and(|line| line.stamp == found.stamp)
    }

    /// A slot that was loaded is what its checksum says.
    pub(super) fn proven(&self, line: u64, found: &Found) {
        let mut part = self.part(line);
        let same = part.get_mut(line).filter(|line| line.stamp == found.stamp);
        if let Some(Line { place: Place::Slot(slot), .. }) = same {
            slot.proven = true;
        }
    }

    /// Forgets a line that was found damaged.
    pub(super) fn forget(&self, line: u64, found: &Found) {
        if self.is_still(line, found) {
            self.part(line).remove(line);
        }
    }

    /// A stream that is not to be kept has read all of a line: it goes next.
    pub(super) fn spent(&self, line: u64) {
        self.part(line).probation.demote(&line);
    }

    /// A change of a range begins: until it ends nothing of it is valid.
    pub(super) fn begin(&self, range: &Range<u64>) -> Change {
        let sweep = (range.end - range.start) / self.size > SWEEP;
        if sweep {
            self.sweeping.fetch_add(1, Ordering::SeqCst);
            self.sweeps.fetch_add(1, Ordering::SeqCst);
            self.drop_many(range);
            return Change { range: range.clone(), sweeps: None, sweep };
        }
        let began = self.sweeps.load(Ordering::SeqCst);
        let sweeps = (self.sweeping.load(Ordering::SeqCst) == 0).then_some(began);
        for (line, within) in self.of(range) {
            let mut part = self.part(line);
            part.spoil(line);
            self.invalidate(&mut part, line, &within);
            let busy = part.busy.entry(line).or_insert(Busy { changes: 0, contended: false });
            busy.changes += 1;
            busy.contended |= busy.changes > 1;
        }
        Change { range: range.clone(), sweeps, sweep }
    }

    /// A change has ended. `bytes` is what is there now, if that is known and to be kept.
    pub(super) fn end(&self, change: &Change, bytes: Option<&Data>) {
        if change.sweep {
            self.drop_many(&change.range);
            self.sweeping.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let mut from = 0;
        for (line, within) in self.of(&change.range) {
            let len = (within.end - within.start) as usize;
            let mut part = self.part(line);
            part.spoil(line);
            let contended = part.busy.get(&line).is_none_or(|busy| busy.contended);
            if let Some(busy) = part.busy.get_mut(&line) {
                busy.changes -= 1;
                if busy.changes == 0 {
                    part.busy.remove(&line);
                }
            }
            if let Some(bytes) = bytes.filter(|_| !contended && self.may_install(change.sweeps)) {
                self.merge(&mut part, line, &within, &bytes.slice(from..from + len));
            }
            from += len;
        }
    }

    /// Makes a range invalid, and what is on its way for it.
    pub(super) fn drop_range(&self, range: &Range<u64>) {
        if (range.end - range.start) / self.size > SWEEP {
            return self.drop_many(range);
        }
        for (line, within) in self.of(range) {
            let mut part = self.part(line);
            part.spoil(line);
            self.invalidate(&mut part, line, &within);
        }
    }

    fn drop_many(&self, range: &Range<u64>) {
        let lines = range.start / self.size..range.end.div_ceil(self.size);
        for mut part in self.all() {
            part.flights.retain(|line, _| !lines.contains(line));
            let kept = part.probation.iter().chain(part.protected.iter());
            let gone: Vec<_> = kept.map(|(line, _)| *line).filter(|line| lines.contains(line)).collect();
            gone.into_iter().for_each(|line| part.remove(line));
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.drop_many(&(0..u64::MAX));
    }

    fn may_install(&self, sweeps: Option<u64>) -> bool {
        self.sweeping.load(Ordering::SeqCst) == 0 && sweeps == Some(self.sweeps.load(Ordering::SeqCst))
    }

    fn invalidate(&self, part: &mut Part, line: u64, within: &Range<u64>) {
        let gone = self.touched(within);
        if let Some(found) = part.get_mut(line) {
            found.valid &= !gone;
            if found.valid == 0 {
                part.remove(line);
            }
        }
    }

    /// Puts bytes into a line of memory.
    fn merge(&self, part: &mut Part, number: u64, within: &Range<u64>, bytes: &Data) {
        let units = self.covered(within);
        if units == 0 {
            return;
        }
        let range = within.start as usize..within.end as usize;
        match part.get_mut(number) {
            Some(Line { place: Place::Memory(data), valid, next, .. }) => {
                // Of units that it covers in part the rest stays as it is, valid or not.
                bytes.copy_to(&mut data.make_mut()[range]);
                *valid = *valid & !self.touched(within) | units;
                *next = within.end;
            }
            Some(Line { place: Place::Slot(_), .. }) => {}
            None => {
                let mut buf = PoolBuf::zeroed(self.size as usize);
                bytes.copy_to(&mut buf[range]);
                let place = Place::Memory(buf.freeze());
                part.put(number, Line { place, valid: units, next: within.end, stamp: self.stamp() });
            }
        }
    }

    /// The most lines.
    pub(super) fn capacity(&self) -> usize {
        self.all().map(|part| part.capacity).sum()
    }

    /// Lines that are kept.
    pub(super) fn count(&self) -> usize {
        self.all().map(|part| part.len()).sum()
    }

    /// What is kept in slots: the line, what of it is valid, the slot.
    pub(super) fn slots(&self) -> Vec<(u64, u128, Slot)> {
        let mut found = Vec::new();
        for part in self.all() {
            for (line, kept) in part.probation.iter().chain(part.protected.iter()) {
                if let Place::Slot(slot) = kept.place {
                    found.push((*line, kept.valid, slot));
                }
            }
        }
        found
    }

    /// Takes a slot as it was when the cache was closed. Nothing has been asked for yet.
    pub(super) fn load(&self, line: u64, valid: u128, slot: Slot) {
        let mut part = self.part(line);
        // The slots of a part are not those of another; a table that says so is damaged.
        if let Some(ix) = part.spare.iter().position(|spare| *spare == slot.number)
            && part.get(line).is_none()
        {
            part.spare.swap_remove(ix);
            part.put(line, Line { place: Place::Slot(slot), valid, next: 0, stamp: self.stamp() });
        }
    }
}

fn bits(from: u64, to: u64) -> u128 {
    let below = |bit: u64| if bit >= UNITS { u128::MAX } else { (1 << bit) - 1 };
    if from >= to { 0 } else { below(to) & !below(from) }
}

/// The one who reads a line from below for all who want it. Dropped, it gives up.
pub(super) struct Lead {
    lines: Arc<Lines>,
    pub(super) line: u64,
    flight: Arc<Flight>,
}

impl Lead {
    /// Puts the line into its place, unless it has changed since this began. False if it has, or may have.
    pub(super) fn install(&self, place: Place, valid: u128, next: u64) -> bool {
        let mut part = self.lines.part(self.line);
        let mine = part.flights.get(&self.line).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight));
        let quiet = self.lines.sweeping.load(Ordering::SeqCst) == 0 && !part.busy.contains_key(&self.line);
        if !(mine && quiet) || valid == 0 {
            return false;
        }
        part.put(self.line, Line { place, valid, next, stamp: self.lines.stamp() });
        true
    }

    /// Tells whoever waits.
    pub(super) fn end(self, outcome: Result<Data>) {
        self.flight.end(Some(outcome));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        let mut part = self.lines.part(self.line);
        if part.flights.get(&self.line).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            part.flights.remove(&self.line);
        }
        drop(part);
        self.flight.end(None);
    }
}
