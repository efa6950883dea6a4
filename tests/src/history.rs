//! Guests that write down in which order they have changed what: so a disk that has lost its newest changes can be told
//! to be what it was at one moment, with every change before it and none after.

use crate::ledger::{Guest, SECTOR, stamp, stamp_in};
use crate::raw::{READ, Raw, WRITE};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Sectors of a block that encryption takes as one: zeros are written to whole ones.
const BLOCK: u64 = 8;

/// Sectors of the longest request, 256 KiB: what caches keep as one.
const LONGEST: u64 = 512;

/// NBD_CMD_FLUSH, NBD_CMD_WRITE_ZEROES.
const FLUSH: u16 = 3;
const ZEROES: u16 = 6;

/// When something was asked for and answered, by a clock that all guests of a disk have together.
#[derive(Clone, Copy, Debug)]
struct Change {
    sent: u64,
    answered: Option<u64>,
}

/// What must be there of what was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All of it.
    Answered,
    /// What was answered before a flush was sent that was answered, too, by a disk of which this is promised.
    Flushed,
    /// What was there when it was looked at last.
    Nothing,
}

/// A part of a disk that one guest has to itself, and what it has been.
pub struct History {
    number: u64,
    first: u64,
    /// Of each sector: after how many changes it became what. The first line is what it was at first.
    sectors: Vec<Vec<(usize, u64)>>,
    /// One after the other: a guest waits for each.
    changes: Vec<Change>,
    /// When the last flush that counts was sent.
    flushed: u64,
    /// Whether flushes count: whether what they promise outlives whatever happens.
    pub flushes_count: bool,
    count: u64,
    clock: Arc<AtomicU64>,
    rng: fastrand::Rng,
}

impl History {
    /// So many, each with its share of the first `bytes` of a disk, which must be zeros.
    pub fn shares(count: u64, bytes: u64, seed: u64) -> Vec<History> {
        let share = bytes / SECTOR / count / BLOCK * BLOCK;
        // What is later than nothing.
        let clock = Arc::new(AtomicU64::new(1));
        let one = |number: u64| History {
            number: number + 1,
            first: number * share,
            sectors: vec![vec![(0, 0)]; share as usize],
            changes: Vec::new(),
            flushed: 0,
            flushes_count: false,
            count: 0,
            clock: clock.clone(),
            rng: fastrand::Rng::with_seed(seed.wrapping_mul(1 << 8).wrapping_add(number)),
        };
        (0..count).map(one).collect()
    }

    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn ask(&self, raw: &mut Raw, command: u16, at: u64, length: u64, data: &[u8]) -> io::Result<()> {
        self.answered(raw.ask(command, (self.first + at) * SECTOR, (length * SECTOR) as u32, data))
    }

    fn answered(&self, answer: io::Result<u32>) -> io::Result<()> {
        answer.map(|error| assert_eq!(error, 0, "a request of guest {} has failed", self.number))
    }

    fn change(&mut self, raw: &mut Raw, command: u16, at: u64, length: u64, count: u64) -> io::Result<()> {
        let stamps = (at..at + length).flat_map(|ix| stamp(count, self.number, self.first + ix));
        let data: Vec<u8> = if command == WRITE { stamps.collect() } else { Vec::new() };
        let sent = self.now();
        self.changes.push(Change { sent, answered: None });
        let after = self.changes.len();
        for sector in &mut self.sectors[at as usize..(at + length) as usize] {
            sector.push((after, count));
        }
        self.ask(raw, command, at, length, &data)?;
        self.changes[after - 1].answered = Some(self.now());
        Ok(())
    }

    fn flush(&mut self, raw: &mut Raw) -> io::Result<()> {
        let sent = self.now();
        self.answered(raw.ask(FLUSH, 0, 0, &[]))?;
        if self.flushes_count {
            self.flushed = sent;
        }
        Ok(())
    }

    /// Nothing else has changed it: each sector is what it became last.
    fn check(&self, raw: &mut Raw, at: u64, length: u64) -> io::Result<()> {
        let found = self.read(raw, at, length)?;
        for (sector, found) in self.sectors[at as usize..].iter().zip(&found) {
            let last = sector.last().map(|(_, stamp)| *stamp);
            assert_eq!(*found, last, "guest {} reads from {}: {found:?}", self.number, self.first + at);
        }
        Ok(())
    }

    /// The stamps in a range; None for what is none.
    fn read(&self, raw: &mut Raw, at: u64, length: u64) -> io::Result<Vec<Option<u64>>> {
        self.ask(raw, READ, at, length, &[])?;
        let data = raw.try_bytes((length * SECTOR) as usize)?;
        let sectors = (self.first + at..).zip(data.chunks(SECTOR as usize));
        Ok(sectors.map(|(place, found)| stamp_in(found, self.number, place)).collect())
    }

    fn read_all(&self, raw: &mut Raw) -> Vec<Option<u64>> {
        let all = self.sectors.len() as u64;
        let ranges = (0..all).step_by(LONGEST as usize).map(|at| (at, LONGEST.min(all - at)));
        ranges.flat_map(|(at, length)| self.read(raw, at, length).unwrap()).collect()
    }

    /// For each number of changes whether these sectors are what they were after so many.
    fn moments(&self, found: &[Option<u64>]) -> Vec<bool> {
        let end = self.changes.len() + 1;
        // How many sectors are right, as differences.
        let mut right = vec![0_i64; end + 1];
        for (sector, found) in self.sectors.iter().zip(found) {
            for (ix, (from, stamp)) in sector.iter().enumerate() {
                if Some(*stamp) == *found {
                    right[*from] += 1;
                    right[sector.get(ix + 1).map_or(end, |next| next.0)] -= 1;
                }
            }
        }
        let mut sum = 0;
        let counted = right[..end].iter().map(|change| {
            sum += change;
            sum == self.sectors.len() as i64
        });
        counted.collect()
    }

    /// How many changes were answered before that time.
    fn answered_before(&self, time: u64) -> usize {
        self.changes.partition_point(|change| change.answered.is_some_and(|answered| answered < time))
    }

    /// It is what it was after so many changes, for ever: those after them never come.
    fn cut(&mut self, changes: usize) {
        self.changes.truncate(changes);
        for sector in &mut self.sectors {
            sector.truncate(sector.partition_point(|(from, _)| *from <= changes));
        }
        let now = self.now();
        for change in self.changes.iter_mut().filter(|change| change.answered.is_none()) {
            change.answered = Some(now);
        }
    }

    /// What it is now can never be lost.
    pub fn forget(&mut self) {
        for sector in &mut self.sectors {
            sector.drain(..sector.len() - 1);
            sector[0].0 = 0;
        }
        self.changes.clear();
        self.flushed = 0;
    }
}

impl Guest for History {
    fn step(&mut self, raw: &mut Raw) -> io::Result<()> {
        let longest = if self.rng.u8(..8) == 0 { LONGEST } else { 32 };
        let length = self.rng.u64(1..=longest);
        let at = self.rng.u64(..=self.sectors.len() as u64 - length);
        match self.rng.u8(..32) {
            0..2 => self.flush(raw),
            2..4 => self.change(raw, ZEROES, at / BLOCK * BLOCK, length.next_multiple_of(BLOCK), 0),
            4..12 => self.check(raw, at, length),
            _ => {
                self.count += 1;
                self.change(raw, WRITE, at, length, self.count)
            }
        }
    }
}

/// How much of what was done a disk has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Changes that are there, since it could last be told that none of them can be lost.
    pub there: usize,
    /// Changes that were answered and are not.
    pub lost: usize,
}

/// Reads a disk, which must be what it was at one moment: with all changes before it and none after, and with what must
/// be there. What is not there then never was. Nobody else changes the disk.
pub fn look(histories: &mut [History], socket: &Path, kept: Kept, told: &str) -> Found {
    let mut raw = Raw::ready(socket);
    let found: Vec<_> = histories.iter().map(|history| history.read_all(&mut raw)).collect();
    let moments: Vec<_> =
        histories.iter().zip(&found).map(|(history, found)| history.moments(found)).collect();
    for ((history, moments), found) in histories.iter().zip(&moments).zip(&found) {
        assert!(moments.contains(&true), "{told}: {}", torn(history, found));
    }
    let least = least(histories, kept);
    let counts = agree(histories, &moments, &least);
    let counts = counts.unwrap_or_else(|why| panic!("{told}: {why}"));
    let mut sum = Found::default();
    for (history, count) in histories.iter_mut().zip(&counts) {
        sum.there += count;
        sum.lost += history.answered_before(u64::MAX).saturating_sub(*count);
        history.cut(*count);
    }
    sum
}

fn least(histories: &[History], kept: Kept) -> Vec<usize> {
    let until = match kept {
        Kept::Answered => u64::MAX,
        Kept::Flushed => histories.iter().map(|history| history.flushed).max().unwrap_or(0),
        Kept::Nothing => 0,
    };
    histories.iter().map(|history| history.answered_before(until)).collect()
}

/// The first moment of the disk that is one of each guest's: who has a change has all that were answered before that was
/// sent, of the others as well.
fn agree(histories: &[History], moments: &[Vec<bool>], least: &[usize]) -> Result<Vec<usize>, String> {
    let next = |guest: usize, least: usize| {
        let later = moments[guest].iter().skip(least).position(|is_one| *is_one).map(|more| least + more);
        later.ok_or_else(|| {
            let last = moments[guest].iter().rposition(|is_one| *is_one);
            format!("guest {} has {last:?} changes, and should have {least}", histories[guest].number)
        })
    };
    let mut counts = vec![0; histories.len()];
    for (guest, count) in counts.iter_mut().enumerate() {
        *count = next(guest, least[guest])?;
    }
    loop {
        let newest = |(history, count): (&History, &usize)| Some(history.changes[count.checked_sub(1)?].sent);
        let time = histories.iter().zip(&counts).filter_map(newest).max().unwrap_or(0);
        let before = counts.clone();
        for (guest, count) in counts.iter_mut().enumerate() {
            *count = next(guest, histories[guest].answered_before(time).max(*count))?;
        }
        if counts == before {
            return Ok(counts);
        }
    }
}

/// Where a guest's part is no moment of it.
fn torn(history: &History, found: &[Option<u64>]) -> String {
    let newest = |(sector, found): (&Vec<(usize, u64)>, &Option<u64>)| {
        sector.iter().rfind(|(_, stamp)| Some(*stamp) == *found).map(|line| line.0)
    };
    let newest: Vec<_> = history.sectors.iter().zip(found).map(newest).collect();
    let reached = newest.iter().flatten().max().copied().unwrap_or(0);
    let is_old = |(sector, found): &(&Vec<(usize, u64)>, &Option<u64>)| {
        let was = sector.iter().rfind(|(from, _)| *from <= reached).map(|line| line.1);
        was != **found
    };
    let old = history.sectors.iter().zip(found).position(|pair| is_old(&pair)).unwrap_or(0);
    format!(
        "guest {} has change {reached} of {}, and sector {} is {:?} of {:?}",
        history.number,
        history.changes.len(),
        history.first + old as u64,
        found[old],
        history.sectors[old]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two guests of 16 sectors who have each changed some, at times 1 to 2, 3 to 4, and so on.
    fn two(changes: &[(usize, std::ops::Range<usize>)]) -> Vec<History> {
        let mut guests = History::shares(2, 2 * 16 * SECTOR, 1);
        for (number, (guest, sectors)) in changes.iter().enumerate() {
            let history = &mut guests[*guest];
            let sent = history.now();
            let answered = Some(history.now());
            history.changes.push(Change { sent, answered });
            let line = (history.changes.len(), number as u64 + 1);
            history.sectors[sectors.clone()].iter_mut().for_each(|sector| sector.push(line));
        }
        guests
    }

    /// What a disk has after so many changes of each.
    fn after(guests: &[History], counts: [usize; 2]) -> Vec<Vec<Option<u64>>> {
        let at = |sector: &Vec<(usize, u64)>, count| {
            sector.iter().rfind(|line| line.0 <= count).map(|line| line.1)
        };
        let of = |(guest, count): (&History, usize)| {
            guest.sectors.iter().map(|sector| at(sector, count)).collect()
        };
        guests.iter().zip(counts).map(of).collect()
    }

    fn agreed(guests: &[History], found: &[Vec<Option<u64>>], kept: Kept) -> Result<Vec<usize>, String> {
        let moments: Vec<_> = guests.iter().zip(found).map(|(guest, found)| guest.moments(found)).collect();
        agree(guests, &moments, &least(guests, kept))
    }

    #[test]
    fn a_moment_has_all_before_it() {
        let mut guests = two(&[(0, 0..4), (1, 0..4), (0, 2..6), (1, 8..9)]);
        guests[0].flushed = 6;
        for (counts, kept, right) in [
            ([2, 2], Kept::Answered, true),
            ([2, 1], Kept::Answered, false),
            ([2, 1], Kept::Flushed, true),
            ([1, 1], Kept::Flushed, true),
            ([1, 0], Kept::Flushed, false),
            ([1, 0], Kept::Nothing, true),
            ([0, 0], Kept::Nothing, true),
            // The second of the first guest was sent when the first of the second one had been answered.
            ([2, 0], Kept::Nothing, false),
            ([0, 1], Kept::Nothing, false),
        ] {
            let found = after(&guests, counts);
            let agreed = agreed(&guests, &found, kept);
            assert_eq!(agreed.is_ok(), right, "{counts:?} {kept:?}: {agreed:?}");
        }
    }

    #[test]
    fn half_a_change_is_no_moment() {
        let guests = two(&[(0, 0..4), (0, 2..6)]);
        let mut found = after(&guests, [2, 0]);
        assert!(guests[0].moments(&found[0]).contains(&true));
        found[0][5] = Some(0);
        assert!(!guests[0].moments(&found[0]).contains(&true));
        assert!(torn(&guests[0], &found[0]).contains("sector 5"));
    }

    #[test]
    fn what_is_cut_off_never_was() {
        let mut guests = two(&[(0, 0..4), (0, 2..6), (0, 0..1)]);
        guests[0].cut(1);
        let found = after(&guests, [3, 0]);
        assert_eq!(agreed(&guests, &found, Kept::Answered), Ok(vec![1, 0]));
        guests[0].forget();
        assert_eq!(agreed(&guests, &found, Kept::Answered), Ok(vec![0, 0]));
    }
}
