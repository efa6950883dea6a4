//! Small files that are replaced as a whole.

use rustix::fs::{AtFlags, CWD, FileType, StatxAttributes, StatxFlags, statx};
use std::fs::{DirBuilder, File};
use std::io::{Error, ErrorKind, Result, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers temporary files, since several may be written at once.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Writes a file, durably: when this returns it is there whole, and when it fails, or the process ends
/// at any moment, what was there before is. Keeps the permissions of a file that is there; makes missing
/// folders, for this user alone.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    Replacement::prepare(path, bytes)?.put()
}

/// What a file is to say, written beside it: what may fail has been done, but for the last step. Removed again when it
/// goes.
pub struct Replacement {
    path: PathBuf,
    temporary: PathBuf,
}

impl Replacement {
    /// Writes it, durably.
    ///
    /// # Errors
    /// It cannot be written, or the file cannot be replaced.
    pub fn prepare(path: &Path, bytes: &[u8]) -> Result<Replacement> {
        may_be_replaced(path)?;
        let folder = folder(path);
        if !folder.is_dir() {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // A long name is cut, so that there is room for what makes it another one.
        let short: String = name.chars().take(40).collect();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!(".{short}.{}.{number}", std::process::id()));
        // What a process of this number left when it was killed.
        let _ = std::fs::remove_file(&temporary);
        let prepared = Replacement { path: path.to_owned(), temporary };
        write_new(path, &prepared.temporary, bytes)?;
        Ok(prepared)
    }

    /// Puts it in the place of the file, durably.
    ///
    /// # Errors
    /// What was there before is there.
    pub fn put(self) -> Result<()> {
        std::fs::rename(&self.temporary, &self.path)?;
        File::open(folder(&self.path))?.sync_all()
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // It is gone if it was put into place.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// What a rename would find out only at the end.
fn may_be_replaced(path: &Path) -> Result<()> {
    let Ok(found) = statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) else { return Ok(()) };
    if found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
        return Err(Error::new(ErrorKind::PermissionDenied, "it is marked as not to be replaced (chattr)"));
    }
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::Directory => Err(ErrorKind::IsADirectory.into()),
        _ => Ok(()),
    }
}

fn write_new(path: &Path, temporary: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create_new(temporary)?;
    if let Ok(meta) = path.metadata() {
        file.set_permissions(PermissionsExt::from_mode(meta.permissions().mode() & 0o7777))?;
    }
    file.write_all(bytes)?;
    file.sync_all()
}

/// Removes a file, durably. One that is gone already is no failure.
pub fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| File::open(folder(path))?.sync_all()),
    }
}

fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/file");
        replace_file(&path, b"one").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        replace_file(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        drop(Replacement::prepare(&path, b"three").unwrap());
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert!(replace_file(&folder.path().join("new"), b"a folder is there").is_err());
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }
}
