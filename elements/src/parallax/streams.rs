//! What comes from other pools: who a snapshot is everywhere, and how far a volume has been filled.

use super::admin::Plan;
use super::below::Below;
use super::format::{BLOCK, Entry, EntryKind, Features, Receiving, SnapshotId};
use super::open::need_feature;
use super::pool::{Core, Pool};
use blockmason::{Error, Kind, Result};

/// A change of what the catalog says of a volume that is being filled.
#[derive(Clone)]
pub(super) enum Step {
    /// So far it is there, durably.
    Filled(Receiving),
    /// It is whole: that snapshot of it is the other pool's.
    Whole { snapshot: u32, id: SnapshotId, made: u64 },
}

impl Step {
    /// What a volume's or snapshot's entry is after it.
    pub(super) fn change(&self, entry: &mut Entry) {
        match (self, &mut entry.kind) {
            (Step::Filled(filled), EntryKind::Volume { receiving, .. }) => *receiving = Some(*filled),
            (Step::Whole { .. }, EntryKind::Volume { receiving, .. }) => *receiving = None,
            (Step::Whole { id, made, .. }, EntryKind::Snapshot { id: known, .. }) => {
                (*known, entry.made) = (Some(*id), *made);
            }
            (Step::Filled(_), EntryKind::Snapshot { .. }) => {}
        }
    }
}

impl Core {
    /// Who a snapshot is: the same in every pool that has it. Copies of a pool's file have the same ones.
    pub(super) fn identity(&self, number: u32) -> Option<SnapshotId> {
        let entry = self.catalog.get(&number)?;
        let EntryKind::Snapshot { birth, id, .. } = entry.kind else { return None };
        let made = || {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&self.root.id);
            let words = [u64::from(self.root.owner), u64::from(number), birth, entry.made];
            for word in words {
                hasher.update(&word.to_le_bytes());
            }
            std::array::from_fn(|ix| hasher.finalize().as_bytes()[ix])
        };
        Some(id.unwrap_or_else(made))
    }

    /// # Errors
    /// [`Kind::Busy`] if a volume is being filled: it is no whole disk yet.
    pub(super) fn need_whole(&self, number: u32) -> Result<()> {
        match self.receiving(number) {
            Some(_) => Err(Error::new(
                Kind::Busy,
                "it is being received from another pool: finish that, or give it up with mason volume receive --abort",
            )),
            None => Ok(()),
        }
    }

    /// How far a volume has been filled.
    pub(super) fn receiving(&self, number: u32) -> Option<Receiving> {
        match self.catalog.get(&number)?.kind {
            EntryKind::Volume { receiving, .. } => receiving,
            EntryKind::Snapshot { .. } => None,
        }
    }
}

/// What of an identity a volume remembers that is being filled.
fn prefix(id: &SnapshotId) -> [u8; 10] {
    std::array::from_fn(|ix| id[ix])
}

impl Pool {
    /// A volume is being filled with the snapshot of that identity, and has what comes before `offset`: durably, with everything
    /// that was written to it before.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is served, or being filled with something else.
    pub(super) async fn fill(
        &self,
        name: &str,
        id: &SnapshotId,
        offset: u64,
        below: Below<'_>,
    ) -> Result<()> {
        need_feature(self, Features::STREAMS, below).await?;
        let filled = Receiving { id: prefix(id), blocks: offset / BLOCK };
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_free(number, name)?;
            if core.receiving(number).is_some_and(|before| before.id != filled.id) {
                return Err(Error::new(Kind::Busy, format!("{name} is being filled with another snapshot")));
            }
            let size = core.catalog.get(&number).map_or(0, |entry| entry.size);
            match offset.is_multiple_of(BLOCK) && offset <= size {
                true => Ok(Plan::Receive(number, Step::Filled(filled))),
                false => Err(Error::invalid(format!("{name} has no byte {offset}"))),
            }
        };
        self.administer(below, plan).await
    }

    /// A volume that is being filled has all of it: what it is now is that snapshot. Done a second time it is as done once.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is not being filled with that, or has another snapshot of the name.
    pub(super) async fn filled(
        &self,
        name: &str,
        (snapshot, id, made): (&str, &SnapshotId, u64),
        below: Below<'_>,
    ) -> Result<()> {
        super::admin::check_name(snapshot)?;
        let number = self.core().find(name, None)?;
        let taken = {
            let core = self.core();
            let filling = core.receiving(number).is_some_and(|filled| filled.id == prefix(id));
            if !filling {
                return Err(Error::new(Kind::Busy, format!("{name} is not being filled with that snapshot")));
            }
            core.snapshot(number, snapshot)
        };
        let taken = match taken {
            // Taken, and then this was interrupted.
            Some(taken) if self.core().ancestors(number).0.0 == taken => taken,
            Some(_) => {
                let message = format!("{name} has a snapshot {snapshot} of its own");
                return Err(Error::new(Kind::Busy, message));
            }
            None => self.snapshot(&[(number, snapshot.to_owned())], made, below).await?[0],
        };
        let whole = Step::Whole { snapshot: taken, id: *id, made };
        self.administer(below, |_| Ok(Plan::Receive(number, whole))).await
    }
}
