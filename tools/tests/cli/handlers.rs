//! `mason get`, `mason set`, `mason call`: what is typed, what is printed.

use crate::harness::{Daemon, Home};

/// A guest, limits inside a compound whose name has a dot in it, a log, a disk.
fn serve(home: &Home) -> Daemon {
    home.file(
        "vm.mason",
        "compound Limits {\n\
         element Copy (type throttle) (rate 20M/s)\n\
         in -> Copy -> out\n\
         }\n\
         element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Move (type Limits)\n\
         element Probe (type probe)\n\
         element Bad (type error) (probability 0%)\n\
         element Disk (type mem) (size 1M)\n\
         Guest -> Move -> Probe -> Bad -> Disk\n",
    );
    home.run(&["vm.mason"], 1)
}

#[test]
fn a_value_is_read_and_set_and_stays() {
    let home = Home::new();
    let daemon = serve(&home);
    assert_eq!(home.mason(&["get", "Move.Copy.rate"]).done(), "20M/s\n");
    assert_eq!(home.mason(&["set", "Move.Copy.rate", "50M/s"]).done(), "");
    assert_eq!(home.mason(&["get", "Move.Copy.rate", "--json"]).json()["value"], "50M/s");
    assert_eq!(home.mason(&["set", "Bad.probability", "0.5%", "--json"]).json()["value"], "0.5%");
    // A handler with the name of a parameter is that parameter.
    let graph = home.mason(&["show", "--graph"]).done();
    assert!(graph.contains("(rate 50M/s)") && graph.contains("(probability 0.5%)"), "{graph}");
    home.file("again.mason", &graph);
    home.mason(&["check", "again.mason"]).done();
    let tree = home.mason(&["show"]).done();
    assert!(tree.contains("Move.Copy  throttle  rate 50M/s"), "{tree}");
    assert_eq!(home.mason(&["call", "Probe.reset"]).code, Some(0));
    daemon.stop().done();
}

#[test]
fn all_of_an_element_and_all_of_all() {
    let home = Home::new();
    let daemon = serve(&home);
    let bad = home.mason(&["get", "Bad"]).done();
    let wanted = "Bad.probability  0%\n\
                  Bad.count        unlimited\n\
                  Bad.failed       0\n\
                  Bad.requests     0\n\
                  Bad.bytes        0\n";
    assert_eq!(bad, wanted);
    let all = home.mason(&["get"]).done();
    for line in ["Guest.requests", "Guest.latency_p99", "Move.Copy.rate", "Disk.bytes"] {
        assert!(all.lines().any(|found| found.split_whitespace().next() == Some(line)), "{line} in {all}");
    }
    assert!(!all.contains("reset"), "what can only be called has no value: {all}");
    let json = home.mason(&["get", "Bad", "--json", "--graph", "vm"]).json();
    let names: Vec<_> = json.as_array().unwrap().iter().map(|handler| &handler["handler"]).collect();
    assert_eq!(names, ["probability", "count", "failed", "requests", "bytes"]);
    daemon.stop().done();
}

#[test]
fn what_is_wrong_is_one_sentence() {
    let home = Home::new();
    let daemon = serve(&home);
    for (typed, said) in [
        (&["get", "Bad.probabilty"][..], "Bad has no handler probabilty; did you mean `probability`?"),
        (&["get", "Bda"], "vm has no element Bda; did you mean `Bad`?"),
        (&["get", "Nowhere.rate"], "there is no element Nowhere"),
        (
            &["get", "Bad.colour"],
            "Bad has no handler colour; a error has: probability, count, failed, requests, bytes",
        ),
        (&["get", "Probe.reset"], "Probe.reset can be called, not read"),
        (&["set", "Bad.failed", "3"], "Bad.failed can be read, not set"),
        (&["call", "Bad.count"], "Bad.count can be read and set, not called"),
        (&["set", "Bad.probability", "often"], "Bad.probability: expected"),
        (&["set", "Move.Copy.rate", "0/s"], "Move.Copy.rate: nothing would ever pass at 0/s"),
        (
            &["set", "Move.Copy.iops", "-5"],
            "Move.Copy.iops: expected requests in a second, or `unlimited`, found `-5`",
        ),
        (&["get", "--graph", "other"], "no graph other is served; served: vm"),
    ] {
        let sentence = home.mason(typed).failed();
        assert!(sentence.starts_with(&format!("mason: {said}")), "{typed:?}: {sentence}");
    }
    for typed in [&["set", "Bad"][..], &["set", "Bad", "1"], &["call", "Bad"], &["call"]] {
        home.mason(typed).misused();
    }
    assert_eq!(home.mason(&["get", "Bad.probability"]).done(), "0%\n", "nothing has changed");
    daemon.stop().done();
}

#[test]
fn of_several_graphs_one_is_named() {
    let home = Home::new();
    home.memory_graph("one");
    home.memory_graph("two");
    let daemon = home.run(&["one.mason", "two.mason"], 2);
    let several = home.mason(&["get", "Disk.requests"]).failed();
    assert_eq!(several, "mason: several graphs are served, name one: one, two\n");
    for graph in ["two", "two.mason", "./two.mason"] {
        assert_eq!(home.mason(&["get", "Disk.requests", "--graph", graph]).done(), "0\n");
    }
    home.mason(&["unload", "two"]).done();
    home.mason(&["get", "Disk.requests"]).done();
    home.mason(&["unload", "one"]).done();
    assert_eq!(home.mason(&["get"]).failed(), "mason: the daemon serves no graph\n");
    daemon.stop().done();
}
