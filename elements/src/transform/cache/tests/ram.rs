//! The cache in memory as a disk, and what reaches the disk below it.

use super::*;
use blockmason::Class;
use blockmason::testing::{checked, play_against_model, run};
use std::time::Duration;

const BACK: &str = "(size 1M) (line 4k) (mode write_back) (lossy yes)";

#[test]
fn behaves_like_a_vector() {
    let caches = [
        "(size 40k) (line 4k)",
        "(size 200k) (line 16k) (read_ahead 0) (bypass 20k)",
        "(size 4M) (line 64k) (read_ahead 32k)",
        "(size 200k) (line 4k) (mode write_back) (lossy yes) (dirty 64k)",
        "(size 2M) (line 16k) (mode write_back) (lossy yes) (dirty_time 1ms)",
        "(size 200k) (line 4k) (mode write_back) (lossy yes) (dirty 64k) (rate 10M/s)",
    ];
    for cache in caches {
        for (seed, sink) in (0..).zip(["(type mem) (size 100001)", "(type volatile) (size 100k)"]) {
            run(seed, async |host| {
                let (disk, element) = disk(&host, cache, sink).await;
                play_against_model(&disk, seed, 300).await;
                assert!(number(&element, "used") <= 4 << 20);
            });
        }
    }
}

#[test]
fn what_is_read_or_written_once_is_not_read_below_again() {
    run(1, async |host| {
        let (disk, element) =
            disk(&host, "(size 1M) (line 16k) (read_ahead 0)", "(type mem) (size 1M)").await;
        disk.read(100, 50).await.unwrap();
        assert_eq!(ranges(Op::Read), vec![(0, 16384)]);
        disk.read(0, 16384).await.unwrap();
        disk.write(40000, &[7; 1000]).await.unwrap();
        assert_eq!(disk.read(40448, 500).await.unwrap(), [7; 500]);
        assert_eq!(ranges(Op::Read), vec![], "whole sectors of what was written are known");
        let found = disk.read(40000, 1000).await.unwrap();
        assert_eq!((found, ranges(Op::Read)), (vec![7; 1000], vec![(32768, 49152)]));
        assert_eq!(number(&element, "used"), 2 * 16384);
        disk.op(Op::Discard, 0, 16384).await.unwrap();
        assert_eq!(number(&element, "used"), 16384);
    });
}

#[test]
fn it_takes_no_more_memory_than_it_was_given() {
    for cache in ["(size 100k) (line 4k)", "(size 1M) (line 64k)", "(size 300k) (line 16k)"] {
        run(1, async |host| {
            let (disk, element) = disk(&host, cache, "(type mem) (size 8M)").await;
            let size = size_of_cache(cache);
            for at in (0..8 << 20).step_by(12345) {
                disk.read(at, 3000).await.unwrap();
                let lines = cache_of(&element).lines().count() as u64;
                assert!(lines * (cache_of(&element).lines().size + lines::OVERHEAD) <= size);
            }
            assert!(number(&element, "used") > size / 2);
        });
    }
}

fn size_of_cache(cache: &str) -> u64 {
    let size = cache.split("(size ").nth(1).unwrap().split(')').next().unwrap();
    size.parse::<blockmason::lang::value::Size>().unwrap().0
}

#[test]
fn a_stream_is_read_ahead_and_a_long_one_is_not_kept() {
    run(1, async |host| {
        let cache = "(size 8M) (line 16k) (read_ahead 256k) (bypass 1M)";
        let (disk, element) = disk(&host, cache, "(type mem) (size 64M)").await;
        for at in (0..8 << 20).step_by(16384) {
            disk.read(at, 16384).await.unwrap();
            settle().await;
        }
        let seen = seen();
        let by = |origin: Origin| seen.iter().filter(|(_, from, _)| *from == origin).count();
        assert!(by(Origin::Guest) <= 4 && by(Origin::Prefetch) > 30, "{} reads of guests", by(Origin::Guest));
        let bytes: u64 = seen.iter().map(|(.., range)| range.end - range.start).sum();
        assert!(bytes <= (8 << 20) + (512 << 10), "nothing twice: {bytes}");
        assert!(element.get("hit_ratio").unwrap().parse::<f64>().unwrap() > 0.98);
        let hot = 100 * 16384;
        disk.read(30 << 20, hot).await.unwrap();
        disk.read(30 << 20, hot).await.unwrap();
        assert!(number(&element, "used") <= 8 << 20);
    });
}

#[test]
fn a_hint_and_warming_bring_lines_in() {
    run(1, async |host| {
        let (disk, element) =
            disk(&host, "(size 1M) (line 16k) (read_ahead 0)", "(type mem) (size 1M)").await;
        disk.op(Op::Cache, 20000, 30000).await.unwrap();
        settle().await;
        assert_eq!(seen(), [(Op::Read, Origin::Prefetch, 16384..65536)]);
        element.call("warm", "100k-200k").unwrap();
        settle().await;
        assert_eq!(ranges(Op::Read), vec![(6 * 16384, 13 * 16384)]);
        disk.read(100 << 10, 100 << 10).await.unwrap();
        assert!(seen().is_empty());
        assert!(element.call("warm", "all").unwrap().contains("as much of it as fits"));
        assert!(element.call("warm", "some").is_err());
    });
}

#[test]
fn written_back_in_order_before_a_flush_is_answered() {
    run(1, async |host| {
        let (disk, element) = disk(&host, BACK, "(type mem) (size 1M)").await;
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.write(4096, &[2; 4096]).await.unwrap();
        disk.write(2048, &[3; 4096]).await.unwrap();
        disk.write(100_000, &[4; 10]).await.unwrap();
        assert!(seen().is_empty() && number(&element, "dirty") > 12288);
        let found = disk.read(0, 8192).await.unwrap();
        assert!(found[..2048] == [1; 2048] && found[2048..6144] == [3; 4096] && found[6144..] == [2; 2048]);
        disk.op(Op::Flush, 0, 0).await.unwrap();
        let seen = seen();
        let back = Origin::WriteBack;
        assert_eq!(seen[0], (Op::Write, back, 0..8192), "the newest bytes, in one piece");
        assert_eq!(seen[1..3], [(Op::Write, back, 100_000..100_010), (Op::Flush, back, 0..0)]);
        assert_eq!((number(&element, "dirty"), element.get("state").unwrap()), (0, "keeping".into()));
        assert!(disk.read(0, 8192).await.unwrap() == found);
    });
}

#[test]
fn what_is_old_goes_below_by_itself_and_what_is_much_at_once() {
    run(1, async |host| {
        let (disk, element) =
            disk(&host, &format!("{BACK} (dirty_time 2s) (dirty 128k)"), "(type mem) (size 1M)").await;
        disk.write(0, &[1; 512]).await.unwrap();
        blockmason::rt::sleep(Duration::from_millis(1900)).await;
        assert!(number(&element, "dirty") > 0);
        blockmason::rt::sleep(Duration::from_millis(200)).await;
        assert_eq!(number(&element, "dirty"), 0);
        for at in 0..100 {
            disk.write(at * 8192, &[2; 8192]).await.unwrap();
            assert!(number(&element, "dirty") <= 128 << 10);
        }
        element.set("dirty_time", "1h").unwrap();
        assert_eq!(element.get("dirty_time").unwrap(), "1h");
        disk.write(0, &[3; 512]).await.unwrap();
        element.call("flush", "").unwrap();
        settle().await;
        assert_eq!(number(&element, "dirty"), 0);
    });
}

#[test]
fn no_more_goes_below_in_a_second_than_was_said() {
    run(1, async |host| {
        let cache = "(size 4M) (line 4k) (mode write_back) (lossy yes) (dirty_time 10ms) (rate 100k/s)";
        let (disk, element) = disk(&host, cache, "(type mem) (size 1M)").await;
        disk.write(0, &[1; 200_000]).await.unwrap();
        blockmason::rt::sleep(Duration::from_millis(100)).await;
        assert_eq!(number(&element, "dirty"), 0, "the first batch goes at once");
        disk.write(0, &[2; 512]).await.unwrap();
        blockmason::rt::sleep(Duration::from_millis(1500)).await;
        assert!(number(&element, "dirty") > 0);
        blockmason::rt::sleep(Duration::from_millis(1000)).await;
        assert_eq!(number(&element, "dirty"), 0);
        element.set("rate", "unlimited").unwrap();
        assert!(element.get("rate").unwrap() == "unlimited" && element.set("rate", "fast").is_err());
    });
}

#[test]
fn guests_wait_while_the_disk_below_fails_and_are_told_by_flushes_only() {
    run(1, async |host| {
        let (disk, element) =
            disk(&host, &format!("{BACK} (dirty 64k) (dirty_time 1s)"), "(type mem) (size 1M)").await;
        fail(&[Op::Write]);
        disk.write(0, &[1; 20_000]).await.unwrap();
        assert!(disk.op(Op::Flush, 0, 0).await.is_err());
        let events = host.events().follow(100).take(100);
        assert!(format!("{events:?}").contains("changes cannot be written below"), "{events:?}");
        let waits: Vec<_> =
            (1..5).map(|at| disk.send(Request::write(at * 20_000, Data::copy_of(&[2; 20_000])))).collect();
        blockmason::rt::sleep(Duration::from_secs(20)).await;
        assert_eq!(disk.read(0, 20_000).await.unwrap(), [1; 20_000]);
        fail(&[]);
        for wait in waits {
            wait.await.unwrap().unwrap();
        }
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!(number(&element, "dirty"), 0);
        let events = host.events().follow(100).take(100);
        assert!(format!("{events:?}").contains("are written below again"));
    });
}

#[test]
fn drained_it_keeps_nothing_until_it_resumes() {
    run(1, async |host| {
        let (disk, element) = disk(&host, BACK, "(type mem) (size 1M)").await;
        disk.write(0, &[1; 4096]).await.unwrap();
        assert_eq!(element.call("drain", "").unwrap(), "draining");
        disk.write(0, &[2; 512]).await.unwrap();
        assert_eq!((number(&element, "dirty"), element.get("state").unwrap()), (0, "drained".into()));
        let below: Vec<_> = seen().into_iter().map(|(op, origin, _)| (op, origin)).collect();
        let (back, guest) = (Origin::WriteBack, Origin::Guest);
        assert_eq!(below, [(Op::Write, back), (Op::Flush, back), (Op::Write, guest)]);
        let found = disk.read(0, 4096).await.unwrap();
        assert!(found[..512] == [2; 512] && found[512..] == [1; 3584]);
        assert_eq!(element.call("resume", "").unwrap(), "keeping");
        disk.write(0, &[3; 512]).await.unwrap();
        assert!(number(&element, "dirty") > 0);
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [3; 512]);
        assert!(element.may_leave().is_ok() && element.may_hand_over().is_ok());
    });
}

#[test]
fn geometry_says_what_is_promised() {
    run(1, async |host| {
        // Through it the disk below promises what it does; what is kept back goes below in other pieces.
        let through = blockmason::geometry::MAX_REQUEST;
        for (cache, needs_flush, atomic) in [("(size 1M)", false, through), (BACK, true, 0)] {
            let (disk, _) = disk(&host, cache, "(type mem) (size 1M)").await;
            let graph = disk.disk.graph();
            let below = graph.below(graph.node("Client").unwrap()).unwrap();
            assert_eq!((below.atomic, below.needs_flush, below.ops.cache), (atomic, needs_flush, true));
        }
        let (disk, _) = disk(&host, BACK, "(type mem) (size 1M)").await;
        let urgent = Request { class: Class::Background, ..Request::new(Op::WriteZeroes, 0, 512) };
        disk.submit(urgent.with(Flags::FAST_ONLY)).await.unwrap();
    });
}

#[test]
fn what_makes_no_sense_is_refused_in_a_sentence() {
    let refused = |cache: &str| {
        let text = format!(
            "element G (type nbd) (listen unix:x.sock) element C (type cache) {cache} element S (type mem) (size 1M) G -> C -> S"
        );
        checked(crate::ALL, &text).err().unwrap().to_string()
    };
    for (cache, what) in [
        ("", "how much memory?"),
        ("(size 1M) (mode write_back)", "agree with `(lossy yes)`, or give it a `path`"),
        ("(size 20k)", "eight lines must fit"),
        ("(size 1M) (line 8k)", "4k, 16k, 64k or 256k, found `8k`"),
        ("(size 1M) (mode back)", "`write_through` or `write_back`, found `back`"),
        ("(size 1M) (log 1M)", "which has a `path`"),
        ("(size 1M) (durability remote)", "which has a `path`"),
        ("(size 1M) (mode write_back) (lossy yes) (dirty 1M)", "eight lines must fit"),
    ] {
        let found = refused(cache);
        assert!(found.contains(what), "{cache}: {found}");
    }
}
