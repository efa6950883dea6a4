//! A pool that is open: what is known of its volumes, and how changes become findable.

use super::below::Below;
use super::count::{Count, Here};
use super::format::{BLOCK, Change, Compress, Entry, EntryKind, Format, Id, Map, NODE, Root};
use super::log::{Fate, Log, Part, Written};
use super::moves::Window;
use super::nodes::Nodes;
use super::runs::{Run, Runs};
use super::space::Space;
use blockmason::{Cx, Data, Error, Kind, Result};
use futures::future::{Either, select};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::{AddAssign, Range, SubAssign};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;

/// How often what was written goes into the trees, if nothing asks for it sooner.
pub(super) const CHECKPOINT: Duration = Duration::from_secs(5);

/// Percent of a pool that are left when it says so.
const LOW: [u64; 3] = [2, 10, 20];

/// Runs in memory after which they are brought into the trees.
const MOST_RUNS: usize = 200_000;

/// What was written while one snapshot was the newest, and is in no tree.
#[derive(Default)]
pub(super) struct Layer {
    pub(super) runs: Runs,
    /// That snapshot and its birth; 0 none.
    pub(super) newest: (u32, u64),
}

/// A volume's changes that are in no tree yet.
#[derive(Default)]
pub(super) struct Line {
    /// Takes what is written now.
    pub(super) active: Runs,
    /// Older ones, newest last.
    pub(super) layers: Vec<Arc<Layer>>,
    /// A snapshot is about to be taken: nothing is written in place.
    snapping: bool,
    /// Writes in place that are under way; those of them that a move waits for.
    pub(super) in_place: [Arc<Count>; 2],
    /// Blocks that are being moved.
    pub(super) window: Option<Arc<Window>>,
    /// Leaves of what is active, for which room is promised.
    leaves: HashSet<u64>,
    /// Behind what was written last.
    pub(super) near: Option<u64>,
    /// What its tree does not count yet.
    pub(super) fresh: Fresh,
    /// What requests that are under way have been promised.
    pub(super) pending: Fresh,
}

impl Line {
    /// True if it has changes that are in no tree.
    pub(super) fn has_runs(&self) -> bool {
        !self.active.is_empty() || !self.layers.is_empty()
    }
}

/// Blocks of a volume that have been given room and are in no tree yet.
#[derive(Clone, Copy, Default)]
pub(super) struct Fresh {
    /// All of them.
    pub(super) placed: u64,
    /// Those where there was a hole.
    pub(super) filled: u64,
}

impl AddAssign for Fresh {
    fn add_assign(&mut self, other: Fresh) {
        self.placed += other.placed;
        self.filled += other.filled;
    }
}

impl SubAssign for Fresh {
    /// No further than to nothing: a snapshot forgets what has been placed before it.
    fn sub_assign(&mut self, other: Fresh) {
        self.placed = self.placed.saturating_sub(other.placed);
        self.filled = self.filled.saturating_sub(other.filled);
    }
}

/// What so many blocks take together with the nodes that lead to them, at most.
pub(super) fn with_nodes(blocks: u64) -> u64 {
    blocks + blocks / 16
}

/// A snapshot that is not in the trees yet: it sees these layers over its root.
pub(super) struct Young {
    pub(super) number: u32,
    pub(super) layers: Vec<Arc<Layer>>,
}

/// Everything that changes, under one lock, which is held for no longer than a look takes.
pub(super) struct Core {
    format: Format,
    /// By which its volumes are told from those of other trees of the format, `KEY:NAME`; most have none.
    pub(super) key: String,
    /// As it is on the device.
    pub(super) root: Root,
    pub(super) births: u64,
    pub(super) next: u32,
    pub(super) log: Log,
    pub(super) catalog: BTreeMap<u32, Entry>,
    /// Entries that the next checkpoint has to write.
    pub(super) changed: BTreeSet<u32>,
    pub(super) lines: BTreeMap<u32, Line>,
    pub(super) young: Vec<Young>,
    /// Used blocks that are in no tree, and that nothing leads to any more.
    pub(super) loose: Vec<Range<u64>>,
    /// Blocks that are promised for nodes of what is in lines.
    pub(super) promised: u64,
    /// Those who may see what the trees led to when they came.
    pub(super) era: Arc<()>,
    /// Blocks of the space journal that the root names.
    pub(super) journal: Vec<u64>,
    /// Blocks that are free once those eras are over, oldest first.
    pub(super) leaving: Vec<(Weak<()>, Vec<Range<u64>>)>,
    /// How often each volume or snapshot is being served.
    pub(super) served: BTreeMap<u32, usize>,
    /// The graph that each volume is served to, and how often.
    pub(super) writers: BTreeMap<u32, (String, usize)>,
    /// By volumes that are being received: whoever does so now.
    pub(super) receivers: BTreeMap<u32, u64>,
    /// Volumes for which room is kept.
    reserving: Vec<u32>,
    /// Runs in lines.
    runs: usize,
    /// It has just been opened for writing: the next checkpoint says so, whatever else there is.
    pub(super) opened: bool,
    /// Which of the levels of [`LOW`] the room that is left has fallen below.
    low: usize,
}

impl Core {
    pub(super) fn new(
        (format, key): (Format, &str),
        root: Root,
        log: Log,
        catalog: BTreeMap<u32, Entry>,
    ) -> Core {
        let (births, next) = (root.births, root.next);
        let lines = catalog.iter().filter(|(_, entry)| matches!(entry.kind, EntryKind::Volume { .. }));
        let lines = lines.map(|(number, _)| (*number, Line::default())).collect();
        let mut core = Core {
            format,
            key: key.to_owned(),
            root,
            births,
            next,
            log,
            catalog,
            changed: BTreeSet::new(),
            lines,
            young: Vec::new(),
            loose: Vec::new(),
            promised: 0,
            era: Arc::default(),
            journal: Vec::new(),
            leaving: Vec::new(),
            served: BTreeMap::new(),
            writers: BTreeMap::new(),
            receivers: BTreeMap::new(),
            reserving: Vec::new(),
            runs: 0,
            opened: false,
            low: LOW.len(),
        };
        core.look_at_reserves();
        core
    }

    /// The newest snapshot of a volume and its birth, and the birth of its origin; 0 none.
    pub(super) fn ancestors(&self, volume: u32) -> ((u32, u64), u64) {
        let Some(EntryKind::Volume { newest, origin, .. }) =
            self.catalog.get(&volume).map(|entry| &entry.kind)
        else {
            return ((0, 0), 0);
        };
        ((*newest, self.birth(*newest).unwrap_or(0)), origin.1)
    }

    /// # Errors
    /// [`Kind::Busy`] if another graph than this one writes a volume.
    pub(super) fn need_writable_by(&self, volume: u32, graph: &str) -> Result<()> {
        self.need_whole(volume)?;
        match self.writers.get(&volume) {
            Some((other, _)) if other != graph => {
                Err(Error::new(Kind::Busy, format!("the graph {other} has it open")))
            }
            _ => Ok(()),
        }
    }

    /// How what is written to a volume is compressed.
    pub(super) fn compress(&self, volume: u32) -> Option<Compress> {
        self.catalog.get(&volume).map(|entry| entry.compress)
    }

    /// The birth of a snapshot.
    pub(super) fn birth(&self, snapshot: u32) -> Option<u64> {
        match self.catalog.get(&snapshot).map(|entry| &entry.kind) {
            Some(EntryKind::Snapshot { birth, .. }) => Some(*birth),
            _ => None,
        }
    }

    /// Blocks were taken for changes which have not happened.
    pub(super) fn let_go(&mut self, changes: Vec<Change>) {
        self.loose.extend(changes.iter().map(Change::room).filter(|room| !room.is_empty()));
    }

    /// Applies a record that has been written.
    pub(super) fn apply(&mut self, number: u64, changes: Vec<Change>) {
        for change in changes {
            self.note_change(&change);
            // Each of them: a snapshot may be among the changes of others.
            let birth = self.births;
            match change {
                Change::Map { volume, first, len, at, crcs, pack, .. } => {
                    let Some(line) = self.lines.get_mut(&volume) else { continue };
                    let before = line.active.len();
                    let run = Run::new(u64::from(len), at, birth, number, &crcs).packed(pack);
                    // Of the same layer, so no snapshot sees them.
                    self.loose.extend(line.active.replace(first, run));
                    self.runs = self.runs + line.active.len() - before;
                }
                Change::Snapshot { number, volume, made, name } => {
                    self.take_snapshot(number, volume, made, name)
                }
            }
        }
    }

    /// What the volume is now is what the snapshot is from now on.
    fn take_snapshot(&mut self, number: u32, volume: u32, made: u64, name: String) {
        self.freeze(volume);
        let (newest, _) = self.ancestors(volume);
        let birth = self.births;
        self.births += 1;
        let (Some(line), Some(entry)) = (self.lines.get_mut(&volume), self.catalog.get_mut(&volume)) else {
            return;
        };
        (line.snapping, line.in_place[0]) = (false, Arc::default());
        let dead = super::format::Ptr::default();
        let kind = EntryKind::Snapshot { before: newest.0, volume, birth, dead, id: None };
        let snapshot = Entry { name, made, kind, ..entry.clone() };
        if let EntryKind::Volume { newest, own, .. } = &mut entry.kind {
            (*newest, *own) = (number, 0);
        }
        // The snapshot sees all of it.
        line.fresh.placed = 0;
        if !line.layers.is_empty() {
            self.young.push(Young { number, layers: line.layers.clone() });
        }
        self.catalog.insert(number, snapshot);
        self.changed.extend([number, volume]);
        self.next = self.next.max(number + 1);
    }

    /// What a volume has in its active layer goes into one that changes no more.
    pub(super) fn freeze(&mut self, volume: u32) {
        let (newest, _) = self.ancestors(volume);
        let Some(line) = self.lines.get_mut(&volume) else { return };
        if !line.active.is_empty() {
            line.layers.push(Arc::new(Layer { runs: std::mem::take(&mut line.active), newest }));
        }
        line.leaves.clear();
    }

    /// Blocks that volumes have by what the log says, in order.
    pub(super) fn logged(&self) -> Vec<Range<u64>> {
        let layers = |line: &Line| {
            let runs = line.layers.iter().flat_map(|layer| layer.runs.within(0..u64::MAX));
            let runs = line.active.within(0..u64::MAX).chain(runs).map(|(_, run)| run);
            runs.filter(|run| run.at != 0).map(|run| run.at..run.at + run.len).collect::<Vec<_>>()
        };
        let mut all: Vec<Range<u64>> = self.lines.values().flat_map(layers).collect();
        all.sort_unstable_by_key(|range| range.start);
        all
    }

    /// Blocks that are reserved for a volume and that it has not taken yet.
    fn unmet(&self, volume: u32) -> u64 {
        let Some(EntryKind::Volume { limits, own, .. }) = self.catalog.get(&volume).map(|entry| &entry.kind)
        else {
            return 0;
        };
        let placed = self.lines.get(&volume).map_or(0, |line| line.fresh.placed + line.pending.placed);
        with_nodes((limits.reserve / BLOCK).saturating_sub(own + placed))
    }

    /// Blocks that are kept for volumes with a reserve.
    pub(super) fn kept(&self) -> u64 {
        self.reserving.iter().map(|volume| self.unmet(*volume)).sum()
    }

    /// Blocks that are kept for others than this volume.
    pub(super) fn kept_from(&self, volume: u32) -> u64 {
        self.reserving.iter().filter(|other| **other != volume).map(|volume| self.unmet(*volume)).sum()
    }

    /// Notes which volumes have a reserve.
    pub(super) fn look_at_reserves(&mut self) {
        let reserves =
            |entry: &Entry| matches!(&entry.kind, EntryKind::Volume { limits, .. } if limits.reserve > 0);
        let reserving = self.catalog.iter().filter(|(_, entry)| reserves(entry));
        self.reserving = reserving.map(|(number, _)| *number).collect();
    }

    /// # Errors
    /// [`Kind::NoSpace`] if a volume may not have so many more blocks.
    pub(super) fn check_quota(&self, volume: u32, more: u64) -> Result<()> {
        let Some(Entry { kind: EntryKind::Volume { limits, .. }, mapped, name, .. }) =
            self.catalog.get(&volume)
        else {
            return Ok(());
        };
        let filled = self.lines.get(&volume).map_or(0, |line| line.fresh.filled + line.pending.filled);
        match limits.quota > 0 && (mapped + filled + more) * BLOCK > limits.quota && more > 0 {
            true => Err(Error::new(Kind::NoSpace, format!("volume {name} has reached its quota"))),
            false => Ok(()),
        }
    }

    /// Blocks that the nodes may take which lead to one leaf of a volume.
    pub(super) fn nodes_for(&self, volume: u32) -> u64 {
        let height = self.catalog.get(&volume).map_or(0, |entry| u64::from(entry.height));
        // It may be all that is below the nodes above it, and what it lets go of begins a part of a dead list; each node is
        // kept twice.
        let nodes = 2 * NODE * (height + 2);
        match self.format {
            Format::One => nodes,
            Format::Two => nodes + Map::ROOM,
        }
    }

    /// What is promised to a request for so many nodes goes to what it has written, where there was nothing of that leaf.
    /// What of it is kept.
    pub(super) fn keep(
        &mut self,
        volume: u32,
        leaves: impl Iterator<Item = u64> + Clone,
        nodes: u64,
        fresh: Fresh,
    ) -> u64 {
        let Some(line) = self.lines.get_mut(&volume) else { return 0 };
        let each = nodes / leaves.clone().count() as u64;
        let kept = each * leaves.filter(|leaf| line.leaves.insert(*leaf)).count() as u64;
        line.fresh += fresh;
        self.promised += kept;
        kept
    }

    /// True if a checkpoint may make room: there is something that is not in the trees, or that nobody may see any more.
    pub(super) fn may_get_room(&self) -> bool {
        self.promised > 0
            || !self.loose.is_empty()
            || self.leaving.iter().any(|(era, _)| era.strong_count() == 0)
            || self.lines.values().any(|line| !line.active.is_empty() || !line.layers.is_empty())
    }

    /// True if a checkpoint is due.
    pub(super) fn is_due(&self) -> bool {
        self.log.is_long() || self.runs > MOST_RUNS
    }

    pub(super) fn forget_runs(&mut self, runs: usize) {
        self.runs -= runs.min(self.runs);
    }

    /// Enters a write in place, unless there may be none.
    pub(super) fn enter_in_place(&self, volume: u32) -> Option<Here> {
        self.lines.get(&volume).filter(|line| !line.snapping).map(|line| line.in_place[0].enter())
    }
}

pub(super) struct Pool {
    pub(super) id: Id,
    pub(super) format: Format,
    pub(super) writable: bool,
    pub(super) space: Space,
    /// All trees of the pool share them.
    pub(super) nodes: Arc<Nodes>,
    /// The extent of the root.
    pub(super) root_extent: u64,
    core: Mutex<Core>,
    pub(super) checkpointing: tokio::sync::Mutex<()>,
    /// Held for reading while a snapshot is taken, for writing while something else changes the catalog.
    pub(super) administering: tokio::sync::RwLock<()>,
    /// A checkpoint is due.
    pub(super) due: Notify,
    /// It has been said that writes wait for room; again once there is more than a little.
    pub(super) waited: AtomicBool,
    /// When the last scrub of a schedule was due.
    pub(super) scrubbed: AtomicU64,
    broken: OnceLock<String>,
}

impl Pool {
    pub(super) fn new(
        format: Format,
        space: Space,
        nodes: Arc<Nodes>,
        root_extent: u64,
        core: Core,
        writable: bool,
    ) -> Pool {
        space.keep(core.kept());
        Pool {
            id: space.label().id,
            format,
            writable,
            space,
            nodes,
            root_extent,
            core: Mutex::new(core),
            checkpointing: tokio::sync::Mutex::default(),
            administering: tokio::sync::RwLock::default(),
            due: Notify::new(),
            waited: AtomicBool::new(false),
            scrubbed: AtomicU64::new(0),
            broken: OnceLock::new(),
        }
    }

    pub(super) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing is written any more until the pool is opened anew, and what is durable is read from the device.
    pub(super) fn break_down(&self, error: &Error) {
        if self.broken.set(error.to_string()).is_ok() {
            tracing::error!("the pool takes no more changes until it is opened anew: {error}");
            self.space.blocks.room.notify_waiters();
        }
    }

    /// Why it takes no more changes, if it does not.
    pub(super) fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// # Errors
    /// Why nothing may be written.
    pub(super) fn check(&self) -> Result<()> {
        match self.broken.get() {
            Some(why) => {
                let message = format!("the pool takes no more changes until it is opened anew: {why}");
                Err(Error::new(Kind::Io, message))
            }
            None if !self.writable => Err(Error::new(Kind::Denied, "the pool is open for reading only")),
            None => Ok(()),
        }
    }

    /// Writes changes to the log and applies them: from then on they outlive this process. All of them are in one record.
    ///
    /// What of it has no data has not happened.
    pub(super) async fn log(&self, part: Part, below: Below<'_>) -> Result<()> {
        self.check()?;
        let fate = self.core().log.add(part);
        loop {
            let mut woken = std::pin::pin!(fate.changed().notified());
            woken.as_mut().enable();
            if let Some(outcome) = fate.outcome() {
                return outcome;
            }
            if self.core().log.lead() {
                // Few do that, and it takes more memory than waiting.
                Box::pin(self.write_log(&fate, below)).await;
            } else {
                woken.await;
            }
        }
    }

    /// Writes what waits, until this is written.
    async fn write_log(&self, until: &Fate, below: Below<'_>) {
        let mut leader = Leader { pool: self, writes: None };
        // What else this turn of the shard brings goes into the same record.
        tokio::task::yield_now().await;
        while until.outcome().is_none() {
            let Some(batch) = self.core().log.next_batch() else { break };
            leader.writes = Some(batch.fate.clone());
            let done = self.write_record(batch.parts, below).await;
            if let Err(error) = &done {
                self.break_down(error);
            }
            leader.writes = None;
            batch.fate.settle(done);
        }
    }

    async fn write_record(&self, mut parts: Vec<Part>, below: Below<'_>) -> Result<()> {
        self.check()?;
        let stamp = {
            let mut core = self.core();
            core.settle_moves(&mut parts);
            core.log.stamp()
        };
        let bytes = stamp.encode(&self.id, parts.iter().flat_map(|part| &part.changes));
        let blocks = bytes.len() as u64 / BLOCK;
        let (at, behind) = loop {
            if let Some(room) = self.core().log.room(blocks) {
                break room;
            }
            Box::pin(self.checkpoint(below)).await?;
        };
        below.write(at * BLOCK, Data::shared(bytes)).await?;
        let (mut spoilt, mut failed) = (false, Vec::new());
        for part in &mut parts {
            let written = part.data().await;
            if written != Written::Yes {
                spoilt = true;
                let changes = std::mem::take(&mut part.changes);
                failed.extend(changes.into_iter().filter(|_| written == Written::No));
            }
        }
        let mut core = self.core();
        core.log.written(stamp.number, stamp.settled, behind);
        if spoilt {
            core.log.spoil(stamp.number);
            core.let_go(failed);
        }
        for part in parts {
            core.apply(stamp.number, part.changes);
            part.window.iter().for_each(|window| core.close_window(window));
        }
        if core.is_due() {
            self.due.notify_one();
        }
        Ok(())
    }

    /// Promises room for what new entries of the catalog take, and the dead lists that begin with them, until the next
    /// checkpoint has written them.
    ///
    /// # Errors
    /// [`Kind::NoSpace`]: only what makes room may use what is left.
    pub(super) async fn keep_room(&self, entries: u64, below: Below<'_>) -> Result<()> {
        loop {
            let had = self.space.backed();
            {
                let mut core = self.core();
                let blocks = entries * 2 * NODE * (u64::from(core.root.height) + 3);
                if self.space.reserve(blocks, core.kept(), false)? {
                    core.promised += blocks;
                    return Ok(());
                }
            }
            let more = Box::pin(self.space.back(had, below)).await;
            more.inspect_err(|error| self.fails_with(error))?;
        }
    }

    /// A flush that fails may have lost what others were told is written.
    pub(super) fn fails_with(&self, error: &Error) {
        if error.kind() != Kind::NoSpace {
            self.break_down(error);
        }
    }

    /// Makes everything durable that has been answered.
    pub(super) async fn flush(&self, below: Below<'_>) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.check()?;
        let last = self.core().log.last();
        if let Err(error) = below.flush().await {
            self.break_down(&error);
            return Err(error);
        }
        self.core().log.flushed(last);
        Ok(())
    }

    /// Takes snapshots of several volumes at one instant. Durable when it returns. Nobody waits for it meanwhile.
    ///
    /// # Errors
    /// [`Kind::Busy`] if a name is taken; then none is taken.
    pub(super) async fn snapshot(
        &self,
        wanted: &[(u32, String)],
        made: u64,
        below: Below<'_>,
    ) -> Result<Vec<u32>> {
        let _together = self.administering.read().await;
        self.take_snapshots(wanted, made, below).await
    }

    /// The same, while nobody else changes the catalog.
    pub(super) async fn take_snapshots(
        &self,
        wanted: &[(u32, String)],
        made: u64,
        below: Below<'_>,
    ) -> Result<Vec<u32>> {
        self.check()?;
        if self.keep_room(wanted.len() as u64, below).await.is_err() {
            // What is promised to writes that have ended is free again.
            self.checkpoint(below).await?;
            self.keep_room(wanted.len() as u64, below).await?;
        }
        let (counts, changes) = self.begin_snapshots(wanted, made)?;
        for count in counts {
            count.none().await;
        }
        let numbers = changes.iter().filter_map(|change| match change {
            Change::Snapshot { number, .. } => Some(*number),
            Change::Map { .. } => None,
        });
        let numbers: Vec<u32> = numbers.collect();
        self.log(Part::after_data(changes), below).await?;
        self.flush(below).await?;
        Ok(numbers)
    }

    fn begin_snapshots(&self, wanted: &[(u32, String)], made: u64) -> Result<(Vec<Arc<Count>>, Vec<Change>)> {
        let mut core = self.core();
        for (ix, (volume, name)) in wanted.iter().enumerate() {
            let twice = wanted[..ix].iter().any(|(other, _)| other == volume);
            if twice || core.lines.get(volume).is_none_or(|line| line.snapping) {
                return Err(Error::new(Kind::Busy, "a snapshot of that volume is just being taken"));
            }
            let taken = core.catalog.values().any(|entry| {
                entry.is(name)
                    && matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == *volume)
            });
            if taken {
                return Err(Error::new(Kind::Busy, format!("there is a snapshot {name} already")));
            }
        }
        self.has_room_for_reserves(&core, wanted)?;
        let (mut counts, mut changes) = (Vec::new(), Vec::new());
        for (volume, name) in wanted {
            let number = core.next;
            core.next += 1;
            if let Some(line) = core.lines.get_mut(volume) {
                line.snapping = true;
                counts.extend(line.in_place.clone());
            }
            changes.push(Change::Snapshot { number, volume: *volume, made, name: name.clone() });
        }
        Ok((counts, changes))
    }

    /// What others may not count on.
    pub(super) fn note_kept(&self, core: &Core) {
        self.space.keep(core.kept());
    }

    /// What a snapshot sees counts for no reserve any more: so much has to be kept anew.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    fn has_room_for_reserves(&self, core: &Core, wanted: &[(u32, String)]) -> Result<()> {
        let reserved = |(volume, _): &(u32, String)| match core.catalog.get(volume).map(|entry| &entry.kind) {
            Some(EntryKind::Volume { limits, .. }) => {
                with_nodes(limits.reserve / BLOCK).saturating_sub(core.unmet(*volume))
            }
            _ => 0,
        };
        let more: u64 = wanted.iter().map(reserved).sum();
        match more == 0 || self.space.has_room(core.kept() + more) {
            true => {
                self.space.keep(core.kept() + more);
                Ok(())
            }
            false => Err(Error::new(
                Kind::NoSpace,
                "the pool has no room to keep what is reserved once a snapshot sees what has been written",
            )),
        }
    }

    /// Brings the log into the trees when that is due, and before the graph closes.
    pub(super) async fn tend(&self, below: Below<'_>, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        loop {
            let due = blockmason::rt::timeout(CHECKPOINT, self.due.notified());
            let ends = matches!(select(closing.as_mut(), pin!(due)).await, Either::Left(_));
            // The reason has been logged, and whoever writes is told.
            let _ = self.checkpoint(below).await;
            if let Err(error) = self.give_back(below).await {
                tracing::warn!(
                    graph = cx.graph_name(),
                    element = cx.name(),
                    "the block store below: {error}"
                );
            }
            self.warn(cx);
            if ends {
                return;
            }
            let begun = blockmason::rt::now();
            // What fails has ended all changes of the pool, and has been logged.
            if let Ok(true) = self.delete_some(below).await {
                // As long again is for others.
                let pause = cx.sleep(begun.elapsed());
                if let Either::Left(_) = select(closing.as_mut(), pin!(pause)).await {
                    let _ = self.checkpoint(below).await;
                    return;
                }
                self.due.notify_one();
            }
        }
    }

    /// Gives the block store below what is not needed: true if it has more for everybody than was known.
    pub(super) async fn give_back(&self, below: Below<'_>) -> Result<bool> {
        let _alone = self.checkpointing.lock().await;
        self.space.give_back(below).await
    }

    /// Says when there is little room left, once each time.
    fn warn(&self, cx: Cx<'_>) {
        let (free, all) =
            (self.space.blocks.free().saturating_sub(self.space.slop()), self.space.blocks.all());
        let percent = free * 100 / all.max(1);
        let mut core = self.core();
        let level = LOW.into_iter().position(|low| percent < low).map_or(LOW.len(), |level| level);
        if level < core.low {
            cx.notice(format!("the pool has less than {} % of its room left", LOW[level]));
        }
        if level > 0 {
            self.waited.store(false, Ordering::Relaxed);
        }
        core.low = level;
    }

    /// The value of a handler that all elements over a pool have.
    pub(super) fn get(&self, handler: &str) -> Result<String> {
        let free = self.space.blocks.free();
        match handler {
            "free" => Ok((free * BLOCK).to_string()),
            "used" => Ok(((self.space.blocks.all() - free) * BLOCK).to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    /// Blocks that nobody can see any more are free.
    pub(super) fn sweep(&self) {
        let mut core = self.core();
        let over = core.leaving.iter().take_while(|(era, _)| era.strong_count() == 0).count();
        let free: Vec<_> = core.leaving.drain(..over).flat_map(|(_, blocks)| blocks).collect();
        drop(core);
        free.into_iter().for_each(|blocks| self.space.give(blocks));
        self.space.blocks.room.notify_waiters();
    }
}

/// Whoever writes the log.
struct Leader<'a> {
    pool: &'a Pool,
    writes: Option<Arc<Fate>>,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        // Its flow has ended before its end: a panic above it, say. Nobody knows what has been written.
        if let Some(fate) = self.writes.take() {
            let error = Error::internal("whoever wrote the log has gone");
            self.pool.break_down(&error);
            fate.settle(Err(error));
        }
        let next = self.pool.core().log.leave();
        if let Some(fate) = next {
            fate.wake();
        }
    }
}
