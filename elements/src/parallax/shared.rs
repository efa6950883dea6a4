//! The pools that this process has open: each once, whoever uses it.

use super::below::Below;
use super::format::{BLOCK, EXTENT, Id};
use super::open::{Opening, create, open};
use super::pool::Pool;
use blockmason::heads::HeadPlace;
use blockmason::io::{Access, FileIo, FileOptions, Image, Opened, Registry};
use blockmason::{Cx, Error, Kind, Result};
use futures::executor::block_on;
use rustix::fs::{FileType, OFlags, SeekFrom};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Who holds the lock of an open pool, in the words of whoever is refused.
const HOLDER: &str = "of its pool";

/// The file of a pool that is a folder.
const FILE: &str = "blocks";

/// A pool that is open.
pub(super) struct Shared {
    io: FileIo,
    pub(super) pool: Arc<Pool>,
    /// Goes last: by then the file is closed, and its lock with it.
    listed: Listed,
}

/// That it is among those that are open.
struct Listed(PathBuf);

/// Pools that are open. One that nobody has any more is among them until it is closed: what is in memory only goes to its
/// device then, and it may not be opened anew before.
static OPEN: Mutex<BTreeMap<PathBuf, Weak<Shared>>> = Mutex::new(BTreeMap::new());
static CLOSED: Condvar = Condvar::new();

type All = MutexGuard<'static, BTreeMap<PathBuf, Weak<Shared>>>;

/// The pool at a path, if it is open. Whoever holds the lock may open it if not.
fn find(path: &Path) -> (Option<Arc<Shared>>, All) {
    let mut all = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(shared) = all.get(path) {
        if let Some(shared) = shared.upgrade() {
            return (Some(shared), all);
        }
        all = CLOSED.wait(all).unwrap_or_else(PoisonError::into_inner);
    }
    (None, all)
}

impl Shared {
    /// The pool at a path, opened for writing if this process has not opened it yet. Blocks.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process has it open.
    pub(super) fn open(path: &Path, memory: u64) -> Result<Arc<Shared>> {
        let path = file_of(path)?;
        let (found, mut all) = find(&path);
        if let Some(shared) = found {
            return Ok(shared);
        }
        let (image, size, device) = image(&path, true)?;
        let opening = Opening { writable: true, memory };
        let pool = block_on(open(opening, size, Below::Plain(image.file().as_fd())));
        let pool = pool.map_err(|error| error.with_path(&path))?;
        let io = FileIo::new(image, FileOptions { size, direct: false, device });
        let shared = Arc::new(Shared { io, pool: Arc::new(pool), listed: Listed(path.clone()) });
        all.insert(path, Arc::downgrade(&shared));
        Ok(shared)
    }

    /// Looks at the pool at a path, changing nothing. Blocks.
    ///
    /// # Errors
    /// As [`Shared::open`].
    pub(super) fn look<T>(path: &Path, look: impl FnOnce(&Pool) -> Result<T>) -> Result<T> {
        let path = file_of(path)?;
        let (found, all) = find(&path);
        if let Some(shared) = found {
            // If it is the last one to have it, closing it needs the lock.
            drop(all);
            return look(&shared.pool);
        }
        let (image, size, _) = image(&path, false)?;
        let below = Below::Plain(image.file().as_fd());
        let opening = Opening { writable: false, memory: 16 << 20 };
        let pool = block_on(open(opening, size, below)).map_err(|error| error.with_path(&path))?;
        look(&pool)
    }

    /// The way down of a request of a graph.
    pub(super) fn below<'a>(&'a self, cx: Cx<'a>) -> Below<'a> {
        Below::Image(&self.io, cx)
    }

    /// Makes the pool as large as its device, or its file so large, and the pool with it. Its new size.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it would be smaller, or larger than it can be; [`Kind::NoSpace`] if the device is smaller.
    pub(super) fn grow(&self, size: Option<u64>) -> Result<u64> {
        let failed = |errno| Error::os(errno, "it cannot be made larger").with_path(&self.listed.0);
        let file = self.io.image().file();
        let is_device = FileType::from_raw_mode(rustix::fs::fstat(file).map_err(failed)?.st_mode)
            == FileType::BlockDevice;
        let has = rustix::fs::seek(file, SeekFrom::End(0)).map_err(failed)?;
        let wanted = match (size, is_device) {
            (None, false) => return Err(Error::invalid("how large? a pool in a file needs a size")),
            (Some(size), true) if size > has => {
                let message = format!("the device has {has} bytes only");
                return Err(Error::new(Kind::NoSpace, message));
            }
            (size, _) => size.unwrap_or(has),
        };
        let extents = wanted / (EXTENT * BLOCK);
        let label = self.pool.space.label();
        if !is_device && wanted > has && (label.extents..=label.capacity).contains(&extents) {
            rustix::fs::ftruncate(file, wanted).map_err(failed)?;
        }
        block_on(self.pool.space.grow(extents, self.blocking()))?;
        self.pool.room.notify_waiters();
        Ok(extents * EXTENT * BLOCK)
    }

    /// The head of a volume that is gone goes with it, and is that of the volume's new name otherwise.
    pub(super) fn move_head(&self, volume: &str, to: Option<&str>) {
        let from = head_of(&self.listed.0, volume, false).path;
        let moved = match to {
            Some(to) => std::fs::rename(&from, head_of(&self.listed.0, to, false).path),
            None => std::fs::remove_file(&from),
        };
        if let Err(error) = moved
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: the head is not where it should be: {error}", from.display());
        }
    }

    /// Its file.
    pub(super) fn opened(&self) -> Option<Opened> {
        let size = self.pool.space.label().extents * EXTENT * BLOCK;
        Opened::of(&self.listed.0, self.io.image().file(), size).ok()
    }

    /// Bytes that are free on the file system that the pool is on; none of a device, which has what it has.
    pub(super) fn room_below(&self) -> Option<u64> {
        let file = self.io.image().file();
        let stat = rustix::fs::fstat(file).ok()?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        is_file
            .then(|| rustix::fs::fstatvfs(file).ok().map(|found| found.f_bavail * found.f_frsize))
            .flatten()
    }

    /// The way down of whatever is no request of a graph, and on no shard.
    pub(super) fn blocking(&self) -> Below<'_> {
        Below::Blocking(&self.io)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Whatever it is that failed has been said; the log has everything.
        let _ = block_on(self.pool.checkpoint(self.blocking()));
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
        CLOSED.notify_all();
    }
}

/// Where the head of a volume is: beside the pool, which it goes along with.
pub(super) fn head_of(pool: &Path, volume: &str, read_only: bool) -> HeadPlace {
    let pool = file_of(pool).unwrap_or_else(|_| pool.to_owned());
    let (shown, mut path) = (pool.display().to_string(), pool.into_os_string());
    path.push(format!(".{volume}.mason-head"));
    HeadPlace { path: path.into(), called: format!("{shown} {volume}"), read_only, missing: None }
}

/// Makes a pool in a new file, or on a block device that reads as zeros where its label will be. Blocks.
///
/// # Errors
/// [`Kind::Busy`] if there is something already; what the system says.
pub(super) fn make(path: &Path, size: Option<u64>, id: Id) -> Result<()> {
    let refused = |errno, what: &'static str| Error::os(errno, what).with_path(path);
    if rustix::fs::stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice)
    {
        let (image, all, _) = image(path, true)?;
        let below = Below::Plain(image.file().as_fd());
        return block_on(async {
            if !super::open::is_empty(below).await? {
                let message = "the device has something on it: zero its first 2 MiB if it may be overwritten";
                return Err(Error::new(Kind::Busy, message).with_path(path));
            }
            super::open::clear(all, below).await?;
            create(id, size.unwrap_or(all).min(all), below).await
        });
    }
    let Some(size) = size else {
        return Err(Error::invalid("a pool in a file needs a size").with_path(path));
    };
    let path = if path.is_dir() { &path.join(FILE) } else { path };
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    let file = rustix::fs::open(path, flags, mode).map_err(|errno| refused(errno, "it cannot be created"))?;
    let made = rustix::fs::ftruncate(&file, size)
        .map_err(|errno| refused(errno, "it cannot be made that large"))
        .and_then(|()| block_on(create(id, size, Below::Plain(file.as_fd()))));
    // Half made, it would stand in the way.
    made.inspect_err(|_| _ = rustix::fs::unlink(path))
}

/// The file or device of a pool.
fn file_of(path: &Path) -> Result<PathBuf> {
    let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
    let found = path.canonicalize();
    found.map_err(|error| Error::io(error, "there is no such pool").with_path(&path))
}

/// Opens the file or device of a pool, with its lock: its size, and whether it is a device.
fn image(path: &Path, write: bool) -> Result<(Arc<Image>, u64, bool)> {
    let image = Registry::of_process().open(path, Access { write, direct: false }, HOLDER)?;
    let refused = |errno| Error::os(errno, "its size cannot be found out").with_path(path);
    let stat = rustix::fs::fstat(image.file()).map_err(refused)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => {
            let size = rustix::fs::seek(image.file(), SeekFrom::End(0)).map_err(refused)?;
            Ok((image, size, true))
        }
        _ if (stat.st_size as u64) < BLOCK => Err(Error::new(Kind::Denied, "it is no pool").with_path(path)),
        _ => Ok((image, stat.st_size as u64, false)),
    }
}
