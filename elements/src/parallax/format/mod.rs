//! A pool on disk, as docs/formats/parallax.md has it: structures and their bytes, nothing that reads or writes.

mod catalog;
mod log;
mod map;
mod node;
mod pack;
mod root;
mod store;

pub(super) use catalog::{Entry, Kind as EntryKind, Limits, RECORDS, Receiving, SnapshotId};
pub(super) use log::{Change, Record, Stamp};
pub(super) use map::{Map, MapRun};
pub(super) use node::{Body, DEAD, Dead, Node, SLOTS, Slot, unit_of};
pub use pack::Compress;
pub(super) use pack::{PACK, PACK_BYTES, Pack, unit};
pub(super) use root::{Ptr, Root};
pub(super) use store::{EXTENT_RECORD, ExtentRecord, Features, Label, MOST_KEY, Owner, Owners, is_key};

use blockmason::{Error, Kind, Result};

/// Bytes of a block, the unit of everything.
pub(super) const BLOCK: u64 = 4096;
/// Blocks of an extent.
pub(super) const EXTENT: u64 = 512;
/// Blocks of a node.
pub(super) const NODE: u64 = 2;
/// The first number that 5 bytes do not hold.
pub(super) const LIMIT: u64 = 1 << 40;

blockmason::words! {
    /// A format of trees. Trees of one format are one owner of extents.
    pub enum Format {
        /// Leaves and inner nodes.
        One = "1",
        /// Maps above the leaves, and regions in a row that need neither.
        Two = "2",
    }
}

impl Default for Format {
    /// What volumes have where nothing else is asked for.
    fn default() -> Format {
        Format::One
    }
}

impl Format {
    /// Its number on disk.
    pub(super) fn number(self) -> u32 {
        self as u32 + 1
    }

    /// That with a number, if this program knows it.
    pub(super) fn numbered(number: u32) -> Option<Format> {
        [Format::One, Format::Two].into_iter().find(|format| format.number() == number)
    }
}

/// The pool's name for itself.
pub(super) type Id = [u8; 16];

/// What of it stands in structures that are written often.
pub(super) fn short(id: &Id) -> u64 {
    u64_at(id, 0)
}

/// Something is not what it should be, and nobody can tell what it was.
#[cold]
pub(super) fn damaged(what: impl Into<String>) -> Error {
    Error::new(Kind::Io, what.into())
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    number_at(bytes, at, 2) as u16
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    number_at(bytes, at, 4) as u32
}

pub(super) fn u40_at(bytes: &[u8], at: usize) -> u64 {
    number_at(bytes, at, 5)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    number_at(bytes, at, 8)
}

fn number_at(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Puts the lowest `len` bytes of a number.
pub(super) fn put(bytes: &mut [u8], at: usize, len: usize, number: u64) {
    bytes[at..at + len].copy_from_slice(&number.to_le_bytes()[..len]);
}

/// The checksum of a structure whose own field, 4 bytes, counts as zeros.
fn checksum(bytes: &[u8], field: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..field]);
    hasher.update(&[0; 4]);
    hasher.update(&bytes[field + 4..]);
    hasher.finalize()
}

pub(super) fn seal(bytes: &mut [u8], field: usize) {
    let sum = checksum(bytes, field);
    put(bytes, field, 4, u64::from(sum));
}

pub(super) fn is_sound(bytes: &[u8], field: usize) -> bool {
    u32_at(bytes, field) == checksum(bytes, field)
}

/// Refuses bytes that have no meaning yet and are not zero.
fn expect_zeros(bytes: &[u8], what: &str) -> Result<()> {
    match bytes.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(damaged(format!("{what} has something where nothing may be"))),
    }
}
