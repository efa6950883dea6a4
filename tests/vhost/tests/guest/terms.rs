//! What a guest was told is not taken from it while it is connected, and what it was not offered it does not get.

use crate::{Daemon, Running};
use blockmason_tests::control::mason;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, DISCARD, IOERR, OK, Request, Shape, WRITE_ZEROES};
use blockmason_vhost_tests::model::contents;
use blockmason_vhost_tests::raw::Raw;
use std::fs::File;

const SIZE: u64 = 1 << 20;

fn graph(params: &str, size: u64) -> String {
    format!(
        "element Guest (type vhost_user_blk) (listen unix:vm.sock) {params}\n\
         element Disk (type file) (path disk.img) (size {size})\nGuest -> Disk\n"
    )
}

fn daemon(params: &str) -> Daemon {
    let mut daemon = Daemon::new();
    daemon.running = Some(daemon.run(&graph(params, SIZE)));
    assert!(matches!(daemon.running, Some(Running::Mason(_))));
    daemon
}

/// Has the daemon read another graph. Returns why it will not have it.
fn reload(daemon: &Daemon, text: &str) -> Option<String> {
    std::fs::write(daemon.home.path().join("vm.mason"), text).unwrap();
    let asked = mason(daemon.home.path(), &["reload", "vm.mason", "--control", "c.sock"]);
    (asked.code != Some(0)).then(|| asked.refused())
}

fn resize(daemon: &Daemon, size: u64) {
    File::options().write(true).open(daemon.home.path().join("disk.img")).unwrap().set_len(size).unwrap();
}

#[test]
fn a_disk_that_has_grown_does_not_shrink() {
    let daemon = daemon("");
    let mut blk = Blk::connected(Shape::default(), &daemon.socket());
    resize(&daemon, 4 * SIZE);
    assert_eq!(reload(&daemon, &graph("", 4 * SIZE)), None);
    until("the guest is told", || blk.device.config().unwrap()[..8] == (4 * SIZE / 512).to_le_bytes());
    // Not below what it was told at last, though above what it was told at first.
    resize(&daemon, 2 * SIZE);
    let why = reload(&daemon, &graph("", 2 * SIZE)).unwrap();
    assert!(why.contains("was told 4194304 bytes, and there would be 2097152"), "{why}");
    resize(&daemon, 4 * SIZE);
    blk.write(6 * SIZE / 512 / 2, &contents(1, 1));
    blk.device.disconnect();
    resize(&daemon, 2 * SIZE);
    until("nobody is connected", || reload(&daemon, &graph("", 2 * SIZE)).is_none());
}

#[test]
fn a_guest_keeps_its_queues_and_may_go_on_writing() {
    let daemon = daemon("(queues 2)");
    let mut blk = Blk::connected(Shape { queues: 2, ..Shape::default() }, &daemon.socket());
    for (params, why) in [
        ("(queues 1)", "was offered 2 queues of 256, and there would be 1 of 256"),
        ("(queues 2) (queue_size 64)", "was offered 2 queues of 256, and there would be 2 of 64"),
        ("(queues 2) (readonly yes)", "(readonly yes) would come too late for it"),
    ] {
        let refused = reload(&daemon, &graph(params, SIZE)).unwrap();
        assert!(refused.contains(why), "{params}: {refused}");
        blk.write(8, &contents(1, 2));
    }
    assert_eq!(reload(&daemon, &graph("(queues 4) (queue_size 512)", SIZE)), None);
    blk.write(8, &contents(1, 3));
    blk.device.disconnect();
    until("nobody is connected", || reload(&daemon, &graph("(readonly yes)", SIZE)).is_none());
}

/// Also not for a guest that does not care what it was told.
#[test]
fn nobody_writes_to_a_read_only_export() {
    let daemon = daemon("(readonly yes)");
    let mut blk = Blk::connected(Shape::default(), &daemon.socket());
    for request in [
        Request::write(8, &contents(1, 5)),
        Request::ranges(DISCARD, &[(0, 8, 0)]),
        Request::ranges(WRITE_ZEROES, &[(0, 8, 0)]),
    ] {
        assert_eq!(blk.run(request).status, IOERR);
    }
    assert_eq!(blk.run(Request::read(8, 4096)).status, OK);
    assert!(daemon.image().iter().all(|byte| *byte == 0));
}

/// What is wrong with a front-end is said, once in a while.
#[test]
fn complaints_are_few() {
    let daemon = daemon("");
    for _ in 0..20 {
        let raw = Raw::connect(&daemon.socket());
        raw.bytes(&[0xff; 12], &[]);
        until("it is cut off", || raw.ended());
    }
    let log = daemon.log();
    assert_eq!(log.matches("a front-end is cut off: a message of another version").count(), 1, "{log}");
}
