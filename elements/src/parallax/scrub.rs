//! Scrubs: everything that can be read is read, and mended where one copy of two is damaged, a piece at a time, while guests go on.
//! Nothing is remembered between two pieces but where the next one begins, whatever the size of the pool.

use super::below::Below;
use super::copies::examine_heads;
use super::examine::{Examiner, Said, Subject};
use super::format::{Entry, EntryKind};
use super::pool::{Core, Pool};
use crate::calendar::seconds;
use blockmason::{Cx, Error, Result};
use futures::future::{Either, select};
use serde::{Deserialize, Serialize};
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Bytes that are read in one piece, about.
const PIECE: u64 = if cfg!(test) { 64 << 10 } else { 4 << 20 };

/// The time of day is looked at again after so long: it may jump.
const LOOK: Duration = Duration::from_secs(60);

/// What is told of one scrub of a schedule, at most; the rest is counted.
const TOLD: usize = 20;

/// Where the next piece begins. First comes what leads to everything; then all snapshots, the oldest first, then volumes, of each
/// what no older one has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// What else is kept twice: the label, owners, the root, the space journal.
    Heads,
    /// From this byte of the table of extents on.
    Table(u64),
    Catalog,
    /// From this block on of the oldest snapshot that has this birth or a later one.
    Snapshots(u64, u64),
    /// From this block on of the first volume that has this number or a higher one. Snapshots up to this birth have been looked at.
    Volumes(u32, u64, u64),
}

impl Stage {
    pub(super) const FIRST: Stage = Stage::Table(0);
}

/// What one piece has brought.
#[derive(Default)]
pub(super) struct Piece {
    pub(super) said: Said,
    /// Bytes that were read.
    pub(super) bytes: u64,
    /// What was looked at.
    pub(super) what: String,
    /// Where it goes on; none: that was all.
    pub(super) next: Option<Stage>,
}

impl Core {
    /// The oldest snapshot with at least that birth, and its birth.
    fn snapshot_from(&self, from: u64) -> Option<(u64, u32)> {
        let birth = |(number, entry): (&u32, &Entry)| match entry.kind {
            EntryKind::Snapshot { birth, .. } if birth >= from => Some((birth, *number)),
            _ => None,
        };
        self.catalog.iter().filter_map(birth).min()
    }

    /// The birth of the youngest snapshot that has all of something that is not younger: it is not being deleted, as its tree may not be
    /// whole then, nor is it younger than `most`. None: 0.
    pub(super) fn older(&self, entry: &Entry, most: u64) -> u64 {
        let mut entry = entry;
        // As many as there are, however they are chained.
        for _ in 0..=self.catalog.len() {
            let before = match entry.kind {
                EntryKind::Volume { newest, origin, .. } => {
                    if newest == 0 {
                        origin.0
                    } else {
                        newest
                    }
                }
                EntryKind::Snapshot { before: 0, volume, .. } => self.origin(volume),
                EntryKind::Snapshot { before, .. } => before,
            };
            let Some(found) = self.catalog.get(&before) else { return 0 };
            match found.kind {
                EntryKind::Snapshot { birth, .. } if birth <= most && !found.deleting => return birth,
                _ => entry = found,
            }
        }
        0
    }

    fn origin(&self, volume: u32) -> u32 {
        match self.catalog.get(&volume).map(|entry| &entry.kind) {
            Some(EntryKind::Volume { origin, .. }) => origin.0,
            _ => 0,
        }
    }
}

impl Pool {
    /// Looks at one piece.
    ///
    /// # Errors
    /// Neither copy of something can be read without which there is no pool.
    pub(super) async fn scrub(&self, stage: Stage, below: Below<'_>) -> Result<Piece> {
        match stage {
            Stage::Table(at) => {
                let (found, next) = self.space.blocks.examine(at, below).await?;
                let mut piece = Piece { what: "the table of extents".to_owned(), ..Piece::default() };
                found.into_iter().for_each(|what| piece.said.say(what));
                piece.bytes = 2 * next.map_or(0, |next| next - at);
                piece.next = Some(next.map_or(Stage::Heads, Stage::Table));
                Ok(piece)
            }
            Stage::Heads => {
                // What was written before is in the trees.
                if self.check().is_ok() {
                    self.checkpoint(below).await?;
                }
                let _as_it_is = self.checkpointing.lock().await;
                let said = examine_heads(self, below).await?;
                let what = "what leads to everything".to_owned();
                Ok(Piece { said, what, next: Some(Stage::Catalog), ..Piece::default() })
            }
            Stage::Catalog => {
                // As long as the era lasts, nothing that is led to now is used for anything else.
                let (catalog, height, _era) = {
                    let core = self.core();
                    (core.root.catalog, core.root.height, core.era.clone())
                };
                let mut examiner = Examiner::new(self, below);
                examiner.pages(catalog, height, 0).await;
                let what = "the catalog".to_owned();
                Ok(Piece {
                    said: examiner.said,
                    bytes: examiner.bytes,
                    what,
                    next: Some(Stage::Snapshots(0, 0)),
                })
            }
            Stage::Snapshots(from, block) => Ok(self.scrub_snapshot(from, block, below).await),
            Stage::Volumes(number, block, birth) => Ok(self.scrub_volume(number, block, birth, below).await),
        }
    }

    async fn scrub_snapshot(&self, from: u64, block: u64, below: Below<'_>) -> Piece {
        let (birth, number, entry, name, newer, _era) = {
            let core = self.core();
            let found = core.snapshot_from(from);
            let found = found.and_then(|(birth, number)| Some((birth, number, core.catalog.get(&number)?)));
            let Some((birth, number, entry)) = found else {
                let next = Some(Stage::Volumes(0, 0, from));
                return Piece { next, ..Piece::default() };
            };
            let newer = core.older(entry, birth);
            (birth, number, entry.clone(), core.title(entry), newer, core.era.clone())
        };
        // One that was to be gone on with may be gone.
        let block = if birth == from { block } else { 0 };
        let mut examiner = Examiner::of(self, (block, newer, PIECE), below);
        let subject = Subject { name, entry: &entry };
        if let (0, EntryKind::Snapshot { dead, .. }) = (block, &entry.kind) {
            examiner.dead_list(*dead, (number, birth), &subject.name).await;
        }
        // Of one that is being deleted some nodes may be gone.
        let left = if entry.deleting { None } else { examiner.tree(&subject).await };
        let next = match left {
            Some(block) => Stage::Snapshots(birth, block),
            None => Stage::Snapshots(birth + 1, 0),
        };
        Piece { said: examiner.said, bytes: examiner.bytes, what: subject.name, next: Some(next) }
    }

    async fn scrub_volume(&self, from: u32, block: u64, birth: u64, below: Below<'_>) -> Piece {
        let (number, entry, name, newer, _era) = {
            let core = self.core();
            let is = |(_, entry): &(&u32, &Entry)| matches!(entry.kind, EntryKind::Volume { .. });
            let Some((number, entry)) = core.catalog.range(from..).find(is) else { return Piece::default() };
            let newer = core.older(entry, birth.saturating_sub(1));
            (*number, entry.clone(), core.title(entry), newer, core.era.clone())
        };
        let block = if number == from { block } else { 0 };
        let mut examiner = Examiner::of(self, (block, newer, PIECE), below);
        let subject = Subject { name, entry: &entry };
        let next = match examiner.tree(&subject).await {
            Some(block) => Stage::Volumes(number, block, birth),
            None => Stage::Volumes(number + 1, 0, birth),
        };
        Piece { said: examiner.said, bytes: examiner.bytes, what: subject.name, next: Some(next) }
    }
}

/// When a graph scrubs its pool by itself.
#[derive(Clone, Copy)]
pub(super) struct Scrubbing {
    /// Seconds between two of them, which begin at multiples of that since 1970.
    every: u64,
}

impl Scrubbing {
    /// What the parameter `scrub_every` says.
    pub(super) fn new(every: Option<Duration>) -> Result<Option<Scrubbing>> {
        match every.map(|every| every.as_secs()) {
            None => Ok(None),
            Some(every) if every < 60 => Err(Error::invalid("scrubs begin a minute apart at least")),
            Some(every) => Ok(Some(Scrubbing { every })),
        }
    }

    /// Scrubs when it is time, until the graph closes. A scrub that this ends is begun anew at the next time.
    pub(super) async fn run(self, pool: &Pool, below: Below<'_>, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut last = seconds();
        loop {
            let now = seconds();
            // A clock that was set back begins a new count.
            last = last.min(now);
            let due = (last / self.every + 1) * self.every;
            if due > now {
                let wait = Duration::from_secs(due - now).clamp(Duration::from_secs(1), LOOK);
                if let Either::Left(_) = select(closing.as_mut(), pin!(cx.sleep(wait))).await {
                    return;
                }
                continue;
            }
            last = now;
            // One of all that serve volumes of a pool.
            if pool.scrubbed.fetch_max(due, Ordering::Relaxed) >= due {
                continue;
            }
            let done = pin!(scrub(pool, below, cx));
            match select(closing.as_mut(), done).await {
                Either::Left(_) => return,
                Either::Right((Ok(said), _)) => cx.notice(said),
                Either::Right((Err(error), _)) => cx.notice(format!("the pool cannot be scrubbed: {error}")),
            }
        }
    }
}

/// Scrubs a whole pool. What is said in the end.
async fn scrub(pool: &Pool, below: Below<'_>, cx: Cx<'_>) -> Result<String> {
    let (mut stage, mut bytes, mut found) = (Stage::FIRST, 0, 0);
    loop {
        let begun = blockmason::rt::now();
        let piece = pool.scrub(stage, below).await?;
        bytes += piece.bytes;
        for what in piece.said.all {
            found += 1;
            if found <= TOLD {
                cx.notice(format!("scrub: {what}"));
            }
        }
        found += piece.said.more as usize;
        let Some(next) = piece.next else { break };
        stage = next;
        // As long again is for others.
        cx.sleep(begun.elapsed()).await;
    }
    Ok(match found {
        0 => format!("the pool has been scrubbed: {bytes} bytes were read, and all is well"),
        1 => "the pool has been scrubbed: one thing was not as it should be".to_owned(),
        found => format!("the pool has been scrubbed: {found} things were not as they should be"),
    })
}
