//! Blocks to slots and back, as docs/formats/checksum.md has them.

use super::Counts;
use crate::transform::label::Id;
use crate::transform::slots::{INLINE, Layout, Slotted, aside, damaged, flat};
use blockmason::data::is_zero;
use blockmason::sched::RangeLock;
use blockmason::{Cx, Data, PoolBuf, Reply, Request, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Begins the labels.
pub(super) const MAGIC: &[u8; 8] = b"MASONSUM";
/// What a slot has behind its block: a mark, and the checksum.
pub(super) const TRAILER: usize = 16;
/// Bytes of a checksum.
const SUM: usize = 12;
/// The mark of a block that was written.
const WRITTEN: [u8; 4] = 1u32.to_le_bytes();

blockmason::words! {
    /// How blocks are summed.
    pub(super) enum Sum {
        /// CRC-32 (IEEE).
        Crc32 = "crc32",
        /// The first 96 bits of BLAKE3.
        Blake3 = "blake3",
    }
}

impl Sum {
    pub(super) fn number(self) -> u32 {
        match self {
            Sum::Crc32 => 1,
            Sum::Blake3 => 2,
        }
    }

    pub(super) fn from(number: u32) -> Option<Sum> {
        [Sum::Crc32, Sum::Blake3].into_iter().find(|sum| sum.number() == number)
    }
}

/// A sum of the disk's id, to be gone on with.
#[derive(Clone)]
enum Begun {
    Crc32(crc32fast::Hasher),
    Blake3(Box<blake3::Hasher>),
}

impl Begun {
    fn new(sum: Sum, id: &Id) -> Begun {
        match sum {
            Sum::Crc32 => {
                let mut hasher = crc32fast::Hasher::new();
                hasher.update(id);
                Begun::Crc32(hasher)
            }
            Sum::Blake3 => {
                let mut hasher = Box::new(blake3::Hasher::new());
                hasher.update(id);
                Begun::Blake3(hasher)
            }
        }
    }

    /// The checksum of a block.
    fn of(&self, number: u64, block: &[u8]) -> [u8; SUM] {
        let mut sum = [0; SUM];
        match self.clone() {
            Begun::Crc32(mut hasher) => {
                hasher.update(&number.to_le_bytes());
                hasher.update(block);
                sum[..4].copy_from_slice(&hasher.finalize().to_le_bytes());
            }
            Begun::Blake3(mut hasher) => {
                hasher.update(&number.to_le_bytes()).update(block);
                sum.copy_from_slice(&hasher.finalize().as_bytes()[..SUM]);
            }
        }
        sum
    }

    /// Blocks from the `first` on, as slots.
    fn seal(&self, first: u64, block: usize, plain: &Data) -> Data {
        let blocks = plain.len() / block;
        let mut slots = PoolBuf::new(blocks * (block + TRAILER));
        for (ix, slot) in slots.chunks_exact_mut(block + TRAILER).enumerate() {
            let (contents, trailer) = slot.split_at_mut(block);
            plain.slice(ix * block..(ix + 1) * block).copy_to(contents);
            trailer[..4].copy_from_slice(&WRITTEN);
            trailer[4..].copy_from_slice(&self.of(first + ix as u64, contents));
        }
        slots.freeze()
    }

    /// The blocks that do not match their checksums, of slots that begin with block `first`.
    fn mismatches(&self, first: u64, block: usize, slots: &Data) -> Vec<u64> {
        let (mut scratch, len) = (Vec::new(), block + TRAILER);
        let matches = |number: u64, slot: &[u8]| {
            let (contents, trailer) = slot.split_at(block);
            match trailer[..4] == WRITTEN {
                true => trailer[4..] == self.of(number, contents),
                false => is_zero(slot),
            }
        };
        let numbered = (0..slots.len() / len).map(|ix| (first + ix as u64, ix * len));
        let bad = numbered.filter(|(number, at)| {
            let slot = slots.slice(*at..at + len);
            !slot.is_known_zero() && !matches(*number, flat(&slot, &mut scratch))
        });
        bad.map(|(number, _)| number).collect()
    }
}

/// An open disk.
pub(super) struct Volume {
    pub(super) layout: Layout,
    pub(super) ranges: Arc<RangeLock>,
    counts: Arc<Counts>,
    /// What is longer is summed beside the shard.
    inline: usize,
    begun: Arc<Begun>,
}

impl Volume {
    pub(super) fn new(
        layout: Layout,
        sum: Sum,
        id: &Id,
        ranges: Arc<RangeLock>,
        counts: Arc<Counts>,
    ) -> Volume {
        // A CRC takes no longer than to copy.
        let inline = if sum == Sum::Crc32 { usize::MAX } else { INLINE };
        Volume { layout, ranges, counts, inline, begun: Arc::new(Begun::new(sum, id)) }
    }

    /// The blocks that do not match, of slots that begin with block `first`. Counts them.
    pub(super) async fn mismatches(&self, first: u64, slots: &Data) -> Result<Vec<u64>> {
        let block = self.layout.block as usize;
        let found = match slots.len() <= self.inline {
            true => self.begun.mismatches(first, block, slots),
            false => {
                let (begun, slots) = (self.begun.clone(), slots.clone());
                aside(move || begun.mismatches(first, block, &slots)).await?
            }
        };
        self.counts.compared.fetch_add(slots.len() as u64 / self.layout.slot, Ordering::Relaxed);
        self.counts.damaged.fetch_add(found.len() as u64, Ordering::Relaxed);
        Ok(found)
    }
}

impl Slotted for Volume {
    fn layout(&self) -> Layout {
        self.layout
    }

    fn ranges(&self) -> &RangeLock {
        &self.ranges
    }

    async fn store(&self, mut req: Request, cx: Cx<'_>) -> Reply {
        let (block, plain) = (self.layout.block as usize, std::mem::take(&mut req.data));
        let first = req.offset / self.layout.block;
        let slots = match plain.len() <= self.inline {
            true => self.begun.seal(first, block, &plain),
            false => {
                let begun = self.begun.clone();
                aside(move || begun.seal(first, block, &plain)).await?
            }
        };
        self.layout.write(&req, slots, cx).await
    }

    async fn open(&self, first: u64, slots: Data, cx: Cx<'_>) -> Result<Data> {
        if let Some(bad) = self.mismatches(first, &slots).await?.first() {
            return Err(damaged(*bad, "its checksum differs", cx));
        }
        let Layout { block, slot, .. } = self.layout;
        let blocks = (0..slots.len() / slot as usize).map(|ix| ix * slot as usize);
        Ok(Data::concat(blocks.map(|at| slots.slice(at..at + block as usize))))
    }
}
