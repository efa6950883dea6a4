//! From an event to those who are told of it: how many, how fast, and what came of it.

use super::exec::Command;
use super::webhook::Webhook;
use blockmason::events::Event;
use futures::StreamExt;
use futures::future::join;
use serde::Serialize;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Messages that wait, at the most.
pub(super) const QUEUE: usize = 64;

/// Messages that are sent at a time.
const AT_ONCE: usize = 4;

/// A command that takes longer is killed.
const EXEC_DEADLINE: Duration = Duration::from_secs(30);

/// An event on its way.
pub(super) struct Message {
    pub(super) event: Arc<Event>,
    /// Events before it that nobody was told of.
    pub(super) suppressed: u64,
}

#[derive(Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    event: &'a Event,
    suppressed: u64,
}

impl Message {
    /// One object on one line.
    pub(super) fn json(&self) -> String {
        let body = Body { event: &self.event, suppressed: self.suppressed };
        // Texts and numbers under keys of text: nothing of it can fail.
        let mut line = serde_json::to_string(&body).unwrap_or_default();
        line.push('\n');
        line
    }

    /// The same for programs that read no JSON. What an environment cannot hold is replaced.
    pub(super) fn variables(&self) -> [(&'static str, String); 5] {
        let event = &self.event;
        let text = |text: &str| text.replace('\0', "\u{fffd}");
        [
            ("MASON_GRAPH", text(&event.graph)),
            ("MASON_KIND", event.kind.name().to_owned()),
            ("MASON_ELEMENT", text(event.element.as_deref().unwrap_or_default())),
            ("MASON_MESSAGE", text(&event.message)),
            ("MASON_SUPPRESSED", self.suppressed.to_string()),
        ]
    }
}

/// At most `rate` in any stretch of time as long as `per`.
pub(super) struct Limiter {
    rate: usize,
    per: Duration,
    /// When the last ones passed; at most `rate`.
    passed: VecDeque<Instant>,
    suppressed: u64,
}

impl Limiter {
    pub(super) fn new(rate: u32, per: Duration) -> Limiter {
        Limiter { rate: rate as usize, per, passed: VecDeque::new(), suppressed: 0 }
    }

    /// How many were left out since the last one that passed; None if this one is left out too.
    pub(super) fn admit(&mut self, now: Instant) -> Option<u64> {
        let old = |at: &Instant| now.saturating_duration_since(*at) >= self.per;
        while self.passed.front().is_some_and(old) {
            self.passed.pop_front();
        }
        if self.passed.len() >= self.rate {
            self.skip(1);
            return None;
        }
        self.passed.push_back(now);
        Some(std::mem::take(&mut self.suppressed))
    }

    /// Counts some that are left out for another reason.
    pub(super) fn skip(&mut self, count: u64) {
        self.suppressed += count;
    }
}

/// What has come of it all.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) sent: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) suppressed: AtomicU64,
    last: Mutex<String>,
}

impl Counts {
    pub(super) fn last(&self) -> String {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn ended(&self, event: &Event, result: Result<(), String>) {
        let (count, how) = match &result {
            Ok(()) => (&self.sent, "sent"),
            Err(error) => (&self.failed, error.as_str()),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) =
            format!("{} {}: {how}", event.kind, event.number);
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Whom to tell.
pub(super) struct Targets {
    /// The element, for the log.
    pub(super) element: String,
    pub(super) exec: Option<Command>,
    pub(super) webhook: Option<Webhook>,
}

impl Targets {
    pub(super) fn is_empty(&self) -> bool {
        self.exec.is_none() && self.webhook.is_none()
    }

    async fn tell(&self, message: Message, counts: &Counts) {
        let exec = async {
            match &self.exec {
                Some(command) => command.run(&message, EXEC_DEADLINE).await,
                None => Ok(()),
            }
        };
        let webhook = async {
            match &self.webhook {
                Some(webhook) => webhook.post(&message.json()).await,
                None => Ok(()),
            }
        };
        let result = match join(exec, webhook).await {
            (Ok(()), result) | (result, Ok(())) => result,
            (Err(exec), Err(webhook)) => Err(format!("{exec}; {webhook}")),
        };
        if let Err(error) = &result {
            let (graph, element) = (&message.event.graph, &self.element);
            // Not as an event: it would be one more to be sent.
            tracing::warn!(graph, element, "nobody was told of an event: {error}");
        }
        counts.ended(&message.event, result);
    }
}

/// Sends what comes, a few at a time, until there is no sender any more and all is sent.
pub(super) async fn send_all(mut queue: mpsc::Receiver<Message>, targets: Arc<Targets>, counts: Arc<Counts>) {
    let messages = futures::stream::poll_fn(move |task| queue.poll_recv(task));
    messages.for_each_concurrent(AT_ONCE, |message| targets.tell(message, &counts)).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_much_is_counted_with_the_next_one() {
        let (start, mut limiter) = (blockmason::rt::now(), Limiter::new(2, seconds(60)));
        let passed: Vec<_> =
            [0, 10, 20, 59, 60, 69, 70, 71].map(|at| limiter.admit(start + seconds(at))).into();
        assert_eq!(passed, [Some(0), Some(0), None, None, Some(2), None, Some(1), None]);
        limiter.skip(4);
        assert_eq!(limiter.admit(start + seconds(1000)), Some(5));
    }

    proptest! {
        #[test]
        fn no_stretch_of_time_has_more_and_none_is_forgotten(
            rate in 1u32..5, gaps in prop::collection::vec(0u64..30, 1..200),
        ) {
            let mut limiter = Limiter::new(rate, seconds(60));
            let (mut now, mut passed, mut told) = (blockmason::rt::now(), Vec::new(), 0);
            for gap in &gaps {
                now += seconds(*gap);
                if let Some(suppressed) = limiter.admit(now) {
                    passed.push(now);
                    told += 1 + suppressed;
                }
            }
            prop_assert_eq!(told + limiter.suppressed, gaps.len() as u64);
            for stretch in passed.windows(rate as usize + 1) {
                prop_assert!(stretch[rate as usize] - stretch[0] >= seconds(60));
            }
            prop_assert!(limiter.passed.len() <= rate as usize);
        }
    }
}
