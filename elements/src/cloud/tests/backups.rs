//! Backups of a volume that is written meanwhile, in a store that fails.

use super::*;
use crate::cloud::backup::points::Keep;
use crate::cloud::backup::{By, Copied, Pruned, back_up, list, prune, restore};
use crate::cloud::testing::Odds;
use blockmason::Kind;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

fn below(memory: &Memory, prefix: &str) -> Bucket {
    Bucket::new(Arc::new(memory.clone()), prefix, Some(Duration::from_secs(3600)))
}

async fn back(memory: &Memory) -> Result<Copied> {
    back_keeping(memory, 1).await
}

async fn back_keeping(memory: &Memory, last: u32) -> Result<Copied> {
    let keep = Keep { last: Some(last), ..Keep::default() };
    back_up(&bucket(memory), &below(memory, "backup/"), keep, By::default(), &|_, _| {}).await
}

/// What a volume has that is made of the newest point.
async fn restored(memory: &Memory) -> Vec<u8> {
    restored_at(memory, None).await
}

/// What a volume has that is made of a point.
async fn restored_at(memory: &Memory, point: Option<u64>) -> Vec<u8> {
    let memory = memory.copy();
    memory.set_odds(Odds::default());
    memory.release();
    let (from, to) = (below(&memory, "backup/"), below(&memory, "new/"));
    restore(&from, &to, point, Claim::default(), true, &|_, _| {}).await.unwrap();
    // On any host.
    let volume =
        open::open(below(&memory, "new/"), opening("elsewhere"), Arc::new(|_: &str| {})).await.unwrap();
    tokio::spawn(keeper::keep(volume.clone()));
    let found = read_all(&volume).await;
    // It can be written, and nothing of its past is in the way.
    volume.clone().serve(write(0, &[77; 5000], Origin::Guest)).await.unwrap();
    volume.settle().await.unwrap();
    open::close(&volume, Duration::from_secs(60)).await.unwrap();
    let again = open::open(below(&memory, "new/"), opening("again"), Arc::new(|_: &str| {})).await.unwrap();
    let expected = [&[77; 5000], &found[5000..]].concat();
    assert_eq!(read_all(&again).await, expected);
    found
}

async fn put(volume: &Arc<Volume>, offset: u64, byte: u8, len: u64) {
    volume.clone().serve(write(offset, &vec![byte; len as usize], Origin::Guest)).await.unwrap();
}

#[test]
fn the_second_backup_copies_what_has_changed_and_deletes_what_it_replaces() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let error = back(&memory).await.unwrap_err();
        assert!(error.to_string().contains("nobody has opened"), "{error}");
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        volume.settle().await.unwrap();
        let first = back(&memory).await.unwrap();
        // The number of the one that failed is not used again.
        assert_eq!((first.point, first.kept, first.pruned), (2, 0, Pruned::default()));
        // 13 blocks, a part, the checkpoint.
        assert_eq!(first.objects, 15);
        assert_eq!(restored(&memory).await, vec![1; SIZE as usize]);

        put(&volume, BLOCK, 2, BLOCK).await;
        put(&volume, 10, 3, 1).await;
        let second = back(&memory).await.unwrap();
        // The block and the two commits; nothing has been replaced yet but the point, which has gone itself.
        let pruned = Pruned { points: vec![2], ..Pruned::default() };
        let expected =
            Copied { point: 3, objects: 3, bytes: second.bytes, kept: 14, pruned, problems: vec![] };
        assert_eq!(second, expected);
        volume.settle().await.unwrap();
        let third = back(&memory).await.unwrap();
        // A block, the part, the checkpoint. Of the block that was written whole there is the object.
        assert_eq!((third.objects, third.kept), (3, 12), "{third:?}");
        // Two blocks, the part, the checkpoint, two commits.
        assert_eq!(third.pruned.objects, 6);
        let mut expected = vec![1; SIZE as usize];
        expected[BLOCK as usize..2 * BLOCK as usize].fill(2);
        expected[10] = 3;
        assert_eq!(restored(&memory).await, expected);
        assert_eq!(back(&memory).await.unwrap().objects, 0);
    });
}

#[test]
fn what_goes_while_it_is_copied_is_copied_as_it_is_then() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        volume.settle().await.unwrap();
        for held in ["some/disk/b/", "some/disk/part/", "some/disk/map/"] {
            memory.hold(move |what, key| what == "get" && key.starts_with(held));
            let copying = tokio::spawn({
                let memory = memory.clone();
                async move { back(&memory).await }
            });
            memory.held(1).await;
            // Written whole, so that the owner reads nothing of what is held.
            put(&volume, 0, 2, SIZE).await;
            volume.settle().await.unwrap();
            memory.release();
            copying.await.unwrap().unwrap();
            assert_eq!(restored(&memory).await, vec![2; SIZE as usize], "{held}");
        }
    });
}

#[test]
fn commits_that_go_between_their_checkpoint_and_their_reading_are_not_missed() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, 10).await;
        volume.settle().await.unwrap();
        put(&volume, 0, 2, 10).await;
        // The checkpoint has been read, the commit has not: what was durable before must be in the backup.
        memory.hold(|what, key| what == "get" && key.starts_with("some/disk/wal/"));
        let copying = tokio::spawn({
            let memory = memory.clone();
            async move { back(&memory).await }
        });
        memory.held(1).await;
        volume.settle().await.unwrap();
        memory.release();
        copying.await.unwrap().unwrap();
        assert_eq!(restored(&memory).await[..10], [2; 10]);
    });
}

#[test]
fn a_backup_that_breaks_off_leaves_the_one_before() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        volume.settle().await.unwrap();
        // Broken off before it was ever complete: it is nothing.
        memory.hold(|what, key| what == "put" && key.starts_with("backup/map/"));
        let broken = tokio::spawn({
            let memory = memory.clone();
            async move { back(&memory).await }
        });
        memory.held(1).await;
        let error = restore(
            &below(&memory, "backup/"),
            &below(&memory, "x/"),
            None,
            Claim::default(),
            true,
            &|_, _| {},
        )
        .await
        .unwrap_err();
        assert!(error.to_string().contains("never completed"), "{error}");
        broken.abort();
        memory.release();
        back(&memory).await.unwrap();
        for place in ["backup/b/", "backup/part/", "backup/wal/", "backup/map/", "backup/point/"] {
            let before = restored(&memory).await;
            put(&volume, 0, before[0] + 1, SIZE).await;
            if place != "backup/wal/" {
                volume.settle().await.unwrap();
            } else {
                put(&volume, 5, 99, 1).await;
            }
            memory.hold(move |what, key| what == "put" && key.starts_with(place));
            let broken = tokio::spawn({
                let memory = memory.clone();
                async move { back(&memory).await }
            });
            memory.held(1).await;
            broken.abort();
            memory.release();
            assert_eq!(restored(&memory).await, before, "{place}");
            back(&memory).await.unwrap();
            assert_eq!(restored(&memory).await, read_all(&volume).await, "{place}");
        }
    });
}

#[test]
fn what_is_not_meant_is_refused() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        back(&memory).await.unwrap();
        let (disk, backup) = (bucket(&memory), below(&memory, "backup/"));
        let says = |result: Result<Copied>, what: &str| {
            let error = result.unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        };
        let restore_to = async |from: &Bucket, to: &str| {
            let to = below(&memory, to);
            restore(from, &to, None, Claim::default(), true, &|_, _| {}).await.map(|_| Copied::default())
        };
        let to = async |from: &Bucket, to: &Bucket| {
            back_up(from, to, Keep::default(), By::default(), &|_, _| {}).await
        };
        says(to(&disk, &disk).await, "a volume already");
        says(restore_to(&disk, "x/").await, "no backup");
        says(restore_to(&backup, "backup/").await, "a backup already");
        says(restore_to(&backup, "some/disk/").await, "a volume already");
        let other = open::create(&below(&memory, "other/"), SIZE, BLOCK, true).await.unwrap();
        let opened =
            open::open(below(&memory, "other/"), opening("a"), Arc::new(|_: &str| {})).await.unwrap();
        drop(opened);
        says(to(&below(&memory, "other/"), &backup).await, &other.id);
        let error = open::create(&backup, SIZE, BLOCK, true).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        let opened = open::open(below(&memory, "backup/"), opening("a"), Arc::new(|_: &str| {})).await;
        let error = opened.err().unwrap();
        assert!(error.to_string().contains("`mason bucket restore`"), "{error}");
        // A restore that breaks off leaves no volume, and nothing that the next one takes for its own.
        memory.hold(|what, key| what == "put" && key.starts_with("y/map/"));
        let broken = tokio::spawn({
            let memory = memory.clone();
            async move {
                let (from, to) = (below(&memory, "backup/"), below(&memory, "y/"));
                restore(&from, &to, None, Claim::default(), true, &|_, _| {}).await
            }
        });
        memory.held(1).await;
        broken.abort();
        memory.release();
        says(restore_to(&backup, "y/").await, "did not end");
        let opened = open::open(below(&memory, "y/"), opening("a"), Arc::new(|_: &str| {})).await;
        assert!(opened.is_err());
        // A backup with a hole says so.
        let block = memory.keys().into_iter().find(|key| key.starts_with("backup/b/")).unwrap();
        memory.remove(&block);
        says(restore_to(&backup, "z/").await, "missing in the backup");
    });
}

/// Names the host that makes a backup.
fn by(machine: &str, take: bool) -> By {
    By { claim: opening(machine).claim, take }
}

#[test]
fn points_stay_whole_until_they_are_pruned() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        let mut states = vec![Vec::new()];
        for byte in 1..=5 {
            put(&volume, u64::from(byte) * BLOCK, byte, BLOCK).await;
            if byte % 2 == 0 {
                volume.settle().await.unwrap();
            }
            let done = back_keeping(&memory, 9).await.unwrap();
            assert_eq!((done.point, done.pruned.points.len()), (u64::from(byte), 0), "{done:?}");
            assert_eq!(done.problems, Vec::<String>::new());
            states.push(read_all(&volume).await);
        }
        for (point, state) in states.iter().enumerate().skip(1) {
            assert_eq!(restored_at(&memory, Some(point as u64)).await, *state, "{point}");
        }
        assert_eq!(restored(&memory).await, states[5]);
        let backup = below(&memory, "backup/");
        // In whole blocks: each has those of the points before it, and one more; none has one of its own, but for the newest.
        let listed = list(&backup).await.unwrap();
        let listed: Vec<_> =
            listed.iter().map(|(point, bytes, own)| (point.number, bytes / BLOCK, own / BLOCK)).collect();
        let expected = [(5, 5, 1), (4, 4, 0), (3, 3, 0), (2, 2, 0), (1, 1, 0)];
        assert_eq!(listed, expected);

        let all = Keep::default();
        let error = prune(&backup, all, &[5], by("a", false), false).await.unwrap_err();
        assert!(error.to_string().contains("newest"), "{error}");
        let error = prune(&backup, all, &[7], by("a", false), false).await.unwrap_err();
        assert!(error.to_string().contains("no point 7"), "{error}");
        let before = memory.keys();
        let dry = prune(&backup, all, &[2, 3], by("a", false), true).await.unwrap();
        assert_eq!((&dry.points[..], memory.keys()), (&[3, 2][..], before));
        assert_eq!(prune(&backup, all, &[2, 3], by("a", false), false).await.unwrap(), dry);
        for point in [1, 4, 5] {
            assert_eq!(restored_at(&memory, Some(point)).await, states[point as usize], "{point}");
        }
        let lost = restore(&backup, &below(&memory, "x/"), Some(2), Claim::default(), true, &|_, _| {}).await;
        assert!(lost.unwrap_err().to_string().contains("no point 2"));
        let last = Keep { last: Some(1), ..Keep::default() };
        let pruned = prune(&backup, last, &[], by("a", false), false).await.unwrap();
        assert_eq!(pruned.points, [4, 1]);
        assert_eq!(restored(&memory).await, states[5]);
        // Nothing is left of those that went: a backup from scratch has as much.
        let fresh = below(&memory, "fresh/");
        back_up(&bucket(&memory), &fresh, all, by("a", false), &|_, _| {}).await.unwrap();
        let count = |prefix: &str| memory.keys().iter().filter(|key| key.starts_with(prefix)).count();
        assert_eq!(count("backup/"), count("fresh/"));
    });
}

#[test]
fn one_at_a_time_works_on_a_backup() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        volume.settle().await.unwrap();
        let make = async |by: By| {
            back_up(&bucket(&memory), &below(&memory, "backup/"), Keep::default(), by, &|_, _| {}).await
        };
        // One hangs, and another host may not go on, unless it is said to be dead.
        memory.hold(|what, key| what == "put" && key.starts_with("backup/map/"));
        let hanging = tokio::spawn({
            let memory = memory.clone();
            async move {
                let (from, to) = (bucket(&memory), below(&memory, "backup/"));
                back_up(&from, &to, Keep::default(), by("a", false), &|_, _| {}).await
            }
        });
        memory.held(1).await;
        let error = make(by("b", false)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        assert!(error.to_string().contains("--take"), "{error}");
        let held = memory.clone();
        memory.hold(|what, key| what == "put" && key.starts_with("backup/point/"));
        let taking = tokio::spawn(async move {
            let (from, to) = (bucket(&held), below(&held, "backup/"));
            back_up(&from, &to, Keep::default(), by("b", true), &|_, _| {}).await
        });
        // That one has the backup now, with the first still where it was; it finds out before it adds anything.
        memory.held(2).await;
        memory.release();
        let error = hanging.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("taken over"), "{error}");
        assert_eq!(taking.await.unwrap().unwrap().point, 2);
        // It is over, and anybody may go on; so is one that failed.
        assert_eq!(make(by("c", false)).await.unwrap().point, 3);
        let prune_lost =
            prune(&below(&memory, "backup/"), Keep::default(), &[9], by("d", false), false).await;
        assert!(prune_lost.is_err());
        assert_eq!(make(by("e", false)).await.unwrap().point, 4);
        assert_eq!(restored(&memory).await, vec![1; SIZE as usize]);
    });
}

#[test]
fn what_is_damaged_in_a_backup_is_copied_anew() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, SIZE).await;
        volume.settle().await.unwrap();
        back_keeping(&memory, 9).await.unwrap();
        let block = memory.keys().into_iter().find(|key| key.starts_with("backup/b/")).unwrap();
        memory.overwrite(&block, b"short");
        let done = back_keeping(&memory, 9).await.unwrap();
        assert_eq!((done.objects, done.problems.len()), (1, 0), "{done:?}");
        // What only an older point needs is gone for good, and is said.
        put(&volume, 0, 2, SIZE).await;
        volume.settle().await.unwrap();
        memory.remove(&block);
        let done = back_keeping(&memory, 9).await.unwrap();
        assert_eq!(done.problems.len(), 1, "{done:?}");
        assert!(block.ends_with(done.problems[0].split(':').next().unwrap()), "{:?}", done.problems);
        assert_eq!(restored(&memory).await, vec![2; SIZE as usize]);
    });
}

/// Backups one after the other while somebody writes, and the store fails, loses answers and does things late.
fn story(seed: u64) {
    fastrand::seed(seed);
    let mut rng = fastrand::Rng::with_seed(seed);
    let memory = Memory::new(seed);
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime(), async {
        create(&memory).await;
        memory.set_odds(Odds { fails: 30, lost: 30, late: 30 });
        let volume =
            open(&memory, Opening { idle: Duration::from_millis(20), ..opening("a") }).await.unwrap();
        let states = Rc::new(RefCell::new(vec![vec![0; SIZE as usize]]));
        let (answered, ends) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(false)));
        let writer = tokio::task::spawn_local({
            let (states, answered, ends, memory) =
                (states.clone(), answered.clone(), ends.clone(), memory.clone());
            let mut rng = rng.fork();
            async move {
                while !ends.get() {
                    let offset = rng.u64(..SIZE);
                    let len = rng.u64(1..=(SIZE - offset).min(3 * BLOCK));
                    let byte = rng.u8(..);
                    let mut next = states.borrow().last().unwrap().clone();
                    next[offset as usize..(offset + len) as usize].fill(byte);
                    states.borrow_mut().push(next);
                    let number = states.borrow().len() - 1;
                    match rng.u8(..8) {
                        0 => tokio::time::sleep(Duration::from_millis(rng.u64(..100))).await,
                        1 => volume.settle().await.unwrap(),
                        _ => {}
                    }
                    put(&volume, offset, byte, len).await;
                    answered.set(number);
                    memory.land(rng.f64() * 0.3);
                }
            }
        });
        // What each point that there is has.
        let mut points: Vec<(u64, Vec<u8>)> = Vec::new();
        for round in 0..rng.u32(1..6) {
            tokio::time::sleep(Duration::from_millis(rng.u64(..200))).await;
            let least = answered.get();
            let done = back_keeping(&memory, 3).await;
            let most = states.borrow().len() - 1;
            match done {
                Ok(done) => {
                    assert_eq!(done.problems, Vec::<String>::new(), "seed {seed}, round {round}");
                    let found = restored(&memory).await;
                    let fits = (least..=most).any(|state| states.borrow()[state] == found);
                    assert!(fits, "seed {seed}, round {round}: it is no state from {least} to {most}");
                    points.push((done.point, found));
                    points.retain(|(point, _)| !done.pruned.points.contains(point));
                    assert!(points.len() <= 3, "seed {seed}");
                }
                Err(error) => assert_eq!(error.kind(), Kind::Busy, "seed {seed}, round {round}: {error}"),
            }
            if rng.u8(..4) == 0 && points.len() > 1 {
                let point = points.remove(rng.usize(..points.len() - 1)).0;
                prune(&below(&memory, "backup/"), Keep::default(), &[point], By::default(), false)
                    .await
                    .unwrap();
            }
            memory.land(rng.f64());
            for (point, state) in &points {
                assert_eq!(restored_at(&memory, Some(*point)).await, *state, "seed {seed}, point {point}");
            }
        }
        ends.set(true);
        writer.await.unwrap();
        let done = back(&memory).await.unwrap();
        assert_eq!(restored(&memory).await, *states.borrow().last().unwrap(), "seed {seed}: {done:?}");
    });
}

#[test]
fn each_backup_is_the_disk_of_one_instant_of_its_making() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let first: u64 = number("CLOUD_FIRST", 1);
    (first..first + number("CLOUD_SEEDS", 30)).for_each(story);
}
