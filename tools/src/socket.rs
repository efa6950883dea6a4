//! A unix socket at a path that exists only while somebody accepts.

use crate::failure::{Failure, Outcome};
use rustix::fs::Mode;
use rustix::io::Errno;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The name of a listening socket; gone when this is dropped, if it is still ours.
pub(crate) struct Published {
    path: PathBuf,
    identity: (u64, u64),
}

impl Published {
    /// That of a socket which another process has bound: its device and inode.
    pub(crate) fn of(path: PathBuf, identity: (u64, u64)) -> Published {
        Published { path, identity }
    }

    /// The path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Device and inode of the socket.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

/// Binds a socket under another name, mode 0600, and renames it: whoever sees the path can connect. A
/// socket that nobody accepts on any more is replaced.
pub(crate) fn publish(path: &Path) -> Outcome<(UnixListener, Published)> {
    let refused = |what: String| Failure::new(format!("{}: {what}", path.display()));
    let cannot = |error: std::io::Error| refused(format!("the control socket cannot be made: {error}"));
    match path.symlink_metadata() {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(refused("there is something else than a socket".to_owned()));
        }
        Ok(_) if is_served(path).map_err(cannot)? => {
            return Err(refused("another process serves this control socket".to_owned()));
        }
        Ok(_) => tracing::info!("{}: a socket that nobody served is replaced", path.display()),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(cannot(error)),
    }
    let name = path.file_name().ok_or_else(|| refused("it names no file".to_owned()))?;
    let hidden = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    // What a process of the same number left behind.
    let _ = std::fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden).map_err(cannot)?;
    let named = rustix::fs::chmod(&hidden, Mode::from_raw_mode(0o600))
        .map_err(std::io::Error::from)
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| hidden.symlink_metadata())
        .and_then(|meta| std::fs::rename(&hidden, path).map(|()| (meta.dev(), meta.ino())));
    match named {
        Ok(identity) => Ok((listener, Published { path: path.to_owned(), identity })),
        Err(error) => {
            let _ = std::fs::remove_file(&hidden);
            Err(cannot(error))
        }
    }
}

/// True if somebody accepts on a socket. Never waits, not even where the queue of connections is full.
pub(crate) fn is_served(path: &Path) -> std::io::Result<bool> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        let ours = |meta: &std::fs::Metadata| (meta.dev(), meta.ino()) == self.identity;
        if self.path.symlink_metadata().is_ok_and(|meta| ours(&meta)) {
            // Nobody is left to be told.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (listener, published) = publish(&path).unwrap_or_else(|_| panic!("stale"));
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert!(publish(&path).is_err(), "live");
        drop((listener, published));
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        std::fs::write(&path, "a file").unwrap();
        assert!(publish(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        let (_listener, published) = publish(&path).unwrap_or_else(|_| panic!("free"));
        std::fs::remove_file(&path).unwrap();
        let _another = UnixListener::bind(&path).unwrap();
        drop(published);
        assert!(path.exists());
    }
}
