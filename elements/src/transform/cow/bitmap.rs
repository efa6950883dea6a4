//! A bit for each block, read by all shards without a lock.

use super::format::{PER_SECTOR, WORDS};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// A map in memory: one bit for each block, in whole map sectors.
pub(super) struct Bitmap(Box<[AtomicU64]>);

impl Bitmap {
    pub(super) fn new(sectors: u64) -> Bitmap {
        Bitmap((0..sectors * WORDS as u64).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, ix: u64) -> u64 {
        self.0[ix as usize].load(Ordering::Acquire)
    }

    pub(super) fn has(&self, block: u64) -> bool {
        self.word(block / 64) >> (block % 64) & 1 != 0
    }

    /// The first block from `range.start` on that is in (`held`) or not, or the end of the range.
    pub(super) fn find(&self, held: bool, range: Range<u64>) -> u64 {
        let mut at = range.start;
        while at < range.end {
            let word = if held { self.word(at / 64) } else { !self.word(at / 64) };
            let rest = word >> (at % 64);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(range.end);
            }
            at = (at / 64 + 1) * 64;
        }
        range.end
    }

    /// True if every block of the range is in.
    pub(super) fn all(&self, range: Range<u64>) -> bool {
        self.find(false, range.clone()) == range.end
    }

    /// The words of a map sector.
    pub(super) fn sector(&self, sector: u64) -> [u64; WORDS] {
        std::array::from_fn(|ix| self.word(sector * WORDS as u64 + ix as u64))
    }

    pub(super) fn insert(&self, sector: u64, words: &[u64; WORDS]) {
        for (place, word) in
            self.0[sector as usize * WORDS..].iter().zip(words).filter(|(_, word)| **word != 0)
        {
            place.fetch_or(*word, Ordering::AcqRel);
        }
    }

    pub(super) fn remove(&self, sector: u64, words: &[u64; WORDS]) {
        for (place, word) in
            self.0[sector as usize * WORDS..].iter().zip(words).filter(|(_, word)| **word != 0)
        {
            place.fetch_and(!word, Ordering::AcqRel);
        }
    }

    pub(super) fn clear(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::Release));
    }

    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum()
    }
}

/// The part of a range of blocks that lies in a map sector, as its words.
pub(super) fn mask(sector: u64, blocks: &Range<u64>) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    let first = sector * PER_SECTOR;
    for block in blocks.start.max(first)..blocks.end.min(first + PER_SECTOR) {
        let ix = (block - first) as usize;
        words[ix / 64] |= 1 << (ix % 64);
    }
    words
}

/// `a` and `b` word by word.
pub(super) fn join(a: &[u64; WORDS], b: &[u64; WORDS], f: impl Fn(u64, u64) -> u64) -> [u64; WORDS] {
    std::array::from_fn(|ix| f(a[ix], b[ix]))
}

/// The map sectors that a range of blocks touches.
pub(super) fn sectors(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / PER_SECTOR..blocks.end.div_ceil(PER_SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn against_a_vector(runs in proptest::collection::vec((0u64..9000, 1u64..5000, any::<bool>()), 0..20)) {
            let (bitmap, mut model) = (Bitmap::new(3), vec![false; 3 * PER_SECTOR as usize]);
            for (start, len, insert) in runs {
                let run = start..(start + len).min(model.len() as u64);
                for sector in sectors(&run) {
                    let mask = mask(sector, &run);
                    if insert { bitmap.insert(sector, &mask) } else { bitmap.remove(sector, &mask) }
                }
                model[run.start as usize..run.end as usize].fill(insert);
                let end = model.len() as u64;
                for held in [true, false] {
                    let found = model[start as usize..].iter().position(|bit| *bit == held);
                    prop_assert_eq!(bitmap.find(held, start..end), found.map_or(end, |ix| start + ix as u64));
                    prop_assert_eq!(bitmap.find(held, start..start + 1), start + u64::from(model[start as usize] != held));
                }
                prop_assert_eq!(bitmap.all(run.clone()), insert);
                prop_assert_eq!(bitmap.count(), model.iter().filter(|bit| **bit).count() as u64);
                prop_assert!((0..end).all(|block| bitmap.has(block) == model[block as usize]));
            }
        }
    }
}
