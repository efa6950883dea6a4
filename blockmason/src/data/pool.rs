//! Buffers for data in flight: page-aligned, reused per thread, never zeroed twice.

use super::Data;
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Every pool buffer starts at a multiple of this: what O_DIRECT asks for at the most.
pub const ALIGN: usize = 4096;

/// The sizes that are kept for reuse. Larger ones come from the allocator and go back to it.
const CLASSES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20];

/// What one thread keeps of one class, in bytes: enough for a deep queue, little beside the budget.
const KEEP_BYTES: usize = 4 << 20;

/// What one thread keeps, by class. A thread that ends gives it back.
struct Free([Vec<NonNull<u8>>; CLASSES.len()]);

thread_local! {
    static FREE: RefCell<Free> = const { RefCell::new(Free([const { Vec::new() }; CLASSES.len()])) };
}

impl Drop for Free {
    fn drop(&mut self) {
        for (class, list) in CLASSES.iter().zip(&mut self.0) {
            for ptr in list.drain(..) {
                // SAFETY: allocated in `Block::new` with the layout of its class, and ours alone.
                unsafe { dealloc(ptr.as_ptr(), layout(*class)) }
            }
        }
    }
}

/// Page-aligned memory. All its bytes are initialised, though stale after the first use.
pub(super) struct Block {
    ptr: NonNull<u8>,
    cap: usize,
}

// SAFETY: a block is plain owned memory, as a Box<[u8]> is.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

fn layout(cap: usize) -> Layout {
    Layout::from_size_align(cap, ALIGN).expect("a buffer's size fits an isize")
}

impl Block {
    fn new(len: usize) -> Block {
        let class = CLASSES.iter().position(|size| len <= *size);
        let cap = class.map_or(len.next_multiple_of(ALIGN), |class| CLASSES[class]);
        let kept = class.and_then(|class| FREE.with_borrow_mut(|free| free.0[class].pop()));
        let ptr = kept.unwrap_or_else(|| {
            // SAFETY: cap is not zero: the smallest class is 4 KiB.
            let ptr = unsafe { alloc_zeroed(layout(cap)) };
            NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(layout(cap)))
        });
        Block { ptr, cap }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: cap initialised bytes, ours alone while self lives; writes need &mut self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.cap) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.cap) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        let class = CLASSES.iter().position(|size| self.cap == *size);
        let kept = class.is_some_and(|class| {
            // At the end of a thread its list may be gone already.
            FREE.try_with(|free| {
                let list = &mut free.borrow_mut().0[class];
                let room = list.len() * self.cap < KEEP_BYTES;
                if room {
                    list.push(self.ptr);
                }
                room
            })
            .unwrap_or(false)
        });
        if !kept {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { dealloc(self.ptr.as_ptr(), layout(self.cap)) }
        }
    }
}

/// A buffer of one's own, to fill and then [freeze](PoolBuf::freeze). What it holds at first is
/// stale: whoever takes one fills all of it, else an old request's bytes reach a stranger.
pub struct PoolBuf {
    block: Block,
    len: usize,
}

impl PoolBuf {
    /// A buffer of `len` bytes.
    pub fn new(len: usize) -> PoolBuf {
        PoolBuf { block: Block::new(len), len }
    }

    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> PoolBuf {
        let mut buf = PoolBuf::new(len);
        buf.fill(0);
        buf
    }

    /// Gives up the right to write and shares it.
    pub fn freeze(self) -> Data {
        Data::pool(self.block, self.len)
    }
}

impl Deref for PoolBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.block.bytes()[..self.len]
    }
}

impl DerefMut for PoolBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len;
        &mut self.block.bytes_mut()[..len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_reused() {
        let first = PoolBuf::new(5000);
        assert_eq!(first.as_ptr() as usize % ALIGN, 0);
        let at = first.as_ptr();
        drop(first.freeze());
        assert_eq!(PoolBuf::new(16384).as_ptr(), at, "the same class takes the freed block");
    }

    #[test]
    fn what_a_thread_keeps_is_bounded() {
        let many: Vec<_> = (0..20).map(|_| PoolBuf::new(1 << 20)).collect();
        drop(many);
        FREE.with_borrow(|free| assert_eq!(free.0[4].len(), KEEP_BYTES >> 20));
    }

    /// Bytes of memory that this process has in use.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/statm").unwrap();
        status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    fn a_thread_that_ends_keeps_nothing() {
        let before = resident();
        for _ in 0..128 {
            let fill = || drop([0; 4].map(|_| PoolBuf::zeroed(1 << 20)));
            std::thread::spawn(fill).join().unwrap();
        }
        // They would have kept 512 MiB. Other tests of this process use memory meanwhile, but less.
        let grown = resident().saturating_sub(before);
        assert!(grown < 256 << 20, "{grown} bytes");
    }

    #[test]
    fn a_block_may_be_freed_on_another_thread() {
        let data = PoolBuf::zeroed(3 << 20).freeze();
        let small = Data::copy_of(b"abc");
        std::thread::spawn(move || {
            assert_eq!(small.to_vec(), b"abc");
            drop((data, small));
        })
        .join()
        .unwrap();
    }
}
