//! Sockets of exports in the file system: who may use them, making them, and taking them away.

use blockmason::{Errno, Error, Kind, Result};
use std::fmt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Permission bits, octal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode(u32);

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Mode, String> {
        match u32::from_str_radix(text, 8) {
            Ok(mode) if mode <= 0o777 => Ok(Mode(mode)),
            _ => Err(format!("expected permission bits such as `0660`, found `{text}`")),
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

blockmason::text_value!(Mode, "octal permission bits");

/// Who may use a socket in the file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SocketRights {
    /// Permission bits; the umask decides if there are none.
    pub mode: Option<u32>,
    /// User id of the owner.
    pub owner: Option<u32>,
    /// Group id.
    pub group: Option<u32>,
}

/// Owner and group by name or number.
///
/// # Errors
/// There is no such user or group.
pub(super) fn rights(mode: Option<Mode>, owner: Option<&str>, group: Option<&str>) -> Result<SocketRights> {
    Ok(SocketRights {
        mode: mode.map(|mode| mode.0),
        owner: owner.map(|name| id("/etc/passwd", name)).transpose()?,
        group: group.map(|name| id("/etc/group", name)).transpose()?,
    })
}

/// The number of a user or group, from a file of names.
fn id(table: &str, name: &str) -> Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let text = std::fs::read_to_string(table)
        .map_err(|error| Error::io(error, "names cannot be looked up").with_path(table))?;
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.ok_or_else(|| Error::invalid(format!("there is no {name:?}")).with_path(table))
}

/// Bytes that the kernel has room for.
const LONGEST_PATH: usize = 107;

/// What a process that goes on with a socket knows it by.
pub(crate) fn key(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    format!("unix:{}", path.display())
}

/// A path that leads to a socket of ours.
pub(crate) struct Bound {
    path: PathBuf,
    /// Device and inode, by which it is known to be ours still.
    inode: (u64, u64),
}

impl Bound {
    /// The one that is there now.
    pub(crate) fn at(path: &Path) -> Option<Bound> {
        let meta = std::fs::symlink_metadata(path).ok()?;
        Some(Bound { path: path.to_owned(), inode: (meta.dev(), meta.ino()) })
    }

    /// Takes it away, unless somebody else has put theirs there meanwhile.
    pub(crate) fn remove(&self) {
        if Bound::at(&self.path).is_some_and(|there| there.inode == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

pub(crate) fn nonblocking(result: std::io::Result<()>) -> Result<()> {
    result.map_err(|error| Error::io(error, "the socket cannot be made non-blocking"))
}

/// A socket appears under its path only when it accepts: it is bound under another name and renamed.
pub(crate) fn open_unix(path: &Path, rights: &SocketRights) -> Result<UnixListener> {
    let refused = |error: std::io::Error, what: &'static str| Error::io(error, what).with_path(path);
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(Error::new(Kind::Busy, "it exists and is no socket").with_path(path));
        }
        Ok(_) => match probe(path) {
            // A full backlog is one that somebody has opened.
            Ok(()) | Err(Errno::AGAIN) => {
                return Err(Error::new(Kind::Busy, "another process serves this socket").with_path(path));
            }
            Err(Errno::ACCESS | Errno::PERM) => {
                return Err(refused(Errno::ACCESS.into(), "it is a socket that belongs to somebody else"));
            }
            // A dead process has left it behind.
            Err(_) => tracing::info!("replacing the stale socket {}", path.display()),
        },
        Err(_) => {}
    }
    let mut hidden = path.as_os_str().to_owned();
    hidden.push(format!(".{}", std::process::id()));
    let hidden = PathBuf::from(hidden);
    let _ = std::fs::remove_file(&hidden);
    if hidden.as_os_str().len() > LONGEST_PATH {
        let most = LONGEST_PATH - (hidden.as_os_str().len() - path.as_os_str().len());
        return Err(Error::invalid(format!("the path of a socket has at most {most} bytes")).with_path(path));
    }
    if path.parent().is_some_and(|folder| !folder.as_os_str().is_empty() && !folder.exists()) {
        return Err(Error::new(Kind::Unavailable, "its folder does not exist").with_path(path));
    }
    let made = (|| {
        let listener =
            UnixListener::bind(&hidden).map_err(|error| refused(error, "the socket cannot be made"))?;
        grant(&hidden, rights).map_err(|error| refused(error, "its mode or owner cannot be set"))?;
        nonblocking(listener.set_nonblocking(true))?;
        std::fs::rename(&hidden, path).map_err(|error| refused(error, "the socket cannot take its name"))?;
        Ok(listener)
    })();
    if made.is_err() {
        let _ = std::fs::remove_file(&hidden);
    }
    made
}

/// Whether somebody listens on a socket, without waiting for them.
fn probe(path: &Path) -> Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

fn grant(path: &Path, rights: &SocketRights) -> std::io::Result<()> {
    if let Some(mode) = rights.mode {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    }
    if rights.owner.is_some() || rights.group.is_some() {
        std::os::unix::fs::chown(path, rights.owner, rights.group)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_by_name_and_number() {
        assert_eq!(id("/etc/passwd", "root").unwrap(), 0);
        assert_eq!(id("/etc/group", "1234").unwrap(), 1234);
        assert!(id("/etc/passwd", "no such user").is_err());
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!("0660".parse(), Ok(Mode(0o660)));
        assert_eq!(Mode(0o600).to_string(), "0600");
        assert!("0888".parse::<Mode>().is_err() && "1777".parse::<Mode>().is_err());
    }
}
