//! What a guest has written can be read neither on the wire to the bucket, nor in it, nor on the SSD, nor in anything else
//! that the daemon leaves behind; without encryption it can, which shows that it was looked for well.

use crate::cloud::Cloud;
use blockmason_tests::raw::Raw;
use std::path::Path;

/// Stands at the begin of each sector, followed by the sector's number.
const SHORT: &[u8; 16] = b"Attack at dawn. ";
/// Fills whole pieces of 64 KiB.
const LONG: &[u8; 64] = b"Whoever can read this has found what nobody but its owner knows.";

const MIB: u64 = 1 << 20;

fn sectors() -> Vec<u8> {
    let sector = |number: u64| [&SHORT[..], &number.to_le_bytes(), &[0; 488]].concat();
    (0..MIB / 512).flat_map(sector).collect()
}

/// How often either of them is in there.
fn seen(bytes: &[u8]) -> usize {
    let begins = |window: &&[u8]| window[..] == SHORT[..] || window[..] == LONG[..16];
    bytes.windows(16).filter(|window| window[0] == SHORT[0] || window[0] == LONG[0]).filter(begins).count()
}

/// In everything below a folder.
fn seen_below(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let one = |entry: std::fs::DirEntry| match entry.file_type().unwrap() {
        kind if kind.is_dir() => seen_below(&entry.path()),
        kind if kind.is_file() => seen(&std::fs::read(entry.path()).unwrap()),
        _ => 0,
    };
    entries.map(one).sum()
}

/// How often it is seen on the wire, as it goes and as it comes; in the bucket; and on this machine's files.
fn exposed(cloud: &mut Cloud) -> [usize; 4] {
    cloud.server.capture();
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    raw.write(0, &sectors());
    for at in (MIB..3 * MIB).step_by(64 << 10) {
        raw.write(at, &LONG.repeat(1 << 10));
    }
    // In the midst of blocks, so that these are read and written anew.
    raw.write(4 * MIB + 512, &sectors()[..1024]);
    cloud.drain();
    drop(raw);
    daemon.stop_well();
    std::fs::rename(cloud.site.path("vm1.cache"), cloud.site.path("old.cache")).unwrap();
    // All of it comes back from the bucket now, and into a new cache.
    let daemon = cloud.run();
    let mut raw = Raw::ready(daemon.socket());
    assert!(raw.read(0, MIB as u32) == sectors());
    assert!(raw.read(MIB, 2 * MIB as u32) == LONG.repeat(2 << 14));
    assert!(raw.read(4 * MIB + 512, 1024) == sectors()[..1024]);
    drop(raw);
    daemon.stop_well();
    let wire = cloud.server.capture();
    let objects = cloud.server.store().keys("vms").into_iter();
    let objects = objects.filter_map(|key| cloud.server.store().get("vms", &key));
    assert!(wire.iter().map(|both| both[0].len()).sum::<usize>() as u64 > 3 * MIB);
    [
        wire.iter().map(|both| seen(&both[0])).sum(),
        wire.iter().map(|both| seen(&both[1])).sum(),
        objects.map(|object| seen(&object.bytes)).sum(),
        seen_below(cloud.site.folder()),
    ]
}

#[test]
fn nothing_leaves_in_the_clear() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 32M)");
    assert_eq!(exposed(&mut cloud), [0; 4]);
}

#[test]
fn without_encryption_all_of_it_does() {
    let mut cloud = Cloud::new("8M");
    cloud.serve_with("(size 32M)");
    cloud.without("Secret");
    cloud.change("invariant ", "# invariant ");
    // One in each sector, and one for each 64 bytes of two MiB.
    let all = (MIB / 512 + 2 * MIB / 64) as usize;
    let exposed = exposed(&mut cloud);
    assert!(exposed.iter().all(|count| *count >= all), "{exposed:?} of {all}");
}
