//! A cache in memory or on an SSD: what is read often is near, and what is written may go below later.

mod clean;
mod doc;
mod format;
mod hold;
mod index;
mod journal;
mod lines;
mod open;
mod params;
mod read;
mod ssd;
mod streams;
#[cfg(test)]
mod tests;
mod write;

use crate::route::throttle::Bandwidth;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports, Survives};
use blockmason::io::Opened;
use blockmason::lang::value::{ByteRange, Time};
use blockmason::sched::Coalesced;
use blockmason::{
    Children, Cx, Element, Error, Flags, Flow, Geometry, Kind, LocalBoxFuture, Op, Open, Ops, Prepared,
    Request, Result,
};
use futures::future::{Either, select};
use journal::{Journal, Standing, Tail};
use lines::Lines;
use params::{LINES, Mode, Params};
use ssd::Ssd;
use std::ops::Range;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use streams::Streams;
use tokio::sync::Notify;
use tokio::time::Instant;

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "cache",
    summary: "keeps what is read often in memory or on an SSD, and may write back later",
    doc: doc::DOC,
    family: Family::Transform,
    params: Params::TABLE,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "hits", access: Access::Read, doc: "reads that needed nothing from below" },
        Handler { name: "misses", access: Access::Read, doc: "reads that needed something from below" },
        Handler {
            name: "hit_ratio",
            access: Access::Read,
            doc: "the part of all reads that needed nothing from below",
        },
        Handler {
            name: "dirty",
            access: Access::Read,
            doc: "bytes that have been answered and are not below yet",
        },
        Handler { name: "used", access: Access::Read, doc: "bytes that are kept, of lines and of changes" },
        Handler {
            name: "state",
            access: Access::Read,
            doc: "keeping, draining, drained, failed; through if it never keeps changes",
        },
        Handler { name: "error", access: Access::Read, doc: "why it cannot be opened, else empty" },
        Handler {
            name: "dirty_time",
            access: Access::ReadWrite,
            doc: "how long a change may wait before it goes below",
        },
        Handler {
            name: "rate",
            access: Access::ReadWrite,
            doc: "bytes in a second that go below, or `unlimited`",
        },
        Handler {
            name: "flush",
            access: Access::Call,
            doc: "begins to bring below what is not there; `dirty` tells how far",
        },
        Handler {
            name: "drain",
            access: Access::Call,
            doc: "brings everything below, and keeps no more changes until `resume`",
        },
        Handler {
            name: "resume",
            access: Access::Call,
            doc: "keeps changes again, and uses the SSD again if it had failed",
        },
        Handler {
            name: "warm",
            access: Access::Call,
            doc: "reads a range, `0-1G`, or `all` of the disk into the cache",
        },
    ],
    layout: false,
    handover: Handover::Gate,
    survives: Survives::Power,
    example: "element Guest (type nbd) (listen unix:cache.sock)\n\
              element Ram (type cache) (size 8M)\n\
              element Ssd (type cache) (path vm1.cache) (size 32M) (mode write_back)\n\
              element Far (type delay) (read 20ms) (write 30ms)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Ram -> Ssd -> Far -> Disk\n",
    check: Params::are_sound,
    build: |build: &Build<'_>| {
        let params = build.read(Params::sound)?;
        Ok(Arc::new(Handle(Arc::new(Cache::new(params, build.graph)?))))
    },
    ..ElementType::BASE
};

/// The longest range that a hint brings in, in bytes.
const HINT: u64 = 32 << 20;

/// What `warm` reads at once, in bytes.
const WARM: u64 = 1 << 20;

/// What can be set while it runs, and what the work of its own remembers.
struct Tuning {
    dirty_time: Duration,
    rate: Bandwidth,
    /// When the next batch may begin.
    next: Option<Instant>,
    /// The disk below takes no changes.
    failing: bool,
    /// The number before which `flush` wants everything below.
    wanted: u64,
    /// What `warm` has asked for and is still to be read.
    warm: Option<Range<u64>>,
}

struct Cache {
    params: Params,
    graph: String,
    /// Of an SSD, known once it is open.
    lines: OnceLock<Arc<Lines>>,
    streams: Mutex<Streams>,
    /// None where changes are not kept; of an SSD None until it has been opened.
    journal: Mutex<Option<Journal>>,
    /// Told of whatever happens to the journal, or is wanted of it.
    changed: Notify,
    /// Whoever waits for room waits here for its turn.
    turn: tokio::sync::Mutex<()>,
    cleaning: Coalesced,
    /// The next batch that goes below, read while the one before was on its way.
    ahead: Mutex<Option<(journal::Batch, Vec<format::Record>)>>,
    ssd: Option<Ssd>,
    /// Opening: one at a time.
    opening: Coalesced,
    /// What the last try to open it came to, if it has failed.
    error: Mutex<String>,
    is_open: AtomicBool,
    /// That this is the only one in the process that has the SSD open.
    held: Mutex<Option<open::Held>>,
    /// The longest change that is kept as one.
    longest: AtomicU64,
    /// The SSD has failed: nothing is read from it or written to it any more.
    broken: AtomicBool,
    /// The disk below has ended for good.
    ended: AtomicBool,
    hold: hold::Hold,
    /// Something is below that a flush has to make durable there, though changes are kept.
    owes_flush: AtomicBool,
    tuning: Mutex<Tuning>,
    hits: AtomicU64,
    misses: AtomicU64,
    /// A name for this life of the memory.
    incarnation: OnceLock<String>,
}

/// The element; work that goes on by itself has the cache too.
struct Handle(Arc<Cache>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change of what they guard is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    fn new(params: Params, graph: &str) -> Result<Cache> {
        let ssd = params.path.is_some().then(Ssd::new);
        let memory = params.memory();
        let lines = OnceLock::new();
        if ssd.is_none() {
            let count = usize::try_from(params.lines()).unwrap_or(usize::MAX);
            let _ = lines.set(Arc::new(Lines::new(params.line(), count, false)));
        }
        let keeps = ssd.is_none() && params.mode == Mode::Back;
        let begin = Tail { at: 0, number: 1, life: 0 };
        let longest = if ssd.is_none() { (memory / 4).min(1 << 20) } else { 0 };
        let tuning = Tuning {
            dirty_time: params.dirty_time.0,
            rate: params.rate,
            next: None,
            failing: false,
            wanted: 0,
            warm: None,
        };
        let cache = Cache {
            lines,
            streams: Mutex::new(Streams::new(params.read_ahead.0, params.bypass.0)),
            journal: Mutex::new(keeps.then(|| Journal::new(memory, memory, begin))),
            changed: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
            cleaning: Coalesced::default(),
            ahead: Mutex::default(),
            is_open: AtomicBool::new(ssd.is_none()),
            ssd,
            opening: Coalesced::default(),
            error: Mutex::default(),
            held: Mutex::new(None),
            longest: AtomicU64::new(longest),
            broken: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            hold: hold::Hold::default(),
            owes_flush: AtomicBool::new(false),
            tuning: Mutex::new(tuning),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            incarnation: OnceLock::new(),
            graph: graph.to_owned(),
            params,
        };
        cache.find_ssd()?;
        Ok(cache)
    }

    fn journal(&self) -> MutexGuard<'_, Option<Journal>> {
        lock(&self.journal)
    }

    fn tuning(&self) -> MutexGuard<'_, Tuning> {
        lock(&self.tuning)
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        lock(&self.streams)
    }

    fn lines(&self) -> &Arc<Lines> {
        self.lines.get().expect("nothing is served before the cache is open")
    }

    fn ssd(&self) -> Result<&Ssd> {
        self.ssd.as_ref().ok_or_else(|| Error::internal("this cache is in memory"))
    }

    /// Changes the journal and tells whoever waits for it.
    fn update(&self, change: impl FnOnce(&mut Journal)) {
        self.journal().as_mut().map(change);
        self.changed.notify_waiters();
    }

    /// Waits until `look` finds something in the journal.
    async fn wait<T>(&self, look: impl Fn(&Journal) -> Option<T>) -> T {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(found) = self.journal().as_ref().and_then(&look) {
                return found;
            }
            changed.await;
        }
    }

    /// True if changes are kept, or were and may not all be below.
    fn keeps(&self) -> bool {
        self.journal().is_some()
    }

    fn is_passing(&self) -> bool {
        self.journal().as_ref().is_some_and(|journal| matches!(journal.standing, Standing::Passing))
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// The SSD has failed: it goes on without.
    fn broke(&self, error: &Error, cx: Cx<'_>) {
        if self.broken.swap(true, Ordering::SeqCst) {
            return;
        }
        cx.notice(format!("the cache fails and is not used any more until `resume`: {error}"));
        self.lines().clear();
        self.update(|journal| {
            if matches!(journal.standing, Standing::Keeping) {
                journal.standing = Standing::Passing;
            }
            journal.forget_cleaned();
        });
    }

    fn serve<'a>(self: &'a Arc<Self>, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let keeps = self.keeps();
        match req.op {
            Op::Read if self.ended.load(Ordering::Relaxed) => {
                cx.fail(&req, Error::new(Kind::Io, lock(&self.error).clone()))
            }
            Op::Read => self.read(req, cx),
            Op::Write | Op::WriteZeroes | Op::Discard if req.len == 0 => Flow::done(),
            Op::WriteZeroes if keeps && req.flags.has(Flags::FAST_ONLY) && !cx.geometry().ops.fast_zero => {
                cx.fail(&req, Error::unsupported("writing zeros is not fast here"))
            }
            Op::Write | Op::WriteZeroes | Op::Discard if keeps => cx.later(&req.clone(), self.back(req, cx)),
            Op::Write | Op::WriteZeroes | Op::Discard => self.through(req, cx),
            Op::Flush if keeps || self.ssd.is_some() => cx.later(&req.clone(), self.flush(req, cx)),
            Op::Extents | Op::Control if keeps => cx.later(&req.clone(), self.settled(req, cx)),
            Op::Flush | Op::Extents | Op::Control => cx.forward(0, req),
            Op::Cache => {
                self.prefetch(req.offset..req.end().min(req.offset + HINT), cx);
                Flow::done()
            }
        }
    }

    fn geometry(&self, below: Geometry) -> Geometry {
        let through = Geometry { ops: Ops { cache: true, ..below.ops }, ..below.above() };
        if self.params.mode == Mode::Through {
            return through;
        }
        let zeroes = below.ops.write_zeroes;
        let ops = Ops {
            write_zeroes: true,
            fast_zero: zeroes && below.ops.fast_zero,
            // They are written as zeros.
            discard: zeroes && below.ops.discard,
            ..through.ops
        };
        // In memory a batch that is half below and lost leaves parts of changes there.
        let atomic = if self.ssd.is_some() { self.longest.load(Ordering::Relaxed) as u32 } else { 0 };
        Geometry { ops, needs_flush: true, atomic, ..through }
    }

    /// Reads what `warm` has asked for, one piece after the other.
    async fn keep_warm(self: &Arc<Self>, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let piece = self.next_to_warm(cx.geometry().size);
            let work = async {
                match piece {
                    Some(piece) => self.fetch_ahead(piece, cx).await,
                    None => changed.await,
                }
            };
            let Either::Right(((), rest)) = select(closing, pin!(work)).await else { return };
            closing = rest;
        }
    }

    fn next_to_warm(&self, size: u64) -> Option<Range<u64>> {
        let mut tuning = self.tuning();
        let range = tuning.warm.take()?;
        let end = range.end.min(size);
        let piece = range.start..end.min(range.start + WARM);
        if piece.end < end {
            tuning.warm = Some(piece.end..end);
        }
        (!piece.is_empty()).then_some(piece)
    }

    fn state(&self) -> &'static str {
        let failed = if self.is_broken() { "failed" } else { "through" };
        match &*self.journal() {
            None => failed,
            Some(journal) => match journal.standing {
                Standing::Keeping => "keeping",
                Standing::Lost(_) => "failed",
                Standing::Passing if journal.dirty() > 0 => "draining",
                Standing::Passing if self.is_broken() => "failed",
                Standing::Passing => "drained",
            },
        }
    }

    fn resume(&self) -> Result<String> {
        let busy = "changes are still on their way to the SSD that has failed";
        if let Some(journal) = &mut *self.journal() {
            if self.params.mode == Mode::Through {
                return Err(Error::invalid("its mode is write_through: it keeps no changes"));
            }
            if !journal.resume() {
                return Err(Error::new(Kind::Busy, busy));
            }
        }
        if self.broken.swap(false, Ordering::SeqCst) {
            // Nobody has seen to them meanwhile.
            self.lines().clear();
        }
        self.changed.notify_waiters();
        Ok(self.state().to_owned())
    }

    fn warm(&self, argument: &str) -> Result<String> {
        let range = match argument {
            "all" => 0..u64::MAX,
            range => {
                let range: ByteRange = range.parse().map_err(Error::invalid)?;
                range.start..range.end.unwrap_or(u64::MAX)
            }
        };
        let lines =
            self.lines.get().ok_or_else(|| Error::new(Kind::Unavailable, "the cache is not open yet"))?;
        let most = lines.capacity() as u64 * lines.size;
        self.tuning().warm = Some(range.start..range.end.min(range.start.saturating_add(most)));
        self.changed.notify_waiters();
        Ok(format!("reading as much of it as fits, {most} bytes at the most"))
    }
}

impl Element for Handle {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.ports.first().map(|(_, geometry)| *geometry);
        let below = below.ok_or_else(|| Error::internal("a cache has one out port"))?;
        Ok(Prepared::of(self.0.geometry(below)))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let cache = &self.0;
        if cache.is_open.load(Ordering::Acquire) {
            return cache.serve(req, cx);
        }
        cx.later(&req.clone(), async move {
            cache.opened(cx).await?;
            cache.serve(req, cx).await
        })
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(async move {
            if self.0.keep_opening(cx).await {
                futures::future::join(self.0.keep_clean(cx), self.0.keep_warm(cx)).await;
                self.0.let_go(cx).await;
            }
        }))
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        self.0.make_ssd().map(|()| None)
    }

    fn close(&self) {
        self.0.close();
    }

    fn opened(&self) -> Option<Opened> {
        self.0.file()
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        let old = (old as &dyn std::any::Any).downcast_ref::<Handle>();
        if self.0.ssd.is_some() || old.is_some_and(|old| old.0.ssd.is_some()) {
            let message = "a cache on an SSD cannot be changed as it runs, but for `rate` and `dirty_time`: call its \
                           `drain`, take it out of the graph, and put it in again";
            return Err(Error::unsupported(message));
        }
        Ok(())
    }

    fn may_leave(&self) -> Result<()> {
        let dirty = self.0.journal().as_ref().map_or(0, |journal| journal.dirty());
        // What is in memory goes below with the flush that comes before it leaves.
        if self.0.ssd.is_none() || dirty == 0 {
            return Ok(());
        }
        let what = match self.0.is_passing() {
            true => "it is being drained: wait until its `state` is `drained`",
            false => "call its `drain` first",
        };
        let message = format!("{dirty} bytes are only in the cache: {what}");
        Err(Error::new(Kind::Busy, message))
    }

    fn may_be_left(&self) -> Result<()> {
        self.may_leave()
    }

    fn may_hand_over(&self) -> Result<()> {
        if self.0.ssd.is_none() {
            return Ok(());
        }
        Err(Error::unsupported("a cache on an SSD is closed and opened again, not passed on: stop and start"))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let cache = &self.0;
        let (hits, misses) = (cache.hits.load(Ordering::Relaxed), cache.misses.load(Ordering::Relaxed));
        match handler {
            "hits" => Ok(hits.to_string()),
            "misses" => Ok(misses.to_string()),
            "hit_ratio" => Ok(format!("{:.3}", hits as f64 / (hits + misses).max(1) as f64)),
            "dirty" => Ok(cache.journal().as_ref().map_or(0, |journal| journal.dirty()).to_string()),
            "used" => {
                let lines = cache.lines.get().map_or(0, |lines| lines.count() as u64 * lines.size);
                let changes = cache.journal().as_ref().map_or(0, |journal| journal.used());
                Ok((lines + changes).to_string())
            }
            "state" => Ok(cache.state().to_owned()),
            "error" => Ok(lock(&cache.error).clone()),
            "dirty_time" => Ok(Time(cache.tuning().dirty_time).to_string()),
            "rate" => Ok(cache.tuning().rate.to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        let cache = &self.0;
        match handler {
            "dirty_time" => cache.tuning().dirty_time = value.parse::<Time>().map_err(Error::invalid)?.0,
            "rate" => cache.tuning().rate = value.parse().map_err(Error::invalid)?,
            _ => return Err(Error::no_handler(handler)),
        }
        cache.changed.notify_waiters();
        Ok(())
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        let cache = &self.0;
        match handler {
            "flush" => {
                let answered = cache.journal().as_ref().map_or(0, |journal| journal.answered());
                cache.tuning().wanted = answered;
                cache.changed.notify_waiters();
                Ok("everything is on its way below; `dirty` tells how far".to_owned())
            }
            "drain" => {
                cache.update(|journal| {
                    if matches!(journal.standing, Standing::Keeping) {
                        journal.standing = Standing::Passing;
                    }
                });
                Ok(cache.state().to_owned())
            }
            "resume" => cache.resume(),
            "warm" => cache.warm(argument),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
