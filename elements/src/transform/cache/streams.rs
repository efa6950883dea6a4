//! Recognises reads that follow each other, and says what to read before it is asked for.

use std::ops::Range;

/// Streams that are followed at once.
const STREAMS: usize = 16;

/// A read that begins this far behind the last one, in bytes, still goes on with it: with several in flight they overtake
/// each other.
const GAP: u64 = 64 << 10;

/// What is read ahead at first, in bytes: as much as has been read, but no less.
const FIRST: u64 = 128 << 10;

#[derive(Default)]
struct Stream {
    /// Where the next read is expected.
    next: u64,
    /// Bytes that were read in a row.
    run: u64,
    /// Reads in a row, more than one of which is no accident.
    reads: u64,
    /// Up to where it has been read ahead.
    ahead: u64,
    used: u64,
}

/// What to do about a read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Advice {
    /// Keep what it brings.
    pub(super) keep: bool,
    /// Read this before anybody asks for it; perhaps empty.
    pub(super) ahead: Range<u64>,
}

pub(super) struct Streams {
    streams: Vec<Stream>,
    clock: u64,
    /// The most that is read ahead, in bytes; 0 is nothing.
    read_ahead: u64,
    /// A longer stream is not kept; 0 keeps them all.
    bypass: u64,
}

impl Streams {
    pub(super) fn new(read_ahead: u64, bypass: u64) -> Streams {
        Streams { streams: Vec::new(), clock: 0, read_ahead, bypass }
    }

    /// A read of `range` of a disk of `size` bytes.
    pub(super) fn read(&mut self, range: &Range<u64>, size: u64) -> Advice {
        self.clock += 1;
        let goes_on = |stream: &&mut Stream| (stream.next..=stream.next + GAP).contains(&range.start);
        let Some(stream) = self.streams.iter_mut().find(goes_on) else {
            self.begin(range);
            let keep = self.bypass == 0 || range.end - range.start <= self.bypass;
            return Advice { keep, ahead: 0..0 };
        };
        // Where guests read here and there, one read lies near another now and then, and what is read ahead then costs requests.
        let is_sure = stream.next == range.start || stream.reads > 1;
        stream.used = self.clock;
        stream.run += range.end - range.start;
        stream.reads += 1;
        stream.next = range.end;
        let keep = self.bypass == 0 || stream.run <= self.bypass;
        let window = stream.run.max(FIRST).min(self.read_ahead);
        let (from, to) = (stream.ahead.max(range.end), (range.end + window).min(size));
        // In halves of the window: not a read below for each read above.
        if !is_sure || window == 0 || from >= to || stream.ahead > range.end + window / 2 {
            return Advice { keep, ahead: 0..0 };
        }
        stream.ahead = to;
        Advice { keep, ahead: from..to }
    }

    fn begin(&mut self, range: &Range<u64>) {
        let new = Stream {
            next: range.end,
            run: range.end - range.start,
            reads: 1,
            ahead: range.end,
            used: self.clock,
        };
        if self.streams.len() < STREAMS {
            return self.streams.push(new);
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = new;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_recognised_and_read_ahead_more_and_more() {
        let mut streams = Streams::new(1 << 20, 8 << 20);
        let (mut at, mut ahead, mut asked) = (1 << 20, 0, Vec::new());
        let mut kept = 0;
        while at < 20 << 20 {
            let advice = streams.read(&(at..at + 4096), 1 << 30);
            at += 4096;
            kept += u64::from(advice.keep) * 4096;
            if !advice.ahead.is_empty() {
                assert!(ahead == 0 || advice.ahead.start == ahead, "no gap, and nothing twice");
                ahead = advice.ahead.end;
                asked.push(ahead - at);
            }
            assert!(ahead == 0 || ahead >= at, "the reader never catches up");
        }
        assert_eq!((asked[0], *asked.last().unwrap()), (FIRST, 1 << 20));
        assert!(asked.is_sorted() && asked.len() < 100, "{asked:?}");
        assert_eq!(kept, 8 << 20);
    }

    #[test]
    fn single_reads_are_no_stream_and_several_streams_are_told_apart() {
        let mut streams = Streams::new(1 << 20, 0);
        for at in [5, 900, 17, 400].map(|at: u64| at << 20) {
            assert_eq!(streams.read(&(at..at + 4096), 1 << 30), Advice { keep: true, ahead: 0..0 });
        }
        for at in [5, 900, 17].map(|at: u64| (at << 20) + 4096) {
            assert_eq!(streams.read(&(at..at + 4096), 1 << 30).ahead, at + 4096..at + 4096 + FIRST);
        }
    }

    #[test]
    fn a_read_near_another_is_no_stream_and_two_are() {
        let mut streams = Streams::new(1 << 20, 0);
        let mut ahead = |at: u64| streams.read(&(at..at + 4096), 1 << 30).ahead;
        assert!(ahead(0).is_empty() && ahead(20_480).is_empty());
        assert_eq!(ahead(40_960), 45_056..45_056 + FIRST);
    }

    #[test]
    fn nothing_is_read_ahead_beyond_the_end_or_where_it_is_off() {
        let mut streams = Streams::new(1 << 20, 0);
        streams.read(&(0..4096), 10000);
        assert_eq!(streams.read(&(4096..8192), 10000).ahead, 8192..10000);
        assert_eq!(streams.read(&(8192..10000), 10000).ahead, 0..0);
        let mut off = Streams::new(0, 0);
        off.read(&(0..4096), 1 << 20);
        assert_eq!(off.read(&(4096..8192), 1 << 20).ahead, 0..0);
    }
}
