//! The clock. Everything that waits or looks at the time does it here, so that a test can stop time.
#![allow(clippy::disallowed_methods, reason = "this is the one place where the clock is read")]

use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Now.
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// The time of day, for records that people read; it may jump.
pub fn wall_clock() -> SystemTime {
    SystemTime::now()
}

/// Resolves after `time`.
pub async fn sleep(time: Duration) {
    tokio::time::sleep(time).await;
}

/// The body's result, or None if it took longer than `time`.
pub async fn timeout<T>(time: Duration, body: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(time, body).await.ok()
}
