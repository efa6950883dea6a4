//! What has landed at the copy and is perhaps not durable there: until a flush it may be forgotten.

use super::bits::Bits;
use super::{DirtyMap, Flights};
use blockmason::Reply;
use std::ops::Range;
use std::sync::Arc;

/// The granules in which changes have landed since the copy was flushed.
#[derive(Default)]
pub(super) struct Loose {
    /// Since the last flush has begun; none before the size of the disk is known.
    since: Option<Bits>,
    /// Before that, as long as that flush is on its way.
    flushing: Option<Bits>,
}

/// A flush of the copy, from before it is issued.
pub struct CopyFlush {
    map: Arc<DirtyMap>,
    /// Another one was on its way when it began: what this one covers is not known.
    counts: bool,
}

impl Loose {
    /// Changes have landed there, on a disk of so many granules.
    pub(super) fn add(&mut self, range: Range<u64>, granules: u64) {
        self.since.get_or_insert_with(|| Bits::new(granules, false)).change(range, true);
    }

    /// What a flush has not made durable waits for the next one.
    fn put_back(&mut self) {
        match (self.flushing.take(), &self.since) {
            (Some(flushing), Some(since)) => since.add(&flushing),
            (flushing, None) => self.since = flushing,
            (None, Some(_)) => {}
        }
    }
}

impl DirtyMap {
    /// A flush of the copy begins, which covers what has landed there before.
    pub fn flushing_copy(self: &Arc<Self>) -> CopyFlush {
        let mut flights = self.flights();
        let counts = !std::mem::replace(&mut flights.flushing_copy, true);
        if counts {
            flights.loose.flushing = flights.loose.since.take();
        }
        drop(flights);
        CopyFlush { map: self.clone(), counts }
    }

    /// The copy may have forgotten what is not durable there, and what was on its way.
    fn forget(&self, flights: &mut Flights) {
        flights.loose.put_back();
        let (lost, mut at) = (flights.loose.since.take(), 0..self.size());
        while let Some(run) = lost.as_ref().and_then(|lost| self.run_in(lost, &at)) {
            at.start = run.end;
            self.spoil(flights, &run, None);
            flights.regions.want(&run);
        }
        let flying: Vec<_> = flights.list.iter().map(|flight| flight.range.clone()).collect();
        flying.iter().for_each(|range| self.spoil(flights, range, None));
    }
}

impl CopyFlush {
    /// Says what has come of it. If it has failed, whatever has landed since the last one that succeeded is dirty.
    pub fn end(self, reply: Reply) -> Reply {
        let mut flights = self.map.flights();
        match &reply {
            Ok(_) if self.counts => flights.loose.flushing = None,
            Ok(_) => {}
            Err(_) => self.map.forget(&mut flights),
        }
        drop(flights);
        self.map.work.notify_one();
        reply
    }
}

impl Drop for CopyFlush {
    fn drop(&mut self) {
        if self.counts {
            let mut flights = self.map.flights();
            flights.flushing_copy = false;
            flights.loose.put_back();
        }
    }
}
