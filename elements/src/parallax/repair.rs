//! Repairs what no second copy mends, in a pool that nobody has open. Everything that is to be done is found out first; then, for
//! each of the pool's trees, it is one checkpoint: after a crash all of it has happened or none.

use super::account::Held;
use super::admin::{Catalog, Plan, delete_of_snapshot, set_dead};
use super::below::Below;
use super::check::{Reached, check, own, reach};
use super::copies::{examine_copies, examine_heads};
use super::examine::{Lost, Said, is_odd};
use super::format::{BLOCK, Body, Dead, EXTENT, Entry, EntryKind, MapRun, Node, Ptr, Root, SLOTS};
use super::items::Item;
use super::maps::blocks_of;
use super::merge::Merge;
use super::nodes::{Place, Tree};
use super::open::{All, Opening, find_all};
use super::pool::Pool;
use blockmason::{Error, Kind, LocalBoxFuture, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

/// How a pool is repaired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repairing {
    /// It is done, and not only said.
    pub act: bool,
    /// What cannot be read of volumes reads as zeros from then on, and no more as an error.
    pub zero: bool,
}

/// What has been found out and done.
#[derive(Debug, Default)]
pub(super) struct Repaired {
    /// What was damaged.
    pub(super) problems: Said,
    /// What is done about it.
    pub(super) steps: Vec<String>,
    /// What cannot be repaired, and what to do instead.
    pub(super) left: Vec<String>,
    /// What a check says after it.
    pub(super) after: Option<Said>,
}

/// What is to be done to trees.
#[derive(Clone, Default)]
pub(super) struct Fix {
    /// Nodes that cannot be read become holes.
    zero: bool,
    /// Snapshots whose dead lists are made anew; with holes in trees, all.
    lists: BTreeSet<u32>,
    /// Marked as used, and nothing leads to them.
    leaked: Vec<Range<u64>>,
    /// In use, and not marked.
    unmarked: Vec<Range<u64>>,
    /// Extents whose records are written anew.
    extents: BTreeSet<u64>,
    /// Blocks that are in use, as the records say it before.
    used: u64,
}

impl Fix {
    fn is_needed(&self, root: &Root) -> bool {
        let marks = self.leaked.is_empty() && self.unmarked.is_empty() && self.extents.is_empty();
        self.zero || !self.lists.is_empty() || !marks || self.used != root.used
    }
}

/// Repairs a pool of that size, or says what would be done.
///
/// # Errors
/// It cannot be opened, or written.
pub(super) async fn repair(how: Repairing, size: u64, below: Below<'_>) -> Result<Repaired> {
    let opening = if how.act { Opening::writable(64 << 20) } else { Opening::read_only(64 << 20) };
    let all = find_all(opening, size, below).await?;
    let mut repaired = Repaired::default();
    for lacking in &all.lacking {
        repaired.left.push(format!(
            "{} cannot be opened: {}; take them from a backup",
            lacking.what(),
            lacking.why
        ));
    }
    // The table and what else is the pool's are one for all trees.
    for (ix, trees) in all.trees().enumerate() {
        let said =
            if ix == 0 { examine_copies(trees, below).await? } else { examine_heads(trees, below).await? };
        let known = |what: &String| repaired.problems.all.contains(what);
        let new: Vec<String> = said.all.into_iter().filter(|what| !known(what)).collect();
        new.into_iter().for_each(|what| repaired.problems.say(what));
    }
    let mut plans = Vec::new();
    let mut all_is_known = all.lacking.is_empty() && all.unknown == 0;
    for trees in all.trees() {
        let mut reached = reach(trees, below).await;
        repaired.problems.append(std::mem::take(&mut reached.findings.said));
        all_is_known &= how.zero || !reached.lost.iter().any(|lost| matches!(lost, Lost::Node(_)));
        let (fine, extents) = claim(trees, &reached, &mut repaired.left);
        all_is_known &= fine;
        plans.push((trees, reached, extents));
    }
    let mut fixes = Vec::new();
    for (trees, reached, extents) in plans {
        let fix = Fix { extents, ..Fix::default() };
        let fix = plan(trees, &reached, (how, fix), &mut repaired);
        if fix.is_needed(&trees.core().root) {
            fixes.push((trees, fix));
        }
    }
    let unowned = if all_is_known { all.blocks.doubtful() } else { Vec::new() };
    for extent in &unowned {
        repaired
            .steps
            .push(format!("extent {extent}, whose record is damaged and which nobody uses, is free"));
    }
    if how.act {
        act(&all, fixes, &unowned, &mut repaired, below).await?;
    }
    Ok(repaired)
}

async fn act(
    all: &All,
    fixes: Vec<(&Pool, Fix)>,
    unowned: &[u64],
    repaired: &mut Repaired,
    below: Below<'_>,
) -> Result<()> {
    for (trees, fix) in fixes {
        all.write_journal(trees, below).await?;
        trees.checkpoint_with(&Plan::Repair(Box::new(fix)), below).await.map_err(|error| match error.kind() {
            Kind::Io => Error::new(
                Kind::Io,
                format!("{error}: what was written cannot be brought into what cannot be read; use --lost zero, or dump the volumes"),
            ),
            _ => error,
        })?;
    }
    for trees in all.trees() {
        free_what_is_left(trees, below).await?;
    }
    all.blocks.free_doubtful(unowned, below).await?;
    let mut after = Said::default();
    for trees in all.trees() {
        after.append(check(trees, below).await?.said);
    }
    repaired.after = Some(after);
    Ok(())
}

/// Frees what only a clone had of a snapshot that has become a hole, and has let go of when the log came into its tree: to a clone that
/// is the snapshot's.
async fn free_what_is_left(trees: &Pool, below: Below<'_>) -> Result<()> {
    let reached = reach(trees, below).await;
    let mut fix = Fix::default();
    marks(trees, &reached, &mut fix);
    if reached.lost.is_empty() && !fix.leaked.is_empty() {
        let fix = Fix { leaked: fix.leaked, used: fix.used, ..Fix::default() };
        trees.checkpoint_with(&Plan::Repair(Box::new(fix)), below).await?;
    }
    Ok(())
}

/// What trees lead to is theirs, and nobody is given any of it, whatever the records say. False if it is another's; and the extents of
/// the root and of the log whose records do not say that they are full.
fn claim(trees: &Pool, reached: &Reached, left: &mut Vec<String>) -> (bool, BTreeSet<u64>) {
    let mut extents: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for at in reached.claims.known.keys() {
        extents.entry(at / EXTENT).or_default().push(*at);
    }
    for at in own(trees).into_iter().flatten().step_by(EXTENT as usize) {
        extents.entry(at / EXTENT).or_default();
    }
    let mut fine = true;
    for (extent, blocks) in extents {
        if !trees.space.adopt(extent) {
            fine = false;
            left.push(format!(
                "extent {extent} is said to be somebody else's, and volumes of format {} use it: dump them, and restore them into another pool",
                trees.format
            ));
            continue;
        }
        // It is one of ours now: marking it cannot fail.
        blocks.into_iter().for_each(|at| drop(trees.space.mark(at..at + 1)));
    }
    let own = own(trees).into_iter().flatten().step_by(EXTENT as usize).map(|at| at / EXTENT);
    (fine, own.filter(|extent| trees.space.fill(*extent)).collect())
}

/// Finds out what is to be done.
fn plan(trees: &Pool, reached: &Reached, (how, mut fix): (Repairing, Fix), repaired: &mut Repaired) -> Fix {
    let lost: Vec<u64> = reached
        .lost
        .iter()
        .filter_map(|lost| if let Lost::Node(blocks) = lost { Some(*blocks) } else { None })
        .collect();
    fix.zero = how.zero && !lost.is_empty();
    let lists =
        reached.lost.iter().filter_map(|lost| if let Lost::DeadList(of) = lost { Some(*of) } else { None });
    fix.lists = lists.collect();
    marks(trees, reached, &mut fix);
    let bytes =
        |ranges: &[Range<u64>]| ranges.iter().map(|range| (range.end - range.start) * BLOCK).sum::<u64>();
    let (leaked, unmarked) = (bytes(&fix.leaked), bytes(&fix.unmarked));
    if !lost.is_empty() && !how.zero {
        let count = lost.len();
        repaired.left.push(format!(
            "parts of volumes and snapshots that cannot be read ({count}) stay errors: have them read as zeros by --lost zero, and write what a backup has"
        ));
        if leaked > 0 {
            repaired
                .left
                .push(format!("{leaked} bytes stay in use, because what cannot be read may be in them"));
            fix.leaked.clear();
        }
    }
    let steps = &mut repaired.steps;
    if fix.zero {
        steps.push(format!("parts of volumes and snapshots that cannot be read ({}) are zeros", lost.len()));
    }
    {
        let core = trees.core();
        for (number, entry) in core.catalog.iter().filter(|(number, _)| fix.lists.contains(number)) {
            steps.push(match entry.deleting {
                true => format!("the deletion of {} (number {number}) is ended", core.title(entry)),
                false => format!("the dead list of {} is made anew", core.title(entry)),
            });
        }
    }
    for extent in &fix.extents {
        steps.push(format!("the record of extent {extent} is made anew"));
    }
    if !fix.leaked.is_empty() {
        steps.push(format!("{leaked} bytes that nothing leads to are free"));
    }
    if unmarked > 0 {
        steps.push(format!("{unmarked} bytes that are in use are marked as used"));
    }
    if fix.used != trees.core().root.used {
        steps.push("how much is in use is counted anew".to_owned());
    }
    fix
}

/// Compares what is marked with what is reachable, by the trees or by what the log says.
fn marks(trees: &Pool, reached: &Reached, fix: &mut Fix) {
    let own = own(trees);
    let logged = trees.core().logged();
    let is_logged = |at: &u64| {
        let behind = logged.partition_point(|range| range.start <= *at);
        behind > 0 && logged[behind - 1].contains(at)
    };
    for (extent, map, doubtful) in trees.space.marked() {
        if doubtful {
            fix.extents.insert(extent);
        }
        for ix in 0..EXTENT {
            let at = extent * EXTENT + ix;
            let is_marked = map[(ix / 64) as usize] >> (ix % 64) & 1 == 1;
            let is_own = own.iter().any(|range| range.contains(&at));
            let is_reached = is_own || reached.claims.known.contains_key(&at);
            match (is_marked, is_reached) {
                (true, false) if !is_logged(&at) => add(&mut fix.leaked, at),
                (false, true) => add(&mut fix.unmarked, at),
                _ => {}
            }
            fix.used += u64::from(is_marked && !is_own);
        }
    }
}

fn add(ranges: &mut Vec<Range<u64>>, at: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == at => last.end += 1,
        _ => ranges.push(at..at + 1),
    }
}

impl Fix {
    /// Does it, before anything is brought into the trees.
    pub(super) async fn carry_out(
        &self,
        merge: &mut Merge<'_>,
        catalog: &mut Catalog<'_>,
        root: &mut Root,
    ) -> Result<()> {
        root.used = self.used;
        self.leaked.iter().for_each(|range| merge.free(range.clone()));
        self.unmarked.iter().for_each(|range| merge.difference.add(range.clone()));
        self.extents.iter().for_each(|extent| merge.difference.touch(*extent));
        if self.lists.is_empty() && !self.zero {
            return Ok(());
        }
        let all: Vec<(u32, Entry)> =
            catalog.pool.core().catalog.iter().map(|(number, entry)| (*number, entry.clone())).collect();
        // Their trees are not whole any more: no list can be made of them.
        for (number, _) in all.iter().filter(|(_, entry)| entry.deleting) {
            while let Some(snapshot) = catalog.snapshot(*number) {
                delete_of_snapshot(merge, catalog, *number, snapshot).await?;
            }
        }
        if self.zero {
            let mut holes = Holes { merge, made: HashMap::new() };
            for (number, _) in &all {
                let Some(entry) = catalog.get(*number) else { continue };
                let new = holes.tree(entry.root, entry.height, 0).await?;
                if new != entry.root {
                    catalog.change(*number, |entry| entry.root = new);
                    recount(holes.merge, catalog, *number).await?;
                }
            }
        }
        for (volume, _) in &all {
            self.make_lists(merge, catalog, *volume, &all).await?;
        }
        Ok(())
    }

    /// Makes the dead lists anew of a volume's snapshots: what one of them sees and the next does not has died.
    async fn make_lists(
        &self,
        merge: &mut Merge<'_>,
        catalog: &mut Catalog<'_>,
        volume: u32,
        all: &[(u32, Entry)],
    ) -> Result<()> {
        let Some((mut next, _, (_, origin))) = catalog.volume(volume) else { return Ok(()) };
        let (mut later, mut newer) = (Later::default(), volume);
        for number in catalog.line(volume) {
            if self.zero {
                later.add(newer, (merge, catalog, all)).await?;
                newer = number;
            }
            let Some(snapshot) = catalog.snapshot(number) else { continue };
            if self.zero || self.lists.contains(&number) {
                merge.take_dead(number, snapshot.dead, usize::MAX).await?;
                merge.lost_between(origin, &snapshot.entry, &next).await?;
                merge.dead = later.without(std::mem::take(&mut merge.dead));
                let list = merge.add_dead(number, Ptr::default()).await?;
                catalog.change(number, |entry| set_dead(entry, list));
            }
            next = snapshot.entry;
        }
        Ok(())
    }
}

/// What later snapshots of a line see, and what was cloned of them. Where one in between has become a hole, that is not dead which the next
/// one does not see: somebody may see it again.
#[derive(Default)]
struct Later {
    blocks: HashSet<u64>,
    nodes: HashSet<u64>,
}

impl Later {
    /// Adds a volume or a snapshot, with all that was cloned of it.
    async fn add(
        &mut self,
        number: u32,
        (merge, catalog, all): (&Merge<'_>, &Catalog<'_>, &[(u32, Entry)]),
    ) -> Result<()> {
        let mut numbers = vec![number];
        while let Some(number) = numbers.pop() {
            let Some(entry) = catalog.get(number) else { continue };
            self.tree(Item::of(merge.format, entry.root, entry.height, 0), merge).await?;
            let is_clone =
                |entry: &Entry| matches!(entry.kind, EntryKind::Volume { origin, .. } if origin.0 == number);
            for (clone, _) in all.iter().filter(|(_, entry)| is_clone(entry)) {
                numbers.push(*clone);
                numbers.extend(catalog.line(*clone));
            }
        }
        Ok(())
    }

    async fn tree(&mut self, root: Item, merge: &Merge<'_>) -> Result<()> {
        let mut items = vec![root];
        while let Some(item) = items.pop() {
            match item {
                Item::Run { room, .. } => self.blocks.extend(room),
                Item::Node(Place { ptr, level, index, .. }) if self.nodes.insert(ptr.at[0]) => {
                    let body = merge.read(ptr, level, index).await?;
                    ptr.at.into_iter().for_each(|at| self.blocks.extend(at..at + body.blocks()));
                    items.extend(Item::all(merge.format, &body, level, index));
                }
                Item::Node(_) => {}
            }
        }
        Ok(())
    }

    fn without(&self, dead: Vec<Dead>) -> Vec<Dead> {
        let each = dead.into_iter().flat_map(|dead| {
            let blocks = dead.at..dead.at + u64::from(dead.len);
            blocks.map(move |at| Dead { at, len: 1, ..dead })
        });
        let mut left: Vec<Dead> = Vec::new();
        for dead in each.filter(|dead| !self.blocks.contains(&dead.at)) {
            match left.last_mut() {
                Some(last)
                    if last.birth == dead.birth
                        && last.at + u64::from(last.len) == dead.at
                        && last.len < u16::MAX =>
                {
                    last.len += 1;
                }
                _ => left.push(dead),
            }
        }
        left
    }
}

/// Counts what a tree maps, of which some has become holes.
async fn recount(merge: &Merge<'_>, catalog: &mut Catalog<'_>, number: u32) -> Result<()> {
    let Some(entry) = catalog.get(number) else { return Ok(()) };
    let (pool, below) = (catalog.pool, merge.below);
    let (era, newest) = {
        let core = pool.core();
        let ((_, newest), origin) = core.ancestors(number);
        (core.era.clone(), newest.max(origin))
    };
    let tree = Held::new(&entry, &era);
    let all = pool.younger(&tree, 0, below).await?.data;
    let alone = pool.younger(&tree, newest, below).await?.data;
    catalog.change(number, |entry| {
        entry.mapped = all;
        if let EntryKind::Volume { own, .. } = &mut entry.kind {
            *own = alone;
        }
    });
    Ok(())
}

/// Makes holes of nodes that cannot be read. What several trees have in common stays so: each node is made anew once, with the birth
/// that it had.
struct Holes<'m, 'a> {
    merge: &'m mut Merge<'a>,
    /// What has become of each node, by its first block.
    made: HashMap<u64, Ptr>,
}

impl Holes<'_, '_> {
    fn tree(&mut self, ptr: Ptr, level: u8, index: u64) -> LocalBoxFuture<'_, Result<Ptr>> {
        Box::pin(async move {
            if !ptr.is_node() {
                return Ok(ptr);
            }
            if let Some(made) = self.made.get(&ptr.at[0]) {
                return Ok(*made);
            }
            let body = if is_odd(ptr) { None } else { self.merge.read(ptr, level, index).await.ok() };
            let made = match body {
                None => Ptr::hole(ptr.birth),
                Some(body) => self.node(ptr, body, level, index).await?,
            };
            self.made.insert(ptr.at[0], made);
            Ok(made)
        })
    }

    async fn node(&mut self, ptr: Ptr, mut body: Body, level: u8, index: u64) -> Result<Ptr> {
        let child = |ix: u64| index * SLOTS as u64 + ix;
        let mut changed = false;
        match &mut body {
            Body::Inner(children) => {
                for (ix, place) in children.iter_mut().enumerate() {
                    let new = self.tree(*place, level - 1, child(ix as u64)).await?;
                    changed |= new != *place;
                    *place = new;
                }
            }
            Body::Map(map) => {
                let mut left = Vec::new();
                for (ix, leaf) in std::mem::take(&mut map.leaves) {
                    let new = self.tree(leaf, 0, child(u64::from(ix))).await?;
                    changed |= new != leaf;
                    match new.is_node() {
                        true => left.push((ix, new)),
                        false => {
                            let blocks = blocks_of(ix);
                            let place = map.runs.partition_point(|run| run.end() <= blocks.start);
                            let hole = MapRun { first: blocks.start, len: EXTENT, at: 0, birth: new.birth };
                            map.runs.insert(place, hole);
                        }
                    }
                }
                map.leaves = left;
            }
            Body::Leaf(_) | Body::Catalog(_) | Body::Dead(..) => {}
        }
        if !changed {
            return Ok(ptr);
        }
        let place = Place { tree: Tree::Volume(self.merge.format), ptr, level, index };
        let (writer, blocks) = self.merge.old(&place).await?;
        ptr.at.into_iter().for_each(|at| self.merge.free(at..at + blocks));
        self.merge.write(Node { level, index, writer, body }, ptr.birth).await
    }
}
