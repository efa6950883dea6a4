//! Serves a volume, or a snapshot of one.

use super::below::Below;
use super::count::Here;
use super::format::{BLOCK, Body, EntryKind, Map, Node, Pack, Ptr, SLOTS, Slot, unit};
use super::merge::span;
use super::nodes::{Place, Tree};
use super::open::crc_of;
use super::pool::{Core, Pool};
use super::runs::Run;
use crate::calendar::seconds;
use blockmason::{
    Answer, Cx, Data, Error, Extent, ExtentState, Flags, Flow, Kind, Op, Reply, Request, Result,
};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What the maps begin with that a volume has: the name of a snapshot follows.
pub const CHANGED_SINCE: &str = "x-mason:changed-since:";

/// Pieces that are looked up at once for an answer that may be incomplete.
const MOST_PIECES: usize = 4096;

/// Nodes that are read for such an answer, at most, if there is anything to say without more.
const MOST_READ: usize = 64;

/// Blocks in a row of a volume that are in a row in the pool, or in one pack; or a hole.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) first: u64,
    pub(super) len: u64,
    /// Of a pack its own first block; 0 is a hole.
    pub(super) at: u64,
    pub(super) pack: Option<Pack>,
    /// Nobody else sees them, and a replay of the log does not look at them.
    pub(super) own: bool,
    /// In volumes that have checksums.
    pub(super) crcs: Vec<u32>,
}

impl Piece {
    /// Blocks of the pool that have to be read for it.
    fn room(&self) -> Range<u64> {
        Slot { at: self.at, pack: self.pack, ..Slot::default() }.room(self.len)
    }

    /// Its bytes, of those blocks.
    ///
    /// # Errors
    /// They are not what was written.
    fn open(&self, found: Data) -> Result<Data> {
        let damaged = |block: u64, why: &str| {
            let at = block * BLOCK;
            Error::new(Kind::Io, format!("the 4096 bytes at {at} are damaged: {why}"))
        };
        let data = match self.pack {
            None => found,
            Some(pack) => {
                let skip = ((self.first - unit(self.first).start) * BLOCK) as usize;
                let plain = pack.open(&found).map_err(|error| damaged(self.first, error.message()))?;
                plain.slice(skip..skip + (self.len * BLOCK) as usize)
            }
        };
        for (ix, crc) in self.crcs.iter().enumerate() {
            let from = ix * BLOCK as usize;
            if crc_of(&data.slice(from..from + BLOCK as usize)) != *crc {
                return Err(damaged(self.first + ix as u64, "their checksum is another one"));
            }
        }
        Ok(data)
    }
}

/// A volume or a snapshot of an open pool, being served.
pub(super) struct Volume {
    pub(super) pool: Arc<Pool>,
    pub(super) number: u32,
    read_only: bool,
    /// The graph that it is served to, for which it is kept.
    graph: Option<String>,
    /// How long a write waits for room where there is none.
    pub(super) patience: Duration,
}

/// What writes that need room do where there is none.
#[derive(Clone, Copy)]
pub(super) struct Full {
    pub(super) on_full: OnFull,
    /// How long they wait, at most.
    pub(super) timeout: Duration,
}

impl Full {
    /// They fail.
    pub(super) const ERROR: Full = Full { on_full: OnFull::Error, timeout: Duration::ZERO };
}

blockmason::words! {
    /// What becomes of a write for which the pool has no room.
    pub(super) enum OnFull {
        /// It fails with ENOSPC.
        Error = "error",
        /// It waits.
        Queue = "queue",
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let mut core = self.pool.core();
        if let Some(count) = core.served.get_mut(&self.number) {
            *count -= 1;
            if *count == 0 {
                core.served.remove(&self.number);
            }
        }
        if self.graph.is_some()
            && let Some((_, count)) = core.writers.get_mut(&self.number)
        {
            *count -= 1;
            if *count == 0 {
                core.writers.remove(&self.number);
            }
        }
    }
}

/// What keeps blocks from being given to others while a request uses them.
pub(super) struct Hold {
    _era: Arc<()>,
    _in_place: Option<Here>,
}

/// A node that is not in memory, and stays where it is until it has been read.
pub(super) struct Missing {
    node: Place,
    hold: Hold,
}

/// Nodes that a search has had to read. It has them until it ends, so that it ends however few the cache keeps; and the
/// oldest hold keeps their blocks from holding anything else meanwhile.
#[derive(Default)]
pub(super) struct Search {
    /// It is not asked where blocks are, but whether they are younger than this: the block that is found is 1 or 0.
    since: Option<u64>,
    nodes: HashMap<u64, Arc<Node>>,
    holds: Vec<Hold>,
}

impl Volume {
    /// Serves what is found. It cannot be deleted from then on, nor is it just being deleted. What a graph may write no other
    /// graph may.
    ///
    /// # Errors
    /// It is not found; [`Kind::Busy`] if another graph has it.
    pub(super) async fn open(
        pool: Arc<Pool>,
        full: Full,
        graph: Option<&str>,
        find: impl FnOnce(&Core) -> Result<u32>,
    ) -> Result<Volume> {
        let _settled = pool.administering.read().await;
        let number = find(&pool.core())?;
        let patience = if full.on_full == OnFull::Queue { full.timeout } else { Duration::ZERO };
        let mut volume = Volume::new(pool.clone(), number);
        volume.patience = patience;
        if let Some(graph) = graph.filter(|_| !volume.read_only) {
            let mut core = pool.core();
            core.need_writable_by(number, graph)?;
            core.writers.entry(number).or_insert_with(|| (graph.to_owned(), 0)).1 += 1;
            drop(core);
            volume.graph = Some(graph.to_owned());
        }
        Ok(volume)
    }

    /// Serves a volume, or a snapshot, for reading only.
    pub(super) fn new(pool: Arc<Pool>, number: u32) -> Volume {
        let mut core = pool.core();
        *core.served.entry(number).or_default() += 1;
        let read_only = !core.lines.contains_key(&number);
        drop(core);
        Volume { pool, number, read_only, graph: None, patience: Duration::ZERO }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn name(&self) -> String {
        let core = self.pool.core();
        core.catalog.get(&self.number).map_or(String::new(), |entry| core.called(&entry.name))
    }

    pub(super) fn blocks(req: &Request) -> Range<u64> {
        req.offset / BLOCK..req.end().div_ceil(BLOCK)
    }

    pub(super) fn submit<'a>(&'a self, req: Request, below: Below<'a>, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            op if op.changes_data() && self.read_only => {
                cx.fail(&req, Error::new(Kind::Denied, "a snapshot is not written"))
            }
            Op::Read => self.read(req, below, cx),
            Op::Write => self.write(req, below, cx),
            Op::Discard | Op::WriteZeroes => cx.later(&req.clone(), self.punch(req, below)),
            Op::Flush => cx.later(&req, async move { self.pool.flush(below).await.map(|()| Answer::Done) }),
            Op::Cache => Flow::done(),
            Op::Extents => cx.later(&req.clone(), self.extents(req, below)),
            Op::Control => cx.later(&req.clone(), self.control(req, below, cx)),
        }
    }

    /// Where blocks are, as many pieces as that at most.
    ///
    /// # Errors
    /// The node that has to be read first.
    fn resolve(
        &self,
        core: &Core,
        blocks: Range<u64>,
        most: usize,
        search: &Search,
    ) -> Result<Vec<Piece>, Place> {
        // As long as it is served it is there.
        let Some(entry) = core.catalog.get(&self.number) else { return Ok(Vec::new()) };
        let shared = match entry.kind {
            EntryKind::Snapshot { .. } => u64::MAX,
            EntryKind::Volume { .. } => {
                let ((_, newest), origin) = core.ancestors(self.number);
                if entry.checksums || entry.ordered { u64::MAX } else { newest.max(origin) }
            }
        };
        // The newest first; the tree comes last.
        let (active, layers) = match core.lines.get(&self.number) {
            Some(line) => (Some(&line.active), &line.layers[..]),
            None => {
                let young = core.young.iter().find(|young| young.number == self.number);
                (None, young.map_or(&[][..], |young| &young.layers))
            }
        };
        let checksums = entry.checksums && search.since.is_none();
        let mut found = Found { pieces: Vec::new(), checksums, since: search.since };
        let mut at = blocks.start;
        while at < blocks.end && found.pieces.len() < most {
            let mut end = blocks.end;
            let older = layers.iter().rev().map(|layer| &layer.runs);
            let run = active.into_iter().chain(older).find_map(|runs| match runs.at(at, end) {
                Ok(run) => Some(run),
                Err(gap) => {
                    end = at + gap;
                    None
                }
            });
            at = match run {
                Some(run) => found.add_run(at, &run, run.birth > shared && core.log.trusts(run.number)),
                None => {
                    let tree = (entry.root, entry.height);
                    match self.resolve_tree(tree, at..end, shared, search, &mut found) {
                        Ok(at) => at,
                        // Enough of an answer that may be incomplete.
                        Err(_) if most < usize::MAX && search.nodes.len() >= MOST_READ => break,
                        Err(missing) => return Err(missing),
                    }
                }
            };
        }
        Ok(found.pieces)
    }

    /// Looks into the tree: one leaf, or one hole. Where it goes on.
    fn resolve_tree(
        &self,
        (mut ptr, mut level): (Ptr, u8),
        blocks: Range<u64>,
        shared: u64,
        search: &Search,
        found: &mut Found,
    ) -> Result<u64, Place> {
        let at = blocks.start;
        loop {
            let index = at / span(level + 1);
            if !ptr.is_node() || search.since.is_some_and(|since| ptr.birth <= since) {
                let end = blocks.end.min((index + 1) * span(level + 1));
                let row = if ptr.is_node() || ptr.is_hole() { 0 } else { ptr.at[0] + at % span(level + 1) };
                let slot = Slot::new(row, ptr.birth);
                found.add(at, slot, end - at, slot.birth > shared);
                return Ok(end);
            }
            let place = Place { tree: Tree::Volume(self.pool.format), ptr, level, index };
            let node = match search.nodes.get(&ptr.at[0]) {
                Some(node) => node.clone(),
                None => self.pool.nodes.cached(&place).ok_or(place)?,
            };
            match &node.body {
                Body::Leaf(slots) => {
                    let end = blocks.end.min((index + 1) * SLOTS as u64);
                    for block in at..end {
                        let slot = slots[(block % SLOTS as u64) as usize];
                        found.add(block, slot, 1, slot.birth > shared);
                    }
                    return Ok(end);
                }
                Body::Inner(children) => {
                    ptr = children[(at / span(level)) as usize % SLOTS];
                    level -= 1;
                }
                Body::Map(map) => match map.leaf(at % Map::BLOCKS) {
                    Some(leaf) => (ptr, level) = (leaf, 0),
                    None => {
                        let run = map.at(at % Map::BLOCKS);
                        let len = run.len.min(blocks.end - at);
                        let slot = Slot::new(run.at, run.birth);
                        found.add(at, slot, len, slot.birth > shared);
                        return Ok(at + len);
                    }
                },
                Body::Catalog(_) | Body::Dead(..) => return Err(place),
            }
        }
    }

    /// Where blocks are. What is found is kept from being used for something else as long as it is held.
    pub(super) async fn find(
        &self,
        blocks: Range<u64>,
        most: usize,
        in_place: bool,
        below: Below<'_>,
    ) -> Result<(Vec<Piece>, Hold)> {
        match self.find_now(blocks.clone(), most, in_place, &Search::default()) {
            Ok(found) => Ok(found),
            // Seldom, and it takes more memory.
            Err(_) => Box::pin(self.search(blocks, most, in_place, Search::default(), below)).await,
        }
    }

    async fn search(
        &self,
        blocks: Range<u64>,
        most: usize,
        in_place: bool,
        mut search: Search,
        below: Below<'_>,
    ) -> Result<(Vec<Piece>, Hold)> {
        loop {
            let Missing { node, hold } = match self.find_now(blocks.clone(), most, in_place, &search) {
                Ok(found) => return Ok(found),
                Err(missing) => missing,
            };
            search.holds.push(hold);
            let read = self.pool.nodes.get(&node, below).await?;
            search.nodes.insert(node.ptr.at[0], read);
        }
    }

    pub(super) fn find_now(
        &self,
        blocks: Range<u64>,
        most: usize,
        in_place: bool,
        search: &Search,
    ) -> Result<(Vec<Piece>, Hold), Missing> {
        let core = self.pool.core();
        let hold = |here| Hold { _era: core.era.clone(), _in_place: here };
        let found = self.resolve(&core, blocks, most, search);
        let mut pieces = found.map_err(|node| Missing { node, hold: hold(None) })?;
        for piece in &mut pieces {
            piece.own &= in_place && !core.moves(self.number, piece.first..piece.first + piece.len);
        }
        let here = pieces.iter().any(|piece| piece.own).then(|| core.enter_in_place(self.number)).flatten();
        if here.is_none() {
            pieces.iter_mut().for_each(|piece| piece.own = false);
        }
        Ok((pieces, hold(here)))
    }

    fn read<'a>(&'a self, req: Request, below: Below<'a>, cx: Cx<'a>) -> Flow<'a> {
        if let Ok((pieces, hold)) = self.find_now(Self::blocks(&req), usize::MAX, false, &Search::default())
            && let [piece] = &pieces[..]
            && piece.crcs.is_empty()
            && piece.pack.is_none()
        {
            if piece.at == 0 {
                return Flow::Now(Ok(Answer::Data(Data::zeros(req.len as usize))));
            }
            let moved = Request { offset: piece.at * BLOCK, ..req };
            return below.submit(moved).then(move |reply| {
                drop(hold);
                reply
            });
        }
        cx.later(&req.clone(), self.read_pieces(req, below))
    }

    pub(super) async fn read_pieces(&self, req: Request, below: Below<'_>) -> Reply {
        let (pieces, _hold) = self.find(Self::blocks(&req), usize::MAX, false, below).await?;
        let mut parts = Vec::new();
        // Packs of what was written in a row lie in a row, and are read at once.
        let goes_on = |one: &Piece, other: &Piece| {
            one.pack.is_some() && other.pack.is_some() && one.room().end == other.at
        };
        for row in pieces.chunk_by(goes_on) {
            let (first, end) = (&row[0], row[row.len() - 1].room().end);
            let from = first.first * BLOCK - req.offset;
            if first.at == 0 {
                parts.push(Data::zeros((first.len * BLOCK) as usize));
                continue;
            }
            let mut part = req.part(from, first.len * BLOCK, first.at * BLOCK);
            part.len = (end - first.at) * BLOCK;
            if !first.crcs.is_empty() || first.pack.is_some() {
                // A guest may change its own memory before it has been compared, and has none for what is compressed.
                part.data = Data::empty();
            }
            let data = below.submit(part).await?.into_data()?;
            for piece in row {
                let room = piece.room();
                let at = |block: u64| ((block - first.at) * BLOCK) as usize;
                parts.push(piece.open(data.slice(at(room.start)..at(room.end)))?);
            }
        }
        Ok(Answer::Data(Data::concat(parts)))
    }

    pub(super) async fn extents(&self, req: Request, below: Below<'_>) -> Reply {
        let most = if req.flags.has(Flags::ONE) { 1 } else { MOST_PIECES };
        let map = req.extra.as_ref().and_then(|extra| extra.map.as_deref());
        let since = map.map(|map| self.birth_in(map)).transpose()?;
        let search = Search { since, ..Search::default() };
        let (pieces, _hold) = self.search(Self::blocks(&req), most, false, search, below).await?;
        let state = |piece: &Piece| match (since, piece.at) {
            (None, 0) => ExtentState::HOLE,
            (None, _) => ExtentState::DATA,
            (Some(_), at) => ExtentState { dirty: at != 0, ..ExtentState::default() },
        };
        let same = pieces.chunk_by(|one, other| state(one) == state(other));
        let extent = |same: &[Piece]| {
            let blocks: u64 = same.iter().map(|piece| piece.len).sum();
            Extent { len: blocks * BLOCK, state: state(&same[0]) }
        };
        Ok(Answer::Extents(same.map(extent).collect()))
    }

    /// The blocks that were born after that, in order, whether or not they are in the trees yet.
    pub(super) async fn born_after(&self, birth: u64, below: Below<'_>) -> Result<Vec<Range<u64>>> {
        self.born_after_in(0..self.blocks_of(), birth, below).await
    }

    /// How many blocks it has.
    pub(super) fn blocks_of(&self) -> u64 {
        self.pool.core().catalog.get(&self.number).map_or(0, |entry| entry.size / BLOCK)
    }

    /// The same of these blocks.
    pub(super) async fn born_after_in(
        &self,
        blocks: Range<u64>,
        birth: u64,
        below: Below<'_>,
    ) -> Result<Vec<Range<u64>>> {
        let (mut found, mut at) = (Vec::<Range<u64>>::new(), blocks.start);
        while at < blocks.end {
            let search = Search { since: Some(birth), ..Search::default() };
            let (pieces, _hold) = self.search(at..blocks.end, MOST_PIECES, false, search, below).await?;
            let young = pieces.iter().filter(|piece| piece.at != 0);
            young.for_each(|piece| add_to(&mut found, piece.first..piece.first + piece.len));
            let last = pieces.last().ok_or_else(|| Error::internal("nothing was found of a volume"))?;
            at = last.first + last.len;
        }
        Ok(found)
    }

    /// What was born after that has changed, as a map says it.
    ///
    /// # Errors
    /// It is no map of changes since a snapshot of this line.
    fn birth_in(&self, map: &str) -> Result<u64> {
        let name = map
            .strip_prefix(CHANGED_SINCE)
            .ok_or_else(|| Error::unsupported("a volume knows of no such map"))?;
        let core = self.pool.core();
        let line = match core.catalog.get(&self.number).map(|entry| &entry.kind) {
            Some(EntryKind::Snapshot { volume, .. }) => *volume,
            _ => self.number,
        };
        let birth = core.snapshot(line, name).and_then(|number| core.birth(number));
        birth.ok_or_else(|| Error::new(Kind::Unavailable, format!("there is no snapshot {name}")))
    }

    async fn control(&self, req: Request, below: Below<'_>, cx: Cx<'_>) -> Reply {
        let (verb, argument) = req.extra.as_ref().and_then(|extra| extra.control.clone()).unwrap_or_default();
        match verb.as_str() {
            "snapshot" => {
                let made = seconds();
                let numbers = self.pool.snapshot(&[(self.number, argument.clone())], made, below).await?;
                cx.notice(format!("snapshot {argument} is taken"));
                Ok(Answer::Text(numbers.iter().map(u32::to_string).collect()))
            }
            "delete_snapshot" => {
                let volume = self.name();
                self.pool.delete_snapshot(&volume, &argument, below).await?;
                cx.notice(format!("snapshot {volume}@{argument} is deleted"));
                Ok(Answer::Done)
            }
            "checkpoint" => self.pool.checkpoint(below).await.map(|()| Answer::Done),
            #[cfg(test)]
            "tidy" => self.tidy_all(&argument, below).await,
            _ => Err(Error::unsupported("a volume knows of no such thing")),
        }
    }
}

/// Adds a range to those before it.
fn add_to(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

/// Pieces, as they are found.
struct Found {
    pieces: Vec<Piece>,
    checksums: bool,
    /// As in [`Search`].
    since: Option<u64>,
}

impl Found {
    /// Adds a run. Where it goes on.
    fn add_run(&mut self, first: u64, run: &Run, own: bool) -> u64 {
        if self.checksums {
            (0..run.len).for_each(|ix| self.add(first + ix, run.slot(ix), 1, own));
        } else {
            let slot = Slot { pack: run.pack, ..Slot::new(run.at, run.birth) };
            self.add(first, slot, run.len, own);
        }
        first + run.len
    }

    fn add(&mut self, first: u64, mut slot: Slot, len: u64, own: bool) {
        if let Some(since) = self.since {
            slot = Slot::new(u64::from(slot.birth > since), slot.birth);
        }
        let own = own && slot.at != 0 && slot.pack.is_none();
        let crcs = if self.checksums && slot.at != 0 { len as usize } else { 0 };
        let crcs = std::iter::repeat_n(slot.crc, crcs);
        if let Some(last) = self.pieces.last_mut() {
            let joins = match self.since {
                Some(_) => last.at == slot.at,
                None if last.at == 0 => slot.at == 0,
                None if slot.pack.is_some() => last.pack == slot.pack && last.at == slot.at,
                None => last.pack.is_none() && slot.at == last.at + last.len,
            };
            if joins && last.own == own {
                last.len += len;
                last.crcs.extend(crcs);
                return;
            }
        }
        self.pieces.push(Piece { first, len, at: slot.at, pack: slot.pack, own, crcs: crcs.collect() });
    }
}
