//! What threads share, in every interleaving: the same files as outside, made of loom's primitives instead
//! of the standard ones. A wake that gets lost is a deadlock, which loom reports; so is any access to the
//! contents of a range that is not ordered by its lock.
#![allow(dead_code, unreachable_pub, reason = "the models use less of the files than the scheduler")]
#![allow(clippy::duplicate_mod, reason = "that is what this is")]

mod sync {
    use std::task::Waker;

    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU64};
    pub(super) use loom::sync::{Mutex, MutexGuard};

    /// Loom's, with the signature of the one that is in use.
    #[derive(Default)]
    pub(super) struct AtomicWaker(loom::future::AtomicWaker);

    impl AtomicWaker {
        pub(super) fn register(&self, waker: &Waker) {
            self.0.register_by_ref(waker);
        }

        pub(super) fn wake(&self) {
            self.0.wake();
        }
    }
}

#[path = "bell.rs"]
mod bell;
#[path = "ranges.rs"]
mod ranges;
#[path = "woken.rs"]
mod woken;

use loom::cell::UnsafeCell;
use loom::future::block_on;
use loom::sync::{Arc, Mutex};
use loom::thread;
use ranges::{Holder, Mode, RangeLock, Waiting};
use std::future::poll_fn;
use std::ops::Range;
use std::task::Poll;

/// Every interleaving with at most so many switches at arbitrary points.
fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(body);
}

/// Four bytes and what orders the access to them.
#[derive(Default)]
struct Disk {
    lock: RangeLock,
    bytes: [UnsafeCell<u64>; 4],
}

impl Disk {
    fn claim(&self, range: Range<u64>) -> Waiting<'_> {
        self.lock.claim(HOLDER, Mode::Exclusive, std::slice::from_ref(&range))
    }

    fn change(&self, range: Range<u64>) {
        let held = block_on(self.claim(range.clone()));
        for byte in range {
            // SAFETY: an exclusive claim is held; loom checks that nothing else is under way.
            self.bytes[byte as usize].with_mut(|byte| unsafe { *byte += 1 });
        }
        drop(held);
    }

    fn read(&self, ranges: &[Range<u64>]) -> u64 {
        let held = block_on(self.lock.claim(HOLDER, Mode::Shared, ranges));
        let bytes = ranges.iter().cloned().flatten();
        // SAFETY: a shared claim is held; loom checks that nothing writes meanwhile.
        let sum = bytes.map(|byte| self.bytes[byte as usize].with(|byte| unsafe { *byte })).sum();
        drop(held);
        sum
    }
}

const HOLDER: Holder = Holder { root: 1, doing: "test" };

type Body = Box<dyn FnOnce(&Disk) + Send>;

fn together(bodies: Vec<Body>) {
    let disk = Arc::new(Disk::default());
    let spawn = |body: Body| {
        let disk = disk.clone();
        thread::spawn(move || body(&disk))
    };
    let threads: Vec<_> = bodies.into_iter().map(spawn).collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(disk.lock.claims().is_empty());
}

#[test]
fn claims_of_three_threads_exclude_each_other_and_all_end() {
    model(2, || {
        together(vec![
            Box::new(|disk| disk.change(0..2)),
            Box::new(|disk| disk.change(1..4)),
            Box::new(|disk| disk.change(0..3)),
        ]);
    });
}

#[test]
fn readers_share_and_writers_wait_for_all_of_them() {
    model(2, || {
        together(vec![
            Box::new(|disk| assert!(disk.read(&[0..1, 3..4]) <= 2)),
            Box::new(|disk| assert!(disk.read(&[0..1, 1..2]) <= 2)),
            Box::new(|disk| disk.change(0..4)),
        ]);
    });
}

#[test]
fn whoever_gives_up_wakes_those_behind() {
    model(3, || {
        together(vec![
            Box::new(|disk| disk.change(0..2)),
            Box::new(|disk| {
                // Polled once, so that a waker is left, and dropped.
                let mut waiting = std::pin::pin!(disk.claim(1..3));
                let once = poll_fn(|task| Poll::Ready(waiting.as_mut().poll(task).is_ready()));
                block_on(once);
            }),
            Box::new(|disk| disk.change(2..4)),
        ]);
    });
}

#[test]
fn no_wake_of_a_parked_flow_is_lost() {
    model(2, || {
        let mut woken = woken::Woken::default();
        let wakers = [woken.waker(0), woken.waker(1), woken.waker(70)];
        let threads = wakers.map(|waker| {
            thread::spawn(move || {
                waker.wake_by_ref();
            })
        });
        let mut seen = [0, 0];
        block_on(poll_fn(|task| {
            woken.tell(task.waker());
            for (word, seen) in seen.iter_mut().enumerate() {
                *seen |= woken.take(word);
            }
            if seen == [0b11, 1 << 6] { Poll::Ready(()) } else { Poll::Pending }
        }));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn what_is_put_down_before_the_bell_is_found() {
    model(3, || {
        let post = Arc::new((bell::Bell::default(), Mutex::new(0)));
        let ring = || {
            let post = post.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    *post.1.lock().unwrap() += 1;
                    post.0.ring();
                }
            })
        };
        let threads = [ring(), ring()];
        let mut came = 0;
        block_on(poll_fn(|task| {
            post.0.answer(task.waker());
            came += std::mem::take(&mut *post.1.lock().unwrap());
            if came == 4 { Poll::Ready(()) } else { Poll::Pending }
        }));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
