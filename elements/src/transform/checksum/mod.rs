//! Notices when a disk gives back something else than what was written to it.
//!
//! `sum` makes slots of blocks, `verify` compares all of a disk in the background.

mod sum;
#[cfg(test)]
mod tests;
mod verify;

use super::label::{END, Opened, Wanted};
use super::own::{Io, OUT};
use super::power::Block;
use super::slots::{self, Layout};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::sched::RangeLock;
use blockmason::{Children, Cx, Element, Error, Flow, LocalBoxFuture, Op, Prepared, Request, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use sum::{Sum, TRAILER, Volume};
use verify::Verify;

blockmason::params! {
    /// Checksums.
    struct Params {
        /// How blocks are summed. Of a disk that exists it must be its own.
        sum: Sum = "crc32",
        /// Bytes that have one checksum: a power of two from 512 to 64k. Of a disk that exists it must be its own.
        block: Block = "4k",
        /// Makes a disk with checksums of an empty one.
        create: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "checksum",
    summary: "notices when a disk gives back something else than what was written to it",
    doc: "Each block is stored with a checksum of its contents, its address and the id of the disk, and compared when it is \
          read. A block that has rotted, was written to another place, or comes from another disk is answered with EIO, and an event \
          names it; its data is never given out. Below each leg of a mirror it says which leg is wrong, see \
          [checksum.md](../checksum.md). `crc32` misses one damage in four thousand million; `blake3` none that chance \
          makes. Neither keeps anybody from changing a block on purpose: that is `crypto`, which has no need of this.\n\n\
          **The disk below.** A block and its checksum are in one slot, 16 bytes longer than the block, which must be written as a whole or \
          not at all, whatever dies meanwhile; else a loss of power would leave blocks that look rotten. A disk that does not promise that is \
          refused. `s3` promises it; a `wal`, whose log sees to it; and `mem`. Files and block devices do not: put a `wal` in \
          between, which writes everything twice. 8 KiB at the start are taken, and 16 bytes for each block. An empty \
          disk is made one with checksums where `(create yes)` says so; anything else is refused. Format: \
          [formats/checksum.md](../formats/checksum.md).\n\n\
          **What it does not notice.** A write that the disk below has answered and lost: the old block is whole. A slot that was made zeros: \
          blocks that were never written, or were discarded, are that.\n\n\
          **Order, durability.** A write of several blocks is one write below, and atomic as that is. Flushes and FUA are passed on. \
          What is shorter than a block is read, compared, modified and written: so part of a block that is damaged cannot be written, \
          all of it can, and it is whole then.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "error", access: Access::Read, doc: "why the disk cannot be opened, else empty" },
        Handler { name: "compared", access: Access::Read, doc: "blocks that were compared since the start" },
        Handler {
            name: "damaged",
            access: Access::Read,
            doc: "how often a block was found damaged since the start",
        },
        Handler {
            name: "verify",
            access: Access::Call,
            doc: "begins to compare all of the disk in the background; `stop` ends that",
        },
        Handler {
            name: "verified",
            access: Access::Read,
            doc: "how much of that is done, in percent, or `none`",
        },
        Handler {
            name: "found",
            access: Access::Read,
            doc: "damaged blocks that the last such run has found",
        },
    ],
    layout: true,
    tuning: &["create"],
    example: "element Guest (type nbd) (listen unix:checksum.sock)\n\
              element Sums (type checksum) (create yes)\n\
              element Disk (type mem) (size 64M)\n\
              Guest -> Sums -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Checksum::new(&build.read(Params::from)?))),
    ..ElementType::BASE
};

/// What was counted, in all graphs.
#[derive(Default)]
struct Counts {
    compared: AtomicU64,
    damaged: AtomicU64,
}

struct Checksum {
    sum: Sum,
    block: u64,
    create: bool,
    ranges: Arc<RangeLock>,
    counts: Arc<Counts>,
    verify: Verify,
    error: std::sync::Mutex<String>,
}

/// What one graph makes of it.
struct Place {
    layout: Layout,
    opened: Opened,
    volume: OnceLock<Volume>,
}

impl Checksum {
    fn new(params: &Params) -> Checksum {
        Checksum {
            sum: params.sum,
            block: params.block.0,
            create: params.create,
            ranges: Arc::default(),
            counts: Arc::default(),
            verify: Verify::default(),
            error: std::sync::Mutex::default(),
        }
    }

    /// The volume of this graph, opened if it is not yet.
    async fn volume<'a>(&self, cx: Cx<'a>) -> Result<&'a Volume> {
        let place: &Place = cx.prepared();
        let wanted = Wanted {
            magic: sum::MAGIC,
            what: "checksum",
            layout: place.layout,
            kind: self.sum.number(),
            kind_says: |kind| Sum::from(kind).map(|sum| format!("(sum {sum})")),
            create: self.create,
        };
        let opened = place.opened.id(&Io::new(cx), &wanted).await;
        let text = opened.as_ref().err().map(ToString::to_string).unwrap_or_default();
        *self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = text;
        let volume = |id| Volume::new(place.layout, self.sum, id, self.ranges.clone(), self.counts.clone());
        opened.map(|id| place.volume.get_or_init(|| volume(id)))
    }
}

impl Element for Checksum {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        let layout = Layout::new(self.block, self.block + TRAILER as u64, END, below.size, "checksum")?;
        let geometry = layout.geometry(&below, 0, "would look like one that has rotted")?;
        Ok(Prepared::with(geometry, Place { layout, opened: Opened::default(), volume: OnceLock::new() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match cx.prepared::<Place>().volume.get() {
            Some(volume) => slots::serve(volume, req, cx),
            // Nothing was written here: a disk that does not open must not keep its graph.
            None if matches!(req.op, Op::Flush | Op::Control) => cx.forward(OUT, req),
            None => cx.later(&req.clone(), async move {
                let volume = self.volume(cx).await?;
                slots::serve(volume, req, cx).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(async move { self.verify.work(|| self.volume(cx), cx).await }))
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "error" => Ok(self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()),
            "compared" => Ok(self.counts.compared.load(Ordering::Relaxed).to_string()),
            "damaged" => Ok(self.counts.damaged.load(Ordering::Relaxed).to_string()),
            _ => self.verify.get(handler),
        }
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        match (handler, argument) {
            ("verify", "") => self.verify.begin(),
            ("verify", "stop") => self.verify.stop(),
            ("verify", _) => Err(Error::invalid("expected nothing, or `stop`")),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
