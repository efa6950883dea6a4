//! Which bytes of a range were described already.

use std::collections::BTreeMap;

/// A set of byte ranges without overlaps; neighbours are merged, so it stays small for in-order chunks.
#[derive(Debug, Default, Clone)]
pub(crate) struct Coverage(BTreeMap<u64, u64>);

impl Coverage {
    /// Adds `start..end`; false (and nothing added) when it overlaps what is there.
    pub(crate) fn add(&mut self, start: u64, end: u64) -> bool {
        let before = self.0.range(..end).next_back().map(|(&from, &to)| (from, to));
        if before.is_some_and(|(_, to)| to > start) {
            return false;
        }
        let mut merged = (start, end);
        if let Some((from, to)) = before
            && to == start
        {
            merged.0 = from;
        }
        if let Some(to) = self.0.remove(&end) {
            merged.1 = to;
        }
        self.0.insert(merged.0, merged.1);
        true
    }

    /// Whether every byte of `start..end` is in the set.
    pub(crate) fn covers(&self, start: u64, end: u64) -> bool {
        let Some((_, &to)) = self.0.range(..=start).next_back() else { return start >= end };
        start >= end || to >= end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_overlaps_are_refused() {
        let mut coverage = Coverage::default();
        assert!(coverage.add(10, 20));
        assert!(coverage.add(30, 40));
        assert!(!coverage.covers(10, 40));
        for (start, end) in [(15, 16), (5, 11), (19, 31), (0, 100), (39, 41)] {
            assert!(!coverage.add(start, end), "{start}..{end}");
        }
        assert!(coverage.add(20, 30));
        assert!(coverage.covers(10, 40));
        assert!(!coverage.covers(9, 40));
        assert!(!coverage.covers(10, 41));
        assert!(coverage.covers(12, 35));
        assert_eq!(coverage.0.len(), 1);
    }

    #[test]
    fn an_empty_range_is_always_covered() {
        assert!(Coverage::default().covers(5, 5));
        assert!(!Coverage::default().covers(5, 6));
    }
}
