//! The region in which a back-end notes what it has in flight. The front-end keeps it across the back-end's death;
//! tests read it, and write into it what a death at some instant would have left.

use std::fs::File;
use std::os::fd::AsRawFd;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Bytes before the entries of a queue.
const HEADER: usize = 16;

/// Bytes of an entry.
const ENTRY: usize = 16;

/// Regions of queues begin at multiples of this, as they do in every back-end there is; the specification does not
/// say.
const ALIGN: usize = 64;

/// A region, mapped.
pub struct Inflight {
    about: VhostUserInflight,
    file: File,
    map: MmapRegion<()>,
}

/// The header of a queue's region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 1 once the back-end has used it.
    pub version: u16,
    /// Entries.
    pub entries: u16,
    /// The head that was used last, the start of a list.
    pub last_batch_head: u16,
    /// What the index of the used ring was when the entries were brought up to date.
    pub used_idx: u16,
}

/// What is noted of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// Whether it was taken and not used.
    pub inflight: bool,
    /// The next of the last batch.
    pub next: u16,
    /// The order in which heads were taken.
    pub counter: u64,
}

impl Inflight {
    /// Maps what a back-end has sent.
    pub fn new(about: VhostUserInflight, file: File) -> Inflight {
        let (offset, size) = (about.mmap_offset, usize::try_from(about.mmap_size).unwrap());
        let needed = stride(about.queue_size.into()) * usize::from(about.num_queues);
        assert!(size >= needed, "a region of {size} bytes is too small, it must have {needed}");
        let map = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), offset), size).unwrap();
        Inflight { about, file, map }
    }

    /// What the back-end said of it.
    pub fn about(&self) -> &VhostUserInflight {
        &self.about
    }

    /// The region's file.
    pub fn fd(&self) -> i32 {
        self.file.as_raw_fd()
    }

    /// A queue's header.
    pub fn header(&self, queue: usize) -> Header {
        let at = self.queue(queue);
        let field = |offset| self.get::<u16>(at + offset);
        Header { version: field(8), entries: field(10), last_batch_head: field(12), used_idx: field(14) }
    }

    /// Sets a queue's header.
    pub fn set_header(&self, queue: usize, header: Header) {
        let at = self.queue(queue);
        self.set(at, 0_u64);
        self.set(at + 8, header.version);
        self.set(at + 10, header.entries);
        self.set(at + 12, header.last_batch_head);
        self.set(at + 14, header.used_idx);
    }

    /// What is noted of a head.
    pub fn entry(&self, queue: usize, head: u16) -> Entry {
        let at = self.at(queue, head);
        Entry { inflight: self.get::<u8>(at) != 0, next: self.get(at + 6), counter: self.get(at + 8) }
    }

    /// Whether a head is noted as in flight.
    pub fn is_in_flight(&self, queue: usize, head: u16) -> bool {
        self.get::<u8>(self.at(queue, head)) != 0
    }

    /// Sets what is noted of a head.
    pub fn set_entry(&self, queue: usize, head: u16, entry: Entry) {
        let at = self.at(queue, head);
        self.set(at, u8::from(entry.inflight));
        self.set(at + 6, entry.next);
        self.set(at + 8, entry.counter);
    }

    /// The heads that are noted as in flight, in the order in which they were taken.
    pub fn heads(&self, queue: usize) -> Vec<u16> {
        let heads = 0..self.about.queue_size;
        let mut heads: Vec<u16> = heads.filter(|head| self.entry(queue, *head).inflight).collect();
        heads.sort_by_key(|head| self.entry(queue, *head).counter);
        heads
    }

    /// Sets every byte of it.
    pub fn fill(&self, byte: u8) {
        self.map.as_volatile_slice().copy_from(&vec![byte; self.map.size()]);
    }

    fn queue(&self, queue: usize) -> usize {
        assert!(queue < usize::from(self.about.num_queues));
        queue * stride(self.about.queue_size.into())
    }

    fn at(&self, queue: usize, head: u16) -> usize {
        assert!(head < self.about.queue_size);
        self.queue(queue) + HEADER + ENTRY * usize::from(head)
    }

    fn get<T: vm_memory::ByteValued>(&self, at: usize) -> T {
        self.map.as_volatile_slice().read_obj(at).unwrap()
    }

    fn set<T: vm_memory::ByteValued>(&self, at: usize, value: T) {
        self.map.as_volatile_slice().write_obj(value, at).unwrap();
    }
}

/// Bytes from one queue's region to the next.
pub fn stride(entries: usize) -> usize {
    (HEADER + ENTRY * entries).next_multiple_of(ALIGN)
}
