//! What the server may have forgotten: changes that it had answered and not flushed when a connection broke.
//!
//! Nobody can tell a server that was cut off from one that has died and come back. So whoever asks for
//! durability after that is told once: each flush that had begun before somebody was told fails.

use super::CommandFlags;
use super::calls::Wanted;
use blockmason::{Error, Kind, Result};
use std::sync::atomic::{AtomicU64, Ordering};

/// Of one client, all links together: a flush on one of them covers what was answered on each.
pub(super) struct Losses {
    /// Changes that were answered, and how many of them are durable.
    changes: AtomicU64,
    flushed: AtomicU64,
    /// How often some that were not may have been lost, and how much of that has been told.
    count: AtomicU64,
    told: AtomicU64,
}

/// A flush on its way.
#[derive(Clone, Copy)]
pub(super) struct Flush {
    changes: u64,
    told: u64,
}

impl Losses {
    /// Whoever had the disk before may have left something that is not flushed: a predecessor, for one.
    pub(super) fn new() -> Losses {
        let [flushed, count, told] = Default::default();
        Losses { changes: AtomicU64::new(1), flushed, count, told }
    }

    /// True if this is only durable with a flush.
    pub(super) fn needs_flush(wanted: &Wanted) -> bool {
        wanted.is_change() && !wanted.flags.contains(CommandFlags::FUA)
    }

    /// So many changes were answered that need one. Noted before anybody learns of the answers.
    pub(super) fn answered(&self, changes: u64) {
        if changes > 0 {
            self.changes.fetch_add(changes, Ordering::AcqRel);
        }
    }

    /// A connection is gone.
    pub(super) fn interrupted(&self) {
        if self.changes.load(Ordering::Acquire) > self.flushed.load(Ordering::Acquire) {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// A flush is about to be sent.
    pub(super) fn begin(&self) -> Flush {
        Flush { changes: self.changes.load(Ordering::Acquire), told: self.told.load(Ordering::Acquire) }
    }

    /// The server has answered it well. If `tell`, its end says whether something was lost.
    pub(super) fn end(&self, flush: Flush, tell: bool, uri: impl std::fmt::Display) -> Result<()> {
        self.flushed.fetch_max(flush.changes, Ordering::AcqRel);
        let count = self.count.load(Ordering::Acquire);
        if !tell || count <= flush.told {
            return Ok(());
        }
        self.told.fetch_max(count, Ordering::AcqRel);
        let message = format!(
            "{uri} was lost, and may have forgotten what it had answered and not flushed: that has to be written again"
        );
        Err(Error::new(Kind::Io, message))
    }
}
