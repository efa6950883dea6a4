//! The control socket, and the commands that ask it.

use crate::harness::{Home, MASON};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;

#[test]
fn the_only_daemon_is_found() {
    let home = Home::new();
    home.memory_graph("vm");
    assert!(home.mason(&["status"]).failed().contains("no daemon runs"));
    let daemon = home.run(&["vm.mason"], 1);
    let status = home.mason(&["status", "--json"]).json();
    assert_eq!(status["pid"], daemon.pid());
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    let graph = &status["graphs"][0];
    assert_eq!((&graph["name"], &graph["file"]), (&"vm".into(), &"vm.mason".into()));
    assert_eq!(graph["live"]["exports"][0]["uri"], daemon.ready[0].1);
    assert_eq!(graph["elements"][1]["geometry"]["size"], 1 << 20);
    assert_eq!(graph["edges"][0]["requests"], 0);
    let text = home.mason(&["status"]).done();
    assert!(text.contains(&daemon.ready[0].1) && text.contains("1M"), "{text}");
    daemon.stop().done();
}

#[test]
fn the_running_graph_is_shown_with_its_counters() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let tree = home.mason(&["show"]).done();
    assert!(tree.contains("-> Disk  mem  size 1M  [0 requests, 0]"), "{tree}");
    let explained = home.mason(&["show", "--explain"]).done();
    assert!(explained.lines().any(|line| line.contains("Disk") && line.contains("1M")), "{explained}");
    assert!(home.mason(&["show", "--svg"]).done().contains("<svg"));
    daemon.stop().done();
}

#[test]
fn of_several_daemons_one_has_to_be_named() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let (one, two) = (home.run(&["one.mason"], 1), home.run(&["two.mason"], 1));
    // Something else that is named like a control socket is passed over.
    let _other = UnixListener::bind(home.path("mason/stale.sock")).map(drop);
    let several = home.mason(&["status"]).failed();
    assert!(several.contains("one.sock") && several.contains("two.sock"), "{several}");
    let status = home.mason(&["status", "--json", "--control", "mason/two.sock"]).json();
    assert_eq!(status["pid"], two.pid());
    two.stop().done();
    assert_eq!(home.mason(&["status", "--json"]).json()["pid"], one.pid());
    one.stop().done();
}

#[test]
fn a_path_that_was_asked_for_or_an_error() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let daemon = home.run(&["one.mason", "--control", "c.sock"], 1);
    assert!(!home.path("mason").exists());
    let taken = home.mason(&["run", "two.mason", "--control", "c.sock"]).failed();
    assert!(taken.contains("c.sock: another process serves this control socket"), "{taken}");
    assert!(!home.path("two.nbd").exists(), "what was opened is closed again");
    home.mason(&["status", "--control", "c.sock"]).done();
    daemon.stop().done();
    assert!(!home.path("c.sock").exists());
    let gone = home.mason(&["status", "--control", "c.sock"]).failed();
    assert!(gone.contains("no daemon runs there"), "{gone}");
}

#[test]
fn without_a_folder_for_it_there_is_one_warning() {
    let home = Home::new();
    home.memory_graph("vm");
    home.file("mason", "in the way");
    let daemon = home.run(&["vm.mason"], 1);
    let ended = daemon.stop();
    assert_eq!((ended.code, ended.err.lines().count()), (Some(0), 1), "{}", ended.err);
    assert!(ended.err.contains("WARN") && ended.err.contains("no control socket"), "{}", ended.err);
}

fn ask(stream: &mut UnixStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn it_speaks_http_and_survives_what_does_not() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let connect = || UnixStream::connect(home.path("mason/vm.sock")).unwrap();
    let get = |path: &str| {
        ask(&mut connect(), &format!("GET {path} HTTP/1.1\r\nhost: m\r\nconnection: close\r\n\r\n"))
    };
    assert!(get("/v1/status").starts_with("HTTP/1.1 200 OK"));
    let unknown = get("/v2");
    assert!(unknown.starts_with("HTTP/1.1 404") && unknown.contains("\"error\""), "{unknown}");
    ask(&mut connect(), "\0\0\0\r\n\r\n");
    let idle = connect();
    home.mason(&["status"]).done();
    daemon.stop().done();
    drop(idle);
}

#[test]
fn other_users_are_refused() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root can be somebody else for a moment.
    }
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason", "--control", "c.sock"], 1);
    let open = |name: &str, mode| {
        std::fs::set_permissions(home.path(name), PermissionsExt::from_mode(mode)).unwrap();
    };
    open(".", 0o755);
    // Even where a careless administrator has opened the socket to all.
    open("c.sock", 0o666);
    let copy = home.path("copy");
    // By another process: one that tests of other threads start could hold what we write open, and then
    // it cannot be executed.
    let copied = home.command("cp", &[MASON, copy.to_str().unwrap()]).status().unwrap();
    assert!(copied.success());
    let mut command = home.command(&copy, &["status", "--control", "c.sock"]);
    let output = command.uid(65534).gid(65534).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    home.mason(&["status", "--control", "c.sock"]).done();
    daemon.stop().done();
}

#[test]
fn two_daemons_may_have_a_first_graph_of_the_same_name() {
    let home = Home::new();
    std::fs::create_dir(home.path("more")).unwrap();
    home.memory_graph("vm");
    std::fs::copy(home.path("vm.mason"), home.path("more/vm.mason")).unwrap();
    let first = home.run(&["vm.mason"], 1);
    let second = home.run(&["more/vm.mason", "-v"], 1);
    let own = format!("vm-{}.sock", second.pid());
    let several = home.mason(&["status"]).failed();
    assert!(several.contains("vm.sock") && several.contains(&own), "{several}");
    let status = home.mason(&["status", "--json", "--control", &format!("mason/{own}")]).json();
    assert_eq!(status["pid"], second.pid());
    let ended = second.stop();
    assert!(ended.err.contains("INFO") && ended.err.contains(&own), "{}", ended.err);
    assert!(!home.path("mason").join(own).exists());
    assert_eq!(home.mason(&["status", "--json"]).json()["pid"], first.pid());
    first.stop().done();
}

#[test]
fn connections_too_many_are_told_so() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let idle: Vec<_> = (0..64).map(|_| UnixStream::connect(home.path("mason/vm.sock")).unwrap()).collect();
    let refused = home.mason(&["status"]).failed();
    assert!(refused.contains("too many connections to the control socket"), "{refused}");
    drop(idle);
    // The daemon has yet to notice.
    while home.mason(&["status"]).code != Some(0) {}
    daemon.stop().done();
}

#[test]
fn only_reads_and_writes_move_bytes() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let mut client = home.nbd_client("vm.nbd");
    client.read(0, 4096).unwrap();
    // Trim.
    client.send(4, 0, 65536).unwrap();
    let source = &home.mason(&["status", "--json"]).json()["graphs"][0]["live"]["sources"][0];
    let of = |op: &str| {
        let found = source["operations"].as_array().unwrap().iter().find(|found| found["operation"] == op);
        found.map(|found| (found["requests"].as_u64().unwrap(), found["bytes"].as_u64().unwrap()))
    };
    assert_eq!((of("read"), of("discard")), (Some((1, 4096)), Some((1, 0))), "{source:#}");
    assert_eq!(home.mason(&["get", "Disk.bytes"]).done(), "4096\n");
    drop(client);
    daemon.stop().done();
}

/// Answers like a daemon that wants to take over its asker's terminal.
fn hostile(listener: &UnixListener) {
    const EVIL: &str = "\\u001b[31mevil\\u009b\\u0007";
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut asked = [0; 4096];
        let length = stream.read(&mut asked).unwrap();
        let asked = String::from_utf8_lossy(&asked[..length]).into_owned();
        let body = if asked.starts_with("GET /v1/daemon") {
            format!(
                r#"{{"version":"{EVIL}","pid":1,"uptime_seconds":1,"graphs":["{EVIL}"],"run":"/","defines":[]}}"#
            )
        } else if asked.starts_with("GET /v1/status") {
            format!(
                r#"{{"version":"{EVIL}","pid":1,"uptime_seconds":1,"graphs":[{{"name":"{EVIL}","file":"{EVIL}",
                "elements":[{{"name":"{EVIL}","type":"{EVIL}","family":"{EVIL}","place":"","parameters":[]}}],
                "edges":[],"live":{{"failed":false,"in_flight_bytes":0,
                "exports":[{{"element":"{EVIL}","uri":"{EVIL}"}}],"sources":[]}}}}]}}"#
            )
        } else if asked.starts_with("GET /v1/events") {
            format!(
                "{{\"number\":1,\"time\":1e300,\"graph\":\"{EVIL}\",\"kind\":\"notice\",\"message\":\"{EVIL}\"}}\n"
            )
        } else {
            format!(r#"{{"error":{{"kind":"busy","message":"{EVIL}\\n{EVIL}"}}}}"#)
        };
        let status = if body.contains("\"error\"") { "409 Conflict" } else { "200 OK" };
        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close", body.len());
        let _ = stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes());
    }
}

#[test]
fn what_a_daemon_says_does_nothing_to_a_terminal() {
    let home = Home::new();
    let listener = UnixListener::bind(home.path("evil.sock")).unwrap();
    std::thread::spawn(move || hostile(&listener));
    for args in [&["status"][..], &["show"], &["show", "--explain"], &["show", "--dot"], &["show", "--svg"]] {
        let out = home.mason(&[args, &["--control", "evil.sock"]].concat()).done();
        assert!(out.contains("evil") && !out.contains(|c: char| c.is_control() && c != '\n'), "{out:?}");
    }
    let json = home.mason(&["status", "--json", "--control", "evil.sock"]);
    assert!(!json.out.contains(['\x1b', '\u{9b}']), "{json:?}");
    for args in [&["events"][..], &["events", "--json"]] {
        let out = home.mason(&[args, &["--control", "evil.sock"]].concat()).done();
        assert!(out.contains("evil") && !out.contains(|c: char| c.is_control() && c != '\n'), "{out:?}");
    }
    let failed = home.mason(&["unload", "vm", "--control", "evil.sock"]).failed();
    assert!(failed.contains("evil") && !failed.contains('\x1b'), "{failed:?}");
}
