//! What the map says above a disk, and its file, of changes, reloads and successors.

use blockmason::describe::{Catalogue, ElementType};
use blockmason::live::Options;
use blockmason::testing::{CLIENT, TestDisk, checked, live, play_against_model, run};
use blockmason::{Op, Origin, Request};
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

async fn get(disk: &TestDisk, handler: &str) -> String {
    let graph = disk.disk.graph();
    let found = graph.instances().find(|instance| instance.name == "L").unwrap();
    found.element.get(handler).unwrap()
}

fn kept(folder: &Path, more: &str) -> String {
    let file = folder.join("map").display().to_string();
    format!("element L (type log_dirty) (granule 4k) (file {file}) {more} element M (type mem) (size 200M)")
}

/// The first word of the regions in the file.
fn regions(folder: &Path) -> u64 {
    let bytes = std::fs::read(folder.join("map")).unwrap();
    u64::from_le_bytes(bytes[4096..4104].try_into().unwrap())
}

#[test]
fn whole_granules_become_clean() {
    run(1, async |host| {
        let text = "element L (type log_dirty) (granule 4k) element M (type mem) (size 10k) L -> M";
        let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        assert_eq!(get(&disk, "granules").await, "3/3");
        disk.write(100, &[1; 8000]).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "3/3");
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.write(8192, &[1; 2048]).await.unwrap();
        assert_eq!(
            (get(&disk, "granules").await, get(&disk, "remaining").await),
            ("1/3".into(), "4096".into())
        );
    });
}

#[test]
fn since_a_backup_every_change_is_dirty_also_one_that_fails() {
    run(1, async |host| {
        let text = "element L (type log_dirty) (granule 4k) (initially clean) (written dirty)\n\
                    element E (type error) (op write) (range 4k-8k) element M (type mem) (size 12k) L -> E -> M";
        let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        disk.write(100, &[1; 8]).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "1/3");
        assert!(disk.write(5000, &[1; 8]).await.is_err());
        assert_eq!(get(&disk, "granules").await, "2/3");
    });
}

/// A flush as a copier sends it.
async fn flush(disk: &TestDisk) -> blockmason::Reply {
    disk.submit(Request { origin: Origin::Copy, ..Request::flush() }).await
}

#[test]
fn a_flush_that_fails_makes_dirty_what_was_written_since_the_last_one() {
    run(1, async |host| {
        let text = "element L (type log_dirty) (granule 4k) \
                    element E (type error) (op flush) (after 1) (count 1) element M (type mem) (size 40k) L -> E -> M";
        let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        disk.write(0, &[1; 8192]).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "8/10");
        flush(&disk).await.unwrap();
        disk.write(8192, &[1; 8192]).await.unwrap();
        disk.write(100, &[1; 8]).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "6/10");
        assert!(flush(&disk).await.is_err());
        assert_eq!(get(&disk, "granules").await, "9/10", "all but the second granule");
        flush(&disk).await.unwrap();
        disk.write(0, &[1; 40 << 10]).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "0/10");
    });
}

#[test]
fn a_guest_is_not_told_of_losses_and_its_flush_says_nothing() {
    run(1, async |host| {
        let text = "element L (type log_dirty) (granule 4k) \
                    element E (type error) (op flush) (after 1) (count 1) element M (type mem) (size 8k) L -> E -> M";
        let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        disk.write(0, &[1; 8192]).await.unwrap();
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!(get(&disk, "granules").await, "0/2");
        assert!(flush(&disk).await.is_err());
        assert_eq!(get(&disk, "granules").await, "2/2");
    });
}

#[test]
fn with_a_file_it_behaves_like_a_vector() {
    let folder = tempfile::tempdir().unwrap();
    run(3, async |host| {
        let text = kept(folder.path(), "").replace("200M", "70001") + " L -> M";
        let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
        play_against_model(&disk, 3, 200).await;
    });
}

#[test]
fn regions_are_marked_by_the_first_change_and_taken_back_after_some_seconds() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let text = kept(folder.path(), "(initially clean) (written dirty)") + " L -> M";
        let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
        assert_eq!(regions(folder.path()), 0);
        disk.write(130 << 20, &[1; 8]).await.unwrap();
        assert_eq!(regions(folder.path()), 0b100);
        blockmason::rt::sleep(Duration::from_secs(3)).await;
        disk.write(10, &[1; 8]).await.unwrap();
        blockmason::rt::sleep(Duration::from_secs(30)).await;
        assert_eq!(regions(folder.path()), 0);
        assert_eq!(get(&disk, "granules").await, "2/51200");
    });
    run(1, async |host| {
        let text = kept(folder.path(), "(initially dirty)") + " L -> M";
        let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
        assert_eq!(get(&disk, "granules").await, "2/51200", "the file knows better");
    });
}

#[test]
fn a_region_stays_marked_as_long_as_the_disk_cannot_be_flushed() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let text = kept(folder.path(), "(initially clean)")
            + " element E (type error) (op flush) (count 3) L -> E -> M";
        let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
        disk.write(0, &[1; 8]).await.unwrap();
        blockmason::rt::sleep(Duration::from_secs(12)).await;
        assert_eq!(regions(folder.path()), 1);
        blockmason::rt::sleep(Duration::from_secs(60)).await;
        assert_eq!(regions(folder.path()), 0);
    });
}

#[test]
fn a_graph_that_is_only_built_leaves_nothing_behind_and_an_occupied_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let text = kept(folder.path(), "") + " L -> M";
        drop(blockmason::testing::graph(&host, crate::ALL, &text, "L").unwrap());
        assert!(!folder.path().join("map").exists());
        let _disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
        let twice = text.replace("element L", "element K").replace("L ->", "K ->");
        let error = TestDisk::new(&host, crate::ALL, &twice, "K").await.err().unwrap().to_string();
        assert!(error.contains("the element L keeps its map there"), "{error}");
        let coarse = text.replace("4k", "8k");
        let error = TestDisk::new(&host, crate::ALL, &coarse, "L").await.err().unwrap().to_string();
        assert!(error.contains("granules have 4096 bytes"), "{error}");
    });
}

static WITH_CLIENT: LazyLock<Catalogue> = LazyLock::new(|| {
    let all = crate::ALL.iter().copied().chain([&CLIENT]).collect::<Vec<&'static ElementType>>();
    Vec::leak(all)
});

#[test]
fn a_reload_turns_nothing_clean_with_a_file_or_without() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let graph = |log: &str| {
            let text = format!(
                "element Client (type client) element L (type log_dirty) {log} (written dirty)\n\
                 element M (type mem) (size 1M) Client -> L -> M"
            );
            checked(*WITH_CLIENT, &text).map(|_| text).unwrap()
        };
        let file = format!("(file {})", folder.path().join("map").display());
        let first = graph("(granule 4k) (initially clean)");
        let (live, disk) = live(&host, *WITH_CLIENT, &first).await.unwrap();
        disk.write(0, &[1; 8]).await.unwrap();
        let steps = [
            ("(granule 8k) (initially clean)".to_owned(), "1/128"),
            (format!("(granule 8k) (initially clean) {file}"), "2/128"),
            (format!("(granule 8k) (initially dirty) {file}"), "3/128"),
            ("(granule 4k) (initially clean)".to_owned(), "8/256"),
        ];
        for (step, (log, expected)) in steps.iter().enumerate() {
            live.reload(checked(*WITH_CLIENT, &graph(log)).unwrap(), &Options::default()).await.unwrap();
            assert_eq!(get(&disk, "granules").await, *expected, "{log}");
            disk.write((step as u64 + 1) << 16, &[1; 8]).await.unwrap();
        }
    });
}

#[test]
fn a_successor_in_another_process_has_the_map_that_this_one_had() {
    run(1, async |host| {
        let text = "element L (type log_dirty) (granule 4k) element M (type mem) (size 1M) L -> M";
        let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        disk.write(8192, &[1; 40960]).await.unwrap();
        let next = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
        let element = |disk: &TestDisk| {
            disk.disk.graph().instances().find(|instance| instance.name == "L").unwrap().element.clone()
        };
        let open = blockmason::Open { host: &host, disk: &disk.disk, name: "L" };
        let luggage = element(&disk).hand_over(&open).await.unwrap();
        element(&next).take_over(luggage, &open).await.unwrap();
        assert_eq!(get(&next, "granules").await, "246/256");
    });
}
