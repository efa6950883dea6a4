//! Where the texts of a graph come from.

use super::source::Sources;
use std::io;
use std::path::{Component, Path, PathBuf};

/// Largest graph file, in bytes.
pub(super) const LARGEST_FILE: usize = 4 << 20;

/// Reads graph files, so that a daemon can be sent them and a fuzzer needs none.
pub trait Files {
    /// The text of a file.
    ///
    /// # Errors
    /// As reading a file: not found, no permission, no UTF-8, larger than 4 MiB.
    fn read(&self, path: &Path) -> io::Result<String>;

    /// Two paths with one identity are one file.
    fn identity(&self, path: &Path) -> PathBuf {
        without_dots(path)
    }
}

/// The file system.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl Files for Disk {
    fn read(&self, path: &Path) -> io::Result<String> {
        use io::Read;
        let mut text = String::new();
        let file = std::fs::File::open(path)?;
        // One byte more than allowed, so that a longer file, or an endless one, is noticed.
        file.take(LARGEST_FILE as u64 + 1).read_to_string(&mut text)?;
        Ok(text)
    }

    fn identity(&self, path: &Path) -> PathBuf {
        std::fs::canonicalize(path).unwrap_or_else(|_| without_dots(path))
    }
}

/// No file can be included.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoFiles;

impl Files for NoFiles {
    fn read(&self, _path: &Path) -> io::Result<String> {
        Err(io::ErrorKind::NotFound.into())
    }
}

/// The texts of another run, by their paths: what a client read and sent is what a daemon parses.
impl Files for Sources {
    fn read(&self, path: &Path) -> io::Result<String> {
        let found = self.iter().find(|source| without_dots(source.opened()) == without_dots(path));
        found.map(|source| source.text().to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// The path with `.` and, as far as names allow, `..` resolved.
fn without_dots(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if matches!(out.components().next_back(), Some(Component::Normal(_))) => {
                out.pop();
            }
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_are_resolved() {
        assert_eq!(without_dots("a/./b/../c".as_ref()), Path::new("a/c"));
        assert_eq!(without_dots("../a/../../b".as_ref()), Path::new("../../b"));
        assert_eq!(without_dots("/x/..".as_ref()), Path::new("/"));
    }

    #[test]
    fn sources_are_found_again() {
        let mut sources = Sources::default();
        sources.add_file("x".as_ref(), "a/lib/../x.mason".into(), String::from("text"));
        assert_eq!(sources.read("a/x.mason".as_ref()).unwrap(), "text");
        assert!(sources.read("x.mason".as_ref()).is_err());
    }
}
