//! A change that has been announced to the log, until it has ended on every leg.

use crate::migrate::map::{DirtyMap, Intent};
use blockmason::Reply;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Shared by all legs that a change goes down; the announcement ends with the last of them.
pub(super) struct Announced {
    log: Arc<DirtyMap>,
    range: Range<u64>,
    /// Legs that have not ended. What is dropped before, nobody knows what became of it.
    left: AtomicUsize,
    /// The legs may differ there when all have ended.
    differs: AtomicBool,
    /// Ends after the log has been told.
    _intent: Intent,
}

impl Announced {
    /// For a change that goes down so many legs.
    pub(super) fn new(log: Arc<DirtyMap>, range: Range<u64>, intent: Intent, legs: usize) -> Arc<Announced> {
        let (left, differs) = (AtomicUsize::new(legs), AtomicBool::new(false));
        Arc::new(Announced { log, range, left, differs, _intent: intent })
    }

    pub(super) fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// A leg has ended whose failure is its own business.
    pub(super) fn landed(&self) {
        self.left.fetch_sub(1, Ordering::AcqRel);
    }

    /// A leg has ended on which the guest's answer depends: where that fails, another may have taken it.
    pub(super) fn answered(&self, reply: &Reply) {
        if reply.is_err() {
            self.differ();
        }
        self.landed();
    }

    /// A leg has it and does not answer. What comes of it later says nothing.
    pub(super) fn let_go(&self) {
        self.differ();
        self.log.let_go(&self.range);
        self.log.set(self.range.clone());
    }

    /// A leg does not have it, or may have something older.
    pub(super) fn differ(&self) {
        self.differs.store(true, Ordering::Release);
    }
}

impl Drop for Announced {
    fn drop(&mut self) {
        if *self.left.get_mut() > 0 || *self.differs.get_mut() {
            self.log.set(self.range.clone());
        }
    }
}
