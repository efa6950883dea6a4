//! Clients that misbehave: the others go on unharmed, and the daemon's memory stays bounded.
#![allow(clippy::unwrap_used)]

use blockmason_tests::client;
use blockmason_tests::mason::{Mason, Start, now, until};
use blockmason_tests::raw::{READ, Raw, WRITE};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::io::ErrorKind;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// A daemon with one disk of 64 MiB in memory.
struct Daemon {
    mason: Mason,
    _home: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Daemon {
        let home = tempfile::tempdir().unwrap();
        let graph = home.path().join("disk.mason");
        let text = "element Guest (type nbd) (listen unix:disk.sock)\n\
                    element Memory (type mem) (size 64M)\n\
                    Guest -> Memory\n";
        fs::write(&graph, text).unwrap();
        Daemon { mason: Start::new(home.path()).run(&[graph.to_str().unwrap()]), _home: home }
    }

    fn client(&self) -> Raw {
        Raw::ready(self.mason.socket())
    }

    /// Panics if the daemon has taken more memory than that since `before`.
    fn has_grown_less_than(&self, bytes: u64, before: u64) {
        let grown = self.mason.resident_bytes().saturating_sub(before);
        assert!(grown < bytes, "the daemon has grown by {} MiB", grown / MIB);
    }
}

/// A client with good manners finds what it has written.
fn works(good: &mut Raw, pattern: u8) {
    let data = vec![pattern; 64 << 10];
    good.write(MIB, &data);
    assert!(good.read(MIB, 64 << 10) == data, "other data came back");
}

#[test]
fn a_thousand_connections_at_once() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let daemon = Daemon::start();
    let mut good = daemon.client();
    let before = daemon.mason.resident_bytes();
    let mut crowd: Vec<Raw> = (0..1000).map(|_| daemon.client()).collect();
    works(&mut good, 1);
    // Each of them can be used, the first that came and the last.
    for (index, raw) in crowd.iter_mut().enumerate() {
        raw.write(index as u64 * 4096, &[index as u8; 4096]);
    }
    for (index, raw) in crowd.iter_mut().enumerate().rev() {
        assert_eq!(raw.read(index as u64 * 4096 + 4095, 1), [index as u8]);
    }
    daemon.has_grown_less_than(128 * MIB, before);
    drop(crowd);
    works(&mut good, 2);
    daemon.mason.stop_well();
}

#[test]
fn a_handshake_that_never_ends_is_dropped_after_ten_seconds() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    let begun = now();
    let silent = Raw::connect(daemon.mason.socket());
    let mut greeted = Raw::connect(daemon.mason.socket());
    greeted.greet();
    let mut cut = Raw::connect(daemon.mason.socket());
    cut.greet();
    cut.option(7, 100, b"some of it");
    for (what, mut raw) in [("silent", silent), ("greeted", greeted), ("cut", cut)] {
        assert!(raw.ended(), "the {what} client was not dropped");
        let time = begun.elapsed();
        assert!((9..20).contains(&time.as_secs()), "the {what} client was dropped after {time:?}");
        works(&mut good, 3);
    }
    daemon.mason.stop_well();
}

#[test]
fn options_and_requests_of_absurd_length_take_no_memory() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    let before = daemon.mason.resident_bytes();
    let clients: Vec<Raw> = (0..50)
        .map(|index| {
            let mut raw = Raw::connect(daemon.mason.socket());
            raw.greet();
            match index % 2 {
                0 => raw.option(7, u32::MAX - 4, b"abcd"),
                _ => raw.send(b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n"),
            }
            works(&mut good, index);
            raw
        })
        .collect();
    let mut readers: Vec<Raw> = (0..50).map(|_| daemon.client()).collect();
    for raw in &mut readers {
        raw.request(READ, 0, u32::MAX);
        raw.request(READ, u64::MAX - 1, 4096);
        assert_ne!((raw.reply(), raw.reply()), (0, 0));
    }
    works(&mut good, 77);
    daemon.has_grown_less_than(64 * MIB, before);
    drop((clients, readers));
    daemon.mason.stop_well();
}

/// A client that asks for far more than it may have in flight, and takes no reply.
fn deaf(daemon: &Daemon) -> Raw {
    let mut raw = daemon.client();
    raw.0.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let stuck = (0..100_000).find_map(|index| raw.try_request(READ, index % 63 * MIB, MIB as u32).err());
    let stuck = stuck.expect("the server takes any number of requests").kind();
    assert!(matches!(stuck, ErrorKind::WouldBlock | ErrorKind::TimedOut), "{stuck}");
    raw
}

#[test]
fn a_client_that_stops_reading_harms_nobody() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    // So that every read has something to send.
    (0..64).for_each(|index| good.write(index * MIB, &vec![9; MIB as usize]));
    let before = daemon.mason.resident_bytes();
    let deaf = deaf(&daemon);
    let begun = now();
    (0..50).for_each(|index| works(&mut good, index));
    assert!(begun.elapsed() < Duration::from_secs(5), "50 rounds took {:?}", begun.elapsed());
    client("nbdinfo", &[daemon.mason.uri()]);
    daemon.has_grown_less_than(192 * MIB, before);
    drop(deaf);
    (0..50).for_each(|index| works(&mut good, index));
    daemon.mason.stop_well();
}

#[test]
fn clients_that_hold_all_memory_and_stop_reading_are_dropped_in_time() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    (0..64).for_each(|index| good.write(index * MIB, &vec![9; MIB as usize]));
    let before = daemon.mason.resident_bytes();
    // Together they take all that one disk may have in flight: 256 MiB.
    let mut deaf: Vec<Raw> = (0..3).map(|_| deaf(&daemon)).collect();
    daemon.has_grown_less_than(384 * MIB, before);
    let begun = now();
    works(&mut good, 8);
    assert!(begun.elapsed() < Duration::from_secs(20), "it took {:?}", begun.elapsed());
    assert!(deaf.iter_mut().any(Raw::ended));
    (0..50).for_each(|index| works(&mut good, index));
    daemon.mason.stop_well();
}

#[test]
fn clients_that_die_in_a_write_harm_nobody() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    works(&mut good, 4);
    let before = daemon.mason.resident_bytes();
    for index in 0..200_u64 {
        let mut raw = daemon.client();
        raw.request(WRITE, 2 * MIB, 8 * MIB as u32);
        raw.send(&vec![0xee; (index * 4099 % MIB) as usize]);
        drop(raw);
    }
    works(&mut good, 5);
    // A write whose data never came whole has not happened.
    assert!(good.read(2 * MIB, 8 * MIB as u32).iter().all(|byte| *byte == 0));
    daemon.has_grown_less_than(96 * MIB, before);
    daemon.mason.stop_well();
}

#[test]
fn clients_that_die_in_a_read_harm_nobody() {
    let daemon = Daemon::start();
    let mut good = daemon.client();
    (0..64).for_each(|index| good.write(index * MIB, &vec![6; MIB as usize]));
    let before = daemon.mason.resident_bytes();
    for index in 0..200_u64 {
        let mut raw = daemon.client();
        (0..4).for_each(|part| raw.request(READ, part * 8 * MIB, 8 * MIB as u32));
        // Some die before the reply, some in the middle of it.
        if index % 2 == 1 {
            assert_eq!(raw.reply(), 0);
            raw.bytes((index * 4099 % MIB) as usize);
        }
        drop(raw);
    }
    works(&mut good, 7);
    until("the memory of dead clients' reads is given back", || {
        daemon.mason.resident_bytes().saturating_sub(before) < 128 * MIB
    });
    daemon.mason.stop_well();
}
