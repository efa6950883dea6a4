//! Volumes with a layout: signed at the first start, refused through another layout, adopted on demand.

use crate::harness::{Ended, Home};
use std::path::Path;

const STRIPE: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
    element Both (type stripe) (chunk 64k)\n\
    element Left (type file) (path left.img) (size 1M)\n\
    element Right (type file) (path right.img) (size 1M)\n\
    Guest -> Both\n(Both, left) -> Left\n(Both, right) -> Right\n";

const PLAIN: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
    element Left (type file) (path left.img)\nGuest -> Left\n";

fn head(home: &Home, image: &str) -> Option<String> {
    std::fs::read_to_string(home.path(&format!("{image}.mason-head"))).ok()
}

/// What a command says on stderr that fails.
#[track_caller]
fn refused(ended: Ended) -> String {
    assert_eq!(ended.code, Some(1), "{ended:?}");
    assert!(ended.err.starts_with("mason: "), "{ended:?}");
    ended.err
}

/// Starts a graph, and ends it.
fn serve(home: &Home, args: &[&str]) {
    home.run(args, 1).stop().done();
}

fn signed() -> Home {
    let home = Home::new();
    home.file("vm.mason", STRIPE);
    serve(&home, &["vm.mason"]);
    home
}

#[test]
fn the_first_start_signs_and_the_next_ones_go_by_it() {
    let home = signed();
    let (left, right) = (head(&home, "left.img").unwrap(), head(&home, "right.img").unwrap());
    assert!(
        left.contains("\"stripe (chunk 64k) member 0 of 2\"") && left.contains("\"complete\": true"),
        "{left}"
    );
    assert!(right.contains("member 1 of 2"), "{right}");
    home.file("vm.mason", &STRIPE.replace("(chunk 64k)", "(chunk 65536)").replace("Both", "Stripe"));
    serve(&home, &["vm.mason"]);
    assert_eq!(head(&home, "left.img").unwrap(), left);
    let shown = home.mason(&["show", "vm.mason", "--explain"]).done();
    assert!(shown.contains("Volumes with a layout:\n  Left: signed in "), "{shown}");
    home.file("vm.mason", PLAIN);
    std::fs::remove_file(home.path("left.img.mason-head")).unwrap();
    serve(&home, &["vm.mason"]);
    assert_eq!(head(&home, "left.img"), None, "a disk that is served as it is has no head");
}

#[test]
fn another_layout_is_refused_forced_and_adopted() {
    let home = signed();
    let before = head(&home, "left.img").unwrap();
    home.file("vm.mason", &STRIPE.replace("64k", "128k"));
    let refusal = refused(home.mason(&["run", "vm.mason"]));
    let lines: Vec<&str> = refusal.lines().collect();
    assert!(lines[0].starts_with("mason: Left (vm.mason:3:9): its layout is another one: "), "{refusal}");
    assert!(lines[0].ends_with("/left.img.mason-head"), "{refusal}");
    assert_eq!(lines[1], "    - stripe (chunk 64k) member 0 of 2");
    assert_eq!(lines[2], "    + stripe (chunk 128k) member 0 of 2");
    assert!(lines[3].starts_with("        member 1: "), "{refusal}");
    assert!(refusal.contains("--force") && refusal.contains("mason sign"), "{refusal}");
    assert!(!home.path("vm.nbd").exists());
    serve(&home, &["vm.mason", "--force"]);
    assert_eq!(head(&home, "left.img").unwrap(), before, "the heads stay as they are");

    let ended = home.mason(&["sign", "vm.mason"]);
    assert!(ended.out.contains("Left (vm.mason:3:9): its layout is another one"), "{ended:?}");
    assert!(ended.out.contains("    + stripe (chunk 128k) member 1 of 2"), "{ended:?}");
    assert!(refused(ended).contains("2 heads would be replaced: say --yes as well"));
    assert_eq!(head(&home, "left.img").unwrap(), before);
    home.mason(&["sign", "vm.mason", "--yes"]).done();
    serve(&home, &["vm.mason"]);
    assert_eq!(
        home.mason(&["sign", "vm.mason"]).done(),
        "Left (vm.mason:3:9): signed\nRight (vm.mason:4:9): signed\n"
    );
    home.file("vm.mason", STRIPE);
    refused(home.mason(&["run", "vm.mason"]));
}

#[test]
fn swapped_disks_are_refused() {
    let home = signed();
    home.file(
        "vm.mason",
        &STRIPE.replace("left.img", "x").replace("right.img", "left.img").replace("path x", "path right.img"),
    );
    let refusal = refused(home.mason(&["run", "vm.mason"]));
    for lines in [
        "    - stripe (chunk 64k) member 1 of 2\n    -   member 0: ",
        "    + stripe (chunk 64k) member 0 of 2\n",
    ] {
        assert!(refusal.contains(lines), "{refusal}");
    }
}

#[test]
fn a_member_alone_is_refused_until_its_head_is_removed() {
    let home = signed();
    home.file("vm.mason", PLAIN);
    let refusal = refused(home.mason(&["run", "vm.mason"]));
    assert!(refusal.contains("    + served as it is"), "{refusal}");
    assert!(refused(home.mason(&["sign", "vm.mason"])).contains("--remove removes the head"));
    assert!(refused(home.mason(&["sign", "vm.mason", "--yes"])).contains("--remove removes the head"));
    assert!(refused(home.mason(&["sign", "vm.mason", "--remove"])).contains("say --yes as well"));
    assert!(head(&home, "left.img").is_some());
    home.mason(&["sign", "vm.mason", "--remove", "--yes"]).done();
    assert_eq!(head(&home, "left.img"), None);
    serve(&home, &["vm.mason"]);
    assert!(refused(home.mason(&["sign", "vm.mason", "--remove", "--yes"])).contains("nothing to remove"));
}

#[test]
fn a_start_that_fails_leaves_no_head() {
    let home = Home::new();
    home.file("vm.mason", STRIPE);
    home.file("vm.nbd", "something of the user's");
    home.mason(&["run", "vm.mason"]).failed();
    assert_eq!((head(&home, "left.img"), head(&home, "right.img")), (None, None));
    let left = std::fs::read_dir(home.path("")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("mason-head")), "{left:?}");
    std::fs::remove_file(home.path("vm.nbd")).unwrap();
    home.file("vm.mason", &STRIPE.replace("64k", "128k"));
    serve(&home, &["vm.mason"]);
}

#[test]
fn heads_are_not_changed_while_a_daemon_serves() {
    let home = signed();
    let daemon = home.run(&["vm.mason"], 1);
    assert!(refused(home.mason(&["sign", "vm.mason"])).contains("it is locked"));
    daemon.stop().done();
}

#[test]
fn a_head_of_another_version_is_left_alone() {
    let home = signed();
    let newer = head(&home, "right.img").unwrap().replace("\"mason-head\": 1", "\"mason-head\": 9");
    home.file("right.img.mason-head", &newer);
    let refusal = refused(home.mason(&["run", "vm.mason"]));
    assert!(refusal.contains("Right (vm.mason:4:9): "), "{refusal}");
    assert!(
        refusal.contains("right.img.mason-head: its format is version 9, this program knows 3"),
        "{refusal}"
    );
    assert_eq!(head(&home, "right.img").unwrap(), newer);
    assert!(Path::new(&home.path("left.img")).exists());
}

#[test]
fn an_invariant_that_does_not_hold_stops_the_start() {
    let home = Home::new();
    home.file(
        "vm.mason",
        &format!("{STRIPE}invariant \"nothing is raw\": every path export -> file passes probe\n"),
    );
    let ended = home.mason(&["run", "vm.mason"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("does not hold: Guest -> Both -> Left"), "{}", ended.err);
    assert!(!home.path("left.img").exists());
    let json = home.mason(&["check", "--json", "vm.mason"]).json();
    assert_eq!(json["graphs"][0]["errors"][0]["code"], "mason::invariant");
}

#[test]
fn a_disk_of_a_server_has_its_head_in_the_folder_for_state() {
    let home = Home::new();
    home.memory_graph("far");
    let far = home.run(&["far.mason"], 1);
    let near = "element Guest (type nbd) (listen unix:near.nbd)\nelement Window (type slice) (length 64k)\n\
        element Far (type nbd_client) (uri nbd+unix:///?socket=far.nbd)\nGuest -> Window -> Far\n";
    home.file("near.mason", near);
    serve(&home, &["near.mason", "--control", "near.sock"]);
    let heads: Vec<_> = std::fs::read_dir(home.path("state/mason/heads")).unwrap().collect();
    let name = heads[0].as_ref().unwrap().file_name().into_string().unwrap();
    assert!(heads.len() == 1 && name.starts_with("nbd-nbd%2bunix%3a"), "{name}");
    serve(&home, &["near.mason", "--control", "near.sock"]);
    home.file("near.mason", &near.replace("(length", "(offset 4k) (length"));
    assert!(refused(home.mason(&["run", "near.mason"])).contains("- slice (offset 0) (length 64k)"));
    far.stop().done();
}

#[test]
fn a_reload_goes_by_the_heads_too() {
    let home = signed();
    let before = head(&home, "left.img").unwrap();
    let daemon = home.run(&["vm.mason"], 1);
    home.file("vm.mason", &STRIPE.replace("64k", "128k"));
    let refusal = refused(home.mason(&["reload", "vm.mason"]));
    assert!(refusal.contains("+ stripe (chunk 128k) member 0 of 2"), "{refusal}");
    let watched = STRIPE.replace("Guest -> Both", "Guest -> Seen -> Both\nelement Seen (type probe)");
    home.file("vm.mason", &watched);
    let ended = home.mason(&["reload", "vm.mason"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(head(&home, "left.img").unwrap(), before);
    // A guard that the graph gets while it runs counts from then on.
    home.file(
        "vm.mason",
        &format!("{watched}invariant \"all is seen\": every path Guest -> sink passes Seen\n"),
    );
    assert_eq!(home.mason(&["reload", "vm.mason"]).code, Some(0));
    home.file(
        "vm.mason",
        &format!("{STRIPE}invariant \"all is seen\": every path Guest -> sink passes probe\n"),
    );
    let refusal = home.mason(&["reload", "vm.mason"]);
    assert!(refusal.err.contains("\"all is seen\" does not hold"), "{refusal:?}");
    daemon.stop().done();
}
