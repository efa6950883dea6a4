//! A cache is put back that was thought to be lost, and has changes, after the disk has gone on without it: nothing is
//! served until somebody has said what is to become of them.

use crate::cloud::Cloud;
use blockmason_tests::mason::until;
use blockmason_tests::raw::{READ, Raw};
use mason_bucket::{Action, Hold, Operation, Rule};

const HERE: &str = "(size 32M) (dirty_time 1h)";
const LEN: usize = 4096;

/// A disk that has `B` in the bucket, and whose old cache has `A` for the same place.
fn put_back() -> Cloud {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(HERE);
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(1 << 20, &[1; LEN]);
    cloud.drain();
    Raw::ready(daemon.socket()).write(0, &[b'A'; LEN]);
    daemon.kill();
    let (file, old) = (cloud.site.path("vm1.cache"), cloud.site.path("old.cache"));
    std::fs::rename(&file, &old).unwrap();
    cloud.bucket("take", &[]).done();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    assert_eq!((raw.read(0, LEN as u32), raw.read(1 << 20, LEN as u32)), (vec![0; LEN], vec![1; LEN]));
    raw.write(0, &[b'B'; LEN]);
    drop(raw);
    cloud.drain();
    daemon.stop_well();
    std::fs::rename(&old, &file).unwrap();
    cloud
}

#[test]
fn it_is_refused() {
    let cloud = put_back();
    let daemon = cloud.run();
    assert_ne!(Raw::ready(daemon.socket()).ask(READ, 0, LEN as u32, &[]).unwrap(), 0);
    let says = "somebody else has written the disk below";
    until("it is said", || cloud.site.mason(&["events", "--json"]).out.contains(says));
    // What is flushed at a stop cannot be.
    let (status, _) = daemon.stop();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn its_changes_are_forgotten_or_written_over_the_others() {
    for (word, letter) in [("discard", b'B'), ("replay", b'A')] {
        let mut cloud = put_back();
        cloud.serve_with(&format!("{HERE} (stale {word})"));
        let daemon = cloud.run();
        assert_eq!(Raw::ready(daemon.socket()).read(0, LEN as u32), vec![letter; LEN], "{word}");
        daemon.stop_well();
    }
}

/// The host dies while a flush of its cache is on the way, and another goes on without it. The cache does not know whether what it
/// was about to flush got there; but it finds out that others have written since.
#[test]
fn a_cache_that_died_amid_a_flush_does_not_write_over_what_others_have_written() {
    for arrives in [false, true] {
        let mut cloud = Cloud::new("8M");
        cloud.serve_with("(size 32M) (dirty_time 20ms)");
        let daemon = cloud.run();
        Raw::ready(daemon.socket()).write(0, &[1; LEN]);
        cloud.drain();
        let hold = Hold::default();
        cloud.server.fault(Rule::always(Action::Hold(hold.clone())).on(Operation::Put).prefix("vm1/wal/"));
        Raw::ready(daemon.socket()).write(8192, &[b'A'; LEN]);
        hold.wait(1);
        daemon.kill();
        cloud.server.clear_faults();
        if arrives {
            hold.release();
        }
        let (file, old) = (cloud.site.path("vm1.cache"), cloud.site.path("old.cache"));
        // Nobody else has written: it goes on.
        let daemon = cloud.run();
        assert_eq!(Raw::ready(daemon.socket()).read(8192, LEN as u32), [b'A'; LEN]);
        daemon.kill();
        std::fs::rename(&file, &old).unwrap();
        cloud.bucket("take", &[]).done();
        let daemon = cloud.run();
        Raw::ready(daemon.socket()).write(8192, &[b'B'; LEN]);
        cloud.drain();
        daemon.stop_well();
        hold.release();
        std::fs::rename(&old, &file).unwrap();
        let daemon = cloud.run();
        // Either it had nothing left, or it is asked about.
        let mut raw = Raw::ready(daemon.socket());
        match raw.ask(READ, 8192, LEN as u32, &[]).unwrap() {
            0 => {
                assert_eq!(raw.bytes(LEN), [b'B'; LEN], "{arrives}");
                daemon.stop();
            }
            _ => assert_eq!(daemon.stop().0.code(), Some(1)),
        }
        std::fs::remove_file(&file).unwrap();
        let daemon = cloud.run();
        assert_eq!(Raw::ready(daemon.socket()).read(8192, LEN as u32), [b'B'; LEN], "{arrives}");
        daemon.stop_well();
    }
}

/// What goes past a cache that has been drained is no stranger's.
#[test]
fn a_cache_that_was_drained_for_a_while_knows_what_went_past_it() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with(HERE);
    let daemon = cloud.run();
    Raw::ready(daemon.socket()).write(0, &[1; LEN]);
    cloud.site.mason(&["call", "Ssd.drain"]).done();
    until("it is drained", || cloud.get("Ssd.state") == "drained");
    Raw::ready(daemon.socket()).write(8192, &[2; LEN]);
    cloud.site.mason(&["call", "Ssd.resume"]).done();
    Raw::ready(daemon.socket()).write(16384, &[3; LEN]);
    daemon.kill();
    let daemon = cloud.run();
    for (offset, byte) in [(0, 1), (8192, 2), (16384, 3)] {
        assert_eq!(Raw::ready(daemon.socket()).read(offset, LEN as u32), [byte; LEN]);
    }
    daemon.stop_well();
}
