//! Blocks to slots and back, with the sessions that they have.

use super::cipher::{self, Session};
use super::volume::Volume;
use crate::transform::slots::{INLINE, Layout, Slotted, aside, damaged};
use blockmason::sched::RangeLock;
use blockmason::{Cx, Data, Error, Kind, Reply, Request, Result};
use std::sync::Arc;

/// What may have become of a block that does not open.
const HOW: &str = "damaged, or changed by somebody";

impl Slotted for Volume {
    fn layout(&self) -> Layout {
        self.layout
    }

    fn ranges(&self) -> &RangeLock {
        &self.ranges
    }

    fn check(&self) -> Result<()> {
        match self.state().header.erased {
            true => Err(Error::new(Kind::Denied, "the volume was erased")),
            false => Ok(()),
        }
    }

    async fn store(&self, mut req: Request, cx: Cx<'_>) -> Reply {
        let sealed = self.seal(req.offset / self.layout.block, std::mem::take(&mut req.data), cx).await?;
        self.layout.write(&req, sealed, cx).await
    }

    async fn open(&self, first: u64, slots: Data, cx: Cx<'_>) -> Result<Data> {
        self.check()?;
        let block = self.layout.block as usize;
        let sessions = self.sessions(first, &slots).map_err(|bad| damaged(bad, HOW, cx))?;
        let opened = match sessions.len() * block <= INLINE {
            true => cipher::open(&sessions, first, block, &slots),
            false => aside(move || cipher::open(&sessions, first, block, &slots)).await?,
        };
        opened.map_err(|bad| damaged(bad, HOW, cx))
    }
}

impl Volume {
    /// Blocks from the `first` on, encrypted. Their range is held.
    pub(super) async fn seal(&self, first: u64, plain: Data, cx: Cx<'_>) -> Result<Data> {
        let block = self.layout.block as usize;
        let (session, counter) = self.nonces(cx, (plain.len() / block) as u64).await?;
        if plain.len() <= INLINE {
            return cipher::seal(&session, first, counter, block, &plain);
        }
        aside(move || cipher::seal(&session, first, counter, block, &plain)).await?
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
