//! Images that go from one process to the next: the open descriptions, and with them their locks.

use super::{Access, Image, Lock, Registry};
use crate::error::{Errno, Error, Kind, Result};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, Weak};

/// An open image on its way to another process.
#[derive(Debug)]
pub struct Carried {
    /// The path it was opened by first.
    pub path: PathBuf,
    /// What it is open for.
    pub access: Access,
    /// The graph that has it open.
    pub holder: String,
    /// A flush has failed, and nobody has dealt with that.
    pub sync_failed: bool,
    /// Nobody else may read it either.
    pub exclusive: bool,
    /// The description that requests use.
    pub file: OwnedFd,
    /// The description that has the lock, which several images of one file share.
    pub lock: OwnedFd,
}

/// Images that another process has had open, until the graphs here have taken them.
#[derive(Debug)]
pub struct Claims(Vec<Arc<Image>>);

impl Claims {
    /// A graph has taken what is its own.
    ///
    /// # Errors
    /// An image is left: its path leads to another file by now, which would be served instead.
    pub fn settle(&self, holder: &str) -> Result<()> {
        // The registry knows it weakly; one is ours.
        let left = |image: &&Arc<Image>| image.holder == holder && Arc::strong_count(image) == 1;
        match self.0.iter().find(left) {
            None => Ok(()),
            Some(image) => {
                let message =
                    "it is open, and its path leads to another file by now, or to none: put it back";
                Err(Error::new(Kind::Busy, message).with_path(&image.path))
            }
        }
    }
}

impl Registry {
    /// True if a flush of an open image has failed and nobody has dealt with that.
    pub fn has_failed(&self) -> bool {
        self.open_images().iter().any(|image| image.has_failed())
    }

    fn open_images(&self) -> Vec<Arc<Image>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        images.values().flatten().filter_map(Weak::upgrade).collect()
    }

    /// Copies of everything that is open. Both processes then have the same descriptions, and so the same
    /// locks, until one of them has closed its own.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn carry(&self) -> Result<Vec<Carried>> {
        let copy = |fd: &OwnedFd, image: &Image| {
            fd.try_clone()
                .map_err(|error| Error::io(error, "its descriptor cannot be copied").with_path(&image.path))
        };
        let carried = |image: Arc<Image>| {
            Ok(Carried {
                path: image.path.clone(),
                access: image.access,
                holder: image.holder.clone(),
                sync_failed: image.has_failed(),
                exclusive: image.lock.exclusive.load(Ordering::Acquire),
                file: copy(&image.file, &image)?,
                lock: copy(&image.lock.file, &image)?,
            })
        };
        self.open_images().into_iter().map(carried).collect()
    }

    /// Takes up what another process has carried here: graphs that open these files find them open, as
    /// long as the claims live.
    ///
    /// # Errors
    /// A descriptor that is none of a file.
    pub fn expect(&self, carried: Vec<Carried>) -> Result<Claims> {
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let mut claims = Vec::new();
        for Carried { path, access, holder, sync_failed, exclusive, file, lock } in carried {
            let inode = |fd: &OwnedFd| -> Result<_, Errno> {
                let stat = rustix::fs::fstat(fd)?;
                Ok((stat.st_dev, stat.st_ino))
            };
            let same = inode(&file).and_then(|file| Ok((file, file == inode(&lock)?)));
            let (inode, same) =
                same.map_err(|errno| Error::os(errno, "it cannot be looked at").with_path(&path))?;
            if !same {
                return Err(Error::invalid("its lock is that of another file").with_path(&path));
            }
            let list = images.entry(inode).or_default();
            // Descriptions of one file share a lock.
            let shared = list.iter().find_map(Weak::upgrade).map(|other| other.lock.clone());
            let fresh = || Arc::new(Lock { file: lock, exclusive: AtomicBool::new(exclusive) });
            let lock = shared.unwrap_or_else(fresh);
            let image = Arc::new(Image {
                path,
                access,
                holder,
                lock,
                file: Arc::new(file),
                sync_failed: AtomicBool::new(sync_failed),
                syncing: tokio::sync::Mutex::default(),
            });
            list.push(Arc::downgrade(&image));
            claims.push(image);
        }
        Ok(Claims(claims))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FlockOperation, flock};

    fn locked(path: &std::path::Path) -> bool {
        let other = std::fs::File::open(path).unwrap();
        flock(&other, FlockOperation::NonBlockingLockShared).is_err()
    }

    /// Two registries in one process: locks of descriptions conflict all the same.
    #[test]
    fn the_lock_and_a_failed_flush_go_along() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        let (old, new) = (Registry::default(), Registry::default());
        let access = Access { write: true, direct: false };
        let image = old.open(&path, access, "vm").unwrap();
        image.fail();
        assert!(new.open(&path, access, "vm").is_err(), "it is locked");
        let claims = new.expect(old.carry().unwrap()).unwrap();
        assert!(new.open(&path, access, "other").is_err(), "it is another graph's");
        let taken = new.open(&path, access, "vm").unwrap();
        claims.settle("vm").unwrap();
        drop((claims, image));
        assert!(locked(&path) && taken.has_failed());
        drop(taken);
        assert!(!locked(&path));
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        std::fs::write(&path, "old").unwrap();
        let (old, new) = (Registry::default(), Registry::default());
        let access = Access { write: true, direct: false };
        let _image = old.open(&path, access, "vm").unwrap();
        let claims = new.expect(old.carry().unwrap()).unwrap();
        std::fs::write(folder.path().join("b.img"), "new").unwrap();
        std::fs::rename(folder.path().join("b.img"), &path).unwrap();
        let _other = new.open(&path, access, "vm").unwrap();
        let error = claims.settle("vm").unwrap_err().to_string();
        assert!(error.contains("another file") && error.contains("a.img"), "{error}");
    }
}
