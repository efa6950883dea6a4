//! What is asked of a store, counted by kind: what a bill is made of.

use std::sync::atomic::{AtomicU64, Ordering};

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

/// Requests and bytes, by kind. Every attempt counts: it is paid for.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    requests: [AtomicU64; 5],
    bytes: [AtomicU64; 5],
}

impl Counts {
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
