//! How fast it may go: a bucket that fills at a rate, guests that go first, and ranges that have failed.

use crate::migrate::map::DirtyMap;
use crate::route::throttle::Bucket;
use std::ops::Range;
use std::time::Duration;
use tokio::time::Instant;

/// How long guests count as active after a request of theirs.
const ACTIVE: Duration = Duration::from_millis(100);

/// Chunks under way at once while guests are active.
pub(super) const BUSY_DEPTH: usize = 4;

/// The longest that it steps back for guests after a chunk.
pub(super) const STEP_BACK: Duration = Duration::from_millis(100);

/// What may be copied at once after a rest, as time.
const BURST: Duration = Duration::from_millis(100);

/// Whether guests are active, and how much may be copied now.
pub(super) struct Pace {
    bucket: Bucket,
    filled: Instant,
    /// Requests of guests as of the last look.
    guests: u64,
    active_until: Instant,
}

impl Pace {
    pub(super) fn new(guests: u64, now: Instant) -> Pace {
        Pace { bucket: Bucket::default(), filled: now, guests, active_until: now }
    }

    /// Takes notice of how many requests of guests there have been. True if they are active.
    pub(super) fn look(&mut self, guests: u64, now: Instant) -> bool {
        if guests != self.guests {
            (self.guests, self.active_until) = (guests, now + ACTIVE);
        }
        now < self.active_until
    }

    /// How long to wait at that rate before the next chunk.
    pub(super) fn debt(&mut self, rate: Option<u64>, now: Instant) -> Duration {
        self.bucket.fill(now.saturating_duration_since(self.filled), BURST);
        self.filled = now;
        self.bucket.limit(rate);
        self.bucket.debt()
    }

    pub(super) fn take(&mut self, bytes: u64) {
        self.bucket.take(bytes);
    }

    /// Gives back what was taken and not needed.
    pub(super) fn give(&mut self, bytes: u64) {
        self.bucket.give(bytes);
    }
}

/// How long what has failed waits before it is tried again, at first and at last.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// Ranges that have failed: with so many nothing else is tried before they are tried again.
const FAILED: usize = 16;

/// Ranges that have failed, and when they are tried again.
pub(super) struct Troubles {
    ranges: Vec<Range<u64>>,
    again: Option<Instant>,
    /// How long the next ones wait.
    wait: Duration,
}

impl Troubles {
    pub(super) fn new() -> Troubles {
        Troubles { ranges: Vec::new(), again: None, wait: RETRY[0] }
    }

    /// A range has failed. Returns how long it waits.
    pub(super) fn add(&mut self, range: Range<u64>, now: Instant) -> Duration {
        if !self.ranges.contains(&range) {
            self.ranges.push(range);
        }
        if let Some(again) = self.until(now) {
            return again - now;
        }
        let wait = self.wait;
        (self.again, self.wait) = (Some(now + wait), (wait * 2).min(RETRY[1]));
        wait
    }

    /// Forgets what is clean by now. True if there was something and there is nothing any more.
    pub(super) fn settle(&mut self, map: &DirtyMap) -> bool {
        let before = self.ranges.len();
        self.ranges.retain(|range| map.is_dirty(range.clone()));
        let over = before > 0 && self.ranges.is_empty();
        if over {
            *self = Troubles::new();
        }
        over
    }

    /// When what has failed is tried again, if not now.
    pub(super) fn until(&self, now: Instant) -> Option<Instant> {
        self.again.filter(|again| *again > now)
    }

    /// True if nothing else may be tried meanwhile.
    pub(super) fn are_many(&self) -> bool {
        self.ranges.len() >= FAILED
    }

    /// True if a range has to wait.
    pub(super) fn block(&self, range: &Range<u64>, now: Instant) -> bool {
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        self.until(now).is_some() && self.ranges.iter().any(overlaps)
    }

    /// Tries again now, and soon again if that fails.
    pub(super) fn retry(&mut self) {
        (self.again, self.wait) = (None, RETRY[0]);
    }
}
