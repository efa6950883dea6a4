//! Moving the blocks of an overlay to its base while it is used.

use super::format::State;
use super::io::{BASE, Io, OVERLAY};
use super::overlay::Overlay;
use blockmason::sched::Mode;
use blockmason::{Flags, Result};
use futures::future::join_all;
use std::ops::Range;

/// Bytes that are moved at once: writes to them wait meanwhile.
pub(super) const BATCH: u64 = 4 << 20;

/// Runs of blocks that are moved at once.
const RUNS: usize = 64;

impl Overlay {
    /// Moves some blocks to the base, at most `bytes` or one block. Returns how many bytes; 0 if none is
    /// left, and then the commit has ended. Runs to its end once begun: a write to the base that is
    /// given up could overtake a later one.
    pub(super) async fn merge_some(&self, io: &Io<'_>, bytes: u64) -> Result<u64> {
        self.check()?;
        let runs = self.next_runs((bytes / self.layout.block).max(1));
        if runs.is_empty() {
            self.end_commit(io).await?;
            return Ok(0);
        }
        let ranges: Vec<_> = runs.iter().map(|run| self.layout.bytes(run.clone())).collect();
        let _held = self.ranges.claim(io.holder("merge"), Mode::Exclusive, &ranges).await;
        let copied = join_all(runs.iter().map(|run| self.copy_down(io, run))).await;
        let copied = copied.into_iter().sum::<Result<u64>>()?;
        io.flush(BASE).await?;
        self.release(io, &runs).await?;
        Ok(copied)
    }

    /// The first runs of blocks that are in the overlay. While a commit goes on none is added.
    fn next_runs(&self, mut blocks: u64) -> Vec<Range<u64>> {
        debug_assert_eq!(self.state(), State::Committing);
        let (mut runs, mut at, end) = (Vec::new(), 0, self.layout.blocks());
        while runs.len() < RUNS && blocks > 0 {
            let start = self.claimed.find(true, at..end);
            let run = start..self.claimed.find(false, start..end.min(start + blocks));
            if run.is_empty() {
                break;
            }
            (at, blocks) = (run.end, blocks - (run.end - run.start));
            runs.push(run);
        }
        runs
    }

    async fn copy_down(&self, io: &Io<'_>, run: &Range<u64>) -> Result<u64> {
        let bytes = self.layout.bytes(run.clone());
        let len = bytes.end - bytes.start;
        let data = io.read(OVERLAY, self.layout.data() + bytes.start, len).await?;
        if data.is_zero() {
            io.zero(BASE, bytes.start, len).await?;
        } else {
            io.write(BASE, bytes.start, data, Flags::NONE).await?;
        }
        Ok(len)
    }
}
