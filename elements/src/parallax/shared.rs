//! The pools that this process has open: each once, whoever uses it.

use super::below::{Below, block_on};
use super::blocks::write_size;
use super::format::{BLOCK, EXTENT, Format, Id, Label};
use super::open::{Lacking, Opening, add_trees, create, open, read_label};
use super::pool::Pool;
use super::repair::{Repaired, Repairing, repair};
use blockmason::heads::{self, HeadPlace, Standing};
use blockmason::io::{Access, FileIo, FileOptions, Image, Opened, Registry};
use blockmason::{Cx, Error, Kind, Result};
use rustix::fs::{FileType, OFlags, SeekFrom};
use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

/// Who holds the lock of an open pool, in the words of whoever is refused.
const HOLDER: &str = "of its pool";

/// The file of a pool that is a folder.
const FILE: &str = "blocks";

/// A pool that is open.
pub(super) struct Shared {
    io: FileIo,
    /// Of each format and key one, at most.
    trees: Mutex<Vec<Arc<Pool>>>,
    pub(super) lacking: Vec<Lacking>,
    /// Held by whoever gives a volume a name, which is one in all formats, or makes trees of another one.
    naming: Mutex<()>,
    /// Goes last: by then the file is closed, and its lock with it.
    listed: Listed,
}

/// That nobody else gives a volume a name.
pub(super) type Naming<'a> = MutexGuard<'a, ()>;

/// The file or device of a pool: by whatever name it is opened, it is one pool.
struct Place {
    path: PathBuf,
    /// Device and inode; of a device its own number.
    id: (u64, u64),
}

impl Place {
    /// # Errors
    /// There is none, or it is something else, which might never answer.
    fn of(path: &Path) -> Result<Place> {
        let path = if path.is_dir() { path.join(FILE) } else { path.to_owned() };
        let none = |error| Error::io(error, "there is no such pool").with_path(&path);
        let found = path.metadata().map_err(none)?;
        let id = match found.file_type() {
            ty if ty.is_file() => (found.dev(), found.ino()),
            ty if ty.is_block_device() => (0, found.rdev()),
            _ => {
                let message = "a pool is a file, a block device, or a folder that holds the file";
                return Err(Error::new(Kind::Denied, message).with_path(&path));
            }
        };
        Ok(Place { path: path.canonicalize().map_err(none)?, id })
    }
}

/// That it is among those that are open, or are just being opened.
struct Listed(Place);

/// Pools that are open. One that is just being opened is among them, and one that nobody has any more until it is closed: what is
/// in memory only goes to its device then, and it may not be opened anew before.
static OPEN: Mutex<BTreeMap<(u64, u64), Weak<Shared>>> = Mutex::new(BTreeMap::new());
static CHANGED: Condvar = Condvar::new();

fn all() -> MutexGuard<'static, BTreeMap<(u64, u64), Weak<Shared>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pool at a place, if it is open; else nobody opens it as long as what is returned is there. Waits for whoever does just
/// that.
fn find(place: Place) -> Result<Arc<Shared>, Listed> {
    let mut all = all();
    while let Some(shared) = all.get(&place.id) {
        if let Some(shared) = shared.upgrade() {
            return Ok(shared);
        }
        all = CHANGED.wait(all).unwrap_or_else(PoisonError::into_inner);
    }
    all.insert(place.id, Weak::new());
    Err(Listed(place))
}

impl Shared {
    /// The pool at a path, opened for writing if this process has not opened it yet. Blocks.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process has it open.
    pub(super) fn open(path: &Path, memory: u64) -> Result<Arc<Shared>> {
        let listed = match find(Place::of(path)?) {
            Ok(shared) => return Ok(shared),
            Err(listed) => listed,
        };
        let path = &listed.0.path;
        let (image, size, device) = image(path, true)?;
        let opened = block_on(open(Opening::writable(memory), size, Below::Plain(image.file().as_fd())));
        let opened = opened.map_err(|error| error.with_path(path))?;
        for lacking in &opened.lacking {
            tracing::error!(pool = %path.display(), "its {} cannot be used: {}", lacking.what(), lacking.why);
        }
        let io = FileIo::new(image, FileOptions { size, direct: false, device });
        let id = listed.0.id;
        let trees = Mutex::new(opened.trees.into_iter().map(Arc::new).collect());
        let lacking = opened.lacking;
        let shared = Arc::new(Shared { io, trees, lacking, naming: Mutex::default(), listed });
        all().insert(id, Arc::downgrade(&shared));
        CHANGED.notify_all();
        Ok(shared)
    }

    /// Looks at the pool at a path, changing nothing. Blocks.
    ///
    /// # Errors
    /// As [`Shared::open`].
    pub(super) fn look<T>(
        path: &Path,
        look: impl FnOnce(&[Arc<Pool>], &[Lacking]) -> Result<T>,
    ) -> Result<T> {
        let listed = match find(Place::of(path)?) {
            Ok(shared) => return look(&shared.trees(), &shared.lacking),
            Err(listed) => listed,
        };
        let (image, size, _) = image(&listed.0.path, false)?;
        let below = Below::Plain(image.file().as_fd());
        let opened = block_on(open(Opening::read_only(16 << 20), size, below));
        let opened = opened.map_err(|error| error.with_path(&listed.0.path))?;
        let trees: Vec<Arc<Pool>> = opened.trees.into_iter().map(Arc::new).collect();
        look(&trees, &opened.lacking)
    }

    /// All trees of the pool, the oldest format first.
    pub(super) fn trees(&self) -> Vec<Arc<Pool>> {
        self.trees.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Some trees of the pool, for what is the pool's.
    pub(super) fn any(&self) -> Arc<Pool> {
        self.trees.lock().unwrap_or_else(PoisonError::into_inner)[0].clone()
    }

    /// The trees that have a volume.
    ///
    /// # Errors
    /// [`Kind::Unavailable`].
    pub(super) fn having(&self, volume: &str) -> Result<Arc<Pool>> {
        having(&self.trees(), &self.lacking, volume)
    }

    /// Nobody else gives a volume that name as long as what is returned is there.
    ///
    /// # Errors
    /// [`Kind::Busy`] if there is a volume of that name.
    pub(super) fn name(&self, name: &str) -> Result<Naming<'_>> {
        let alone = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        match self.having(name) {
            Err(error) if error.kind() == Kind::Unavailable => Ok(alone),
            _ => Err(super::admin::taken(name)),
        }
    }

    /// The trees of a format that have no key, which are made if there are none.
    ///
    /// # Errors
    /// They cannot be opened; [`Kind::NoSpace`].
    pub(super) fn of_format(&self, format: Format, _alone: &Naming<'_>) -> Result<Arc<Pool>> {
        let is = |lacking: &&Lacking| lacking.format == format && lacking.key.is_empty();
        if let Some(lacking) = self.lacking.iter().find(is) {
            let message = format!("{} cannot be used: {}", lacking.what(), lacking.why);
            return Err(Error::new(Kind::Io, message));
        }
        let is = |trees: &Arc<Pool>| trees.format == format && trees.core().key.is_empty();
        if let Some(trees) = self.trees().into_iter().find(is) {
            return Ok(trees);
        }
        let trees = Arc::new(block_on(add_trees(format, &self.any(), self.blocking()))?);
        self.trees.lock().unwrap_or_else(PoisonError::into_inner).push(trees.clone());
        Ok(trees)
    }

    /// Makes a pool larger that is so full that it cannot be opened for writing. Its new size. Blocks.
    ///
    /// # Errors
    /// As [`Shared::grow`], and [`Kind::Busy`] if somebody has it open.
    pub(super) fn grow_closed(path: &Path, size: Option<u64>) -> Result<u64> {
        let listed = match find(Place::of(path)?) {
            Ok(_) => return Err(Error::new(Kind::Busy, "it has just been opened").with_path(path)),
            Err(listed) => listed,
        };
        let (image, _, _) = image(&listed.0.path, true)?;
        let below = Below::Plain(image.file().as_fd());
        let label = block_on(read_label(below))?;
        let extents = make_room(image.file(), &label, size).map_err(|error| error.with_path(path))?;
        block_on(write_size(label, extents, below))?;
        Ok(extents * EXTENT * BLOCK)
    }

    /// Repairs a pool that nobody has open, or says what would be done. Blocks.
    ///
    /// # Errors
    /// [`Kind::Busy`] if somebody has it open.
    pub(super) fn repair_closed(path: &Path, how: Repairing) -> Result<Repaired> {
        let busy = || {
            let message = "a graph serves the pool: stop its daemon, then repair the pool";
            Error::new(Kind::Busy, message).with_path(path)
        };
        let listed = find(Place::of(path)?).map_or_else(Ok, |_| Err(busy()))?;
        let (image, size, _) = image(&listed.0.path, how.act).map_err(|error| match error.kind() {
            Kind::Busy => busy(),
            _ => error,
        })?;
        let done = block_on(repair(how, size, Below::Plain(image.file().as_fd())));
        done.map_err(|error| error.with_path(path))
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
        let any = self.any();
        let label = any.space.label();
        let extents = make_room(self.io.image().file(), &label, size)
            .map_err(|error| error.with_path(&self.listed.0.path))?;
        block_on(any.space.blocks.grow(extents, self.blocking()))?;
        any.space.blocks.room.notify_waiters();
        Ok(extents * EXTENT * BLOCK)
    }

    /// The head of a volume that is gone goes with it, and is that of the volume's new name otherwise.
    pub(super) fn move_head(&self, volume: &str, to: Option<&str>) {
        let from = head_of(&self.listed.0.path, volume, false).path;
        let moved = match to {
            Some(to) => std::fs::rename(&from, head_of(&self.listed.0.path, to, false).path),
            None => std::fs::remove_file(&from),
        };
        if let Err(error) = moved
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: the head is not where it should be: {error}", from.display());
        }
    }

    /// # Errors
    /// [`Kind::Busy`] if a volume is being filled by a move, or a backup is restored to it: it is no whole disk yet.
    pub(super) fn is_whole(&self, volume: &str) -> Result<()> {
        let head = heads::read(&head_of(&self.listed.0.path, volume, false).path).ok().flatten();
        match head.map(|head| head.standing) {
            Some(Standing::Filling(from)) => {
                let message =
                    format!("{volume} is being filled from {from}, and is not, or not always, a whole disk");
                Err(Error::new(Kind::Busy, message))
            }
            _ => Ok(()),
        }
    }

    /// Its file.
    pub(super) fn opened(&self) -> Option<Opened> {
        let size = self.any().space.label().extents * EXTENT * BLOCK;
        Opened::of(&self.listed.0.path, self.io.image().file(), size).ok()
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
        for trees in self.trees() {
            let _ = block_on(trees.checkpoint(self.blocking()));
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        all().remove(&self.0.id);
        CHANGED.notify_all();
    }
}

/// The trees that have a volume.
///
/// # Errors
/// [`Kind::Unavailable`].
pub(super) fn having(trees: &[Arc<Pool>], lacking: &[Lacking], volume: &str) -> Result<Arc<Pool>> {
    let mut all = trees.iter().filter(|trees| trees.core().volume(volume).is_some());
    let found = all.next().cloned().ok_or_else(|| super::admin::gone("volume", volume));
    if all.next().is_some() {
        let message =
            format!("two volumes are called {volume}, of different formats: tools cannot tell them apart");
        return Err(Error::new(Kind::Busy, message));
    }
    match lacking.first() {
        Some(lacking) => found.map_err(|error| {
            let message = format!("{}; {} cannot be used: {}", error.message(), lacking.what(), lacking.why);
            Error::new(error.kind(), message)
        }),
        None => found,
    }
}

/// Makes the file of a pool larger if it is too small for that size. The extents that there are then.
fn make_room(file: impl AsFd, label: &Label, size: Option<u64>) -> Result<u64> {
    let failed = |errno| Error::os(errno, "it cannot be made larger");
    let stat = rustix::fs::fstat(&file).map_err(failed)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    let has = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(failed)?;
    let wanted = match (size, is_device) {
        (None, false) => return Err(Error::invalid("how large? a pool in a file needs a size")),
        (Some(size), true) if size > has => {
            return Err(Error::new(Kind::NoSpace, format!("the device has {has} bytes only")));
        }
        (size, _) => size.unwrap_or(has),
    };
    let extents = wanted / (EXTENT * BLOCK);
    if !is_device && wanted > has && (label.extents..=label.capacity).contains(&extents) {
        rustix::fs::ftruncate(&file, wanted).map_err(failed)?;
    }
    Ok(extents)
}

/// Where the head of a volume is: beside the pool, which it goes along with.
pub(super) fn head_of(pool: &Path, volume: &str, read_only: bool) -> HeadPlace {
    let pool = Place::of(pool).map_or_else(|_| pool.to_owned(), |place| place.path);
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
