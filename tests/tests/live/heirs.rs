//! Handovers seen from elsewhere: clients that come amid one, TLS, signals, and an old process that dies or lies.

use crate::{Site, plain};
use blockmason_tests::handover::{Heir, is_running};
use blockmason_tests::mason::{pause, program, until};
use blockmason_tests::raw::Raw;
use blockmason_tests::{certificates, client, client_output};
use rustix::process::Signal;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A program at that name.
fn script(site: &Site, name: &str, text: &str) {
    let path = site.write(name, text);
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn clients_that_come_amid_a_handover() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let (stop, socket) = (AtomicBool::new(false), site.path("vm.nbd"));
    // Many that stay, and one after the other that come, read and go.
    let mut crowd: Vec<Raw> = (0..300).map(|_| Raw::ready(&socket)).collect();
    let (mut heirs, mut pauses) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let comers: Vec<_> = (0..3)
            .map(|number| {
                let (stop, socket) = (&stop, &socket);
                scope.spawn(move || {
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        let mut raw = Raw::ready(socket);
                        let data = [(count % 251) as u8; 512];
                        raw.write((number << 20) + (count % 100) * 512, &data);
                        assert_eq!(raw.read((number << 20) + (count % 100) * 512, 512), data);
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for _ in 0..10 {
            let (heir, handed) = Heir::take_over(site.folder(), &[]);
            pauses.push(handed.pause);
            heirs.push(heir);
            pause(Duration::from_millis(20));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(comers.into_iter().map(|comer| comer.join().unwrap()).sum::<u64>() > 100);
    });
    pauses.sort();
    eprintln!("300 clients: {pauses:?}");
    assert!(pauses[5] < Duration::from_millis(500), "{pauses:?}");
    for (number, raw) in crowd.iter_mut().enumerate() {
        raw.write((32 << 20) + number as u64 * 512, &[number as u8; 512]);
    }
    drop(crowd);
    assert!(daemon.ended_well());
    heirs.pop().unwrap().stop(&socket);
}

const TLS: &str = r#"
import nbd, os, subprocess
folder, program = os.environ["FOLDER"], os.environ["PROGRAM"]
def connected():
    h = nbd.NBD()
    h.set_tls(nbd.TLS_REQUIRE); h.set_tls_certificates(folder); h.set_tls_verify_peer(False)
    h.connect_unix(folder + "/vm.nbd")
    return h
h = connected()
h.pwrite(b"a" * 4096, 0)
def hand_over(*more):
    return subprocess.run([program, "handover", "--control", folder + "/c.sock", *more], capture_output=True)
# One that fails does not send it away.
assert hand_over("--binary", "/bin/false").returncode == 1
assert hand_over("--binary", folder + "/half").returncode == 1
assert h.pread(4096, 0) == b"a" * 4096
run = hand_over()
assert run.returncode == 0, run.stderr
try:
    h.pread(4096, 0)
    raise SystemExit("it is still served")
except nbd.Error: pass
h = connected()
assert h.pread(4096, 0) == b"a" * 4096
h.pwrite(b"b" * 4096, 4096)
h.shutdown()
"#;

/// Says everything up to `ready`, and ends.
const HALF: &str = r#"#!/usr/bin/python3
import json, socket, struct, sys
s = socket.socket(fileno=0)
def say(**message):
    text = json.dumps(message).encode()
    s.sendall(b"masonhnd" + struct.pack("<II", len(text), 0) + text)
def take(count):
    data = b""
    while len(data) < count: data += s.recv(count - len(data)) or sys.exit(3)
    return data
def hear(wanted):
    while True:
        length, count = struct.unpack("<II", take(16)[8:])
        message = json.loads(take(length))
        take((count + 199) // 200)
        if message["message"] == wanted: return
say(message="hello", magic="mason-handover", versions=[1], version="half")
hear("offer"); say(message="prepared"); hear("drained")
"#;

#[test]
fn a_client_with_tls_comes_again() {
    let site = Site::new();
    certificates(site.folder());
    script(&site, "half", &format!("{HALF}say(message='ready')\n"));
    let tls = "(listen unix:vm.nbd) (tls required) (tls_certificates .)";
    site.write("vm.mason", plain().replace("(listen unix:vm.nbd)", tls));
    let daemon = site.run(&["vm.mason"]);
    let shell = Command::new("/usr/bin/python3")
        .args(["-c", TLS])
        .env("FOLDER", site.folder())
        .env("PROGRAM", program())
        .output()
        .unwrap();
    assert!(shell.status.success(), "{shell:?}");
    assert!(daemon.ended_well());
    Heir::take_over(site.folder(), &[]).0.stop(&site.path("vm.nbd"));
}

#[test]
fn a_signal_that_comes_amid_a_handover() {
    // Undone: the old process ends, and takes its paths away.
    let site = Site::new();
    site.write("vm.mason", plain());
    script(&site, "hangs", &format!("{HALF}import time\nopen('here', 'w')\ntime.sleep(60)\n"));
    let daemon = site.run(&["vm.mason"]);
    std::thread::scope(|scope| {
        let failing =
            scope.spawn(|| site.mason(&["handover", "--binary", "hangs", "--deadline", "4s"]).refused());
        until("it has been told everything", || site.path("here").exists());
        daemon.signal(Signal::TERM);
        // The process may end before it has said why.
        failing.join().unwrap();
    });
    assert!(daemon.ended_well());
    assert!(!site.path("vm.nbd").exists() && !site.path("c.sock").exists());

    // Done: whoever serves is meant.
    let wrapper = format!(
        "#!/bin/sh\ntouch begun; while ! test -e go_on; do sleep 0.01; done\nexec {} \"$@\"\n",
        program().display()
    );
    script(&site, "slow", &wrapper);
    let daemon = site.run(&["vm.mason"]);
    let mut raw = Raw::ready(&site.path("vm.nbd"));
    std::thread::scope(|scope| {
        let done =
            scope.spawn(|| Heir::take_over(site.folder(), &["--binary", "slow", "--deadline", "10s"]).0);
        until("it has been started", || site.path("begun").exists());
        daemon.signal(Signal::TERM);
        site.write("go_on", "");
        let heir = done.join().unwrap();
        until("it ends, too", || !is_running(heir.pid()));
    });
    assert!(daemon.ended_well() && raw.ended());
    assert!(!site.path("vm.nbd").exists() && !site.path("c.sock").exists());
}

/// An old process: it says what its argument says, and then ends as that says.
const OLD: &str = r#"
import json, os, socket, struct, subprocess, sys, time
program, folder = os.environ["PROGRAM"], os.environ["FOLDER"]
listener = socket.socket(socket.AF_UNIX)
listener.bind(folder + "/vm.nbd"); listener.listen()
near, far = socket.socketpair()
child = subprocess.Popen([program, "run", "--inherit", "vm.mason"], stdin=far, cwd=folder,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
far.close()
open(folder + "/pid", "w").write(str(child.pid))
def say(fds=[], **message):
    text = json.dumps(message).encode()
    near.sendall(b"masonhnd" + struct.pack("<II", len(text), len(fds)) + text)
    if fds: socket.send_fds(near, [b"\0"], fds)
def take(count):
    data = b""
    while len(data) < count:
        more = near.recv(count - len(data))
        if not more: raise EOFError
        data += more
    return data
def hear():
    length, count = struct.unpack("<II", take(16)[8:])
    return json.loads(take(length))
assert hear()["message"] == "hello"
text = f"element Guest (type nbd) (listen unix:{folder}/vm.nbd) element A (type file) (path {folder}/a.img) Guest -> A"
graph = dict(name="vm", file="vm.mason", path=folder + "/vm.mason", text=text)
offer = dict(message="offer", version=1, graphs=[graph], images=[], control=None,
    sockets=[dict(address="unix:" + folder + "/vm.nbd", descriptor=0)])
def offered(**changed): say([listener.fileno()], **{**offer, **changed})
def ready():
    offered(); assert hear()["message"] == "prepared"
    say(message="drained"); assert hear()["message"] == "ready"
def refused(says):
    answer = hear()
    assert answer["message"] == "refused" and says in answer["sentence"], answer
    assert child.wait(20) == 1
    assert os.path.exists(folder + "/vm.nbd")
"#;

fn old_process(site: &Site, story: &str) -> Output {
    Command::new("/usr/bin/python3")
        .args(["-c", &format!("{OLD}{story}")])
        .env("FOLDER", site.folder())
        .env("PROGRAM", program())
        .output()
        .unwrap()
}

#[test]
fn an_old_process_that_dies_or_lies() {
    let site = Site::new();
    site.write("a.img", vec![0; 1 << 20]);
    let lies = [
        ("a text that is no graph", "offered(graphs=[{**graph, 'text': 'element'}]); refused('not good')"),
        (
            "no descriptor",
            "say(**{**offer, 'sockets': [dict(address='x', descriptor=7)]}); refused('was not handed over')",
        ),
        ("nothing", "say(message='go'); refused('offers nothing')"),
        (
            "luggage of nobody",
            "offered(); hear(); say(message='luggage', graph='vm', element='X', version=1, value={}); \
            say(message='drained'); refused('no such element')",
        ),
        (
            "luggage of another graph",
            "offered(); hear(); say(message='luggage', graph='b', element='X', version=1, \
            value={}); say(message='drained'); refused('not offered')",
        ),
        (
            "luggage of another version",
            "offered(); hear(); say(message='luggage', graph='vm', element='Guest', \
            version=9, value={}); say(message='drained'); refused('version 9')",
        ),
        (
            "a client without a socket",
            "offered(); hear(); say(message='luggage', graph='vm', element='Guest', \
            version=1, value=dict(connections=[dict(socket=0, size=1, flags=1, style='simple', contexts=[], \
            max_payload=1)])); say(message='drained'); refused('was not handed over')",
        ),
        ("an end too early", "offered(); hear(); near.close(); assert child.wait(20) == 1"),
        ("an end while it lives", "ready(); near.close(); assert child.wait(20) == 1"),
        ("something else than go", "ready(); say(message='prepared'); assert child.wait(20) == 1"),
    ];
    for (what, story) in lies {
        let _ = std::fs::remove_file(site.path("vm.nbd"));
        let output = old_process(&site, story);
        assert!(output.status.success(), "{what}: {output:?}");
        assert!(site.path("vm.nbd").exists(), "{what}: the path is the old process's");
    }
    // Before `go` nobody is accepted, and nothing is read.
    let _ = std::fs::remove_file(site.path("vm.nbd"));
    let quiet = "ready(); c = socket.socket(socket.AF_UNIX); c.connect(folder + '/vm.nbd'); c.settimeout(0.3)
try: sys.exit('it says ' + repr(c.recv(18)))
except TimeoutError: pass
say(message='go'); assert hear()['message'] == 'going'; c.settimeout(20)
assert c.recv(18).startswith(b'NBDMAGIC'); child.terminate(); assert child.wait(20) == 0
assert not os.path.exists(folder + '/vm.nbd')\n";
    let output = old_process(&site, quiet);
    assert!(output.status.success(), "{output:?}");

    // It dies when everything has been said but `go`.
    let output = old_process(&site, "ready(); os._exit(0)");
    assert!(output.status.success(), "{output:?}");
    let pid: u32 = std::fs::read_to_string(site.path("pid")).unwrap().parse().unwrap();
    let uri = format!("nbd+unix:///?socket={}", site.path("vm.nbd").display());
    let size = client("nbdinfo", &["--size", &uri]);
    let raw = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(raw, Signal::TERM).unwrap();
    until("it ends", || !is_running(pid));
    assert_eq!(size.trim(), "1048576");
    assert!(!client_output("nbdinfo", &["--size", &uri]).status.success());
}

#[test]
fn nobody_inherits_by_hand() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let ended = site.mason(&["run", "--inherit", "vm.mason"]);
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(!site.path("a.img").exists() && !site.path("vm.nbd").exists());
}
