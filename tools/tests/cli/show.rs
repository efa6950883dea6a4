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
    home.mason(&["show", "bad.mason", "--dot", "--svg"]).misused();
}
