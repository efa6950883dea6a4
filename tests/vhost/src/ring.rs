//! A split virtqueue, the driver's side, with every field within reach: VIRTIO 1.2, section 2.7.

use crate::memory::{Half, Memory};
use std::num::Wrapping;
use std::sync::Arc;

/// Another descriptor follows.
pub const NEXT: u16 = 1;
/// The device writes into it.
pub const WRITE: u16 = 2;
/// It is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub const DESCRIPTOR: u64 = 16;

/// A part of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// A guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes into it.
    pub write: bool,
}

/// An entry of the descriptor table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// A guest address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The entry that follows.
    pub next: u16,
}

/// Where a ring lies, in guest addresses.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Descriptors.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

impl Place {
    /// Takes memory for a ring of `size` descriptors, a power of two.
    pub fn take(mem: &Memory, size: u16) -> Place {
        let count = u64::from(size);
        Place {
            size,
            desc: mem.take(Half::Low, DESCRIPTOR * count, 16),
            avail: mem.take(Half::Low, 6 + 2 * count, 2),
            used: mem.take(Half::Low, 6 + 8 * count, 4),
        }
    }
}

/// A ring.
pub struct Ring {
    mem: Arc<Memory>,
    /// Where it lies.
    pub place: Place,
    event_idx: bool,
    free: Vec<u16>,
    /// The descriptors of the chain that begins with a head; empty where none is out.
    out: Vec<Vec<u16>>,
    avail: Wrapping<u16>,
    told: Wrapping<u16>,
    seen: Wrapping<u16>,
}

impl Ring {
    /// An empty ring.
    pub fn new(mem: &Arc<Memory>, size: u16, event_idx: bool) -> Ring {
        let place = Place::take(mem, size);
        Ring {
            mem: mem.clone(),
            place,
            event_idx,
            free: (0..size).rev().collect(),
            out: vec![Vec::new(); size.into()],
            avail: Wrapping(0),
            told: Wrapping(0),
            seen: Wrapping(0),
        }
    }

    /// Lets all indices begin at `idx`, as after so many requests. Nothing may be out.
    pub fn start_at(&mut self, idx: u16) {
        assert_eq!(self.out(), 0);
        (self.avail, self.told, self.seen) = (Wrapping(idx), Wrapping(idx), Wrapping(idx));
        self.set_avail_idx(idx);
        self.set_used_idx(idx);
    }

    /// Lays out a chain and makes it available. Returns its head; none when descriptors are lacking.
    pub fn offer(&mut self, parts: &[Part]) -> Option<u16> {
        let head = self.lay(parts)?;
        self.publish(head);
        Some(head)
    }

    /// As [`offer`](Self::offer), through a table of descriptors at the guest address `table`.
    pub fn offer_indirect(&mut self, parts: &[Part], table: u64) -> Option<u16> {
        let head = self.free.pop()?;
        for (ix, part) in (0_u16..).zip(parts) {
            let more = if usize::from(ix) + 1 < parts.len() { NEXT } else { 0 };
            let at = table + DESCRIPTOR * u64::from(ix);
            self.describe(at, part.addr, part.len, more | flag(*part), ix + 1);
        }
        let bytes = DESCRIPTOR as u32 * parts.len() as u32;
        self.set_descriptor(head, table, bytes, INDIRECT, 0);
        self.out[usize::from(head)] = vec![head];
        self.publish(head);
        Some(head)
    }

    /// Lays out a chain that the device is not told of yet.
    pub fn lay(&mut self, parts: &[Part]) -> Option<u16> {
        if self.free.len() < parts.len() {
            return None;
        }
        let chain: Vec<u16> = self.free.split_off(self.free.len() - parts.len());
        for (ix, part) in parts.iter().enumerate() {
            let next = chain.get(ix + 1);
            let more = if next.is_some() { NEXT } else { 0 };
            self.set_descriptor(chain[ix], part.addr, part.len, more | flag(*part), *next.unwrap_or(&0));
        }
        let head = chain[0];
        self.out[usize::from(head)] = chain;
        Some(head)
    }

    /// Makes a head available.
    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.avail.0 % self.place.size);
        self.mem.set(self.place.avail + 4 + 2 * slot, head);
        self.avail += 1;
        self.set_avail_idx(self.avail.0);
    }

    /// Whether the device wants to be told of what was offered since the last time this was asked.
    pub fn needs_kick(&mut self) -> bool {
        let (old, new) = (self.told, self.avail);
        self.told = new;
        if old == new {
            return false;
        }
        if !self.event_idx {
            return self.mem.load::<u16>(self.place.used) & 1 == 0;
        }
        new - Wrapping(self.asked_for()) - Wrapping(1) < new - old
    }

    /// How far the device had come when it asked to be told of more, with VIRTIO_F_EVENT_IDX.
    pub fn asked_for(&self) -> u16 {
        self.mem.load(self.place.used + 4 + 8 * u64::from(self.place.size))
    }

    /// The next head that the device has used, and the bytes that it says it has written. Panics when that chain is
    /// not out: it is completed a second time, or never was offered.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if !self.is_ready() {
            return None;
        }
        let (head, written) = self.used_element(self.seen.0);
        let count = u32::from(self.place.size);
        assert!(head < count, "the used ring names head {head} of {count}");
        let head = head as u16;
        let chain = std::mem::take(&mut self.out[usize::from(head)]);
        assert!(!chain.is_empty(), "head {head} is completed, but it is not out");
        self.free.extend(chain);
        self.seen += 1;
        Some((head, written))
    }

    /// Whether the device has used something that was not taken.
    pub fn is_ready(&self) -> bool {
        self.seen != Wrapping(self.used_idx())
    }

    /// Asks to be called when something more is used. There may be something by now: look again.
    pub fn arm(&self) {
        let at = self.place.avail + 4 + 2 * u64::from(self.place.size);
        self.mem.store(at, self.seen.0);
    }

    /// Chains that the device has.
    pub fn out(&self) -> usize {
        self.out.iter().filter(|chain| !chain.is_empty()).count()
    }

    /// Descriptors that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many have been offered, modulo 65536.
    pub fn avail_idx(&self) -> u16 {
        self.avail.0
    }

    /// Overwrites the index of the available ring.
    pub fn set_avail_idx(&self, idx: u16) {
        self.mem.store(self.place.avail + 2, idx);
    }

    /// The index of the used ring.
    pub fn used_idx(&self) -> u16 {
        self.mem.load(self.place.used + 2)
    }

    /// Overwrites the index of the used ring, as a back-end does.
    pub fn set_used_idx(&self, idx: u16) {
        self.mem.store(self.place.used + 2, idx);
    }

    /// An element of the used ring.
    pub fn used_element(&self, idx: u16) -> (u32, u32) {
        let at = self.place.used + 4 + 8 * u64::from(idx % self.place.size);
        (self.mem.get(at), self.mem.get(at + 4))
    }

    /// Overwrites an element of the used ring, as a back-end does.
    pub fn set_used_element(&self, idx: u16, head: u16, written: u32) {
        let at = self.place.used + 4 + 8 * u64::from(idx % self.place.size);
        self.mem.set(at, u32::from(head));
        self.mem.set(at + 4, written);
    }

    /// A descriptor.
    pub fn descriptor(&self, ix: u16) -> Descriptor {
        let at = self.place.desc + DESCRIPTOR * u64::from(ix);
        let (addr, len) = (self.mem.get(at), self.mem.get(at + 8));
        Descriptor { addr, len, flags: self.mem.get(at + 12), next: self.mem.get(at + 14) }
    }

    /// Overwrites a descriptor.
    pub fn set_descriptor(&self, ix: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.describe(self.place.desc + DESCRIPTOR * u64::from(ix), addr, len, flags, next);
    }

    /// Writes a descriptor at a guest address.
    pub fn describe(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.mem.set(at, addr);
        self.mem.set(at + 8, len);
        self.mem.set(at + 12, flags);
        self.mem.set(at + 14, next);
    }
}

fn flag(part: Part) -> u16 {
    if part.write { WRITE } else { 0 }
}
