//! Room that requests are promised before they take any.

use super::below::Below;
use super::format::SLOTS;
use super::pool::Fresh;
use super::volume::Volume;
use blockmason::Result;
use std::ops::Range;

/// Room that has been promised to a request, until what it writes is in memory, or it has ended otherwise.
pub(super) struct Promise<'a> {
    volume: &'a Volume,
    leaves: Range<u64>,
    /// Of what is punched, all leaves but the first and the last are dropped, not written.
    ends: bool,
    /// Blocks for nodes, of each leaf as many.
    nodes: u64,
    /// Blocks that have not been taken yet.
    unplaced: u64,
    fresh: Fresh,
}

impl Promise<'_> {
    fn leaves(&self) -> impl Iterator<Item = u64> + Clone + use<> {
        let last = self.leaves.end - 1;
        let step = if self.ends { (last - self.leaves.start).max(1) } else { 1 };
        self.leaves.clone().step_by(step as usize)
    }

    /// So many blocks have been taken.
    pub(super) fn placed(&mut self, blocks: u64) {
        self.unplaced -= blocks;
        self.volume.pool.space.release(blocks);
    }

    /// What has been promised for is in memory: room for its nodes is needed until a checkpoint has written them.
    pub(super) fn keep(mut self) {
        if self.nodes > 0 {
            let kept =
                self.volume.pool.core().keep(self.volume.number(), self.leaves(), self.nodes, self.fresh);
            self.nodes -= kept;
        }
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        let pool = &self.volume.pool;
        if self.fresh.placed > 0
            && let Some(line) = pool.core().lines.get_mut(&self.volume.number())
        {
            line.pending -= self.fresh;
        }
        pool.space.release(self.nodes + self.unplaced);
    }
}

impl Volume {
    /// Promises room for blocks and for the nodes that lead to them. What makes room may use what is kept for that.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn promise(
        &self,
        fresh: Fresh,
        row: &Range<u64>,
        makes_room: bool,
        below: Below<'_>,
    ) -> Result<Promise<'_>> {
        self.promise_blocks(fresh.placed, fresh, row, makes_room, below).await
    }

    /// The same for holes, which make room.
    pub(super) async fn promise_to_punch(&self, row: &Range<u64>, below: Below<'_>) -> Result<Promise<'_>> {
        let none = Fresh::default();
        match self.promise(none, row, true, below).await {
            Ok(promise) => Ok(promise),
            Err(_) => {
                // What is promised to writes is free again, or theirs.
                self.pool.checkpoint(below).await?;
                self.promise(none, row, true, below).await
            }
        }
    }

    /// The same of so many blocks, not all of which may be more than the volume has: others lie elsewhere now.
    pub(super) async fn promise_blocks(
        &self,
        blocks: u64,
        fresh: Fresh,
        row: &Range<u64>,
        makes_room: bool,
        below: Below<'_>,
    ) -> Result<Promise<'_>> {
        let leaves = row.start / SLOTS as u64..row.end.div_ceil(SLOTS as u64);
        let none = Fresh::default();
        let mut promise =
            Promise { volume: self, leaves, ends: makes_room, nodes: 0, unplaced: 0, fresh: none };
        if blocks == 0 && !makes_room {
            return Ok(promise);
        }
        loop {
            let had = self.pool.space.backed();
            if self.promise_now(&mut promise, blocks, fresh)? {
                return Ok(promise);
            }
            Box::pin(self.pool.space.back(had, below))
                .await
                .inspect_err(|error| self.pool.fails_with(error))?;
        }
    }

    /// False if more room has to be set aside first.
    fn promise_now(&self, promise: &mut Promise<'_>, blocks: u64, fresh: Fresh) -> Result<bool> {
        let mut core = self.pool.core();
        core.check_quota(self.number(), fresh.filled)?;
        let nodes = core.nodes_for(self.number()) * promise.leaves().count() as u64;
        if !self.pool.space.reserve(blocks + nodes, core.kept_from(self.number()), promise.ends)? {
            return Ok(false);
        }
        (promise.nodes, promise.unplaced, promise.fresh) = (nodes, blocks, fresh);
        if let Some(line) = core.lines.get_mut(&self.number()) {
            line.pending += fresh;
        }
        Ok(true)
    }
}
