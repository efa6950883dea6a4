//! Clusters to slots and back, as docs/formats/compress.md has them. What is read is bounded by the cluster, whatever
//! the disk below says.

use crate::transform::label::Id;
use crate::transform::slots::flat;
use blockmason::data::is_zero;
use blockmason::{Data, Error, PoolBuf, Result};
use std::cell::RefCell;
use zstd::bulk::{Compressor, Decompressor};

/// Begins the labels.
pub(super) const MAGIC: &[u8; 8] = b"MASONZIP";
/// What a slot has before its contents.
pub(super) const HEAD: usize = 32;
/// What of it is set.
const USED: usize = 12;

blockmason::words! {
    /// How clusters are compressed.
    pub(super) enum Algorithm {
        /// The fastest.
        Lz4 = "lz4",
        /// Smaller, and slower.
        Zstd = "zstd",
    }
}

/// How a cluster is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Plain,
    Lz4,
    Zstd,
}

impl Form {
    fn number(self) -> u32 {
        match self {
            Form::Plain => 1,
            Form::Lz4 => 2,
            Form::Zstd => 3,
        }
    }

    fn from(number: u32) -> Option<Form> {
        [Form::Plain, Form::Lz4, Form::Zstd].into_iter().find(|form| form.number() == number)
    }
}

/// Makes slots of clusters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Codec {
    pub(super) id: Id,
    pub(super) algorithm: Algorithm,
    pub(super) level: i32,
    /// Bytes of a cluster.
    pub(super) cluster: usize,
    /// Slots are stored in multiples of this.
    pub(super) unit: usize,
}

/// A slot as far as it is used.
pub(super) struct Stored {
    pub(super) bytes: Data,
    /// It was not worth it.
    pub(super) plain: bool,
}

impl Codec {
    /// Bytes of a slot.
    pub(super) fn slot(cluster: u64, unit: u64) -> u64 {
        (cluster + HEAD as u64).next_multiple_of(unit)
    }

    /// What is stored for a cluster.
    ///
    /// # Errors
    /// The library has failed.
    pub(super) fn seal(&self, number: u64, plain: &Data) -> Result<Stored> {
        let mut scratch = Vec::new();
        let plain = flat(plain, &mut scratch);
        // One unit less than it takes as it is; what is longer is not worth it.
        let whole = (HEAD + self.cluster).next_multiple_of(self.unit);
        let mut slot = PoolBuf::new(whole);
        let room = whole - self.unit - HEAD;
        let packed = match self.algorithm {
            Algorithm::Lz4 => lz4_pack(plain, &mut slot[HEAD..HEAD + room])?,
            Algorithm::Zstd => zstd_pack(plain, &mut slot[HEAD..HEAD + room], self.level)?,
        };
        let (form, len) = match (packed, self.algorithm) {
            (Some(len), Algorithm::Lz4) => (Form::Lz4, len),
            (Some(len), Algorithm::Zstd) => (Form::Zstd, len),
            (None, _) => {
                slot[HEAD..HEAD + plain.len()].copy_from_slice(plain);
                (Form::Plain, plain.len())
            }
        };
        let end = (HEAD + len).next_multiple_of(self.unit);
        slot[..HEAD].fill(0);
        slot[HEAD + len..end].fill(0);
        slot[..4].copy_from_slice(&form.number().to_le_bytes());
        slot[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        let sum = self.sum(number, &slot[..HEAD + len]);
        slot[8..USED].copy_from_slice(&sum.to_le_bytes());
        Ok(Stored { bytes: slot.freeze().slice(0..end), plain: form == Form::Plain })
    }

    /// Of the first 8 bytes of a slot and its contents.
    fn sum(&self, number: u64, slot: &[u8]) -> u32 {
        let mut sum = crc32fast::Hasher::new();
        sum.update(&self.id);
        sum.update(&number.to_le_bytes());
        sum.update(&slot[..8]);
        sum.update(&slot[HEAD..]);
        sum.finalize()
    }

    /// The cluster in a slot; None if it is not what was written there.
    pub(super) fn open(&self, number: u64, slot: &Data) -> Option<Data> {
        let mut scratch = Vec::new();
        let head = slot.slice(0..HEAD);
        if head.is_zero() {
            // What lies behind it was never used, or is not any more.
            return Some(Data::zeros(self.cluster));
        }
        let head = head.to_vec();
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (form, len) = (Form::from(u32_at(0))?, u32_at(4) as usize);
        if len > self.cluster || !is_zero(&head[USED..]) || (form == Form::Plain && len != self.cluster) {
            return None;
        }
        let used = slot.slice(0..HEAD + len);
        let bytes = flat(&used, &mut scratch);
        if self.sum(number, bytes) != u32_at(8) {
            return None;
        }
        if form == Form::Plain {
            return Some(used.slice(HEAD..HEAD + len));
        }
        let mut plain = PoolBuf::new(self.cluster);
        let found = match form {
            Form::Zstd => zstd_unpack(&bytes[HEAD..], &mut plain)?,
            Form::Lz4 | Form::Plain => lz4_flex::block::decompress_into(&bytes[HEAD..], &mut plain).ok()?,
        };
        (found == self.cluster).then(|| plain.freeze())
    }
}

thread_local! {
    /// The library asks for room for the worst case. And a context takes longer to make than to use.
    static LZ4: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static PACKER: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static UNPACKER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn failed<E>(_: E) -> Error {
    Error::internal("the library that compresses has failed")
}

/// The length of what was compressed; None if it is longer than `packed`.
fn lz4_pack(plain: &[u8], packed: &mut [u8]) -> Result<Option<usize>> {
    LZ4.with_borrow_mut(|room| {
        room.resize(lz4_flex::block::get_maximum_output_size(plain.len()), 0);
        let len = lz4_flex::block::compress_into(plain, room).map_err(failed)?;
        Ok(packed.get_mut(..len).map(|packed| {
            packed.copy_from_slice(&room[..len]);
            len
        }))
    })
}

/// The length of what was compressed; None if it is longer than `packed`.
fn zstd_pack(plain: &[u8], packed: &mut [u8], level: i32) -> Result<Option<usize>> {
    PACKER.with_borrow_mut(|kept| {
        let (_, packer) = match kept {
            Some(packer) if packer.0 == level => packer,
            other => other.insert((level, Compressor::new(level).map_err(failed)?)),
        };
        Ok(packer.compress_to_buffer(plain, packed).ok())
    })
}

/// The length of what was compressed; None if it is longer than `plain`, or damaged.
fn zstd_unpack(packed: &[u8], plain: &mut [u8]) -> Option<usize> {
    UNPACKER.with_borrow_mut(|kept| {
        let unpacker = match kept {
            Some(unpacker) => unpacker,
            None => kept.insert(Decompressor::new().ok()?),
        };
        unpacker.decompress_to_buffer(packed, plain).ok()
    })
}

/// The level that a parameter says.
pub(super) fn level(algorithm: Algorithm, level: Option<u64>) -> Result<i32> {
    match (algorithm, level) {
        (_, None) => Ok(1),
        (Algorithm::Zstd, Some(level @ 1..=19)) => Ok(level as i32),
        (Algorithm::Zstd, Some(_)) => Err(Error::invalid("expected a level from 1 to 19")),
        (Algorithm::Lz4, Some(_)) => Err(Error::invalid("lz4 has no levels")),
    }
}
