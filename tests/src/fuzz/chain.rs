//! A guest's queue in the guest's memory, any bytes, against a parser that is written again in the simplest way.

use super::MAX_INPUT;
use blockmason_elements::vhost::fuzzing::{Piece, Rings, Taken};
use blockmason_elements::vhost::wire::{MemoryRegion, RingAddress};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Bytes of the file that all regions are parts of.
const FILE: usize = 64 << 10;

/// Bytes in front of the regions, and of each of them.
const HEAD: usize = 16;
const REGION: usize = 16;

/// Requests that are looked at: one may have many descriptors, and all of them may be the same.
const REQUESTS: usize = 64;

/// The first bytes of a request that may be anything but data: its header, and ranges.
const LOOKED_AT: usize = 16 + 256 * 16;

/// The most pieces of a request: descriptors, and borders between regions that each may lie across.
const PIECES: usize = 1024 + 509;

/// One byte of terms, one with the number of regions, two with the place that comes next, three times four with the
/// addresses of the ring; the regions, sixteen bytes each; and what the file that they are parts of starts with.
///
/// A request consists of what its descriptors say, all of it inside of the regions, or the queue stops; taking
/// requests changes nothing, and gives the same when it is done again; completing them changes the used ring only.
pub fn chain(data: &[u8]) {
    let Some(model) = Model::new(&data[..data.len().min(MAX_INPUT)]) else { return };
    let file =
        File::from(rustix::fs::memfd_create("fuzz-chain", rustix::fs::MemfdFlags::CLOEXEC).expect("memory"));
    file.write_all_at(&model.file, 0).expect("memory");
    let open = || {
        let region = |region: &MemoryRegion| (*region, file.try_clone().expect("a descriptor").into());
        let terms = (model.indirect, model.event_idx);
        Rings::open(model.regions.iter().map(region), &model.address, model.size, model.next, terms)
    };
    let parts = model.parts();
    let Ok(mut rings) = open() else { return assert!(parts.is_none(), "a good queue is refused") };
    let parts = parts.expect("a bad queue is taken");
    let (taken, stopped) = take_all(&mut rings);
    let (expected, broken) = model.take_all(&parts);
    assert_eq!(stopped.is_some(), broken, "{stopped:?} after {} requests", taken.len());
    assert_eq!(taken.len(), expected.len());
    taken.iter().zip(&expected).for_each(|(taken, expected)| expected.check(taken));
    let again = take_all(&mut open().expect("it was good before"));
    assert_eq!(again, (taken.clone(), stopped), "another time, another queue");
    assert!(contents(&file) == model.file, "taking requests writes into the guest's memory");
    let heads: Vec<_> = taken.iter().map(|taken| taken.head).collect();
    let idx = model.u16(parts.used + 2).wrapping_add(heads.len() as u16);
    assert_eq!(rings.complete(&heads), idx);
    let used = parts.used..parts.used + 6 + 8 * usize::from(model.size);
    let mut after = contents(&file);
    after[used.clone()].copy_from_slice(&model.file[used]);
    assert!(after == model.file, "completing requests writes outside of the used ring");
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; FILE];
    file.read_exact_at(&mut bytes, 0).expect("memory");
    bytes
}

/// The requests that are there; and why the queue stops, if it does.
fn take_all(rings: &mut Rings) -> (Vec<Taken>, Option<&'static str>) {
    let mut taken = Vec::new();
    while taken.len() < REQUESTS {
        match rings.take() {
            Ok(Some(request)) => taken.push(request),
            Ok(None) => break,
            Err(why) => return (taken, Some(why)),
        }
    }
    (taken, None)
}

/// A guest, and what is to be made of it.
struct Model {
    indirect: bool,
    event_idx: bool,
    size: u16,
    next: u16,
    address: RingAddress,
    regions: Vec<MemoryRegion>,
    file: Vec<u8>,
}

/// Where the parts of a ring are in the file.
struct Parts {
    desc: usize,
    avail: usize,
    used: usize,
}

/// A request, as it is to be taken.
struct Expected {
    head: u16,
    chain: [Vec<Piece>; 2],
    /// What it asks for; of reads and writes the data too.
    job: Job,
    data: Option<[Vec<Piece>; 2]>,
}

impl Expected {
    fn check(&self, taken: &Taken) {
        assert_eq!((self.head, &self.chain), (taken.head, &taken.chain));
        assert!(self.chain.iter().map(Vec::len).sum::<usize>() <= PIECES, "a request in too many pieces");
        let (at, len) = *self.chain[1].last().expect("a place for the status");
        assert_eq!(taken.status, at + len as u64 - 1);
        assert_eq!(taken.job, format!("{:?}", self.job));
        if let Some(data) = &self.data {
            assert_eq!(&taken.data, data);
        }
    }
}

/// What a request asks for; prints as the real one does.
#[derive(Debug)]
#[allow(dead_code, reason = "the fields are printed")]
enum Job {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    Id,
    Answer(u8),
}

#[derive(Debug)]
#[allow(dead_code, reason = "the fields are printed")]
struct Range {
    offset: u64,
    len: u64,
    unmap: bool,
}

/// A descriptor.
struct Entry {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

impl Model {
    fn new(data: &[u8]) -> Option<Model> {
        let (head, rest) = data.split_first_chunk::<HEAD>()?;
        let number =
            |at: usize| u64::from(u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let address = RingAddress { flags: 0, desc: number(4), avail: number(8), used: number(12), log: 0 };
        let count = usize::from(head[1] & 15) + 1;
        let (regions, contents) = rest.split_at_checked(count * REGION)?;
        let mut file = contents.to_vec();
        file.resize(FILE, 0);
        Some(Model {
            indirect: head[0] & 1 != 0,
            event_idx: head[0] & 2 != 0,
            size: 1 << (head[0] >> 4),
            next: u16::from_le_bytes([head[2], head[3]]),
            address,
            // Those that are empty or wrap around are no message.
            regions: regions.chunks_exact(REGION).map(region).collect::<Option<_>>()?,
            file,
        })
    }

    /// Where the ring is, if it can be one.
    fn parts(&self) -> Option<Parts> {
        let apart =
            |a: &MemoryRegion, b: &MemoryRegion| a.guest + a.size <= b.guest || b.guest + b.size <= a.guest;
        let good = self.regions.iter().enumerate().all(|(ix, region)| {
            region.offset + region.size <= FILE as u64
                && self.regions[..ix].iter().all(|other| apart(region, other))
        });
        if !good || self.size > 1024 {
            return None;
        }
        let mut sorted: Vec<_> = self.regions.iter().collect();
        sorted.sort_by_key(|region| region.guest);
        let part = |at: u64, len: usize, align: usize| {
            let region = sorted.iter().find(|region| at >= region.user && at < region.user + region.size)?;
            let place = (at - region.user + region.offset) as usize;
            let inside = at + len as u64 <= region.user + region.size;
            (inside && place.is_multiple_of(align)).then_some(place)
        };
        let size = usize::from(self.size);
        Some(Parts {
            desc: part(self.address.desc, 16 * size, 16)?,
            avail: part(self.address.avail, 6 + 2 * size, 2)?,
            used: part(self.address.used, 6 + 8 * size, 4)?,
        })
    }

    /// The requests that are there, and whether the queue stops behind them.
    fn take_all(&self, parts: &Parts) -> (Vec<Expected>, bool) {
        let mut requests = Vec::new();
        let count = self.u16(parts.avail + 2).wrapping_sub(self.next);
        if count > self.size {
            return (requests, true);
        }
        for n in 0..count.min(REQUESTS as u16) {
            let slot = usize::from(self.next.wrapping_add(n) % self.size);
            let head = self.u16(parts.avail + 4 + 2 * slot);
            let Some(request) = self.chain(parts, head).and_then(|chain| self.request(head, chain)) else {
                return (requests, true);
            };
            requests.push(request);
        }
        (requests, false)
    }

    /// The memory of a chain, if it is a good one.
    fn chain(&self, parts: &Parts, head: u16) -> Option<[Vec<Piece>; 2]> {
        let (mut table, mut size, mut index) = (parts.desc, usize::from(self.size), usize::from(head));
        let mut pieces = [Vec::new(), Vec::new()];
        let mut nested = false;
        let mut steps = 0;
        loop {
            if index >= size || steps >= size {
                return None;
            }
            let entry = self.entry(table + 16 * index);
            if entry.flags & INDIRECT != 0 {
                let whole = entry.len > 0 && entry.len.is_multiple_of(16) && entry.len <= 16 * 1024;
                if nested || !self.indirect || entry.flags & NEXT != 0 || !whole {
                    return None;
                }
                // One region holds all of it.
                let [(_, len)] = self.pieces(entry.address, entry.len)?[..] else { return None };
                (table, size, index) = (self.place(entry.address)?, len / 16, 0);
                (nested, steps) = (true, 0);
                continue;
            }
            let more = self.pieces(entry.address, entry.len)?;
            match entry.flags & WRITE {
                0 if !pieces[1].is_empty() => return None,
                0 => pieces[0].extend(more),
                _ => pieces[1].extend(more),
            }
            if pieces.iter().map(Vec::len).sum::<usize>() > PIECES {
                return None;
            }
            if entry.flags & NEXT == 0 {
                return Some(pieces);
            }
            (index, steps) = (entry.next.into(), steps + 1);
        }
    }

    fn request(&self, head: u16, chain: [Vec<Piece>; 2]) -> Option<Expected> {
        let mut data = chain.clone();
        let last = data[1].last_mut()?;
        last.1 -= 1;
        data[1].retain(|(_, len)| *len > 0);
        let bytes = self.gather(&chain[0]);
        let [readable, room] =
            [&chain[0], &data[1]].map(|pieces| pieces.iter().map(|(_, len)| *len as u64).sum());
        let Some((header, bytes)) = bytes.split_first_chunk::<16>() else {
            return Some(Expected { head, chain, job: Job::Answer(1), data: None });
        };
        cut(&mut data[0], header.len());
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = number(&header[8..]);
        let job = job(kind, sector, bytes, [readable - 16, room]);
        let data = (!matches!(kind, 11 | 13)).then_some(data);
        Some(Expected { head, chain, job, data })
    }

    /// Where the region of a guest's address has it in the file.
    fn place(&self, guest: u64) -> Option<usize> {
        let region = self.region(guest)?;
        Some((guest - region.guest + region.offset) as usize)
    }

    fn region(&self, guest: u64) -> Option<&MemoryRegion> {
        self.regions.iter().find(|region| guest >= region.guest && guest < region.guest + region.size)
    }

    fn pieces(&self, guest: u64, len: u32) -> Option<Vec<Piece>> {
        let (mut at, mut left, mut pieces) = (guest, u64::from(len), Vec::new());
        while left > 0 {
            let region = self.region(at)?;
            let here = left.min(region.guest + region.size - at);
            pieces.push((at, here as usize));
            (at, left) = (at + here, left - here);
        }
        Some(pieces)
    }

    /// The first bytes of these pieces.
    fn gather(&self, pieces: &[Piece]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (at, len) in pieces {
            let place = self.place(*at).expect("a piece is in a region");
            let len = (*len).min(LOOKED_AT - bytes.len());
            bytes.extend_from_slice(&self.file[place..place + len]);
        }
        bytes
    }

    fn u16(&self, place: usize) -> u16 {
        u16::from_le_bytes([self.file[place], self.file[place + 1]])
    }

    fn entry(&self, place: usize) -> Entry {
        let bytes = &self.file[place..place + 16];
        let (address, len) = (number(bytes), number(&bytes[8..]) as u32);
        Entry { address, len, flags: self.u16(place + 12), next: self.u16(place + 14) }
    }
}

/// The eight bytes at the front.
fn number(bytes: &[u8]) -> u64 {
    bytes[..8].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn region(bytes: &[u8]) -> Option<MemoryRegion> {
    let (guest, rest) = (number(bytes), number(&bytes[8..]));
    let (user, offset, size) = (rest & 0xffff_ffff, rest >> 32 & 0xffff, (rest >> 48) + 1);
    guest.checked_add(size)?;
    Some(MemoryRegion { guest, size, user, offset })
}

/// Cuts the first bytes off.
fn cut(pieces: &mut Vec<Piece>, mut count: usize) {
    for (at, len) in pieces.iter_mut() {
        let here = count.min(*len);
        (*at, *len, count) = (*at + here as u64, *len - here, count - here);
    }
    pieces.retain(|(_, len)| *len > 0);
}

/// What a request of this kind asks for; `bytes` is what its data starts with, of so many bytes to read and to write.
fn job(kind: u32, sector: u64, bytes: &[u8], [readable, writable]: [u64; 2]) -> Job {
    let len = if kind == 0 { writable } else { readable };
    match (kind, sector.checked_mul(512)) {
        (_, None) => Job::Answer(1),
        (0 | 1, _) if len == 0 => Job::Answer(0),
        (0 | 1, _) if len % 512 != 0 => Job::Answer(1),
        (0, Some(offset)) => Job::Read { offset, len },
        (1, Some(offset)) => Job::Write { offset, len },
        (4, _) => Job::Flush,
        (8, _) => Job::Id,
        (11 | 13, _) if len == 0 || len % 16 != 0 || len > 256 * 16 => Job::Answer(1),
        (11 | 13, _) => ranges(kind == 13, bytes),
        _ => Job::Answer(2),
    }
}

fn ranges(zero: bool, bytes: &[u8]) -> Job {
    let mut ranges = Vec::new();
    for range in bytes.chunks_exact(16) {
        let (sector, rest) = (number(range), number(&range[8..]));
        let (sectors, flags) = (rest & 0xffff_ffff, rest >> 32);
        if flags > u64::from(zero) {
            return Job::Answer(2);
        }
        let Some(offset) = sector.checked_mul(512).filter(|_| sectors <= 1 << 21) else {
            return Job::Answer(1);
        };
        if sectors > 0 {
            ranges.push(Range { offset, len: sectors * 512, unmap: flags == 1 });
        }
    }
    match (ranges.is_empty(), zero) {
        (true, _) => Job::Answer(0),
        (false, true) => Job::WriteZeroes(ranges),
        (false, false) => Job::Discard(ranges),
    }
}
