//! Ceph's RGW, with one monitor, one manager and one OSD whose objects are in memory. It takes seconds and half a GB.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::File;
use std::iter;
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
/// The place of the OSD among the daemons.
const OSD_DAEMON: usize = 2;
const OSD: &str = "0f6f0c1e-93a4-4a0e-8a53-2b9d3e7c4f21";

/// How long all of it may take to start: a few seconds, but on a machine with other things to do.
const STARTING: Duration = Duration::from_secs(180);

/// A running RGW. Its processes are ended when it is dropped, and its objects are gone.
pub struct Rgw {
    folder: PathBuf,
    port: u16,
    gateway: Child,
    /// Monitor, manager, OSD.
    cluster: [Child; 3],
    osd_starts: u32,
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
        let [monitor, port] = free_ports();
        configure(folder, monitor, port);
        let cluster = start_cluster(folder, monitor);
        let gateway = start_gateway(folder);
        let mut rgw = Rgw { folder: folder.to_owned(), port, gateway, cluster, osd_starts: 1 };
        rgw.wait();
        let keys = [format!("--access-key={ACCESS}"), format!("--secret-key={SECRET}")];
        rgw.admin(&["user", "create", "--uid=mason", "--display-name=mason", &keys[0], &keys[1]]);
        Some(rgw)
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
        end(&mut self.gateway);
        self.gateway = start_gateway(&self.folder);
        self.wait();
    }

    /// Until the gateway takes connections. It does when everything behind it works.
    #[allow(clippy::disallowed_methods, reason = "servers of a test run in real time, beside its thread")]
    fn wait(&mut self) {
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let trouble = self.trouble();
            let late = (begun.elapsed() > STARTING).then(|| format!("not after {STARTING:?}"));
            if let Some(trouble) = trouble.or(late) {
                panic!("RGW: {trouble}{}", last_words(&self.folder));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Which daemon has ended, if one has.
    fn trouble(&mut self) -> Option<String> {
        // An OSD may ask its monitor something before it has been told the cluster's identity, is refused with `wrong fsid`,
        // and ends: elsewhere a service manager starts it again.
        if ended(&mut self.cluster[OSD_DAEMON]).is_some() && self.osd_starts < 10 {
            self.osd_starts += 1;
            self.cluster[OSD_DAEMON] = start_osd(&self.folder);
        }
        let daemons = iter::once(&mut self.gateway).chain(&mut self.cluster);
        let mut named = ["radosgw", "ceph-mon", "ceph-mgr", "ceph-osd"].into_iter().zip(daemons);
        named.find_map(|(program, child)| Some(format!("{program} has ended: {}", ended(child)?)))
    }

    fn admin(&self, args: &[&str]) {
        run(&self.folder, "radosgw-admin", args);
    }
}

impl Drop for Rgw {
    fn drop(&mut self) {
        end(&mut self.gateway);
        self.cluster.iter_mut().rev().for_each(end);
    }
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

fn start_cluster(folder: &Path, monitor: u16) -> [Child; 3] {
    let map = folder.join("monmap");
    let map = map.to_str().unwrap();
    let address = format!("[v1:127.0.0.1:{monitor}]");
    run(folder, "monmaptool", &["--create", "--fsid", CLUSTER, "--addv", "a", &address, map]);
    run(folder, "ceph-mon", &["--mkfs", "-i", "a", "--monmap", map]);
    let monitor = spawn(folder, "ceph-mon", &["-i", "a"]);
    let manager = spawn(folder, "ceph-mgr", &["-i", "x"]);
    // Waits for the monitor.
    run(folder, "ceph", &["osd", "new", OSD]);
    run(folder, "ceph-osd", &["-i", "0", "--mkfs", "--osd-uuid", OSD]);
    [monitor, manager, start_osd(folder)]
}

fn start_osd(folder: &Path) -> Child {
    spawn(folder, "ceph-osd", &["-i", "0"])
}

fn start_gateway(folder: &Path) -> Child {
    spawn(folder, "radosgw", &["-n", "client.rgw"])
}

fn command(folder: &Path, program: &str, args: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(program);
    command.arg("-c").arg(folder.join("ceph.conf")).args(args).current_dir(folder).stdin(Stdio::null());
    command
}

/// Runs a program to its end, which must be a good one.
fn run(folder: &Path, program: &str, args: &[&str]) {
    let output = command(folder, program, args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} has ended with {}: {said}", output.status);
}

/// Starts a daemon as a child, so that it cannot outlive its group, nor be mistaken for another by its number.
fn spawn(folder: &Path, program: &str, args: &[&str]) -> Child {
    let log = File::create(folder.join("log").join(format!("{program}.out"))).unwrap();
    let mut command = command(folder, program, args);
    command.arg("-f").stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}
