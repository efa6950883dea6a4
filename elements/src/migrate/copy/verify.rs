//! One range under a hold: what is clean of it is compared.

use super::chunk::{Chunk, FROM, Failed, Place, Step, TO, request};
use super::silence::Asked;
use blockmason::{Cx, Data, Flags, Op, Result};
use futures::future::join;
use std::ops::Range;

/// Differences of which the places are told.
const TOLD: usize = 4;

/// What a comparison has found so far.
#[derive(Default)]
pub(super) struct Findings {
    /// Granules that differ.
    pub(super) differ: u64,
    /// The first bytes that differ of a few of them: where, and both.
    first: Vec<(u64, [u8; 2])>,
    /// Bytes that are alike.
    pub(super) alike: u64,
    /// Bytes that are dirty: not compared.
    pub(super) dirty: u64,
}

impl Findings {
    pub(super) fn add(&mut self, other: Findings) {
        self.differ += other.differ;
        self.alike += other.alike;
        self.dirty += other.dirty;
        self.first.extend(other.first);
        // Chunks come in any order.
        self.first.sort_unstable();
        self.first.truncate(TOLD);
    }

    /// What the operator is told if something differs.
    pub(super) fn sentence(&self, granule: u64) -> String {
        let place = |(at, [from, to]): &(u64, [u8; 2])| format!("at {at}: {from:#04x} and {to:#04x}");
        let places: Vec<_> = self.first.iter().map(place).collect();
        let (count, more) = (self.differ, if self.differ as usize > TOLD { " and more" } else { "" });
        format!(
            "{count} pieces of {granule} bytes differ, first bytes on `from` and `to` {}{more}; find out why, then call \
             `retry` to copy them again",
            places.join(", ")
        )
    }
}

/// How far a hole of the disk at `from` is known to be one at `to`, too.
pub(super) async fn hole_of_both(place: &Place, cx: Cx<'_>, asked: &Asked, hole: &Range<u64>) -> u64 {
    if !place.to_extents {
        return hole.start;
    }
    let mut req = request(Op::Extents, hole);
    req.flags = Flags::ONE;
    let known = asked.ask(cx, &place.map, req, None).await.ok();
    let known = known.and_then(|known| known.into_extents().ok()).unwrap_or_default();
    let zeros = known.first().filter(|extent| extent.state.zero).map_or(0, |extent| extent.len);
    hole.start.saturating_add(zeros).min(hole.end)
}

/// Compares what is clean of a range. What differs is made dirty. What is longer than a chunk was a hole on both sides.
pub(super) async fn verify(step: &Step<'_>, range: &Range<u64>) -> Result<Findings, Failed> {
    if range.end - range.start > step.place.chunk {
        let held = step.place.hold(step.cx, range).await?;
        let clean = !step.place.map.is_dirty(range.clone());
        if clean && step.chunk(&held).are_zeros(range).await {
            return Ok(Findings { alike: range.end - range.start, ..Findings::default() });
        }
    }
    let mut found = Findings::default();
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min(at + step.place.chunk);
        found.add(verify_chunk(step, &(at..end)).await?);
        at = end;
    }
    Ok(found)
}

async fn verify_chunk(step: &Step<'_>, range: &Range<u64>) -> Result<Findings, Failed> {
    let held = step.place.hold(step.cx, range).await?;
    let (place, chunk) = (step.place, step.chunk(&held));
    let mut found = Findings::default();
    let mut at = range.start;
    while at < range.end {
        let dirty = place.map.next_dirty(at..range.end).unwrap_or(range.end..range.end);
        if at < dirty.start {
            chunk.compare(at..dirty.start, &mut found).await?;
        }
        found.dirty += dirty.end - dirty.start;
        at = dirty.end;
    }
    Ok(found)
}

impl Chunk<'_> {
    /// True if both sides are known to read as zeros there.
    async fn are_zeros(&self, range: &Range<u64>) -> bool {
        let whole = [range.clone()];
        self.zeros(FROM, range).await == whole && self.zeros(TO, range).await == whole
    }

    async fn compare(&self, range: Range<u64>, found: &mut Findings) -> Result<(), Failed> {
        if self.are_zeros(&range).await {
            found.alike += range.end - range.start;
            return Ok(());
        }
        let read = |port| self.ask(port, request(Op::Read, &range), None);
        let (from, to) = join(read(FROM), read(TO)).await;
        let (from, to) = (from?.into_data().map_err(Failed::From)?, to?.into_data().map_err(Failed::To)?);
        self.hold_against(&range, &from, &to, found);
        Ok(())
    }

    /// Granule by granule, so that each that differs becomes dirty.
    fn hold_against(&self, range: &Range<u64>, from: &Data, to: &Data, found: &mut Findings) {
        let Place { map, .. } = self.place;
        let (from, to) = (from.flatten(), to.flatten());
        let (Some(from), Some(to)) = (from.as_slice(), to.as_slice()) else { return };
        let mut at = range.start;
        while at < range.end {
            let end = (at + 1).next_multiple_of(map.granule()).min(range.end);
            let part = (at - range.start) as usize..(end - range.start) as usize;
            let (one, other) = (&from[part.clone()], &to[part]);
            if one == other {
                found.alike += end - at;
            } else if let Some(ix) = one.iter().zip(other).position(|(a, b)| a != b) {
                map.set(at..end);
                let first = vec![(at + ix as u64, [one[ix], other[ix]])];
                found.add(Findings { differ: 1, first, ..Findings::default() });
            }
            at = end;
        }
    }
}
