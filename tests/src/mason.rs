//! The program `mason` in a process of its own, with folders of its own.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// How long any start or stop may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

/// `mason run` with one export; killed when dropped.
pub struct Mason {
    child: Child,
    lines: Receiver<String>,
    uri: String,
    ready_after: Duration,
}

/// How a [`Mason`] is started.
pub struct Start<'a> {
    /// Holds its state, its sockets and its home.
    pub home: &'a Path,
    /// The program, where it is not the one that was built.
    pub program: Option<&'a Path>,
    /// A user and group other than the test's own.
    pub user: Option<u32>,
    /// Whether there is an XDG_RUNTIME_DIR.
    pub runtime_dir: bool,
    /// Takes what it says on standard error, anew; else that is the test's own.
    pub log: Option<&'a Path>,
}

impl<'a> Start<'a> {
    /// The built program, as the test's own user, with everything below `home`.
    pub fn new(home: &'a Path) -> Start<'a> {
        Start { home, program: None, user: None, runtime_dir: true, log: None }
    }

    /// Runs `mason run` and waits until its export is ready.
    pub fn run(&self, args: &[impl AsRef<OsStr>]) -> Mason {
        let begun = now();
        let mut command = Command::new(self.program.map_or_else(program, Path::to_owned));
        command.arg("run").args(args).current_dir(self.home);
        command.env("HOME", self.home).env_remove("XDG_STATE_HOME").env_remove("XDG_RUNTIME_DIR");
        if self.runtime_dir {
            command.env("XDG_STATE_HOME", self.home.join("state")).env("XDG_RUNTIME_DIR", self.home);
        }
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        if let Some(log) = self.log {
            command.stderr(std::fs::File::create(log).unwrap());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("mason cannot be started: {error}"));
        let lines = lines_of(child.stdout.take().unwrap());
        let mut mason = Mason { child, lines, uri: String::new(), ready_after: Duration::ZERO };
        let line = mason.line();
        mason.ready_after = begun.elapsed();
        let words: Vec<_> = line.split(' ').collect();
        let ["ready", _, uri] = words[..] else { panic!("expected `ready ELEMENT URI`, found `{line}`") };
        mason.uri = uri.to_owned();
        mason
    }
}

impl Mason {
    /// The next line of its standard output; panics when there is none in time.
    pub fn line(&mut self) -> String {
        self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            panic!(
                "mason said nothing more; it {}",
                match self.child.try_wait().unwrap() {
                    Some(status) => format!("has ended with {status}"),
                    None => "is still there".to_owned(),
                }
            )
        })
    }

    /// Where its export is.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The path of its export's unix socket.
    pub fn socket(&self) -> &Path {
        Path::new(self.uri.split("socket=").nth(1).unwrap())
    }

    /// From the start of the process to its `ready` line.
    pub fn ready_after(&self) -> Duration {
        self.ready_after
    }

    /// Bytes of memory that the process has now.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a crash would: with SIGKILL.
    pub fn kill(self) {
        drop(self);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Asks it to end, and waits. Returns how it ended and how long that took.
    pub fn stop(mut self) -> (ExitStatus, Duration) {
        let begun = now();
        self.signal(rustix::process::Signal::TERM);
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status, begun.elapsed());
            }
            pause(Duration::from_millis(2));
        }
        panic!("mason still runs {PATIENCE:?} after SIGTERM");
    }

    /// Waits until it has ended by itself. True if it has done so well.
    pub fn ended_well(mut self) -> bool {
        let begun = now();
        while begun.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.success();
            }
            pause(Duration::from_millis(2));
        }
        panic!("mason still runs after {PATIENCE:?}");
    }

    /// [`stop`](Self::stop), and it must have ended well.
    pub fn stop_well(self) {
        let (status, _) = self.stop();
        assert!(status.success(), "mason ended with {status} (signal {:?})", status.signal());
    }
}

impl Drop for Mason {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(stdout: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    receive
}

/// The program under test: `$MASON_BIN`, else the one built beside this test.
pub fn program() -> PathBuf {
    std::env::var_os("MASON_BIN").map_or_else(|| crate::program("mason"), PathBuf::from)
}

/// The folder of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// A graph that ships.
pub fn shipped_graph(name: &str) -> PathBuf {
    workspace().join("graphs").join(name)
}

/// The clock, for tests of processes: these run in real time.
#[allow(clippy::disallowed_methods, reason = "another process does not follow a stopped clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Waits a little for another process.
#[allow(clippy::disallowed_methods, reason = "no shard is blocked: this waits for another process")]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Asks until the answer is yes; panics with `what` when that takes too long.
pub fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let begun = now();
    while !yes() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        pause(Duration::from_millis(5));
    }
}
