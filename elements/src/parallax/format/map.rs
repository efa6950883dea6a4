//! Maps: where the blocks of a gibibyte of a volume are, in runs, and in leaves where there are too many of them. Only trees
//! of format 2 have them.

use super::node::HEADER;
use super::{BLOCK, EXTENT, NODE, Ptr, damaged, put, u16_at, u40_at};
use blockmason::Result;
use std::ops::Range;

/// Blocks of a map, at most.
const MOST: u64 = 4;
/// Bytes of a run: the first block and how many, where they are in the pool, their birth.
const RUN: usize = 5 + 5 + 5;
/// Bytes of a leaf: which one, and the pointer to it.
const LEAF: usize = 2 + Ptr::BYTES;

/// Blocks in a row that are in a row in the pool and born at once; or a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct MapRun {
    /// The first one, from the first of the map.
    pub(in super::super) first: u64,
    pub(in super::super) len: u64,
    /// The first block of the pool; 0 is a hole.
    pub(in super::super) at: u64,
    pub(in super::super) birth: u64,
}

impl MapRun {
    pub(in super::super) fn end(&self) -> u64 {
        self.first + self.len
    }

    /// What of it is within a range.
    pub(in super::super) fn cut(&self, range: &Range<u64>) -> Option<MapRun> {
        let (first, end) = (self.first.max(range.start), self.end().min(range.end));
        let at = if self.at == 0 { 0 } else { self.at + (first - self.first) };
        (first < end).then(|| MapRun { first, len: end - first, at, ..*self })
    }

    /// True if another one goes on where this one ends, everywhere.
    pub(in super::super) fn joins(&self, next: &MapRun) -> bool {
        let goes_on = match (self.at, next.at) {
            (0, 0) => true,
            (0, _) | (_, 0) => false,
            (at, next) => at + self.len == next,
        };
        goes_on && self.end() == next.first && self.birth == next.birth
    }
}

/// Where the blocks of a gibibyte are. What is in no run and no leaf has never been written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Map {
    /// By the first block; none touches another's blocks, nor those of a leaf.
    pub(in super::super) runs: Vec<MapRun>,
    /// Leaves, each of 512 blocks: which one it is, and where.
    pub(in super::super) leaves: Vec<(u16, Ptr)>,
}

impl Map {
    /// Blocks that a map covers.
    pub(in super::super) const BLOCKS: u64 = EXTENT * 512;

    /// Blocks that may be needed, beside a leaf, for what is new among a leaf's blocks: a map is longer than other nodes, and may
    /// have to give some of its runs to leaves. Where that leaf has become one, what it takes less room by makes up for all
    /// but five runs, and each of the others gives 13 bytes at least.
    pub(in super::super) const ROOM: u64 = 2 * (MOST - NODE) + 5 * 2 * NODE;

    fn bytes(&self) -> usize {
        HEADER + self.leaves.len() * LEAF + self.runs.len() * RUN
    }

    /// Bytes by which it is too long.
    pub(in super::super) fn over(&self) -> usize {
        self.bytes().saturating_sub(Map::most())
    }

    /// Bytes that it has at most. Tests have few blocks, and see long maps all the same.
    fn most() -> usize {
        let short = cfg!(test) && std::env::var_os("PARALLAX_MAP").is_none();
        if short { 400 } else { (MOST * BLOCK) as usize }
    }

    /// Bytes by which it is shorter with a leaf in place of so many runs.
    pub(in super::super) fn saved(runs: usize) -> usize {
        (runs * RUN).saturating_sub(LEAF)
    }

    /// Blocks of one copy of it.
    pub(in super::super) fn blocks(&self) -> u64 {
        (self.bytes() as u64).div_ceil(BLOCK)
    }

    /// The highest birth in it.
    pub(super) fn birth(&self) -> Option<u64> {
        let leaves = self.leaves.iter().map(|(_, leaf)| leaf.birth);
        self.runs.iter().map(|run| run.birth).chain(leaves).max()
    }

    /// What the header of a map says of its length in blocks.
    pub(super) fn blocks_of(header: &[u8]) -> Option<u64> {
        let (leaves, runs) = (u16_at(header, 10) as usize, u16_at(header, 48) as usize);
        let bytes = (HEADER + leaves * LEAF + runs * RUN) as u64;
        (bytes <= MOST * BLOCK).then(|| bytes.div_ceil(BLOCK))
    }

    pub(super) fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 10, 2, self.leaves.len() as u64);
        put(bytes, 48, 2, self.runs.len() as u64);
        let mut at = HEADER;
        for (ix, leaf) in &self.leaves {
            put(bytes, at, 2, u64::from(*ix));
            leaf.put(bytes, at + 2);
            at += LEAF;
        }
        for run in &self.runs {
            put(bytes, at, 5, run.first | (run.len - 1) << 18);
            put(bytes, at + 5, 5, run.at);
            put(bytes, at + 10, 5, run.birth);
            at += RUN;
        }
    }

    /// Of a node whose length fits.
    ///
    /// # Errors
    /// Runs or leaves are out of order, or lie over one another.
    pub(super) fn decode(bytes: &[u8]) -> Result<Map> {
        let (leaves, runs) = (u16_at(bytes, 10) as usize, u16_at(bytes, 48) as usize);
        let first_run = HEADER + leaves * LEAF;
        let leaf = |at: usize| (u16_at(bytes, at), Ptr::at(bytes, at + 2));
        let run = |at: usize| MapRun {
            first: u40_at(bytes, at) & (Map::BLOCKS - 1),
            len: (u40_at(bytes, at) >> 18) + 1,
            at: u40_at(bytes, at + 5),
            birth: u40_at(bytes, at + 10),
        };
        let map = Map {
            leaves: (0..leaves).map(|ix| leaf(HEADER + ix * LEAF)).collect(),
            runs: (0..runs).map(|ix| run(first_run + ix * RUN)).collect(),
        };
        super::expect_zeros(&bytes[first_run + runs * RUN..], "a map")?;
        match map.is_sane() {
            true => Ok(map),
            false => Err(damaged("a map has runs or leaves that cannot be")),
        }
    }

    fn is_sane(&self) -> bool {
        let mut end = 0;
        let runs = self.runs.iter().all(|run| {
            let fits = run.first >= end && run.end() <= Map::BLOCKS;
            end = run.end();
            fits
        });
        let ordered = self.leaves.windows(2).all(|pair| pair[0].0 < pair[1].0);
        let apart = |(ix, leaf): &(u16, Ptr)| {
            let range = u64::from(*ix) * EXTENT..(u64::from(*ix) + 1) * EXTENT;
            range.end <= Map::BLOCKS && leaf.is_node() && self.within(&range).next().is_none()
        };
        runs && ordered && self.leaves.iter().all(apart)
    }

    /// The leaf that has a block.
    pub(in super::super) fn leaf(&self, block: u64) -> Option<Ptr> {
        let ix = (block / EXTENT) as u16;
        let found = self.leaves.binary_search_by_key(&ix, |(ix, _)| *ix);
        found.ok().map(|found| self.leaves[found].1)
    }

    /// Runs that have blocks of a range, cut to it.
    pub(in super::super) fn within<'a>(&'a self, range: &'a Range<u64>) -> impl Iterator<Item = MapRun> + 'a {
        let begin = self.runs.partition_point(|run| run.end() <= range.start);
        self.runs[begin..].iter().map_while(|run| run.cut(range))
    }

    /// The run from a block on, which no leaf has; where there is none, a hole that has always been one, up to the next run or
    /// leaf.
    pub(in super::super) fn at(&self, block: u64) -> MapRun {
        let next = self.runs.partition_point(|run| run.end() <= block);
        let mut end = Map::BLOCKS;
        if let Some(run) = self.runs.get(next) {
            if let Some(run) = run.cut(&(block..end)).filter(|run| run.first == block) {
                return run;
            }
            end = run.first;
        }
        let leaf = self.leaves.partition_point(|(ix, _)| u64::from(*ix) * EXTENT <= block);
        if let Some((ix, _)) = self.leaves.get(leaf) {
            end = end.min(u64::from(*ix) * EXTENT);
        }
        MapRun { first: block, len: end - block, at: 0, birth: 0 }
    }
}

// With one run inside each leaf's blocks and one over each border it is not too long: else there are two inside one, which a
// leaf takes less room than.
const _: () =
    assert!(HEADER + (512 + 511) * RUN <= (MOST * BLOCK) as usize && 2 * RUN > LEAF && LEAF < 2 * RUN);
