//! Chains of descriptors: what of the guest's memory a request consists of. Source: virtio 1.2, sections 2.7.4
//! to 2.7.5. A chain that breaks a rule ends its queue: nothing that follows it can be trusted.

use super::memory::{MOST_REGIONS, Memory};
use super::ring::{DESCRIPTOR, Descriptor, Ring, read_descriptor};
use std::ptr::NonNull;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// The most descriptors of a request, in the ring or in a table of its own.
const LONGEST: usize = 1024;

/// The most pieces of a request. Each border between regions parts one descriptor in two; only a driver whose descriptors
/// lie on top of each other has more, and could have millions.
const MOST_PIECES: usize = LONGEST + MOST_REGIONS;

/// The most bytes of a request (virtio 1.2, 2.7.5.2).
const MOST_BYTES: u64 = 1 << 32;

/// Pieces of memory in a row.
pub(crate) type Pieces = Vec<(NonNull<u8>, usize)>;

/// The memory of a request, reused from one to the next.
#[derive(Default)]
pub(crate) struct Chain {
    /// What the driver has written for us.
    pub(crate) readable: Pieces,
    /// What we may write.
    pub(crate) writable: Pieces,
    pub(crate) readable_len: u64,
    pub(crate) writable_len: u64,
}

impl Chain {
    /// Collects the chain that starts at `head`, any number. What was collected before is forgotten.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(crate) fn read(&mut self, ring: &Ring, head: u16, indirect: bool) -> Result<(), &'static str> {
        self.readable.clear();
        self.writable.clear();
        (self.readable_len, self.writable_len) = (0, 0);
        let mut index = head;
        for _ in 0..ring.size() {
            if index >= ring.size() {
                return Err("a descriptor past the end of the ring");
            }
            let descriptor = ring.descriptor(index);
            if has(&descriptor, VRING_DESC_F_INDIRECT) {
                if !indirect {
                    return Err("an indirect table, which was not negotiated");
                }
                if has(&descriptor, VRING_DESC_F_NEXT) {
                    return Err("an indirect table with something after it");
                }
                return self.read_table(ring.memory(), &descriptor);
            }
            self.push(ring.memory(), &descriptor)?;
            if !has(&descriptor, VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = u16::from_le(descriptor.next);
        }
        Err("a chain that is longer than its ring")
    }

    fn read_table(&mut self, memory: &Memory, table: &Descriptor) -> Result<(), &'static str> {
        let (address, len) = (u64::from_le(table.address), u64::from(u32::from_le(table.len)));
        let count = len / DESCRIPTOR;
        if !len.is_multiple_of(DESCRIPTOR) || count == 0 || count > LONGEST as u64 {
            return Err("an indirect table of an impossible length");
        }
        let start = memory.get(address, len).ok_or("an indirect table outside of the guest's memory")?;
        let mut index = 0;
        for _ in 0..count {
            if index >= count {
                return Err("a descriptor past the end of its table");
            }
            // SAFETY: index < count: the descriptor is inside of the table, which is mapped.
            let descriptor = unsafe { read_descriptor(start.add((index * DESCRIPTOR) as usize)) };
            if has(&descriptor, VRING_DESC_F_INDIRECT) {
                return Err("an indirect table in an indirect table");
            }
            self.push(memory, &descriptor)?;
            if !has(&descriptor, VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = u64::from(u16::from_le(descriptor.next));
        }
        Err("a chain that is longer than its table")
    }

    #[inline]
    fn push(&mut self, memory: &Memory, descriptor: &Descriptor) -> Result<(), &'static str> {
        let (address, len) = (u64::from_le(descriptor.address), u64::from(u32::from_le(descriptor.len)));
        let (pieces, total) = if has(descriptor, VRING_DESC_F_WRITE) {
            (&mut self.writable, &mut self.writable_len)
        } else if self.writable_len > 0 {
            return Err("memory to read behind memory to write");
        } else {
            (&mut self.readable, &mut self.readable_len)
        };
        *total += len;
        if *total > MOST_BYTES {
            return Err("a request of more than 4 GiB");
        }
        let collect = |at, len| pieces.push((at, len));
        memory.pieces(address, len, collect).map_err(|_| "an address outside of the guest's memory")?;
        if self.readable.len() + self.writable.len() > MOST_PIECES {
            return Err("a request in more pieces than memory could lie in");
        }
        Ok(())
    }
}

fn has(descriptor: &Descriptor, flag: u32) -> bool {
    u16::from_le(descriptor.flags) & flag as u16 != 0
}

/// Copies the first bytes out and cuts them off. False, and nothing is changed, if there are not so many.
pub(crate) fn take_bytes(pieces: &mut Pieces, to: &mut [u8]) -> bool {
    if pieces.iter().map(|(_, len)| len).sum::<usize>() < to.len() {
        return false;
    }
    let (mut done, mut used) = (0, 0);
    for (at, len) in pieces.iter_mut() {
        let n = (*len).min(to.len() - done);
        // SAFETY: n bytes are mapped at the piece; `to` is ours, so they do not overlap. What is copied may
        // be anything, as the guest may be writing it. n <= len: the rest begins inside of the piece, or at its end.
        unsafe {
            std::ptr::copy_nonoverlapping(at.as_ptr(), to[done..].as_mut_ptr(), n);
            *at = at.add(n);
        }
        *len -= n;
        done += n;
        if *len > 0 {
            break;
        }
        used += 1;
    }
    pieces.drain(..used);
    true
}

/// Cuts the last byte off.
pub(crate) fn split_last_byte(pieces: &mut Pieces) -> Option<NonNull<u8>> {
    let last = pieces.iter().rposition(|(_, len)| *len > 0)?;
    pieces.truncate(last + 1);
    let (at, len) = pieces.last_mut()?;
    *len -= 1;
    // SAFETY: the byte was inside of the piece.
    let byte = unsafe { at.add(*len) };
    if *len == 0 {
        pieces.pop();
    }
    Some(byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::{Driver, Piece};
    use proptest::prelude::*;

    fn lengths(pieces: &Pieces) -> Vec<usize> {
        pieces.iter().map(|(_, len)| *len).collect()
    }

    fn piece() -> impl Strategy<Value = (u64, u32)> {
        (0u64..8192, 1u32..3000)
    }

    proptest! {
        #[test]
        fn a_chain_is_what_the_driver_put_there(
            readable in proptest::collection::vec(piece(), 0..5),
            writable in proptest::collection::vec(piece(), 0..5),
            indirect in any::<bool>(),
        ) {
            prop_assume!(!(readable.is_empty() && writable.is_empty()));
            let mut driver = Driver::new(16);
            let pieces = |list: &[(u64, u32)], write: bool| {
                list.iter().map(|(at, len)| Piece { at: *at, len: *len, write }).collect::<Vec<_>>()
            };
            let all = [pieces(&readable, false), pieces(&writable, true)].concat();
            let head = if indirect { driver.add_indirect(&all) } else { driver.add(&all) };
            let ring = driver.ring();
            let mut chain = Chain::default();
            chain.read(&ring, head, true).unwrap();
            let expected = |list: &[(u64, u32)]| list.iter().map(|(_, len)| *len as usize).collect::<Vec<_>>();
            prop_assert_eq!(lengths(&chain.readable), expected(&readable));
            prop_assert_eq!(lengths(&chain.writable), expected(&writable));
            for ((at, _), piece) in chain.readable.iter().zip(&all) {
                prop_assert_eq!(ring.memory().guest_address(*at), Some(driver.buffer(piece.at)));
            }
        }

        /// Whatever a guest writes into its rings, reading a chain ends, and gives out its own memory only.
        #[test]
        fn garbage_is_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 16 * 16), head in any::<u16>()) {
            let mut driver = Driver::new(16);
            driver.write_table(&bytes);
            let ring = driver.ring();
            let mut chain = Chain::default();
            if chain.read(&ring, head, true).is_ok() {
                for (at, len) in chain.readable.iter().chain(&chain.writable) {
                    let start = ring.memory().guest_address(*at).unwrap();
                    prop_assert!(ring.memory().get(start, *len as u64).is_some());
                }
            }
        }
    }

    fn refused(change: impl FnOnce(&mut Driver) -> u16) -> &'static str {
        let mut driver = Driver::new(4);
        let head = change(&mut driver);
        Chain::default().read(&driver.ring(), head, true).unwrap_err()
    }

    #[test]
    fn rules() {
        let next = VRING_DESC_F_NEXT as u16;
        let write = VRING_DESC_F_WRITE as u16;
        let indirect = VRING_DESC_F_INDIRECT as u16;
        let at = Driver::new(4).buffer(0);
        let table = |entries: &[(u64, u32, u16, u16)]| {
            let entries = entries.to_vec();
            move |driver: &mut Driver| {
                entries.iter().enumerate().for_each(|(ix, entry)| driver.put(ix as u16, *entry));
                0
            }
        };
        assert_eq!(refused(|_| 4), "a descriptor past the end of the ring");
        assert_eq!(refused(table(&[(at, 1, next, 9)])), "a descriptor past the end of the ring");
        assert_eq!(refused(table(&[(at, 1, next, 0)])), "a chain that is longer than its ring");
        assert_eq!(refused(table(&[(u64::MAX, 8, 0, 0)])), "an address outside of the guest's memory");
        assert_eq!(refused(table(&[(at, u32::MAX, 0, 0)])), "an address outside of the guest's memory");
        let mixed = [(at, 1, next | write, 1), (at, 1, 0, 0)];
        assert_eq!(refused(table(&mixed)), "memory to read behind memory to write");
        let followed = [(at, 16, next | indirect, 1), (at, 1, 0, 0)];
        assert_eq!(refused(table(&followed)), "an indirect table with something after it");
        assert_eq!(refused(table(&[(at, 17, indirect, 0)])), "an indirect table of an impossible length");
        assert_eq!(refused(table(&[(at, 0, indirect, 0)])), "an indirect table of an impossible length");
        assert_eq!(
            refused(table(&[(1 << 40, 16, indirect, 0)])),
            "an indirect table outside of the guest's memory"
        );
        let nested = |driver: &mut Driver| {
            let inner = driver.put_buffer(0, &[(at, 16, indirect, 0)]);
            driver.put(0, (inner, 16, indirect, 0));
            0
        };
        assert_eq!(refused(nested), "an indirect table in an indirect table");
        let looped = |driver: &mut Driver| {
            let inner = driver.put_buffer(0, &[(at, 1, next, 1), (at, 1, next, 0)]);
            driver.put(0, (inner, 32, indirect, 0));
            0
        };
        assert_eq!(refused(looped), "a chain that is longer than its table");
    }

    /// Regions may be as small as a byte, and descriptors all the same.
    #[test]
    fn pieces_are_bounded() {
        let mut driver = Driver::new(4);
        let (from, count) = (1 << 40, MOST_REGIONS as u32 - 1);
        (0..u64::from(count)).for_each(|n| driver.add_region(from + n, 1));
        let next = VRING_DESC_F_NEXT as u16;
        (0..4).for_each(|n| driver.put(n, (from, count, next, n + 1)));
        driver.put(2, (from, count, 0, 0));
        let mut chain = Chain::default();
        chain.read(&driver.ring(), 0, true).unwrap();
        assert_eq!(chain.readable.len(), 3 * count as usize);
        driver.put(2, (from, count, next, 3));
        let error = chain.read(&driver.ring(), 0, true).unwrap_err();
        assert_eq!(error, "a request in more pieces than memory could lie in");
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let mut driver = Driver::new(4);
        let head = driver.add_indirect(&[Piece { at: 0, len: 16, write: false }]);
        assert!(Chain::default().read(&driver.ring(), head, false).is_err());
    }

    #[test]
    fn cutting() {
        let bytes: Vec<u8> = (0..36).collect();
        let start = NonNull::from(&bytes[0]);
        let mut pieces = vec![(start, 10), (start, 6), (start, 20)];
        assert!(!take_bytes(&mut pieces, &mut [0; 37]));
        let mut front = [0; 12];
        assert!(take_bytes(&mut pieces, &mut front));
        assert_eq!(front, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]);
        assert_eq!(lengths(&pieces), [4, 20]);
        let mut pieces = vec![(start, 3), (start, 1), (start, 0)];
        assert!(split_last_byte(&mut pieces).is_some());
        assert_eq!(lengths(&pieces), [3]);
        assert!(split_last_byte(&mut vec![]).is_none());
    }
}
