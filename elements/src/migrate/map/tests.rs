//! What the map says, without a file; and what a file says after the two kinds of crash.
#![allow(
    clippy::single_range_in_vec_init,
    reason = "the runs of a map are ranges, also where there is only one"
)]

mod crash;
mod freeze;
mod power;

use super::*;
use futures::FutureExt;

fn map(size: u64, dirty: bool) -> Arc<DirtyMap> {
    let map = Arc::new(DirtyMap::new(16, dirty));
    map.cover(size).unwrap();
    map
}

fn runs(map: &DirtyMap) -> Vec<Range<u64>> {
    let (mut runs, mut at) = (Vec::new(), 0);
    while let Some(run) = map.next_dirty(at..map.size()) {
        at = run.end;
        runs.push(run);
    }
    runs
}

#[test]
fn only_whole_granules_become_clean_and_the_last_one_is_what_the_disk_has_of_it() {
    let map = map(40, true);
    assert_eq!((map.dirty_bytes(), runs(&map)), (40, vec![0..40]));
    for (range, left) in [(1..32, vec![0..16, 32..40]), (0..15, vec![0..16, 32..40]), (32..40, vec![0..16])] {
        map.intend_now(range).unwrap().synced();
        assert_eq!(runs(&map), left);
    }
    map.set(39..40);
    assert_eq!((map.dirty_bytes(), runs(&map)), (24, vec![0..16, 32..40]));
    map.intend_now(0..48).unwrap().synced();
    assert_eq!(map.dirty_bytes(), 0);
    assert!(map.cover(41).is_err() && map.cover(40).is_ok());
}

#[test]
fn what_fails_beside_a_change_keeps_it_from_cleaning() {
    let map = map(64, true);
    let (one, other) = (map.intend_now(0..32).unwrap(), map.intend_now(20..24).unwrap());
    other.failed();
    drop(other);
    one.synced();
    drop(one);
    assert_eq!(map.dirty_bytes(), 64, "in what order the two came there is not known");
    map.intend_now(0..32).unwrap().synced();
    assert_eq!(runs(&map), [32..64]);
    map.intend_now(0..1).unwrap().failed();
    assert_eq!(runs(&map), [0..16, 32..64]);
}

#[test]
fn runs_are_found_from_either_end() {
    let map = map(200, true);
    map.intend_now(32..96).unwrap().synced();
    assert_eq!((map.next_dirty(0..200), map.last_dirty(0..200)), (Some(0..32), Some(96..200)));
    assert_eq!((map.last_dirty(0..104), map.last_dirty(0..96)), (Some(96..104), Some(0..32)));
    assert_eq!((map.last_dirty(8..96), map.last_dirty(32..96)), (Some(8..32), None));
}

#[test]
fn whoever_watches_is_told_of_what_becomes_dirty() {
    let map = map(64, false);
    let mut changed = Box::pin(map.changed());
    assert!((&mut changed).now_or_never().is_none());
    map.intend_now(0..16).unwrap().synced();
    assert!((&mut changed).now_or_never().is_none());
    map.intend_now(0..1).unwrap().failed();
    assert!(changed.now_or_never().is_some());
}

#[tokio::test]
async fn it_has_settled_when_nothing_is_on_its_way() {
    let map = map(64, false);
    let (one, far) = (map.intend_now(0..32).unwrap(), map.intend_now(32..64).unwrap());
    let mut settled = Box::pin(map.settled(16..20));
    assert!((&mut settled).now_or_never().is_none());
    drop(far);
    assert!((&mut settled).now_or_never().is_none());
    drop(one);
    settled.await;
}

#[test]
fn beside_a_change_that_was_let_go_nothing_becomes_clean_and_after_it_neither() {
    let map = map(64, true);
    let astray = map.intend_now(0..32).unwrap();
    map.let_go(&(0..32));
    assert!(map.let_go_since().is_some());
    let beside = map.intend_now(16..48).unwrap();
    beside.synced();
    drop(beside);
    assert_eq!(map.dirty_bytes(), 64, "which of the two comes last nobody knows");
    astray.synced();
    drop(astray);
    assert_eq!((map.dirty_bytes(), map.let_go_since()), (64, None));
    map.intend_now(0..64).unwrap().synced();
    assert_eq!(map.dirty_bytes(), 0);
}

#[test]
fn a_change_that_was_let_go_and_met_no_other_counts_when_it_lands() {
    let map = map(64, true);
    let astray = map.intend_now(0..32).unwrap();
    map.let_go(&(0..32));
    map.intend_now(32..64).unwrap().synced();
    astray.synced();
    drop(astray);
    assert_eq!(map.dirty_bytes(), 0);
}
