//! What it takes to open a volume after a crash, and a store that lists as it likes.

use super::*;
use crate::cloud::backup::points::Keep;
use crate::cloud::backup::{By, back_up, prune};
use crate::cloud::holds;
use crate::cloud::store::{Attempt, Head, Listed, ObjectStore, Put};
use blockmason::element::BoxFuture;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// A volume whose owner has died and left that many commits, each of one whole block.
async fn left_with_commits(memory: &Memory, commits: u8) {
    create(memory).await;
    let volume = open(memory, opening("a")).await.unwrap();
    for byte in 1..=commits {
        volume.clone().serve(write(0, &[byte; BLOCK as usize], Origin::Guest)).await.unwrap();
        volume.clone().serve(op(Op::Flush, 0, 0)).await.unwrap();
    }
}

/// Lets everybody go on who can.
async fn others() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

/// A few at a time, however many there are: together they may be far more than what is left of them.
#[test]
fn commits_are_read_a_few_at_a_time() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        left_with_commits(&memory, 40).await;
        // The next finds them one after the other, and dies before it has brought them into their blocks.
        memory.hold(|what, key| what == "put" && key.starts_with("some/disk/b/"));
        drop(open(&memory, Opening { take: true, ..opening("b") }).await.unwrap());
        memory.hold(|what, key| what == "get" && key.starts_with("some/disk/wal/"));
        let opened = tokio::spawn({
            let memory = memory.clone();
            async move { open(&memory, Opening { take: true, ..opening("c") }).await }
        });
        memory.held(2).await;
        others().await;
        assert!(memory.holds() <= open::COMMITS_AT_ONCE, "{}", memory.holds());
        memory.release();
        let volume = opened.await.unwrap().unwrap();
        assert_eq!(read_all(&volume).await[..BLOCK as usize], [40; BLOCK as usize]);
        assert!(volume.state().pieces.bytes() <= BLOCK, "{}", volume.state().pieces.bytes());
    });
}

/// One by one over a wide line a busy disk would never be done.
#[test]
fn a_backup_copies_commits_side_by_side() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        left_with_commits(&memory, 40).await;
        memory.hold(|what, key| what == "put" && key.starts_with("backup/wal/"));
        let copied = tokio::spawn({
            let memory = memory.clone();
            async move {
                let to = Bucket::new(Arc::new(memory.clone()), "backup/", None);
                back_up(&bucket(&memory), &to, Keep::default(), By::default(), &|_, _| {}).await
            }
        });
        memory.held(8).await;
        memory.release();
        copied.await.unwrap().unwrap();
    });
}

/// Points were made while it was about to delete some: it gives up, and others need not be told that it is dead.
#[test]
fn a_prune_that_gives_up_is_over() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let _volume = open(&memory, opening("a")).await.unwrap();
        let backup = || Bucket::new(Arc::new(memory.clone()), "backup/", None);
        let by = |machine: &str| By { claim: opening(machine).claim, take: false };
        let make = async || {
            back_up(&bucket(&memory), &backup(), Keep::default(), by("b"), &|_, _| {}).await.unwrap()
        };
        make().await;
        make().await;
        let first = AtomicBool::new(true);
        memory.hold(move |what, key| {
            what == "list" && key.starts_with("backup/run/") && first.swap(false, Ordering::Relaxed)
        });
        let pruned = tokio::spawn({
            let (backup, by) = (backup(), by("a"));
            async move { prune(&backup, Keep::default(), &[1], by, false).await }
        });
        memory.held(1).await;
        assert_eq!(make().await.point, 3);
        memory.release();
        let error = pruned.await.unwrap().unwrap_err();
        assert!(error.to_string().contains("changed the backup meanwhile"), "{error}");
        assert_eq!(prune(&backup(), Keep::default(), &[1], by("c"), false).await.unwrap().points, [1]);
    });
}

/// A release that comes late is not one of the hold that was put meanwhile.
#[test]
fn a_late_release_leaves_the_hold_after_it() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        volume.clone().hold(7, "here".to_owned()).await.unwrap();
        memory.hold(|what, _| what == "delete");
        let late = tokio::spawn(volume.clone().release());
        memory.held(1).await;
        volume.clone().hold(7, "here".to_owned()).await.unwrap();
        memory.release();
        late.await.unwrap().unwrap();
        let left = holds::all(&bucket(&memory)).await.unwrap();
        assert_eq!(
            left.iter().map(|hold| (hold.cache, hold.place.as_str())).collect::<Vec<_>>(),
            [(7, "here")]
        );
        volume.release().await.unwrap();
        assert!(holds::all(&bucket(&memory)).await.unwrap().is_empty());
    });
}

/// The oldest objects of a volume are its claims: a rule that deletes what is old meets them first.
#[test]
fn a_volume_whose_claims_are_gone_is_opened_only_if_somebody_says_so() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        create(&memory).await;
        let volume = open(&memory, opening("a")).await.unwrap();
        volume.clone().serve(write(0, &[1; BLOCK as usize], Origin::Guest)).await.unwrap();
        open::close(&volume, Duration::from_secs(60)).await.unwrap();
        for claim in memory.keys().into_iter().filter(|key| key.contains("/claim/")) {
            memory.remove(&claim);
        }
        let error = open(&memory, opening("b")).await.err().unwrap();
        assert!(error.to_string().contains("claims of the volume have been deleted"), "{error}");
        let volume = open(&memory, Opening { take: true, ..opening("b") }).await.unwrap();
        assert_eq!(volume.epoch, 2);
        volume.clone().serve(write(0, &[2; BLOCK as usize], Origin::Guest)).await.unwrap();
        open::close(&volume, Duration::from_secs(60)).await.unwrap();
        let volume = open(&memory, opening("c")).await.unwrap();
        assert_eq!(read_all(&volume).await[..BLOCK as usize], [2; BLOCK as usize]);
    });
}

/// What a store does that lists as it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Backwards,
    Twice,
    /// What lies elsewhere.
    Elsewhere,
    /// The first ones again, whatever they are to come after.
    Again,
}

struct Disorderly(Memory, Order);

impl ObjectStore for Disorderly {
    fn put<'a>(&'a self, key: &'a str, body: Data, id: &'a str, absent: bool) -> BoxFuture<'a, Attempt<Put>> {
        self.0.put(key, body, id, absent)
    }

    fn get_range<'a>(&'a self, key: &'a str, range: Range<u64>) -> BoxFuture<'a, Attempt<Option<Data>>> {
        self.0.get_range(key, range)
    }

    fn head<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Attempt<Option<Head>>> {
        self.0.head(key)
    }

    fn delete_many<'a>(&'a self, keys: &'a [String]) -> BoxFuture<'a, Attempt<()>> {
        self.0.delete_many(keys)
    }

    fn list<'a>(&'a self, prefix: &'a str, after: &'a str, most: u32) -> BoxFuture<'a, Attempt<Vec<Listed>>> {
        Box::pin(async move {
            let after = if self.1 == Order::Again { "" } else { after };
            let mut listed = self.0.list(prefix, after, most).await?;
            match self.1 {
                Order::Backwards => listed.reverse(),
                Order::Twice => listed = listed.into_iter().flat_map(|one| [one.clone(), one]).collect(),
                Order::Elsewhere => {
                    listed.iter_mut().for_each(|one| one.key = one.key.replace("some/", "other/"));
                }
                Order::Again => {}
            }
            Ok(listed)
        })
    }

    fn dangers(&self) -> BoxFuture<'_, Attempt<Vec<String>>> {
        self.0.dangers()
    }
}

/// Whoever follows such a listing would never come to an end, or miss something.
#[test]
fn a_store_whose_listings_do_not_go_on_in_order_is_refused() {
    runtime().block_on(async {
        let memory = Memory::new(1);
        left_with_commits(&memory, 3).await;
        let first = bucket(&memory).list("", "", 1).await.unwrap()[0].key.clone();
        for order in [Order::Backwards, Order::Twice, Order::Elsewhere, Order::Again] {
            let bucket = Bucket::new(Arc::new(Disorderly(memory.clone(), order)), "some/disk/", None);
            let error = bucket.list("", &first, 1000).await.unwrap_err();
            assert!(error.to_string().contains("in their order"), "{order:?}: {error}");
        }
    });
}
