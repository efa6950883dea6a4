//! The flight recorder: the last hops of sampled requests, for whoever looks after an error.

use crate::request::{Flags, Op, Origin, Request};
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Where a hop leads: over an edge, or from a client into a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// The graph.
    pub graph: String,
    /// The element above and its out port; None where a client's request enters.
    pub from: Option<(String, String)>,
    /// The element that it leads to.
    pub to: String,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.from {
            None => f.write_str(&self.to),
            Some((from, port)) if port == "out" => write!(f, "{from} -> {}", self.to),
            Some((from, port)) => write!(f, "({from}, {port}) -> {}", self.to),
        }
    }
}

/// One hop of a sampled request: from an edge into the element below, until its reply.
///
/// A request that the framework makes fit has one hop for itself, and below that one for each request
/// that was made of it.
#[derive(Clone, Debug)]
pub struct Hop {
    /// The request that entered at a source.
    pub root: u64,
    /// The request of this hop: the same on several hops where it was only handed on.
    pub request: u64,
    /// This hop's own number.
    pub number: u64,
    /// The hop in which it was made; None for a root's first.
    pub parent: Option<u64>,
    /// Where it led.
    pub way: Arc<Way>,
    /// The shard.
    pub shard: usize,
    /// What was asked.
    pub op: Op,
    /// Its modifiers.
    pub flags: Flags,
    /// Who asked.
    pub origin: Origin,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When it was submitted; of a root, when it was admitted.
    pub start: Instant,
    /// From submission to reply.
    pub took: Duration,
    /// What went wrong, if anything; at most [`LONGEST_ERROR`] bytes.
    pub error: Option<Box<str>>,
}

/// Bytes of an error's text that are kept.
pub const LONGEST_ERROR: usize = 256;

impl Hop {
    /// A hop that begins with `req`.
    pub(super) fn new(way: Arc<Way>, req: &Request, number: u64, shard: usize, start: Instant) -> Hop {
        Hop {
            root: req.root,
            request: req.id,
            number,
            parent: None,
            way,
            shard,
            op: req.op,
            flags: req.flags,
            origin: req.origin,
            offset: req.offset,
            len: req.len,
            start,
            took: Duration::ZERO,
            error: None,
        }
    }
}

impl fmt::Display for Hop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.way, self.op)?;
        if self.op.has_range() {
            write!(f, " of {} at {}", self.len, self.offset)?;
        }
        if self.flags != Flags::NONE {
            write!(f, ", {:?}", self.flags)?;
        }
        if self.origin != Origin::Guest {
            write!(f, ", {}", self.origin)?;
        }
        write!(f, ", took {:.1?}", self.took)?;
        self.error.iter().try_for_each(|error| write!(f, ": {error}"))
    }
}

/// How many hops a shard remembers. With the longest errors that is half a megabyte for each shard, and
/// the names of the graphs that they led through.
const HOPS: usize = 1024;

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

    /// The hops, in the order in which they ended.
    pub(crate) fn hops(&self) -> impl Iterator<Item = &Hop> {
        self.hops.iter()
    }
}

// What is said about memory above.
const _: () = assert!(HOPS * (size_of::<Hop>() + LONGEST_ERROR) <= 512 << 10);
