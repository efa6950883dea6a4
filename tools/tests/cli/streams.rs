//! `mason volume send` and `receive`: what is sent is what is there, whatever becomes of the stream on its way.

use crate::harness::{Ended, Home, MASON};
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason::Kind;
use blockmason_elements::parallax::tool::{self, Format, Operation, Settings};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 3000;

/// Two pools, and what the volume `v` of the first one holds: a number for each block, 0 is zeros.
struct Pair {
    home: Home,
    rng: fastrand::Rng,
    now: Vec<u32>,
    next: u32,
}

impl Pair {
    fn new(seed: u64, format: Format) -> Pair {
        let home = Home::new();
        for pool in ["a.pool", "b.pool"] {
            home.mason(&["pool", "create", pool, "--size", "160M"]).done();
        }
        let mut pair =
            Pair { home, rng: fastrand::Rng::with_seed(seed), now: vec![0; BLOCKS as usize], next: 0 };
        let settings = Settings { format, checksums: seed % 2 == 1, ..Settings::default() };
        let made = Operation::CreateVolume { name: "v".into(), size: BLOCKS * BLOCK, settings };
        pair.ask("a.pool", &made);
        pair.change();
        pair
    }

    fn ask(&mut self, pool: &str, operation: &Operation) -> Value {
        open(&self.home.path(pool)).carry_out(operation).unwrap()
    }

    /// Writes and discards here and there.
    fn change(&mut self) {
        let open = open(&self.home.path("a.pool"));
        for _ in 0..self.rng.usize(5..40) {
            self.next += 1;
            let first = self.rng.u64(0..BLOCKS);
            let most = [2, 30, 250][self.rng.usize(0..3)];
            let len = self.rng.u64(1..=most).min(BLOCKS - first);
            let zero = self.rng.u8(0..4) == 0;
            let range = first as usize..(first + len) as usize;
            self.now[range.clone()].fill(if zero { 0 } else { self.next });
            let (volume, offset) = ("v".to_owned(), first * BLOCK);
            let done = open.carry_out(&match zero {
                true => Operation::Punch { volume, offset, len: len * BLOCK, receiver: None },
                false => {
                    let bytes: Vec<u8> = range.flat_map(|ix| block(self.now[ix])).collect();
                    Operation::Write { volume, offset, data: BASE64_STANDARD.encode(bytes), receiver: None }
                }
            });
            done.unwrap();
        }
    }

    fn snapshot(&mut self, name: &str) -> Vec<u32> {
        self.ask("a.pool", &Operation::Snapshot { volumes: vec!["v".into()], name: name.into() });
        self.now.clone()
    }

    fn send(&self, args: &[&str]) -> Vec<u8> {
        let args = [&["volume", "send", "a.pool"], args].concat();
        let output = self.home.command(MASON, &args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn receive(&self, name: &str, stream: &[u8]) -> Ended {
        let mut command = self.home.command(MASON, &["volume", "receive", "b.pool", name]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // It may have seen enough before all of it is written.
        let _ = child.stdin.take().unwrap().write_all(stream);
        Ended::of(child.wait_with_output().unwrap())
    }

    /// The volume, or its snapshot, in the second pool is what it should be, and the pool is sound.
    fn expect(&mut self, name: &str, snapshot: Option<&str>, contents: &[u32]) {
        let snapshot = snapshot.map(str::to_owned);
        for first in (0..BLOCKS).step_by(200) {
            let len = 200.min(BLOCKS - first);
            let (volume, snapshot) = (name.to_owned(), snapshot.clone());
            let read =
                Operation::Read { volume, snapshot, offset: first * BLOCK, len: len * BLOCK, number: None };
            let found = match self.ask("b.pool", &read).as_str() {
                Some(data) => BASE64_STANDARD.decode(data).unwrap(),
                None => vec![0; (len * BLOCK) as usize],
            };
            for (found, ix) in found.chunks(BLOCK as usize).zip(first as usize..) {
                assert!(found == block(contents[ix]), "{name}, block {ix}");
            }
        }
        let findings = self.ask("b.pool", &Operation::Check);
        assert_eq!(findings["problems"], serde_json::json!([]));
    }

    /// What the second pool has of a volume.
    fn listed(&mut self, pool: &str, name: &str) -> Value {
        let found = self.ask(pool, &Operation::List);
        let mut all = found["volumes"].as_array().unwrap().iter();
        all.find(|volume| volume["name"] == name).cloned().unwrap_or_default()
    }

    fn token(&self) -> String {
        let said = self.home.mason(&["volume", "stat", "b.pool", "w"]).done();
        said.lines().find_map(|line| line.split_once("--resume ")).unwrap().1.to_owned()
    }
}

/// A process that another test is just starting has the locks of this one until it is its own program.
fn open(path: &Path) -> tool::Open {
    loop {
        match tool::open(path) {
            Err(error) if error.kind() == Kind::Busy => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

fn block(version: u32) -> Vec<u8> {
    version.to_le_bytes().repeat(BLOCK as usize / 4)
}

#[test]
fn a_volume_and_what_changes_in_it() {
    for (seed, format) in [(0, Format::One), (1, Format::Two)] {
        let mut pair = Pair::new(seed, format);
        let mut states = vec![("s0".to_owned(), pair.snapshot("s0"))];
        assert_eq!(pair.receive("w", &pair.send(&["v@s0"])).done(), "");
        for round in 1..4 {
            pair.change();
            let name = format!("s{round}");
            states.push((name.clone(), pair.snapshot(&name)));
            pair.change();
            let stream = pair.send(&[&format!("v@{name}"), "--from", &states[round - 1].0]);
            pair.receive("w", &stream).done();
            // Once more is nothing.
            assert_eq!(pair.receive("w", &stream).done(), format!("w has {name} already\n"));
        }
        for (name, contents) in &states {
            pair.expect("w", Some(name), contents);
        }
        pair.expect("w", None, &states[3].1);
        let id = |listed: Value| {
            listed["snapshots"].as_array().unwrap().iter().map(|s| s["id"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(id(pair.listed("a.pool", "v")), id(pair.listed("b.pool", "w")));
        assert_eq!(pair.listed("b.pool", "w")["checksums"], seed == 1);
        // And on to a third one, as what it is.
        pair.home.mason(&["pool", "create", "c.pool", "--size", "160M"]).done();
        let onwards = pair.home.command(MASON, &["volume", "send", "b.pool", "w@s3"]).output().unwrap();
        let mut third = pair
            .home
            .command(MASON, &["volume", "receive", "c.pool", "x"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        third.stdin.take().unwrap().write_all(&onwards.stdout).unwrap();
        assert!(third.wait_with_output().unwrap().status.success());
        let sent: Vec<Value> = id(pair.listed("c.pool", "x"));
        assert_eq!(sent[0], id(pair.listed("a.pool", "v"))[3]);
    }
}

/// Wherever a stream ends, or whoever receives it is killed, the rest is enough, or all of it again.
#[test]
fn a_stream_that_is_cut_is_gone_on_with() {
    let mut pair = Pair::new(2, Format::One);
    let first = pair.snapshot("a");
    pair.receive("w", &pair.send(&["v@a"])).done();
    pair.change();
    let contents = pair.snapshot("b");
    let stream = pair.send(&["v@b", "--from", "a"]);
    for _ in 0..6 {
        let len = pair.rng.usize(400..stream.len());
        let failed = pair.receive("w", &stream[..len]).failed();
        assert!(failed.contains("the stream ends early; send the rest with --resume "), "{failed}");
        let token = pair.token();
        assert!(failed.contains(&token), "{failed}, {token}");
        // Its snapshots can be used, and itself cannot.
        pair.expect("w", Some("a"), &first);
        pair.home.file("w.mason", "element G (type nbd) (listen unix:w.nbd) element D (type parallax) (pool b.pool) (volume w) G -> D");
        let refused = pair.home.mason(&["run", "w.mason"]).failed();
        assert!(refused.contains("w is being received"), "{refused}");
        let other = pair.send(&["v@a"]);
        assert!(pair.receive("x", &other).done().is_empty());
        pair.home.mason(&["volume", "delete", "b.pool", "x@a"]).done();
        pair.home.mason(&["volume", "delete", "b.pool", "x"]).done();
        if pair.rng.bool() {
            let rest = pair.send(&["v@b", "--from", "a", "--resume", &token]);
            let begun = !token.ends_with(":0");
            assert_eq!(rest.len() < stream.len(), begun, "{} of {}, {token}", rest.len(), stream.len());
            pair.receive("w", &rest).done();
        } else {
            pair.receive("w", &stream).done();
        }
        pair.expect("w", None, &contents);
        pair.home.mason(&["volume", "rollback", "b.pool", "w@a", "--keep", "old"]).done();
        pair.home.mason(&["volume", "delete", "b.pool", "old@b"]).done();
        pair.home.mason(&["volume", "delete", "b.pool", "old"]).done();
    }
}

#[test]
fn whoever_receives_may_be_killed() {
    let mut pair = Pair::new(4, Format::Two);
    let contents = pair.snapshot("a");
    let stream = pair.send(&["v@a"]);
    for _ in 0..5 {
        let mut command = pair.home.command(MASON, &["volume", "receive", "b.pool", "w"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let len = pair.rng.usize(300..stream.len());
        child.stdin.as_mut().unwrap().write_all(&stream[..len]).unwrap();
        let pid = Pid::from_child(&child);
        kill_process(pid, Signal::KILL).unwrap();
        child.wait().unwrap();
        // It may not have begun, or not have been made.
        let there = pair.listed("b.pool", "w");
        match there["receiving"].is_object() {
            true => {
                let rest = pair.send(&["v@a", "--resume", &pair.token()]);
                pair.receive("w", &rest).done();
                pair.expect("w", None, &contents);
                pair.home.mason(&["volume", "delete", "b.pool", "w@a"]).done();
            }
            false if there.is_null() => continue,
            false => assert_eq!(there["mapped"], 0, "{there}"),
        }
        pair.home.mason(&["volume", "delete", "b.pool", "w"]).done();
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut pair = Pair::new(6, Format::One);
    pair.snapshot("a");
    pair.receive("w", &pair.send(&["v@a"])).done();
    pair.change();
    let contents = pair.snapshot("b");
    let (whole, changes) = (pair.send(&["v@b"]), pair.send(&["v@b", "--from", "a"]));
    let refused = |pair: &Pair, name: &str, stream: &[u8], why: &str| {
        let failed = pair.receive(name, stream).failed();
        assert!(failed.contains(why), "{failed}, not {why}");
    };
    refused(&pair, "w", &whole, "there is a volume w already");
    refused(&pair, "none", &changes, "there is no volume none");
    refused(&pair, "w", b"", "the stream ends early");
    refused(&pair, "w", b"mason-volume 1\nvolume", "this is no stream of a volume");
    let write = Operation::Write {
        volume: "w".into(),
        offset: 0,
        data: BASE64_STANDARD.encode([1; 4096]),
        receiver: None,
    };
    pair.ask("b.pool", &write);
    refused(&pair, "w", &changes, "w has changed since w@a");
    pair.home.mason(&["volume", "rollback", "b.pool", "w@a", "--keep", "mine"]).done();
    let half = changes.len() / 2;
    refused(&pair, "w", &changes[..half], "the stream ends early");
    // Of which a byte has been changed; another snapshot; what is not there.
    let mut bad = changes.clone();
    bad[half] ^= 1;
    refused(&pair, "w", &bad, "the stream has been changed on its way");
    pair.change();
    pair.snapshot("c");
    refused(&pair, "w", &pair.send(&["v@c", "--from", "a"]), "w is being filled with another snapshot");
    refused(&pair, "w", &pair.send(&["v@c", "--from", "b"]), "w is being filled with another snapshot");
    let token = pair.token();
    let other = ["volume", "send", "a.pool", "v@c", "--from", "a", "--resume", &token];
    let failed = pair.home.mason(&other).failed();
    assert!(failed.contains("is another snapshot than v@c"), "{failed}");
    pair.home.mason(&["volume", "receive", "b.pool", "w", "--abort"]).done();
    refused(
        &pair,
        "w",
        &pair.send(&["v@c", "--from", "b"]),
        "which w does not have: send what has changed since its newest snapshot, a",
    );
    pair.receive("w", &changes).done();
    pair.expect("w", None, &contents);
    let failed = pair.home.mason(&["volume", "receive", "b.pool", "w", "--abort"]).failed();
    assert!(failed.contains("w is not being received"), "{failed}");
}

/// The rest of a snapshot is of no use to whoever has begun with what has changed in it, nor the other way round.
#[test]
fn what_has_begun_as_changes_goes_on_as_changes() {
    let mut pair = Pair::new(8, Format::One);
    pair.snapshot("a");
    pair.receive("w", &pair.send(&["v@a"])).done();
    pair.change();
    let contents = pair.snapshot("b");
    let (whole, changes) = (pair.send(&["v@b"]), pair.send(&["v@b", "--from", "a"]));
    let half = |stream: &[u8]| stream[..stream.len() * 3 / 4].to_vec();
    pair.receive("w", &half(&changes)).failed();
    let token = pair.token();
    for stream in [whole.clone(), pair.send(&["v@b", "--resume", &token])] {
        let failed = pair.receive("w", &stream).failed();
        assert!(failed.contains("the stream is something else"), "{failed}");
    }
    // What fails at its first byte takes back nothing of what is there.
    pair.receive("w", &changes[..400]).failed();
    assert_eq!(pair.token(), token);
    let taken = pair.home.mason(&["volume", "snapshot", "b.pool", "w@mine"]).failed();
    assert!(taken.contains("w is being received"), "{taken}");
    pair.receive("x", &half(&whole)).failed();
    let failed = pair.receive("x", &changes).failed();
    assert!(failed.contains("the stream is something else"), "{failed}");
    pair.receive("w", &changes).done();
    pair.receive("x", &whole).done();
    pair.expect("w", None, &contents);
    pair.expect("x", None, &contents);
}
