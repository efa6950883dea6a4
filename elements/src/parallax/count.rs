//! How many are at something, for whoever has to wait until nobody is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

/// Counts who is there; resolves when nobody is.
#[derive(Default)]
pub(super) struct Count {
    here: AtomicUsize,
    none: Notify,
}

/// Somebody who is there.
pub(super) struct Here(Arc<Count>);

impl Count {
    pub(super) fn enter(self: &Arc<Count>) -> Here {
        self.here.fetch_add(1, Ordering::AcqRel);
        Here(self.clone())
    }

    pub(super) async fn none(&self) {
        loop {
            let mut woken = std::pin::pin!(self.none.notified());
            woken.as_mut().enable();
            if self.here.load(Ordering::Acquire) == 0 {
                return;
            }
            woken.await;
        }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        if self.0.here.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.none.notify_waiters();
        }
    }
}
