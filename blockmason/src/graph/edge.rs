//! An edge, and what may travel it without help.

use crate::element::Demand;
use crate::geometry::{Geometry, NO_LIMIT};
use crate::request::{Op, Request};
use crate::sched::{Order, Traced};
use std::sync::Arc;

/// Leads from an out port to the element below.
pub(crate) struct Edge {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) port: Box<str>,
    /// Bits that offset and length of a request must not have: the block size, less one.
    pub(crate) mask: u64,
    /// True if changes hold their range: somebody reads, modifies and writes blocks of the element below, here
    /// or on another edge.
    pub(crate) locks: bool,
    /// The longest request.
    pub(crate) max_len: u64,
    /// Bit `op` is set if the element below can be handed requests of that operation as they are.
    ops: u8,
    /// The same, less those that have to be ordered first.
    unordered: u8,
    /// What orders overlapping requests that go by, if this is the place for that.
    pub(crate) order: Option<Order>,
    /// Size of the element below.
    pub(crate) size: u64,
    /// Of sampled requests only.
    pub(crate) traced: Arc<Traced>,
}

impl Edge {
    pub(crate) fn new(from: u32, port: &str, to: u32, below: &Geometry, demand: Demand) -> Edge {
        let ops = Op::ALL.into_iter().filter(|op| below.ops.has(*op)).fold(0, |ops, op| ops | 1 << op as u8);
        let max_len = below.max_len.min(demand.max_len);
        let mut edge = Edge {
            from,
            to,
            port: port.into(),
            mask: u64::from(below.min_block.max(demand.min_block)) - 1,
            locks: false,
            max_len: if max_len >= NO_LIMIT { u64::MAX } else { u64::from(max_len) },
            ops,
            unordered: ops,
            order: None,
            size: below.size,
            traced: Arc::default(),
        };
        if edge.mask > 0 {
            edge.lock_changes();
        }
        edge
    }

    /// Where blocks are read, modified and written, every change has to hold its range, whole blocks too: a
    /// write between the reading and the writing would be lost.
    pub(crate) fn lock_changes(&mut self) {
        self.locks = true;
        self.ops = Op::ALL
            .into_iter()
            .filter(|op| op.changes_data())
            .fold(self.ops, |ops, op| ops & !(1 << op as u8));
        self.unordered = self.ops;
    }

    /// Makes this a place where overlapping requests are ordered.
    pub(crate) fn set_order(&mut self, order: Order) {
        let ordered = Op::ALL.into_iter().filter(|op| op.locks()).fold(0, |ops, op| ops | 1 << op as u8);
        self.unordered = self.ops & !ordered;
        self.order = Some(order);
    }

    /// True if `req` can be handed to the element below as it is, and nothing else has to be done.
    #[inline]
    pub(crate) fn takes(&self, req: &Request) -> bool {
        self.unordered >> req.op as u8 & 1 != 0 && self.suits(req) && req.extra.is_none()
    }

    /// True if the element below can be handed `req` as it is.
    pub(crate) fn fits(&self, req: &Request) -> bool {
        self.ops >> req.op as u8 & 1 != 0 && self.suits(req)
    }

    #[inline]
    fn suits(&self, req: &Request) -> bool {
        (req.offset | req.len) & self.mask == 0 && req.len <= self.max_len
    }
}
