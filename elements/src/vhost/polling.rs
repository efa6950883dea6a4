//! Looking for requests instead of waiting for a kick: for a while after the last one, and only as long as
//! that has been worth it lately. Off unless it is asked for: an idle queue costs nothing.

use blockmason::Shard;
use std::task::Context;
use std::time::Duration;
use tokio::time::Instant;

/// The shortest time that is worth looking.
const SHORTEST: Duration = Duration::from_micros(4);

/// How an idle queue looks for requests.
pub(crate) struct Polling {
    /// The longest time to look. Zero: never.
    most: Duration,
    /// The time to look next time.
    window: Duration,
    state: Doing,
}

#[derive(Clone, Copy)]
enum Doing {
    Working,
    /// Looking, since then.
    Looking(Instant),
    /// Waiting for a kick; idle since then.
    Waiting(Instant),
}

impl Polling {
    pub(crate) fn new(most: Duration) -> Polling {
        Polling { most, window: most, state: Doing::Working }
    }

    /// Nothing is there. True if we look again soon: the task has been woken for it.
    #[inline]
    pub(crate) fn goes_on(&mut self, task: &Context<'_>) -> bool {
        !self.most.is_zero() && self.looks(blockmason::rt::now(), task)
    }

    fn looks(&mut self, now: Instant, task: &Context<'_>) -> bool {
        let since = match self.state {
            Doing::Working => now,
            Doing::Looking(since) => since,
            Doing::Waiting(_) => return false,
        };
        if now < since + self.window {
            self.state = Doing::Looking(since);
            task.waker().wake_by_ref();
            // The thread does not sleep: what was queued for the kernel goes to it here.
            Shard::submit();
            return true;
        }
        // In vain: half as long next time, and not at all below what is worth it.
        self.window = if self.window / 2 < SHORTEST { Duration::ZERO } else { self.window / 2 };
        self.state = Doing::Waiting(since);
        false
    }

    /// Something has come.
    #[inline]
    pub(crate) fn found(&mut self) {
        if self.most.is_zero() {
            return;
        }
        if let Doing::Waiting(since) = self.state {
            let idle = blockmason::rt::now() - since;
            // It would have been found by looking a little longer: the next may take as long, and a bit.
            if idle < self.most {
                self.window = (2 * idle).clamp(SHORTEST.min(self.most), self.most);
            }
        }
        self.state = Doing::Working;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn looks(polling: &mut Polling, now: Instant) -> bool {
        polling.looks(now, &Context::from_waker(Waker::noop()))
    }

    #[tokio::test(start_paused = true)]
    async fn it_looks_as_long_as_that_is_worth_it() {
        let us = Duration::from_micros;
        let mut polling = Polling::new(us(40));
        let start = blockmason::rt::now();
        assert!(looks(&mut polling, start) && looks(&mut polling, start + us(39)));
        assert!(!looks(&mut polling, start + us(40)));
        assert_eq!(polling.window, us(20));
        // Long after: it stays short.
        tokio::time::advance(Duration::from_secs(1)).await;
        polling.found();
        assert_eq!(polling.window, us(20));
        let now = blockmason::rt::now();
        assert!(looks(&mut polling, now) && !looks(&mut polling, now + us(20)));
        assert_eq!(polling.window, us(10));
        // Soon after: long enough for the next that takes as long.
        tokio::time::advance(us(30)).await;
        polling.found();
        assert_eq!(polling.window, us(40));
        let now = blockmason::rt::now();
        assert!(looks(&mut polling, now + us(39)));
    }

    #[test]
    fn it_does_not_look_unless_asked_to() {
        let mut polling = Polling::new(Duration::ZERO);
        assert!(!polling.goes_on(&Context::from_waker(Waker::noop())));
        polling.found();
    }
}
