//! What nodes of a volume's tree lead to, whatever their kind and format.

use super::format::{Body, EXTENT, Format, Map, Ptr, SLOTS, Slot, unit};
use super::merge::span;
use super::nodes::{Place, Tree};
use std::ops::Range;

/// What is at a place of a tree.
#[derive(Clone, Debug)]
pub(super) enum Item {
    /// Blocks of the volume in a row that are in a row in the pool, or in one pack, and born at once; or a hole. The blocks of the
    /// pool that hold them: of a pack with the first of its items alone.
    Run { first: u64, len: u64, slot: Slot, room: Range<u64> },
    /// A node that says more.
    Node(Place),
}

impl Item {
    /// What a pointer says.
    pub(super) fn of(format: Format, ptr: Ptr, level: u8, index: u64) -> Item {
        match ptr.is_node() {
            true => Item::Node(Place { tree: Tree::Volume(format), ptr, level, index }),
            false => {
                let len = span(level + 1);
                Item::run(index * len, len, Slot::new(ptr.at[0], ptr.birth))
            }
        }
    }

    /// Blocks that are in no pack.
    fn run(first: u64, len: u64, slot: Slot) -> Item {
        Item::Run { first, len, slot, room: slot.room(len) }
    }

    /// The first block of it.
    fn first(&self) -> u64 {
        match self {
            Item::Run { first, .. } => *first,
            Item::Node(place) => place.index * span(place.level + 1),
        }
    }

    /// All that a node of that level and index says, in order; holes that have always been some may be left out.
    pub(super) fn all(format: Format, body: &Body, level: u8, index: u64) -> Vec<Item> {
        let child = |ix: u64| index * SLOTS as u64 + ix;
        match body {
            Body::Leaf(slots) => {
                let item = |(ix, slot): (usize, &Slot)| {
                    let before = &slots[unit(ix as u64).start as usize..ix];
                    Item::Run { first: child(ix as u64), len: 1, slot: *slot, room: slot.left_by(before) }
                };
                slots.iter().enumerate().map(item).collect()
            }
            Body::Inner(children) => {
                let children = (child(0)..).zip(children.iter());
                children.map(|(index, ptr)| Item::of(format, *ptr, level - 1, index)).collect()
            }
            Body::Map(map) => {
                let leaves = map.leaves.iter();
                let leaves = leaves.map(|(ix, leaf)| Item::of(format, *leaf, 0, child(u64::from(*ix))));
                let runs = map.runs.iter().map(|run| {
                    Item::run(index * Map::BLOCKS + run.first, run.len, Slot::new(run.at, run.birth))
                });
                let mut all: Vec<Item> = leaves.chain(runs).collect();
                all.sort_by_key(Item::first);
                all
            }
            Body::Catalog(_) | Body::Dead(..) => Vec::new(),
        }
    }
}

const _: () = assert!(EXTENT == SLOTS as u64);
