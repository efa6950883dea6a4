//! `mason trace`.

use crate::guest::Guest;
use crate::harness::{Daemon, Home, MASON, run_to_end};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::process::Child;

/// Reads are slow, writes fail.
fn slow(home: &Home) -> Daemon {
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Slow (type delay) (read 20ms)\n\
         element Bad (type error) (op write)\n\
         element Disk (type mem) (size 1M)\n\
         Guest -> Slow -> Bad -> Disk\n",
    );
    home.run(&["vm.mason"], 1)
}

/// One request in so many is sampled now.
fn sampled_every(home: &Home) -> u64 {
    let answer = home.ask("mason/vm.sock", "GET", "/v1/counters", "");
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let counters: serde_json::Value = serde_json::from_str(body).unwrap();
    counters["graphs"][0]["sampled_every"].as_u64().unwrap()
}

/// Starts `mason trace` and waits until the daemon samples one request in so many.
fn trace(home: &Home, args: &[&str], every: u64) -> Child {
    let child = home.command(MASON, &[&["trace"], args].concat()).spawn().unwrap();
    while sampled_every(home) != every {}
    child
}

#[test]
fn hops_of_a_request_as_a_tree_and_as_json() {
    let home = Home::new();
    let daemon = slow(&home);
    let mut guest = Guest::connect(&home, "vm.nbd");
    let text = trace(&home, &["--count", "1"], 1);
    guest.read(4096, 512);
    let text = run_to_end(text).done();
    while sampled_every(&home) != 1024 {}
    let json = trace(&home, &["--count", "2", "--json"], 1);
    guest.read(4096, 512);
    assert_ne!(guest.write(0, &[1; 4096]), 0);
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["since", "took", "self", "element"]);
    let elements: Vec<_> = rows[2..].iter().map(|row| row[3]).collect();
    assert_eq!(elements, ["Guest", "Slow", "Bad", "Disk"]);
    assert_eq!(rows[2][4..], ["read", "512", "at", "4k", "ok"]);
    assert_eq!(rows[2][0], "+0ns");

    let out = run_to_end(json).done();
    let hops: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> =
        hops.iter().map(|hop| (hop["to"].as_str().unwrap(), hop["operation"].as_str().unwrap())).collect();
    let wanted = [("Guest", "read"), ("Slow", "read"), ("Bad", "read"), ("Disk", "read")];
    assert_eq!(
        (&names[..4], &names[4..]),
        (&wanted[..], &[("Guest", "write"), ("Slow", "write"), ("Bad", "write")][..])
    );
    for pair in hops[..4].windows(2) {
        assert_eq!(pair[1]["parent"], pair[0]["hop"]);
        assert_eq!(pair[1]["root"], pair[0]["root"]);
    }
    assert!(hops[1]["took_ns"].as_u64().unwrap() >= 20_000_000, "{}", hops[1]);
    assert!(hops[6]["error"].as_str().unwrap().starts_with("Bad: write at 0"), "{}", hops[6]);
    drop(guest);
    daemon.stop();
}

#[test]
fn only_what_was_asked_for() {
    let home = Home::new();
    let daemon = slow(&home);
    let mut guest = Guest::connect(&home, "vm.nbd");
    let args = [
        &["Slow -> Bad", "--errors", "--json", "--count", "1"][..],
        &["Slow", "--min", "10ms", "--json", "--count", "1"],
    ];
    for (args, operation) in args.into_iter().zip(["write", "read"]) {
        let child = trace(&home, args, 1);
        guest.write(0, &[1; 512]);
        guest.read(0, 512);
        let out = run_to_end(child).done();
        assert!(out.lines().all(|line| line.contains(&format!("\"{operation}\""))), "{out}");
        while sampled_every(&home) != 1024 {}
    }
    let unknown = home.mason(&["trace", "Slwo"]).failed();
    assert_eq!(unknown, "mason: vm has no element Slwo; did you mean `Slow`?\n");
    let unknown = home.mason(&["trace", "Slow -> Disk"]).failed();
    assert!(unknown.starts_with("mason: vm has no edge Slow -> Disk"), "{unknown}");
    home.mason(&["trace", "--sample", "0"]).misused();
    home.mason(&["trace", "--sample", "1/x"]).misused();
    assert!(home.mason(&["trace", "--graph", "vn"]).failed().contains("no graph vn is served"));
    assert_eq!(home.mason(&["trace", "--for", "50ms"]).done(), "");
    drop(guest);
    daemon.stop();
}

#[test]
fn the_rate_goes_back_when_tracers_go_or_die() {
    let home = Home::new();
    let daemon = slow(&home);
    assert_eq!(sampled_every(&home), 1024);
    let mut slow = trace(&home, &["--sample", "1/5"], 5);
    let fast = trace(&home, &["--sample", "1/2"], 2);
    kill_process(Pid::from_child(&fast), Signal::INT).unwrap();
    assert_eq!(run_to_end(fast).done(), "");
    while sampled_every(&home) != 5 {}
    // Nothing is sent to it that could show that it is dead.
    slow.kill().unwrap();
    slow.wait().unwrap();
    while sampled_every(&home) != 1024 {}
    // A tracer ends with its graph.
    let tracer = trace(&home, &["--sample", "1/3"], 3);
    home.mason(&["unload", "vm"]).done();
    assert_eq!(run_to_end(tracer).done(), "");
    daemon.stop().done();
}

#[test]
fn for_a_viewer_also_when_interrupted() {
    let home = Home::new();
    let daemon = slow(&home);
    let mut guest = Guest::connect(&home, "vm.nbd");
    for requests in [0, 3] {
        let mut child = trace(&home, &["--format", "perfetto"], 1);
        (0..requests).for_each(|_| guest.read(0, 512));
        let (mut out, mut text) = (BufReader::new(child.stdout.take().unwrap()), String::new());
        // A line ends when the next one begins; the hops of a request are written at once.
        while text.matches("\"X\"").count() + 1 < 4 * requests {
            assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
        }
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        out.read_to_string(&mut text).unwrap();
        assert_eq!(run_to_end(child).code, Some(0));
        let events: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        let of = |phase: &str| events.iter().filter(|event| event["ph"] == phase).count();
        assert_eq!((of("X"), of("M")), (4 * requests, requests.min(1)), "{events:#?}");
        while sampled_every(&home) != 1024 {}
    }
    // What was recorded for a tracer is in the flight recorder too.
    let last = home.mason(&["trace", "--last", "Disk", "--json"]).done();
    assert_eq!(last.lines().count(), 12, "{last}");
    assert_eq!(home.mason(&["trace", "--last", "--errors"]).done(), "");
    let text = home.mason(&["trace", "--last", "--count", "1"]).done();
    assert_eq!(text.lines().count(), 6, "{text}");
    home.mason(&["trace", "--last", "--sample", "1/2"]).misused();
    drop(guest);
    daemon.stop();
}
