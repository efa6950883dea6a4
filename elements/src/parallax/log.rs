//! The log: where it stands, and what of it is durable. Writing it is the pool's business.
//!
//! One record is written at a time; what comes meanwhile goes into the next one together. Whoever finds nobody writing
//! does it for all.

use super::format::{Change, Record, Stamp};
use super::moves::Window;
use blockmason::{Error, Result};
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, oneshot};

/// What becomes of a batch of changes: whether its record is written and applied.
#[derive(Default)]
pub(super) struct Fate {
    done: OnceLock<Result<()>>,
    changed: Notify,
}

impl Fate {
    pub(super) fn settle(&self, done: Result<()>) {
        let _ = self.done.set(done);
        self.changed.notify_waiters();
    }

    /// Wakes whoever waits for it, to write it.
    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    pub(super) fn outcome(&self) -> Option<Result<()>> {
        self.done.get().map(|done| done.as_ref().copied().map_err(copy))
    }

    pub(super) fn changed(&self) -> &Notify {
        &self.changed
    }
}

fn copy(error: &Error) -> Error {
    Error::new(error.kind(), error.message().to_owned())
}

/// Changes of one request.
pub(super) struct Part {
    pub(super) changes: Vec<Change>,
    /// Says whether their data could be written; none if it has been.
    data: Option<oneshot::Receiver<bool>>,
    /// They are a move of blocks of this window, as far as those have not changed when the record is made.
    pub(super) window: Option<Arc<Window>>,
}

/// What has become of the data of changes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Written {
    Yes,
    /// It failed.
    No,
    /// Whoever wrote it has gone: it may yet arrive, so nothing else may be where it goes.
    Unknown,
}

impl Part {
    /// Their data, if they have any, has been written.
    pub(super) fn after_data(changes: Vec<Change>) -> Part {
        Part { changes, data: None, window: None }
    }

    /// The same of blocks that are moved.
    pub(super) fn of_move(changes: Vec<Change>, window: Arc<Window>) -> Part {
        Part { changes, data: None, window: Some(window) }
    }

    /// Their data is being written; who is told whether it could be.
    pub(super) fn beside_data(changes: Vec<Change>) -> (oneshot::Sender<bool>, Part) {
        let (written, data) = oneshot::channel();
        (written, Part { changes, data: Some(data), window: None })
    }

    /// Waits for the data.
    pub(super) async fn data(&mut self) -> Written {
        let Some(data) = self.data.take() else { return Written::Yes };
        match data.await {
            Ok(true) => Written::Yes,
            Ok(false) => Written::No,
            Err(_) => Written::Unknown,
        }
    }
}

/// What goes into one record.
pub(super) struct Batch {
    pub(super) parts: Vec<Part>,
    bytes: usize,
    pub(super) fate: Arc<Fate>,
}

pub(super) struct Log {
    /// First block, and how many there are.
    place: [u64; 2],
    epoch: u64,
    /// What is to be written, oldest first; the last one takes more.
    waiting: VecDeque<Batch>,
    writing: bool,
    /// Where the next record goes, and its number.
    head: (u64, u64),
    /// Where replay would begin.
    tail: (u64, u64),
    /// Blocks from the tail to the head.
    live: u64,
    /// The last record that is durable with all before it.
    durable: u64,
    /// Records up to this one are believed by a replay whatever their data looks like: the record that says so is durable.
    trusted: u64,
    /// Records that are not durable, and what they say is settled.
    marks: VecDeque<(u64, u64)>,
    /// The first and the last record that speaks of data which could not be written. As long as a replay finds them, it
    /// has to compare that data: neither they nor any behind them are called settled.
    spoilt: Option<(u64, u64)>,
}

impl Log {
    /// A log in which nothing lies behind the tail.
    pub(super) fn new(place: [u64; 2], epoch: u64, tail: (u64, u64)) -> Log {
        let durable = tail.1.saturating_sub(1);
        Log {
            place,
            epoch,
            waiting: VecDeque::new(),
            writing: false,
            head: tail,
            tail,
            live: 0,
            durable,
            trusted: durable,
            marks: VecDeque::new(),
            spoilt: None,
        }
    }

    /// From that tail to the head there is something that may not be overwritten yet.
    pub(super) fn begin_full(&mut self, tail: (u64, u64)) {
        let size = self.place[1];
        self.live = (self.head.0 + size - tail.0) % size;
        self.tail = tail;
    }

    /// Adds changes, which go into one record. Their fate.
    pub(super) fn add(&mut self, part: Part) -> Arc<Fate> {
        let bytes: usize = part.changes.iter().map(Record::bytes_of).sum();
        if let Some(batch) = self.waiting.back_mut().filter(|last| last.bytes + bytes <= Record::MOST / 2) {
            batch.bytes += bytes;
            batch.parts.push(part);
            return batch.fate.clone();
        }
        let batch = Batch { parts: vec![part], bytes, fate: Arc::default() };
        let fate = batch.fate.clone();
        self.waiting.push_back(batch);
        fate
    }

    /// Makes the caller the one who writes, if nobody is.
    pub(super) fn lead(&mut self) -> bool {
        !self.waiting.is_empty() && !std::mem::replace(&mut self.writing, true)
    }

    /// Ends that. Whose turn it is next, if something waits.
    pub(super) fn leave(&mut self) -> Option<Arc<Fate>> {
        self.writing = false;
        self.waiting.front().map(|batch| batch.fate.clone())
    }

    pub(super) fn next_batch(&mut self) -> Option<Batch> {
        self.waiting.pop_front()
    }

    /// What the next record says of itself.
    pub(super) fn stamp(&self) -> Stamp {
        let settled = self.spoilt.map_or(self.durable, |(first, _)| self.durable.min(first - 1));
        Stamp { epoch: self.epoch, number: self.head.1, settled }
    }

    /// The data of a change in that record could not be written.
    pub(super) fn spoil(&mut self, number: u64) {
        self.spoilt = Some((self.spoilt.map_or(number, |(first, _)| first), number));
    }

    /// Where a record of so many blocks goes: the block of the pool, and where the log goes on behind it. None if there is no room.
    pub(super) fn room(&self, blocks: u64) -> Option<(u64, u64)> {
        let skipped = if self.head.0 + blocks > self.place[1] { self.place[1] - self.head.0 } else { 0 };
        // The block behind it stays free, so that a full ring is not an empty one.
        if self.live + skipped + blocks >= self.place[1] {
            return None;
        }
        let at = if skipped > 0 { 0 } else { self.head.0 };
        Some((self.place[0] + at, (at + blocks) % self.place[1]))
    }

    /// A record has been written, behind which the log goes on there.
    pub(super) fn written(&mut self, number: u64, settled: u64, behind: u64) {
        self.marks.push_back((number, settled));
        let size = self.place[1];
        self.live += (behind + size - self.head.0) % size;
        self.head = (behind, number + 1);
    }

    /// Where it ends, for a checkpoint; and the last record.
    pub(super) fn head(&self) -> (u64, u64) {
        self.head
    }

    /// What came before is in the trees, durably.
    pub(super) fn cut(&mut self, tail: (u64, u64)) {
        let size = self.place[1];
        self.live -= (tail.0 + size - self.tail.0) % size;
        self.tail = tail;
        self.trusted = self.trusted.max(tail.1.saturating_sub(1));
        self.spoilt = self.spoilt.filter(|(_, last)| *last >= tail.1);
    }

    /// The last record there is: what a flush that begins now makes durable.
    pub(super) fn last(&self) -> u64 {
        self.head.1 - 1
    }

    /// A flush that began with that as the last record has succeeded.
    pub(super) fn flushed(&mut self, last: u64) {
        self.durable = self.durable.max(last);
        while let Some((_, settled)) =
            self.marks.front().copied().filter(|(number, _)| *number <= self.durable)
        {
            self.trusted = self.trusted.max(settled);
            self.marks.pop_front();
        }
    }

    pub(super) fn trusts(&self, number: u64) -> bool {
        number <= self.trusted
    }

    /// True if it should be brought into the trees soon.
    pub(super) fn is_long(&self) -> bool {
        self.live > self.place[1] / 2
    }

    pub(super) fn is_empty(&self) -> bool {
        self.live == 0 && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> Log {
        Log::new([100, 10], 1, (0, 1))
    }

    fn write(log: &mut Log, blocks: u64) -> Option<u64> {
        let (at, behind) = log.room(blocks)?;
        let stamp = log.stamp();
        log.written(stamp.number, stamp.settled, behind);
        Some(at)
    }

    #[test]
    fn the_ring_never_overtakes_itself() {
        let mut log = log();
        assert_eq!([write(&mut log, 4), write(&mut log, 4)], [Some(100), Some(104)]);
        assert_eq!(write(&mut log, 2), None, "a full ring would look like an empty one");
        let tail = (4, 2);
        log.cut(tail);
        assert_eq!(write(&mut log, 3), Some(100), "it does not fit before the end");
        assert_eq!(write(&mut log, 1), None);
        log.cut(log.head());
        assert!(log.is_empty());
        assert_eq!(write(&mut log, 7), Some(103));
    }

    #[test]
    fn what_a_record_says_is_trusted_once_that_record_is_durable() {
        let mut log = log();
        write(&mut log, 1);
        log.flushed(log.last());
        assert!(!log.trusts(1), "nothing on the disk says that record 1 was flushed");
        write(&mut log, 1);
        assert!(!log.trusts(1));
        log.flushed(log.last());
        assert!(log.trusts(1) && !log.trusts(2));
        log.cut(log.head());
        assert!(log.trusts(2));
    }

    #[test]
    fn what_has_no_data_is_never_settled() {
        let mut log = log();
        write(&mut log, 1);
        write(&mut log, 1);
        log.spoil(2);
        log.flushed(log.last());
        write(&mut log, 1);
        log.flushed(log.last());
        assert!(log.trusts(1) && !log.trusts(2) && !log.trusts(3));
        assert_eq!(log.stamp().settled, 1);
        log.cut(log.head());
        assert_eq!(log.stamp().settled, 3, "a replay does not see it any more");
    }
}
