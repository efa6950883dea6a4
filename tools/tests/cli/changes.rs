//! The commands that change a running graph: what they print, refuse, and leave for the next start.

use crate::harness::{Daemon, Ended, Home};
use rustix::process::Signal;

const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
    element Limit (type throttle) (rate 20M/s)\n\
    element Disk (type file) (path disk.img) (size 1M)\n\
    Guest -> Limit -> Disk\n";

fn served() -> (Home, Daemon) {
    let home = Home::new();
    home.file("vm.mason", GRAPH);
    let daemon = home.run(&["vm.mason"], 1);
    (home, daemon)
}

/// What a change says, without how long it took.
#[track_caller]
fn said(ended: &Ended, text: &str) -> String {
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let lines = text.lines().filter(|line| !line.starts_with("done in "));
    lines.map(|line| format!("{line}\n")).collect()
}

/// An edit's words, and the edges of the graph that it prints.
#[track_caller]
fn edited(home: &Home, args: &[&str]) -> (String, String) {
    let ended = home.mason(args);
    let edges: Vec<_> = ended.out.lines().filter(|line| line.contains(" -> ")).collect();
    (said(&ended, &ended.err), edges.join("; "))
}

const UNSAVED: &str = "the graph's file says something else: `mason save` writes it anew\n";

/// Ends a daemon as a crash would.
fn crash(daemon: Daemon) {
    daemon.signal(Signal::KILL);
    daemon.end();
}

#[test]
fn edits_say_what_they_change_and_print_the_graph() {
    let (home, daemon) = served();
    let (words, edges) = edited(&home, &["insert", "probe", "between", "Guest", "and", "Limit"]);
    let probe =
        "+ Probe (probe)\n- Guest -> Limit\n+ Guest -> Probe\n+ Probe -> Limit\n  3 kept\nwithout a pause\n";
    assert_eq!(words, format!("{probe}{UNSAVED}"));
    assert_eq!(edges, "Guest -> Probe; Limit -> Disk; Probe -> Limit");
    let (words, _) = edited(&home, &["remove", "Probe"]);
    assert_eq!(
        words,
        "- Probe (probe)\n- Guest -> Probe\n- Probe -> Limit\n+ Guest -> Limit\n  3 kept\nwithout a pause\n"
    );
    let (_, edges) = edited(&home, &["add", "element P (type probe)  Guest -> P -> Disk"]);
    assert_eq!(edges, "Guest -> P; P -> Disk", "what nothing reaches goes along");
    let (_, edges) = edited(&home, &["connect", "Guest -> Disk"]);
    assert_eq!(edges, "Guest -> Disk");
    let (words, _) =
        edited(&home, &["replace", "Disk", "(type file) (path disk.img) (size 1M) (direct yes)"]);
    assert!(
        words.starts_with("! Disk (file) rebuilt; direct: no -> yes\n  1 kept\nrequests wait at a gate"),
        "{words}"
    );
    let tee = "element Both (type linear) element High (type null) (size 1M)\n(Both, low) -> Disk (Both, high) -> High";
    let (words, edges) = edited(&home, &["replace", "Disk", tee]);
    assert!(words.contains("+ Both (linear)\n+ High (null)\n"), "{words}");
    assert_eq!(edges, "Guest -> Both; (Both, low) -> Disk; (Both, high) -> High");
    let (words, edges) = edited(&home, &["disconnect", "(Both, high) -> High", "--sign", "--disconnect"]);
    assert!(words.contains("- High (null)\n"), "{words}");
    assert_eq!(edges, "Guest -> Both; (Both, low) -> Disk");
    daemon.stop().done();
}

#[test]
fn edits_that_make_no_sense_change_nothing() {
    let (home, daemon) = served();
    let before = home.mason(&["show", "--graph"]).done();
    for (args, sentence) in [
        (&["remove", "Nope"][..], "edit:1:1: there is no element Nope"),
        (&["remove", "Disk"], "Limit leads to Disk, and would lead nowhere (connect Limit to something else"),
        (&["insert", "nope", "between", "Guest", "and", "Limit"], "there is no type `nope`"),
        (&["insert", "prob", "between", "Guest", "and", "Limit"], "did you mean `probe`?"),
        (&["insert", "probe", "between", "Guest", "and", "Disk"], "(from Guest lead: Guest -> Limit)"),
        (&["connect", "Guest -> Nowhere"], "there is no element `Nowhere`"),
        (&["disconnect", "Guest -> Disk"], "there is no such edge (from Guest lead: Guest -> Limit)"),
        (&["disconnect", "Guest -> Limit"], "no edge leaves port `out` of `Guest`"),
        (&["replace", "Disk", "(type file) (path gone.img)"], "gone.img: there is no such file"),
        (&["add", "include \"other.mason\""], "an edit includes no file"),
        (&["remove", "Limit", "--graph", "nope"], "no graph nope is served; served: vm"),
        (&["save", "nope"], "no graph nope is served; served: vm"),
        (&["commit"], "vm is not being tried"),
        (&["discard"], "vm is not being tried"),
    ] {
        let refusal = home.mason(args).failed();
        assert!(refusal.contains(sentence), "{args:?}: {refusal}");
    }
    for args in [
        &["add"][..],
        &["remove"],
        &["connect"],
        &["disconnect"],
        &["replace", "Disk"],
        &["reload"],
        &["try"],
        &["insert", "probe", "betwixt", "Guest", "and", "Disk"],
        &["reload", "vm.mason", "--save", "--dry-run"],
        &["reload", "vm.mason", "--sign", "--force"],
        &["reload", "vm.mason", "--deadline", "soon"],
        &["try", "vm.mason", "--save"],
        &["try", "vm.mason", "--sign"],
        &["set", "Limit", "5M/s"],
    ] {
        home.mason(args).misused();
    }
    assert_eq!(home.mason(&["show", "--graph"]).done(), before);
    daemon.stop().done();
}

#[test]
fn reloads_say_what_they_change() {
    let (home, daemon) = served();
    assert_eq!(home.mason(&["reload", "vm.mason"]).done(), "nothing changes\n");
    home.file("vm.mason", &GRAPH.replace("20M", "30M"));
    let change = "~ Limit (throttle) changed in place; rate: 20M/s -> 30M/s\n  2 kept\nwithout a pause\n";
    assert_eq!(home.mason(&["reload", "vm.mason", "--dry-run"]).done(), change);
    assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "20M/s\n", "a dry run changes nothing");
    let ended = home.mason(&["reload", "vm.mason"]);
    assert_eq!(said(&ended, &ended.out), change);
    for (name, text) in
        [("wrong", GRAPH.replace("Limit -> D", "Limit -> B")), ("half", GRAPH[..60].to_owned())]
    {
        let file = format!("{name}.mason");
        home.file(&file, &text);
        let (reload, check) = (home.mason(&["reload", &file]), home.mason(&["check", &file]));
        assert_eq!((reload.code, check.code), (Some(1), Some(1)), "{reload:?}");
        let drawn = format!("{}{}", check.out, check.err);
        assert!(!reload.err.is_empty() && drawn.contains(reload.err.trim_end()), "{reload:?} {check:?}");
    }
    assert!(home.mason(&["reload", "none.mason"]).err.contains("cannot read `none.mason`"));
    assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "30M/s\n");
    daemon.stop().done();
}

#[test]
fn each_command_writes_json() {
    let (home, daemon) = served();
    home.file("new.mason", &GRAPH.replace("20M", "30M"));
    for (args, changes) in [
        (&["insert", "probe", "between", "Guest", "and", "Limit"][..], true),
        (&["remove", "Probe"], true),
        (&["add", "element P (type probe) Guest -> P -> Limit"], true),
        (&["connect", "Guest -> Limit"], true),
        (&["replace", "Limit", "(type throttle) (rate 5M/s)"], true),
        (&["reload", "new.mason"], true),
        (&["reload", "new.mason"], false),
        (&["try", "vm.mason"], true),
        (&["discard"], true),
        (&["try", "vm.mason"], true),
        (&["commit"], true),
    ] {
        let ended = home.mason(&[args, &["--json"]].concat());
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{args:?}");
        let json = ended.json();
        assert_eq!((&json["done"], &json["changes"]), (&true.into(), &changes.into()), "{args:?} {json}");
        assert!(json["graph"].as_str().unwrap().contains("element Guest"), "{json}");
    }
    let dry = home.mason(&["reload", "new.mason", "--dry-run", "--json"]).json();
    assert_eq!(
        (&dry["done"], &dry["changes"], &dry["took_seconds"]),
        (&false.into(), &true.into(), &().into())
    );
    let saved = home.mason(&["save", "--json"]).json();
    assert!(saved["saved"].as_str().unwrap().ends_with("/vm.mason"), "{saved}");
    daemon.stop().done();
}

#[test]
fn a_parameter_that_is_set_is_part_of_the_graph_and_of_what_is_left() {
    let (home, daemon) = served();
    let records = || std::fs::read_dir(home.path("state/mason/left")).map_or(0, Iterator::count);
    home.mason(&["set", "Limit.rate", "5M/s"]).done();
    assert!(home.mason(&["show", "--graph"]).done().contains("(rate 5M/s)"));
    assert_eq!(records(), 1);
    home.mason(&["save"]).done();
    assert_eq!(records(), 0);
    assert!(std::fs::read_to_string(home.path("vm.mason")).unwrap().contains("(rate 5M/s)"));
    daemon.stop().done();
}

#[test]
fn of_two_graphs_one_is_named() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let daemon = home.run(&["one.mason", "two.mason"], 2);
    let insert = ["insert", "probe", "between", "Guest", "and", "Disk"];
    let refusal = home.mason(&insert);
    assert!(
        refusal.code != Some(0) && refusal.err.contains("one") && refusal.err.contains("two"),
        "{refusal:?}"
    );
    let (_, edges) = edited(&home, &[&insert[..], &["--graph", "two"]].concat());
    assert_eq!(edges, "Guest -> Probe; Probe -> Disk");
    assert!(!home.mason(&["show", "one", "--graph"]).done().contains("Probe"));
    daemon.stop().done();
}

#[test]
fn after_a_crash_the_next_start_knows() {
    let (home, daemon) = served();
    crash(daemon);
    home.run(&["vm.mason"], 1).stop().done();

    let daemon = home.run(&["vm.mason"], 1);
    home.mason(&["set", "Limit.rate", "5M/s"]).done();
    crash(daemon);
    for _ in 0..2 {
        let daemon = home.run(&["vm.mason"], 1);
        assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "20M/s\n");
        let warning = daemon.stop().err;
        assert!(
            warning.contains("the file is served, and `--as-left` would serve it as it ran"),
            "{warning}"
        );
    }
    let daemon = home.run(&["vm.mason", "--as-left"], 1);
    assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "5M/s\n");
    edited(&home, &["replace", "Disk", "(type file) (path other.img) (size 1M)"]);
    crash(daemon);
    let refusal = home.mason(&["run", "vm.mason"]);
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.err.contains("! Disk (file) rebuilt; path: "), "{refusal:?}");
    assert!(
        refusal.err.ends_with("`--as-left` serves it as it ran, `--as-file` as the file says\n"),
        "{refusal:?}"
    );
    home.run(&["vm.mason", "--as-file"], 1).stop().done();
    home.run(&["vm.mason"], 1).stop().done();
}

/// What knows in memory what is on a disk finds it out anew when the disk goes back.
#[test]
fn a_volume_goes_back_with_its_disk() {
    const MIB: u64 = 1 << 20;
    let home = Home::new();
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Volume (type radix) (volume v) (size 64M)\n\
         element Trees (type isolation)\n\
         element Store (type block_store)\n\
         element Disk (type file) (path vm.pool) (size 160M)\n\
         Guest -> Volume -> Trees -> Store -> Disk\n",
    );
    let write = |at: u64, len: u64, byte: u8| {
        let mut client = home.nbd_client("vm.nbd");
        client.write(at * MIB, &vec![byte; (len * MIB) as usize]).unwrap();
        client.send(3, 0, 0).unwrap();
    };
    let reads = |at: u64, byte: u8| {
        let found = home.nbd_client("vm.nbd").read(at * MIB, 4096).unwrap();
        assert!(found.iter().all(|found| *found == byte), "at {at} MiB: {}, not {byte}", found[0]);
    };
    let daemon = home.run(&["vm.mason"], 1);
    write(0, 4, 1);
    assert_eq!(home.mason(&["try", "vm.mason"]).code, Some(0));
    write(8, 24, 2);
    home.mason(&["call", "Volume.snapshot", "s"]).done();
    home.mason(&["call", "Volume.checkpoint"]).done();
    assert_eq!(home.mason(&["discard", "--disconnect"]).code, Some(0));
    reads(0, 1);
    reads(8, 0);
    assert_eq!(home.mason(&["get", "Volume.snapshots"]).done(), "");
    write(40, 8, 3);
    write(0, 1, 4);
    assert_eq!(daemon.stop().code, Some(0));
    assert_eq!(home.mason(&["pool", "check", "vm.pool"]).code, Some(0));
    let daemon = home.run(&["vm.mason"], 1);
    for (at, byte) in [(0, 4), (2, 1), (8, 0), (41, 3)] {
        reads(at, byte);
    }
    daemon.stop();
}

#[test]
fn a_graph_on_trial_is_kept_or_given_up() {
    let (home, daemon) = served();
    home.file("new.mason", &GRAPH.replace("20M", "30M"));
    let ended = home.mason(&["try", "new.mason"]);
    let words = said(&ended, &ended.out);
    assert!(words.contains("+ Disk_try (cow)\n") && !words.contains("mason save"), "{words}");
    let busy = "mason: vm is being tried: `mason commit` or `mason discard` ends that first\n";
    for args in [&["try", "new.mason"][..], &["reload", "vm.mason"], &["remove", "Limit"], &["save"]] {
        assert_eq!(home.mason(args).failed(), busy, "{args:?}");
    }
    assert_eq!(std::fs::read_to_string(home.path("vm.mason")).unwrap(), GRAPH);
    let client = home.nbd_client("vm.nbd");
    let refusal = home.mason(&["discard"]).failed();
    assert!(
        refusal.contains("would lose its disk; end it first, or send it away with --disconnect"),
        "{refusal}"
    );
    assert_eq!(home.mason(&["discard", "--disconnect"]).code, Some(0));
    drop(client);
    assert_eq!(home.mason(&["get", "Limit.rate"]).done(), "20M/s\n");
    assert_eq!(home.mason(&["discard"]).failed(), "mason: vm is not being tried\n");

    assert_eq!(home.mason(&["try", "new.mason"]).code, Some(0));
    crash(daemon);
    assert_eq!(home.mason(&["run", "vm.mason"]).code, Some(1), "neither without being told which");
    let daemon = home.run(&["vm.mason", "--as-left"], 1);
    assert_eq!(home.mason(&["reload", "vm.mason"]).failed(), busy, "the trial goes on");
    assert_eq!(home.mason(&["commit", "--save"]).code, Some(0));
    assert_eq!(home.mason(&["commit"]).failed(), "mason: vm is not being tried\n");
    assert!(!home.mason(&["show", "--graph"]).done().contains("_try"));
    daemon.stop().done();
    home.run(&["vm.mason"], 1).stop().done();
}
