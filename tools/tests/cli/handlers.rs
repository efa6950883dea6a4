//! `mason get`, `mason set`, `mason call`: what is typed, what is printed.

use crate::harness::{Daemon, Home};

/// A guest, limits inside a compound whose name has a dot in it, a log, a disk.
fn serve(home: &Home) -> Daemon {
    home.file(
        "vm.mason",
        "compound limits () {\n\
         element Copy (type throttle) (rate 20M/s)\n\
         element Probe (type probe)\n\
         element Bad (type error) (probability 0%)\n\
         element Disk (type mem) (size 1M)\n\
         Copy -> Probe -> Bad -> Disk\n\
         port in = (Copy, in)\n\
         }\n\
         element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Move (type limits)\n\
         Guest -> Move\n",
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
    assert_eq!(home.mason(&["set", "Move.Bad.probability", "0.5%", "--json"]).json()["value"], "0.5%");
    // A handler with the name of a parameter is that parameter.
    let graph = home.mason(&["show", "--graph"]).done();
    assert!(graph.contains("(rate 50M/s)") && graph.contains("(probability 0.5%)"), "{graph}");
    home.file("again.mason", &graph);
    home.mason(&["check", "again.mason"]).done();
    let tree = home.mason(&["show"]).done();
    assert!(tree.contains("Move.Copy  throttle  rate 50M/s"), "{tree}");
    assert_eq!(home.mason(&["call", "Move.Probe.reset"]).code, Some(0));
    // The flush at the end is a request, too.
    home.mason(&["set", "Move.Bad.probability", "0%"]).done();
    daemon.stop().done();
}

#[test]
fn all_of_an_element_and_all_of_all() {
    let home = Home::new();
    let daemon = serve(&home);
    let bad = home.mason(&["get", "Move.Bad"]).done();
    let wanted = "Move.Bad.probability  0%\n\
                  Move.Bad.count        unlimited\n\
                  Move.Bad.failed       0\n\
                  Move.Bad.requests     0\n\
                  Move.Bad.bytes        0\n";
    assert_eq!(bad, wanted);
    let all = home.mason(&["get"]).done();
    for line in ["Guest.requests", "Guest.latency_p99", "Move.Copy.rate", "Move.Disk.bytes"] {
        assert!(all.lines().any(|found| found.split_whitespace().next() == Some(line)), "{line} in {all}");
    }
    assert!(!all.contains("reset"), "what can only be called has no value: {all}");
    let json = home.mason(&["get", "Move.Bad", "--json", "--graph", "vm"]).json();
    let names: Vec<_> = json.as_array().unwrap().iter().map(|handler| &handler["handler"]).collect();
    assert_eq!(names, ["probability", "count", "failed", "requests", "bytes"]);
    daemon.stop().done();
}

#[test]
fn what_is_wrong_is_one_sentence() {
    let home = Home::new();
    let daemon = serve(&home);
    for (typed, said) in [
        (
            &["get", "Move.Bad.probabilty"][..],
            "Move.Bad has no handler probabilty; did you mean `probability`?",
        ),
        (&["get", "Move.Bda"], "there is no element Move"),
        (&["get", "Nowhere.rate"], "there is no element Nowhere"),
        (
            &["get", "Move.Bad.colour"],
            "Move.Bad has no handler colour; the type error has: probability, count, failed, requests, bytes",
        ),
        (&["get", "Move.Probe.reset"], "Move.Probe.reset can be called, not read"),
        (&["set", "Move.Bad.failed", "3"], "Move.Bad.failed can be read, not set"),
        (&["call", "Move.Bad.count"], "Move.Bad.count can be read and set, not called"),
        (&["set", "Move.Bad.probability", "often"], "Move.Bad.probability: expected"),
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
    for typed in [&["set", "Move.Bad"][..], &["set", "Move.Bad", "1"], &["call", "Move.Bad"], &["call"]] {
        home.mason(typed).misused();
    }
    assert_eq!(home.mason(&["get", "Move.Bad.probability"]).done(), "0%\n", "nothing has changed");
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
