//! `mason replay`: what `workload_log` has recorded.

use crate::harness::Home;
use serde_json::Value;

/// A log of 200 writes and 200 reads of 4k by `mason bench`, in a graph with the element; and of a flush whenever that ends.
fn recorded(home: &Home) {
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Workload (type workload_log) (log vm.workload)\n\
         element D (type mem) (size 800k)\n\
         Guest -> Workload -> D\n",
    );
    for percent in ["0", "100"] {
        home.mason(&["bench", "vm.mason", "--once", "--write", "--read-percent", percent]).done();
    }
}

fn operation<'a>(list: &'a Value, name: &str) -> &'a Value {
    let found = list.as_array().unwrap().iter().find(|op| op["operation"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {list:#}"))
}

#[test]
fn says_what_a_log_has() {
    let home = Home::new();
    recorded(&home);
    let found = home.mason(&["replay", "vm.workload", "--json"]).json();
    assert_eq!((&found["disk"], &found["lost"]), (&(800 << 10).into(), &0.into()), "{found:#}");
    for name in ["read", "write"] {
        let op = operation(&found["operations"], name);
        assert_eq!((&op["requests"], &op["bytes"]), (&200.into(), &(800 << 10).into()), "{op:#}");
    }
    let text = home.mason(&["replay", "vm.workload"]).done();
    assert!(text.starts_with("a disk of 800k, from ") && text.contains("write"), "{text}");
}

#[test]
fn asks_the_same_of_another_graph() {
    let home = Home::new();
    recorded(&home);
    home.memory_graph("other");
    for speed in ["1", "max"] {
        let report = home
            .mason(&["replay", "vm.workload", "other.mason", "--write", "--speed", speed, "--json"])
            .json();
        assert_eq!((&report["requests"], &report["errors"]), (&402.into(), &0.into()), "{report:#}");
        let ops = &report["sources"][0]["operations"];
        assert_eq!(
            (&operation(ops, "read")["requests"], &operation(ops, "write")["requests"]),
            (&200.into(), &200.into())
        );
        assert_eq!(report["late"].is_object(), speed == "1", "{report:#}");
    }
    // Nothing is lost that nobody has said may be.
    let text = home.mason(&["replay", "vm.workload", "other.mason", "--speed", "max"]).done();
    assert!(text.contains("200 requests that change the disk are left out"), "{text}");
    home.file("small.mason", "element G (type nbd)\nelement D (type mem) (size 400k)\nG -> D\n");
    let report =
        home.mason(&["replay", "vm.workload", "small.mason", "--write", "--speed", "max", "--json"]).json();
    assert_eq!((&report["requests"], &report["beyond_the_end"]), (&202.into(), &200.into()), "{report:#}");
}

#[test]
fn the_times_are_those_of_the_log() {
    let home = Home::new();
    recorded(&home);
    home.memory_graph("other");
    let span = home.mason(&["replay", "vm.workload", "--json"]).json()["seconds"].as_f64().unwrap();
    // Two runs of a program lie between the first request and the last.
    let report = home.mason(&["replay", "vm.workload", "other.mason", "--speed", "0.5", "--json"]).json();
    assert!(report["seconds"].as_f64().unwrap() >= span, "{span}: {report:#}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let home = Home::new();
    home.memory_graph("vm");
    home.file("no.workload", &"x".repeat(8192));
    let refused = home.mason(&["replay", "no.workload"]).failed();
    assert!(refused.contains("no log of a workload"), "{refused}");
    home.mason(&["replay", "nothing"]).failed();
    home.mason(&["replay", "no.workload", "vm.mason", "--speed", "0"]).misused();
    home.mason(&["replay", "no.workload", "--write"]).misused();
}
