//! Which regions of a disk are known, durably, as such where marks may change.

use std::ops::Range;

/// The regions of a map that is kept in a file. Changed only by whoever holds the map's lock.
#[derive(Default)]
pub(super) struct Regions {
    /// Bytes of one; 0 while there is no file.
    bytes: u64,
    list: Vec<Region>,
    /// To be set by the next run.
    pub(super) wanted: Vec<usize>,
    /// To be taken back by the next run, if nothing is announced there before it ends.
    pub(super) resting: Vec<Resting>,
    /// Changes go to a second disk that is flushed apart.
    mirrored: bool,
    /// Flushes of that disk that have begun, and how many of them at least have covered everything before them.
    begun: u64,
    flushed: u64,
}

#[derive(Clone, Default)]
struct Region {
    /// It is set in the file, durably.
    durable: bool,
    /// How often something has been announced or has landed there.
    touched: u64,
    /// How often when somebody asked last.
    seen: u64,
    /// How many flushes of the second disk had begun then.
    at: u64,
}

/// A region as it was when nothing happened there.
#[derive(Clone, Copy, Debug)]
pub struct Resting {
    pub(super) region: usize,
    touched: u64,
}

impl Regions {
    /// Those of a file that was just opened.
    pub(super) fn reset(&mut self, bytes: u64, durable: impl IntoIterator<Item = bool>) {
        self.bytes = bytes;
        let at = self.begun;
        self.list = durable.into_iter().map(|durable| Region { durable, touched: 1, seen: 0, at }).collect();
    }

    /// The regions that a range of bytes touches.
    pub(super) fn of(&self, range: &Range<u64>) -> Range<usize> {
        if self.bytes == 0 || range.is_empty() {
            return 0..0;
        }
        let clip = |region: u64| (region as usize).min(self.list.len());
        clip(range.start / self.bytes)..clip(range.end.div_ceil(self.bytes))
    }

    /// The bytes of one.
    pub(super) fn bytes_of(&self, region: usize) -> Range<u64> {
        region as u64 * self.bytes..(region as u64 + 1) * self.bytes
    }

    /// True if marks of the range may change.
    pub(super) fn are_durable(&self, range: &Range<u64>) -> bool {
        self.list[self.of(range)].iter().all(|region| region.durable)
    }

    pub(super) fn is_durable(&self, region: usize) -> bool {
        self.list[region].durable
    }

    pub(super) fn any_durable(&self) -> bool {
        self.list.iter().any(|region| region.durable)
    }

    /// Has those of a range set that are not.
    pub(super) fn want(&mut self, range: &Range<u64>) {
        let missing =
            self.of(range).filter(|region| !self.list[*region].durable && !self.wanted.contains(region));
        let missing: Vec<_> = missing.collect();
        self.wanted.extend(missing);
    }

    pub(super) fn touch(&mut self, range: &Range<u64>) {
        let (at, of) = (self.begun, self.of(range));
        for region in &mut self.list[of] {
            region.touched += 1;
            region.at = at;
        }
    }

    pub(super) fn set_durable(&mut self, region: usize) {
        self.list[region].durable = true;
        self.touch(&self.bytes_of(region));
    }

    /// Those that nobody has touched since this was asked last; or, if `all`, since now. What is on its way is the
    /// caller's to know.
    pub(super) fn untouched(&mut self, all: bool) -> Vec<Resting> {
        let (mirrored, flushed) = (self.mirrored, self.flushed);
        let found = self.list.iter_mut().enumerate().filter(|(_, region)| region.durable);
        let found = found.filter_map(|(ix, region)| {
            let rests = std::mem::replace(&mut region.seen, region.touched) == region.touched || all;
            let covered = !mirrored || flushed > region.at;
            (rests && covered).then_some(Resting { region: ix, touched: region.touched })
        });
        found.collect()
    }

    /// Takes one back, unless somebody has touched it since. True if it is.
    pub(super) fn take_back(&mut self, resting: Resting) -> bool {
        let region = &mut self.list[resting.region];
        let rests = region.touched == resting.touched;
        region.durable &= !rests;
        rests
    }

    pub(super) fn mirror(&mut self) {
        self.mirrored = true;
    }

    /// A flush of the second disk begins. Its number.
    pub(super) fn begin_flush(&mut self) -> u64 {
        self.begun += 1;
        self.begun
    }

    pub(super) fn end_flush(&mut self, number: u64) {
        self.flushed = self.flushed.max(number);
    }
}
