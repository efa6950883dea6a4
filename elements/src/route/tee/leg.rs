//! A leg of a tee: what is on its way there after the guest has been answered, and what fails there.

use super::announced::Announced;
use blockmason::sched::{Budget, Holder, Mode, Permit, RangeGuard, RangeLock, Waiting};
use blockmason::{Cx, Flow, Op, Reply, Request, rt};
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;
use tokio::time::Instant;

/// What a request counts as at the least, so that their number is bounded as well.
const LEAST: u64 = 64 << 10;

/// Where the numbers of changes are in the order of a leg: behind the end of every disk.
const NUMBERS: u64 = 1 << 63;

/// A leg, in all graphs that its tee serves.
pub(super) struct Leg {
    pub(super) name: String,
    /// Keeps later requests behind earlier ones that they overlap. A change holds its number, too: a flush
    /// waits for those of all changes that came before it.
    order: Arc<RangeLock>,
    /// The number of the next change.
    next: AtomicU64,
    room: Arc<Budget>,
    /// What has been sent and has not ended.
    unfinished: Mutex<Unfinished>,
    /// How long it may leave everything unanswered; without a log there is no bound.
    silence: Option<Duration>,
    /// It does not answer: nothing is sent there before all has ended that was.
    is_let_go: AtomicBool,
    pub(super) errors: AtomicU64,
    pub(super) skipped: AtomicU64,
    /// A bit for each operation that has failed the last time.
    failing: AtomicU8,
}

/// What is on its way down a leg.
struct Unfinished {
    count: usize,
    changes: Vec<Arc<Announced>>,
    /// When something ended last, or was sent while nothing was on its way.
    heard: Instant,
}

impl Leg {
    /// A leg that may be `lag` bytes behind, and leave everything unanswered for `silence`.
    pub(super) fn new(name: &str, lag: u64, silence: Option<Duration>) -> Leg {
        let unfinished = Unfinished { count: 0, changes: Vec::new(), heard: rt::now() };
        Leg {
            name: name.to_owned(),
            order: Arc::default(),
            next: AtomicU64::new(0),
            room: Budget::new(lag),
            unfinished: Mutex::new(unfinished),
            silence,
            is_let_go: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            failing: AtomicU8::new(0),
        }
    }

    fn unfinished(&self) -> MutexGuard<'_, Unfinished> {
        // Every change of it is complete before anything can panic.
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that it is behind, as `lag` counts them.
    pub(super) fn behind(&self) -> u64 {
        self.room.used()
    }

    /// Room for a request if there is some now and nobody waits for it.
    pub(super) fn room_now(&self, req: &Request) -> Option<Permit> {
        let mut permit = Permit::default();
        let mut task = Context::from_waker(Waker::noop());
        self.room.poll_grow(&mut permit, load(req), &mut task).is_ready().then_some(permit)
    }

    /// Waits for room; none if the leg is let go meanwhile.
    pub(super) async fn room(&self, req: &Request, cx: Cx<'_>) -> Option<Permit> {
        let Some(silence) = self.silence else { return Some(self.room.take(load(req)).await) };
        let mut room = pin!(self.room.take(load(req)));
        loop {
            if self.is_silent(cx) {
                return None;
            }
            let quiet = rt::now().saturating_duration_since(self.unfinished().heard);
            // Nothing may be on its way yet, however long ago something ended.
            let left = silence.saturating_sub(quiet).max(silence / 8);
            if let Some(permit) = rt::timeout(left, room.as_mut()).await {
                return Some(permit);
            }
        }
    }

    /// True if it does not answer. What is on its way is let go when that is first seen: what comes of it will say
    /// nothing about what is there.
    pub(super) fn is_silent(&self, cx: Cx<'_>) -> bool {
        if self.is_let_go.load(Ordering::Acquire) {
            return true;
        }
        let Some(silence) = self.silence else { return false };
        let unfinished = self.unfinished();
        let quiet = rt::now().saturating_duration_since(unfinished.heard);
        if unfinished.count == 0 || quiet < silence || self.is_let_go.swap(true, Ordering::AcqRel) {
            return self.is_let_go.load(Ordering::Acquire);
        }
        unfinished.changes.iter().for_each(|change| change.let_go());
        drop(unfinished);
        cx.notice(format!("leg `{}` has not answered for {silence:?}: what it misses is marked", self.name));
        true
    }

    fn begins(&self, announced: Option<&Arc<Announced>>) {
        let mut unfinished = self.unfinished();
        if unfinished.count == 0 {
            unfinished.heard = rt::now();
        }
        unfinished.count += 1;
        unfinished.changes.extend(announced.cloned());
    }

    /// Something has ended. With the last of it a leg that was let go takes part again.
    fn ends(&self, announced: Option<&Arc<Announced>>) {
        let mut unfinished = self.unfinished();
        unfinished.count -= 1;
        unfinished.heard = rt::now();
        let own = |change: &Arc<Announced>| announced.is_some_and(|own| Arc::ptr_eq(own, change));
        if let Some(ix) = unfinished.changes.iter().position(own) {
            unfinished.changes.swap_remove(ix);
        }
        if unfinished.count == 0 {
            self.is_let_go.store(false, Ordering::Release);
        }
    }

    /// A change is not sent here. What is on its way may end later and look as if it were the newest.
    pub(super) fn skip(&self, announced: &Announced) {
        self.skipped.fetch_add(1, Ordering::Relaxed);
        announced.differ();
        let range = announced.range();
        let overlaps = |earlier: &&Arc<Announced>| {
            earlier.range().start < range.end && range.start < earlier.range().end
        };
        self.unfinished().changes.iter().filter(overlaps).for_each(|earlier| earlier.differ());
    }

    /// Notes what became of a request, and tells of the first failure since one of its kind succeeded.
    pub(super) fn ended(&self, cx: Cx<'_>, op: Op, reply: &Reply) {
        // A hint, or a question that only the primary need understand, is nothing that a leg misses.
        if matches!(op, Op::Cache | Op::Extents | Op::Control) {
            return;
        }
        let bit = 1 << op as u8;
        let Err(error) = reply else {
            if self.failing.load(Ordering::Relaxed) & bit != 0 {
                self.failing.fetch_and(!bit, Ordering::Relaxed);
            }
            return;
        };
        self.errors.fetch_add(1, Ordering::Relaxed);
        if self.failing.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
            cx.notice(format!("leg `{}` fails, look at what is below it: {error}", self.name));
        }
    }

    /// Takes a request's place behind those that it must not overtake here.
    fn place(&self, req: &Request) -> Waiting<'static> {
        let own = req.offset..req.end();
        let claim = |mode, ranges: &[Range<u64>]| self.order.claim_shared(Holder::of(req), mode, ranges);
        match req.op {
            Op::Read => claim(Mode::Shared, &[own]),
            Op::Write | Op::Discard | Op::WriteZeroes => {
                let number = NUMBERS + self.next.fetch_add(1, Ordering::AcqRel);
                claim(Mode::Exclusive, &[own, number..number + 1])
            }
            Op::Flush => {
                let earlier = NUMBERS..NUMBERS + self.next.load(Ordering::Acquire);
                claim(Mode::Shared, &[earlier])
            }
            Op::Cache | Op::Extents => claim(Mode::Shared, &[]),
            Op::Control => {
                // Everybody sees it at the same place in the stream.
                let all = 0..u64::MAX;
                claim(Mode::Exclusive, &[all])
            }
        }
    }
}

/// What a request counts as.
fn load(req: &Request) -> u64 {
    let carried = if matches!(req.op, Op::Read | Op::Write) { req.len } else { 0 };
    carried.max(LEAST)
}

/// A request that goes down a leg while nobody waits.
pub(super) struct Carrier {
    port: usize,
    req: Request,
    place: Waiting<'static>,
    freight: Freight,
}

/// What is given back when such a request has ended, or was dropped.
struct Freight {
    leg: Arc<Leg>,
    announced: Option<Arc<Announced>>,
    _room: Permit,
}

impl Carrier {
    /// Takes its place in the leg's order now: the guest may be answered any moment, and come back.
    pub(super) fn new(
        leg: &Arc<Leg>,
        port: usize,
        req: Request,
        room: Permit,
        announced: Option<Arc<Announced>>,
    ) -> Carrier {
        leg.begins(announced.as_ref());
        let freight = Freight { leg: leg.clone(), announced, _room: room };
        Carrier { port, place: leg.place(&req), req, freight }
    }

    /// Sends it when its turn has come.
    pub(super) fn run<'a>(self, cx: Cx<'a>) -> Flow<'a> {
        let Carrier { port, req, place, freight } = self;
        match place.now() {
            Ok(held) => freight.send(held, port, req, cx),
            Err(waiting) => Flow::later(async move {
                let held = waiting.await;
                freight.send(held, port, req, cx).await
            }),
        }
    }
}

impl Freight {
    fn send<'a>(self, held: RangeGuard<'static>, port: usize, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let op = req.op;
        if self.leg.is_let_go.load(Ordering::Acquire) {
            // It would only come after what does not end. That it is missing there is marked.
            return Flow::done();
        }
        cx.forward(port, req).then(move |reply| {
            self.leg.ended(cx, op, &reply);
            if let Some(announced) = &self.announced {
                announced.landed();
            }
            drop(self);
            drop(held);
            reply
        })
    }
}

impl Drop for Freight {
    fn drop(&mut self) {
        self.leg.ends(self.announced.as_ref());
    }
}
