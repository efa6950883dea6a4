//! Requests of a virtio block device (VIRTIO 1.2, section 5.2) over rings of our own.

use crate::device::{self, Device, F_EVENT_IDX, F_INDIRECT, Wishes};
use crate::memory::{Half, Memory, Seal};
use crate::ring::{DESCRIPTOR, Part, Ring};
use std::path::Path;

/// VIRTIO_BLK_T_IN.
pub const IN: u32 = 0;
/// VIRTIO_BLK_T_OUT.
pub const OUT: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub const FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub const GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub const DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub const WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_S_OK.
pub const OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const UNSUPP: u8 = 2;
/// What the status byte is before the device sets it.
pub const UNSET: u8 = 0xff;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// Parts of a chain, at most: header, data in pieces, status.
const PARTS: u64 = 34;

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// One of the types above, or none.
    pub kind: u32,
    /// Where it begins.
    pub sector: u64,
    /// What the device reads after the header.
    pub out: Vec<u8>,
    /// Bytes that the device writes before the status.
    pub into: u32,
    /// Descriptors that the data is cut into.
    pub pieces: usize,
}

impl Request {
    /// Reads.
    pub fn read(sector: u64, bytes: u32) -> Request {
        Request { into: bytes, ..Request::of(IN, sector) }
    }

    /// Writes.
    pub fn write(sector: u64, data: &[u8]) -> Request {
        Request { out: data.to_vec(), ..Request::of(OUT, sector) }
    }

    /// A request without data.
    pub fn of(kind: u32, sector: u64) -> Request {
        Request { kind, sector, out: Vec::new(), into: 0, pieces: 1 }
    }

    /// Discards or zeroes ranges of sectors, each with its flags (1 is `unmap`).
    pub fn ranges(kind: u32, ranges: &[(u64, u32, u32)]) -> Request {
        let mut out = Vec::new();
        for (sector, count, flags) in ranges {
            out.extend(sector.to_le_bytes());
            out.extend(count.to_le_bytes());
            out.extend(flags.to_le_bytes());
        }
        Request { out, ..Request::of(kind, 0) }
    }

    /// With the data in so many descriptors.
    pub fn in_pieces(mut self, pieces: usize) -> Request {
        self.pieces = pieces;
        self
    }
}

/// A request that was completed.
#[derive(Clone, Debug)]
pub struct Done {
    /// The request.
    pub request: Request,
    /// The head of its chain.
    pub head: u16,
    /// Its status byte.
    pub status: u8,
    /// Bytes that the device says it has written, the status among them.
    pub written: u32,
    /// What the device has written, before the status.
    pub data: Vec<u8>,
}

/// The shape of a disk's front-end.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Queues.
    pub queues: usize,
    /// Descriptors of each.
    pub size: u16,
    /// Requests in flight on each, at most.
    pub depth: usize,
    /// Bytes of data of a request, at most.
    pub data: u32,
    /// How it connects.
    pub wishes: Wishes,
    /// Whether the memory may shrink.
    pub sealed: bool,
    /// Bytes of memory that no request needs: as large as a guest's.
    pub spare: u64,
}

impl Default for Shape {
    fn default() -> Shape {
        let wishes = Wishes::default();
        Shape { queues: 1, size: 128, depth: 16, data: 64 << 10, wishes, sealed: true, spare: 0 }
    }
}

/// A disk as its driver sees it.
pub struct Blk {
    /// The connection.
    pub device: Device,
    /// The rings.
    pub rings: Vec<Ring>,
    queues: Vec<Queue>,
    shape: Shape,
}

struct Queue {
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// By head: the slot and the request.
    out: Vec<Option<(usize, Request)>>,
}

/// Where a request's parts lie.
#[derive(Clone, Copy)]
struct Slot {
    head: u64,
    table: u64,
    data: u64,
}

impl Blk {
    /// A disk that is not connected.
    pub fn new(shape: Shape) -> Blk {
        let each = u64::from(shape.data).next_multiple_of(4096) + DESCRIPTOR * PARTS + 4096;
        let rings = shape.queues as u64 * (u64::from(shape.size) * 32 + 4096);
        let half =
            (each * (shape.queues * shape.depth) as u64 + rings + shape.spare / 2).next_multiple_of(4096);
        let mem = Memory::new(half, if shape.sealed { Seal::Shrink } else { Seal::Nothing });
        let event_idx = shape.wishes.features & F_EVENT_IDX != 0;
        let rings: Vec<Ring> = (0..shape.queues).map(|_| Ring::new(&mem, shape.size, event_idx)).collect();
        let slot = |ix: usize| Slot {
            head: mem.take(Half::Low, 32, 16),
            table: mem.take(Half::Low, DESCRIPTOR * PARTS, 16),
            // Both regions get data.
            data: mem.take(
                if ix.is_multiple_of(2) { Half::High } else { Half::Low },
                shape.data.into(),
                4096,
            ),
        };
        let queue = |_| Queue {
            slots: (0..shape.depth).map(slot).collect(),
            free: (0..shape.depth).rev().collect(),
            out: vec![None; shape.size.into()],
        };
        let queues = (0..shape.queues).map(queue).collect();
        let places: Vec<_> = rings.iter().map(|ring| ring.place).collect();
        Blk { device: Device::new(mem, places, shape.wishes), rings, queues, shape }
    }

    /// A disk that is connected.
    pub fn connected(shape: Shape, socket: &Path) -> Blk {
        let mut blk = Blk::new(shape);
        blk.connect(socket).unwrap_or_else(|error| panic!("{}: {error}", socket.display()));
        blk
    }

    /// Connects, again or for the first time.
    pub fn connect(&mut self, socket: &Path) -> device::Result<()> {
        self.device.connect(socket)
    }

    /// Lets the indices of all rings begin at `idx` instead of 0, as after so many requests. Before it connects.
    pub fn start_at(&mut self, idx: u16) {
        self.rings.iter_mut().for_each(|ring| ring.start_at(idx));
    }

    /// The shape that it was made with.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether a queue can take another request.
    pub fn has_room(&self, queue: usize) -> bool {
        !self.queues[queue].free.is_empty() && self.rings[queue].free() >= PARTS as usize
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.queues.iter().map(|queue| queue.out.iter().flatten().count()).sum()
    }

    /// Makes a request available, without telling the device. Returns its head.
    pub fn submit(&mut self, queue: usize, request: Request) -> u16 {
        let (slot, parts) = self.lay(queue, &request);
        let indirect = self.device.wishes.features & F_INDIRECT != 0 && parts.len() > 3;
        let table = self.queues[queue].slots[slot].table;
        let ring = &mut self.rings[queue];
        let head = if indirect { ring.offer_indirect(&parts, table) } else { ring.offer(&parts) };
        self.took(queue, head, slot, request)
    }

    /// As [`submit`](Self::submit), but the available ring does not name it yet.
    pub fn prepare(&mut self, queue: usize, request: Request) -> u16 {
        let (slot, parts) = self.lay(queue, &request);
        let head = self.rings[queue].lay(&parts);
        self.took(queue, head, slot, request)
    }

    fn took(&mut self, queue: usize, head: Option<u16>, slot: usize, request: Request) -> u16 {
        let head = head.expect("no descriptor is free");
        self.queues[queue].out[usize::from(head)] = Some((slot, request));
        head
    }

    fn lay(&mut self, queue: usize, request: &Request) -> (usize, Vec<Part>) {
        let mem = &self.device.mem;
        let number = self.queues[queue].free.pop().expect("too many requests in flight");
        let slot = self.queues[queue].slots[number];
        mem.set(slot.head, request.kind);
        mem.set(slot.head + 4, 0_u32);
        mem.set(slot.head + 8, request.sector);
        mem.set(slot.head + 16, UNSET);
        let bytes = request.into.max(request.out.len() as u32);
        assert!(bytes <= self.shape.data, "a request has {bytes} bytes");
        mem.write(slot.data, &vec![0xee; request.into as usize]);
        mem.write(slot.data, &request.out);
        let mut parts = vec![Part { addr: slot.head, len: 16, write: false }];
        let piece = bytes.div_ceil(request.pieces as u32).max(1);
        for start in (0..bytes).step_by(piece as usize) {
            let len = piece.min(bytes - start);
            parts.push(Part { addr: slot.data + u64::from(start), len, write: request.into > 0 });
        }
        parts.push(Part { addr: slot.head + 16, len: 1, write: true });
        (number, parts)
    }

    /// Tells the device of what was submitted, if it wants to be told.
    pub fn kick(&mut self, queue: usize) {
        if self.rings[queue].needs_kick() {
            self.device.vrings[queue].kick.write(1).unwrap();
        }
    }

    /// The next request that is completed. Panics when its chain was not in flight, or when it has no status.
    pub fn collect(&mut self, queue: usize) -> Option<Done> {
        let (head, written) = self.rings[queue].used()?;
        let (number, request) = self.queues[queue].out[usize::from(head)].take().unwrap();
        self.queues[queue].free.push(number);
        let (slot, mem) = (self.queues[queue].slots[number], &self.device.mem);
        let status = mem.get(slot.head + 16);
        assert!(status != UNSET, "{request:?} is completed without a status");
        let mut data = vec![0; request.into as usize];
        mem.read(slot.data, &mut data);
        Some(Done { request, head, status, written, data })
    }

    /// Sets the status byte of a request in flight, as a back-end does.
    pub fn set_status(&self, queue: usize, head: u16, status: u8) {
        let (slot, _) = self.queues[queue].out[usize::from(head)].as_ref().unwrap();
        self.device.mem.set(self.queues[queue].slots[*slot].head + 16, status);
    }

    /// Waits until a queue has something to collect. Returns false when it has nothing in time.
    pub fn wait(&mut self, queue: usize) -> bool {
        let until = crate::now() + crate::PATIENCE;
        loop {
            self.rings[queue].arm();
            if self.rings[queue].is_ready() {
                return true;
            }
            let left = until.saturating_duration_since(crate::now());
            if !crate::wait_for(&self.device.vrings[queue].call, Some(left)) {
                return self.rings[queue].is_ready();
            }
        }
    }

    /// Carries out a request on the first queue, alone.
    pub fn run(&mut self, request: Request) -> Done {
        self.run_on(0, request)
    }

    /// Carries out a request, alone.
    pub fn run_on(&mut self, queue: usize, request: Request) -> Done {
        self.submit(queue, request);
        self.kick(queue);
        self.next(queue)
    }

    /// The next request that is completed; panics when there is none in time.
    pub fn next(&mut self, queue: usize) -> Done {
        assert!(self.wait(queue), "nothing is completed on queue {queue} after {:?}", crate::PATIENCE);
        self.collect(queue).unwrap()
    }

    /// Reads bytes, which must succeed.
    pub fn read(&mut self, sector: u64, bytes: u32) -> Vec<u8> {
        let done = self.run(Request::read(sector, bytes));
        assert_eq!(done.status, OK, "reading {bytes} bytes at sector {sector}");
        assert_eq!(done.written, bytes + 1, "the used length");
        done.data
    }

    /// Writes bytes, which must succeed.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let done = self.run(Request::write(sector, data));
        assert_eq!(done.status, OK, "writing {} bytes at sector {sector}", data.len());
    }
}
