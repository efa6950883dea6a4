//! Other programs' NBD servers, which disks are moved and backed up to, and which may die.

use blockmason_tests::mason::until;
use rustix::process::{Pid, Signal, kill_process};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// nbdkit.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    pub(crate) fn start(folder: &Path, args: &[&str]) -> Server {
        let socket = folder.join("target.nbd");
        // That of one that was killed.
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new("nbdkit");
        command.arg("--foreground").arg("--unix").arg(&socket).args(args).current_dir(folder);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap_or_else(|error| panic!("nbdkit: {error}: tests/run installs it"));
        until("nbdkit serves", || socket.exists());
        Server { child, socket }
    }

    /// A disk in memory.
    pub(crate) fn memory(folder: &Path, size: &str) -> Server {
        Server::start(folder, &["memory", size])
    }

    /// As the target of a move. It fails soon once the server is gone; a connection without a reply yet would wait
    /// for longer, so there is only one.
    pub(crate) fn disk(&self) -> String {
        format!(
            "nbd_client (uri nbd+unix:///?socket={}) (reconnect 200ms) (connections 1)",
            self.socket.display()
        )
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn die(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
