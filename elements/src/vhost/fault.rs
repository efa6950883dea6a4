//! Memory that its owner may take away: files that a front-end has mapped into us and then cuts short.
//!
//! Reading such memory raises SIGBUS, which ends a process, and every guest with it. So whoever maps a file
//! of somebody else's [guards](guard) it: the handler puts zeros in place of the mapping that failed and marks it as
//! lost; whoever owned it is cut off, and nobody else notices. Seals would forbid the shrinking, but not every front-end
//! has memory that can be sealed.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// Mappings that can be guarded at a time. A guest has a handful.
const SLOTS: usize = 4096;

struct Slot {
    /// 0 if the slot is free. Written last when a slot is taken, first when it is given up.
    start: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0), lost: AtomicBool::new(false) }
}; SLOTS];

/// One past the highest slot that was ever taken.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// Slots that were given back.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

/// How many mappings have been lost in this process: whoever has seen this number need not look again.
static LOST: AtomicUsize = AtomicUsize::new(0);

/// What the signal did before us.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// A mapping whose loss is survived, until this is dropped.
#[derive(Debug)]
pub(crate) struct Guard(usize);

/// Guards a mapping. None if too many are guarded already.
///
/// # Safety
/// `start..start + len` is a shared mapping that the caller owns and keeps until the guard is gone; it is
/// accessed through raw pointers alone, so that it may be replaced by zeros at any instant.
pub(crate) unsafe fn guard(start: usize, len: usize) -> Option<Guard> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(install);
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let ix = free.pop().or_else(|| {
        let next = TAKEN.load(Ordering::Relaxed);
        (next < SLOTS).then(|| {
            TAKEN.store(next + 1, Ordering::Release);
            next
        })
    })?;
    let slot = &TABLE[ix];
    slot.lost.store(false, Ordering::Relaxed);
    slot.len.store(len, Ordering::Relaxed);
    slot.start.store(start, Ordering::Release);
    Some(Guard(ix))
}

/// How many mappings have been lost so far.
#[inline]
pub(crate) fn lost() -> usize {
    LOST.load(Ordering::Acquire)
}

impl Guard {
    /// True if the memory was taken away: what it holds now is ours alone.
    pub(crate) fn is_lost(&self) -> bool {
        TABLE[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.0].start.store(0, Ordering::Release);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

fn install() {
    // SAFETY: zeroed is a valid sigaction; both calls get valid pointers. The handler does what a handler
    // may: atomics and system calls.
    unsafe {
        let before: *mut libc::sigaction = Box::into_raw(Box::new(std::mem::zeroed()));
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        // Shards and the runtime's threads have stacks for signals of their own.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, std::ptr::null(), before);
        BEFORE.store(before, Ordering::Release);
        if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0 {
            tracing::warn!("SIGBUS cannot be caught: a front-end that shrinks its memory ends this process");
        }
    }
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo to a handler that was installed with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    let taken = TAKEN.load(Ordering::Acquire);
    let holds = |slot: &&Slot| {
        let start = slot.start.load(Ordering::Acquire);
        start != 0 && at >= start && at - start < slot.len.load(Ordering::Relaxed)
    };
    match TABLE[..taken].iter().find(holds) {
        Some(slot) if replace(slot) => {
            slot.lost.store(true, Ordering::Release);
            LOST.fetch_add(1, Ordering::AcqRel);
        }
        _ => pass_on(signal, info, context),
    }
}

/// Zeros in place of the whole mapping. True if that worked.
fn replace(slot: &Slot) -> bool {
    let (start, len) = (slot.start.load(Ordering::Acquire), slot.len.load(Ordering::Relaxed));
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the range is a mapping whose owner has agreed to this (contract of `guard`), and which
    // nobody can unmap meanwhile but its owner, who would be the one that faulted. errno is put back for the
    // code that was interrupted.
    unsafe {
        let errno = *libc::__errno_location();
        let mapped = libc::mmap(start as *mut libc::c_void, len, prot, flags, -1, 0);
        *libc::__errno_location() = errno;
        mapped != libc::MAP_FAILED
    }
}

/// Does what the signal did before us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.load(Ordering::Acquire);
    // SAFETY: `before` was written once by sigaction and is never freed; a handler that was installed with
    // SA_SIGINFO takes these three arguments, another takes the first.
    unsafe {
        match before.as_ref() {
            Some(action) if action.sa_sigaction != libc::SIG_DFL && action.sa_sigaction != libc::SIG_IGN => {
                if action.sa_flags & libc::SA_SIGINFO != 0 {
                    let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(action.sa_sigaction);
                    call(signal, info, context);
                } else {
                    let call: extern "C" fn(libc::c_int) = std::mem::transmute(action.sa_sigaction);
                    call(signal);
                }
            }
            // The access happens again and ends the process, as it would have without us.
            _ => {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::vhost::memory::Mapping;
    use crate::vhost::testing::memory_file;

    #[test]
    fn memory_that_is_taken_away_reads_as_zeros_and_harms_no_other() {
        let (cut, kept) = (memory_file(64 << 10), memory_file(64 << 10));
        let first = Mapping::new(cut.try_clone().unwrap(), 0, 64 << 10).unwrap();
        let second = Mapping::new(kept, 0, 64 << 10).unwrap();
        let at = |mapping: &Mapping, offset: usize| mapping.at(offset).as_ptr();
        // SAFETY: inside of the mappings.
        unsafe {
            at(&first, 5000).write_volatile(7);
            at(&second, 5000).write_volatile(9);
            let before = super::lost();
            rustix::fs::ftruncate(&cut, 0).unwrap();
            assert_eq!(at(&first, 5000).read_volatile(), 0);
            at(&first, 60_000).write_volatile(1);
            assert!(first.is_lost() && super::lost() > before);
            assert!(!second.is_lost());
            assert_eq!(at(&second, 5000).read_volatile(), 9);
        }
    }

    /// In a process of its own: whoever touches memory that nobody guards ends as ever.
    #[test]
    fn what_is_not_guarded_ends_the_process() {
        let program = std::env::current_exe().unwrap();
        let name = "vhost::fault::tests::touches_memory_that_is_gone";
        let mut child = std::process::Command::new(program);
        let child = child.args(["--exact", name, "--ignored"]).output().unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
    }

    #[test]
    #[ignore = "ends its process; another test starts it"]
    fn touches_memory_that_is_gone() {
        let guarded = Mapping::new(memory_file(4096), 0, 4096).unwrap();
        let file = memory_file(4096);
        let plain = vm_memory::FileOffset::new(file.try_clone().unwrap(), 0);
        let plain = vm_memory::MmapRegion::<()>::from_file(plain, 4096).unwrap();
        rustix::fs::ftruncate(&file, 0).unwrap();
        // SAFETY: inside of the mapping.
        unsafe { plain.as_ptr().read_volatile() };
        drop(guarded);
    }
}
