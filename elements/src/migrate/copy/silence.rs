//! A disk that does not answer: what is on its way there is left to itself, so that no guest waits behind it.

use super::chunk::{Failed, TO};
use crate::migrate::map::{DirtyMap, Intent};
use blockmason::{Answer, Cx, Flow, Request, rt};
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::Instant;

/// How long the disk at `to` may leave everything unanswered.
pub(super) const SILENCE: Duration = Duration::from_secs(2);

/// What the disk at `to` has been asked and has not answered.
pub(super) struct Asked {
    waiting: Cell<usize>,
    /// When it answered last, or was asked while nothing was waited for.
    heard: Cell<Instant>,
    /// Requests that were left to themselves.
    left: Rc<Cell<usize>>,
}

impl Asked {
    pub(super) fn new(now: Instant) -> Asked {
        Asked { waiting: Cell::new(0), heard: Cell::new(now), left: Rc::default() }
    }

    /// Since when it has not answered, as long as something is on its way that was left to itself, here or by
    /// a mirror.
    pub(super) fn silent_since(&self, map: &DirtyMap) -> Option<Instant> {
        let own = (self.left.get() > 0).then(|| self.heard.get());
        own.max(map.let_go_since())
    }

    /// Sends a request past all who wait for what is held, and waits for the answer as long as anything is answered. A
    /// change that is not may land later: the map knows that. What `intent` announces ends with the request.
    pub(super) async fn ask(
        &self,
        cx: Cx<'_>,
        map: &DirtyMap,
        req: Request,
        intent: Option<Intent>,
    ) -> Result<Answer, Failed> {
        let (range, left) = (req.offset..req.end(), self.left.clone());
        let given_up = Rc::new(Cell::new(false));
        let (told, over) = (given_up.clone(), Over { left, given_up });
        let mut reply = cx.detach_with(move |cx| {
            Flow::later(async move {
                let over = over;
                let reply = cx.hold_none().await.forward(TO, req).await;
                if let (Some(intent), Ok(_)) = (&intent, &reply) {
                    intent.synced();
                }
                drop(over);
                reply
            })
        });
        if self.waiting.replace(self.waiting.get() + 1) == 0 {
            self.heard.set(rt::now());
        }
        let answered = loop {
            let quiet = rt::now().saturating_duration_since(self.heard.get());
            if quiet >= SILENCE {
                break None;
            }
            if let Some(reply) = rt::timeout(SILENCE - quiet, &mut reply).await {
                self.heard.set(rt::now());
                break Some(reply);
            }
        };
        self.waiting.set(self.waiting.get() - 1);
        let Some(reply) = answered else {
            told.set(true);
            self.left.set(self.left.get() + 1);
            map.let_go(&range);
            return Err(Failed::Silent);
        };
        reply.map_err(Failed::To)
    }
}

/// Counts the end of a request.
struct Over {
    left: Rc<Cell<usize>>,
    given_up: Rc<Cell<bool>>,
}

impl Drop for Over {
    fn drop(&mut self) {
        if self.given_up.get() {
            self.left.set(self.left.get() - 1);
        }
    }
}
