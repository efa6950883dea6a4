//! Where blocks of a volume are that are not in its tree yet.

use super::format::{Pack, Slot, unit};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Blocks in a row that are in a row in the pool, too, or a hole.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) len: u64,
    /// The first block of the pool; 0 is a hole.
    pub(super) at: u64,
    pub(super) birth: u64,
    /// The record of the log that says so.
    pub(super) number: u64,
    /// All of it is in one pack, which begins at that block of the pool.
    pub(super) pack: Option<Pack>,
    /// Checksums of the blocks and how many of them come before this run, in volumes that have them.
    crcs: Option<(Arc<[u32]>, usize)>,
}

impl Run {
    pub(super) fn new(len: u64, at: u64, birth: u64, number: u64, crcs: &[u32]) -> Run {
        let crcs = (!crcs.is_empty()).then(|| (Arc::from(crcs), 0));
        Run { len, at, birth, number, pack: None, crcs }
    }

    /// The same, in a pack.
    pub(super) fn packed(self, pack: Option<Pack>) -> Run {
        Run { pack, ..self }
    }

    /// `len` blocks of it, from the `from`th on.
    pub(super) fn part(&self, from: u64, len: u64) -> Run {
        let at = if self.at == 0 || self.pack.is_some() { self.at } else { self.at + from };
        let crcs = self.crcs.as_ref().map(|(crcs, skip)| (crcs.clone(), skip + from as usize));
        Run { len, at, crcs, ..*self }
    }

    /// True if only leaves can say what there is to say of its blocks: their checksums, or that they are in a pack.
    pub(super) fn needs_leaf(&self) -> bool {
        self.crcs.is_some() || self.pack.is_some()
    }

    /// Blocks of the pool that it is in.
    pub(super) fn room(&self) -> Range<u64> {
        self.slot(0).room(self.len)
    }

    /// What a leaf says of the `ix`th block.
    pub(super) fn slot(&self, ix: u64) -> Slot {
        let crc = self.crcs.as_ref().map_or(0, |(crcs, skip)| crcs[skip + ix as usize]);
        let at = if self.at == 0 || self.pack.is_some() { self.at } else { self.at + ix };
        Slot { at, birth: self.birth, crc: if at == 0 { 0 } else { crc }, pack: self.pack }
    }
}

/// Runs that do not overlap, by their first block.
#[derive(Clone, Debug, Default)]
pub(super) struct Runs {
    runs: BTreeMap<u64, Run>,
}

impl Runs {
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.runs.len()
    }

    /// Puts a run over whatever was there, which is returned.
    pub(super) fn put(&mut self, first: u64, run: Run) -> Vec<Run> {
        let over = self.cut(first..first + run.len);
        self.runs.insert(first, run);
        over
    }

    /// The same. Blocks of the pool that none of the runs leads to any more.
    pub(super) fn replace(&mut self, first: u64, run: Run) -> Vec<Range<u64>> {
        let touched = unit(first).start..unit(first + run.len - 1).end;
        let mut over = self.put(first, run);
        over.retain(|old| {
            let is_left = |(_, run): (u64, Run)| run.pack.is_some() && run.at == old.at;
            old.at != 0 && !(old.pack.is_some() && self.within(touched.clone()).any(is_left))
        });
        // Of a pack there may have been several parts.
        over.sort_by_key(|old| old.at);
        over.dedup_by(|one, other| one.pack.is_some() && one.at == other.at);
        over.iter().map(Run::room).collect()
    }

    /// Takes out whatever there is in a range, which is returned.
    pub(super) fn cut(&mut self, range: Range<u64>) -> Vec<Run> {
        let mut over = Vec::new();
        while let Some((at, old)) = self.runs.range(..range.end).next_back() {
            let (at, old_end) = (*at, at + old.len);
            if old_end <= range.start {
                break;
            }
            let Some(old) = self.runs.remove(&at) else { break };
            let (from, to) = (at.max(range.start), old_end.min(range.end));
            over.push(old.part(from - at, to - from));
            if old_end > range.end {
                self.runs.insert(range.end, old.part(range.end - at, old_end - range.end));
            }
            if at < range.start {
                self.runs.insert(at, old.part(0, range.start - at));
                break;
            }
        }
        over
    }

    /// The run that covers a block, from there on, and not beyond `end`; else how many blocks from there on are in
    /// none.
    pub(super) fn at(&self, block: u64, end: u64) -> Result<Run, u64> {
        if let Some((first, run)) = self.runs.range(..=block).next_back()
            && first + run.len > block
        {
            let len = (first + run.len).min(end) - block;
            return Ok(run.part(block - first, len));
        }
        let next = self.runs.range(block..end).next().map_or(end, |(first, _)| *first);
        Err(next - block)
    }

    /// What lies in a range, cut to it.
    pub(super) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Run)> + '_ {
        let before = self.runs.range(..range.start).next_back();
        let reaches = before.filter(|(first, run)| *first + run.len > range.start);
        reaches.into_iter().chain(self.runs.range(range.clone())).map(move |(first, run)| {
            let (from, to) = ((*first).max(range.start), (first + run.len).min(range.end));
            (from, run.part(from - first, to - from))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::PACK;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Blocks of the pool that these are in.
    fn rooms(slots: &[Option<Slot>]) -> BTreeSet<u64> {
        slots.iter().flatten().flat_map(|slot| slot.room(1)).collect()
    }

    proptest! {
        #[test]
        fn runs_are_like_a_vector(puts in prop::collection::vec((0u64..100, 1u64..40, 0..5_u8), 0..60)) {
            let (mut runs, mut model) = (Runs::default(), vec![None; 140]);
            for (number, (first, len, kind)) in puts.into_iter().enumerate() {
                let pack = (kind > 2).then(|| Pack::decode(0x13).unwrap()).flatten();
                let (first, len) = if pack.is_some() { (unit(first).start, PACK) } else { (first, len) };
                let at = if kind == 0 { 0 } else { 1000 * (number as u64 + 1) };
                let crcs: Vec<u32> = (0..len as u32).map(|ix| 7 * ix + number as u32).collect();
                let run = Run::new(len, at, number as u64, number as u64, &crcs).packed(pack);
                let mut led = rooms(&model);
                led.extend(run.room());
                for ix in 0..len {
                    let crc = if kind == 0 { 0 } else { crcs[ix as usize] };
                    let at = if kind == 0 || pack.is_some() { at } else { at + ix };
                    model[(first + ix) as usize] = Some(Slot { at, birth: number as u64, crc, pack });
                }
                let over: Vec<u64> = runs.replace(first, run).into_iter().flatten().collect();
                let gone: Vec<u64> = led.difference(&rooms(&model)).copied().collect();
                prop_assert_eq!(over, gone);
            }
            for (block, slot) in model.iter().enumerate() {
                let found = runs.at(block as u64, 140);
                prop_assert_eq!(found.as_ref().ok().map(|run| run.slot(0)), *slot);
                if let Err(len) = found {
                    prop_assert!(model[block..block + len as usize].iter().all(Option::is_none));
                }
            }
            let inside: Vec<_> = runs.within(30..70).flat_map(|(first, run)| {
                (0..run.len).map(move |ix| (first + ix, run.slot(ix)))
            }).collect();
            let wanted: Vec<_> = (30..70).filter_map(|ix| model[ix as usize].map(|slot| (ix, slot))).collect();
            prop_assert_eq!(inside, wanted);
        }
    }
}
