//! A new disk that does not answer: guests do not wait behind it, and nothing that lands late is taken for new.
#![allow(
    clippy::single_range_in_vec_init,
    reason = "what is written is a list of ranges, also of a single one"
)]

use super::world::{Moving, bytes, fresh, parked, pass, release, set, settle, world};
use blockmason::testing::run;
use blockmason::{Op, Ops, rt};

const CHUNK: u64 = 65_536;

/// A copier whose first chunk has been read, and whose write does not end.
async fn stuck(host: &std::sync::Arc<blockmason::Host>) -> Moving {
    fresh(Ops::NONE);
    set("Old", vec![1; 2 * CHUNK as usize]);
    set("New", vec![9; 2 * CHUNK as usize]);
    let moving =
        Moving::new(host, &Moving::text("hand", 2 * CHUNK, 2 * CHUNK, "(chunk 64k) (depth 1)"), "T").await;
    settle().await;
    let (disk, ix, op, _) = parked()[0].clone();
    assert_eq!((disk.as_str(), op), ("Old", Op::Read));
    release(&disk, ix, true);
    settle().await;
    assert_eq!(writes(), [0..CHUNK]);
    moving
}

/// What waits at the new disk.
fn writes() -> Vec<std::ops::Range<u64>> {
    parked().into_iter().filter(|(disk, _, op, _)| disk == "New" && *op == Op::Write).map(|it| it.3).collect()
}

/// Lets go of everything that waits at the old disk, as long as there is something.
async fn old_answers() {
    settle().await;
    while let Some((disk, ix, ..)) = parked().into_iter().find(|(disk, ..)| disk == "Old") {
        release(&disk, ix, true);
        settle().await;
    }
}

#[test]
fn a_guest_waits_for_it_no_longer_than_two_seconds() {
    run(1, async |host| {
        let moving = stuck(&host).await;
        let since = rt::now();
        let reply = moving.disk.send(blockmason::Request::write(0, blockmason::Data::copy_of(&[2; 4096])));
        pass(1900).await;
        assert!(parked().iter().all(|(disk, ..)| disk == "New"), "its range is held");
        pass(150).await;
        old_answers().await;
        reply.await.unwrap().unwrap();
        assert!((rt::now() - since).as_secs() <= 2);
        pass(3000).await;
        assert_eq!((moving.get("state"), moving.get("under_way")), ("waiting".into(), "0".into()));
        assert!(moving.get("error").contains("has not answered for 2s"), "{}", moving.get("error"));
        // The guest's own leg has been sent, beside what may land at any time.
        assert_eq!(writes(), [0..CHUNK, 0..4096]);
    });
}

#[test]
fn what_lands_late_is_copied_again_where_a_guest_has_written_meanwhile() {
    for order in [[0, 0], [1, 0]] {
        run(1, async |host| {
            let moving = stuck(&host).await;
            pass(2100).await;
            let reply =
                moving.disk.send(blockmason::Request::write(0, blockmason::Data::copy_of(&[2; 65_536])));
            old_answers().await;
            reply.await.unwrap().unwrap();
            order.into_iter().for_each(|ix| release("New", ix, true));
            for _ in 0..100 {
                old_answers().await;
                while let Some((disk, ix, ..)) = parked().first().cloned() {
                    release(&disk, ix, true);
                    settle().await;
                }
                pass(50).await;
            }
            assert_eq!(moving.get("state"), "clean");
            assert!(bytes("New") == bytes("Old"), "{order:?}");
        });
    }
}

#[test]
fn what_lands_late_and_met_nobody_need_not_be_copied_again() {
    run(1, async |host| {
        let moving = stuck(&host).await;
        pass(2100).await;
        release("New", 0, true);
        settle().await;
        assert_eq!(moving.number("remaining"), CHUNK);
        world(|world| world.seen.clear());
        pass(200).await;
        assert_eq!((moving.get("state"), moving.get("error")), ("copying".into(), String::new()));
        assert!(parked().iter().all(|(.., range)| range.start == CHUNK), "{:?}", parked());
    });
}
