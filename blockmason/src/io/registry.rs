//! Images that are open: one description and one lock for each, however many graphs use it.
//!
//! Locks of open file descriptions conflict within a process too; successive graphs share the
//! description, and with it the lock.

mod carry;

pub use carry::{Carried, Claims};

use super::fence;
use crate::error::{Errno, Error, Kind, Result};
use rustix::fs::{FlockOperation, OFlags};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// For writing too; no other graph may then have it open.
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// An open image.
pub struct Image {
    path: PathBuf,
    access: Access,
    /// The graph that has it open.
    holder: String,
    lock: Arc<Lock>,
    /// The description that requests use.
    pub(super) file: Arc<OwnedFd>,
    /// Set by a failed fdatasync: the kernel has forgotten which pages were dirty.
    sync_failed: AtomicBool,
    /// One fdatasync at a time: of two at once the kernel tells one that pages were lost, and the other
    /// would be taken for a success.
    pub(super) syncing: tokio::sync::Mutex<()>,
}

impl Image {
    /// The path it was opened by first.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open file.
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// True if a flush has failed and nobody has [reset](Self::reset) it: what was written before it
    /// may be lost although reads still show it.
    pub fn has_failed(&self) -> bool {
        self.sync_failed.load(Ordering::Acquire)
    }

    pub(super) fn fail(&self) {
        self.sync_failed.store(true, Ordering::Release);
    }

    /// The operator has dealt with a failed flush.
    pub fn reset(&self) {
        self.sync_failed.store(false, Ordering::Release);
    }
}

/// Keeps other processes off an image, whatever descriptions of it this one has. Exclusive from the
/// first that writes on.
struct Lock {
    file: OwnedFd,
    exclusive: AtomicBool,
}

impl Lock {
    fn new(file: &OwnedFd, exclusive: bool) -> Result<Lock, Errno> {
        // A copy of the descriptor is the same description, and so the same lock.
        let file = file.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        lock(&file, exclusive)?;
        Ok(Lock { file, exclusive: AtomicBool::new(exclusive) })
    }

    /// Makes sure that nobody else reads either.
    fn make_exclusive(&self) -> Result<(), Errno> {
        if !self.exclusive.load(Ordering::Acquire) {
            // The kernel gives up the lock before it takes the other.
            lock(&self.file, true).inspect_err(|_| {
                let _ = lock(&self.file, false);
            })?;
            self.exclusive.store(true, Ordering::Release);
        }
        Ok(())
    }
}

/// Device and inode.
type Inode = (u64, u64);

/// The open images of this process.
#[derive(Default)]
pub struct Registry {
    images: Mutex<HashMap<Inode, Vec<Weak<Image>>>>,
}

/// See [`Registry::of_process`].
static OF_PROCESS: LazyLock<Registry> = LazyLock::new(Registry::default);

impl Registry {
    /// That of this process: successive graphs share lock and description, and a successor in another
    /// process is given both.
    pub fn of_process() -> &'static Registry {
        &OF_PROCESS
    }

    /// Opens `path` for the graph `holder`, or returns it if that has it open already with the same
    /// access. With another access it is another description under the same lock.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process, or another graph of this one, holds a lock that conflicts;
    /// what the system says otherwise.
    pub fn open(&self, path: &Path, access: Access, holder: &str) -> Result<Arc<Image>> {
        let refused = |errno: Errno, what: &'static str| Error::os(errno, what).with_path(path);
        let busy = |what: String| Error::new(Kind::Busy, what).with_path(path);
        let file = open_file(path, access)?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| refused(errno, "it cannot be looked at"))?;
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.retain(|_, list| list.iter().any(|image| image.strong_count() > 0));
        let list = images.entry((stat.st_dev, stat.st_ino)).or_default();
        let open: Vec<_> = list.iter().filter_map(Weak::upgrade).collect();
        let excludes = |image: &&Arc<Image>| image.holder != holder && (image.access.write || access.write);
        if let Some(other) = open.iter().find(excludes) {
            return Err(busy(format!("the graph {} has it open", other.holder)));
        }
        let same = |image: &&Arc<Image>| image.holder == holder && image.access == access;
        if let Some(image) = open.iter().find(same) {
            return Ok(image.clone());
        }
        let locked = match open.first() {
            Some(other) if access.write => other.lock.make_exclusive().map(|()| other.lock.clone()),
            Some(other) => Ok(other.lock.clone()),
            None => {
                let lock = || Lock::new(&file, access.write).map(Arc::new);
                let locked = fence::lock_after_the_dead((stat.st_dev, stat.st_ino), lock);
                locked.inspect(|_| {
                    if !access.write {
                        fence::come_after_reads(&file, holder)
                    }
                })
            }
        };
        let lock = locked.map_err(|errno| match errno {
            Errno::AGAIN | Errno::ACCESS => busy("it is locked: another process has it open".to_owned()),
            _ => refused(errno, "it cannot be locked"),
        })?;
        let image = Arc::new(Image {
            path: path.to_owned(),
            access,
            holder: holder.to_owned(),
            lock,
            file: Arc::new(file),
            sync_failed: AtomicBool::new(false),
            syncing: tokio::sync::Mutex::default(),
        });
        list.retain(|image| image.strong_count() > 0);
        list.push(Arc::downgrade(&image));
        Ok(image)
    }
}

fn open_file(path: &Path, access: Access) -> Result<OwnedFd> {
    let refused = |errno: Errno, what: &'static str| Error::os(errno, what).with_path(path);
    let mut flags = OFlags::CLOEXEC | if access.write { OFlags::RDWR } else { OFlags::RDONLY };
    if access.direct {
        flags |= OFlags::DIRECT;
    }
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => refused(errno, "there is no such file"),
        Errno::ACCESS | Errno::PERM => refused(errno, "permission to open it is missing"),
        Errno::INVAL if access.direct => refused(errno, "its file system does not do O_DIRECT"),
        Errno::ISDIR => refused(errno, "it is a folder, not a disk image"),
        _ => refused(errno, "it cannot be opened"),
    })
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Image({}, {:?})", self.path.display(), self.access)
    }
}

/// Locks the whole file: flock, which tools of other projects see too, and a record lock of the
/// description, which NFS honours.
fn lock(file: &OwnedFd, write: bool) -> Result<(), Errno> {
    let (whole, record) = if write {
        (FlockOperation::NonBlockingLockExclusive, libc::F_WRLCK)
    } else {
        (FlockOperation::NonBlockingLockShared, libc::F_RDLCK)
    };
    rustix::fs::flock(file.as_fd(), whole)?;
    record_lock(file, record)
}

fn record_lock(file: &OwnedFd, kind: libc::c_int) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let lock = fence::record(kind, 0, fence::END);
    // SAFETY: the descriptor is open, and the kernel only reads the structure.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if locked == 0 {
        return Ok(());
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    // Some file systems have no record locks; the flock above holds all the same.
    if matches!(errno, Errno::NOLCK | Errno::NOTSUP | Errno::INVAL) { Ok(()) } else { Err(errno) }
}
