//! What handlers speak of: counters, and how fast it goes.

use super::chunk::UNREADABLE;
use blockmason::{Error, Result};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// What is counted.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) copied: AtomicU64,
    pub(super) skipped: AtomicU64,
    pub(super) passes: AtomicU64,
    pub(super) verified: AtomicU64,
    /// Goes up and down.
    pub(super) under_way: AtomicU64,
}

/// What a successor in another process does not find in the map.
#[derive(Serialize, Deserialize)]
pub(super) struct Left {
    copied: u64,
    skipped: u64,
    passes: u64,
}

impl Left {
    /// The version of that.
    pub(super) const VERSION: u32 = 1;
}

impl Counters {
    pub(super) fn left(&self) -> Left {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Left { copied: get(&self.copied), skipped: get(&self.skipped), passes: get(&self.passes) }
    }

    pub(super) fn set(&self, left: &Left) {
        self.copied.store(left.copied, Ordering::Relaxed);
        self.skipped.store(left.skipped, Ordering::Relaxed);
        self.passes.store(left.passes, Ordering::Relaxed);
    }

    /// Goes on with those of the element before.
    pub(super) fn take(&self, old: &Counters) {
        self.set(&old.left());
        self.verified.store(old.verified.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

/// Everything that a copier says of itself: its handler `progress`, as JSON. The names are those of its handlers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// `copying`, `clean` and so on.
    pub state: Cow<'static, str>,
    /// Bytes that are still to be copied.
    pub remaining: u64,
    /// Bytes of the disk.
    pub total: u64,
    /// Bytes that were copied.
    pub copied: u64,
    /// Bytes that were known to be zero.
    pub skipped: u64,
    /// Bytes a second, lately.
    pub rate_now: u64,
    /// Passes over the disk.
    pub passes: u64,
    /// What has failed last; or empty.
    pub error: String,
    /// Bytes that were compared.
    pub verified: u64,
    /// Chunks that are under way.
    pub under_way: u64,
}

impl Progress {
    /// Why the disk that is copied cannot be read, if it is that which has failed.
    pub fn unreadable(&self) -> Option<&str> {
        self.error.strip_prefix(UNREADABLE)
    }

    pub(super) fn get(self, handler: &str) -> Result<String> {
        let number = match handler {
            "state" => return Ok(self.state.into_owned()),
            "error" => return Ok(self.error),
            "progress" => {
                let text = serde_json::to_string(&self);
                return text.map_err(|error| Error::internal(format!("it cannot be written down: {error}")));
            }
            "remaining" => self.remaining,
            "total" => self.total,
            "copied" => self.copied,
            "skipped" => self.skipped,
            "rate_now" => self.rate_now,
            "passes" => self.passes,
            "verified" => self.verified,
            "under_way" => self.under_way,
            _ => return Err(Error::no_handler(handler)),
        };
        Ok(number.to_string())
    }
}

/// What a handler is set to that is on or off.
pub(super) fn yes_or_no(value: &str) -> Result<bool> {
    match value {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err(Error::invalid(format!("expected `yes` or `no`, found `{value:.40}`"))),
    }
}

/// Bytes of the last seconds.
#[derive(Default)]
pub(super) struct Recent(VecDeque<(Instant, u64)>);

/// How far it looks back.
const WINDOW: Duration = Duration::from_secs(4);

/// What is counted together.
const SLOT: Duration = Duration::from_millis(250);

impl Recent {
    pub(super) fn add(&mut self, now: Instant, bytes: u64) {
        match self.0.back_mut() {
            Some((since, sum)) if now - *since < SLOT => *sum += bytes,
            _ => self.0.push_back((now, bytes)),
        }
        while self.0.front().is_some_and(|(since, _)| now - *since > WINDOW) {
            self.0.pop_front();
        }
    }

    /// Bytes in a second.
    pub(super) fn rate(&self, now: Instant) -> u64 {
        let recent = self.0.iter().filter(|(since, _)| now.saturating_duration_since(*since) <= WINDOW);
        let Some((first, _)) = recent.clone().next() else { return 0 };
        let time = now.saturating_duration_since(*first).max(Duration::from_secs(1));
        (recent.map(|(_, bytes)| bytes).sum::<u64>() as f64 / time.as_secs_f64()) as u64
    }
}
