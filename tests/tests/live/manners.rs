//! Clients of the control socket that die, hurry, or do not listen.

use crate::{BLOCKS, Site, graph, plain};
use blockmason_tests::control::{command, insert, reload, remove};
use blockmason_tests::mason::{now, until};
use blockmason_tests::raw::{READ, Raw};
use blockmason_tests::stamps::Stampers;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::Duration;

fn has(graph: &Value, element: &str) -> bool {
    graph["elements"].as_array().unwrap().iter().any(|one| one["name"] == element)
}

#[test]
fn a_client_that_dies() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 6);
    let body = insert("P (type probe)", "Guest", "A").to_string();
    let head =
        format!("POST /v1/graphs/vm/edits HTTP/1.1\r\nhost: m\r\ncontent-length: {}\r\n\r\n", body.len());
    let whole = head + &body;
    let mut control = site.control();
    for cut in (0..whole.len()).step_by(7) {
        let mut stream = UnixStream::connect(site.path("c.sock")).unwrap();
        stream.write_all(&whole.as_bytes()[..cut]).unwrap();
    }
    stampers.go_on(200);
    assert!(!has(&control.graph("vm"), "P"), "half a request has done something");
    // A whole one is carried out, or not at all where the daemon sees the end of it first; nobody is there to be told.
    until("the probe is there", || {
        UnixStream::connect(site.path("c.sock")).unwrap().write_all(whole.as_bytes()).unwrap();
        has(&control.graph("vm"), "P")
    });
    // So is one that needs the gate; once it has been made, there is nothing left to change.
    let body = json!({ "edits": [{ "edit": "replace", "element": "A",
        "by": "(type file) (path a.img) (direct yes)" }], "folder": site.folder() });
    until("the image was opened anew", || {
        site.control().send("POST", "/v1/graphs/vm/edits", &body);
        control.graph("vm")["live"]["gated"] == 1
    });
    stampers.go_on(200);
    control.done("POST", "/v1/graphs/vm/edits", &remove("P"));
    stampers.finish();
    daemon.stop_well();
}

#[test]
fn two_at_once() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 7);
    let mut controls = [site.control(), site.control()];
    let mut last = [0; 3];
    for round in 0..30 {
        // Two edits: both are made.
        for (control, name) in controls.iter_mut().zip(["P", "Q"]) {
            let element = format!("{name} (type probe)");
            control.send("POST", "/v1/graphs/vm/edits", &insert(&element, "Guest", "A"));
        }
        let answers = controls.each_mut().map(|control| control.answer());
        // The second of them finds no such edge any more; it is told so.
        let done = answers.iter().filter(|(status, _)| *status == 200).count();
        let graph = controls[0].graph("vm");
        let there = [has(&graph, "P"), has(&graph, "Q")];
        assert_eq!(there, [answers[0].0 == 200, answers[1].0 == 200], "{answers:?}");
        last[done] += 1;
        // Two whole graphs: the later one stays, and says that it has come after the other.
        let place = site.path("vm.mason");
        for (control, iops) in controls.iter_mut().zip([1_000_000, 2_000_000]) {
            let text = graph_with_limit(iops + round);
            control.send("POST", "/v1/graphs/vm/reload", &reload(&place, &text, &json!({})));
        }
        let answers = controls.each_mut().map(|control| control.answer());
        assert!(answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
        let after = |ix: usize, before: i64| {
            answers[ix].1["text"].as_str().unwrap().contains(&format!("iops: {before} ->"))
        };
        let (first, second) = (1_000_000 + round, 2_000_000 + round);
        let stays = match (after(0, second), after(1, first)) {
            (true, false) => first,
            (false, true) => second,
            order => panic!("both or neither came last: {order:?} {answers:?}"),
        };
        assert_eq!(site.mason(&["get", "Limit.iops"]).done(), format!("{stays}\n"));
        controls[0].done("POST", "/v1/graphs/vm/reload", &reload(&place, &plain(), &json!({})));
    }
    assert_eq!(last[0], 0, "at least one is always made");
    stampers.go_on(100);
    stampers.finish();
    daemon.stop_well();
}

fn graph_with_limit(iops: i64) -> String {
    graph(&format!("element Limit (type throttle) (iops {iops})"), "Guest -> Limit -> A")
}

/// So many parts of a disk that each fail by themselves: of one element, only ten events in ten seconds are kept.
const PARTS: u64 = 300;

#[test]
fn a_reader_of_events_that_has_stopped() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let part = |ix| {
        format!(
            "element E{ix} (type error) (op read) element M{ix} (type mem) (size 4k) (All, p{ix:03}) -> E{ix} -> M{ix}\n"
        )
    };
    let parts: String = (0..PARTS).map(part).collect();
    let bad = format!(
        "element Bad (type nbd) (listen unix:bad.nbd)\nelement All (type linear)\nBad -> All\n{parts}"
    );
    site.write("bad.mason", bad);
    let daemon = site.run(&["vm.mason", "bad.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 8);
    let mut reader = command(site.folder(), &["events", "--follow", "--json", "--control", "c.sock"]);
    let mut reader = reader.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        assert!(lines.next().unwrap().unwrap().contains("\"loaded\""));
    }
    let pid = Pid::from_child(&reader);
    kill_process(pid, Signal::STOP).unwrap();
    let stopped = now();
    // Many more than are kept and fit into a socket's buffer, well before the daemon loses its patience.
    let mut client = Raw::ready(&site.path("bad.nbd"));
    let before = stampers.requests();
    let mut sent = 0;
    while sent < 20 * PARTS && stopped.elapsed() < Duration::from_secs(6) {
        for part in 0..PARTS {
            client.request(READ, part * 4096, 512);
        }
        for _ in 0..PARTS {
            assert_ne!(client.reply(), 0);
        }
        sent += PARTS;
    }
    assert!(stampers.requests() > before, "the other clients are held up");
    stampers.go_on(100);
    kill_process(pid, Signal::CONT).unwrap();
    let mut numbers = Vec::new();
    let dropped = loop {
        let line: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
        if let Some(dropped) = line["dropped"].as_u64() {
            break dropped;
        }
        numbers.push(line["number"].as_u64().unwrap());
    };
    let next: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    let (last, next) = (*numbers.last().unwrap_or(&2), next["number"].as_u64().unwrap());
    assert_eq!(next, last + dropped + 1, "{dropped} dropped after {last}");
    assert!(numbers.is_sorted());
    let _ = reader.kill();
    let _ = reader.wait();
    stampers.finish();
    daemon.stop_well();
}
