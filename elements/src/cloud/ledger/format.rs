//! The ledger byte for byte: docs/formats/ledger.md.

use super::{Day, Ledger, MOST_DAYS};
use crate::calendar::{LAST, day_of};
use crate::cloud::counts::Sum;
use crate::cloud::price::Prices;
use blockmason::{Error, Result};
use std::collections::BTreeMap;

/// Bytes of a slot, of which a file has two.
pub(super) const SLOT: usize = 65536;

const MAGIC: &[u8; 8] = b"MasonLGR";
const VERSION: u32 = 1;
const HEADER: usize = 128;
const RECORD: usize = 128;
const CHECKSUM: std::ops::Range<usize> = 8..12;

/// What a slot says, and its number.
pub(super) fn encode(ledger: &Ledger, number: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + ledger.days.len() * RECORD);
    bytes.extend(MAGIC);
    bytes.extend([0; 4]);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([number, ledger.at, ledger.stored].iter().flat_map(|number| number.to_le_bytes()));
    bytes.extend((ledger.days.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    let Prices { put, get, month, out } = ledger.prices;
    bytes.extend([put, get, month, out].iter().flat_map(|price| price.to_le_bytes()));
    for (period, dollars) in [ledger.raised_day, ledger.raised_month] {
        bytes.extend(u64::from(period).to_le_bytes());
        bytes.extend(dollars.to_le_bytes());
    }
    bytes.extend(ledger.volume);
    for (number, day) in &ledger.days {
        bytes.extend(u64::from(*number).to_le_bytes());
        bytes.extend(day.seconds.to_le_bytes());
        let Sum { requests, bytes: moved } = day.sum;
        bytes.extend(requests.iter().chain(&moved).flat_map(|number| number.to_le_bytes()));
        bytes.extend(day.byte_seconds.to_le_bytes());
        bytes.extend([0; 16]);
    }
    let checksum = crc32fast::hash(&bytes);
    bytes[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A slot whose contents may be anything.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// 32 bits, and as many zeros.
    fn small(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    fn dollars(&mut self) -> Option<f64> {
        let dollars = f64::from_le_bytes(self.take()?);
        (dollars.is_finite() && dollars >= 0.0).then_some(dollars)
    }

    fn numbers(&mut self) -> Option<[u64; 5]> {
        let mut numbers = [0; 5];
        for number in &mut numbers {
            *number = self.number()?;
        }
        Some(numbers)
    }

    fn raised(&mut self) -> Option<(u32, f64)> {
        Some((self.small()?, self.dollars()?))
    }

    fn day(&mut self) -> Option<(u32, Day)> {
        let (number, seconds) = (self.small()?, self.number()?);
        let sum = Sum { requests: self.numbers()?, bytes: self.numbers()? };
        let byte_seconds = u128::from_le_bytes(self.take()?);
        let known = Day { seconds, sum, byte_seconds };
        let can_be = number <= day_of(LAST) && seconds <= MOST_SECONDS;
        (self.take()? == [0; 16] && can_be).then_some((number, known))
    }
}

/// A clock that was set back makes a day longer, each time by a day at the most.
const MOST_SECONDS: u64 = 1 << 40;

/// What a sound slot says, and its number. Fails with what is wrong with it.
pub(super) fn decode(slot: &[u8]) -> Result<(u64, Ledger), &'static str> {
    let short = "it is too short";
    if slot.get(..MAGIC.len()).ok_or(short)? != MAGIC {
        return Err("it does not begin as a ledger does");
    }
    let days =
        slot.get(40..44).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes).ok_or(short)?;
    let end = HEADER + (days as usize).min(MOST_DAYS) * RECORD;
    let mut bytes = slot.get(..end).ok_or(short)?.to_vec();
    let written = bytes[CHECKSUM].to_vec();
    bytes[CHECKSUM].fill(0);
    if days as usize > MOST_DAYS || crc32fast::hash(&bytes).to_le_bytes() != *written {
        return Err("its checksum does not fit");
    }
    let mut reader = Reader(&bytes[12..]);
    if reader.take().map(u32::from_le_bytes) != Some(VERSION) {
        return Err("its version is one that this program does not know");
    }
    contents(&mut reader).ok_or("it says what cannot be")
}

fn contents(reader: &mut Reader<'_>) -> Option<(u64, Ledger)> {
    let (number, at, stored, count) = (reader.number()?, reader.number()?, reader.number()?, reader.small()?);
    let mut price = || reader.dollars();
    let prices = Prices { put: price()?, get: price()?, month: price()?, out: price()? };
    let (raised_day, raised_month) = (reader.raised()?, reader.raised()?);
    let volume = reader.take()?;
    let mut days = BTreeMap::new();
    for _ in 0..count {
        let (day, known) = reader.day()?;
        if days.last_key_value().is_some_and(|(last, _)| *last >= day) {
            return None;
        }
        days.insert(day, known);
    }
    let can_be = at <= LAST && (1..u64::MAX).contains(&number);
    let ledger = Ledger { volume, at, stored, days, prices, raised_day, raised_month };
    can_be.then_some((number, ledger))
}

/// What a file says: the newer sound slot, and which one it is.
///
/// # Errors
/// One sentence about why it is no ledger.
pub(super) fn read(bytes: &[u8]) -> Result<(usize, u64, Ledger)> {
    let refused = |why: String| Error::invalid(format!("{why}; it is not overwritten: name another file"));
    if bytes.len() != 2 * SLOT {
        return Err(refused(format!("it has {} bytes, and a ledger {}", bytes.len(), 2 * SLOT)));
    }
    let slots = [decode(&bytes[..SLOT]), decode(&bytes[SLOT..])];
    let reasons: Vec<_> = slots.iter().map(|slot| slot.as_ref().err().copied().unwrap_or_default()).collect();
    let sound = slots.into_iter().enumerate().filter_map(|(at, slot)| slot.ok().map(|slot| (at, slot)));
    let newest = sound.max_by_key(|(_, (number, _))| *number);
    let (slot, (number, ledger)) = newest.ok_or_else(|| {
        refused(format!("neither half of it is a sound ledger: {}; {}", reasons[0], reasons[1]))
    })?;
    Ok((slot, number, ledger))
}
