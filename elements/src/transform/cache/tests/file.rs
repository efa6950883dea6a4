//! A cache in a file: what is warm after a restart, what is refused, what happens when the SSD fails.

use super::*;
use blockmason::testing::{play_against_model, run};
use std::path::Path;

/// A cache in a file above a `watch` above a disk in a file.
fn text(folder: &Path, cache: &str) -> String {
    let folder = folder.display();
    format!(
        "element C (type cache) (path {folder}/c) (read_ahead 0) {cache} element W (type watch) \
         element S (type file) (path {folder}/disk.img) (size 200k) C -> W -> S"
    )
}

async fn open(host: &Arc<Host>, folder: &Path, cache: &str) -> Result<(TestDisk, Arc<dyn Element>)> {
    let graph = graph(host, *TYPES, &text(folder, cache), "C")?;
    let element = element(&graph, "C");
    let disk = TestDisk::serve(host, graph).await;
    // It is open once it answers, if that is not an error.
    let _ = disk.op(Op::Flush, 0, 0).await;
    settle().await;
    WATCHING.take();
    Ok((disk, element))
}

const BACK: &str = "(size 1M) (line 4k) (mode write_back) (dirty_time 1h)";
const THROUGH: &str = "(size 1M) (line 4k)";

#[test]
fn behaves_like_a_vector() {
    let caches = [
        "(size 200k) (line 4k)",
        "(size 4M) (line 64k)",
        "(size 200k) (line 4k) (log 64k) (mode write_back)",
        "(size 4M) (line 16k) (mode write_back) (dirty_time 1ms)",
        "(size 400k) (line 4k) (log 100k) (mode write_back) (dirty 30k) (durability remote)",
    ];
    for cache in caches {
        for seed in 0..2 {
            let folder = tempfile::tempdir().unwrap();
            run(seed, async |host| {
                let mut bytes = None;
                for life in 0..2 {
                    let (disk, _) = open(&host, folder.path(), cache).await.unwrap();
                    let found = disk.read(0, 200 << 10).await.unwrap();
                    assert!(bytes.is_none_or(|bytes| bytes == found), "{cache}: the second life");
                    play_against_model(&disk, seed * 2 + life, 100).await;
                    bytes = Some(disk.read(0, 200 << 10).await.unwrap());
                    disk.disk.stop().await.unwrap();
                }
            });
        }
    }
}

#[test]
fn lines_are_warm_after_a_restart_and_damaged_ones_are_found() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let (disk, _) = open(&host, folder.path(), THROUGH).await.unwrap();
        disk.write(0, &[7; 40960]).await.unwrap();
        disk.read(0, 40960).await.unwrap();
        assert_eq!(ranges(Op::Read), vec![(0, 40960)]);
        disk.write(8192, &[8; 4096]).await.unwrap();
        let crashed = std::fs::read(folder.path().join("c")).unwrap();
        disk.disk.stop().await.unwrap();
        let (disk, element) = open(&host, folder.path(), THROUGH).await.unwrap();
        assert_eq!(number(&element, "used"), 9 * 4096, "what was overwritten is not there");
        assert_eq!(disk.read(0, 8192).await.unwrap(), [7; 8192]);
        assert!(seen().is_empty(), "warm");
        assert_eq!(disk.read(8192, 4096).await.unwrap(), [8; 4096]);
        disk.disk.stop().await.unwrap();
        // Other bytes in all slots: none is believed.
        let mut bytes = std::fs::read(folder.path().join("c")).unwrap();
        bytes[16384..].iter_mut().filter(|byte| **byte == 7).for_each(|byte| *byte = 9);
        std::fs::write(folder.path().join("c"), bytes).unwrap();
        let (disk, _) = open(&host, folder.path(), THROUGH).await.unwrap();
        assert_eq!(disk.read(0, 8192).await.unwrap(), [7; 8192]);
        assert!(format!("{:?}", host.events().follow(100).take(100)).contains("is damaged"));
        disk.disk.stop().await.unwrap();
        // As it was while it was in use: nothing of it is believed.
        std::fs::write(folder.path().join("c"), crashed).unwrap();
        let (disk, element) = open(&host, folder.path(), THROUGH).await.unwrap();
        assert_eq!(number(&element, "used"), 0);
        assert_eq!(disk.read(8192, 4096).await.unwrap(), [8; 4096]);
    });
}

#[test]
fn changes_are_found_after_a_restart_and_may_not_be_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let (disk, element) = open(&host, folder.path(), BACK).await.unwrap();
        disk.write(100, &[1; 5000]).await.unwrap();
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert!(ranges(Op::Write).is_empty() && number(&element, "dirty") > 5000);
        let error = element.may_leave().unwrap_err().to_string();
        assert!(error.contains("call its `drain` first"), "{error}");
        assert!(element.may_hand_over().is_err());
        disk.disk.stop().await.unwrap();
        let (disk, element) = open(&host, folder.path(), BACK).await.unwrap();
        assert_eq!(disk.read(100, 5000).await.unwrap(), [1; 5000]);
        assert!(number(&element, "dirty") > 5000);
        element.call("drain", "").unwrap();
        disk.write(100, &[2; 100]).await.unwrap();
        assert_eq!(element.get("state").unwrap(), "drained");
        assert!(element.may_leave().is_ok());
        disk.disk.stop().await.unwrap();
        assert_eq!(
            std::fs::read(folder.path().join("disk.img")).unwrap()[100..300],
            [[2; 100], [1; 100]].concat()
        );
    });
}

/// A cache that has written back is opened by one that does not: what was left goes below first.
#[test]
fn the_mode_may_change_between_two_starts() {
    let folder = tempfile::tempdir().unwrap();
    run(1, async |host| {
        let (disk, _) = open(&host, folder.path(), BACK).await.unwrap();
        disk.write(0, &[1; 5000]).await.unwrap();
        disk.disk.stop().await.unwrap();
        let (disk, element) = open(&host, folder.path(), THROUGH).await.unwrap();
        assert_eq!(disk.read(0, 5000).await.unwrap(), [1; 5000]);
        disk.write(0, &[2; 512]).await.unwrap();
        assert_eq!(number(&element, "dirty"), 0);
        assert!(element.call("resume", "").is_err());
        disk.disk.stop().await.unwrap();
        let found = std::fs::read(folder.path().join("disk.img")).unwrap();
        assert!(found[..512] == [2; 512] && found[512..5000] == [1; 4488]);
    });
}

#[test]
fn what_is_no_cache_or_another_disks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = async |host: &Arc<Host>, cache: &str| {
        let (disk, _) = open(host, folder.path(), cache).await.unwrap();
        let error = disk.read(0, 512).await.unwrap_err().to_string();
        disk.disk.stop().await.unwrap_err();
        error
    };
    run(1, async |host| {
        let none = open(&host, folder.path(), "").await.err().unwrap().to_string();
        assert!(none.contains("give it a `size`"), "{none}");
        std::fs::write(folder.path().join("c"), vec![1; 1 << 20]).unwrap();
        assert!(refused(&host, "").await.contains("zero its first 64 KiB"));
        std::fs::write(folder.path().join("c"), vec![0; 20000]).unwrap();
        assert!(refused(&host, "").await.contains("no room for eight lines"));
        std::fs::remove_file(folder.path().join("c")).unwrap();
        let (disk, _) = open(&host, folder.path(), THROUGH).await.unwrap();
        disk.disk.stop().await.unwrap();
        std::fs::File::options()
            .write(true)
            .open(folder.path().join("disk.img"))
            .unwrap()
            .set_len(2 << 20)
            .unwrap();
        let error = refused(&host, THROUGH).await;
        assert!(error.contains("belongs to a disk of 204800 bytes, not to one of 2097152"), "{error}");
    });
}

/// A cache on a port above a store that says which generation it is.
fn ported(cache: &str) -> String {
    format!(
        "element C (type cached) (path /none) (size 400k) (line 4k) (read_ahead 0) {cache} element W (type watch) \
         element Q (type plug) element S (type store) (size 100k) element L (type mem) (size 400k) \
         (C, out) -> W W -> S (C, ssd) -> Q Q -> L"
    )
}

/// Serves `text` anew with the sinks of `before`.
async fn again(host: &Arc<Host>, before: &Graph, text: &str) -> (TestDisk, Arc<dyn Element>) {
    let fresh = graph(host, *TYPES, text, "C").unwrap();
    let keep = |name: &str| name == "S" || name == "L";
    let old = |name: &str| before.instances().find(|instance| instance.name == name).unwrap().clone();
    let instances: Vec<_> =
        fresh.instances().map(|own| if keep(&own.name) { old(&own.name) } else { own.clone() }).collect();
    let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
    let edges =
        [("C", "out", "W"), ("W", "out", "S"), ("C", "ssd", "Q"), ("Q", "out", "L"), ("Client", "out", "C")];
    let edges = edges.map(|(from, port, to)| blockmason::Connection {
        from: place(from),
        port: port.into(),
        to: place(to),
    });
    let graph = Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap());
    let element = element(&graph, "C");
    let disk = TestDisk::serve(host, graph).await;
    settle().await;
    (disk, element)
}

#[test]
fn changes_for_a_disk_that_others_have_written_wait_for_the_operator() {
    plug_in();
    for (stale, byte) in [("", 0), ("(stale discard)", 5), ("(stale replay)", 2)] {
        run(1, async |host| {
            let back = ported("(mode write_back)");
            let disk = TestDisk::new(&host, *TYPES, &back, "C").await.unwrap();
            disk.write(0, &[1; 4096]).await.unwrap();
            element(&disk.disk.graph(), "C").call("flush", "").unwrap();
            settle().await;
            disk.write(0, &[2; 4096]).await.unwrap();
            disk.disk.stop().await.unwrap();
            let before = disk.disk.graph();
            // Nobody else has written it: all is well.
            let (disk, element_now) = again(&host, &before, &back).await;
            assert_eq!(disk.read(0, 4096).await.unwrap(), [2; 4096]);
            assert!(number(&element_now, "dirty") > 4096);
            disk.disk.stop().await.unwrap();
            let store = element(&before, "S");
            store.call("others", "").unwrap();
            let own: &Store = (&*store as &dyn std::any::Any).downcast_ref().unwrap();
            lock(&own.0).committed[..4096].fill(5);
            let (disk, _) = again(&host, &before, &ported(&format!("(mode write_back) {stale}"))).await;
            match disk.read(0, 4096).await {
                Ok(found) => assert_eq!(found, [byte; 4096], "{stale}"),
                Err(error) => assert!(byte == 0 && error.to_string().contains("(stale discard)"), "{error}"),
            }
        });
    }
}

#[test]
fn what_the_log_has_is_not_read_ahead() {
    plug_in();
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, &ported("(mode write_back)"), "C").await.unwrap();
        let cache = element(&disk.disk.graph(), "C");
        disk.write(0, &[1; 65536]).await.unwrap();
        cache.call("flush", "").unwrap();
        settle().await;
        seen();
        cache.call("warm", "0-64k").unwrap();
        disk.op(Op::Cache, 0, 65536).await.unwrap();
        settle().await;
        assert!(seen().iter().all(|(op, ..)| *op != Op::Read));
        // A line of which a part is missing is read.
        cache.call("warm", "60k-80k").unwrap();
        settle().await;
        let reads: Vec<_> =
            seen().into_iter().filter(|(op, ..)| *op == Op::Read).map(|(.., range)| range).collect();
        assert_eq!((reads.first().unwrap().start, reads.last().unwrap().end), (65536, 81920));
    });
}

#[test]
fn a_disk_that_has_grown_keeps_its_cache_unless_that_has_changes() {
    plug_in();
    for drained in [true, false] {
        run(1, async |host| {
            let back = ported("(mode write_back)");
            let disk = TestDisk::new(&host, *TYPES, &back, "C").await.unwrap();
            // The last line is not whole.
            disk.write(98304, &[1; 4096]).await.unwrap();
            element(&disk.disk.graph(), "C").call("flush", "").unwrap();
            settle().await;
            if !drained {
                disk.write(0, &[2; 4096]).await.unwrap();
            }
            disk.disk.stop().await.unwrap();
            let before = disk.disk.graph();
            element(&before, "S").call("grow", "150000").unwrap();
            for _ in 0..2 {
                let (disk, _) = again(&host, &before, &back).await;
                assert_eq!(disk.size(), 150_000);
                let found = disk.read(98304, 8192).await;
                if !drained {
                    assert!(found.unwrap_err().to_string().contains("(stale discard)"));
                    return;
                }
                assert_eq!(found.unwrap(), [vec![1; 4096], vec![0; 4096]].concat());
                disk.write(149_000, &[3; 1000]).await.unwrap();
                assert_eq!(disk.read(148_999, 1001).await.unwrap(), [vec![0], vec![3; 1000]].concat());
                disk.disk.stop().await.unwrap();
            }
        });
    }
}

#[test]
fn an_ssd_that_fails_is_done_without_as_long_as_nothing_is_lost() {
    plug_in();
    for mode in ["(mode write_through)", "(mode write_back)"] {
        run(1, async |host| {
            let disk = TestDisk::new(&host, *TYPES, &ported(mode), "C").await.unwrap();
            let element = element(&disk.disk.graph(), "C");
            disk.write(0, &[1; 8192]).await.unwrap();
            disk.read(40960, 8192).await.unwrap();
            pull(&["Q write once"]);
            if mode.contains("through") {
                disk.read(20480, 4096).await.unwrap();
            }
            disk.write(4096, &[2; 4096]).await.unwrap();
            assert_eq!(element.get("state").unwrap(), "failed", "{mode}");
            let events = format!("{:?}", host.events().follow(100).take(100));
            assert!(events.contains("not used any more until `resume`"), "{events}");
            let found = disk.read(0, 8192).await.unwrap();
            assert!(found[..4096] == [1; 4096] && found[4096..] == [2; 4096], "{mode}");
            disk.op(Op::Flush, 0, 0).await.unwrap();
            plug_in();
            element.call("resume", "").unwrap();
            disk.write(0, &[3; 4096]).await.unwrap();
            disk.write(50, &[4; 50]).await.unwrap();
            for _ in 0..2 {
                assert_eq!(disk.read(40, 60).await.unwrap(), [vec![3; 10], vec![4; 50]].concat());
            }
            disk.op(Op::Flush, 0, 0).await.unwrap();
        });
    }
}

#[test]
fn what_only_a_dead_ssd_had_is_an_error_and_never_something_old() {
    plug_in();
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, &ported("(mode write_back)"), "C").await.unwrap();
        let element = element(&disk.disk.graph(), "C");
        disk.write(8192, &[1; 4096]).await.unwrap();
        element.call("flush", "").unwrap();
        settle().await;
        disk.write(0, &[1; 4096]).await.unwrap();
        pull(&["Q"]);
        assert!(disk.write(40960, &[2; 512]).await.is_err(), "what it would go on top of is lost");
        assert!(disk.read(0, 4096).await.is_err(), "only the SSD had it");
        assert!(disk.op(Op::Flush, 0, 0).await.is_err());
        assert_eq!(disk.read(81920, 512).await.unwrap(), [0; 512], "what is below is served");
        assert_eq!(element.get("state").unwrap(), "failed");
        plug_in();
    });
}

/// It can be read but not written: everything goes below, and then nothing is taken that the old log would hide.
#[test]
fn an_ssd_that_cannot_be_emptied_takes_no_changes() {
    plug_in();
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, &ported("(mode write_back)"), "C").await.unwrap();
        let element = element(&disk.disk.graph(), "C");
        disk.write(0, &[1; 4096]).await.unwrap();
        pull(&["Q write"]);
        let error = disk.write(4096, &[2; 512]).await.unwrap_err().to_string();
        assert!(error.contains("take the cache out of the graph"), "{error}");
        assert_eq!(disk.read(0, 4096).await.unwrap(), [1; 4096]);
        assert_eq!((number(&element, "dirty"), element.get("state").unwrap()), (0, "failed".into()));
        assert!(element.may_leave().is_ok());
        plug_in();
    });
}

#[test]
fn one_write_is_one_record_up_to_what_geometry_says() {
    plug_in();
    run(1, async |host| {
        for (mode, atomic) in [("(mode write_back)", 51136), ("", 0)] {
            let disk = TestDisk::new(&host, *TYPES, &ported(mode), "C").await.unwrap();
            let graph = disk.disk.graph();
            assert_eq!(graph.below(graph.node("Client").unwrap()).unwrap().atomic, atomic);
            disk.read(0, 512).await.unwrap();
            assert_eq!(
                cache_of(&element(&graph, "C")).longest.load(Ordering::Relaxed),
                u64::from(atomic.max(16320))
            );
        }
    });
}
