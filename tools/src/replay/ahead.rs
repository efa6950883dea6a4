//! Reads a log ahead, and puts its records in the order in which they came.

use blockmason::Result;
use blockmason_elements::workload::{Log, Record};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;
use tokio::sync::mpsc::{Receiver, Sender, channel};

/// Records that are put in order among each other, at most: those that were in flight together.
const WINDOW: usize = 64 << 10;

/// Records that are handed on at a time, and how many times ahead.
const BATCH: usize = 1 << 10;
const AHEAD: usize = 16;

/// By when it came.
struct Came(Record, u64);

impl Came {
    fn key(&self) -> (Duration, u64) {
        (self.0.at, self.1)
    }
}

impl PartialEq for Came {
    fn eq(&self, other: &Came) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Came {}

impl PartialOrd for Came {
    fn partial_cmp(&self, other: &Came) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Came {
    fn cmp(&self, other: &Came) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// A log from its beginning, in the order in which its requests came.
pub(super) struct Ordered {
    log: Log,
    waiting: BinaryHeap<Reverse<Came>>,
    number: u64,
    is_over: bool,
}

impl Ordered {
    pub(super) fn new(log: Log) -> Ordered {
        Ordered { log, waiting: BinaryHeap::new(), number: 0, is_over: false }
    }

    /// The next one; None at the end.
    ///
    /// # Errors
    /// The log cannot be read.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        while !self.is_over && self.waiting.len() < WINDOW {
            match self.log.next_block()? {
                Some(records) => {
                    for record in records {
                        self.number += 1;
                        self.waiting.push(Reverse(Came(record, self.number)));
                    }
                }
                None => self.is_over = true,
            }
        }
        Ok(self.waiting.pop().map(|Reverse(Came(record, _))| record))
    }

    /// How many requests the log could not keep, as far as it has been read.
    pub(super) fn lost(&self) -> u64 {
        self.log.lost()
    }
}

/// Reads on a thread of its own. An error ends what is received.
pub(super) fn read_ahead(log: Log) -> std::io::Result<Receiver<Result<Vec<Record>>>> {
    let (to, from) = channel(AHEAD);
    std::thread::Builder::new().name("log".to_owned()).spawn(move || read(Ordered::new(log), &to))?;
    Ok(from)
}

fn read(mut log: Ordered, to: &Sender<Result<Vec<Record>>>) {
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        let mut ended = Ok(false);
        while matches!(ended, Ok(false)) && batch.len() < BATCH {
            match log.next() {
                Ok(next) => {
                    ended = Ok(next.is_none());
                    batch.extend(next);
                }
                Err(error) => ended = Err(error),
            }
        }
        // Nobody listens any more once the replay has ended.
        let gone = to.blocking_send(Ok(batch)).is_err();
        match ended {
            Ok(false) if !gone => {}
            Err(error) if !gone => return drop(to.blocking_send(Err(error))),
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::{Class, Flags, Op, Origin};

    #[test]
    fn whoever_came_first_is_first() {
        let came = |at: u64, number: u64| {
            let record = Record {
                at: Duration::from_nanos(at),
                op: Op::Read,
                offset: number,
                len: 1,
                flags: Flags::NONE,
                origin: Origin::Guest,
                class: Class::Interactive,
                took: Duration::ZERO,
                errno: 0,
            };
            Reverse(Came(record, number))
        };
        let mut heap: BinaryHeap<_> =
            [(5, 1), (3, 2), (5, 3), (1, 4)].map(|(at, number)| came(at, number)).into();
        let order: Vec<u64> = std::iter::from_fn(|| heap.pop().map(|Reverse(one)| one.0.offset)).collect();
        assert_eq!(order, [4, 2, 1, 3]);
    }
}
