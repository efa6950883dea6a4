//! Clients that stamp every block they write, and know what must be in each: a write that is lost, done twice or
//! done too late shows as a block with another stamp.

use crate::raw::{READ, Raw, WRITE};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;

/// Requests of a client that are in flight at once, at most.
const DEPTH: usize = 16;

/// NBD_CMD_FLUSH.
const FLUSH: u16 = 3;

/// Connections that write and read until they are told to end. They panic when a request fails or a block is not
/// what it must be; [`finish`](Self::finish) passes that on.
pub struct Stampers {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Stampers {
    /// So many connections share the blocks of a disk from `first` on, `count` of them, which must be zeros or
    /// never read before.
    pub fn start(socket: &Path, first: u64, count: u64, connections: u64, seed: u64) -> Stampers {
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = |number| {
            let own: Vec<u64> =
                (first..first + count).filter(|block| block % connections == number).collect();
            let stamper = Stamper {
                raw: Raw::ready(socket),
                rng: Random(seed.wrapping_mul(1 << 8).wrapping_add(number + 1)),
                model: vec![None; own.len()],
                own,
                count: 0,
                number,
            };
            let (stop, requests) = (stop.clone(), requests.clone());
            std::thread::spawn(move || stamper.run(&stop, &requests))
        };
        let threads = (0..connections).map(thread).collect();
        Stampers { stop, requests, threads }
    }

    /// Requests that have been answered so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Waits until so many more have been answered.
    pub fn go_on(&self, more: u64) {
        let wanted = self.requests() + more;
        crate::mason::until("the clients go on", || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a client has failed");
            self.requests() >= wanted
        });
    }

    /// Ends them, once each has read all of its blocks. Returns how many requests there were.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.requests.load(Ordering::Relaxed)
    }
}

/// xorshift: a seed gives the same requests again.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }
}

struct Stamper {
    raw: Raw,
    rng: Random,
    /// The blocks that nobody else writes.
    own: Vec<u64>,
    /// The stamp that each of them has, once it has been written.
    model: Vec<Option<u64>>,
    count: u64,
    number: u64,
}

impl Stamper {
    fn run(mut self, stop: &AtomicBool, requests: &AtomicU64) {
        while !stop.load(Ordering::Relaxed) {
            let burst = self.burst();
            self.carry_out(&burst);
            requests.fetch_add(burst.len() as u64, Ordering::Relaxed);
        }
        for first in (0..self.own.len()).step_by(DEPTH) {
            let rest: Vec<_> = (first..self.own.len().min(first + DEPTH)).map(|ix| (READ, ix)).collect();
            self.carry_out(&rest);
        }
    }

    /// Reads and writes of different blocks; or a flush, which is of no block.
    fn burst(&mut self) -> Vec<(u16, usize)> {
        let mut burst: Vec<(u16, usize)> = Vec::new();
        if self.rng.below(16) == 0 {
            return vec![(FLUSH, 0)];
        }
        for _ in 0..=self.rng.below(DEPTH) {
            let ix = self.rng.below(self.own.len());
            let command = if self.rng.below(3) == 0 { READ } else { WRITE };
            if burst.iter().all(|(_, other)| *other != ix) {
                burst.push((command, ix));
            }
        }
        burst
    }

    fn carry_out(&mut self, burst: &[(u16, usize)]) {
        for &(command, ix) in burst {
            match command {
                FLUSH => self.raw.request(FLUSH, 0, 0),
                READ => self.raw.request(READ, self.own[ix] * BLOCK, BLOCK as u32),
                _ => {
                    self.count += 1;
                    self.model[ix] = Some(self.count);
                    let offset = self.own[ix] * BLOCK;
                    self.raw.request(WRITE, offset, BLOCK as u32);
                    self.raw.send(&stamp(self.count, self.number, offset));
                }
            }
        }
        for _ in burst {
            let (error, offset) = self.raw.reply_to();
            assert_eq!(error, 0, "a request at {offset} of client {} has failed", self.number);
            let read = burst.iter().find(|(command, ix)| *command == READ && self.own[*ix] * BLOCK == offset);
            let Some((_, ix)) = read else { continue };
            let found = self.raw.bytes(BLOCK as usize);
            if let Some(count) = self.model[*ix] {
                let is = u64::from_le_bytes(found[..8].try_into().unwrap());
                let whole = found == stamp(count, self.number, offset);
                assert!(
                    whole,
                    "the block at {offset} has stamp {is} instead of {count} of client {}",
                    self.number
                );
            }
        }
    }
}

/// What a block is filled with.
fn stamp(count: u64, number: u64, offset: u64) -> Vec<u8> {
    [count, number, offset, !count].map(u64::to_le_bytes).concat().repeat(BLOCK as usize / 32)
}
