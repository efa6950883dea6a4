//! A bound on the bytes of requests in flight.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

/// Bytes that may be in flight together. One holder at a time may overdraw, so that payloads that
/// have arrived in part can always be completed and the memory they hold comes free.
pub struct Budget {
    limit: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    overdrawn: bool,
    next: u64,
    /// Whoever waits, in the order of arrival: what comes free is theirs before a newcomer's.
    waiters: VecDeque<(u64, Waker)>,
}

impl State {
    /// Takes a place in the queue, or keeps it.
    fn wait(&mut self, permit: &mut Permit, waker: &Waker) {
        let ticket = *permit.ticket.get_or_insert_with(|| {
            self.next += 1;
            self.next
        });
        match self.waiters.iter_mut().find(|(other, _)| *other == ticket) {
            Some((_, known)) => known.clone_from(waker),
            None => self.waiters.push_back((ticket, waker.clone())),
        }
    }

    /// Gives the place in the queue up; there may be room for the next one.
    fn leave(&mut self, permit: &mut Permit) {
        if let Some(ticket) = permit.ticket.take() {
            self.waiters.retain(|(other, _)| *other != ticket);
            self.wake_first();
        }
    }

    fn wake_first(&self) {
        if let Some((_, waker)) = self.waiters.front() {
            waker.wake_by_ref();
        }
    }
}

impl Budget {
    /// A budget of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Budget> {
        Arc::new(Budget { limit, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Sums are complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.state().used
    }

    /// True if somebody waits.
    pub fn is_contended(&self) -> bool {
        !self.state().waiters.is_empty()
    }

    /// Takes `bytes` once they are free, or at once if nobody else overdraws and `permit`, which
    /// they are added to, already holds some.
    pub fn poll_grow(self: &Arc<Self>, permit: &mut Permit, bytes: u64, task: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        let first = state.waiters.front().is_none_or(|(ticket, _)| Some(*ticket) == permit.ticket);
        let fits = first && (state.used + bytes <= self.limit || state.used == 0);
        if !fits && !permit.overdraws {
            if permit.bytes == 0 || state.overdrawn {
                state.wait(permit, task.waker());
                drop(state);
                permit.budget.get_or_insert_with(|| self.clone());
                return Poll::Pending;
            }
            state.overdrawn = true;
            permit.overdraws = true;
        }
        state.used += bytes;
        permit.bytes += bytes;
        state.leave(permit);
        drop(state);
        permit.budget.get_or_insert_with(|| self.clone());
        Poll::Ready(())
    }

    /// Waits for `bytes`.
    pub async fn take(self: &Arc<Self>, bytes: u64) -> Permit {
        let mut permit = Permit::default();
        poll_fn(|task| self.poll_grow(&mut permit, bytes, task)).await;
        permit
    }
}

/// Bytes taken from a budget, given back when it is dropped.
#[derive(Default)]
pub struct Permit {
    budget: Option<Arc<Budget>>,
    bytes: u64,
    overdraws: bool,
    /// The place in the queue, while it waits.
    ticket: Option<u64>,
}

impl Permit {
    /// How many.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(budget) = self.budget.take() else { return };
        let mut state = budget.state();
        state.used -= self.bytes;
        if self.overdraws {
            state.overdrawn = false;
        }
        state.leave(self);
        state.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn grow(budget: &Arc<Budget>, permit: &mut Permit, bytes: u64) -> bool {
        budget.poll_grow(permit, bytes, &mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn waits_for_what_is_given_back() {
        let budget = Budget::new(100);
        let first = budget.take(80).now_or_never().unwrap();
        let mut second = Box::pin(budget.take(30));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        let second = second.as_mut().now_or_never().unwrap();
        assert_eq!(budget.used(), 30);
        drop(second);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn one_holder_at_a_time_may_complete_beyond_the_limit() {
        let budget = Budget::new(100);
        let (mut a, mut b, mut c) = (Permit::default(), Permit::default(), Permit::default());
        assert!(grow(&budget, &mut a, 50) && grow(&budget, &mut b, 50));
        assert!(grow(&budget, &mut a, 50), "a holds a part and may go on");
        assert!(!grow(&budget, &mut b, 50), "but only one may");
        assert!(!grow(&budget, &mut c, 1), "and a newcomer never");
        drop(a);
        assert!(grow(&budget, &mut b, 50));
        assert!(!grow(&budget, &mut c, 1));
        drop(b);
        assert!(grow(&budget, &mut c, 1));
    }

    #[test]
    fn what_comes_free_goes_to_whoever_came_first() {
        let budget = Budget::new(100);
        let (mut a, mut b, mut c) = (Permit::default(), Permit::default(), Permit::default());
        assert!(grow(&budget, &mut a, 90));
        assert!(!grow(&budget, &mut b, 60));
        assert!(!grow(&budget, &mut c, 5), "there is room, but b came first");
        drop(a);
        assert!(!grow(&budget, &mut c, 5));
        assert!(grow(&budget, &mut b, 60));
        assert!(grow(&budget, &mut c, 5));
        let mut d = Permit::default();
        assert!(!grow(&budget, &mut d, 90));
        drop(d);
        assert!(!budget.is_contended(), "whoever gives up leaves the queue");
    }

    #[test]
    fn a_request_larger_than_the_limit_goes_alone() {
        let budget = Budget::new(10);
        let permit = budget.take(100).now_or_never().unwrap();
        assert!(budget.take(1).now_or_never().is_none());
        drop(permit);
        assert!(budget.take(1).now_or_never().is_some());
    }
}
