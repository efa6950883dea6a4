//! Which backups follow each other, and which disks are whole: what heads say decides, and whoever writes past them is found
//! out.

use crate::backup::{backup, begin_slowly, elements, start, status, view};
use crate::{Site, graph, plain};
use blockmason_tests::control::{Ended, command, mason};
use blockmason_tests::mason::{Mason, until};
use blockmason_tests::mounts::{Tmpfs, skipped};
use blockmason_tests::raw::Raw;
use std::io::Write;

/// A head, as text; empty if there is none.
fn head(site: &Site, image: &str) -> String {
    std::fs::read_to_string(site.path(&format!("{image}.mason-head"))).unwrap_or_default()
}

fn to(site: &Site, target: &str, more: &[&str]) -> Ended {
    site.mason(&[&["backup", "vm", "A", "--to", target], more].concat())
}

fn same(site: &Site, one: &str, other: &str) -> bool {
    std::fs::read(site.path(one)).unwrap() == std::fs::read(site.path(other)).unwrap()
}

fn write(daemon: &Mason, at: u64, byte: u8) {
    Raw::ready(daemon.socket()).write(at, &[byte; 65536]);
}

/// Ends one that was killed: what it has left of its socket goes.
fn killed(site: &Site, daemon: Mason) {
    daemon.kill();
    let _ = std::fs::remove_file(site.path("c.sock"));
}

#[test]
fn an_incremental_backup_goes_to_what_holds_the_last_one_and_nowhere_else() {
    let site = Site::new();
    let daemon = start(&site);
    write(&daemon, 0, 1);
    backup(&site, &["--save"]).done();
    std::fs::copy(site.path("b.img"), site.path("copy.img")).unwrap();
    write(&daemon, 1 << 20, 2);
    // A slip of the pen makes no new file, and spoils nothing.
    let said = to(&site, "file (path bb.img)", &["--incremental"]).refused();
    assert!(said.contains("bb.img") && said.contains("it is not there"), "{said}");
    assert!(!site.path("bb.img").exists());
    assert!(
        to(&site, "file (path bb.img)", &["--incremental", "--force"]).refused().contains("it is not there")
    );
    let said = to(&site, "file (path copy.img)", &["--incremental"]).refused();
    assert!(said.contains("nothing says that it holds"), "{said}");
    assert!(to(&site, "mem (size 64M)", &["--incremental"]).refused().contains("nothing says"));
    let next = view(backup(&site, &["--incremental", "--json"]));
    assert_eq!(next["total"], 65536, "{next}");
    // Who knows better may say so, once: the copy has the one before.
    write(&daemon, 2 << 20, 3);
    to(&site, "file (path other.img)", &[]).done();
    write(&daemon, 3 << 20, 4);
    let said = backup(&site, &["--incremental"]).refused();
    assert!(said.contains("it holds backup 2 of A, and changes are counted from 3"), "{said}");
    std::fs::copy(site.path("other.img"), site.path("moved.img")).unwrap();
    to(&site, "file (path moved.img)", &["--incremental", "--force"]).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "moved.img"));
    // Over a restart, as the graph was saved.
    let daemon = site.run(&["vm.mason"]);
    write(&daemon, 4 << 20, 5);
    assert!(to(&site, "file (path other.img)", &["--incremental"]).refused().contains("counted from 4"));
    to(&site, "file (path moved.img)", &["--incremental"]).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "moved.img"));
}

#[test]
fn overlays_of_a_backup_follow_each_other() {
    let site = Site::new();
    let daemon = start(&site);
    write(&daemon, 0, 1);
    backup(&site, &[]).done();
    let over = |name: &str, below: &str| {
        let base =
            if below.is_empty() { "element B (type file) (path b.img)".to_owned() } else { below.to_owned() };
        let top = if below.is_empty() { "B" } else { "Monday" };
        format!(
            "element {name} (type cow) element {name}_c (type file) (path {name}.cow) (size 70M)\n{base}\n\
             ({name}, base) -> {top} ({name}, overlay) -> {name}_c"
        )
    };
    let monday = over("Monday", "");
    write(&daemon, 1 << 20, 2);
    to(&site, &monday, &["--incremental"]).done();
    write(&daemon, 2 << 20, 3);
    assert!(backup(&site, &["--incremental"]).refused().contains("counted from 2"));
    let tuesday = over("Tuesday", &monday);
    to(&site, &tuesday, &["--incremental"]).done();
    let restore = |from: &str| {
        mason(site.folder(), &["restore", "--from", from, "--to", "file (path r.img)", "--verify", "--force"])
    };
    restore(&tuesday).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "r.img"));
    // Written to, the base is not what Monday was made on.
    site.write("look.mason", graph("", "Guest -> A").replace("a.img", "b.img"));
    let look = site.run(&["look.mason"]);
    look.stop_well();
    let said = mason(site.folder(), &["restore", "--from", &monday, "--to", "file (path s.img)"]).refused();
    assert!(said.contains("B is not any more what the overlay above it was made on"), "{said}");
}

#[test]
fn who_serves_a_disk_without_account_makes_the_next_backup_a_full_one() {
    let site = Site::new();
    let daemon = start(&site);
    write(&daemon, 0, 1);
    backup(&site, &["--save"]).done();
    assert!(head(&site, "a.img").contains("\"account\""));
    daemon.stop_well();
    // As the same graph of another name does.
    site.write("other.mason", plain());
    let other = site.run(&["other.mason"]);
    write(&other, 1 << 20, 2);
    other.stop_well();
    assert_eq!(head(&site, "a.img"), "", "nobody keeps account");
    let daemon = site.run(&["vm.mason"]);
    let said = backup(&site, &["--incremental"]).refused();
    assert!(said.contains("by somebody who has kept no account of it"), "{said}");
    backup(&site, &[]).done();
    write(&daemon, 2 << 20, 3);
    backup(&site, &["--incremental"]).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "b.img"));
    // A reader changes nothing.
    site.write("other.mason", plain().replace("(path a.img) (size 64M)", "(path a.img) (readonly yes)"));
    site.run(&["other.mason"]).stop_well();
    let daemon = site.run(&["vm.mason"]);
    backup(&site, &["--incremental"]).done();
    // The account goes with what keeps it.
    site.mason(&["remove", "A_changes"]).done();
    assert_eq!(head(&site, "a.img"), "");
    assert!(backup(&site, &["--incremental"]).refused().contains("no account is kept"));
    daemon.stop_well();
}

#[test]
fn a_backup_that_is_served_is_a_disk_from_then_on() {
    let site = Site::new();
    let daemon = start(&site);
    write(&daemon, 0, 1);
    backup(&site, &[]).done();
    assert!(head(&site, "b.img").contains("\"backup\""));
    site.write("b.mason", plain().replace("a.img", "b.img").replace("vm.nbd", "b.nbd"));
    site.mason(&["load", "b.mason"]).done();
    assert_eq!(head(&site, "b.img"), "");
    site.mason(&["unload", "b"]).done();
    assert!(backup(&site, &["--incremental"]).refused().contains("nothing says"));
    daemon.stop_well();
}

#[test]
fn what_was_given_up_is_no_backup_and_is_not_restored_or_served() {
    let site = Site::new();
    let daemon = start(&site);
    Raw::ready(daemon.socket()).write(0, &vec![7; 8 << 20]);
    let mut child = begin_slowly(&site);
    assert!(head(&site, "b.img").contains("\"filling\""));
    assert!(head(&site, "a.img").contains("\"overlaid\""));
    site.mason(&["backup", "abort", "vm", "A"]).done();
    child.wait().unwrap();
    assert!(head(&site, "b.img").contains("\"filling\"") && !head(&site, "a.img").contains("\"overlaid\""));
    let restore = |more: &[&str]| {
        let args = ["restore", "--from", "file (path b.img)", "--to", "file (path r.img)"];
        mason(site.folder(), &[&args, more].concat())
    };
    let said = restore(&[]).refused();
    assert!(
        said.contains("it is being filled from A of vm (a backup)") && said.contains("--force"),
        "{said}"
    );
    restore(&["--force"]).done();
    site.write("b.mason", plain().replace("a.img", "b.img").replace("vm.nbd", "b.nbd"));
    assert!(site.mason(&["load", "b.mason"]).refused().contains("being filled"));
    // An incremental one that was given up can be tried again there.
    backup(&site, &[]).done();
    Raw::ready(daemon.socket()).write(0, &vec![8; 8 << 20]);
    let mut child = crate::backup::spawn(
        &site,
        &["backup", "vm", "A", "--to", "file (path b.img)", "--rate", "1M/s", "--incremental"],
    );
    until("it copies", || status(&site)["copied"].as_u64() > Some(0) && status(&site)["state"] == "copying");
    site.mason(&["backup", "abort", "vm", "A"]).done();
    child.wait().unwrap();
    assert!(restore(&["--force"]).done().contains("restored"));
    assert!(restore(&[]).refused().contains("being filled"));
    backup(&site, &["--incremental"]).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "b.img"));
}

#[test]
fn the_head_of_a_target_says_what_is_true_of_it() {
    let site = Site::new();
    let daemon = start(&site);
    write(&daemon, 0, 1);
    site.mason(&["migrate", "vm", "A", "--to", "file (path c.img)"]).done();
    assert!(head(&site, "a.img").contains("\"moved\""));
    to(&site, "file (path a.img)", &[]).done();
    assert!(head(&site, "a.img").contains("\"active\""), "{}", head(&site, "a.img"));
    // Somebody's disk is not overwritten.
    site.write("x.mason", plain().replace("a.img", "x.img").replace("vm.nbd", "x.nbd"));
    site.mason(&["load", "x.mason"]).done();
    site.mason(&["migrate", "x", "A", "--to", "file (path y.img)"]).done();
    site.mason(&["unload", "x"]).done();
    let said = to(&site, "file (path y.img)", &[]).refused();
    assert!(said.contains("a volume that somebody uses"), "{said}");
    site.write("old.mason", plain().replace("vm.nbd", "o.nbd"));
    site.mason(&["load", "old.mason"]).done();
    daemon.stop_well();
}

#[test]
fn a_disk_below_an_overlay_is_served_by_nobody_else() {
    let site = Site::new();
    let daemon = start(&site);
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &vec![1; 8 << 20]);
    let mut child = begin_slowly(&site);
    raw.write(0, &[2; 4096]);
    killed(&site, daemon);
    let _ = child.wait();
    site.write("other.mason", plain());
    let said = mason(site.folder(), &["run", "other.mason", "--control", "c.sock"]).refused();
    assert!(said.contains("overlay.cow") && said.contains("start its graph once"), "{said}");
    site.write("full.img", vec![5; 64 << 20]);
    let restore = || {
        let args = ["restore", "--from", "file (path full.img)", "--to", "file (path a.img)", "--force"];
        mason(site.folder(), &args)
    };
    let said = restore().refused();
    assert!(said.contains("overlay.cow") && said.contains("mason backup discard"), "{said}");
    let _ = std::fs::remove_file(site.path("c.sock"));
    let daemon = site.run(&["vm.mason"]);
    until("it is merged", || status(&site)["state"] == "failed");
    assert!(!head(&site, "a.img").contains("overlaid"));
    assert_eq!(elements(&site), ["A", "A_changes", "Guest"]);
    daemon.stop_well();
}

#[test]
fn an_overlay_that_is_dropped_is_not_merged_into_what_is_restored() {
    let site = Site::new();
    let daemon = start(&site);
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &vec![1; 8 << 20]);
    let mut child = begin_slowly(&site);
    raw.write(0, &[2; 4096]);
    let discard =
        |more: &[&str]| mason(site.folder(), &[&["backup", "discard", "vm.mason", "A"], more].concat());
    assert!(discard(&["--yes"]).refused().contains("overlay.cow"), "it is in use");
    killed(&site, daemon);
    let _ = child.wait();
    assert!(discard(&[]).refused().contains("--yes"));
    discard(&["--yes"]).done();
    assert!(discard(&["--yes"]).refused().contains("nothing is left"));
    assert_eq!(head(&site, "a.img"), "");
    site.write("full.img", vec![5; 64 << 20]);
    let args = ["restore", "--from", "file (path full.img)", "--to", "file (path a.img)", "--force"];
    mason(site.folder(), &args).done();
    let daemon = site.run(&["vm.mason"]);
    assert_eq!(Raw::ready(daemon.socket()).read(0, 4096), [5; 4096]);
    assert!(backup(&site, &["--incremental"]).refused().contains("no account is kept"));
    backup(&site, &["--save"]).done();
    daemon.stop_well();
    // A restore is no change that account has been kept of.
    site.write("full.img", vec![6; 64 << 20]);
    mason(site.folder(), &args).done();
    let daemon = site.run(&["vm.mason"]);
    assert!(backup(&site, &["--incremental"]).refused().contains("kept no account of it"));
    backup(&site, &[]).done();
    daemon.stop_well();
    assert!(same(&site, "a.img", "b.img"));
}

#[test]
fn a_restore_that_ends_half_way_leaves_no_disk() {
    let site = Site::new();
    site.write("full.img", vec![5; 64 << 20]);
    site.write("vm.mason", plain());
    let args = ["restore", "--from", "file (path full.img)", "--to", "file (path a.img)"];
    let mut spawned = command(site.folder(), &[&args[..], &["--rate", "1M/s"]].concat());
    let mut child = spawned.stderr(std::process::Stdio::null()).spawn().unwrap();
    until("it has begun", || head(&site, "a.img").contains("filling"));
    child.kill().unwrap();
    child.wait().unwrap();
    let said = mason(site.folder(), &["run", "vm.mason", "--control", "c.sock"]).refused();
    assert!(said.contains("it is being filled from"), "{said}");
    mason(site.folder(), &args).done();
    assert_eq!(head(&site, "a.img"), "");
    site.run(&["vm.mason"]).stop_well();
}

#[test]
fn an_overlay_goes_also_where_the_folder_for_state_is_full() {
    let root = rustix::process::geteuid().is_root();
    if skipped((!root).then_some("mounts need root")) {
        return;
    }
    let site = Site::new();
    let state = site.path("state");
    std::fs::create_dir(&state).unwrap();
    let small = Tmpfs::mount(&state, 16 << 20);
    let daemon = start(&site);
    Raw::ready(daemon.socket()).write(0, &vec![1; 8 << 20]);
    let mut child = begin_slowly(&site);
    Raw::ready(daemon.socket()).write(0, &vec![2; 4 << 20]);
    let mut filler = std::fs::File::create(state.join("filler")).unwrap();
    while filler.write_all(&[7; 4096]).is_ok() {}
    site.mason(&["backup", "abort", "vm", "A"]).done();
    child.wait().unwrap();
    assert_eq!(status(&site)["state"], "failed");
    assert_eq!(elements(&site), ["A", "A_changes", "Guest"]);
    daemon.stop_well();
    drop(small);
    assert!(std::fs::read(site.path("a.img")).unwrap()[..4 << 20].iter().all(|byte| *byte == 2));
}

#[test]
fn a_target_that_leads_back_to_the_disk_is_refused() {
    let site = Site::new();
    let daemon = start(&site);
    let said = to(&site, "nbd_client (uri nbd+unix:///?socket=vm.nbd)", &[]).refused();
    assert!(said.contains("it is the disk A itself, by way of Guest"), "{said}");
    assert_eq!(elements(&site), ["A", "Guest"]);
    daemon.stop_well();
}

#[test]
fn messages_speak_of_what_was_written_on_the_command_line() {
    let site = Site::new();
    let daemon = start(&site);
    site.write("small.img", vec![0; 1 << 20]);
    for (target, says) in [
        ("file (path small.img)", "file (path small.img) has 1M, A 64M: make it at least as large"),
        ("file (path b.img) (colour red)", "--to: "),
        ("file (path none/b.img)", "--to: "),
    ] {
        let said = to(&site, target, &[]).refused();
        assert!(said.contains(says) && !said.contains("edit:") && !said.contains("backing up"), "{said}");
    }
    // An interrupt before anything has begun begins nothing; one after that says what goes on.
    let args = ["backup", "vm", "A", "--to", "file (path b.img)", "--control", "c.sock"];
    let before = ["--before", "touch before; until [ -e go ]; do sleep 0.01; done"];
    let mut spawned = command(site.folder(), &[&args[..], &before].concat());
    let child = spawned.stderr(std::process::Stdio::piped()).spawn().unwrap();
    until("it waits", || site.path("before").exists());
    let interrupt = |child: &std::process::Child| {
        let number = child.id().to_string();
        assert!(std::process::Command::new("kill").args(["-INT", &number]).status().unwrap().success());
    };
    interrupt(&child);
    site.write("go", "");
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("nothing has begun"), "{said}");
    assert_eq!(elements(&site), ["A", "Guest"]);
    Raw::ready(daemon.socket()).write(0, &vec![1; 8 << 20]);
    let mut spawned = command(site.folder(), &[&args[..], &["--rate", "1M/s"]].concat());
    let child = spawned.stderr(std::process::Stdio::piped()).spawn().unwrap();
    until("it copies", || elements(&site).contains(&"A_copy".to_owned()));
    // It says so from the moment when it has been told.
    until("it is told", || status(&site)["copied"].as_u64() > Some(1 << 20));
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(130) && said.contains("`mason backup abort vm A` ends it"),
        "{said}"
    );
    site.mason(&["backup", "abort", "vm", "A"]).done();
    daemon.stop_well();
}
