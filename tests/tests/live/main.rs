//! Graphs that change under real clients: no request fails, nothing is lost, and what cannot be done is refused
//! while the graph before serves on.
#![allow(clippy::unwrap_used)]

mod backup;
mod backup_marks;
mod changes;
mod clients;
mod cloud;
mod cloud_crash;
mod cloud_down;
mod cloud_grow;
mod cloud_leave;
mod cloud_plain;
mod cloud_refused;
mod cloud_stale;
mod crashes;
mod handover;
mod heirs;
mod manners;
mod migrate;
mod migrate_commands;
mod migrate_crash;
mod migrate_files;
mod migrate_refused;
mod migrate_soak;
mod migrate_targets;
mod migrate_volumes;
mod refused;
mod server;
mod soak;
mod standby;
mod volumes_crash;
mod volumes_dump;
mod volumes_room;

use blockmason_tests::control::{Control, Ended, mason};
use blockmason_tests::mason::{Mason, Start};
use std::path::{Path, PathBuf};

/// A folder for graphs, images and sockets, and the daemon that is at home there.
struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Site {
        Site(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn folder(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `mason run`, with its control socket at `c.sock`.
    fn run(&self, args: &[&str]) -> Mason {
        Start::new(self.folder()).run(&[args, &["--control", "c.sock"]].concat())
    }

    /// Any other command, sent to that socket.
    fn mason(&self, args: &[&str]) -> Ended {
        mason(self.folder(), &[args, &["--control", "c.sock"]].concat())
    }

    fn control(&self) -> Control {
        Control::connect(&self.path("c.sock"))
    }
}

/// As [`Site::run`], and what it says on standard error is kept.
fn run_logged(site: &Site, args: &[&str]) -> Mason {
    let log = site.path("log");
    let start = Start { log: Some(&log), ..Start::new(site.folder()) };
    start.run(&[args, &["--control", "c.sock"]].concat())
}

/// What the last of these has said.
fn read_log(site: &Site) -> String {
    std::fs::read_to_string(site.path("log")).unwrap()
}

/// A file behind a socket, with `between` on the way.
fn graph(elements: &str, way: &str) -> String {
    format!(
        "element Guest (type nbd) (listen unix:vm.nbd)\nelement A (type file) (path a.img) (size 64M)\n\
         {elements}\n{way}\n"
    )
}

/// The plain form of it.
fn plain() -> String {
    graph("", "Guest -> A")
}

/// Blocks of the image.
const BLOCKS: u64 = 64 << 8;
