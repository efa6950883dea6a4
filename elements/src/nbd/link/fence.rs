//! The order of changes that are replayed after a connection has broken.
//!
//! The server may or may not have done a change whose reply was lost. It is sent again, and between the
//! two times a later change of the same bytes could be done, and be overwritten by the second. So a
//! replayed change stands in the fence until it is answered, and **no change is sent while an
//! overlapping one stands in the fence before it**: a new change waits for every one, a replayed one for
//! those that broke before. Reads and flushes do not wait: a read of bytes whose change is unanswered
//! may see either state, and a flush covers only what was answered before it.
//!
//! Ids grow, and nothing waits for a larger one, so nothing waits in a circle.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::Waker;

/// The replayed changes of all connections of one client.
#[derive(Default)]
pub(super) struct Fence {
    /// How many entries there are: what a request pays for when nothing is replayed.
    count: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    entries: Vec<Entry>,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    waiting: Vec<Waker>,
}

impl Fence {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if anything is replayed.
    pub(super) fn is_up(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// A change of `range` is going to be replayed.
    pub(super) fn enter(&self, range: Range<u64>) -> u64 {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.entries.push(Entry { id, range, waiting: Vec::new() });
        self.count.store(state.entries.len(), Ordering::Release);
        id
    }

    /// It was answered, or will not be replayed after all.
    pub(super) fn leave(&self, id: u64) {
        let mut state = self.state();
        let Some(place) = state.entries.iter().position(|entry| entry.id == id) else { return };
        let gone = state.entries.remove(place);
        self.count.store(state.entries.len(), Ordering::Release);
        drop(state);
        gone.waiting.into_iter().for_each(Waker::wake);
    }

    /// True if a change of `range` must wait; `waker` is then woken when it should ask again. `own` is
    /// the change's own id, if it is itself replayed.
    pub(super) fn blocks(&self, range: &Range<u64>, own: Option<u64>, waker: &Waker) -> bool {
        let mut state = self.state();
        let before = own.unwrap_or(u64::MAX);
        let overlaps = |entry: &&mut Entry| entry.range.start < range.end && range.start < entry.range.end;
        let blocking = state.entries.iter_mut().filter(|entry| entry.id < before).find(overlaps);
        let Some(entry) = blocking else { return false };
        if !entry.waiting.iter().any(|other| other.will_wake(waker)) {
            entry.waiting.push(waker.clone());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::task::Wake;

    struct Woken(AtomicUsize);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn later_overlapping_changes_wait() {
        let fence = Fence::default();
        let woken = Arc::new(Woken(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        assert!(!fence.is_up() && !fence.blocks(&(0..10), None, &waker));
        let first = fence.enter(0..10);
        let second = fence.enter(5..20);
        assert!(!fence.blocks(&(0..10), Some(first), &waker), "the first waits for nobody");
        assert!(fence.blocks(&(5..20), Some(second), &waker));
        assert!(fence.blocks(&(19..30), None, &waker) && !fence.blocks(&(20..30), None, &waker));
        fence.leave(first);
        assert_eq!(woken.0.load(Ordering::SeqCst), 1);
        assert!(!fence.blocks(&(5..20), Some(second), &waker));
        fence.leave(second);
        assert_eq!(woken.0.load(Ordering::SeqCst), 2);
        assert!(!fence.is_up() && !fence.blocks(&(19..30), None, &waker));
        fence.leave(second);
    }
}
