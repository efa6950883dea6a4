//! A split virtqueue, seen from the device. Source: virtio 1.2, section 2.7.
//!
//! The rings are the guest's memory, which it may change at any instant: every field is read once, by a volatile
//! or atomic load, and nothing is believed that was not checked after it was read. All `unsafe` of the rings is here.

use super::memory::Memory;
use super::wire::RingAddress;
use blockmason::{Error, Result};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

/// Bytes of a descriptor.
pub(crate) const DESCRIPTOR: u64 = 16;

/// The longest ring.
pub(crate) const LONGEST: u16 = 1024;

/// An entry of a table of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Reads a descriptor once. Whatever the bytes are, it is one.
///
/// # Safety
/// Sixteen bytes are mapped at `at`.
pub(crate) unsafe fn read_descriptor(at: NonNull<u8>) -> Descriptor {
    // SAFETY: mapped, by the caller; every bit pattern is a descriptor, and unaligned tables are read too.
    unsafe { at.as_ptr().cast::<Descriptor>().read_unaligned() }
}

/// Where the three parts of a ring are in our address space.
pub(crate) struct Ring {
    size: u16,
    desc: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
    memory: Arc<Memory>,
}

impl Ring {
    /// The ring of `size` entries at these addresses of the front-end.
    ///
    /// # Errors
    /// [`blockmason::Kind::Invalid`] if it is not in the guest's memory as a whole, or not aligned.
    pub(crate) fn new(memory: &Arc<Memory>, address: &RingAddress, size: u16) -> Result<Ring> {
        if size == 0 || !size.is_power_of_two() || size > LONGEST {
            return Err(Error::invalid(format!(
                "a queue of {size} entries, not of a power of two up to {LONGEST}"
            )));
        }
        let entries = u64::from(size);
        let part = |address: u64, len: u64, align: usize| {
            let at = memory.get_user(address, len).filter(|at| (at.as_ptr() as usize).is_multiple_of(align));
            at.ok_or_else(|| {
                Error::invalid(format!("a queue at {address:#x}, which is not the guest's memory: is that shared with this process (share=on)?"))
            })
        };
        Ok(Ring {
            size,
            desc: part(address.desc, DESCRIPTOR * entries, 16)?,
            // flags, idx, entries, used_event; flags, idx, entries, avail_event.
            avail: part(address.avail, 6 + 2 * entries, 2)?,
            used: part(address.used, 6 + 8 * entries, 4)?,
            memory: memory.clone(),
        })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// A field of 16 bits. The offset is one of those checked by `new`.
    #[inline]
    fn field(&self, part: NonNull<u8>, offset: usize) -> &AtomicU16 {
        // SAFETY: `new` has checked that the whole part is mapped and aligned, and self.memory keeps it so.
        // Both sides access such fields by single loads and stores of 16 bits.
        unsafe { AtomicU16::from_ptr(part.as_ptr().add(offset).cast()) }
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    /// How far the driver has come. What it wrote before is seen by whoever has read this.
    #[inline]
    pub(crate) fn avail_idx(&self) -> u16 {
        u16::from_le(self.field(self.avail, 2).load(Ordering::Acquire))
    }

    /// The head of the chain at a place of the available ring: any number.
    #[inline]
    pub(crate) fn avail_head(&self, index: u16) -> u16 {
        u16::from_le(self.field(self.avail, 4 + 2 * self.slot(index)).load(Ordering::Relaxed))
    }

    /// A descriptor of the table. `index` is below the size.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Descriptor {
        assert!(index < self.size);
        // SAFETY: the table has `size` entries, all of them mapped (see `new`).
        unsafe { read_descriptor(self.desc.add(usize::from(index) * DESCRIPTOR as usize)) }
    }

    /// How far we had come, as the ring says: true even after the death of whoever wrote it.
    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le(self.field(self.used, 2).load(Ordering::Acquire))
    }

    /// Writes an entry of the used ring. The driver sees it after [`publish`](Self::publish).
    #[inline]
    pub(crate) fn put_used(&self, index: u16, head: u16, len: u32) {
        let [id, len] = [u32::from(head).to_le(), len.to_le()];
        // SAFETY: the entry is inside of the used ring, aligned to four bytes (see `new`); the driver reads it
        // only after idx has passed it.
        unsafe {
            let entry = self.used.add(self.used_offset(index)).cast::<u32>();
            entry.write_volatile(id);
            entry.add(1).write_volatile(len);
        }
    }

    fn used_offset(&self, index: u16) -> usize {
        4 + 8 * self.slot(index)
    }

    /// Hands the entries before `idx` to the driver.
    #[inline]
    pub(crate) fn publish(&self, idx: u16) {
        self.field(self.used, 2).store(idx.to_le(), Ordering::Release);
    }

    /// Offset and length of what [`put_used`](Self::put_used) wrote, and of idx, in the used ring: for the log.
    pub(crate) fn written(&self, from: u16, to: u16) -> impl Iterator<Item = (u64, u64)> {
        let count = to.wrapping_sub(from);
        let entries = (0..count).map(move |n| (self.used_offset(from.wrapping_add(n)) as u64, 8));
        entries.chain([(0, 4)])
    }

    /// Asks for a kick when something comes after `next`. True if something has come meanwhile.
    pub(crate) fn ask_for_kick(&self, next: u16, event_idx: bool) -> bool {
        if event_idx {
            let event = 4 + 8 * usize::from(self.size);
            self.field(self.used, event).store(next.to_le(), Ordering::Relaxed);
        } else {
            self.field(self.used, 0).store(0, Ordering::Relaxed);
        }
        // What the driver adds is seen here, or what we ask for is seen there.
        fence(Ordering::SeqCst);
        self.avail_idx() != next
    }

    /// Kicks are of no use: we look by ourselves. With event_idx they end by themselves.
    pub(crate) fn ask_for_no_kick(&self, event_idx: bool) {
        if !event_idx {
            self.field(self.used, 0).store((VRING_USED_F_NO_NOTIFY as u16).to_le(), Ordering::Relaxed);
        }
    }

    /// True if the driver wants to be interrupted for the entries between `from` and `to`, which have been
    /// published.
    #[inline]
    pub(crate) fn wants_interrupt(&self, from: u16, to: u16, event_idx: bool) -> bool {
        // What the driver asks for is seen here, or what was published is seen there.
        fence(Ordering::SeqCst);
        if event_idx {
            let event = 4 + 2 * usize::from(self.size);
            let event = u16::from_le(self.field(self.avail, event).load(Ordering::Relaxed));
            return to.wrapping_sub(event).wrapping_sub(1) < to.wrapping_sub(from);
        }
        let flags = u16::from_le(self.field(self.avail, 0).load(Ordering::Relaxed));
        flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
    }
}

// SAFETY: the pointers lead into memory that `memory` keeps mapped, on whatever thread; only the one that has the
// ring writes the device's side of it.
unsafe impl Send for Ring {}
