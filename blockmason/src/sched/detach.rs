//! Requests, and what elements do besides, that run to their end whether anybody waits or not.

use super::Cx;
use super::cx::Lane;
use crate::element::Flow;
use crate::error::Error;
use crate::request::{Reply, Request};
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// Something detached that its lane has not taken up yet.
pub(crate) struct Task {
    make: Make,
    pub(crate) done: Done,
}

type Make = Box<dyn for<'a> FnOnce(Cx<'a>) -> Flow<'a>>;

impl Task {
    /// The flow, and whom to tell of its end.
    pub(crate) fn start<'a>(self, lane: &'a Lane) -> (impl FnOnce() -> Flow<'a>, Done) {
        let Task { make, done } = self;
        let node = done.node as usize;
        (move || make(lane.cx(node)), done)
    }
}

/// The sending half.
pub(crate) struct Done {
    state: Rc<RefCell<State>>,
    /// Whose work it is.
    pub(crate) node: u32,
}

#[derive(Default)]
struct State {
    reply: Option<Reply>,
    waker: Option<Waker>,
}

impl Done {
    pub(crate) fn send(self, reply: Reply) {
        let waker = {
            let mut state = self.state.borrow_mut();
            state.reply = Some(reply);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The reply of a detached request, for whoever wants it. Dropping it changes nothing.
pub struct Detached(Rc<RefCell<State>>);

impl Future for Detached {
    type Output = Reply;

    fn poll(self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Reply> {
        let mut state = self.0.borrow_mut();
        match state.reply.take() {
            Some(reply) => Poll::Ready(reply),
            None if Rc::strong_count(&self.0) == 1 => {
                Poll::Ready(Err(Error::internal("a detached request was dropped with its graph")))
            }
            None => {
                state.waker = Some(task.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Cx<'_> {
    /// Runs a request to its end whether anybody waits for the reply or not: a lagging leg, a
    /// prefetch. It counts as in flight in this epoch.
    pub fn detach(self, port: usize, req: Request) -> Detached {
        self.detach_with(move |cx| cx.forward(port, req))
    }

    /// Runs a flow of the element's own to its end whether anybody waits for the reply or not: what is
    /// left to do when a request has been answered. It counts as in flight in this epoch.
    pub fn detach_with(self, make: impl for<'a> FnOnce(Cx<'a>) -> Flow<'a> + 'static) -> Detached {
        let state = Rc::new(RefCell::new(State::default()));
        let done = Done { state: state.clone(), node: self.node };
        self.lane.detached.borrow_mut().push_back(Task { make: Box::new(make), done });
        Detached(state)
    }
}
