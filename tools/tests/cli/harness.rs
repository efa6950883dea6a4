//! A home of its own for each test, and daemons that end with it.

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// The program under test.
pub(crate) const MASON: &str = env!("CARGO_BIN_EXE_mason");

/// A process that takes longer than this hangs, and is killed.
const PATIENCE: Duration = Duration::from_secs(60);

/// The repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A folder that stands for a user's home.
pub(crate) struct Home(tempfile::TempDir);

impl Home {
    pub(crate) fn new() -> Home {
        Home(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `mason` with these arguments, in this home.
    pub(crate) fn command(&self, program: impl AsRef<Path>, args: &[&str]) -> Command {
        let mut command = Command::new(program.as_ref());
        command
            .args(args)
            .current_dir(self.0.path())
            .env_clear()
            .env("HOME", self.0.path())
            .env("XDG_RUNTIME_DIR", self.0.path())
            .env("XDG_STATE_HOME", self.path("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `mason` to its end.
    pub(crate) fn mason(&self, args: &[&str]) -> Ended {
        Ended::of(self.command(MASON, args).output().unwrap())
    }

    /// Starts `mason run` with these arguments and waits until `exports` exports are ready.
    pub(crate) fn run(&self, args: &[&str], exports: usize) -> Daemon {
        let args = [&["run"], args].concat();
        Daemon::start(&mut self.command(MASON, &args), exports)
    }

    /// One HTTP request to a socket, and the whole answer. The first line of a stream is an answer, too.
    pub(crate) fn ask(&self, socket: &str, method: &str, path: &str, body: &str) -> String {
        let mut stream = UnixStream::connect(self.path(socket)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-length: {length}");
        stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    /// `vm.mason`: a disk in memory behind `vm.nbd`.
    pub(crate) fn memory_graph(&self, name: &str) -> PathBuf {
        let graph = format!(
            "element Guest (type nbd) (listen unix:{name}.nbd)\n\
             element Disk (type mem) (size 1M)\n\
             Guest -> Disk\n"
        );
        self.file(&format!("{name}.mason"), &graph)
    }
}

/// An NBD client that reads, in the simplest form of the protocol.
pub(crate) struct NbdClient(UnixStream);

impl Home {
    /// Connects to the export of no name.
    pub(crate) fn nbd_client(&self, socket: &str) -> NbdClient {
        let mut stream = UnixStream::connect(self.path(socket)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Fixed newstyle without padding; the option that goes on with the export of no name.
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(&[b"IHAVEOPT", &1u32.to_be_bytes()[..], &0u32.to_be_bytes()].concat()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        NbdClient(stream)
    }
}

impl NbdClient {
    /// Sends a request without a payload.
    fn ask(&mut self, command: u16, offset: u64, len: u32) {
        let (flags, read) = (0u16.to_be_bytes(), command.to_be_bytes());
        let head =
            [&0x2560_9513u32.to_be_bytes()[..], &flags, &read, b"a cookie", &offset.to_be_bytes()].concat();
        self.0.write_all(&[&head[..], &len.to_be_bytes()].concat()).unwrap();
    }

    /// Reads.
    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.send(0, offset, len)?;
        let mut data = vec![0; len as usize];
        self.0.read_exact(&mut data).unwrap();
        Ok(data)
    }

    /// Sends a request without a payload, and takes the head of the reply.
    pub(crate) fn send(&mut self, command: u16, offset: u64, len: u32) -> Result<(), u32> {
        self.ask(command, offset, len);
        self.answer()
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        self.ask(1, offset, data.len() as u32);
        self.0.write_all(data).unwrap();
        self.answer()
    }

    fn answer(&mut self) -> Result<(), u32> {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        if error == 0 { Ok(()) } else { Err(error) }
    }
}

/// What a command did.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    pub(crate) fn of(output: Output) -> Ended {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// What it wrote on stdout, having done its work without a word on stderr.
    #[track_caller]
    pub(crate) fn done(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "{}", self.out);
        self.out
    }

    /// The one sentence on stderr of a command that failed.
    #[track_caller]
    pub(crate) fn failed(self) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(1), ""), "{}", self.err);
        assert_eq!(self.err.lines().count(), 1, "one sentence: {}", self.err);
        self.err
    }

    /// The first line on stderr of a command that was called in the wrong way.
    #[track_caller]
    pub(crate) fn misused(self) -> String {
        assert_eq!((self.code, self.out.as_str()), (Some(2), ""), "{}", self.err);
        self.err
    }

    /// What it wrote on stdout, as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A running `mason run`. It is killed if a test forgets it.
pub(crate) struct Daemon {
    child: Child,
    stdout: BufReader<ChildStdout>,
    /// What the ready lines said: element and URI.
    pub(crate) ready: Vec<(String, String)>,
}

impl Daemon {
    pub(crate) fn start(command: &mut Command, exports: usize) -> Daemon {
        let mut child = command.spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut ready = Vec::new();
        for _ in 0..exports {
            let mut line = String::new();
            if stdout.read_line(&mut line).unwrap() == 0 {
                panic!("it has ended: {:?}", Ended::of(child.wait_with_output().unwrap()));
            }
            let words: Vec<_> = line.split_whitespace().collect();
            assert_eq!((words.len(), words[0]), (3, "ready"), "{line}");
            ready.push((words[1].to_owned(), words[2].to_owned()));
        }
        Daemon { child, stdout, ready }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        let status = wait(&mut self.child);
        let (mut out, mut err) = (String::new(), String::new());
        self.stdout.read_to_string(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        Ended { code: status.code(), out, err }
    }

    /// Ends it with SIGTERM.
    pub(crate) fn stop(self) -> Ended {
        self.signal(Signal::TERM);
        self.end()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process that was started by hand has done when it has ended.
pub(crate) fn run_to_end(child: Child) -> Ended {
    let pid = Pid::from_child(&child);
    let (ended, watch) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    watchdog.join().unwrap();
    Ended::of(output)
}

/// Waits for a process, and kills it when that takes too long.
fn wait(child: &mut Child) -> ExitStatus {
    let pid = Pid::from_child(child);
    let (ended, watch) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let status = child.wait().unwrap();
    drop(ended);
    watchdog.join().unwrap();
    status
}
