//! Backups under a client that writes one block after the other: what is in a backup is all that it had written up to
//! one of them, and nothing of what came after.

use crate::server::Server;
use crate::{BLOCKS, Site, plain};
use blockmason_tests::client;
use blockmason_tests::control::{Ended, command, insert, mason, reload};
use blockmason_tests::mason::{Mason, Start, now, pause, until};
use blockmason_tests::raw::Raw;
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

const BLOCK: u64 = 4096;

/// What the client has written, and how that went.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// The block of each write, in their order.
    history: Mutex<Vec<u64>>,
    /// How many have been answered.
    answered: AtomicUsize,
    /// The longest time that one took, in milliseconds.
    slowest: AtomicU64,
}

/// A client with one request in flight. The n-th write fills its block with the number n.
struct Writer {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

impl Writer {
    /// Writes to the first `blocks` of a disk. With `pauses` it stands still while there is a file `freeze` in that folder,
    /// and makes a file `frozen` then.
    fn start(socket: &Path, blocks: u64, pauses: Option<&Path>) -> Writer {
        let shared: Arc<Shared> = Arc::default();
        let (mut raw, own, folder) = (Raw::ready(socket), shared.clone(), pauses.map(Path::to_owned));
        let thread = std::thread::spawn(move || {
            let mut rng = fastrand::Rng::with_seed(7);
            while !own.stop.load(Ordering::Relaxed) {
                if let Some(folder) = &folder {
                    stand_still(folder, &own.stop);
                }
                let block = rng.u64(0..blocks);
                let number = {
                    let mut history = own.history.lock().unwrap();
                    history.push(block);
                    history.len() as u64
                };
                let since = now();
                raw.write(block * BLOCK, &number.to_le_bytes().repeat(BLOCK as usize / 8));
                let took = since.elapsed().as_millis() as u64;
                own.slowest.fetch_max(took, Ordering::Relaxed);
                own.answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        Writer { shared, thread }
    }

    fn answered(&self) -> usize {
        self.shared.answered.load(Ordering::Relaxed)
    }

    fn issued(&self) -> usize {
        self.shared.history.lock().unwrap().len()
    }

    fn go_on(&self, more: usize) {
        let wanted = self.answered() + more;
        until("the client goes on", || {
            assert!(!self.thread.is_finished(), "the client has failed");
            self.answered() >= wanted
        });
    }

    /// Whoever reads at `path` finds the disk as it was after one of the writes; returns which.
    #[track_caller]
    fn cut(&self, path: &Path) -> usize {
        let found = numbers(&std::fs::read(path).unwrap());
        let history = self.shared.history.lock().unwrap();
        let last = *found.iter().max().unwrap() as usize;
        assert!(found == replay(&history[..last]), "{} is no disk of one instant", path.display());
        last
    }

    /// Ends it. Returns what the disk must hold, and the longest time that a write took.
    fn finish(self) -> (Vec<u64>, Duration) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
        let history = self.shared.history.lock().unwrap();
        (replay(&history), Duration::from_millis(self.shared.slowest.load(Ordering::Relaxed)))
    }

    /// Of a client whose server was killed: the disk must have what was answered, and may have the one after it.
    fn killed(self) -> [Vec<u64>; 2] {
        assert!(self.thread.join().is_err(), "its server was killed");
        let history = self.shared.history.lock().unwrap();
        let answered = self.shared.answered.load(Ordering::Relaxed);
        [replay(&history[..answered]), replay(&history)]
    }
}

fn stand_still(folder: &Path, stop: &AtomicBool) {
    while folder.join("freeze").exists() && !stop.load(Ordering::Relaxed) {
        std::fs::write(folder.join("frozen"), "").unwrap();
        pause(Duration::from_millis(2));
    }
    let _ = std::fs::remove_file(folder.join("frozen"));
}

fn replay(history: &[u64]) -> Vec<u64> {
    let mut disk = vec![0; BLOCKS as usize];
    for (ix, block) in history.iter().enumerate() {
        disk[*block as usize] = ix as u64 + 1;
    }
    disk
}

/// The number in each block of a disk.
#[track_caller]
fn numbers(bytes: &[u8]) -> Vec<u64> {
    let number = |(ix, block): (usize, &[u8])| {
        assert!(block.chunks(8).all(|word| word == &block[..8]), "block {ix} is torn");
        u64::from_le_bytes(block[..8].try_into().unwrap())
    };
    bytes.chunks(BLOCK as usize).enumerate().map(number).collect()
}

pub(crate) fn backup(site: &Site, more: &[&str]) -> Ended {
    site.mason(&[&["backup", "vm", "A", "--to", "file (path b.img)"], more].concat())
}

pub(crate) fn view(ended: Ended) -> Value {
    serde_json::from_str(&ended.done()).unwrap()
}

pub(crate) fn status(site: &Site) -> Value {
    view(site.mason(&["backup", "status", "--json"]))[0].clone()
}

pub(crate) fn elements(site: &Site) -> Vec<String> {
    let graph = site.control().graph("vm");
    let names = graph["elements"].as_array().unwrap().iter();
    let mut names: Vec<_> = names.map(|element| element["name"].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

pub(crate) fn start(site: &Site) -> Mason {
    site.write("vm.mason", plain());
    site.run(&["vm.mason"])
}

/// A command in the background.
pub(crate) fn spawn(site: &Site, args: &[&str]) -> Child {
    let mut command = command(site.folder(), &[args, &["--control", "c.sock"]].concat());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// A backup that takes some seconds has begun.
pub(crate) fn begin_slowly(site: &Site) -> Child {
    let to = ["backup", "vm", "A", "--to", "file (path b.img)", "--rate", "1M/s"];
    let child = spawn(site, &to);
    until("it copies", || {
        site.control().ask("GET", "/v1/graphs/vm/backups/A", &Value::Null).1["state"] == "copying"
    });
    child
}

#[test]
fn a_backup_is_the_disk_at_one_instant_and_an_incremental_one_at_a_later_one() {
    let site = Site::new();
    let daemon = start(&site);
    let writer = Writer::start(daemon.socket(), 4096, None);
    writer.go_on(300);
    let before = writer.answered();
    let first = view(backup(&site, &["--json"]));
    assert_eq!(first["state"], "done", "{first}");
    let cut = writer.cut(&site.path("b.img"));
    assert!(before <= cut && cut <= writer.issued(), "{before} {cut}");
    assert_eq!(elements(&site), ["A", "A_changes", "Guest"], "only what keeps account stays");
    for _ in 0..3 {
        writer.go_on(50);
        let before = writer.answered();
        let next = view(backup(&site, &["--incremental", "--json"]));
        assert!(next["total"].as_u64() < first["total"].as_u64(), "{next}");
        let cut = writer.cut(&site.path("b.img"));
        assert!(before <= cut && cut <= writer.issued(), "{before} {cut}");
    }
    // Above the last one, which stays as it is.
    let last = std::fs::read(site.path("b.img")).unwrap();
    writer.go_on(50);
    let over = "element Over (type cow) element B (type file) (path b.img)\n\
                element C (type file) (path c.cow) (size 70M) (Over, base) -> B (Over, overlay) -> C";
    site.mason(&["backup", "vm", "A", "--to", over, "--incremental"]).done();
    assert!(std::fs::read(site.path("b.img")).unwrap() == last);
    mason(site.folder(), &["restore", "--from", over, "--to", "file (path d.img)", "--verify"]).done();
    writer.cut(&site.path("d.img"));
    let (disk, slowest) = writer.finish();
    daemon.stop_well();
    assert!(numbers(&std::fs::read(site.path("a.img")).unwrap()) == disk);
    eprintln!("the slowest write took {slowest:?}");
}

#[test]
fn the_instant_lies_between_two_commands() {
    let site = Site::new();
    let daemon = start(&site);
    let writer = Writer::start(daemon.socket(), 2048, Some(site.folder()));
    for more in [&[][..], &["--incremental"]] {
        writer.go_on(100);
        // While the client stands still the whole disk is read by its export, in another way.
        let freeze = "touch freeze; until [ -e frozen ]; do sleep 0.01; done; nbdcopy --no-extents \"$DISK\" exact.img";
        let around = ["--before", freeze, "--after", "rm freeze"];
        let args = ["backup", "vm", "A", "--to", "file (path b.img)", "--control", "c.sock"];
        let mut command = command(site.folder(), &[&args[..], &around, more].concat());
        let output = command.env("DISK", daemon.uri()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        writer.cut(&site.path("b.img"));
        let exact = std::fs::read(site.path("exact.img")).unwrap();
        assert!(std::fs::read(site.path("b.img")).unwrap() == exact);
        std::fs::remove_file(site.path("exact.img")).unwrap();
    }
    // A command that fails: nothing begins, and the other one is run all the same.
    let around = ["--before", "touch freeze; exit 3", "--after", "rm freeze; exit 4"];
    let said = backup(&site, &around).refused();
    assert!(said.contains("--before") && said.contains("exit status: 3"), "{said}");
    assert!(said.contains("--after") && !site.path("freeze").exists(), "{said}");
    writer.finish();
    daemon.stop_well();
}

#[test]
fn what_cannot_be_backed_up_is_refused_and_nothing_has_changed() {
    let site = Site::new();
    let daemon = start(&site);
    site.write("small.img", vec![0; 1 << 20]);
    let refused = |args: &[&str]| site.mason(&[&["backup", "vm"], args].concat()).refused();
    let cases: &[(&[&str], &str)] = &[
        (&["A", "--to", "file (path b.img)", "--incremental"], "no account is kept"),
        (&["A", "--to", "file (path small.img)"], "make it at least as large"),
        (&["A", "--to", "file (path a.img)"], "it is the disk A itself"),
        (&["B", "--to", "file (path b.img)"], "there is no element B"),
        (&["Guest", "--to", "file (path b.img)"], "no disk"),
        (&["A", "--to", "fil (path b.img)"], "fil"),
        (&["A", "--to", "file (path b.img)", "--rate", "fast"], "rate"),
    ];
    for (args, expected) in cases {
        let said = refused(args);
        assert!(said.contains(expected), "{args:?}: {said}");
        assert_eq!(elements(&site), ["A", "Guest"], "{args:?}");
    }
    let said = site.mason(&["migrate", "vm", "A", "--to", "file (path a.img)"]).refused();
    assert!(said.contains("it is the disk A itself"), "{said}");
    let left = site.path("state/mason/backup");
    let files = client("find", &[left.to_str().unwrap(), "-type", "f"]);
    assert_eq!(files, "");

    Raw::ready(daemon.socket()).write(0, &vec![7; 8 << 20]);
    let mut child = begin_slowly(&site);
    let mut control = site.control();
    let text = plain();
    let busy = [
        ("/v1/graphs/vm/edits", insert("P (type probe)", "Guest", "A")),
        ("/v1/graphs/vm/reload", reload(&site.path("vm.mason"), &text, &json!({}))),
        ("/v1/graphs/vm/save", json!({})),
        ("/v1/graphs/vm/backups", json!({ "element": "A", "to": "null (size 64M)", "folder": "/" })),
        ("/v1/graphs/vm/moves", json!({ "element": "A", "to": "null (size 64M)", "folder": "/" })),
        ("/v1/graphs/vm/elements/A_cow/handlers/discard", json!({ "argument": "yes" })),
        ("/v1/handover", json!({})),
    ];
    for (path, body) in &busy {
        let (status, answer) = control.ask("POST", path, body);
        assert_eq!(status, 409, "{path}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("being backed up"), "{path}: {answer}");
    }
    assert!(site.mason(&["try", "vm.mason"]).refused().contains("being backed up"));
    assert!(child.try_wait().unwrap().is_none(), "it was still going on");
    let said = site.mason(&["backup", "abort", "vm", "A"]).done();
    assert!(said.contains("failed") && said.contains("it was given up"), "{said}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(elements(&site), ["A", "A_changes", "Guest"]);
    let said = refused(&["A", "--to", "file (path b.img)", "--incremental"]);
    assert!(said.contains("no backup was ever complete"), "{said}");
    daemon.stop_well();
}

#[test]
fn a_target_that_dies_harms_no_guest_and_the_next_incremental_backup_has_all() {
    let site = Site::new();
    let daemon = start(&site);
    let writer = Writer::start(daemon.socket(), 2048, None);
    writer.go_on(200);
    backup(&site, &[]).done();
    writer.go_on(200);
    let mut far = Server::memory(site.folder(), "64M");
    let to = far.disk();
    // That it has none of the last backup does not matter here.
    let args = [
        "backup",
        "vm",
        "A",
        "--to",
        &to,
        "--incremental",
        "--force",
        "--rate",
        "500k/s",
        "--patience",
        "1s",
    ];
    let mut child = spawn(&site, &args);
    until("it copies", || {
        let view = status(&site);
        view["state"] == "copying" && view["copied"].as_u64() > Some(0)
    });
    far.die();
    writer.go_on(50);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let view = status(&site);
    let said = view["message"].as_str().unwrap();
    assert!(
        view["state"] == "failed" && said.contains("the disk at `to`") && !said.contains("tried again"),
        "{view}"
    );
    writer.go_on(50);
    backup(&site, &["--incremental"]).done();
    writer.cut(&site.path("b.img"));
    let (disk, slowest) = writer.finish();
    assert!(slowest < Duration::from_secs(5), "a write took {slowest:?}");
    daemon.stop_well();
    assert!(numbers(&std::fs::read(site.path("a.img")).unwrap()) == disk);
}

#[test]
fn a_target_that_is_slow_keeps_no_guest_waiting() {
    let site = Site::new();
    let daemon = start(&site);
    let writer = Writer::start(daemon.socket(), 1024, None);
    writer.go_on(300);
    let to = "element Slow (type delay) (all 3s) element B (type file) (path b.img) (size 64M) Slow -> B";
    site.mason(&["backup", "vm", "A", "--to", to]).done();
    writer.cut(&site.path("b.img"));
    let (_, slowest) = writer.finish();
    assert!(slowest < Duration::from_secs(2), "a write took {slowest:?}");
    daemon.stop_well();
}

#[test]
fn a_daemon_that_is_killed_at_any_moment_has_lost_nothing() {
    let site = Site::new();
    let mut rng = fastrand::Rng::with_seed(11);
    let mut daemon = start(&site);
    let mut given_up = 0;
    for round in 0..12 {
        let _ = std::fs::remove_file(site.path("b.img"));
        // What the round before has left must not count.
        Raw::ready(daemon.socket()).write(0, &vec![0; 4 << 20]);
        let writer = Writer::start(daemon.socket(), 1024, None);
        writer.go_on(100);
        let rate = if round % 3 == 0 { "unlimited" } else { "2M/s" };
        let mut child = spawn(&site, &["backup", "vm", "A", "--to", "file (path b.img)", "--rate", rate]);
        pause(Duration::from_millis(rng.u64(20..700)));
        daemon.kill();
        let _ = child.wait();
        let models = writer.killed();
        let _ = std::fs::remove_file(site.path("c.sock"));
        let log = site.path("log");
        daemon =
            Start { log: Some(&log), ..Start::new(site.folder()) }.run(&["vm.mason", "--control", "c.sock"]);
        let found = numbers(&Raw::ready(daemon.socket()).read(0, 4 << 20));
        assert!(models.iter().any(|model| model[..1024] == found), "round {round}: something is lost");
        let list = || view(site.mason(&["backup", "status", "--json"]));
        until("it is over", || {
            list()
                .as_array()
                .unwrap()
                .iter()
                .all(|view| ["done", "failed"].contains(&view["state"].as_str().unwrap()))
        });
        given_up += usize::from(list()[0]["state"] == "failed");
        assert!(elements(&site).iter().all(|name| !name.contains("_cow") && !name.contains("_copy")));
        let found = numbers(&Raw::ready(daemon.socket()).read(0, 4 << 20));
        assert!(
            models.iter().any(|model| model[..1024] == found),
            "round {round}: the merge has lost something"
        );
    }
    assert!(given_up >= 3, "only {given_up} backups were given up");
    daemon.stop_well();
}

#[test]
fn what_is_only_in_an_overlay_is_not_left_behind() {
    let site = Site::new();
    let daemon = start(&site);
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &vec![1; 8 << 20]);
    let mut child = begin_slowly(&site);
    raw.write(0, &[2; 4096]);
    daemon.kill();
    let _ = child.wait();
    let _ = std::fs::remove_file(site.path("c.sock"));
    assert_eq!(std::fs::read(site.path("a.img")).unwrap()[0], 1, "it is in the overlay alone");
    let said = mason(site.folder(), &["run", "vm.mason", "--control", "c.sock", "--as-file"]).refused();
    assert!(said.contains("what was written while A was backed up"), "{said}");
    let overlay =
        client("find", &[site.path("state/mason/backup").to_str().unwrap(), "-name", "overlay.cow"]);
    let (overlay, aside) = (Path::new(overlay.trim()), site.path("aside"));
    std::fs::rename(overlay, &aside).unwrap();
    let _ = std::fs::remove_file(site.path("c.sock"));
    let said = mason(site.folder(), &["run", "vm.mason", "--control", "c.sock"]).refused();
    assert!(said.contains("is gone"), "{said}");
    std::fs::rename(&aside, overlay).unwrap();
    let _ = std::fs::remove_file(site.path("c.sock"));
    let daemon = site.run(&["vm.mason"]);
    assert_eq!(Raw::ready(daemon.socket()).read(0, 4096), [2; 4096]);
    until("it is merged", || status(&site)["state"] == "failed");
    assert!(!overlay.exists());
    let said = backup(&site, &["--incremental"]).refused();
    assert!(said.contains("no backup was ever complete"), "{said}");
    daemon.stop_well();
    assert_eq!(std::fs::read(site.path("a.img")).unwrap()[0], 2);
}

#[test]
fn account_is_kept_over_a_restart_if_the_graph_was_saved_and_forgotten_if_not() {
    let site = Site::new();
    let daemon = start(&site);
    Raw::ready(daemon.socket()).write(0, &[1; 4096]);
    backup(&site, &["--save"]).done();
    daemon.stop_well();
    let daemon = site.run(&["vm.mason"]);
    Raw::ready(daemon.socket()).write(8192, &[2; 4096]);
    let next = view(backup(&site, &["--incremental", "--json"]));
    assert_eq!(next["total"], 65536, "{next}");
    daemon.stop_well();
    assert!(std::fs::read(site.path("a.img")).unwrap() == std::fs::read(site.path("b.img")).unwrap());
    // Served without: what was known of changes is not true any more.
    site.write("vm.mason", plain());
    let daemon = site.run(&["vm.mason"]);
    assert!(backup(&site, &["--incremental"]).refused().contains("no account is kept"));
    daemon.stop_well();
    let daemon = site.run(&["vm.mason"]);
    backup(&site, &[]).done();
    daemon.stop_well();
}

#[test]
fn a_backup_is_restored_to_a_disk_that_nobody_uses() {
    let site = Site::new();
    let daemon = start(&site);
    Raw::ready(daemon.socket()).write(1 << 20, &vec![5; 3 << 20]);
    backup(&site, &[]).done();
    site.write("small.img", vec![0; 1 << 20]);
    site.write("used.img", vec![9; 65 << 20]);
    let restore = |to: &str, more: &[&str]| {
        let to = format!("file (path {to})");
        let args = ["restore", "--from", "file (path b.img)", "--to", &to, "--verify"];
        mason(site.folder(), &[&args, more].concat())
    };
    let said = restore("a.img", &["--force"]).refused();
    assert!(said.contains("mason: --to: ") && said.contains("a.img: it is locked"), "{said}");
    let said = restore("small.img", &[]).refused();
    assert!(
        said.contains("file (path small.img) has 1M, file (path b.img) 64M: make it at least as large"),
        "{said}"
    );
    daemon.stop_well();
    let disk = std::fs::read(site.path("a.img")).unwrap();
    std::fs::write(site.path("a.img"), vec![3; 64 << 20]).unwrap();
    for (to, why) in [
        ("a.img", "its head says that it is a disk"),
        ("used.img", "a file of 65M is there already"),
        ("b.img", "are the same disk"),
    ] {
        let said = restore(to, &[]).refused();
        assert!(said.contains(why), "{said}");
    }
    for to in ["a.img", "new.img", "used.img"] {
        let more: &[&str] = if to == "new.img" { &[] } else { &["--force"] };
        let said = restore(to, more).done();
        assert!(said.contains("both are alike"), "{said}");
        let found = std::fs::read(site.path(to)).unwrap();
        assert!(found[..64 << 20] == disk && found[64 << 20..].iter().all(|byte| *byte == 9), "{to}");
    }
    let daemon = site.run(&["vm.mason"]);
    assert_eq!(Raw::ready(daemon.socket()).read(2 << 20, 512), [5; 512]);
    daemon.stop_well();
}
