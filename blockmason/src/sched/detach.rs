//! Requests that run to their end whether anybody waits or not.

use super::Cx;
use crate::error::Error;
use crate::request::{Reply, Request};
use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// A detached request that its lane has not taken up yet.
pub(crate) struct Task {
    pub(crate) node: u32,
    pub(crate) port: usize,
    pub(crate) req: Request,
    pub(crate) done: Done,
}

/// The sending half.
pub(crate) struct Done(Rc<RefCell<State>>);

#[derive(Default)]
struct State {
    reply: Option<Reply>,
    waker: Option<Waker>,
}

impl Done {
    pub(crate) fn send(self, reply: Reply) {
        let waker = {
            let mut state = self.0.borrow_mut();
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

pub(crate) fn detach(cx: Cx<'_>, port: usize, req: Request) -> Detached {
    let state = Rc::new(RefCell::new(State::default()));
    let done = Done(state.clone());
    cx.lane.detached.borrow_mut().push_back(Task { node: cx.node, port, req, done });
    Detached(state)
}
