//! Guests that write down what each sector must hold, also when the daemon dies amid a request: a change that was
//! answered must be there, and one that was not may be, sector by sector.

use crate::raw::{READ, Raw, WRITE};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Sectors of the longest request: 1 MiB.
const LONGEST: u64 = 2048;

/// NBD_CMD_FLUSH, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES.
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZEROES: u16 = 6;

/// What a sector may hold.
#[derive(Clone, Copy, PartialEq)]
enum Sector {
    /// This stamp; 0 means zeros.
    Is(u64),
    /// Either: a change of it was not answered.
    OneOf(u64, u64),
    /// Anything: it was discarded.
    Any,
}

impl Sector {
    fn may_be(self, stamp: Option<u64>) -> bool {
        match self {
            Sector::Is(one) => stamp == Some(one),
            Sector::OneOf(one, other) => stamp == Some(one) || stamp == Some(other),
            Sector::Any => true,
        }
    }

    /// After a change to `next` that was not answered.
    fn perhaps(self, next: Sector) -> Sector {
        match (self, next) {
            (Sector::Is(one), Sector::Is(other)) => Sector::OneOf(one, other),
            _ => Sector::Any,
        }
    }
}

/// A part of a disk that one guest has to itself, and what is in it.
pub struct Ledger {
    number: u64,
    first: u64,
    sectors: Vec<Sector>,
    count: u64,
    rng: fastrand::Rng,
}

impl Ledger {
    /// Of the sectors from `first` on, which must be zeros. Those of one disk have different numbers.
    pub fn new(number: u64, first: u64, count: u64, seed: u64) -> Ledger {
        let rng = fastrand::Rng::with_seed(seed.wrapping_mul(1 << 8).wrapping_add(number));
        Ledger { number, first, sectors: vec![Sector::Is(0); count as usize], count: 0, rng }
    }

    /// So many, each with its share of the first `bytes` of a disk.
    pub fn shares(count: u64, bytes: u64, seed: u64) -> Vec<Ledger> {
        let share = bytes / SECTOR / count;
        (0..count).map(|number| Ledger::new(number + 1, number * share, share, seed)).collect()
    }

    fn answered(&self, answer: io::Result<u32>) -> io::Result<()> {
        answer.map(|error| assert_eq!(error, 0, "a request of guest {} has failed", self.number))
    }

    fn change(&mut self, raw: &mut Raw, command: u16, at: u64, length: u64, next: Sector) -> io::Result<()> {
        let stamps = (at..at + length).flat_map(|ix| stamp(self.count, self.number, self.first + ix));
        let data: Vec<u8> = if command == WRITE { stamps.collect() } else { Vec::new() };
        let bytes = (length * SECTOR) as u32;
        let answer = self.answered(raw.ask(command, (self.first + at) * SECTOR, bytes, &data));
        for sector in &mut self.sectors[at as usize..(at + length) as usize] {
            *sector = if answer.is_ok() { next } else { sector.perhaps(next) };
        }
        answer
    }

    /// Reads a range and compares; what may be one or the other is what it is from now on.
    fn check(&mut self, raw: &mut Raw, at: u64, length: u64) -> io::Result<()> {
        let bytes = (length * SECTOR) as u32;
        self.answered(raw.ask(READ, (self.first + at) * SECTOR, bytes, &[]))?;
        let data = raw.try_bytes(bytes as usize)?;
        for (ix, found) in (at..).zip(data.chunks(SECTOR as usize)) {
            let place = self.first + ix;
            let stamp = stamp_in(found, self.number, place);
            let may_be = self.sectors[ix as usize].may_be(stamp);
            assert!(
                may_be,
                "sector {place} of guest {} has {:02x?}: {}",
                self.number,
                &found[..32],
                self.told(ix)
            );
            if let Some(stamp) = stamp {
                self.sectors[ix as usize] = Sector::Is(stamp);
            }
        }
        Ok(())
    }

    fn told(&self, ix: u64) -> String {
        match self.sectors[ix as usize] {
            Sector::Is(one) => format!("not {one}"),
            Sector::OneOf(one, other) => format!("neither {one} nor {other}"),
            Sector::Any => "whatever".to_owned(),
        }
    }

    /// Reads everything.
    pub fn verify(&mut self, socket: &Path) {
        let mut raw = Raw::ready(socket);
        for at in (0..self.sectors.len() as u64).step_by(LONGEST as usize) {
            let length = LONGEST.min(self.sectors.len() as u64 - at);
            self.check(&mut raw, at, length).unwrap();
        }
    }
}

/// What a sector is filled with; zeros for no stamp.
pub(crate) fn stamp(count: u64, number: u64, place: u64) -> Vec<u8> {
    match count {
        0 => vec![0; SECTOR as usize],
        _ => [count, number, place, !count].map(u64::to_le_bytes).concat().repeat(SECTOR as usize / 32),
    }
}

/// The stamp of a sector; 0 for zeros, None for anything else.
pub(crate) fn stamp_in(found: &[u8], number: u64, place: u64) -> Option<u64> {
    let count = u64::from_le_bytes(found[..8].try_into().unwrap());
    (found == stamp(count, number, place)).then_some(count)
}

/// Somebody who makes requests and knows what must come of them.
pub trait Guest: Send + 'static {
    /// Makes one random request, and checks what it reads.
    ///
    /// # Errors
    /// The connection has ended: a change may have been made or not.
    fn step(&mut self, raw: &mut Raw) -> io::Result<()>;
}

impl Guest for Ledger {
    fn step(&mut self, raw: &mut Raw) -> io::Result<()> {
        let longest = if self.rng.u8(..8) == 0 { LONGEST } else { 64 };
        let length = self.rng.u64(1..=longest.min(self.sectors.len() as u64));
        let at = self.rng.u64(..=self.sectors.len() as u64 - length);
        match self.rng.u8(..32) {
            0 => self.answered(raw.ask(FLUSH, 0, 0, &[])),
            1 => self.change(raw, TRIM, at, length, Sector::Any),
            2..4 => self.change(raw, ZEROES, at, length, Sector::Is(0)),
            4..12 => self.check(raw, at, length),
            _ => {
                self.count += 1;
                self.change(raw, WRITE, at, length, Sector::Is(self.count))
            }
        }
    }
}

/// Guests at work, one request of each in flight.
pub struct Guests<G: Guest = Ledger> {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    threads: Vec<JoinHandle<(G, bool)>>,
}

impl<G: Guest> Guests<G> {
    /// Each with a connection of its own.
    pub fn start(socket: &Path, guests: Vec<G>) -> Guests<G> {
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = |mut guest: G| {
            let (mut raw, stop, requests) = (Raw::ready(socket), stop.clone(), requests.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if guest.step(&mut raw).is_err() {
                        return (guest, true);
                    }
                    requests.fetch_add(1, Ordering::Relaxed);
                }
                (guest, false)
            })
        };
        let threads = guests.into_iter().map(thread).collect();
        Guests { stop, requests, threads }
    }

    /// Requests that have been answered so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Waits until so many more have been answered.
    pub fn go_on(&self, more: u64) {
        let wanted = self.requests() + more;
        crate::mason::until("the guests go on", || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a guest has failed");
            self.requests() >= wanted
        });
    }

    /// Ends them; no connection may have ended before.
    pub fn stop(self) -> Vec<G> {
        self.end(|broken| assert!(!broken, "a guest's connection has ended"))
    }

    /// Ends them, whatever the daemon has done to them.
    pub fn part(self) -> Vec<G> {
        self.end(|_| ())
    }

    fn end(self, look: impl Fn(bool)) -> Vec<G> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.threads.into_iter().map(|thread| match thread.join() {
            Ok((guest, broken)) => {
                look(broken);
                guest
            }
            Err(panic) => std::panic::resume_unwind(panic),
        });
        ended.collect()
    }
}

impl Guests {
    /// Ends them and reads everything. Returns what they know.
    pub fn finish(self, socket: &Path) -> Vec<Ledger> {
        let mut ledgers = self.stop();
        ledgers.iter_mut().for_each(|ledger| ledger.verify(socket));
        ledgers
    }
}
