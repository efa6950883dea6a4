//! Work that many want done and one does for all of them: a flush, a checkpoint.

use crate::error::Result;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

/// Lets callers share runs of some work. One run at a time; whoever calls is served by a run that
/// starts after the call. Callers may be on any shard.
#[derive(Default)]
pub struct Coalesced {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: bool,
    /// The run that has not started, and whom it will serve.
    next: Option<Arc<Batch>>,
    wakers: Vec<Waker>,
}

/// What one run comes to; None until it has ended.
type Batch = Mutex<Option<Result<()>>>;

impl Coalesced {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `work` done once, after now, by this caller or by another. If the one who does it is
    /// dropped meanwhile, another of those who wait does it again.
    ///
    /// # Errors
    /// What the run said; all of its callers are told.
    pub async fn run(&self, work: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
        let batch = self.state().next.get_or_insert_default().clone();
        // Whoever calls in the same turn of the shard, woken by the same event perhaps, shares the run.
        tokio::task::yield_now().await;
        let turn = poll_fn(|task| {
            let mut state = self.state();
            if let Some(outcome) = &*outcome(&batch) {
                return Poll::Ready(Err(outcome.clone()));
            }
            if state.running {
                if !state.wakers.iter().any(|known| known.will_wake(task.waker())) {
                    state.wakers.push(task.waker().clone());
                }
                return Poll::Pending;
            }
            state.running = true;
            // Whoever calls from now on is served by a later run.
            if state.next.as_ref().is_some_and(|next| Arc::ptr_eq(next, &batch)) {
                state.next = None;
            }
            Poll::Ready(Ok(Turn(self)))
        });
        match turn.await {
            Err(outcome) => outcome,
            Ok(turn) => {
                let done = work().await;
                *outcome(&batch) = Some(done.clone());
                drop(turn);
                done
            }
        }
    }
}

fn outcome(batch: &Batch) -> MutexGuard<'_, Option<Result<()>>> {
    batch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held by the one who does the work.
struct Turn<'a>(&'a Coalesced);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let wakers = {
            let mut state = self.0.state();
            state.running = false;
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use futures::FutureExt;
    use std::cell::Cell;
    use tokio::sync::oneshot;

    /// A run that ends when the test says so.
    async fn run(shared: &Coalesced, runs: &Cell<usize>, end: oneshot::Receiver<Result<()>>) -> Result<()> {
        let work = async || {
            runs.set(runs.get() + 1);
            end.await.unwrap()
        };
        shared.run(work).await
    }

    /// Polls until nothing goes on any more.
    fn settle<T>(caller: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        (0..3).find_map(|_| caller.as_mut().now_or_never())
    }

    #[test]
    fn callers_share_a_run_that_starts_after_they_called() {
        let (shared, runs) = (Coalesced::default(), Cell::new(0));
        let (mut ends, mut callers) = (Vec::new(), Vec::new());
        for number in 0..5 {
            let (tx, rx) = oneshot::channel();
            let mut caller = Box::pin(run(&shared, &runs, rx));
            assert!(caller.as_mut().now_or_never().is_none());
            ends.push(tx);
            callers.push(caller);
            // The first two call in one turn.
            if number > 0 {
                assert!(callers.iter_mut().all(|caller| settle(caller).is_none()));
                assert_eq!(runs.get(), 1);
            }
        }
        ends.remove(0).send(Ok(())).unwrap();
        for caller in [0, 0] {
            settle(&mut callers.remove(caller)).unwrap().unwrap();
        }
        assert_eq!(runs.get(), 1);
        // The three that came while the first run went on share the second.
        assert!(callers.iter_mut().rev().all(|caller| settle(caller).is_none()));
        assert_eq!(runs.get(), 2);
        ends.remove(3).send(Err(Error::internal("of a test"))).unwrap();
        for caller in [2, 0, 1] {
            assert!(settle(&mut callers[caller]).unwrap().is_err());
        }
        assert_eq!(runs.get(), 2);
    }

    #[test]
    fn work_whose_doer_has_gone_is_done_by_another() {
        let (shared, runs) = (Coalesced::default(), Cell::new(0));
        let hold = || oneshot::channel::<Result<()>>();
        let ((_never, first_end), (_too, second_end), (go, third_end)) = (hold(), hold(), hold());
        let mut first = Box::pin(run(&shared, &runs, first_end));
        assert!(settle(&mut first).is_none());
        let mut second = Box::pin(run(&shared, &runs, second_end));
        let mut third = Box::pin(run(&shared, &runs, third_end));
        assert!(settle(&mut second).is_none() && settle(&mut third).is_none());
        drop(first);
        assert!(settle(&mut second).is_none());
        assert_eq!(runs.get(), 2);
        drop(second);
        go.send(Ok(())).unwrap();
        settle(&mut third).unwrap().unwrap();
        assert_eq!(runs.get(), 3);
        assert!(shared.state().wakers.is_empty());
    }
}
