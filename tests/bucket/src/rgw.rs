//! Ceph's RGW, with one monitor, one manager and one OSD whose objects are in memory. It takes seconds and half a GB.

use std::fmt::Write;
use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const PROGRAMS: [&str; 7] =
    ["monmaptool", "ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "radosgw", "radosgw-admin"];
const ACCESS: &str = "mason";
const SECRET: &str = "mason-secret";
/// There is one cluster in a folder, so these may be the same for all.
const CLUSTER: &str = "7c1b4f2e-5a0d-4c55-9d1e-6f0c8a3b2d10";
const OSD_PROGRAM: &str = "ceph-osd";
const GATEWAY: &str = "radosgw";
const OSD: &str = "0f6f0c1e-93a4-4a0e-8a53-2b9d3e7c4f21";

/// How long all of it may take to start: a few seconds, but on a machine with other things to do.
const STARTING: Duration = Duration::from_secs(70);
/// How often it is started. A daemon may find that somebody has taken its port meanwhile, and all others wait for it.
const ATTEMPTS: u32 = 3;

/// A running RGW. Its processes are ended when it is dropped, and its objects are gone.
pub struct Rgw {
    folder: PathBuf,
    port: u16,
    daemons: Vec<Daemon>,
    /// When what is going on must be over.
    deadline: Instant,
}

/// A process that runs until it is ended.
struct Daemon {
    program: &'static str,
    args: [&'static str; 2],
    child: Child,
    starts: u32,
}

impl Rgw {
    /// Starts it with everything in `folder`, which must be empty, and waits until it answers. None when its programs
    /// are not installed, after saying so; panics instead where `MASON_TESTS_NO_SKIP` is set.
    pub fn start(folder: &Path) -> Option<Rgw> {
        let missing: Vec<_> = PROGRAMS.into_iter().filter(|program| !installed(program)).collect();
        if !missing.is_empty() {
            let forbidden = std::env::var_os("MASON_TESTS_NO_SKIP").is_some_and(|value| value == "1");
            assert!(!forbidden, "there is no {}", missing.join(", no "));
            eprintln!("skipped: there is no {}", missing.join(", no "));
            return None;
        }
        for attempt in 1..=ATTEMPTS {
            let begun = now();
            match Rgw::attempt(folder.join(attempt.to_string())) {
                Ok(rgw) => {
                    eprintln!("RGW answers after {:.1?}", begun.elapsed());
                    return Some(rgw);
                }
                Err(trouble) => eprintln!("RGW, attempt {attempt}: {trouble}"),
            }
        }
        panic!("RGW does not start");
    }

    fn attempt(folder: PathBuf) -> Result<Rgw, String> {
        let [monitor, port] = free_ports();
        configure(&folder, monitor, port);
        let mut rgw = Rgw { folder, port, daemons: Vec::new(), deadline: now() + STARTING };
        rgw.begin(monitor).map_err(|trouble| format!("{trouble}{}", last_words(&rgw.folder)))?;
        Ok(rgw)
    }

    fn begin(&mut self, monitor: u16) -> Result<(), String> {
        let address = format!("[v1:127.0.0.1:{monitor}]");
        self.run("monmaptool", &["--create", "--fsid", CLUSTER, "--addv", "a", &address, "monmap"])?;
        self.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", "monmap"])?;
        self.spawn("ceph-mon", ["-i", "a"]);
        self.spawn("ceph-mgr", ["-i", "x"]);
        // Waits for the monitor.
        self.run("ceph", &["osd", "new", OSD])?;
        self.run("ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", OSD])?;
        self.spawn(OSD_PROGRAM, ["-i", "0"]);
        self.spawn(GATEWAY, ["-n", "client.rgw"]);
        self.wait()?;
        let keys = [format!("--access-key={ACCESS}"), format!("--secret-key={SECRET}")];
        let user = ["user", "create", "--uid=mason", "--display-name=mason", &keys[0], &keys[1]];
        self.run("radosgw-admin", &user)
    }

    /// Where it is, as a URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The access key of its user.
    pub fn access(&self) -> &str {
        ACCESS
    }

    /// The secret of that key.
    pub fn secret(&self) -> &str {
        SECRET
    }

    /// Kills the gateway alone, in the midst of whatever it does, and starts it again. The objects stay.
    pub fn restart_radosgw(&mut self) {
        self.deadline = now() + STARTING;
        let gateway = self.daemons.iter_mut().find(|daemon| daemon.program == GATEWAY).unwrap();
        end(&mut gateway.child);
        gateway.start(&self.folder);
        if let Err(trouble) = self.wait() {
            panic!("RGW: {trouble}{}", last_words(&self.folder));
        }
    }

    /// Until the gateway takes connections. It does when everything behind it works.
    fn wait(&mut self) -> Result<(), String> {
        self.until(GATEWAY, |port| TcpStream::connect(("127.0.0.1", port)).ok().map(drop))
    }

    /// Runs a program to its end, which must be a good one.
    fn run(&mut self, program: &str, args: &[&str]) -> Result<(), String> {
        let (name, out) = (format!("{program} {}", args[0]), log(&self.folder, &format!("{program}.run")));
        let mut child = command(&self.folder, program, args, out).spawn().unwrap();
        let done = self.until(&name, |_| ended(&mut child)).and_then(|status| match status.success() {
            true => Ok(()),
            false => Err(format!("{name} has ended: {status}")),
        });
        end(&mut child);
        done
    }

    /// Asks until there is an answer, a daemon has ended or it is too late.
    #[allow(clippy::disallowed_methods, reason = "servers of a test run in real time, beside its thread")]
    fn until<T>(&mut self, what: &str, mut answer: impl FnMut(u16) -> Option<T>) -> Result<T, String> {
        loop {
            if let Some(answer) = answer(self.port) {
                return Ok(answer);
            }
            self.trouble()?;
            if now() > self.deadline {
                return Err(format!("{what}: not after {STARTING:?}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Which daemon has ended, if one has.
    fn trouble(&mut self) -> Result<(), String> {
        for daemon in &mut self.daemons {
            let Some(status) = ended(&mut daemon.child) else { continue };
            // An OSD may ask its monitor something before it has been told the cluster's identity, is refused with
            // `wrong fsid`, and ends: elsewhere a service manager starts it again.
            if daemon.program != OSD_PROGRAM || daemon.starts == 10 {
                return Err(format!("{} has ended: {status}", daemon.program));
            }
            daemon.start(&self.folder);
        }
        Ok(())
    }

    fn spawn(&mut self, program: &'static str, args: [&'static str; 2]) {
        let child = spawn(&self.folder, program, args);
        self.daemons.push(Daemon { program, args, child, starts: 1 });
    }
}

impl Daemon {
    fn start(&mut self, folder: &Path) {
        self.child = spawn(folder, self.program, self.args);
        self.starts += 1;
    }
}

impl Drop for Rgw {
    fn drop(&mut self) {
        self.daemons.iter_mut().rev().for_each(|daemon| end(&mut daemon.child));
    }
}

#[allow(clippy::disallowed_methods, reason = "servers of a test run in real time, beside its thread")]
fn now() -> Instant {
    Instant::now()
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    let _ = child.kill();
    let _ = child.wait();
}

/// How it ended, if it has.
fn ended(child: &mut Child) -> Option<ExitStatus> {
    child.try_wait().unwrap()
}

fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// Ports that nobody has now. They are below those that the kernel gives to connections: one of these could be the other end
/// of somebody's connection before the server is there, or, on one machine, of its own.
fn free_ports<const N: usize>() -> [u16; N] {
    let begin = 10_000 + (std::process::id() as u16 % 2_000) * 10;
    let mut ports = (begin..32_000).chain(10_000..begin);
    let listeners =
        [(); N].map(|()| ports.find_map(|port| TcpListener::bind(("127.0.0.1", port)).ok()).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// The ends of what the daemons have written, which are gone with the folder.
fn last_words(folder: &Path) -> String {
    let mut words = String::new();
    for entry in std::fs::read_dir(folder.join("log")).unwrap() {
        let entry = entry.unwrap();
        let text = String::from_utf8_lossy(&std::fs::read(entry.path()).unwrap()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let _ = write!(words, "\n-- {}", entry.file_name().to_string_lossy());
        lines.iter().skip(lines.len().saturating_sub(25)).for_each(|line| {
            let _ = write!(words, "\n{line}");
        });
    }
    words
}

fn configure(folder: &Path, monitor: u16, port: u16) {
    for name in ["mon", "mgr", "osd", "rgw", "log"] {
        std::fs::create_dir_all(folder.join(name)).unwrap();
    }
    let text = include_str!("ceph.conf")
        .replace("FOLDER", folder.to_str().unwrap())
        .replace("CLUSTER", CLUSTER)
        .replace("MONITOR", &monitor.to_string())
        .replace("PORT", &port.to_string());
    std::fs::write(folder.join("ceph.conf"), text).unwrap();
}

/// A new file for what a program writes.
fn log(folder: &Path, name: &str) -> File {
    File::create(folder.join("log").join(name)).unwrap()
}

fn command(folder: &Path, program: &str, args: &[&str], out: File) -> Command {
    let mut command = Command::new(program);
    command.arg("-c").arg(folder.join("ceph.conf")).args(args).current_dir(folder);
    command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
    command
}

/// Starts a daemon as a child, so that it cannot outlive its group, nor be mistaken for another by its number.
fn spawn(folder: &Path, program: &str, args: [&str; 2]) -> Child {
    let out = log(folder, &format!("{program}.out"));
    command(folder, program, &args, out).arg("-f").spawn().unwrap()
}
