//! What only trees of format 2 do: runs go into maps, leaves come and go, and what lies in a row needs no node.

use super::format::{Body, EXTENT, Format, Map, MapRun, NODE, Node, Ptr, SLOTS, Slot, damaged};
use super::merge::{Merge, Who, span};
use super::runs::{Run, Runs};
use blockmason::Result;
use std::collections::BTreeMap;
use std::ops::Range;

/// A leaf of so few runs is part of its map.
const FEW: usize = 16;

/// Blocks of a leaf, each by itself.
type Slots = Box<[Slot; SLOTS]>;

impl Body {
    /// A hole, or a superpage, as a node of that level would say it.
    pub(super) fn spread(format: Format, ptr: Ptr, level: u8) -> Body {
        let part = |ix: u64, each: u64| if ptr.is_hole() { 0 } else { ptr.at[0] + ix * each };
        match (level, format) {
            (0, _) => {
                let slot = |ix| Slot::new(part(ix as u64, 1), ptr.birth);
                Body::Leaf(Box::new(std::array::from_fn(slot)))
            }
            (1, Format::Two) => {
                let all = MapRun { first: 0, len: Map::BLOCKS, at: part(0, 1), birth: ptr.birth };
                let runs = if ptr == Ptr::default() { Vec::new() } else { vec![all] };
                Body::Map(Map { runs, leaves: Vec::new() })
            }
            _ => {
                let child = |ix| Ptr { at: [part(ix as u64, span(level)), 0], birth: ptr.birth };
                Body::Inner(Box::new(std::array::from_fn(child)))
            }
        }
    }

    /// The node of that level that has a tree as its first child.
    pub(super) fn above(format: Format, tree: Ptr, level: u8) -> Body {
        match (Body::spread(format, Ptr::default(), level), Body::spread(format, tree, level - 1)) {
            (Body::Map(mut map), Body::Leaf(slots)) => {
                match tree.is_node() {
                    true => map.leaves.push((0, tree)),
                    false => map.runs = runs_of(&slots, 0),
                }
                Body::Map(map)
            }
            (Body::Inner(mut children), _) => {
                children[0] = tree;
                Body::Inner(children)
            }
            (body, _) => body,
        }
    }

    /// The pointer that says all of a node of that level without one, if there is such a pointer. Holes of which a snapshot of
    /// the line sees some and not others stay apart, but for those of one leaf.
    pub(super) fn without_node(&self, who: Who, format: Format, level: u8) -> Option<Ptr> {
        let birth = self.birth();
        match self {
            Body::Leaf(slots) => slots.iter().all(|slot| slot.at == 0).then(|| Ptr::hole(birth)),
            Body::Inner(children) if children.iter().all(Ptr::is_hole) => {
                who.same(children.iter().map(|child| child.birth)).then(|| Ptr::hole(birth))
            }
            Body::Inner(children) if format == Format::Two => {
                let goes_on = |pair: &[Ptr]| {
                    pair[0].at[0] + span(level) == pair[1].at[0] && pair[0].birth == pair[1].birth
                };
                let rows = children.iter().all(|child| !child.is_hole() && !child.is_node());
                (rows && children.windows(2).all(goes_on)).then_some(children[0])
            }
            Body::Map(map) if map.leaves.is_empty() && map.runs.iter().all(|run| run.at == 0) => {
                let never = map.runs.iter().map(|run| run.len).sum::<u64>() < Map::BLOCKS;
                let births = map.runs.iter().map(|run| run.birth).chain(never.then_some(0));
                who.same(births).then(|| Ptr::hole(birth))
            }
            Body::Map(map) => match &map.runs[..] {
                [run] if run.len == Map::BLOCKS => Some(Ptr::row(run.at, run.birth)),
                _ => None,
            },
            Body::Inner(_) | Body::Catalog(_) | Body::Dead(..) => None,
        }
    }
}

/// Runs that have a leaf's blocks, from the first block of a map that it has on.
fn runs_of(slots: &[Slot; SLOTS], first: u64) -> Vec<MapRun> {
    let mut runs: Vec<MapRun> = Vec::new();
    for (first, slot) in (first..).zip(slots).filter(|(_, slot)| **slot != Slot::default()) {
        join(&mut runs, MapRun { first, len: 1, at: slot.at, birth: slot.birth });
    }
    runs
}

/// Adds a run behind others, or to the last of them.
fn join(runs: &mut Vec<MapRun>, run: MapRun) {
    match runs.last_mut() {
        Some(last) if last.joins(&run) => last.len += run.len,
        _ => runs.push(run),
    }
}

/// A leaf's blocks, as runs have them.
pub(super) fn slots_of(runs: impl Iterator<Item = MapRun>) -> Slots {
    let mut slots = Box::new([Slot::default(); SLOTS]);
    for run in runs {
        for ix in 0..run.len {
            let at = if run.at == 0 { 0 } else { run.at + ix };
            slots[((run.first + ix) % EXTENT) as usize] = Slot::new(at, run.birth);
        }
    }
    slots
}

pub(super) fn blocks_of(leaf: u16) -> Range<u64> {
    u64::from(leaf) * EXTENT..(u64::from(leaf) + 1) * EXTENT
}

impl Map {
    /// Leaves to be made of the runs that lie within one alone, those of most runs first, so that a map is not too long.
    fn to_spill(&self) -> Vec<u16> {
        let inside = |run: &&MapRun| run.first / EXTENT == (run.end() - 1) / EXTENT;
        let runs: Vec<&MapRun> = self.runs.iter().filter(inside).collect();
        let same = runs.chunk_by(|one, other| one.first / EXTENT == other.first / EXTENT);
        let mut leaves: Vec<(usize, u16)> = same
            .filter(|same| same.len() > 1)
            .map(|same| (same.len(), (same[0].first / EXTENT) as u16))
            .collect();
        leaves.sort_unstable_by_key(|(count, _)| std::cmp::Reverse(*count));
        let mut over = self.over();
        let needed = leaves.iter().take_while(|(count, _)| {
            let needed = over > 0;
            over = over.saturating_sub(Map::saved(*count));
            needed
        });
        let mut needed: Vec<u16> = needed.map(|(_, leaf)| *leaf).collect();
        needed.sort_unstable();
        needed
    }

    /// Takes runs out that lie in the blocks of these leaves.
    fn take(&mut self, leaves: &[u16]) -> Vec<Slots> {
        let slots = leaves.iter().map(|leaf| slots_of(self.within(&blocks_of(*leaf)))).collect();
        let mut left = Vec::new();
        for run in std::mem::take(&mut self.runs) {
            let touched = run.first / EXTENT..(run.end() - 1) / EXTENT + 1;
            let kept = touched
                .filter_map(|leaf| u16::try_from(leaf).ok())
                .filter(|leaf| leaves.binary_search(leaf).is_err());
            kept.filter_map(|leaf| run.cut(&blocks_of(leaf))).for_each(|part| join(&mut left, part));
        }
        self.runs = left;
        slots
    }
}

impl Merge<'_> {
    /// Brings runs into a map: into its leaves where there are some, or where blocks have checksums or are in packs, else into its
    /// runs.
    pub(super) async fn merge_map(
        &mut self,
        who: Who,
        mut map: Map,
        index: u64,
        pieces: &[(u64, Run)],
    ) -> Result<Body> {
        // What is written now is seen by no snapshot that is there, whatever is in it.
        let born = pieces.iter().map(|(_, run)| run.birth).max().unwrap_or(0);
        let busy = busy(index, pieces);
        let mut open: BTreeMap<u16, Slots> = BTreeMap::new();
        let mut runs = Runs::default();
        for run in std::mem::take(&mut map.runs) {
            runs.put(run.first, Run::new(run.len, run.at, run.birth, 0, &[]));
        }
        for (first, run) in pieces {
            let (mut at, end) = (first - index * Map::BLOCKS, first - index * Map::BLOCKS + run.len);
            while at < end {
                let leaf = (at / EXTENT) as u16;
                let part = run.part(at - (first - index * Map::BLOCKS), blocks_of(leaf).end.min(end) - at);
                if !open.contains_key(&leaf) {
                    let slots = self.open_leaf(who, &mut map, leaf, index).await?;
                    let as_leaf = part.needs_leaf() || usize::from(busy[usize::from(leaf)]) > FEW;
                    let slots = slots.or_else(|| as_leaf.then(|| take(&mut runs, leaf)));
                    open.extend(slots.map(|slots| (leaf, slots)));
                }
                let len = part.len;
                match open.get_mut(&leaf) {
                    Some(slots) => self.merge_slots(who, slots, at % EXTENT, &part),
                    None => {
                        self.place_data(who, &part);
                        for old in runs.put(at, part) {
                            self.kill_data(who, old.slot(0), old.len, old.room());
                        }
                    }
                }
                at += len;
            }
        }
        self.close_map((who, born), map, index, runs, open).await.map(Body::Map)
    }

    /// Takes a leaf out of a map, if it has that one, to change it.
    async fn open_leaf(&mut self, who: Who, map: &mut Map, leaf: u16, index: u64) -> Result<Option<Slots>> {
        let Ok(place) = map.leaves.binary_search_by_key(&leaf, |(ix, _)| *ix) else { return Ok(None) };
        let (_, ptr) = map.leaves.remove(place);
        let Body::Leaf(slots) = self.read(ptr, 0, index * SLOTS as u64 + u64::from(leaf)).await? else {
            return Err(damaged("a leaf was expected"));
        };
        self.kill_node(who, ptr, NODE);
        Ok(Some(slots))
    }

    /// The map with those runs and changed leaves, which are written.
    async fn close_map(
        &mut self,
        by: (Who, u64),
        mut map: Map,
        index: u64,
        runs: Runs,
        open: BTreeMap<u16, Slots>,
    ) -> Result<Map> {
        let mut parts: Vec<MapRun> =
            runs.within(0..Map::BLOCKS).map(|(first, run)| part(first, &run)).collect();
        let mut full = Vec::new();
        for (leaf, slots) in open {
            let few = runs_of(&slots, blocks_of(leaf).start);
            let needs_leaf = slots.iter().any(|slot| slot.crc != 0 || slot.pack.is_some());
            if needs_leaf || few.len() > FEW { full.push((leaf, slots)) } else { parts.extend(few) }
        }
        parts.sort_by_key(|run| run.first);
        parts.into_iter().for_each(|run| join(&mut map.runs, run));
        for (leaf, slots) in full {
            self.write_leaf(by, &mut map, leaf, index, slots).await?;
        }
        loop {
            let leaves = map.to_spill();
            if leaves.is_empty() {
                return Ok(map);
            }
            for (slots, leaf) in map.take(&leaves).into_iter().zip(leaves) {
                self.write_leaf(by, &mut map, leaf, index, slots).await?;
            }
        }
    }

    /// Writes a leaf by whom and born when is said.
    async fn write_leaf(
        &mut self,
        (who, born): (Who, u64),
        map: &mut Map,
        leaf: u16,
        index: u64,
        slots: Slots,
    ) -> Result<()> {
        let body = Body::Leaf(slots);
        let (index, birth) = (index * SLOTS as u64 + u64::from(leaf), body.birth().max(born));
        let ptr = self.write(Node { level: 0, index, writer: who.volume, body }, birth).await?;
        let place = map.leaves.partition_point(|(other, _)| *other < leaf);
        map.leaves.insert(place, (leaf, ptr));
        Ok(())
    }
}

/// How many pieces touch each leaf of a map.
fn busy(index: u64, pieces: &[(u64, Run)]) -> [u16; SLOTS] {
    let mut busy = [0_u16; SLOTS];
    for (first, run) in pieces {
        let first = first - index * Map::BLOCKS;
        for leaf in first / EXTENT..(first + run.len).div_ceil(EXTENT) {
            busy[leaf as usize] += 1;
        }
    }
    busy
}

fn part(first: u64, run: &Run) -> MapRun {
    MapRun { first, len: run.len, at: run.at, birth: run.birth }
}

/// The blocks of a leaf that are in runs, which lose them.
fn take(runs: &mut Runs, leaf: u16) -> Slots {
    let range = blocks_of(leaf);
    let taken: Vec<MapRun> = runs.within(range.clone()).map(|(first, run)| part(first, &run)).collect();
    runs.cut(range);
    slots_of(taken.into_iter())
}
