//! Copying while guests write: one case each of what it promises. Orders of events have a file of their own.

mod frozen;
mod orders;
mod silent;
mod world;

use blockmason::live::Options;
use blockmason::testing::{checked, live, play_against_model, run};
use blockmason::{Data, Op, Ops, Request, rt};
use world::{ALL, Moving, bytes, fresh, parked, pass, release, set, settle, world};

const SIZE: u64 = 300_000;

/// Old bytes without zeros, and a new disk of something else.
async fn moving(host: &std::sync::Arc<blockmason::Host>, ops: Ops, parameters: &str) -> Moving {
    fresh(ops);
    set("Old", vec![1; SIZE as usize]);
    set("New", vec![9; SIZE as usize]);
    let text = Moving::text("slow", SIZE, SIZE, &format!("(chunk 64k) {parameters}"));
    Moving::new(host, &text, "T").await
}

#[test]
fn requests_above_are_answered_like_those_of_a_vector_while_it_copies() {
    for seed in 0..10 {
        run(seed, async |host| {
            fresh(Ops::ALL);
            world(|world| world.slow = 2);
            let moving = Moving::new(&host, &Moving::text("slow", 70_001, 70_001, "(chunk 64k)"), "T").await;
            play_against_model(&moving.disk, seed, 150).await;
            moving.landed().await;
            moving.until("clean").await;
            assert!(bytes("Old") == bytes("New"), "seed {seed}");
            moving.verify().await;
        });
    }
}

#[test]
fn what_is_said_while_it_copies_and_when_it_is_done() {
    run(1, async |host| {
        let moving = moving(&host, Ops::ALL, "").await;
        assert_eq!((moving.get("state"), moving.get("remaining")), ("copying".into(), SIZE.to_string()));
        moving.until("clean").await;
        let progress: serde_json::Value = serde_json::from_str(&moving.get("progress")).unwrap();
        assert_eq!(progress["total"], SIZE);
        assert_eq!(
            (&progress["remaining"], &progress["copied"], &progress["passes"]),
            (&0.into(), &SIZE.into(), &1.into())
        );
        assert_eq!((&progress["error"], &progress["skipped"]), (&"".into(), &0.into()));
        assert!(moving.number("rate_now") > 0);
        pass(10_000).await;
        assert_eq!((moving.number("rate_now"), moving.number("passes")), (0, 1));
    });
}

#[test]
fn zeros_are_not_written_as_data_whether_they_are_known_or_found() {
    for ops in [Ops::ALL, Ops { extents: false, ..Ops::ALL }, Ops::NONE] {
        run(1, async |host| {
            fresh(ops);
            let mut content = vec![0; SIZE as usize];
            content[131_072 + 10] = 5;
            set("Old", content.clone());
            set("New", vec![9; SIZE as usize]);
            let moving = Moving::new(&host, &Moving::text("slow", SIZE, SIZE, "(chunk 128k)"), "T").await;
            moving.until("clean").await;
            assert!(bytes("New") == content);
            let piece = if ops.extents { 4096 } else { 65_536 };
            assert_eq!((moving.number("copied"), moving.number("skipped")), (piece, SIZE - piece), "{ops:?}");
        });
    }
}

#[test]
fn zeros_are_not_made_again_where_that_would_take_long() {
    run(1, async |host| {
        fresh(Ops { fast_zero: false, ..Ops::ALL });
        let mut there = vec![0; SIZE as usize];
        there[100_000] = 1;
        set("New", there);
        let moving = Moving::new(&host, &Moving::text("slow", SIZE, SIZE, "(chunk 64k)"), "T").await;
        moving.until("clean").await;
        assert!(bytes("New").iter().all(|byte| *byte == 0));
        let changes = world(|world| {
            world.seen.iter().filter(|(disk, op, _)| disk == "New" && op.changes_data()).count()
        });
        assert_eq!((changes, moving.number("skipped")), (1, SIZE));
    });
}

#[test]
fn what_is_data_is_not_asked_for_holes_chunk_by_chunk() {
    run(1, async |host| {
        let moving = moving(&host, Ops::ALL, "").await;
        moving.until("clean").await;
        let asked = || world(|world| world.seen.iter().filter(|(_, op, _)| *op == Op::Extents).count());
        assert_eq!(asked(), 1);
        moving.verify().await;
        assert_eq!(asked(), 2, "once more, for the comparison");
    });
}

#[test]
fn large_holes_are_passed_over_at_once() {
    run(1, async |host| {
        let size = 100u64 << 30;
        let text = format!(
            "element Old (type null) (size {size}) element L (type log_dirty) element New (type null) (size {size})
             element C (type copy) (only L) L -> New (C, from) -> Old (C, to) -> L"
        );
        let moving = Moving::new(&host, &text, "Old").await;
        moving.until("clean").await;
        assert_eq!((moving.number("skipped"), moving.number("copied")), (size, 0));
    });
}

#[test]
fn what_is_being_made_zero_keeps_a_guest_waiting_and_what_fails_is_copied_with_its_write() {
    run(1, async |host| {
        fresh(Ops::ALL);
        let moving = Moving::new(&host, &Moving::text("hand", SIZE, SIZE, "(chunk 64k)"), "T").await;
        settle().await;
        // The whole disk is a hole, and is being made zero.
        assert_eq!(
            parked().iter().map(|(disk, _, op, _)| (&**disk, *op)).collect::<Vec<_>>(),
            [("New", Op::WriteZeroes)]
        );
        let written = moving.disk.send(Request::write(5000, Data::copy_of(&[3; 100])));
        settle().await;
        assert_eq!(parked().len(), 1, "it waits for the zeros");
        release("New", 0, false);
        settle().await;
        while moving.get("state") != "clean" {
            parked().first().into_iter().for_each(|(disk, ix, ..)| release(disk, *ix, true));
            pass(10).await;
        }
        written.await.unwrap().unwrap();
        assert!(bytes("Old") == bytes("New") && bytes("New")[5000] == 3);
    });
}

#[test]
fn disks_of_any_sizes_are_copied_and_what_lies_behind_is_left_alone() {
    for (old, new) in [(1, 1), (1, 5000), (4096, 4097), (65_537, 65_537), (65_537, 69_000), (70_000, 1 << 20)]
    {
        for order in ["up", "down"] {
            run(1, async |host| {
                fresh(Ops::ALL);
                set("Old", vec![1; old]);
                set("New", vec![9; new]);
                let parameters = format!("(chunk 64k) (order {order})");
                let moving =
                    Moving::new(&host, &Moving::text("slow", old as u64, new as u64, &parameters), "T").await;
                moving.until("clean").await;
                let (found, end) = (bytes("New"), old.next_multiple_of(4096).min(new));
                assert!(found[..old] == bytes("Old") && found[old..end].iter().all(|byte| *byte == 0));
                assert!(found[end..].iter().all(|byte| *byte == 9));
                assert_eq!((moving.number("copied"), moving.number("remaining")), (old as u64, 0));
                moving.verify().await;
            });
        }
    }
}

#[test]
fn a_disk_that_it_cannot_be_copied_to_is_refused() {
    run(1, async |host| {
        fresh(Ops::ALL);
        let refused = |text: &str| {
            let graph = blockmason::testing::graph(&host, *ALL, text, "Old");
            graph.err().map(|error| error.to_string()).unwrap_or_default()
        };
        let small = Moving::text("slow", 5000, 4999, "");
        assert!(refused(&small).contains("4999, that at `from` 5000"), "{}", refused(&small));
        let other = "element Old (type mem) (size 1M) element New (type mem) (size 1M) element M (type mem) (size 2M)
            element L (type log_dirty) element G (type readonly) element C (type copy) (only L) L -> M G -> New
            (C, from) -> Old (C, to) -> New";
        assert!(refused(other).contains("on the way to it"), "{}", refused(other));
        let read_only = other.replace("(C, to) -> New", "(C, to) -> G");
        assert!(refused(&read_only).contains("read-only"), "{}", refused(&read_only));
    });
}

#[test]
fn a_map_of_another_disk_is_no_reason_to_copy_for_ever() {
    run(1, async |host| {
        fresh(Ops::ALL);
        let text =
            "element M (type mem) (size 1M) element Old (type mem) (size 1M) element New (type mem) (size 1M)
            element L (type log_dirty) element C (type copy) (only L) L -> M (C, from) -> Old (C, to) -> New";
        let moving = Moving::new(&host, text, "Old").await;
        moving.until("waiting").await;
        assert!(moving.get("error").contains("still dirty"), "{}", moving.get("error"));
    });
}

#[test]
fn without_a_map_everything_is_copied_once() {
    run(1, async |host| {
        fresh(Ops::ALL);
        set("Old", vec![1; 200_000]);
        let text = "element Old (type slow) (size 200000) element New (type slow) (size 300000)
            element C (type copy) (C, from) -> Old (C, to) -> New";
        let moving = Moving::new(&host, text, "Old").await;
        moving.until("clean").await;
        assert!(bytes("New")[..200_000] == bytes("Old") && bytes("New")[200_000..] == [0; 100_000]);
        moving.disk.write(0, &[2; 10]).await.unwrap();
        pass(1000).await;
        assert_eq!((moving.get("state"), bytes("New")[0]), ("clean".into(), 1));
    });
}

#[test]
fn it_pauses_and_goes_on() {
    run(1, async |host| {
        let moving = moving(&host, Ops::ALL, "(paused yes)").await;
        pass(1000).await;
        assert_eq!((moving.get("state"), moving.number("copied")), ("paused".into(), 0));
        moving.set("paused", "no");
        assert_eq!(moving.get("paused"), "no");
        moving.until("clean").await;
        assert!(bytes("Old") == bytes("New"));
        assert!(moving.copy.element.set("paused", "perhaps").is_err());
        assert!(moving.copy.element.set("depth", "65").is_err());
    });
}

#[test]
fn it_keeps_its_rate() {
    run(1, async |host| {
        let moving = moving(&host, Ops::NONE, "(rate 100k/s)").await;
        let since = rt::now();
        moving.until("clean").await;
        // The last chunk may be owed.
        let least = (SIZE - 65_536) as f64 / 102_400.0 - 0.1;
        let took = (rt::now() - since).as_secs_f64();
        assert!((least..least + 1.0).contains(&took), "{took} s");
        assert!((60_000..140_000).contains(&moving.number("rate_now")), "{}", moving.number("rate_now"));
    });
}

#[test]
fn it_goes_slower_while_guests_are_active() {
    run(1, async |host| {
        let moving = moving(&host, Ops::NONE, "(busy_rate 64k/s) (paused yes)").await;
        settle().await;
        moving.disk.read(0, 1).await.unwrap();
        moving.set("paused", "no");
        let until = rt::now() + std::time::Duration::from_secs(3);
        while rt::now() < until {
            moving.disk.read(0, 1).await.unwrap();
            pass(20).await;
        }
        let busy = moving.number("copied");
        assert!((128 << 10..=256 << 10).contains(&busy), "{busy}");
        moving.until("clean").await;
        assert!((rt::now() - until).as_secs_f64() < 1.5, "idle again, it goes at full speed");
    });
}

#[test]
fn a_guest_waits_for_one_chunk_at_the_most() {
    run(1, async |host| {
        fresh(Ops::NONE);
        world(|world| world.slow = 0);
        set("Old", vec![1; SIZE as usize]);
        let moving =
            Moving::new(&host, &Moving::text("hand", SIZE, SIZE, "(chunk 64k) (depth 4)"), "T").await;
        settle().await;
        assert_eq!(parked().len(), 4, "reads of four chunks");
        let written = moving.disk.send(Request::write(70_000, Data::copy_of(&[2; 10])));
        let beside = moving.disk.send(Request::read(SIZE - 10, 10));
        settle().await;
        assert!(
            parked().iter().any(|(_, _, op, range)| *op == Op::Read && range.end == SIZE),
            "that one does not wait"
        );
        // Only the second chunk ends.
        let ix = parked().iter().find(|(.., range)| range.start == 65_536).unwrap().1;
        release("Old", ix, true);
        settle().await;
        release("New", 0, true);
        settle().await;
        let ix = parked()
            .iter()
            .find(|(disk, _, op, _)| disk == "Old" && *op == Op::Write)
            .expect("the guest's")
            .1;
        release("Old", ix, true);
        written.await.unwrap().unwrap();
        while let Some((disk, ix, ..)) = parked().first() {
            release(disk, *ix, true);
            settle().await;
        }
        beside.await.unwrap().unwrap();
    });
}

#[test]
fn errors_name_their_side_and_are_tried_again_while_the_rest_goes_on() {
    for (disk, says) in [("Old", "`from` cannot be read"), ("New", "`to` does not take it")] {
        run(1, async |host| {
            fresh(Ops::NONE);
            set("Old", vec![1; SIZE as usize]);
            let bad = format!(
                "element E (type error) (op {}) (range 131072-131073)",
                if disk == "Old" { "read" } else { "write" }
            );
            let text = Moving::text("slow", SIZE, SIZE, "(chunk 64k)") + " " + &bad;
            let text = match disk {
                "Old" => text.replace("(C, from) -> Old", "(C, from) -> E E -> Old"),
                _ => text.replace("L -> New", "L -> E E -> New"),
            };
            let moving = Moving::new(&host, &text, "T").await;
            moving.until("waiting").await;
            assert!(moving.get("error").contains(says), "{}", moving.get("error"));
            assert_eq!(moving.number("remaining"), 65_536);
            let count =
                |disk: &str| world(|world| world.seen.iter().filter(|(name, ..)| name == disk).count());
            let before = count("Old");
            pass(10_000).await;
            // After 1, 2 and 4 seconds; what the error element refuses does not come to the disk below.
            assert_eq!(count("Old") - before, if disk == "Old" { 0 } else { 3 });
            let graph = moving.disk.disk.graph();
            let error = graph.instances().find(|instance| instance.name == "E").unwrap();
            error.element.set("count", "0").unwrap();
            moving.call("retry");
            pass(50).await;
            assert_eq!((moving.get("state"), moving.get("error")), ("clean".into(), String::new()));
            assert!(bytes("Old") == bytes("New"));
        });
    }
}

#[test]
fn what_becomes_dirty_later_is_copied_again() {
    run(1, async |host| {
        let moving = moving(&host, Ops::NONE, "").await;
        moving.until("clean").await;
        world(|world| world.failing.insert("New".to_owned(), 100));
        moving.disk.write(100, &[2; 10]).await.unwrap();
        moving.until("waiting").await;
        world(|world| world.failing.clear());
        moving.until("clean").await;
        assert!(bytes("Old") == bytes("New") && moving.number("passes") > 1);
    });
}

#[test]
fn every_byte_that_differs_is_found_and_copied_again_when_that_is_wanted() {
    for at in [0, 4095, 4096, 65_535, 65_536, SIZE as usize - 1] {
        run(1, async |host| {
            let moving = moving(&host, Ops::ALL, "").await;
            moving.until("clean").await;
            world(|world| world.bytes_mut("New")[at] ^= 0x40);
            moving.call("verify");
            moving.until("differs").await;
            assert!(
                moving.get("error").contains(&format!("at {at}: 0x01 and 0x41;")),
                "{}",
                moving.get("error")
            );
            let part = if at >= SIZE as usize / 4096 * 4096 { SIZE % 4096 } else { 4096 };
            assert_eq!((moving.number("verified"), moving.number("remaining")), (SIZE - part, part));
            pass(5000).await;
            assert_eq!(moving.get("state"), "differs");
            moving.call("retry");
            moving.until("clean").await;
            assert!(bytes("Old") == bytes("New"));
            moving.verify().await;
            assert_eq!(moving.get("error"), "");
        });
    }
}

#[test]
fn a_comparison_that_cannot_read_ends_and_says_so() {
    run(1, async |host| {
        let moving = moving(&host, Ops::ALL, "").await;
        moving.until("clean").await;
        world(|world| world.failing.insert("New".to_owned(), 100));
        moving.call("verify");
        moving.until("clean").await;
        assert!(moving.get("error").contains("ended early"), "{}", moving.get("error"));
        assert!(moving.number("verified") < SIZE);
    });
}

#[test]
fn it_goes_on_after_a_reload_with_what_it_has_counted() {
    run(1, async |host| {
        fresh(Ops::NONE);
        set("Old", vec![1; SIZE as usize]);
        let text = "element Client (type client) element Old (type slow) (size 300000) element New (type slow) (size 300000)
            element C (type copy) (chunk 64k) (rate 100k/s) Client -> Old (C, from) -> Old (C, to) -> New";
        let (live, disk) = live(&host, *ALL, text).await.unwrap();
        pass(1000).await;
        let copied = |disk: &blockmason::testing::TestDisk| -> u64 {
            let graph = disk.disk.graph();
            let copy = graph.instances().find(|instance| instance.name == "C").unwrap();
            copy.element.get("copied").unwrap().parse().unwrap()
        };
        let before = copied(&disk);
        assert!((1..SIZE).contains(&before));
        let next = checked(*ALL, &text.replace("(rate 100k/s)", "")).unwrap();
        live.reload(next, &Options::default()).await.unwrap();
        pass(1000).await;
        assert_eq!(copied(&disk), SIZE, "nothing is copied twice");
        assert!(bytes("Old") == bytes("New"));
        assert_eq!(world(|world| world.moved["New"]), SIZE);
    });
}
