//! Copies one disk to another while guests go on, and compares both.
//!
//! `run` says what is done next and does it, `chunk` moves one range, `verify` compares one, `pace` says how fast,
//! `silence` knows when a disk does not answer, `progress` is what handlers speak of.

mod chunk;
mod pace;
mod progress;
mod run;
mod silence;
#[cfg(test)]
mod tests;
mod verify;

use super::map::DirtyMap;
use crate::route::throttle::Bandwidth;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Outs, Ports};
use blockmason::element::BoxFuture;
use blockmason::lang::value::{Ref, Size};
use blockmason::lang::{ParamError, Params as Given};
use blockmason::{
    Children, Cx, Element, Error, Flow, Geometry, Kind, LocalBoxFuture, Luggage, Open, Prepared, Request,
    Result,
};
use chunk::Place;
pub use progress::Progress;
use progress::{Counters, Left, Recent};
use std::any::Any;
use std::fmt;
use std::future::ready;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// How many chunks may be under way at once, at the most.
const MOST: usize = 64;

/// Chunks under way at once.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Depth(usize);

impl FromStr for Depth {
    type Err = String;

    fn from_str(text: &str) -> Result<Depth, String> {
        let found = text.parse().ok().filter(|depth| (1..=MOST).contains(depth));
        found.map(Depth).ok_or_else(|| format!("expected a number from 1 to {MOST}, found `{text:.40}`"))
    }
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

blockmason::text_value!(Depth, "number");

blockmason::words! {
    /// Where a pass begins.
    enum Way: "order" {
        /// At the first byte.
        Up = "up",
        /// At the last one.
        Down = "down",
    }
}

blockmason::params! {
    /// Copies one disk to another.
    struct Params {
        /// Copies what is dirty in the map of this element, which stands on the way to the disk at `to`, until nothing
        /// is. With `frozen` the element stands above the disk at `from`, and what a backup has frozen in its map is
        /// copied. Without it everything is copied once.
        only: Option<Ref<DirtyMap>>,
        /// The most bytes that are held and moved at once, from 64k to 64M; at least a granule of the map.
        chunk: Size = "1M",
        /// Nobody changes the disk at `from`, or uses the one at `to`: nothing is held, and both are flushed at the end.
        frozen: bool = "no",
        /// Chunks under way at once, from 1 to 64.
        depth: Depth = "8",
        /// Bytes that may be copied, or compared, in a second.
        rate: Bandwidth = "unlimited",
        /// Bytes that may be copied in a second while guests are active.
        busy_rate: Bandwidth = "unlimited",
        /// Where a pass begins: `up` at the first byte, `down` at the last one.
        order: Way = "up",
        /// Begins only when this is set to `no`.
        paused: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "copy",
    summary: "copies the disk at `from` to the disk at `to` while guests go on, and compares them",
    doc: "Reads the disk at `from` and writes it to the disk at `to`, chunk by chunk. A chunk is held from its read to \
          the end of its write: requests of guests that overlap it wait so long, all others pass. With `only` it \
          copies what is dirty in the map of a `log_dirty` above the disk at `to`, pass after pass, until nothing \
          is; then it waits, and copies again what becomes dirty. A `tee` above both disks sends the new disk what \
          guests change meanwhile. Without `only` everything is copied once, and what guests change after that is \
          not: for a disk that nobody changes.\n\n\
          **What is written.** What the disk at `from` is known to read as zeros is not read; that, and what turns \
          out to be zero, is made zero at `to` and may become a hole there. Large holes are passed over at once, with \
          `(order up)` and where zeros are fast at `to`. Only whole granules of the map are written. The disk at `to` \
          may be larger than that at `from`; what lies behind the end of `from` is not touched, but for the rest \
          of the last granule, which becomes zeros. What is written is not flushed: flush the disk at `to` before the \
          one at `from` goes away.\n\n\
          **Of a disk that stands still.** With `(frozen yes)` no range is held, so no guest waits for either disk, \
          however slow. For the base of a `cow`, which guests read and do not change. When everything is copied, the \
          disk at `to` and then the one at `from` are flushed; `state` is `clean` when that has been done.\n\n\
          **Guests first.** While guests are active, and for 100 ms after a request of theirs, four chunks at the \
          most are under way, each is followed by a pause of a quarter of what it took, 100 ms at the most, and `busy_rate` \
          counts, too. When they are idle, `depth` chunks are under way at `rate`. Zeros count nothing.\n\n\
          **Errors.** What cannot be read or written stays dirty. It is tried again after a second, then after \
          two, up to 30 seconds, or when `retry` is called; other chunks go on until 16 have failed. `error` says \
          which side has failed. Nothing is copied twice at once, and nothing becomes clean but by a change that \
          has succeeded at `to`.\n\n\
          **Comparing.** `verify` reads both disks, chunk by chunk, while guests go on. What is dirty is left out, as it \
          has to be copied first. The disks are alike if at its end `verified` is `total`. If something differs, it \
          is made dirty, `state` is `differs`, and nothing is copied until `retry` is called, which copies it again, or \
          `verify`. What differs has been changed past the mirror, or by a disk that is failing: look for the reason \
          first. An error while reading ends it.\n\n\
          A restart or a reload with another map begins at what is dirty in that; without `only`, at the first \
          byte.",
    family: Family::Migrate,
    params: Params::PARAMS,
    ports: Ports { input: false, out: Outs::Named(&["from", "to"]) },
    handlers: &[
        Handler {
            name: "state",
            access: Access::Read,
            doc: "`copying`, `paused`, `waiting` after an error, `clean`, `verifying` or `differs`",
        },
        Handler { name: "remaining", access: Access::Read, doc: "bytes still to be copied" },
        Handler { name: "total", access: Access::Read, doc: "bytes of the disk at `from`" },
        Handler { name: "copied", access: Access::Read, doc: "bytes that have been written, without zeros" },
        Handler {
            name: "skipped",
            access: Access::Read,
            doc: "bytes that are zeros and were not written as data",
        },
        Handler {
            name: "rate_now",
            access: Access::Read,
            doc: "bytes copied in a second, over the last few seconds",
        },
        Handler { name: "passes", access: Access::Read, doc: "how often it has begun at the start" },
        Handler {
            name: "error",
            access: Access::Read,
            doc: "what has failed and waits, or differs; else empty",
        },
        Handler {
            name: "verified",
            access: Access::Read,
            doc: "bytes that the last `verify` has found alike; `total` of them at its end if all are",
        },
        Handler { name: "under_way", access: Access::Read, doc: "chunks that are being moved just now" },
        Handler { name: "progress", access: Access::Read, doc: "all of these at once, as a JSON object" },
        Handler { name: "rate", access: Access::ReadWrite, doc: "bytes in a second, or `unlimited`" },
        Handler { name: "busy_rate", access: Access::ReadWrite, doc: "the same while guests are active" },
        Handler { name: "depth", access: Access::ReadWrite, doc: "chunks under way at once" },
        Handler { name: "paused", access: Access::ReadWrite, doc: "`yes` to begin no chunk, `no` to go on" },
        Handler { name: "verify", access: Access::Call, doc: "begins to compare both disks" },
        Handler {
            name: "retry",
            access: Access::Call,
            doc: "tries again now what has failed, or copies again what differs",
        },
    ],
    serialises: true,
    example: "element Guest (type nbd) (listen unix:copy.sock)\n\
              element Still (type readonly)\n\
              element Old (type file) (path old.img) (size 64M)\n\
              element Copy (type copy) (rate 200M/s)\n\
              element New (type file) (path new.img) (size 64M)\n\
              Guest -> Still -> Old\n\
              (Copy, from) -> Old\n\
              (Copy, to) -> New\n",
    check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let only = params.only.as_ref().map(|only| build.refer(only)).transpose()?;
        Ok(Arc::new(Copy::new(&params, only)))
    },
    ..ElementType::BASE
};

fn check(params: &Given) -> Result<(), Vec<ParamError>> {
    let Params { chunk: Size(chunk), .. } = Params::from(params)?;
    match (64 << 10..=64 << 20).contains(&chunk) {
        true => Ok(()),
        false => Err(vec![params.error("chunk", "expected a size from 64k to 64M")]),
    }
}

/// What can be set while it runs.
#[derive(Clone, Copy)]
struct Settings {
    rate: Bandwidth,
    busy_rate: Bandwidth,
    depth: Depth,
    paused: bool,
}

/// What it does.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum State {
    #[default]
    Copying,
    Paused,
    Waiting,
    Clean,
    Verifying,
    Differs,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Copying => "copying",
            State::Paused => "paused",
            State::Waiting => "waiting",
            State::Clean => "clean",
            State::Verifying => "verifying",
            State::Differs => "differs",
        }
    }
}

/// What handlers speak of.
#[derive(Default)]
struct Now {
    state: State,
    error: String,
    /// Both disks are to be compared, or are just being.
    verify: bool,
    /// What has failed is to be tried again at once.
    retry: bool,
    /// Something differs, and nobody has said yet that it is to be copied again.
    differs: bool,
    /// The operator has been told that nothing is left to do.
    clean: bool,
    recent: Recent,
    /// Of the graph that runs, or will.
    place: Option<Arc<Place>>,
}

struct Copy {
    only: Option<Arc<DirtyMap>>,
    frozen: bool,
    chunk: u64,
    order: Way,
    settings: Mutex<Settings>,
    now: Mutex<Now>,
    counters: Counters,
    /// Tells `run` that there is something to look at.
    wake: Notify,
}

/// Bytes of which it is known together whether they have been copied, where no map says that.
const GRANULE: u64 = 64 << 10;

impl Copy {
    fn new(params: &Params, only: Option<Arc<DirtyMap>>) -> Copy {
        let Params { rate, busy_rate, depth, paused, frozen, .. } = *params;
        Copy {
            only,
            frozen,
            chunk: params.chunk.0,
            order: params.order,
            settings: Mutex::new(Settings { rate, busy_rate, depth, paused }),
            now: Mutex::default(),
            counters: Counters::default(),
            wake: Notify::new(),
        }
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        // Every change is complete before anything can panic.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The map of what has been copied, where `only` names none: the one before, if the disk is as large.
    fn own_map(&self, size: u64) -> Result<Arc<DirtyMap>> {
        let before = self.now().place.as_ref().map(|place| place.map.clone());
        if let Some(map) = before.filter(|map| map.size() == size) {
            return Ok(map);
        }
        let map = DirtyMap::new(GRANULE, true);
        map.cover(size)?;
        Ok(Arc::new(map))
    }

    /// A map of what a backup has frozen; nothing of that is known yet.
    fn map_of_frozen(&self, changes: &DirtyMap, size: u64) -> Result<Arc<DirtyMap>> {
        if changes.size() != size {
            let changes = changes.size();
            let message = format!(
                "the map that `only` names is that of a disk of {changes} bytes, and the disk at `from` has {size}: name \
                 a `log_dirty` above it"
            );
            return Err(Error::invalid(message));
        }
        let map = DirtyMap::new(changes.granule(), false);
        map.cover(size)?;
        Ok(Arc::new(map))
    }

    fn place(&self, from: Geometry, to: Geometry) -> Result<Place> {
        if to.size < from.size {
            let (from, to) = (Size(from.size), Size(to.size));
            let message =
                format!("the disk at `to` has {to}, that at `from` {from}: make it at least as large");
            return Err(Error::new(Kind::NoSpace, message));
        }
        if to.read_only {
            return Err(Error::new(
                Kind::Denied,
                "the disk at `to` is read-only: nothing can be copied to it",
            ));
        }
        let map = match &self.only {
            None => self.own_map(from.size)?,
            Some(changes) if self.frozen => self.map_of_frozen(changes, from.size)?,
            Some(map) if map.size() == to.size => map.clone(),
            Some(map) => {
                let (map, to) = (map.size(), to.size);
                let message = format!(
                    "the map that `only` names is that of a disk of {map} bytes, and the disk at `to` has {to}: name a \
                     `log_dirty` on the way to it"
                );
                return Err(Error::invalid(message));
            }
        };
        let own = self.only.is_none() || self.frozen;
        let mut place = Place::new(from, to, map, own, self.chunk);
        place.frozen = self.frozen;
        Ok(place)
    }

    fn progress(&self) -> Progress {
        let place = self.now().place.clone();
        let (remaining, total) = place.map_or((0, 0), |place| (place.remaining(), place.from));
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let now = self.now();
        Progress {
            state: now.state.name().into(),
            remaining,
            total,
            copied: count(&self.counters.copied),
            skipped: count(&self.counters.skipped),
            rate_now: now.recent.rate(blockmason::rt::now()),
            passes: count(&self.counters.passes),
            error: now.error.clone(),
            verified: count(&self.counters.verified),
            under_way: count(&self.counters.under_way),
        }
    }
}

impl Element for Copy {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let [(_, from), (_, to)] = children.ports else {
            return Err(Error::internal("a disk to read and one to write were expected"));
        };
        let place = Arc::new(self.place(*from, *to)?);
        // Of a graph that may yet be refused nobody is told, if there is one that runs.
        self.now().place.get_or_insert_with(|| place.clone());
        Ok(Prepared::with(Geometry::new(0), place))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.fail(&req, Error::internal("nothing leads to a copier"))
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(run::work(self, cx)))
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        let Some(old) = (old as &dyn Any).downcast_ref::<Copy>() else { return Ok(()) };
        self.counters.take(&old.counters);
        let old = old.now();
        let (verify, differs, error) = (old.verify, old.differs, old.error.clone());
        let place = old.place.clone().filter(|place| place.own && self.only.is_none());
        drop(old);
        let mut now = self.now();
        (now.verify, now.differs, now.error) = (verify, differs, error);
        // It has been prepared with a map in which nothing is copied yet.
        if let (Some(old), Some(place)) = (place, &now.place) {
            place.learn(&old.map);
        }
        Ok(())
    }

    fn hand_over<'a>(&'a self, _leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        Box::pin(ready(Luggage::of(Left::VERSION, &self.counters.left())))
    }

    fn take_over<'a>(&'a self, luggage: Luggage, _coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        let left: Result<Left> = luggage.read(Left::VERSION);
        Box::pin(ready(left.map(|left| self.counters.set(&left))))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let settings = *self.settings();
        match handler {
            "rate" => Ok(settings.rate.to_string()),
            "busy_rate" => Ok(settings.busy_rate.to_string()),
            "depth" => Ok(settings.depth.to_string()),
            "paused" => Ok(if settings.paused { "yes" } else { "no" }.to_owned()),
            _ => self.progress().get(handler),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        let mut settings = self.settings();
        match handler {
            "rate" => settings.rate = value.parse().map_err(Error::invalid)?,
            "busy_rate" => settings.busy_rate = value.parse().map_err(Error::invalid)?,
            "depth" => settings.depth = value.parse().map_err(Error::invalid)?,
            "paused" => settings.paused = progress::yes_or_no(value)?,
            _ => return Err(Error::no_handler(handler)),
        }
        drop(settings);
        self.wake.notify_one();
        Ok(())
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        let mut now = self.now();
        let answer = match handler {
            "verify" => {
                if !std::mem::replace(&mut now.verify, true) {
                    self.counters.verified.store(0, Ordering::Relaxed);
                }
                now.state = State::Verifying;
                "comparing; `state` says when it is done, and `verified` is `total` then if all is alike"
            }
            "retry" => {
                (now.retry, now.differs) = (true, false);
                now.error.clear();
                "what has failed or differs is copied again"
            }
            _ => return Err(Error::no_handler(handler)),
        };
        drop(now);
        self.wake.notify_one();
        Ok(answer.to_owned())
    }
}
