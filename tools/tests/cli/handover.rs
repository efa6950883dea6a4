//! `mason handover`: what it says, and what the service manager is told.

use crate::harness::{Daemon, Home, MASON};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

/// The process that has taken over; killed when this is dropped.
struct Heir(OwnedFd);

impl Heir {
    fn of(pid: i32) -> Heir {
        Heir(pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap())
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.0, Signal::KILL);
    }
}

fn file_graph(home: &Home) {
    let graph = "element Guest (type nbd) (listen unix:vm.nbd)\nelement A (type file) (path a.img) (size 1M)\nGuest -> A\n";
    home.file("vm.mason", graph);
}

#[test]
fn one_line_says_what_has_happened() {
    let home = Home::new();
    file_graph(&home);
    let daemon = home.run(&["vm.mason"], 1);
    let said = home.mason(&["handover"]).done();
    let words: Vec<_> = said.split_whitespace().collect();
    let pid = daemon.pid().to_string();
    let ["handed", "over", "from", from, "to", to, "in", _, "paused", "for", _] = words[..] else {
        panic!("{said}");
    };
    assert!(from == pid && said.ends_with('\n') && said.lines().count() == 1, "{said}");
    let first = Heir::of(to.parse().unwrap());
    let json = home.mason(&["handover", "--json"]).json();
    assert_eq!(json["from"].to_string(), to);
    let second = Heir::of(json["to"].as_i64().unwrap() as i32);
    let pause = json["pause_seconds"].as_f64().unwrap();
    assert!(pause > 0.0 && pause < json["took_seconds"].as_f64().unwrap());
    assert_eq!(home.mason(&["status", "--json"]).json()["pid"], json["to"]);
    pidfd_send_signal(&second.0, Signal::TERM).unwrap();
    // The pipes of the first process are the last one's, too.
    let ended = daemon.end();
    assert_eq!((ended.code, ended.err.as_str(), ended.out.as_str()), (Some(0), "", ""));
    drop((first, second));
    assert!(!home.path("vm.nbd").exists() && !home.path("mason/vm.sock").exists());
}

#[test]
fn what_is_refused_is_one_sentence() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let said = home.mason(&["handover"]).failed();
    assert!(said.contains("Disk (vm.mason:2:9)") && said.contains("mason replace"), "{said}");
    assert!(home.mason(&["handover", "--deadline", "soon"]).misused().contains("deadline"));
    assert!(home.mason(&["handover", "--control", "none.sock"]).failed().contains("none.sock"));
    daemon.stop().done();
}

#[test]
fn the_service_manager_is_told() {
    let home = Home::new();
    file_graph(&home);
    let manager = UnixDatagram::bind(home.path("notify.sock")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let next = || {
        let mut text = [0; 256];
        let length = manager.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..length]).trim().to_owned()
    };
    let mut command = home.command(MASON, &["run", "vm.mason"]);
    command.env("NOTIFY_SOCKET", home.path("notify.sock"));
    let daemon = Daemon::start(&mut command, 1);
    assert_eq!(next(), "READY=1");
    assert!(home.mason(&["handover", "--binary", "/bin/false"]).failed().contains("before `hello`"));
    let json = home.mason(&["handover", "--json"]).json();
    let heir = Heir::of(json["to"].as_i64().unwrap() as i32);
    assert_eq!(next(), format!("MAINPID={}", json["to"]));
    assert_eq!(next(), "READY=1");
    pidfd_send_signal(&heir.0, Signal::TERM).unwrap();
    assert_eq!(next(), "STOPPING=1");
    assert_eq!(daemon.end().code, Some(0));
}
