//! A write-ahead log in front of a disk: after a crash the disk is as it was after some change, with
//! all changes before it and none after.

mod format;
mod maintain;
mod state;
#[cfg(test)]
mod tests;

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Outs, Ports, Survives};
use blockmason::sched::Coalesced;
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Flags, Flow, Geometry, Kind, LocalBoxFuture, Op, Ops,
    Prepared, Reply, Request, Result, Until,
};
use format::{Kind as Change, Record, Superblock};
use futures::future::{Either, join_all, select};
use state::{Fate, Reserved, Room, State, cancelled};
use std::ops::Range;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

blockmason::params! {
    /// A write-ahead log.
    struct Params {
        /// Makes a log of a device that carries something else, which is lost. Without it only a device
        /// that is all zeros becomes a log.
        format: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "wal",
    summary: "a write-ahead log: a crash leaves the disk as it was after some write",
    doc: "Every change (write, zeros, discard) goes to the log at `log` first, and from there to the disk at \
          `out`. It is answered when it and all changes before it are written in the log; a flush or FUA \
          when the log has been flushed. A change is written to the disk only when its record is durable.\n\n\
          After a crash the changes in the log are made again before the first request is served, up to \
          the first record that is missing or torn. The disk is then as it was after some change, with all \
          before it and none after: a prefix, which reaches at least to the last flush; after the death of \
          this process alone, to the last answer. Writes of more than 1 MiB, or a quarter of the log, are \
          several changes. A shorter one is there as a whole or not at all, whatever the disks below do to a write \
          that is cut off: that is what `crypto` needs of the disk below it.\n\n\
          Reads see changes that are not on the disk yet. When the log is full, changes wait until it has \
          been emptied. When the disk fails, changes go on as long as the log has room; when the log \
          fails, they fail.\n\n\
          The size of the log is that of the device below `log`; 64 MiB is plenty. The log and its disk belong \
          together: neither is to be used without the other, except after both have been stopped \
          and `used` was 0. A log that belongs to a disk of another size, or a device that is neither a \
          log nor all zeros, is refused. The format is described in docs/formats/wal.md.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports { input: true, out: Outs::Named(&["out", "log"]) },
    handlers: &[
        Handler { name: "used", access: Access::Read, doc: "bytes of the log that are in use" },
        Handler { name: "pending", access: Access::Read, doc: "changes that are not on the disk yet" },
        Handler { name: "sequence", access: Access::Read, doc: "the number of the next change" },
        Handler {
            name: "checkpoint",
            access: Access::Call,
            doc: "begins to flush the disk and to empty the log; tries again what has failed",
        },
    ],
    layout: true,
    tuning: &["format"],
    handover: Handover::Gate,
    survives: Survives::Power,
    example: "element Guest (type nbd) (listen unix:wal.sock)\n\
              element Wal (type wal)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              element Log (type file) (path disk.log) (size 16M)\n\
              Guest -> Wal\n\
              (Wal, out) -> Disk\n\
              (Wal, log) -> Log\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let log = Log { format: build.read(Params::from)?.format, ..Log::default() };
        Ok(Arc::new(Wal(Arc::new(log))))
    },
    ..ElementType::BASE
};

/// The ports.
const DISK: usize = 0;
const LOG: usize = 1;

/// How long after a failure of the disk the changes are tried again.
const PATIENCE: Duration = Duration::from_secs(5);

/// What lies below, in one graph.
struct Below {
    disk: u64,
    log: Geometry,
}

struct Wal(Arc<Log>);

#[derive(Default)]
struct Log {
    format: bool,
    /// None until it has been recovered.
    state: Mutex<Option<State>>,
    /// Told of whatever happens to the state.
    changed: Notify,
    /// Recovery, checkpoints: one at a time.
    maintenance: Coalesced,
    wanted: Notify,
}

impl Log {
    fn state(&self) -> MutexGuard<'_, Option<State>> {
        // Every change of the state is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the state, if there is one, or changes it.
    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> Option<T> {
        self.state().as_mut().map(look)
    }

    /// Changes the state and tells whoever waits for it.
    fn update(&self, change: impl FnOnce(&mut State)) {
        self.with(change);
        self.changed.notify_waiters();
    }

    /// Waits until `look` finds something. Of a log that has been recovered.
    async fn wait<T>(&self, mut look: impl FnMut(&mut State) -> Option<T>) -> T {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(found) = self.with(&mut look).flatten() {
                return found;
            }
            changed.await;
        }
    }

    /// Makes a change.
    async fn change(self: &Arc<Self>, mut req: Request, cx: Cx<'_>) -> Reply {
        self.recovered(cx).await?;
        req.stabilise();
        let longest = self.with(|state| state.log.payload()).unwrap_or(0);
        let piece = if req.op == Op::Write { longest } else { req.len };
        let mut fate = Fate::default();
        for from in (0..req.len).step_by(piece as usize) {
            let part = req.part(from, piece.min(req.len - from), req.offset + from);
            fate = self.record(&part, cx).await?;
        }
        self.decided(&fate).await?;
        if req.is_fua() {
            cx.forward(LOG, own(cx, Request::flush())).await?;
        }
        Ok(Answer::Done)
    }

    /// Gives a change its place in the log, and sends it on its way.
    async fn record(self: &Arc<Self>, req: &Request, cx: Cx<'_>) -> Result<Fate> {
        let range = req.offset..req.end();
        let record = Record { sequence: 0, kind: Change::of(req), range, data: req.data.clone() };
        let mut tied = like(req, own(cx, record.request()));
        cx.watch(&mut tied);
        let data = std::mem::replace(&mut tied.data, Data::empty());
        let waiting = Waiting::join(self);
        let reserved = loop {
            match self.wait(|state| state.reserve(waiting.ticket, &record, &tied)).await {
                Room::Here(reserved) => break reserved,
                Room::Maintain => self.maintain(cx).await?,
            }
        };
        drop(waiting);
        let fate = reserved.fate.clone();
        tied.data = data;
        self.carry(req, tied, reserved, cx);
        Ok(fate)
    }

    /// Writes a record to the log and, when that is durable, the change to the disk; detached, since
    /// the client is answered in between.
    fn carry(self: &Arc<Self>, req: &Request, mut data: Request, reserved: Reserved, cx: Cx<'_>) {
        let (sequence, fate) = (reserved.record.sequence, reserved.fate.clone());
        let mut carrier = Carrier { log: self.clone(), sequence, landed: false };
        let writes = match write_ahead(req, &mut data, reserved, cx) {
            Ok(writes) => writes,
            Err(error) => return carrier.land(Err(error)),
        };
        drop(cx.detach_with(move |cx| {
            Flow::later(async move {
                let writes = writes.into_iter().map(|write| cx.forward(LOG, write));
                let written: Result<Vec<_>> = join_all(writes).await.into_iter().collect();
                carrier.land(written.map(drop));
                carrier.log.decided(&fate).await?;
                carrier.apply(cx.forward(DISK, data).await.map(drop));
                if carrier.log.with(|state| state.is_due()) == Some(true) {
                    carrier.log.maintain(cx).await?;
                }
                Ok(Answer::Done)
            })
        }));
    }

    /// Waits until it is known whether a record, and all before it, are in the log.
    async fn decided(&self, fate: &Fate) -> Result<()> {
        self.wait(|_| fate.get().cloned()).await
    }

    /// Waits until the changes so far are on the disk, as far as they touch `range`.
    async fn applied(&self, range: Range<u64>) -> Result<()> {
        let now = self.with(|state| state.next()).unwrap_or(0);
        self.wait(|state| state.is_applied(&range, now)).await
    }

    /// Reads from the disk what is there, and from memory what is not there yet.
    async fn read(&self, req: Request, cx: Cx<'_>) -> Reply {
        self.recovered(cx).await?;
        let range = req.offset..req.end();
        let mut newer = self.with(|state| state.of_range(&range)).unwrap_or_default();
        while newer.iter().any(|record| record.kind == Change::Discard) {
            // What is behind a discard, the disk decides.
            self.applied(range.clone()).await?;
            newer = self.with(|state| state.of_range(&range)).unwrap_or_default();
        }
        if newer.is_empty() {
            return cx.forward(DISK, req).await;
        }
        let covers = |record: &Record| record.range.start <= range.start && record.range.end >= range.end;
        // All that lies below the last one that covers everything is of no interest.
        let (mut data, rest) = match newer.iter().rposition(covers) {
            Some(last) => (Data::zeros(req.len as usize), &newer[last..]),
            None => {
                let mut below = cx.child(&req);
                below.data = Data::empty();
                (cx.forward(DISK, below).await?.into_data()?, &newer[..])
            }
        };
        for record in rest {
            data = laid_over(&data, range.start, record);
        }
        Ok(Answer::Data(data))
    }
}

/// The writes of a record to the log. The write of the data comes after them, when they are durable, and
/// after older ones to the same place.
fn write_ahead(req: &Request, data: &mut Request, reserved: Reserved, cx: Cx<'_>) -> Result<Vec<Request>> {
    let Reserved { record, at, log, after, .. } = reserved;
    let bytes = record.encode(&log);
    let mut writes = Vec::new();
    let mut from = 0;
    for piece in log.pieces(at, bytes.len() as u64) {
        let len = (piece.end - piece.start) as usize;
        let mut write = like(req, own(cx, Request::write(piece.start, bytes.slice(from..from + len))));
        from += len;
        cx.add_dependency(data, &mut write, Until::Durable)?;
        writes.push(write);
    }
    for mut before in after {
        cx.add_dependency(data, &mut before, Until::Completed)?;
    }
    Ok(writes)
}

/// The bytes from `start` on after a change.
fn laid_over(data: &Data, start: u64, record: &Record) -> Data {
    let end = start + data.len() as u64;
    let (from, to) = (record.range.start.max(start), record.range.end.min(end));
    let new = match record.kind {
        Change::Write => {
            let skip = record.range.start;
            record.data.slice((from - skip) as usize..(to - skip) as usize)
        }
        Change::Zeroes | Change::Unmap | Change::Discard => Data::zeros((to - from) as usize),
    };
    let before = data.slice(0..(from - start) as usize);
    Data::concat([before, new, data.slice((to - start) as usize..data.len())])
}

/// A request of the element's own.
fn own(cx: Cx<'_>, req: Request) -> Request {
    let mut own = cx.child(&req);
    own.root = own.id;
    own
}

/// The same as part of what `parent` causes.
fn like(parent: &Request, req: Request) -> Request {
    Request { root: parent.root, origin: parent.origin, class: parent.class, ..req }
}

/// A place in the queue for room.
struct Waiting<'a> {
    log: &'a Log,
    ticket: u64,
}

impl Waiting<'_> {
    fn join(log: &Log) -> Waiting<'_> {
        Waiting { log, ticket: log.with(State::join).unwrap_or(0) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.log.update(|state| state.leave(self.ticket));
    }
}

/// Sees a change to its end. If it is dropped before, nobody knows what became of its writes.
struct Carrier {
    log: Arc<Log>,
    sequence: u64,
    landed: bool,
}

impl Carrier {
    fn land(&mut self, outcome: Result<()>) {
        if !std::mem::replace(&mut self.landed, true) {
            if let Err(error) = &outcome {
                tracing::error!("a change cannot be logged: {error}");
            }
            let sequence = self.sequence;
            self.log.update(|state| state.landed(sequence, outcome));
        }
    }

    fn apply(&self, outcome: Result<()>) {
        if let Err(error) = &outcome {
            tracing::warn!("change {} is in the log, but not on the disk: {error}", self.sequence);
            self.log.wanted.notify_one();
        }
        self.log.update(|state| state.applied(self.sequence, outcome));
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.land(Err(cancelled()));
        // If the disk has it, it is not pending any more.
        let sequence = self.sequence;
        self.log.update(|state| state.abandoned(sequence, cancelled()));
    }
}

impl Element for Wal {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let mut children = children.iter();
        let (Some(disk), Some(log)) = (children.next(), children.next()) else {
            return Err(Error::internal("a log has two out ports"));
        };
        if log.read_only {
            return Err(Error::new(Kind::Denied, "its log is read-only"));
        }
        if Superblock::new(0, disk.size, log.size, u64::from(log.min_block)).is_none() {
            let (size, block) = (log.size, log.min_block);
            let message = format!(
                "no log fits on a device of {size} bytes in blocks of {block}: it needs 72k, and blocks of 4k at most"
            );
            return Err(Error::invalid(message));
        }
        let ops =
            Ops { write_zeroes: true, fast_zero: disk.ops.fast_zero && disk.ops.write_zeroes, ..disk.ops };
        // One record is there or not, and what it does to the disk is done again until it is whole.
        let atomic = Superblock::atomic(disk.size, log.size) as u32;
        let geometry = Geometry { ops, needs_flush: log.needs_flush, atomic, ..disk.above() };
        Ok(Prepared::with(geometry, Below { disk: disk.size, log }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let log = &self.0;
        let range = req.offset..req.end();
        match req.op {
            Op::Write | Op::Discard | Op::WriteZeroes if req.len == 0 => Flow::done(),
            Op::WriteZeroes if req.flags.has(Flags::FAST_ONLY) && !cx.geometry().ops.fast_zero => {
                cx.fail(&req, Error::unsupported("writing zeros is not fast here"))
            }
            Op::Write | Op::Discard | Op::WriteZeroes => cx.later(&req.clone(), log.change(req, cx)),
            Op::Read if log.with(|state| state.of_range(&range).is_empty()) == Some(true) => {
                cx.forward(DISK, req)
            }
            Op::Read => cx.later(&req.clone(), log.read(req, cx)),
            Op::Flush => cx.later(&req.clone(), async move {
                log.recovered(cx).await?;
                cx.forward(LOG, req).await
            }),
            Op::Cache => cx.forward(DISK, req),
            Op::Extents | Op::Control => cx.later(&req.clone(), async move {
                log.recovered(cx).await?;
                log.applied(if req.op == Op::Control { 0..u64::MAX } else { range }).await?;
                cx.forward(DISK, req).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(async move {
            let log = &self.0;
            if let Err(error) = log.recovered(cx).await {
                tracing::error!(graph = cx.graph_name(), element = cx.name(), "{error}");
            }
            let mut closing = pin!(cx.closing());
            loop {
                let next = log.wanted.notified();
                let Either::Right(((), rest)) = select(closing, pin!(next)).await else { return };
                closing = rest;
                let Err(error) = log.maintain(cx).await else { continue };
                tracing::warn!(graph = cx.graph_name(), element = cx.name(), "no checkpoint: {error}");
                let Either::Right(((), rest)) = select(closing, pin!(cx.sleep(PATIENCE))).await else {
                    return;
                };
                closing = rest;
                if log.with(|state| state.first_failed().is_some()) == Some(true) {
                    log.wanted.notify_one();
                }
            }
        }))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let value = |of: fn(&State) -> u64| self.0.with(|state| of(state)).unwrap_or(0).to_string();
        match handler {
            "used" => Ok(value(State::used)),
            "pending" => Ok(value(|state| state.pending() as u64)),
            "sequence" => Ok(value(State::next)),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        match handler {
            "checkpoint" => {
                self.0.wanted.notify_one();
                Ok("a checkpoint has been asked for".to_owned())
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}
