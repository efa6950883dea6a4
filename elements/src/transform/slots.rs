//! A disk whose blocks are stored in slots, each with something of its own beside the block: what is encrypted, summed,
//! compressed. Where they are, who may touch them, and what becomes of requests.
//!
//! The framework cuts requests to whole blocks, and to what one write below may have. A slot must be there as a whole
//! or not at all, whatever dies meanwhile; so the disk below has to promise that. While a slot is changed nobody
//! reads it: a read sees the old or the new block whatever the disk below does with two requests at once.

use super::own::OUT;
use blockmason::request::join_extents;
use blockmason::sched::{Holder, Mode, RangeGuard, RangeLock};
use blockmason::{
    Answer, Cx, Data, Error, Extent, ExtentState, Flags, Flow, Geometry, Kind, Op, Ops, Reply, Request,
    Result, rt,
};
use std::ops::Range;

/// What is longer, in bytes, is worked on beside the shard, which has others to serve.
pub(super) const INLINE: usize = 64 << 10;

/// Runs what takes the processor for long where that harms nobody.
pub(super) async fn aside<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    rt::blocking(body).await.ok_or_else(|| Error::internal("work beside the shards has panicked"))
}

/// Where blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Bytes of a block, a power of two.
    pub(super) block: u64,
    /// Bytes of a slot.
    pub(super) slot: u64,
    /// Where the first slot begins.
    pub(super) start: u64,
    /// Bytes of the disk that is seen.
    pub(super) size: u64,
}

impl Layout {
    /// As many blocks as fit on a disk of `below` bytes. `what` is the kind of disk, for the error.
    pub(super) fn new(block: u64, slot: u64, start: u64, below: u64, what: &str) -> Result<Layout> {
        let blocks = below.saturating_sub(start) / slot;
        if blocks == 0 {
            let needed = start + slot;
            let message = format!("the disk below has {below} bytes; the smallest {what} one has {needed}");
            return Err(Error::new(Kind::NoSpace, message));
        }
        Ok(Layout { block, slot, start, size: blocks * block })
    }

    /// Where the slots of a range of whole blocks are.
    pub(super) fn places(self, range: &Range<u64>) -> Range<u64> {
        let place = |at: u64| self.start + at / self.block * self.slot;
        place(range.start)..place(range.end)
    }

    /// What is seen, above a disk that writes slots, and what else has `whole` bytes, as a whole or not at all. `harm` is what
    /// becomes of a block that is not.
    pub(super) fn geometry(self, below: &Geometry, whole: u64, harm: &str) -> Result<Geometry> {
        let (reach, needed) = (below.reach(), self.slot.max(whole));
        if reach < needed {
            let message = format!(
                "the disk below promises atomic writes of {reach} bytes, and {needed} are needed: a block that is torn by a \
                 loss of power {harm}; put a `wal` in between"
            );
            return Err(Error::unsupported(message));
        }
        let longest = (reach / self.slot * self.block) as u32;
        let zeroes = below.ops.write_zeroes;
        let ops = Ops {
            discard: zeroes,
            write_zeroes: zeroes,
            fast_zero: zeroes && below.ops.fast_zero,
            cache: below.ops.cache,
            extents: below.ops.extents,
        };
        Ok(Geometry {
            size: self.size,
            min_block: self.block as u32,
            preferred_block: below.preferred_block.max(self.block as u32),
            max_len: longest,
            ops,
            atomic: longest,
            ..*below
        })
    }

    /// Writes the slots of a request in its place: by one write below, as atomic as that is.
    pub(super) async fn write(self, req: &Request, slots: Data, cx: Cx<'_>) -> Reply {
        let mut below = self.below(req, cx);
        below.data = slots;
        cx.forward(OUT, below).await
    }

    /// The same as a request, for the slots and without payload.
    fn below(self, req: &Request, cx: Cx<'_>) -> Request {
        let places = self.places(&(req.offset..req.end()));
        let mut below = cx.child(req);
        (below.offset, below.len, below.data) = (places.start, places.end - places.start, Data::empty());
        below
    }
}

/// What is in slots. Ranges are held by whoever calls these.
pub(super) trait Slotted {
    fn layout(&self) -> Layout;

    /// Blocks that are being read, by several, or changed, by one.
    fn ranges(&self) -> &RangeLock;

    /// Whether anything may be read or changed.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The blocks that are in slots, from block `first` on.
    async fn open(&self, first: u64, slots: Data, cx: Cx<'_>) -> Result<Data>;

    /// Writes whole blocks.
    async fn store(&self, req: Request, cx: Cx<'_>) -> Reply;
}

/// What becomes of a request from above.
pub(super) fn serve<'a>(slotted: &'a impl Slotted, req: Request, cx: Cx<'a>) -> Flow<'a> {
    if req.len == 0 && req.op.has_range() {
        return match req.op {
            Op::Read => Flow::Now(Ok(Answer::Data(Data::empty()))),
            Op::Extents => cx.fail(&req, Error::invalid("nothing is asked for")),
            _ => Flow::done(),
        };
    }
    match req.op {
        Op::Read => cx.begun(&req.clone(), read(slotted, req, cx)),
        Op::Write => cx.begun(&req.clone(), write(slotted, req, cx)),
        Op::WriteZeroes | Op::Discard => cx.later(&req.clone(), zero(slotted, req, cx)),
        Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
            cx.fail(&req, Error::unsupported("a disk in slots knows of no such map"))
        }
        Op::Extents => cx.later(&req.clone(), extents(slotted.layout(), req, cx)),
        Op::Cache => cx.forward(OUT, slotted.layout().below(&req, cx)),
        Op::Flush | Op::Control => cx.forward(OUT, req),
    }
}

async fn hold<'a>(slotted: &'a impl Slotted, req: &Request, mode: Mode) -> RangeGuard<'a> {
    let range = req.offset..req.end();
    slotted.ranges().claim(Holder::of(req), mode, std::slice::from_ref(&range)).await
}

async fn read(slotted: &impl Slotted, req: Request, cx: Cx<'_>) -> Reply {
    let layout = slotted.layout();
    let _held = hold(slotted, &req, Mode::Shared).await;
    let slots = cx.forward(OUT, layout.below(&req, cx)).await?.into_data()?;
    slotted.check()?;
    if slots.is_known_zero() {
        return Ok(Answer::Data(Data::zeros(req.len as usize)));
    }
    slotted.open(req.offset / layout.block, slots, cx).await.map(Answer::Data)
}

async fn write(slotted: &impl Slotted, mut req: Request, cx: Cx<'_>) -> Reply {
    req.stabilise();
    let _held = hold(slotted, &req, Mode::Exclusive).await;
    slotted.store(req, cx).await
}

/// Discards are writes of zeros: what a discard leaves below is open, and half a slot would be damage.
async fn zero(slotted: &impl Slotted, req: Request, cx: Cx<'_>) -> Reply {
    slotted.check()?;
    let _held = hold(slotted, &req, Mode::Exclusive).await;
    let mut below = slotted.layout().below(&req, cx);
    if req.op == Op::Discard {
        below.op = Op::WriteZeroes;
        below.flags = below.flags.with(Flags::MAY_UNMAP);
    }
    cx.forward(OUT, below).await
}

async fn extents(layout: Layout, req: Request, cx: Cx<'_>) -> Reply {
    let mut below = layout.below(&req, cx);
    // The first extent may be less than a slot, and then says nothing.
    below.flags = below.flags.without(Flags::ONE);
    let found = cx.forward(OUT, below).await?.into_extents()?;
    Ok(Answer::Extents(blocks_of(found, layout.slot, layout.block)))
}

/// A block is not what was written there.
#[cold]
pub(super) fn damaged(block: u64, how: &str, cx: Cx<'_>) -> Error {
    let message = format!("block {block} is not what was written there: {how}");
    cx.notice(&message);
    Error::new(Kind::Io, message)
}

/// The bytes in one piece: where they are, or copied.
pub(super) fn flat<'a>(data: &'a Data, scratch: &'a mut Vec<u8>) -> &'a [u8] {
    match data.as_slice() {
        Some(bytes) => bytes,
        None => {
            scratch.resize(data.len(), 0);
            data.copy_to(scratch);
            scratch
        }
    }
}

/// What is known of blocks, from what is known of slots: a block has what all of its slot has.
fn blocks_of(slots: Vec<Extent>, slot: u64, block: u64) -> Vec<Extent> {
    let both = |a: ExtentState, b: ExtentState| ExtentState {
        hole: a.hole && b.hole,
        zero: a.zero && b.zero,
        dirty: a.dirty || b.dirty,
    };
    let mut blocks = Vec::new();
    // Bytes of slots so far, and what is known of the beginning of a slot that has not ended.
    let (mut at, mut begun) = (0, None::<ExtentState>);
    for Extent { len, state } in slots {
        let Range { start, end } = at..at + len;
        at = end;
        let mut from = start;
        if let Some(before) = begun {
            let whole = start.next_multiple_of(slot);
            begun = Some(both(before, state));
            if end < whole {
                continue;
            }
            blocks.push(Extent { len: block, state: both(before, state) });
            (from, begun) = (whole, None);
        }
        blocks.push(Extent { len: (end - from) / slot * block, state });
        if !(end - from).is_multiple_of(slot) {
            begun = Some(state);
        }
    }
    let blocks = join_extents(blocks);
    match blocks.is_empty() {
        true => vec![Extent { len: block, state: ExtentState::DATA }],
        false => blocks,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_what_all_of_its_slot_is() {
        let (hole, data) = (ExtentState::HOLE, ExtentState::DATA);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..2000 {
            let slots: Vec<_> = (0..rng.usize(1..8))
                .map(|_| Extent { len: rng.u64(1..30), state: if rng.bool() { hole } else { data } })
                .collect();
            let bytes: Vec<_> = slots.iter().flat_map(|run| (0..run.len).map(|_| run.state.zero)).collect();
            let mut wanted: Vec<_> =
                bytes.chunks_exact(10).map(|slot| slot.iter().all(|zero| *zero)).collect();
            if wanted.is_empty() {
                wanted.push(false);
            }
            let found = blocks_of(slots, 10, 8);
            let found: Vec<_> =
                found.iter().flat_map(|run| (0..run.len / 8).map(|_| run.state.zero)).collect();
            assert_eq!(found, wanted);
        }
    }
}
