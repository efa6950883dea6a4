//! A process that is killed while it changes two disks, and what its file says then. And what is no map's file.

use super::*;
use blockmason::Kind;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

const SIZE: u64 = 1 << 20;
const GRANULE: u64 = 4096;
/// Names the folder to the process that is killed.
const FOLDER: &str = "MASON_MAP_CRASH";

fn open(path: &Path, size: u64, granule: u64, element: &str) -> Result<Arc<DirtyMap>> {
    let map = DirtyMap::in_file(granule, false, path, "graph", element)?;
    map.cover(size)?;
    map.open()?;
    Ok(Arc::new(map))
}

/// Changes two disks and keeps account of it, until it is killed.
async fn change_for_ever(folder: &Path) {
    let disk =
        |name| File::options().create(true).truncate(false).write(true).open(folder.join(name)).unwrap();
    let (disks, map) = ([disk("old"), disk("new")], open(&folder.join("map"), SIZE, GRANULE, "L").unwrap());
    let mut rng = fastrand::Rng::with_seed(u64::from(std::process::id()));
    loop {
        println!("another");
        let start = rng.u64(0..SIZE / GRANULE);
        let end = (start + rng.u64(1..5)).min(SIZE / GRANULE);
        let bytes = vec![rng.u8(..); ((end - start) * GRANULE) as usize];
        let intent = map.intend(start * GRANULE..end * GRANULE).await.unwrap();
        for disk in &disks {
            disk.write_all_at(&bytes, start * GRANULE).unwrap();
        }
        intent.synced();
        drop(intent);
        if rng.u8(0..64) == 0 {
            map.rest(map.resting(true)).await.unwrap();
        }
    }
}

#[test]
fn a_killed_process_leaves_no_granule_clean_that_differs() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        return runtime.block_on(change_for_ever(Path::new(&folder)));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut rng = fastrand::Rng::with_seed(1);
    for round in 0..30 {
        let name = "migrate::map::tests::crash::a_killed_process_leaves_no_granule_clean_that_differs";
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for_changes(child.stdout.take().unwrap(), rng.usize(1..200));
        child.kill().unwrap();
        child.wait().unwrap();
        check(folder.path(), round);
    }
}

/// The process goes on meanwhile, so what it is about when it is killed is a matter of chance.
fn wait_for_changes(from: impl std::io::Read, count: usize) {
    let lines = std::io::BufRead::lines(std::io::BufReader::new(from));
    let changes = lines.filter(|line| line.as_ref().is_ok_and(|line| line.ends_with("another"))).take(count);
    assert_eq!(changes.count(), count, "the process has ended by itself");
}

fn check(folder: &Path, round: u32) {
    let map = open(&folder.join("map"), SIZE, GRANULE, "L").unwrap();
    let [old, new] = ["old", "new"].map(|name| {
        let mut bytes = std::fs::read(folder.join(name)).unwrap();
        bytes.resize(SIZE as usize, 0);
        bytes
    });
    for at in (0..SIZE).step_by(GRANULE as usize) {
        let granule = at as usize..(at + GRANULE) as usize;
        let same = old[granule.clone()] == new[granule];
        assert!(same || map.is_dirty(at..at + 1), "round {round}: {at} differs and is called clean");
    }
    assert!(map.dirty_bytes() <= 4 * 4 * GRANULE * u64::from(round + 1), "round {round}: too much is dirty");
}

#[test]
fn a_file_of_something_else_is_refused_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map");
    drop(open(&path, SIZE, GRANULE, "L").unwrap());
    let good = std::fs::read(&path).unwrap();
    let mut flipped = good.clone();
    flipped[20] ^= 1;
    let longer = [&good[..], &[0; 4096]].concat();
    let cases: [(&[u8], &str); 5] = [
        (b"short", "too short"),
        (&[7; 9000], "no map"),
        (&flipped, "damaged"),
        (&good[..good.len() - 4096], "cut off"),
        (&longer, "appended"),
    ];
    for (bytes, says) in cases {
        std::fs::write(&path, bytes).unwrap();
        let error = open(&path, SIZE, GRANULE, "L").err().unwrap().to_string();
        assert!(error.contains(says) && error.contains("map"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
    }
    std::fs::write(&path, &good).unwrap();
    for (size, granule, says) in [(2 * SIZE, GRANULE, "of a disk"), (SIZE, 2 * GRANULE, "4096 bytes: say so")]
    {
        let error = open(&path, size, granule, "L").err().unwrap().to_string();
        assert!(error.contains(says), "{error}");
    }
    let held = open(&path, SIZE, GRANULE, "L").unwrap();
    assert_eq!(open(&path, SIZE, GRANULE, "M").err().unwrap().kind(), Kind::Busy);
    drop(held);
    let _other = File::open(&path).unwrap();
    rustix::fs::flock(&_other, rustix::fs::FlockOperation::NonBlockingLockShared).unwrap();
    assert_eq!(open(&path, SIZE, GRANULE, "L").err().unwrap().kind(), Kind::Busy);
}

#[tokio::test]
async fn a_region_that_was_not_taken_back_is_dirty_in_another_life_of_the_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map");
    let size = 200 << 20;
    let map = open(&path, size, 64 << 10, "L").unwrap();
    assert!(map.intend_now(0..1).is_none(), "the first change of a region waits");
    drop(map.intend(70 << 20..71 << 20).await.unwrap());
    assert!(map.intend_now(70 << 20..71 << 20).is_some());
    drop(map);
    assert_eq!(open(&path, size, 64 << 10, "L").unwrap().dirty_bytes(), 0, "the kernel is the same");
    let other_boot = || {
        let layout = Layout::new(size, 64 << 10).unwrap();
        let bytes = format::Header { layout, boot: [b'x'; 36] }.encode();
        File::options().write(true).open(&path).unwrap().write_all_at(&bytes, 0).unwrap();
    };
    other_boot();
    let map = open(&path, size, 64 << 10, "L").unwrap();
    assert_eq!(runs(&map), [64 << 20..128 << 20]);
    map.intend_now(64 << 20..128 << 20).unwrap().synced();
    map.rest(map.resting(true)).await.unwrap();
    assert!(!map.is_at_work());
    drop(map);
    other_boot();
    assert_eq!(open(&path, size, 64 << 10, "L").unwrap().dirty_bytes(), 0, "it was taken back");
}

#[tokio::test]
async fn what_is_frozen_when_the_process_ends_is_dirty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map");
    let map = open(&path, SIZE, GRANULE, "L").unwrap();
    map.intend(0..1).await.unwrap().failed();
    map.freeze().await.unwrap();
    map.intend(GRANULE..GRANULE + 1).await.unwrap().failed();
    drop(map);
    for _ in 0..2 {
        let map = open(&path, SIZE, GRANULE, "L").unwrap();
        assert_eq!(runs(&map), [0..2 * GRANULE]);
        map.intend(0..GRANULE).await.unwrap().synced();
        map.rest(map.resting(true)).await.unwrap();
        map.intend(0..1).await.unwrap().failed();
    }
}

#[tokio::test]
async fn a_region_is_not_taken_back_for_a_flush_that_was_too_early() {
    let folder = tempfile::tempdir().unwrap();
    let map = open(&folder.path().join("map"), SIZE, GRANULE, "L").unwrap();
    drop(map.intend(0..1).await.unwrap());
    let early = map.resting(true);
    assert_eq!(early.len(), 1);
    drop(map.intend(0..1).await.unwrap());
    let late = map.resting(true);
    map.rest(early).await.unwrap();
    assert!(map.is_at_work(), "the second change was not flushed");
    let flying = map.intend(0..1).await.unwrap();
    assert!(map.resting(true).is_empty(), "something is on its way");
    drop(flying);
    map.rest(late).await.unwrap();
    assert!(map.is_at_work());
    map.mirror();
    assert!(map.resting(true).is_empty(), "the second disk was not flushed");
    let number = map.flush_begins();
    map.flushed(number);
    map.rest(map.resting(true)).await.unwrap();
    assert!(!map.is_at_work());
}
