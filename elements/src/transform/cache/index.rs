//! Which change a byte of the disk was last touched by.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges that do not overlap, each with the number of its newest change.
#[derive(Default)]
pub(super) struct Index {
    /// From where each begins to its end.
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl Index {
    /// A newer change of a range.
    pub(super) fn insert(&mut self, range: &Range<u64>, number: u64) {
        self.cut(range.start);
        self.cut(range.end);
        let covered: Vec<_> = self.ranges.range(range.clone()).map(|(start, _)| *start).collect();
        for start in covered {
            self.ranges.remove(&start);
        }
        self.ranges.insert(range.start, (range.end, number));
    }

    /// Makes a place a boundary, if it lies within a range.
    fn cut(&mut self, at: u64) {
        if let Some((_, (end, number))) = self.ranges.range_mut(..at).next_back()
            && *end > at
        {
            let rest = (*end, *number);
            *end = at;
            self.ranges.insert(at, rest);
        }
    }

    /// A change is forgotten, which was one of this range.
    pub(super) fn remove(&mut self, range: &Range<u64>, number: u64) {
        let own = |(_, (_, found)): &(&u64, &(u64, u64))| *found == number;
        let gone: Vec<_> = self.ranges.range(range.clone()).filter(own).map(|(start, _)| *start).collect();
        for start in gone {
            self.ranges.remove(&start);
        }
    }

    /// What touches a range, in order, cut to it; where nothing does there is a gap.
    pub(super) fn find(&self, range: &Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let (from, to) = (range.start, range.end);
        let before = self.ranges.range(..from).next_back().filter(move |(_, (end, _))| *end > from);
        let all = before.into_iter().chain(self.ranges.range(range.clone()));
        all.map(move |(start, (end, number))| ((*start).max(from)..(*end).min(to), *number))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn it_knows_of_each_byte_what_touched_it_last(
            changes in prop::collection::vec((0..60u64, 1..20u64, prop::bool::weighted(0.3)), 1..40),
        ) {
            let (mut index, mut model) = (Index::default(), vec![None; 80]);
            for (number, (start, len, forget)) in (0..).zip(&changes) {
                let range = *start..start + len;
                index.insert(&range, number);
                model[range.start as usize..range.end as usize].fill(Some(number));
                if *forget {
                    // The oldest go first, as in a log.
                    let (start, len, _) = changes[number as usize / 2];
                    index.remove(&(start..start + len), number / 2);
                    let forgotten = |place: &&mut Option<u64>| **place == Some(number / 2);
                    model.iter_mut().filter(forgotten).for_each(|place| *place = None);
                }
                let mut found = vec![None; 80];
                for (range, number) in index.find(&(0..80)) {
                    prop_assert!(!range.is_empty());
                    found[range.start as usize..range.end as usize].fill(Some(number));
                }
                prop_assert_eq!(&found, &model);
                let part: Vec<_> = index.find(&(33..47)).collect();
                prop_assert!(part.iter().all(|(range, _)| range.start >= 33 && range.end <= 47));
                prop_assert_eq!(part.is_empty(), model[33..47].iter().all(Option::is_none));
            }
        }
    }
}
