//! What becomes of a request from above. The framework has cut it to whole blocks, and to what one write below may
//! have.

use super::cipher::{self, Session};
use super::io::OUT;
use super::volume::{Volume, aside};
use blockmason::request::join_extents;
use blockmason::sched::{Holder, Mode, RangeGuard};
use blockmason::{
    Answer, Cx, Data, Error, Extent, ExtentState, Flags, Flow, Kind, Op, Reply, Request, Result,
};
use std::ops::Range;
use std::sync::Arc;

/// What is longer, in bytes, is encrypted and decrypted beside the shard, which has others to serve.
const INLINE: usize = 64 << 10;

impl Volume {
    pub(super) fn serve<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.len == 0 && req.op.has_range() {
            return match req.op {
                Op::Read => Flow::Now(Ok(Answer::Data(Data::empty()))),
                Op::Extents => cx.fail(&req, Error::invalid("nothing is asked for")),
                _ => Flow::done(),
            };
        }
        match req.op {
            Op::Read => cx.later(&req.clone(), self.read(req, cx)),
            Op::Write => cx.later(&req.clone(), self.write(req, cx)),
            Op::WriteZeroes | Op::Discard => cx.later(&req.clone(), self.zero(req, cx)),
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                cx.fail(&req, Error::unsupported("an encrypted disk knows of no such map"))
            }
            Op::Extents => cx.later(&req.clone(), self.extents(req, cx)),
            Op::Cache => cx.forward(OUT, self.below(&req, cx)),
            Op::Flush | Op::Control => cx.forward(OUT, req),
        }
    }

    /// The same for the slots, without payload.
    fn below(&self, req: &Request, cx: Cx<'_>) -> Request {
        let slots = self.layout.slots(&(req.offset..req.end()));
        let mut below = cx.child(req);
        (below.offset, below.len, below.data) = (slots.start, slots.end - slots.start, Data::empty());
        below
    }

    async fn hold(&self, req: &Request, mode: Mode) -> RangeGuard<'_> {
        let range = req.offset..req.end();
        self.ranges.claim(Holder::of(req), mode, std::slice::from_ref(&range)).await
    }

    async fn read(&self, req: Request, cx: Cx<'_>) -> Reply {
        let _held = self.hold(&req, Mode::Shared).await;
        let slots = cx.forward(OUT, self.below(&req, cx)).await?.into_data()?;
        self.open_slots(req.offset / self.layout.block, slots, cx).await.map(Answer::Data)
    }

    async fn write(&self, mut req: Request, cx: Cx<'_>) -> Reply {
        req.stabilise();
        let _held = self.hold(&req, Mode::Exclusive).await;
        let mut below = self.below(&req, cx);
        below.data = self.seal_blocks(req.offset / self.layout.block, req.data, cx).await?;
        cx.forward(OUT, below).await
    }

    /// Discards are writes of zeros: what a discard leaves below is open, and half a slot would be damage.
    async fn zero(&self, req: Request, cx: Cx<'_>) -> Reply {
        self.check()?;
        let _held = self.hold(&req, Mode::Exclusive).await;
        let mut below = self.below(&req, cx);
        if req.op == Op::Discard {
            below.op = Op::WriteZeroes;
            below.flags = below.flags.with(Flags::MAY_UNMAP);
        }
        cx.forward(OUT, below).await
    }

    async fn extents(&self, req: Request, cx: Cx<'_>) -> Reply {
        let mut below = self.below(&req, cx);
        // The first extent may be less than a slot, and then says nothing.
        below.flags = below.flags.without(Flags::ONE);
        let found = cx.forward(OUT, below).await?.into_extents()?;
        Ok(Answer::Extents(blocks_of(found, self.layout.slot(), self.layout.block)))
    }

    fn check(&self) -> Result<()> {
        match self.state().header.erased {
            true => Err(Error::new(Kind::Denied, "the volume was erased")),
            false => Ok(()),
        }
    }

    /// Blocks from the `first` on, encrypted. Their range is held.
    pub(super) async fn seal_blocks(&self, first: u64, plain: Data, cx: Cx<'_>) -> Result<Data> {
        let block = self.layout.block as usize;
        let (session, counter) = self.nonces(cx, (plain.len() / block) as u64).await?;
        if plain.len() <= INLINE {
            return cipher::seal(&session, first, counter, block, &plain);
        }
        aside(move || cipher::seal(&session, first, counter, block, &plain)).await?
    }

    /// What is in slots that were read, the first of which is that of block `first`.
    pub(super) async fn open_slots(&self, first: u64, slots: Data, cx: Cx<'_>) -> Result<Data> {
        self.check()?;
        let block = self.layout.block as usize;
        if slots.is_known_zero() {
            return Ok(Data::zeros(slots.len() / self.layout.slot() as usize * block));
        }
        let sessions = self.sessions(first, &slots).map_err(|bad| damaged(bad, cx))?;
        let opened = match sessions.len() * block <= INLINE {
            true => cipher::open(&sessions, first, block, &slots),
            false => aside(move || cipher::open(&sessions, first, block, &slots)).await?,
        };
        opened.map_err(|bad| damaged(bad, cx))
    }

    /// The session of each slot; none where it has none.
    ///
    /// # Errors
    /// The first block whose session is not known.
    pub(super) fn sessions(&self, first: u64, slots: &Data) -> Result<Vec<Option<Arc<Session>>>, u64> {
        let mut sessions: Vec<Option<Arc<Session>>> = Vec::new();
        for (number, trailer) in (first..).zip(cipher::trailers(self.layout.block as usize, slots)) {
            let last = sessions.last().and_then(Option::as_ref);
            let found = match trailer.session {
                0 => None,
                same if last.is_some_and(|last| last.number == same) => last.cloned(),
                other => Some(self.session(other).ok().flatten().ok_or(number)?),
            };
            sessions.push(found);
        }
        Ok(sessions)
    }
}

/// A block is not what was written there.
#[cold]
fn damaged(block: u64, cx: Cx<'_>) -> Error {
    let message = format!("block {block} is not what was written there: damaged, or changed by somebody");
    cx.notice(&message);
    Error::new(Kind::Io, message)
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
