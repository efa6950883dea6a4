//! A disk in a bucket becomes larger, with all that stands above it: caches, encryption, the guest's end.

use crate::cloud::Cloud;
use blockmason_tests::raw::Raw;

const MIB: u64 = 1 << 20;

#[test]
fn it_grows_with_all_that_is_above() {
    // A multiple neither of its objects nor of slots.
    let mut cloud = Cloud::new("9999k");
    cloud.serve_with("(size 32M)");
    let daemon = cloud.run();
    let size = Raw::ready_with_size(daemon.socket()).1;
    let mut raw = Raw::ready(daemon.socket());
    // To its very end.
    raw.write(size - 4096, &[1; 4096]);
    raw.write(MIB, &[2; 8192]);
    drop(raw);
    let refused = cloud.bucket("grow", &["--size", "20M"]);
    assert!(refused.code == Some(1) && refused.err.contains("open"), "{}", refused.err);
    cloud.drain();
    daemon.stop_well();
    assert_eq!(cloud.bucket("grow", &["--size", "9M"]).code, Some(1));
    cloud.bucket("grow", &["--size", "20M"]).done();
    let mut at = size;
    for round in 0..2 {
        let daemon = cloud.run();
        let now = Raw::ready_with_size(daemon.socket()).1;
        assert!(now > 17 * MIB, "{now}");
        let mut raw = Raw::ready(daemon.socket());
        assert_eq!(raw.read(size - 4096, 4096), [1; 4096], "{round}");
        assert_eq!(raw.read(MIB, 8192), [2; 8192], "{round}");
        // What is new was never written, but for the last block of the round before.
        assert_eq!(raw.read(at, 8192), [0; 8192], "{round}");
        raw.write(now - 4096, &[3; 4096]);
        assert_eq!(raw.read(now - 8192, 8192), [[0; 4096], [3; 4096]].concat());
        at = now - 16384;
        drop(raw);
        cloud.drain();
        daemon.stop_well();
        cloud.check("after it has grown");
    }
}
