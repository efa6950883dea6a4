//! Reads and writes of an image, by the engine that is fastest for each.
//!
//! Cached reads are answered inline by `preadv2(RWF_NOWAIT)`; what is not cached, and O_DIRECT, goes
//! through the shard's io_uring; tmpfs, which refuses RWF_NOWAIT and never waits, is read and written
//! inline. Small buffered writes are inline too; a file whose write took longer than a millisecond
//! writes through the ring, or the pool of threads, for a second. docs/performance.md has the numbers.

use super::registry::Image;
use super::{pool, ring};
use crate::data::{Data, PoolBuf};
use crate::element::Flow;
use crate::error::{Errno, Error, Kind, Result};
use crate::request::{Answer, Extent, ExtentState, Reply, Request};
use crate::sched::Cx;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::ReadWriteFlags;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The longest write that is made inline, in bytes.
const INLINE_WRITE: u64 = 64 << 10;

/// The longest read that is tried inline, in bytes: copying more would hold up the others' replies.
const INLINE_READ: u64 = 1 << 20;

/// An inline call that takes longer moves the file to the ring for [`SLOW_FOR`].
const SLOW_CALL: Duration = Duration::from_millis(1);

/// How long a file that was slow stays off the inline path.
const SLOW_FOR: Duration = Duration::from_secs(1);

/// The most pieces the kernel takes in one call.
pub(super) const IOV_MAX: usize = 1024;

/// How a file is used.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// Bytes that the image has.
    pub size: u64,
    /// Opened with O_DIRECT.
    pub direct: bool,
    /// A block device.
    pub device: bool,
}

/// An image with its engines.
pub struct FileIo {
    image: Arc<Image>,
    options: FileOptions,
    /// `tmpfs` and the like: memory, where nothing waits for a device.
    memory: bool,
    /// `RWF_NOWAIT` reads work here.
    nowait: bool,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_extents: AtomicBool,
    started: Instant,
    /// Milliseconds after `started` until which nothing is done inline.
    slow_until: AtomicU64,
}

impl FileIo {
    /// An engine for `image`; probes what its file system can do.
    pub fn new(image: Arc<Image>, options: FileOptions) -> FileIo {
        const TMPFS: i64 = 0x0102_1994;
        const RAMFS: i64 = 0x8584_58f6;
        let fs = rustix::fs::fstatfs(image.file()).map(|fs| fs.f_type).unwrap_or(0);
        let memory = !options.device && (fs == TMPFS || fs == RAMFS);
        let mut probe = [0; 1];
        let nowait = !memory
            && !options.direct
            && !matches!(
                rustix::io::preadv2(
                    image.file(),
                    &mut [IoSliceMut::new(&mut probe)],
                    0,
                    ReadWriteFlags::NOWAIT
                ),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
            );
        FileIo {
            image,
            options,
            memory,
            nowait,
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_extents: AtomicBool::new(false),
            started: now(),
            slow_until: AtomicU64::new(0),
        }
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    fn file(&self) -> Arc<OwnedFd> {
        self.image.file.clone()
    }

    fn is_slow(&self) -> bool {
        let until = self.slow_until.load(Ordering::Relaxed);
        until != 0 && (now() - self.started).as_millis() < u128::from(until)
    }

    fn watch(&self, since: Instant) {
        let end = now();
        if end - since > SLOW_CALL {
            let until = (end - self.started + SLOW_FOR).as_millis() as u64;
            self.slow_until.store(until, Ordering::Relaxed);
        }
    }

    /// Reads. The reply is in the given destination where there is one, else in pool memory.
    pub fn read<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let inline = req.len <= INLINE_READ && (self.memory || self.nowait);
        if inline && req.data.is_empty() {
            let mut buf = PoolBuf::new(req.len as usize);
            return match self.read_inline(&mut buf, req.offset) {
                Some(Ok(())) => Flow::Now(Ok(Answer::Data(buf.freeze()))),
                Some(Err(error)) => cx.fail(&req, self.failed(error)),
                None => self.read_later(req, cx, buf),
            };
        }
        if inline {
            match self.read_inline_foreign(&req.data, req.offset) {
                Some(Ok(())) => return Flow::Now(Ok(Answer::Data(req.data))),
                Some(Err(error)) => return cx.fail(&req, self.failed(error)),
                None => {}
            }
        }
        let buf = PoolBuf::new(if req.data.is_empty() { req.len as usize } else { 0 });
        self.read_later(req, cx, buf)
    }

    /// Bytes that the page cache has, without waiting. None if it has not all of them, or they cannot be read; [`FileIo::read`]
    /// says then what is wrong.
    pub fn read_now(&self, offset: u64, len: u64) -> Option<Data> {
        if len > INLINE_READ || !(self.memory || self.nowait) {
            return None;
        }
        let mut buf = PoolBuf::new(len as usize);
        self.read_inline(&mut buf, offset)?.ok()?;
        Some(buf.freeze())
    }

    fn read_later<'a>(&'a self, req: Request, cx: Cx<'a>, buf: PoolBuf) -> Flow<'a> {
        let (offset, len, dest) = (req.offset, req.len as usize, req.data.clone());
        cx.later(&req, async move {
            if !dest.is_empty() {
                self.read_foreign(cx, offset, &dest).await.map_err(|error| self.failed(error))?;
                return Ok(Answer::Data(dest));
            }
            let (n, data) = self.read_some(cx, offset, buf).await.map_err(|error| self.failed(error))?;
            if n == len {
                return Ok(Answer::Data(data));
            }
            let mut pieces = vec![data.slice(0..n)];
            let mut done = n;
            while done < len {
                let buf = PoolBuf::new(len - done);
                let read = self.read_some(cx, offset + done as u64, buf).await;
                let (n, data) = read.map_err(|error| self.failed(error))?;
                // Nothing comes past the end of a file that was cut short behind our back.
                let n_or_rest = if n == 0 { Data::zeros(len - done) } else { data.slice(0..n) };
                done += n_or_rest.len();
                pieces.push(n_or_rest);
            }
            Ok(Answer::Data(Data::concat(pieces)))
        })
    }

    /// One attempt. Returns how many bytes came, at the start of the buffer's.
    async fn read_some(&self, cx: Cx<'_>, offset: u64, mut buf: PoolBuf) -> io::Result<(usize, Data)> {
        let (n, buf) = match cx.shard().ring() {
            Some(ring) => {
                let (n, buf) = ring.read(self.file(), offset, buf).await;
                (n?, buf)
            }
            None => {
                let file = self.file();
                pool::run(move || rustix::io::pread(&file, &mut buf[..], offset).map(|n| (n, buf))).await??
            }
        };
        Ok((n, buf.freeze()))
    }

    async fn read_foreign(&self, cx: Cx<'_>, offset: u64, dest: &Data) -> io::Result<()> {
        let mut done = 0;
        while done < dest.len() {
            let left = dest.slice(done..dest.len());
            let n = match cx.shard().ring() {
                Some(ring) => ring.read_foreign(self.file(), offset + done as u64, left).await?,
                None => {
                    let file = self.file();
                    pool::run(move || preadv(&file, &left, offset + done as u64, 0)).await??
                }
            };
            if n == 0 {
                let rest = dest.slice(done..dest.len());
                rest.fill_from(&Data::zeros(rest.len()));
                return Ok(());
            }
            done += n;
        }
        Ok(())
    }

    /// Reads without waiting. None if it would have to wait.
    fn read_inline(&self, buf: &mut [u8], offset: u64) -> Option<io::Result<()>> {
        let flags = if self.memory { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let read = if self.memory {
                rustix::io::pread(&*self.image.file, &mut buf[done..], at)
            } else {
                rustix::io::preadv2(&*self.image.file, &mut [IoSliceMut::new(&mut buf[done..])], at, flags)
            };
            match read {
                Ok(0) => {
                    buf[done..].fill(0);
                    return Some(Ok(()));
                }
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Err(errno) => return Some(Err(errno.into())),
            }
        }
        Some(Ok(()))
    }

    /// The same into foreign memory, in place.
    fn read_inline_foreign(&self, to: &Data, offset: u64) -> Option<io::Result<()>> {
        let flags = if self.memory { 0 } else { libc::RWF_NOWAIT };
        let mut done = 0;
        while done < to.len() {
            let rest = if done == 0 { to.clone() } else { to.slice(done..to.len()) };
            match preadv(&self.image.file, &rest, offset + done as u64, flags) {
                Ok(0) => {
                    rest.fill_from(&Data::zeros(rest.len()));
                    return Some(Ok(()));
                }
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(()))
    }

    /// Writes; durable before the reply if the request says FUA.
    pub fn write<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let small = req.len <= INLINE_WRITE || self.memory;
        if small && !self.options.direct && !self.is_slow() {
            let since = now();
            let written = self.write_inline(&req.data, req.offset);
            if !self.memory {
                self.watch(since);
            }
            return match written {
                Ok(()) if req.is_fua() => cx.later(&req, async move { self.sync(cx).await }),
                Ok(()) => Flow::done(),
                Err(error) => cx.fail(&req, self.failed(error)),
            };
        }
        let (offset, fua) = (req.offset, req.is_fua());
        let data = if self.options.direct { aligned(&req.data) } else { req.data.clone() };
        cx.later(&req, async move {
            let mut done = 0;
            while done < data.len() {
                let rest = data.slice(done..data.len());
                match self.write_some(cx, offset + done as u64, rest).await.map_err(|e| self.failed(e))? {
                    0 => return Err(Error::new(Kind::NoSpace, "nothing more could be written")),
                    n => done += n,
                }
            }
            if fua { self.sync(cx).await } else { Ok(Answer::Done) }
        })
    }

    async fn write_some(&self, cx: Cx<'_>, offset: u64, data: Data) -> io::Result<usize> {
        let data = if ring::iovecs(&data).len() > IOV_MAX { data.flatten() } else { data };
        match cx.shard().ring() {
            Some(ring) => ring.write(self.file(), offset, data).await,
            None => {
                let file = self.file();
                pool::run(move || pwritev(&file, &data, offset)).await?
            }
        }
    }

    fn write_inline(&self, data: &Data, offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let rest = if done == 0 { data.clone() } else { data.slice(done..data.len()) };
            let written = match rest.as_slice() {
                Some(bytes) => rustix::io::pwrite(&*self.image.file, bytes, offset + done as u64),
                None => pwritev(&self.image.file, &rest, offset + done as u64)
                    .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            };
            match written {
                Ok(0) => return Err(Errno::NOSPC.into()),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Makes everything that was written and answered durable. A failure latches until
    /// [`Image::reset`]: the kernel reports it once and then calls the lost pages clean.
    pub async fn sync(&self, cx: Cx<'_>) -> Reply {
        let sync = async {
            match cx.shard().ring() {
                // Memory has nowhere to write to: the call returns at once.
                _ if self.memory => rustix::fs::fdatasync(&*self.image.file).map_err(io::Error::from),
                Some(ring) => ring.sync(self.file()).await,
                None => {
                    let file = self.file();
                    let done = pool::run(move || rustix::fs::fdatasync(&*file)).await;
                    done.and_then(|done| done.map_err(io::Error::from))
                }
            }
        };
        self.synced(sync).await
    }

    /// The same on this thread, which waits for the disk: not on a shard.
    pub async fn sync_here(&self) -> Reply {
        self.synced(async { rustix::fs::fdatasync(&*self.image.file).map_err(io::Error::from) }).await
    }

    /// One flush at a time: the kernel tells only one of several that something was lost.
    async fn synced(&self, sync: impl Future<Output = io::Result<()>>) -> Reply {
        let _alone = self.image.syncing.lock().await;
        if self.image.has_failed() {
            let message = "an earlier flush failed and data may be lost; call the element's reset when it is dealt with";
            return Err(Error::new(Kind::Io, message));
        }
        let outcome = Unknown(&self.image);
        let synced = sync.await;
        std::mem::forget(outcome);
        synced.map_err(|error| {
            self.image.fail();
            Error::io(error, "the flush failed: what was written before it may be lost")
                .with_path(self.image.path())
        })?;
        Ok(Answer::Done)
    }

    /// Gives space back. What is read there afterwards is zeros.
    pub fn discard<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if self.no_punch.load(Ordering::Relaxed) {
            return Flow::done();
        }
        let fua = req.is_fua();
        cx.later(&req.clone(), async move {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match self.allocate(cx, mode, &req).await {
                Ok(()) => {}
                Err(error) if is_unsupported(&error) => self.no_punch.store(true, Ordering::Relaxed),
                Err(error) => return Err(self.failed(error)),
            }
            if fua { self.sync(cx).await } else { Ok(Answer::Done) }
        })
    }

    /// Makes a range read as zeros: by a hole where it may, by allocated zeros where it may not, by
    /// writing where the file system can do neither.
    pub fn write_zeroes<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.later(&req.clone(), async move {
            if !self.zero_fast(cx, &req).await? {
                if req.flags.has(crate::Flags::FAST_ONLY) {
                    return Err(Error::unsupported("this file system has no fast way to zeros"));
                }
                self.zero_slow(cx, &req).await?;
            }
            if req.is_fua() { self.sync(cx).await } else { Ok(Answer::Done) }
        })
    }

    /// True if it is done.
    async fn zero_fast(&self, cx: Cx<'_>, req: &Request) -> Result<bool> {
        let keep = FallocateFlags::KEEP_SIZE;
        let punch = (FallocateFlags::PUNCH_HOLE | keep, &self.no_punch);
        let zero = (FallocateFlags::ZERO_RANGE | keep, &self.no_zero_range);
        let ways = if req.flags.has(crate::Flags::MAY_UNMAP) { vec![punch, zero] } else { vec![zero] };
        for (mode, unsupported) in ways {
            if unsupported.load(Ordering::Relaxed) {
                continue;
            }
            match self.allocate(cx, mode, req).await {
                Ok(()) => return Ok(true),
                Err(error) if is_unsupported(&error) => unsupported.store(true, Ordering::Relaxed),
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(false)
    }

    async fn zero_slow(&self, cx: Cx<'_>, req: &Request) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let mut at = req.offset;
        while at < req.end() {
            let data = Data::zeros(PIECE.min(req.end() - at) as usize);
            let data = if self.options.direct { aligned(&data) } else { data };
            match self.write_some(cx, at, data).await.map_err(|error| self.failed(error))? {
                0 => return Err(Error::new(Kind::NoSpace, "nothing more could be written")),
                n => at += n as u64,
            }
        }
        Ok(())
    }

    async fn allocate(&self, cx: Cx<'_>, mode: FallocateFlags, req: &Request) -> io::Result<()> {
        let (offset, len) = (req.offset, req.len);
        match cx.shard().ring() {
            _ if self.memory => Ok(rustix::fs::fallocate(&*self.image.file, mode, offset, len)?),
            Some(ring) => ring.allocate(self.file(), mode.bits() as i32, offset, len).await,
            None => {
                let file = self.file();
                Ok(pool::run(move || rustix::fs::fallocate(&*file, mode, offset, len)).await??)
            }
        }
    }

    /// Which of the range is allocated, by SEEK_DATA and SEEK_HOLE. Stops after a bounded number of
    /// extents.
    pub fn extents<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        const MOST: usize = 1024;
        if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) {
            return cx.fail(&req, Error::unsupported("a file knows of no such map"));
        }
        if self.no_extents.load(Ordering::Relaxed) || self.options.device {
            return Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])));
        }
        let most = if req.flags.has(crate::Flags::ONE) { 1 } else { MOST };
        let (offset, end) = (req.offset, req.end());
        let file = self.file();
        let seek = move || seek_extents(&file, offset, end, most);
        cx.later(&req, async move {
            let found =
                if self.memory { seek() } else { pool::run(seek).await.map_err(|e| self.failed(e))? };
            match found {
                Ok(extents) => Ok(Answer::Extents(extents)),
                Err(error) if is_unsupported(&error) => {
                    self.no_extents.store(true, Ordering::Relaxed);
                    Ok(Answer::Extents(vec![Extent { len: end - offset, state: ExtentState::DATA }]))
                }
                Err(error) => Err(self.failed(error)),
            }
        })
    }

    /// Asks the kernel to read ahead.
    pub fn cache<'a>(&'a self, req: Request) -> Flow<'a> {
        let advice = rustix::fs::Advice::WillNeed;
        // A hint: whether it was heard makes no difference to the answer.
        let _ = rustix::fs::fadvise(&*self.image.file, req.offset, std::num::NonZero::new(req.len), advice);
        Flow::done()
    }

    #[cold]
    fn failed(&self, error: io::Error) -> Error {
        let message = match Errno::from_io_error(&error) {
            Some(Errno::NOSPC | Errno::DQUOT) => "no space is left",
            _ => "the file system reported an error",
        };
        Error::io(error, message).with_path(self.image.path())
    }
}

#[allow(clippy::disallowed_methods, reason = "measures real system calls, which no test clock slows down")]
fn now() -> Instant {
    Instant::now()
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV))
}

/// A flush whose outcome nobody has seen. Dropped with its flow, it counts as failed: the kernel may have
/// told of lost pages, and does so once.
struct Unknown<'a>(&'a Image);

impl Drop for Unknown<'_> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

/// The same bytes in memory that O_DIRECT takes.
fn aligned(data: &Data) -> Data {
    let mut fits = true;
    data.for_each(|segment| {
        let start = match segment {
            crate::Segment::Bytes(bytes) => bytes.as_ptr() as usize,
            crate::Segment::Foreign(part) => part.as_ptr() as usize,
            crate::Segment::Zeros(_) => 1,
        };
        fits = fits && (start | segment.len()) % 512 == 0;
    });
    if fits {
        return data.clone();
    }
    let mut buf = PoolBuf::new(data.len());
    data.copy_to(&mut buf);
    buf.freeze()
}

fn preadv(file: &OwnedFd, to: &Data, offset: u64, flags: libc::c_int) -> io::Result<usize> {
    let iovecs = ring::iovecs(to);
    let count = iovecs.len().min(IOV_MAX) as i32;
    // SAFETY: the iovecs point into `to`, which is foreign memory, valid while it is held here; what
    // the kernel writes there is what a guest might.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), iovecs.as_ptr(), count, offset as i64, flags) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

fn pwritev(file: &OwnedFd, data: &Data, offset: u64) -> io::Result<usize> {
    let mut slices = Vec::new();
    let mut foreign = false;
    data.for_each(|segment| match segment {
        crate::Segment::Bytes(bytes) => slices.push(IoSlice::new(bytes)),
        _ => foreign = true,
    });
    if !foreign {
        slices.truncate(IOV_MAX);
        return Ok(rustix::io::pwritev(file, &slices, offset)?);
    }
    let iovecs = ring::iovecs(data);
    let count = iovecs.len().min(IOV_MAX) as i32;
    // SAFETY: the iovecs point into `data`, held here, or at static zeros; the kernel only reads.
    let n = unsafe { libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, offset as i64) };
    if n < 0 { Err(io::Error::last_os_error()) } else { Ok(n as usize) }
}

fn seek_extents(file: &OwnedFd, start: u64, end: u64, most: usize) -> io::Result<Vec<Extent>> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = start;
    while at < end && extents.len() < most {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(errno) => return Err(errno.into()),
        };
        if data > at {
            extents.push(Extent { len: data - at, state: ExtentState::HOLE });
            at = data;
            continue;
        }
        // A hole at the end of the file always exists.
        let hole = rustix::fs::seek(file, SeekFrom::Hole(at))?.clamp(at + 1, end.max(at + 1));
        extents.push(Extent { len: hole.min(end) - at, state: ExtentState::DATA });
        at = hole;
    }
    Ok(extents)
}
