//! The parked flows of one epoch of one stream.
//!
//! Slots and their wakers are reused, so that parking allocates nothing once a stream is warm. Only
//! flows that were woken are polled.

use super::woken::Woken;
use crate::element::LocalBoxFuture;
use crate::request::Reply;
use std::task::{Context, Poll, Waker};

/// Parked flows, each with what its owner wants back with the reply.
pub(crate) struct Flows<'a, T> {
    slots: Vec<Slot<'a, T>>,
    free: Vec<usize>,
    /// Which slots were woken.
    woken: Woken,
}

struct Slot<'a, T> {
    parked: Option<(LocalBoxFuture<'a, Reply>, T)>,
    waker: Waker,
}

impl<'a, T> Flows<'a, T> {
    pub(crate) fn new() -> Self {
        Flows { slots: Vec::new(), free: Vec::new(), woken: Woken::default() }
    }

    /// How many are parked.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Who waits for the flows that are parked.
    pub(crate) fn owners(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.parked.as_ref()).map(|(_, owner)| owner)
    }

    /// Parks a flow. It is polled by the next [`poll`](Self::poll).
    pub(crate) fn insert(&mut self, flow: LocalBoxFuture<'a, Reply>, owner: T) {
        let ix = self.free.pop().unwrap_or_else(|| self.grow());
        let slot = &mut self.slots[ix];
        slot.parked = Some((flow, owner));
        slot.waker.wake_by_ref();
    }

    fn grow(&mut self) -> usize {
        let ix = self.slots.len();
        self.slots.push(Slot { parked: None, waker: self.woken.waker(ix) });
        ix
    }

    /// Polls each flow that was woken once. `each` is given every reply, or None if the flow
    /// panicked. Returns true if a flow ended.
    pub(crate) fn poll(&mut self, task: &Context<'_>, mut each: impl FnMut(T, Option<Reply>)) -> bool {
        self.woken.tell(task.waker());
        let mut ended = false;
        for word in 0..self.woken.words() {
            let mut bits = self.woken.take(word);
            while bits != 0 {
                let ix = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                ended |= self.poll_slot(ix, &mut each);
            }
        }
        ended
    }

    fn poll_slot(&mut self, ix: usize, each: &mut impl FnMut(T, Option<Reply>)) -> bool {
        let slot = &mut self.slots[ix];
        let Some((flow, _)) = &mut slot.parked else { return false };
        let mut task = Context::from_waker(&slot.waker);
        // A panic is contained here: the flow is dropped, its graph marked as failed by the caller.
        let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| flow.as_mut().poll(&mut task)));
        let reply = match polled {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(reply)) => Some(reply),
            Err(_) => None,
        };
        if let Some((flow, owner)) = slot.parked.take() {
            drop(flow);
            self.free.push(ix);
            each(owner, reply);
        }
        true
    }

    /// Drops every flow and gives back their owners: the graph has failed.
    pub(crate) fn abandon(&mut self) -> Vec<T> {
        let parked = self.slots.iter_mut().filter_map(|slot| slot.parked.take());
        let owners = parked.map(|(_, owner)| owner).collect();
        self.free = (0..self.slots.len()).collect();
        owners
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Answer;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    struct Counting(AtomicUsize);
    impl Wake for Counting {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_woken_flows_are_polled() {
        let polls: Vec<_> = (0..200).map(|_| Rc::new(Cell::new(0))).collect();
        let wakers: Vec<_> = (0..200).map(|_| Rc::new(Cell::new(None))).collect();
        let mut flows = Flows::new();
        for ix in 0..200usize {
            let (polls, waker) = (polls[ix].clone(), wakers[ix].clone());
            let flow = std::future::poll_fn(move |task| {
                polls.set(polls.get() + 1);
                waker.set(Some(task.waker().clone()));
                if polls.get() == 2 { Poll::Ready(Ok(Answer::Done)) } else { Poll::Pending }
            });
            flows.insert(Box::pin(flow), ix);
        }
        let parent = Arc::new(Counting(AtomicUsize::new(0)));
        let waker = Waker::from(parent.clone());
        let task = Context::from_waker(&waker);
        assert!(!flows.poll(&task, |_, _| panic!("none is done")));
        assert!(polls.iter().all(|polls| polls.get() == 1));
        wakers[3].take().unwrap().wake();
        wakers[130].take().unwrap().wake();
        assert_eq!(parent.0.load(Ordering::SeqCst), 1, "two wakes tell the owner once");
        let mut done = Vec::new();
        assert!(flows.poll(&task, |ix, reply| done.push((ix, reply.unwrap().is_ok()))));
        assert_eq!(done, [(3, true), (130, true)]);
        assert_eq!(flows.len(), 198);
        assert_eq!(polls[4].get(), 1);
    }

    #[test]
    fn a_panic_ends_only_its_flow() {
        let mut flows = Flows::new();
        flows.insert(Box::pin(async { panic!("of a test") }), 1);
        flows.insert(Box::pin(async { Ok(Answer::Done) }), 2);
        let mut done = Vec::new();
        flows.poll(&Context::from_waker(Waker::noop()), |ix, reply| done.push((ix, reply.is_some())));
        assert_eq!(done, [(1, false), (2, true)]);
    }

    #[test]
    fn wakes_from_another_thread_arrive() {
        let mut flows = Flows::new();
        let (tx, rx) = tokio::sync::oneshot::channel();
        flows.insert(
            Box::pin(async move {
                rx.await.unwrap();
                Ok(Answer::Done)
            }),
            (),
        );
        let sender = std::thread::spawn(move || tx.send(()).unwrap());
        futures::executor::block_on(std::future::poll_fn(|task| {
            flows.poll(task, |(), _| ());
            if flows.len() == 0 { Poll::Ready(()) } else { Poll::Pending }
        }));
        sender.join().unwrap();
    }
}
