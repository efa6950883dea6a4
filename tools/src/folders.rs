//! Where state and sockets are kept when nobody says where.

use crate::failure::{Failure, Outcome};
use std::fs::{DirBuilder, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The folders of this user. Nothing is made before [`make_state`] or [`make_run`] is called.
#[derive(Clone)]
pub(crate) struct Folders {
    /// State that outlives the process; None if there is no home to keep it in.
    pub(crate) state: Option<PathBuf>,
    /// Sockets.
    pub(crate) run: PathBuf,
}

impl Folders {
    /// `state` where it is given, else what the XDG base directory specification says; for root the
    /// folders that the file system hierarchy has for services.
    pub(crate) fn find(state: Option<&Path>) -> Folders {
        let uid = rustix::process::geteuid();
        let state = match state {
            Some(state) => std::path::absolute(state).ok(),
            None => variable("XDG_STATE_HOME")
                .map(|home| home.join("mason"))
                .or_else(|| uid.is_root().then(|| PathBuf::from("/var/lib/mason")))
                .or_else(|| variable("HOME").map(|home| home.join(".local/state/mason"))),
        };
        // What `su` leaves behind is another user's, and not to be used.
        let ours = |folder: &PathBuf| folder.metadata().is_ok_and(|meta| meta.uid() == uid.as_raw());
        let run = match variable("XDG_RUNTIME_DIR").filter(ours) {
            Some(runtime) => runtime.join("mason"),
            None if uid.is_root() => PathBuf::from("/run/mason"),
            None => PathBuf::from(format!("/tmp/mason-{}", uid.as_raw())),
        };
        Folders { state, run }
    }
}

/// An absolute path from the environment.
fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// The current folder, where relative paths of a command line start.
///
/// # Errors
/// It is gone.
pub(crate) fn here() -> Outcome<PathBuf> {
    std::env::current_dir()
        .map_err(|error| Failure::new(format!("the current folder is not to be found: {error}")))
}

/// Makes a folder for state if it is missing, for this user alone.
pub(crate) fn make_state(folder: &Path) -> Outcome {
    make(folder).map_err(|error| {
        Failure::new(format!("{}: the state folder cannot be made: {error}", folder.display()))
    })
}

/// Makes the folder for sockets if it is missing, and makes sure that nobody else can put one there:
/// anybody may make names in `/tmp`.
pub(crate) fn make_run(folder: &Path) -> Outcome {
    let refused = |what: &dyn std::fmt::Display| Failure::new(format!("{}: {what}", folder.display()));
    make(folder).map_err(|error| refused(&format!("the folder for sockets cannot be made: {error}")))?;
    let meta = folder.symlink_metadata().map_err(|error| refused(&error))?;
    match fault(&meta) {
        None => Ok(()),
        Some(fault) => Err(refused(&format!("the folder for sockets {fault}"))),
    }
}

fn make(folder: &Path) -> std::io::Result<()> {
    match DirBuilder::new().recursive(true).mode(0o700).create(folder) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// What is wrong with a folder that only this user should have.
fn fault(meta: &Metadata) -> Option<&'static str> {
    if !meta.is_dir() {
        Some("is no folder")
    } else if meta.uid() != rustix::process::geteuid().as_raw() {
        Some("belongs to another user")
    } else if meta.mode() & 0o077 != 0 {
        Some("is open to other users: its mode must be 0700")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_for_sockets_is_private_or_refused() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("mason");
        assert!(make_run(&folder).is_ok() && make_run(&folder).is_ok());
        assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(make_run(&folder).is_err());
        let link = home.path().join("link");
        std::os::unix::fs::symlink(home.path(), &link).unwrap();
        assert!(make_run(&link).is_err());
        std::fs::write(home.path().join("file"), "").unwrap();
        assert!(make_run(&home.path().join("file")).is_err());
    }
}
