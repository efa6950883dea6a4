//! The flight recorder: the last hops of sampled requests, for whoever looks after an error.

use std::collections::VecDeque;
use std::time::Duration;

/// One hop of a sampled request: from an edge into the element below, until its reply.
#[derive(Clone, Debug)]
pub struct Hop {
    /// The request that entered at a source.
    pub root: u64,
    /// The request of this hop.
    pub id: u64,
    /// The element.
    pub element: String,
    /// What was asked.
    pub op: &'static str,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// From submission to reply.
    pub took: Duration,
    /// What went wrong, if anything.
    pub error: Option<String>,
}

/// How many hops a shard remembers.
const HOPS: usize = 256;

/// A shard's last hops.
#[derive(Default)]
pub(crate) struct Recorder {
    hops: VecDeque<Hop>,
}

impl Recorder {
    pub(crate) fn record(&mut self, hop: Hop) {
        if self.hops.len() == HOPS {
            self.hops.pop_front();
        }
        self.hops.push_back(hop);
    }

    /// The hops, oldest first.
    pub(crate) fn dump(&self) -> Vec<Hop> {
        self.hops.iter().cloned().collect()
    }
}
