//! The requests of a log as a stream into a graph, at the times at which they came.

use blockmason::data::Data;
use blockmason::graph::{Histogram, OpReading};
use blockmason::rt::Timer;
use blockmason::sched::{Admit, Stream};
use blockmason::{Op, Reply, Request, Result};
use blockmason_elements::workload::Record;
use std::cell::{Cell, RefCell};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc::Receiver;
use tokio::time::Instant;

/// What is written is pieces of so many bytes.
const PIECE: usize = 1 << 20;

/// How a log is replayed.
pub(super) struct Way {
    /// How many times as fast as it was; None: as fast as `depth` in flight allow.
    pub(super) speed: Option<f64>,
    /// Requests in flight, at most.
    pub(super) depth: u32,
    /// Requests that change the disk are asked for, too.
    pub(super) writes: bool,
    /// Bytes of the disk.
    pub(super) size: u64,
}

/// What came of a log, besides what the graph counts itself.
#[derive(Default)]
pub(super) struct Came {
    /// How late requests were asked for, at a speed.
    pub(super) late: OpReading,
    /// Those that would have changed the disk, and those that reach past its end.
    pub(super) left_out: u64,
    pub(super) beyond: u64,
    /// What was asked for, by operation, with what it took when it was recorded.
    pub(super) recorded: Vec<OpReading>,
    /// The log could not be read any further.
    pub(super) error: Option<blockmason::Error>,
}

/// Nothing has been counted.
pub(super) fn nothing() -> OpReading {
    OpReading { latency: vec![0; Histogram::BUCKETS], ..OpReading::default() }
}

/// Counts a record.
pub(super) fn count(reading: &mut OpReading, record: &Record) {
    reading.requests += 1;
    reading.bytes += if matches!(record.op, Op::Read | Op::Write) { record.len } else { 0 };
    reading.errors += u64::from(record.errno != 0);
    reading.latency[Histogram::bucket(record.took.as_nanos() as u64)] += 1;
}

pub(super) struct Replay {
    way: Way,
    from: RefCell<Receiver<Result<Vec<Record>>>>,
    /// Those that come next, the next one last.
    next: RefCell<Vec<Record>>,
    /// When the first one was asked for, and when it had come by the log.
    begun: Cell<Option<(Instant, Duration)>>,
    timer: RefCell<Timer>,
    in_flight: Cell<u32>,
    data: Data,
    came: RefCell<Came>,
}

impl Replay {
    pub(super) fn new(way: Way, from: Receiver<Result<Vec<Record>>>) -> Replay {
        let mut bytes = vec![0; if way.writes { PIECE } else { 0 }];
        fastrand::fill(&mut bytes);
        let came = Came { late: nothing(), recorded: vec![nothing(); Op::ALL.len()], ..Came::default() };
        Replay {
            way,
            from: RefCell::new(from),
            next: RefCell::default(),
            begun: Cell::new(None),
            timer: RefCell::new(Timer::new(Duration::ZERO)),
            in_flight: Cell::new(0),
            data: Data::shared(bytes),
            came: RefCell::new(came),
        }
    }

    /// What has come of it so far.
    pub(super) fn outcome(&self) -> Came {
        self.came.take()
    }

    /// The next record that is to be asked for; None at the end.
    fn poll_record(&self, task: &mut Context<'_>) -> Poll<Option<Record>> {
        loop {
            let last = self.next.borrow().last().copied();
            if let Some(record) = last {
                if self.is_wanted(&record) {
                    return Poll::Ready(Some(record));
                }
                self.next.borrow_mut().pop();
                continue;
            }
            match std::task::ready!(self.from.borrow_mut().poll_recv(task)) {
                None => return Poll::Ready(None),
                Some(Ok(mut records)) => {
                    records.reverse();
                    *self.next.borrow_mut() = records;
                }
                Some(Err(error)) => {
                    self.came.borrow_mut().error = Some(error);
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_wanted(&self, record: &Record) -> bool {
        let mut came = self.came.borrow_mut();
        if record.op.changes_data() && !self.way.writes {
            came.left_out += 1;
            return false;
        }
        let fits = record.offset.checked_add(record.len).is_some_and(|end| end <= self.way.size);
        let may_be = !matches!(record.op, Op::Read | Op::Write)
            || record.len <= u64::from(blockmason::geometry::MAX_REQUEST);
        if record.op.has_range() && !(fits && may_be) {
            came.beyond += 1;
            return false;
        }
        true
    }

    /// Waits until a record is due. How late it is.
    fn poll_due(&self, record: &Record, speed: f64, task: &mut Context<'_>) -> Poll<Duration> {
        let now = blockmason::rt::now();
        let (begun, first) = self.begun.get().unwrap_or((now, record.at));
        self.begun.set(Some((begun, first)));
        let due = begun + record.at.saturating_sub(first).div_f64(speed);
        if let Some(late) = now.checked_duration_since(due) {
            return Poll::Ready(late);
        }
        let mut timer = self.timer.borrow_mut();
        timer.reset(due - now);
        std::task::ready!(timer.poll(task));
        Poll::Ready(blockmason::rt::now().saturating_duration_since(due))
    }

    fn request(&self, record: &Record) -> Request {
        let mut request = Request::new(record.op, record.offset, record.len);
        request.flags = record.flags;
        if record.op == Op::Write {
            let len = record.len as usize;
            let pieces = (0..len).step_by(PIECE).map(|at| self.data.slice(0..PIECE.min(len - at)));
            request.data = Data::concat(pieces.collect::<Vec<_>>());
        }
        request
    }
}

impl Stream for Replay {
    type Tag = ();

    fn poll_next(&self, task: &mut Context<'_>) -> Poll<Admit<()>> {
        // With the depth in flight the next reply polls this again.
        if self.in_flight.get() >= self.way.depth {
            return Poll::Pending;
        }
        let Some(record) = std::task::ready!(self.poll_record(task)) else { return Poll::Ready(Admit::End) };
        if let Some(speed) = self.way.speed {
            let late = std::task::ready!(self.poll_due(&record, speed, task));
            let came = &mut self.came.borrow_mut().late;
            came.requests += 1;
            came.latency[Histogram::bucket(late.as_nanos() as u64)] += 1;
        }
        self.next.borrow_mut().pop();
        count(&mut self.came.borrow_mut().recorded[record.op as usize], &record);
        self.in_flight.set(self.in_flight.get() + 1);
        Poll::Ready(Admit::Request((), self.request(&record)))
    }

    fn reply(&self, (): (), _reply: Reply) {
        // The framework counts it, an error too.
        self.in_flight.set(self.in_flight.get() - 1);
    }

    fn poll_flush(&self, _task: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}
