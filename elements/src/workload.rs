//! A log of a workload as it lies in its file: docs/formats/workload.md. The element `workload_log` writes it, `mason replay` reads it.

use blockmason::{Class, Error, Flags, Op, Origin, Result};
use rustix::fs::{FileType, Mode, OFlags};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

const HEAD: &[u8; 8] = b"MASONWL1";
const BLOCK: &[u8; 4] = b"MWLB";
const VERSION: u32 = 1;

/// Bytes of a block.
pub(crate) const BLOCK_LEN: usize = 4096;
const RECORD: usize = 32;

/// Records that a block has, at most.
pub(crate) const MOST: usize = (BLOCK_LEN - RECORD) / RECORD;

/// The bits of a record's flags, in their order.
const FLAGS: [Flags; 4] = [Flags::FUA, Flags::MAY_UNMAP, Flags::FAST_ONLY, Flags::ONE];

/// What a log is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of the disk when it was begun.
    pub size: u64,
    /// When that was, in nanoseconds since 1970.
    pub start: u64,
}

/// A request that has been answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When it came, since the log's start.
    pub at: Duration,
    /// What was asked for.
    pub op: Op,
    /// The first byte of the disk; 0 where there is no range.
    pub offset: u64,
    /// Bytes, less than 2^48.
    pub len: u64,
    /// How it was asked for.
    pub flags: Flags,
    /// By whom.
    pub origin: Origin,
    /// How urgent it was.
    pub class: Class,
    /// How long it took, to the microsecond.
    pub took: Duration,
    /// 0, or the number of the error.
    pub errno: u16,
}

impl Record {
    fn put(&self, to: &mut Vec<u8>) {
        to.extend(self.offset.to_le_bytes());
        to.extend((self.at.as_nanos() as u64).to_le_bytes());
        to.extend(&self.len.to_le_bytes()[..6]);
        to.extend(u32::try_from(self.took.as_micros()).unwrap_or(u32::MAX).to_le_bytes());
        let flags = FLAGS.iter().enumerate().filter(|(_, flag)| self.flags.has(**flag));
        let flags = flags.fold(0, |bits, (ix, _)| bits | 1 << ix);
        to.extend([self.op as u8, self.origin as u8, self.class as u8, flags]);
        to.extend(self.errno.to_le_bytes());
    }

    fn take(bytes: &[u8; RECORD]) -> Option<Record> {
        let number = |at: usize, len: usize| {
            bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
        };
        let flags = bytes[29];
        // A question to the graph itself is nothing that could be asked again.
        let op = *Op::ALL.get(usize::from(bytes[26])).filter(|op| **op != Op::Control)?;
        let set = FLAGS.iter().enumerate().filter(|(ix, _)| flags >> ix & 1 == 1);
        (flags < 1 << FLAGS.len()).then_some(Record {
            at: Duration::from_nanos(number(8, 8)),
            op,
            offset: number(0, 8),
            len: number(16, 6),
            flags: set.fold(Flags::NONE, |flags, (_, flag)| flags.with(*flag)),
            origin: *Origin::ALL.get(usize::from(bytes[27]))?,
            class: *Class::ALL.get(usize::from(bytes[28]))?,
            took: Duration::from_micros(number(22, 4)),
            errno: number(30, 2) as u16,
        })
    }
}

/// Sets the checksum, which is at `at`.
fn seal(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes.resize(BLOCK_LEN, 0);
    let crc = crc32fast::hash(&bytes);
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// True if the checksum at `at` is right.
fn is_sealed(bytes: &[u8; BLOCK_LEN], at: usize) -> bool {
    let mut hasher = crc32fast::Hasher::new();
    for part in [&bytes[..at], &[0; 4], &bytes[at + 4..]] {
        hasher.update(part);
    }
    bytes[at..at + 4] == hasher.finalize().to_le_bytes()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|ix| bytes[at + ix]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|ix| bytes[at + ix]))
}

impl Head {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = HEAD.to_vec();
        bytes.extend([0; 4]);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(self.start.to_le_bytes());
        seal(bytes, 8)
    }

    /// # Errors
    /// It is none, or damaged, or of a newer program.
    pub(crate) fn decode(bytes: &[u8; BLOCK_LEN]) -> Result<Head> {
        if !bytes.starts_with(HEAD) {
            return Err(Error::invalid("it is no log of a workload"));
        }
        let version = u32_at(bytes, 12);
        if version != VERSION {
            return Err(Error::unsupported(format!(
                "it is of form {version}, of which this program knows nothing"
            )));
        }
        let is_whole = is_sealed(bytes, 8) && bytes[32..].iter().all(|byte| *byte == 0);
        is_whole
            .then(|| Head { size: u64_at(bytes, 16), start: u64_at(bytes, 24) })
            .ok_or_else(|| Error::invalid("it is damaged"))
    }
}

/// What a block has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Block {
    pub(crate) records: Vec<Record>,
    /// How many there were before these that could not be kept.
    pub(crate) lost: u32,
}

impl Block {
    /// The block of that number, of the log that began then.
    pub(crate) fn encode(&self, number: u64, start: u64) -> Vec<u8> {
        let mut bytes = BLOCK.to_vec();
        bytes.extend([0; 4]);
        bytes.extend((self.records.len() as u32).to_le_bytes());
        bytes.extend(self.lost.to_le_bytes());
        bytes.extend(number.to_le_bytes());
        bytes.extend(start.to_le_bytes());
        self.records.iter().for_each(|record| record.put(&mut bytes));
        seal(bytes, 4)
    }

    /// None if it is not that block.
    pub(crate) fn decode(bytes: &[u8; BLOCK_LEN], number: u64, start: u64) -> Option<Block> {
        let count = u32_at(bytes, 8) as usize;
        let is = bytes.starts_with(BLOCK)
            && is_sealed(bytes, 4)
            && (1..=MOST).contains(&count)
            && (u64_at(bytes, 16), u64_at(bytes, 24)) == (number, start);
        let (records, rest) = bytes[RECORD..].split_at(if is { count } else { 0 } * RECORD);
        let records = records.as_chunks().0.iter().map(Record::take).collect::<Option<_>>()?;
        (is && rest.iter().all(|byte| *byte == 0)).then_some(Block { records, lost: u32_at(bytes, 12) })
    }
}

/// Reads a log from its beginning, a block at a time.
pub struct Log {
    file: File,
    head: Head,
    /// Blocks that have been read.
    number: u64,
    lost: u64,
}

impl Log {
    /// # Errors
    /// It cannot be read, or is no log of a workload.
    pub fn open(path: &Path) -> Result<Log> {
        let refused = |errno| Error::os(errno, "the log cannot be read").with_path(path);
        // A pipe in its place must not hold anybody up.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(refused)?;
        let stat = rustix::fs::fstat(&file).map_err(refused)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::invalid("it is no log of a workload, but no regular file").with_path(path));
        }
        Log::read(File::from(file)).map_err(|error| error.with_path(path))
    }

    pub(crate) fn read(mut file: File) -> Result<Log> {
        let head = next(&mut file)?.ok_or_else(|| Error::invalid("it is no log of a workload"))?;
        Ok(Log { file, head: Head::decode(&head)?, number: 0, lost: 0 })
    }

    /// What it is of.
    pub fn head(&self) -> Head {
        self.head
    }

    /// The records of the next block, in the order in which they were answered; None at the end, which is also before a block that
    /// is damaged.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn next_block(&mut self) -> Result<Option<Vec<Record>>> {
        Ok(self.block()?.map(|block| block.records))
    }

    pub(crate) fn block(&mut self) -> Result<Option<Block>> {
        let Some(bytes) = next(&mut self.file)? else { return Ok(None) };
        let Some(block) = Block::decode(&bytes, self.number + 1, self.head.start) else { return Ok(None) };
        self.number += 1;
        self.lost += u64::from(block.lost);
        Ok(Some(block))
    }

    /// Of the last block that has been read, 0 before the first.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// How many requests there were, up to here, that could not be kept.
    pub fn lost(&self) -> u64 {
        self.lost
    }
}

/// None at the end, or where less than a block is left.
fn next(file: &mut File) -> Result<Option<[u8; BLOCK_LEN]>> {
    let mut bytes = [0; BLOCK_LEN];
    match file.read_exact(&mut bytes) {
        Ok(()) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(Error::io(error, "the log cannot be read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const START: u64 = 1_795_190_400_000_000_000;

    prop_compose! {
        fn record()(
            at in 0..u64::MAX, op in 0..Op::ALL.len() - 1, offset: u64, len in 0..1_u64 << 48, flags in 0..16_u8,
            origin in 0..Origin::ALL.len(), class in 0..Class::ALL.len(), took: u32, errno: u16,
        ) -> Record {
            let set = FLAGS.iter().enumerate().filter(|(ix, _)| flags >> ix & 1 == 1);
            Record {
                at: Duration::from_nanos(at),
                op: Op::ALL[op],
                offset,
                len,
                flags: set.fold(Flags::NONE, |flags, (_, flag)| flags.with(*flag)),
                origin: Origin::ALL[origin],
                class: Class::ALL[class],
                took: Duration::from_micros(u64::from(took)),
                errno,
            }
        }
    }

    fn sized(bytes: &[u8]) -> &[u8; BLOCK_LEN] {
        bytes.try_into().unwrap()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            records in proptest::collection::vec(record(), 1..=MOST), lost: u32, number: u64, size: u64, bit in 0..BLOCK_LEN * 8,
        ) {
            let block = Block { records, lost };
            let mut bytes = block.encode(number, START);
            prop_assert_eq!(Block::decode(sized(&bytes), number, START), Some(block));
            prop_assert!(Block::decode(sized(&bytes), number ^ 1, START).is_none());
            prop_assert!(Block::decode(sized(&bytes), number, START + 1).is_none());
            let head = Head { size, start: START };
            prop_assert_eq!(Head::decode(sized(&head.encode())).unwrap(), head);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Block::decode(sized(&bytes), number, START).is_none());
            let mut bytes = head.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Head::decode(sized(&bytes)).is_err());
        }

        /// What no program writes, under a checksum that is right.
        #[test]
        fn hostile_blocks_are_refused_or_are_what_would_be_written(
            body in proptest::collection::vec(any::<u8>(), BLOCK_LEN - RECORD), count in 0..200_u32, small: bool,
        ) {
            let mut bytes = BLOCK.to_vec();
            bytes.extend([0; 4]);
            bytes.extend(count.to_le_bytes());
            bytes.extend([0; 4]);
            bytes.extend(7_u64.to_le_bytes());
            bytes.extend(START.to_le_bytes());
            let used = count as usize * RECORD;
            bytes.extend(body.iter().enumerate().map(|(ix, byte)| match ix {
                _ if ix >= used => 0,
                // Such that most of them are records.
                _ if small && ix % RECORD >= 26 => byte & 1,
                _ => *byte,
            }));
            let bytes = seal(bytes, 4);
            if let Some(block) = Block::decode(sized(&bytes), 7, START) {
                prop_assert_eq!(block.encode(7, START), bytes);
            }
        }
    }

    #[test]
    fn what_is_none_says_so() {
        let says = |bytes: &[u8; BLOCK_LEN], what: &str| {
            let error = Head::decode(bytes).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        says(&[0; BLOCK_LEN], "no log of a workload");
        let mut newer = Head { size: 1, start: 2 }.encode();
        newer[12] = 2;
        says(sized(&newer), "form 2");
        let file = tempfile::tempfile().unwrap();
        assert!(Log::read(file).is_err());
    }
}
