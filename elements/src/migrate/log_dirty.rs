//! Keeps account of which parts of the disk below differ from another one.

use super::map::{DirtyMap, Intent};
use crate::services::Test;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::element::BoxFuture;
use blockmason::heads::Account;
use blockmason::lang::value::{FilePath, Service, Size};
use blockmason::{
    Children, Class, Cx, Element, Error, Flow, Kind, LocalBoxFuture, Luggage, Op, Open, Origin, Prepared,
    Reply, Request, Result,
};
use futures::future::{Either, select};
use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::future::ready;
use std::io::{Read, Seek, Write};
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

/// A power of two from 4 KiB to 16 MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Granule(u64);

impl FromStr for Granule {
    type Err = String;

    fn from_str(text: &str) -> Result<Granule, String> {
        let Size(bytes) = text.parse()?;
        let fits = bytes.is_power_of_two() && (4 << 10..=16 << 20).contains(&bytes);
        fits.then_some(Granule(bytes))
            .ok_or(format!("expected a power of two from 4k to 16M, found `{text:.40}`"))
    }
}

impl fmt::Display for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

blockmason::text_value!(Granule, "size");

blockmason::words! {
    /// What is known at first.
    enum Initially {
        /// Everything differs.
        Dirty = "dirty",
        /// Nothing does.
        Clean = "clean",
    }
}

blockmason::words! {
    /// What a change means.
    enum Written {
        /// It brings the disk below up to date: this is the leg of a mirror.
        Clean = "clean",
        /// It makes the disk below differ from its last backup.
        Dirty = "dirty",
    }
}

blockmason::params! {
    /// Keeps account of what differs.
    struct Params {
        /// Bytes of which the map knows only together whether they differ: a power of two from 4k to 16M.
        granule: Granule = "64k",
        /// Keeps the map in this file, which is made when it is missing. Without it the map ends with the process.
        file: Option<FilePath>,
        /// What is known at first: that all is `dirty`, or that all is `clean`. A file that exists knows better.
        initially: Initially = "dirty",
        /// What a change makes of the granules that it touches: `clean`, as on the leg of a mirror, or `dirty`, as
        /// since a backup.
        written: Written = "clean",
        /// What this account is called in the heads of the volumes below: 32 hexadecimal digits. `mason backup`
        /// chooses it.
        account: Option<Account>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "log_dirty",
    summary: "keeps account of which parts of the disk below differ from another one",
    doc: "Requests pass unmodified. A map says of each granule of the disk whether it may differ from another \
          disk, which others refer to: a `copy` copies what is dirty, an `if` forwards only that.\n\n\
          With `(written clean)` this stands on the leg of a mirror that is being filled (Block Mason, section 3.1.1): \
          a change that succeeds on all of a granule makes it clean, one on a part of it leaves it as it was, and \
          one that fails makes it dirty. So does a flush from within the graph that fails, of all that was written since the last one \
          that did not: the disk below may have forgotten it. With `(written dirty)` it stands above a disk of which there is a backup: \
          a change makes the granules that it touches dirty before it is issued.\n\n\
          A `tee` above that refers to the map announces changes to it before it sends them down any leg.\n\n\
          With `file` the map outlives the process, also one that is killed: a change is marked there before it is \
          issued. After a loss of power all of a region is dirty in which there had been changes a few seconds \
          before; regions are of 64 MiB, or more on large disks. The first change in a region waits until that is durable, and \
          after some seconds without changes the disk below is flushed and the region is taken back; one of which everything is dirty is marked from the start. A file of another \
          disk, or of other granules, is refused, as is one that somebody else has open, and never overwritten. \
          The file knows nothing of changes that are made while no `log_dirty` keeps it: delete it then. Format: \
          docs/formats/dirty.md.\n\n\
          With `account` the heads of the volumes below may name it: as long as they do, nobody has written to them who \
          has not passed here. A graph that serves them otherwise takes the name out of the heads.\n\n\
          When parameters change while the graph runs, what was dirty stays so; granules of another size, or the end \
          of a disk that has grown, are dirty as soon as a part of them is or may be. A successor in another process \
          goes on with the map, with a file or without.",
    family: Family::Migrate,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "remaining", access: Access::Read, doc: "dirty bytes" },
        Handler { name: "granules", access: Access::Read, doc: "dirty granules and all of them, `12/1024`" },
    ],
    provides: &["dirty_map", "test", "account"],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:log_dirty.sock)\n\
              element Changed (type log_dirty) (initially clean) (written dirty)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Changed -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let (granule, dirty) = (params.granule.0, params.initially == Initially::Dirty);
        let map = match &params.file {
            Some(file) => DirtyMap::in_file(granule, dirty, &file.0, build.graph, build.name)?,
            None => DirtyMap::new(granule, dirty),
        };
        let (cleans, account) = (params.written == Written::Clean, params.account);
        Ok(Arc::new(LogDirty { map: Arc::new(map), cleans, account }))
    },
    ..ElementType::BASE
};

/// How long nothing must happen in a region before it is taken back.
const REST: Duration = Duration::from_secs(5);

/// How long the last flush may take.
const LAST: Duration = Duration::from_secs(1);

/// The form of what is handed over to another process.
const LUGGAGE: u32 = 1;

/// What a successor is told of the map; its words are in a file of memory.
#[derive(Serialize, Deserialize)]
struct Left {
    granule: u64,
    size: u64,
}

struct LogDirty {
    map: Arc<DirtyMap>,
    /// Changes bring the disk below up to date.
    cleans: bool,
    /// What it is called in heads.
    account: Option<Account>,
}

/// A change on its way below.
struct Change {
    intent: Intent,
    cleans: bool,
    ended: bool,
}

impl Change {
    fn new(intent: Intent, cleans: bool) -> Change {
        if !cleans {
            intent.failed();
        }
        Change { intent, cleans, ended: false }
    }

    fn end(mut self, reply: Reply) -> Reply {
        self.ended = true;
        match &reply {
            Ok(_) if self.cleans => self.intent.synced(),
            Ok(_) => {}
            Err(_) => self.intent.failed(),
        }
        reply
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        // Nobody waits any more, and what comes of it nobody knows.
        if !self.ended {
            self.intent.failed();
        }
    }
}

impl LogDirty {
    /// Takes back regions that rest, until the graph closes; then all that can be.
    async fn tend(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        loop {
            let wait = async {
                match self.map.is_at_work() {
                    true => cx.sleep(REST).await,
                    false => self.map.has_work().await,
                }
            };
            let last = matches!(select(closing.as_mut(), pin!(wait)).await, Either::Left(_));
            self.rest(cx, last).await;
            if last {
                return;
            }
        }
    }

    async fn rest(&self, cx: Cx<'_>, last: bool) {
        let mut regions = self.map.resting(last);
        if !regions.is_empty()
            && let Err(error) = self.flush(cx, last).await
        {
            tracing::warn!(graph = cx.graph_name(), element = cx.name(), "regions stay marked: {error}");
            regions.clear();
        }
        if let Err(error) = self.map.rest(regions).await {
            tracing::warn!(graph = cx.graph_name(), element = cx.name(), "regions stay marked: {error}");
        }
    }

    /// Flushes the disk below. Where the graph closes nobody waits long for a disk that may not answer.
    async fn flush(&self, cx: Cx<'_>, last: bool) -> Reply {
        let flush = Request { origin: Origin::Internal, class: Class::Background, ..Request::flush() };
        let (flush, flushing) = (cx.child(&flush), self.cleans.then(|| self.map.flushing_copy()));
        let flushed = cx.detach_with(move |cx| {
            cx.forward(0, flush).then(|reply| match flushing {
                Some(flushing) => flushing.end(reply),
                None => reply,
            })
        });
        let late = async {
            if !last {
                cx.closing().await;
            }
            cx.sleep(LAST).await;
        };
        match select(flushed, pin!(late)).await {
            Either::Left((reply, _)) => reply,
            Either::Right(_) => Err(Error::new(Kind::Busy, format!("not flushed in {LAST:?}"))),
        }
    }

    /// The words of the map as a file of memory.
    fn pack(&self) -> Result<Luggage> {
        let lost = |error| Error::io(error, "the map cannot be handed over");
        let fd = rustix::fs::memfd_create(c"map", MemfdFlags::CLOEXEC).map_err(|errno| lost(errno.into()))?;
        let mut file = File::from(fd);
        let words: Vec<u8> = self.map.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&words).map_err(lost)?;
        let left = Left { granule: self.map.granule(), size: self.map.size() };
        Ok(Luggage { fds: vec![file.into()], ..Luggage::of(LUGGAGE, &left)? })
    }

    fn unpack(&self, mut luggage: Luggage) -> Result<()> {
        let Left { granule, size } = luggage.read(LUGGAGE)?;
        if (granule, size) != (self.map.granule(), self.map.size()) {
            return Err(Error::invalid("the map that was handed over is that of another disk"));
        }
        let fd = luggage.fds.pop().ok_or_else(|| Error::invalid("the map was not handed over"))?;
        let lost = |error| Error::io(error, "the map that was handed over cannot be read");
        let (mut file, mut bytes) = (File::from(fd), Vec::new());
        file.rewind().map_err(lost)?;
        let most = size.div_ceil(granule).div_ceil(64) * 8;
        file.take(most + 1).read_to_end(&mut bytes).map_err(lost)?;
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        });
        self.map.set_words(&words.collect::<Vec<_>>())
    }
}

impl Element for LogDirty {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?.above();
        if below.forgetful && self.cleans {
            self.map.may_be_forgotten();
        }
        self.map.cover(below.size)?;
        Ok(Prepared::of(below))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Write | Op::WriteZeroes | Op::Discard if req.len > 0 => {}
            // A guest is not told what was lost.
            Op::Flush if self.cleans && req.origin != Origin::Guest => {
                let flush = self.map.flushing_copy();
                return cx.forward(0, req).then(|reply| flush.end(reply));
            }
            _ => return cx.forward(0, req),
        }
        let range = req.offset..req.end();
        match self.map.intend_now(range.clone()) {
            Some(intent) => {
                let change = Change::new(intent, self.cleans);
                cx.forward(0, req).then(|reply| change.end(reply))
            }
            None => cx.later(&req.clone(), async move {
                let change = Change::new(self.map.intend(range).await?, self.cleans);
                let reply = cx.forward(0, req).await;
                change.end(reply)
            }),
        }
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        self.map.open().map(|()| None)
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        self.map.is_kept().then(|| Box::pin(self.tend(cx)) as LocalBoxFuture<'a, ()>)
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        if let Some(old) = (old as &dyn Any).downcast_ref::<LogDirty>() {
            self.map.inherit(&old.map);
        }
        Ok(())
    }

    fn hand_over<'a>(&'a self, _leaving: &'a Open<'a>) -> BoxFuture<'a, Result<Luggage>> {
        // What is in a file is found there: the memory of the kernel is the same.
        Box::pin(ready(if self.map.is_kept() { Ok(Luggage::none()) } else { self.pack() }))
    }

    fn take_over<'a>(&'a self, luggage: Luggage, _coming: &'a Open<'a>) -> BoxFuture<'a, Result<()>> {
        Box::pin(ready(if luggage.is_none() { Ok(()) } else { self.unpack(luggage) }))
    }

    fn provide(&self, service: &str) -> Option<Box<dyn Any>> {
        match service {
            DirtyMap::NAME => Some(Box::new(self.map.clone())),
            Account::NAME => Some(Box::new(self.account.clone()?)),
            <dyn Test>::NAME => Some(Box::new(self.map.clone() as Arc<dyn Test>)),
            _ => None,
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "remaining" => Ok(self.map.dirty_bytes().to_string()),
            "granules" => {
                let granule = self.map.granule();
                let (dirty, all) =
                    (self.map.dirty_bytes().div_ceil(granule), self.map.size().div_ceil(granule));
                Ok(format!("{dirty}/{all}"))
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests;
