//! Volumes are put in order while guests use them: what chance would hardly find. Chance is in the stories of crashes.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::BLOCK;
use super::super::open::{Opening, open_newest};
use super::super::tidy::{Tidied, Tidying};
use super::super::volume::Volume;
use super::rig::{Rig, failure};
use blockmason::testing::run;
use blockmason::{Answer, Data, Host, Kind, Op, Reply, Request, Result};
use futures::executor::block_on;
use serde_json::{Value, json};
use std::os::fd::AsFd;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Blocks of a leaf.
const LEAF: u64 = 512;

impl Volume {
    /// Puts all of it in order.
    pub(in super::super) async fn tidy_all(&self, order: &str, below: Below<'_>) -> Reply {
        let order = match order {
            "holes" => Tidying::Holes,
            order => Tidying::Rows { unshare: order == "unshare" },
        };
        let (mut next, mut all) = (Some(0), Tidied::default());
        while let Some(offset) = next {
            let (done, on) = self.tidy(offset, order, below).await?;
            all += done;
            next = on;
            blockmason::rt::pass().await;
        }
        Ok(Answer::Text(serde_json::to_string(&all).unwrap()))
    }
}

/// Two leaves, each block of which has its neighbours elsewhere, in trees.
async fn aged(host: &Arc<Host>, volume: &str, byte: u8) -> Rig {
    let rig =
        Rig::new(host, &format!("(size 4M) {volume}"), &["H (type hold)"], "(type mem) (size 64M)").await;
    for block in (0..2 * LEAF).step_by(2).chain((1..2 * LEAF).step_by(2)) {
        rig.fill(block, 1, byte).await.unwrap();
    }
    rig.checkpoint().await.unwrap();
    rig
}

fn said(reply: Reply) -> Result<Value> {
    match reply? {
        Answer::Text(text) => Ok(serde_json::from_str(&text).unwrap()),
        other => panic!("{other:?}"),
    }
}

async fn tidy(rig: &Rig, order: &str) -> Value {
    said(rig.control("tidy", order).await.unwrap()).unwrap()
}

/// Where a block is in the pool.
async fn place(rig: &Rig, block: u64) -> u64 {
    rig.look(|pool, below| {
        let number = pool.core().volume("v").unwrap();
        let volume = Volume::new(pool.clone(), number);
        block_on(volume.find(block..block + 1, 1, false, below)).unwrap().0[0].at
    })
    .await
}

/// Where the log goes on.
async fn head(rig: &Rig) -> u64 {
    rig.look(|pool, _| {
        let core = pool.core();
        core.root.log[0] + core.log.head().0
    })
    .await
}

/// Everything that can go on has done so, and so many requests are held.
async fn held(rig: &Rig, count: usize) {
    blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
    assert_eq!(rig.element("H").get("held").unwrap(), count.to_string());
}

/// Another process finds the pool sound, and nothing used that nothing leads to.
async fn sound(rig: &Rig) {
    let image = rig.image().await;
    let (below, size) = (Below::Plain(image.as_fd()), image.metadata().unwrap().len());
    let pool = block_on(open_newest(Opening::writable(1 << 20), size, below)).unwrap();
    assert_eq!(block_on(check(&pool, below)).unwrap().said.all, [] as [String; 0]);
    assert_eq!(pool.space.leaked(&pool.core().journal), [] as [u64; 0]);
}

/// The volume is filled with that, but for those blocks, now and after the process has died, and the pool is sound.
async fn holds(mut rig: Rig, byte: u8, others: &[(u64, u8)]) {
    for again in [false, true] {
        let found = rig.disk.read(0, 2 * LEAF * BLOCK).await.unwrap();
        for (block, found) in (0..).zip(found.chunks(BLOCK as usize)) {
            let other = others.iter().find(|(other, _)| *other == block);
            let expected = other.map_or(byte, |(_, byte)| *byte);
            assert!(
                found.iter().all(|found| *found == expected),
                "block {block} has {}, again {again}",
                found[0]
            );
        }
        sound(&rig).await;
        if !again {
            rig.reopen().await;
        }
    }
    rig.checkpoint().await.unwrap();
    sound(&rig).await;
}

const VOLUMES: [&str; 4] = ["", "(format 2)", "(checksums yes)", "(order prefix)"];

#[test]
fn what_lies_here_and_there_lies_in_a_row() {
    for volume in VOLUMES.into_iter().chain(["(format 2) (checksums yes)"]) {
        run(1, async |host| {
            let rig = aged(&host, volume, 1).await;
            let done = tidy(&rig, "rows").await;
            let windows =
                json!([done["pieces_before"], done["pieces_after"], done["moved_windows"], done["moved"]]);
            assert_eq!(windows, json!([1024, 2, 2, 4 << 20]), "{volume}: {done}");
            assert_eq!(place(&rig, 1023).await, place(&rig, 512).await + 511, "{volume}");
            assert_eq!(place(&rig, 511).await, place(&rig, 0).await + 511, "{volume}");
            let again = tidy(&rig, "rows").await;
            assert_eq!(json!([again["windows"], again["moved"], again["pieces_before"]]), json!([2, 0, 2]));
            holds(rig, 1, &[]).await;
        });
    }
}

#[test]
fn zeros_become_holes() {
    for volume in VOLUMES {
        run(1, async |host| {
            let rig = aged(&host, volume, 0).await;
            rig.fill(7, 2, 3).await.unwrap();
            rig.fill(LEAF, 1, 3).await.unwrap();
            let done = tidy(&rig, "holes").await;
            assert_eq!(done["moved"], (2 * LEAF - 3) * BLOCK, "{volume}: {done}");
            assert_eq!([place(&rig, 0).await, place(&rig, LEAF + 1).await], [0, 0]);
            assert_ne!(place(&rig, 7).await, 0);
            rig.checkpoint().await.unwrap();
            let mapped = rig.look(|pool, _| pool.core().catalog.values().next().unwrap().mapped).await;
            assert_eq!(mapped, 3, "{volume}");
            assert_eq!(tidy(&rig, "holes").await["moved"], 0);
            holds(rig, 0, &[(7, 3), (8, 3), (LEAF, 3)]).await;
        });
    }
}

#[test]
fn what_a_snapshot_sees_stays_where_it_is_unless_that_is_wanted() {
    for (volume, byte) in [("", 1), ("(format 2)", 1), ("(checksums yes)", 0)] {
        run(1, async |host| {
            let rig = aged(&host, volume, byte).await;
            rig.control("snapshot", "s").await.unwrap().unwrap();
            rig.fill(3, 1, 2).await.unwrap();
            for order in ["rows", "holes"] {
                let done = tidy(&rig, order).await;
                assert_eq!(
                    json!([done["moved"], done["shared"]]),
                    json!([0, (2 * LEAF - 1) * BLOCK]),
                    "{done}"
                );
            }
            let done = tidy(&rig, "unshare").await;
            assert_eq!(json!([done["moved"], done["pieces_after"]]), json!([4 << 20, 2]), "{volume}: {done}");
            rig.checkpoint().await.unwrap();
            let snapshot = rig.snapshot("s", 2 * LEAF as usize).await.unwrap();
            assert!(snapshot.iter().all(|found| *found == byte), "{volume}");
            holds(rig, byte, &[(3, 2)]).await;
        });
    }
}

/// A volume that is just being put in order: of its first leaf the last block has not been read yet, all others have.
async fn half_read(rig: &Rig, order: &str) -> oneshot::Receiver<Reply> {
    let last = place(rig, LEAF - 1).await;
    rig.hold(Op::Read, last);
    let tidying = rig.control("tidy", order);
    held(rig, 1).await;
    if order == "holes" {
        // It has been looked at without a window first.
        rig.let_go();
        rig.hold(Op::Read, last);
        held(rig, 1).await;
    }
    tidying
}

/// What is there, and how it is put in order; formats and kinds of volumes in turn.
const ORDERS: [(&str, u8); 2] = [("rows", 1), ("holes", 0)];

fn each(test: impl AsyncFn(&Arc<Host>, &str, &str, u8)) {
    for volume in VOLUMES {
        for (order, byte) in ORDERS {
            run(1, async |host| test(&host, volume, order, byte).await);
        }
    }
}

#[test]
fn what_a_guest_writes_meanwhile_stays() {
    each(async |host, volume, order, byte| {
        let rig = aged(host, volume, byte).await;
        let other = place(&rig, LEAF + 5).await;
        let tidying = half_read(&rig, order).await;
        // Nobody waits for it; and the rest of the volume is written as it always is.
        rig.fill(0, 1, 9).await.unwrap();
        rig.fill(LEAF + 5, 1, 8).await.unwrap();
        let in_place = volume.is_empty() || volume == "(format 2)";
        assert_eq!(place(&rig, LEAF + 5).await == other, in_place, "{volume}");
        rig.fill(100, 3, 7).await.unwrap();
        rig.let_go();
        let done = said(tidying.await.unwrap()).unwrap();
        assert_eq!(done["busy"], 2 * 16 * BLOCK, "{volume}, {order}: {done}");
        holds(rig, byte, &[(0, 9), (LEAF + 5, 8), (100, 7), (101, 7), (102, 7)]).await;
    });
}

#[test]
fn what_is_being_written_in_place_is_waited_for() {
    for (order, byte) in ORDERS {
        run(1, async |host| {
            let rig = aged(&host, "", byte).await;
            rig.hold(Op::Write, place(&rig, 0).await);
            let write = rig.disk.send(Request::write(0, Data::copy_of(&[2; BLOCK as usize])));
            held(&rig, 1).await;
            let mut tidying = rig.control("tidy", order);
            held(&rig, 1).await;
            assert!(tidying.try_recv().is_err(), "it has not waited");
            // Others are not waited for, and do not wait.
            rig.fill(LEAF, 1, 3).await.unwrap();
            rig.let_go();
            write.await.unwrap().unwrap();
            let done = said(tidying.await.unwrap()).unwrap();
            assert_eq!(done["busy"], 0, "{done}");
            holds(rig, byte, &[(0, 2), (LEAF, 3)]).await;
        });
    }
}

/// A snapshot waits for what is written in place, also for that which a move waits for.
#[test]
fn a_snapshot_waits_for_what_a_move_waits_for() {
    run(1, async |host| {
        let rig = aged(&host, "", 1).await;
        rig.hold(Op::Write, place(&rig, 0).await);
        let write = rig.disk.send(Request::write(0, Data::copy_of(&[2; BLOCK as usize])));
        held(&rig, 1).await;
        let tidying = rig.control("tidy", "rows");
        held(&rig, 1).await;
        let mut taken = rig.control("snapshot", "s");
        held(&rig, 1).await;
        assert!(taken.try_recv().is_err(), "it was taken while a block was being written that it sees");
        rig.let_go();
        write.await.unwrap().unwrap();
        taken.await.unwrap().unwrap();
        said(tidying.await.unwrap()).unwrap();
        assert_eq!(rig.snapshot("s", 1).await.unwrap()[0], 2);
        holds(rig, 1, &[(0, 2)]).await;
    });
}

/// The write of a guest and the move are in one record of the log.
#[test]
fn a_move_does_not_come_after_what_stands_before_it_in_its_record() {
    each(async |host, volume, order, byte| {
        let rig = aged(host, volume, byte).await;
        let tidying = half_read(&rig, order).await;
        rig.hold(Op::Write, head(&rig).await);
        let fill = |block: u64, byte| {
            rig.disk.send(Request::write(block * BLOCK, Data::copy_of(&[byte; BLOCK as usize])))
        };
        let first = fill(20, 4);
        held(&rig, 2).await;
        let second = fill(40, 5);
        held(&rig, 2).await;
        // The read, then the record: what has come meanwhile is the next one.
        rig.let_go();
        held(&rig, 1).await;
        rig.let_go();
        for write in [first, second] {
            write.await.unwrap().unwrap();
        }
        let done = said(tidying.await.unwrap()).unwrap();
        assert_eq!(done["busy"], 2 * 16 * BLOCK, "{volume}, {order}: {done}");
        holds(rig, byte, &[(20, 4), (40, 5)]).await;
    });
}

#[test]
fn what_a_snapshot_sees_by_then_stays() {
    each(async |host, volume, order, byte| {
        let rig = aged(host, volume, byte).await;
        let before = place(&rig, 4).await;
        let tidying = half_read(&rig, order).await;
        rig.control("snapshot", "s").await.unwrap().unwrap();
        rig.fill(0, 1, 9).await.unwrap();
        rig.let_go();
        let done = said(tidying.await.unwrap()).unwrap();
        // The other leaf is looked at after the snapshot was taken.
        assert_eq!(
            json!([done["moved"], done["busy"]]),
            json!([0, LEAF * BLOCK]),
            "{volume}, {order}: {done}"
        );
        assert_eq!(place(&rig, 4).await, before);
        let snapshot = rig.snapshot("s", 2 * LEAF as usize).await.unwrap();
        assert!(snapshot.iter().all(|found| *found == byte), "{volume}, {order}");
        holds(rig, byte, &[(0, 9)]).await;
    });
}

#[test]
fn a_checkpoint_does_not_matter() {
    each(async |host, volume, order, byte| {
        let rig = aged(host, volume, byte).await;
        rig.fill(30, 1, 6).await.unwrap();
        let tidying = half_read(&rig, order).await;
        rig.fill(0, 1, 9).await.unwrap();
        for _ in 0..3 {
            rig.checkpoint().await.unwrap();
        }
        rig.fill(16, 1, 8).await.unwrap();
        rig.let_go();
        let done = said(tidying.await.unwrap()).unwrap();
        assert_eq!(done["busy"], if order == "rows" { 32 } else { 30 } * BLOCK, "{volume}, {order}: {done}");
        holds(rig, byte, &[(0, 9), (16, 8), (30, 6)]).await;
    });
}

#[test]
fn what_is_discarded_meanwhile_is_zero() {
    for volume in VOLUMES {
        run(1, async |host| {
            let rig = aged(&host, volume, 1).await;
            let tidying = half_read(&rig, "rows").await;
            rig.disk.op(Op::Discard, 5 * BLOCK, 2 * BLOCK).await.unwrap();
            rig.disk.op(Op::WriteZeroes, 300 * BLOCK, BLOCK).await.unwrap();
            rig.let_go();
            said(tidying.await.unwrap()).unwrap();
            holds(rig, 1, &[(5, 0), (6, 0), (300, 0)]).await;
        });
    }
}

#[test]
fn it_is_done_once_at_a_time_and_the_end_of_one_does_not_matter() {
    run(1, async |host| {
        let mut rig = aged(&host, "", 1).await;
        let first = half_read(&rig, "rows").await;
        let second = said(rig.control("tidy", "rows").await.unwrap());
        assert_eq!(failure(second).kind(), Kind::Busy);
        // Its process dies.
        rig.reopen().await;
        drop(first);
        assert_eq!(tidy(&rig, "rows").await["pieces_after"], 2);
        holds(rig, 1, &[]).await;
    });
}

#[test]
fn what_is_damaged_is_named_and_stays() {
    run(1, async |host| {
        let rig = aged(&host, "(checksums yes)", 1).await;
        let at = place(&rig, 9).await;
        rig.damage(at * BLOCK + 77).await;
        let done = tidy(&rig, "rows").await;
        assert_eq!(json!([done["damaged"], done["pieces_after"]]), json!([[9 * BLOCK], 4]), "{done}");
        assert_eq!(place(&rig, 9).await, at);
        assert!(rig.filled(9).await.is_err(), "a wrong block has got a checksum");
        rig.fill(9, 1, 1).await.unwrap();
        holds(rig, 1, &[]).await;
    });
}

/// Blocks that are written in place need no room, however full the pool is; nor do they while it is put in order.
#[test]
fn guests_do_not_run_out_of_room_by_it() {
    for (seed, volume) in [(1, ""), (2, "(format 2)"), (3, "")] {
        run(seed, async |host| {
            let (size, volume) = (if seed == 2 { 56 } else { 36 }, format!("(size 64M) {volume}"));
            let rig = Rig::new(&host, &volume, &[], &format!("(type mem) (size {size}M)")).await;
            let leaves = 6;
            for block in (0..leaves * LEAF).step_by(2).chain((1..leaves * LEAF).step_by(2)) {
                rig.fill(block, 1, 1).await.unwrap();
            }
            rig.checkpoint().await.unwrap();
            let tidied = tidy(&rig, "rows").await;
            assert_eq!(tidied["pieces_after"], leaves, "{tidied}");
            // The rest of the pool is filled.
            let mut at = leaves;
            while rig.fill(at * LEAF, LEAF / 4, 2).await.is_ok() {
                at += 1;
            }
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = vec![1; (leaves * LEAF) as usize];
            for _ in 0..20 {
                rig.checkpoint().await.unwrap();
                let tidying = rig.control("tidy", "unshare");
                for _ in 0..40 {
                    let (block, byte) = (rng.u64(0..leaves * LEAF), rng.u8(1..));
                    rig.fill(block, 1, byte).await.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                    model[block as usize] = byte;
                }
                let done = said(tidying.await.unwrap()).unwrap();
                assert_eq!(done["damaged"], json!([]));
            }
            for (block, byte) in (0..).zip(model) {
                assert_eq!(rig.filled(block).await.unwrap(), byte, "block {block}");
            }
            sound(&rig).await;
        });
    }
}
