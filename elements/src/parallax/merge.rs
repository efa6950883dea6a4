//! Brings changes into trees: writes the nodes that change to new places, and finds out what nothing leads to any more.

use super::below::Below;
use super::format::{Body, DEAD, Dead, Entry, NODE, Node, Ptr, RECORDS, SLOTS, Slot, damaged};
use super::nodes::{Nodes, Place, Tree};
use super::pool::Pool;
use super::runs::{Run, Runs};
use super::space::{Difference, Space, Want};
use blockmason::{LocalBoxFuture, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// Blocks or leaves below each entry of a node at that level.
pub(super) fn span(level: u8) -> u64 {
    1 << (9 * u32::from(level))
}

/// The fewest levels above the leaves with which a tree has that many leaves.
pub(super) fn height(leaves: u64) -> u8 {
    (0..4).find(|height| leaves <= span(*height)).unwrap_or(4)
}

/// Whose tree it is, and what others see of it.
#[derive(Clone, Copy)]
pub(super) struct Who {
    pub(super) volume: u32,
    /// What is not younger than this is seen by the newest snapshot.
    pub(super) newest: u64,
    /// ... belongs to the line of the origin.
    pub(super) origin: u64,
}

/// How many blocks of a volume more there are than before, or fewer.
#[derive(Clone, Copy, Default)]
pub(super) struct Counted {
    pub(super) mapped: i64,
    /// Those that only the volume sees.
    pub(super) own: i64,
}

impl Counted {
    fn add(&mut self, who: Who, birth: u64, blocks: i64) {
        self.mapped += blocks;
        self.own += if birth > who.newest.max(who.origin) { blocks } else { 0 };
    }
}

/// What a checkpoint does.
pub(super) struct Merge<'a> {
    space: &'a Space,
    nodes: &'a Nodes,
    below: Below<'a>,
    pub(super) difference: Difference,
    /// Blocks that nothing leads to any more.
    pub(super) freed: Vec<Range<u64>>,
    /// What the line has let go of and the newest snapshot sees.
    pub(super) dead: Vec<Dead>,
    pub(super) counted: Counted,
}

impl<'a> Merge<'a> {
    pub(super) fn new(pool: &'a Pool, below: Below<'a>) -> Merge<'a> {
        Merge {
            space: &pool.space,
            nodes: &pool.nodes,
            below,
            difference: Difference::default(),
            freed: Vec::new(),
            dead: Vec::new(),
            counted: Counted::default(),
        }
    }

    pub(super) fn free(&mut self, blocks: Range<u64>) {
        self.difference.remove(blocks.clone());
        match self.freed.last_mut() {
            Some(last) if last.end == blocks.start => last.end = blocks.end,
            _ => self.freed.push(blocks),
        }
    }

    /// Nothing leads to a node any more that no snapshot sees.
    pub(super) fn free_node(&mut self, ptr: Ptr) {
        if !ptr.is_hole() {
            ptr.at.into_iter().for_each(|at| self.free(at..at + NODE));
        }
    }

    /// A line lets go of blocks with that birth.
    fn kill(&mut self, who: Who, at: u64, len: u64, birth: u64) {
        if birth <= who.origin {
            return;
        }
        if birth > who.newest {
            return self.free(at..at + len);
        }
        match self.dead.last_mut() {
            Some(last)
                if last.birth == birth && last.at + u64::from(last.len) == at && last.len < u16::MAX =>
            {
                last.len += len as u16;
            }
            _ => self.dead.push(Dead { at, birth, len: len as u16 }),
        }
    }

    fn kill_node(&mut self, who: Who, ptr: Ptr) {
        if !ptr.is_hole() {
            ptr.at.into_iter().for_each(|at| self.kill(who, at, NODE, ptr.birth));
        }
    }

    /// Room for both copies of a node.
    async fn place(&mut self) -> Result<[u64; 2]> {
        let want = Want { least: NODE, most: NODE };
        let first = self.space.take(None, want, self.below).await?.start;
        // Not beside the first one: what destroys a piece of the medium should not destroy both.
        let second = self.space.take(Some(first + super::format::EXTENT / 2), want, self.below).await?.start;
        for at in [first, second] {
            self.difference.add(at..at + NODE);
        }
        Ok([first, second])
    }

    pub(super) async fn write(&mut self, node: Node, birth: u64) -> Result<Ptr> {
        // On a fast device nothing of all this ever waits, and guests would.
        blockmason::rt::pass().await;
        let ptr = Ptr { at: self.place().await?, birth };
        self.nodes.write(ptr, node, self.below).await?;
        Ok(ptr)
    }

    /// The body of a node of a volume's tree.
    pub(super) async fn read(&self, ptr: Ptr, level: u8, index: u64) -> Result<Body> {
        self.body(Place { tree: Tree::Volume, ptr, level, index }).await
    }

    async fn body(&self, place: Place) -> Result<Body> {
        let node = self.nodes.get(&place, self.below).await?;
        Ok(node.body.clone())
    }

    /// A part of a snapshot's dead list: the next one, and what is in this one.
    pub(super) async fn dead_part(&self, ptr: Ptr, snapshot: u32) -> Result<(Ptr, Vec<Dead>)> {
        let place = Place { tree: Tree::DeadList, ptr, level: 0, index: u64::from(snapshot) };
        match self.body(place).await? {
            Body::Dead(next, dead) => Ok((next, dead)),
            Body::Leaf(_) | Body::Inner(_) | Body::Catalog(_) => Err(damaged("a dead list was expected")),
        }
    }

    /// Brings runs into the tree below a pointer. The new pointer.
    pub(super) fn merge<'m>(
        &'m mut self,
        who: Who,
        ptr: Ptr,
        (level, index): (u8, u64),
        runs: &'m Runs,
    ) -> LocalBoxFuture<'m, Result<Ptr>> {
        Box::pin(async move {
            let blocks = span(level + 1);
            let range = index * blocks..(index + 1) * blocks;
            let mut here = runs.within(range.clone()).peekable();
            let Some((_, first)) = here.peek() else { return Ok(ptr) };
            if first.at == 0 && first.len == blocks {
                let birth = first.birth;
                self.drop_tree(who, ptr, level, index).await?;
                return Ok(Ptr::hole(birth));
            }
            let pieces: Vec<(u64, Run)> = here.collect();
            let body = match level {
                0 => self.merge_leaf(who, ptr, index, &pieces).await?,
                _ => self.merge_inner(who, ptr, (level, index), &pieces, runs).await?,
            };
            self.kill_node(who, ptr);
            let birth = body.birth();
            let empty = match &body {
                Body::Leaf(slots) => slots.iter().all(|slot| slot.at == 0),
                Body::Inner(children) => children.iter().all(Ptr::is_hole),
                Body::Catalog(_) | Body::Dead(..) => false,
            };
            if empty {
                return Ok(Ptr::hole(birth));
            }
            self.write(Node { level, index, writer: who.volume, body }, birth).await
        })
    }

    async fn merge_leaf(&mut self, who: Who, ptr: Ptr, index: u64, pieces: &[(u64, Run)]) -> Result<Body> {
        let mut slots = match ptr.is_hole() {
            true => Box::new([Slot { birth: ptr.birth, ..Slot::default() }; SLOTS]),
            false => match self.read(ptr, 0, index).await? {
                Body::Leaf(slots) => slots,
                _ => return Err(damaged("a leaf was expected")),
            },
        };
        for (first, run) in pieces {
            for ix in 0..run.len {
                let slot = &mut slots[(first + ix - index * SLOTS as u64) as usize];
                let old = std::mem::replace(slot, run.slot(ix));
                if old.at != 0 {
                    self.counted.add(who, old.birth, -1);
                    self.kill(who, old.at, 1, old.birth);
                }
            }
            if run.at != 0 {
                self.counted.add(who, run.birth, run.len as i64);
                self.difference.add(run.at..run.at + run.len);
            }
        }
        Ok(Body::Leaf(slots))
    }

    async fn merge_inner(
        &mut self,
        who: Who,
        ptr: Ptr,
        (level, index): (u8, u64),
        pieces: &[(u64, Run)],
        runs: &Runs,
    ) -> Result<Body> {
        let mut children = self.children(Place { tree: Tree::Volume, ptr, level, index }).await?;
        let each = span(level);
        let mut next = 0;
        for (first, run) in pieces {
            let touched = first / each..(first + run.len).div_ceil(each);
            for child in touched.start.max(next)..touched.end {
                let slot = (child - index * SLOTS as u64) as usize;
                children[slot] = self.merge(who, children[slot], (level - 1, child), runs).await?;
                next = child + 1;
            }
        }
        Ok(Body::Inner(children))
    }

    /// What is below an inner node.
    async fn children(&self, place: Place) -> Result<Box<[Ptr; SLOTS]>> {
        if place.ptr.is_hole() {
            return Ok(Box::new([place.ptr; SLOTS]));
        }
        match self.body(place).await? {
            Body::Inner(children) => Ok(children),
            Body::Leaf(_) | Body::Catalog(_) | Body::Dead(..) => Err(damaged("an inner node was expected")),
        }
    }

    /// A line lets go of a whole tree, and of what it has in common with its origin, too.
    pub(super) fn drop_tree(
        &mut self,
        who: Who,
        ptr: Ptr,
        level: u8,
        index: u64,
    ) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if ptr.is_hole() {
                return Ok(());
            }
            let body = self.read(ptr, level, index).await.unwrap_or_else(|error| {
                // Nobody wants what it leads to any more: that is lost room, and no reason to refuse everything else.
                tracing::warn!("what a node has led to stays marked as used: {error}");
                Body::Dead(Ptr::default(), Vec::new())
            });
            match body {
                Body::Leaf(slots) => {
                    for slot in slots.iter().filter(|slot| slot.at != 0) {
                        self.counted.add(who, slot.birth, -1);
                        self.kill(who, slot.at, 1, slot.birth);
                    }
                }
                Body::Inner(children) => {
                    for (ix, child) in children.iter().enumerate() {
                        self.drop_tree(who, *child, level - 1, index * SLOTS as u64 + ix as u64).await?;
                    }
                }
                Body::Catalog(_) | Body::Dead(..) => {}
            }
            self.kill_node(who, ptr);
            Ok(())
        })
    }

    /// A line lets go of the next so many leaves of a tree that are its own. What is left.
    pub(super) fn drop_some<'m>(
        &'m mut self,
        who: Who,
        ptr: Ptr,
        (level, index): (u8, u64),
        leaves: &'m mut usize,
    ) -> LocalBoxFuture<'m, Result<Ptr>> {
        Box::pin(async move {
            if ptr.is_hole() || ptr.birth <= who.origin {
                return Ok(Ptr::default());
            }
            if *leaves == 0 {
                return Ok(ptr);
            }
            if level == 0 {
                *leaves -= 1;
                self.drop_tree(who, ptr, level, index).await?;
                return Ok(Ptr::default());
            }
            let mut children = self.children(Place { tree: Tree::Volume, ptr, level, index }).await?;
            for (ix, child) in children.iter_mut().enumerate() {
                let place = (level - 1, index * SLOTS as u64 + ix as u64);
                *child = self.drop_some(who, *child, place, leaves).await?;
            }
            self.kill_node(who, ptr);
            if children.iter().all(Ptr::is_hole) {
                return Ok(Ptr::default());
            }
            let body = Body::Inner(children);
            self.write(Node { level, index, writer: who.volume, body }, ptr.birth).await
        })
    }

    /// Finds what one tree sees and the one that came from it does not, where it is younger than that: it goes to the dead.
    pub(super) fn lost(
        &mut self,
        origin: u64,
        (old, new): (Ptr, Ptr),
        (level, index): (u8, u64),
    ) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if old.is_hole() || old.at == new.at || old.birth <= origin {
                return Ok(());
            }
            // Everything in it is older than what could have taken its place.
            let who = Who { volume: 0, newest: u64::MAX, origin };
            if new.is_hole() {
                return self.drop_tree(who, old, level, index).await;
            }
            match (self.read(old, level, index).await?, self.read(new, level, index).await?) {
                (Body::Leaf(old), Body::Leaf(new)) => {
                    let gone =
                        old.iter().zip(new.iter()).filter(|(old, new)| old.at != 0 && old.at != new.at);
                    gone.for_each(|(old, _)| self.kill(who, old.at, 1, old.birth));
                }
                (Body::Inner(old), Body::Inner(new)) => {
                    for (ix, pair) in old.iter().zip(new.iter()).enumerate() {
                        let place = (level - 1, index * SLOTS as u64 + ix as u64);
                        self.lost(origin, (*pair.0, *pair.1), place).await?;
                    }
                }
                _ => {
                    return Err(damaged("two trees of one line have nodes of two kinds in one place"));
                }
            }
            self.kill_node(who, old);
            Ok(())
        })
    }

    /// A node of that level with a tree as its first child: the tree is one level higher. No snapshot sees it that is older
    /// than the birth.
    pub(super) async fn above(&mut self, tree: Ptr, level: u8, writer: u32, birth: u64) -> Result<Ptr> {
        let mut children = Box::new([Ptr::default(); SLOTS]);
        children[0] = tree;
        self.write(Node { level, index: 0, writer, body: Body::Inner(children) }, birth).await
    }

    /// Adds what was let go of to the dead list of a snapshot.
    pub(super) async fn add_dead(&mut self, snapshot: u32, mut list: Ptr) -> Result<Ptr> {
        let mut dead = std::mem::take(&mut self.dead);
        if dead.is_empty() {
            return Ok(list);
        }
        let index = u64::from(snapshot);
        if !list.is_hole()
            && let (next, part) = self.dead_part(list, snapshot).await?
            && part.len() < DEAD
        {
            self.free_node(list);
            dead.splice(..0, part);
            list = next;
        }
        for part in dead.chunks(DEAD) {
            let body = Body::Dead(list, part.to_vec());
            list = self.write(Node { level: 0, index, writer: 0, body }, 0).await?;
        }
        Ok(list)
    }

    /// Writes entries of the catalog. The new pointer to it.
    pub(super) fn catalog<'m>(
        &'m mut self,
        ptr: Ptr,
        (level, index): (u8, u64),
        entries: &'m BTreeMap<u32, Option<Entry>>,
    ) -> LocalBoxFuture<'m, Result<Ptr>> {
        Box::pin(async move {
            let each = span(level) * RECORDS as u64;
            let number = |index: u64| (index * each).min(u64::from(u32::MAX)) as u32;
            let numbers = number(index)..number(index + 1);
            if entries.range(numbers.clone()).next().is_none() {
                return Ok(ptr);
            }
            let place = Place { tree: Tree::Catalog, ptr, level, index };
            let body = match level {
                0 => {
                    let mut page = match ptr.is_hole() {
                        true => vec![None; RECORDS],
                        false => match self.body(place).await? {
                            Body::Catalog(page) => page,
                            _ => return Err(damaged("a page of the catalog was expected")),
                        },
                    };
                    for (number, entry) in entries.range(numbers) {
                        page[*number as usize % RECORDS] = entry.clone();
                    }
                    Body::Catalog(page)
                }
                _ => {
                    let mut children = self.children(place).await?;
                    for (ix, child) in children.iter_mut().enumerate() {
                        let place = (level - 1, index * SLOTS as u64 + ix as u64);
                        *child = self.catalog(*child, place, entries).await?;
                    }
                    Body::Inner(children)
                }
            };
            self.free_node(ptr);
            self.write(Node { level, index, writer: 0, body }, 0).await
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_as_high_as_it_must_be() {
        let leaves = [1, 2, 512, 513, 1 << 18, (1 << 18) + 1, 1 << 27];
        assert_eq!(leaves.map(height), [0, 1, 1, 2, 2, 3, 3]);
    }
}
