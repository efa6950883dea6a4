//! `mason run`: serving and stopping.

use crate::harness::{Daemon, Home, MASON, repository};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What an NBD server says first.
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT";

fn greeted(mut stream: impl Read) -> bool {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).is_ok() && greeting.starts_with(GREETING)
}

#[test]
fn the_quickstart_serves_and_stops_without_a_trace_but_its_disk() {
    let home = Home::new();
    let graph = repository().join("graphs/quickstart.mason");
    let daemon = home.run(&[graph.to_str().unwrap()], 1);
    let socket = home.path("mason/quickstart.nbd");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    assert_eq!(daemon.ready, [("Guest".to_owned(), uri)]);
    assert!(greeted(UnixStream::connect(&socket).unwrap()));
    let mode = |name: &str| home.path(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!([mode("mason"), mode("state/mason/quickstart")], [0o700; 2]);
    assert_eq!(mode("mason/quickstart.sock"), 0o600);
    assert_eq!(daemon.stop().done(), "");
    assert_eq!(home.path("mason").read_dir().unwrap().count(), 0);
    let disk = home.path("state/mason/quickstart/disk.img").metadata().unwrap();
    assert_eq!(disk.len(), 1 << 30);
}

#[test]
fn an_idle_client_does_not_hold_it_up() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let idle = UnixStream::connect(home.path("vm.nbd")).unwrap();
    assert!(greeted(&idle));
    let asked = Instant::now();
    daemon.stop().done();
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    assert!(!home.path("vm.nbd").exists());
    let mut rest = Vec::new();
    assert!((&idle).read_to_end(&mut rest).is_err() || rest.is_empty(), "closed");
}

#[test]
fn an_interrupt_stops_it() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    daemon.signal(Signal::INT);
    daemon.end().done();
}

#[test]
fn several_graphs_and_several_exports() {
    let home = Home::new();
    home.memory_graph("one");
    home.file(
        "two.mason",
        "element A (type nbd) (listen unix:two.nbd) (name a)\n\
         element B (type nbd) (listen unix:two.nbd) (name b)\n\
         element Disk (type mem) (size 1M)\n\
         A -> Disk\nB -> Disk\n",
    );
    let daemon = home.run(&["one.mason", "two.mason", "--shards", "1"], 3);
    let names: Vec<_> = daemon.ready.iter().map(|(element, _)| element.as_str()).collect();
    assert_eq!(names, ["Guest", "A", "B"]);
    assert!(daemon.ready[2].1.contains("///b?socket="), "{:?}", daemon.ready);
    daemon.stop().done();
    std::fs::create_dir(home.path("more")).unwrap();
    home.memory_graph("more/one");
    assert!(home.mason(&["run", "one.mason", "more/one.mason"]).misused().contains("called one too"));
}

#[test]
fn the_state_folder_is_where_it_is_asked_for() {
    let home = Home::new();
    let graph = "element Guest (type nbd) (listen unix:vm.nbd)\n\
                 element Disk (type file) (path ${state}/disk.img) (size 1M)\n\
                 Guest -> Disk\n";
    home.file("vm.mason", graph);
    home.run(&["vm.mason", "--state", "kept"], 1).stop().done();
    assert!(home.path("kept/vm/disk.img").exists() && !home.path("state").exists());
    std::fs::create_dir(home.path("own")).unwrap();
    home.run(&["vm.mason", "-D", "state=own"], 1).stop().done();
    assert!(home.path("own/disk.img").exists() && !home.path("state").exists());
    std::fs::create_dir(home.path("its")).unwrap();
    home.file("vm.mason", &format!("param state = its\n{graph}"));
    home.run(&["vm.mason"], 1).stop().done();
    assert!(home.path("its/disk.img").exists() && !home.path("state").exists());
}

#[test]
fn the_service_manager_is_told() {
    let home = Home::new();
    home.memory_graph("vm");
    let notify = UnixDatagram::bind(home.path("notify")).unwrap();
    let mut command = home.command(MASON, &["run", "vm.mason"]);
    let daemon = Daemon::start(command.env("NOTIFY_SOCKET", home.path("notify")), 1);
    let told = || {
        let mut buffer = [0; 1000];
        let length = notify.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    };
    assert_eq!(told().trim(), "READY=1");
    daemon.stop().done();
    assert_eq!(told().trim(), "STOPPING=1");
}

#[test]
fn one_client_on_standard_input_and_output() {
    let home = Home::new();
    home.memory_graph("vm");
    let mut child =
        home.command(MASON, &["run", "vm.mason", "--stdio"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    assert!(greeted(&mut stdout), "and nothing before it");
    // Flags: fixed newstyle without padding. Then the option to abort.
    let abort = [&3u32.to_be_bytes()[..], b"IHAVEOPT", &2u32.to_be_bytes(), &0u32.to_be_bytes()].concat();
    child.stdin.take().unwrap().write_all(&abort).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]));
    assert!(!home.path("vm.nbd").exists());
}

#[test]
fn what_happens_is_logged_when_asked_for() {
    let home = Home::new();
    home.memory_graph("vm");
    let log = |args: &[&str]| {
        let daemon = home.run(&[&["vm.mason"], args].concat(), 1);
        let mut client = UnixStream::connect(home.path("vm.nbd")).unwrap();
        assert!(greeted(&client));
        // No flags that there are: the server hangs up, and says so at the level of info.
        client.write_all(&[0xff; 4]).unwrap();
        let _ = client.read_to_end(&mut Vec::new());
        daemon.stop()
    };
    log(&[]).done();
    let text = log(&["-v"]).err;
    assert!(text.contains("INFO") && !text.contains('\x1b'), "{text}");
    let json = log(&["-v", "--log-format", "json"]).err;
    let lines = json.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    assert!(lines.into_iter().any(|line| line["level"] == "INFO"), "{json}");
}
