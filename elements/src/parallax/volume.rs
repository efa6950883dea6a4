//! Serves a volume, or a snapshot of one.

use super::below::Below;
use super::format::{BLOCK, Body, Change, EntryKind, Node, Ptr, SLOTS, Slot};
use super::merge::span;
use super::nodes::{Place, Tree};
use super::open::crc_of;
use super::pool::{Core, Here, Pool};
use super::runs::{Run, Runs};
use super::space::Want;
use blockmason::{
    Answer, Cx, Data, Error, Extent, ExtentState, Flags, Flow, Kind, Op, Reply, Request, Result,
};
use std::collections::HashMap;
use std::iter::once;
use std::ops::Range;
use std::sync::Arc;

/// Pieces that are looked up at once for an answer that may be incomplete.
const MOST_PIECES: usize = 4096;

/// Nodes that are read for such an answer, at most, if there is anything to say without more.
const MOST_READ: usize = 64;

/// Blocks in a row of a volume that are in a row in the pool, or a hole.
#[derive(Debug)]
struct Piece {
    first: u64,
    len: u64,
    /// 0 is a hole.
    at: u64,
    /// Nobody else sees them, and a replay of the log does not look at them.
    own: bool,
    /// In volumes that have checksums.
    crcs: Vec<u32>,
}

/// A volume or a snapshot of an open pool, being served.
pub(super) struct Volume {
    pub(super) pool: Arc<Pool>,
    number: u32,
    read_only: bool,
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
    }
}

/// What keeps blocks from being given to others while a request uses them.
struct Hold {
    _era: Arc<()>,
    _in_place: Option<Here>,
}

/// A node that is not in memory, and stays where it is until it has been read.
struct Missing {
    node: Place,
    hold: Hold,
}

/// Nodes that a search has had to read. It has them until it ends, so that it ends however few the cache keeps; and the
/// oldest hold keeps their blocks from holding anything else meanwhile.
#[derive(Default)]
struct Search {
    nodes: HashMap<u64, Arc<Node>>,
    holds: Vec<Hold>,
}

impl Volume {
    /// Serves what is found. It cannot be deleted from then on, nor is it just being deleted.
    ///
    /// # Errors
    /// It is not found.
    pub(super) async fn open(pool: Arc<Pool>, find: impl FnOnce(&Core) -> Result<u32>) -> Result<Volume> {
        let _settled = pool.administering.read().await;
        let number = find(&pool.core())?;
        Ok(Volume::new(pool.clone(), number))
    }

    /// Serves a volume, or a snapshot, for reading only.
    pub(super) fn new(pool: Arc<Pool>, number: u32) -> Volume {
        let mut core = pool.core();
        *core.served.entry(number).or_default() += 1;
        let read_only = !core.lines.contains_key(&number);
        drop(core);
        Volume { pool, number, read_only }
    }

    fn name(&self) -> String {
        self.pool.core().catalog.get(&self.number).map(|entry| entry.name.clone()).unwrap_or_default()
    }

    fn blocks(req: &Request) -> Range<u64> {
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
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                cx.fail(&req, Error::unsupported("a volume knows of no such map"))
            }
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
                if entry.checksums { u64::MAX } else { newest.max(origin) }
            }
        };
        let sources: Vec<&Runs> = match core.lines.get(&self.number) {
            Some(line) => {
                once(&line.active).chain(line.layers.iter().rev().map(|layer| &layer.runs)).collect()
            }
            None => {
                let young = core.young.iter().find(|young| young.number == self.number);
                young
                    .into_iter()
                    .flat_map(|young| young.layers.iter().rev())
                    .map(|layer| &layer.runs)
                    .collect()
            }
        };
        let mut found = Found { pieces: Vec::new(), checksums: entry.checksums };
        let mut at = blocks.start;
        while at < blocks.end && found.pieces.len() < most {
            let mut end = blocks.end;
            let run = sources.iter().find_map(|runs| match runs.at(at, end) {
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
            if ptr.is_hole() {
                let end = blocks.end.min((index + 1) * span(level + 1));
                found.add(at, Slot { birth: ptr.birth, ..Slot::default() }, end - at, false);
                return Ok(end);
            }
            let place = Place { tree: Tree::Volume, ptr, level, index };
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
                Body::Catalog(_) | Body::Dead(..) => return Err(place),
            }
        }
    }

    /// Where blocks are. What is found is kept from being used for something else as long as it is held.
    async fn find(
        &self,
        blocks: Range<u64>,
        most: usize,
        in_place: bool,
        below: Below<'_>,
    ) -> Result<(Vec<Piece>, Hold)> {
        let mut search = Search::default();
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

    fn find_now(
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
        let mut here = None;
        if in_place && pieces.iter().any(|piece| piece.own) {
            here = core.enter_in_place(self.number);
            if here.is_none() {
                pieces.iter_mut().for_each(|piece| piece.own = false);
            }
        }
        Ok((pieces, hold(here)))
    }

    fn read<'a>(&'a self, req: Request, below: Below<'a>, cx: Cx<'a>) -> Flow<'a> {
        if let Ok((pieces, hold)) = self.find_now(Self::blocks(&req), usize::MAX, false, &Search::default())
            && let [piece] = &pieces[..]
            && piece.crcs.is_empty()
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
        for piece in pieces {
            let len = piece.len * BLOCK;
            if piece.at == 0 {
                parts.push(Data::zeros(len as usize));
                continue;
            }
            let mut part = req.part(piece.first * BLOCK - req.offset, len, piece.at * BLOCK);
            if !piece.crcs.is_empty() {
                // A guest may change its own memory before it has been compared.
                part.data = Data::empty();
            }
            let data = below.submit(part).await?.into_data()?;
            for (ix, crc) in piece.crcs.iter().enumerate() {
                let from = ix * BLOCK as usize;
                if crc_of(&data.slice(from..from + BLOCK as usize)) != *crc {
                    let block = piece.first + ix as u64;
                    return Err(Error::new(
                        Kind::Io,
                        format!("block {block} is damaged: its checksum is another one"),
                    ));
                }
            }
            parts.push(data);
        }
        Ok(Answer::Data(Data::concat(parts)))
    }

    fn write<'a>(&'a self, mut req: Request, below: Below<'a>, cx: Cx<'a>) -> Flow<'a> {
        req.stabilise();
        if !req.is_fua()
            && self.pool.check().is_ok()
            && let Ok((pieces, hold)) =
                self.find_now(Self::blocks(&req), usize::MAX, true, &Search::default())
            && let [piece] = &pieces[..]
            && piece.own
        {
            return below.submit(Request { offset: piece.at * BLOCK, ..req }).then(move |reply| {
                drop(hold);
                reply
            });
        }
        cx.later(&req.clone(), self.write_pieces(req, below))
    }

    pub(super) async fn write_pieces(&self, req: Request, below: Below<'_>) -> Reply {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.try_to_write(&req, below).await {
                // What has been let go of is free after a checkpoint, once nobody sees it any more: nor this request.
                Err(error) if error.kind() == Kind::NoSpace && tries < 3 => {
                    self.pool.checkpoint(below).await?
                }
                done => return done,
            }
        }
    }

    async fn try_to_write(&self, req: &Request, below: Below<'_>) -> Reply {
        self.pool.check()?;
        let (pieces, _hold) = self.find(Self::blocks(req), usize::MAX, true, below).await?;
        let mut changes = Vec::new();
        for (own, row) in rows(&pieces) {
            let from = row.start * BLOCK - req.offset;
            let part = |from: u64, len: u64, at: u64| {
                let mut part = req.part(from, len * BLOCK, at * BLOCK);
                part.flags = part.flags.without(Flags::FUA);
                part
            };
            let done = match own {
                Some(at) => below.submit(part(from, row.end - row.start, at)).await.map(drop),
                None => self.write_new(req, row, &part, &mut changes, below).await,
            };
            if let Err(error) = done {
                self.let_go(&changes);
                return Err(error);
            }
        }
        self.end(changes, req, below).await
    }

    /// Writes blocks to new places.
    async fn write_new(
        &self,
        req: &Request,
        row: Range<u64>,
        part: &impl Fn(u64, u64, u64) -> Request,
        changes: &mut Vec<Change>,
        below: Below<'_>,
    ) -> Result<()> {
        self.reserve(row.end - row.start, &row, false)?;
        let mut first = row.start;
        while first < row.end {
            let near = self.pool.core().lines.get(&self.number).and_then(|line| line.near);
            let want = Want { least: 1, most: row.end - first };
            let taken = self.pool.space.take(near, want, below).await;
            let blocks = taken.inspect_err(|error| {
                self.pool.space.release(row.end - first);
                // A flush that fails may have lost what others were told is written.
                if error.kind() != Kind::NoSpace {
                    self.pool.break_down(error);
                }
            })?;
            let len = blocks.end - blocks.start;
            self.pool.space.release(len);
            let part = part(first * BLOCK - req.offset, len, blocks.start);
            changes.push(self.map(first, &part.data, blocks.clone()));
            first += len;
            // What was taken for nothing is let go of with the changes.
            let written = below.submit(part).await;
            written.inspect_err(|_| self.pool.space.release(row.end - first))?;
        }
        Ok(())
    }

    /// Blocks that were written for nothing.
    fn let_go(&self, changes: &[Change]) {
        let blocks = changes.iter().filter_map(|change| match change {
            Change::Map { at: at @ 1.., len, .. } => Some(*at..at + u64::from(*len)),
            Change::Map { .. } | Change::Snapshot { .. } => None,
        });
        self.pool.core().loose.extend(blocks);
    }

    /// What is said of data that goes to these blocks. What comes next goes behind them.
    fn map(&self, first: u64, data: &Data, blocks: Range<u64>) -> Change {
        let checksums = {
            let mut core = self.pool.core();
            if let Some(line) = core.lines.get_mut(&self.number) {
                line.near = Some(blocks.end);
            }
            core.catalog.get(&self.number).is_some_and(|entry| entry.checksums)
        };
        let crcs = match checksums {
            true => data.to_vec().chunks(BLOCK as usize).map(crc32fast::hash).collect(),
            false => Vec::new(),
        };
        let len = (blocks.end - blocks.start) as u32;
        Change::Map { volume: self.number, first, len, at: blocks.start, crc: crc_of(data), crcs }
    }

    /// Logs what has been done, and makes it durable if that was asked for.
    async fn end(&self, changes: Vec<Change>, req: &Request, below: Below<'_>) -> Reply {
        if !changes.is_empty() {
            self.pool.log(changes, below).await?;
        }
        if req.is_fua() {
            self.pool.flush(below).await?;
        }
        Ok(Answer::Done)
    }

    /// Promises room for blocks and for the nodes that lead to them. What makes room may use what is kept for that.
    fn reserve(&self, blocks: u64, row: &Range<u64>, makes_room: bool) -> Result<()> {
        let leaves = row.start / SLOTS as u64..row.end.div_ceil(SLOTS as u64);
        let mut core = self.pool.core();
        // Of what is punched, all leaves but the first and the last are dropped, not written.
        let leaves = if makes_room { vec![leaves.start, leaves.end - 1] } else { leaves.collect() };
        let nodes = core.nodes_for(self.number, &leaves);
        self.pool.space.reserve(blocks + nodes, makes_room)?;
        core.promise(self.number, &leaves, nodes);
        Ok(())
    }

    pub(super) async fn punch(&self, req: Request, below: Below<'_>) -> Reply {
        self.pool.check()?;
        let row = Self::blocks(&req);
        if row.end - row.start <= 4 * SLOTS as u64 {
            let (pieces, _hold) = self.find(row.clone(), usize::MAX, false, below).await?;
            if pieces.iter().all(|piece| piece.at == 0) {
                return self.end(Vec::new(), &req, below).await;
            }
        }
        if self.reserve(0, &row, true).is_err() {
            // What is promised to writes is free again, or theirs.
            self.pool.checkpoint(below).await?;
            self.reserve(0, &row, true)?;
        }
        let starts = (row.start..row.end).step_by(u32::MAX as usize);
        let change = |first: u64| {
            let len = (row.end - first).min(u64::from(u32::MAX)) as u32;
            Change::Map { volume: self.number, first, len, at: 0, crc: 0, crcs: Vec::new() }
        };
        self.end(starts.map(change).collect(), &req, below).await
    }

    async fn extents(&self, req: Request, below: Below<'_>) -> Reply {
        let most = if req.flags.has(Flags::ONE) { 1 } else { MOST_PIECES };
        let (pieces, _hold) = self.find(Self::blocks(&req), most, false, below).await?;
        let extent = |piece: &Piece| {
            let state = if piece.at == 0 { ExtentState::HOLE } else { ExtentState::DATA };
            Extent { len: piece.len * BLOCK, state }
        };
        Ok(Answer::Extents(pieces.iter().map(extent).collect()))
    }

    async fn control(&self, req: Request, below: Below<'_>, cx: Cx<'_>) -> Reply {
        let (verb, argument) = req.extra.as_ref().and_then(|extra| extra.control.clone()).unwrap_or_default();
        match verb.as_str() {
            "snapshot" => {
                let made = unix_seconds();
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
            _ => Err(Error::unsupported("a volume knows of no such thing")),
        }
    }
}

/// Pieces, as they are found.
struct Found {
    pieces: Vec<Piece>,
    checksums: bool,
}

impl Found {
    /// Adds a run. Where it goes on.
    fn add_run(&mut self, first: u64, run: &Run, own: bool) -> u64 {
        if self.checksums {
            (0..run.len).for_each(|ix| self.add(first + ix, run.slot(ix), 1, own));
        } else {
            self.add(first, Slot { at: run.at, birth: run.birth, crc: 0 }, run.len, own);
        }
        first + run.len
    }

    fn add(&mut self, first: u64, slot: Slot, len: u64, own: bool) {
        let own = own && slot.at != 0;
        let crc = (self.checksums && slot.at != 0).then_some(slot.crc);
        if let Some(last) = self.pieces.last_mut() {
            let joins = if last.at == 0 { slot.at == 0 } else { slot.at == last.at + last.len };
            if joins && last.own == own {
                last.len += len;
                last.crcs.extend(crc);
                return;
            }
        }
        self.pieces.push(Piece { first, len, at: slot.at, own, crcs: crc.into_iter().collect() });
    }
}

/// Pieces that are written where they are, and what lies between them, in order.
fn rows(pieces: &[Piece]) -> Vec<(Option<u64>, Range<u64>)> {
    let mut rows: Vec<(Option<u64>, Range<u64>)> = Vec::new();
    for piece in pieces {
        let range = piece.first..piece.first + piece.len;
        match rows.last_mut() {
            Some((None, last)) if !piece.own => last.end = range.end,
            _ => rows.push((piece.own.then_some(piece.at), range)),
        }
    }
    rows
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    let now = blockmason::rt::wall_clock().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
