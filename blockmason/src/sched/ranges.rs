//! Byte ranges that requests hold while they work on them: first come, first served.

use super::sync::{Mutex, MutexGuard};
use crate::request::Request;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::ops::{Deref, Range};
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use tokio::time::Instant;

/// Orders those who want overlapping ranges by arrival. A claim that waits blocks later overlapping
/// ones, shared ones too, so nobody starves. Shared by all shards.
///
/// Claims know nothing of each other, also if they are made for one root request: whoever holds a range
/// must not wait for another one that overlaps it, and takes all ranges that it needs by one claim.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

/// How a range is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Along with others that hold it so: to read.
    Shared,
    /// Alone: to change what is there.
    Exclusive,
}

/// For whom a range is held: for listings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The root request.
    pub root: u64,
    /// What it does, by the word of [`crate::Op::name`] or another one.
    pub doing: &'static str,
}

impl Holder {
    /// Whoever works on a request.
    pub fn of(req: &Request) -> Holder {
        Holder { root: req.root, doing: req.op.name() }
    }
}

/// A claim as it stands: what a listing shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// For whom.
    pub holder: Holder,
    /// How.
    pub mode: Mode,
    /// What.
    pub ranges: Vec<Range<u64>>,
    /// When it was made.
    pub since: Instant,
    /// How many earlier claims it still waits for, counted once for each pair of ranges that overlap. It
    /// holds its ranges if there are none.
    pub waits_for: usize,
}

#[derive(Default)]
struct State {
    arrivals: u64,
    /// One for each claimed range, in any order. In flight are tens, rarely hundreds: scanning these,
    /// packed, beats a tree.
    ranges: Vec<Range<u64>>,
    /// What else is known of each range.
    slots: Vec<Slot>,
    /// Unused places in both; the lowest is used first and the end is cut off, so that both stay as
    /// short as the claims allow. Places behind the end may linger.
    free: BinaryHeap<Reverse<u32>>,
    /// Claims that do not hold their ranges yet.
    waiting: usize,
}

/// In the place of a range that nobody claims. Overlaps nothing.
const FREE: Range<u64> = Range { start: u64::MAX, end: 0 };

struct Slot {
    arrival: u64,
    mode: Mode,
    /// The slot of the claim's first range.
    head: u32,
    /// In the head only.
    claim: Option<Head>,
}

struct Head {
    holder: Holder,
    since: Instant,
    waits_for: usize,
    waker: Option<Waker>,
    /// The slots of the claim's further ranges.
    more: Vec<u32>,
}

#[inline]
fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl State {
    /// The slots whose claims conflict with one of this range.
    fn conflicts(&self, range: &Range<u64>, mode: Mode) -> impl Iterator<Item = usize> {
        let overlapping = self.ranges.iter().enumerate().filter(move |(_, other)| overlap(range, other));
        overlapping
            .map(|(ix, _)| ix)
            .filter(move |ix| mode == Mode::Exclusive || self.slots[*ix].mode == Mode::Exclusive)
    }

    fn insert(&mut self, range: Range<u64>, slot: Slot) -> u32 {
        match self.free.pop() {
            Some(Reverse(ix)) if (ix as usize) < self.slots.len() => {
                self.ranges[ix as usize] = range;
                self.slots[ix as usize] = slot;
                ix
            }
            _ => {
                // The lowest free place lies behind the end, and so do all others.
                self.free.clear();
                self.ranges.push(range);
                self.slots.push(slot);
                self.slots.len() as u32 - 1
            }
        }
    }

    fn remove(&mut self, ix: u32) -> Range<u64> {
        let range = std::mem::replace(&mut self.ranges[ix as usize], FREE);
        self.free.push(Reverse(ix));
        while self.ranges.last() == Some(&FREE) {
            self.ranges.pop();
            self.slots.pop();
        }
        range
    }

    /// Tells the claims behind a freed range that they wait for one less. Those that now hold their
    /// ranges leave their wakers.
    fn freed(&mut self, range: &Range<u64>, mode: Mode, arrival: u64, wakers: &mut Vec<Waker>) {
        let later = |ix: &usize| self.slots[*ix].arrival > arrival;
        let behind: Vec<usize> = self.conflicts(range, mode).filter(later).collect();
        for ix in behind {
            let head = self.slots[ix].head as usize;
            let Some(claim) = &mut self.slots[head].claim else { continue };
            claim.waits_for -= 1;
            if claim.waits_for == 0 {
                wakers.extend(claim.waker.take());
                self.waiting -= 1;
            }
        }
    }
}

impl RangeLock {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place in the order now, for all of `ranges` at once; the guard comes when no earlier claim
    /// is left that one of them conflicts with. Dropping what this returns, at any time, gives the place
    /// up. Ranges of one claim may overlap each other.
    pub fn claim(&self, holder: Holder, mode: Mode, ranges: &[Range<u64>]) -> Waiting<'_> {
        self.join(holder, mode, ranges).of(Lock::Borrowed(self))
    }

    /// As [`claim`](Self::claim), for a place in the order that is taken now and used by a flow that
    /// outlives the caller: one that is detached.
    pub fn claim_shared(
        self: &Arc<Self>,
        holder: Holder,
        mode: Mode,
        ranges: &[Range<u64>],
    ) -> Waiting<'static> {
        self.join(holder, mode, ranges).of(Lock::Shared(self.clone()))
    }

    fn join(&self, holder: Holder, mode: Mode, ranges: &[Range<u64>]) -> Joined {
        let since = crate::rt::now();
        let (first, more) = ranges.split_first().map_or((&(0..0), ranges), |(first, more)| (first, more));
        let mut state = self.state();
        let waits_for = ranges.iter().map(|range| state.conflicts(range, mode).count()).sum();
        let arrival = state.arrivals;
        state.arrivals += 1;
        state.waiting += usize::from(waits_for > 0);
        let head = state.insert(first.clone(), Slot { arrival, mode, head: 0, claim: None });
        let slot =
            |range: &Range<u64>| state.insert(range.clone(), Slot { arrival, mode, head, claim: None });
        let more = more.iter().map(slot).collect();
        let slot = &mut state.slots[head as usize];
        slot.head = head;
        slot.claim = Some(Head { holder, since, waits_for, waker: None, more });
        Joined { head, granted: waits_for == 0 }
    }

    fn release(&self, head: u32) {
        let mut wakers = Vec::new();
        let mut state = self.state();
        let slot = &mut state.slots[head as usize];
        let (arrival, mode) = (slot.arrival, slot.mode);
        let Some(claim) = slot.claim.take() else { return };
        let freed = state.remove(head);
        let more: Vec<_> = claim.more.into_iter().map(|ix| state.remove(ix)).collect();
        state.waiting -= usize::from(claim.waits_for > 0);
        if state.waiting > 0 {
            for range in std::iter::once(&freed).chain(&more) {
                state.freed(range, mode, arrival, &mut wakers);
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Claims one range alone, for an element's own bookkeeping.
    pub fn lock(&self, range: Range<u64>) -> Waiting<'_> {
        self.claim(Holder { root: 0, doing: "internal" }, Mode::Exclusive, &[range])
    }

    /// Every claim, in the order of arrival: who holds, who waits, since when. For a drain that does not
    /// end.
    pub fn claims(&self) -> Vec<Claim> {
        let state = self.state();
        let mut found = Vec::new();
        for (slot, range) in state.slots.iter().zip(&state.ranges) {
            let Some(head) = &slot.claim else { continue };
            let more = head.more.iter().map(|ix| &state.ranges[*ix as usize]);
            let claim = Claim {
                holder: head.holder,
                mode: slot.mode,
                ranges: std::iter::once(range).chain(more).cloned().collect(),
                since: head.since,
                waits_for: head.waits_for,
            };
            found.push((slot.arrival, claim));
        }
        drop(state);
        found.sort_by_key(|(arrival, _)| *arrival);
        found.into_iter().map(|(_, claim)| claim).collect()
    }
}

/// A claim that has just been made, to be given to whoever keeps the lock.
struct Joined {
    head: u32,
    granted: bool,
}

impl Joined {
    fn of(self, lock: Lock<'_>) -> Waiting<'_> {
        Waiting { guard: Some(RangeGuard { lock, head: self.head }), granted: self.granted }
    }
}

/// A place in the order.
#[must_use = "dropping it gives the place up"]
pub struct Waiting<'a> {
    guard: Option<RangeGuard<'a>>,
    /// It held its ranges when the claim was made.
    granted: bool,
}

impl<'a> Waiting<'a> {
    /// The guard if it is here already, without a future to poll.
    pub fn now(mut self) -> Result<RangeGuard<'a>, Waiting<'a>> {
        match self.guard.take() {
            Some(guard) if self.granted => Ok(guard),
            guard => Err(Waiting { guard, granted: false }),
        }
    }
}

impl<'a> Future for Waiting<'a> {
    type Output = RangeGuard<'a>;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let guard = self.guard.take().expect("a future is not polled after its end");
        if self.granted {
            return Poll::Ready(guard);
        }
        let mut state = guard.lock.state();
        let waits = state.slots[guard.head as usize].claim.as_mut().is_some_and(|claim| {
            let waits = claim.waits_for > 0;
            claim.waker = waits.then(|| task.waker().clone());
            waits
        });
        drop(state);
        if !waits {
            return Poll::Ready(guard);
        }
        self.guard = Some(guard);
        Poll::Pending
    }
}

/// Holds ranges until it is dropped.
pub struct RangeGuard<'a> {
    lock: Lock<'a>,
    head: u32,
}

/// What a guard keeps its lock by.
enum Lock<'a> {
    Borrowed(&'a RangeLock),
    Shared(Arc<RangeLock>),
}

impl Deref for Lock<'_> {
    type Target = RangeLock;

    fn deref(&self) -> &RangeLock {
        match self {
            Lock::Borrowed(lock) => lock,
            Lock::Shared(lock) => lock,
        }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.head);
    }
}
