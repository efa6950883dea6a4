//! A bit for each granule.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Read without a lock, changed only by whoever holds the map's.
pub(super) struct Bits {
    pub(super) words: Box<[AtomicU64]>,
    /// How many are set.
    count: AtomicU64,
}

/// The bits of a word, by its place, that a range of granules covers.
pub(super) fn mask(word: usize, granules: &Range<u64>) -> u64 {
    let first = word as u64 * 64;
    let (start, end) = (granules.start.clamp(first, first + 64), granules.end.clamp(first, first + 64));
    if start >= end { 0 } else { u64::MAX >> (64 - (end - start)) << (start - first) }
}

/// The places of the words that a range of granules touches.
pub(super) fn words(granules: &Range<u64>) -> Range<usize> {
    if granules.is_empty() { 0..0 } else { granules.start as usize / 64..granules.end.div_ceil(64) as usize }
}

impl Bits {
    pub(super) fn new(granules: u64, set: bool) -> Bits {
        let words = (0..granules.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let bits = Bits { words, count: AtomicU64::new(0) };
        if set {
            bits.change(0..granules, true);
        }
        bits
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    pub(super) fn has(&self, granule: u64) -> bool {
        self.word(granule as usize / 64) >> (granule % 64) & 1 != 0
    }

    pub(super) fn word(&self, word: usize) -> u64 {
        self.words[word].load(Ordering::Acquire)
    }

    /// The first granule of a range that is set or not, or the end of the range.
    pub(super) fn find(&self, set: bool, range: Range<u64>) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let word = self.word(at as usize / 64);
            let rest = if set { word } else { !word } >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(range.end);
            }
            at = (at / 64 + 1) * 64;
        }
        range.end
    }

    /// Where the last granule of a range that is set or not ends, or the start of the range.
    pub(super) fn find_last(&self, set: bool, range: Range<u64>) -> u64 {
        let mut at = range.end;
        while at > range.start {
            let word = self.word((at - 1) as usize / 64);
            let rest = if set { word } else { !word } << (63 - (at - 1) % 64);
            if rest != 0 {
                return (at - u64::from(rest.leading_zeros())).max(range.start);
            }
            at = (at - 1) / 64 * 64;
        }
        range.start
    }

    /// The first run of granules of a range that are set; empty at the end of the range if none is.
    pub(super) fn run(&self, range: Range<u64>) -> Range<u64> {
        let start = self.find(true, range.clone());
        start..self.find(false, start..range.end)
    }

    pub(super) fn change(&self, range: Range<u64>, set: bool) {
        for word in words(&range) {
            let mask = mask(word, &range);
            let before = self.word(word);
            self.put(word, if set { before | mask } else { before & !mask });
        }
    }

    /// Replaces a word.
    pub(super) fn put(&self, word: usize, value: u64) {
        let before = self.words[word].swap(value, Ordering::AcqRel);
        // Wraps around where it becomes less.
        let more = u64::from(value.count_ones()).wrapping_sub(u64::from(before.count_ones()));
        self.count.fetch_add(more, Ordering::AcqRel);
    }

    /// Sets what another one of the same size has set.
    pub(super) fn add(&self, other: &Bits) {
        for word in 0..self.words.len() {
            self.put(word, self.word(word) | other.word(word));
        }
    }

    /// Clears all. Returns what was set.
    pub(super) fn take(&self) -> Bits {
        let taken = Bits::new(self.words.len() as u64 * 64, false);
        for word in 0..self.words.len() {
            taken.put(word, self.word(word));
            self.put(word, 0);
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bits_are_like_a_vector(changes in prop::collection::vec((0u64..200, 0u64..200, any::<bool>()), 0..30)) {
            let bits = Bits::new(200, false);
            let mut model = [false; 200];
            for (a, b, set) in changes {
                let range = a.min(b)..a.max(b);
                bits.change(range.clone(), set);
                model[range.start as usize..range.end as usize].fill(set);
                let find = |set| model[range.start as usize..].iter().position(|bit| *bit == set);
                for set in [false, true] {
                    let found = find(set).map_or(200, |at| at as u64 + range.start);
                    prop_assert_eq!(bits.find(set, range.start..200), found);
                    let last = model[..range.end as usize].iter().rposition(|bit| *bit == set);
                    prop_assert_eq!(bits.find_last(set, 0..range.end), last.map_or(0, |at| at as u64 + 1));
                }
            }
            let set = model.iter().filter(|bit| **bit).count() as u64;
            prop_assert_eq!((bits.count(), bits.take().count(), bits.count()), (set, set, 0));
        }
    }
}
