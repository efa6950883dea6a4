//! What a change means for clients: of other graphs, of other processes, and for the size that they were told.

use crate::{BLOCKS, Site, graph, plain};
use blockmason_tests::control::{insert, remove};
use blockmason_tests::mason::{now, until};
use blockmason_tests::raw::Raw;
use blockmason_tests::stamps::Stampers;
use blockmason_tests::{client, client_output};
use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

#[test]
fn the_image_that_has_gone_is_free_though_clients_are_connected() {
    let site = Site::new();
    site.write("vm.mason", plain());
    site.write("b.img", "");
    std::fs::File::options().write(true).open(site.path("b.img")).unwrap().set_len(64 << 20).unwrap();
    let daemon = site.run(&["vm.mason"]);
    // Idle clients, one of them in the middle of saying something.
    let mut idle: Vec<Raw> = (0..8).map(|_| Raw::ready(daemon.socket())).collect();
    idle[0].send(&0x2560_9513u32.to_be_bytes());
    let locked = |name: &str| {
        let file = std::fs::File::open(site.path(name)).unwrap();
        flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
    };
    let qemu = |name: &str| {
        let path = site.path(name);
        let output = client_output("qemu-io", &["-f", "raw", "-c", "write 0 512", path.to_str().unwrap()]);
        output.status.success()
    };
    let (mut here, mut there) = ("a.img", "b.img");
    let mut fastest = Duration::MAX;
    for _ in 0..4 {
        assert!(!qemu(here) || locked(here), "{here} is served and not locked");
        site.mason(&["replace", "A", &format!("(type file) (path {there})")]).done();
        let since = now();
        until("the image is free", || !locked(here));
        fastest = fastest.min(since.elapsed());
        assert!(qemu(here), "{here}");
        (here, there) = (there, here);
    }
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
    idle[1].write(0, &[1; 4096]);
    drop(idle);
    daemon.stop_well();
}

fn size(uri: &str) -> u64 {
    client("nbdinfo", &["--size", uri]).trim().parse().unwrap()
}

fn image(path: &Path, size: u64) {
    std::fs::File::create(path).unwrap().set_len(size).unwrap();
}

#[test]
fn a_disk_that_grows_and_shrinks() {
    let site = Site::new();
    site.write("vm.mason", plain());
    image(&site.path("large.img"), 96 << 20);
    image(&site.path("small.img"), 32 << 20);
    let daemon = site.run(&["vm.mason"]);
    let mut old = Raw::ready(daemon.socket());
    assert_eq!(size(daemon.uri()), 64 << 20);
    site.mason(&["replace", "A", "(type file) (path large.img)"]).done();
    assert_eq!(size(daemon.uri()), 96 << 20);
    old.write((64 << 20) - 4096, &[7; 4096]);
    let mut new = Raw::ready(daemon.socket());
    new.write((96 << 20) - 4096, &[7; 4096]);
    drop(new);
    // Now `old` was told 64 MiB, and that is what a disk must have.
    let shrink = ["replace", "A", "(type file) (path small.img)"];
    let said = site.mason(&shrink).refused();
    assert!(said.contains("a client is connected that was told 67108864 bytes"), "{said}");
    site.mason(&["replace", "A", "(type file) (path a.img)"]).done();
    let read_only = ["replace", "A", "(type file) (path a.img) (readonly yes)"];
    assert!(site.mason(&read_only).refused().contains("may write, and the disk would be read-only"));
    old.write(0, &[1; 4096]);
    site.mason(&[&shrink[..], &["--disconnect"]].concat()).done();
    assert!(old.ended(), "it was sent away");
    assert_eq!(size(daemon.uri()), 32 << 20);
    let mut old = Raw::ready(daemon.socket());
    assert_eq!(old.read(0, 512), [0; 512]);
    site.mason(&[&read_only[..], &["--disconnect"]].concat()).done();
    assert!(old.ended());
    assert!(client("nbdinfo", &[daemon.uri()]).contains("is_read_only: true"));
    daemon.stop_well();
}

#[test]
fn another_graph_is_left_alone() {
    let site = Site::new();
    site.write("vm.mason", plain());
    site.write("b.mason", plain().replace("vm.nbd", "b.nbd").replace("a.img", "b.img"));
    let daemon = site.run(&["vm.mason", "b.mason"]);
    let changed = Stampers::start(&site.path("vm.nbd"), 0, BLOCKS, 1, 10);
    let beside = Stampers::start(&site.path("b.nbd"), 0, BLOCKS, 2, 11);
    let mut control = site.control();
    for round in 0..20 {
        control.done("POST", "/v1/graphs/vm/edits", &insert("P (type probe)", "Guest", "A"));
        control.done("POST", "/v1/graphs/vm/edits", &remove("P"));
        let direct = if round % 2 == 0 { "yes" } else { "no" };
        let edit = json!({ "edit": "replace", "element": "A",
            "by": format!("(type file) (path a.img) (direct {direct})") });
        let body = json!({ "edits": [edit], "folder": site.folder() });
        control.done("POST", "/v1/graphs/vm/edits", &body);
    }
    let mut gated = |name: &str| control.graph(name)["live"]["gated"].clone();
    assert_eq!((gated("vm"), gated("b")), (json!(20), json!(0)));
    changed.finish();
    assert!(beside.finish() > 0);
    let graph = control.graph("b");
    let operations = graph["live"]["sources"][0]["operations"].as_array().unwrap().clone();
    assert!(!operations.is_empty() && operations.iter().all(|op| op["errors"] == 0), "{graph}");
    daemon.stop_well();
}

#[test]
fn a_graph_that_nobody_uses_is_changed_as_well() {
    let site = Site::new();
    site.write("vm.mason", graph("element P (type probe)", "Guest -> P -> A"));
    let daemon = site.run(&["vm.mason"]);
    site.mason(&["remove", "P"]).done();
    assert_eq!(size(daemon.uri()), 64 << 20);
    daemon.stop_well();
}
