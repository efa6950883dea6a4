//! A bound on the bytes of requests in flight.

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
    waiters: Vec<Waker>,
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
        let fits = state.used + bytes <= self.limit || state.used == 0;
        if !fits && !permit.overdraws {
            if permit.bytes == 0 || state.overdrawn {
                state.waiters.push(task.waker().clone());
                return Poll::Pending;
            }
            state.overdrawn = true;
            permit.overdraws = true;
        }
        state.used += bytes;
        permit.bytes += bytes;
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
        let waiters = std::mem::take(&mut state.waiters);
        drop(state);
        waiters.into_iter().for_each(Waker::wake);
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
    fn a_request_larger_than_the_limit_goes_alone() {
        let budget = Budget::new(10);
        let permit = budget.take(100).now_or_never().unwrap();
        assert!(budget.take(1).now_or_never().is_none());
        drop(permit);
        assert!(budget.take(1).now_or_never().is_some());
    }
}
