//! Byte ranges that requests hold while they work on them: first come, first served.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Orders holders of overlapping ranges by arrival. A waiting range blocks later overlapping ones, so
/// nobody starves. Shared by all shards.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// In the order of arrival. In flight are tens, rarely hundreds: a scan beats a tree.
    entries: Vec<Entry>,
}

struct Entry {
    id: u64,
    range: Range<u64>,
    granted: bool,
    waker: Option<Waker>,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    /// True if no earlier entry overlaps the one at `ix`.
    fn is_free(&self, ix: usize) -> bool {
        let range = &self.entries[ix].range;
        self.entries[..ix].iter().all(|earlier| !overlap(&earlier.range, range))
    }
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place in the order now; the guard comes when every earlier overlapping range is free.
    /// Dropping what this returns, at any time, gives the place up.
    pub fn lock(&self, range: Range<u64>) -> Waiting<'_> {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.entries.push(Entry { id, range, granted: false, waker: None });
        let last = state.entries.len() - 1;
        state.entries[last].granted = state.is_free(last);
        Waiting { guard: Some(RangeGuard { lock: self, id }) }
    }

    fn release(&self, id: u64) {
        let mut wakers = Vec::new();
        let mut state = self.state();
        let Some(gone) = state.entries.iter().position(|entry| entry.id == id) else { return };
        let freed = state.entries.remove(gone).range;
        for ix in gone..state.entries.len() {
            let entry = &state.entries[ix];
            if !entry.granted && overlap(&entry.range, &freed) && state.is_free(ix) {
                state.entries[ix].granted = true;
                wakers.extend(state.entries[ix].waker.take());
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// A place in the order.
pub struct Waiting<'a> {
    guard: Option<RangeGuard<'a>>,
}

impl<'a> Future for Waiting<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let guard = self.guard.take().expect("a future is not polled after its end");
        let mut state = guard.lock.state();
        let entry = state.entries.iter_mut().find(|entry| entry.id == guard.id);
        let granted = entry.is_none_or(|entry| {
            entry.waker = (!entry.granted).then(|| task.waker().clone());
            entry.granted
        });
        drop(state);
        if granted {
            return Poll::Ready(guard);
        }
        self.guard = Some(guard);
        Poll::Pending
    }
}

/// Holds a range until it is dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    fn poll<'a>(waiting: &mut Waiting<'a>) -> Option<RangeGuard<'a>> {
        waiting.now_or_never()
    }

    #[test]
    fn a_waiting_range_blocks_later_ones() {
        let lock = RangeLock::default();
        let first = poll(&mut lock.lock(0..10)).unwrap();
        let mut second = lock.lock(5..20);
        let mut third = lock.lock(15..30);
        assert!(poll(&mut second).is_none());
        assert!(poll(&mut third).is_none(), "free, but it came after one that waits");
        assert!(poll(&mut lock.lock(30..40)).is_some());
        drop(first);
        let second = poll(&mut second).unwrap();
        assert!(poll(&mut third).is_none());
        drop(second);
        assert!(poll(&mut third).is_some());
    }

    #[test]
    fn giving_up_waiting_lets_others_on() {
        let lock = RangeLock::default();
        let first = poll(&mut lock.lock(0..10)).unwrap();
        let waiting = lock.lock(0..20);
        let mut third = lock.lock(15..30);
        assert!(poll(&mut third).is_none());
        drop(waiting);
        assert!(poll(&mut third).is_some());
        drop(first);
        assert!(lock.state().entries.is_empty());
    }

    type Waiters<'a> = Vec<(usize, Range<u64>, Waiting<'a>)>;
    type Holders<'a> = Vec<(usize, Range<u64>, RangeGuard<'a>)>;

    /// Moves whoever is granted now to the holders, and checks that exactly those are who should be.
    fn settle<'a>(waiting: &mut Waiters<'a>, held: &mut Holders<'a>) -> usize {
        let (mut ix, mut served) = (0, 0);
        while ix < waiting.len() {
            let range = waiting[ix].1.clone();
            let expected = waiting[..ix].iter().all(|other| !overlap(&other.1, &range))
                && held.iter().all(|other| !overlap(&other.1, &range));
            let granted = poll(&mut waiting[ix].2);
            assert_eq!(granted.is_some(), expected);
            match granted {
                Some(guard) => {
                    let (id, range, _) = waiting.remove(ix);
                    held.push((id, range, guard));
                    served += 1;
                }
                None => ix += 1,
            }
        }
        served
    }

    proptest! {
        /// Holders never overlap, grants keep the order of arrival, and everybody is served.
        #[test]
        fn against_a_model(steps in proptest::collection::vec((0u64..40, 1u64..20, any::<prop::sample::Index>()), 1..60)) {
            let lock = RangeLock::default();
            let mut waiting = Waiters::new();
            let mut held = Holders::new();
            let mut served = 0;
            for (id, (start, len, release)) in steps.iter().enumerate() {
                waiting.push((id, *start..start + len, lock.lock(*start..start + len)));
                served += settle(&mut waiting, &mut held);
                if id % 2 == 1 && !held.is_empty() {
                    held.remove(release.index(held.len()));
                    served += settle(&mut waiting, &mut held);
                }
            }
            while !held.is_empty() {
                held.remove(0);
                served += settle(&mut waiting, &mut held);
            }
            prop_assert!(waiting.is_empty());
            prop_assert_eq!(served, steps.len());
        }
    }
}
