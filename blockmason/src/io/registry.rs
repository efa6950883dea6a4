//! Images that are open: one description and one lock for each, however many graphs use it.
//!
//! Locks of open file descriptions conflict within a process too; successive graphs share the
//! description, and with it the lock.

use crate::error::{Errno, Error, Kind, Result};
use rustix::fs::{FlockOperation, OFlags};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// For writing too; nobody else may then have it open through us.
    pub write: bool,
    /// Past the page cache.
    pub direct: bool,
}

/// An open image.
pub struct Image {
    path: PathBuf,
    access: Access,
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

/// The open images of this process.
#[derive(Default)]
pub struct Registry {
    images: Mutex<HashMap<(u64, u64, Access), Weak<Image>>>,
}

impl Registry {
    /// Opens `path`, or returns it if it is open already with the same access.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process, or this one with another access, holds a lock that
    /// conflicts; what the system says otherwise.
    pub fn open(&self, path: &Path, access: Access) -> Result<Arc<Image>> {
        let refused = |errno: Errno, what: &'static str| Error::os(errno, what).with_path(path);
        let mut flags = OFlags::CLOEXEC | if access.write { OFlags::RDWR } else { OFlags::RDONLY };
        if access.direct {
            flags |= OFlags::DIRECT;
        }
        let file = rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT => refused(errno, "there is no such file"),
            Errno::ACCESS | Errno::PERM => refused(errno, "permission to open it is missing"),
            Errno::INVAL if access.direct => refused(errno, "its file system does not do O_DIRECT"),
            Errno::ISDIR => refused(errno, "it is a folder, not a disk image"),
            _ => refused(errno, "it cannot be opened"),
        })?;
        let stat = rustix::fs::fstat(&file).map_err(|errno| refused(errno, "it cannot be looked at"))?;
        let key = (stat.st_dev, stat.st_ino, access);
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.retain(|_, image| image.strong_count() > 0);
        if let Some(image) = images.get(&key).and_then(Weak::upgrade) {
            return Ok(image);
        }
        lock(&file, access.write).map_err(|errno| match errno {
            Errno::AGAIN | Errno::ACCESS => {
                Error::new(Kind::Busy, "it is locked: another process or graph has it open").with_path(path)
            }
            _ => refused(errno, "it cannot be locked"),
        })?;
        let image = Arc::new(Image {
            path: path.to_owned(),
            access,
            file: Arc::new(file),
            sync_failed: AtomicBool::new(false),
            syncing: tokio::sync::Mutex::default(),
        });
        images.insert(key, Arc::downgrade(&image));
        Ok(image)
    }
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
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel only reads the structure.
    let locked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
    if locked == 0 {
        return Ok(());
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    // Some file systems have no record locks; the flock above holds all the same.
    if matches!(errno, Errno::NOLCK | Errno::NOTSUP | Errno::INVAL) { Ok(()) } else { Err(errno) }
}
