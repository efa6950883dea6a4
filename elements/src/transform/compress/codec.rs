//! Clusters to slots and back, as docs/formats/compress.md has them. What is read is bounded by the cluster, whatever
//! the disk below says.

use crate::compression::{self, Algorithm};
use crate::transform::label::Id;
use crate::transform::slots::flat;
use blockmason::data::is_zero;
use blockmason::{Data, Error, PoolBuf, Result};

/// Begins the labels.
pub(super) const MAGIC: &[u8; 8] = b"MASONZIP";
/// What a slot has before its contents.
pub(super) const HEAD: usize = 32;
/// What of it is set.
const USED: usize = 12;

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
        let packed = compression::pack(self.algorithm, self.level, plain, &mut slot[HEAD..HEAD + room])?;
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
        let algorithm = if form == Form::Zstd { Algorithm::Zstd } else { Algorithm::Lz4 };
        let found = compression::unpack(algorithm, &bytes[HEAD..], &mut plain)?;
        (found == self.cluster).then(|| plain.freeze())
    }
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
