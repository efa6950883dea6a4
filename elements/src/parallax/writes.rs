//! How a volume is written: in place where only it sees what is there, else to new places, compressed or not, of which the log says where
//! they are.

use super::below::Below;
use super::format::{BLOCK, Change, PACK, PACK_BYTES, Pack, SLOTS, unit};
use super::log::Part;
use super::open::crc_of;
use super::pool::Fresh;
use super::promise::Promise;
use super::space::Want;
use super::volume::{Hold, Piece, Search, Volume};
use crate::compression::Algorithm;
use blockmason::{Answer, Cx, Data, Flags, Flow, Kind, Reply, Request, Result};
use futures::future::join;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::Ordering;

/// Bytes of a request that are written beside their record, at most.
const MOST_BESIDE: u64 = 64 << 10;

/// Blocks of a volume that go to a new place.
struct Load {
    first: u64,
    len: u64,
    /// If they go there as a pack: its bytes.
    packed: Option<(Pack, Data)>,
}

impl Volume {
    pub(super) fn write<'a>(&'a self, mut req: Request, below: Below<'a>, cx: Cx<'a>) -> Flow<'a> {
        req.stabilise();
        if let Err(error) = self.pool.check() {
            return cx.fail(&req, error);
        }
        let in_place = self.may_be_in_place(&req);
        let found = self.find_now(Self::blocks(&req), usize::MAX, in_place, &Search::default()).ok();
        let found = match found {
            Some((pieces, hold)) if !req.is_fua() && matches!(&pieces[..], [piece] if piece.own) => {
                return below.submit(Request { offset: pieces[0].at * BLOCK, ..req }).then(move |reply| {
                    drop(hold);
                    reply
                });
            }
            found => found,
        };
        cx.later(&req.clone(), async move {
            let done = match found {
                Some(found) => self.write_found(&req, found, below).await,
                None => self.try_to_write(&req, below).await,
            };
            match done {
                Err(error) if error.kind() == Kind::NoSpace => Box::pin(self.write_pieces(req, below)).await,
                done => done,
            }
        })
    }

    /// Writes when there is room.
    pub(super) async fn write_pieces(&self, req: Request, below: Below<'_>) -> Reply {
        let begun = blockmason::rt::now();
        let mut tries = 0;
        loop {
            let mut room = pin!(self.pool.space.blocks.room.notified());
            room.as_mut().enable();
            let error = match self.try_to_write(&req, below).await {
                Err(error) if error.kind() == Kind::NoSpace => error,
                done => return done,
            };
            // It may need none once what is being moved can be written in place again.
            if self.pool.core().moves(self.number, Self::blocks(&req)) {
                room.await;
                tries = 0;
                continue;
            }
            // What is being deleted makes room.
            if self.pool.delete_some(below).await? {
                continue;
            }
            // What has been let go of is free after a checkpoint, once nobody sees it any more: nor this request.
            tries += 1;
            if tries < 3 && self.pool.core().may_get_room() {
                self.pool.checkpoint(below).await?;
                continue;
            }
            if tries < 3 && self.pool.give_back(below).await? {
                continue;
            }
            let left = self.patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                // Whoever tends the pool says how little room there is.
                self.pool.due.notify_one();
                return Err(error);
            }
            if !self.pool.waited.swap(true, Ordering::Relaxed) {
                below.notice(format!("{}: writes wait for room: {error}", self.name()));
            }
            let _ = blockmason::rt::timeout(left, room).await;
            tries = 0;
        }
    }

    async fn try_to_write(&self, req: &Request, below: Below<'_>) -> Reply {
        self.pool.check()?;
        let in_place = self.may_be_in_place(req);
        let found = self.find(Self::blocks(req), usize::MAX, in_place, below).await?;
        self.write_found(req, found, below).await
    }

    /// How what is written is compressed, if it is.
    fn algorithm(&self) -> Option<Algorithm> {
        self.pool.core().compress(self.number)?.algorithm()
    }

    /// False if something of it is to be compressed, which is never in place.
    fn may_be_in_place(&self, req: &Request) -> bool {
        packs(&Self::blocks(req)).is_empty() || self.algorithm().is_none()
    }

    /// Writes what is there in place where that may be, and the rest to new places.
    async fn write_found(&self, req: &Request, found: (Vec<Piece>, Hold), below: Below<'_>) -> Reply {
        let (pieces, _hold) = found;
        let (mut changes, mut parts) = (Vec::new(), Vec::new());
        let mut promise = self.promise(fresh(&pieces), &Self::blocks(req), false, below).await?;
        for (own, row) in rows(&pieces) {
            let part = |first: u64, len: u64, at: u64| {
                let mut part = req.part(first * BLOCK - req.offset, len * BLOCK, at * BLOCK);
                part.flags = part.flags.without(Flags::FUA);
                part
            };
            if let Some(at) = own {
                parts.push(part(row.start, row.end - row.start, at));
                continue;
            }
            let done = async {
                for load in self.loads(req, row).await? {
                    self.place(load, &mut promise, below, |Load { first, len, packed }, at| {
                        let mut part = part(first, len, at);
                        let plain = part.data.clone();
                        let (pack, data) =
                            packed.map_or((None, plain.clone()), |(pack, data)| (Some(pack), data));
                        (part.len, part.data) = (data.len() as u64, data);
                        changes.push(self.map((first, len), &plain, (at, pack), &part.data));
                        parts.push(part);
                    })
                    .await?;
                }
                Ok(())
            };
            if let Err(error) = done.await {
                // What was taken for nothing.
                self.pool.core().let_go(changes);
                return Err(error);
            }
        }
        self.write_parts(changes, joined(parts), below).await?;
        promise.keep();
        self.end(req, below).await
    }

    /// Blocks that go to new places: packs of them where that makes them fewer, and the others as they are.
    async fn loads(&self, req: &Request, row: Range<u64>) -> Result<Vec<Load>> {
        let load =
            |blocks: Range<u64>, packed| Load { first: blocks.start, len: blocks.end - blocks.start, packed };
        let Some(algorithm) = self.algorithm() else { return Ok(vec![load(row, None)]) };
        let (mut loads, mut plain) = (Vec::new(), row.start);
        for unit in packs(&row).step_by(PACK as usize).map(unit) {
            let from = (unit.start * BLOCK - req.offset) as usize;
            let bytes = req.data.slice(from..from + PACK_BYTES);
            let made = match bytes.as_slice() {
                Some(bytes) => Pack::make(algorithm, bytes)?,
                None => Pack::make(algorithm, &bytes.to_vec())?,
            };
            // It takes some time, which others may use.
            blockmason::rt::pass().await;
            if let Some(packed) = made {
                if plain < unit.start {
                    loads.push(load(plain..unit.start, None));
                }
                plain = unit.end;
                loads.push(load(unit, Some(packed)));
            }
        }
        if plain < row.end {
            loads.push(load(plain..row.end, None));
        }
        Ok(loads)
    }

    /// Takes room for blocks that go to new places, piece by piece. What of them goes where is told each time.
    async fn place(
        &self,
        mut load: Load,
        promise: &mut Promise<'_>,
        below: Below<'_>,
        mut placed: impl FnMut(Load, u64),
    ) -> Result<()> {
        let near = || self.pool.core().lines.get(&self.number).and_then(|line| line.near);
        if let Some((pack, data)) = load.packed.take() {
            let blocks = u64::from(pack.blocks);
            if let Some(room) = self.pool.space.take_now(near(), Want { least: blocks, most: blocks }) {
                promise.placed(blocks);
                placed(Load { packed: Some((pack, data)), ..load }, room.start);
                return Ok(());
            }
            // There are not so many in a row: it was promised as much as it takes as it is, wherever that is.
        }
        let (mut first, end) = (load.first, load.first + load.len);
        while first < end {
            let near = near();
            let want = Want { least: 1, most: end - first };
            let blocks = match self.pool.space.take_now(near, want) {
                Some(blocks) => blocks,
                None => {
                    let taken = Box::pin(self.pool.space.take(near, want, below)).await;
                    taken.inspect_err(|error| self.pool.fails_with(error))?
                }
            };
            let len = blocks.end - blocks.start;
            promise.placed(len);
            placed(Load { first, len, packed: None }, blocks.start);
            first += len;
        }
        Ok(())
    }

    /// Writes data, and logs where it is. Little of it is written beside its record, so that both take the time of one;
    /// nobody else has to wait for much of it. That of an ordered volume never is: if it failed, a replay would end at its
    /// record, and everything after it would be lost, flushed or not.
    async fn write_parts(&self, changes: Vec<Change>, parts: Vec<Request>, below: Below<'_>) -> Result<()> {
        let bytes: u64 = parts.iter().map(|part| part.len).sum();
        let data = async {
            for part in parts {
                below.submit(part).await?;
            }
            Ok(())
        };
        if changes.is_empty() {
            return data.await;
        }
        let ordered = self.pool.core().catalog.get(&self.number).is_some_and(|entry| entry.ordered);
        if bytes > MOST_BESIDE || ordered {
            if let Err(error) = data.await {
                self.pool.core().let_go(changes);
                return Err(error);
            }
            return self.pool.log(Part::after_data(changes), below).await;
        }
        let (written, part) = Part::beside_data(changes);
        let data = async {
            let done = data.await;
            // If nobody waits for it the record could not be written: that is said to whoever has sent it.
            let _ = written.send(done.is_ok());
            done
        };
        // Whoever writes the record lets go of blocks without their data.
        let (data, logged) = join(data, self.pool.log(part, below)).await;
        data.and(logged)
    }

    /// What is said of blocks that go to a place, in a pack or not, where they are this data. What comes next goes behind them.
    fn map(
        &self,
        (first, len): (u64, u64),
        plain: &Data,
        (at, pack): (u64, Option<Pack>),
        data: &Data,
    ) -> Change {
        let checksums = {
            let mut core = self.pool.core();
            if let Some(line) = core.lines.get_mut(&self.number) {
                line.near = Some(at + data.len() as u64 / BLOCK);
            }
            core.catalog.get(&self.number).is_some_and(|entry| entry.checksums)
        };
        let crcs = match checksums {
            true => plain.to_vec().chunks(BLOCK as usize).map(crc32fast::hash).collect(),
            false => Vec::new(),
        };
        Change::Map { volume: self.number, first, len: len as u32, at, crc: crc_of(data), pack, crcs }
    }

    /// What has been done is made durable if that was asked for.
    async fn end(&self, req: &Request, below: Below<'_>) -> Reply {
        if req.is_fua() {
            self.pool.flush(below).await?;
        }
        Ok(Answer::Done)
    }

    pub(super) async fn punch(&self, req: Request, below: Below<'_>) -> Reply {
        self.pool.check()?;
        let row = Self::blocks(&req);
        if row.end - row.start <= 4 * SLOTS as u64 {
            let (pieces, _hold) = self.find(row.clone(), usize::MAX, false, below).await?;
            if pieces.iter().all(|piece| piece.at == 0) {
                return self.end(&req, below).await;
            }
        } else {
            // What cannot be read and is not discarded as a whole is in the way of every checkpoint from then on.
            for (edge, block) in [(row.start, row.start), (row.end, row.end - 1)] {
                if !edge.is_multiple_of(SLOTS as u64) {
                    self.find(block..block + 1, usize::MAX, false, below).await?;
                }
            }
        }
        let promise = self.promise_to_punch(&row, below).await?;
        let starts = (row.start..row.end).step_by(u32::MAX as usize);
        let change = |first: u64| {
            let len = (row.end - first).min(u64::from(u32::MAX)) as u32;
            Change::Map { volume: self.number, first, len, at: 0, crc: 0, pack: None, crcs: Vec::new() }
        };
        self.pool.log(Part::after_data(starts.map(change).collect()), below).await?;
        promise.keep();
        self.end(&req, below).await
    }
}

/// Blocks among these that whole packs can be made of.
fn packs(blocks: &Range<u64>) -> Range<u64> {
    blocks.start.next_multiple_of(PACK)..blocks.end - blocks.end % PACK
}

/// Writes to the pool, of which those in a row become one.
fn joined(parts: Vec<Request>) -> Vec<Request> {
    let mut joined: Vec<Request> = Vec::with_capacity(parts.len());
    for part in parts {
        match joined.last_mut() {
            Some(last) if last.end() == part.offset => {
                last.len += part.len;
                last.data = Data::concat(vec![std::mem::take(&mut last.data), part.data]);
            }
            _ => joined.push(part),
        }
    }
    joined
}

/// What of these goes to new places.
fn fresh(pieces: &[Piece]) -> Fresh {
    let mut fresh = Fresh::default();
    for piece in pieces.iter().filter(|piece| !piece.own) {
        fresh.placed += piece.len;
        fresh.filled += if piece.at == 0 { piece.len } else { 0 };
    }
    fresh
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
