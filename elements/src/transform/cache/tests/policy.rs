//! Which lines stay: compared with a plain LRU on the same traces.

use super::super::lines::{Lines, Look, Place};
use blockmason::Data;
use lru::LruCache;
use std::num::NonZeroUsize;
use std::sync::Arc;

const LINE: u64 = 4096;

/// Asks for a line as a read does. True if it was there.
fn ask(lines: &Arc<Lines>, line: u64) -> bool {
    if matches!(lines.look(line, &(0..LINE)), Look::Here(_)) {
        return true;
    }
    let lead = lines.lead(line, LINE).unwrap();
    assert!(lead.install(Place::Memory(Data::zeros(LINE as usize)), lines.covered(&(0..LINE)), LINE));
    lead.end(Ok(Data::empty()));
    false
}

/// A trace whose number `n` comes about `1 / n^0.99` times as often as the first, and in no order.
fn zipf(count: usize, items: usize, rng: &mut fastrand::Rng) -> Vec<u64> {
    let mut sums = Vec::with_capacity(items);
    let mut sum = 0.0;
    for item in 1..=items {
        sum += (item as f64).powf(-0.99);
        sums.push(sum);
    }
    let mut places: Vec<u64> = (0..items as u64).collect();
    rng.shuffle(&mut places);
    let one = |rng: &mut fastrand::Rng| {
        let at = rng.f64() * sum;
        places[sums.partition_point(|sum| *sum < at).min(items - 1)]
    };
    (0..count).map(|_| one(rng)).collect()
}

fn ratios(trace: &[u64], capacity: usize) -> (f64, f64) {
    let lines = Arc::new(Lines::new(LINE, capacity, false));
    let mut plain = LruCache::new(NonZeroUsize::new(capacity).unwrap());
    let (mut ours, mut theirs) = (0, 0);
    for line in trace {
        ours += usize::from(ask(&lines, *line));
        theirs += usize::from(plain.put(*line, ()).is_some());
    }
    assert!(lines.count() <= capacity);
    (ours as f64 / trace.len() as f64, theirs as f64 / trace.len() as f64)
}

#[test]
fn it_hits_as_often_as_a_plain_lru_where_some_lines_are_hot() {
    for (seed, capacity) in [(1, 200), (2, 1000), (3, 5000), (4, 60)] {
        let trace = zipf(60_000, 20_000, &mut fastrand::Rng::with_seed(seed));
        let (ours, theirs) = ratios(&trace, capacity);
        println!("{capacity} lines: {ours:.3}, plain LRU {theirs:.3}");
        assert!(ours >= 0.95 * theirs, "{capacity}: {ours} and {theirs}");
    }
}

#[test]
fn a_scan_leaves_what_is_hot() {
    let lines = Arc::new(Lines::new(LINE, 1000, false));
    for _ in 0..3 {
        for line in 0..300 {
            ask(&lines, line);
        }
    }
    for line in 1000..50_000 {
        ask(&lines, line);
    }
    let hits = (0..300).filter(|line| ask(&lines, *line)).count();
    assert!(hits >= 290, "{hits} of 300 hot lines are still there");
}

#[test]
fn reading_a_line_in_pieces_is_no_second_time() {
    let lines = Arc::new(Lines::new(16384, 100, false));
    for _ in 0..2 {
        for line in 0..50 {
            ask(&lines, line);
        }
    }
    for line in 1000..2000 {
        let lead = lines.lead(line, 16384).unwrap();
        let valid = lines.covered(&(0..16384));
        assert!(lead.install(Place::Memory(Data::zeros(16384)), valid, 4096));
        drop(lead);
        for at in [4096, 8192, 12288] {
            assert!(matches!(lines.look(line, &(at..at + 4096)), Look::Here(_)));
        }
    }
    assert_eq!((0..50).filter(|line| ask(&lines, *line)).count(), 50);
}

#[test]
fn there_are_never_more_lines_than_there_is_room_for() {
    for capacity in [8, 63, 64, 1000, 1025] {
        let lines = Arc::new(Lines::new(LINE, capacity, false));
        let mut rng = fastrand::Rng::with_seed(capacity as u64);
        for _ in 0..5000 {
            ask(&lines, rng.u64(0..3000));
            assert!(lines.count() <= capacity);
        }
        assert!(lines.count() * 10 >= capacity * 8, "{} of {capacity} are used", lines.count());
    }
}
