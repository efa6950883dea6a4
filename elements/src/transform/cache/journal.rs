//! Changes that are answered and not below yet, in their order, in memory or in the ring of an SSD; and behind them
//! those that are below already, as long as nobody needs their room.

use super::format::Kind;
use super::index::Index;
use blockmason::{Data, Error, Result};
use std::collections::VecDeque;
use std::ops::Range;
use tokio::time::Instant;

/// Changes of one batch at the most, however small: each may take a piece out of the middle of another, so they are up to
/// twice as many writes, and a disk that commits takes no more than 65,536 as one.
pub(super) const CHANGES: usize = 8192;

/// A change.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    pub(super) range: Range<u64>,
    /// Its bytes, of a write that is kept in memory.
    pub(super) data: Option<Data>,
    /// Where it begins: positions only grow.
    pub(super) at: u64,
    /// Bytes that it takes.
    pub(super) size: u64,
    /// Of a record in a ring; see docs/formats/cache.md.
    pub(super) life: u64,
    came: Instant,
    landed: bool,
}

/// What becomes of changes.
#[derive(Clone, Debug)]
pub(super) enum Standing {
    /// They are kept here.
    Keeping,
    /// They go below, once everything that is kept has gone before. Somebody wanted it, or the SSD has failed.
    Passing,
    /// The SSD has failed in a way that no change can be taken: what it would go on top of is lost, or what the SSD says
    /// would hide it at the next start.
    Lost(Error),
}

/// A place for a change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ticket {
    pub(super) number: u64,
    pub(super) at: u64,
    pub(super) life: u64,
    era: usize,
}

/// What a change is told that wants to be kept.
pub(super) enum Room {
    Here(Ticket),
    /// It goes below instead.
    Pass,
    /// There is room once something has been cleaned.
    Clean,
    /// A turn has to come before it.
    Turn,
    /// Something has to happen first.
    Wait,
    Refused(Error),
}

/// What is known of a part of the disk.
#[derive(Clone, Debug)]
pub(super) enum Known {
    /// Nothing: it is below, or in a line.
    Gap,
    Zeros,
    Memory(Data),
    /// From this position of the ring on, in the record of that number.
    Ring(u64, u64),
}

/// Where the log begins, as the label says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) at: u64,
    pub(super) number: u64,
    pub(super) life: u64,
}

/// The oldest changes, as many as go below at once.
pub(super) struct Batch {
    pub(super) entries: Vec<(u64, Entry)>,
    /// Behind the last of them.
    pub(super) end: u64,
    pub(super) tail: Tail,
}

pub(super) struct Journal {
    entries: VecDeque<Entry>,
    /// The number of the first of them.
    first: u64,
    /// The first that may not be below.
    cleaned: u64,
    /// The first that may not be read yet: it, or one before it, has not landed.
    published: u64,
    index: Index,
    /// Bytes for all of them.
    capacity: u64,
    /// Bytes of those that are not below.
    limit: u64,
    dirty: u64,
    head: u64,
    life: u64,
    /// On their way to the ring.
    on_the_way: usize,
    /// Changes that have gone past and are not answered.
    passing: usize,
    pub(super) standing: Standing,
    /// Records that are no more, or were never all there, may lie behind the head.
    turn: bool,
    /// For each failure of the ring the first number that did not get in. What was promised before and lies behind
    /// that has failed.
    eras: Vec<u64>,
}

impl Journal {
    /// An empty one, or one that goes on behind `tail`.
    pub(super) fn new(capacity: u64, limit: u64, tail: Tail) -> Journal {
        Journal {
            entries: VecDeque::new(),
            first: tail.number,
            cleaned: tail.number,
            published: tail.number,
            index: Index::default(),
            capacity,
            limit: limit.min(capacity),
            dirty: 0,
            head: tail.at,
            life: tail.life,
            on_the_way: 0,
            passing: 0,
            standing: Standing::Keeping,
            turn: false,
            eras: Vec::new(),
        }
    }

    /// A record that was found in the ring.
    pub(super) fn found(&mut self, kind: Kind, range: Range<u64>, size: u64, now: Instant) {
        let ticket = self.push(kind, range, None, size, now);
        self.landed(ticket, Ok(()));
    }

    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Bytes that are in use, of what is below already as well.
    pub(super) fn used(&self) -> u64 {
        self.entries.front().map_or(0, |entry| self.head - entry.at)
    }

    pub(super) fn dirty(&self) -> u64 {
        self.dirty
    }

    /// Where the next record goes, and what it has to be.
    pub(super) fn head(&self) -> Tail {
        Tail { at: self.head, number: self.next(), life: self.life }
    }

    /// Room for a change that takes `size` bytes.
    pub(super) fn reserve(
        &mut self,
        kind: Kind,
        range: &Range<u64>,
        data: Option<Data>,
        size: u64,
        now: Instant,
    ) -> Room {
        match &self.standing {
            Standing::Keeping if self.passing > 0 => return Room::Wait,
            Standing::Keeping => {}
            Standing::Passing => return Room::Pass,
            Standing::Lost(error) => return Room::Refused(error.clone()),
        }
        if self.turn && kind != Kind::Turn {
            return Room::Turn;
        }
        while self.used() + size > self.capacity && self.first < self.cleaned {
            self.forget_first();
        }
        let too_much = self.dirty > 0 && self.dirty + size > self.limit;
        if too_much || self.used() + size > self.capacity {
            return if self.cleaned < self.published { Room::Clean } else { Room::Wait };
        }
        Room::Here(self.push(kind, range.clone(), data, size, now))
    }

    fn push(
        &mut self,
        kind: Kind,
        range: Range<u64>,
        data: Option<Data>,
        size: u64,
        came: Instant,
    ) -> Ticket {
        let Tail { at, number, life } = self.head();
        if kind == Kind::Turn {
            (self.life, self.turn) = (range.start, false);
        }
        self.entries.push_back(Entry { kind, range, data, at, size, life, came, landed: false });
        self.head += size;
        self.dirty += size;
        self.on_the_way += 1;
        Ticket { number, at, life, era: self.eras.len() }
    }

    fn forget_first(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            if entry.kind != Kind::Turn {
                self.index.remove(&entry.range, self.first);
            }
            self.first += 1;
        }
    }

    /// A change has been written to where it is kept, or has not. It can be read when all before it are there, too: so
    /// what is answered is what an open finds.
    pub(super) fn landed(&mut self, ticket: Ticket, outcome: Result<()>) {
        self.on_the_way -= 1;
        if ticket.era != self.eras.len() {
            return;
        }
        if outcome.is_err() {
            // An open would stop here: what comes after is not there either.
            while self.next() > ticket.number {
                let Some(lost) = self.entries.pop_back() else { break };
                self.dirty -= lost.size;
                (self.head, self.life) = (lost.at, lost.life);
            }
            self.eras.push(ticket.number);
            self.turn = true;
            self.standing = Standing::Passing;
            return;
        }
        if let Some(entry) = self.entries.get_mut((ticket.number - self.first) as usize) {
            entry.landed = true;
        }
        while let Some(entry) = self.entries.get((self.published - self.first) as usize)
            && entry.landed
        {
            if entry.kind != Kind::Turn {
                self.index.insert(&entry.range, self.published);
            }
            self.published += 1;
        }
    }

    /// Whether a change is kept, and all before it: None as long as that is not known.
    pub(super) fn is_kept(&self, ticket: Ticket) -> Option<bool> {
        match self.eras.get(ticket.era) {
            Some(broke) => Some(ticket.number < *broke),
            None => (ticket.number < self.published).then_some(true),
        }
    }

    /// What is known of a range, in order and without gaps.
    pub(super) fn find(&self, range: &Range<u64>, header: u64) -> Vec<(Range<u64>, Known)> {
        let mut found = Vec::new();
        let mut at = range.start;
        for (part, number) in self.index.find(range) {
            if part.start > at {
                found.push((at..part.start, Known::Gap));
            }
            at = part.end;
            let Some(entry) = self.entries.get((number - self.first) as usize) else { continue };
            let from = part.start - entry.range.start;
            let known = match (&entry.data, entry.kind) {
                (_, Kind::Zeroes | Kind::Unmap | Kind::Turn) => Known::Zeros,
                (Some(data), Kind::Write) => {
                    Known::Memory(data.slice(from as usize..(part.end - entry.range.start) as usize))
                }
                (None, Kind::Write) => Known::Ring(entry.at + header + from, number),
            };
            found.push((part, known));
        }
        if at < range.end {
            found.push((at..range.end, Known::Gap));
        }
        found
    }

    /// Which parts of a range it knows.
    pub(super) fn touching(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        self.index.find(range).map(|(part, _)| part).collect()
    }

    /// True if nothing of a range has to be read elsewhere.
    pub(super) fn has_all(&self, range: &Range<u64>) -> bool {
        self.index.find(range).map(|(part, _)| part.end - part.start).sum::<u64>() == range.end - range.start
    }

    pub(super) fn knows_nothing(&self) -> bool {
        self.index.is_empty()
    }

    /// True if the room of a record has not been given to another one.
    pub(super) fn has(&self, number: u64) -> bool {
        number >= self.first
    }

    /// True if nothing that touches a range is only here.
    pub(super) fn is_below(&self, range: &Range<u64>) -> bool {
        self.index.find(range).all(|(_, number)| number < self.cleaned)
    }

    /// The number behind the last change that was answered.
    pub(super) fn answered(&self) -> u64 {
        self.published
    }

    /// True if everything before a number is below.
    pub(super) fn is_cleaned(&self, number: u64) -> bool {
        self.cleaned >= number
    }

    /// When the oldest change came that is not below.
    pub(super) fn oldest(&self) -> Option<Instant> {
        self.entries.get((self.cleaned - self.first) as usize).map(|entry| entry.came)
    }

    /// True if it is more than half full of what is not below.
    pub(super) fn is_crowded(&self) -> bool {
        2 * self.dirty > self.limit
    }

    /// The oldest changes that are not below, up to so many bytes; one at least. None if there are none.
    pub(super) fn batch(&self, most: u64) -> Option<Batch> {
        self.batch_from(self.cleaned, most)
    }

    /// The number of the first change that may not be below.
    pub(super) fn cleaned(&self) -> u64 {
        self.cleaned
    }

    /// The same from a number on, before which there is nothing that has gone.
    pub(super) fn batch_from(&self, begin: u64, most: u64) -> Option<Batch> {
        let from = (begin - self.first) as usize;
        let count = CHANGES.min(self.published.saturating_sub(begin) as usize);
        let mut bytes = 0;
        let fits = |entry: &&Entry| {
            bytes += entry.size;
            bytes <= most || bytes == entry.size
        };
        let entries: Vec<_> = self.entries.iter().skip(from).take(count).take_while(fits).cloned().collect();
        let end = begin + entries.len() as u64;
        let next = self.entries.get((end - self.first) as usize);
        let tail = next.map_or(self.head(), |entry| Tail { at: entry.at, number: end, life: entry.life });
        let entries: Vec<_> = (begin..).zip(entries).collect();
        (!entries.is_empty()).then_some(Batch { entries, end, tail })
    }

    /// Everything before a number is below, durably.
    pub(super) fn clean_to(&mut self, end: u64) {
        for number in self.cleaned..end {
            self.dirty -= self.entries[(number - self.first) as usize].size;
        }
        self.cleaned = self.cleaned.max(end);
    }

    /// Forgets what is below already: it is read there.
    pub(super) fn forget_cleaned(&mut self) {
        while self.first < self.cleaned {
            self.forget_first();
        }
    }

    /// Lets a change past, if nothing is kept that would have to go before it. It must say when it has been answered.
    pub(super) fn pass(&mut self) -> bool {
        if !matches!(self.standing, Standing::Passing) || self.cleaned < self.next() || self.on_the_way > 0 {
            return false;
        }
        // It would hide what comes below now.
        self.forget_cleaned();
        self.passing += 1;
        true
    }

    pub(super) fn passed(&mut self) {
        self.passing -= 1;
    }

    /// The next record must be a turn: a ring has been opened.
    pub(super) fn needs_turn(&mut self) {
        self.turn = true;
    }

    /// Changes are kept again. False if some that failed are still on their way to where new ones would go.
    pub(super) fn resume(&mut self) -> bool {
        if self.on_the_way > 0 && matches!(self.standing, Standing::Passing) && self.turn {
            return false;
        }
        if matches!(self.standing, Standing::Passing) {
            self.standing = Standing::Keeping;
        }
        true
    }

    /// True if something is only here.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty > 0
    }
}
