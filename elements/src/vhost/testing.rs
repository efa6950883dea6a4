//! The other side, for tests: a driver with memory of its own.

use super::memory::Memory;
use super::ring::{DESCRIPTOR, Ring};
use super::wire::{MemoryRegion, RingAddress};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::sync::Arc;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// A file of zeros in memory.
pub(crate) fn memory_file(size: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

/// Where the guest has its memory; its front-end has it mapped at another address.
const GUEST: u64 = 0x10_0000;
const USER: u64 = 0x7000_0000;
const SIZE: u64 = 1 << 20;
/// Where things are in the guest's memory.
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xc000;
const BUFFERS: u64 = 0x1_0000;
const TABLES: u64 = 0x8_0000;

/// A piece of a request's memory, by its place among the buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) write: bool,
}

/// A driver of one queue.
pub(crate) struct Driver {
    memory: Arc<Memory>,
    size: u16,
    next: u16,
    tables: u64,
    avail: u16,
    used: u16,
}

impl Driver {
    pub(crate) fn new(size: u16) -> Driver {
        let place = MemoryRegion { guest: GUEST, size: SIZE, user: USER, offset: 0 };
        let memory = Memory::new([(place, memory_file(SIZE).into())]).unwrap();
        Driver { memory: Arc::new(memory), size, next: 0, tables: TABLES, avail: 0, used: 0 }
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Adds memory, for nothing in particular.
    pub(crate) fn add_region(&mut self, guest: u64, size: u64) {
        let place = MemoryRegion { guest, size, user: guest, offset: 0 };
        self.memory = Arc::new(self.memory.with(place, memory_file(size).into()).unwrap());
    }

    pub(crate) fn ring(&self) -> Ring {
        let address = RingAddress { flags: 0, desc: USER, used: USER + USED, avail: USER + AVAIL, log: 0 };
        Ring::new(&self.memory, &address, self.size).unwrap()
    }

    /// The guest's address of a place among the buffers.
    pub(crate) fn buffer(&self, at: u64) -> u64 {
        GUEST + BUFFERS + at
    }

    pub(crate) fn write(&self, guest: u64, bytes: &[u8]) {
        let at = self.memory.get(guest, bytes.len() as u64).unwrap();
        // SAFETY: mapped, as was just found.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.as_ptr(), bytes.len()) }
    }

    pub(crate) fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let at = self.memory.get(guest, len as u64).unwrap();
        let mut bytes = vec![0; len];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(at.as_ptr(), bytes.as_mut_ptr(), len) }
        bytes
    }

    fn descriptor((address, len, flags, next): (u64, u32, u16, u16)) -> Vec<u8> {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    }

    /// Puts a descriptor into the table as it is.
    pub(crate) fn put(&mut self, index: u16, entry: (u64, u32, u16, u16)) {
        self.write(GUEST + u64::from(index) * DESCRIPTOR, &Self::descriptor(entry));
    }

    /// Puts descriptors among the buffers; returns their address.
    pub(crate) fn put_buffer(&mut self, at: u64, entries: &[(u64, u32, u16, u16)]) -> u64 {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| Self::descriptor(*entry)).collect();
        self.write(self.buffer(at), &bytes);
        self.buffer(at)
    }

    /// The bytes of the whole table.
    pub(crate) fn write_table(&mut self, bytes: &[u8]) {
        self.write(GUEST, bytes);
    }

    fn entries(&self, pieces: &[Piece], first: u16) -> Vec<(u64, u32, u16, u16)> {
        let flags = |ix: usize, piece: &Piece| {
            let next = if ix + 1 < pieces.len() { VRING_DESC_F_NEXT as u16 } else { 0 };
            next | if piece.write { VRING_DESC_F_WRITE as u16 } else { 0 }
        };
        let entry = |(ix, piece): (usize, &Piece)| {
            let next = (first + ix as u16 + 1) % self.size.max(1024);
            (self.buffer(piece.at), piece.len, flags(ix, piece), next)
        };
        pieces.iter().enumerate().map(entry).collect()
    }

    /// Adds a chain to the table; returns its head.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next;
        self.next += pieces.len() as u16;
        let entries = self.entries(pieces, head);
        entries.into_iter().enumerate().for_each(|(ix, entry)| self.put(head + ix as u16, entry));
        head
    }

    /// Adds a chain in a table of its own; returns its head.
    pub(crate) fn add_indirect(&mut self, pieces: &[Piece]) -> u16 {
        let (head, table) = (self.next, self.tables);
        self.next += 1;
        let bytes: Vec<u8> = self.entries(pieces, 0).into_iter().flat_map(Self::descriptor).collect();
        self.tables += bytes.len() as u64;
        self.write(GUEST + table, &bytes);
        self.put(head, (GUEST + table, bytes.len() as u32, VRING_DESC_F_INDIRECT as u16, 0));
        head
    }

    /// Makes a chain available.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.write(GUEST + AVAIL + 4 + 2 * slot, &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.write(GUEST + AVAIL + 2, &self.avail.to_le_bytes());
    }

    /// What has been used since the last time: heads and lengths. Their descriptors are free again.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let idx = u16::from_le_bytes(self.read(GUEST + USED + 2, 2).try_into().unwrap());
        let mut used = Vec::new();
        while self.used != idx {
            let slot = u64::from(self.used % self.size);
            let entry = self.read(GUEST + USED + 4 + 8 * slot, 8);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            used.push((number(&entry[..4]), number(&entry[4..])));
            self.used = self.used.wrapping_add(1);
        }
        if !used.is_empty() {
            (self.next, self.tables) = (0, TABLES);
        }
        used
    }
}

impl Driver {
    /// Wants to be interrupted when idx of the used ring passes this.
    pub(crate) fn set_used_event(&self, event: u16) {
        self.write(GUEST + AVAIL + 4 + 2 * u64::from(self.size), &event.to_le_bytes());
    }
}
