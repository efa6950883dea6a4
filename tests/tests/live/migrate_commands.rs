//! What an operator says to moves that go on, from another terminal.

use crate::migrate::{GRAPH, TO, World};
use blockmason_tests::control::command;
use blockmason_tests::mason::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::process::Stdio;

/// Holds a move long enough to be looked at.
const SLOWLY: [&str; 4] = ["--rate", "100k/s", "--until", "begun"];

#[test]
fn a_move_is_paused_goes_on_and_is_given_up() {
    let mut world = World::new();
    world.migrate(TO, &SLOWLY).done();
    let said = world.mason(&["migrate", "status"]).done();
    assert!(said.starts_with("vm A: copying, ") && said.contains("of 16M"), "{said}");
    world.mason(&["migrate", "pause"]).done();
    world.until_state("paused");
    world.go_on();
    world.mason(&["migrate", "resume", "vm", "A"]).done();
    world.until_state("copying");
    let said = world.mason(&["migrate", "abort", "vm", "A"]).done();
    assert!(said.contains("aborted") && said.contains("a.img, as before"), "{said}");
    assert_eq!(world.site.head("b.img"), "filling");
    for what in ["pause", "resume", "abort"] {
        assert!(world.mason(&["migrate", what, "vm", "A"]).refused().contains("the move is over"));
    }
    world.is_as_before();
    // What was left of it there is in nobody's way.
    world.migrate(TO, &[]).done();
    world.starts_anew();
}

#[test]
fn a_move_given_up_serves_the_old_disk_from_a_plain_start() {
    let mut world = World::new();
    world.make_ready();
    world.mason(&["migrate", "abort"]).done();
    world.is_as_before();
    let site = world.starts_anew();
    assert_eq!((site.head("a.img"), site.head("b.img")), ("none".to_owned(), "filling".to_owned()));
}

#[test]
fn answers_in_json() {
    let world = World::new();
    let parse = |text: String| serde_json::from_str::<Value>(&text).unwrap();
    let ready = parse(world.migrate(TO, &["--cutover", "manual", "--until", "ready", "--json"]).done());
    assert_eq!((&ready["state"], &ready["total"]), (&json!("ready"), &json!(16 << 20)));
    let all = parse(world.mason(&["migrate", "status", "vm", "--json"]).done());
    assert_eq!((&all[0]["element"], &all[0]["to"]), (&json!("A"), &json!(TO)));
    assert_eq!(parse(world.mason(&["migrate", "pause", "--json"]).done())["graph"], "vm");
    world.mason(&["migrate", "resume"]).done();
    world.until_state("ready");
    let done = parse(world.mason(&["migrate", "cutover", "--json"]).done());
    assert_eq!(done[0]["state"], "done");
    assert!(done[0]["pause_seconds"].as_f64().unwrap() > 0.0, "{done}");
    world.starts_anew();
}

#[test]
fn a_mirror_is_kept_and_goes_back() {
    let mut world = World::new();
    let said = world.migrate(TO, &["--keep-mirror"]).done();
    assert!(said.contains("mirroring"), "{said}");
    world.go_on();
    assert_eq!(
        (world.site.head("a.img"), world.site.head("b.img")),
        ("filling".to_owned(), "moving".to_owned())
    );
    let said = world.mason(&["migrate", "vm", "A", "--back"]).done();
    assert!(said.contains("done") && said.contains("a.img now"), "{said}");
    world.go_on();
    world.verify();
    assert_eq!(
        (world.site.head("a.img"), world.site.head("b.img")),
        ("active".to_owned(), "moved".to_owned())
    );
    world.site.has_no_move();
    world.daemon.stop_well();
}

#[test]
fn a_mirror_is_let_go() {
    let world = World::new();
    world.migrate(TO, &["--keep-mirror"]).done();
    world.go_on();
    let said = world.mason(&["migrate", "abort"]).done();
    assert!(said.contains("b.img") && said.contains("its mirror no more"), "{said}");
    assert_eq!(
        (world.site.head("a.img"), world.site.head("b.img")),
        ("moved".to_owned(), "active".to_owned())
    );
    world.go_on();
    world.site.has_no_move();
    world.starts_anew();
}

#[test]
fn a_mirror_outlives_the_daemon() {
    let mut world = World::new();
    world.migrate(TO, &["--keep-mirror"]).done();
    let ledgers = world.verify();
    let mut world = world.killed_and_started(ledgers);
    assert_eq!(world.status()["state"], "mirroring");
    world.go_on();
    world.mason(&["migrate", "vm", "A", "--back"]).done();
    world.go_on();
    world.verify();
    world.daemon.stop_well();
}

#[test]
fn a_command_that_is_interrupted_leaves_the_daemon_at_work() {
    let world = World::new();
    let args = ["migrate", "vm", "A", "--to", TO, "--rate", "2M/s", "--control", "c.sock"];
    let mut tool = command(world.site.folder(), &args);
    let mut tool = tool.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    until("it has begun", || !world.status().is_null());
    kill_process(Pid::from_child(&tool), Signal::INT).unwrap();
    assert!(!tool.wait().unwrap().success());
    world.go_on();
    assert_eq!(world.status()["state"], "copying");
    world.until_state("done");
    world.starts_anew();
}

#[test]
fn two_disks_of_a_graph_cut_over_at_one_instant() {
    let other = "element Other (type nbd) (listen unix:other.nbd)
element B (type file) (path c.img) (size 16M)
Other -> B
";
    let world = World::of(&format!("{GRAPH}{other}"));
    world.make_ready();
    let second =
        ["migrate", "vm", "B", "--to", "file (path d.img)", "--cutover", "manual", "--until", "ready"];
    world.mason(&second).done();
    let said = world.mason(&["migrate", "pause"]).refused();
    assert!(said.contains("several disks move, name one: vm A, vm B"), "{said}");
    let said = world.mason(&["migrate", "cutover", "vm", "A", "vm", "B"]).done();
    assert_eq!(said.matches(": done").count(), 2, "{said}");
    world.go_on();
    for (old, new) in [("a.img", "b.img"), ("c.img", "d.img")] {
        assert_eq!((world.site.head(old), world.site.head(new)), ("moved".to_owned(), "active".to_owned()));
    }
    world.starts_anew();
}

#[test]
fn disks_of_two_graphs_cut_over_at_one_instant() {
    let world = World::new();
    world.site.write("other.mason", GRAPH.replace("vm.nbd", "other.nbd").replace("a.img", "c.img"));
    world.mason(&["load", "other.mason"]).done();
    world.make_ready();
    let second =
        ["migrate", "other", "A", "--to", "file (path d.img)", "--cutover", "manual", "--until", "ready"];
    world.mason(&second).done();
    assert!(world.mason(&["migrate", "cutover", "vm"]).code == Some(2));
    let said = world.mason(&["migrate", "cutover", "vm", "A", "other", "A"]).done();
    assert_eq!(said.matches(": done").count(), 2, "{said}");
    world.go_on();
    for (old, new) in [("a.img", "b.img"), ("c.img", "d.img")] {
        assert_eq!((world.site.head(old), world.site.head(new)), ("moved".to_owned(), "active".to_owned()));
    }
    world.starts_anew();
}

#[test]
fn a_move_that_goes_on_is_waited_for() {
    let world = World::new();
    world.migrate(TO, &SLOWLY).done();
    let late = world.mason(&["migrate", "wait", "--until", "ready", "--timeout", "100ms"]);
    assert_eq!(late.code, Some(1), "{late:?}");
    assert!(late.refused().contains("not come that far in time"));
    world.mason(&["set", "A_copy.rate", "unlimited"]).done();
    let said = world.mason(&["migrate", "wait", "vm", "A", "--timeout", "1m"]).done();
    assert!(said.contains("vm A: done") && said.contains("b.img now"), "{said}");
    assert!(world.mason(&["migrate", "wait"]).refused().contains("no disk is being moved"));
    let said = world.mason(&["migrate", "wait", "vm", "A"]).done();
    assert!(said.contains("vm A: done"), "{said}");
    world.migrate("file (path c.img)", &SLOWLY).done();
    let mut wait = command(world.site.folder(), &["migrate", "wait", "--control", "c.sock"]);
    let mut wait = wait.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    world.mason(&["migrate", "abort"]).done();
    assert_eq!(wait.wait().unwrap().code(), Some(1), "as the command that has begun it");
    world.starts_anew();
}
