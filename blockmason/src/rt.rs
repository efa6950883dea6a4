//! The clock. Everything that waits or looks at the time does it here, so that a test can stop time.
#![allow(clippy::disallowed_methods, reason = "this is the one place where the clock is read")]

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// Now.
#[inline]
pub fn now() -> Instant {
    Instant::now()
}

/// The time of day, for records that people read; it may jump.
pub fn wall_clock() -> SystemTime {
    #[cfg(any(test, feature = "testing"))]
    if let Some(time) = crate::testing::wall_clock() {
        return time;
    }
    SystemTime::now()
}

/// Resolves after `time`.
pub async fn sleep(time: Duration) {
    tokio::time::sleep(time).await;
}

/// An alarm for hand-written futures.
pub struct Timer(Pin<Box<tokio::time::Sleep>>);

impl Timer {
    /// Goes off after `time`.
    pub fn new(time: Duration) -> Timer {
        Timer(Box::pin(tokio::time::sleep(time)))
    }

    /// Goes off `time` from now instead.
    pub fn reset(&mut self, time: Duration) {
        self.0.as_mut().reset(now() + time);
    }

    /// Ready once it has gone off.
    pub fn poll(&mut self, task: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(task)
    }
}

/// Runs what may wait for files or sockets on a thread where that harms nobody. None if it panicked.
pub async fn blocking<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(body).await.ok()
}

/// Lets everybody else have a turn who is ready for one, on whatever executor.
pub async fn pass() {
    let mut passed = false;
    std::future::poll_fn(|task| {
        if std::mem::replace(&mut passed, true) {
            return Poll::Ready(());
        }
        task.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The body's result, or None if it took longer than `time`.
pub async fn timeout<T>(time: Duration, body: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(time, body).await.ok()
}
