//! What a log knows while it is in use: the changes that are not on the data disk yet, and the room
//! that is left.

use super::format::{Record, Superblock};
use blockmason::{Error, Kind, Request, Result};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// Changes that are held in memory until they are on the data disk, in bytes of payload; one more may
/// always come if there is none.
const HELD_BYTES: u64 = 32 << 20;

/// Their number. Reads look at each of them.
const HELD: usize = 1024;

/// What becomes of a record: whether it, and all before it, are in the log.
pub(super) type Fate = Arc<OnceLock<Result<()>>>;

/// A change that is in the log, or on its way there, and not known to be on the data disk.
pub(super) struct Entry {
    pub(super) record: Record,
    /// The request to the data disk, without its payload: what overlaps it depends on it.
    tied: Request,
    /// Where its record begins in the ring.
    at: u64,
    /// Why it is not on the data disk.
    failed: Option<Error>,
}

impl Entry {
    fn overlaps(&self, range: &Range<u64>) -> bool {
        self.record.range.start < range.end && range.start < self.record.range.end
    }
}

/// The log once it has been opened.
pub(super) struct State {
    /// As it is on the device.
    pub(super) log: Superblock,
    /// Where the next record goes.
    head: u64,
    next: u64,
    /// Records that are not in the log yet, or that follow one: whether each is there, and its fate.
    landing: BTreeMap<u64, (bool, Fate)>,
    /// Writes to the log that have not ended.
    on_the_way: usize,
    /// The first record that could not be written. Nothing is logged until the ring begins anew.
    broken: Option<Error>,
    pending: BTreeMap<u64, Entry>,
    held: u64,
    /// Whoever waits for room, in the order of arrival.
    queue: VecDeque<u64>,
    tickets: u64,
}

/// What a change that wants room is told.
pub(super) enum Room {
    /// It has it.
    Here(Reserved),
    /// There will be some after a checkpoint, or once the ring begins anew.
    Maintain,
}

/// A place in the log.
pub(super) struct Reserved {
    pub(super) record: Record,
    pub(super) at: u64,
    pub(super) fate: Fate,
    /// As it was when the place was taken: the layout and the life of the ring.
    pub(super) log: Superblock,
    /// What has to be on the data disk first.
    pub(super) after: Vec<Request>,
}

impl State {
    pub(super) fn new(log: Superblock) -> State {
        State {
            head: log.tail,
            next: log.sequence,
            log,
            landing: BTreeMap::new(),
            on_the_way: 0,
            broken: None,
            pending: BTreeMap::new(),
            held: 0,
            queue: VecDeque::new(),
            tickets: 0,
        }
    }

    /// A place in the queue for room.
    pub(super) fn join(&mut self) -> u64 {
        self.tickets += 1;
        self.queue.push_back(self.tickets);
        self.tickets
    }

    pub(super) fn leave(&mut self, ticket: u64) {
        self.queue.retain(|other| *other != ticket);
    }

    /// Room for a change, or what to do about it; None if there is nothing to do but wait. `tied` is
    /// the request to the data disk, which others can depend on.
    pub(super) fn reserve(&mut self, ticket: u64, record: &Record, tied: &Request) -> Option<Room> {
        if self.queue.front() != Some(&ticket) {
            return None;
        }
        if self.broken.is_some() {
            return Some(Room::Maintain);
        }
        let (payload, size) = (record.payload(), self.log.record(record.payload()));
        let held = self.pending.is_empty() || self.pending.len() < HELD && self.held + payload <= HELD_BYTES;
        let full = self.used() + size > self.log.ring;
        if full || !held {
            let frees = full && self.first_needed().0 > self.log.tail;
            return (frees || self.first_failed().is_some()).then_some(Room::Maintain);
        }
        let record = Record { sequence: self.next, ..record.clone() };
        let after = self.before(&record.range);
        let (fate, at) = (Fate::default(), self.head);
        self.head += size;
        self.next += 1;
        self.held += payload;
        self.on_the_way += 1;
        self.landing.insert(record.sequence, (false, fate.clone()));
        let entry = Entry { record: record.clone(), tied: tied.clone(), at, failed: None };
        self.pending.insert(record.sequence, entry);
        Some(Room::Here(Reserved { record, at, fate, log: self.log, after }))
    }

    /// The requests that must have ended before one to `range` begins: those that overlap it, down to
    /// one that covers it, which waits for those before itself.
    fn before(&self, range: &Range<u64>) -> Vec<Request> {
        let mut found = Vec::new();
        for entry in self.pending.values().rev().filter(|entry| entry.overlaps(range)) {
            found.push(entry.tied.clone());
            if entry.record.range.start <= range.start && range.end <= entry.record.range.end {
                break;
            }
        }
        found
    }

    /// A record has been written to the log, or has not.
    pub(super) fn landed(&mut self, sequence: u64, outcome: Result<()>) {
        self.on_the_way -= 1;
        match outcome {
            Ok(()) => {
                if let Some((there, _)) = self.landing.get_mut(&sequence) {
                    *there = true;
                }
            }
            Err(error) if self.landing.contains_key(&sequence) => {
                // Recovery would stop here: what comes after is not in the log either.
                for (lost, (_, fate)) in self.landing.split_off(&sequence) {
                    let _ = fate.set(Err(error.clone()));
                    self.forget(lost);
                }
                self.broken = Some(error);
            }
            Err(_) => {}
        }
        while let Some(first) = self.landing.first_entry().filter(|first| first.get().0) {
            let _ = first.remove().1.set(Ok(()));
        }
    }

    /// A change has been written to the data disk, or has not.
    pub(super) fn applied(&mut self, sequence: u64, outcome: Result<()>) {
        match outcome {
            Ok(()) => self.forget(sequence),
            Err(error) => {
                if let Some(entry) = self.pending.get_mut(&sequence) {
                    entry.failed = Some(error);
                }
            }
        }
    }

    /// Nobody will say any more what became of a change.
    pub(super) fn abandoned(&mut self, sequence: u64, error: Error) {
        if let Some(entry) = self.pending.get_mut(&sequence) {
            entry.failed.get_or_insert(error);
        }
    }

    fn forget(&mut self, sequence: u64) {
        if let Some(entry) = self.pending.remove(&sequence) {
            self.held -= entry.record.payload();
        }
    }

    /// The first record that is needed after a crash: where it begins, and its number.
    pub(super) fn first_needed(&self) -> (u64, u64) {
        let first = self.pending.first_key_value();
        first.map_or((self.head, self.next), |(sequence, entry)| (entry.at, *sequence))
    }

    /// The first change that the data disk refused.
    pub(super) fn first_failed(&self) -> Option<Record> {
        let failed = self.pending.values().find(|entry| entry.failed.is_some());
        failed.map(|entry| entry.record.clone())
    }

    /// True if a checkpoint is due: half of the ring could be free.
    pub(super) fn is_due(&self) -> bool {
        2 * (self.first_needed().0 - self.log.tail) >= self.log.ring
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// True if nothing is being written to the log.
    pub(super) fn is_still(&self) -> bool {
        self.on_the_way == 0
    }

    /// The ring begins anew behind what was reserved.
    pub(super) fn begin_anew(&mut self, log: Superblock) {
        self.log = log;
        self.broken = None;
    }

    /// Bytes of the ring in use.
    pub(super) fn used(&self) -> u64 {
        self.head - self.log.tail
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// The changes of a range that are not on the data disk, in order.
    pub(super) fn of_range(&self, range: &Range<u64>) -> Vec<Record> {
        let found = self.pending.values().filter(|entry| entry.overlaps(range));
        found.map(|entry| entry.record.clone()).collect()
    }

    /// Whether what came before `sequence` is on the data disk as far as it touches `range`; None if
    /// it is still on its way.
    pub(super) fn is_applied(&self, range: &Range<u64>, sequence: u64) -> Option<Result<()>> {
        let mut before = self.pending.range(..sequence).map(|(_, entry)| entry);
        let mut open = false;
        let failed = before.find_map(|entry| {
            open |= entry.overlaps(range);
            entry.failed.clone().filter(|_| entry.overlaps(range))
        });
        match failed {
            Some(error) => Some(Err(error)),
            None => (!open).then_some(Ok(())),
        }
    }
}

/// The error of something whose flow was dropped: nobody saw its end.
pub(super) fn cancelled() -> Error {
    Error::new(Kind::Unavailable, "it was cancelled before it ended")
}
