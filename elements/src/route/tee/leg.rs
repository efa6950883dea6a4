//! A leg of a tee: what is on its way there after the guest has been answered, and what fails there.

use super::announced::Announced;
use blockmason::sched::{Budget, Holder, Mode, Permit, RangeGuard, RangeLock, Waiting};
use blockmason::{Cx, Flow, Op, Reply, Request};
use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

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
    /// Changes that have been sent and have not ended.
    unfinished: Mutex<Vec<Arc<Announced>>>,
    pub(super) errors: AtomicU64,
    pub(super) skipped: AtomicU64,
    /// A bit for each operation that has failed the last time.
    failing: AtomicU8,
}

impl Leg {
    /// A leg that may be `lag` bytes behind.
    pub(super) fn new(name: &str, lag: u64) -> Leg {
        Leg {
            name: name.to_owned(),
            order: Arc::default(),
            next: AtomicU64::new(0),
            room: Budget::new(lag),
            unfinished: Mutex::default(),
            errors: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            failing: AtomicU8::new(0),
        }
    }

    fn unfinished(&self) -> MutexGuard<'_, Vec<Arc<Announced>>> {
        // Every change of the list is complete before anything can panic.
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

    /// Waits for room.
    pub(super) async fn room(&self, req: &Request) -> Permit {
        self.room.take(load(req)).await
    }

    /// A change is not sent here. What is on its way may end later and look as if it were the newest.
    pub(super) fn skip(&self, announced: &Announced) {
        self.skipped.fetch_add(1, Ordering::Relaxed);
        announced.differ();
        let range = announced.range();
        let overlaps = |earlier: &&Arc<Announced>| {
            earlier.range().start < range.end && range.start < earlier.range().end
        };
        self.unfinished().iter().filter(overlaps).for_each(|earlier| earlier.differ());
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
        leg.unfinished().extend(announced.clone());
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
        let Some(announced) = &self.announced else { return };
        let mut unfinished = self.leg.unfinished();
        if let Some(ix) = unfinished.iter().position(|other| Arc::ptr_eq(other, announced)) {
            unfinished.swap_remove(ix);
        }
    }
}
