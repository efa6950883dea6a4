//! Memory that belongs to somebody else, a guest above all, and may change at any time.

use super::Segment;
use std::any::Any;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// Pieces of foreign memory in a row, with whatever keeps them mapped.
pub struct Foreign {
    /// Most are in one piece, and then nothing is allocated for it.
    first: (NonNull<u8>, usize),
    rest: Box<[(NonNull<u8>, usize)]>,
    len: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory is never borrowed as a Rust reference, only copied from and to through raw
// pointers; the owner that keeps it mapped is itself Send and Sync.
unsafe impl Send for Foreign {}
// SAFETY: as above; concurrent copies are races on bytes whose value is undetermined anyhow, since
// the guest may write them at the same instant.
unsafe impl Sync for Foreign {}

impl Foreign {
    /// Takes pieces of memory.
    ///
    /// # Safety
    /// Every piece must stay mapped, readable and (where it is the destination of a read) writable
    /// for as long as `owner` lives, and no Rust reference to it may exist meanwhile.
    pub unsafe fn new(parts: &[(NonNull<u8>, usize)], owner: Arc<dyn Any + Send + Sync>) -> Foreign {
        let len = parts.iter().map(|(_, len)| len).sum();
        let first = parts.first().copied().unwrap_or((NonNull::dangling(), 0));
        Foreign { first, rest: parts.get(1..).unwrap_or_default().into(), len, _owner: owner }
    }

    /// Length in bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The bytes of `range`, if one piece has them all.
    pub(super) fn single(&self, range: Range<usize>) -> Option<ForeignPart<'_>> {
        let (ptr, len) = self.first;
        if range.end > len {
            return None;
        }
        // SAFETY: range.start <= range.end <= len: the result lies inside of the piece.
        let ptr = unsafe { ptr.add(range.start) };
        Some(ForeignPart { ptr, len: range.end - range.start, _memory: std::marker::PhantomData })
    }

    pub(super) fn for_each<'a>(&'a self, range: Range<usize>, mut each: impl FnMut(ForeignPart<'a>)) {
        let mut at = 0;
        for &(ptr, len) in std::iter::once(&self.first).chain(&self.rest) {
            let from = range.start.max(at);
            let to = range.end.min(at + len);
            if from < to {
                // SAFETY: from - at < len, so the result lies inside the piece.
                let ptr = unsafe { ptr.add(from - at) };
                each(ForeignPart { ptr, len: to - from, _memory: std::marker::PhantomData });
            }
            at += len;
        }
    }
}

/// A contiguous piece of foreign memory, mapped for `'a`.
#[derive(Clone, Copy)]
pub struct ForeignPart<'a> {
    ptr: NonNull<u8>,
    len: usize,
    _memory: std::marker::PhantomData<&'a Foreign>,
}

impl ForeignPart<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it starts: for a system call, which may do with it what a guest may do.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len);
        // SAFETY: at <= len: one past the end at the most.
        let tail = unsafe { self.ptr.add(at) };
        (ForeignPart { len: at, ..self }, ForeignPart { ptr: tail, len: self.len - at, ..self })
    }

    pub(super) fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len);
        // SAFETY: both are valid for len bytes; `to` is exclusively ours, so they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr.as_ptr(), to.as_mut_ptr(), self.len) }
    }

    pub(super) fn is_zero(&self) -> bool {
        let mut block = [0; 512];
        let mut rest = *self;
        while rest.len > 0 {
            let (head, tail) = rest.split_at(rest.len.min(block.len()));
            head.copy_to(&mut block[..head.len]);
            if !super::is_zero(&block[..head.len]) {
                return false;
            }
            rest = tail;
        }
        true
    }

    /// Writes `len` bytes of `segment` from `at` on.
    pub(super) fn fill(self, segment: Segment<'_>, at: usize) {
        assert!(at + self.len <= segment.len());
        let to = self.ptr.as_ptr();
        match segment {
            // SAFETY: `to` is valid for len bytes (constructor's contract).
            Segment::Zeros(_) => unsafe { std::ptr::write_bytes(to, 0, self.len) },
            Segment::Bytes(bytes) => {
                // SAFETY: valid for len bytes each (asserted above); Rust's bytes and foreign memory
                // do not overlap, by the constructor's contract.
                unsafe { std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), to, self.len) }
            }
            Segment::Foreign(part) => {
                let (_, from) = part.split_at(at);
                if from.ptr != self.ptr {
                    // SAFETY: valid for len bytes each; two pieces of a guest's memory may overlap,
                    // for which `copy` is defined.
                    unsafe { std::ptr::copy(from.ptr.as_ptr(), to, self.len) }
                }
            }
        }
    }
}

/// Foreign memory of a test: these bytes, in two pieces cut at `cut`.
#[cfg(test)]
pub(super) fn test_memory(bytes: &[u8], cut: usize) -> Foreign {
    struct Memory(*mut [u8]);
    // SAFETY: only the pointer moves; the memory is touched through Foreign alone.
    unsafe impl Send for Memory {}
    // SAFETY: as above.
    unsafe impl Sync for Memory {}
    impl Drop for Memory {
        fn drop(&mut self) {
            // SAFETY: it came from Box::into_raw below, and the Foreign that used it is gone.
            drop(unsafe { Box::from_raw(self.0) });
        }
    }
    let cut = cut.min(bytes.len());
    let raw = Box::into_raw(bytes.to_vec().into_boxed_slice());
    let start = NonNull::new(raw as *mut u8).unwrap();
    // SAFETY: cut <= len.
    let tail = unsafe { start.add(cut) };
    let parts = [(start, cut), (tail, bytes.len() - cut)];
    // SAFETY: the box lives in the owner and nothing borrows it.
    unsafe { Foreign::new(&parts, Arc::new(Memory(raw))) }
}
