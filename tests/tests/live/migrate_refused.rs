//! What a disk cannot move to, and what nobody may do to a disk that moves: refused with a reason, while the guest
//! works on and the disk stays what it was.

use crate::migrate::{GRAPH, SIZE, TO, World};
use blockmason_tests::mounts::{Tmpfs, skipped};

/// The move is refused for this reason.
#[track_caller]
fn refuse(world: &World, to: &str, more: &[&str], why: &str) {
    let said = world.migrate(to, more).refused();
    assert!(said.contains(why), "{to}: {said}");
    world.go_on();
    assert_eq!(world.site.head("a.img"), "none", "{to}");
    world.site.has_no_move();
}

#[test]
fn a_target_that_is_no_place_for_the_disk() {
    let mut world = World::new();
    world.site.write("small.img", vec![0; 1 << 20]);
    world.site.write("readonly.img", vec![0; SIZE as usize]);
    refuse(&world, "file (path small.img)", &[], "has 1M, that");
    world.site.write("large.img", vec![0; SIZE as usize * 2]);
    refuse(&world, "file (path large.img)", &["--keep-mirror"], "it could not be its mirror");
    refuse(&world, "/no/such.img", &[], "--to 'file (path /no/such.img)'");
    refuse(&world, "nbd://far/vm1", &[], "--to 'nbd_client (uri nbd://far/vm1)'");
    refuse(&world, "file (path readonly.img) (readonly yes)", &[], "read-only");
    refuse(&world, "nbd_client (uri nbd+unix:///?socket=gone.nbd) (reconnect 100ms)", &[], "gone.nbd");
    refuse(&world, "file (path nowhere/b.img)", &[], "nowhere");
    refuse(&world, "file (path .)", &[], "A_new");
    refuse(&world, "floppy (path b.img)", &[], "there is no type `floppy`");
    refuse(&world, "", &[], "type");
    refuse(&world, "file (pat b.img)", &[], "pat");
    refuse(&world, TO, &["--rate", "fast"], "fast");
    refuse(&world, "null (size 16M)", &[], "null, which forgets everything at once: --force");
    refuse(&world, "mem (size 16M)", &[], "memory: --force");
    refuse(&world, "mem (size 1E)", &["--force"], "64T at the most");
    let own = "nbd_client (uri nbd+unix:///?socket=vm.nbd)";
    refuse(&world, own, &["--force"], "Guest of this graph serves it");
    assert!(!world.site.path("b.img").exists());
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn a_target_that_another_process_serves() {
    let (mut world, other) = (World::new(), World::new());
    let to = format!("file (path {})", other.site.path("a.img").display());
    refuse(&world, &to, &["--force"], "a.img");
    world.is_as_before();
    // Nothing of it was overwritten.
    other.starts_anew();
    world.starts_anew();
}

#[test]
fn a_target_that_is_the_disk_itself() {
    let mut world = World::new();
    std::fs::hard_link(world.site.path("a.img"), world.site.path("hard.img")).unwrap();
    std::os::unix::fs::symlink("a.img", world.site.path("soft.img")).unwrap();
    for name in ["a.img", "./a.img", "hard.img", "soft.img"] {
        refuse(&world, &format!("file (path {name})"), &[], "it is the disk A itself");
        refuse(&world, &format!("file (path {name})"), &["--force"], "it is the disk A itself");
    }
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn a_target_that_the_graph_has_already() {
    let other = "element Other (type nbd) (listen unix:other.nbd)
element B (type file) (path b.img) (size 16M)
Other -> B
";
    let mut world = World::of(&format!("{GRAPH}{other}"));
    std::os::unix::fs::symlink("b.img", world.site.path("soft.img")).unwrap();
    refuse(&world, TO, &[], "it is B of this graph");
    refuse(&world, "file (path soft.img)", &["--force"], "it is B of this graph");
    refuse(&world, "element E (type error) (probability 0%) E -> B", &[], "it is B of this graph");
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn a_target_that_is_somebodys_volume() {
    let mut world = World::new();
    // Another daemon's disk, which has moved there.
    let other = World::new();
    let theirs = other.site.path("b.img");
    other.migrate(TO, &[]).done();
    let to = format!("file (path {})", theirs.display());
    refuse(&world, &to, &["--force"], "b.img");
    let other = other.starts_anew();
    assert_eq!(other.head("b.img"), "active");
    refuse(&world, &to, &[], "--force overwrites it");
    world.is_as_before();
    world.migrate(&to, &["--force"]).done();
    assert_eq!((world.site.head("a.img"), other.head("b.img")), ("moved".to_owned(), "active".to_owned()));
    world.starts_anew();
}

#[test]
fn an_element_that_is_no_disk() {
    let mut world = World::new();
    for (element, why) in [("Gone", "there is no element Gone"), ("Guest", "Guest is where requests enter")] {
        let said = world.mason(&["migrate", "vm", element, "--to", TO]).refused();
        assert!(said.contains(why), "{said}");
    }
    assert!(world.mason(&["migrate", "gone", "A", "--to", TO]).refused().contains("gone"));
    assert!(world.mason(&["migrate", "vm", "A", "--back"]).refused().contains("A of vm"));
    for what in ["pause", "resume", "abort", "cutover"] {
        assert!(world.mason(&["migrate", what]).refused().contains("no disk is being moved"));
    }
    world.is_as_before();
}

#[test]
fn a_disk_that_moves_already() {
    let mut world = World::new();
    world.make_ready();
    for element in ["A", "A_new", "A_tee", "A_copy"] {
        let said = world.mason(&["migrate", "vm", element, "--to", "file (path c.img)"]).refused();
        assert!(said.contains("A is on its way to"), "{element}: {said}");
    }
    world.site.write("same.mason", GRAPH);
    for args in [
        &["reload", "vm.mason"][..],
        &["reload", "same.mason", "--graph", "vm"],
        &["save", "vm"],
        &["remove", "A_leg"],
        &["remove", "A_copy"],
        &["replace", "A_new", "(type mem) (size 16M)"],
        &["insert", "P (type probe)", "between", "A_tee", "and", "A_leg"],
        &["try", "vm.mason"],
    ] {
        let said = world.mason(args).refused();
        assert!(said.contains("A is on its way to"), "{args:?}: {said}");
        world.go_on();
    }
    assert_eq!(world.status()["state"], "ready");
    assert!(!world.site.path("c.img").exists());
    world.mason(&["migrate", "abort"]).done();
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn the_rest_of_the_graph_changes_while_a_disk_moves() {
    let world = World::new();
    world.make_ready();
    world.mason(&["insert", "P (type probe)", "between", "Guest", "and", "A_tee"]).done();
    world.go_on();
    world.mason(&["migrate", "cutover"]).done();
    world.go_on();
    assert_eq!(world.mason(&["get", "P.counts"]).code, Some(0));
    let text = std::fs::read_to_string(world.site.path("vm.mason")).unwrap();
    assert!(text.contains("b.img") && text.contains("Guest -> P\n"), "{text}");
    world.starts_anew();
}

#[test]
fn a_target_without_room() {
    if skipped((!rustix::process::geteuid().is_root()).then_some("mounts need root")) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let full = Tmpfs::mount(folder.path(), 4 << 20);
    let mut world = World::new();
    let to = format!("file (path {})", folder.path().join("b.img").display());
    let said = world.migrate(&to, &["--patience", "1s"]).refused();
    assert!(said.contains("aborted") && said.contains("b.img"), "{said}");
    world.is_as_before();
    world.starts_anew();
    drop(full);
}
