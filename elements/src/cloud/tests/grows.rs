//! Volumes that become larger.

use super::*;
use crate::cloud::backup::points::Keep;
use crate::cloud::backup::{By, back_up, restore};
use crate::cloud::found::{Reasons, Seen};
use crate::cloud::grow::grow;
use blockmason::Kind;

async fn fill(volume: &Arc<Volume>, byte: u8) {
    let size = volume.state().size;
    volume.clone().serve(write(0, &vec![byte; size as usize], Origin::Guest)).await.unwrap();
}

async fn all(volume: &Arc<Volume>) -> Vec<u8> {
    let size = volume.state().size;
    let read = volume.clone().serve(Request::read(0, size)).await;
    read.unwrap().into_data().unwrap().to_vec()
}

/// Everything that is there belongs there, and is as long as it should be.
async fn sound(bucket: &Bucket) {
    let mut reasons = Reasons::of(bucket).await.unwrap();
    let mut seen = Seen::list(bucket, &reasons).await.unwrap();
    reasons.problems.append(&mut seen.problems);
    assert_eq!((reasons.problems, seen.stray), (Vec::new(), Vec::new()));
}

#[test]
fn what_is_new_reads_as_zeros_and_the_last_block_is_as_long_as_the_others() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        fill(&volume, 1).await;
        open::close(&volume, Duration::from_secs(60)).await.unwrap();
        let mut expected = vec![1; SIZE as usize];
        // Within the block, to its end, beyond it, to another part of the map, nowhere.
        let sizes = [SIZE + 5, 13 * BLOCK, 20 * BLOCK + 1, 20_000 * BLOCK + 7, 20_000 * BLOCK + 7];
        for (number, size) in (2..).zip(sizes) {
            let volume = open(&memory, opening("a")).await.unwrap();
            // Something of the last block waits for its object; so it does after a crash.
            let last = volume.state().size - 1;
            volume.clone().serve(write(last, &[number], Origin::Guest)).await.unwrap();
            expected[last as usize] = number;
            grow(&volume, size).await.unwrap();
            expected.resize(size as usize, 0);
            assert!(all(&volume).await == expected, "{size}");
            open::close(&volume, Duration::from_secs(60)).await.unwrap();
            sound(&bucket(&memory)).await;
            let again = open(&memory, opening("b")).await.unwrap();
            assert!(all(&again).await == expected, "{size}, opened again");
            // The last bytes, and what is written across the old end.
            for (offset, len) in [(size - 3, 3), (SIZE - 2, 4)] {
                let bytes = vec![number; len as usize];
                again.clone().serve(write(offset, &bytes, Origin::Guest)).await.unwrap();
                expected[offset as usize..][..len as usize].fill(number);
            }
            open::close(&again, Duration::from_secs(60)).await.unwrap();
            let third = open(&memory, opening("a")).await.unwrap();
            assert!(all(&third).await == expected, "{size}, written");
            open::close(&third, Duration::from_secs(60)).await.unwrap();
        }
    });
}

#[test]
fn it_never_becomes_smaller() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        fill(&volume, 1).await;
        for size in [0, 1, SIZE - 1, u64::MAX] {
            assert_eq!(grow(&volume, size).await.unwrap_err().kind(), Kind::Invalid, "{size}");
        }
        assert_eq!(all(&volume).await, vec![1; SIZE as usize]);
    });
}

#[test]
fn a_crash_before_the_checkpoint_leaves_the_old_disk() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        fill(&volume, 1).await;
        open::close(&volume, Duration::from_secs(60)).await.unwrap();
        let size = 20_000 * BLOCK;
        for place in ["b/", "part/", "map/"] {
            let memory = memory.copy();
            let volume = open(&memory, opening("a")).await.unwrap();
            memory.hold(move |what, key| what == "put" && key.starts_with(&format!("some/disk/{place}")));
            tokio::spawn(async move { grow(&volume, size).await });
            memory.held(1).await;
            // What has arrived by then; whoever was at it is not heard of any more.
            let memory = memory.copy();
            let volume = open(&memory, opening("a")).await.unwrap();
            // The checkpoint, which is the last of them, is what counts.
            let mut expected = vec![1; SIZE as usize];
            assert!(all(&volume).await == expected, "{place}");
            grow(&volume, size).await.unwrap();
            expected.resize(size as usize, 0);
            assert!(all(&volume).await == expected, "{place}");
        }
    });
}

#[test]
fn a_backup_has_points_of_each_size() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let backup = Bucket::new(Arc::new(memory.clone()), "backup/", None);
        let make = async || {
            back_up(&bucket(&memory), &backup, Keep::default(), By::default(), &|_, _| {}).await.unwrap()
        };
        let volume = open(&memory, opening("a")).await.unwrap();
        fill(&volume, 1).await;
        volume.settle().await.unwrap();
        make().await;
        grow(&volume, 2 * SIZE).await.unwrap();
        make().await;
        sound(&backup).await;
        for (point, size) in [(1, SIZE), (2, 2 * SIZE)] {
            let place = Bucket::new(Arc::new(memory.clone()), &format!("new{point}/"), None);
            restore(&backup, &place, Some(point), Claim::default(), true, &|_, _| {}).await.unwrap();
            let volume = open::open(place, opening("x"), Arc::new(|_: &str| {})).await.unwrap();
            let mut expected = vec![1; SIZE as usize];
            expected.resize(size as usize, 0);
            assert_eq!(all(&volume).await, expected, "{point}");
        }
    });
}
