//! Whose the room of a pool is, and how it is given back to the file system that the pool is on.

use super::below::Below;
use super::format::{BLOCK, Body, Entry, EntryKind, NODE, Ptr, Slot, damaged};
use super::items::Item;
use super::nodes::{Place, Tree};
use super::pool::Pool;
use blockmason::{Error, Kind, LocalBoxFuture, Request, Result};
use blockmason::{Op, Origin};
use std::ops::Range;
use std::sync::Arc;

/// Room of a volume or a snapshot, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Account {
    /// Blocks of it that hold data.
    pub(super) mapped: u64,
    /// Of those, what something else sees as well.
    pub(super) shared: u64,
    /// Comes back if it is deleted, with the nodes that lead to it; of a volume: together with its snapshots.
    pub(super) freed: u64,
    /// Of a volume, of what is its own and its snapshots': what is compressed, and what that takes.
    pub(super) packed: [u64; 2],
}

/// Extents whose free blocks are given back together.
const AT_ONCE: usize = if cfg!(test) { 3 } else { 256 };

/// Blocks of a tree.
#[derive(Clone, Copy, Default)]
pub(super) struct Counted {
    /// Of the volume.
    pub(super) data: u64,
    /// Of the pool: what those take.
    pub(super) room: u64,
    pub(super) nodes: u64,
    /// What of both is in packs.
    packed: [u64; 2],
    /// Those of the volume that were written or discarded.
    pub(super) changed: u64,
    /// Blocks that the volume has: a tree reaches further.
    end: u64,
}

impl Counted {
    fn add(&mut self, first: u64, len: u64, slot: Slot, room: u64) {
        self.changed += (first + len).min(self.end).saturating_sub(first);
        self.data += if slot.at == 0 { 0 } else { len };
        self.room += room;
        if slot.pack.is_some() {
            self.packed = [self.packed[0] + len, self.packed[1] + room];
        }
    }
}

/// A tree as it was at one instant, whose blocks stay what they are as long as this is held.
pub(super) struct Held {
    root: Ptr,
    height: u8,
    end: u64,
    _era: Arc<()>,
}

impl Held {
    pub(super) fn new(entry: &Entry, era: &Arc<()>) -> Held {
        Held { root: entry.root, height: entry.height, end: entry.size / BLOCK, _era: era.clone() }
    }
}

impl Pool {
    /// What a volume or snapshot takes.
    ///
    /// # Errors
    /// A node cannot be read.
    pub(super) async fn account(&self, number: u32, below: Below<'_>) -> Result<Account> {
        self.checkpoint(below).await?;
        let (entry, tree) = {
            let core = self.core();
            let gone = || Error::new(Kind::Unavailable, "it has just been deleted");
            let entry = core.catalog.get(&number).cloned().ok_or_else(gone)?;
            let tree = Held::new(&entry, &core.era);
            (entry, tree)
        };
        let mapped = entry.mapped;
        match entry.kind {
            EntryKind::Volume { origin, .. } => {
                let newest = self.core().ancestors(number).0.1;
                let alone = self.younger(&tree, newest.max(origin.1), below).await?;
                let line = self.younger(&tree, origin.1, below).await?;
                let mut freed = line.room + line.nodes;
                for (snapshot, dead) in self.dead_lists(number) {
                    freed += self.dead(snapshot, dead, origin.1, below).await?;
                }
                let shared = mapped.saturating_sub(alone.data);
                Ok(Account { mapped, shared, freed, packed: line.packed })
            }
            EntryKind::Snapshot { before, dead, .. } => {
                let before = self.core().birth(before).unwrap_or(0);
                let freed = self.dead(number, dead, before, below).await?;
                // A dead list does not tell data from nodes.
                Ok(Account { mapped, shared: mapped.saturating_sub(freed), freed, packed: [0; 2] })
            }
        }
    }

    fn dead_lists(&self, volume: u32) -> Vec<(u32, Ptr)> {
        let core = self.core();
        let list = |(number, entry): (&u32, &Entry)| match entry.kind {
            EntryKind::Snapshot { volume: of, dead, .. } if of == volume => Some((*number, dead)),
            _ => None,
        };
        core.catalog.iter().filter_map(list).collect()
    }

    /// Blocks of a tree that are younger than that.
    pub(super) async fn younger(&self, tree: &Held, birth: u64, below: Below<'_>) -> Result<Counted> {
        let mut counted = Counted { end: tree.end, ..Counted::default() };
        self.count_younger((tree.root, tree.height, 0), birth, &mut counted, below).await?;
        Ok(counted)
    }

    fn count_younger<'a>(
        &'a self,
        (ptr, level, index): (Ptr, u8, u64),
        birth: u64,
        counted: &'a mut Counted,
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
                    counted.nodes += 2 * node.body.blocks();
                    Item::all(self.format, &node.body, level, index)
                }
            };
            for item in items {
                match item {
                    Item::Run { first, len, slot, room } if slot.birth > birth => {
                        counted.add(first, len, slot, room.end - room.start);
                    }
                    Item::Run { .. } => {}
                    Item::Node(Place { ptr, level, index, .. }) => {
                        self.count_younger((ptr, level, index), birth, counted, below).await?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Blocks of a dead list that are younger than that, and those of the list itself.
    pub(super) async fn dead(
        &self,
        snapshot: u32,
        mut list: Ptr,
        birth: u64,
        below: Below<'_>,
    ) -> Result<u64> {
        let (mut blocks, mut parts) = (0, 0);
        while !list.is_hole() {
            parts += 1;
            if parts > self.space.blocks.all() / NODE {
                return Err(damaged("a dead list leads back to itself"));
            }
            let place = Place { tree: Tree::DeadList, ptr: list, level: 0, index: u64::from(snapshot) };
            let node = self.nodes.get(&place, below).await?;
            let Body::Dead(next, dead) = &node.body else { return Err(damaged("a dead list was expected")) };
            let young = dead.iter().filter(|dead| dead.birth > birth);
            blocks += 2 * NODE + young.map(|dead| u64::from(dead.len)).sum::<u64>();
            list = *next;
        }
        Ok(blocks)
    }

    /// Ends what is being deleted, and gives the room that is free back to the file system or device that the pool is on. The
    /// bytes given back, or none if it takes none.
    ///
    /// # Errors
    /// As those of a checkpoint.
    pub(super) async fn collect(&self, below: Below<'_>) -> Result<Option<u64>> {
        self.check()?;
        self.delete_all(below).await?;
        // What has just been let go of is free once a later checkpoint has been made.
        self.checkpoint(below).await?;
        // A checkpoint writes what the table says of extents.
        let _alone = self.checkpointing.lock().await;
        let (mut extent, mut given) = (0, 0);
        while extent < self.space.label().extents {
            let mut taken = Vec::new();
            while taken.len() < AT_ONCE
                && let Some((at, free)) = self.space.hollow_out(extent)
            {
                extent = at + 1;
                taken.push((at, free));
            }
            if taken.is_empty() {
                break;
            }
            let extents: Vec<u64> = taken.iter().map(|(at, _)| *at).collect();
            let free: Vec<Range<u64>> = taken.into_iter().flat_map(|(_, free)| free).collect();
            // Said before it is so: else whoever opens the pool next counts on room that is not there.
            let said = async {
                self.space.write_known(&extents, below).await?;
                below.flush().await
            };
            let done = match said.await {
                Ok(()) => punch(&free, below).await,
                Err(error) => {
                    self.break_down(&error);
                    Err(error)
                }
            };
            free.into_iter().for_each(|run| self.space.give(run));
            match done {
                Ok(blocks) => given += blocks * BLOCK,
                Err(error) if error.kind() == Kind::Unsupported => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(given))
    }
}

async fn punch(free: &[Range<u64>], below: Below<'_>) -> Result<u64> {
    let mut blocks = 0;
    for run in free {
        let len = run.end - run.start;
        let mut req = Request::new(Op::Discard, run.start * BLOCK, len * BLOCK);
        req.origin = Origin::Internal;
        below.submit(req).await?;
        blocks += len;
    }
    Ok(blocks)
}
