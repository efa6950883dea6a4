use super::*;

#[tokio::test]
async fn what_was_dirty_is_frozen_and_what_is_on_its_way_stays_dirty_too() {
    let map = map(64, false);
    map.set(0..32);
    let flying = map.intend_now(20..24).unwrap();
    map.freeze().await.unwrap();
    assert_eq!((map.frozen_next(0..64), runs(&map)), (Some(0..32), vec![16..32]));
    assert!(map.freeze().await.is_err(), "only one at a time");
    drop(flying);
    map.set(48..50);
    map.thaw(true).await.unwrap();
    assert_eq!((map.frozen_next(0..64), runs(&map)), (None, vec![0..32, 48..64]));
    map.freeze().await.unwrap();
    map.thaw(false).await.unwrap();
    assert_eq!((map.frozen_next(0..64), map.dirty_bytes()), (None, 0));
}

#[test]
fn a_larger_granule_and_a_larger_disk_turn_dirty_and_nothing_clean() {
    let old = map(64, false);
    old.set(17..18);
    let new = Arc::new(DirtyMap::new(32, false));
    new.cover(100).unwrap();
    new.inherit(&old);
    assert_eq!(runs(&new), [0..32, 64..100]);
    let none = DirtyMap::new(16, false);
    new.inherit(&none);
    assert_eq!(runs(&new), [0..100], "one that knows nothing");
}

#[test]
fn words_go_to_another_process() {
    let (one, other) = (map(5000, false), map(5000, true));
    one.set(40..60);
    other.set_words(&one.words()).unwrap();
    assert_eq!(runs(&other), [32..64]);
    assert!(map(64, true).set_words(&one.words()).is_err());
}
