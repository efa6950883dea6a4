//! The log as it is on its device: docs/formats/wal.md. What is read here is believed by nobody.

use blockmason::data::Segment;
use blockmason::{Data, Flags, Op, Request};
use std::ops::Range;

const MAGIC: &[u8; 8] = b"MasonWAL";
const VERSION: u32 = 1;

/// Bytes of a superblock that say something.
const SUPERBLOCK: usize = 96;

/// Bytes of a slot that are written: what a disk does not tear.
pub(super) const SECTOR: usize = 512;

const RECORD: [u8; 4] = *b"MREC";

/// Bytes of a record before its payload.
pub(super) const HEADER: usize = 64;

/// The longest payload of a record, in bytes, in the largest log.
const PAYLOAD: u64 = 1 << 20;

/// Bytes of each of the two slots of the superblock.
pub(super) const SLOT: u64 = 4096;

/// What no position and no size reaches, so that sums do not overflow.
const FAR: u64 = 1 << 62;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The checksum of some bytes, the four from `at` on taken as zero, and of a payload.
fn checksum(bytes: &[u8], at: usize, payload: &Data) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[at + 4..]);
    payload.for_each(|segment| match segment {
        Segment::Bytes(bytes) => hasher.update(bytes),
        Segment::Zeros(len) => {
            let zeros = [0; 4096];
            (0..len)
                .step_by(zeros.len())
                .for_each(|from| hasher.update(&zeros[..zeros.len().min(len - from)]));
        }
        Segment::Foreign(_) => unreachable!("the payload has been made stable"),
    });
    hasher.finalize()
}

/// Where the log begins, and how it is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) log_id: u64,
    pub(super) generation: u64,
    pub(super) life: u64,
    pub(super) disk: u64,
    pub(super) ring: u64,
    pub(super) block: u64,
    /// The first record that may not be on the data disk: its position, and its number.
    pub(super) tail: u64,
    pub(super) sequence: u64,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Valid(Superblock),
    /// A valid one of a version that is not known here.
    Version(u32),
    Other,
}

impl Superblock {
    /// The first one of a new log for a data disk of `disk` bytes, on a device of `size` bytes that
    /// takes requests in blocks of `block`. None if there is too little room.
    pub(super) fn new(log_id: u64, disk: u64, size: u64, block: u64) -> Option<Superblock> {
        let block = block.max(SECTOR as u64);
        let ring = size.checked_sub(2 * SLOT)? / block * block;
        let new = Superblock { log_id, generation: 0, life: 0, disk, ring, block, tail: 0, sequence: 1 };
        new.is_sane().then_some(new)
    }

    /// The longest write that is one change in every log on a device of `size` bytes, whatever its blocks.
    pub(super) fn atomic(disk: u64, size: u64) -> u64 {
        Superblock::new(0, disk, size, SLOT).map_or(0, |log| log.payload())
    }

    fn is_sane(&self) -> bool {
        self.block.is_power_of_two()
            && (SECTOR as u64..=SLOT).contains(&self.block)
            && self.ring >= 64 << 10
            && self.ring.is_multiple_of(self.block)
            && self.tail.is_multiple_of(self.block)
            && self.ring < FAR
            && self.tail < FAR
            && self.sequence < FAR
            && self.life < FAR
            && self.generation < FAR
    }

    /// Bytes of the device that the log takes.
    pub(super) fn end(&self) -> u64 {
        2 * SLOT + self.ring
    }

    /// Where its slot is on the device.
    pub(super) fn place(&self) -> u64 {
        self.generation % 2 * SLOT
    }

    /// Where bytes of the ring are on the device, in one or two pieces.
    pub(super) fn pieces(&self, at: u64, len: u64) -> impl Iterator<Item = Range<u64>> + use<> {
        let (start, from) = (2 * SLOT, at % self.ring);
        let first = len.min(self.ring - from);
        let pieces = [start + from..start + from + first, start..start + len - first];
        pieces.into_iter().filter(|piece| !piece.is_empty())
    }

    /// The longest payload of a record, so that it takes a quarter of the ring at the most.
    pub(super) fn payload(&self) -> u64 {
        PAYLOAD.min(self.ring / 4 / self.block * self.block - HEADER as u64)
    }

    /// Bytes that a record with such a payload takes in the ring.
    pub(super) fn record(&self, payload: u64) -> u64 {
        (HEADER as u64 + payload).next_multiple_of(self.block)
    }

    pub(super) fn encode(&self) -> [u8; SUPERBLOCK] {
        let mut bytes = [0; SUPERBLOCK];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
        let words = [self.log_id, self.generation, self.life, self.disk, self.ring, self.block];
        for (to, word) in bytes[16..].chunks_mut(8).zip(words.iter().chain([&self.tail, &self.sequence])) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        let sum = checksum(&bytes, 8, &Data::empty());
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// What the first bytes of a slot say.
    pub(super) fn decode(bytes: &[u8]) -> Slot {
        let Some(bytes) = bytes.get(..SUPERBLOCK).filter(|bytes| bytes.starts_with(MAGIC)) else {
            return Slot::Other;
        };
        if checksum(bytes, 8, &Data::empty()) != u32_at(bytes, 8) {
            return Slot::Other;
        }
        if u32_at(bytes, 12) != VERSION {
            return Slot::Version(u32_at(bytes, 12));
        }
        let found = Superblock {
            log_id: u64_at(bytes, 16),
            generation: u64_at(bytes, 24),
            life: u64_at(bytes, 32),
            disk: u64_at(bytes, 40),
            ring: u64_at(bytes, 48),
            block: u64_at(bytes, 56),
            tail: u64_at(bytes, 64),
            sequence: u64_at(bytes, 72),
        };
        if found.is_sane() { Slot::Valid(found) } else { Slot::Other }
    }
}

/// What a record does to the data disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Write = 1,
    Zeroes = 2,
    Unmap = 3,
    Discard = 4,
}

impl Kind {
    /// The kind of a request that changes data.
    pub(super) fn of(req: &Request) -> Kind {
        match req.op {
            Op::Discard => Kind::Discard,
            Op::WriteZeroes if req.flags.has(Flags::MAY_UNMAP) => Kind::Unmap,
            Op::WriteZeroes => Kind::Zeroes,
            Op::Write | Op::Read | Op::Flush | Op::Cache | Op::Extents | Op::Control => Kind::Write,
        }
    }
}

/// A change, as the log has it.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) sequence: u64,
    pub(super) kind: Kind,
    pub(super) range: Range<u64>,
    /// Of a write, its bytes.
    pub(super) data: Data,
}

impl Record {
    /// The request that does it.
    pub(super) fn request(&self) -> Request {
        let range = |op| Request::new(op, self.range.start, self.range.end - self.range.start);
        match self.kind {
            Kind::Write => Request::write(self.range.start, self.data.clone()),
            Kind::Zeroes => range(Op::WriteZeroes),
            Kind::Unmap => range(Op::WriteZeroes).with(Flags::MAY_UNMAP),
            Kind::Discard => range(Op::Discard),
        }
    }

    /// Bytes of its payload.
    pub(super) fn payload(&self) -> u64 {
        self.data.len() as u64
    }

    /// As it is in the log, in whole blocks.
    pub(super) fn encode(&self, log: &Superblock) -> Data {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&RECORD);
        let Range { start, end } = self.range;
        let words = [log.log_id, log.life, self.sequence, start, end - start];
        for (to, word) in bytes[8..].chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes[48..52].copy_from_slice(&(self.payload() as u32).to_le_bytes());
        bytes[52] = self.kind as u8;
        let sum = checksum(&bytes, 4, &self.data);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        let rest = log.record(self.payload()) - HEADER as u64 - self.payload();
        Data::concat([Data::copy_of(&bytes), self.data.clone(), Data::zeros(rest as usize)])
    }
}

/// The header of a record, before its payload has been read.
#[derive(Clone, Debug)]
pub(super) struct Header {
    bytes: [u8; HEADER],
    kind: Kind,
    range: Range<u64>,
    /// Bytes of its payload: never more than [`Superblock::payload`].
    pub(super) payload: u64,
}

impl Header {
    /// The header of the record with that number, if `bytes` begin with it.
    pub(super) fn decode(bytes: &[u8], log: &Superblock, sequence: u64) -> Option<Header> {
        let bytes: [u8; HEADER] = *bytes.first_chunk()?;
        let [log_id, life, number, offset, len] = [8, 16, 24, 32, 40].map(|at| u64_at(&bytes, at));
        let kind = match bytes[52] {
            1 => Kind::Write,
            2 => Kind::Zeroes,
            3 => Kind::Unmap,
            4 => Kind::Discard,
            _ => return None,
        };
        let payload = u64::from(u32_at(&bytes, 48));
        let end = offset.checked_add(len).filter(|end| *end <= log.disk && len > 0)?;
        let right = bytes[..4] == RECORD
            && (log_id, life, number) == (log.log_id, log.life, sequence)
            && payload == if kind == Kind::Write { len } else { 0 }
            && payload <= log.payload();
        right.then_some(Header { bytes, kind, range: offset..end, payload })
    }

    /// The record, if its payload is right.
    pub(super) fn with(self, data: Data) -> Option<Record> {
        let right =
            data.len() as u64 == self.payload && checksum(&self.bytes, 4, &data) == u32_at(&self.bytes, 4);
        let sequence = u64_at(&self.bytes, 24);
        right.then_some(Record { sequence, kind: self.kind, range: self.range, data })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn log() -> Superblock {
        Superblock { life: 3, ..Superblock::new(77, 1 << 20, 200 << 10, 1).unwrap() }
    }

    #[test]
    fn a_superblock_comes_back() {
        let log = Superblock { generation: 8, tail: 5 << 9, sequence: 12, ..log() };
        assert_eq!(Superblock::decode(&log.encode()), Slot::Valid(log));
        assert_eq!((log.block, log.ring, log.place()), (512, 192 << 10, 0));
        assert_eq!(Superblock::decode(&[0; 512]), Slot::Other);
        let mut other = log.encode();
        other[12] = 2;
        assert_eq!(Superblock::decode(&other), Slot::Other, "damaged");
        let sum = checksum(&other, 8, &Data::empty());
        other[8..12].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Superblock::decode(&other), Slot::Version(2));
        for at in 0..SUPERBLOCK {
            let mut damaged = log.encode();
            damaged[at] ^= 0x10;
            assert_eq!(Superblock::decode(&damaged), Slot::Other, "byte {at}");
        }
    }

    #[test]
    fn there_must_be_room() {
        assert!(Superblock::new(1, 1, 64 << 10, 1).is_none());
        assert!(Superblock::new(1, 1, (64 << 10) + 8192, 1).is_some());
        assert!(Superblock::new(1, 1, (64 << 10) + 8192, 16 << 10).is_none());
        let large = Superblock::new(1, 1, 1 << 40, 4096).unwrap();
        assert_eq!(large.payload(), PAYLOAD);
        let small = log();
        assert!(small.record(small.payload()) <= small.ring / 4);
    }

    fn sealed(mut header: [u8; HEADER], data: &Data) -> [u8; HEADER] {
        let sum = checksum(&header, 4, data);
        header[4..8].copy_from_slice(&sum.to_le_bytes());
        header
    }

    /// What is read of a log at a place, as recovery does it.
    fn read(bytes: &[u8], log: &Superblock, sequence: u64) -> Option<Record> {
        let header = Header::decode(bytes, log, sequence)?;
        assert!(header.payload <= log.payload());
        let end = HEADER + header.payload as usize;
        header.with(Data::copy_of(bytes.get(HEADER..end)?))
    }

    fn record() -> impl Strategy<Value = Record> {
        let kind = prop_oneof![Just(Kind::Write), Just(Kind::Zeroes), Just(Kind::Unmap), Just(Kind::Discard)];
        (kind, 1..u64::MAX, 0..1u64 << 19, 1..5000u64, any::<u8>(), any::<bool>()).prop_map(
            |(kind, sequence, start, len, byte, zeros)| {
                let bytes = vec![byte; len as usize];
                let data = if zeros { Data::zeros(len as usize) } else { Data::copy_of(&bytes) };
                let data = if kind == Kind::Write { data } else { Data::empty() };
                Record { sequence, kind, range: start..start + len, data }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn a_record_comes_back_and_a_damaged_one_does_not(
            record in record(),
            place in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            let log = log();
            let bytes = record.encode(&log).to_vec();
            prop_assert_eq!(bytes.len() as u64, log.record(record.payload()));
            let found = read(&bytes, &log, record.sequence).unwrap();
            prop_assert_eq!((found.kind, &found.range), (record.kind, &record.range));
            prop_assert_eq!(found.data.to_vec(), record.data.to_vec());
            prop_assert!(read(&bytes, &log, record.sequence + 1).is_none());
            for other in [Superblock { life: 4, ..log }, Superblock { log_id: 4, ..log }] {
                prop_assert!(read(&bytes, &other, record.sequence).is_none());
            }
            let mut damaged = bytes;
            let at = place.index(HEADER + record.data.len());
            damaged[at] ^= 1u8 << bit;
            prop_assert!(read(&damaged, &log, record.sequence).is_none(), "byte {}", at);
        }

        /// Whatever the log holds, nothing panics, and nothing longer than a record is asked for; also
        /// where the checksums are those of a forger.
        #[test]
        fn hostile_bytes_are_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600),
            forged in any::<bool>(),
            fields in any::<[u64; 5]>(),
            kind in 0..6u8,
        ) {
            let _ = Superblock::decode(&bytes);
            let _ = read(&bytes, &log(), 5);
            bytes.resize(600, 1);
            if forged {
                let mut block: [u8; SUPERBLOCK] = *bytes.first_chunk().unwrap();
                block[..8].copy_from_slice(MAGIC);
                block[12..16].copy_from_slice(&VERSION.to_le_bytes());
                let sum = checksum(&block, 8, &Data::empty());
                block[8..12].copy_from_slice(&sum.to_le_bytes());
                if let Slot::Valid(log) = Superblock::decode(&block) {
                    prop_assert!(log.payload() <= PAYLOAD && log.end() < u64::MAX / 2);
                }
                let log = log();
                let mut header: [u8; HEADER] = *bytes.first_chunk().unwrap();
                header[..4].copy_from_slice(&RECORD);
                for (to, word) in header[8..].chunks_mut(8).zip([log.log_id, log.life, 5, fields[0], fields[1]]) {
                    to.copy_from_slice(&word.to_le_bytes());
                }
                header[48..52].copy_from_slice(&(fields[2] as u32).to_le_bytes());
                header[52] = kind;
                bytes[..HEADER].copy_from_slice(&sealed(header, &Data::empty()));
                if let Some(record) = read(&bytes, &log, 5) {
                    prop_assert!(record.range.end <= log.disk);
                }
            }
        }

        #[test]
        fn pieces_of_the_ring_are_its_bytes(at in 0..1u64 << 20, len in 1..192u64 << 10) {
            let log = log();
            let found: u64 = log.pieces(at, len).map(|piece| piece.end - piece.start).sum();
            prop_assert_eq!(found, len);
            prop_assert!(log.pieces(at, len).all(|piece| piece.start >= 8192 && piece.end <= log.end()));
        }
    }
}
