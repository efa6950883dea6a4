//! What goes wrong, and when.

use crate::Operation;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// What happens to a request. "Before" and "after" are before and after its effect.
#[derive(Clone, Debug)]
pub enum Action {
    /// Nothing is done, and this status and code are answered.
    ErrorBefore(u16, &'static str),
    /// It is done, and this status and code are answered.
    ErrorAfter(u16, &'static str),
    /// Nothing is done, and the connection is closed without an answer.
    CloseBefore,
    /// It is done, and the connection is closed without an answer.
    CloseAfter,
    /// It is done after this time.
    Delay(Duration),
    /// It is done when the test says so, even when its client has long gone.
    Hold(Hold),
    /// The answer promises its whole body; the connection is closed after these bytes of it.
    TruncateBody(usize),
    /// It is done, and the answer goes on for ever with pieces of this length.
    Endless(usize),
    /// This bit of the body of the answer is the other way round, counted from the start and around its end.
    FlipBit(usize),
    /// `If-None-Match` and `If-Match` are not looked at.
    IgnoreConditions,
}

impl Action {
    /// The store asks for fewer requests.
    pub const SLOW_DOWN: Action = Action::ErrorBefore(503, "SlowDown");
    /// Another conditional request is under way.
    pub const CONFLICT: Action = Action::ErrorBefore(409, "ConditionalRequestConflict");
    /// The keys are not good for this.
    pub const DENIED: Action = Action::ErrorBefore(403, "AccessDenied");
    /// The client's clock is wrong.
    pub const CLOCK_SKEW: Action = Action::ErrorBefore(403, "RequestTimeTooSkewed");
    /// The key is said not to exist.
    pub const MISSING: Action = Action::ErrorBefore(404, "NoSuchKey");
}

/// Keeps requests from being done until [`release`](Self::release). Clones are the same hold.
#[derive(Clone, Debug)]
pub struct Hold(Arc<watch::Sender<Held>>);

#[derive(Debug, Default)]
struct Held {
    arrived: usize,
    released: bool,
}

impl Default for Hold {
    fn default() -> Hold {
        Hold(Arc::new(watch::Sender::new(Held::default())))
    }
}

impl Hold {
    /// How many requests have come to it.
    pub fn arrived(&self) -> usize {
        self.0.borrow().arrived
    }

    /// Waits until this many requests have come to it.
    pub fn wait(&self, arrived: usize) {
        crate::until("requests that are held", || self.arrived() >= arrived);
    }

    /// Lets all of them go, and all that come later.
    pub fn release(&self) {
        self.0.send_modify(|held| held.released = true);
    }

    pub(crate) async fn pass(&self) {
        self.0.send_modify(|held| held.arrived += 1);
        // The sender is here, so it is not gone.
        let _ = self.0.subscribe().wait_for(|held| held.released).await;
    }
}

/// An action, and the requests that it happens to. Those that several rules choose suffer all of their actions.
pub struct Rule {
    action: Action,
    operation: Option<Operation>,
    key: Box<dyn Fn(&str) -> bool + Send>,
    skip: u64,
    times: u64,
}

impl Rule {
    /// Happens to the first request that matches, whichever it is until the rule says more.
    pub fn once(action: Action) -> Rule {
        Rule { action, operation: None, key: Box::new(|_| true), skip: 0, times: 1 }
    }

    /// Happens to all requests that match.
    pub fn always(action: Action) -> Rule {
        Rule::once(action).times(u64::MAX)
    }

    /// Only requests of this operation match.
    pub fn on(mut self, operation: Operation) -> Rule {
        self.operation = Some(operation);
        self
    }

    /// Only keys with this prefix match.
    pub fn prefix(self, prefix: &str) -> Rule {
        let prefix = prefix.to_owned();
        self.key(move |key| key.starts_with(&prefix))
    }

    /// Only keys of which `matches` is true match.
    pub fn key(mut self, matches: impl Fn(&str) -> bool + Send + 'static) -> Rule {
        self.key = Box::new(matches);
        self
    }

    /// The first `count` that match are left alone.
    pub fn skip(mut self, count: u64) -> Rule {
        self.skip = count;
        self
    }

    /// It happens this many times, then no more.
    pub fn times(mut self, count: u64) -> Rule {
        self.times = count;
        self
    }

    /// The action if it happens to this request, which is counted.
    pub(crate) fn happens(&mut self, operation: Operation, key: &str) -> Option<Action> {
        let matches = self.operation.is_none_or(|wanted| wanted == operation) && (self.key)(key);
        if !matches || self.times == 0 {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.times -= 1;
        Some(self.action.clone())
    }
}
