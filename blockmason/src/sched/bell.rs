//! Tells a task on another thread that there is something for it, once a turn.

use super::sync::{AtomicBool, AtomicWaker};
use std::sync::atomic::Ordering;
use std::task::Waker;

/// Whoever rings puts down first what it rings for.
#[derive(Default)]
pub(super) struct Bell {
    rung: AtomicBool,
    waker: AtomicWaker,
}

impl Bell {
    /// Wakes the task, unless somebody has since its last [`answer`](Self::answer).
    pub(super) fn ring(&self) {
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// The task is about to look. A ring from now on wakes it again: the waker is there before the bell is
    /// silent. What an earlier ring was for is found: the swap has seen that ring.
    pub(super) fn answer(&self, waker: &Waker) {
        self.waker.register(waker);
        self.rung.swap(false, Ordering::AcqRel);
    }
}
