//! An open disk: how clusters are written and read, and what becomes of the rest of their slots.
//!
//! A cluster is written to the beginning of its slot. What an older, longer one has left behind it takes room until it
//! is discarded; but not before the new one is durable, since after a loss of power the old one may be there again
//! and be in need of it. So such places are remembered, and a flush of the element's own comes between.

use super::Counts;
use super::codec::{Codec, Stored};
use crate::transform::own::{Io, OUT};
use crate::transform::slots::{INLINE, Layout, Slotted, aside, damaged};
use blockmason::sched::{Mode, RangeLock};
use blockmason::{Answer, Cx, Data, Flags, Op, Reply, Request, Result};
use futures::future::join_all;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// So many slots are remembered at the most. What is forgotten takes room until its cluster is written again.
const MOST: usize = 1 << 16;
/// With so many of them nobody waits for the time to come.
pub(super) const MANY: usize = 1 << 12;

/// What all graphs of one element share.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) ranges: RangeLock,
    pub(super) counts: Counts,
    rests: Mutex<Rests>,
    /// There is something to discard.
    pub(super) wake: Notify,
}

/// The slots with something behind what is used of them.
#[derive(Default)]
struct Rests {
    next: u64,
    /// By the number of the cluster: which write it was, and the bytes that it uses.
    of: BTreeMap<u64, (u64, u64)>,
}

impl Shared {
    fn rests(&self) -> MutexGuard<'_, Rests> {
        // Every change of them is complete before anything can panic.
        self.rests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing of that slot is to be discarded: it is being written.
    fn forget(&self, cluster: u64) {
        self.rests().of.remove(&cluster);
    }

    /// How many slots have something to discard.
    pub(super) fn waiting(&self) -> usize {
        self.rests().of.len()
    }

    fn remember(&self, cluster: u64, used: u64) {
        let mut rests = self.rests();
        rests.next += 1;
        let number = rests.next;
        if rests.of.len() < MOST || rests.of.contains_key(&cluster) {
            rests.of.insert(cluster, (number, used));
        }
        let waiting = rests.of.len();
        drop(rests);
        if waiting == 1 || waiting == MANY {
            self.wake.notify_one();
        }
    }
}

pub(super) struct Volume {
    pub(super) layout: Layout,
    pub(super) codec: Codec,
    pub(super) shared: Arc<Shared>,
}

impl Volume {
    /// Writes one cluster of a request, whose range is held.
    async fn store_one(&self, number: u64, stored: Stored, req: &Request, cx: Cx<'_>) -> Result<()> {
        let mut write = cx.child(req);
        let place = self.layout.places(&(number * self.layout.block..number * self.layout.block)).start;
        (write.offset, write.len, write.data) = (place, stored.bytes.len() as u64, stored.bytes);
        let (used, counts) = (write.len, &self.shared.counts);
        self.shared.forget(number);
        cx.forward(OUT, write).await?;
        counts.taken.fetch_add(self.layout.block, Ordering::Relaxed);
        counts.stored.fetch_add(used, Ordering::Relaxed);
        if used < self.layout.slot {
            self.shared.remember(number, used);
        }
        if counts.count(stored.plain) {
            cx.notice("nothing of what is written can be compressed: is it encrypted above? Compress above `crypto`, not below");
        }
        Ok(())
    }

    /// Zeros are no cluster at all.
    async fn zero_one(&self, number: u64, req: &Request, cx: Cx<'_>) -> Result<()> {
        let block = self.layout.block;
        let places = self.layout.places(&(number * block..(number + 1) * block));
        self.shared.forget(number);
        let mut zero = cx.child(req);
        (zero.op, zero.data) = (Op::WriteZeroes, Data::empty());
        zero.flags = zero.flags.with(Flags::MAY_UNMAP);
        (zero.offset, zero.len) = (places.start, places.end - places.start);
        self.shared.counts.taken.fetch_add(block, Ordering::Relaxed);
        cx.forward(OUT, zero).await.map(drop)
    }

    /// Discards what lies behind clusters that were written before now. True if there was anything.
    ///
    /// # Errors
    /// The flush has failed, and all is as it was.
    pub(super) async fn trim(&self, cx: Cx<'_>) -> Result<bool> {
        let rests: Vec<_> = self.shared.rests().of.iter().map(|(cluster, rest)| (*cluster, *rest)).collect();
        if rests.is_empty() {
            return Ok(false);
        }
        let io = Io::background(cx);
        io.flush().await?;
        for (cluster, rest) in rests {
            self.trim_one(cluster, rest, &io).await;
        }
        Ok(true)
    }

    async fn trim_one(&self, cluster: u64, rest: (u64, u64), io: &Io<'_>) {
        let block = self.layout.block;
        let range = cluster * block..(cluster + 1) * block;
        let _held =
            self.shared.ranges.claim(io.holder("trim"), Mode::Exclusive, std::slice::from_ref(&range)).await;
        {
            let mut rests = self.shared.rests();
            // It may have been written again meanwhile, and that is not durable.
            if rests.of.get(&cluster) != Some(&rest) {
                return;
            }
            rests.of.remove(&cluster);
        }
        let places = self.layout.places(&range);
        // Only a hint: what it leaves takes room, and nothing else.
        if io.discard(places.start + rest.1..places.end).await.is_ok() {
            self.shared.counts.trimmed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The clusters of a request, in the order of the disk.
    fn split(&self, req: &Request) -> Vec<(u64, Data)> {
        let block = self.layout.block;
        let clusters = (req.offset / block..req.end() / block).zip(0..);
        let piece = |ix: u64| req.data.slice((ix * block) as usize..((ix + 1) * block) as usize);
        clusters.map(|(number, ix)| (number, piece(ix))).collect()
    }
}

/// Slots for clusters; none for one of zeros.
fn seal_all(codec: &Codec, clusters: Vec<(u64, Data)>) -> Result<Vec<(u64, Option<Stored>)>> {
    let seal = |(number, plain): (u64, Data)| match plain.is_zero() {
        true => Ok((number, None)),
        false => codec.seal(number, &plain).map(|stored| (number, Some(stored))),
    };
    clusters.into_iter().map(seal).collect()
}

/// The clusters in slots, from number `first` on; or the number of the first that is damaged.
fn open_all(codec: &Codec, slot: usize, first: u64, slots: &Data) -> Result<Data, u64> {
    let numbered = (first..).zip(0..slots.len() / slot);
    let open = |(number, ix): (u64, usize)| {
        codec.open(number, &slots.slice(ix * slot..(ix + 1) * slot)).ok_or(number)
    };
    Ok(Data::concat(numbered.map(open).collect::<Result<Vec<_>, u64>>()?))
}

impl Slotted for Volume {
    fn layout(&self) -> Layout {
        self.layout
    }

    fn ranges(&self) -> &RangeLock {
        &self.shared.ranges
    }

    async fn store(&self, req: Request, cx: Cx<'_>) -> Reply {
        let (clusters, codec) = (self.split(&req), self.codec);
        let stored = match req.len as usize <= INLINE {
            true => seal_all(&codec, clusters)?,
            false => aside(move || seal_all(&codec, clusters)).await??,
        };
        let writes = stored.into_iter().map(async |(number, stored)| match stored {
            Some(stored) => self.store_one(number, stored, &req, cx).await,
            None => self.zero_one(number, &req, cx).await,
        });
        // All have ended, whatever became of the others.
        join_all(writes).await.into_iter().collect::<Result<()>>()?;
        Ok(Answer::Done)
    }

    async fn open(&self, first: u64, slots: Data, cx: Cx<'_>) -> Result<Data> {
        let (codec, slot) = (self.codec, self.layout.slot as usize);
        let opened = match slots.len() / slot * codec.cluster <= INLINE {
            true => open_all(&codec, slot, first, &slots),
            false => aside(move || open_all(&codec, slot, first, &slots)).await?,
        };
        opened.map_err(|bad| damaged(bad, "what is stored for it is no cluster of this disk", cx))
    }
}
