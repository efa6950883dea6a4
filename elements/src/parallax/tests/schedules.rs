//! Snapshots that are taken at times.

use super::super::tool::{self, Operation, Settings};
use super::kit::find;
use blockmason::testing::{TestDisk, graph, run, set_wall_clock};
use blockmason::{Graph, Host, Kind, Op};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Ten minutes before an hour is full.
const BEGIN: u64 = 1_795_996_800 - 600;

async fn serve(host: &Arc<Host>, path: &Path, keep: u64) -> (Arc<Graph>, TestDisk) {
    let text = format!(
        "element D (type parallax) (pool {}) (volume v) (snapshot_every 1h) (keep {keep})",
        path.display()
    );
    let graph = graph(host, crate::ALL, &text, "D").unwrap();
    (graph.clone(), TestDisk::serve(host, graph).await)
}

fn pool(folder: &tempfile::TempDir) -> std::path::PathBuf {
    let path = folder.path().join("a.pool");
    super::super::shared::make(&path, Some(64 << 20), [7; 16]).unwrap();
    let made = Operation::CreateVolume { name: "v".into(), size: 8 << 20, settings: Settings::default() };
    tool::open(&path).unwrap().carry_out(&made).unwrap();
    path
}

fn snapshots(graph: &Graph) -> Vec<String> {
    let said = find(graph, "D").element.get("snapshots").unwrap();
    said.split(' ').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

async fn minutes(count: u64) {
    blockmason::rt::sleep(Duration::from_secs(60 * count)).await;
}

async fn carry_out(path: &Path, operation: Operation) -> blockmason::Result<serde_json::Value> {
    let path = path.to_owned();
    blockmason::rt::blocking(move || tool::open(&path)?.carry_out(&operation)).await.unwrap()
}

#[test]
fn taken_at_full_hours_where_something_has_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder);
    run(1, async |host| {
        set_wall_clock(BEGIN);
        let (graph, disk) = serve(&host, &path, 3).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        minutes(1).await;
        assert_eq!(snapshots(&graph), [""; 0]);
        minutes(10).await;
        assert_eq!(snapshots(&graph), ["auto-2026-11-30T00-00-00Z"]);
        minutes(70).await;
        assert_eq!(snapshots(&graph).len(), 1, "nothing has changed");
        disk.write(0, &[2; 4096]).await.unwrap();
        minutes(60).await;
        let names = snapshots(&graph);
        assert_eq!(names[1..], ["auto-2026-11-30T02-00-00Z"], "{names:?}");
    });
}

/// What is held or has a clone outlives its time, and what a person has taken is nothing of theirs.
#[test]
fn so_many_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder);
    run(1, async |host| {
        set_wall_clock(BEGIN);
        let (graph, disk) = serve(&host, &path, 2).await;
        let mut events = host.events().follow(0);
        let hour = async |byte: u8| {
            disk.write(0, &[byte; 4096]).await.unwrap();
            minutes(60).await;
        };
        hour(1).await;
        for name in ["mine", "auto-mine"] {
            let taken = Operation::Snapshot { volumes: vec!["v".into()], name: name.into() };
            carry_out(&path, taken).await.unwrap();
        }
        let refused = find(&graph, "D").element.call("snapshot", "auto-mine-too").unwrap_err();
        assert!(refused.to_string().contains("call it something else"), "{refused}");
        hour(2).await;
        let held = snapshots(&graph).pop().unwrap();
        let hold = |held_now| Operation::Hold { volume: "v".into(), name: held.clone(), held: held_now };
        carry_out(&path, hold(true)).await.unwrap();
        let delete = Operation::DeleteSnapshot { volume: "v".into(), name: held.clone() };
        let refused = carry_out(&path, delete.clone()).await.unwrap_err();
        assert!(refused.kind() == Kind::Busy && refused.to_string().contains("is held"), "{refused}");
        for byte in 3..9 {
            hour(byte).await;
        }
        let names = snapshots(&graph);
        for kept in ["mine", "auto-mine", &held] {
            assert!(names.iter().any(|name| name == kept), "{kept}: {names:?}");
        }
        assert_eq!(names.len(), 5, "two, the held one, and mine: {names:?}");
        // The newest one does not count either, once it is held.
        let newest = names.last().unwrap().clone();
        let hold_newest = Operation::Hold { volume: "v".into(), name: newest.clone(), held: true };
        carry_out(&path, hold_newest).await.unwrap();
        hour(10).await;
        let names = snapshots(&graph);
        assert_eq!(names.len(), 6, "{names:?}");
        carry_out(&path, Operation::Hold { volume: "v".into(), name: newest, held: false }).await.unwrap();
        carry_out(&path, hold(false)).await.unwrap();
        hour(9).await;
        assert!(!snapshots(&graph).contains(&held));
        let told: Vec<String> = events.take(1000).events.iter().map(|event| event.message.clone()).collect();
        let taken = told.iter().filter(|told| told.ends_with("has been taken")).count();
        assert!((9..=10).contains(&taken), "{told:?}");
        assert!(told.contains(&format!("the snapshot v@{held} has been deleted: 2 are kept")), "{told:?}");
    });
    // A restart does not take one before it is time.
    run(2, async |host| {
        set_wall_clock(BEGIN + 10 * 3600 + 60);
        let (graph, disk) = serve(&host, &path, 2).await;
        let before = snapshots(&graph);
        disk.write(0, &[77; 4096]).await.unwrap();
        minutes(5).await;
        assert_eq!(snapshots(&graph), before);
        minutes(60).await;
        assert_ne!(snapshots(&graph), before);
    });
}

#[test]
fn a_clock_that_is_set_back_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder);
    run(1, async |host| {
        set_wall_clock(BEGIN);
        let (graph, disk) = serve(&host, &path, 9).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        minutes(70).await;
        let before = snapshots(&graph);
        set_wall_clock(BEGIN - 5 * 3600);
        for byte in 2..4 {
            disk.write(0, &[byte; 4096]).await.unwrap();
            minutes(61).await;
        }
        let taken = snapshots(&graph).len() - before.len();
        assert!((2..=3).contains(&taken), "{taken}");
    });
}

/// What has been said of the pool.
fn said(host: &Host) -> Vec<String> {
    let events = host.events().follow(1000).take(1000).events;
    events.into_iter().map(|event| event.message.clone()).collect()
}

/// The first leaf that is in a file.
fn leaf(path: &Path) -> (File, u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let is = |at: &u64| {
        let mut head = [0; 10];
        file.read_exact_at(&mut head, at * 4096).unwrap();
        head.starts_with(b"PXND") && head[8..] == [1, 0]
    };
    let at = (0..file.metadata().unwrap().len() / 4096).find(is).unwrap();
    (file, at * 4096 + 70)
}

/// While guests go on, what is damaged in one copy is mended, and said; and said once if several elements could.
#[test]
fn a_pool_is_scrubbed_when_it_is_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder);
    run(1, async |host| {
        set_wall_clock(BEGIN);
        let text = format!("element D (type parallax) (pool {}) (volume v) (scrub_every 1h)", path.display());
        let disk = TestDisk::serve(&host, graph(&host, crate::ALL, &text, "D").unwrap()).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.write(4 << 20, &[2; 4096]).await.unwrap();
        let taken = Operation::Snapshot { volumes: vec!["v".into()], name: "s".into() };
        carry_out(&path, taken).await.unwrap();
        let second =
            TestDisk::serve(&host, graph(&host, crate::ALL, &format!("{text} (snapshot s)"), "D").unwrap());
        let second = second.await;
        minutes(1).await;
        let (file, at) = leaf(&path);
        let mut before = [0];
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(&[!before[0]], at).unwrap();
        let mut byte = [0];
        for minute in 0..20 {
            disk.write(4 << 20, &[minute; 8192]).await.unwrap();
            assert_eq!(second.read(4 << 20, 4096).await.unwrap(), [2; 4096]);
            file.read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte == before, minute >= 9, "{minute}");
            minutes(1).await;
        }
        let scrubs: Vec<String> = said(&host).into_iter().filter(|said| said.contains("scrub")).collect();
        assert_eq!(scrubs.len(), 2, "{scrubs:?}");
        assert!(
            scrubs[0].contains("v@s") && scrubs[0].contains("was damaged, and is written anew"),
            "{scrubs:?}"
        );
        assert!(scrubs[1].contains("one thing was not as it should be"), "{scrubs:?}");
        minutes(60).await;
        let last = said(&host).pop().unwrap();
        assert!(last.contains("all is well"), "{last}");
        assert_eq!(disk.read(0, 4096).await.unwrap(), [1; 4096]);
    });
}

#[test]
fn a_pool_says_how_little_room_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = pool(&folder);
    run(1, async |host| {
        let made = Operation::CreateVolume { name: "w".into(), size: 1 << 30, settings: Settings::default() };
        carry_out(&path, made).await.unwrap();
        let text = format!("element D (type parallax) (pool {}) (volume w)", path.display());
        let disk = TestDisk::serve(&host, graph(&host, crate::ALL, &text, "D").unwrap()).await;
        let mut at = 0;
        while disk.write(at, &vec![3; 512 << 10]).await.is_ok() {
            at += 512 << 10;
            blockmason::rt::sleep(Duration::from_secs(6)).await;
        }
        blockmason::rt::sleep(Duration::from_secs(6)).await;
        let low = || -> Vec<String> {
            said(&host).into_iter().filter(|said| said.contains("% of its room")).collect()
        };
        let left = low();
        let told = [20, 10, 2].map(|percent| format!("the pool has less than {percent} % of its room left"));
        assert_eq!(left, told);
        // Once there is room again it is said anew.
        disk.op(Op::Discard, 0, at).await.unwrap();
        blockmason::rt::sleep(Duration::from_secs(20)).await;
        at = 0;
        while low().len() < 4 {
            disk.write(at, &vec![3; 512 << 10]).await.unwrap();
            at += 512 << 10;
            blockmason::rt::sleep(Duration::from_secs(6)).await;
        }
        assert!(low()[3].contains("less than 20 %"));
    });
}
