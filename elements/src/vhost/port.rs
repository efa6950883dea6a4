//! The device's half of a virtqueue: takes requests from the ring, completes them in batches, keeps the record of
//! what is in flight, interrupts the driver when it wants that, and logs what was written. Knows no graph.

use super::inflight::Tracked;
use super::log::DirtyLog;
use super::ring::Ring;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

/// Completions that are handed over together at the most. All of a turn at once would have device and driver take
/// turns: with 32 requests in flight, one works while the other waits.
const BATCH: usize = 16;

/// The same in bytes moved: what takes long to move is not kept back for others.
const BATCH_BYTES: u64 = 128 << 10;

/// Where writes are logged, while the guest migrates.
#[derive(Clone, Default)]
pub(crate) struct Logs {
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// The guest's address of the used ring, if writes to it are logged.
    pub(crate) used: Option<u64>,
}

/// See the module.
pub(crate) struct Port {
    ring: Ring,
    tracked: Option<Tracked>,
    event_idx: bool,
    /// The place in the available ring that comes next.
    next: u16,
    /// What the driver had made available when we looked last.
    seen: u16,
    /// Heads that were taken by another process, or given back: they come before all others.
    again: VecDeque<u16>,
    /// The number that the next request gets.
    counter: u64,
    /// idx of the used ring.
    used: u16,
    /// Completed and not published: heads, and the bytes written.
    done: Vec<(u16, u32)>,
    /// Bytes that these have moved.
    moved: u64,
    /// Interrupts the driver. None: it looks for itself.
    call: Option<Arc<OwnedFd>>,
    /// The driver has been interrupted since it said how.
    interrupted: bool,
    logs: Logs,
}

impl Port {
    /// A port that goes on where `ring` and `tracked` say. Without a record of what is in flight, or with a new one,
    /// that is at `next`.
    pub(crate) fn new(ring: Ring, tracked: Option<Tracked>, next: u16, event_idx: bool) -> Port {
        let used = ring.used_idx();
        let resumed = tracked.as_ref().map(|tracked| tracked.resume(used)).unwrap_or_default();
        let next = resumed.next.unwrap_or(next);
        Port {
            ring,
            tracked,
            event_idx,
            next,
            seen: next,
            again: resumed.heads.into(),
            counter: resumed.counter,
            used,
            done: Vec::new(),
            moved: 0,
            call: None,
            interrupted: false,
            logs: Logs::default(),
        }
    }

    pub(crate) fn ring(&self) -> &Ring {
        &self.ring
    }

    /// These were taken by another process, which has no record that says so.
    pub(crate) fn take_again(&mut self, heads: Vec<u16>) {
        if self.tracked.is_none() {
            self.again = heads.into();
        }
    }

    /// Those that were taken by another process and not by this one yet.
    pub(crate) fn not_taken_again(&self) -> impl Iterator<Item = u16> {
        self.again.iter().copied()
    }

    /// The same rings in other memory. Nothing is in flight.
    pub(crate) fn move_to(&mut self, ring: Ring) {
        self.ring = ring;
    }

    /// How many requests are to be executed again.
    pub(crate) fn unfinished(&self) -> usize {
        self.again.len()
    }

    /// The place in the available ring that comes next.
    pub(crate) fn next(&self) -> u16 {
        self.next
    }

    /// The head of the next chain that is there, now in flight.
    ///
    /// # Errors
    /// The ring makes no sense; nothing more can be taken from it.
    #[inline]
    pub(crate) fn take(&mut self) -> Result<Option<u16>, &'static str> {
        if let Some(head) = self.again.pop_front() {
            return Ok(Some(head));
        }
        if self.seen == self.next {
            self.seen = self.ring.avail_idx();
            if self.seen.wrapping_sub(self.next) > self.ring.size() {
                return Err("more requests than the ring has room for");
            }
            if self.seen == self.next {
                return Ok(None);
            }
        }
        let head = self.ring.avail_head(self.next);
        if head >= self.ring.size() {
            return Err("a request past the end of the ring");
        }
        if let Some(tracked) = &self.tracked {
            tracked.take(head, self.counter);
            self.counter = self.counter.wrapping_add(1);
        }
        self.next = self.next.wrapping_add(1);
        Ok(Some(head))
    }

    /// Asks for a kick when something comes. True if something has come meanwhile.
    pub(crate) fn ask_for_kick(&self) -> bool {
        self.ring.ask_for_kick(self.next, self.event_idx)
    }

    /// Kicks are of no use while we look by ourselves.
    pub(crate) fn ask_for_no_kick(&self) {
        self.ring.ask_for_no_kick(self.event_idx);
    }

    /// A request that was taken is done; the driver learns of it with the next [`publish`](Self::publish), which comes
    /// by itself once there are enough.
    #[inline]
    pub(crate) fn complete(&mut self, head: u16, written: u32, moved: u64) {
        self.done.push((head, written));
        self.moved += moved;
        if self.done.len() >= BATCH || self.moved >= BATCH_BYTES {
            self.publish();
        }
    }

    /// Forgets what was completed and not published.
    pub(crate) fn forget(&mut self) {
        self.done.clear();
    }

    /// Hands everything that was completed to the driver, with one interrupt if it wants one.
    #[inline]
    pub(crate) fn publish(&mut self) {
        if self.done.is_empty() {
            return;
        }
        let from = self.used;
        for (head, written) in &self.done {
            self.ring.put_used(self.used, *head, *written);
            self.used = self.used.wrapping_add(1);
            if let Some(tracked) = &self.tracked {
                tracked.link(*head);
            }
        }
        self.ring.publish(self.used);
        if let Some(tracked) = &self.tracked {
            tracked.settle(self.done.iter().map(|(head, _)| *head), self.used);
        }
        self.done.clear();
        self.moved = 0;
        if let (Some(log), Some(at)) = (&self.logs.log, self.logs.used) {
            self.ring
                .written(from, self.used)
                .for_each(|(offset, len)| log.mark(at.saturating_add(offset), len));
        }
        if !self.interrupted || self.ring.wants_interrupt(from, self.used, self.event_idx) {
            self.interrupt();
        }
    }

    fn interrupt(&mut self) {
        let Some(call) = &self.call else { return };
        self.interrupted = true;
        // It is an event counter that does not block: a full one has been told already.
        let _ = rustix::io::write(call, &1u64.to_ne_bytes());
    }

    /// How the driver is interrupted from now on. It is, once: what was published before may have been told to nobody.
    pub(crate) fn set_call(&mut self, call: Option<Arc<OwnedFd>>) {
        self.call = call;
        self.interrupt();
    }

    pub(crate) fn set_logs(&mut self, logs: Logs) {
        self.logs = logs;
    }

    /// So many bytes of the guest's memory have been written at this place.
    #[inline]
    pub(crate) fn mark(&self, at: NonNull<u8>, len: usize) {
        let Some(log) = &self.logs.log else { return };
        if let Some(guest) = self.ring.memory().guest_address(at) {
            log.mark(guest, len as u64);
        }
    }

    /// True if writes are logged.
    #[inline]
    pub(crate) fn is_logged(&self) -> bool {
        self.logs.log.is_some()
    }

    /// True if memory that it needs has been taken away.
    pub(crate) fn is_lost(&self) -> bool {
        self.ring.memory().is_lost()
            || self.tracked.as_ref().is_some_and(Tracked::is_lost)
            || self.logs.log.as_ref().is_some_and(|log| log.mapping().is_lost())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::inflight::Inflight;
    use crate::vhost::memory::Mapping;
    use crate::vhost::testing::{Driver, Piece, memory_file};
    use rustix::event::{EventfdFlags, eventfd};

    fn port(driver: &Driver, tracked: Option<Tracked>, next: u16) -> Port {
        Port::new(driver.ring(), tracked, next, true)
    }

    fn offer(driver: &mut Driver) -> u16 {
        let head = driver.add(&[Piece { at: 0, len: 16, write: true }]);
        driver.offer(head);
        head
    }

    #[test]
    fn requests_come_in_order_and_go_in_any() {
        let mut driver = Driver::new(4);
        let mut port = port(&driver, None, 0);
        assert_eq!(port.take(), Ok(None));
        let heads: Vec<_> = (0..4).map(|_| offer(&mut driver)).collect();
        let taken: Vec<_> = (0..4).map(|_| port.take().unwrap().unwrap()).collect();
        assert_eq!((taken, port.take()), (heads, Ok(None)));
        port.complete(2, 7, 0);
        port.complete(0, 1, 0);
        assert_eq!(driver.used(), []);
        port.publish();
        assert_eq!(driver.used(), [(2, 7), (0, 1)]);
    }

    #[test]
    fn a_ring_that_makes_no_sense_is_refused() {
        let mut driver = Driver::new(4);
        driver.offer(9);
        assert!(port(&driver, None, 0).take().is_err());
        assert!(port(&driver, None, 100).take().is_err());
    }

    #[test]
    fn the_driver_is_interrupted_when_it_wants_to_be() {
        let mut driver = Driver::new(4);
        let mut port = port(&driver, None, 0);
        let call = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let told = || {
            let mut bytes = [0; 8];
            rustix::io::read(&call, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
        };
        port.set_call(Some(call.clone()));
        assert_eq!(told(), 1, "whatever was published before");
        let serve = |driver: &mut Driver, port: &mut Port, event: u16| {
            driver.set_used_event(event);
            offer(driver);
            let head = port.take().unwrap().unwrap();
            port.complete(head, 1, 0);
            port.publish();
            driver.used();
            told()
        };
        assert_eq!(serve(&mut driver, &mut port, 0), 1);
        assert_eq!(serve(&mut driver, &mut port, 5), 0, "not before the sixth");
        assert_eq!(serve(&mut driver, &mut port, 2), 1);
    }

    #[test]
    fn whoever_comes_after_a_death_finds_what_was_in_flight() {
        let mut driver = Driver::new(8);
        let inflight = Arc::new(Inflight::create(1, 8).unwrap());
        let tracked = || Some(inflight.queue(0, 8).unwrap());
        let mut first = port(&driver, tracked(), 0);
        (0..5).for_each(|head| assert_eq!(offer(&mut driver), head));
        (0..4).for_each(|head| assert_eq!(first.take(), Ok(Some(head))));
        first.complete(1, 1, 0);
        first.publish();
        first.complete(3, 1, 0);
        // It dies here; the front-end tells the next one the idx of the used ring.
        let mut second = port(&driver, tracked(), 1);
        assert_eq!((second.unfinished(), second.next()), (3, 4));
        let heads: Vec<_> = (0..4).map(|_| second.take().unwrap().unwrap()).collect();
        assert_eq!(heads, [0, 2, 3, 4]);
        assert_eq!(second.take(), Ok(None));
    }

    #[test]
    fn what_is_written_is_logged() {
        let mut driver = Driver::new(4);
        let mut port = port(&driver, None, 0);
        let log = Arc::new(DirtyLog::new(Mapping::new(memory_file(4096), 0, 4096).unwrap()));
        port.set_logs(Logs { log: Some(log.clone()), used: Some(4096 * 9) });
        offer(&mut driver);
        let head = port.take().unwrap().unwrap();
        port.mark(driver.memory().get(driver.buffer(4095), 1).unwrap(), 2);
        port.complete(head, 2, 0);
        port.publish();
        // SAFETY: inside of the mapping.
        let byte = |at: u64| unsafe { log.mapping().at(at as usize).as_ptr().read_volatile() };
        assert_eq!(byte(1), 0b10, "the used ring");
        let page = driver.buffer(0) / 4096;
        assert_eq!(byte(page / 8) >> (page % 8) & 0b11, 0b11);
    }
}
