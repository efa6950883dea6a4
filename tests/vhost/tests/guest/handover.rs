//! Another process goes on with the guests of the one before: rings, memory and records go along.

use crate::{Daemon, Running, Sink};
use blockmason_tests::control::mason;
use blockmason_tests::handover::{Heir, is_running};
use blockmason_tests::mason::{program, until};
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::device::Wishes;
use blockmason_vhost_tests::model::{BLOCK, Load};
use blockmason_vhost_tests::raw::{GET_CONFIG, GET_FEATURES, Raw, SET_MEM_TABLE, VERSION};
use rustix::process::Signal;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const BLOCKS: u64 = 512;
const SIZE: u64 = BLOCKS * BLOCK;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_PROTOCOL_F_BACKEND_REQ and VHOST_USER_PROTOCOL_F_CONFIG.
const CHANNEL: u64 = 1 << 5 | 1 << 9;

/// Keeps the daemon busy while `work` is done elsewhere.
fn busy<T: Send>(load: &mut Load, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let worker = scope.spawn(work);
        while !worker.is_finished() {
            load.fill();
            if load.collect() == 0 {
                load.rest();
            }
        }
        worker.join().unwrap()
    })
}

/// Hands the daemon over, and waits until the process before has ended, well.
fn hand_over(daemon: &mut Daemon, heir: Option<Heir>) -> (Heir, Duration) {
    let before = heir.as_ref().map_or_else(|| daemon.pid(), Heir::pid);
    let (next, handed) = Heir::take_over(daemon.home.path(), &[]);
    assert_eq!(handed.from, before);
    match daemon.running.take() {
        Some(Running::Mason(mason)) => assert!(mason.ended_well()),
        Some(Running::Peer(_)) => unreachable!("only ours is replaced"),
        None => until("the old process ends", || !is_running(before)),
    }
    (next, handed.pause)
}

#[test]
fn under_load_again_and_again() {
    for (inflight, poll) in [(true, "0s"), (false, "0s"), (true, "100us")] {
        let mut daemon = Daemon::new();
        daemon.poll = poll;
        daemon.start(Sink::File(SIZE), 2);
        let wishes = Wishes { inflight, ..Wishes::default() };
        let shape = Shape { queues: 2, depth: 32, wishes, ..Shape::default() };
        let mut load = Load::new(Blk::connected(shape, &daemon.socket()), BLOCKS, 11);
        let mut pauses = Vec::new();
        let mut heir = None;
        for _ in 0..8 {
            let before = load.completed;
            let (next, pause) = busy(&mut load, || hand_over(&mut daemon, heir.take()));
            heir = Some(next);
            pauses.push(pause);
            busy(&mut load, || blockmason_tests::mason::pause(Duration::from_millis(20)));
            assert!(load.completed > before + 100, "hardly anything was done");
            // Nothing has been lost on the way, and nothing comes twice.
            load.drain();
        }
        load.check_all();
        eprintln!("inflight {inflight}, poll {poll}: {pauses:?}, {} requests", load.completed);
        let heir = heir.unwrap();
        if inflight {
            // What the last one wrote down is good for those that come after a crash.
            busy(&mut load, || {
                heir.signal(Signal::KILL);
                until("it is dead", || !is_running(heir.pid()));
            });
            load.blk.device.disconnect();
            daemon.start(Sink::File(SIZE), 2);
            load.blk.connect(&daemon.socket()).unwrap();
            load.drain();
            load.check_all();
            daemon.stop();
        } else {
            heir.stop(&daemon.socket());
        }
    }
}

/// A program at that name in the daemon's folder.
fn script(daemon: &Daemon, name: &str, text: &str) {
    let path = daemon.home.path().join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A new process that fails, before anything or with everything in its hands, leaves all as it was.
#[test]
fn a_handover_that_fails() {
    let mut daemon = Daemon::started(Sink::File(SIZE), 2);
    // More than a process may have that has room for the program, however much address space its allocator sets aside.
    let shape = Shape { queues: 2, depth: 32, spare: 2 << 30, ..Shape::default() };
    let mut load = Load::new(Blk::connected(shape, &daemon.socket()), BLOCKS, 12);
    let program = program().display().to_string();
    script(&daemon, "nothing", "exit 1");
    // Too few descriptors for those that come.
    script(&daemon, "poor", &format!("ulimit -n 24; exec {program} \"$@\""));
    // Guests' memory finds no room.
    script(&daemon, "narrow", &format!("ulimit -v 1500000; exec {program} \"$@\""));
    let home = daemon.home.path().to_owned();
    for name in ["nothing", "poor", "narrow", "nothing", "poor", "narrow"] {
        let said = busy(&mut load, || {
            mason(&home, &["handover", "--control", "c.sock", "--binary", &format!("./{name}")]).refused()
        });
        eprintln!("{name}: {said}");
        let before = load.completed;
        busy(&mut load, || blockmason_tests::mason::pause(Duration::from_millis(20)));
        assert!(load.completed > before + 100, "{name}: hardly anything was done");
        load.drain();
    }
    load.check_all();
    let (heir, _) = busy(&mut load, || hand_over(&mut daemon, None));
    load.drain();
    load.check_all();
    heir.stop(&daemon.socket());
}

/// Bytes of a message, with its header.
fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        [request, VERSION, payload.len() as u32].iter().flat_map(|n| n.to_ne_bytes()).collect();
    bytes.extend_from_slice(payload);
    bytes
}

/// One process reads the first half of a message and the other the second, whatever came along with it.
#[test]
fn half_a_message() {
    let mut daemon = Daemon::started(Sink::File(SIZE), 1);
    let (early, late) = (Raw::connect(&daemon.socket()), Raw::greeted(&daemon.socket(), CHANNEL));
    let features = message(GET_FEATURES, &[]);
    early.bytes(&features[..5], &[]);
    // One region, whose file comes with the first byte.
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let region: Vec<u8> =
        [1u64, 0, 1 << 20, 1 << 40, 0].iter().flat_map(|field| field.to_ne_bytes()).collect();
    let table = message(SET_MEM_TABLE, &region);
    late.bytes(&table[..30], &[file.as_fd()]);
    until("both are read", || early.is_read() && late.is_read());
    let (heir, _) = hand_over(&mut daemon, None);
    early.bytes(&features[5..], &[]);
    late.bytes(&table[30..], &[]);
    assert!(early.reply(GET_FEATURES).is_some());
    late.send(GET_FEATURES, &[], &[]);
    assert!(late.reply(GET_FEATURES).is_some());
    heir.stop(&daemon.socket());
}

/// The new process knows what size the guest was told, and how to tell it of another.
#[test]
fn a_disk_that_grows_afterwards() {
    let mut daemon = Daemon::started(Sink::File(SIZE), 1);
    let raw = Raw::greeted(&daemon.socket(), CHANNEL);
    let (mut near, far) = UnixStream::pair().unwrap();
    raw.send(SET_BACKEND_REQ_FD, &[], &[far.as_fd()]);
    raw.send(GET_FEATURES, &[], &[]);
    assert!(raw.reply(GET_FEATURES).is_some());
    let (heir, _) = hand_over(&mut daemon, None);
    drop(far);
    let graph = daemon.home.path().join("vm.mason");
    let text = std::fs::read_to_string(&graph).unwrap();
    std::fs::write(&graph, text.replace(&format!("(size {SIZE})"), &format!("(size {})", 2 * SIZE))).unwrap();
    std::fs::File::options()
        .write(true)
        .open(daemon.home.path().join("disk.img"))
        .unwrap()
        .set_len(2 * SIZE)
        .unwrap();
    mason(daemon.home.path(), &["reload", "vm.mason", "--control", "c.sock"]).done();
    near.set_read_timeout(Some(blockmason_vhost_tests::PATIENCE)).unwrap();
    let mut told = [0; 12];
    near.read_exact(&mut told).unwrap();
    assert_eq!(told[..4], 2u32.to_ne_bytes(), "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG");
    heir.stop(&daemon.socket());
}

/// Tells others to stop when it is dropped, whatever the reason.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Somebody who does not read their answers, and others who come and go, hold up nobody.
#[test]
fn others_are_not_waited_for() {
    let mut daemon = Daemon::started(Sink::File(SIZE), 2);
    let shape = Shape { queues: 2, ..Shape::default() };
    let mut load = Load::new(Blk::connected(shape, &daemon.socket()), BLOCKS, 13);
    let (socket, stop) = (daemon.socket(), AtomicBool::new(false));
    let mute = Raw::greeted(&socket, CHANNEL);
    let config: Vec<u8> = [0u32, 256, 0].iter().flat_map(|n| n.to_ne_bytes()).chain([0; 256]).collect();
    // Until its answers find no room, and so nothing is read any more.
    let mut unread = 0;
    while unread < 50 {
        if unread == 0 {
            mute.send(GET_CONFIG, &config, &[]);
        }
        blockmason_tests::mason::pause(Duration::from_micros(200));
        unread = if mute.is_read() { 0 } else { unread + 1 };
    }
    let heir = std::thread::scope(|scope| {
        let comers = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let comer = Raw::connect(&socket);
                comer.send(GET_FEATURES, &[], &[]);
                // It may be let down while one process ends.
                comer.reply(GET_FEATURES);
            }
        });
        let stopping = Stop(&stop);
        let mut heir = None;
        for _ in 0..5 {
            heir = Some(busy(&mut load, || hand_over(&mut daemon, heir.take())).0);
        }
        drop(stopping);
        comers.join().unwrap();
        heir.unwrap()
    });
    load.drain();
    load.check_all();
    heir.stop(&daemon.socket());
}

/// A guest keeps the queues that it was offered, whatever others are offered since.
#[test]
fn more_queues_for_those_who_come() {
    let mut daemon = Daemon::started(Sink::File(SIZE), 2);
    let shape = Shape { queues: 2, ..Shape::default() };
    let mut load = Load::new(Blk::connected(shape, &daemon.socket()), BLOCKS, 14);
    let graph = daemon.home.path().join("vm.mason");
    let text = std::fs::read_to_string(&graph).unwrap();
    std::fs::write(&graph, text.replace("(queues 2)", "(queues 4)")).unwrap();
    mason(daemon.home.path(), &["reload", "vm.mason", "--control", "c.sock"]).done();
    let (heir, _) = busy(&mut load, || hand_over(&mut daemon, None));
    load.drain();
    load.check_all();
    load.blk.device.stop().unwrap();
    load.blk.device.disconnect();
    let shape = Shape { queues: 4, ..Shape::default() };
    let mut blk = Blk::connected(shape, &daemon.socket());
    assert_eq!(blk.run_on(3, Request::read(0, 4096)).status, OK);
    heir.stop(&daemon.socket());
}
