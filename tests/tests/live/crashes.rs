//! The daemon dies between, during and after a change and its save: the next start serves what ran, or says what
//! differs, and the graph file is at every moment whole.

use crate::{Site, plain};
use blockmason_tests::control::{Control, command, insert, reload, remove};
use blockmason_tests::mason::{Mason, Start, now, pause, until};
use blockmason_tests::raw::{READ, Raw};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

/// What the daemon says when the graph that ran is not the one in its file.
const SAYS_SO: &str = "was changed while it ran and not saved";

fn run(site: &Site, more: &[&str]) -> (Mason, String) {
    let log = site.path("log");
    let start = Start { log: Some(&log), ..Start::new(site.folder()) };
    let daemon = start.run(&[&["vm.mason", "--control", "c.sock"], more].concat());
    (daemon, std::fs::read_to_string(log).unwrap())
}

/// `mason run` that must not serve.
pub(crate) fn refused(site: &Site) -> String {
    // A daemon that was killed leaves it behind.
    let _ = std::fs::remove_file(site.path("c.sock"));
    let log = std::fs::File::create(site.path("log")).unwrap();
    let mut daemon = command(site.folder(), &["run", "vm.mason", "--control", "c.sock"]);
    let mut daemon = daemon.stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let mut ended = None;
    let since = now();
    while ended.is_none() && !site.path("c.sock").exists() && since.elapsed() < Duration::from_secs(20) {
        pause(Duration::from_millis(2));
        ended = daemon.try_wait().unwrap();
    }
    let _ = daemon.kill();
    let _ = daemon.wait();
    let said = std::fs::read_to_string(site.path("log")).unwrap();
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "it serves: {said}");
    said
}

/// The elements that serve.
fn state(control: &mut Control) -> BTreeSet<String> {
    let graph = control.graph("vm");
    let names = graph["elements"].as_array().unwrap().iter();
    names.map(|element| element["name"].as_str().unwrap().to_owned()).collect()
}

/// The edit that turns a probe on or off.
fn toggle(state: &BTreeSet<String>, options: &Value) -> Value {
    let mut body = if state.contains("P") { remove("P") } else { insert("P (type probe)", "Guest", "A") };
    body["options"] = options.clone();
    body
}

#[test]
fn a_daemon_that_is_killed_at_any_moment() {
    const EDITS: &str = "/v1/graphs/vm/edits";
    let site = Site::new();
    let file = site.write("vm.mason", plain());
    let mut rng = fastrand::Rng::with_seed(20);
    let (mut daemon, _) = run(&site, &[]);
    let mut seen = BTreeSet::new();
    for round in 0..40 {
        let mut control = site.control();
        let mut before = state(&mut control);
        // How long one takes that is left to end, with what the file is about to say.
        let dry = control.done("POST", EDITS, &toggle(&before, &json!({ "dry_run": true })));
        let since = now();
        let kind = round % 5;
        let (mut path, mut body) = (EDITS, toggle(&before, &json!({ "save": kind == 1 })));
        if kind >= 2 {
            control.done("POST", EDITS, &toggle(&before, &json!({})));
            before = state(&mut control);
            (path, body) = ("/v1/graphs/vm/save", json!({}));
        }
        let took = since.elapsed().max(Duration::from_millis(3));
        let old = std::fs::read_to_string(&file).unwrap();
        match kind {
            // Between the edit and its save.
            3 => {}
            // After it.
            4 => drop(control.done("POST", path, &body)),
            _ => {
                control.send("POST", path, &body);
                pause(took.mul_f64(rng.f64() * 1.5));
            }
        }
        daemon.kill();
        let mut after = before.clone();
        if kind < 2 && !after.remove("P") {
            after.insert("P".to_owned());
        }
        let is = std::fs::read_to_string(&file).unwrap();
        let new = dry["graph"].as_str().unwrap();
        assert!(is == old || (kind != 0 && is == new), "round {round}: the file is neither: {is}");
        assert!(kind != 4 || is == new, "round {round}: what was saved is not there: {is}");
        let (served, said) = run(&site, &[]);
        let found = state(&mut site.control());
        let warned = said.contains(SAYS_SO);
        assert!(warned || found == before || found == after, "round {round}: served in silence: {found:?}");
        assert!(kind != 4 || !warned, "round {round}: {said}");
        served.kill();
        // The start before has taken nothing away.
        daemon = run(&site, &["--as-left"]).0;
        let left = state(&mut site.control());
        assert!(left == before || left == after, "round {round}: {left:?}, not {before:?} or {after:?}");
        seen.insert((kind, left == after, is == old, warned));
    }
    assert!(seen.len() >= 5, "{seen:?}");
    daemon.stop_well();
}

#[test]
fn a_daemon_that_served_another_image() {
    let site = Site::new();
    site.write("vm.mason", plain());
    site.write("b.img", vec![0; 64 << 20]);
    let (daemon, _) = run(&site, &[]);
    site.mason(&["replace", "A", "(type file) (path b.img)"]).done();
    Raw::ready(daemon.socket()).write(0, &[7; 512]);
    daemon.kill();
    let said = refused(&site);
    assert!(said.contains("its layout or sinks differ") && said.contains("a.img -> "), "{said}");
    assert!(said.contains("--as-left") && said.contains("--as-file"), "{said}");
    let (daemon, _) = run(&site, &["--as-left"]);
    assert_eq!(Raw::ready(daemon.socket()).read(0, 512), [7; 512]);
    daemon.stop_well();
    // Not to be had by asking again, nor lost by ending well.
    assert!(refused(&site).contains(SAYS_SO));
    let (daemon, _) = run(&site, &["--as-file"]);
    assert_eq!(Raw::ready(daemon.socket()).read(0, 512), [0; 512]);
    daemon.kill();
    let (daemon, said) = run(&site, &[]);
    assert!(!said.contains(SAYS_SO), "{said}");
    daemon.stop_well();
}

/// On the way back to what the file says, the graph that was edited serves until the change is made.
#[test]
fn a_daemon_that_dies_on_the_way_back_to_its_file() {
    let site = Site::new();
    let text = plain()
        + "element Slow (type delay) (read 60s) element Other (type nbd) (listen unix:slow.nbd)\nOther -> Slow -> A\n";
    let file = site.write("vm.mason", &text);
    site.write("b.img", vec![0; 64 << 20]);
    let (daemon, _) = run(&site, &[]);
    site.mason(&["replace", "A", "(type file) (path b.img)"]).done();
    let mut stuck = Raw::ready(&site.path("slow.nbd"));
    stuck.request(READ, 0, 512);
    let mut control = site.control();
    until("the read is in flight", || control.graph("vm")["live"]["in_flight_bytes"] == 512);
    let mut back = site.control();
    back.send("POST", "/v1/graphs/vm/reload", &reload(&file, &text, &json!({ "deadline_seconds": 30 })));
    until("the gate is closed", || control.graph("vm")["live"]["gated"] == 2);
    daemon.kill();
    assert!(refused(&site).contains(SAYS_SO));
}

#[test]
fn a_record_that_is_damaged() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let (daemon, _) = run(&site, &[]);
    site.mason(&["insert", "P (type probe)", "between", "Guest", "and", "A"]).done();
    daemon.kill();
    let folder = site.path("state/mason/left");
    let record = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&record).unwrap();
    for cut in (0..whole.len()).step_by(40) {
        std::fs::write(&record, &whole[..cut]).unwrap();
        let said = refused(&site);
        assert!(
            said.contains("--as-file") && said.contains(record.to_str().unwrap()),
            "cut off at {cut}: {said}"
        );
    }
    std::fs::write(&record, &whole).unwrap();
    let (daemon, _) = run(&site, &["--as-left"]);
    assert!(state(&mut site.control()).contains("P"));
    daemon.stop_well();
}
