//! The store is down for longer than anybody likes: what is in the cache is read, and writes and flushes go on until the log
//! is full. Then guests wait; when the store is back, they go on, and nothing has been lost.

use crate::cloud::Cloud;
use blockmason_tests::control::command;
use blockmason_tests::mason::{Mason, until};
use blockmason_tests::raw::{FLUSH, Raw, WRITE};
use mason_bucket::{Action, Hold, Operation, Rule};
use std::sync::mpsc::{Receiver, channel};

const MIB: u64 = 1 << 20;

/// What the log has room for, about: half of a file of 16 MiB.
const LOG: u64 = 8;

fn piece(number: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(number + 1);
    (0..MIB).map(|_| rng.u8(..)).collect()
}

/// A disk whose first four MiB are in the bucket, the first of them in the caches too, once the daemon has been started anew.
fn served() -> (Cloud, Mason) {
    let mut cloud = Cloud::new("40M");
    cloud.serve_with("(size 16M) (dirty_time 20ms)");
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    (0..4).for_each(|number| raw.write(number * MIB, &piece(number)));
    cloud.drain();
    daemon.stop_well();
    std::fs::remove_file(cloud.site.path("vm1.cache")).unwrap();
    let daemon = cloud.run();
    assert!(Raw::ready(daemon.socket()).read(0, MIB as u32) == piece(0));
    // Its first write begins a session of encryption, which is read from the bucket.
    Raw::ready(daemon.socket()).write(5 * MIB, &piece(5)[..4096]);
    cloud.drain();
    (cloud, daemon)
}

/// A client that writes twice what the log has room for, in pieces of a MiB, flushes after each, and tells. No request of
/// it may fail.
fn writer(daemon: &Mason) -> Receiver<u64> {
    let mut raw = Raw::ready(daemon.socket());
    // Longer than any of this takes.
    raw.0.set_read_timeout(None).unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for number in 8..8 + 2 * LOG {
            for (command, data) in [(WRITE, piece(number)), (FLUSH, Vec::new())] {
                let at = if command == WRITE { number * MIB } else { 0 };
                match raw.ask(command, at, data.len() as u32, &data) {
                    Ok(error) => assert_eq!(error, 0, "MiB {number}"),
                    // The daemon has died.
                    Err(_) => return,
                }
            }
            let _ = tell.send(number);
        }
    });
    told
}

/// The story of a store that is away from `down` to `up`.
fn away(down: impl FnOnce(&mut Cloud), silent: bool, up: impl FnOnce(&mut Cloud)) {
    let (mut cloud, daemon) = served();
    down(&mut cloud);
    let written = writer(&daemon);
    // All but what is under way has room; less would be a log that is not used.
    let first: Vec<u64> = written.iter().take(LOG as usize - 2).collect();
    assert_eq!(first.len() as u64, LOG - 2);
    until("the log is full", || cloud.get("Ssd.dirty").parse::<u64>().unwrap() > (LOG - 2) * MIB);
    assert!(Raw::ready(daemon.socket()).read(0, MIB as u32) == piece(0), "what is cached is read");
    assert!(Raw::ready(daemon.socket()).read(8 * MIB, MIB as u32) == piece(8), "what is in the log is read");
    if silent {
        until("it is said", || cloud.get("Disk.store") == "silent");
    }
    // Guests wait, and are told no error.
    assert!(written.try_iter().count() < 3);
    up(&mut cloud);
    assert_eq!(written.iter().last(), Some(7 + 2 * LOG), "the writer goes on");
    until("it is said", || cloud.get("Disk.store") == "answers");
    cloud.drain();
    daemon.kill();
    // All of it is in the bucket; nobody but this test knows.
    std::fs::remove_file(cloud.site.path("vm1.cache")).unwrap();
    cloud.bucket("take", &[]).done();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    for number in (0..4).chain(8..8 + 2 * LOG) {
        assert!(raw.read(number * MIB, MIB as u32) == piece(number), "MiB {number}");
    }
    drop(raw);
    daemon.stop_well();
    cloud.check("the end");
}

#[test]
fn a_store_that_refuses_connections() {
    away(|cloud| cloud.server.stop(), true, |cloud| cloud.server.start());
}

#[test]
fn a_store_that_answers_nothing() {
    let hold = Hold::default();
    let held = hold.clone();
    away(
        |cloud| cloud.server.fault(Rule::always(Action::Hold(held))),
        false,
        |cloud| {
            cloud.server.clear_faults();
            hold.release();
        },
    );
}

#[test]
fn a_store_that_takes_nothing_any_more() {
    // Somebody has changed the rights of the keys, and changes them back.
    away(
        |cloud| cloud.server.fault(Rule::always(Action::DENIED).on(Operation::Put)),
        false,
        |cloud| cloud.server.clear_faults(),
    );
}

#[test]
fn a_daemon_that_dies_meanwhile_has_everything_when_the_store_is_back() {
    let (mut cloud, daemon) = served();
    cloud.server.stop();
    let written = writer(&daemon);
    let first: Vec<u64> = written.iter().take(LOG as usize - 2).collect();
    daemon.kill();
    cloud.server.start();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    for number in (0..4).chain(first) {
        assert!(raw.read(number * MIB, MIB as u32) == piece(number), "MiB {number}");
    }
    drop(raw);
    daemon.stop_well();
}

#[test]
fn a_second_signal_ends_a_daemon_whose_store_is_away() {
    use rustix::process::Signal;
    for signal in [Signal::TERM, Signal::INT] {
        let (mut cloud, daemon) = served();
        cloud.server.stop();
        let written = writer(&daemon);
        let first: Vec<u64> = written.iter().take(LOG as usize - 2).collect();
        daemon.signal(signal);
        until("it has heard the first one", || !cloud.site.path("c.sock").exists());
        // Another one, SIGTERM: 128 and its number.
        assert_eq!(daemon.stop().0.code(), Some(143));
        cloud.server.start();
        let daemon = cloud.run();
        let mut raw = Raw::ready(daemon.socket());
        for number in (0..4).chain(first) {
            assert!(raw.read(number * MIB, MIB as u32) == piece(number), "MiB {number}");
        }
        drop(raw);
        daemon.stop_well();
    }
}

/// Nobody has been answered yet, so nothing is to be waited for.
#[test]
fn what_does_not_serve_yet_ends_at_the_first_signal() {
    use rustix::process::{Pid, Signal, kill_process};
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 16M)");
    let hold = Hold::default();
    cloud.server.fault(Rule::always(Action::Hold(hold.clone())).on(Operation::Put));
    let mut run = command(cloud.site.folder(), &["run", "cloud.mason", "--control", "c.sock"]);
    let mut daemon = run.spawn().unwrap();
    hold.wait(1);
    kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert_eq!(daemon.wait().unwrap().code(), Some(143));
    hold.release();
}
