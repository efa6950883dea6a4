//! The overlay on disk, as docs/formats/cow.md has it: places, header, map sectors.

use blockmason::{Error, Kind, Result};
use std::ops::Range;

pub(super) const SECTOR: u64 = 512;
/// What a header may take: all of it zeros is a new overlay.
pub(super) const REGION: u64 = 4096;
/// Words of 64 blocks in one map sector.
pub(super) const WORDS: usize = 62;
/// Blocks of one map sector.
pub(super) const PER_SECTOR: u64 = WORDS as u64 * 64;
/// More would take 256 MiB of memory for each map.
const MOST_BLOCKS: u64 = 1 << 31;
const MAGIC: &[u8; 8] = b"MASONCOW";
const VERSION: u32 = 1;
/// The longest incarnation, in bytes.
pub(super) const LONGEST: usize = 64;

/// One of the two maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Map {
    /// Blocks whose data is durable.
    Durable = 0,
    /// Blocks whose data has been written.
    Claimed = 1,
}

/// Where things are in the overlay of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of a block, a power of two.
    pub(super) block: u64,
    /// Bytes of the base.
    pub(super) size: u64,
}

impl Layout {
    pub(super) fn new(block: u64, size: u64) -> Result<Layout> {
        let layout = Layout { block, size };
        if layout.blocks() > MOST_BLOCKS {
            let message = format!(
                "{size} bytes in blocks of {block} are more than {MOST_BLOCKS} blocks; make blocks larger"
            );
            return Err(Error::invalid(message));
        }
        if layout.data().checked_add(size).is_none_or(|end| end > i64::MAX as u64) {
            return Err(Error::invalid(format!("a base of {size} bytes leaves no room for the maps")));
        }
        Ok(layout)
    }

    pub(super) fn blocks(self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Sectors of each map.
    pub(super) fn sectors(self) -> u64 {
        self.blocks().div_ceil(PER_SECTOR)
    }

    /// Where a sector of a map is.
    pub(super) fn place(self, map: Map, sector: u64) -> u64 {
        REGION + map as u64 * (self.sectors() * SECTOR).next_multiple_of(REGION) + sector * SECTOR
    }

    /// Where block 0 is, behind both maps.
    pub(super) fn data(self) -> u64 {
        (self.place(Map::Claimed, 0) + (self.sectors() * SECTOR).next_multiple_of(REGION))
            .next_multiple_of(self.block)
    }

    /// Bytes that the overlay disk must have.
    pub(super) fn needed(self) -> u64 {
        self.data() + self.size
    }

    /// The blocks that a range of bytes touches.
    pub(super) fn touched(self, bytes: Range<u64>) -> Range<u64> {
        bytes.start / self.block..bytes.end.div_ceil(self.block)
    }

    /// The bytes of blocks; the last one may be short.
    pub(super) fn bytes(self, blocks: Range<u64>) -> Range<u64> {
        blocks.start * self.block..(blocks.end * self.block).min(self.size)
    }
}

/// What the overlay is being used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Changes go to the overlay.
    Overlaying = 0,
    /// Blocks of the overlay move to the base; all others are the base's.
    Committing = 1,
    /// The overlay is empty; the base serves everything.
    Committed = 2,
}

impl State {
    pub(super) fn from(number: u32) -> Option<State> {
        [State::Overlaying, State::Committing, State::Committed]
            .into_iter()
            .find(|state| *state as u32 == number)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            State::Overlaying => "overlaying",
            State::Committing => "committing",
            State::Committed => "committed",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) layout: Layout,
    pub(super) id: [u8; 16],
    pub(super) generation: u64,
    /// Generations of the durable and the claimed map.
    pub(super) maps: [u64; 2],
    pub(super) state: State,
    /// None is unknown.
    pub(super) incarnation: Option<String>,
}

fn refuse(message: impl Into<String>) -> Error {
    Error::new(Kind::Denied, message.into())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Ends a sector with its checksum.
fn seal(sector: &mut [u8], before: &[u8]) {
    let sum = checksum(&sector[..508], before);
    sector[508..512].copy_from_slice(&sum.to_le_bytes());
}

fn checksum(bytes: &[u8], before: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(before);
    sum.update(bytes);
    sum.finalize()
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut sector = Vec::with_capacity(SECTOR as usize);
        sector.extend(MAGIC);
        sector.extend(VERSION.to_le_bytes());
        sector.extend((self.layout.block as u32).to_le_bytes());
        sector.extend(self.layout.size.to_le_bytes());
        sector.extend(self.id);
        sector.extend(self.generation.to_le_bytes());
        self.maps.iter().for_each(|generation| sector.extend(generation.to_le_bytes()));
        sector.extend((self.state as u32).to_le_bytes());
        let incarnation = self.incarnation.as_deref().unwrap_or_default().as_bytes();
        sector.extend((incarnation.len() as u32).to_le_bytes());
        sector.extend(incarnation);
        sector.resize(SECTOR as usize, 0);
        seal(&mut sector, &[]);
        sector
    }

    /// The header of an overlay of `wanted`, or None of a new one.
    ///
    /// # Errors
    /// What else the disk carries, and what to do about it.
    pub(super) fn decode(region: &[u8], wanted: Layout) -> Result<Option<Header>> {
        if region.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        if !region.starts_with(MAGIC) {
            return Err(refuse(
                "the overlay disk carries something that is no overlay, and is not overwritten; give it \
                 another disk, or wipe its first 4096 bytes if they are of no use",
            ));
        }
        if checksum(&region[..508], &[]) != u32_at(region, 508) {
            return Err(refuse("the overlay's header is damaged: its checksum is wrong"));
        }
        let version = u32_at(region, 8);
        if version != VERSION {
            return Err(refuse(format!("the overlay has version {version}; this program knows {VERSION}")));
        }
        let found = Layout { block: u64::from(u32_at(region, 12)), size: u64_at(region, 16) };
        if found.block != wanted.block {
            let (found, wanted) = (found.block, wanted.block);
            return Err(refuse(format!(
                "the overlay has blocks of {found} bytes, not {wanted}; set (block {found})"
            )));
        }
        if found.size != wanted.size {
            let (found, wanted) = (found.size, wanted.size);
            return Err(refuse(format!(
                "the overlay belongs to a base of {found} bytes, and this one has {wanted}"
            )));
        }
        let len = u32_at(region, 68) as usize;
        let text = region[72..72 + len.min(LONGEST)].to_vec();
        let state = State::from(u32_at(region, 64));
        let (Some(state), Ok(text), true) = (state, String::from_utf8(text), len <= LONGEST) else {
            return Err(refuse("the overlay's header makes no sense, although its checksum is right"));
        };
        let mut id = [0; 16];
        id.copy_from_slice(&region[24..40]);
        Ok(Some(Header {
            layout: found,
            id,
            generation: u64_at(region, 40),
            maps: [u64_at(region, 48), u64_at(region, 56)],
            state,
            incarnation: (!text.is_empty()).then_some(text),
        }))
    }

    fn before(&self, map: Map, sector: u64) -> [u8; 25] {
        let mut bytes = [0; 25];
        bytes[..16].copy_from_slice(&self.id);
        bytes[16] = map as u8;
        bytes[17..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    pub(super) fn encode_map(&self, map: Map, sector: u64, words: &[u64; WORDS]) -> Vec<u8> {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(self.maps[map as usize].to_le_bytes());
        bytes.resize(SECTOR as usize, 0);
        seal(&mut bytes, &self.before(map, sector));
        bytes
    }

    /// The blocks of a map sector.
    pub(super) fn decode_map(&self, map: Map, sector: u64, bytes: &[u8]) -> Result<[u64; WORDS]> {
        let mut words = [0; WORDS];
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(words);
        }
        let damaged = |what: &str| {
            let place = self.layout.place(map, sector);
            refuse(format!("the overlay's map is damaged at byte {place}: {what}"))
        };
        if checksum(&bytes[..508], &self.before(map, sector)) != u32_at(bytes, 508) {
            return Err(damaged("its checksum is wrong"));
        }
        let (found, generation) = (u64_at(bytes, 496), self.maps[map as usize]);
        if found > generation {
            return Err(damaged("it is newer than the header"));
        }
        if found < generation {
            return Ok(words);
        }
        for (ix, word) in words.iter_mut().enumerate() {
            *word = u64_at(bytes, ix * 8);
        }
        let blocks = self.layout.blocks().saturating_sub(sector * PER_SECTOR).min(PER_SECTOR);
        let past = |ix: u64| words[ix as usize / 64] >> (ix % 64) & 1 != 0;
        if (blocks..PER_SECTOR).any(past) {
            return Err(damaged("it has blocks past the end of the base"));
        }
        Ok(words)
    }
}
