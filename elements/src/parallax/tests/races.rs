//! Orders of events that chance would hardly find: one request of the pool is held until the others are done, or the
//! power is lost at one instant.

use super::super::format::{BLOCK, Body};
use super::super::nodes::{Place, Tree};
use super::rig::Rig;
use blockmason::testing::run;
use blockmason::{Data, Op, Request};
use futures::executor::block_on;

const DISK: &str = "(type mem) (size 36M)";

/// Both copies of a node, as they are on the disk.
async fn copies(rig: &Rig, places: [u64; 2]) -> [Vec<u8>; 2] {
    let copy = async |at: u64| rig.below.read(at * BLOCK, 2 * BLOCK).await.unwrap();
    [copy(places[0]).await, copy(places[1]).await]
}

/// Writes something to a new place, and brings it into the tree: the leaf goes to a new place, too.
async fn move_leaf(rig: &Rig, round: u64) {
    let byte = (round % 200) as u8 + 2;
    rig.disk.op(Op::Discard, 0, BLOCK).await.unwrap();
    rig.fill(0, 1, byte).await.unwrap();
    rig.fill(1 + round, 1, byte).await.unwrap();
    rig.checkpoint().await.unwrap();
}

/// A leaf is being read while checkpoints give it up and want its blocks for something else.
#[test]
fn a_node_that_is_being_read_is_not_given_away() {
    run(1, async |host| {
        // One node is kept in memory: that of the catalog, which is written last.
        let rig = Rig::new(&host, "(size 2M) (memory 12k)", &["H (type hold)"], DISK).await;
        rig.fill(0, 1, 1).await.unwrap();
        rig.checkpoint().await.unwrap();
        let places = rig.leaf(0).await;
        let before = copies(&rig, places).await;
        rig.hold(Op::Read, places[0]);
        let read = rig.disk.send(Request::read(0, BLOCK));
        rig.stands().await;
        for round in 0..8 {
            move_leaf(&rig, round).await;
            assert_ne!(rig.leaf(0).await, places, "the leaf has not moved");
            assert!(copies(&rig, places).await == before, "round {round}: its blocks have been given away");
        }
        rig.stands().await;
        rig.let_go();
        let found = read.await.unwrap().unwrap().into_data().unwrap().to_vec();
        assert!((1..=9).contains(&found[0]) && found.iter().all(|byte| *byte == found[0]), "{}", found[0]);
        // Now that nobody reads it, it would have been.
        let mut given = false;
        for round in 8..16 {
            move_leaf(&rig, round).await;
            given |= copies(&rig, places).await != before;
        }
        assert!(given, "nobody has wanted its blocks: this test shows nothing");
    });
}

/// The block of the pool in which the first block of the volume is.
async fn data_of_first(rig: &Rig) -> u64 {
    rig.look(|pool, below| {
        let number = pool.core().volume("v").unwrap();
        let ptr = pool.core().catalog[&number].root;
        let place = Place { tree: Tree::Volume(pool.format), ptr, level: 0, index: 0 };
        match &block_on(pool.nodes.get(&place, below)).unwrap().body {
            Body::Leaf(slots) => slots[0].at,
            _ => panic!("a leaf was expected"),
        }
    })
    .await
}

/// A block is being written in place when a snapshot is asked for, which sees that block: it must not change later.
#[test]
fn a_snapshot_is_not_taken_before_what_is_written_in_place_is() {
    run(1, async |host| {
        let rig = Rig::new(&host, "(size 2M)", &["H (type hold)"], DISK).await;
        rig.fill(0, 2, 1).await.unwrap();
        rig.checkpoint().await.unwrap();
        rig.hold(Op::Write, data_of_first(&rig).await);
        let write = rig.disk.send(Request::write(0, Data::copy_of(&[2; BLOCK as usize])));
        rig.stands().await;
        let mut taken = rig.control("snapshot", "s");
        rig.stands().await;
        let early = taken.try_recv().is_ok();
        let first = rig.snapshot("s", 512).await;
        // Nobody waits for it meanwhile.
        rig.fill(1, 1, 3).await.unwrap();
        rig.fill(100, 1, 3).await.unwrap();
        rig.let_go();
        write.await.unwrap().unwrap();
        if !early {
            taken.await.unwrap().unwrap();
        }
        let second = rig.snapshot("s", 512).await.unwrap();
        assert!(first.is_none_or(|first| first == second), "the snapshot has changed");
        assert!(!early, "it was taken while a block was being written that it sees");
        assert_eq!(second[0], 2, "what was under way when it was asked for is in it: it waited for that");
        // What is written after the answer is not.
        rig.fill(0, 512, 4).await.unwrap();
        rig.checkpoint().await.unwrap();
        assert!(rig.snapshot("s", 512).await.unwrap() == second, "the snapshot has changed");
        assert_eq!(rig.filled(0).await.unwrap(), 4);
    });
}

/// The power is lost at the instant at which something has been answered.
#[test]
fn what_is_answered_as_durable_is() {
    for seed in 0..6 {
        run(seed, async |host| {
            let disk = format!("(type volatile) (size 36M) (seed {seed})");
            let mut rig = Rig::new(&host, "(size 2M)", &[], &disk).await;
            rig.fill(0, 300, 1).await.unwrap();
            rig.control("snapshot", "s").await.unwrap().unwrap();
            rig.lose_power();
            let found = rig.snapshot("s", 512).await.unwrap_or_else(|| panic!("seed {seed}: it is gone"));
            assert!(found[..300 << 12].iter().all(|byte| *byte == 1), "seed {seed}: it has something else");
            rig.reopen().await;
            rig.fill(0, 300, 2).await.unwrap();
            rig.checkpoint().await.unwrap();
            rig.lose_power();
            rig.reopen().await;
            assert_eq!([rig.filled(0).await.unwrap(), rig.filled(299).await.unwrap()], [2, 2], "seed {seed}");
            assert!(rig.snapshot("s", 512).await.unwrap() == found, "seed {seed}: the snapshot has changed");
        });
    }
}

/// The graph ends while the room of a snapshot that was deleted comes back, step by step with pauses.
#[test]
fn a_graph_ends_at_any_moment_of_a_deletion() {
    for ms in (4700..5100).step_by(4) {
        run(ms, async |host| {
            let rig = Rig::new(&host, "(size 8M)", &["T (type delay) (all 1ms)"], DISK).await;
            rig.fill(0, 2000, 1).await.unwrap();
            rig.control("snapshot", "s").await.unwrap().unwrap();
            for block in (0..2000).step_by(100) {
                rig.fill(block, 1, 2).await.unwrap();
            }
            rig.checkpoint().await.unwrap();
            rig.control("delete_snapshot", "s").await.unwrap().unwrap();
            blockmason::rt::sleep(std::time::Duration::from_millis(ms)).await;
            assert!(rig.stop().await, "{ms} ms");
        });
    }
}
