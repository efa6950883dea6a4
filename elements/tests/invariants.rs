//! What the elements of the library carry, as invariants see it.
#![allow(clippy::unwrap_used, reason = "tests panic")]

use blockmason::lang::{Defines, NoFiles, parse_checked};
use blockmason_elements::ALL;

/// True if the graph `Guest -> element -> Disk` holds to the rule.
fn holds(element: &str, disk: &str, rule: &str) -> bool {
    let text = format!(
        "element Guest (type nbd) (listen unix:x) element E {element} element Disk {disk}\n\
         Guest -> E -> Disk invariant \"x\": {rule}"
    );
    let checked = parse_checked(&NoFiles, "t".as_ref(), "/t".into(), text, &Defines::new(), ALL);
    match checked {
        Ok(_) => true,
        Err(errors) => {
            assert_eq!(errors.iter().next().unwrap().code, "mason::invariant", "{errors}");
            false
        }
    }
}

#[test]
fn who_stops_writes_and_reads() {
    let (probe, disk) = ("(type probe)", "(type mem) (size 1M)");
    for (element, disk, writes, reads) in [
        (probe, disk, true, true),
        ("(type readonly)", disk, false, true),
        (probe, "(type file) (path x)", true, true),
        (probe, "(type file) (path x) (readonly yes)", false, true),
        (probe, "(type nbd_client) (uri nbd://h/x)", true, true),
        (probe, "(type nbd_client) (uri nbd://h/x) (readonly yes)", false, true),
        ("(type filter) (drop write)", disk, true, true),
        ("(type filter) (drop write discard write_zeroes)", disk, false, true),
        ("(type filter) (drop write discard write_zeroes) (range 0-4k)", disk, true, true),
        ("(type filter) (drop write discard write_zeroes) (origin guest)", disk, true, true),
        ("(type filter) (drop read)", disk, true, false),
        ("(type filter) (drop read) (size 512-)", disk, true, true),
        ("(type filter) (keep read)", disk, false, true),
        ("(type filter) (keep read discard) (range 0-4k)", disk, true, true),
        ("(type filter) (keep write)", disk, true, false),
        ("(type filter) (keep cache)", disk, false, false),
    ] {
        let found = |kind: &str| !holds(element, disk, &format!("no {kind} path Guest -> Disk"));
        assert_eq!((found("write"), found("read"), found("")), (writes, reads, true), "{element} {disk}");
    }
}

#[test]
fn what_is_encrypted_is_not_compressed_behind_it() {
    let rule = "no path crypto -> compress";
    let (key, disk) = ("(type crypto) (key_file vm1.key)", "(type mem) (size 64M)");
    let graph = |upper: &str, lower: &str| {
        let text = format!(
            "element Guest (type nbd) (listen unix:x) element U {upper} element L {lower} element Disk {disk}\n\
             Guest -> U -> L -> Disk invariant \"x\": {rule}"
        );
        parse_checked(&NoFiles, "t".as_ref(), "/t".into(), text, &Defines::new(), ALL).is_ok()
    };
    assert!(graph("(type compress)", key) && !graph(key, "(type compress)"));
}

/// "All data is encrypted before it reaches the disk", whatever is put in between later.
#[test]
fn encryption_can_be_demanded_of_every_write() {
    let rule = "every write path export -> sink passes crypto";
    let disk = "(type mem) (size 64M)";
    assert!(holds("(type crypto) (key_file vm1.key)", disk, rule));
    assert!(!holds("(type probe)", disk, rule));
    assert!(holds("(type readonly)", disk, rule), "nothing is written past it");
}
