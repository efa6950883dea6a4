//! Disks that move into a volume of a pool, from one volume to another, and out again.

use crate::migrate::World;
use blockmason_tests::control::mason;

const VOLUME: &str = "parallax (pool vms.pool) (volume vm)";

/// A guest whose disk is a file, beside a pool with two volumes.
fn world() -> World {
    let world = World::new();
    mason(world.site.folder(), &["pool", "create", "vms.pool", "--size", "256M"]).done();
    for name in ["vm", "other"] {
        world.mason(&["volume", "create", "vms.pool", name, "--size", "16M"]).done();
    }
    world
}

fn graph_has(world: &World, what: &str) {
    let text = std::fs::read_to_string(world.site.path("vm.mason")).unwrap();
    assert!(text.contains(what), "{text}");
}

#[test]
fn into_a_volume_and_out_of_it() {
    let mut world = world();
    let said = world.migrate(VOLUME, &["--verify"]).done();
    assert!(said.contains("vm A: done"), "{said}");
    graph_has(&world, "parallax");
    world.go_on();
    world.mason(&["volume", "snapshot", "vms.pool", "vm@there"]).done();
    world.go_on();
    let said = world.migrate("parallax (pool vms.pool) (volume other)", &["--verify"]).done();
    assert!(said.contains("vm A: done"), "{said}");
    graph_has(&world, "(volume other)");
    world.go_on();
    let said = world.migrate("file (path c.img)", &["--verify"]).done();
    assert!(said.contains("c.img now"), "{said}");
    world.go_on();
    assert_eq!(world.site.head("c.img"), "active");
    // What was left behind is nobody's: it is deleted while the daemon goes on.
    for name in ["vm@there", "vm", "other"] {
        world.mason(&["volume", "delete", "vms.pool", name]).done();
    }
    world.verify();
    world.site.has_no_move();
    world.daemon.stop_well();
    mason(world.site.folder(), &["pool", "check", "vms.pool"]).done();
}

/// The last disk at which both were the same is a volume: that is what the daemon serves again.
#[test]
fn killed_once_the_volume_is_the_disk() {
    let mut world = world();
    world.migrate(VOLUME, &[]).done();
    world.go_on();
    let ledgers = world.verify();
    let mut world = world.killed_and_started(ledgers);
    world.go_on();
    world.verify();
    graph_has(&world, "parallax");
    world.daemon.stop_well();
    mason(world.site.folder(), &["pool", "check", "vms.pool"]).done();
}

/// Amid the copy: the guest has its old disk, and the move goes on to its end.
#[test]
fn killed_while_a_volume_is_filled() {
    let mut world = world();
    world.migrate(VOLUME, &["--rate", "4M/s", "--until", "begun"]).done();
    world.go_on();
    let ledgers = world.verify();
    let mut world = world.killed_and_started(ledgers);
    world.go_on();
    world.until_state("done");
    graph_has(&world, "parallax");
    world.go_on();
    world.verify();
    world.site.has_no_move();
    world.daemon.stop_well();
    mason(world.site.folder(), &["pool", "check", "vms.pool"]).done();
}

/// A volume that another graph has is nobody else's: not for a move, and not for a third graph.
#[test]
fn a_volume_that_is_served_is_not_overwritten() {
    let mut world = world();
    let other = "element OtherGuest (type nbd) (listen unix:other.nbd)
element Other (type parallax) (pool vms.pool) (volume vm)
OtherGuest -> Other
";
    world.site.write("other.mason", other);
    world.mason(&["load", "other.mason"]).done();
    for more in [&[][..], &["--force"]] {
        let said = world.migrate(VOLUME, more).refused();
        assert!(said.contains("the graph other has it open"), "{said}");
    }
    world.site.write("third.mason", other.replace("other.nbd", "third.nbd").replace("Other", "Third"));
    let said = world.mason(&["load", "third.mason"]).refused();
    assert!(said.contains("the graph other has it open"), "{said}");
    world.mason(&["reload", "--graph", "other", "other.mason"]).done();
    world.is_as_before();
    world.starts_anew();
}

/// What is being filled is no disk yet, and a snapshot would make one of it.
#[test]
fn no_snapshot_is_taken_of_what_is_being_filled() {
    let mut world = world();
    world.migrate(VOLUME, &["--rate", "64k/s", "--until", "begun"]).done();
    let said = world.mason(&["volume", "snapshot", "vms.pool", "vm@amid"]).refused();
    assert!(said.contains("is being filled from"), "{said}");
    world.mason(&["migrate", "abort"]).done();
    world.until_state("aborted");
    world.is_as_before();
    world.starts_anew();
}
