//! Packs: blocks of a volume in a row that are compressed into fewer blocks of the pool.

use super::{BLOCK, damaged, put, u32_at};
use crate::compression::{self, Algorithm};
use blockmason::{Data, PoolBuf, Result};
use std::ops::Range;

/// Blocks of a volume that a pack has, the first of them a multiple of that.
pub(in super::super) const PACK: u64 = 8;
/// Bytes of them.
pub(in super::super) const PACK_BYTES: usize = (PACK * BLOCK) as usize;
/// What comes before the compressed bytes: how many they are, and their CRC-32.
const HEAD: usize = 8;
/// Of those libraries that have levels. The next ones take twice the time for a few percent.
const LEVEL: i32 = 3;

blockmason::words! {
    /// How what is written to a volume is compressed.
    #[derive(Default)]
    pub enum Compress {
        /// Not at all.
        #[default]
        No = "no",
        /// With LZ4: the fastest.
        Lz4 = "lz4",
        /// With Zstandard: smaller, and slower.
        Zstd = "zstd",
    }
}

impl Compress {
    pub(in super::super) fn algorithm(self) -> Option<Algorithm> {
        match self {
            Compress::No => None,
            Compress::Lz4 => Some(Algorithm::Lz4),
            Compress::Zstd => Some(Algorithm::Zstd),
        }
    }

    pub(super) fn code(self) -> u8 {
        self.algorithm().map_or(0, code)
    }

    pub(super) fn of(code: u8) -> Option<Compress> {
        [Compress::No, Compress::Lz4, Compress::Zstd].into_iter().find(|compress| compress.code() == code)
    }
}

fn code(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::Lz4 => 1,
        Algorithm::Zstd => 2,
    }
}

/// How a pack is compressed, and the blocks of the pool that it takes: 1 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Pack {
    algorithm: Algorithm,
    pub(in super::super) blocks: u8,
}

impl Pack {
    /// What an entry says of it in one byte.
    pub(super) fn encode(pack: Option<Pack>) -> u8 {
        pack.map_or(0, |pack| code(pack.algorithm) << 4 | pack.blocks)
    }

    /// # Errors
    /// The byte says nothing.
    pub(in super::super) fn decode(byte: u8) -> Result<Option<Pack>> {
        let algorithm = Compress::of(byte >> 4).and_then(Compress::algorithm);
        match (byte, algorithm, byte & 15) {
            (0, ..) => Ok(None),
            (_, Some(algorithm), blocks @ 1..8) => Ok(Some(Pack { algorithm, blocks })),
            _ => Err(damaged("an entry says of a pack what cannot be")),
        }
    }

    /// Compresses so many bytes as a pack has. None if that makes no block less of them.
    ///
    /// # Errors
    /// The library has failed, or is not there.
    pub(in super::super) fn make(algorithm: Algorithm, plain: &[u8]) -> Result<Option<(Pack, Data)>> {
        let mut bytes = PoolBuf::new(PACK_BYTES - BLOCK as usize);
        let Some(len) = compression::pack(algorithm, LEVEL, plain, &mut bytes[HEAD..])? else {
            return Ok(None);
        };
        let end = (HEAD + len).next_multiple_of(BLOCK as usize);
        bytes[HEAD + len..end].fill(0);
        put(&mut bytes, 0, 4, len as u64);
        let sum = crc32fast::hash(&bytes[HEAD..HEAD + len]);
        put(&mut bytes, 4, 4, u64::from(sum));
        let pack = Pack { algorithm, blocks: (end as u64 / BLOCK) as u8 };
        Ok(Some((pack, bytes.freeze().slice(0..end))))
    }

    /// The bytes of the volume that it has.
    ///
    /// # Errors
    /// These blocks are no such pack.
    pub(in super::super) fn open(self, blocks: &Data) -> Result<Data> {
        let bytes = blocks.to_vec();
        let contents = bytes.get(HEAD..).unwrap_or_default();
        let packed = (bytes.len() > HEAD).then(|| contents.get(..u32_at(&bytes, 0) as usize)).flatten();
        let packed = packed.filter(|packed| crc32fast::hash(packed) == u32_at(&bytes, 4));
        let mut plain = PoolBuf::new(PACK_BYTES);
        match packed.and_then(|packed| compression::unpack(self.algorithm, packed, &mut plain)) {
            Some(PACK_BYTES) => Ok(plain.freeze()),
            _ => Err(damaged("compressed blocks are damaged")),
        }
    }
}

/// The blocks of the pack that a block of a volume would be in.
pub(in super::super) fn unit(block: u64) -> Range<u64> {
    let first = block - block % PACK;
    first..first + PACK
}

#[cfg(all(test, feature = "compress"))]
mod tests {
    use super::*;

    #[test]
    fn a_pack_is_smaller_or_there_is_none_and_no_flipped_bit_is_believed() {
        let mut rng = fastrand::Rng::with_seed(1);
        for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
            let noise: Vec<u8> = (0..PACK_BYTES).map(|_| rng.u8(..)).collect();
            assert!(Pack::make(algorithm, &noise).unwrap().is_none());
            for letters in [1, 2, 20, 200] {
                let plain: Vec<u8> = (0..PACK_BYTES).map(|_| rng.u8(0..letters)).collect();
                let Some((pack, blocks)) = Pack::make(algorithm, &plain).unwrap() else {
                    assert!(letters == 200 || letters == 20 && algorithm == Algorithm::Lz4, "{algorithm}");
                    continue;
                };
                assert_eq!(blocks.len() as u64, u64::from(pack.blocks) * BLOCK);
                assert!(u64::from(pack.blocks) < PACK);
                assert_eq!(Pack::decode(Pack::encode(Some(pack))).unwrap(), Some(pack));
                assert_eq!(pack.open(&blocks).unwrap().to_vec(), plain);
                for _ in 0..200 {
                    let mut other = blocks.to_vec();
                    other[rng.usize(0..HEAD + u32_at(&blocks.to_vec(), 0) as usize)] ^= 1 << rng.u8(0..8);
                    assert!(pack.open(&Data::shared(other)).is_err());
                }
            }
        }
        assert!([0x08, 0x10, 0x18, 0x31, 0xff].into_iter().all(|byte| Pack::decode(byte).is_err()));
        assert_eq!(unit(15), 8..16);
    }
}
