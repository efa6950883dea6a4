//! A new data key, and every block encrypted again with it while guests go on.

use super::cipher::Session;
use super::volume::Volume;
use crate::transform::own::Io;
use crate::transform::slots::Slotted;
use blockmason::sched::Mode;
use blockmason::{Error, Kind, Result};
use std::ops::Range;
use std::sync::Arc;

/// Bytes of blocks that are held at a time.
const STEP: u64 = 1 << 20;

/// Bytes after which the disk is told how far it is.
const MARK: u64 = 1 << 30;

/// A rotation that is under way.
#[derive(Debug, PartialEq)]
pub(super) struct Rotation {
    /// The next block to be looked at.
    next: u64,
    /// Blocks that cannot be read.
    bad: u64,
    /// The first of them.
    first_bad: Option<u64>,
    /// All blocks have been looked at, and some of them are bad.
    stuck: bool,
}

impl Volume {
    /// Begins a rotation, or once more one that has met blocks that cannot be read.
    pub(super) async fn begin_rotation(&self, io: &Io<'_>) -> Result<()> {
        let _alone = self.changing.lock().await;
        let (erased, keys) = {
            let state = self.state();
            (state.header.erased, state.header.keys.len())
        };
        match (erased, keys) {
            (true, _) => Err(Error::new(Kind::Denied, "the volume was erased")),
            (false, 1) => self.add_key(io).await,
            (false, _) => self.change(io, |header| header.rotated = 0).await,
        }
    }

    /// The rotation that the header speaks of.
    pub(super) fn rotation(&self) -> Option<Rotation> {
        let state = self.state();
        let begun = state.header.keys.len() > 1;
        begun.then_some(Rotation { next: state.header.rotated, bad: 0, first_bad: None, stuck: false })
    }

    /// Moves a rotation on. True if it has come to its end.
    ///
    /// # Errors
    /// The disk below has failed, and the same can be tried again; or at the end there are blocks that cannot be
    /// read, and the older key stays.
    pub(super) async fn rotate_some(&self, io: &Io<'_>, rotation: &mut Rotation, most: u64) -> Result<bool> {
        let layout = self.layout;
        let at = rotation.next * layout.block;
        if at >= layout.size {
            return self.end_rotation(io, rotation).await.map(|()| true);
        }
        let range = at..layout.size.min(at + STEP.min(most).max(layout.block));
        {
            let _held =
                self.ranges.claim(io.holder("rotate"), Mode::Exclusive, std::slice::from_ref(&range)).await;
            self.renew(io, range.clone(), rotation).await?;
        }
        rotation.next = range.end / layout.block;
        if at / MARK != range.end / MARK && rotation.bad == 0 {
            io.flush().await?;
            let _alone = self.changing.lock().await;
            let next = rotation.next;
            if self.rotation().is_some() {
                self.change(io, |header| header.rotated = next).await?;
            }
        }
        Ok(false)
    }

    async fn end_rotation(&self, io: &Io<'_>, rotation: &mut Rotation) -> Result<()> {
        if let Some(first) = rotation.first_bad {
            let bad = rotation.bad;
            rotation.stuck = true;
            let message = format!(
                "{bad} blocks cannot be read, the first is block {first}: the older key is kept; write or discard \
                 them, then call `rotate` again"
            );
            return Err(Error::new(Kind::Io, message));
        }
        io.flush().await?;
        let _alone = self.changing.lock().await;
        if self.rotation().is_some() {
            self.drop_key(io).await?;
            io.cx.notice("every block has the new data key; the older one is forgotten");
        }
        Ok(())
    }

    /// Encrypts blocks again whose key is not the newest. Their range is held.
    async fn renew(&self, io: &Io<'_>, range: Range<u64>, rotation: &mut Rotation) -> Result<()> {
        let (layout, first) = (self.layout, range.start / self.layout.block);
        let places = layout.places(&range);
        let slots = io.read(places.start, places.end - places.start).await?;
        if slots.is_known_zero() {
            return Ok(());
        }
        let newest = self.state().header.newest();
        let slot = layout.slot as usize;
        let is_old = |session: &Option<Arc<Session>>| session.as_ref().is_some_and(|it| it.key != newest);
        // The most common case at once: everything can be read.
        let old: Vec<bool> = match self.sessions(first, &slots) {
            Ok(sessions) => sessions.iter().map(is_old).collect(),
            // One at a time then; what has no session that is known is looked at, and fails.
            Err(_) => (0..slots.len() / slot)
                .map(|ix| {
                    let one = self.sessions(first, &slots.slice(ix * slot..(ix + 1) * slot));
                    one.map_or(true, |sessions| sessions.iter().any(is_old))
                })
                .collect(),
        };
        for run in runs(&old) {
            let part = slots.slice(run.start * slot..run.end * slot);
            match self.open(first + run.start as u64, part, io.cx).await {
                Ok(plain) => self.rewrite(io, first + run.start as u64, plain).await?,
                Err(_) => self.rewrite_each(io, first, run, &slots, rotation).await?,
            }
        }
        Ok(())
    }

    async fn rewrite(&self, io: &Io<'_>, first: u64, plain: blockmason::Data) -> Result<()> {
        let range = first * self.layout.block..first * self.layout.block + plain.len() as u64;
        let sealed = self.seal(first, plain, io.cx).await?;
        io.write(self.layout.places(&range).start, sealed).await
    }

    /// Of a run in which something cannot be read, what can be.
    async fn rewrite_each(
        &self,
        io: &Io<'_>,
        first: u64,
        run: Range<usize>,
        slots: &blockmason::Data,
        rotation: &mut Rotation,
    ) -> Result<()> {
        let slot = self.layout.slot as usize;
        for ix in run {
            let number = first + ix as u64;
            match self.open(number, slots.slice(ix * slot..(ix + 1) * slot), io.cx).await {
                Ok(plain) => self.rewrite(io, number, plain).await?,
                Err(_) => {
                    rotation.bad += 1;
                    rotation.first_bad.get_or_insert(number);
                }
            }
        }
        Ok(())
    }

    /// How much of a rotation is done, as people read it.
    pub(super) fn rotated(&self, reached: Option<u64>) -> String {
        let blocks = self.layout.size / self.layout.block;
        match self.rotation() {
            None => "none".to_owned(),
            Some(stored) => format!("{}%", reached.unwrap_or(stored.next).min(blocks) * 100 / blocks),
        }
    }
}

impl Rotation {
    /// The next block.
    pub(super) fn reached(&self) -> u64 {
        self.next
    }

    /// True if it cannot come to its end as things are.
    pub(super) fn is_stuck(&self) -> bool {
        self.stuck
    }
}

/// The runs of what is true.
fn runs(which: &[bool]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for ix in (0..which.len()).filter(|ix| which[*ix]) {
        match runs.last_mut() {
            Some(run) if run.end == ix => run.end = ix + 1,
            _ => runs.push(ix..ix + 1),
        }
    }
    runs
}
