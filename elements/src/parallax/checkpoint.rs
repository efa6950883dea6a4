//! A checkpoint: what the log says goes into the trees, a new root says so, and the log is empty again.
//!
//! Guests write meanwhile, into the next layer. What it writes is seen by nobody before the root is durable.

use super::admin::{Catalog, Plan};
use super::below::Below;
use super::format::{BLOCK, EXTENT, Entry, EntryKind, ExtentRecord, Ptr, RECORDS, Root, put, seal, short};
use super::merge::{Counted, Merge, Who, height};
use super::pool::{Core, Fresh, Layer, Pool};
use super::space::Want;
use blockmason::{Data, Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Entries of one block of the space journal.
const JOURNAL: usize = 29;

/// What a checkpoint brings into the trees, as it was at one instant.
pub(super) struct Frozen {
    pub(super) root: Root,
    /// Entries of the catalog that change; none is removed.
    pub(super) entries: BTreeMap<u32, Option<Entry>>,
    lines: Vec<(u32, Vec<Arc<Layer>>)>,
    /// Snapshots that see the first so many layers of their volume.
    young: Vec<(u32, usize)>,
    loose: Vec<Range<u64>>,
    promised: u64,
    runs: usize,
    /// What the lines had been given room for.
    fresh: Vec<(u32, Fresh)>,
}

impl Frozen {
    /// What was written over a snapshot that is gone by now was written over the one before it.
    fn look_at_layers(&mut self, pool: &Pool) {
        let mut catalog = Catalog { pool, changed: &mut self.entries };
        for (volume, layers) in &mut self.lines {
            for layer in layers {
                let (number, birth) = layer.newest;
                if number == 0 || catalog.get(number).is_some() {
                    continue;
                }
                let line = catalog.line(*volume).into_iter();
                let mut older = line.filter_map(|number| Some((number, catalog.snapshot(number)?.birth)));
                let newest = older.find(|(_, older)| *older < birth).unwrap_or_default();
                catalog.change(newest.0, |_| ());
                *layer = Arc::new(Layer { runs: layer.runs.clone(), newest });
            }
        }
    }
}

/// What has become of the trees.
#[derive(Default)]
struct Outcome {
    /// Of each volume: its tree after each layer.
    trees: BTreeMap<u32, Vec<Grown>>,
    /// Dead lists of snapshots.
    dead: BTreeMap<u32, Ptr>,
}

/// A tree after a layer.
#[derive(Clone, Copy)]
struct Grown {
    root: Ptr,
    /// Blocks that it maps.
    mapped: u64,
}

impl Grown {
    fn enter(self, entry: &mut Entry) {
        (entry.root, entry.mapped) = (self.root, self.mapped);
    }
}

impl Pool {
    /// Brings everything that has been answered into the trees, durably.
    ///
    /// # Errors
    /// The pool takes no more changes after one.
    pub(super) async fn checkpoint(&self, below: Below<'_>) -> Result<()> {
        let _alone = self.checkpointing.lock().await;
        self.check()?;
        self.sweep();
        let Some(frozen) = self.core().freeze_all(false) else { return Ok(()) };
        self.end_checkpoint(frozen, None, below).await
    }

    /// A checkpoint that changes the catalog as well. Nothing else may change the catalog meanwhile.
    pub(super) async fn checkpoint_with(&self, plan: &Plan, below: Below<'_>) -> Result<()> {
        let _alone = self.checkpointing.lock().await;
        self.check()?;
        self.sweep();
        let Some(frozen) = self.core().freeze_all(true) else { return Ok(()) };
        self.end_checkpoint(frozen, Some(plan), below).await
    }

    async fn end_checkpoint(&self, frozen: Frozen, plan: Option<&Plan>, below: Below<'_>) -> Result<()> {
        let done = self.write_checkpoint(frozen, plan, below).await;
        if let Err(error) = &done {
            self.break_down(error);
        }
        self.sweep();
        done
    }

    async fn write_checkpoint(
        &self,
        mut frozen: Frozen,
        plan: Option<&Plan>,
        below: Below<'_>,
    ) -> Result<()> {
        let mut merge = Merge::new(self, below);
        let mut outcome = Outcome::default();
        if let Some(plan) = plan.filter(|plan| plan.comes_first()) {
            plan.carry_out(&mut merge, self, &mut frozen).await?;
            frozen.look_at_layers(self);
        }
        for (volume, layers) in &frozen.lines {
            let trees =
                merge_line(&mut merge, &mut frozen.entries, *volume, layers, &mut outcome.dead).await?;
            outcome.trees.insert(*volume, trees);
        }
        for (number, layers) in &frozen.young {
            let Some(Some(entry)) = frozen.entries.get_mut(number) else { continue };
            let EntryKind::Snapshot { volume, .. } = entry.kind else { continue };
            let trees = outcome.trees.get(&volume);
            if let Some(tree) = trees.and_then(|trees| trees.get(layers.wrapping_sub(1))) {
                tree.enter(entry);
            }
        }
        if let Some(plan) = plan.filter(|plan| !plan.comes_first()) {
            plan.carry_out(&mut merge, self, &mut frozen).await?;
        }
        write_catalog(&mut merge, &mut frozen).await?;
        let Merge { difference, mut freed, .. } = merge;
        freed.append(&mut frozen.loose);
        let (records, more) = self.space.records(&difference);
        let mut root = frozen.root.clone();
        root.used = root.used.saturating_add_signed(more);
        let journal = self.write_journal(&records, root.sequence, below).await?;
        root.journal = journal.first().copied().unwrap_or(0);
        below.flush().await?;
        self.write_root(&root, below).await?;
        let planned = plan.is_some().then(|| std::mem::take(&mut frozen.entries));
        self.commit(&frozen, root, (outcome, planned), freed, journal);
        self.space.commit(&records, below).await
    }

    /// Writes the records of extents that will change to free blocks, which it returns.
    async fn write_journal(
        &self,
        records: &[(u64, ExtentRecord)],
        sequence: u64,
        below: Below<'_>,
    ) -> Result<Vec<u64>> {
        let mut places = Vec::new();
        for _ in 0..records.len().div_ceil(JOURNAL) {
            places.push(self.space.take(None, Want { least: 2, most: 2 }, below).await?.start);
        }
        for (ix, part) in records.chunks(JOURNAL).enumerate() {
            let mut bytes = vec![0; BLOCK as usize];
            bytes[..4].copy_from_slice(b"PXSJ");
            put(&mut bytes, 8, 8, short(&self.id));
            put(&mut bytes, 16, 8, sequence);
            put(&mut bytes, 24, 8, places.get(ix + 1).copied().unwrap_or(0));
            put(&mut bytes, 32, 4, part.len() as u64);
            for ((extent, record), at) in part.iter().zip((64..).step_by(136)) {
                put(&mut bytes, at, 8, *extent);
                bytes[at + 8..at + 136].copy_from_slice(&record.encode());
            }
            seal(&mut bytes, 4);
            bytes.extend_from_within(..);
            below.write(places[ix] * BLOCK, Data::shared(bytes)).await?;
        }
        Ok(places.into_iter().flat_map(|at| [at, at + 1]).collect())
    }

    /// Makes the root the one that counts.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process has opened the pool meanwhile.
    pub(super) async fn write_root(&self, root: &Root, below: Below<'_>) -> Result<()> {
        let first = self.root_extent * EXTENT;
        for place in Root::places(root.sequence).into_iter().chain(Root::places(root.sequence + 1)) {
            // A copy that cannot be read says nothing, and is written anew.
            let found = below.read((first + place) * BLOCK, BLOCK).await;
            let found = found.and_then(|data| Root::decode(&data.to_vec(), &self.id, root.owner));
            if found.is_ok_and(|other| {
                other.epoch > root.epoch || other.epoch == root.epoch && other.sequence >= root.sequence
            }) {
                return Err(Error::new(Kind::Busy, "somebody else has opened the pool and changed it"));
            }
        }
        let data = Data::shared(root.encode());
        for place in Root::places(root.sequence) {
            below.write((first + place) * BLOCK, data.clone()).await?;
        }
        below.flush().await
    }

    /// The root is durable.
    fn commit(
        &self,
        frozen: &Frozen,
        root: Root,
        (outcome, planned): (Outcome, Option<BTreeMap<u32, Option<Entry>>>),
        mut freed: Vec<Range<u64>>,
        journal: Vec<u64>,
    ) {
        let mut core = self.core();
        core.log.cut(root.tail);
        for (volume, trees) in &outcome.trees {
            core.move_on(*volume, trees, frozen);
        }
        for (snapshot, list) in outcome.dead {
            if let Some(EntryKind::Snapshot { dead, .. }) =
                core.catalog.get_mut(&snapshot).map(|entry| &mut entry.kind)
            {
                *dead = list;
            }
        }
        core.replace_entries(planned.unwrap_or_default());
        core.root = root;
        core.promised -= frozen.promised;
        for (volume, fresh) in &frozen.fresh {
            if let Some(line) = core.lines.get_mut(volume) {
                line.fresh -= *fresh;
            }
        }
        core.forget_runs(frozen.runs);
        freed.extend(std::mem::replace(&mut core.journal, journal).into_iter().map(|at| at..at + 1));
        let era = std::mem::take(&mut core.era);
        core.leaving.push((Arc::downgrade(&era), freed));
        self.note_kept(&core);
        drop(core);
        self.space.release(frozen.promised);
    }
}

impl Core {
    /// Entries are these from now on.
    fn replace_entries(&mut self, entries: BTreeMap<u32, Option<Entry>>) {
        for (number, entry) in entries {
            match entry {
                Some(entry) => {
                    if matches!(entry.kind, EntryKind::Volume { .. }) {
                        self.lines.entry(number).or_default();
                    }
                    self.catalog.insert(number, entry);
                }
                None => {
                    self.lines.remove(&number);
                    self.catalog.remove(&number);
                }
            }
        }
        self.look_at_reserves();
    }

    /// What a checkpoint has to do, if there is anything, or if it is wanted all the same.
    fn freeze_all(&mut self, wanted: bool) -> Option<Frozen> {
        let volumes: Vec<u32> = self.lines.keys().copied().collect();
        volumes.iter().for_each(|volume| self.freeze(*volume));
        let layers = |(volume, line): (&u32, &super::pool::Line)| {
            (!line.layers.is_empty()).then(|| (*volume, line.layers.clone()))
        };
        let lines: Vec<(u32, Vec<Arc<Layer>>)> = self.lines.iter().filter_map(layers).collect();
        let nothing = lines.is_empty()
            && self.changed.is_empty()
            && self.log.is_empty()
            && self.loose.is_empty()
            && self.promised == 0;
        if nothing && !std::mem::take(&mut self.opened) && !wanted {
            return None;
        }
        let mut numbers = std::mem::take(&mut self.changed);
        for (volume, layers) in &lines {
            numbers.insert(*volume);
            numbers.extend(layers.iter().map(|layer| layer.newest.0).filter(|number| *number != 0));
        }
        let entries = numbers.iter().map(|number| (*number, self.catalog.get(number).cloned())).collect();
        let young = self.young.iter().map(|young| (young.number, young.layers.len())).collect();
        let (tail, promised) = (self.log.head(), self.promised);
        let root = Root {
            sequence: self.root.sequence + 1,
            births: self.births,
            next: self.next,
            tail,
            ..self.root.clone()
        };
        let runs = lines.iter().flat_map(|(_, layers)| layers).map(|layer| layer.runs.len()).sum();
        let fresh = self.lines.iter().map(|(volume, line)| (*volume, line.fresh)).collect();
        let loose = std::mem::take(&mut self.loose);
        Some(Frozen { root, entries, lines, young, loose, promised, runs, fresh })
    }

    /// A volume's first layers are in its tree, with these roots after each of them.
    fn move_on(&mut self, volume: u32, trees: &[Grown], frozen: &Frozen) {
        let Some(newest) = trees.last() else { return };
        if let (Some(line), Some(entry)) = (self.lines.get_mut(&volume), self.catalog.get_mut(&volume)) {
            line.layers.drain(..trees.len());
            newest.enter(entry);
            if let Some(Some(then)) = frozen.entries.get(&volume) {
                entry.take_own(then);
            }
        }
        let catalog = &mut self.catalog;
        self.young.retain_mut(|young| {
            let Some(entry) = catalog.get_mut(&young.number) else { return false };
            if !matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == volume) {
                return true;
            }
            let count = young.layers.len().min(trees.len());
            trees[count - 1].enter(entry);
            young.layers.drain(..count);
            !young.layers.is_empty()
        });
    }
}

impl Entry {
    /// What only the volume sees is what was found out, unless a snapshot was taken meanwhile, which sees all of it.
    fn take_own(&mut self, found: &Entry) {
        if let (EntryKind::Volume { newest, own, .. }, EntryKind::Volume { newest: then, own: found, .. }) =
            (&mut self.kind, &found.kind)
            && newest == then
        {
            *own = *found;
        }
    }

    fn count(&mut self, counted: Counted, is_newest: bool) {
        self.mapped = self.mapped.saturating_add_signed(counted.mapped);
        if let EntryKind::Volume { own, .. } = &mut self.kind
            && is_newest
        {
            *own = own.saturating_add_signed(counted.own);
        }
    }
}

/// Brings the layers of a volume into its tree, the oldest first. The tree after each of them.
async fn merge_line(
    merge: &mut Merge<'_>,
    entries: &mut BTreeMap<u32, Option<Entry>>,
    volume: u32,
    layers: &[Arc<Layer>],
    lists: &mut BTreeMap<u32, Ptr>,
) -> Result<Vec<Grown>> {
    let Some(Some(mut entry)) = entries.get(&volume).cloned() else { return Ok(Vec::new()) };
    let EntryKind::Volume { newest: latest, origin: (_, origin), .. } = entry.kind else {
        return Ok(Vec::new());
    };
    let mut trees = Vec::new();
    for layer in layers {
        let (snapshot, newest) = layer.newest;
        merge.counted = Counted::default();
        let who = Who { volume, newest, origin };
        entry.root = merge.merge(who, entry.root, (entry.height, 0), &layer.runs).await?;
        entry.count(merge.counted, snapshot == latest);
        trees.push(Grown { root: entry.root, mapped: entry.mapped });
        if let Some(Some(Entry { kind: EntryKind::Snapshot { dead, .. }, .. })) = entries.get_mut(&snapshot) {
            *dead = merge.add_dead(snapshot, *dead).await?;
            lists.insert(snapshot, *dead);
        }
    }
    entries.insert(volume, Some(entry));
    Ok(trees)
}

/// Writes what has changed of the catalog, which may grow by it.
async fn write_catalog(merge: &mut Merge<'_>, frozen: &mut Frozen) -> Result<()> {
    let root = &mut frozen.root;
    let pages = u64::from(root.next).div_ceil(RECORDS as u64).max(1);
    while root.height < height(pages) {
        root.height += 1;
        if !root.catalog.is_hole() {
            root.catalog = merge.above(root.catalog, root.height, 0, 0).await?;
        }
    }
    root.catalog = merge.catalog(root.catalog, (root.height, 0), &frozen.entries).await?;
    Ok(())
}
