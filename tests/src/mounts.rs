//! Served disks as block devices of this machine, and file systems on them. Needs root, `/dev/fuse` and
//! loop devices. Everything is taken down again when dropped, in a panic too.

use crate::client;
use crate::mason::until;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Why there can be no mounts here; None if there can.
pub fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        Some("mounts need root")
    } else if !Path::new("/dev/fuse").exists() {
        Some("there is no /dev/fuse")
    } else if !Path::new("/dev/loop-control").exists() {
        Some("there are no loop devices")
    } else {
        None
    }
}

/// True if the test cannot run here, which it says; where nothing may be skipped it panics instead.
pub fn skipped(reason: Option<&str>) -> bool {
    let Some(reason) = reason else { return false };
    assert!(std::env::var_os("MASON_TESTS_NO_SKIP").is_none(), "nothing may be skipped here, but {reason}");
    eprintln!("\n*** SKIPPED: {reason}\n");
    true
}

/// A served disk as a loop device, by way of nbdfuse.
pub struct Device {
    /// `/dev/loopN`.
    pub path: String,
    folder: PathBuf,
    fuse: Child,
}

impl Device {
    /// Attaches the disk of that URI. `folder` is made, and holds the mount of nbdfuse.
    pub fn attach(uri: &str, folder: &Path) -> Device {
        fs::create_dir_all(folder).unwrap();
        let file = folder.join("disk");
        let mut fuse = Command::new("nbdfuse");
        fuse.arg(&file).arg(uri).stdin(Stdio::null());
        let fuse = fuse.spawn().unwrap_or_else(|error| panic!("nbdfuse cannot be started: {error}"));
        let mut device = Device { path: String::new(), folder: folder.to_owned(), fuse };
        until("nbdfuse mounts", || {
            assert!(device.fuse.try_wait().unwrap().is_none(), "nbdfuse has ended");
            file.exists()
        });
        device.path = client("losetup", &["--find", "--show", file.to_str().unwrap()]).trim().to_owned();
        device
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.path.is_empty() {
            quietly("losetup", &["--detach", &self.path]);
        }
        quietly("umount", &[self.folder.to_str().unwrap_or_default()]);
        // It ends by itself once it is unmounted; if that failed it must not outlive the test.
        if !std::thread::panicking() && self.fuse.wait().is_ok() {
            return;
        }
        let _ = self.fuse.kill();
        let _ = self.fuse.wait();
    }
}

/// A mounted file system.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Mounts a device on a folder, which is made.
    pub fn new(device: &Device, folder: &Path, options: &str) -> Mounted {
        fs::create_dir_all(folder).unwrap();
        client("mount", &["-o", options, &device.path, folder.to_str().unwrap()]);
        Mounted(folder.to_owned())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Unmounts it; everything has been written then.
    pub fn unmount(self) {
        client("umount", &[self.0.to_str().unwrap()]);
        std::mem::forget(self);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        quietly("umount", &["--lazy", self.0.to_str().unwrap_or_default()]);
    }
}

/// A small file system in memory.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Mounts one with room for so many bytes. Needs root.
    pub fn mount(folder: &Path, bytes: u64) -> Tmpfs {
        let options = format!("size={bytes}");
        client("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", folder.to_str().unwrap()]);
        Tmpfs(folder.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        quietly("umount", &["--lazy", self.0.to_str().unwrap_or_default()]);
    }
}

fn quietly(program: &str, args: &[&str]) {
    // Called on the way out, where there is nobody left to tell.
    let _ = Command::new(program).args(args).stdin(Stdio::null()).stderr(Stdio::null()).status();
}

/// Copies a tree of folders and plain files.
pub fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy_tree(&entry.path(), &target),
            kind if kind.is_file() => drop(fs::copy(entry.path(), &target).unwrap()),
            _ => {}
        }
    }
}

/// Every file of a tree with its SHA-256, as `sha256sum` prints them, sorted by name.
pub fn checksums(tree: &Path) -> Vec<String> {
    let script = "cd \"$0\" && find . -type f -print0 | xargs -0 sha256sum | sort -k2";
    let listed = client("sh", &["-ec", script, tree.to_str().unwrap()]);
    listed.lines().map(str::to_owned).collect()
}
