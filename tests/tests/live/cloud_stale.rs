//! A cache is put back that was thought to be lost, and has changes, after the disk has gone on without it: nothing is
//! served until somebody has said what is to become of them.

use crate::cloud::Cloud;
use blockmason_tests::mason::until;
use blockmason_tests::raw::{READ, Raw};

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
