//! What is asked of a store, counted by kind: what a bill is made of.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// A kind of request, as stores price them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    /// An object is put.
    Put,
    /// Bytes of an object are fetched.
    Get,
    /// An object is asked about.
    Head,
    /// Objects are listed.
    List,
    /// Objects are deleted.
    Delete,
}

impl Call {
    /// All of them, in the order of their numbers.
    pub(crate) const ALL: [Call; 5] = [Call::Put, Call::Get, Call::Head, Call::List, Call::Delete];

    /// The word of a bill.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Call::Put => "put",
            Call::Get => "get",
            Call::Head => "head",
            Call::List => "list",
            Call::Delete => "delete",
        }
    }
}

/// Requests and bytes of some time, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) requests: [u64; 5],
    pub(crate) bytes: [u64; 5],
}

impl Sum {
    pub(crate) fn add(&mut self, more: &Sum) {
        for ix in 0..Call::ALL.len() {
            self.requests[ix] = self.requests[ix].saturating_add(more.requests[ix]);
            self.bytes[ix] = self.bytes[ix].saturating_add(more.bytes[ix]);
        }
    }

    fn since(&self, before: &Sum) -> Sum {
        let (mut requests, mut bytes) = (self.requests, self.bytes);
        for ix in 0..Call::ALL.len() {
            requests[ix] -= before.requests[ix];
            bytes[ix] -= before.bytes[ix];
        }
        Sum { requests, bytes }
    }
}

/// Requests and bytes, by kind. Every attempt counts: it is paid for.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    requests: [AtomicU64; 5],
    bytes: [AtomicU64; 5],
    /// What has been on a bill.
    billed: Mutex<Sum>,
}

impl Counts {
    /// What has been counted since this was called last, by whomever: nothing is on two bills.
    pub(crate) fn take_unbilled(&self) -> Sum {
        let mut billed = self.billed.lock().unwrap_or_else(PoisonError::into_inner);
        let read = |counters: &[AtomicU64; 5]| counters.each_ref().map(|one| one.load(Ordering::Relaxed));
        // Read under the lock, the counters only grow: none is below what was billed.
        let now = Sum { requests: read(&self.requests), bytes: read(&self.bytes) };
        let unbilled = now.since(&billed);
        *billed = now;
        unbilled
    }

    pub(crate) fn add(&self, call: Call, bytes: u64) {
        self.requests[call as usize].fetch_add(1, Ordering::Relaxed);
        self.moved(call, bytes);
    }

    /// Bytes of a request that has been counted before.
    pub(crate) fn moved(&self, call: Call, bytes: u64) {
        self.bytes[call as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// How many requests of a kind there have been.
    pub(crate) fn requests(&self, call: Call) -> u64 {
        self.requests[call as usize].load(Ordering::Relaxed)
    }

    /// The bytes that they have moved.
    pub(crate) fn bytes(&self, call: Call) -> u64 {
        self.bytes[call as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_on_two_bills() {
        let counts = Counts::default();
        counts.add(Call::Put, 10);
        counts.add(Call::Get, 0);
        let mut sum = counts.take_unbilled();
        assert_eq!((sum.requests, sum.bytes), ([1, 1, 0, 0, 0], [10, 0, 0, 0, 0]));
        assert_eq!(counts.take_unbilled(), Sum::default());
        counts.moved(Call::Get, 7);
        counts.add(Call::Delete, 0);
        sum.add(&counts.take_unbilled());
        assert_eq!((sum.requests, sum.bytes), ([1, 1, 0, 0, 1], [10, 7, 0, 0, 0]));
        assert_eq!(counts.requests(Call::Put), 1);
    }
}
