//! Brings changes into trees: writes the nodes that change to new places, and finds out what nothing leads to any more.

use super::below::Below;
use super::format::{
    Body, DEAD, Dead, Entry, Format, NODE, Node, Ptr, RECORDS, SLOTS, Slot, damaged, unit_of,
};
use super::items::Item;
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

impl Who {
    /// True if each snapshot of the line is older than all of these births, or than none; those that come later are older than
    /// none.
    pub(super) fn same(&self, births: impl Iterator<Item = u64>) -> bool {
        let newest = self.newest.max(self.origin);
        let mut classes = births.map(|birth| if birth > newest { u64::MAX } else { birth });
        let first = classes.next();
        newest == 0 || classes.all(|class| Some(class) == first)
    }
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
    pub(super) format: Format,
    space: &'a Space,
    nodes: &'a Nodes,
    pub(super) below: Below<'a>,
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
            format: pool.format,
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
    pub(super) fn kill(&mut self, who: Who, at: u64, len: u64, birth: u64) {
        if birth <= who.origin {
            return;
        }
        if birth > who.newest {
            return self.free(at..at + len);
        }
        match self.dead.last_mut() {
            Some(last)
                if last.birth == birth
                    && last.at + u64::from(last.len) == at
                    && u64::from(last.len) + len <= u64::from(u16::MAX) =>
            {
                last.len += len as u16;
            }
            _ => {
                let each = usize::from(u16::MAX);
                let parts = (at..at + len).step_by(each).map(|first| (first, (at + len - first) as usize));
                self.dead.extend(parts.map(|(at, left)| Dead { at, birth, len: left.min(each) as u16 }));
            }
        }
    }

    /// Both copies of a node of so many blocks.
    pub(super) fn kill_node(&mut self, who: Who, ptr: Ptr, blocks: u64) {
        if ptr.is_node() {
            ptr.at.into_iter().for_each(|at| self.kill(who, at, blocks, ptr.birth));
        }
    }

    /// A line lets go of so many blocks of a volume, and with them of what nothing of it leads to then.
    pub(super) fn kill_data(&mut self, who: Who, slot: Slot, len: u64, room: Range<u64>) {
        if slot.at != 0 {
            self.counted.add(who, slot.birth, -(len as i64));
        }
        if !room.is_empty() {
            self.kill(who, room.start, room.end - room.start, slot.birth);
        }
    }

    /// Blocks of a volume are where a run says.
    pub(super) fn place_data(&mut self, who: Who, run: &Run) {
        if run.at != 0 {
            self.counted.add(who, run.birth, run.len as i64);
            self.difference.add(run.room());
        }
    }

    /// Room for both copies of a node.
    async fn place(&mut self, blocks: u64) -> Result<[u64; 2]> {
        let want = Want { least: blocks, most: blocks };
        let first = self.space.take(None, want, self.below).await?.start;
        // Not beside the first one: what destroys a piece of the medium should not destroy both.
        let second = self.space.take(Some(first + super::format::EXTENT / 2), want, self.below).await?.start;
        for at in [first, second] {
            self.difference.add(at..at + blocks);
        }
        Ok([first, second])
    }

    pub(super) async fn write(&mut self, node: Node, birth: u64) -> Result<Ptr> {
        // On a fast device nothing of all this ever waits, and guests would.
        blockmason::rt::pass().await;
        let ptr = Ptr { at: self.place(node.body.blocks()).await?, birth };
        self.nodes.write(ptr, node, self.below).await?;
        Ok(ptr)
    }

    /// The body of a node of a volume's tree.
    pub(super) async fn read(&self, ptr: Ptr, level: u8, index: u64) -> Result<Body> {
        self.body(Place { tree: Tree::Volume(self.format), ptr, level, index }).await
    }

    async fn body(&self, place: Place) -> Result<Body> {
        let node = self.nodes.get(&place, self.below).await?;
        Ok(node.body.clone())
    }

    /// The volume that wrote a node, and the blocks of each of its copies.
    pub(super) async fn old(&self, place: &Place) -> Result<(u32, u64)> {
        let node = self.nodes.get(place, self.below).await?;
        Ok((node.writer, node.body.blocks()))
    }

    /// A part of a snapshot's dead list: the next one, and what is in this one.
    pub(super) async fn dead_part(&self, ptr: Ptr, snapshot: u32) -> Result<(Ptr, Vec<Dead>)> {
        let place = Place { tree: Tree::DeadList, ptr, level: 0, index: u64::from(snapshot) };
        match self.body(place).await? {
            Body::Dead(next, dead) => Ok((next, dead)),
            _ => Err(damaged("a dead list was expected")),
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
            let old = self.inside(ptr, level, index).await?;
            let blocks = if ptr.is_node() { old.blocks() } else { 0 };
            let body = match old {
                Body::Leaf(mut slots) => {
                    for (first, run) in &pieces {
                        self.merge_slots(who, &mut slots, first % SLOTS as u64, run);
                    }
                    Body::Leaf(slots)
                }
                Body::Map(map) => self.merge_map(who, map, index, &pieces).await?,
                Body::Inner(children) => {
                    self.merge_inner(who, children, (level, index), &pieces, runs).await?
                }
                Body::Catalog(_) | Body::Dead(..) => return Err(damaged("a node of a volume was expected")),
            };
            self.kill_node(who, ptr, blocks);
            let birth = body.birth();
            match body.without_node(who, self.format, level) {
                Some(ptr) => Ok(ptr),
                None => self.write(Node { level, index, writer: who.volume, body }, birth).await,
            }
        })
    }

    /// What a pointer leads to as a node has it, be there one or not.
    pub(super) async fn inside(&self, ptr: Ptr, level: u8, index: u64) -> Result<Body> {
        match ptr.is_node() {
            true => self.read(ptr, level, index).await,
            false => Ok(Body::spread(self.format, ptr, level)),
        }
    }

    /// Brings a run into the blocks of a leaf, from the `first` on.
    pub(super) fn merge_slots(&mut self, who: Who, slots: &mut [Slot; SLOTS], first: u64, run: &Run) {
        for ix in 0..run.len {
            let at = (first + ix) as usize;
            let old = std::mem::replace(&mut slots[at], run.slot(ix));
            let room = old.left_by(unit_of(slots, at));
            self.kill_data(who, old, 1, room);
        }
        self.place_data(who, run);
    }

    async fn merge_inner(
        &mut self,
        who: Who,
        mut children: Box<[Ptr; SLOTS]>,
        (level, index): (u8, u64),
        pieces: &[(u64, Run)],
        runs: &Runs,
    ) -> Result<Body> {
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

    /// A line lets go of a whole tree, and of what it has in common with its origin, too.
    pub(super) fn drop_tree(
        &mut self,
        who: Who,
        ptr: Ptr,
        level: u8,
        index: u64,
    ) -> LocalBoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let items = match Item::of(self.format, ptr, level, index) {
                run @ Item::Run { .. } => vec![run],
                Item::Node(place) => match self.body(place).await {
                    Ok(body) => {
                        self.kill_node(who, ptr, body.blocks());
                        Item::all(self.format, &body, level, index)
                    }
                    Err(error) => {
                        // Nobody wants what it leads to any more: that is lost room, and no reason to refuse everything else.
                        tracing::warn!("what a node has led to stays marked as used: {error}");
                        self.kill_node(who, ptr, place.least());
                        Vec::new()
                    }
                },
            };
            for item in items {
                match item {
                    Item::Run { len, slot, room, .. } => self.kill_data(who, slot, len, room),
                    Item::Node(Place { ptr, level, index, .. }) => {
                        self.drop_tree(who, ptr, level, index).await?;
                    }
                }
            }
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
            if !ptr.is_node() || self.is_lowest(level) {
                *leaves -= 1;
                self.drop_tree(who, ptr, level, index).await?;
                return Ok(Ptr::default());
            }
            let Ok(Body::Inner(mut children)) = self.read(ptr, level, index).await else {
                self.drop_tree(who, ptr, level, index).await?;
                return Ok(Ptr::default());
            };
            for (ix, child) in children.iter_mut().enumerate() {
                let place = (level - 1, index * SLOTS as u64 + ix as u64);
                *child = self.drop_some(who, *child, place, leaves).await?;
            }
            self.kill_node(who, ptr, NODE);
            if children.iter().all(Ptr::is_hole) {
                return Ok(Ptr::default());
            }
            let body = Body::Inner(children);
            self.write(Node { level, index, writer: who.volume, body }, ptr.birth).await
        })
    }

    /// True of a node below which there are no inner ones: a leaf, or a map.
    fn is_lowest(&self, level: u8) -> bool {
        level <= u8::from(self.format == Format::Two)
    }

    /// A node of that level with a tree as its first child: the tree is one level higher. No snapshot sees it that is older
    /// than the birth.
    pub(super) async fn above(&mut self, tree: Ptr, level: u8, writer: u32, birth: u64) -> Result<Ptr> {
        // Catalogs are the same in both formats.
        let format = if writer == 0 { Format::One } else { self.format };
        let body = Body::above(format, tree, level);
        self.write(Node { level, index: 0, writer, body }, birth).await
    }

    /// Adds what was let go of to the dead list of a snapshot.
    pub(super) async fn add_dead(&mut self, snapshot: u32, mut list: Ptr) -> Result<Ptr> {
        let mut dead = std::mem::take(&mut self.dead);
        if dead.is_empty() {
            return Ok(list);
        }
        let index = u64::from(snapshot);
        // A part that cannot be read stays where it is.
        if !list.is_hole()
            && let Ok((next, part)) = self.dead_part(list, snapshot).await
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
                    let mut children = match ptr.is_hole() {
                        true => Box::new([ptr; SLOTS]),
                        false => match self.body(place).await? {
                            Body::Inner(children) => children,
                            _ => return Err(damaged("an inner node was expected")),
                        },
                    };
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
