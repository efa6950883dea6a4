//! A shard's io_uring. Submissions queue up during a turn and go to the kernel in one system call
//! when the shard is about to wait; completions wake their flows.
//!
//! Dropping the future of an operation cancels nothing: its slot keeps the buffers, the iovecs and the
//! file until the completion has arrived.

use crate::data::{Data, PoolBuf, Segment};
use crate::sched::Shard;
use io_uring::{IoUring, opcode, squeue, types};
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::unix::AsyncFd;

/// Entries of the submission queue. More wait in memory.
const ENTRIES: u32 = 256;

/// A shard's io_uring.
pub struct Ring {
    inner: RefCell<Inner>,
}

struct Inner {
    uring: IoUring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Did not fit the submission queue.
    overflow: std::collections::VecDeque<squeue::Entry>,
    queued: bool,
    /// Empty between two turns: its memory is used again.
    wakers: Vec<Waker>,
}

enum Slot {
    Free,
    Running {
        waker: Option<Waker>,
        hold: Hold,
    },
    Done {
        result: i32,
        hold: Hold,
    },
    /// Nobody waits any more.
    Orphan(#[allow(dead_code, reason = "as above")] Hold),
}

/// What an operation needs until its completion.
struct Hold {
    _file: Arc<OwnedFd>,
    memory: Memory,
    _iovecs: Box<[libc::iovec]>,
}

/// The memory of an operation.
pub(super) enum Memory {
    None,
    /// Read into.
    Buf(PoolBuf),
    /// Written from; or foreign memory, read into.
    Data(#[allow(dead_code, reason = "keeps memory alive until the completion")] Data),
}

impl Ring {
    /// A ring for the shard of that number. None, with one line in the log, where the kernel refuses.
    pub(crate) fn open(shard: usize) -> Option<Ring> {
        match IoUring::builder().setup_clamp().build(ENTRIES) {
            Ok(uring) => Some(Ring {
                inner: RefCell::new(Inner {
                    uring,
                    slots: Vec::new(),
                    free: Vec::new(),
                    overflow: Default::default(),
                    queued: false,
                    wakers: Vec::new(),
                }),
            }),
            Err(error) => {
                if shard == 0 {
                    tracing::info!(
                        "no io_uring here ({error}): file I/O that may wait goes to a few threads"
                    );
                }
                None
            }
        }
    }

    /// Waits for completions while the shard has nothing else to do.
    pub(crate) async fn reap(shard: Rc<Shard>) {
        let Some(ring) = shard.ring() else { return };
        let fd = ring.inner.borrow().uring.as_raw_fd();
        // SAFETY: the descriptor belongs to the ring, which `shard` keeps open for longer than `ready`.
        let watch = unsafe { AsyncFd::register_with_interest(Borrowed(fd), tokio::io::Interest::READABLE) };
        let ready = match watch {
            Ok(ready) => ready,
            Err(error) => return tracing::error!("cannot watch the io_uring: {error}"),
        };
        while let Ok(mut guard) = ready.readable().await {
            guard.clear_ready();
            ring.complete();
        }
    }

    /// Submits what has queued up and takes in what has completed.
    pub(crate) fn turn(&self) {
        let submitted = self.inner.borrow_mut().submit();
        if let Err(error) = submitted {
            // EBUSY and EAGAIN: completions have to be taken in first; the next turn tries again.
            tracing::debug!("io_uring: {error}");
        }
        self.complete();
    }

    fn complete(&self) {
        let mut wakers = self.inner.borrow_mut().take_completions();
        wakers.drain(..).for_each(Waker::wake);
        self.inner.borrow_mut().wakers = wakers;
    }

    /// Reads into `buf` from `offset` on. Returns how many bytes came, and the buffer.
    pub(super) async fn read(
        &self,
        file: Arc<OwnedFd>,
        offset: u64,
        mut buf: PoolBuf,
    ) -> (io::Result<usize>, PoolBuf) {
        let iovec = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let fd = types::Fd(file.as_raw_fd());
        let make = |iovecs: &[libc::iovec]| {
            opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        };
        let (result, memory) = self.run(file, Memory::Buf(buf), Box::new([iovec]), make).await;
        match memory {
            Memory::Buf(buf) => (result, buf),
            _ => unreachable!("an operation gives back the memory it was given"),
        }
    }

    /// Reads into foreign memory.
    pub(super) async fn read_foreign(&self, file: Arc<OwnedFd>, offset: u64, to: Data) -> io::Result<usize> {
        let fd = types::Fd(file.as_raw_fd());
        let iovecs = iovecs(&to);
        // The kernel takes no more at once; what is left over is a short read, which callers go on with.
        let make = |iovecs: &[libc::iovec]| {
            let count = iovecs.len().min(super::file::IOV_MAX) as u32;
            opcode::Readv::new(fd, iovecs.as_ptr(), count).offset(offset).build()
        };
        self.run(file, Memory::Data(to), iovecs, make).await.0
    }

    /// Writes `data` from `offset` on.
    pub(super) async fn write(&self, file: Arc<OwnedFd>, offset: u64, data: Data) -> io::Result<usize> {
        let fd = types::Fd(file.as_raw_fd());
        let iovecs = iovecs(&data);
        let make = |iovecs: &[libc::iovec]| {
            opcode::Writev::new(fd, iovecs.as_ptr(), iovecs.len() as u32).offset(offset).build()
        };
        self.run(file, Memory::Data(data), iovecs, make).await.0
    }

    /// `fdatasync`.
    pub(super) async fn sync(&self, file: Arc<OwnedFd>) -> io::Result<()> {
        let fd = types::Fd(file.as_raw_fd());
        let make = |_: &[libc::iovec]| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
        self.run(file, Memory::None, Box::new([]), make).await.0.map(drop)
    }

    /// `fallocate`.
    pub(super) async fn allocate(
        &self,
        file: Arc<OwnedFd>,
        mode: i32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let fd = types::Fd(file.as_raw_fd());
        let make = |_: &[libc::iovec]| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build();
        self.run(file, Memory::None, Box::new([]), make).await.0.map(drop)
    }

    async fn run(
        &self,
        file: Arc<OwnedFd>,
        memory: Memory,
        iovecs: Box<[libc::iovec]>,
        make: impl FnOnce(&[libc::iovec]) -> squeue::Entry,
    ) -> (io::Result<usize>, Memory) {
        let entry = make(&iovecs);
        let hold = Hold { _file: file, memory, _iovecs: iovecs };
        let slot = self.inner.borrow_mut().queue(entry, hold);
        Running { ring: self, slot: Some(slot) }.await
    }
}

/// The pieces of `data` for the kernel.
pub(super) fn iovecs(data: &Data) -> Box<[libc::iovec]> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut iovecs = Vec::new();
    data.for_each(|segment| match segment {
        Segment::Bytes(bytes) => {
            iovecs.push(libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        }
        Segment::Foreign(part) => {
            iovecs.push(libc::iovec { iov_base: part.as_ptr().cast(), iov_len: part.len() });
        }
        Segment::Zeros(len) => {
            for at in (0..len).step_by(ZEROS.len()) {
                let len = ZEROS.len().min(len - at);
                iovecs.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len: len });
            }
        }
    });
    iovecs.into()
}

impl Inner {
    fn queue(&mut self, entry: squeue::Entry, hold: Hold) -> usize {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::Free);
            self.slots.len() - 1
        });
        self.slots[slot] = Slot::Running { waker: None, hold };
        self.overflow.push_back(entry.user_data(slot as u64));
        self.queued = true;
        slot
    }

    fn submit(&mut self) -> io::Result<()> {
        while self.queued {
            {
                let mut queue = self.uring.submission();
                while let Some(entry) = self.overflow.front() {
                    // SAFETY: everything the entry points to is in its slot, which keeps it until
                    // the completion has arrived.
                    if unsafe { queue.push(entry) }.is_err() {
                        break;
                    }
                    self.overflow.pop_front();
                }
            }
            self.uring.submit()?;
            self.queued = !self.overflow.is_empty();
        }
        Ok(())
    }

    fn take_completions(&mut self) -> Vec<Waker> {
        let mut wakers = std::mem::take(&mut self.wakers);
        for completion in self.uring.completion() {
            let ix = completion.user_data() as usize;
            match std::mem::replace(&mut self.slots[ix], Slot::Free) {
                Slot::Running { waker, hold } => {
                    self.slots[ix] = Slot::Done { result: completion.result(), hold };
                    wakers.extend(waker);
                }
                Slot::Orphan(_) => self.free.push(ix),
                // The kernel completes an operation once.
                Slot::Free | Slot::Done { .. } => debug_assert!(false, "a completion for a free slot"),
            }
        }
        wakers
    }
}

struct Running<'a> {
    ring: &'a Ring,
    slot: Option<usize>,
}

impl Future for Running<'_> {
    type Output = (io::Result<usize>, Memory);

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Self::Output> {
        let ix = self.slot.expect("a future is not polled after its end");
        let mut inner = self.ring.inner.borrow_mut();
        match std::mem::replace(&mut inner.slots[ix], Slot::Free) {
            Slot::Running { hold, .. } => {
                inner.slots[ix] = Slot::Running { waker: Some(task.waker().clone()), hold };
                Poll::Pending
            }
            Slot::Done { result, hold } => {
                inner.free.push(ix);
                drop(inner);
                self.slot = None;
                let result =
                    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as usize) };
                Poll::Ready((result, hold.memory))
            }
            Slot::Free | Slot::Orphan(_) => unreachable!("only this future gives its slot up"),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let Some(ix) = self.slot else { return };
        let mut inner = self.ring.inner.borrow_mut();
        match std::mem::replace(&mut inner.slots[ix], Slot::Free) {
            Slot::Running { hold, .. } => inner.slots[ix] = Slot::Orphan(hold),
            _ => inner.free.push(ix),
        }
    }
}

impl Drop for Inner {
    /// Waits for what is in flight: the kernel writes into our memory until then.
    fn drop(&mut self) {
        let in_flight = |slots: &[Slot]| {
            slots.iter().filter(|slot| matches!(slot, Slot::Running { .. } | Slot::Orphan(_))).count()
        };
        if self.submit().is_err() {
            return;
        }
        while in_flight(&self.slots) > 0 {
            if self.uring.submit_and_wait(1).is_err() {
                return;
            }
            self.take_completions();
        }
    }
}

/// A descriptor that somebody else closes.
struct Borrowed(RawFd);

impl AsRawFd for Borrowed {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}
