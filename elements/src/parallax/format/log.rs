//! Records of the log.

use super::{BLOCK, Entry, Id, PACK, Pack, Slot, is_sound, put, seal, short, u32_at, u40_at, u64_at};
use std::ops::Range;

const MAGIC: &[u8; 4] = b"PXLG";
const HEADER: usize = 64;

/// What has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Change {
    /// Blocks of a volume are elsewhere now.
    Map {
        volume: u32,
        first: u64,
        len: u32,
        /// The first block of the pool; 0 is a hole.
        at: u64,
        /// Of what is there.
        crc: u32,
        /// The pack that they are, all of its blocks.
        pack: Option<Pack>,
        /// Of each block, in volumes with checksums.
        crcs: Vec<u32>,
    },
    /// A snapshot is taken.
    Snapshot { number: u32, volume: u32, made: u64, name: String },
}

impl Change {
    /// Blocks of the pool that what has been written is in.
    pub(in super::super) fn room(&self) -> Range<u64> {
        match self {
            Change::Map { at, len, pack, .. } => {
                Slot { at: *at, pack: *pack, ..Slot::default() }.room(u64::from(*len))
            }
            Change::Snapshot { .. } => 0..0,
        }
    }

    /// Bytes that it takes. `checksums` says whether the volume has them.
    fn len(&self) -> usize {
        match self {
            Change::Map { crcs, .. } => 24 + 4 * crcs.len(),
            Change::Snapshot { name, .. } => 18 + name.len(),
        }
    }

    fn encode(&self, to: &mut Vec<u8>) {
        let from = to.len();
        to.resize(from + self.len(), 0);
        let bytes = &mut to[from..];
        match self {
            Change::Map { volume, first, len, at, crc, pack, crcs } => {
                bytes[0] = 1;
                put(bytes, 1, 4, u64::from(*volume));
                put(bytes, 5, 5, *first);
                put(bytes, 10, 4, u64::from(*len));
                put(bytes, 14, 5, *at);
                put(bytes, 19, 4, u64::from(*crc));
                bytes[23] = Pack::encode(*pack) << 1 | u8::from(!crcs.is_empty());
                for (crc, at) in crcs.iter().zip((24..).step_by(4)) {
                    put(bytes, at, 4, u64::from(*crc));
                }
            }
            Change::Snapshot { number, volume, made, name } => {
                bytes[0] = 2;
                put(bytes, 1, 4, u64::from(*number));
                put(bytes, 5, 4, u64::from(*volume));
                put(bytes, 9, 8, *made);
                bytes[17] = name.len() as u8;
                bytes[18..].copy_from_slice(name.as_bytes());
            }
        }
    }

    /// The change at the start of these bytes, and what is behind it.
    fn decode(bytes: &[u8]) -> Option<(Change, &[u8])> {
        match bytes.first()? {
            1 if bytes.len() >= 24 => {
                let len = u32_at(bytes, 10);
                let sums = if bytes[23] & 1 == 1 { len as usize } else { 0 };
                let (first, at) = (u40_at(bytes, 5), u40_at(bytes, 14));
                let pack = Pack::decode(bytes[23] >> 1).ok()?;
                let is_pack = at != 0 && first.is_multiple_of(PACK) && u64::from(len) == PACK;
                if len == 0 || pack.is_some() && !is_pack {
                    return None;
                }
                let rest = &bytes[24..];
                if rest.len() / 4 < sums {
                    return None;
                }
                let crcs = (0..sums).map(|ix| u32_at(rest, 4 * ix)).collect();
                let (volume, crc) = (u32_at(bytes, 1), u32_at(bytes, 19));
                Some((Change::Map { volume, first, len, at, crc, pack, crcs }, &rest[4 * sums..]))
            }
            2 if bytes.len() >= 18 => {
                let len = bytes[17] as usize;
                let name = bytes.get(18..18 + len).and_then(|name| std::str::from_utf8(name).ok())?;
                if !(1..=Entry::NAME).contains(&len) {
                    return None;
                }
                let (number, volume, made) = (u32_at(bytes, 1), u32_at(bytes, 5), u64_at(bytes, 9));
                let name = name.to_owned();
                Some((Change::Snapshot { number, volume, made, name }, &bytes[18 + len..]))
            }
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Record {
    pub(in super::super) epoch: u64,
    pub(in super::super) number: u64,
    /// All up to this one were known to be durable, with their data.
    pub(in super::super) settled: u64,
    pub(in super::super) changes: Vec<Change>,
}

/// What a record says of itself.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Stamp {
    pub(in super::super) epoch: u64,
    pub(in super::super) number: u64,
    /// As in [`Record`].
    pub(in super::super) settled: u64,
}

impl Stamp {
    /// The record of these changes, in whole blocks.
    pub(in super::super) fn encode<'a>(&self, id: &Id, changes: impl Iterator<Item = &'a Change>) -> Vec<u8> {
        let (mut bytes, mut count) = (vec![0; HEADER], 0);
        for change in changes {
            change.encode(&mut bytes);
            count += 1;
        }
        let len = bytes.len();
        bytes.resize(len.next_multiple_of(BLOCK as usize), 0);
        bytes[..4].copy_from_slice(MAGIC);
        let words = [short(id), self.epoch, self.number, self.settled];
        for (word, at) in words.into_iter().zip((8..).step_by(8)) {
            put(&mut bytes, at, 8, word);
        }
        put(&mut bytes, 40, 4, count);
        put(&mut bytes, 44, 4, len as u64);
        seal(&mut bytes, 4);
        bytes
    }
}

impl Record {
    /// The longest, in bytes: what one request may change, and more.
    pub(in super::super) const MOST: usize = 1 << 20;

    /// Bytes that changes take in a record, without its header.
    pub(in super::super) fn bytes_of(change: &Change) -> usize {
        change.len()
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(in super::super) fn encode(&self, id: &Id) -> Vec<u8> {
        let Record { epoch, number, settled, .. } = *self;
        Stamp { epoch, number, settled }.encode(id, self.changes.iter())
    }

    /// How many bytes the record has that begins with this block, whole blocks; None if none does.
    pub(in super::super) fn span(block: &[u8], id: &Id, epoch: u64, number: u64) -> Option<usize> {
        let own = block.len() >= HEADER
            && block.starts_with(MAGIC)
            && u64_at(block, 8) == short(id)
            && u64_at(block, 16) == epoch
            && u64_at(block, 24) == number;
        let len = own.then(|| u32_at(block, 44) as usize)?;
        (HEADER..=Record::MOST).contains(&len).then(|| len.next_multiple_of(BLOCK as usize))
    }

    /// None if it is no record, or a damaged one.
    pub(in super::super) fn decode(bytes: &[u8], id: &Id, epoch: u64, number: u64) -> Option<Record> {
        let span = Record::span(bytes, id, epoch, number)?;
        if span != bytes.len() || !is_sound(bytes, 4) {
            return None;
        }
        let (count, len) = (u32_at(bytes, 40) as usize, u32_at(bytes, 44) as usize);
        if bytes[48..HEADER].iter().chain(&bytes[len..]).any(|byte| *byte != 0) {
            return None;
        }
        let (mut rest, mut changes) = (&bytes[HEADER..len], Vec::new());
        while !rest.is_empty() {
            let (change, behind) = Change::decode(rest)?;
            changes.push(change);
            rest = behind;
        }
        let settled = u64_at(bytes, 32);
        (changes.len() == count).then_some(Record { epoch, number, settled, changes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn change() -> impl Strategy<Value = Change> {
        let numbers = (any::<u32>(), 0..super::super::LIMIT, 1u32..20, any::<u32>(), any::<bool>(), 0..4_u8);
        let map = numbers.prop_map(|(volume, mut first, mut len, crc, sums, ix)| {
            let pack = Pack::decode([0, 0, 0x17, 0x21][usize::from(ix)]).unwrap();
            if pack.is_some() {
                (first, len) = (super::super::unit(first).start, PACK as u32);
            }
            let crcs = if sums { (0..len).collect() } else { Vec::new() };
            Change::Map { volume, first, len, at: first / 2 + 1, crc, pack, crcs }
        });
        let snapshot = (any::<u32>(), "[a-zä]{1,40}").prop_map(|(number, name)| Change::Snapshot {
            number,
            volume: 1,
            made: 77,
            name,
        });
        prop_oneof![map, snapshot]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_record_says_what_was_written_and_no_flipped_bit_is_believed(
            changes in prop::collection::vec(change(), 0..200), flips in prop::collection::vec(any::<usize>(), 60),
        ) {
            let record = Record { epoch: 4, number: 900, settled: 7, changes };
            let bytes = record.encode(&[5; 16]);
            prop_assert_eq!(Record::decode(&bytes, &[5; 16], 4, 900), Some(record));
            prop_assert_eq!(Record::decode(&bytes, &[5; 16], 5, 900), None);
            prop_assert_eq!(Record::decode(&bytes, &[5; 16], 4, 901), None);
            for flip in flips {
                let mut other = bytes.clone();
                let bit = flip % (bytes.len() * 8);
                other[bit / 8] ^= 1 << (bit % 8);
                prop_assert_eq!(Record::decode(&other, &[5; 16], 4, 900), None);
            }
        }
    }
}
