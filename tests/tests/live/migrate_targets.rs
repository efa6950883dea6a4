//! Targets that fail: a server that dies or has no room, at every stage of a move. The move is given up in time, and
//! the guest notices nothing.

use crate::migrate::{TO, World};
use crate::migrate_crash::Tracer;
use crate::server::Server;
use blockmason_tests::control::command;
use blockmason_tests::mason::until;
use rustix::process::Signal;
use std::path::Path;
use std::time::Duration;

const PATIENCE: [&str; 2] = ["--patience", "1s"];

/// A move to a server that may die.
fn begun(options: &[&str]) -> (World, Server) {
    let world = World::new();
    let server = Server::memory(world.site.folder(), "16M");
    world.migrate(&server.disk(), &[options, &PATIENCE].concat()).done();
    (world, server)
}

/// The server is gone: the move ends, the guest goes on.
#[track_caller]
fn is_given_up(mut world: World) {
    world.go_on();
    world.until_state("aborted");
    let message = world.status()["message"].as_str().unwrap().to_owned();
    assert!(message.contains("a.img, as before") && message.contains("target.nbd"), "{message}");
    world.is_as_before();
    world.starts_anew();
}

#[test]
fn a_server_that_dies_at_the_start() {
    let (world, mut server) = begun(&["--rate", "100k/s", "--until", "begun"]);
    server.die();
    is_given_up(world);
}

#[test]
fn a_server_that_dies_half_way() {
    let (world, mut server) = begun(&["--rate", "4M/s", "--until", "begun"]);
    let half = |status: serde_json::Value| {
        let number = |key: &str| status[key].as_u64().unwrap();
        assert_eq!(status["state"], "copying", "{status}");
        number("total") > 0 && number("remaining") <= number("total") / 2
    };
    until("half is copied", || half(world.status()));
    server.die();
    is_given_up(world);
}

#[test]
fn a_server_that_dies_once_both_are_the_same() {
    let (world, mut server) = begun(&["--cutover", "manual", "--until", "ready"]);
    server.die();
    is_given_up(world);
}

#[test]
fn a_server_that_dies_at_the_cut_over() {
    let (world, mut server) = begun(&["--cutover", "manual", "--until", "ready"]);
    // It does not answer the flush of the cut-over.
    server.signal(Signal::STOP);
    let said = world.mason(&["migrate", "cutover", "--deadline", "500ms"]).refused();
    assert!(!said.is_empty());
    world.go_on();
    server.die();
    is_given_up(world);
}

#[test]
fn a_server_that_does_not_answer_any_more() {
    for stage in [&["--rate", "4M/s", "--until", "begun"][..], &["--cutover", "manual", "--until", "ready"]] {
        let (world, server) = begun(stage);
        server.signal(Signal::STOP);
        let since = blockmason_tests::mason::now();
        while since.elapsed() < Duration::from_secs(3) {
            world.go_on();
        }
        // Guests have gone on beside it, and do while it is given up, with the server as it is.
        is_given_up(world);
    }
}

/// Whatever it is asked to do, and however long others have said that it may take.
#[test]
fn a_move_to_a_server_that_does_not_answer_is_aborted_soon() {
    let ready = ["--cutover", "manual", "--until", "ready"];
    for (stage, cuts) in
        [(&["--rate", "4M/s", "--until", "begun"][..], false), (&ready, false), (&ready, true)]
    {
        let mut world = World::new();
        let server = Server::memory(world.site.folder(), "16M");
        world.migrate(&server.disk(), stage).done();
        server.signal(Signal::STOP);
        world.go_on();
        let cutover = cuts.then(|| {
            let cutover = world.command(&["migrate", "cutover", "--deadline", "100s"]).spawn().unwrap();
            until("it cuts over", || world.status()["state"] == "cutting");
            cutover
        });
        let since = blockmason_tests::mason::now();
        let said = world.mason(&["migrate", "abort"]).done();
        let took = since.elapsed();
        assert!(said.contains("aborted") && took < Duration::from_secs(8), "{took:?}: {said}");
        if let Some(cutover) = cutover {
            assert_eq!(cutover.wait_with_output().unwrap().status.code(), Some(1));
        }
        world.is_as_before();
        world.starts_anew();
    }
}

#[test]
fn a_server_that_answers_again_in_time() {
    let world = World::new();
    let server = Server::memory(world.site.folder(), "16M");
    world.migrate(&server.disk(), &["--cutover", "manual", "--until", "ready"]).done();
    server.signal(Signal::STOP);
    until("it is noticed", || world.status()["message"].as_str().unwrap().contains("has not answered"));
    world.go_on();
    server.signal(Signal::CONT);
    world.until_state("ready");
    world.mason(&["migrate", "cutover"]).done();
    let mut world = world;
    world.go_on();
    world.verify();
    world.daemon.stop_well();
    drop(server);
}

#[test]
fn a_server_that_dies_after_the_cut_over_and_comes_back() {
    let mut world = World::new();
    let args = ["file", "file=target.img"];
    world.site.write("target.img", vec![0; 16 << 20]);
    let mut server = Server::start(world.site.folder(), &args);
    let to = server.disk().replace("200ms", "20s");
    world.migrate(&to, &[]).done();
    world.go_on();
    server.die();
    let server = Server::start(world.site.folder(), &args);
    world.go_on();
    world.verify();
    assert_eq!(world.site.head("a.img"), "moved");
    // It has the name of the disk that it is.
    let events = world.mason(&["events", "--last", "20"]).done();
    assert!(events.contains("notice A: nbd+unix") && !events.contains("notice A_new: nbd+unix"), "{events}");
    world.daemon.stop_well();
    drop(server);
}

#[test]
fn a_server_that_dies_within_the_cut_over_and_comes_back() {
    let mut world = World::new();
    let args = ["file", "file=target.img"];
    world.site.write("target.img", vec![0; 16 << 20]);
    let mut server = Server::start(world.site.folder(), &args);
    let to = server.disk().replace("200ms", "20s");
    world.migrate(&to, &["--cutover", "manual", "--until", "ready"]).done();
    // Between the head that decides and the graph that follows from it.
    let slowly = Tracer::inject(&world.daemon, "rename", "delay_exit=1000000", &world.site);
    let cutover = command(world.site.folder(), &["migrate", "cutover", "--control", "c.sock"]).spawn();
    until("the new head decides", || a_head_says(&world.site.path("state/mason/heads"), "\"active\""));
    server.die();
    assert_eq!(world.site.head("a.img"), "moving");
    drop(slowly);
    assert!(cutover.unwrap().wait().unwrap().success());
    let server = Server::start(world.site.folder(), &args);
    world.go_on();
    world.verify();
    assert_eq!(world.site.head("a.img"), "moved");
    world.daemon.stop_well();
    drop(server);
}

/// A server that answers before it has written anything: what is not flushed dies with it.
#[test]
fn a_server_that_forgets_what_was_not_flushed() {
    for stage in [&[][..], &["--keep-mirror"]] {
        let mut world = World::new();
        let args = ["--filter=cache", "file", "file=target.img", "cache=writeback"];
        world.site.write("target.img", vec![0; 16 << 20]);
        let mut server = Server::start(world.site.folder(), &args);
        let to = server.disk().replace("200ms", "20s");
        world.migrate(&to, &[&["--cutover", "manual", "--until", "ready"], stage].concat()).done();
        world.go_on();
        let mut ledgers = world.verify();
        server.die();
        let mut server = Server::start(world.site.folder(), &args);
        // It is found out by the flush of the cut-over, if not before, and copied again.
        until("it cuts over", || world.mason(&["migrate", "cutover"]).code == Some(0));
        ledgers.iter_mut().for_each(|ledger| ledger.verify(world.daemon.socket()));
        world.daemon.stop_well();
        server.die();
        world.site.are_same("a.img", "target.img");
    }
}

#[test]
fn a_way_back_that_is_gone_is_no_success() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::memory(folder.path(), "16M");
    let disk = server.disk();
    let (ty, parameters) = disk.split_once(' ').unwrap();
    let graph = format!(
        "element Guest (type nbd) (listen unix:vm.nbd)\nelement A (type {ty}) {parameters}\nGuest -> A\n"
    );
    let mut world = World::of(&graph);
    world.migrate(TO, &[&["--keep-mirror"], &PATIENCE[..]].concat()).done();
    let said = world.mason(&["migrate", "cutover"]).refused();
    assert!(said.contains("has cut over already") && said.contains("--back` goes back"), "{said}");
    server.die();
    world.go_on();
    let said = world.mason(&["migrate", "vm", "A", "--back"]).refused();
    assert!(said.contains("b.img") && said.contains("its mirror no more"), "{said}");
    world.go_on();
    world.verify();
    world.site.has_no_move();
    world.daemon.stop_well();
}

/// True if the head of a disk elsewhere says that.
fn a_head_says(folder: &Path, what: &str) -> bool {
    let heads = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    // One that is just being written has a name that begins with a dot.
    let mut heads = heads.filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.'));
    heads.any(|path| std::fs::read_to_string(&path).is_ok_and(|text| text.contains(what)))
}

#[test]
fn a_server_without_room() {
    let world = World::new();
    let args = [
        "--filter=error",
        "memory",
        "16M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-file=full",
    ];
    let server = Server::start(world.site.folder(), &args);
    world.site.write("full", "");
    let said = world.migrate(&server.disk(), &PATIENCE).refused();
    assert!(said.contains("aborted") && said.contains("ENOSPC"), "{said}");
    is_given_up(world);
}

#[test]
fn a_server_that_gets_room_in_time() {
    let mut world = World::new();
    let args = [
        "--filter=error",
        "memory",
        "16M",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        "error-file=full",
    ];
    let server = Server::start(world.site.folder(), &args);
    world.site.write("full", "");
    world.migrate(&server.disk(), &["--verify", "--until", "begun"]).done();
    until("the target fails", || world.status()["message"].as_str().unwrap().contains("ENOSPC"));
    world.go_on();
    std::fs::remove_file(world.site.path("full")).unwrap();
    world.until_state("done");
    world.go_on();
    world.verify();
    world.daemon.stop_well();
    drop(server);
}
