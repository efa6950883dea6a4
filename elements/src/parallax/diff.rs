//! What has changed in a volume.

use super::below::Below;
use super::format::{BLOCK, Ptr};
use super::items::Item;
use super::nodes::Place;
use super::pool::Pool;
use blockmason::{LocalBoxFuture, Result};
use std::ops::Range;

impl Pool {
    /// The blocks of a volume or snapshot that have changed since a snapshot of its line, or its origin, in order.
    pub(super) async fn changed_since(
        &self,
        number: u32,
        birth: u64,
        below: Below<'_>,
    ) -> Result<Vec<Range<u64>>> {
        self.checkpoint(below).await?;
        let (root, height, size, _era) = {
            let core = self.core();
            let Some(entry) = core.catalog.get(&number) else { return Ok(Vec::new()) };
            (entry.root, entry.height, entry.size / BLOCK, core.era.clone())
        };
        let mut found = Vec::new();
        self.walk_younger((root, height, 0), birth, &mut found, below).await?;
        // A tree reaches further than its volume, and so do the holes in it.
        found.retain(|blocks| blocks.start < size);
        if let Some(last) = found.last_mut() {
            last.end = last.end.min(size);
        }
        Ok(found)
    }

    fn walk_younger<'a>(
        &'a self,
        (ptr, level, index): (Ptr, u8, u64),
        birth: u64,
        found: &'a mut Vec<Range<u64>>,
        below: Below<'a>,
    ) -> LocalBoxFuture<'a, Result<()>> {
        Box::pin(async move {
            if ptr.birth <= birth {
                return Ok(());
            }
            let items = match Item::of(self.format, ptr, level, index) {
                run @ Item::Run { .. } => vec![run],
                Item::Node(place) => {
                    let node = self.nodes.get(&place, below).await?;
                    Item::all(self.format, &node.body, level, index)
                }
            };
            for item in items {
                match item {
                    Item::Run { first, len, slot, .. } if slot.birth > birth => match found.last_mut() {
                        Some(last) if last.end == first => last.end = first + len,
                        _ => found.push(first..first + len),
                    },
                    Item::Run { .. } => {}
                    Item::Node(Place { ptr, level, index, .. }) => {
                        self.walk_younger((ptr, level, index), birth, found, below).await?;
                    }
                }
            }
            Ok(())
        })
    }
}
