//! What a line has lost: its dead lists, and how one is made anew. Two trees of one line are compared: what the older one sees and the newer one does not has died. What cannot be told, because a
//! node cannot be read, stays marked as used.

use super::format::{Body, Dead, Entry, Format, Map, NODE, Ptr, SLOTS, Slot, damaged, unit, unit_of};
use super::maps::{blocks_of, slots_of};
use super::merge::{Merge, Who};
use blockmason::{LocalBoxFuture, Result};
use std::collections::HashSet;

impl Merge<'_> {
    /// What the first so many parts of a dead list have. Frees those parts; what is left. From a part on that cannot be read it is
    /// lost room: what it lists stays marked as used.
    pub(super) async fn take_dead(
        &mut self,
        snapshot: u32,
        mut list: Ptr,
        most: usize,
    ) -> Result<(Ptr, Vec<Dead>)> {
        let (mut all, mut parts) = (Vec::new(), HashSet::new());
        while !list.is_hole() && parts.len() < most {
            let (next, dead) = match self.dead_part(list, snapshot).await {
                Ok(part) => part,
                Err(error) => {
                    tracing::warn!("what a dead list has stays marked as used: {error}");
                    return Ok((Ptr::default(), all));
                }
            };
            all.extend(dead);
            if !parts.insert(list.at) {
                return Err(damaged("a dead list leads back to itself"));
            }
            self.free_node(list);
            list = next;
        }
        Ok((list, all))
    }
    /// Finds what a snapshot sees and the tree that came from it does not, where it is younger than that: it goes to the dead.
    pub(super) async fn lost_between(&mut self, origin: u64, old: &Entry, new: &Entry) -> Result<()> {
        let lowest = u8::from(self.format == Format::Two);
        let (mut ptr, mut level) = (new.root, new.height);
        // What of a tree that has grown is where it had its root before.
        while level > old.height.max(lowest) {
            let Some(body) = self.readable(ptr, level, 0).await else { return Ok(()) };
            let Body::Inner(children) = body else { return Err(other_kind()) };
            (ptr, level) = (children[0], level - 1);
        }
        if level == old.height {
            return self.lost(origin, (old.root, ptr), (level, 0)).await;
        }
        // A leaf, of whose blocks the newer tree has a map.
        let Some(new) = self.readable(ptr, level, 0).await else { return Ok(()) };
        self.lost_within(origin, (Body::above(self.format, old.root, level), new), (level, 0)).await
    }

    fn lost(
        &mut self,
        origin: u64,
        (old, new): (Ptr, Ptr),
        (level, index): (u8, u64),
    ) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if old.is_hole() || old.at == new.at || old.birth <= origin {
                return Ok(());
            }
            let who = all_seen(origin);
            if new.is_hole() {
                return self.drop_tree(who, old, level, index).await;
            }
            let (was, is) = (self.readable(old, level, index).await, self.readable(new, level, index).await);
            self.kill_node(who, old, was.as_ref().map_or(1, Body::blocks));
            match was.zip(is) {
                Some(bodies) => self.lost_within(origin, bodies, (level, index)).await,
                None => Ok(()),
            }
        })
    }

    /// What a pointer leads to, if that can be told.
    async fn readable(&self, ptr: Ptr, level: u8, index: u64) -> Option<Body> {
        let found = self.inside(ptr, level, index).await;
        found.inspect_err(|error| tracing::warn!("what a node has led to stays marked as used: {error}")).ok()
    }

    async fn lost_within(
        &mut self,
        origin: u64,
        (old, new): (Body, Body),
        (level, index): (u8, u64),
    ) -> Result<()> {
        match (old, new) {
            (Body::Leaf(old), Body::Leaf(new)) => self.lost_slots(origin, &old, &new),
            (Body::Map(old), Body::Map(new)) => self.lost_leaves(origin, (&old, &new), index).await?,
            (Body::Inner(old), Body::Inner(new)) => {
                for (ix, pair) in old.iter().zip(new.iter()).enumerate() {
                    let place = (level - 1, index * SLOTS as u64 + ix as u64);
                    self.lost(origin, (*pair.0, *pair.1), place).await?;
                }
            }
            _ => return Err(other_kind()),
        }
        Ok(())
    }

    /// Compares two maps, the blocks of a leaf at a time.
    async fn lost_leaves(&mut self, origin: u64, (old, new): (&Map, &Map), index: u64) -> Result<()> {
        for leaf in 0..SLOTS as u16 {
            let range = blocks_of(leaf);
            let [was, is] = [old, new].map(|map| map.leaf(range.start));
            let same = was == is && old.within(&range).eq(new.within(&range));
            if same || was.is_some_and(|was| was.birth <= origin) {
                continue;
            }
            let place = index * SLOTS as u64 + u64::from(leaf);
            let mut slots = Vec::new();
            for (map, ptr) in [(old, was), (new, is)] {
                match ptr {
                    None => slots.push(slots_of(map.within(&range))),
                    Some(ptr) => match self.readable(ptr, 0, place).await {
                        Some(Body::Leaf(found)) => slots.push(found),
                        Some(_) => return Err(other_kind()),
                        None => {}
                    },
                }
            }
            if let Some(was) = was.filter(|_| was != is) {
                self.kill_node(all_seen(origin), was, NODE);
            }
            if let [was, is] = &slots[..] {
                self.lost_slots(origin, was, is);
            }
        }
        Ok(())
    }

    fn lost_slots(&mut self, origin: u64, old: &[Slot; SLOTS], new: &[Slot; SLOTS]) {
        for (ix, (was, is)) in old.iter().zip(new.iter()).enumerate() {
            if was.at == 0 || was.at == is.at {
                continue;
            }
            // Of a pack once, and only if the newer tree has none of it.
            let before = &old[unit(ix as u64).start as usize..ix];
            let room = was.left_by(unit_of(new, ix).iter().chain(before));
            if !room.is_empty() {
                self.kill(all_seen(origin), room.start, room.end - room.start, was.birth);
            }
        }
    }
}

/// Everything in the older tree is older than what could have taken its place.
fn all_seen(origin: u64) -> Who {
    Who { volume: 0, newest: u64::MAX, origin }
}

fn other_kind() -> blockmason::Error {
    damaged("two trees of one line have nodes of two kinds in one place")
}
