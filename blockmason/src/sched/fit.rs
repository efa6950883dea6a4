//! Makes a request fit the element below an edge: splits it, reads, modifies and writes whole blocks,
//! does by other means what the element does not do.

use super::order::ordered;
use super::trace::Open;
use super::{Cx, Holder, Mode, depends};
use crate::data::Data;
use crate::element::Flow;
use crate::error::{Error, Result};
use crate::graph::edge::Edge;
use crate::request::{Answer, Extent, ExtentState, Flags, Op, Origin, Reply, Request, join_extents};
use futures::stream::{FuturesOrdered, StreamExt};
use std::ops::Range;

/// Parts of one request that are in flight at once.
const PARALLEL: usize = 8;

/// The longest write of zeros that stands in for a WriteZeroes, in bytes.
const ZEROES_LEN: u64 = 4 << 20;

/// Hands `req`, with which there is something to do on this edge, on: in its order, and in a form that
/// the element below can take.
#[cold]
pub(super) fn forward<'a>(below: Cx<'a>, edge: &'a Edge, mut req: Request) -> Flow<'a> {
    match Open::edge(below, edge, &mut req) {
        None => after_others(below, edge, req),
        Some(hop) => hop.watch(after_others(below, edge, req)),
    }
}

fn after_others<'a>(below: Cx<'a>, edge: &'a Edge, req: Request) -> Flow<'a> {
    if depends::is_tied(&req) { depends::forward(below, edge, req) } else { in_order(below, edge, req) }
}

/// Hands on a request that waits for no other one, unless that overlaps it.
pub(super) fn in_order<'a>(below: Cx<'a>, edge: &'a Edge, req: Request) -> Flow<'a> {
    ordered(edge, req, move |req| {
        depends::has_passed(edge, &req);
        hand_on(below, edge, req)
    })
}

/// Hands `req` on in a form that the element below can take.
pub(super) fn hand_on<'a>(below: Cx<'a>, edge: &'a Edge, req: Request) -> Flow<'a> {
    if edge.fits(&req) { below.submit(req) } else { fit(Below { cx: below, edge }, req) }
}

fn fit<'a>(below: Below<'a>, req: Request) -> Flow<'a> {
    match req.op {
        Op::Flush | Op::Control => below.cx.submit(req),
        Op::Read => Flow::later(below.read(req)),
        Op::Write => Flow::later(below.write(req)),
        Op::WriteZeroes => Flow::later(below.write_zeroes(req)),
        Op::Discard if !below.ops().discard => Flow::done(),
        Op::Discard => Flow::later(below.discard(req)),
        Op::Cache if !below.ops().cache => Flow::done(),
        Op::Cache => Flow::later(below.cache(req)),
        Op::Extents if !below.ops().extents => {
            if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) {
                return Flow::fail(Error::unsupported("nothing below knows of such a map"));
            }
            Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])))
        }
        Op::Extents => Flow::later(below.extents(req)),
    }
}

/// The lower end of an edge.
#[derive(Clone, Copy)]
struct Below<'a> {
    cx: Cx<'a>,
    edge: &'a Edge,
}

impl<'a> Below<'a> {
    fn ops(self) -> crate::geometry::Ops {
        self.cx.geometry().ops
    }

    /// Hands the element what it can take.
    fn submit(self, mut req: Request) -> Flow<'a> {
        match Open::part(self.cx, self.edge, &mut req) {
            None => self.cx.submit(req),
            Some(hop) => hop.watch(self.cx.submit(req)),
        }
    }

    fn block(self) -> u64 {
        self.edge.mask + 1
    }

    /// The whole blocks that cover a range, cut at the end of the disk.
    fn outwards(self, range: Range<u64>) -> Range<u64> {
        let start = range.start & !self.edge.mask;
        start..range.end.next_multiple_of(self.block()).min(self.edge.size)
    }

    /// The whole blocks within a range; the end of the disk ends a block too.
    fn inwards(self, range: Range<u64>) -> Range<u64> {
        let start = range.start.next_multiple_of(self.block());
        let end = if range.end == self.edge.size { range.end } else { range.end & !self.edge.mask };
        start..end.max(start)
    }

    /// The longest piece that may go down at once.
    fn piece(self) -> u64 {
        self.edge.max_len & !self.edge.mask
    }

    /// Submits `req` in pieces that are not too long, some at once, and collects the replies in
    /// order. All pieces are done, whatever becomes of the others.
    async fn split(self, req: Request, piece: u64) -> Result<Vec<Answer>> {
        if req.len <= piece {
            return self.submit(req).await.map(|answer| vec![answer]);
        }
        let mut answers = Vec::new();
        let mut failed = None;
        let mut running = FuturesOrdered::new();
        let mut from = 0;
        loop {
            while from < req.len && running.len() < PARALLEL && failed.is_none() {
                let len = piece.min(req.len - from);
                let part = self.cx.child(&req.part(from, len, req.offset + from));
                running.push_back(self.submit(part));
                from += len;
            }
            match running.next().await {
                Some(Ok(answer)) => answers.push(answer),
                Some(Err(error)) => failed = failed.or(Some(error)),
                None => return failed.map_or(Ok(answers), Err),
            }
        }
    }

    async fn read(self, req: Request) -> Reply {
        let wanted = req.offset..req.end();
        let whole = self.outwards(wanted.clone());
        if whole == wanted {
            return self.read_blocks(req).await.map(Answer::Data);
        }
        let mut blocks = self.cx.child(&req);
        (blocks.offset, blocks.len, blocks.data) = (whole.start, whole.end - whole.start, Data::empty());
        let data = self.read_blocks(blocks).await?;
        let from = (wanted.start - whole.start) as usize;
        Ok(Answer::Data(data.slice(from..from + req.len as usize)))
    }

    async fn read_blocks(self, req: Request) -> Result<Data> {
        let answers = self.split(req, self.piece()).await?;
        let pieces = answers.into_iter().map(Answer::into_data).collect::<Result<Vec<_>>>()?;
        Ok(Data::concat(pieces))
    }

    async fn write(self, req: Request) -> Reply {
        if !self.edge.locks {
            self.split(req, self.piece()).await?;
            return Ok(Answer::Done);
        }
        let whole = self.outwards(req.offset..req.end());
        let _held = self.hold(&req, &whole).await;
        self.write_held(req, whole).await
    }

    /// Writes while the range lock is held: completes the first and the last block from below.
    async fn write_held(self, mut req: Request, whole: Range<u64>) -> Reply {
        let (start, end) = (req.offset, req.end());
        if whole != (start..end) {
            let head = self.read_part(&req, whole.start..start).await?;
            let tail = self.read_part(&req, end..whole.end).await?;
            let data = Data::concat([head, req.data.clone(), tail]);
            req = self.cx.child(&req);
            (req.offset, req.len, req.data) = (whole.start, whole.end - whole.start, data);
        }
        self.split(req, self.piece()).await?;
        Ok(Answer::Done)
    }

    /// Bytes that complete a block, read in whole blocks. Less than a block.
    async fn read_part(self, parent: &Request, part: Range<u64>) -> Result<Data> {
        if part.is_empty() {
            return Ok(Data::empty());
        }
        let whole = self.outwards(part.clone());
        let mut read = self.cx.child(parent);
        read.op = Op::Read;
        read.origin = Origin::Internal;
        read.flags = Flags::NONE;
        (read.offset, read.len, read.data) = (whole.start, whole.end - whole.start, Data::empty());
        let data = self.submit(read).await?.into_data()?;
        Ok(data.slice((part.start - whole.start) as usize..(part.end - whole.start) as usize))
    }

    async fn write_zeroes(self, req: Request) -> Reply {
        let native = self.ops().write_zeroes;
        if req.flags.has(Flags::FAST_ONLY) && !(native && self.ops().fast_zero) {
            return Err(Error::unsupported("writing zeros is not fast here"));
        }
        let range = req.offset..req.end();
        let inner = if native { self.inwards(range.clone()) } else { range.end..range.end };
        if inner.is_empty() {
            return self.zeros_by_write(&req, range).await;
        }
        self.zeros_by_write(&req, range.start..inner.start).await?;
        self.zeros_by_write(&req, inner.end..range.end).await?;
        let _held = self.hold(&req, &inner).await;
        let mut middle = self.cx.child(&req);
        (middle.offset, middle.len) = (inner.start, inner.end - inner.start);
        self.split(middle, self.piece()).await?;
        Ok(Answer::Done)
    }

    /// Holds a range against read-modify-write, where that happens at all.
    async fn hold(self, req: &Request, range: &Range<u64>) -> Option<super::RangeGuard<'a>> {
        if !self.edge.locks {
            return None;
        }
        let ranges = &self.cx.lane.graph.nodes[self.cx.node as usize].instance.ranges;
        Some(ranges.claim(Holder::of(req), Mode::Exclusive, std::slice::from_ref(range)).await)
    }

    async fn zeros_by_write(self, req: &Request, range: Range<u64>) -> Reply {
        let piece = ZEROES_LEN.min(self.piece());
        let mut at = range.start;
        while at < range.end {
            // Ends on a block, so that only the ends of the whole range are read and modified.
            let end = ((at + piece) & !self.edge.mask).min(range.end);
            let mut write = self.cx.child(req);
            write.op = Op::Write;
            write.flags = req.flags.without(Flags::MAY_UNMAP).without(Flags::FAST_ONLY);
            (write.offset, write.len, write.data) = (at, end - at, Data::zeros((end - at) as usize));
            self.write(write).await?;
            at = end;
        }
        Ok(Answer::Done)
    }

    /// Discards the whole blocks of the range: what a discard leaves behind is open anyhow.
    async fn discard(self, req: Request) -> Reply {
        let inner = self.inwards(req.offset..req.end());
        if inner.is_empty() {
            return Ok(Answer::Done);
        }
        let _held = self.hold(&req, &inner).await;
        let mut discard = self.cx.child(&req);
        (discard.offset, discard.len) = (inner.start, inner.end - inner.start);
        self.split(discard, self.piece()).await?;
        Ok(Answer::Done)
    }

    async fn cache(self, req: Request) -> Reply {
        let whole = self.outwards(req.offset..req.end());
        let mut cache = self.cx.child(&req);
        (cache.offset, cache.len) = (whole.start, whole.end - whole.start);
        self.split(cache, self.piece()).await?;
        Ok(Answer::Done)
    }

    /// One piece is enough: an answer may cover less than was asked for.
    async fn extents(self, req: Request) -> Reply {
        let whole = self.outwards(req.offset..req.end());
        let mut asked = self.cx.child(&req);
        (asked.offset, asked.len) = (whole.start, (whole.end - whole.start).min(self.piece()));
        let mut extents = self.submit(asked).await?.into_extents()?;
        let mut skip = req.offset - whole.start;
        for extent in &mut extents {
            let cut = skip.min(extent.len);
            extent.len -= cut;
            skip -= cut;
        }
        let extents = join_extents(extents);
        if extents.is_empty() {
            return Err(Error::internal("an extents answer covers nothing of the range"));
        }
        Ok(Answer::Extents(extents))
    }
}
