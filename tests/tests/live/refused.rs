//! What cannot be served, reloaded while a client works: it is refused, and the client notices nothing.

use crate::{BLOCKS, Site, graph, plain};
use blockmason_tests::control::{insert, reload};
use blockmason_tests::raw::{READ, Raw};
use blockmason_tests::stamps::Stampers;
use serde_json::json;
use std::os::unix::net::UnixListener;

#[test]
fn bad_files() {
    let site = Site::new();
    // Long enough to be cut off at many places.
    let whole = graph(
        "# what is cut off here and there\nparam rate = 1G/s\nelement Limit (type throttle) (rate ${rate})\n\
         element Low (type slice) (length 32M)\nelement High (type slice) (offset 32M)\n\
         element Both (type linear)",
        "Guest -> Limit -> Both\n(Both, low) -> Low -> A\n(Both, high) -> High -> A\n\
         invariant \"limited\": every path export -> file passes throttle",
    );
    site.write("vm.mason", &whole);
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 2);
    let mut control = site.control();
    let before = site.mason(&["show", "--graph", "vm"]).out;
    let refuse = |name: &str, bytes: &[u8], why: &str| {
        site.write(name, bytes);
        let said = site.mason(&["reload", name, "--graph", "vm"]).refused();
        assert!(said.contains(why), "{name}: {said}");
    };
    refuse("wrong.mason", whole.replace("(rate", "(rat").as_bytes(), "rat");
    refuse("empty.mason", b"", "mason::");
    refuse("binary.mason", &[0x7f, b'E', b'L', b'F', 0xff, 0, 1, 2], "UTF-8");
    refuse("nul.mason", b"element A (type mem) \0", "mason::");
    refuse("deep.mason", "(".repeat(100_000).as_bytes(), "mason::");
    assert!(site.mason(&["reload", "gone.mason"]).refused().contains("gone.mason"));
    assert!(site.mason(&["reload", "."]).refused().contains("it is a folder"));
    // Sent past the command, which would not let them pass.
    let place = site.path("vm.mason");
    for cut in (0..whole.len()).step_by(20) {
        let body = reload(&place, &whole[..cut], &json!({}));
        let (status, answer) = control.ask("POST", "/v1/graphs/vm/reload", &body);
        assert_eq!(status, 400, "cut off at {cut}: {answer}");
        assert!(answer["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer}");
    }
    let same = site.mason(&["reload", "vm.mason"]).done();
    assert!(same.starts_with("nothing changes"), "{same}");
    assert_eq!(site.mason(&["show", "--graph", "vm"]).out.lines().count(), before.lines().count());
    stampers.go_on(200);
    stampers.finish();
    assert_eq!(control.graph("vm")["live"]["gated"], 0);
    daemon.stop_well();
}

#[test]
fn elements_that_cannot_be_built_or_opened() {
    let site = Site::new();
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 3);
    let (_taken, _dead) =
        (UnixListener::bind(site.path("taken.nbd")).unwrap(), site.write("plain.nbd", "mine"));
    let refuse = |args: &[&str], why: &str| {
        let said = site.mason(args).refused();
        assert!(said.contains(why), "{args:?}: {said}");
    };
    refuse(&["replace", "A", "(type file) (path gone.img)"], "gone.img: there is no such file");
    refuse(&["replace", "A", "(type file) (path .)"], "A");
    refuse(
        &["replace", "A", "(type nbd_client) (uri nbd+unix:///?socket=gone.nbd) (reconnect 100ms)"],
        "gone.nbd",
    );
    refuse(&["replace", "A", "(type mem) (size 1M)"], "was told 67108864 bytes, and there would be 1048576");
    refuse(&["replace", "A", "(type file) (path a.img) (readonly yes)"], "the disk would be read-only");
    for (socket, why) in [("taken.nbd", "another process serves this socket"), ("plain.nbd", "is no socket")]
    {
        refuse(&["add", &format!("element B (type nbd) (listen unix:{socket}) B -> A")], why);
        let moved = plain().replace("vm.nbd", socket).replace("Guest", "Host");
        site.write("next.mason", moved);
        refuse(&["reload", "next.mason", "--graph", "vm", "--disconnect"], why);
    }
    // One good change and one bad one in the same request: neither is made.
    refuse(
        &[
            "add",
            "element B (type nbd) (listen unix:b.nbd) (name b) B -> A",
            "element C (type nbd) (listen unix:taken.nbd) C -> A",
        ],
        "taken.nbd",
    );
    assert!(!site.path("b.nbd").exists());
    assert_eq!(std::fs::read_to_string(site.path("plain.nbd")).unwrap(), "mine");
    stampers.go_on(200);
    stampers.finish();
    Raw::ready(daemon.socket());
    daemon.stop_well();
}

#[test]
fn a_request_that_does_not_end() {
    let site = Site::new();
    // Another export of the image, whose reads take their time.
    let slow = "element Slow (type delay) (read 60s) element Other (type nbd) (listen unix:slow.nbd)";
    site.write("vm.mason", graph(slow, "Guest -> A Other -> Slow -> A"));
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(&site.path("vm.nbd"), 0, BLOCKS, 2, 4);
    let mut stuck = Raw::ready(&site.path("slow.nbd"));
    for number in 0..3 {
        stuck.request(READ, number * 8192, 4096);
    }
    let mut control = site.control();
    blockmason_tests::mason::until("three reads wait", || {
        let graph = control.graph("vm");
        let edges = graph["edges"].as_array().unwrap();
        edges.iter().any(|edge| edge["from"] == "Slow" || (edge["to"] == "Slow" && edge["requests"] == 3))
    });
    let gated = ["replace", "A", "(type file) (path a.img) (direct yes)", "--deadline", "1s"];
    let said = site.mason(&gated).refused();
    assert!(said.contains("the graph has not been changed"), "{said}");
    for number in 0..3 {
        assert!(said.contains(&format!("Other: read of 4096 at {}", number * 8192)), "{said}");
    }
    stampers.go_on(200);
    // What needs no gate goes on all the same.
    control.done("POST", "/v1/graphs/vm/edits", &insert("P (type probe)", "Guest", "A"));
    stampers.go_on(200);
    assert_eq!(control.graph("vm")["live"]["gated"], 1, "the one that was given up");
    stampers.finish();
    drop(stuck);
    drop(daemon);
}

#[test]
fn what_a_handler_does_not_take() {
    let site = Site::new();
    site.write("vm.mason", graph("element Limit (type throttle)", "Guest -> Limit -> A"));
    let daemon = site.run(&["vm.mason"]);
    let stampers = Stampers::start(daemon.socket(), 0, BLOCKS, 2, 5);
    for value in ["fast", "0/s", "", "99999999999999999999999/s", "1M/s 2M/s", "1M/s) (iops 1", "\u{1}"] {
        let said = site.mason(&["set", "Limit.rate", value]).refused();
        assert!(said.contains("Limit"), "{value}: {said}");
    }
    assert!(site.mason(&["set", "Limit.rat", "1M/s"]).refused().contains("rat"));
    assert!(site.mason(&["set", "Gone.rate", "1M/s"]).refused().contains("Gone"));
    assert_eq!(site.mason(&["get", "Limit.rate"]).done(), "unlimited\n");
    stampers.go_on(100);
    stampers.finish();
    daemon.stop_well();
}
