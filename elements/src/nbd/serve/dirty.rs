//! Block status of maps of changes: answered from the maps, without a way through the graph.

use super::super::meta::{BITMAP, DIRTY, STATE_DIRTY, Status};
use crate::migrate::map::DirtyMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

/// Finds the map of a context, as the graph is now; none where it has none any more.
pub(crate) type Maps = Rc<dyn Fn(&str) -> Option<Arc<DirtyMap>>>;

/// True of a context that is answered from a map in memory.
pub(super) fn is_in_memory(context: &str) -> bool {
    context == DIRTY || context.starts_with(BITMAP)
}

/// Collects what a map says of a range. Without a map anything may have changed.
pub(super) fn collect(status: &mut Status, map: Option<&DirtyMap>, range: Range<u64>) {
    let mut at = range.start;
    while at < range.end {
        let run = match map {
            Some(map) => map.next_dirty(at..range.end).unwrap_or(range.end..range.end),
            None => at..range.end,
        };
        if !status.push(run.start - at, 0) || !status.push(run.end - run.start, STATE_DIRTY) {
            return;
        }
        at = run.end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statuses(map: Option<&DirtyMap>, range: Range<u64>, one: bool) -> Vec<(u64, u64)> {
        let mut status = Status::new(range.end - range.start, one, true);
        collect(&mut status, map, range);
        status.extents().iter().map(|extent| (extent.len, extent.status)).collect()
    }

    #[test]
    fn runs_of_the_map_are_clipped_to_the_range() {
        let map = DirtyMap::new(16, false);
        map.cover(100).unwrap();
        map.set(20..50);
        assert_eq!(statuses(Some(&map), 0..100, false), [(16, 0), (48, 1), (36, 0)]);
        assert_eq!(statuses(Some(&map), 60..70, false), [(4, 1), (6, 0)]);
        assert_eq!(statuses(Some(&map), 0..100, true), [(16, 0)]);
        assert_eq!(statuses(Some(&map), 20..30, true), [(10, 1)]);
        assert_eq!(statuses(None, 20..30, false), [(10, 1)], "a map that is gone");
    }
}
