//! `mason show` on graph files.

use crate::harness::Home;

/// Two exports over one disk; a name full of markup.
fn shared(home: &Home) {
    home.file(
        "vm.mason",
        "element A (type nbd) (listen unix:vm.nbd) (name \"<a&b>\\\"\")\n\
         element B (type nbd) (listen unix:vm.nbd) (name b)\n\
         element Disk (type file) (path disk.img) (size 3M)\n\
         A -> Disk\nB -> Disk\n",
    );
}

#[test]
fn as_a_tree() {
    let home = Home::new();
    shared(&home);
    let tree = home.mason(&["show", "vm.mason"]).done();
    let expected = "vm  vm.mason\n\
                    A  nbd  listen unix:vm.nbd, name <a&b>\"\n\
                    -> Disk  file  path disk.img, size 3M\n\
                    B  nbd  listen unix:vm.nbd, name b\n\
                    -> Disk ^\n";
    assert_eq!(tree, expected);
    assert!(!home.path("disk.img").exists());
}

#[test]
fn for_graphviz_and_for_programs() {
    let home = Home::new();
    shared(&home);
    let dot = home.mason(&["show", "vm.mason", "--dot"]).done();
    assert!(dot.contains(r#""A" [label="A\nnbd\nlisten unix:vm.nbd, name <a&b>\""];"#), "{dot}");
    assert!(dot.contains(r#""B" -> "Disk""#), "{dot}");
    let graph = &home.mason(&["show", "vm.mason", "--json"]).json()[0];
    assert_eq!(graph["elements"][2]["place"], "vm.mason:3:9");
    assert_eq!(graph["edges"].as_array().unwrap().len(), 2);
}

#[test]
fn as_a_picture() {
    let home = Home::new();
    shared(&home);
    let svg = home.mason(&["show", "vm.mason", "--svg"]).done();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("&lt;a&amp;b&gt;&quot;") && !svg.contains("<a&b>"), "{svg}");
    assert_eq!(svg.matches("marker-end").count(), 2);
}

#[test]
fn as_a_graph_file_that_means_the_same() {
    let home = Home::new();
    shared(&home);
    let printed = home.mason(&["show", "vm.mason", "--graph"]).done();
    home.file("again.mason", &printed);
    assert_eq!(home.mason(&["show", "again.mason", "--graph"]).done(), printed);
}

#[test]
fn explained() {
    let home = Home::new();
    shared(&home);
    let text = home.mason(&["show", "vm.mason", "--explain"]).done();
    let disk = text.lines().find(|line| line.contains("Disk ")).unwrap();
    assert!(disk.contains("3M") && disk.contains("discard") && disk.contains("flush for dur"), "{text}");
    assert!(text.contains("(Disk, in) <- (A, out), (B, out)"), "{text}");
    assert!(!home.path("vm.nbd").exists(), "exports are not opened");
}

#[test]
fn a_bad_graph_is_not_drawn() {
    let home = Home::new();
    home.file("bad.mason", "element Disk (type fiel)\n");
    let ended = home.mason(&["show", "bad.mason"]);
    assert_eq!((ended.code, ended.out.as_str()), (Some(1), ""));
    assert!(home.mason(&["show"]).failed().contains("no daemon runs"));
    assert!(home.mason(&["show", "--graph"]).failed().contains("no daemon runs"));
    home.mason(&["show", "bad.mason", "--interval", "1s"]).misused();
    home.mason(&["show", "bad.mason", "--dot", "--svg"]).misused();
}

#[test]
fn a_running_graph_in_every_form() {
    let home = Home::new();
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Limit (type throttle) (rate 50M/s)\n\
         element Disk (type file) (path disk.img) (size 1M)\n\
         Guest -> Limit -> Disk\n",
    );
    let daemon = home.run(&["vm.mason"], 1);
    let mut guest = crate::guest::Guest::connect(&home, "vm.nbd");
    (0..8).for_each(|_| guest.read(0, 512));
    let tree = home.mason(&["show", "vm"]).done();
    assert!(tree.contains("[8 requests, 4k]"), "{tree}");
    assert!(home.mason(&["show", "vm", "--dot"]).done().contains("8 requests, 4k"));
    assert!(home.mason(&["show", "vm", "--svg"]).done().contains("8 requests, 4k"));
    assert_eq!(home.mason(&["show", "vm", "--json"]).json()[0]["edges"][0]["requests"], 8);
    let rates = home.mason(&["show", "vm", "--interval", "50ms"]).done();
    assert!(rates.contains("[0 requests/s, 0/s]"), "{rates}");
    let rates = home.mason(&["show", "--interval", "50ms", "--json"]).json();
    assert_eq!(rates[0]["edges"][0]["rate"]["requests_per_second"], 0.0);
    // What handlers have set is part of the graph.
    home.mason(&["set", "Limit.rate", "20M/s"]).done();
    let printed = home.mason(&["show", "vm", "--graph"]).done();
    assert!(printed.contains("(rate 20M/s)") && printed.contains("(path disk.img)"), "{printed}");
    home.file("again.mason", &printed);
    assert_eq!(home.mason(&["show", "again.mason", "--graph"]).done(), printed);
    let unknown = home.mason(&["show", "vn"]).failed();
    assert_eq!(unknown, "mason: no graph vn is served; served: vm\n");
    drop(guest);
    daemon.stop().done();
}
