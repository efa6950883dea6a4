//! What becomes of a request from above.

use super::format::{PER_SECTOR, State};
use super::io::{BASE, Io, OVERLAY};
use super::overlay::Overlay;
use blockmason::sched::{Holder, Mode, Part};
use blockmason::{Answer, Cx, Data, Error, Flags, Flow, Op, Request, Result};
use futures::future::join;
use std::ops::Range;

/// The most runs of blocks that a hint or a question about extents is followed through.
const MOST_RUNS: usize = 256;

impl Overlay {
    /// The runs of a range that are in one place, in order: the place, and the end.
    fn runs(&self, range: Range<u64>) -> impl Iterator<Item = (usize, Range<u64>)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let blocks = self.layout.touched(at..range.end);
            let held = at < range.end && self.claimed.has(blocks.start);
            let run = at..self.layout.bytes(0..self.claimed.find(!held, blocks)).end.min(range.end);
            at = run.end;
            (!run.is_empty()).then_some((if held { OVERLAY } else { BASE }, run))
        })
    }

    /// Where a byte of the disk is at an out port.
    fn place(&self, port: usize, at: u64) -> u64 {
        if port == OVERLAY { self.layout.data() + at } else { at }
    }

    fn part(&self, req: &Request, port: usize, run: Range<u64>) -> Part {
        Part::new(port, self.place(port, run.start), run.end - run.start, run.start - req.offset)
    }

    /// Hands a request that changes nothing to wherever its blocks are.
    pub(super) fn look<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let mut runs = self.runs(req.offset..req.end());
        let first = runs.next();
        match first {
            None => return cx.forward(BASE, req),
            // What is known of bytes past the run does not hold here: `scatter` cuts it off.
            Some((port, run)) if run.end == req.end() && req.op != Op::Extents => {
                req.offset = self.place(port, run.start);
                return cx.forward(port, req);
            }
            Some(_) => {}
        }
        let most = if req.op == Op::Read { usize::MAX } else { MOST_RUNS };
        let parts: Vec<Part> =
            first.into_iter().chain(runs).take(most).map(|(port, run)| self.part(&req, port, run)).collect();
        cx.scatter(&req, parts)
    }

    /// Changes what is read from now on.
    pub(super) fn change<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        self.count();
        if req.len == 0 {
            return Flow::done();
        }
        if let Err(error) = self.check() {
            return cx.fail(&req, error);
        }
        if req.flags.has(Flags::FAST_ONLY) && !cx.geometry().ops.fast_zero {
            return cx.fail(&req, Error::unsupported("writing zeros is not fast here"));
        }
        // What most writes are: to a block that is there, and nobody is in the way.
        let blocks = self.layout.touched(req.offset..req.end());
        let range = req.offset..req.end();
        let there = if req.is_fua() { &self.durable } else { &self.claimed };
        if req.op == Op::Write
            && there.all(blocks.clone())
            && let Ok(held) = self.ranges.claim(Holder::of(&req), Mode::Shared, &[range]).now()
            && there.all(blocks)
        {
            let moved = Request { offset: self.place(OVERLAY, req.offset), ..req };
            return cx.forward(OVERLAY, moved).then(move |reply| {
                drop(held);
                reply
            });
        }
        cx.later(&req.clone(), async move {
            let mut at = req.offset;
            while at < req.end() {
                // Only writes are short: what else there is goes a map sector at a time.
                let span = self.layout.block * PER_SECTOR;
                let end = if req.op == Op::Write { req.end() } else { req.end().min((at / span + 1) * span) };
                self.change_part(cx.child(&req.part(at - req.offset, end - at, at)), cx).await?;
                at = end;
            }
            Ok(Answer::Done)
        })
    }

    /// True if a change puts blocks into the overlay first.
    fn adds_blocks(&self, op: Op, blocks: &Range<u64>) -> bool {
        op != Op::Discard && self.state() == State::Overlaying && !self.claimed.all(blocks.clone())
    }

    async fn change_part(&self, req: Request, cx: Cx<'_>) -> Result<()> {
        let io = Io::of(cx, &req);
        let blocks = self.layout.touched(req.offset..req.end());
        let durable = loop {
            let adds = self.adds_blocks(req.op, &blocks);
            let (mode, range) = match adds {
                true => (Mode::Exclusive, self.layout.bytes(blocks.clone())),
                false => (Mode::Shared, req.offset..req.end()),
            };
            let _held = self.ranges.claim(Holder::of(&req), mode, &[range]).await;
            self.check()?;
            match self.adds_blocks(req.op, &blocks) {
                // They have left meanwhile: this is not the range to hold.
                true if !adds => {}
                true => {
                    self.first(&req, &blocks, &io).await?;
                    break false;
                }
                false => break self.in_place(&req, cx).await?,
            }
        };
        if req.is_fua() && !durable { self.persist(&io).await } else { Ok(()) }
    }

    /// Writes to blocks of which some are not in the overlay yet. Their range is held.
    async fn first(&self, req: &Request, blocks: &Range<u64>, io: &Io<'_>) -> Result<()> {
        let whole = self.layout.bytes(blocks.clone());
        let start = if self.claimed.has(blocks.start) { req.offset } else { whole.start };
        let end = if self.claimed.has(blocks.end - 1) { req.end() } else { whole.end };
        let head = io.read(BASE, start, req.offset - start);
        let tail = io.read(BASE, req.end(), end - req.end());
        let (head, tail) = join(head, tail).await;
        let (head, tail) = (head?, tail?);
        let flags = self.first_flags();
        let at = |byte| self.place(OVERLAY, byte);
        if req.op == Op::Write {
            let data = Data::concat([head, req.data.clone(), tail]);
            io.write(OVERLAY, at(start), data, flags).await?;
        } else {
            let mut zero = io.cx.child(req);
            zero.offset = at(req.offset);
            zero.flags = zero.flags.without(Flags::FUA).with(flags);
            io.cx.forward(OVERLAY, zero).await?;
            io.write(OVERLAY, at(start), head, flags).await?;
            io.write(OVERLAY, at(req.end()), tail, flags).await?;
        }
        self.claim(io, blocks.clone()).await
    }

    /// Changes blocks where they are. The range is held. True if what FUA asks for has been done.
    async fn in_place(&self, req: &Request, cx: Cx<'_>) -> Result<bool> {
        let base = self.state() != State::Overlaying;
        // The base is not ours to change before the commit, and what a discard leaves is open.
        let runs: Vec<_> =
            self.runs(req.offset..req.end()).filter(|(port, _)| base || *port == OVERLAY).collect();
        let is_durable = |run: &Range<u64>| self.durable.all(self.layout.touched(run.clone()));
        // A discard need not last.
        let durable =
            req.op == Op::Discard || runs.iter().all(|(port, run)| *port == BASE || is_durable(run));
        let parts: Vec<Part> = runs.into_iter().map(|(port, run)| self.part(req, port, run)).collect();
        cx.scatter(req, parts).await?;
        Ok(durable)
    }

    /// Makes durable what was answered before, here and in the base.
    pub(super) fn flush<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        self.count();
        cx.later(&req.clone(), async move {
            self.check()?;
            let io = Io::of(cx, &req);
            let (ours, base) = join(self.persist(&io), cx.forward(BASE, cx.child(&req))).await;
            ours.and(base)
        })
    }
}
