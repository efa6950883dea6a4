//! Bounds for latency and errors: measured on the shards, compared once in a window.

use blockmason::graph::{Histogram, OpReading};
use blockmason::{Kind, Reply};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// What one shard has seen. Only the shard itself writes to it, so that no addition is locked.
#[derive(Default)]
pub(super) struct Counters {
    begun: AtomicU64,
    over: AtomicU64,
    errors: AtomicU64,
    latency: Histogram,
}

fn add_one(count: &AtomicU64) {
    // With a single writer a load and a store lose nothing.
    count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
}

impl Counters {
    /// Counts a request that passes now.
    pub(super) fn begin(&self, now: Instant) -> Passing<'_> {
        add_one(&self.begun);
        Passing { counters: self, since: now }
    }
}

/// A request that has passed, until it is answered or dropped.
pub(super) struct Passing<'a> {
    counters: &'a Counters,
    since: Instant,
}

impl Passing<'_> {
    pub(super) fn answered(self, reply: &Reply, now: Instant) {
        self.counters.latency.record((now - self.since).as_nanos() as u64);
        // What a client should not have asked for is its own business.
        let client = |kind| matches!(kind, Kind::Invalid | Kind::Unsupported | Kind::Denied);
        if reply.as_ref().is_err_and(|error| !client(error.kind())) {
            add_one(&self.counters.errors);
        }
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        add_one(&self.counters.over);
    }
}

/// Counters of all shards together.
#[derive(Clone, Debug, Default)]
pub(super) struct Sums {
    begun: u64,
    over: u64,
    errors: u64,
    latency: Vec<u64>,
}

impl Sums {
    pub(super) fn of<'a>(shards: impl IntoIterator<Item = &'a Counters>) -> Sums {
        let mut sums = Sums { latency: vec![0; Histogram::BUCKETS], ..Sums::default() };
        for shard in shards {
            // In this order, so that what is over has begun.
            sums.over += shard.over.load(Ordering::Relaxed);
            sums.begun += shard.begun.load(Ordering::Relaxed);
            sums.errors += shard.errors.load(Ordering::Relaxed);
            sums.latency.iter_mut().zip(shard.latency.read()).for_each(|(sum, count)| *sum += count);
        }
        sums
    }
}

/// What is too much; None is never.
#[derive(Clone, Copy, Default)]
pub(super) struct Bounds {
    /// For the slowest hundredth of the requests of a window.
    pub(super) latency: Option<Duration>,
    /// Requests of a window that fail.
    pub(super) errors: Option<u64>,
    pub(super) window: Duration,
}

impl Bounds {
    pub(super) fn are_none(&self) -> bool {
        self.latency.is_none() && self.errors.is_none()
    }
}

/// A bound that was passed, one way or the other.
#[derive(Debug, PartialEq)]
pub(super) struct Crossing {
    /// `latency` or `errors`.
    pub(super) quantity: &'static str,
    pub(super) above: bool,
    pub(super) value: String,
    pub(super) bound: String,
}

/// Compares one window after the other with the bounds.
#[derive(Default)]
pub(super) struct Watch {
    /// At the end of the window before.
    seen: Sums,
    latency_above: bool,
    errors_above: bool,
}

impl Watch {
    /// Ends a window. Says what has changed sides in it.
    pub(super) fn window(&mut self, bounds: &Bounds, now: Sums) -> Vec<Crossing> {
        let before = std::mem::replace(&mut self.seen, now);
        let now = &self.seen;
        let mut crossings = Vec::new();
        if let Some(bound) = bounds.latency {
            // All that were on their way a window ago are still there: each takes longer than the window.
            let stalled = now.over == before.over && before.begun > before.over;
            let reading = difference(&before.latency, &now.latency);
            let p99 = Duration::from_nanos(reading.quantile_ns(0.99));
            let above = if stalled { bounds.window >= bound } else { p99 > bound };
            let value =
                if stalled { format!("no answer in {:?}", bounds.window) } else { format!("{p99:.1?}") };
            cross(&mut crossings, &mut self.latency_above, "latency", above, value, format!("{bound:?}"));
        }
        if let Some(bound) = bounds.errors {
            let errors = now.errors - before.errors;
            let (value, bound_text) = (errors.to_string(), bound.to_string());
            cross(&mut crossings, &mut self.errors_above, "errors", errors > bound, value, bound_text);
        }
        crossings
    }
}

fn difference(before: &[u64], now: &[u64]) -> OpReading {
    // The first window begins with nothing.
    let before = before.iter().copied().chain(std::iter::repeat(0));
    let latency: Vec<_> = now.iter().zip(before).map(|(now, before)| now - before).collect();
    OpReading { requests: latency.iter().sum(), latency, ..OpReading::default() }
}

fn cross(
    crossings: &mut Vec<Crossing>,
    was: &mut bool,
    quantity: &'static str,
    above: bool,
    value: String,
    bound: String,
) {
    if *was != above {
        *was = above;
        crossings.push(Crossing { quantity, above, value, bound });
    }
}
