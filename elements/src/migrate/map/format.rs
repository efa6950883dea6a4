//! The file's header and where everything lies: docs/formats/dirty.md.

use blockmason::lang::value::Size;
use blockmason::{Error, Result};

/// Bytes of the header, and what bitmaps are padded to.
pub(super) const BLOCK: u64 = 4096;
/// Bytes of the header that mean something, which are written in one piece.
pub(super) const HEADER: usize = 512;
const MAGIC: &[u8; 8] = b"MasonDMP";
const VERSION: u32 = 1;
/// The smallest region.
const REGION: u64 = 64 << 20;
/// The most regions.
const MOST_REGIONS: u64 = 1 << 16;
/// The most granules: half a gibibyte of bits.
const MOST_GRANULES: u64 = 1 << 32;

/// A boot id as the header has it; zeros are none.
pub(super) type Boot = [u8; 36];

/// The kernel's life; zeros if that cannot be found out.
pub(super) fn this_boot() -> Boot {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().as_bytes().try_into().unwrap_or([0; 36])
}

/// What follows from the size of a disk and of its granules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layout {
    pub(super) size: u64,
    pub(super) granule: u64,
    pub(super) region: u64,
}

impl Layout {
    /// # Errors
    /// More granules than can be kept.
    pub(super) fn new(size: u64, granule: u64) -> Result<Layout> {
        let layout = Layout::with_regions(size, granule, REGION);
        if layout.granules() > MOST_GRANULES {
            let needed = Size(size.div_ceil(MOST_GRANULES).next_power_of_two());
            return Err(Error::invalid(format!(
                "the disk has too many granules: say (granule {needed}) or more"
            )));
        }
        Ok(layout)
    }

    pub(super) fn with_regions(size: u64, granule: u64, least: u64) -> Layout {
        let region = size.div_ceil(MOST_REGIONS).next_power_of_two().max(least).max(granule);
        Layout { size, granule, region }
    }

    pub(super) fn granules(&self) -> u64 {
        self.size.div_ceil(self.granule)
    }

    pub(super) fn regions(&self) -> usize {
        self.size.div_ceil(self.region) as usize
    }

    /// The place of the first word of a bitmap: of the regions, the marks, the frozen, and behind all.
    pub(super) fn places(&self) -> [usize; 4] {
        let padded = |bits: u64| (bits.div_ceil(8)).next_multiple_of(BLOCK);
        let regions = BLOCK;
        let marks = regions + padded(self.regions() as u64);
        let frozen = marks + padded(self.granules());
        [regions, marks, frozen, frozen + padded(self.granules())].map(|at| at as usize / 8)
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> u64 {
        self.places()[3] as u64 * 8
    }
}

/// What the first bytes of a file say.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) layout: Layout,
    pub(super) boot: Boot,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.layout.size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.layout.granule.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.layout.region.to_le_bytes());
        bytes[40..76].copy_from_slice(&self.boot);
        let sum = crc32fast::hash(&bytes);
        bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// # Errors
    /// It is none, or damaged.
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<Header> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        if &bytes[..8] != MAGIC {
            return Err(Error::invalid("it is no map of changes, and is not overwritten: name another file"));
        }
        let mut summed = *bytes;
        summed[8..12].fill(0);
        let (sum, version) = (word(8) as u32, (word(8) >> 32) as u32);
        if crc32fast::hash(&summed) != sum {
            let message = "its header is damaged: delete it, and all is dirty again";
            return Err(Error::invalid(message));
        }
        if version != VERSION {
            let message = format!("it has version {version}, and this program knows version {VERSION}");
            return Err(Error::unsupported(message));
        }
        let layout = Layout { size: word(16), granule: word(24), region: word(32) };
        let mut boot = [0; 36];
        boot.copy_from_slice(&bytes[40..76]);
        Ok(Header { layout, boot })
    }

    /// Whether it is that of a map with this layout.
    ///
    /// # Errors
    /// It is another one's.
    pub(super) fn fits(&self, layout: Layout) -> Result<()> {
        let own = self.layout;
        let message = match own {
            _ if own.granule != layout.granule => format!("its granules have {} bytes: say so", own.granule),
            _ if own.size != layout.size => {
                format!(
                    "it is the map of a disk of {} bytes, not of {}: name another file",
                    own.size, layout.size
                )
            }
            _ if own.region != layout.region => {
                "it has other regions: it was made by another program".to_owned()
            }
            _ => return Ok(()),
        };
        Err(Error::invalid(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn everything_lies_behind_what_comes_before() {
        assert_eq!(
            Layout::with_regions(10 << 30, 64 << 10, REGION).places(),
            [512, 1024, 1024 + 2560, 1024 + 5120]
        );
        assert_eq!(Layout::new(8 << 40, 1 << 16).unwrap().regions(), 1 << 16);
        assert!(Layout::new(1 << 45, 4 << 10).unwrap_err().to_string().contains("(granule 8k)"));
    }

    proptest! {
        #[test]
        fn a_header_says_what_was_written_and_no_flipped_bit_is_believed(
            size: u64, shift in 12u32..25, boot: [u8; 32], bit in 0usize..HEADER * 8
        ) {
            let mut id = [0; 36];
            id[..32].copy_from_slice(&boot);
            let header = Header { layout: Layout { size, granule: 1 << shift, region: REGION }, boot: id };
            let mut bytes = header.encode();
            prop_assert_eq!(Header::decode(&bytes).unwrap(), header);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
