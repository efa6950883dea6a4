//! The requests in flight, in memory that outlives this process: the front-end keeps it, and whoever serves
//! next executes again what was not completed. Source: vhost-user, "Inflight I/O tracking", split virtqueue.
//!
//! A process may be killed between any two stores; other processes then see exactly the stores before. So the
//! order of the stores is the protocol, and compiler and processor are kept to it by atomics.

use super::memory::Mapping;
use super::wire::InflightArea;
use blockmason::{Error, Result};
use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

/// Bytes of a queue's header: features, version, desc_num, last_batch_head, used_idx.
const HEADER: usize = 16;
/// Bytes of an entry: inflight, 5 of padding, next, counter.
const ENTRY: usize = 16;
/// Where a queue's part starts is a multiple of this.
const ALIGN: usize = 64;
const VERSION: u16 = 1;

const AT_VERSION: usize = 8;
const AT_COUNT: usize = 10;
const AT_LAST_BATCH: usize = 12;
const AT_USED: usize = 14;

fn part(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
}

/// The memory for all queues of a device.
#[derive(Debug)]
pub(crate) struct Inflight {
    area: InflightArea,
    mapping: Mapping,
}

impl Inflight {
    /// New memory, all zeros.
    pub(crate) fn create(queues: u16, entries: u16) -> Result<Inflight> {
        use rustix::fs::{MemfdFlags, SealFlags};
        let refused = |errno| Error::os(errno, "memory for the requests in flight cannot be made");
        let size = (part(entries) * usize::from(queues)) as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("requests-in-flight", flags).map_err(refused)?;
        rustix::fs::ftruncate(&fd, size).map_err(refused)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(refused)?;
        Inflight::open(InflightArea { size, offset: 0, queues, entries }, File::from(fd))
    }

    /// Memory that the front-end has kept.
    ///
    /// # Errors
    /// [`blockmason::Kind::Invalid`] if it is too small for what it is said to hold.
    pub(crate) fn open(area: InflightArea, file: File) -> Result<Inflight> {
        if area.size < (part(area.entries) * usize::from(area.queues)) as u64 || !area.offset.is_multiple_of(8) {
            return Err(Error::invalid("memory for the requests in flight is too small or not aligned"));
        }
        Ok(Inflight { area, mapping: Mapping::new(file, area.offset, area.size)? })
    }

    pub(crate) fn area(&self) -> InflightArea {
        self.area
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The part of one queue, whose ring has `size` entries.
    pub(crate) fn queue(self: &Arc<Self>, index: u16, size: u16) -> Result<Tracked> {
        if index >= self.area.queues || size > self.area.entries {
            return Err(Error::invalid("the memory for the requests in flight has no room for the queue"));
        }
        let start = self.mapping.at(part(self.area.entries) * usize::from(index));
        Ok(Tracked { inflight: self.clone(), start, size })
    }
}

/// The requests in flight of one queue.
#[derive(Debug)]
pub(crate) struct Tracked {
    inflight: Arc<Inflight>,
    start: NonNull<u8>,
    size: u16,
}

// SAFETY: the pointer leads into the mapping that `inflight` keeps, on whatever thread; all accesses are atomic.
unsafe impl Send for Tracked {}

/// Where a queue goes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resumed {
    /// The place in the available ring that comes next, unless the memory was new.
    pub(crate) next: Option<u16>,
    /// The heads to execute again, in the order in which they were taken.
    pub(crate) heads: Vec<u16>,
    /// The number that the next request gets.
    pub(crate) counter: u64,
}

impl Tracked {
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: inside of this queue's part of the mapping, aligned to two bytes; the mapping lives as
        // long as self.
        unsafe { AtomicU16::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// `head` is below the size, as all callers have made sure.
    fn entry(&self, head: u16) -> usize {
        assert!(head < self.size);
        HEADER + ENTRY * usize::from(head)
    }

    fn flag(&self, head: u16) -> &AtomicU8 {
        let offset = self.entry(head);
        // SAFETY: as in `u16_at`.
        unsafe { AtomicU8::from_ptr(self.start.as_ptr().add(offset)) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + 6)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        let offset = self.entry(head) + 8;
        // SAFETY: as in `u16_at`; entries are aligned to eight bytes.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// A request was taken from the available ring.
    #[inline]
    pub(crate) fn take(&self, head: u16, counter: u64) {
        self.counter(head).store(counter, Ordering::Relaxed);
        self.flag(head).store(1, Ordering::Release);
    }

    /// A request is about to be published, as one of a batch.
    #[inline]
    pub(crate) fn link(&self, head: u16) {
        let last = self.u16_at(AT_LAST_BATCH);
        self.next(head).store(last.load(Ordering::Relaxed), Ordering::Release);
        last.store(head, Ordering::Release);
    }

    /// A batch has been published: idx of the used ring is `used`.
    #[inline]
    pub(crate) fn settle(&self, heads: impl Iterator<Item = u16>, used: u16) {
        heads.for_each(|head| self.flag(head).store(0, Ordering::Release));
        self.u16_at(AT_USED).store(used, Ordering::Release);
    }

    /// Finds out what was in flight when the memory was last written, and makes it consistent. `used` is
    /// idx of the used ring.
    pub(crate) fn resume(&self, used: u16) -> Resumed {
        if self.u16_at(AT_VERSION).load(Ordering::Acquire) != VERSION {
            return self.begin(used);
        }
        self.finish_batch(used);
        let mut heads: Vec<_> = (0..self.size)
            .filter(|head| self.flag(*head).load(Ordering::Acquire) != 0)
            .map(|head| (self.counter(head).load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        let counter = heads.last().map_or(0, |(last, _)| last.wrapping_add(1));
        let next = Some(used.wrapping_add(heads.len() as u16));
        Resumed { next, heads: heads.into_iter().map(|(_, head)| head).collect(), counter }
    }

    /// The memory is new: nothing was in flight.
    fn begin(&self, used: u16) -> Resumed {
        (0..self.size).for_each(|head| self.flag(head).store(0, Ordering::Relaxed));
        self.u16_at(AT_COUNT).store(self.size, Ordering::Relaxed);
        self.u16_at(AT_USED).store(used, Ordering::Relaxed);
        self.u16_at(AT_VERSION).store(VERSION, Ordering::Release);
        Resumed::default()
    }

    /// A batch may have been published and not settled: its requests are done.
    fn finish_batch(&self, used: u16) {
        let settled = self.u16_at(AT_USED).load(Ordering::Acquire);
        let mut head = self.u16_at(AT_LAST_BATCH).load(Ordering::Acquire);
        // No batch is longer than the ring, whatever the memory says.
        for _ in 0..used.wrapping_sub(settled).min(self.size) {
            if head >= self.size {
                break;
            }
            self.flag(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Acquire);
        }
        self.u16_at(AT_USED).store(used, Ordering::Release);
    }

    /// True if its owner has cut the memory short.
    pub(crate) fn is_lost(&self) -> bool {
        self.inflight.mapping.is_lost()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tracked(size: u16) -> Tracked {
        Arc::new(Inflight::create(2, size).unwrap()).queue(1, size).unwrap()
    }

    #[test]
    fn new_memory_has_nothing_in_flight() {
        let tracked = tracked(8);
        assert_eq!(tracked.resume(5), Resumed::default());
        // And the second time it is known to be ours.
        assert_eq!(tracked.resume(5), Resumed { next: Some(5), heads: vec![], counter: 0 });
    }

    #[test]
    fn memory_that_is_too_small_is_refused() {
        let area = InflightArea { size: 64, offset: 0, queues: 1, entries: 128 };
        assert!(Inflight::open(area, crate::vhost::testing::memory_file(4096)).is_err());
        let inflight = Arc::new(Inflight::create(1, 8).unwrap());
        assert!(inflight.queue(1, 8).is_err() && inflight.queue(0, 16).is_err());
    }

    #[test]
    fn what_the_memory_says_is_not_believed() {
        let tracked = tracked(4);
        tracked.resume(0);
        tracked.u16_at(AT_LAST_BATCH).store(999, Ordering::Relaxed);
        assert_eq!(tracked.resume(60_000).heads, Vec::<u16>::new());
        // A circle.
        tracked.u16_at(AT_LAST_BATCH).store(1, Ordering::Relaxed);
        tracked.next(1).store(1, Ordering::Relaxed);
        tracked.take(2, 7);
        assert_eq!(tracked.resume(50_000).heads, [2]);
    }

    /// A step of serving. `Done` lists how many of those in flight are completed as one batch.
    #[derive(Clone, Debug)]
    enum Step {
        Take,
        Done(usize),
    }

    /// Where in completing a batch the process dies.
    #[derive(Clone, Copy, Debug)]
    enum Death {
        Linked,
        Published,
        Cleared(usize),
        Settled,
    }

    fn death() -> impl Strategy<Value = Death> {
        prop_oneof![
            Just(Death::Linked),
            Just(Death::Published),
            (0usize..5).prop_map(Death::Cleared),
            Just(Death::Settled)
        ]
    }

    proptest! {
        /// Whatever happened and wherever the process died: what was published is not executed again, what
        /// was not is, in the order in which it was taken.
        #[test]
        fn every_point_of_death(
            start in any::<u16>(),
            steps in proptest::collection::vec(
                prop_oneof![Just(Step::Take), (1usize..5).prop_map(Step::Done)], 0..60),
            last in 0usize..5,
            death in death(),
        ) {
            let size = 8;
            let tracked = tracked(size);
            tracked.resume(start);
            let (mut used, mut counter) = (start, 0);
            let mut taken: Vec<u16> = Vec::new();
            for step in steps {
                match step {
                    Step::Take => {
                        let Some(head) = (0..size).rev().find(|head| !taken.contains(head)) else { continue };
                        tracked.take(head, counter);
                        counter += 1;
                        taken.push(head);
                    }
                    Step::Done(n) => {
                        // Not in the order in which they were taken.
                        let batch: Vec<_> = taken.split_off(taken.len().saturating_sub(n));
                        batch.iter().for_each(|head| tracked.link(*head));
                        used = used.wrapping_add(batch.len() as u16);
                        tracked.settle(batch.into_iter(), used);
                    }
                }
            }
            let batch: Vec<_> = taken[..last.min(taken.len())].to_vec();
            batch.iter().for_each(|head| tracked.link(*head));
            let published = used.wrapping_add(batch.len() as u16);
            let done = match death {
                Death::Linked => false,
                Death::Published => { used = published; true }
                Death::Cleared(n) => {
                    used = published;
                    batch.iter().take(n).for_each(|head| tracked.flag(*head).store(0, Ordering::Relaxed));
                    true
                }
                Death::Settled => {
                    used = published;
                    tracked.settle(batch.iter().copied(), used);
                    true
                }
            };
            if done {
                taken.retain(|head| !batch.contains(head));
            }
            let resumed = tracked.resume(used);
            prop_assert_eq!(&resumed.heads, &taken);
            prop_assert_eq!(resumed.next, Some(used.wrapping_add(taken.len() as u16)));
            prop_assert!(resumed.counter <= counter);
            // Dying again before anything else happened changes nothing.
            prop_assert_eq!(tracked.resume(used), resumed);
        }
    }
}
