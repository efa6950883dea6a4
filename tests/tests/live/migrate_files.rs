//! Files that somebody takes away, replaces or edits while a disk moves: those of its images, and that of its graph. The
//! disk stays where its guest's data are, and whoever looks is told.

use crate::migrate::{GRAPH, TO, World};
use crate::migrate_crash::Tracer;
use crate::read_log;
use blockmason_tests::handover::Heir;
use blockmason_tests::mason::until;
use blockmason_tests::mounts::skipped;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What somebody does to an image.
fn unlink(image: &Path) {
    fs::remove_file(image).unwrap();
}

fn replace(image: &Path) {
    let other = image.with_extension("other");
    fs::copy(image, &other).unwrap();
    fs::rename(&other, image).unwrap();
}

fn truncate(image: &Path) {
    fs::OpenOptions::new().write(true).open(image).unwrap().set_len(4096).unwrap();
}

type Harm = (fn(&Path), &'static str);

const HARMS: [Harm; 3] = [
    (unlink, "b.img: the file that is open has this name no more"),
    (replace, "b.img: another file has this name now"),
    (truncate, "b.img: it has become shorter"),
];

/// The move is given up for this reason, and the guest goes on with the old disk.
#[track_caller]
fn is_given_up(mut world: World, why: &str) {
    world.until_state("aborted");
    let message = world.status()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("a.img, as before") && message.contains(why), "{message}");
    let events = world.mason(&["events", "--last", "5"]).done();
    assert!(events.contains(why), "{events}");
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn a_new_disk_that_is_taken_away_while_it_is_copied() {
    for (harm, why) in HARMS {
        let world = World::new();
        world.migrate(TO, &["--rate", "1M/s", "--until", "begun"]).done();
        harm(&world.site.path("b.img"));
        is_given_up(world, why);
    }
}

#[test]
fn a_new_disk_that_is_taken_away_before_the_cut_over() {
    for (harm, why) in HARMS {
        let world = World::new();
        world.make_ready();
        harm(&world.site.path("b.img"));
        let said = world.mason(&["migrate", "cutover"]).refused();
        assert!(said.contains(why), "{said}");
        world.go_on();
        is_given_up(world, why);
    }
}

/// At the last instant: once the gates are closed, before anything says that the new disk is the one.
#[test]
fn a_new_disk_that_is_taken_away_within_the_cut_over() {
    let world = World::new();
    world.make_ready();
    // The record of the cut-over comes first, and takes its time.
    let slowly = Tracer::inject(&world.daemon, "rename", "delay_enter=700000:when=1", &world.site);
    let cutover = world.command(&["migrate", "cutover"]).spawn().unwrap();
    until("it cuts over", || world.status()["state"] == "cutting");
    unlink(&world.site.path("b.img"));
    let ended = cutover.wait_with_output().unwrap();
    drop(slowly);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    is_given_up(world, HARMS[0].1);
}

#[test]
fn a_mirror_that_is_taken_away_is_let_go() {
    let mut world = World::new();
    world.migrate(TO, &["--keep-mirror"]).done();
    unlink(&world.site.path("a.img"));
    world.until_state("done");
    let message = world.status()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("b.img, and") && message.contains("a.img: the file"), "{message}");
    world.go_on();
    world.verify();
    world.site.has_no_move();
    world.daemon.stop_well();
}

/// An old disk that has lost its name is saved by a move.
#[test]
fn an_old_disk_without_a_name_moves() {
    let mut world = World::new();
    world.make_ready();
    unlink(&world.site.path("a.img"));
    let said = world.mason(&["migrate", "cutover"]).done();
    assert!(said.contains("b.img now"), "{said}");
    world.go_on();
    world.verify();
    assert_eq!(world.site.head("b.img"), "active");
    world.daemon.stop_well();
}

/// Nor has it to have one when the move begins: that is how a disk is saved whose image was deleted.
#[test]
fn an_old_disk_that_was_deleted_before_moves() {
    let mut world = World::new();
    unlink(&world.site.path("a.img"));
    let said = world.migrate(TO, &["--verify"]).done();
    assert!(said.contains("b.img now"), "{said}");
    world.go_on();
    world.verify();
    assert_eq!(world.site.head("b.img"), "active");
    world.daemon.stop_well();
}

/// What the map says is not about a file that has come into the place of one that was being filled, or was copied.
#[test]
fn an_image_that_is_another_one_at_the_restart() {
    for (image, harm, why) in [
        ("b.img", replace as fn(&Path), "another file has this name now"),
        ("b.img", unlink, "is not there any more"),
        ("a.img", replace, "another file has this name now"),
    ] {
        let mut world = World::new();
        world.migrate(TO, &["--rate", "1M/s", "--until", "begun"]).done();
        until("what moves is noted", || record(&world).contains("\"born\""));
        let ledgers = world.verify();
        let mut world = world.harmed_while_dead(ledgers, |site| harm(&site.path(image)));
        let log = read_log(&world.site);
        assert!(log.contains("was given up") && log.contains(image) && log.contains(why), "{image}: {log}");
        world.is_as_before();
        world.starts_anew();
    }
}

/// The record of the move, as text.
fn record(world: &World) -> String {
    let folders = fs::read_dir(world.site.path("state/mason/moving")).unwrap();
    let records = folders.map(|folder| folder.unwrap().path().join("A/move.json"));
    records.filter_map(|path| fs::read_to_string(path).ok()).collect()
}

fn chattr(how: &str, path: &Path) -> bool {
    Command::new("chattr").arg(how).arg(path).status().is_ok_and(|status| status.success())
}

fn cannot_chattr(path: &Path) -> Option<&'static str> {
    let can = chattr("+i", path) && chattr("-i", path);
    (!can).then_some("chattr needs root and a file system that knows it")
}

/// The cut-over is refused, the move stays ready, and goes on when somebody has seen to the graph file.
#[track_caller]
fn waits_for_the_file(world: World, why: &str, mend: impl FnOnce(&World)) {
    let said = world.mason(&["migrate", "cutover"]).refused();
    assert!(said.contains(why) && said.contains("vm.mason"), "{said}");
    world.go_on();
    let status = world.status();
    assert!(status["state"] == "ready" && status["message"].as_str().unwrap().contains(why), "{status}");
    let said = world.mason(&["migrate", "wait"]).refused();
    assert!(said.contains(why), "{said}");
    assert_eq!((world.site.head("a.img"), world.site.head("b.img")), ("moving".into(), "filling".into()));
    mend(&world);
    world.mason(&["migrate", "cutover"]).done();
    world.go_on();
    world.starts_anew();
}

#[test]
fn a_graph_file_that_cannot_be_replaced() {
    let world = World::new();
    let file = world.site.path("vm.mason");
    if skipped(cannot_chattr(&file)) {
        return;
    }
    assert!(chattr("+i", &file));
    // Of its own accord it does not cut over either.
    let said = world.migrate(TO, &[]).refused();
    assert!(said.contains("vm A: ready") && said.contains("could not be written anew"), "{said}");
    waits_for_the_file(world, "could not be written anew", |_| assert!(chattr("-i", &file)));
    let world = World::new();
    world.make_ready();
    let folder = world.site.folder().to_owned();
    assert!(chattr("+i", &folder));
    waits_for_the_file(world, "could not be written anew", |_| assert!(chattr("-i", &folder)));
}

#[test]
fn a_graph_file_that_was_edited() {
    let edit = |world: &World| drop(world.site.write("vm.mason", format!("# Mine.\n{GRAPH}")));
    let put_back = |world: &World| drop(world.site.write("vm.mason", GRAPH));
    let why = "it is not what was loaded from there any more";
    let world = World::new();
    world.make_ready();
    edit(&world);
    waits_for_the_file(world, why, put_back);
    // It is gone, or leads nowhere.
    let world = World::new();
    world.make_ready();
    let file = world.site.path("vm.mason");
    fs::rename(&file, world.site.path("aside")).unwrap();
    std::os::unix::fs::symlink("nowhere", &file).unwrap();
    waits_for_the_file(world, why, |_| {
        fs::remove_file(&file).unwrap();
        put_back_at(&file);
    });
    // A restart does not forget it.
    let mut world = World::new();
    world.make_ready();
    edit(&world);
    let ledgers = world.verify();
    let mut world = world.killed_and_started(ledgers);
    world.until_state("ready");
    // Nor does a successor, whether something moves already or not.
    let (_heir, _) = Heir::take_over(world.site.folder(), &[]);
    world.until_state("ready");
    assert!(world.mason(&["migrate", "cutover"]).refused().contains(why));
    world.mason(&["migrate", "abort"]).done();
    let (_heir, _) = Heir::take_over(world.site.folder(), &[]);
    world.make_ready();
    assert!(world.mason(&["migrate", "cutover"]).refused().contains(why));
    put_back(&world);
    world.mason(&["migrate", "cutover"]).done();
    world.go_on();
    world.verify();
}

fn put_back_at(file: &Path) {
    fs::write(file, GRAPH).unwrap();
}

#[test]
fn an_edited_graph_file_is_overwritten_by_force_and_no_other_is_taken_for_one() {
    let world = World::new();
    // What is reloaded is known.
    world.site.write("vm.mason", format!("# Mine.\n{GRAPH}"));
    world.mason(&["reload", "vm.mason"]).done();
    world.make_ready();
    world.mason(&["migrate", "cutover"]).done();
    // What a cut-over has written, too.
    world.migrate("file (path c.img)", &["--cutover", "manual", "--until", "ready"]).done();
    world.site.write("vm.mason", GRAPH);
    world.mason(&["migrate", "cutover"]).refused();
    world.mason(&["migrate", "cutover", "--force"]).done();
    let text = fs::read_to_string(world.site.path("vm.mason")).unwrap();
    assert!(text.contains("c.img"), "{text}");
    world.starts_anew();
}

/// Renaming it is the last step, and comes after the one that counts.
#[test]
fn a_graph_file_that_is_not_replaced_after_all() {
    let world = World::new();
    let file = world.site.path("vm.mason");
    if skipped(cannot_chattr(&file)) {
        return;
    }
    world.make_ready();
    let slowly = Tracer::inject(&world.daemon, "rename", "delay_exit=1000000", &world.site);
    let cutover = world.command(&["migrate", "cutover"]).spawn().unwrap();
    until("the new head decides", || world.site.head("b.img") == "active");
    assert!(chattr("+i", &file));
    let ended = cutover.wait_with_output().unwrap();
    assert!(chattr("-i", &file));
    drop(slowly);
    let said = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("vm A: done") && last.contains("b.img now"), "{said}");
    assert!(last.contains("vm.mason could not be written anew and names the old disk"), "{said}");
    let events = world.mason(&["events", "--last", "5"]).done();
    assert!(events.contains("could not be written anew"), "{events}");
    assert_eq!(fs::read_to_string(&file).unwrap(), GRAPH);
    world.go_on();
    world.mason(&["save", "vm"]).done();
    world.starts_anew();
}

/// The file says what a start without any move would serve.
#[test]
fn a_graph_file_names_nothing_of_a_disk_that_is_still_on_its_way() {
    let other = "element Two (type nbd) (listen unix:two.nbd)
element B (type file) (path two.img) (size 16M)
Two -> B
";
    let world = World::of(&format!("{GRAPH}{other}"));
    let to =
        ["migrate", "vm", "B", "--to", "file (path other.img)", "--cutover", "manual", "--until", "ready"];
    world.mason(&to).done();
    world.migrate(TO, &[]).done();
    let text = fs::read_to_string(world.site.path("vm.mason")).unwrap();
    assert!(text.contains("b.img") && text.contains("two.img") && !text.contains("B_"), "{text}");
    world.mason(&["migrate", "abort", "vm", "B"]).done();
    world.site.has_no_move();
    world.starts_anew();
}
