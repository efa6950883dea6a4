//! Moves of disks that end otherwise than by a cut-over, or should not begin.

use crate::harness::{Daemon, Home};
use std::time::{Duration, Instant};

const GRAPH: &str = "element Guest (type nbd) (listen unix:vm1.nbd)\n\
    element Other (type nbd) (listen unix:other.nbd)\n\
    element Disk (type file) (path a.img) (size 4M)\n\
    element Second (type file) (path second.img) (size 4M)\n\
    Guest -> Disk\nOther -> Second\n";

/// The number of a flush on the wire.
const FLUSH: u16 = 3;

/// Slow enough that a move is still there when the next command comes.
const SLOWLY: [&str; 4] = ["--rate", "64k/s", "--until", "begun"];

/// With a graph file, and a disk that has something to copy.
fn home() -> Home {
    let home = Home::new();
    home.file("vm1.mason", GRAPH);
    std::fs::write(home.path("a.img"), vec![7; 4 << 20]).unwrap();
    home
}

fn graph_file(home: &Home) -> String {
    std::fs::read_to_string(home.path("vm1.mason")).unwrap()
}

fn serve(home: &Home) -> Daemon {
    home.run(&["vm1.mason"], 2)
}

#[track_caller]
fn stop(daemon: Daemon) {
    let ended = daemon.stop();
    assert_eq!(ended.code, Some(0), "{ended:?}");
}

/// What a move says on stdout: how far it is goes to stderr on a slow machine.
#[track_caller]
fn moved(home: &Home, to: &str, options: &[&str]) -> String {
    let ended = home.mason(&[&["migrate", "vm1", "Disk", "--to", to], options].concat());
    assert_eq!(ended.code, Some(0), "{ended:?}");
    ended.out
}

/// Polls, for ten seconds at the most.
#[track_caller]
fn wait_until(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_does_not_move_to_where_a_disk_of_its_graph_is() {
    let home = home();
    let daemon = serve(&home);
    std::os::unix::fs::symlink("a.img", home.path("link.img")).unwrap();
    let refused = |image: &str| {
        home.mason(&["migrate", "vm1", "Disk", "--to", &format!("file (path {image})")]).failed()
    };
    for image in ["a.img", "link.img"] {
        assert!(refused(image).ends_with("a.img: it is the disk Disk itself\n"), "{image}");
    }
    assert!(refused("second.img").ends_with("second.img: it is Second of this graph\n"));
    for image in ["a.img", "second.img"] {
        assert!(!home.path(&format!("{image}.mason-head")).exists(), "{image}");
    }
    stop(daemon);
    stop(serve(&home));
}

#[test]
fn a_mirror_that_is_let_go_of_leaves_the_graph_file() {
    let home = home();
    let daemon = serve(&home);
    moved(&home, "file (path b.img)", &["--keep-mirror"]);
    let file = graph_file(&home);
    assert!(file.contains("Disk_back_tee") && file.contains("(path b.img)"), "{file}");
    home.mason(&["migrate", "abort"]);
    let file = graph_file(&home);
    assert!(!file.contains("Disk_back") && file.contains("(path b.img)"), "{file}");
    stop(daemon);
    stop(serve(&home));
}

#[test]
fn a_new_disk_that_is_lost_meanwhile_is_not_believed_to_be_filled() {
    for (options, lost) in [(&SLOWLY[..], "b.img"), (&["--keep-mirror"], "a.img")] {
        let home = home();
        let daemon = serve(&home);
        moved(&home, "file (path b.img)", options);
        stop(daemon);
        std::fs::remove_file(home.path(lost)).unwrap();
        for _ in 0..2 {
            let daemon = serve(&home);
            assert!(!home.mason(&["show"]).done().contains("_tee"), "{lost}");
            assert!(!home.path(lost).exists(), "{lost} is not made anew");
            stop(daemon);
        }
    }
}

#[test]
fn a_move_to_a_server_that_has_died_can_be_given_up() {
    let home = home();
    home.file(
        "far.mason",
        "element Server (type nbd) (listen unix:far.nbd)\n\
         element Store (type mem) (size 4M)\n\
         Server -> Store\n",
    );
    let daemon = serve(&home);
    let far = home.run(&["far.mason", "--control", "far.control", "--state", "far"], 1);
    let to = "nbd_client (uri nbd+unix:///?socket=far.nbd) (reconnect 0s)";
    // A chunk every two seconds: the next one fails.
    let begun = moved(&home, to, &["--rate", "512k/s", "--until", "begun"]);
    assert!(begun.starts_with("vm1 Disk: copying, ") && begun.contains(" of 4M"), "{begun}");
    stop(far);
    wait_until("the copier does not notice", || {
        home.mason(&["migrate", "status"]).out.contains("far.nbd fails: ")
    });
    let aborted = home.mason(&["migrate", "abort"]).out;
    assert!(aborted.contains("a.img, as before"), "{aborted}");
    stop(daemon);
    assert!(!home.path("a.img.mason-head").exists());
    stop(serve(&home));
}

#[test]
fn a_graph_is_edited_elsewhere_while_its_disk_moves() {
    let home = home();
    let daemon = serve(&home);
    moved(&home, "file (path b.img)", &["--cutover", "manual", "--until", "ready"]);
    let inserted = home.mason(&["insert", "probe", "between", "Other", "and", "Second"]);
    assert_eq!(inserted.code, Some(0), "{inserted:?}");
    assert!(home.mason(&["remove", "Disk_copy"]).failed().contains("Disk is on its way to"));
    home.mason(&["migrate", "cutover"]).done();
    let file = graph_file(&home);
    assert!(file.contains("(type probe)") && file.contains("(path b.img)"), "{file}");
    stop(daemon);
}

#[test]
fn a_cut_over_that_was_refused_is_not_made_later() {
    let home = home();
    home.file(
        "vm1.mason",
        &GRAPH.replace("Guest -> Disk", "element Slow (type delay)\nGuest -> Slow -> Disk"),
    );
    let daemon = serve(&home);
    moved(&home, "file (path b.img)", &["--cutover", "manual", "--until", "ready"]);
    home.mason(&["set", "Slow.flush", "3s"]).done();
    let before = home.mason(&["get", "Slow.requests"]).done();
    std::thread::scope(|scope| {
        let mut client = home.nbd_client("vm1.nbd");
        scope.spawn(move || client.send(FLUSH, 0, 0).unwrap());
        wait_until("no flush comes", || home.mason(&["get", "Slow.requests"]).done() != before);
        let refused = home.mason(&["migrate", "cutover", "--deadline", "100ms"]).failed();
        assert!(refused.contains("have not ended in 100ms"), "{refused}");
    });
    // It would be tried again after a second.
    let end = Instant::now() + Duration::from_millis(1500);
    wait_until("it is not ready again", || home.mason(&["migrate", "status"]).out.contains(": ready"));
    while Instant::now() < end {
        let status = home.mason(&["migrate", "status"]).done();
        assert!(status.starts_with("vm1 Disk: ready"), "{status}");
    }
    stop(daemon);
}

/// Only what a move itself moves may be served while it is on the move.
#[test]
fn a_stale_disk_is_not_served_because_another_one_moves() {
    let home = home();
    let daemon = serve(&home);
    moved(&home, "file (path b.img)", &[]);
    moved(&home, "file (path c.img)", &SLOWLY);
    let stale = "element Late (type nbd) (listen unix:late.nbd)\n\
                 element Stale (type file) (path a.img)\n\
                 Late -> Stale";
    let refused = home.mason(&["add", stale]);
    assert!(refused.code == Some(1) && refused.err.contains("it has moved to "), "{refused:?}");
    let inserted = home.mason(&["insert", "P (type probe)", "between", "Guest", "and", "Disk_tee"]);
    assert_eq!(inserted.code, Some(0), "{inserted:?}");
    home.mason(&["migrate", "abort"]);
    stop(daemon);
}

/// The old disk alone could not be served either: a socket is taken.
#[test]
fn a_start_that_fails_for_another_reason_gives_no_move_up() {
    let home = home();
    let daemon = serve(&home);
    moved(&home, "file (path b.img)", &SLOWLY);
    stop(daemon);
    let taken = std::os::unix::net::UnixListener::bind(home.path("vm1.nbd")).unwrap();
    let refused = home.mason(&["run", "vm1.mason"]);
    assert!(refused.code == Some(1) && refused.err.contains("vm1.nbd"), "{refused:?}");
    drop(taken);
    let daemon = serve(&home);
    let status = home.mason(&["migrate", "status"]).out;
    assert!(status.starts_with("vm1 Disk: copying"), "{status}");
    home.mason(&["migrate", "abort"]);
    stop(daemon);
}
