//! Copying a disk that stands still: nothing is held, and everything is flushed at the end.

use super::SIZE;
use super::world::{Moving, bytes, fresh, parked, pass, release, set, world};
use blockmason::testing::run;
use blockmason::{Op, Ops};
use std::ops::Range;

/// The base of an overlay, of which a copier without holds makes a copy on a disk that answers by hand.
const FROZEN: &str = "element W (type cow) (block 4k) element Old (type slow) (size 300000)
    element O (type mem) (size 1M) element New (type hand) (size 300000)
    element C (type copy) (frozen yes) (chunk 64k)
    (W, base) -> Old (W, overlay) -> O (C, from) -> Old (C, to) -> New";

#[test]
fn no_guest_waits_for_the_copy_of_a_disk_that_stands_still() {
    run(1, async |host| {
        fresh(Ops::ALL);
        set("Old", vec![1; SIZE as usize]);
        let moving = Moving::new(&host, FROZEN, "W").await;
        let on_its_way =
            |(_, _, op, range): &(String, usize, Op, Range<u64>)| *op == Op::Write && range.start == 0;
        while !parked().iter().any(on_its_way) {
            pass(1).await;
        }
        // Both on what is on its way to the copy.
        assert_eq!(moving.disk.read(0, 4096).await.unwrap(), vec![1; 4096]);
        moving.disk.write(100, &[2; 5000]).await.unwrap();
        assert_eq!(moving.disk.read(4096, 512).await.unwrap(), vec![2; 512]);
        assert!(!world(|world| world.seen.iter().any(|(disk, op, _)| disk == "New" && *op == Op::Flush)));
        while moving.get("state") != "clean" {
            parked().first().into_iter().for_each(|(disk, ix, ..)| release(disk, *ix, true));
            pass(1).await;
        }
        assert!(bytes("New") == vec![1; SIZE as usize], "it has what was there before");
        let flushed: Vec<_> = world(|world| {
            let flushes = world.seen.iter().filter(|(_, op, _)| *op == Op::Flush);
            flushes.map(|(disk, ..)| disk.clone()).collect()
        });
        assert_eq!(flushed, ["New", "Old"]);
        assert_eq!((moving.number("copied"), moving.number("under_way")), (SIZE, 0));
    });
}

#[test]
fn what_no_backup_has_frozen_is_not_called_copied() {
    run(1, async |host| {
        fresh(Ops::ALL);
        let text = "element L (type log_dirty) (written dirty) element Old (type slow) (size 300000)
            element New (type slow) (size 300000) element C (type copy) (frozen yes) (only L)
            L -> Old (C, from) -> Old (C, to) -> New";
        let moving = Moving::new(&host, text, "L").await;
        moving.until("waiting").await;
        assert!(moving.get("error").contains("no backup has frozen"), "{}", moving.get("error"));
    });
}
