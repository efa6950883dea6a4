//! Small files that are replaced as a whole.

use std::fs::{DirBuilder, File};
use std::io::{ErrorKind, Result, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers temporary files, since several may be written at once.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Writes a file, durably: when this returns it is there whole, and when it fails, or the process ends
/// at any moment, what was there before is. Keeps the permissions of a file that is there; makes missing
/// folders, for this user alone.
pub fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
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
    let written = write_new(path, &temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written?;
    File::open(folder)?.sync_all()
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
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
        assert!(replace_file(&folder.path().join("new"), b"a folder is there").is_err());
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
    }
}
