//! What the README promises: a disk served within a second, and a file system on it that outlives the
//! daemon.
#![allow(clippy::unwrap_used)]

use blockmason_tests::client;
use blockmason_tests::mason::{Mason, Start, program, shipped_graph, workspace};
use blockmason_tests::mounts::{Device, Mounted, checksums, copy_tree, missing, skipped};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

fn quickstart(home: &Path) -> Mason {
    let graph = shipped_graph("quickstart.mason");
    Start::new(home).run(&[graph.to_str().unwrap(), "--state", home.join("kept").to_str().unwrap()])
}

#[test]
fn it_serves_within_a_second() {
    let home = tempfile::tempdir().unwrap();
    // A busy machine may hold any one start up.
    let fastest = (0..3).map(|_| {
        let mason = quickstart(home.path());
        let ready_after = mason.ready_after();
        client("nbdinfo", &[mason.uri()]);
        mason.stop_well();
        ready_after
    });
    let fastest = fastest.min().unwrap();
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
    assert_eq!(fs::metadata(home.path().join("kept/quickstart/disk.img")).unwrap().len(), 1 << 30);
}

#[test]
fn it_stops_at_once_when_idle_and_takes_its_sockets_along() {
    let home = tempfile::tempdir().unwrap();
    let fastest = (0..3).map(|_| {
        let mason = quickstart(home.path());
        let socket = mason.socket().to_owned();
        assert!(socket.exists());
        let (status, time) = mason.stop();
        assert!(status.success() && !socket.exists(), "{status}");
        time
    });
    let fastest = fastest.min().unwrap();
    assert!(fastest < Duration::from_millis(100), "{fastest:?}");
}

#[test]
fn an_ordinary_user_needs_no_runtime_folder() {
    // As root the test becomes such a user; otherwise it is one.
    let root = rustix::process::geteuid().is_root();
    let user = root.then_some(54_321);
    let home = tempfile::tempdir().unwrap();
    let copied = home.path().join("mason");
    let graph = home.path().join("quickstart.mason");
    fs::copy(program(), &copied).unwrap();
    fs::copy(shipped_graph("quickstart.mason"), &graph).unwrap();
    fs::set_permissions(home.path(), PermissionsExt::from_mode(0o755)).unwrap();
    if user.is_some() {
        chown(home.path(), user, user).unwrap();
    }
    let start = Start { program: Some(&copied), user, runtime_dir: false, ..Start::new(home.path()) };
    let mason = start.run(&[graph.to_str().unwrap()]);
    client("qemu-io", &["-f", "raw", mason.uri(), "-c", "write -P 7 1M 4k", "-c", "read -P 7 1M 4k"]);
    mason.stop_well();
    assert!(home.path().join(".local/state/mason/quickstart/disk.img").exists());
    if let Some(user) = user {
        fs::remove_dir(format!("/tmp/mason-{user}")).unwrap();
    }
}

#[test]
fn its_disk_carries_a_file_system() {
    if skipped(missing()) {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    carries_a_file_system(home.path(), || vec![quickstart(home.path())]);
}

#[test]
fn a_disk_behind_two_daemons_carries_a_file_system() {
    if skipped(missing()) {
        return;
    }
    let back = tempfile::tempdir().unwrap();
    let front = tempfile::tempdir().unwrap();
    let graph = front.path().join("front.mason");
    let text = "element Guest (type nbd) (listen unix:front.sock)\n\
                element Remote (type nbd_client) (uri \"${remote}\")\n\
                Guest -> Remote\n";
    fs::write(&graph, text).unwrap();
    carries_a_file_system(front.path(), || {
        let served = quickstart(back.path());
        let remote = format!("remote={}", served.uri());
        let between = Start::new(front.path()).run(&[graph.to_str().unwrap(), "-D", &remote]);
        vec![between, served]
    });
}

/// `start` starts daemons, the one with the disk to use first; they are stopped in that order.
fn carries_a_file_system(folder: &Path, start: impl Fn() -> Vec<Mason>) {
    let daemons = start();
    let written = {
        let device = Device::attach(daemons[0].uri(), &folder.join("fuse"));
        client("mkfs.ext4", &["-q", &device.path]);
        let mounted = Mounted::new(&device, &folder.join("fs"), "rw");
        for part in ["blockmason", "elements", "docs", "tests"] {
            copy_tree(&workspace().join(part), &mounted.path().join(part));
        }
        let written = checksums(mounted.path());
        mounted.unmount();
        written
    };
    assert!(written.len() > 100, "{written:?}");
    daemons.into_iter().for_each(Mason::stop_well);

    let daemons = start();
    {
        let device = Device::attach(daemons[0].uri(), &folder.join("fuse"));
        client("fsck.ext4", &["-f", "-n", &device.path]);
        let mounted = Mounted::new(&device, &folder.join("fs"), "ro");
        assert!(checksums(mounted.path()) == written, "the files differ");
        mounted.unmount();
    }
    daemons.into_iter().for_each(Mason::stop_well);
}
