//! A vhost-user-blk export, seen from a front-end of our own. With `VHOST_TESTS_PEER=qemu` the tests that know no
//! other than the specification's words run against qemu-storage-daemon instead, which shows what they ask of others.
#![allow(clippy::unwrap_used, reason = "tests panic")]

mod crash;
mod handover;
mod hostile_channel;
mod hostile_logs;
mod hostile_memory;
mod hostile_messages;
mod hostile_rings;
mod killpoints;
mod libblkio;
mod protocol;
mod spec;
mod terms;
mod two;

use blockmason_tests::mason::{Mason, Start, until};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Whether another server is tested than ours.
fn is_peer() -> bool {
    std::env::var_os("VHOST_TESTS_PEER").is_some()
}

/// A daemon with one export, `vm.sock`, that dies and is started again over the same image.
struct Daemon {
    home: tempfile::TempDir,
    running: Option<Running>,
    /// How long its idle queues look for requests.
    poll: &'static str,
}

enum Running {
    Mason(Mason),
    Peer(Child),
}

/// What lies below the export, the bytes of an image `disk.img` in the daemon's folder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sink {
    Null(u64),
    File(u64),
    Direct(u64),
    /// A file, and `requests.log` says what reaches it.
    Logged(u64),
}

const LOGGED: &str = "element Log (type debug_log) (logfile requests.log)\nGuest -> Log -> Disk";

impl Daemon {
    /// A daemon that runs.
    fn started(sink: Sink, queues: usize) -> Daemon {
        let mut daemon = Daemon::new();
        daemon.start(sink, queues);
        daemon
    }

    /// A folder for a daemon.
    fn new() -> Daemon {
        Daemon { home: tempfile::tempdir().unwrap(), running: None, poll: "0s" }
    }

    /// Starts it, for the first time or again.
    fn start(&mut self, sink: Sink, queues: usize) {
        assert!(self.running.is_none());
        self.running = Some(if is_peer() { self.peer(sink, queues) } else { self.mason(sink, queues) });
    }

    fn mason(&self, sink: Sink, queues: usize) -> Running {
        let disk = match sink {
            Sink::Null(size) => format!("(type null) (size {size})"),
            Sink::File(size) | Sink::Logged(size) => format!("(type file) (path disk.img) (size {size})"),
            Sink::Direct(size) => format!("(type file) (path disk.img) (size {size}) (direct yes)"),
        };
        self.run(&format!(
            "element Guest (type vhost_user_blk) (listen unix:vm.sock) (queues {queues}) (poll {})\n\
             element Disk {disk}\n{}\n",
            self.poll,
            if matches!(sink, Sink::Logged(_)) { LOGGED } else { "Guest -> Disk" }
        ))
    }

    /// Starts `mason` on a graph.
    fn run(&self, graph: &str) -> Running {
        std::fs::write(self.home.path().join("vm.mason"), graph).unwrap();
        let log = self.home.path().join("log");
        let start = Start { log: Some(&log), ..Start::new(self.home.path()) };
        Running::Mason(start.run(&["vm.mason", "--state", "state", "--control", "c.sock"]))
    }

    fn peer(&self, sink: Sink, queues: usize) -> Running {
        let image = self.home.path().join("disk.img");
        let disk = match sink {
            Sink::Null(size) => format!("driver=null-co,node-name=d,size={size},read-zeroes=on"),
            Sink::File(size) | Sink::Direct(size) | Sink::Logged(size) => {
                let file = std::fs::OpenOptions::new().create(true).append(true).open(&image).unwrap();
                file.set_len(size).unwrap();
                let direct = if matches!(sink, Sink::Direct(_)) { "on" } else { "off" };
                format!(
                    "driver=file,node-name=d,discard=unmap,filename={},cache.direct={direct}",
                    image.display()
                )
            }
        };
        let socket = self.socket();
        // A dead process has left it behind.
        let _ = std::fs::remove_file(&socket);
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=d,writable=on,num-queues={queues},addr.type=unix,addr.path={}",
            socket.display()
        );
        let log = std::fs::File::create(self.home.path().join("log")).unwrap();
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &disk, "--export", &export]);
        let child = command.stdin(Stdio::null()).stderr(log).spawn().unwrap();
        // The socket is there before it listens.
        until("the peer listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        Running::Peer(child)
    }

    /// Ends it with SIGKILL.
    fn kill(&mut self) {
        match self.running.take().unwrap() {
            Running::Mason(mason) => mason.kill(),
            Running::Peer(mut child) => {
                child.kill().unwrap();
                child.wait().unwrap();
            }
        }
    }

    /// Ends it with SIGTERM, and sees that it ends well.
    fn stop(&mut self) {
        match self.running.take().unwrap() {
            Running::Mason(mason) => mason.stop_well(),
            Running::Peer(_) => unreachable!("only ours is stopped"),
        }
    }

    /// The export's socket.
    fn socket(&self) -> PathBuf {
        self.home.path().join("vm.sock")
    }

    /// Its process number.
    fn pid(&self) -> u32 {
        match self.running.as_ref().unwrap() {
            Running::Mason(mason) => mason.pid(),
            Running::Peer(child) => child.id(),
        }
    }

    /// The image.
    fn image(&self) -> Vec<u8> {
        std::fs::read(self.home.path().join("disk.img")).unwrap()
    }

    /// What it has said on standard error since it was started.
    fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("log")).unwrap()
    }

    /// Descriptors that it has open.
    fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Whether the process is there, and no zombie.
    fn is_alive(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X']) && !rest.is_empty())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(log) = std::fs::read_to_string(self.home.path().join("log"))
        {
            eprintln!("the daemon said:\n{log}");
        }
        if let Some(Running::Peer(mut child)) = self.running.take() {
            // It may have ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A socket in a folder.
fn socket_in(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}
