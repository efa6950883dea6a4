//! What comes from other pools: who a snapshot is everywhere, who receives a volume, and how far it has been filled.
//!
//! One receiver at a time: each has a number that nobody else had, which is in memory only. Whatever it does names that number
//! and happens while `administering` is held, so nothing of it comes after somebody else has begun, or has given the volume up.

use super::admin::{Plan, check_size};
use super::below::Below;
use super::format::{BLOCK, Entry, EntryKind, Features, Receiving, SnapshotId};
use super::open::need_feature;
use super::pool::{Core, Pool};
use blockmason::{Error, Kind, Result};

fn busy(message: impl Into<String>) -> Error {
    Error::new(Kind::Busy, message.into())
}

/// A change of what the catalog says of a volume that is being filled.
#[derive(Clone)]
pub(super) enum Step {
    /// Somebody begins to receive it, or goes on; it has that size.
    Begun { filled: Receiving, size: u64 },
    /// So far it is there, durably.
    Filled(Receiving),
    /// It is whole: that snapshot of it is the other pool's.
    Whole { snapshot: u32, id: SnapshotId, made: u64 },
}

impl Step {
    /// What a volume's or snapshot's entry is after it.
    pub(super) fn change(&self, entry: &mut Entry) {
        match (self, &mut entry.kind) {
            (Step::Filled(filled) | Step::Begun { filled, .. }, EntryKind::Volume { receiving, .. }) => {
                *receiving = Some(*filled);
            }
            (Step::Whole { .. }, EntryKind::Volume { receiving, .. }) => *receiving = None,
            (Step::Whole { id, made, .. }, EntryKind::Snapshot { id: known, .. }) => {
                (*known, entry.made) = (Some(*id), *made);
            }
            (Step::Filled(_) | Step::Begun { .. }, EntryKind::Snapshot { .. }) => {}
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
        let Some(entry) = self.catalog.get(&number).filter(|_| self.receiving(number).is_some()) else {
            return Ok(());
        };
        let name = self.called(&entry.name);
        Err(busy(format!(
            "{name} is being received: send the rest, or give it up with mason volume receive --abort"
        )))
    }

    /// What may be changed by whoever has that number, or by anybody where there is none.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is being received by somebody else.
    pub(super) fn need_receiver(&self, number: u32, receiver: Option<u64>) -> Result<()> {
        let Some(receiver) = receiver else { return self.need_whole(number) };
        match self.receivers.get(&number) {
            Some(now) if *now == receiver => Ok(()),
            Some(_) => Err(busy("another receiver has taken over")),
            None => Err(busy(
                "somebody else has received it or given it up, or the daemon has ended: mason volume stat says whether there is a rest to send",
            )),
        }
    }

    /// How far a volume has been filled.
    pub(super) fn receiving(&self, number: u32) -> Option<Receiving> {
        match self.catalog.get(&number)?.kind {
            EntryKind::Volume { receiving, .. } => receiving,
            EntryKind::Snapshot { .. } => None,
        }
    }

    /// The newest snapshot of a volume that is not being deleted.
    fn newest(&self, volume: u32) -> Option<u32> {
        let of = |entry: &Entry| {
            !entry.deleting && matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == volume)
        };
        self.catalog.iter().rfind(|(_, entry)| of(entry)).map(|(number, _)| *number)
    }

    /// What a volume that somebody begins to receive is being filled with. `same` says that it is what its newest snapshot is.
    fn begin(&self, number: u32, stream: &Stream<'_>, same: bool) -> Result<Receiving> {
        let name = stream.volume;
        if self.find(name, None)? != number {
            return Err(busy(format!("{name} is another volume by now: begin anew")));
        }
        self.need_free(number, name)?;
        if self.newest(number).and_then(|newest| self.identity(newest)) != stream.since {
            return Err(busy(format!("the newest snapshot of {name} is another one by now: begin anew")));
        }
        let begun = Receiving { id: prefix(&stream.id), blocks: 0 };
        match self.receiving(number) {
            Some(before) if before.id != begun.id => {
                Err(busy(format!("{name} is being filled with another snapshot")))
            }
            Some(Receiving { blocks: Receiving::SPOILT, .. }) => Err(spoilt(name)),
            Some(before) => Ok(before),
            None if same => Ok(begun),
            None => {
                let newest = self.newest(number).and_then(|newest| self.catalog.get(&newest));
                let since = newest.map_or(String::new(), |newest| format!(" since {name}@{}", newest.name));
                let what = "go back to that first, with mason volume rollback";
                Err(busy(format!("{name} has changed{since}: {what}")))
            }
        }
    }
}

/// What somebody wants to receive.
pub(super) struct Stream<'a> {
    /// What is to become of it.
    pub(super) volume: &'a str,
    pub(super) id: SnapshotId,
    /// The volume's newest snapshot, since which the stream has the changes.
    pub(super) since: Option<SnapshotId>,
    pub(super) size: u64,
}

fn spoilt(name: &str) -> Error {
    busy(format!(
        "what {name} has received is wrong: give it up with mason volume receive --abort, and have it sent anew"
    ))
}

/// What of an identity a volume remembers that is being filled.
fn prefix(id: &SnapshotId) -> [u8; 10] {
    std::array::from_fn(|ix| id[ix])
}

impl Pool {
    /// Somebody begins to receive a volume, or goes on with that, and whoever did so before does so no more. The receiver's
    /// number, and what it comes before that is there.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is served, or being filled with something else, or has changed since its newest snapshot.
    pub(super) async fn receive(
        &self,
        number: u32,
        stream: &Stream<'_>,
        below: Below<'_>,
    ) -> Result<(u64, u64)> {
        check_size(stream.size)?;
        need_feature(self, Features::STREAMS, below).await?;
        self.checkpoint(below).await?;
        let look = |core: &Core| {
            let birth = core.newest(number).and_then(|newest| core.birth(newest)).unwrap_or(0);
            (birth, core.catalog.get(&number).map(|entry| entry.root))
        };
        let (birth, root) = look(&self.core());
        let same = self.changed_since(number, birth, below).await?.is_empty();
        let mut begun = (0, 0);
        let plan = |core: &mut Core| {
            // What has been written since then is in the tree, or in a line.
            let still = look(core) == (birth, root) && core.lines.get(&number).is_some_and(|l| !l.has_runs());
            let filled = core.begin(number, stream, same && still)?;
            let size = core.catalog.get(&number).map_or(0, |entry| entry.size).max(stream.size);
            begun = (fastrand::u64(1..), filled.blocks * BLOCK);
            core.receivers.insert(number, begun.0);
            Ok(Plan::Receive(number, Step::Begun { filled, size }))
        };
        self.administer(below, plan).await?;
        Ok(begun)
    }

    /// A volume that is being received has what comes before `offset`: durably, with everything that was written to it before.
    /// Without an offset, what it has is wrong.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is being received by somebody else.
    pub(super) async fn fill(
        &self,
        (name, receiver): (&str, u64),
        offset: Option<u64>,
        below: Below<'_>,
    ) -> Result<()> {
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_receiver(number, Some(receiver))?;
            let size = core.catalog.get(&number).map_or(0, |entry| entry.size);
            let Some(filled) = core.receiving(number) else { return Err(not_received(name)) };
            let blocks = match offset {
                None => Receiving::SPOILT,
                Some(offset) if offset.is_multiple_of(BLOCK) && offset <= size => offset / BLOCK,
                Some(offset) => return Err(Error::invalid(format!("{name} has no byte {offset}"))),
            };
            if offset.is_none() {
                core.receivers.remove(&number);
            }
            Ok(Plan::Receive(number, Step::Filled(Receiving { blocks, ..filled })))
        };
        self.administer(below, plan).await
    }

    /// A volume that is being received has all of it: what it is now is that snapshot. Done a second time after it was
    /// interrupted it is as done once.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is not being filled with that, or by somebody else, or has another snapshot of the name.
    pub(super) async fn filled(
        &self,
        (name, receiver): (&str, u64),
        (snapshot, id, made): (&str, &SnapshotId, u64),
        below: Below<'_>,
    ) -> Result<()> {
        super::admin::check_name(snapshot)?;
        // Nobody takes over, or gives it up, before the snapshot is taken.
        let together = self.administering.read().await;
        let (number, taken) = {
            let core = self.core();
            let number = core.find(name, None)?;
            core.need_receiver(number, Some(receiver))?;
            if core.receiving(number).is_none_or(|filled| filled.id != prefix(id)) {
                return Err(busy(format!("{name} is not being filled with that snapshot")));
            }
            (number, core.snapshot(number, snapshot))
        };
        let taken = match taken {
            // Taken, and then this was interrupted.
            Some(taken) if self.core().ancestors(number).0.0 == taken => taken,
            Some(_) => return Err(busy(format!("{name} has a snapshot {snapshot} of its own"))),
            None => self.take_snapshots(&[(number, snapshot.to_owned())], made, below).await?[0],
        };
        drop(together);
        let whole = Step::Whole { snapshot: taken, id: *id, made };
        let plan = |core: &mut Core| {
            core.need_receiver(number, Some(receiver))?;
            core.receivers.remove(&number);
            Ok(Plan::Receive(number, whole))
        };
        self.administer(below, plan).await
    }

    /// Gives up what a volume has received: it is what its newest snapshot is, or gone if it has none. Whether it is gone.
    ///
    /// # Errors
    /// [`Kind::Busy`] if it is not being received.
    pub(super) async fn give_up(&self, name: &str, below: Below<'_>) -> Result<bool> {
        let mut gone = false;
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_free(number, name)?;
            if core.receiving(number).is_none() {
                return Err(not_received(name));
            }
            core.receivers.remove(&number);
            let Some(snapshot) = core.newest(number) else {
                gone = true;
                return Ok(Plan::Delete(number));
            };
            let old = core.catalog.get(&number).map_or(String::new(), |entry| entry.name.clone());
            let old = (core.next_number(), old);
            Ok(Plan::Rollback { volume: number, snapshot, old, deleted: true })
        };
        self.administer(below, plan).await?;
        Ok(gone)
    }
}

fn not_received(name: &str) -> Error {
    busy(format!("{name} is not being received"))
}
