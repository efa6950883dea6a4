//! Looks whether everything a pool says of itself is true: each node is the one that is expected, no block has two
//! meanings, and exactly what is reachable is marked as used.

use super::below::Below;
use super::format::{
    BLOCK, Body, Dead, EXTENT, Entry, EntryKind, LIMIT, Pack, Ptr, RECORDS, SLOTS, Slot, damaged, unit,
};
use super::items::Item;
use super::merge::span;
use super::nodes::{Place, Tree};
use super::open::{crc_of, examine_copies};
use super::pool::Pool;
use blockmason::{Data, LocalBoxFuture, Result};
use std::collections::hash_map::Entry as Known;
use std::collections::{HashMap, HashSet};
use std::mem::Discriminant;
use std::ops::{AddAssign, Range};

/// What a block of the pool is. In two trees it is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// A copy of a node of that kind, level and index.
    Node(Discriminant<Body>, u8, u64),
    /// The block of a volume, born then.
    Data(u64, u64),
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// One sentence each; none is a sound pool.
    pub(super) problems: Vec<String>,
    /// Blocks that are reachable.
    pub(super) blocks: u64,
    pub(super) nodes: u64,
    pub(super) volumes: u64,
    pub(super) snapshots: u64,
}

impl AddAssign for Findings {
    fn add_assign(&mut self, other: Findings) {
        self.problems.extend(other.problems);
        self.blocks += other.blocks;
        self.nodes += other.nodes;
        self.volumes += other.volumes;
        self.snapshots += other.snapshots;
    }
}

/// Problems that are told one by one.
const MOST: usize = 100;

struct Check<'a> {
    pool: &'a Pool,
    below: Below<'a>,
    findings: Findings,
    known: HashMap<u64, Meaning>,
    /// Nodes below which everything has been looked at.
    seen: HashSet<u64>,
    /// The pack that was looked at last, and what was in it.
    pack: Option<(u64, Option<Data>)>,
}

/// Checks the trees of a pool as the newest root has them. Guests go on meanwhile, as long as the log has room; checkpoints
/// wait.
pub(super) async fn check(pool: &Pool, below: Below<'_>) -> Result<Findings> {
    let _as_it_is = pool.checkpointing.lock().await;
    let (root, catalog) = {
        let core = pool.core();
        (core.root.clone(), core.catalog.clone())
    };
    let mut check = Check {
        pool,
        below,
        findings: Findings::default(),
        known: HashMap::new(),
        seen: HashSet::new(),
        pack: None,
    };
    for problem in examine_copies(pool, below).await? {
        check.problem(problem);
    }
    check.pages(root.catalog, root.height, 0).await;
    for (number, entry) in &catalog {
        check.entry(*number, entry, &catalog).await;
    }
    check.space(root.used);
    check.findings.nodes = check.seen.len() as u64;
    check.findings.blocks = check.known.len() as u64;
    Ok(check.findings)
}

/// What has become of a copy that was damaged.
pub(super) fn outcome(mended: bool) -> &'static str {
    if mended { "is written anew" } else { "cannot be written anew" }
}

impl Check<'_> {
    fn problem(&mut self, what: impl Into<String>) {
        if self.findings.problems.len() < MOST {
            self.findings.problems.push(what.into());
        }
    }

    /// Blocks have that meaning.
    fn claim(&mut self, at: u64, len: u64, meaning: Meaning) {
        for at in at..at + len {
            match self.known.entry(at) {
                Known::Vacant(slot) => drop(slot.insert(meaning)),
                Known::Occupied(slot) if *slot.get() == meaning => {}
                Known::Occupied(slot) => {
                    let other = *slot.get();
                    self.problem(format!("block {at} is {meaning:?} and {other:?}"));
                }
            }
        }
    }

    /// A node, if it can be read and everything below it has not been looked at.
    async fn node(&mut self, place: Place, what: &str) -> Option<Body> {
        let Place { ptr, level, index, .. } = place;
        if ptr.at[0] == ptr.at[1] || ptr.at.iter().any(|at| *at >= LIMIT) {
            self.problem(format!("{what} points to {ptr:?}"));
            return None;
        }
        // What has been looked at on the device once is in memory, or as good as that.
        let found = match self.seen.contains(&ptr.at[0]) {
            true => self.pool.nodes.get(&place, self.below).await.map(|node| (node, None)),
            false => self.pool.nodes.examine(&place, self.below).await,
        };
        let (node, damaged) = match found {
            Ok(found) => found,
            Err(error) => {
                self.problem(format!("{what}: {error}"));
                return None;
            }
        };
        if let Some((at, mended)) = damaged {
            self.problem(format!(
                "{what}: the copy of a node at block {at} was damaged, and {}",
                outcome(mended)
            ));
        }
        let kind = std::mem::discriminant(&node.body);
        let blocks = node.body.blocks();
        ptr.at.into_iter().for_each(|at| self.claim(at, blocks, Meaning::Node(kind, level, index)));
        if node.body.birth() > ptr.birth {
            self.problem(format!("{what}: the node at block {} has something younger than it is", ptr.at[0]));
        }
        self.seen.insert(ptr.at[0]).then(|| node.body.clone())
    }

    fn pages(&mut self, ptr: Ptr, level: u8, index: u64) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            if ptr.is_hole() || index * span(level) * RECORDS as u64 > u64::from(u32::MAX) {
                return;
            }
            let place = Place { tree: Tree::Catalog, ptr, level, index };
            if let Some(Body::Inner(children)) = self.node(place, "the catalog").await {
                for (ix, child) in children.iter().enumerate() {
                    self.pages(*child, level - 1, index * SLOTS as u64 + ix as u64).await;
                }
            }
        })
    }

    async fn entry(&mut self, number: u32, entry: &Entry, catalog: &std::collections::BTreeMap<u32, Entry>) {
        let what = match &entry.kind {
            EntryKind::Volume { newest, origin, .. } => {
                self.findings.volumes += u64::from(!entry.deleting);
                let lacks = |number: u32| number != 0 && !catalog.contains_key(&number);
                if lacks(*newest) || lacks(origin.0) {
                    self.problem(format!("volume {} names a snapshot that is not there", entry.name));
                }
                format!("volume {}", entry.name)
            }
            EntryKind::Snapshot { volume, before, birth, dead, .. } => {
                self.findings.snapshots += u64::from(!entry.deleting);
                if !catalog.contains_key(volume) || *before != 0 && !catalog.contains_key(before) {
                    self.problem(format!("snapshot {} names something that is not there", entry.name));
                }
                if entry.root.birth > *birth {
                    self.problem(format!("snapshot {} sees what was written after it", entry.name));
                }
                let what = format!("snapshot {}", entry.name);
                self.dead(*dead, number, *birth, &what).await;
                what
            }
        };
        self.tree(entry.root, entry.height, 0, entry, &what).await;
    }

    fn tree<'c>(
        &'c mut self,
        ptr: Ptr,
        level: u8,
        index: u64,
        entry: &'c Entry,
        what: &'c str,
    ) -> LocalBoxFuture<'c, ()> {
        Box::pin(async move {
            let format = self.pool.format;
            let items = match Item::of(format, ptr, level, index) {
                run @ Item::Run { .. } => vec![run],
                Item::Node(place) => match self.node(place, what).await {
                    Some(body) => Item::all(format, &body, level, index),
                    None => return,
                },
            };
            for item in items {
                match item {
                    Item::Run { first, len, slot, room } if slot.at != 0 => {
                        self.run(first..first + len, (slot, room), entry, what).await;
                    }
                    Item::Run { .. } => {}
                    Item::Node(Place { ptr, level, index, .. }) => {
                        self.tree(ptr, level, index, entry, what).await;
                    }
                }
            }
        })
    }

    /// Blocks that are in a row in the pool.
    async fn run(&mut self, blocks: Range<u64>, (slot, room): (Slot, Range<u64>), entry: &Entry, what: &str) {
        if blocks.end * BLOCK > entry.size {
            self.problem(format!("{what} has a block behind its end: {}", blocks.end - 1));
        }
        if room.end > self.pool.space.label().extents * EXTENT {
            return self.problem(format!("{what} has blocks outside the pool, from {} on", slot.at));
        }
        let first = if slot.pack.is_some() { unit(blocks.start).start } else { blocks.start };
        for (block, at) in (first..).zip(room) {
            self.claim(at, 1, Meaning::Data(block, slot.birth));
        }
        if let Some(pack) = slot.pack {
            return self.packed(blocks.start, (slot, pack), entry.checksums, what).await;
        }
        if entry.checksums {
            for (block, at) in blocks.zip(slot.at..) {
                let found = self.below.read(at * BLOCK, BLOCK).await;
                self.contents(found, Some(slot.crc), block, what);
            }
        }
    }

    /// A block that is in a pack.
    async fn packed(&mut self, block: u64, (slot, pack): (Slot, Pack), checksums: bool, what: &str) {
        if self.pack.as_ref().is_none_or(|(at, _)| *at != slot.at) {
            let found = self.below.read(slot.at * BLOCK, u64::from(pack.blocks) * BLOCK).await;
            self.pack = Some((slot.at, found.and_then(|found| pack.open(&found)).ok()));
        }
        let at = ((block - unit(block).start) * BLOCK) as usize;
        let contents = self.pack.as_ref().and_then(|(_, contents)| contents.as_ref());
        let found = contents.map(|contents| contents.slice(at..at + BLOCK as usize));
        let found = found.ok_or_else(|| damaged("the compressed blocks that it is in are damaged"));
        self.contents(found, checksums.then_some(slot.crc), block, what);
    }

    fn contents(&mut self, found: Result<Data>, crc: Option<u32>, block: u64, what: &str) {
        match found {
            Ok(data) if crc.is_none_or(|crc| crc_of(&data) == crc) => {}
            Ok(_) => self.problem(format!("{what}: the 4096 bytes at {} are damaged", block * BLOCK)),
            Err(error) => {
                self.problem(format!("{what}: the 4096 bytes at {} cannot be read: {error}", block * BLOCK))
            }
        }
    }

    /// A dead list: its parts are nodes, and what it lists must be older than its snapshot.
    async fn dead(&mut self, mut list: Ptr, snapshot: u32, birth: u64, what: &str) {
        while !list.is_hole() {
            let place = Place { tree: Tree::DeadList, ptr: list, level: 0, index: u64::from(snapshot) };
            let Some(Body::Dead(next, dead)) = self.node(place, what).await else { return };
            if let Some(Dead { at, birth: young, .. }) = dead.iter().find(|dead| dead.birth > birth) {
                self.problem(format!("{what} lists block {at} as dead, which was born after it ({young})"));
            }
            list = next;
        }
    }

    /// Exactly what is reachable is marked.
    fn space(&mut self, used: u64) {
        let mut marked = 0;
        let own = self.own();
        for (extent, map) in self.pool.space.committed() {
            for ix in 0..EXTENT {
                let at = extent * EXTENT + ix;
                let is_marked = map[(ix / 64) as usize] >> (ix % 64) & 1 == 1;
                let is_own = own.iter().any(|range| range.contains(&at));
                match (is_marked && !is_own, self.known.contains_key(&at)) {
                    (true, false) => {
                        self.problem(format!("block {at} is marked as used, and nothing leads to it"))
                    }
                    (false, true) => self.problem(format!("block {at} is in use and not marked")),
                    _ => {}
                }
                marked += u64::from(is_marked && !is_own);
            }
        }
        let reachable = self.known.len() as u64;
        if marked != used {
            self.problem(format!(
                "the root says that {used} blocks are in use; {marked} are marked, {reachable} reachable"
            ));
        }
    }

    /// Extents of the root and of the log.
    fn own(&self) -> [Range<u64>; 2] {
        let first = self.pool.root_extent * EXTENT;
        let log = self.pool.core().root.log;
        [first..first + EXTENT, log[0]..log[0] + log[1]]
    }
}
