//! `mason run` where it cannot: one sentence with the element and its place, and nothing left behind.

use crate::harness::{Home, MASON};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;

/// A file behind a socket.
fn file_graph(home: &Home, more: &str) {
    home.file(
        "vm.mason",
        &format!(
            "element Guest (type nbd) (listen unix:vm.nbd)\n\
             element Disk (type file) (path disk.img) {more}\n\
             Guest -> Disk\n"
        ),
    );
}

#[test]
fn a_missing_file() {
    let home = Home::new();
    file_graph(&home, "");
    let sentence = home.mason(&["run", "vm.mason"]).failed();
    assert!(sentence.starts_with("mason: Disk (vm.mason:2:9): "), "{sentence}");
    assert!(sentence.contains("disk.img: there is no such file"), "{sentence}");
    assert!(!home.path("vm.nbd").exists() && !home.path("mason/vm.sock").exists());
}

#[test]
fn a_locked_image() {
    let home = Home::new();
    file_graph(&home, "(size 1M)");
    let daemon = home.run(&["vm.mason"], 1);
    let sentence = home.mason(&["run", "vm.mason"]).failed();
    assert!(sentence.starts_with("mason: Disk (vm.mason:2:9): "), "{sentence}");
    assert!(sentence.contains("disk.img: it is locked"), "{sentence}");
    assert!(home.path("vm.nbd").exists(), "the first one goes on");
    daemon.stop().done();
}

#[test]
fn a_socket_path_in_use() {
    let home = Home::new();
    home.memory_graph("vm");
    let daemon = home.run(&["vm.mason"], 1);
    let sentence = home.mason(&["run", "vm.mason"]).failed();
    assert!(sentence.starts_with("mason: Guest (vm.mason:1:9): "), "{sentence}");
    assert!(sentence.contains("vm.nbd: another process serves this socket"), "{sentence}");
    daemon.stop().done();
    home.file("vm.nbd", "something of the user's");
    let sentence = home.mason(&["run", "vm.mason"]).failed();
    assert!(sentence.contains("vm.nbd: it exists and is no socket"), "{sentence}");
    assert_eq!(std::fs::read_to_string(home.path("vm.nbd")).unwrap(), "something of the user's");
}

#[test]
fn a_dead_process_socket_is_replaced_without_a_word() {
    let home = Home::new();
    home.memory_graph("vm");
    drop(UnixListener::bind(home.path("vm.nbd")).unwrap());
    std::fs::create_dir(home.path("mason")).unwrap();
    std::fs::set_permissions(home.path("mason"), PermissionsExt::from_mode(0o700)).unwrap();
    drop(UnixListener::bind(home.path("mason/vm.sock")).unwrap());
    let daemon = home.run(&["vm.mason"], 1);
    assert!(std::os::unix::net::UnixStream::connect(home.path("vm.nbd")).is_ok());
    home.mason(&["status"]).done();
    daemon.stop().done();
}

#[test]
fn a_socket_in_a_folder_that_is_not_there() {
    let home = Home::new();
    home.memory_graph("vm");
    let graph = std::fs::read_to_string(home.path("vm.mason")).unwrap();
    home.file("vm.mason", &graph.replace("vm.nbd", "gone/vm.nbd"));
    let sentence = home.mason(&["run", "vm.mason"]).failed();
    assert!(sentence.starts_with("mason: Guest (vm.mason:1:9): "), "{sentence}");
    assert!(sentence.contains("gone/vm.nbd: its folder does not exist"), "{sentence}");
}

#[test]
fn a_permission_that_is_missing() {
    let home = Home::new();
    let folder = home.path("private");
    std::fs::create_dir(&folder).unwrap();
    home.file("private/disk.img", "x");
    home.file(
        "vm.mason",
        "element Guest (type nbd) (listen unix:vm.nbd)\n\
         element Disk (type file) (path private/disk.img)\n\
         Guest -> Disk\n",
    );
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o000)).unwrap();
    let mut command = home.command(MASON, &["run", "vm.mason"]);
    if rustix::process::geteuid().is_root() {
        // Root may everything; somebody else has to run it, from where they may read.
        let copy = home.path("copy");
        std::fs::copy(MASON, &copy).unwrap();
        std::fs::set_permissions(home.path("."), PermissionsExt::from_mode(0o755)).unwrap();
        command = home.command(&copy, &["run", "vm.mason"]);
        command.uid(65534).gid(65534);
    }
    let output = command.output().unwrap();
    let sentence = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{sentence}");
    assert!(sentence.starts_with("mason: Disk (vm.mason:2:9): "), "{sentence}");
    assert!(sentence.contains("disk.img: permission to open it is missing"), "{sentence}");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
}

#[test]
fn what_was_opened_before_a_failure_is_closed_again() {
    let home = Home::new();
    home.memory_graph("good");
    file_graph(&home, "(size 1M)");
    home.file("vm.nbd", "in the way");
    let sentence = home.mason(&["run", "good.mason", "vm.mason"]).failed();
    assert!(sentence.contains("Guest (vm.mason:1:9)"), "{sentence}");
    assert!(!home.path("good.nbd").exists());
}

#[test]
fn a_bad_graph_opens_nothing() {
    let home = Home::new();
    file_graph(&home, "(size 1M) (sise 2M)");
    let ended = home.mason(&["run", "vm.mason"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("vm.mason:2:") && ended.err.contains("sise"), "{}", ended.err);
    let left = |name: &str| Path::exists(&home.path(name));
    assert!(!left("disk.img") && !left("vm.nbd") && !left("mason"));
}

#[test]
fn no_place_for_state() {
    let home = Home::new();
    home.memory_graph("vm");
    if rustix::process::geteuid().is_root() {
        return; // Root has /var/lib/mason.
    }
    let mut command = home.command(MASON, &["run", "vm.mason"]);
    let output = command.env_remove("HOME").env_remove("XDG_STATE_HOME").output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("--state DIR"));
}
