//! The cache as it is on its device: docs/formats/cache.md. What is read here is believed by nobody.

use super::journal::Tail;
use blockmason::data::Segment;
use blockmason::{Data, Flags, Op, Request};
use std::ops::Range;

const MAGIC: &[u8; 8] = b"MasonCch";
const VERSION: u32 = 1;
const RECORD: [u8; 4] = *b"MCRC";

/// What a disk does not tear; records and labels are written in these.
pub(super) const SECTOR: u64 = 512;

/// Bytes of each of the two places of the label.
pub(super) const PLACE: u64 = 4096;

/// Bytes of a record before its payload.
pub(super) const HEADER: u64 = 64;

/// Bytes of a table's entry.
pub(super) const ENTRY: u64 = 32;

/// The smallest ring.
pub(super) const RING: u64 = 64 << 10;

/// The longest record.
const RECORD_LEN: u64 = 1 << 20;

/// The longest text of a disk below.
const TEXT: usize = 256;

/// What no position, number and size reaches, so that sums do not overflow.
const FAR: u64 = 1 << 62;

/// Flags of a label.
const TABLE: u32 = 1;
const FLUSHING: u32 = 2;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The checksum of some bytes, the four from `at` on taken as zero, and of a payload that does not change.
fn checksum(bytes: &[u8], at: usize, payload: &Data) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[at + 4..]);
    add(&mut hasher, payload);
    hasher.finalize()
}

/// The checksum of bytes that do not change.
pub(super) fn sum(data: &Data) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    add(&mut hasher, data);
    hasher.finalize()
}

fn add(hasher: &mut crc32fast::Hasher, data: &Data) {
    data.for_each(|segment| match segment {
        Segment::Bytes(bytes) => hasher.update(bytes),
        Segment::Zeros(len) => {
            let zeros = [0; 4096];
            let pieces = (0..len).step_by(zeros.len());
            pieces.for_each(|from| hasher.update(&zeros[..zeros.len().min(len - from)]));
        }
        Segment::Foreign(_) => unreachable!("it has been copied"),
    });
}

/// How a cache is laid out, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Label {
    pub(super) id: u64,
    pub(super) generation: u64,
    /// Bytes of the disk below.
    pub(super) disk: u64,
    pub(super) line: u64,
    pub(super) slots: u64,
    pub(super) ring: u64,
    pub(super) tail: Tail,
    /// The checksum of the table, if it is right.
    pub(super) table: Option<u32>,
    /// A flush of the disk below is under way.
    pub(super) flushing: bool,
    /// What the disk below called its generation.
    pub(super) text: String,
}

/// What a label's place holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Valid(Label),
    /// A valid one of a version that is not known here.
    Version(u32),
    Other,
}

impl Label {
    /// That of a new cache on a device of `size` bytes, of which the ring takes about `ring`. None if there is too little
    /// room.
    pub(super) fn new(id: u64, life: u64, disk: u64, size: u64, line: u64, ring: u64) -> Option<Label> {
        let ring = ring.max(RING) / SECTOR * SECTOR;
        let room = size.checked_sub(2 * PLACE + ring)?;
        // The table takes up to one place more than its entries.
        let slots = (room.checked_sub(PLACE)? / (line + ENTRY)).min(u64::from(u32::MAX) - 1);
        let tail = Tail { at: 0, number: 1, life };
        let label = Label { id, disk, line, slots, ring, tail, ..Label::unknown() };
        (label.is_sane() && label.end() <= size).then_some(label)
    }

    /// One that says nothing yet.
    pub(super) fn unknown() -> Label {
        let tail = Tail { at: 0, number: 1, life: 0 };
        let text = String::new();
        Label {
            id: 0,
            generation: 0,
            disk: 0,
            line: 0,
            slots: 0,
            ring: RING,
            tail,
            table: None,
            flushing: false,
            text,
        }
    }

    fn is_sane(&self) -> bool {
        super::LINES.contains(&self.line)
            && (8..u64::from(u32::MAX)).contains(&self.slots)
            && self.ring >= RING
            && self.ring.is_multiple_of(SECTOR)
            && self.tail.at.is_multiple_of(SECTOR)
            && [self.ring, self.tail.at, self.tail.number, self.generation, self.disk]
                .into_iter()
                .all(|n| n < FAR)
    }

    /// Bytes of the table.
    pub(super) fn table_len(&self) -> u64 {
        self.slots * ENTRY
    }

    /// Where the table begins.
    pub(super) fn table_at(&self) -> u64 {
        2 * PLACE
    }

    /// Where a slot is.
    pub(super) fn slot_at(&self, slot: u32) -> u64 {
        self.table_at() + self.table_len().next_multiple_of(PLACE) + u64::from(slot) * self.line
    }

    fn ring_at(&self) -> u64 {
        self.table_at() + self.table_len().next_multiple_of(PLACE) + self.slots * self.line
    }

    /// Bytes of the device that it takes.
    pub(super) fn end(&self) -> u64 {
        self.ring_at() + self.ring
    }

    /// Where it goes on the device.
    pub(super) fn place(&self) -> u64 {
        self.generation % 2 * PLACE
    }

    /// Where bytes of the ring are on the device, in one or two pieces.
    pub(super) fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (start, from) = (self.ring_at(), at % self.ring);
        let first = len.min(self.ring - from);
        let pieces = [start + from..start + from + first, start..start + len - first];
        pieces.into_iter().filter(|piece| !piece.is_empty())
    }

    /// The longest payload of a record.
    pub(super) fn payload(&self) -> u64 {
        (RECORD_LEN + HEADER).min(self.ring / 4 / SECTOR * SECTOR) - HEADER
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; SECTOR as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
        let Tail { at, number, life } = self.tail;
        let words = [self.id, self.generation, self.disk, self.line, self.slots, self.ring, at, number, life];
        for (to, word) in bytes[16..88].chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let flags = if self.table.is_some() { TABLE } else { 0 } | if self.flushing { FLUSHING } else { 0 };
        bytes[88..92].copy_from_slice(&flags.to_le_bytes());
        bytes[92..96].copy_from_slice(&self.table.unwrap_or(0).to_le_bytes());
        let text = cut(&self.text).as_bytes();
        bytes[96..98].copy_from_slice(&(text.len() as u16).to_le_bytes());
        bytes[98..98 + text.len()].copy_from_slice(text);
        let sum = checksum(&bytes, 8, &Data::empty());
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Found {
        let Some(bytes) = bytes.get(..SECTOR as usize).filter(|bytes| bytes.starts_with(MAGIC)) else {
            return Found::Other;
        };
        if checksum(bytes, 8, &Data::empty()) != u32_at(bytes, 8) {
            return Found::Other;
        }
        if u32_at(bytes, 12) != VERSION {
            return Found::Version(u32_at(bytes, 12));
        }
        let [id, generation, disk, line, slots, ring, at, number, life] =
            [16, 24, 32, 40, 48, 56, 64, 72, 80].map(|at| u64_at(bytes, at));
        let flags = u32_at(bytes, 88);
        let len = usize::from(u16::from_le_bytes([bytes[96], bytes[97]])).min(TEXT);
        let label = Label {
            id,
            generation,
            disk,
            line,
            slots,
            ring,
            tail: Tail { at, number, life },
            table: (flags & TABLE != 0).then_some(u32_at(bytes, 92)),
            flushing: flags & FLUSHING != 0,
            text: String::from_utf8_lossy(&bytes[98..98 + len]).into_owned(),
        };
        if label.is_sane() { Found::Valid(label) } else { Found::Other }
    }
}

/// As much of a text as a label holds.
pub(super) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT)]
}

/// What a record does to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Write = 1,
    Zeroes = 2,
    Unmap = 3,
    /// Nothing: records of another life follow.
    Turn = 4,
}

impl Kind {
    /// The kind of a request that changes data.
    pub(super) fn of(req: &Request) -> Kind {
        match req.op {
            Op::WriteZeroes if !req.flags.has(Flags::MAY_UNMAP) => Kind::Zeroes,
            Op::WriteZeroes | Op::Discard => Kind::Unmap,
            Op::Write | Op::Read | Op::Flush | Op::Cache | Op::Extents | Op::Control => Kind::Write,
        }
    }
}

/// A change, with its bytes.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) kind: Kind,
    /// Of a turn, from the next life to itself.
    pub(super) range: Range<u64>,
    /// Of a write, its bytes.
    pub(super) data: Data,
}

/// Bytes that a record with such a payload takes in the ring.
pub(super) fn record_len(payload: u64) -> u64 {
    (HEADER + payload).next_multiple_of(SECTOR)
}

impl Record {
    /// As it is in the ring, in whole sectors. Its bytes must not change meanwhile.
    pub(super) fn encode(&self, label: &Label, number: u64, life: u64) -> Data {
        let payload = self.data.len() as u64;
        let mut bytes = [0; HEADER as usize];
        bytes[..4].copy_from_slice(&RECORD);
        let Range { start, end } = self.range;
        for (to, word) in bytes[8..48].chunks_mut(8).zip([label.id, life, number, start, end - start]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes[48..52].copy_from_slice(&(payload as u32).to_le_bytes());
        bytes[52] = self.kind as u8;
        let sum = checksum(&bytes, 4, &self.data);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        let rest = record_len(payload) - HEADER - payload;
        Data::concat([Data::copy_of(&bytes), self.data.clone(), Data::zeros(rest as usize)])
    }
}

/// The header of a record, before its payload has been read.
#[derive(Clone, Debug)]
pub(super) struct Header {
    bytes: [u8; HEADER as usize],
    kind: Kind,
    range: Range<u64>,
    /// Bytes of its payload: never more than [`Label::payload`].
    pub(super) payload: u64,
}

impl Header {
    /// The header of the record that is expected at `tail`, if `bytes` begin with it.
    pub(super) fn decode(bytes: &[u8], label: &Label, tail: Tail) -> Option<Header> {
        let bytes: [u8; HEADER as usize] = *bytes.first_chunk()?;
        let [id, life, number, offset, len] = [8, 16, 24, 32, 40].map(|at| u64_at(&bytes, at));
        let kind = match bytes[52] {
            1 => Kind::Write,
            2 => Kind::Zeroes,
            3 => Kind::Unmap,
            4 => Kind::Turn,
            _ => return None,
        };
        let payload = u64::from(u32_at(&bytes, 48));
        let end = offset.checked_add(len)?;
        let fits = if kind == Kind::Turn { len == 0 } else { len > 0 && end <= label.disk };
        let right = bytes[..4] == RECORD
            && (id, life, number) == (label.id, tail.life, tail.number)
            && fits
            && payload == if kind == Kind::Write { len } else { 0 }
            && payload <= label.payload();
        right.then_some(Header { bytes, kind, range: offset..end, payload })
    }

    /// The record, if its payload is right.
    pub(super) fn with(self, data: Data) -> Option<Record> {
        let right =
            data.len() as u64 == self.payload && checksum(&self.bytes, 4, &data) == u32_at(&self.bytes, 4);
        right.then_some(Record { kind: self.kind, range: self.range, data })
    }
}

/// The entry of a slot in the table.
pub(super) fn encode_entry(line: u64, valid: u128, sum: u32) -> [u8; ENTRY as usize] {
    let mut bytes = [0; ENTRY as usize];
    bytes[..8].copy_from_slice(&line.to_le_bytes());
    bytes[8..24].copy_from_slice(&valid.to_le_bytes());
    bytes[24..28].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What the table has of an empty slot.
pub(super) const EMPTY: u64 = u64::MAX;

/// Line, validity, checksum; None for an empty slot.
pub(super) fn decode_entry(bytes: &[u8; ENTRY as usize]) -> Option<(u64, u128, u32)> {
    let valid = bytes[8..].first_chunk().map_or(0, |bytes| u128::from_le_bytes(*bytes));
    Some((u64_at(bytes, 0), valid, u32_at(bytes, 24))).filter(|(line, ..)| *line != EMPTY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn label() -> Label {
        let new = Label::new(77, 5, 1 << 20, 1 << 20, 4096, 200 << 10).unwrap();
        Label { tail: Tail { at: 5 << 9, number: 12, life: 5 }, ..new }
    }

    #[test]
    fn a_label_comes_back_and_a_damaged_one_does_not() {
        let text = "8 commits".to_owned();
        let label = Label { generation: 8, table: Some(3), flushing: true, text, ..label() };
        assert_eq!(Label::decode(&label.encode()), Found::Valid(label.clone()));
        assert_eq!((label.place(), label.payload()), (0, (50 << 10) - HEADER));
        assert_eq!(Label::decode(&[0; 512]), Found::Other);
        for at in 0..SECTOR as usize {
            let mut damaged = label.encode();
            damaged[at] ^= 0x10;
            assert_eq!(Label::decode(&damaged), Found::Other, "byte {at}");
        }
        let mut other = label.encode();
        other[12] = 2;
        let sum = checksum(&other, 8, &Data::empty());
        other[8..12].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Label::decode(&other), Found::Version(2));
        let long = Label { text: "\u{e4}".repeat(200), ..label };
        assert_eq!(cut(&long.text).len(), 256);
        let Found::Valid(found) = Label::decode(&long.encode()) else { panic!("not found") };
        assert_eq!(found.text, "\u{e4}".repeat(128));
    }

    #[test]
    fn parts_lie_side_by_side_and_there_must_be_room() {
        for (size, line, ring) in [(1 << 20, 4096, 1), (130 << 10, 4096, 64 << 10), (1 << 40, 65536, 1 << 39)]
        {
            let label = Label::new(1, 1, 1, size, line, ring).unwrap();
            let table = label.table_at() + label.table_len();
            assert!(table <= label.slot_at(0) && label.slot_at(label.slots as u32) == label.ring_at());
            assert!(label.end() <= size && label.end() + 2 * line + PLACE > size, "{label:?}");
            assert!(label.payload() <= RECORD_LEN && record_len(label.payload()) <= label.ring / 4 + HEADER);
        }
        assert!(Label::new(1, 1, 1, 100 << 10, 4096, 64 << 10).is_none());
    }

    #[test]
    fn an_entry_comes_back() {
        assert_eq!(decode_entry(&encode_entry(7, 1 << 100, 9)), Some((7, 1 << 100, 9)));
        assert_eq!(decode_entry(&encode_entry(EMPTY, 0, 0)), None);
    }

    /// What is read of a ring at a place, as an open does it.
    fn read(bytes: &[u8], label: &Label, tail: Tail) -> Option<Record> {
        let header = Header::decode(bytes, label, tail)?;
        assert!(header.payload <= label.payload());
        let end = (HEADER + header.payload) as usize;
        header.with(Data::copy_of(bytes.get(HEADER as usize..end)?))
    }

    fn record() -> impl Strategy<Value = Record> {
        let kind = prop_oneof![Just(Kind::Write), Just(Kind::Zeroes), Just(Kind::Unmap), Just(Kind::Turn)];
        (kind, 0..1u64 << 19, 1..5000u64, any::<u8>()).prop_map(|(kind, start, len, byte)| match kind {
            Kind::Turn => Record { kind, range: start..start, data: Data::empty() },
            Kind::Write => {
                Record { kind, range: start..start + len, data: Data::from(vec![byte; len as usize]) }
            }
            Kind::Zeroes | Kind::Unmap => Record { kind, range: start..start + len, data: Data::empty() },
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn a_record_comes_back_and_a_damaged_one_does_not(
            record in record(),
            place in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let (label, tail) = (label(), label().tail);
            let bytes = record.encode(&label, tail.number, tail.life).to_vec();
            prop_assert_eq!(bytes.len() as u64, record_len(record.data.len() as u64));
            let found = read(&bytes, &label, tail).unwrap();
            prop_assert_eq!((found.kind, &found.range), (record.kind, &record.range));
            prop_assert_eq!(found.data.to_vec(), record.data.to_vec());
            for other in [Tail { number: 13, ..tail }, Tail { life: 6, ..tail }] {
                prop_assert!(read(&bytes, &label, other).is_none());
            }
            let other = Label { id: 78, ..label.clone() };
            prop_assert!(read(&bytes, &other, tail).is_none());
            let mut damaged = bytes;
            let at = place.index(HEADER as usize + record.data.len());
            damaged[at] ^= 1u8 << bit;
            prop_assert!(read(&damaged, &label, tail).is_none(), "byte {}", at);
        }

        /// Whatever a device holds, nothing panics, and nothing longer than a record is asked for; also where the
        /// checksums are those of a forger.
        #[test]
        fn hostile_bytes_are_refused(mut bytes in prop::collection::vec(any::<u8>(), 512..600), forged in any::<bool>()) {
            if forged {
                bytes[..8].copy_from_slice(MAGIC);
                bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
                let sum = checksum(&bytes[..512], 8, &Data::empty());
                bytes[8..12].copy_from_slice(&sum.to_le_bytes());
            }
            if let Found::Valid(label) = Label::decode(&bytes) {
                prop_assert!(label.payload() <= RECORD_LEN);
            }
            let label = label();
            if forged {
                bytes[..4].copy_from_slice(&RECORD);
                for (to, word) in bytes[8..32].chunks_mut(8).zip([label.id, label.tail.life, label.tail.number]) {
                    to.copy_from_slice(&word.to_le_bytes());
                }
            }
            if let Some(record) = read(&bytes, &label, label.tail) {
                prop_assert!(record.range.end <= label.disk);
            }
        }

        #[test]
        fn pieces_of_the_ring_are_its_bytes(at in 0..1u64 << 20, len in 1..200u64 << 10) {
            let label = label();
            let found: u64 = label.pieces(at, len).map(|piece| piece.end - piece.start).sum();
            prop_assert_eq!(found, len);
            prop_assert!(label.pieces(at, len).all(|piece| piece.start >= label.ring_at() && piece.end <= label.end()));
        }
    }
}
