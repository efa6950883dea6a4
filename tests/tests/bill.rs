//! A meter in a daemon, with a server of S3: what `mason bill` says of it while it serves, and when it has ended.
#![allow(clippy::unwrap_used)]

use blockmason_tests::client;
use blockmason_tests::mason::{Start, program, until};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The server in memory; ends with its standard input.
struct Server {
    child: Child,
    endpoint: String,
}

impl Server {
    fn start(folder: &Path) -> Server {
        let mut command = Command::new(blockmason_tests::program("mason-bucket"));
        command.args(["--bucket", "vms"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let said: Value = serde_json::from_str(&line).unwrap();
        let text = |name: &str| said[name].as_str().unwrap().to_owned();
        let (access, secret) = (text("access"), text("secret"));
        let keys = format!("[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n");
        std::fs::write(folder.join("keys"), keys).unwrap();
        Server { child, endpoint: text("endpoint") }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `mason` to its end: what it said, on standard output or, if it failed, on standard error.
fn mason(home: &Path, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program());
    command.args(args).current_dir(home).env("HOME", home).env("XDG_RUNTIME_DIR", home).stdin(Stdio::null());
    let ended = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if ended.status.success() { Ok(text(ended.stdout)) } else { Err(text(ended.stderr)) }
}

fn json(home: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&mason(home, &[args, &["--json"]].concat()).unwrap()).unwrap()
}

/// Requests of an operation, on all days.
fn requests(bill: &Value, operation: &str) -> u64 {
    let days = bill["days"].as_array().unwrap().iter();
    days.map(|day| day["operations"][operation]["requests"].as_u64().unwrap()).sum()
}

#[test]
fn a_daemon_is_billed_while_it_serves_and_when_it_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path();
    let server = Server::start(home);
    let endpoint = &server.endpoint;
    let at = ["s3://vms/vm1", "--endpoint", endpoint, "--credentials", "keys"];
    mason(home, &[&["bucket", "create", "--size", "8M", "--block", "64k"], &at[..]].concat()).unwrap();
    let graph = format!(
        "element Guest (type nbd) (listen unix:{}/guest.sock)\n\
         element Meter (type meter) (of Disk) (ledger vm1.ledger) (day warn=0.0001 read_only=1000)\n\
         element Disk (type s3) (bucket vms) (prefix vm1) (endpoint {endpoint}) (credentials keys)\n\
         Guest -> Meter -> Disk\n",
        home.display()
    );
    std::fs::write(home.join("cloud.mason"), graph).unwrap();
    let daemon = Start::new(home).run(&["cloud.mason"]);
    client(
        "qemu-io",
        &["-f", "raw", "-c", "write -P 7 0 4M", "-c", "flush", "-c", "read -P 7 1M 64k", daemon.uri()],
    );
    let bill = json(home, &["bill"]);
    assert_eq!((&bill["graph"], &bill["element"]), (&"cloud".into(), &"Meter".into()));
    assert!(requests(&bill, "put") >= 64 && requests(&bill, "get") >= 1, "{bill}");
    assert!(bill["stored"].as_u64().unwrap() >= 4 << 20, "{bill}");
    until("a step is reached", || mason(home, &["get", "Meter.state"]).unwrap() == "warn\n");
    let shown = mason(home, &["bill", "Meter", "--graph", "cloud"]).unwrap();
    for part in ["put", "today", "this month", "budget", "day warn=0.0001, day read_only=1000; now: warn"] {
        assert!(shown.contains(part), "{part} in\n{shown}");
    }
    assert!(mason(home, &["bill", "Guest"]).unwrap_err().contains("Guest is no meter of cloud, but Meter"));
    let free = json(home, &["bill", "--prices", "none"]);
    assert_eq!(free["month"]["dollars"], 0.0);
    assert!(mason(home, &["call", "Meter.raise", "day 5"]).unwrap().contains("until this day ends"));
    assert_eq!(mason(home, &["get", "Meter.state"]).unwrap(), "within\n");
    let raised = mason(home, &["bill"]).unwrap();
    assert!(raised.contains("read_only=1000; 5 $ more this day; now: within"), "{raised}");
    let events = mason(home, &["events", "--json"]).unwrap();
    for state in ["\"above\"", "\"below\""] {
        assert!(events.lines().any(|line| line.contains("dollars_day") && line.contains(state)), "{events}");
    }
    daemon.stop_well();
    let after = json(home, &["bill", "--ledger", "vm1.ledger"]);
    // Leaving the volume has cost a checkpoint at least.
    assert!(requests(&after, "put") > requests(&bill, "put"), "{after}");
    assert_eq!(after["prices"], bill["prices"]);
    // As it was before that: 64 blocks, and commits that say so.
    let stored = after["stored"].as_u64().unwrap();
    assert!((4 << 20..5 << 20).contains(&stored), "{stored}");
}
