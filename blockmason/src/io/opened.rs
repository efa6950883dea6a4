//! Whether a name still leads to the file that was opened by it.

use crate::error::{Error, Kind, Result};
use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// A file that was opened: its name, and what tells it apart from others that may have this name later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    /// When it was made, where the file system knows: the inode of a file that is gone is soon another one's.
    born: Option<(i64, u32)>,
    /// How long it is at the least; none of a device.
    size: Option<u64>,
}

const WANTED: StatxFlags =
    StatxFlags::INO.union(StatxFlags::TYPE).union(StatxFlags::SIZE).union(StatxFlags::BTIME);

impl Opened {
    /// What was opened by the name `path`, and is used as a disk of `size` bytes.
    ///
    /// # Errors
    /// The system says nothing of it.
    pub fn of(path: &Path, file: impl AsFd, size: u64) -> Result<Opened> {
        let found = statx(file, "", AtFlags::EMPTY_PATH, WANTED);
        let found = found.map_err(|errno| Error::os(errno, "it cannot be looked at").with_path(path))?;
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Ok(Opened::found(path, &found, size))
    }

    fn found(path: PathBuf, found: &Statx, size: u64) -> Opened {
        let is = |ty| FileType::from_raw_mode(found.stx_mode.into()) == ty;
        let knows = |what: StatxFlags| found.stx_mask & what.bits() != 0;
        Opened {
            path,
            device: match is(FileType::BlockDevice) {
                true => (found.stx_rdev_major, found.stx_rdev_minor),
                false => (found.stx_dev_major, found.stx_dev_minor),
            },
            inode: found.stx_ino,
            born: knows(StatxFlags::BTIME).then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec)),
            size: is(FileType::RegularFile).then_some(size),
        }
    }

    /// Whether its name still leads to it, and it is as long as it was.
    ///
    /// # Errors
    /// What has become of it; or, with a source, what the system says that can tell nothing of it.
    pub fn is_in_place(&self) -> Result<()> {
        let gone = "the file that is open has this name no more";
        self.is_found(gone, |found| found.device == self.device && found.inode == self.inode)
    }

    /// The same of one that nobody has had open meanwhile. Devices are numbered anew when a machine starts, and
    /// inodes are given to others when a file is gone: so it is known by when it was made, if that is known.
    ///
    /// # Errors
    /// As [`is_in_place`](Self::is_in_place).
    pub fn is_still_there(&self) -> Result<()> {
        self.is_found("it is not there any more", |found| match (self.size, self.born) {
            // A device has the name that it was given.
            (None, _) => found.size.is_none(),
            (_, Some(_)) => (found.inode, found.born) == (self.inode, self.born),
            (_, None) => (found.device, found.inode) == (self.device, self.inode),
        })
    }

    fn is_found(&self, gone: &'static str, same: impl Fn(&Opened) -> bool) -> Result<()> {
        let refused = |what: &str| Err(Error::new(Kind::Unavailable, what.to_owned()).with_path(&self.path));
        let found = match statx(CWD, &self.path, AtFlags::empty(), WANTED) {
            Ok(found) => found,
            Err(rustix::io::Errno::NOENT) => return refused(gone),
            Err(errno) => return Err(Error::os(errno, "it cannot be looked at").with_path(&self.path)),
        };
        if !same(&Opened::found(self.path.clone(), &found, found.stx_size)) {
            return refused("another file has this name now");
        }
        match self.size.is_some_and(|size| found.stx_size < size) {
            true => refused("it has become shorter: what was there is gone"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_file_is_known_by_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let (path, aside) = (folder.path().join("disk.img"), folder.path().join("aside"));
        let file = File::create_new(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        let opened = Opened::of(&path, &file, 1 << 20).unwrap();
        let said = || {
            let (now, later) = (opened.is_in_place(), opened.is_still_there());
            assert_eq!(now.is_ok(), later.is_ok());
            now.err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(said(), "");
        file.set_len(2 << 20).unwrap();
        assert_eq!(said(), "");
        file.set_len(1 << 19).unwrap();
        assert!(said().ends_with("disk.img: it has become shorter: what was there is gone"), "{}", said());
        file.set_len(1 << 20).unwrap();
        std::fs::rename(&path, &aside).unwrap();
        assert!(said().contains("has this name no more"), "{}", said());
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        assert!(said().contains("another file has this name now"), "{}", said());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&aside, &path).unwrap();
        assert_eq!(said(), "");
    }
}
