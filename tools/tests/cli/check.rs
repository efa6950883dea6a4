//! `mason check`.

use crate::harness::{Home, MASON, repository};

#[test]
fn a_good_graph_is_passed_without_a_word_and_opens_nothing() {
    let home = Home::new();
    let graph = "element Guest (type nbd) (listen unix:${run}/vm.nbd)\n\
                 element Disk (type file) (path ${state}/disk.img) (size 1M)\n\
                 Guest -> Disk\n";
    home.file("vm.mason", graph);
    assert_eq!(home.mason(&["check", "vm.mason"]).done(), "");
    assert!(!home.path("state").exists() && !home.path("mason").exists());
    // Nor does what it names have to exist.
    home.file("other.mason", &graph.replace("${state}", "/no/such/folder"));
    home.mason(&["check", "vm.mason", "other.mason"]).done();
}

#[test]
fn what_is_wrong_is_drawn_with_its_place() {
    let home = Home::new();
    home.file("bad.mason", "element Disk (type fiel)\nelement Disk (type mem)\n");
    home.memory_graph("good");
    let ended = home.mason(&["check", "good.mason", "bad.mason"]);
    assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""));
    assert!(ended.err.contains("bad.mason:2:9"), "{}", ended.err);
    assert!(!ended.err.contains('\x1b'), "no colours in a pipe: {}", ended.err);
}

#[test]
fn for_programs() {
    let home = Home::new();
    home.file("bad.mason", "element Disk (type fiel)\n");
    home.memory_graph("good");
    let ended = home.mason(&["check", "--json", "good.mason", "bad.mason", "gone.mason"]);
    assert_eq!((ended.code, ended.err.as_str()), (Some(1), ""));
    let report = ended.json();
    assert_eq!(report["ok"], false);
    let graphs = report["graphs"].as_array().unwrap();
    let counts: Vec<_> = graphs.iter().map(|graph| (&graph["graph"], &graph["count"])).collect();
    assert_eq!(counts[0], (&"good.mason".into(), &0.into()));
    let error = &graphs[1]["errors"][0];
    assert_eq!((&error["code"], &error["line"]), (&"mason::unknown-type".into(), &1.into()), "{report:#}");
    assert_eq!(graphs[2]["errors"][0]["code"], "mason::unreadable", "{report:#}");
}

#[test]
fn parameters_come_from_the_command_line() {
    let home = Home::new();
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:a)\nelement D (type mem) (size ${size})\nGuest -> D\n",
    );
    let missing = home.mason(&["check", "vm.mason"]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.err.contains("-D size=VALUE"), "{}", missing.err);
    home.mason(&["check", "vm.mason", "-D", "size=1M"]).done();
    home.mason(&["check", "vm.mason", "-Dsize=2M", "-D", "state=/x"]).done();
    assert!(home.mason(&["check", "vm.mason", "-D", "size"]).misused().contains("KEY=VALUE"));
}

#[test]
fn a_graph_may_come_from_a_pipe() {
    let home = Home::new();
    let mut command = home.command("/bin/sh", &["-c", "cat vm.mason | \"$0\" check /dev/stdin", MASON]);
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:${run}/a)\nelement D (type mem) (size 1M)\nGuest -> D\n",
    );
    let output = command.env("PATH", "/usr/bin:/bin").output().unwrap();
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b""[..]));
}

#[test]
fn wrong_usage_is_told_apart() {
    let home = Home::new();
    home.mason(&["check"]).misused();
    home.mason(&["chekc"]).misused();
    home.mason(&[]).misused();
    home.mason(&["run", "a.mason", "--shards", "0"]).misused();
}

#[test]
fn every_graph_that_ships_is_good() {
    let home = Home::new();
    let graphs = repository().join("graphs").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let graphs: Vec<_> = graphs.filter(|path| path.extension().is_some_and(|e| e == "mason")).collect();
    assert!(!graphs.is_empty());
    for graph in graphs {
        home.mason(&["check", graph.to_str().unwrap()]).done();
    }
}

#[test]
fn every_command_has_help_with_examples() {
    let home = Home::new();
    for command in [
        "run",
        "check",
        "show",
        "elements",
        "bench",
        "replay",
        "status",
        "load",
        "unload",
        "get",
        "set",
        "call",
        "events",
        "completions",
    ] {
        let help = home.mason(&[command, "--help"]).done();
        assert!(help.contains("Examples:\n  mason"), "{help}");
    }
}
