//! One range under a hold: what is dirty of it moves.

use super::silence::{Asked, SILENCE};
use crate::migrate::map::{DirtyMap, Intent};
use blockmason::sched::Held;
use blockmason::{Answer, Class, Cx, Data, Error, Flags, Geometry, Op, Origin, Request, Result};
use futures::stream::{self, StreamExt};
use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// The out ports.
pub(super) const FROM: usize = 0;
pub(super) const TO: usize = 1;

/// Parts of one chunk that are written at once.
const PARALLEL: usize = 8;

/// What is looked at together whether it is zero, at the least: finer, and writes become small.
const LOOK: u64 = 64 << 10;

/// How long a range waits, before it is held, for changes of it that are on their way: guests wait for them while
/// it is held.
const LEGS: Duration = Duration::from_millis(100);

/// What one graph makes of it.
pub(super) struct Place {
    /// Bytes that count: those of the disk at `from`.
    pub(super) from: u64,
    /// The same and what is written behind it, to the end of a granule or of the disk at `to`.
    pub(super) end: u64,
    /// Whole granules.
    pub(super) chunk: u64,
    pub(super) map: Arc<DirtyMap>,
    /// The map is this element's own: nobody else says that something is clean.
    pub(super) own: bool,
    /// Nobody changes the disk at `from`, or uses the one at `to`: ranges are not held.
    pub(super) frozen: bool,
    /// The disk at `from` knows of holes.
    pub(super) from_extents: bool,
    pub(super) to_extents: bool,
    to_zeroes: bool,
    /// Zeros are fast at `to`, however many.
    pub(super) to_fast: bool,
}

impl Place {
    pub(super) fn new(from: Geometry, to: Geometry, map: Arc<DirtyMap>, own: bool, chunk: u64) -> Place {
        let granule = map.granule();
        Place {
            from: from.size,
            end: from.size.next_multiple_of(granule).min(map.size()),
            chunk: (chunk / granule).max(1) * granule,
            map,
            own,
            frozen: false,
            from_extents: from.ops.extents,
            to_extents: to.ops.extents,
            to_zeroes: to.ops.write_zeroes,
            to_fast: to.ops.write_zeroes && to.ops.fast_zero,
        }
    }

    /// Dirty bytes of what counts.
    pub(super) fn remaining(&self) -> u64 {
        let (mut at, mut sum) = (0, 0);
        while let Some(run) = self.map.next_dirty(at..self.from) {
            at = run.end;
            sum += run.end - run.start;
        }
        sum
    }

    /// Takes over from a map of the same disk what has been copied.
    pub(super) fn learn(&self, old: &Arc<DirtyMap>) {
        let mut at = 0;
        while old.size() == self.map.size() && at < self.end {
            let dirty = old.next_dirty(at..self.end).unwrap_or(self.end..self.end);
            if let Some(intent) = self.map.intend_now(at..dirty.start).filter(|_| at < dirty.start) {
                intent.synced();
            }
            at = dirty.end;
        }
    }

    /// The end of the last whole granule up to there; the end of what is written ends one, too.
    pub(super) fn down(&self, at: u64) -> u64 {
        if at >= self.end { self.end } else { at & !(self.map.granule() - 1) }
    }

    /// What a backup has frozen in the map of changes is to be copied.
    pub(super) fn fill(&self, changes: &DirtyMap) {
        let mut at = 0;
        while let Some(run) = changes.frozen_next(at..self.from) {
            at = run.end;
            self.map.set(run);
        }
    }

    /// Holds a range once all that is on its way there has landed, if anything changes there.
    ///
    /// # Errors
    /// It does not land: the disk at `to` does not answer.
    pub(super) async fn hold<'a>(&self, cx: Cx<'a>, range: &Range<u64>) -> Result<Held<'a>, Failed> {
        if self.frozen {
            return Ok(cx.hold_none().await);
        }
        // Later ones may come without end: then they wait.
        let _ = blockmason::rt::timeout(LEGS, self.map.settled(range.clone())).await;
        let held = cx.hold(range.clone()).await;
        // Guests wait for the end of this.
        if self.map.settles(range.clone(), SILENCE).await {
            return Ok(held);
        }
        self.map.let_go(range);
        Err(Failed::Silent)
    }
}

/// How every error of the disk at `from` begins.
pub(super) const UNREADABLE: &str = "the disk at `from` cannot be read: ";

/// Which side has failed.
#[derive(Debug)]
pub(super) enum Failed {
    From(Error),
    To(Error),
    /// The disk at `to` does not answer.
    Silent,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failed::From(error) => write!(f, "{UNREADABLE}{error}"),
            Failed::To(error) => write!(f, "the disk at `to` does not take it: {error}"),
            Failed::Silent => write!(f, "the disk at `to` has not answered for {SILENCE:?}"),
        }
    }
}

/// What has become of a chunk so far, also of one that fails.
#[derive(Default)]
pub(super) struct Moved {
    pub(super) copied: Cell<u64>,
    pub(super) skipped: Cell<u64>,
}

/// A request of this element for a range.
pub(super) fn request(op: Op, range: &Range<u64>) -> Request {
    let mut req = Request::new(op, range.start, range.end - range.start);
    (req.origin, req.class) = (Origin::Copy, Class::Background);
    req
}

/// What a chunk is moved with.
pub(super) struct Step<'a> {
    pub(super) place: &'a Place,
    pub(super) cx: Cx<'a>,
    pub(super) moved: &'a Moved,
    pub(super) asked: &'a Asked,
    /// All of it was data when it was looked at last: to ask for holes again would be dear for nothing.
    pub(super) dense: bool,
}

impl<'a> Step<'a> {
    pub(super) fn chunk(&self, held: &'a Held<'a>) -> Chunk<'a> {
        let Step { place, cx, moved, asked, dense } = *self;
        Chunk { cx, asked, place, held, moved, dense }
    }
}

/// A range that is held, and what has settled there.
pub(super) struct Chunk<'a> {
    pub(super) cx: Cx<'a>,
    pub(super) asked: &'a Asked,
    pub(super) place: &'a Place,
    pub(super) held: &'a Held<'a>,
    pub(super) moved: &'a Moved,
    /// The disk at `from` is not asked for holes.
    pub(super) dense: bool,
}

/// Copies what is dirty of a range.
pub(super) async fn copy(step: &Step<'_>, range: &Range<u64>) -> Result<(), Failed> {
    let held = step.place.hold(step.cx, range).await?;
    let (place, chunk) = (step.place, step.chunk(&held));
    let mut at = range.start;
    while let Some(run) = place.map.next_dirty(at..range.end) {
        at = run.end;
        chunk.copy_run(run).await?;
    }
    Ok(())
}

/// Makes zero what is dirty at the start of a range which is known to be a large hole, if it still is one. The rest
/// stays dirty.
pub(super) async fn zero(step: &Step<'_>, range: &Range<u64>) -> Result<(), Failed> {
    let place = step.place;
    let held = place.hold(step.cx, range).await?;
    let Some(run) = place.map.next_dirty(range.clone()) else { return Ok(()) };
    let mut asked = request(Op::Extents, &run);
    asked.flags = Flags::ONE;
    let known = held.forward(FROM, asked).await.and_then(Answer::into_extents);
    let zeros = known.ok().and_then(|known| known.first().copied()).filter(|extent| extent.state.zero);
    let end = place.down(run.start.saturating_add(zeros.map_or(0, |extent| extent.len))).min(run.end);
    if end <= run.start {
        return Ok(());
    }
    step.chunk(&held).put(run.start..end, None).await
}

/// Makes durable what was copied, and then what it was copied from: else a loss of power could undo there what the
/// copy has.
pub(super) async fn flush(step: &Step<'_>) -> Result<(), Failed> {
    let free = step.cx.hold_none().await;
    let flush = || request(Op::Flush, &(0..0));
    free.forward(TO, flush()).await.map_err(Failed::To)?;
    free.forward(FROM, flush()).await.map_err(Failed::From)?;
    Ok(())
}

impl Chunk<'_> {
    /// Moves a run of whole granules.
    async fn copy_run(&self, run: Range<u64>) -> Result<(), Failed> {
        let zeros = self.zeros(FROM, &run).await;
        for (part, zero) in split(self.place, &run, zeros) {
            if zero {
                self.put(part, None).await?;
                continue;
            }
            let data = self.read(&part).await.map_err(Failed::From)?;
            let step = self.place.map.granule().max(LOOK);
            let puts = pieces(&part, &data, step).into_iter().map(|(range, data)| self.put(range, data));
            let mut puts = stream::iter(puts).buffer_unordered(PARALLEL);
            let mut done = Ok(());
            while let Some(put) = puts.next().await {
                done = done.and(put);
            }
            done?;
        }
        Ok(())
    }

    /// What of a range is known to read as zeros on one side. What lies behind the end of the disk at `from` counts
    /// as zeros. Not to know is no error.
    pub(super) async fn zeros(&self, port: usize, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut zeros: Vec<Range<u64>> = Vec::new();
        let mut add = |zero: Range<u64>| match zeros.last_mut() {
            Some(last) if last.end == zero.start => last.end = zero.end,
            _ => zeros.push(zero),
        };
        let end = if port == FROM { range.end.min(self.place.from) } else { range.end };
        let knows = [self.place.from_extents && !self.dense, self.place.to_extents][port];
        let mut at = range.start;
        while at < end && knows {
            let known = self.ask(port, request(Op::Extents, &(at..end)), None).await;
            let known = known.ok().and_then(|known| known.into_extents().ok()).unwrap_or_default();
            if known.is_empty() {
                break;
            }
            for extent in known {
                let to = at.saturating_add(extent.len).min(end);
                if extent.state.zero && at < to {
                    add(at..to);
                }
                at = to;
            }
        }
        if end < range.end {
            add(end..range.end);
        }
        zeros
    }

    /// Reads a range of the disk at `from`, with zeros behind its end.
    async fn read(&self, range: &Range<u64>) -> Result<Data> {
        let end = range.end.min(self.place.from);
        let data = self.held.forward(FROM, request(Op::Read, &(range.start..end))).await?.into_data()?;
        if end == range.end {
            return Ok(data);
        }
        Ok(Data::concat([data, Data::zeros((range.end - end) as usize)]))
    }

    /// Writes whole granules: the data, or zeros.
    async fn put(&self, range: Range<u64>, data: Option<Data>) -> Result<(), Failed> {
        let Place { map, own, .. } = self.place;
        let there = data.is_none() && self.reads_as_zeros(&range).await;
        let mut intent = None;
        if *own || there {
            intent = Some(map.intend(range.clone()).await.map_err(Failed::To)?);
        }
        let count = if data.is_some() { &self.moved.copied } else { &self.moved.skipped };
        if !there {
            self.ask(TO, self.change(&range, data), intent).await?;
        } else if let Some(intent) = intent {
            intent.synced();
        }
        if map.is_dirty(range.clone()) {
            let message =
                "it was written and is still dirty: `only` must name the `log_dirty` on the way to `to`";
            return Err(Failed::To(Error::invalid(message).at("write", range.start)));
        }
        count.set(count.get() + range.end.min(self.place.from) - range.start);
        Ok(())
    }

    /// Sends a request to one side. Where guests wait for what is held, only as long as the disk at `to` answers.
    pub(super) async fn ask(
        &self,
        port: usize,
        req: Request,
        intent: Option<Intent>,
    ) -> Result<Answer, Failed> {
        if port == FROM {
            return self.held.forward(FROM, req).await.map_err(Failed::From);
        }
        if !self.place.frozen {
            return self.asked.ask(self.cx, &self.place.map, req, intent).await;
        }
        let answer = self.held.forward(TO, req).await.map_err(Failed::To)?;
        intent.iter().for_each(Intent::synced);
        Ok(answer)
    }

    /// True if the disk at `to` is known to be zero there, where to make it so again would take long.
    async fn reads_as_zeros(&self, range: &Range<u64>) -> bool {
        !self.place.to_fast && self.zeros(TO, range).await == [range.clone()]
    }

    /// Zeros are written where the disk cannot do better, in one request: what the framework would make of
    /// another one need not cover whole granules.
    fn change(&self, range: &Range<u64>, data: Option<Data>) -> Request {
        if data.is_none() && self.place.to_zeroes {
            return request(Op::WriteZeroes, range).with(Flags::MAY_UNMAP);
        }
        let mut write = request(Op::Write, range);
        write.data = data.unwrap_or_else(|| Data::zeros(write.len as usize));
        write
    }
}

/// A run in parts of whole granules: those that are known to be zero, and the others.
fn split(place: &Place, run: &Range<u64>, zeros: Vec<Range<u64>>) -> Vec<(Range<u64>, bool)> {
    let (mut parts, mut at) = (Vec::new(), run.start);
    for zero in zeros {
        let start = zero.start.next_multiple_of(place.map.granule());
        let end = place.down(zero.end).min(run.end);
        if start >= end {
            continue;
        }
        if at < start {
            parts.push((at..start, false));
        }
        parts.push((start..end, true));
        at = end;
    }
    if at < run.end {
        parts.push((at..run.end, false));
    }
    parts
}

/// Data in pieces of whole steps, none for those that are all zero.
fn pieces(range: &Range<u64>, data: &Data, step: u64) -> Vec<(Range<u64>, Option<Data>)> {
    let slice = |part: &Range<u64>| {
        data.slice((part.start - range.start) as usize..(part.end - range.start) as usize)
    };
    let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let part = at..(at + step).min(range.end);
        at = part.end;
        let zero = slice(&part).is_zero();
        match runs.last_mut() {
            Some((run, kind)) if *kind == zero => run.end = part.end,
            _ => runs.push((part, zero)),
        }
    }
    runs.into_iter().map(|(run, zero)| (run.clone(), (!zero).then(|| slice(&run)))).collect()
}
