//! Compresses a disk, where what lies below takes room only for what is written.
//!
//! `codec` makes slots of clusters, `volume` writes and reads them and gives room back.

mod codec;
#[cfg(test)]
mod tests;
mod volume;

use super::label::{END, Opened, Wanted};
use super::own::{Io, OUT};
use super::power::{Cluster, Room};
use super::slots::{self, Layout};
use crate::compression::Algorithm;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::Size;
use blockmason::lang::{ParamError, Params as Given};
use blockmason::{Children, Cx, Element, Error, Flow, LocalBoxFuture, Op, Prepared, Request, Result, rt};
use codec::Codec;
use futures::future::{Either, select};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use volume::{MANY, Shared, Volume};

blockmason::params! {
    /// Compression.
    struct Params {
        /// What is written from now on is compressed so; what is there is read however it was.
        algorithm: Algorithm = "lz4",
        /// How much work `zstd` does: 1 to 19. Without it 1.
        level: Option<u64>,
        /// Bytes that are compressed together: a power of two from 16k to 4M. Of a disk that exists it must be its own.
        cluster: Cluster = "64k",
        /// What the disk below takes and gives back at least, a power of two from 512 to 1M, half a cluster at the most: 4k for
        /// files and pools, the size of an object for `s3`. Of a disk that exists it must be its own.
        unit: Room = "4k",
        /// Makes a compressed disk of an empty one.
        create: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "compress",
    summary: "compresses a disk above one that takes room only for what is written",
    doc: "Clusters are compressed on their way down. Each has a slot of its own on the disk below, and is written to its beginning; the rest \
          of the slot is discarded. So the disk below needs no less *size*, rather more: a unit for each cluster, and a little at the start. \
          It takes less *room* if it takes room for what is written only: a file with holes, a pool (`parallax`, `radix`), a bucket \
          with small objects. What that comes to, and what to choose where: [compress.md](../compress.md). Clusters that \
          would not be a unit shorter are stored as they are; clusters of zeros are not stored.\n\n\
          **The disk below** must give back what is discarded, and write a slot as a whole or not at all, whatever dies meanwhile. A disk that does \
          not promise that is refused: put a `wal` between this and a file or a block device. An empty disk becomes a \
          compressed one where `(create yes)` says so; anything else is refused. Format: [formats/compress.md](../formats/compress.md).\n\n\
          **Order with others.** What is encrypted cannot be compressed: `compress` belongs above `crypto`, and an event says so if nothing that is \
          written can be. A `cache` above it answers small writes, which here cost a cluster read and one written.\n\n\
          **Durability.** A cluster is the old or the new one after a loss of power. Flushes and FUA are passed on. What an older and longer \
          cluster has left behind is discarded when the new one is durable, for which every two seconds of writing take a flush of \
          the element's own; whatever is forgotten by a crash takes room until its cluster is written again.\n\n\
          **Damage.** Each slot has a checksum of what is stored, its address, and the id of the disk. What does not match, or does not unpack to \
          exactly a cluster, is answered with EIO, and an event names it. Nothing that is read says how much memory to take.\n\n\
          **Speed.** Requests of more than 64 KiB are compressed beside the shards.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "error", access: Access::Read, doc: "why the disk cannot be opened, else empty" },
        Handler {
            name: "taken",
            access: Access::Read,
            doc: "bytes of clusters that were written since the start",
        },
        Handler { name: "stored", access: Access::Read, doc: "bytes that they were written as" },
        Handler {
            name: "plain",
            access: Access::Read,
            doc: "clusters of those that were not worth compressing",
        },
        Handler { name: "waiting", access: Access::Read, doc: "slots whose rest is still to be discarded" },
        Handler {
            name: "trimmed",
            access: Access::Read,
            doc: "slots whose rest was discarded since the start",
        },
    ],
    layout: true,
    tuning: &["algorithm", "level", "create"],
    example: "element Guest (type nbd) (listen unix:compress.sock)\n\
              element Small (type compress) (algorithm zstd) (create yes)\n\
              element Disk (type mem) (size 64M)\n\
              Guest -> Small -> Disk\n",
    check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let level = codec::level(params.algorithm, params.level)?;
        Ok(Arc::new(Compress::new(&params, level)))
    },
    ..ElementType::BASE
};

fn check(given: &Given) -> Result<(), Vec<ParamError>> {
    let params = Params::from(given)?;
    let mut wrong = Vec::new();
    if let Err(error) = codec::level(params.algorithm, params.level) {
        wrong.push(given.error("level", error.message()));
    }
    if params.unit.0 * 2 > params.cluster.0 {
        wrong.push(given.error("unit", "expected half a cluster at the most: less could never be saved"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// How long rests of slots wait to be discarded, many at a time.
const PERIOD: Duration = Duration::from_secs(2);

/// Clusters of which some must be compressible, or somebody should be told.
const SAMPLE: u64 = 256;

/// What was counted, in all graphs.
#[derive(Default)]
struct Counts {
    taken: AtomicU64,
    stored: AtomicU64,
    plain: AtomicU64,
    packed: AtomicU64,
    trimmed: AtomicU64,
    told: AtomicBool,
}

impl Counts {
    /// Counts a cluster. True if it is time to say, once, that nothing is gained.
    fn count(&self, plain: bool) -> bool {
        let of = if plain { &self.plain } else { &self.packed };
        let count = of.fetch_add(1, Ordering::Relaxed) + 1;
        plain
            && count >= SAMPLE
            && self.packed.load(Ordering::Relaxed) == 0
            && !self.told.swap(true, Ordering::Relaxed)
    }
}

struct Compress {
    algorithm: Algorithm,
    level: i32,
    cluster: u64,
    unit: u64,
    create: bool,
    shared: Arc<Shared>,
    error: Mutex<String>,
}

/// What one graph makes of it.
struct Place {
    layout: Layout,
    opened: Opened,
    volume: OnceLock<Volume>,
}

impl Compress {
    fn new(params: &Params, level: i32) -> Compress {
        Compress {
            algorithm: params.algorithm,
            level,
            cluster: params.cluster.0,
            unit: params.unit.0,
            create: params.create,
            shared: Arc::default(),
            error: Mutex::default(),
        }
    }

    /// The volume of this graph, opened if it is not yet.
    async fn volume<'a>(&self, cx: Cx<'a>) -> Result<&'a Volume> {
        let place: &Place = cx.prepared();
        let wanted = Wanted {
            magic: codec::MAGIC,
            what: "compressed",
            layout: place.layout,
            kind: self.unit as u32,
            kind_says: |kind| Some(format!("(unit {})", Size(u64::from(kind)))),
            create: self.create,
        };
        let opened = place.opened.id(&Io::new(cx), &wanted).await;
        let text = opened.as_ref().err().map(ToString::to_string).unwrap_or_default();
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = text;
        let codec = |id| Codec {
            id,
            algorithm: self.algorithm,
            level: self.level,
            cluster: self.cluster as usize,
            unit: self.unit as usize,
        };
        let volume = |id| Volume { layout: place.layout, codec: codec(id), shared: self.shared.clone() };
        opened.map(|id| place.volume.get_or_init(|| volume(*id)))
    }

    /// Gives room back until the graph closes, and once more then.
    async fn work(&self, cx: Cx<'_>) {
        let place: &Place = cx.prepared();
        let mut closing = pin!(cx.closing());
        let mut told = false;
        loop {
            let some = async {
                if self.shared.waiting() == 0 {
                    self.shared.wake.notified().await;
                }
                if self.shared.waiting() < MANY {
                    let _ = rt::timeout(PERIOD, self.shared.wake.notified()).await;
                }
            };
            let ends = matches!(select(closing.as_mut(), pin!(some)).await, Either::Left(_));
            let Some(volume) = place.volume.get() else {
                if ends {
                    return;
                }
                continue;
            };
            if let Err(error) = volume.trim(cx).await {
                if !std::mem::replace(&mut told, true) {
                    cx.notice(format!("no room is given back, and will be later: {}", error.message()));
                }
                if !ends {
                    cx.sleep(PERIOD).await;
                }
            }
            if ends {
                return;
            }
        }
    }
}

impl Element for Compress {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        let slot = Codec::slot(self.cluster, self.unit);
        let start = END.next_multiple_of(self.unit);
        let layout = Layout::new(self.cluster, slot, start, below.size, "compressed")?;
        let geometry = layout.geometry(&below, 0, "could not be unpacked")?;
        if !below.ops.discard {
            return Err(Error::unsupported(
                "the disk below gives nothing back that is discarded: to compress what it has would save nothing",
            ));
        }
        // Each cluster is a write of its own.
        let geometry = blockmason::Geometry { atomic: self.cluster as u32, ..geometry };
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
        Some(Box::pin(self.work(cx)))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let counts = &self.shared.counts;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed).to_string();
        match handler {
            "error" => Ok(self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()),
            "taken" => Ok(count(&counts.taken)),
            "stored" => Ok(count(&counts.stored)),
            "plain" => Ok(count(&counts.plain)),
            "trimmed" => Ok(count(&counts.trimmed)),
            "waiting" => Ok(self.shared.waiting().to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
