//! Looks whether everything a pool says of itself is true: each node is the one that is expected, no block has two
//! meanings, and exactly what is reachable is marked as used.

use super::below::Below;
use super::copies::examine_copies;
use super::examine::{Examiner, Lost, Said, Subject};
use super::format::{Body, Dead, EXTENT, Entry, EntryKind, Slot, unit};
use super::nodes::{Place, Tree};
use super::pool::Pool;
use blockmason::Result;
use std::collections::hash_map::Entry as Known;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem::Discriminant;
use std::ops::{AddAssign, Range};

/// What a block of the pool is. In two trees it is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// A copy of a node of that kind, level and index.
    Node(Discriminant<Body>, u8, u64),
    /// The block of a volume, born then.
    Data(u64, u64),
    /// What only a snapshot sees that is being deleted.
    Leaving,
}

/// Everything that has been seen.
#[derive(Default)]
pub(super) struct Claims {
    pub(super) known: HashMap<u64, Meaning>,
    /// Nodes of trees below which everything has been looked at, and all other nodes.
    pub(super) seen: HashSet<u64>,
}

impl Claims {
    /// Blocks have that meaning.
    fn claim(&mut self, blocks: Range<u64>, meaning: impl Fn(u64) -> Meaning, said: &mut Said) {
        for at in blocks {
            match self.known.entry(at) {
                Known::Vacant(slot) => drop(slot.insert(meaning(at))),
                Known::Occupied(slot) if *slot.get() == meaning(at) => {}
                Known::Occupied(slot) => {
                    said.say(format!("block {at} is {:?} and {:?}", meaning(at), slot.get()));
                }
            }
        }
    }

    /// Both copies of a node.
    pub(super) fn node(&mut self, place: &Place, body: &Body, said: &mut Said) {
        if !matches!(place.tree, Tree::Volume(_)) {
            self.seen.insert(place.ptr.at[0]);
        }
        let meaning = Meaning::Node(std::mem::discriminant(body), place.level, place.index);
        for at in place.ptr.at {
            self.claim(at..at + body.blocks(), |_| meaning, said);
        }
    }

    /// Blocks of a volume from that one on, and those of the pool that they are in.
    pub(super) fn data(&mut self, first: u64, (slot, room): (Slot, Range<u64>), said: &mut Said) {
        // Those of a pack are told apart, whichever of its blocks is seen.
        let first = if slot.pack.is_some() { unit(first).start } else { first };
        let meaning = |at: u64| Meaning::Data(first + (at - slot.at), slot.birth);
        self.claim(room, meaning, said);
    }
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// None is a sound pool.
    pub(super) said: Said,
    /// Blocks that are reachable.
    pub(super) blocks: u64,
    pub(super) nodes: u64,
    pub(super) volumes: u64,
    pub(super) snapshots: u64,
}

impl AddAssign for Findings {
    fn add_assign(&mut self, other: Findings) {
        self.said.append(other.said);
        self.blocks += other.blocks;
        self.nodes += other.nodes;
        self.volumes += other.volumes;
        self.snapshots += other.snapshots;
    }
}

/// What the trees lead to, and what was found out on the way.
pub(super) struct Reached {
    pub(super) findings: Findings,
    pub(super) claims: Claims,
    pub(super) lost: Vec<Lost>,
}

/// Checks the trees of a pool as the newest root has them. Guests go on meanwhile, as long as the log has room; checkpoints
/// wait.
pub(super) async fn check(pool: &Pool, below: Below<'_>) -> Result<Findings> {
    let _as_it_is = pool.checkpointing.lock().await;
    let mut said = examine_copies(pool, below).await?;
    let mut reached = reach(pool, below).await;
    said.append(std::mem::take(&mut reached.findings.said));
    compare(pool, &reached.claims, &mut said);
    Ok(Findings { said, ..reached.findings })
}

/// Looks at everything that the newest root leads to. The caller keeps checkpoints off.
pub(super) async fn reach(pool: &Pool, below: Below<'_>) -> Reached {
    let (root, catalog) = {
        let core = pool.core();
        (core.root.clone(), core.catalog.clone())
    };
    let mut examiner = Examiner::new(pool, below);
    examiner.claims = Some(Claims::default());
    let mut findings = Findings::default();
    examiner.pages(root.catalog, root.height, 0).await;
    let mut all: Vec<(&u32, &Entry)> = catalog.iter().collect();
    // Each thing is looked at, and named, in the oldest that has it.
    all.sort_by_key(|(number, entry)| match entry.kind {
        EntryKind::Snapshot { birth, .. } => (birth, **number),
        EntryKind::Volume { .. } => (u64::MAX, **number),
    });
    for (number, entry) in all {
        let name = pool.core().title(entry);
        let subject = Subject { name, entry };
        look_at(&mut examiner, *number, &subject, &catalog, &mut findings).await;
    }
    let claims = examiner.claims.take().unwrap_or_default();
    findings.nodes = claims.seen.len() as u64;
    findings.blocks = claims.known.len() as u64;
    findings.said = examiner.said;
    Reached { findings, claims, lost: examiner.lost }
}

async fn look_at(
    examiner: &mut Examiner<'_>,
    number: u32,
    subject: &Subject<'_>,
    catalog: &BTreeMap<u32, Entry>,
    findings: &mut Findings,
) {
    let Subject { name, entry } = subject;
    match &entry.kind {
        EntryKind::Volume { newest, origin, .. } => {
            findings.volumes += u64::from(!entry.deleting);
            let lacks = |number: u32| number != 0 && !catalog.contains_key(&number);
            if lacks(*newest) || lacks(origin.0) {
                examiner.problem(format!("{name} names a snapshot that is not there"));
            }
        }
        EntryKind::Snapshot { volume, before, birth, dead, .. } => {
            findings.snapshots += u64::from(!entry.deleting);
            if !catalog.contains_key(volume) || *before != 0 && !catalog.contains_key(before) {
                examiner.problem(format!("{name} names something that is not there"));
            }
            if entry.root.birth > *birth {
                examiner.problem(format!("{name} sees what was written after it"));
            }
            let dead = examiner.dead_list(*dead, (number, *birth), name).await;
            if entry.deleting {
                // Some of its tree is gone already: what is left to delete is in its list.
                let before = examiner.pool.core().older(entry, *birth);
                return leaving(examiner, dead.iter().filter(|dead| dead.birth > before));
            }
        }
    }
    examiner.tree(subject).await;
}

fn leaving<'d>(examiner: &mut Examiner<'_>, dead: impl Iterator<Item = &'d Dead>) {
    let Some(claims) = &mut examiner.claims else { return };
    for dead in dead {
        claims.claim(dead.at..dead.at + u64::from(dead.len), |_| Meaning::Leaving, &mut examiner.said);
    }
}

/// Exactly what is reachable is marked.
fn compare(pool: &Pool, claims: &Claims, said: &mut Said) {
    let mut marked = 0;
    let own = own(pool);
    let mut committed = HashSet::new();
    for (extent, map) in pool.space.committed() {
        committed.insert(extent);
        for ix in 0..EXTENT {
            let at = extent * EXTENT + ix;
            let is_marked = map[(ix / 64) as usize] >> (ix % 64) & 1 == 1;
            let is_own = own.iter().any(|range| range.contains(&at));
            match (is_marked && !is_own, claims.known.contains_key(&at)) {
                (true, false) => said.say(format!("block {at} is marked as used, and nothing leads to it")),
                (false, true) => said.say(format!("block {at} is in use and not marked")),
                _ => {}
            }
            marked += u64::from(is_marked && !is_own);
        }
    }
    let mut foreign: Vec<u64> = claims.known.keys().map(|at| at / EXTENT).collect();
    foreign.sort_unstable();
    foreign.dedup();
    for extent in foreign.into_iter().filter(|extent| !committed.contains(extent)) {
        said.say(format!("extent {extent} is in use, and not said to be of these volumes"));
    }
    let (used, reachable) = (pool.core().root.used, claims.known.len() as u64);
    if marked != used {
        said.say(format!(
            "the root says that {used} blocks are in use; {marked} are marked, {reachable} reachable"
        ));
    }
}

/// Extents of the root and of the log.
pub(super) fn own(pool: &Pool) -> [Range<u64>; 2] {
    let first = pool.root_extent * EXTENT;
    let log = pool.core().root.log;
    [first..first + EXTENT, log[0]..log[0] + log[1]]
}
