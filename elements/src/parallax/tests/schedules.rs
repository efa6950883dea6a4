//! Snapshots that are taken at times.

use super::super::tool::{self, Operation, Settings};
use super::kit::find;
use blockmason::testing::{TestDisk, graph, run, set_wall_clock};
use blockmason::{Graph, Host, Kind};
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
        let hour = async |byte: u8| {
            disk.write(0, &[byte; 4096]).await.unwrap();
            minutes(60).await;
        };
        hour(1).await;
        let taken = Operation::Snapshot { volumes: vec!["v".into()], name: "mine".into() };
        carry_out(&path, taken).await.unwrap();
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
        assert!(names.contains(&"mine".to_owned()) && names.contains(&held), "{names:?}");
        assert_eq!(names.len(), 4, "two, the held one, and mine: {names:?}");
        carry_out(&path, hold(false)).await.unwrap();
        hour(9).await;
        assert!(!snapshots(&graph).contains(&held));
    });
    // A restart does not take one before it is time.
    run(2, async |host| {
        set_wall_clock(BEGIN + 9 * 3600 + 60);
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
