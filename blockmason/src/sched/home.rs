//! Requests that cross to another shard, for a sink that has a home: a connection that only one shard
//! can own.
//!
//! Between each pair of shards lies a box, locked once a turn by either side. On every shard one task,
//! the ferry, moves what has gathered: it hands over the calls that this shard has made, starts those
//! that have come in, and takes replies back the same way. The order of calls is kept for each pair. At
//! most [`DEPTH`] calls of a pair are across at once; further ones wait, in order, where they were made,
//! and are bounded by what their sources admit.

use super::bell::Bell;
use super::flows::Flows;
use super::{Cx, Shard};
use crate::element::Flow;
use crate::request::Reply;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// Calls of one pair of shards that the other side holds at once: a deep queue of one client.
const DEPTH: usize = 256;

type Make = Box<dyn FnOnce(&Rc<Shard>) -> Flow<'static> + Send>;

/// What became of a call: None if it panicked.
type Outcome = Option<Reply>;

/// What one shard has put down for another.
#[derive(Default)]
struct Letters {
    /// Calls, each with the caller's number for it.
    calls: Vec<(u32, Make)>,
    /// Outcomes of the other's calls, by the number that it gave.
    outcomes: Vec<(u32, Outcome)>,
}

/// The boxes between all shards of a host.
pub(crate) struct Post {
    shards: usize,
    /// Those from shard `a` to shard `b` at `a * shards + b`.
    boxes: Vec<Mutex<Letters>>,
    /// Of the ferry of each shard.
    bells: Vec<Bell>,
}

impl Post {
    /// The boxes of so many shards.
    pub(crate) fn new(shards: usize) -> Arc<Post> {
        let boxes = (0..shards * shards).map(|_| Mutex::default()).collect();
        Arc::new(Post { shards, boxes, bells: (0..shards).map(|_| Bell::default()).collect() })
    }

    fn letters(&self, from: usize, to: usize) -> std::sync::MutexGuard<'_, Letters> {
        // Nothing in here is half done when something panics.
        self.boxes[from * self.shards + to].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A shard's own end of the boxes.
pub(crate) struct Harbour {
    post: Arc<Post>,
    me: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    peers: Vec<Peer>,
    /// Calls of this shard whose flows have not ended.
    waiting: Vec<Waiting>,
    free: Vec<u32>,
}

/// What goes to another shard at the end of the turn.
#[derive(Default)]
struct Peer {
    calls: VecDeque<(u32, Make)>,
    /// Calls that are across, or on their way there or back.
    across: usize,
    outcomes: Vec<(u32, Outcome)>,
}

#[derive(Default)]
struct Waiting {
    outcome: Option<Outcome>,
    waker: Option<Waker>,
    /// The flow was dropped: nobody wants the outcome.
    abandoned: bool,
}

impl Harbour {
    pub(crate) fn new(post: Arc<Post>, me: usize) -> Harbour {
        let peers = (0..post.shards).map(|_| Peer::default()).collect();
        Harbour { post, me, state: RefCell::new(State { peers, ..State::default() }) }
    }

    pub(super) fn shards(&self) -> usize {
        self.post.shards
    }

    fn call(&self, home: usize, make: Make) -> u32 {
        let mut state = self.state.borrow_mut();
        let slot = state.free.pop().unwrap_or(state.waiting.len() as u32);
        match state.waiting.get_mut(slot as usize) {
            Some(waiting) => *waiting = Waiting::default(),
            None => state.waiting.push(Waiting::default()),
        }
        state.peers[home].calls.push_back((slot, make));
        drop(state);
        self.post.bells[self.me].ring();
        slot
    }

    /// Moves everything that is here, both ways, until nothing is left to move.
    fn poll(&self, shard: &Rc<Shard>, flows: &mut Flows<'static, (usize, u32)>, task: &Context<'_>) {
        self.post.bells[self.me].answer(task.waker());
        for from in 0..self.post.shards {
            let came = std::mem::take(&mut *self.post.letters(from, self.me));
            for (slot, outcome) in came.outcomes {
                self.arrive(from, slot, outcome);
            }
            for (slot, make) in came.calls {
                match catch_unwind(AssertUnwindSafe(|| make(shard))) {
                    Ok(Flow::Now(reply)) => self.answer(from, slot, Some(reply)),
                    Ok(Flow::Later(flow)) => flows.insert(flow, (from, slot)),
                    Err(_) => self.answer(from, slot, None),
                }
            }
        }
        flows.poll(task, |(from, slot), outcome| self.answer(from, slot, outcome));
        self.send();
    }

    fn answer(&self, to: usize, slot: u32, outcome: Outcome) {
        self.state.borrow_mut().peers[to].outcomes.push((slot, outcome));
    }

    fn arrive(&self, from: usize, slot: u32, outcome: Outcome) {
        let mut state = self.state.borrow_mut();
        state.peers[from].across -= 1;
        let waiting = &mut state.waiting[slot as usize];
        let waker = waiting.waker.take();
        if waiting.abandoned {
            state.free.push(slot);
        } else {
            waiting.outcome = Some(outcome);
        }
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Puts down what may go, one lock for each peer that gets something.
    fn send(&self) {
        let mut state = self.state.borrow_mut();
        for (to, peer) in state.peers.iter_mut().enumerate() {
            let room = peer.calls.len().min(DEPTH - peer.across);
            if room == 0 && peer.outcomes.is_empty() {
                continue;
            }
            peer.across += room;
            let mut letters = self.post.letters(self.me, to);
            letters.calls.extend(peer.calls.drain(..room));
            letters.outcomes.append(&mut peer.outcomes);
            drop(letters);
            self.post.bells[to].ring();
        }
    }

    /// Runs the ferry of a shard for as long as it lives.
    pub(crate) async fn ferry(shard: Rc<Shard>) {
        let mut flows = Flows::new();
        poll_fn::<(), _>(|task| {
            shard.harbour.poll(&shard, &mut flows, task);
            Poll::Pending
        })
        .await;
    }
}

/// The reply to a call that crossed.
struct Crossed {
    shard: Rc<Shard>,
    slot: u32,
    over: bool,
}

impl Future for Crossed {
    type Output = Reply;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        let mut state = self.shard.harbour.state.borrow_mut();
        let waiting = &mut state.waiting[self.slot as usize];
        let Some(outcome) = waiting.outcome.take() else {
            waiting.waker = Some(task.waker().clone());
            return Poll::Pending;
        };
        state.free.push(self.slot);
        drop(state);
        self.over = true;
        // Contained here as it would have been without the crossing.
        Poll::Ready(outcome.unwrap_or_else(|| panic!("an element panicked on its home shard")))
    }
}

impl Drop for Crossed {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let mut state = self.shard.harbour.state.borrow_mut();
        let waiting = &mut state.waiting[self.slot as usize];
        if waiting.outcome.is_some() {
            state.free.push(self.slot);
        } else {
            waiting.abandoned = true;
            waiting.waker = None;
        }
    }
}

impl<'a> Cx<'a> {
    /// Makes a flow on the shard `home` (modulo their number) and brings its reply back; on the spot if
    /// this is that shard. What is called there runs to its end whether this flow is kept or not.
    ///
    /// For sinks that only one shard can talk to. Calls from one shard to another start in the order in
    /// which they were made.
    pub fn at(
        self,
        home: usize,
        make: impl FnOnce(&Rc<Shard>) -> Flow<'static> + Send + 'static,
    ) -> Flow<'a> {
        at(self.shard(), home, make)
    }
}

fn at<'a>(
    shard: &Rc<Shard>,
    home: usize,
    make: impl FnOnce(&Rc<Shard>) -> Flow<'static> + Send + 'static,
) -> Flow<'a> {
    let home = home % shard.shards();
    if home == shard.id() {
        return make(shard);
    }
    let slot = shard.harbour.call(home, Box::new(make));
    Flow::Later(Box::pin(Crossed { shard: shard.clone(), slot, over: false }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Data;
    use crate::error::Error;
    use crate::request::Answer;
    use crate::sched::{Host, HostConfig};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    fn number(reply: Reply) -> u64 {
        let bytes = reply.unwrap().into_data().unwrap().to_vec();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    fn reply(number: u64) -> Reply {
        Ok(Answer::Data(Data::copy_of(&number.to_le_bytes())))
    }

    /// A flow that is answered at once, or after so many turns of its shard.
    fn after(turns: u64, number: u64, running: Arc<AtomicUsize>) -> Flow<'static> {
        if turns == 0 {
            return Flow::Now(reply(number));
        }
        Flow::later(async move {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            assert!(now <= DEPTH, "{now} calls of a pair are across");
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            running.fetch_sub(1, Ordering::SeqCst);
            reply(number)
        })
    }

    /// What each home saw of each caller, in order.
    type Seen = Arc<Mutex<Vec<(usize, usize, u64)>>>;

    /// Calls both other shards from `me`, drops some flows, and counts the replies.
    async fn caller(shard: Rc<Shard>, calls: u64, seen: Seen) -> u64 {
        let (me, mut rng) = (shard.id(), fastrand::Rng::with_seed(shard.id() as u64));
        let running: Vec<_> = (0..shard.shards()).map(|_| Arc::new(AtomicUsize::new(0))).collect();
        let mut flows = Vec::new();
        let mut dropped = 0;
        for call in 0..calls {
            let (home, turns) = (rng.usize(0..shard.shards()), rng.u64(0..4));
            let (seen, running) = (seen.clone(), running[home].clone());
            let flow = at(&shard, home, move |there| {
                assert_eq!(there.id(), home);
                seen.lock().unwrap().push((me, home, call));
                if home == me { Flow::Now(reply(call)) } else { after(turns, call, running) }
            });
            if rng.u8(0..10) == 0 && matches!(flow, Flow::Later(_)) && home != me {
                dropped += 1;
                drop(flow);
            } else {
                flows.push(async move { assert_eq!(number(flow.await), call) });
            }
            if rng.u8(0..50) == 0 {
                tokio::task::yield_now().await;
            }
        }
        let answered = flows.len() as u64;
        futures::future::join_all(flows).await;
        answered + dropped
    }

    #[test]
    fn every_call_is_answered_once_and_in_order() {
        let shards = 3;
        let folder = std::env::temp_dir();
        let host = Host::start(HostConfig { shards, state_dir: folder }).unwrap();
        let (seen, calls) = (Seen::default(), 20_000);
        let mut done = Vec::new();
        for shard in 0..shards {
            let ((tx, rx), seen) = (oneshot::channel(), seen.clone());
            host.spawn_on(shard, move || async move {
                let shard = Shard::current().unwrap();
                tx.send(caller(shard.clone(), calls, seen).await).unwrap();
            })
            .unwrap();
            done.push(rx);
        }
        for rx in done {
            assert_eq!(rx.blocking_recv().unwrap(), calls);
        }
        // What was dropped by its caller runs all the same; it may be under way still.
        while seen.lock().unwrap().len() < shards * calls as usize {
            std::thread::yield_now();
        }
        let seen = seen.lock().unwrap();
        for pair in 0..shards * shards {
            let of_pair = seen.iter().filter(|(me, home, _)| me * shards + home == pair);
            let numbers: Vec<_> = of_pair.map(|(_, _, call)| *call).collect();
            assert!(numbers.is_sorted_by(|a, b| a < b), "the order of a pair is kept");
        }
    }

    #[test]
    fn a_panic_at_home_is_one_at_the_caller() {
        let host = Host::start(HostConfig { shards: 2, state_dir: std::env::temp_dir() }).unwrap();
        let (tx, rx) = oneshot::channel();
        host.spawn_on(0, move || async move {
            let shard = Shard::current().unwrap();
            let bad = AssertUnwindSafe(at(&shard, 1, |_| panic!("of a test")));
            let panicked = futures::FutureExt::catch_unwind(bad).await.is_err();
            let good = at(&shard, 1, |_| Flow::fail(Error::invalid("still there"))).await;
            tx.send((panicked, good.is_err())).unwrap();
        })
        .unwrap();
        assert_eq!(rx.blocking_recv().unwrap(), (true, true));
    }
}
