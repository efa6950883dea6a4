//! Each race by itself, its order of events forced.

use super::*;
use crate::cloud::counts::Call;
use blockmason::Kind;
use std::sync::Mutex;

/// Runs a story in which time passes only when everything waits.
fn story(body: impl AsyncFnOnce(Memory)) {
    fastrand::seed(1);
    let memory = Memory::new(1);
    runtime().block_on(async {
        create(&memory).await;
        body(memory).await;
    });
}

fn taking(machine: &str) -> Opening {
    Opening { take: true, ..opening(machine) }
}

async fn put(volume: &Arc<Volume>, offset: u64, byte: u8, len: u64) -> Result<()> {
    volume.clone().serve(write(offset, &vec![byte; len as usize], Origin::Guest)).await.map(|_| ())
}

async fn get(volume: &Arc<Volume>, offset: u64) -> u8 {
    volume.clone().serve(Request::read(offset, 1)).await.unwrap().into_data().unwrap().to_vec()[0]
}

#[test]
fn a_commit_that_comes_after_its_owner_was_replaced_is_nobodys() {
    story(async |memory| {
        let first = open(&memory, opening("a")).await.unwrap();
        put(&first, 0, 1, 10).await.unwrap();
        memory.hold(|what, key| what == "put" && key.starts_with("some/disk/wal/0000000000000001-"));
        let late = tokio::spawn({
            let first = first.clone();
            async move { put(&first, 0, 2, 10).await }
        });
        memory.held(1).await;
        // The end of the first owner's commits waits behind the same gate: only the commit is held from here on.
        memory.release();
        memory.hold(|what, key| {
            what == "put" && key.starts_with("some/disk/wal/0000000000000001-0000000000000003")
        });
        late.await.unwrap().unwrap();
        let late = tokio::spawn({
            let first = first.clone();
            async move { put(&first, 0, 3, 10).await }
        });
        memory.held(1).await;
        let second = tokio::spawn({
            let memory = memory.clone();
            async move { open(&memory, taking("b")).await }
        });
        memory.held(2).await;
        memory.release();
        let second = second.await.unwrap().unwrap();
        let answered = late.await.unwrap();
        let found = get(&second, 0).await;
        // Whichever was first: an acknowledged write is there, and what is there no other has.
        assert_eq!(answered.is_ok(), found == 3, "{answered:?}, {found}");
        let error = put(&first, 0, 4, 10).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        assert!(error.to_string().contains("on b"), "{error}");
        assert_eq!(get(&second, 0).await, found);
    });
}

#[test]
fn an_owner_that_was_replaced_deletes_nothing() {
    story(async |memory| {
        let first = open(&memory, opening("a")).await.unwrap();
        put(&first, 0, 1, SIZE).await.unwrap();
        first.settle().await.unwrap();
        put(&first, 0, 2, SIZE).await.unwrap();
        memory.hold(|what, key| what == "put" && key.ends_with(&crate::cloud::key::map(1, 3)));
        let late = tokio::spawn({
            let first = first.clone();
            async move { first.settle().await }
        });
        memory.held(1).await;
        let second = tokio::spawn({
            let memory = memory.clone();
            async move { open(&memory, taking("b")).await }
        });
        memory.held(2).await;
        memory.release();
        let second = second.await.unwrap().unwrap();
        let _ = late.await.unwrap();
        assert_eq!(read_all(&second).await, vec![2; SIZE as usize]);
        assert!(put(&first, 0, 3, 1).await.is_err());
    });
}

/// An end that is put where a checkpoint was, and has been deleted, ends nothing.
#[test]
fn an_owner_that_makes_checkpoints_meanwhile_is_found_out() {
    story(async |memory| {
        let first = open(&memory, opening("a")).await.unwrap();
        put(&first, 0, 1, SIZE).await.unwrap();
        first.settle().await.unwrap();
        // Only the first who puts something there waits: the end, and not the checkpoints that go by it.
        let (end, first_time) = (crate::cloud::key::map(1, 3), std::sync::atomic::AtomicBool::new(true));
        memory.hold(move |what, key| {
            what == "put"
                && key.ends_with(&end)
                && first_time.swap(false, std::sync::atomic::Ordering::Relaxed)
        });
        let second = tokio::spawn({
            let memory = memory.clone();
            async move { open(&memory, taking("b")).await }
        });
        memory.held(1).await;
        for byte in 2..6 {
            put(&first, 0, byte, SIZE).await.unwrap();
            first.settle().await.unwrap();
        }
        memory.release();
        let second = second.await.unwrap().unwrap();
        assert_eq!(read_all(&second).await, vec![5; SIZE as usize]);
        assert!(put(&first, 0, 9, 1).await.is_err());
        put(&second, 0, 7, SIZE).await.unwrap();
        second.settle().await.unwrap();
        let third = open(&memory, opening("b")).await.unwrap();
        assert_eq!(read_all(&third).await, vec![7; SIZE as usize]);
    });
}

/// Holes have no version: what was being written of a block that has come and gone meanwhile is not put into it.
#[test]
fn a_block_that_is_discarded_while_it_is_written_anew_stays_away() {
    story(async |memory| {
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 10, 1, 10).await.unwrap();
        memory.hold(|what, key| what == "put" && key.starts_with("some/disk/b/"));
        let settling = tokio::spawn({
            let volume = volume.clone();
            async move { volume.settle().await }
        });
        memory.held(1).await;
        let whole = tokio::spawn({
            let volume = volume.clone();
            async move {
                put(&volume, 0, 2, BLOCK).await.unwrap();
                volume.clone().serve(op(Op::Discard, 0, BLOCK)).await.unwrap();
            }
        });
        memory.held(2).await;
        memory.release();
        whole.await.unwrap();
        settling.await.unwrap().unwrap();
        assert_eq!(get(&volume, 10).await, 0);
    });
}

#[test]
fn what_was_lost_is_an_error_and_an_event_and_no_zeros() {
    story(async |memory| {
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        let say = Arc::new(move |message: &str| heard.lock().unwrap().push(message.to_owned()));
        let volume = open::open(bucket(&memory), opening("a"), say).await.unwrap();
        tokio::spawn(keeper::keep(volume.clone()));
        put(&volume, 0, 1, BLOCK).await.unwrap();
        put(&volume, BLOCK, 2, BLOCK).await.unwrap();
        let key = memory.keys().into_iter().find(|key| key.contains("/b/00/")).unwrap();
        memory.remove(&key);
        let error = volume.clone().serve(Request::read(5, 1)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Io);
        assert!(said.lock().unwrap()[0].contains("is missing in the bucket"), "{said:?}");
        assert_eq!(get(&volume, BLOCK).await, 2);
        let cut = memory.keys().into_iter().find(|key| key.contains("/b/01/")).unwrap();
        memory.overwrite(&cut, &[2; 100]);
        assert_eq!(volume.clone().serve(Request::read(BLOCK + 200, 1)).await.unwrap_err().kind(), Kind::Io);
    });
}

#[test]
fn another_hosts_volume_is_left_alone_until_that_host_is_said_to_be_dead() {
    story(async |memory| {
        let first = open(&memory, opening("a")).await.unwrap();
        put(&first, 0, 1, 1).await.unwrap();
        let error = open(&memory, opening("b")).await.err().unwrap();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("mason bucket take"), "{error}");
        put(&first, 0, 2, 1).await.unwrap();
        open::close(&first, Duration::from_secs(60)).await.unwrap();
        let second = open(&memory, opening("b")).await.unwrap();
        assert_eq!(get(&second, 0).await, 2);
        assert!(put(&first, 0, 3, 1).await.is_err());
    });
}

#[test]
fn a_store_that_ignores_conditions_is_refused() {
    let memory = Memory::new(1);
    memory.ignore_conditions();
    runtime().block_on(async {
        let error = open::create(&bucket(&memory), SIZE, BLOCK, true).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(memory.keys().is_empty(), "nothing is left behind: {:?}", memory.keys());
        open::create(&bucket(&memory), SIZE, BLOCK, false).await.unwrap();
    });
}

#[test]
fn what_is_there_already_is_kept() {
    story(async |memory| {
        let error = open::create(&bucket(&memory), SIZE * 2, BLOCK, true).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        let volume = open(&memory, opening("a")).await.unwrap();
        assert_eq!(volume.state().size, SIZE);
    });
}

#[test]
fn a_damaged_commit_keeps_the_volume_closed() {
    story(async |memory| {
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, 100).await.unwrap();
        put(&volume, 200, 2, 100).await.unwrap();
        let wal = memory.keys().into_iter().find(|key| key.contains("/wal/")).unwrap();
        let sound = memory.bytes(&wal);
        for at in [0, 9, 30, sound.len() - 1] {
            let mut bytes = sound.clone();
            bytes[at] ^= 1;
            let copy = memory.copy();
            copy.overwrite(&wal, &bytes);
            let error = open(&copy, opening("a")).await.err().unwrap();
            assert!(error.to_string().contains(wal.trim_start_matches("some/disk/")), "{error}");
        }
    });
}

#[test]
fn while_the_store_is_silent_requests_wait_and_are_done_later() {
    story(async |memory| {
        let said = Arc::new(Mutex::new(Vec::new()));
        let heard = said.clone();
        let bucket = bucket(&memory);
        bucket.tell(move |message| heard.lock().unwrap().push(message.to_owned()));
        let volume = open::open(bucket, opening("a"), Arc::new(|_: &str| {})).await.unwrap();
        tokio::spawn(keeper::keep(volume.clone()));
        put(&volume, 0, 1, BLOCK).await.unwrap();
        memory.set_down(true);
        let writing = tokio::spawn({
            let volume = volume.clone();
            async move { put(&volume, BLOCK, 2, 10).await }
        });
        let reading = tokio::spawn({
            let volume = volume.clone();
            async move { get(&volume, 0).await }
        });
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!writing.is_finished() && !reading.is_finished() && volume.bucket.is_down());
        // What is in memory is served meanwhile.
        assert_eq!(get(&volume, BLOCK).await, 2);
        memory.set_down(false);
        writing.await.unwrap().unwrap();
        assert_eq!(reading.await.unwrap(), 1);
        let said = said.lock().unwrap();
        assert!(
            said[0].contains("does not") && said.last().unwrap() == "the store answers again",
            "{said:?}"
        );
    });
}

/// As many requests and bytes as there have to be: what is written as a whole is sent once.
#[test]
fn a_batch_of_whole_blocks_costs_one_request_each_and_one_for_all() {
    let memory = Memory::new(1);
    runtime().block_on(async {
        let (block, size) = (1 << 20, 64 << 20);
        open::create(&bucket(&memory), size, block, true).await.unwrap();
        let volume = open(&memory, opening("a")).await.unwrap();
        let (puts, bytes) = (volume.bucket.counts.requests(Call::Put), volume.bucket.counts.bytes(Call::Put));
        for n in 0..32 * 8 {
            let data = vec![(n % 255 + 1) as u8; 128 << 10];
            volume.clone().serve(write(n * (128 << 10), &data, Origin::WriteBack)).await.unwrap();
        }
        volume.clone().serve(op(Op::Flush, 0, 0)).await.unwrap();
        let puts = volume.bucket.counts.requests(Call::Put) - puts;
        let bytes = volume.bucket.counts.bytes(Call::Put) - bytes;
        assert_eq!(puts, 33);
        assert!(bytes < (32 << 20) + 4096, "{bytes}");
    });
}

/// A cache finds out whether anybody has written since it has last flushed.
#[test]
fn a_generation_is_another_one_after_each_commit_and_the_same_after_a_crash() {
    story(async |memory| {
        let volume = open(&memory, opening("a")).await.unwrap();
        put(&volume, 0, 1, 1).await.unwrap();
        let first = volume.generation();
        assert_eq!(volume.since(&first), "same");
        let again = open(&memory, opening("a")).await.unwrap();
        assert_eq!(again.since(&first), "same");
        // What the first one had on its way when its cache died.
        put(&again, 0, 2, 1).await.unwrap();
        let second = again.generation();
        assert_ne!(second, first);
        put(&again, 0, 3, 1).await.unwrap();
        assert_eq!(again.since(&second), "own");
        let third = open(&memory, opening("a")).await.unwrap();
        assert_eq!((third.since(&second), third.since(&first)), ("own", "other"));
        put(&third, 0, 4, 1).await.unwrap();
        assert_eq!(third.since(&second), "other");
        for odd in ["", "x", "1 2", "1 2 3", "a b c d"] {
            assert_eq!(third.since(odd), "other");
        }
    });
}

/// What is stored is known while the disk is written, whatever is still to be deleted.
#[test]
fn the_bytes_stored_are_those_of_the_objects() {
    let memory = Memory::new(3);
    let mut rng = fastrand::Rng::with_seed(3);
    runtime().block_on(async {
        // A multiple of its blocks, so that all objects are of one size.
        open::create(&bucket(&memory), 12 * BLOCK, BLOCK, true).await.unwrap();
        let volume = open(&memory, opening("a")).await.unwrap();
        for step in 0..200 {
            let start = rng.u64(..11 * BLOCK);
            let len = rng.u64(1..(12 * BLOCK - start).min(3 * BLOCK));
            let req = match rng.u8(..8) {
                0 => op(Op::Discard, start, len),
                1 => op(Op::Flush, 0, 0),
                _ => write(start, &vec![rng.u8(1..); len as usize], Origin::Guest),
            };
            volume.clone().serve(req).await.unwrap();
            if step % 20 == 0 {
                volume.settle().await.unwrap();
            }
            let found = memory.stored("b/") + memory.stored("wal/");
            assert_eq!(volume.stored(), found, "step {step}");
        }
    });
}

/// A keeper at rest costs nothing when nothing happens, lets nobody wait, and goes on when it may.
#[test]
fn a_keeper_at_rest_does_what_it_must_and_no_more() {
    const BLOCK: u64 = 1 << 20;
    const HALF: usize = 512 << 10;
    let memory = Memory::new(1);
    runtime().block_on(async {
        open::create(&bucket(&memory), 512 * BLOCK, BLOCK, true).await.unwrap();
        let volume = open(&memory, Opening { memory: 96 << 20, ..opening("a") }).await.unwrap();
        volume.rest(true);
        put(&volume, 0, 1, 100).await.unwrap();
        let settled = |volume: &Volume| volume.state().map.objects();
        blockmason::rt::sleep(Duration::from_secs(3600)).await;
        let puts = volume.bucket.counts.requests(Call::Put);
        blockmason::rt::sleep(Duration::from_secs(3600)).await;
        assert_eq!((settled(&volume), volume.bucket.counts.requests(Call::Put)), (0, puts));
        // More than what fits into memory, in pieces of blocks: at rest it is put off, and done before anybody waits for good.
        let mut most = 0;
        for n in 0..400 {
            let written = put(&volume, n * BLOCK, 2, HALF as u64);
            blockmason::rt::timeout(Duration::from_secs(60), written).await.expect("a write waits").unwrap();
            let bytes = volume.state().pieces.bytes();
            if settled(&volume) == 0 {
                most = bytes;
            }
            assert!(bytes <= 96 << 20, "{bytes}");
        }
        // At work it begins at half of the memory.
        assert!((71 << 20..=96 << 20).contains(&most), "{most}");
        assert!(settled(&volume) > 0);
        // Whoever asks for it is not kept waiting either.
        volume.settle().await.unwrap();
        assert_eq!((settled(&volume), volume.state().pieces.bytes()), (400, 0));
        put(&volume, 0, 3, 100).await.unwrap();
        let before = volume.state().checkpoint;
        volume.rest(false);
        blockmason::rt::sleep(Duration::from_secs(20)).await;
        assert!(volume.state().pieces.bytes() == 0 && volume.state().checkpoint > before);
        assert_eq!(
            (get(&volume, 0).await, get(&volume, 100).await, get(&volume, 399 * BLOCK).await),
            (3, 2, 2)
        );
    });
}

/// What is missing is never taken for what was never there.
#[test]
fn a_lost_checkpoint_and_a_lost_commit_keep_the_volume_closed() {
    story(async |memory| {
        // One who died before its first checkpoint has lost nothing.
        memory.hold(|what, key| what == "put" && key.starts_with("some/disk/map/"));
        let early = tokio::spawn({
            let memory = memory.clone();
            async move { open(&memory, opening("a")).await.map(drop) }
        });
        memory.held(1).await;
        early.abort();
        memory.release();
        let volume = open(&memory, opening("a")).await.unwrap();
        for byte in 1..=20 {
            put(&volume, u64::from(byte), byte, 1).await.unwrap();
        }
        let refused = async |memory: &Memory, why: &str| {
            let error = open(memory, opening("a")).await.err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
            let reasons = crate::cloud::found::Reasons::of(&bucket(memory)).await.unwrap();
            assert!(reasons.problems.iter().any(|problem| problem.contains(why)), "{:?}", reasons.problems);
        };
        for lost in 1..=16 {
            let memory = memory.copy();
            memory.remove(&format!("some/disk/{}", crate::cloud::key::wal(volume.epoch, lost)));
            refused(&memory, "later commits are there").await;
        }
        // Of the last ones it is not known whether they were ever there.
        let cut = memory.copy();
        cut.remove(&format!("some/disk/{}", crate::cloud::key::wal(volume.epoch, 17)));
        assert_eq!(get(&open(&cut, opening("a")).await.unwrap(), 16).await, 16);
        for settled in [false, true] {
            if settled {
                open::close(&volume, Duration::from_secs(60)).await.unwrap();
            }
            let memory = memory.copy();
            let maps = memory.keys().into_iter().filter(|key| key.starts_with("some/disk/map/"));
            maps.filter(|key| memory.bytes(key).len() > 44).for_each(|key| memory.remove(&key));
            refused(&memory, "newest checkpoint is missing").await;
        }
    });
}
