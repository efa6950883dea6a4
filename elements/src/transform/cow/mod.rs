//! Copy on write: what is changed goes to an overlay, and the base stays as it was, until the changes are
//! merged into it or forgotten.
//!
//! `format` is the overlay on disk, `overlay` keeps it in step, `serve` answers requests, `merge` moves
//! blocks to the base.

mod bitmap;
mod format;
mod io;
mod merge;
mod overlay;
mod serve;
#[cfg(test)]
mod tests;

use super::power::Chunk;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Outs, Ports};
use blockmason::element::BoxFuture;
use blockmason::lang::value::Rate;
use blockmason::{
    Children, Cx, Element, Error, Flow, Geometry, Kind, LocalBoxFuture, Luggage, Op, Open, Origin, Prepared,
    Request, Result,
};
use format::{Layout, State};
use futures::future::{Either, select};
use io::Io;
use overlay::Overlay;
use serde::{Deserialize, Serialize};
use std::future::ready;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

blockmason::params! {
    /// Copy on write.
    struct Params {
        /// Bytes that are copied when the first of them is changed: a power of two from 4k to 1M. Of an
        /// overlay that exists it must be its own.
        block: Chunk = "64k",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "cow",
    summary: "keeps changes in an overlay; the base stays as it was until they are merged",
    doc: "Reads what was changed from the disk at `overlay` and all else from the disk at `base`. Changes go to \
          the overlay: the first one to a block copies what it leaves of the block from the base. The base \
          is not written before `commit`. Several overlays may share one base that nobody writes, each \
          under a `cow` of its own.\n\n\
          The overlay is any disk with room for the whole base and the maps of blocks: the size of the base, \
          12 KiB, a quarter of a byte for each block, and up to a block more; a disk that is too small is refused \
          with the size it needs. A `file` makes it persistent and takes room only for blocks that were changed; `mem` makes it \
          temporary. An empty disk (4096 zeros) is formatted by the first request; a disk with anything else \
          on it is refused, never overwritten, as is an overlay of a base of another size. Format: \
          [formats/cow.md](../formats/cow.md).\n\n\
          `commit` moves all blocks to the base while guests go on: a few at a time, writes to which wait \
          meanwhile, guests first. Blocks that are in the base are served by it from then on, so \
          every block is moved once. It goes on after a restart or a crash wherever it was. At its end \
          the overlay is empty, everything goes to the base, and this element may be taken out of the \
          graph. Until then the base alone makes no sense. `discard` forgets all blocks, and the disk is \
          the base again from one request to the next: under a guest that is running, that is data loss. After \
          a commit it makes the overlay ready for the next use. The overlay's room is not given back by \
          either; make a new file, or write zeros to its start while no graph uses it.\n\n\
          **Durability.** A write is answered when the overlay's disk has answered its data and the entry of its \
          block, so the death of this process loses nothing. A flush makes data durable, then the entries of \
          blocks that are new, which is a second flush of the overlay's disk. After a loss of power a sector \
          that was not flushed is the old or the new one. To tell one crash from the other, the disk below is \
          asked for its incarnation; where it does not know (`nbd_client`, `null`, several disks of different \
          kinds), the first write to a block waits until its data is durable: right, but slower. Discards need not \
          last.\n\n\
          **Memory.** Two bits for each block: for each TiB of the base, 4 MiB with blocks of 64 KiB. More than 2^31 \
          blocks are refused. Large blocks copy more at the first write; small ones take more memory and more \
          requests.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports { input: true, out: Outs::Named(&["base", "overlay"]) },
    handlers: &[
        Handler {
            name: "state",
            access: Access::Read,
            doc: "`overlaying`, `committing`, `discarding` or `committed`",
        },
        Handler { name: "blocks", access: Access::Read, doc: "blocks in the overlay" },
        Handler { name: "bytes", access: Access::Read, doc: "their bytes" },
        Handler {
            name: "remaining",
            access: Access::Read,
            doc: "bytes that a commit has still to move; 0 without one",
        },
        Handler {
            name: "error",
            access: Access::Read,
            doc: "why the overlay cannot be opened, or the last commit or discard failed; else empty",
        },
        Handler {
            name: "merge_rate",
            access: Access::ReadWrite,
            doc: "how fast a commit moves blocks: `50M/s`, or `unlimited`",
        },
        Handler { name: "commit", access: Access::Call, doc: "begins to move all blocks to the base" },
        Handler {
            name: "discard",
            access: Access::Call,
            doc: "with the argument `yes`: forgets all blocks, data loss under a running guest",
        },
    ],
    layout: true,
    example: "element Guest (type nbd) (listen unix:cow.sock)\n\
              element Try (type cow)\n\
              element Image (type file) (path image.img) (size 64M)\n\
              element Changes (type file) (path changes.cow) (size 65M)\n\
              Guest -> Try\n\
              (Try, base) -> Image\n\
              (Try, overlay) -> Changes\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Cow::new(build.read(Params::from)?.block.0))),
    ..ElementType::BASE
};

/// `merge_rate` as it is when there is no limit.
const UNLIMITED: &str = "unlimited";

/// How long what has failed waits before it is tried again, at first and at last.
const RETRY: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];

/// How long to wait now; twice as long the next time.
fn later(retry: &mut Duration) -> Duration {
    std::mem::replace(retry, (*retry * 2).min(RETRY[1]))
}

/// The longest that a commit steps back for guests between two steps.
const STEP_BACK: Duration = Duration::from_millis(100);

/// What a successor in another process does not find in the overlay.
#[derive(Serialize, Deserialize)]
struct Left {
    merge_rate: Option<u64>,
    order: Option<Order>,
}

/// The version of that.
const LEFT: u32 = 1;

/// What an operator has asked for and `run` has not done yet.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Order {
    Commit,
    Discard,
}

/// When the next step is due.
enum Next {
    /// When there is something to do.
    Asked,
    After(Duration),
    /// So many bytes have been moved since then, and so fast may they be.
    Paced {
        since: Instant,
        bytes: u64,
        earliest: Instant,
    },
}

struct Cow {
    block: u64,
    /// Held while an overlay is being opened.
    opening: tokio::sync::Mutex<()>,
    now: Mutex<Now>,
    /// Bytes a second, `u64::MAX` without a limit.
    merge_rate: AtomicU64,
    /// Tells `run` that there is something to do.
    wake: Notify,
}

/// What handlers speak of.
#[derive(Default)]
struct Now {
    /// The overlay that was opened last. Graphs that lead to the same one share it.
    overlay: Option<Arc<Overlay>>,
    order: Option<Order>,
    error: String,
}

/// What one graph makes of it.
struct Place {
    layout: Layout,
    base_read_only: bool,
    /// Set by the first request, or by `run`.
    overlay: OnceLock<Arc<Overlay>>,
}

impl Cow {
    fn new(block: u64) -> Cow {
        Cow {
            block,
            opening: tokio::sync::Mutex::default(),
            now: Mutex::default(),
            merge_rate: AtomicU64::new(u64::MAX),
            wake: Notify::new(),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The overlay of this graph, opened if it is not yet.
    async fn overlay<'a>(&self, cx: Cx<'a>) -> Result<&'a Overlay> {
        let place: &Place = cx.prepared();
        if let Some(overlay) = place.overlay.get() {
            return Ok(overlay);
        }
        let _alone = self.opening.lock().await;
        if let Some(overlay) = place.overlay.get() {
            return Ok(overlay);
        }
        let opened = self.open_or_share(cx, place.layout).await;
        let mut now = self.now();
        match opened {
            Ok(overlay) => {
                now.overlay = Some(overlay.clone());
                now.error.clear();
                drop(now);
                self.wake.notify_one();
                Ok(place.overlay.get_or_init(|| overlay))
            }
            Err(error) => {
                let text = error.message().to_owned();
                if std::mem::replace(&mut now.error, text) != now.error {
                    tracing::error!(graph = cx.graph_name(), element = cx.name(), "no overlay: {error}");
                }
                Err(error)
            }
        }
    }

    /// Two graphs that lead to the same overlay must not each have their own idea of what is in it.
    async fn open_or_share(&self, cx: Cx<'_>, layout: Layout) -> Result<Arc<Overlay>> {
        let io = Io::own(cx, Origin::Internal);
        let last = self.now().overlay.clone();
        match last {
            Some(last) if last.is_at(&io, layout).await? => Ok(last),
            _ => Overlay::open(&io, layout).await.map(Arc::new),
        }
    }

    fn serve<'a>(&self, overlay: &'a Overlay, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                cx.fail(&req, Error::unsupported("an overlay knows of no such map"))
            }
            Op::Read | Op::Cache | Op::Extents => overlay.look(req, cx),
            Op::Write | Op::WriteZeroes | Op::Discard => overlay.change(req, cx),
            Op::Flush => overlay.flush(req, cx),
            // The disk is both: a snapshot of one of them would be none.
            Op::Control => cx.broadcast(req),
        }
    }

    /// Does what there is to do, and says when the next step is due.
    async fn step(&self, cx: Cx<'_>, retry: &mut Duration) -> Next {
        // The reason has been logged, and whoever sends a request is told.
        let Ok(overlay) = self.overlay(cx).await else { return Next::After(later(retry)) };
        let io = Io::own(cx, Origin::Copy);
        if let Err(error) = self.obey(overlay, &io).await {
            tracing::warn!(
                graph = cx.graph_name(),
                element = cx.name(),
                "neither merged nor discarded: {error}"
            );
            return Next::Asked;
        }
        if overlay.state() != State::Committing {
            return Next::Asked;
        }
        let (rate, since) = (self.merge_rate.load(Ordering::Relaxed), cx.now());
        let before = overlay.served.load(Ordering::Relaxed);
        match overlay.merge_some(&io, rate.min(merge::BATCH)).await {
            Ok(0) => {
                tracing::info!(graph = cx.graph_name(), element = cx.name(), "everything is in the base");
                Next::Asked
            }
            Ok(bytes) => {
                *retry = RETRY[0];
                self.now().error.clear();
                let end = cx.now();
                let guests = overlay.served.load(Ordering::Relaxed) != before;
                let back = if guests { (end - since).min(STEP_BACK) } else { Duration::ZERO };
                Next::Paced { since, bytes, earliest: end + back }
            }
            Err(error) => {
                tracing::warn!(graph = cx.graph_name(), element = cx.name(), "the merge waits: {error}");
                self.now().error = error.to_string();
                Next::After(later(retry))
            }
        }
    }

    /// Does what an operator has asked for.
    async fn obey(&self, overlay: &Overlay, io: &Io<'_>) -> Result<()> {
        let order = self.now().order;
        let done = match order {
            None => return Ok(()),
            Some(Order::Commit) if io.cx.prepared::<Place>().base_read_only => {
                Err(Error::new(Kind::Denied, "the base is read-only"))
            }
            Some(Order::Commit) => overlay.start_commit(io).await,
            Some(Order::Discard) => overlay.discard(io).await,
        };
        let mut now = self.now();
        now.order = None;
        now.error = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
        done
    }

    /// Waits, or until there is something to do.
    async fn pause(&self, time: Duration) {
        let _ = blockmason::rt::timeout(time, self.wake.notified()).await;
    }

    async fn wait(&self, next: Next, cx: Cx<'_>) {
        match next {
            Next::Asked => self.wake.notified().await,
            Next::After(time) => self.pause(time).await,
            Next::Paced { since, bytes, earliest } => {
                tokio::task::yield_now().await;
                loop {
                    let rate = self.merge_rate.load(Ordering::Relaxed);
                    let due = earliest.max(since + Duration::from_secs_f64(bytes as f64 / rate as f64));
                    let left = due.saturating_duration_since(cx.now());
                    if left.is_zero() {
                        return;
                    }
                    // The rate may change meanwhile.
                    self.pause(left).await;
                }
            }
        }
    }

    async fn work(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut retry = RETRY[0];
        loop {
            // Not dropped half-way: see `merge_some`.
            let next = self.step(cx, &mut retry).await;
            if let Either::Left(_) = select(closing.as_mut(), pin!(self.wait(next, cx))).await {
                return;
            }
        }
    }

    /// The overlay, for a handler.
    fn opened(&self) -> Result<Arc<Overlay>> {
        let now = self.now();
        let none = || match now.error.as_str() {
            "" => "the overlay is not open yet: the graph is just being started".to_owned(),
            error => error.to_owned(),
        };
        now.overlay.clone().ok_or_else(|| Error::new(Kind::Unavailable, none()))
    }

    fn order(&self, order: Order) {
        self.now().order = Some(order);
        self.wake.notify_one();
    }

    fn call_commit(&self, overlay: &Overlay) -> Result<String> {
        overlay.check()?;
        if self.now().order == Some(Order::Discard) {
            return Err(Error::new(Kind::Busy, "the overlay is just being discarded"));
        }
        let what = format!("{} blocks, {} bytes", overlay.claimed.count(), overlay.bytes());
        match overlay.state() {
            State::Committed => return Ok("everything is in the base already".to_owned()),
            State::Committing => return Ok(format!("still moving to the base: {what}")),
            State::Overlaying => self.order(Order::Commit),
        }
        Ok(format!("moving to the base: {what}; `state` says when it is done"))
    }

    fn call_discard(&self, overlay: &Overlay, argument: &str) -> Result<String> {
        overlay.check()?;
        let blocks = overlay.claimed.count();
        if overlay.state() == State::Committing || self.now().order == Some(Order::Commit) {
            let message =
                "a commit has begun, and what is in the base cannot be taken back; wait for its end";
            return Err(Error::new(Kind::Busy, message));
        }
        if blocks > 0 && argument != "yes" {
            let message = format!(
                "this forgets {blocks} blocks and changes the disk under whoever uses it: stop the guests, \
                 then call it with the argument `yes`"
            );
            return Err(Error::new(Kind::Denied, message));
        }
        self.order(Order::Discard);
        Ok(format!("forgetting {blocks} blocks; it is done when `state` is `overlaying`"))
    }
}

impl Element for Cow {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let [(_, base), (_, overlay)] = children.ports else {
            return Err(Error::internal("a base and an overlay were expected"));
        };
        let layout = Layout::new(self.block, base.size)?;
        if overlay.size < layout.needed() {
            let (found, needed, base) = (overlay.size, layout.needed(), base.size);
            let message = format!(
                "the overlay disk has {found} bytes; for a base of {base} it needs {needed}: make it that \
                 large, a sparse file will do"
            );
            return Err(Error::new(Kind::NoSpace, message));
        }
        if overlay.read_only {
            return Err(Error::new(
                Kind::Denied,
                "the overlay disk is read-only: changes have nowhere to go",
            ));
        }
        let geometry = Geometry { read_only: false, ..children.united(base.size) };
        let place = Place { layout, base_read_only: base.read_only, overlay: OnceLock::new() };
        Ok(Prepared::with(geometry, place))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match cx.prepared::<Place>().overlay.get() {
            Some(overlay) => self.serve(overlay, req, cx),
            None => cx.later(&req.clone(), async move {
                let overlay = self.overlay(cx).await?;
                self.serve(overlay, req, cx).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(self.work(cx)))
    }

    fn may_leave(&self) -> Result<()> {
        // One that nobody has asked anything of has not even looked at its overlay.
        let Ok(overlay) = self.opened() else { return Ok(()) };
        let blocks = overlay.claimed.count();
        if blocks == 0 {
            return Ok(());
        }
        let message =
            format!("{blocks} blocks are only in its overlay: call its `commit` or `discard` first");
        Err(Error::new(Kind::Busy, message))
    }

    fn hand_over<'a>(&'a self, _leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        let merge_rate = self.merge_rate.load(Ordering::Relaxed);
        let left =
            Left { merge_rate: (merge_rate != u64::MAX).then_some(merge_rate), order: self.now().order };
        Box::pin(ready(Luggage::of(LEFT, &left)))
    }

    fn take_over<'a>(&'a self, luggage: Luggage, _coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        let left: Result<Left> = luggage.read(LEFT);
        Box::pin(ready(left.map(|left| {
            self.merge_rate.store(left.merge_rate.unwrap_or(u64::MAX), Ordering::Relaxed);
            self.now().order = left.order;
        })))
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "state" => {
                let overlay = self.opened()?;
                let discarding = self.now().order == Some(Order::Discard);
                Ok(if discarding { "discarding" } else { overlay.state().name() }.to_owned())
            }
            "blocks" => Ok(self.opened()?.claimed.count().to_string()),
            "bytes" => Ok(self.opened()?.bytes().to_string()),
            "remaining" => {
                let overlay = self.opened()?;
                let moving = overlay.state() == State::Committing || self.now().order == Some(Order::Commit);
                Ok(if moving { overlay.bytes() } else { 0 }.to_string())
            }
            "error" => Ok(self.now().error.clone()),
            "merge_rate" => match self.merge_rate.load(Ordering::Relaxed) {
                u64::MAX => Ok(UNLIMITED.to_owned()),
                rate => Ok(Rate(rate).to_string()),
            },
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        match (handler, value) {
            ("merge_rate", UNLIMITED) => self.merge_rate.store(u64::MAX, Ordering::Relaxed),
            ("merge_rate", _) => match value.parse::<Rate>() {
                Ok(Rate(0)) => return Err(Error::invalid("a commit that does not move never ends")),
                Ok(Rate(rate)) => self.merge_rate.store(rate, Ordering::Relaxed),
                Err(error) => return Err(Error::invalid(format!("{error}, or `{UNLIMITED}`"))),
            },
            _ => return Err(Error::no_handler(handler)),
        }
        self.wake.notify_one();
        Ok(())
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        match handler {
            "commit" => self.call_commit(&*self.opened()?),
            "discard" => self.call_discard(&*self.opened()?, argument),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
