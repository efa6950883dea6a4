//! Reads, fills and changes that meet, each way forced by hand.

use super::*;
use blockmason::testing::run;

const RAM: &str = "(size 1M) (line 4k) (read_ahead 0)";
const MEM: &str = "(type mem) (size 64k)";

#[test]
fn two_readers_of_a_line_make_one_request() {
    run(1, async |host| {
        let (disk, element) = disk(&host, "(size 1M) (line 16k) (read_ahead 0)", MEM).await;
        hold(&[Op::Read]);
        let replies: Vec<_> = (0..5).map(|at| disk.send(Request::read(at * 1000, 3000))).collect();
        settle().await;
        assert_eq!((held(), ranges(Op::Read).len()), (1, 1), "one is on its way");
        hold(&[]);
        let_go();
        for reply in replies {
            assert_eq!(answered(reply).await, [0; 3000]);
        }
        disk.read(0, 16384).await.unwrap();
        assert!(seen().is_empty());
        assert_eq!((number(&element, "misses"), number(&element, "hits")), (5, 1));
        assert_eq!(element.get("hit_ratio").unwrap(), "0.167");
    });
}

#[test]
fn what_all_wait_for_fails_for_all_and_is_tried_again() {
    run(1, async |host| {
        let (disk, _) = disk(&host, RAM, MEM).await;
        fail(&[Op::Read]);
        let replies: Vec<_> = (0..3).map(|_| disk.send(Request::read(0, 512))).collect();
        for reply in replies {
            assert!(reply.await.unwrap().unwrap_err().to_string().contains("it fails for a test"));
        }
        fail(&[]);
        assert_eq!(disk.read(0, 512).await.unwrap(), [0; 512]);
    });
}

/// A fill has read what was there before; what has changed it is answered; only then the fill ends.
#[test]
fn a_fill_that_a_change_has_overtaken_is_not_kept() {
    for op in [Op::Write, Op::WriteZeroes, Op::Discard] {
        for cache in [RAM, "(size 1M) (line 4k) (read_ahead 0) (mode write_back) (lossy yes)"] {
            run(1, async |host| {
                let (disk, element) = disk(&host, cache, MEM).await;
                disk.write(0, &[1; 4096]).await.unwrap();
                disk.op(Op::Flush, 0, 0).await.unwrap();
                // Nothing of it is in the cache any more.
                forget(&element);
                hold(&[Op::Read]);
                let fill = disk.send(Request::read(0, 4096));
                settle().await;
                assert_eq!(held(), 1);
                let mut req = Request::new(op, 1024, 512);
                if op == Op::Write {
                    req.data = Data::copy_of(&[2; 512]);
                }
                disk.submit(req).await.unwrap();
                hold(&[]);
                let_go();
                answered(fill).await;
                let byte = if op == Op::Write { 2 } else { 0 };
                let found = disk.read(0, 4096).await.unwrap();
                assert!(found[..1024] == [1; 1024] && found[1024..1536] == [byte; 512], "{op}, {cache}");
                disk.op(Op::Flush, 0, 0).await.unwrap();
                forget(&element);
                let found = disk.read(0, 4096).await.unwrap();
                assert!(found[1024..1536] == [byte; 512], "{op} below, {cache}");
            });
        }
    }
}

/// Forgets all that is below already.
fn forget(element: &Arc<dyn Element>) {
    let cache = cache_of(element);
    cache.lines().clear();
    cache.update(|journal| {
        let standing = std::mem::replace(&mut journal.standing, Standing::Passing);
        assert!(journal.pass(), "something is not below");
        journal.passed();
        journal.standing = standing;
    });
}

/// Whoever comes after a change was answered does not join a read that began before it.
#[test]
fn a_late_reader_joins_no_early_fill() {
    run(1, async |host| {
        let (disk, _) = disk(&host, RAM, MEM).await;
        hold(&[Op::Read]);
        let early = disk.send(Request::read(0, 4096));
        settle().await;
        disk.write(0, &[9; 4096]).await.unwrap();
        let late = disk.send(Request::read(0, 4096));
        settle().await;
        hold(&[]);
        let_go();
        assert_eq!(answered(late).await, [9; 4096]);
        answered(early).await;
    });
}

/// A fill begins while a change is below, and ends before it: nobody knows whether it has seen it.
#[test]
fn a_fill_during_a_change_is_not_kept() {
    run(1, async |host| {
        let (disk, _) = disk(&host, RAM, MEM).await;
        hold(&[Op::Write]);
        let write = disk.send(Request::write(512, Data::copy_of(&[3; 100])));
        settle().await;
        disk.read(0, 4096).await.unwrap();
        seen();
        disk.read(0, 4096).await.unwrap();
        assert_eq!(ranges(Op::Read).len(), 1, "the first was not kept");
        let_go();
        write.await.unwrap().unwrap();
        assert_eq!(disk.read(512, 100).await.unwrap(), [3; 100]);
    });
}

/// Two changes of one place are below at once, and are answered in the other order.
#[test]
fn what_two_changes_have_left_is_read_from_below() {
    run(1, async |host| {
        let (disk, _) = disk(&host, RAM, MEM).await;
        hold(&[Op::Write]);
        let first = disk.send(Request::write(0, Data::copy_of(&[1; 4096])));
        settle().await;
        let held_first = WATCHING.with_borrow_mut(|watching| std::mem::take(&mut watching.held));
        let second = disk.send(Request::write(0, Data::copy_of(&[2; 4096])));
        settle().await;
        let_go();
        second.await.unwrap().unwrap();
        held_first.into_iter().for_each(|held| held.send(()).unwrap());
        first.await.unwrap().unwrap();
        assert_eq!(disk.read(0, 4096).await.unwrap(), [2; 4096], "the disk below had the second one last");
    });
}

/// A change of more lines than are looked at one by one.
#[test]
fn a_change_of_everything_leaves_nothing() {
    run(1, async |host| {
        let (disk, element) = disk(&host, RAM, "(type mem) (size 64M)").await;
        disk.write(0, &[5; 8192]).await.unwrap();
        disk.write(60 << 20, &[5; 8192]).await.unwrap();
        assert_eq!(number(&element, "used"), 16384);
        hold(&[Op::Read, Op::WriteZeroes]);
        let fill = disk.send(Request::read(1 << 20, 4096));
        let zeroes = disk.send(Request::new(Op::WriteZeroes, 0, 64 << 20));
        settle().await;
        assert_eq!(held(), 2);
        let_go();
        answered(fill).await;
        zeroes.await.unwrap().unwrap();
        assert_eq!(number(&element, "used"), 0);
        hold(&[]);
        assert_eq!(disk.read(60 << 20, 8192).await.unwrap(), [0; 8192]);
        disk.write(0, &[6; 4096]).await.unwrap();
        seen();
        assert_eq!(disk.read(0, 4096).await.unwrap(), [6; 4096]);
        assert!(seen().is_empty(), "it is kept again");
    });
}

/// A line is filled while a part of it is only in the journal: that part is not valid in the line when it has left the journal.
#[test]
fn a_fill_keeps_nothing_of_what_is_newer_in_the_journal() {
    run(1, async |host| {
        let cache = "(size 1M) (line 4k) (read_ahead 0) (mode write_back) (lossy yes)";
        let (disk, element) = disk(&host, cache, MEM).await;
        disk.write(1024, &[1; 1000]).await.unwrap();
        let whole = [vec![0; 1024], vec![1; 1000], vec![0; 2072]].concat();
        assert!(disk.read(0, 4096).await.unwrap() == whole);
        assert_eq!(number(&element, "used") & !4095, 4096, "the line is kept");
        disk.op(Op::Flush, 0, 0).await.unwrap();
        cache_of(&element).update(Journal::forget_cleaned);
        assert!(disk.read(0, 4096).await.unwrap() == whole);
    });
}
