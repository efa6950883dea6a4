//! Requests of a virtio block device, and its configuration space. Source: virtio 1.2, section 5.2.

use super::chain::{Chain, Pieces, split_last_byte, take_bytes};
use blockmason::Geometry;
use std::ptr::NonNull;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes of a sector: addresses and lengths are in sectors, whatever the disk's blocks are.
pub(crate) const SECTOR: u64 = 512;

/// The longest piece of a request, in bytes (SIZE_MAX): as many of them as a request may have are no more
/// than a request may be.
const PIECE: u32 = 256 << 10;

/// The most pieces of data in a request (SEG_MAX).
pub(crate) const PIECES: u16 = 254;

/// The longest range to discard or zero, in sectors.
const RANGE: u32 = 1 << 21;

/// The most ranges in a request to discard or zero.
const RANGES: u32 = 256;

/// Done.
pub(crate) const OK: u8 = VIRTIO_BLK_S_OK as u8;
/// It failed.
pub(crate) const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// Nothing that we do.
pub(crate) const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// A set of features of one bit.
pub(crate) const fn bit(feature: u32) -> u64 {
    1 << feature
}

/// The features of a device. Rings are split ones.
pub(crate) fn features(read_only: bool, queues: u16) -> u64 {
    let always = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_BLK_F_SIZE_MAX)
        | bit(VIRTIO_BLK_F_SEG_MAX)
        | bit(VIRTIO_BLK_F_BLK_SIZE)
        | bit(VIRTIO_BLK_F_TOPOLOGY)
        | bit(VIRTIO_BLK_F_FLUSH)
        | bit(VIRTIO_BLK_F_CONFIG_WCE);
    let several = if queues > 1 { bit(VIRTIO_BLK_F_MQ) } else { 0 };
    let changes =
        if read_only { bit(VIRTIO_BLK_F_RO) } else { bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES) };
    always | several | changes
}

/// Where the driver finds and sets whether the device has a volatile cache.
pub(crate) const AT_WRITEBACK: usize = 32;

/// The configuration space, with zeros behind its end.
pub(crate) fn config(disk: &Geometry, queues: u16, write_back: bool) -> [u8; 256] {
    let mut space = [0; 256];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let physical = u64::from(disk.preferred_block).max(SECTOR);
    put(0, &(disk.size / SECTOR).to_le_bytes());
    put(8, &PIECE.to_le_bytes());
    put(12, &u32::from(PIECES).to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    // Sectors in a physical block, as a power of two.
    put(24, &[(physical / SECTOR).ilog2() as u8]);
    put(26, &((physical / SECTOR) as u16).to_le_bytes());
    put(AT_WRITEBACK, &[u8::from(write_back)]);
    put(34, &queues.to_le_bytes());
    put(36, &RANGE.to_le_bytes());
    put(40, &RANGES.to_le_bytes());
    put(44, &((physical / SECTOR) as u32).to_le_bytes());
    put(48, &RANGE.to_le_bytes());
    put(52, &RANGES.to_le_bytes());
    put(56, &[1]);
    space
}

/// A request, taken apart. Its ranges are as the driver gave them: they may lie outside of the disk.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Into the chain's writable pieces, so many bytes.
    Read { offset: u64, len: u64 },
    /// From the chain's readable pieces.
    Write { offset: u64, len: u64 },
    /// Everything answered before it.
    Flush,
    /// Ranges of bytes.
    Discard(Vec<Range>),
    /// Ranges of bytes.
    WriteZeroes(Vec<Range>),
    /// The serial number, into the chain's writable pieces.
    Id,
    /// Nothing to do but to answer so.
    Answer(u8),
}

/// A range to discard or zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) unmap: bool,
}

/// Takes a request apart. What is left of the chain is its data. Returns the place of its status too.
///
/// # Errors
/// There is no place for a status: the driver could never be answered.
pub(crate) fn parse(chain: &mut Chain) -> Result<(Job, NonNull<u8>), &'static str> {
    let status = split_last_byte(&mut chain.writable).ok_or("a request without a place for its status")?;
    chain.writable_len -= 1;
    let mut header = [0; 16];
    if !take_bytes(&mut chain.readable, &mut header) {
        return Ok((Job::Answer(IOERR), status));
    }
    chain.readable_len -= header.len() as u64;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
    Ok((job(chain, kind, sector), status))
}

fn job(chain: &mut Chain, kind: u32, sector: u64) -> Job {
    let Some(offset) = sector.checked_mul(SECTOR) else { return Job::Answer(IOERR) };
    let data = |len: u64, make: fn(u64, u64) -> Job| match len {
        0 => Job::Answer(OK),
        len if len.is_multiple_of(SECTOR) => make(offset, len),
        _ => Job::Answer(IOERR),
    };
    match kind {
        VIRTIO_BLK_T_IN => data(chain.writable_len, |offset, len| Job::Read { offset, len }),
        VIRTIO_BLK_T_OUT => data(chain.readable_len, |offset, len| Job::Write { offset, len }),
        VIRTIO_BLK_T_FLUSH => Job::Flush,
        VIRTIO_BLK_T_GET_ID => Job::Id,
        VIRTIO_BLK_T_DISCARD => ranges(&mut chain.readable, chain.readable_len, false, Job::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES => ranges(&mut chain.readable, chain.readable_len, true, Job::WriteZeroes),
        _ => Job::Answer(UNSUPP),
    }
}

/// Ranges of sixteen bytes each: sector, sectors, flags.
fn ranges(pieces: &mut Pieces, len: u64, may_unmap: bool, make: fn(Vec<Range>) -> Job) -> Job {
    const BYTES: u64 = 16;
    if len == 0 || !len.is_multiple_of(BYTES) || len / BYTES > u64::from(RANGES) {
        return Job::Answer(IOERR);
    }
    let mut ranges = Vec::new();
    let mut bytes = [0; BYTES as usize];
    while take_bytes(pieces, &mut bytes) {
        let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
        let (sectors, flags) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        // The device must refuse flags that it does not know, and unmap of a discard (5.2.6.2).
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && !may_unmap) {
            return Job::Answer(UNSUPP);
        }
        let Some(offset) = u64::from_le_bytes(sector).checked_mul(SECTOR) else { return Job::Answer(IOERR) };
        if sectors > RANGE {
            return Job::Answer(IOERR);
        }
        if sectors > 0 {
            ranges.push(Range { offset, len: u64::from(sectors) * SECTOR, unmap });
        }
    }
    if ranges.is_empty() { Job::Answer(OK) } else { make(ranges) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::{Driver, Piece};

    fn header(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    /// A request of these bytes, cut into pieces of these lengths, with so many bytes to write into.
    fn parsed(bytes: &[u8], cuts: &[u32], writable: u32) -> Result<Job, &'static str> {
        let mut driver = Driver::new(64);
        driver.write(driver.buffer(0), bytes);
        let mut pieces = Vec::new();
        let mut at = 0;
        for len in cuts.iter().copied().chain([bytes.len() as u32 - cuts.iter().sum::<u32>()]) {
            pieces.push(Piece { at, len, write: false });
            at += u64::from(len);
        }
        if writable > 0 {
            pieces.push(Piece { at: 0x8000, len: writable, write: true });
        }
        let head = driver.add(&pieces);
        let mut chain = Chain::default();
        chain.read(&driver.ring(), head, true).unwrap();
        parse(&mut chain).map(|(job, _)| job)
    }

    #[test]
    fn reads_and_writes_however_they_are_cut() {
        let read = header(VIRTIO_BLK_T_IN, 8);
        assert_eq!(parsed(&read, &[], 4097), Ok(Job::Read { offset: 4096, len: 4096 }));
        let write = [header(VIRTIO_BLK_T_OUT, 3), vec![7; 1024]].concat();
        for cuts in [&[16][..], &[4, 12], &[1, 2, 3, 500], &[16, 512]] {
            assert_eq!(parsed(&write, cuts, 1), Ok(Job::Write { offset: 1536, len: 1024 }));
        }
        assert_eq!(parsed(&read, &[], 1), Ok(Job::Answer(OK)));
    }

    #[test]
    fn what_makes_no_sense_is_answered_with_an_error() {
        assert!(parsed(&header(VIRTIO_BLK_T_IN, 0), &[], 0).is_err());
        assert_eq!(parsed(&[1, 2, 3], &[], 1), Ok(Job::Answer(IOERR)));
        assert_eq!(parsed(&header(VIRTIO_BLK_T_IN, u64::MAX / 2), &[], 513), Ok(Job::Answer(IOERR)));
        assert_eq!(parsed(&header(VIRTIO_BLK_T_IN, 0), &[], 100), Ok(Job::Answer(IOERR)));
        assert_eq!(parsed(&header(77, 0), &[], 513), Ok(Job::Answer(UNSUPP)));
    }

    #[test]
    fn ranges_of_discards_and_zeros() {
        let range = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        let request = |kind, ranges: &[Vec<u8>]| [header(kind, 0), ranges.concat()].concat();
        let two = [range(1, 2, 0), range(10, 0, 0), range(100, 8, 0)];
        let expected =
            vec![Range { offset: 512, len: 1024, unmap: false }, Range { offset: 51200, len: 4096, unmap: false }];
        assert_eq!(parsed(&request(VIRTIO_BLK_T_DISCARD, &two), &[16, 20], 1), Ok(Job::Discard(expected)));
        let unmap = [range(1, 2, 1)];
        assert_eq!(parsed(&request(VIRTIO_BLK_T_DISCARD, &unmap), &[], 1), Ok(Job::Answer(UNSUPP)));
        let zeros = vec![Range { offset: 512, len: 1024, unmap: true }];
        assert_eq!(parsed(&request(VIRTIO_BLK_T_WRITE_ZEROES, &unmap), &[], 1), Ok(Job::WriteZeroes(zeros)));
        for (range, answer) in
            [(range(0, 1, 2), UNSUPP), (range(u64::MAX, 1, 0), IOERR), (range(0, u32::MAX, 0), IOERR), (vec![0; 15], IOERR)]
        {
            let request = request(VIRTIO_BLK_T_WRITE_ZEROES, &[range]);
            assert_eq!(parsed(&request, &[], 1), Ok(Job::Answer(answer)));
        }
    }

    #[test]
    fn the_configuration_space_is_where_the_specification_has_it() {
        let disk = Geometry { preferred_block: 4096, ..Geometry::new(10 * 512 + 100) };
        let space = config(&disk, 3, true);
        assert_eq!((space[0], space[20..24] == 512u32.to_le_bytes(), space[24]), (10, true, 3));
        assert_eq!((space[AT_WRITEBACK], space[34], space[56]), (1, 3, 1));
        assert!(u64::from(PIECE) * u64::from(PIECES) <= u64::from(blockmason::geometry::MAX_REQUEST));
    }
}
