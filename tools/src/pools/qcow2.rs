//! What the reader of qcow2 images lets pass, and what would make a volume something else than the image is.

use crate::failure::{Failure, Outcome};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

/// Bytes of a header that all forms have.
const HEADER: usize = 72;
/// Bytes of the first table, at most, as QEMU has it.
const MOST_TABLE: u64 = 32 << 20;
/// Where an entry of a table leads.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// Whether an image is all there, and can be read by whoever has no key. The header has been found to be one.
pub(super) fn check(file: &File) -> Outcome {
    let len = file.metadata().map_err(Failure::new)?.len();
    let header = read(file, 0, HEADER as u64)?;
    let long = |at: usize| u64::from_be_bytes(std::array::from_fn(|ix| header[at + ix]));
    let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|ix| header[at + ix]));
    let (bits, size, entries) = (word(20), long(24), u64::from(word(36)));
    if word(32) != 0 {
        return Err(Failure::new("it is encrypted: decrypt it with qemu-img convert"));
    }
    if !(9..=21).contains(&bits) || entries * 8 > MOST_TABLE {
        return Err(Failure::new("its header makes no sense"));
    }
    let cluster = 1 << bits;
    // What a table leads to, of the tables that the disk needs.
    let needed = size.div_ceil(cluster * (cluster / 8)).min(entries);
    let first = read(file, long(40), needed * 8)?;
    for table in places(&first).map(|entry| entry & PLACE).filter(|table| *table != 0) {
        let table = read(file, table, cluster)?;
        if places(&table).any(|entry| end(entry, bits) > len) {
            return Err(cut());
        }
    }
    Ok(())
}

/// Behind what an entry of a second table leads to; of what is compressed it is the last sector that need not be whole.
fn end(entry: u64, bits: u32) -> u64 {
    if entry & COMPRESSED != 0 {
        let split = 62 - (bits - 8);
        let (place, sectors) = (entry & ((1 << split) - 1), (entry & (COMPRESSED - 1)) >> split);
        return place.max(place / SECTOR * SECTOR + sectors * SECTOR) + 1;
    }
    match entry & PLACE {
        0 => 0,
        _ if entry & ZERO != 0 => 0,
        place => place + (1 << bits),
    }
}

fn places(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).map(|entry| u64::from_be_bytes(std::array::from_fn(|ix| entry[ix])))
}

fn read(file: &File, at: u64, len: u64) -> Outcome<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(cut()),
        Err(error) => Err(Failure::new(error)),
    }
}

fn cut() -> Failure {
    Failure::new("it has been cut short: the file ends before what the image has")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_clusters_end() {
        assert_eq!(end(0, 16), 0);
        assert_eq!(end(5 << 16 | 1 << 63, 16), 6 << 16);
        assert_eq!(end(5 << 16 | 1, 16), 0, "zeros that have room");
        // Three sectors: the one it begins in, and two more.
        assert_eq!(end(COMPRESSED | 2 << 54 | 1000, 16), 512 + 2 * 512 + 1);
        assert_eq!(end(COMPRESSED | 1000, 16), 1001);
        assert!(end(u64::MAX, 21) < u64::MAX / 2 && end(!COMPRESSED & !ZERO, 21) > 1 << 55);
    }
}
