//! Range locks against a naive model: who may hold, and who comes next.

use crate::sched::{Holder, Mode, RangeGuard, RangeLock, Waiting};
use futures::FutureExt;
use proptest::prelude::*;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

const HOLDER: Holder = Holder { root: 7, doing: "write" };

fn write(lock: &RangeLock, range: Range<u64>) -> Waiting<'_> {
    lock.claim(HOLDER, Mode::Exclusive, &[range])
}

fn read(lock: &RangeLock, range: Range<u64>) -> Waiting<'_> {
    lock.claim(HOLDER, Mode::Shared, &[range])
}

fn poll<'a>(waiting: &mut Waiting<'a>) -> Option<RangeGuard<'a>> {
    waiting.now_or_never()
}

#[test]
fn a_waiting_range_blocks_later_ones() {
    let lock = RangeLock::default();
    let first = poll(&mut write(&lock, 0..10)).unwrap();
    let mut second = write(&lock, 5..20);
    let mut third = write(&lock, 15..30);
    assert!(poll(&mut second).is_none());
    assert!(poll(&mut third).is_none(), "free, but it came after one that waits");
    assert!(poll(&mut write(&lock, 30..40)).is_some());
    drop(first);
    let second = poll(&mut second).unwrap();
    assert!(poll(&mut third).is_none());
    drop(second);
    assert!(poll(&mut third).is_some());
}

#[test]
fn reads_share_and_do_not_overtake_a_write() {
    let lock = RangeLock::default();
    let reads = [poll(&mut read(&lock, 0..10)).unwrap(), poll(&mut read(&lock, 5..15)).unwrap()];
    let mut change = write(&lock, 8..9);
    let mut late = read(&lock, 0..10);
    assert!(poll(&mut change).is_none() && poll(&mut late).is_none());
    assert!(poll(&mut read(&lock, 9..15)).is_some(), "nobody waits for that");
    let [a, b] = reads;
    drop(a);
    assert!(poll(&mut change).is_none());
    drop(b);
    let change = poll(&mut change).unwrap();
    assert!(poll(&mut late).is_none());
    drop(change);
    assert!(poll(&mut late).is_some());
}

#[test]
fn a_shared_claim_has_its_place_at_once_and_outlives_the_caller() {
    let lock = Arc::new(RangeLock::default());
    let shared =
        |range: Range<u64>| -> Waiting<'static> { lock.claim_shared(HOLDER, Mode::Exclusive, &[range]) };
    let first = poll(&mut shared(0..10)).unwrap();
    let mut second = shared(5..20);
    let mut third = write(&lock, 15..30);
    assert!(poll(&mut second).is_none() && poll(&mut third).is_none());
    drop(first);
    assert!(poll(&mut third).is_none(), "the second one holds, though nobody has asked for its guard");
    drop(second);
    assert!(poll(&mut third).is_some());
}

#[test]
fn ranges_of_one_claim_come_together() {
    let lock = RangeLock::default();
    let low = poll(&mut write(&lock, 0..10)).unwrap();
    let high = poll(&mut write(&lock, 20..30)).unwrap();
    // They overlap each other too, which is nobody's business but the claim's.
    let mut both = lock.claim(HOLDER, Mode::Exclusive, &[5..8, 6..12, 25..26]);
    let mut behind = write(&lock, 11..12);
    drop(low);
    assert!(poll(&mut both).is_none() && poll(&mut behind).is_none());
    assert_eq!(lock.claims()[1].waits_for, 1);
    drop(high);
    let both = poll(&mut both).unwrap();
    assert!(poll(&mut behind).is_none());
    drop(both);
    assert!(poll(&mut behind).is_some());
    assert!(poll(&mut lock.claim(HOLDER, Mode::Exclusive, &[])).is_some(), "nothing is always free");
}

#[test]
fn giving_up_waiting_lets_others_on() {
    let lock = RangeLock::default();
    let first = poll(&mut write(&lock, 0..10)).unwrap();
    let waiting = write(&lock, 0..20);
    let mut third = write(&lock, 15..30);
    assert!(poll(&mut third).is_none());
    drop(waiting);
    assert!(poll(&mut third).is_some());
    drop(first);
    assert_eq!(lock.claims(), []);
}

#[test]
fn a_panic_releases_what_was_held() {
    let lock = RangeLock::default();
    let mut waiting = None;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _held = poll(&mut write(&lock, 0..10)).unwrap();
        waiting = Some(write(&lock, 0..10));
        panic!("of a test");
    }));
    assert!(panicked.is_err() && poll(&mut waiting.unwrap()).is_some());
}

#[test]
fn claims_are_listed_in_the_order_of_arrival() {
    let lock = RangeLock::default();
    let first = write(&lock, 0..1);
    let held = lock.claim(Holder { root: 8, doing: "hold" }, Mode::Exclusive, &[10..20, 30..40]);
    drop(first);
    let waiting = read(&lock, 15..16);
    let found: Vec<_> = lock
        .claims()
        .into_iter()
        .map(|claim| (claim.holder.root, claim.holder.doing, claim.mode, claim.ranges, claim.waits_for))
        .collect();
    let expected = [
        (8, "hold", Mode::Exclusive, vec![10..20, 30..40], 0),
        (7, "write", Mode::Shared, std::iter::once(15..16).collect(), 1),
    ];
    assert_eq!(found, expected);
    drop((held, waiting));
}

#[derive(Clone, Debug)]
struct Wanted {
    mode: Mode,
    ranges: Vec<Range<u64>>,
}

impl Wanted {
    fn conflicts(&self, other: &Wanted) -> bool {
        let overlap = |a: &Range<u64>| other.ranges.iter().any(|b| a.start < b.end && b.start < a.end);
        (self.mode, other.mode) != (Mode::Shared, Mode::Shared) && self.ranges.iter().any(overlap)
    }
}

/// Who is there, in the order of arrival: waiting or holding.
type Present<'a> = Vec<(Wanted, Result<RangeGuard<'a>, Waiting<'a>>)>;

/// Polls whoever waits, and checks that exactly those hold their ranges who conflict with nobody that came
/// before.
fn settle(present: &mut Present<'_>) {
    for ix in 0..present.len() {
        let (before, rest) = present.split_at_mut(ix);
        let (wanted, state) = &mut rest[0];
        if let Err(waiting) = state {
            let expected = !before.iter().any(|(other, _)| wanted.conflicts(other));
            let granted = poll(waiting);
            assert_eq!(granted.is_some(), expected, "{wanted:?}");
            if let Some(guard) = granted {
                *state = Ok(guard);
            }
        }
    }
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let range = (0u64..40, 1u64..20).prop_map(|(start, len)| start..start + len);
    (any::<bool>(), proptest::collection::vec(range, 1..4)).prop_map(|(shared, ranges)| Wanted {
        mode: if shared { Mode::Shared } else { Mode::Exclusive },
        ranges,
    })
}

proptest! {
    /// Holders never conflict, nobody overtakes, and everybody is served or may give up.
    #[test]
    fn against_a_model(steps in proptest::collection::vec((wanted(), any::<prop::sample::Index>(), 0u8..4), 1..80)) {
        let lock = RangeLock::default();
        let mut present = Present::new();
        for (wanted, leaves, kind) in &steps {
            present.push((wanted.clone(), Err(lock.claim(HOLDER, wanted.mode, &wanted.ranges))));
            // A claim that is never polled before it is granted has no waker.
            if *kind != 0 {
                settle(&mut present);
            }
            if *kind == 1 {
                drop(present.remove(leaves.index(present.len())));
                settle(&mut present);
            }
            let listed: Vec<_> = lock.claims().into_iter().map(|claim| claim.ranges).collect();
            let expected: Vec<_> = present.iter().map(|(wanted, _)| wanted.ranges.clone()).collect();
            prop_assert_eq!(listed, expected);
        }
        settle(&mut present);
        while let Some(ix) = present.iter().position(|(_, state)| state.is_ok()) {
            drop(present.remove(ix));
            settle(&mut present);
        }
        prop_assert!(present.is_empty(), "somebody waits for nobody");
        prop_assert_eq!(lock.claims(), []);
    }
}
