//! What fuzzers and tests of damage call: what has been read is written the same, and nothing that a device may hold
//! makes a pool panic, or answer for ever.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "for tests, which panic")]

use super::below::{Below, block_on};
use super::check::check;
use super::format::{
    BLOCK, Body, Entry, EntryKind, ExtentRecord, Features, Format, Label, Node, Owners, RECORDS, Record,
    Root, seal, u32_at,
};
use super::open::{Opening, add_trees, create, open};
use super::pool::Pool;
use super::settings::Settings;
use super::volume::Volume;
use blockmason::{Data, Op, Request, Result};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

const ID: [u8; 16] = *b"a pool of a test";
const SIZE: u64 = 32 << 20;

/// A byte that says which structure, then the structure. Its checksum is made right, so that the rest of it is looked at.
pub fn structures(data: &[u8]) {
    let Some((which, data)) = data.split_first() else { return };
    let sized = |len: u64, magic: &[u8], field: usize| {
        let mut bytes = data.to_vec();
        bytes.resize(len as usize, 0);
        bytes[..magic.len()].copy_from_slice(magic);
        seal(&mut bytes, field);
        bytes
    };
    match which % 7 {
        0 => {
            let bytes = sized(BLOCK, b"MASONPX1", 8);
            same(Label::decode(&bytes).ok().map(|label| label.encode()), &bytes);
        }
        1 => {
            let label =
                Label { id: ID, extents: 512, capacity: 8192, sequence: 1, features: Features::default() };
            let mut bytes = sized(BLOCK, b"MASONOWN", 8);
            bytes[16..32].copy_from_slice(&ID);
            seal(&mut bytes, 8);
            same(Owners::decode(&bytes, &label).ok().map(|owners| owners.encode()), &bytes);
        }
        2 => {
            let bytes = sized(128, b"", 4);
            same(ExtentRecord::decode(&bytes).map(|record| record.encode().to_vec()), &bytes);
        }
        3 => {
            let mut bytes = sized(BLOCK, b"MASONRT1", 8);
            bytes[16..32].copy_from_slice(&ID);
            seal(&mut bytes, 8);
            let root = Root::decode(&bytes, &ID, u32_at(&bytes, 12)).ok();
            same(root.map(|root| root.encode()), &bytes);
        }
        4 => node(sized(2 * BLOCK, b"PXND", 4)),
        // A page of the catalog with one record.
        5 => {
            let mut bytes = vec![0; Node::BYTES];
            bytes[..4].copy_from_slice(b"PXND");
            bytes[8] = 3;
            let len = data.len().min(256);
            bytes[64..64 + len].copy_from_slice(&data[..len]);
            node(bytes);
        }
        _ => log_record(sized((data.len() as u64).next_multiple_of(BLOCK).max(BLOCK), b"PXLG", 4)),
    }
}

fn same(written: Option<Vec<u8>>, bytes: &[u8]) {
    if let Some(written) = written {
        assert!(written == bytes, "what was read is written otherwise");
    }
}

fn node(mut bytes: Vec<u8>) {
    let at = [77, 700];
    bytes[16..24].copy_from_slice(&ID[..8]);
    for (at, place) in at.iter().zip([32, 40]) {
        bytes[place..place + 8].copy_from_slice(&u64::to_le_bytes(*at));
    }
    seal(&mut bytes, 4);
    let node = Node::decode(&bytes, &ID, at);
    if let Some(Node { body: Body::Catalog(page), .. }) = &node {
        assert_eq!(page.len(), RECORDS);
    }
    same(node.map(|node| node.encode(&ID, at)), &bytes);
}

fn log_record(mut bytes: Vec<u8>) {
    let (epoch, number) = (3_u64, 9_u64);
    bytes[8..16].copy_from_slice(&ID[..8]);
    bytes[16..24].copy_from_slice(&epoch.to_le_bytes());
    bytes[24..32].copy_from_slice(&number.to_le_bytes());
    seal(&mut bytes, 4);
    same(Record::decode(&bytes, &ID, epoch, number).map(|record| record.encode(&ID)), &bytes);
}

/// What stands in a block that has a checksum: its bytes, and where the checksum is.
pub(super) fn sealed(block: &[u8]) -> Option<(u64, usize)> {
    match block {
        [b'P', b'X', b'N', b'D', ..] => Node::len(block).map(|len| (len as u64, 4)),
        [b'P', b'X', b'S', b'J', ..] => Some((BLOCK, 4)),
        [b'P', b'X', b'L', b'G', ..] => Some((u64::from(u32_at(block, 44)).next_multiple_of(BLOCK), 4)),
        [b'M', b'A', b'S', b'O', b'N', ..] => Some((BLOCK, 8)),
        _ => None,
    }
}

/// Makes the checksum right of what stands at a block.
pub(super) fn seal_at(file: &File, at: u64) {
    let mut block = vec![0; BLOCK as usize];
    let known = file.read_exact_at(&mut block, at * BLOCK).ok().and_then(|()| sealed(&block));
    let Some((len, field)) = known.filter(|(len, _)| (BLOCK..=1 << 20).contains(len)) else { return };
    let mut bytes = vec![0; len as usize];
    if file.read_exact_at(&mut bytes, at * BLOCK).is_ok() {
        seal(&mut bytes, field);
        file.write_all_at(&bytes, at * BLOCK).unwrap();
    }
}

/// Blocks of a file that are not zeros.
pub(super) fn contents(file: &File) -> Vec<(u64, Vec<u8>)> {
    let blocks = file.metadata().unwrap().len() / BLOCK;
    let mut found = Vec::new();
    for first in (0..blocks).step_by(256) {
        let mut bytes = vec![0; (256.min(blocks - first) * BLOCK) as usize];
        file.read_exact_at(&mut bytes, first * BLOCK).unwrap();
        let parts = (first..).zip(bytes.chunks(BLOCK as usize));
        let parts = parts.filter(|(_, part)| part.iter().any(|byte| *byte != 0));
        found.extend(parts.map(|(at, part)| (at, part.to_vec())));
    }
    found
}

/// A file of that size with these blocks.
pub(super) fn restore(file: &File, size: u64, contents: &[(u64, Vec<u8>)]) {
    file.set_len(0).unwrap();
    file.set_len(size).unwrap();
    contents.iter().for_each(|(at, block)| file.write_all_at(block, at * BLOCK).unwrap());
}

/// Opens a pool as it is, for reading, then for writing; checks it, and reads everything. `each` is told what was read of
/// each volume and snapshot.
pub(super) fn survives(file: &File, mut each: impl FnMut(&Pool, u32, Result<Data>)) {
    for writable in [false, true] {
        let below = Below::Plain(file.as_fd());
        let opening = Opening { writable, ..Opening::writable(200_000) };
        let Ok(opened) = block_on(open(opening, file.metadata().unwrap().len(), below)) else { continue };
        for pool in opened.trees.into_iter().map(Arc::new) {
            look(&pool, below, &mut each);
            if writable {
                let _ = block_on(pool.checkpoint(below));
            }
        }
    }
}

fn look(pool: &Arc<Pool>, below: Below<'_>, each: &mut impl FnMut(&Pool, u32, Result<Data>)) {
    let _ = block_on(check(pool, below));
    let all: Vec<(u32, u64)> = pool
        .core()
        .catalog
        .iter()
        .filter(|(_, entry)| !entry.deleting)
        .map(|(number, entry)| (*number, entry.size))
        .collect();
    for (number, size) in all {
        // What is larger than any of these was made so.
        let read = Request::read(0, size.clamp(BLOCK, 16 << 20));
        let volume = Volume::new(pool.clone(), number);
        let found = block_on(volume.read_pieces(read, below)).and_then(blockmason::Answer::into_data);
        each(pool, number, found);
    }
}

/// A small pool with a bit of everything in it, and its log not empty.
fn small() -> &'static [(u64, Vec<u8>)] {
    static SMALL: OnceLock<Vec<(u64, Vec<u8>)>> = OnceLock::new();
    SMALL.get_or_init(|| {
        let file = memory();
        file.set_len(SIZE).unwrap();
        let below = Below::Plain(file.as_fd());
        block_on(async {
            create(ID, SIZE, below).await?;
            let opening = Opening::writable(200_000);
            let opened = open(opening, SIZE, below).await?;
            let Some(pool) = opened.trees.into_iter().next().map(Arc::new) else { return Ok(()) };
            for (name, blocks, checksums) in [("a", 700, false), ("b", 20, true)] {
                let settings = Settings { checksums, ordered: checksums, ..Settings::default() };
                let number = pool.make_volume(name, blocks * BLOCK, settings, below).await?;
                let volume = Volume::new(pool.clone(), number);
                let write = async |first: u64, count: u64, byte: u8| {
                    let data = Data::copy_of(&vec![byte; (count * BLOCK) as usize]);
                    volume.write_pieces(Request::write(first * BLOCK, data), below).await
                };
                write(0, 8, 1).await?;
                write(blocks - 2, 2, 2).await?;
                pool.snapshot(&[(number, "s".to_owned())], 1, below).await?;
                write(1, 2, 3).await?;
                pool.checkpoint(below).await?;
                write(2, 3, 4).await?;
                volume.punch(Request::new(Op::Discard, 4 * BLOCK, BLOCK), below).await?;
            }
            pool.clone_volume("a", "s", "c", below).await?;
            let number = pool.core().find("a", None)?;
            let data = Data::copy_of(&[5; 2 * BLOCK as usize]);
            Volume::new(pool.clone(), number).write_pieces(Request::write(0, data), below).await?;
            pool.snapshot(&[(number, "t".to_owned())], 1, below).await?;
            // Far from each other, so that some of it is in leaves.
            let pool = Arc::new(add_trees(Format::Two, &pool, below).await?);
            let number = pool.make_volume("d", 2000 * BLOCK, Settings::default(), below).await?;
            let volume = Volume::new(pool.clone(), number);
            for ix in 0..40 {
                let data = Data::copy_of(&[ix as u8 + 1; BLOCK as usize]);
                volume.write_pieces(Request::write(ix * ix * BLOCK, data), below).await?;
                if ix == 35 {
                    pool.checkpoint(below).await?;
                    pool.snapshot(&[(number, "s".to_owned())], 1, below).await?;
                }
            }
            Ok::<_, blockmason::Error>(())
        })
        .unwrap();
        assert!(contents(&file).len() < 2000);
        contents(&file)
    })
}

fn memory() -> File {
    File::from(rustix::fs::memfd_create("pool", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// Changes to a small pool, eight bytes each: what is done (1), whether its checksum is made right (1), to which block that
/// holds something (2), where in it (2), with what (2).
pub fn pool(data: &[u8]) {
    let (base, file) = (small(), memory());
    restore(&file, SIZE, base);
    for change in data.chunks_exact(8).take(64) {
        let word = |at: usize| u16::from_le_bytes([change[at], change[at + 1]]);
        let (at, block) = &base[word(2) as usize % base.len()];
        let place = u64::from(word(4)) % BLOCK;
        match change[0] % 6 {
            0 => file.write_all_at(&change[6..7], at * BLOCK + place).unwrap(),
            1 => file.write_all_at(&change[6..8], at * BLOCK + place.min(BLOCK - 2)).unwrap(),
            2 => file.write_all_at(&[change[6]; 8], at * BLOCK + place.min(BLOCK - 8)).unwrap(),
            3 => file.write_all_at(&[0; BLOCK as usize], at * BLOCK).unwrap(),
            4 => file.write_all_at(&base[word(6) as usize % base.len()].1, at * BLOCK).unwrap(),
            _ => {
                let bit = block[place as usize] ^ 1 << (change[6] % 8);
                file.write_all_at(&[bit], at * BLOCK + place).unwrap();
            }
        }
        if change[1] & 1 == 1 {
            seal_at(&file, *at);
        }
    }
    survives(&file, |pool, number, _| {
        let core = pool.core();
        let known = core.catalog.get(&number).map(|entry: &Entry| &entry.kind);
        assert!(matches!(known, Some(EntryKind::Volume { .. } | EntryKind::Snapshot { .. })));
    });
}
