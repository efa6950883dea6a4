//! Disks that fail, and copies that are damaged.

use super::super::check::check;
use super::super::format::{BLOCK, EXTENT};
use super::rig::{Rig, failure};
use blockmason::testing::run;
use blockmason::{Errno, Host, Kind, Op};
use futures::executor::block_on;
use std::sync::Arc;

const VOLUME: &str = "(size 4M)";
const DISK: &str = "(type volatile) (size 36M)";

/// A volume with two leaves in its tree and something in each.
async fn two_leaves(host: &Arc<Host>, way: &[&str]) -> Rig {
    let rig = Rig::new(host, VOLUME, way, DISK).await;
    rig.fill(0, 4, 1).await.unwrap();
    rig.fill(600, 4, 2).await.unwrap();
    rig.checkpoint().await.unwrap();
    rig
}

/// What a check finds; nothing must have changed but what is known to have.
async fn problems(rig: &Rig) -> Vec<String> {
    rig.look(|pool, below| block_on(check(pool, below)).unwrap().said.all).await
}

async fn is_sound(rig: &Rig) {
    assert_eq!(problems(rig).await, [] as [String; 0]);
}

#[test]
fn data_that_cannot_be_read_is_the_guests_affair() {
    run(1, async |host| {
        let rig = two_leaves(&host, &["E (type error) (op read) (count 0)"]).await;
        assert_eq!(rig.filled(0).await.unwrap(), 1);
        rig.set("E", "count", "1");
        assert_eq!(failure(rig.disk.read(0, 4096).await).errno(), Errno::IO);
        assert_eq!(rig.filled(0).await.unwrap(), 1);
        rig.fill(0, 4, 3).await.unwrap();
        rig.flush().await.unwrap();
        rig.checkpoint().await.unwrap();
        is_sound(&rig).await;
    });
}

#[test]
fn data_that_cannot_be_written_is_the_guests_affair() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &["E (type error) (op write) (count 0)"]).await;
        // In place, then to new places.
        for block in [0, 100] {
            rig.set("E", "count", "1");
            assert_eq!(failure(rig.fill(block, 2, 7).await).errno(), Errno::IO);
            rig.fill(block, 4, 3).await.unwrap();
        }
        rig.flush().await.unwrap();
        rig.reopen().await;
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(101).await.unwrap()], [3, 3]);
        rig.checkpoint().await.unwrap();
        // What was written for nothing has been given back.
        let leaked = rig.look(|pool, _| pool.space.leaked(&pool.core().journal)).await;
        assert_eq!(leaked, [] as [u64; 0]);
        is_sound(&rig).await;
    });
}

/// A replay of an ordered volume ends at what has not happened: a write that has failed must not take along what was flushed
/// after it.
#[test]
fn a_write_that_fails_takes_nothing_along_that_was_flushed_after_it() {
    run(1, async |host| {
        let way = ["E (type error) (op write) (count 0)"];
        let mut rig = Rig::new(&host, "(size 4M) (order prefix)", &way, "(type mem) (size 40M)").await;
        rig.fill(0, 4, 1).await.unwrap();
        // The data is written first, or at the same time as its record.
        rig.set("E", "count", "1");
        assert_eq!(failure(rig.fill(10, 4, 7).await).errno(), Errno::IO);
        rig.set("E", "count", "0");
        rig.fill(20, 4, 2).await.unwrap();
        rig.flush().await.unwrap();
        rig.reopen().await;
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(20).await.unwrap()], [1, 2]);
        is_sound(&rig).await;
    });
}

#[test]
fn a_damaged_copy_of_a_node_is_written_anew() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        let [first, second] = rig.leaf(0).await.map(|block| block * BLOCK);
        let whole = rig.below.read(first, 8192).await.unwrap();
        assert_eq!(whole, rig.below.read(second, 8192).await.unwrap());
        rig.damage(first + 100).await;
        rig.reopen().await;
        assert_eq!(rig.filled(0).await.unwrap(), 1);
        assert_eq!(rig.below.read(first, 8192).await.unwrap(), whole, "it has not been repaired");
        is_sound(&rig).await;
    });
}

#[test]
fn a_copy_of_a_node_that_cannot_be_read_is_written_anew() {
    run(1, async |host| {
        let way = ["E (type error) (op read) (count 0)", "W (type error) (op write) (count 0)"];
        let mut rig = two_leaves(&host, &way).await;
        let [first, _] = rig.leaf(0).await.map(|block| block * BLOCK);
        let whole = rig.below.read(first, 8192).await.unwrap();
        for repaired in [false, true] {
            rig.reopen().await;
            // The node above it is in memory from then on.
            assert_eq!(rig.filled(600).await.unwrap(), 2);
            // Whoever cannot read it would not see the damage: it shows whether it is written.
            rig.damage(first + 100).await;
            rig.set("E", "count", "1");
            rig.set("W", "count", if repaired { "0" } else { "1" });
            assert_eq!(rig.filled(0).await.unwrap(), 1);
            assert_eq!(rig.element("E").get("failed").unwrap(), "1");
            let now = rig.below.read(first, 8192).await.unwrap();
            assert_eq!(now == whole, repaired);
            // A repair that fails is nobody's loss.
            rig.fill(603, 1, 9).await.unwrap();
            rig.flush().await.unwrap();
            if !repaired {
                rig.damage(first + 100).await;
            }
        }
        is_sound(&rig).await;
    });
}

#[test]
fn what_is_below_a_node_without_a_good_copy_is_lost_and_nothing_else() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        for at in rig.leaf(1).await {
            rig.damage(at * BLOCK + 4096).await;
        }
        rig.reopen().await;
        assert_eq!(rig.filled(0).await.unwrap(), 1);
        let said = failure(rig.filled(600).await);
        assert_eq!(said.errno(), Errno::IO);
        assert!(said.to_string().contains("both copies of a node are damaged"), "{said}");
        for op in [Op::Write, Op::Discard] {
            let lost = match op {
                Op::Write => rig.fill(601, 1, 5).await,
                _ => rig.disk.op(op, 600 * BLOCK, BLOCK).await,
            };
            assert_eq!(failure(lost).errno(), Errno::IO, "{op}");
        }
        rig.fill(10, 4, 6).await.unwrap();
        rig.flush().await.unwrap();
        rig.checkpoint().await.unwrap();
        rig.reopen().await;
        assert_eq!([rig.filled(1).await.unwrap(), rig.filled(13).await.unwrap()], [1, 6]);
        let said = problems(&rig).await;
        assert!(said[0].contains("both copies of a node are damaged"), "{said:?}");
    });
}

#[test]
fn a_read_that_is_wrong_once_is_noticed() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &["F (type flip) (count 0)"]).await;
        rig.reopen().await;
        rig.flush().await.unwrap();
        rig.set("F", "count", "1");
        assert_eq!(rig.filled(0).await.unwrap(), 1, "the leaf's second copy has been read");
        assert_eq!(rig.element("F").get("flipped").unwrap(), "1");
        is_sound(&rig).await;
    });
    run(1, async |host| {
        let rig = Rig::new(&host, "(size 4M) (checksums yes)", &["F (type flip) (count 0)"], DISK).await;
        rig.fill(0, 4, 1).await.unwrap();
        rig.set("F", "count", "1");
        let said = failure(rig.disk.read(0, 4 * BLOCK).await);
        assert!(said.to_string().contains("their checksum is another one"), "{said}");
        assert_eq!(rig.filled(3).await.unwrap(), 1);
    });
}

/// Everything that a pool has twice, by its bytes: pairs of places, and what they are.
async fn twins(rig: &Rig) -> Vec<(&'static str, [u64; 2])> {
    let (label, root, sequence) =
        rig.look(|pool, _| (pool.space.label(), pool.root_extent * EXTENT, pool.core().root.sequence)).await;
    vec![
        ("label", [0, 256 * BLOCK]),
        ("owners", [BLOCK, 257 * BLOCK]),
        ("root", [sequence % 2, 256 + sequence % 2].map(|place| (root + place) * BLOCK)),
        ("extent", label.record(root / EXTENT)),
    ]
}

async fn still_works(rig: &mut Rig, what: &str) {
    rig.reopen().await;
    assert_eq!(rig.filled(0).await.unwrap_or_else(|error| panic!("{what}: {error}")), 1);
    rig.fill(1, 1, 8).await.unwrap();
    rig.checkpoint().await.unwrap();
    rig.reopen().await;
    assert_eq!(rig.filled(1).await.unwrap(), 8, "{what}");
}

#[test]
fn one_copy_of_anything_is_enough() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        for copy in [0, 1] {
            for ix in 0..twins(&rig).await.len() {
                let (what, places) = twins(&rig).await[ix];
                let whole = rig.below.read(places[copy], 128).await.unwrap();
                rig.damage(places[copy] + 17).await;
                still_works(&mut rig, &format!("{what}, copy {copy}")).await;
                let said = problems(&rig).await;
                assert!(
                    said.iter().all(|said| said.ends_with("is written anew")),
                    "{what}, copy {copy}: {said:?}"
                );
                // What has not been written meanwhile is still damaged: only a copy of the pool has been mended.
                if !said.is_empty() {
                    rig.below.write(places[copy], &whole).await.unwrap();
                }
                is_sound(&rig).await;
            }
        }
    });
}

#[test]
fn one_copy_that_can_be_read_is_enough() {
    for copy in [0, 1] {
        for what in 0..4 {
            run(1, async |host| {
                let place = twins(&two_leaves(&host, &[]).await).await[what].1[copy];
                let range = format!("E (type error) (op read) (range {place}-{}) (count 0)", place + 128);
                let mut rig = two_leaves(&host, &[&range]).await;
                let (name, places) = twins(&rig).await[what];
                assert_eq!(places[copy], place, "the same requests have had another end");
                rig.reopen().await;
                rig.set("E", "count", "unlimited");
                // An element that fails is one of the graph: the next one would be new.
                let found = rig.filled(0).await;
                assert_eq!(found.unwrap_or_else(|error| panic!("{name}, copy {copy}: {error}")), 1);
                // Of the table the second copy is only read where the first one does not do.
                let failed = rig.element("E").get("failed").unwrap() != "0";
                assert!(failed || (name, copy) == ("extent", 1), "{name}, copy {copy}: it was not read");
            });
        }
    }
}

#[test]
fn without_a_good_copy_it_says_what_is_missing() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        let all = [
            ("label", "the pool's label is damaged"),
            ("owners", "both copies of the list of the pool's owners are damaged"),
        ];
        for (name, wanted) in all {
            let twins = twins(&rig).await;
            let (_, places) = *twins.iter().find(|(what, _)| *what == name).unwrap();
            for at in places {
                rig.damage(at + 17).await;
            }
            rig.reopen().await;
            let said = failure(rig.filled(0).await);
            assert!(said.to_string().contains(wanted), "{said}");
            for at in places {
                rig.damage(at + 17).await;
            }
        }
        rig.reopen().await;
        assert_eq!(rig.filled(0).await.unwrap(), 1);
    });
}

/// The newest root has been torn twice: what the one before says is there, and the log goes on from it.
#[test]
fn without_the_newest_root_the_one_before_counts() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        let (_, places) = twins(&rig).await[2];
        for at in places {
            rig.damage(at + 40).await;
        }
        rig.reopen().await;
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(600).await.unwrap()], [1, 2]);
        is_sound(&rig).await;
    });
}

/// Of the space journal one copy is enough, whichever it is.
#[test]
fn a_damaged_space_journal_is_read_from_its_copy() {
    run(1, async |host| {
        for damaged in [0, 1] {
            let mut rig = two_leaves(&host, &[]).await;
            let journal = rig.look(|pool, _| pool.core().journal.clone()).await;
            assert_eq!(journal.len(), 2);
            rig.damage(journal[damaged] * BLOCK + 70).await;
            let [leaf, _] = rig.leaf(0).await;
            let label = rig.look(|pool, _| pool.space.label()).await;
            for at in label.record(leaf / EXTENT) {
                rig.damage(at + 20).await;
            }
            rig.reopen().await;
            assert_eq!([rig.filled(0).await.unwrap(), rig.filled(600).await.unwrap()], [1, 2]);
            is_sound(&rig).await;
        }
    });
}

/// An extent whose record is lost counts as full, unless the space journal has it: nothing in it is given away.
#[test]
fn an_extent_without_a_record_is_full() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &[]).await;
        let [leaf, _] = rig.leaf(0).await;
        let (label, free) = rig.look(|pool, _| (pool.space.label(), pool.space.blocks.free())).await;
        for at in label.record(leaf / EXTENT) {
            rig.damage(at + 20).await;
        }
        assert_eq!(rig.look(|pool, _| pool.space.blocks.free()).await, free, "the journal has it");
        is_sound(&rig).await;
        for at in label.record(label.extents - 1) {
            rig.damage(at + 20).await;
        }
        assert_eq!(rig.look(|pool, _| pool.space.blocks.free()).await, free - EXTENT);
        rig.reopen().await;
        rig.fill(100, 300, 4).await.unwrap();
        rig.checkpoint().await.unwrap();
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(600).await.unwrap()], [1, 2]);
        let said = problems(&rig).await;
        let expected = |said: &String| said.contains("nothing leads to it") || said.contains("the root says");
        assert!(!said.is_empty() && said.iter().all(expected), "{said:?}");
    });
}

#[test]
fn a_root_that_cannot_be_written_ends_all_changes() {
    run(1, async |host| {
        let rig = two_leaves(&host, &[]).await;
        let (_, [place, _]) = twins(&rig).await[2];
        let other = place ^ BLOCK;
        let range = format!("E (type error) (op write) (range {other}-{}) (count 0)", other + 1);
        let mut rig = two_leaves(&host, &[&range]).await;
        rig.fill(1, 1, 7).await.unwrap();
        rig.fill(200, 1, 8).await.unwrap();
        rig.set("E", "count", "1");
        failure(rig.checkpoint().await);
        assert_eq!(rig.element("E").get("failed").unwrap(), "1");
        ends_all_changes(&rig).await;
        rig.reopen().await;
        assert_eq!([rig.filled(1).await.unwrap(), rig.filled(200).await.unwrap()], [7, 8]);
        rig.fill(0, 1, 1).await.unwrap();
        is_sound(&rig).await;
    });
}

/// Nothing is changed any more, nothing is said to be durable, and everything can be read.
async fn ends_all_changes(rig: &Rig) {
    let refused = [
        rig.fill(0, 1, 99).await,
        rig.fill(300, 1, 99).await,
        rig.flush().await,
        rig.checkpoint().await,
        rig.disk.op(Op::Discard, 0, 8192).await,
        rig.control("snapshot", "late").await.unwrap().map(drop),
    ];
    for (ix, reply) in refused.into_iter().enumerate() {
        let said = failure(reply);
        let told = said.to_string().contains("the pool takes no more changes until it is opened anew");
        assert!(told && said.kind() == Kind::Io, "{ix}: {said}");
    }
    assert_eq!([rig.filled(0).await.unwrap(), rig.filled(600).await.unwrap()], [1, 2]);
    assert_ne!(rig.filled(300).await.unwrap(), 99);
}

#[test]
fn a_flush_that_fails_ends_all_changes() {
    run(1, async |host| {
        let mut rig = two_leaves(&host, &["E (type error) (op flush) (count 0)"]).await;
        rig.fill(5, 1, 5).await.unwrap();
        rig.flush().await.unwrap();
        rig.fill(6, 1, 6).await.unwrap();
        rig.set("E", "count", "1");
        failure(rig.flush().await);
        ends_all_changes(&rig).await;
        rig.element("P").call("pull", "").unwrap();
        rig.lose_power();
        rig.reopen().await;
        assert_eq!(rig.filled(5).await.unwrap(), 5);
        assert!([0, 6].contains(&rig.filled(6).await.unwrap()));
        rig.fill(7, 1, 7).await.unwrap();
        rig.flush().await.unwrap();
        is_sound(&rig).await;
    });
}

/// A flush that fails may have lost what a later one says nothing of, whoever asked for it: here it is for extents.
#[test]
fn a_flush_that_fails_for_more_room_ends_all_changes() {
    run(1, async |host| {
        let rig = two_leaves(&host, &["E (type error) (op flush) (count 0)"]).await;
        rig.set("E", "count", "1");
        let mut at = 8;
        while rig.element("E").get("failed").unwrap() == "0" {
            let _ = rig.fill(at, 100, 3).await;
            at += 100;
        }
        ends_all_changes(&rig).await;
    });
}

#[test]
fn a_log_that_cannot_be_written_ends_all_changes() {
    run(1, async |host| {
        let log = two_leaves(&host, &[]).await.look(|pool, _| pool.core().root.log).await;
        let range = [log[0] * BLOCK, (log[0] + log[1]) * BLOCK];
        let way = format!("E (type error) (op write) (range {}-{}) (count 0)", range[0], range[1]);
        let mut rig = two_leaves(&host, &[&way]).await;
        rig.fill(200, 1, 5).await.unwrap();
        rig.flush().await.unwrap();
        rig.set("E", "count", "1");
        failure(rig.fill(201, 1, 6).await);
        ends_all_changes(&rig).await;
        rig.reopen().await;
        assert_eq!([rig.filled(200).await.unwrap(), rig.filled(201).await.unwrap()], [5, 0]);
        is_sound(&rig).await;
    });
}

/// A volume that is far larger than its pool.
#[test]
fn a_snapshot_that_is_deleted_makes_room() {
    run(1, async |host| {
        let mut rig = Rig::new(&host, "(size 16T)", &[], "(type mem) (size 40M)").await;
        let fill = async |rig: &Rig, byte: u8| {
            let mut at = 0;
            loop {
                match rig.fill(at, 256, byte).await {
                    Ok(()) => at += 1 << 26,
                    Err(error) => return (at, error),
                }
            }
        };
        let (end, error) = fill(&rig, 1).await;
        assert!(error.kind() == Kind::NoSpace && end > 10 << 26, "{end}: {error}");
        rig.disk.op(Op::Discard, 0, 16 << 40).await.unwrap();
        for at in [0, 1 << 26, 1 << 27] {
            rig.fill(at, 256, 2).await.unwrap();
        }
        rig.control("snapshot", "s").await.unwrap().unwrap();
        let (end, error) = fill(&rig, 3).await;
        assert!(error.kind() == Kind::NoSpace, "{error}");
        rig.flush().await.unwrap();
        rig.control("delete_snapshot", "s").await.unwrap().unwrap();
        rig.fill(end, 256, 4).await.unwrap();
        rig.fill(end + (1 << 26), 256, 4).await.unwrap();
        rig.reopen().await;
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(end + 255).await.unwrap()], [3, 4]);
        rig.checkpoint().await.unwrap();
        is_sound(&rig).await;
    });
}

/// A large discard is believed at once: a leaf below it that is damaged must not be in the way of everything else.
#[test]
fn a_damaged_leaf_can_be_discarded() {
    run(1, async |host| {
        let mut rig = Rig::new(&host, "(size 64M)", &[], DISK).await;
        rig.fill(0, 4, 1).await.unwrap();
        rig.fill(600, 4, 2).await.unwrap();
        rig.checkpoint().await.unwrap();
        for at in rig.leaf(1).await {
            rig.damage(at * BLOCK + 4096).await;
        }
        rig.reopen().await;
        rig.disk.op(Op::Discard, 512 * BLOCK, 4096 * BLOCK).await.unwrap();
        rig.checkpoint().await.unwrap();
        rig.reopen().await;
        assert_eq!([rig.filled(0).await.unwrap(), rig.filled(600).await.unwrap()], [1, 0]);
        rig.fill(600, 4, 3).await.unwrap();
        rig.flush().await.unwrap();
    });
}
