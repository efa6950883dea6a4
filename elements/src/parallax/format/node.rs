//! Nodes: leaves, inner nodes, pages of the catalog, parts of dead lists.

use super::catalog::{Entry, RECORDS};
use super::{
    BLOCK, Id, LIMIT, Map, MapRun, NODE, Pack, Ptr, damaged, expect_zeros, is_sound, put, seal, short,
    u16_at, u32_at, u40_at, u64_at, unit,
};
use blockmason::Result;
use std::ops::Range;

const MAGIC: &[u8; 4] = b"PXND";
/// Entries of a leaf or an inner node.
pub(in super::super) const SLOTS: usize = 512;
const SLOT: usize = 15;
/// Entries of a part of a dead list.
pub(in super::super) const DEAD: usize = 600;
pub(super) const HEADER: usize = 64;

const MAP: u8 = 5;

/// Where a block of a volume is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Slot {
    /// Block of the pool; 0 is a hole.
    pub(in super::super) at: u64,
    pub(in super::super) birth: u64,
    /// Of its contents, in volumes with checksums.
    pub(in super::super) crc: u32,
    /// The pack that it is in, which begins at that block.
    pub(in super::super) pack: Option<Pack>,
}

impl Slot {
    /// Of a block by itself, or the first of a row of them.
    pub(in super::super) fn new(at: u64, birth: u64) -> Slot {
        Slot { at, birth, crc: 0, pack: None }
    }

    /// The blocks of the pool that hold it and those behind it, if it is the first of so many.
    pub(in super::super) fn room(&self, len: u64) -> Range<u64> {
        match self.pack {
            _ if self.at == 0 => 0..0,
            Some(pack) => self.at..self.at + u64::from(pack.blocks),
            None => self.at..self.at + len,
        }
    }

    /// What nothing in these slots of a leaf leads to, if it has been let go of by one of a pack's.
    pub(in super::super) fn left_by<'a>(&self, unit: impl IntoIterator<Item = &'a Slot>) -> Range<u64> {
        match self.pack.is_some() && unit.into_iter().any(|other| other.at == self.at) {
            true => 0..0,
            false => self.room(1),
        }
    }
}

/// Slots of a leaf that may be in one pack with the `ix`th.
pub(in super::super) fn unit_of(slots: &[Slot; SLOTS], ix: usize) -> &[Slot] {
    let unit = unit(ix as u64);
    &slots[unit.start as usize..unit.end as usize]
}

/// Blocks in a row that a line has let go of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Dead {
    pub(in super::super) at: u64,
    pub(in super::super) birth: u64,
    pub(in super::super) len: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Body {
    Leaf(Box<[Slot; SLOTS]>),
    Inner(Box<[Ptr; SLOTS]>),
    Catalog(Vec<Option<Entry>>),
    /// The next part, and what is in this one.
    Dead(Ptr, Vec<Dead>),
    /// In format 2 alone.
    Map(Map),
}

impl Body {
    fn kind(&self) -> u8 {
        match self {
            Body::Leaf(_) => 1,
            Body::Inner(_) => 2,
            Body::Catalog(_) => 3,
            Body::Dead(..) => 4,
            Body::Map(_) => MAP,
        }
    }

    /// Blocks of one copy.
    pub(in super::super) fn blocks(&self) -> u64 {
        match self {
            Body::Map(map) => map.blocks(),
            Body::Leaf(_) | Body::Inner(_) | Body::Catalog(_) | Body::Dead(..) => NODE,
        }
    }

    /// Bytes of memory that it takes, about.
    pub(in super::super) fn memory(&self) -> u64 {
        let bytes = match self {
            Body::Leaf(_) | Body::Inner(_) => SLOTS * size_of::<Slot>(),
            Body::Catalog(entries) => entries.len() * (size_of::<Entry>() + Entry::NAME),
            Body::Dead(_, dead) => dead.len() * size_of::<Dead>(),
            Body::Map(map) => {
                map.runs.len() * size_of::<MapRun>() + map.leaves.len() * size_of::<(u16, Ptr)>()
            }
        };
        bytes as u64 + 100
    }

    /// The highest birth in it.
    pub(in super::super) fn birth(&self) -> u64 {
        match self {
            Body::Leaf(slots) => slots.iter().map(|slot| slot.birth).max(),
            Body::Inner(children) => children.iter().map(|child| child.birth).max(),
            Body::Map(map) => map.birth(),
            Body::Catalog(_) | Body::Dead(..) => None,
        }
        .unwrap_or(0)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Node {
    pub(in super::super) level: u8,
    pub(in super::super) index: u64,
    /// The volume that wrote it.
    pub(in super::super) writer: u32,
    pub(in super::super) body: Body,
}

impl Node {
    /// Bytes of a copy of most nodes.
    pub(in super::super) const BYTES: usize = (NODE * BLOCK) as usize;

    /// Bytes of a copy of the node that begins with this block.
    pub(in super::super) fn len(first: &[u8]) -> Option<usize> {
        if first.len() < HEADER || !first.starts_with(MAGIC) {
            return None;
        }
        let blocks = if first[8] == MAP { Map::blocks_of(first)? } else { NODE };
        Some((blocks * BLOCK) as usize)
    }

    /// Its bytes, the same for both places.
    pub(in super::super) fn encode(&self, id: &Id, at: [u64; 2]) -> Vec<u8> {
        let mut bytes = vec![0; (self.body.blocks() * BLOCK) as usize];
        bytes[..4].copy_from_slice(MAGIC);
        (bytes[8], bytes[9]) = (self.body.kind(), self.level);
        put(&mut bytes, 12, 4, u64::from(self.writer));
        put(&mut bytes, 16, 8, short(id));
        put(&mut bytes, 24, 8, self.index);
        put(&mut bytes, 32, 8, at[0]);
        put(&mut bytes, 40, 8, at[1]);
        match &self.body {
            Body::Leaf(slots) => {
                for (slot, at) in slots.iter().zip((HEADER..).step_by(SLOT)) {
                    put(&mut bytes, at, 5, slot.at);
                    put(&mut bytes, at + 5, 5, slot.birth);
                    put(&mut bytes, at + 10, 4, u64::from(slot.crc));
                    bytes[at + 14] = Pack::encode(slot.pack);
                }
            }
            Body::Inner(children) => {
                for (child, at) in children.iter().zip((HEADER..).step_by(SLOT)) {
                    child.put(&mut bytes, at);
                }
            }
            Body::Catalog(entries) => {
                for (entry, at) in entries.iter().zip((HEADER..).step_by(Entry::BYTES)) {
                    if let Some(entry) = entry {
                        entry.encode(&mut bytes[at..at + Entry::BYTES]);
                    }
                }
            }
            Body::Dead(next, dead) => {
                put(&mut bytes, 10, 2, dead.len() as u64);
                next.put(&mut bytes, HEADER);
                for (dead, at) in dead.iter().zip((HEADER + Ptr::BYTES..).step_by(12)) {
                    put(&mut bytes, at, 5, dead.at);
                    put(&mut bytes, at + 5, 5, dead.birth);
                    put(&mut bytes, at + 10, 2, u64::from(dead.len));
                }
            }
            Body::Map(map) => map.encode(&mut bytes),
        }
        seal(&mut bytes, 4);
        bytes
    }

    /// None if these are not the bytes of a node that was written to these places of this pool.
    pub(in super::super) fn decode(bytes: &[u8], id: &Id, at: [u64; 2]) -> Option<Node> {
        let own = Node::len(bytes) == Some(bytes.len())
            && u64_at(bytes, 16) == short(id)
            && [u64_at(bytes, 32), u64_at(bytes, 40)] == at
            && is_sound(bytes, 4);
        if !own {
            return None;
        }
        let body = Node::body(bytes).ok()?;
        let node = Node { level: bytes[9], index: u64_at(bytes, 24), writer: u32_at(bytes, 12), body };
        let count = u16_at(bytes, 10) as usize;
        let sane = match &node.body {
            Body::Leaf(_) | Body::Catalog(_) => node.level == 0 && count == 0,
            Body::Inner(_) => (1..=4).contains(&node.level) && count == 0,
            Body::Dead(..) => node.level == 0,
            Body::Map(_) => node.level == 1,
        };
        let rest = if bytes[8] == MAP { 50 } else { 48 };
        (sane && bytes[rest..HEADER].iter().all(|byte| *byte == 0)).then_some(node)
    }

    fn body(bytes: &[u8]) -> Result<Body> {
        let slots = |ix: usize| HEADER + ix * SLOT;
        let rest = |from: usize| expect_zeros(&bytes[from..], "a node");
        match bytes[8] {
            1 => {
                rest(slots(SLOTS))?;
                let mut leaf = Box::new([Slot::default(); SLOTS]);
                for (ix, slot) in leaf.iter_mut().enumerate() {
                    *slot = Slot {
                        at: u40_at(bytes, slots(ix)),
                        birth: u40_at(bytes, slots(ix) + 5),
                        crc: u32_at(bytes, slots(ix) + 10),
                        pack: Pack::decode(bytes[slots(ix) + 14])?,
                    };
                    if slot.at == 0 && slot.pack.is_some() {
                        return Err(damaged("a leaf has a hole that is in a pack"));
                    }
                }
                Ok(Body::Leaf(leaf))
            }
            2 => {
                rest(slots(SLOTS))?;
                Ok(Body::Inner(Box::new(std::array::from_fn(|ix| Ptr::at(bytes, slots(ix))))))
            }
            3 => {
                rest(HEADER + RECORDS * Entry::BYTES)?;
                let entry = |ix: usize| Entry::decode(&bytes[HEADER + ix * Entry::BYTES..][..Entry::BYTES]);
                Ok(Body::Catalog((0..RECORDS).map(entry).collect::<Result<_>>()?))
            }
            4 => {
                let count = u16_at(bytes, 10) as usize;
                if count > DEAD {
                    return Err(damaged("a dead list has more than there is room for"));
                }
                let place = |ix: usize| HEADER + Ptr::BYTES + ix * 12;
                rest(place(count))?;
                let dead = |ix: usize| Dead {
                    at: u40_at(bytes, place(ix)),
                    birth: u40_at(bytes, place(ix) + 5),
                    len: u16_at(bytes, place(ix) + 10),
                };
                Ok(Body::Dead(Ptr::at(bytes, HEADER), (0..count).map(dead).collect()))
            }
            MAP => Map::decode(bytes).map(Body::Map),
            _ => Err(damaged("it is a node of no known kind")),
        }
    }
}

const _: () = assert!(HEADER + SLOTS * SLOT <= Node::BYTES);
const _: () = assert!(HEADER + RECORDS * Entry::BYTES <= Node::BYTES);
const _: () = assert!(HEADER + Ptr::BYTES + DEAD * 12 <= Node::BYTES);
const _: () = assert!(LIMIT == 1 << (8 * 5));

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn body() -> impl Strategy<Value = Body> {
        let number = || 0..LIMIT;
        let pack = [0, 0x11, 0x27].map(|byte| Pack::decode(byte).unwrap());
        let slot = (1..LIMIT, number(), any::<u32>(), 0..3_usize)
            .prop_map(move |(at, birth, crc, ix)| Slot { at, birth, crc, pack: pack[ix] });
        let ptr = || (number(), number(), number()).prop_map(|(a, b, birth)| Ptr { at: [a, b], birth });
        let dead = (number(), number(), any::<u16>()).prop_map(|(at, birth, len)| Dead { at, birth, len });
        let leaf = || (number(), 1..LIMIT, 1..LIMIT).prop_map(|(birth, a, b)| Ptr { at: [a, b], birth });
        let part = (0..4u8, 1u64..=512, number(), number(), leaf());
        let map = prop::collection::vec(part, 0..500).prop_map(|parts| {
            let mut map = Map::default();
            for (ix, (what, len, at, birth, leaf)) in parts.into_iter().enumerate() {
                let first = ix as u64 * 512 + 512 - len;
                match what {
                    0 => {}
                    1 => map.leaves.push((ix as u16, leaf)),
                    _ => map.runs.push(MapRun { first, len, at, birth }),
                }
            }
            Body::Map(map)
        });
        prop_oneof![
            map,
            prop::collection::vec(slot, SLOTS).prop_map(|all| Body::Leaf(all.try_into().unwrap())),
            prop::collection::vec(ptr(), SLOTS).prop_map(|all| Body::Inner(all.try_into().unwrap())),
            (ptr(), prop::collection::vec(dead, 0..DEAD)).prop_map(|(next, all)| Body::Dead(next, all)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_node_says_what_was_written_and_no_flipped_bit_is_believed(
            body in body(), index in any::<u64>(), bits in prop::collection::vec(0..Node::BYTES * 8, 50),
        ) {
            let level = u8::from(matches!(body, Body::Inner(_) | Body::Map(_)));
            let node = Node { level, index, writer: 7, body };
            let (id, at) = ([3; 16], [77, 1 << 39]);
            let bytes = node.encode(&id, at);
            prop_assert_eq!(Node::decode(&bytes, &id, at), Some(node));
            prop_assert_eq!(Node::decode(&bytes, &id, [78, 1 << 39]), None);
            prop_assert_eq!(Node::decode(&bytes, &[4; 16], at), None);
            for bit in bits {
                let (mut other, bit) = (bytes.clone(), bit % (8 * bytes.len()));
                other[bit / 8] ^= 1 << (bit % 8);
                prop_assert_eq!(Node::decode(&other, &id, at), None);
            }
        }

        #[test]
        fn whatever_is_read_as_a_node_is_written_the_same(
            kind in 0u8..7, noise in prop::collection::vec((64..Node::BYTES, any::<u8>()), 0..20),
        ) {
            let (id, at) = ([3; 16], [77, 78]);
            let dead = Body::Dead(Ptr::default(), Vec::new());
            let mut bytes = Node { level: 0, index: 0, writer: 0, body: dead }.encode(&id, at);
            bytes[8] = kind;
            noise.into_iter().for_each(|(place, byte)| bytes[place] = byte);
            seal(&mut bytes, 4);
            if let Some(node) = Node::decode(&bytes, &id, at) {
                prop_assert_eq!(node.encode(&id, at), bytes);
            }
        }
    }
}
