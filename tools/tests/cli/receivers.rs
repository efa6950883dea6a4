//! Receivers and senders that something happens under while they are at it: a daemon has the pool, and others use it as well.

use crate::harness::{Daemon, Ended, Home, MASON, run_to_end};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, Stdio};

const MIB: u64 = 1 << 20;

/// `a.pool` with a volume `v` of eight times a MiB, and `b.pool`; a daemon has each of them.
struct Far {
    home: Home,
    _daemon: Daemon,
}

impl Far {
    fn new() -> Far {
        let home = Home::new();
        let mut graph = String::new();
        for pool in ["a", "b"] {
            home.mason(&["pool", "create", &format!("{pool}.pool"), "--size", "160M"]).done();
            home.mason(&["volume", "create", &format!("{pool}.pool"), "keep", "--size", "1M"]).done();
            graph += &format!(
                "element G{pool} (type nbd) (listen unix:{pool}.nbd)\n\
                 element D{pool} (type parallax) (pool {pool}.pool) (volume keep)\n\
                 G{pool} -> D{pool}\n"
            );
        }
        let image = std::fs::File::create_new(home.path("v.raw")).unwrap();
        for mib in 0..8 {
            image.write_all_at(&vec![mib as u8 + 1; MIB as usize], mib * MIB).unwrap();
        }
        home.file("keep.mason", &graph);
        let daemon = home.run(&["keep.mason"], 2);
        let far = Far { home, _daemon: daemon };
        far.volume(&["import", "a.pool", "v", "v.raw"]).done();
        far.volume(&["snapshot", "a.pool", "v@s"]).done();
        far
    }

    fn volume(&self, args: &[&str]) -> Ended {
        self.home.mason(&[&["volume"], args].concat())
    }

    fn send(&self, args: &[&str]) -> Vec<u8> {
        let output =
            self.home.command(MASON, &[&["volume", "send", "a.pool"], args].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    fn listed(&self, name: &str) -> serde_json::Value {
        let all = self.volume(&["list", "b.pool", "--json"]).json();
        let found = all["volumes"].as_array().unwrap().iter().find(|volume| volume["name"] == name);
        found.cloned().unwrap_or_default()
    }

    /// A receiver of `w` that has had that much of a stream, and has begun.
    fn begin(&self, stream: &[u8]) -> (Child, ChildStdin) {
        let mut command = self.home.command(MASON, &["volume", "receive", "b.pool", "w"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(stream).unwrap();
        while !self.listed("w")["receiving"].is_object() {
            assert!(child.try_wait().unwrap().is_none(), "it has ended");
        }
        (child, stdin)
    }

    fn receive(&self, stream: &[u8]) -> Ended {
        let mut command = self.home.command(MASON, &["volume", "receive", "b.pool", "w"]);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(stream);
        run_to_end(child)
    }

    /// What the paused one does with the rest.
    fn go_on(&self, (child, mut stdin): (Child, ChildStdin), rest: &[u8]) -> String {
        let _ = stdin.write_all(rest);
        drop(stdin);
        run_to_end(child).failed()
    }

    fn contents(&self, of: &str) -> Vec<u8> {
        self.volume(&["export", "b.pool", of, "out.raw"]).done();
        let found = std::fs::read(self.home.path("out.raw")).unwrap();
        std::fs::remove_file(self.home.path("out.raw")).unwrap();
        found
    }
}

/// The second one finishes, a guest writes; what the first one has left is not written.
#[test]
fn a_second_receiver_takes_over() {
    let far = Far::new();
    let stream = far.send(&["v@s"]);
    let half = stream.len() / 2;
    let paused = far.begin(&stream[..half]);
    far.receive(&stream).done();
    far.home.file(
        "w.mason",
        "element G (type nbd) (listen unix:w.nbd) element D (type parallax) (pool b.pool) (volume w) G -> D",
    );
    far.home.mason(&["load", "w.mason"]);
    let mut guest = far.home.nbd_client("w.nbd");
    guest.write(7 * MIB, &[99; 4096]).unwrap();
    guest.send(3, 0, 0).unwrap();
    drop(guest);
    far.home.mason(&["unload", "w"]);
    let failed = far.go_on(paused, &stream[half..]);
    assert!(failed.contains("somebody else has received it"), "{failed}");
    let found = far.contents("w");
    assert!(found[7 * MIB as usize..][..4096] == [99; 4096]);
    assert!(found[..7 * MIB as usize] == std::fs::read(far.home.path("v.raw")).unwrap()[..7 * MIB as usize]);
}

#[test]
fn the_older_one_of_two_ends() {
    let far = Far::new();
    let stream = far.send(&["v@s"]);
    let half = stream.len() / 2;
    let first = far.begin(&stream[..half]);
    let again = far.home.command(MASON, &["volume", "receive", "b.pool", "w"]).stdin(Stdio::piped()).spawn();
    let mut again = again.unwrap();
    let mut stdin = again.stdin.take().unwrap();
    // More than fits into a pipe: it has begun.
    stdin.write_all(&stream[..stream.len() - 1]).unwrap();
    let failed = far.go_on(first, &stream[half..]);
    assert!(failed.contains("another receiver has taken over") && !failed.contains("--resume"), "{failed}");
    stdin.write_all(&stream[stream.len() - 1..]).unwrap();
    drop(stdin);
    run_to_end(again).done();
    assert!(far.contents("w@s") == std::fs::read(far.home.path("v.raw")).unwrap());
}

/// Given up, deleted and made anew: in neither case does the volume become what it is not.
#[test]
fn what_is_given_up_is_not_completed() {
    let far = Far::new();
    let stream = far.send(&["v@s"]);
    let half = stream.len() / 2;
    for anew in [false, true] {
        let paused = far.begin(&stream[..half]);
        match anew {
            false => far.volume(&["receive", "b.pool", "w", "--abort"]).done(),
            true => far.volume(&["delete", "b.pool", "w"]).done(),
        };
        far.volume(&["create", "b.pool", "w", "--size", "8M"]).done();
        let failed = far.go_on(paused, &stream[half..]);
        assert!(failed.contains("given it up") && !failed.contains("--resume "), "{failed}");
        let there = far.listed("w");
        assert_eq!((&there["mapped"], &there["snapshots"]), (&0.into(), &serde_json::json!([])), "{there}");
        far.volume(&["delete", "b.pool", "w"]).done();
    }
    far.receive(&stream).done();
    far.volume(&["snapshot", "a.pool", "v@t"]).done();
    far.volume(&["import", "a.pool", "x", "v.raw"]).done();
    let before = far.contents("w");
    let changes = far.send(&["v@t", "--from", "s"]);
    let paused = far.begin(&changes[..changes.len() - 5]);
    far.volume(&["receive", "b.pool", "w", "--abort"]).done();
    let failed = far.go_on(paused, &changes[changes.len() - 5..]);
    assert!(failed.contains("given it up"), "{failed}");
    let there = far.listed("w");
    assert_eq!(there["snapshots"].as_array().unwrap().len(), 1, "{there}");
    assert!(far.contents("w") == before);
    assert_eq!(far.home.mason(&["pool", "check", "b.pool"]).code, Some(0));
}

/// A mixture of two states is no disk: nothing is made of it but the rest of it, and its snapshots can be used.
#[test]
fn what_is_half_received_is_said_to_be() {
    let far = Far::new();
    far.receive(&far.send(&["v@s"])).done();
    far.home.mason(&["load", far.home.file("v.mason", "element G (type nbd) (listen unix:v.nbd) element D (type parallax) (pool a.pool) (volume v) G -> D").to_str().unwrap()]);
    let mut guest = far.home.nbd_client("v.nbd");
    for mib in 0..3 {
        guest.write(mib * MIB, &[77; 4096]).unwrap();
    }
    drop(guest);
    far.volume(&["snapshot", "a.pool", "v@t"]).done();
    let changes = far.send(&["v@t", "--from", "s"]);
    far.receive(&changes[..changes.len() / 2]).failed();
    for args in [
        &["export", "b.pool", "w", "w.raw"][..],
        &["dump", "b.pool", "w"],
        &["rollback", "b.pool", "w@s", "--keep", "old"],
        &["resize", "b.pool", "w", "16M"],
        &["snapshot", "b.pool", "w@mine"],
        &["diff", "b.pool", "w@s"],
    ] {
        let failed = far.volume(args).failed();
        let why = "w is being received: send the rest, or give it up with mason volume receive --abort";
        assert!(failed.contains(why), "{args:?}: {failed}");
    }
    far.volume(&["clone", "b.pool", "w@s", "c"]).done();
    assert!(far.contents("w@s") == std::fs::read(far.home.path("v.raw")).unwrap());
    let list = far.volume(&["list", "b.pool"]).done();
    assert!(
        list.lines().any(|line| line.trim().starts_with("w ") && line.ends_with("half received")),
        "{list}"
    );
    let check = far.home.mason(&["pool", "check", "b.pool"]).done();
    assert!(check.starts_with("w is being received: "), "{check}");
    far.receive(&changes).done();
    assert!(far.contents("w")[..4096] == [77; 4096]);
}

/// A snapshot that is deleted and taken anew under a sender is another one.
#[test]
fn what_is_sent_is_one_snapshot() {
    for what in ["send", "dump"] {
        let far = Far::new();
        let mut child = far.home.command(MASON, &["volume", what, "a.pool", "v@s"]).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 16]).unwrap();
        far.volume(&["delete", "a.pool", "v@s"]).done();
        far.volume(&["snapshot", "a.pool", "v@s"]).done();
        std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
        let failed = run_to_end(child).failed();
        assert!(failed.contains("v@s is another one by now"), "{what}: {failed}");
    }
}

/// A stream without one of its records, or with two exchanged: what is before that is right, and the rest of it is enough.
#[test]
fn a_record_that_is_missing_is_missed() {
    let far = Far::new();
    let stream = far.send(&["v@s"]);
    // Of data: one byte 1, three zeros, checksum, offset, 1 MiB.
    let record = |number: u64| {
        let ends = [&(number * MIB).to_le_bytes()[..], &MIB.to_le_bytes()].concat();
        stream.windows(16).position(|window| window == ends).unwrap() - 8
    };
    let len = 24 + MIB as usize;
    let missing = [&stream[..record(3)], &stream[record(4)..]].concat();
    let swapped = [
        &stream[..record(3)],
        &stream[record(4)..][..len],
        &stream[record(3)..][..len],
        &stream[record(5)..],
    ];
    for bad in [missing, swapped.concat()] {
        let failed = far.receive(&bad).failed();
        assert!(
            failed.contains("the stream has been changed on its way; send the rest with --resume "),
            "{failed}"
        );
        let token = failed.trim_end().rsplit(' ').next().unwrap();
        assert!(token.ends_with(&format!(":{}", 3 * MIB)), "{failed}");
        far.receive(&far.send(&["v@s", "--resume", token])).done();
        assert!(far.contents("w") == std::fs::read(far.home.path("v.raw")).unwrap());
        far.volume(&["delete", "b.pool", "w@s"]).done();
        far.volume(&["delete", "b.pool", "w"]).done();
    }
    // What only its end notices.
    let mut bad = stream.clone();
    let end = bad.len() - 56;
    bad[end + 24..].fill(1);
    let before: [u8; 4] = bad[record(7) + 4..][..4].try_into().unwrap();
    bad[end + 4..end + 8].fill(0);
    let sum = crc32fast::hash(&[&before, &bad[end..]].concat());
    bad[end + 4..end + 8].copy_from_slice(&sum.to_le_bytes());
    let failed = far.receive(&bad).failed();
    assert!(
        failed.contains("give it up with mason volume receive --abort") && !failed.contains("--resume"),
        "{failed}"
    );
    let failed = far.receive(&stream).failed();
    assert!(failed.contains("what w has received is wrong"), "{failed}");
    let stat = far.volume(&["stat", "b.pool", "w"]).done();
    assert!(stat.contains("give it up") && !stat.contains("--resume"), "{stat}");
    far.volume(&["receive", "b.pool", "w", "--abort"]).done();
    far.receive(&stream).done();
}

#[test]
fn what_can_be_done_is_said() {
    let far = Far::new();
    let stream = far.send(&["v@s"]);
    far.receive(&stream).done();
    // Whoever sends it a second time can send all of it.
    let mut command = far.home.command(MASON, &["volume", "receive", "b.pool", "w"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&stream).unwrap();
    assert_eq!(run_to_end(child).done(), "w has s already\n");
    let id = far.listed("w")["snapshots"][0]["id"].as_str().unwrap()[..20].to_owned();
    for offset in ["4097", "8392704"] {
        let token = format!("{id}:{offset}");
        let failed = far.volume(&["send", "a.pool", "v@s", "--resume", &token]).failed();
        assert!(failed.contains(&format!("v@s has no {offset} to be resumed at")), "{failed}");
    }
    far.volume(&["snapshot", "b.pool", "w@later"]).done();
    far.volume(&["snapshot", "a.pool", "v@t"]).done();
    let failed = far.receive(&far.send(&["v@t", "--from", "s"])).failed();
    assert!(
        failed.contains("w has later since then") && failed.contains("mason volume rollback"),
        "{failed}"
    );
    for snapshot in ["a.pool v@auto-mine", "a.pool keep@auto-2026-11-30T00-00-00Z"] {
        let (pool, name) = snapshot.split_once(' ').unwrap();
        let failed = far.volume(&["snapshot", pool, name]).failed();
        assert!(failed.contains("what begins with auto- is taken and deleted by schedules"), "{failed}");
    }
    let failed = far.home.mason(&["call", "Da.snapshot", "auto-mine"]).failed();
    assert!(failed.contains("call it something else"), "{failed}");
    for (said, why) in
        [("(snapshot_every 1h) (keep 0)", "`keep`"), ("(snapshot_every 0s)", "`snapshot_every`")]
    {
        let graph = format!(
            "element G (type nbd) (listen unix:k.nbd) element D (type parallax) (pool a.pool) (volume v) {said} G -> D"
        );
        let ended = far.home.mason(&["check", far.home.file("k.mason", &graph).to_str().unwrap()]);
        assert!(ended.code == Some(1) && ended.err.contains(why), "{ended:?}");
    }
}
