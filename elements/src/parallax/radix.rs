//! A volume of a pool on the disk below.

use super::admin::{check_name, check_size};
use super::below::{Below, block_on};
use super::care::volume_params;
use super::format::{BLOCK, Compress, Format};
use super::lease::{self, Ask, Lease};
use super::open::{Opening, add_trees, create, is_empty, open, open_leased, read_label};
use super::parallax::HANDLERS;
use super::pool::{CHECKPOINT, Core, Pool};
use super::schedule::check_taken_name;
use super::settings::{NewSettings, Settings};
use super::volume::Volume;
use blockmason::describe::{Build, ElementType, Family, Outs, Ports};
use blockmason::lang::value::Size;
use blockmason::{
    Children, Cx, Element, Error, Extra, Flow, Geometry, Kind, LocalBoxFuture, Op, Ops, Origin, Prepared,
    Reply, Request, Result,
};
use futures::future::{Either, join, select};
use std::collections::VecDeque;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::{Notify, oneshot};

volume_params! {
    /// A volume of a pool.
    struct Params {
        /// The volume's name. It is made if there is none.
        volume: String,
        /// Bytes that the volume has, a multiple of 4096. They take room only when they are written.
        size: Size,
        /// Serves this snapshot of the volume instead, for reading only.
        snapshot: Option<String>,
        /// Keeps a checksum of each block, and compares it when the block is read. Blocks are then never
        /// written in place.
        checksums: bool = "no",
        /// What is left after a loss of power of a volume that the element makes: of each block its flushed or a later
        /// version (`block`), or what the whole volume was at some instant since the last flush (`prefix`), for which
        /// blocks are never written in place either.
        order: Order = "block",
        /// How what is written is compressed from now on: `no`, `lz4` or `zstd`. Without it, as it was; at first not at all. What is
        /// compressed is never written in place.
        compress: Option<Compress>,
        /// The format of the trees that the volume is in, 1 or 2. A pool may have both.
        format: Format = "1",
        /// Memory that the pool's map may take.
        memory: Size = "256M",
    }
}

blockmason::words! {
    /// What is left of a volume after a loss of power.
    enum Order {
        /// Each block by itself.
        Block = "block",
        /// All of it as it was at one instant.
        Prefix = "prefix",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "radix",
    summary: "a thin volume with snapshots, of a pool on the disk below",
    doc: "Keeps volumes in a pool on the disk below: copy-on-write radix trees over blocks of 4 KiB. A volume takes room for what \
          is written to it; discarded and zeroed ranges take none. An empty disk (its first block is zeros) is made a pool \
          by the first request; a disk with anything else on it is refused. The volume is made if the pool has none of that name.\n\n\
          Below may be a disk, all of which is then the pool; or an `isolation` over a `block_store`, where others have trees of their \
          own. In both cases one `radix` has the trees: several volumes of one pool are served by `(type parallax)`, or have a key \
          each.\n\n\
          **Snapshots.** `mason call Volume.snapshot NAME`, or a control request `snapshot NAME`, keeps the volume as it is at that instant. It takes one flush of the \
          disk below, whatever the size, and nobody waits for it. `(snapshot NAME)` serves it.\n\n\
          **Durability.** A write is answered when its data and a record of the log that leads to it have been written, so the \
          death of this process loses nothing. A flush is one flush of the disk below. After a loss of power each block \
          that was written since the last flush has its new or its flushed contents. A failed flush, or a log that cannot be \
          written, ends all changes until the graph is started anew.",
    family: Family::Parallax,
    params: Params::PARAMS,
    ports: Ports { input: true, out: Outs::Named(&["out"]) },
    handlers: HANDLERS,
    layout: true,
    tuning: &["on_full", "full_timeout", "memory", "snapshot_every", "keep", "scrub_every"],
    example: "element Guest (type nbd) (listen unix:radix.sock)\n\
              element Volume (type radix) (volume vm1) (size 1G)\n\
              element Pool (type file) (path pool.img) (size 256M)\n\
              Guest -> Volume -> Pool\n",
    check: Params::check_all,
    build: |build: &Build<'_>| Ok(Arc::new(Radix::new(build.read(Params::from)?)?)),
    ..ElementType::BASE
};

/// A pool that takes no changes is opened anew so often; then it is served for reading.
const TRIES: u32 = 3;

struct Radix {
    params: Params,
    opening: tokio::sync::Mutex<()>,
    /// By which a block store below knows it from others.
    opener: OnceLock<u64>,
    volume: OnceLock<Volume>,
    /// How often the pool was found to take no changes when it was opened.
    tries: AtomicU32,
    /// What an operator wants done, which needs the way down that `run` has.
    calls: Mutex<VecDeque<Call>>,
    called: Notify,
}

/// A control request of an operator.
struct Call {
    verb: String,
    argument: String,
    answer: oneshot::Sender<Reply>,
}

/// What is known for one graph.
struct Known {
    /// Bytes of what is below.
    size: u64,
    /// The volume may be used: a block store below, if there is one, knows of it.
    announced: OnceLock<()>,
}

impl Radix {
    fn new(params: Params) -> Result<Radix> {
        check_size(params.size.0)?;
        params.care()?;
        check_name(&params.volume)?;
        let (opening, opener, volume, tries, calls, called) = Default::default();
        Ok(Radix { params, opening, opener, volume, tries, calls, called })
    }

    /// The volume, if it is open and may be used.
    fn opened(&self, cx: Cx<'_>) -> Option<&Volume> {
        cx.prepared::<Known>().announced.get().and(self.volume.get())
    }

    /// The volume, opened if it is not yet.
    async fn open(&self, cx: Cx<'_>) -> Result<&Volume> {
        let _alone = self.opening.lock().await;
        if let Some(volume) = self.opened(cx) {
            return Ok(volume);
        }
        let below = Below::Port(cx);
        let opener = *self.opener.get_or_init(|| cx.rng(|rng| rng.u64(..)));
        let ask = Ask::Open { format: self.params.format.number(), opener };
        let lease = match lease::ask::<Lease>(ask, below).await {
            Err(error) if error.kind() == Kind::Unsupported => None,
            lease => Some(lease?),
        };
        let known = cx.prepared::<Known>();
        if let Some(volume) = self.volume.get() {
            // It has to be what it was in the graph before.
            let same_trees = volume.pool.space.lease() == lease.map(|lease| lease.owner);
            if !same_trees || read_label(below).await?.id != volume.pool.id {
                let message = "another pool is below, or another key: start the graph anew";
                return Err(Error::new(Kind::Busy, message));
            }
            let _ = known.announced.set(());
            return Ok(volume);
        }
        let Params { volume, size, checksums, order, memory, compress, .. } = &self.params;
        let pool = Arc::new(match lease {
            Some(lease) => open_leased(lease, memory.0, below).await?,
            None => self.open_alone(known.size, cx).await?,
        });
        // It may be a failure that passes: only what stays is put up with.
        if let Some(why) = pool.broken()
            && self.tries.fetch_add(1, Ordering::Relaxed) < TRIES
        {
            return Err(Error::new(Kind::Io, why.to_owned()));
        }
        let missing = pool.core().volume(volume).is_none();
        if missing {
            let ordered = *order == Order::Prefix;
            let settings = Settings { checksums: *checksums, ordered, ..Settings::default() };
            pool.make_volume(volume, size.0, settings, below).await?;
        }
        let has = {
            let core = pool.core();
            core.volume(volume).and_then(|volume| core.compress(volume))
        };
        if let Some(wanted) = compress.filter(|wanted| Some(*wanted) != has && self.params.snapshot.is_none())
        {
            let new = NewSettings { compress: Some(wanted), ..NewSettings::default() };
            pool.set(volume, new, below).await?;
        }
        let volume = Volume::open(pool, self.params.full(), None, |core| self.find(core)).await?;
        let _ = known.announced.set(());
        Ok(self.volume.get_or_init(|| volume))
    }

    /// The pool on the disk below, all of which is ours.
    async fn open_alone(&self, size: u64, cx: Cx<'_>) -> Result<Pool> {
        let (below, format) = (Below::Port(cx), self.params.format);
        if is_empty(below).await? {
            let id = cx.rng(|rng| std::array::from_fn(|_| rng.u8(..)));
            create(id, size, below).await?;
        }
        let opened = open(Opening::writable(self.params.memory.0), size, below).await?;
        match opened.take(format)? {
            Err(others) => add_trees(format, &others, below).await,
            Ok(trees) => Ok(trees),
        }
    }

    /// The number of the volume, or of the snapshot.
    fn find(&self, core: &Core) -> Result<u32> {
        let Params { volume, size, snapshot, .. } = &self.params;
        let number = core.find(volume, snapshot.as_deref())?;
        core.need_whole(number)?;
        let has = core.catalog.get(&number).map_or(0, |entry| entry.size);
        match has == size.0 {
            true => Ok(number),
            false => {
                let message = format!("the volume has {has} bytes, and the graph says {}", size.0);
                Err(Error::invalid(message))
            }
        }
    }

    fn calls(&self) -> MutexGuard<'_, VecDeque<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what is called for, each to its end, until the graph closes.
    async fn obey(&self, volume: &Volume, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        loop {
            let called = pin!(self.called.notified());
            while let Some(Call { verb, argument, answer }) = self.next_call() {
                let mut req = cx.child(&Request::new(Op::Control, 0, 0));
                (req.root, req.origin) = (req.id, Origin::Internal);
                req.extra = Some(Box::new(Extra { control: Some((verb, argument)), ..Extra::default() }));
                // Nobody may wait for it any more.
                let _ = answer.send(volume.submit(req, Below::Port(cx), cx).await);
            }
            if let Either::Left(_) = select(closing.as_mut(), called).await {
                return;
            }
        }
    }

    fn next_call(&self) -> Option<Call> {
        self.calls().pop_front()
    }

    async fn work(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        loop {
            match self.open(cx).await {
                Ok(volume) => {
                    if let Ok(care) = self.params.care() {
                        let caring = care.run(volume, || true, Below::Port(cx), cx);
                        join(caring, self.obey(volume, cx)).await;
                    }
                    return;
                }
                Err(error) => {
                    tracing::error!(graph = cx.graph_name(), element = cx.name(), "no pool: {error}");
                    for call in self.calls().drain(..) {
                        let _ = call.answer.send(Err(error.clone()));
                    }
                }
            }
            if let Either::Left(_) = select(closing.as_mut(), pin!(cx.sleep(CHECKPOINT))).await {
                return;
            }
        }
    }
}

impl Element for Radix {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        if below.read_only {
            return Err(Error::new(Kind::Denied, "the disk below is read-only: a pool has to be written"));
        }
        let geometry = Geometry {
            min_block: BLOCK as u32,
            preferred_block: BLOCK as u32,
            ops: Ops::ALL,
            needs_flush: true,
            read_only: self.params.snapshot.is_some(),
            size: self.params.size.0,
            atomic: 0,
            ..below.above()
        };
        Ok(Prepared::with(geometry, Known { size: below.size, announced: OnceLock::new() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match self.opened(cx) {
            Some(volume) => volume.submit(req, Below::Port(cx), cx),
            None => cx.later(&req.clone(), async move {
                let volume = self.open(cx).await?;
                volume.submit(req, Below::Port(cx), cx).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(self.work(cx)))
    }

    /// What was called for too late is not done.
    fn close(&self) {
        self.calls().clear();
    }

    fn get(&self, handler: &str) -> Result<String> {
        let pool = &self.volume.get().ok_or_else(closed)?.pool;
        match handler {
            "snapshots" => Ok(pool.core().snapshots(&self.params.volume).join(" ")),
            _ => pool.get(handler),
        }
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        let volume = &self.params.volume;
        let done = match handler {
            "snapshot" => {
                check_taken_name(argument)?;
                format!("{volume}@{argument}")
            }
            "delete_snapshot" => format!("{volume}@{argument} is deleted"),
            "checkpoint" => "done".to_owned(),
            _ => return Err(Error::no_handler(handler)),
        };
        let (answer, answered) = oneshot::channel();
        self.calls().push_back(Call { verb: handler.to_owned(), argument: argument.to_owned(), answer });
        self.called.notify_one();
        block_on(answered).unwrap_or_else(|_| Err(closed())).map(|_| done)
    }
}

fn closed() -> Error {
    Error::new(Kind::Unavailable, "the pool is not open")
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, run};
    use blockmason::{Kind, Op};

    #[test]
    fn something_else_on_the_disk_is_refused_and_not_overwritten() {
        run(1, async |host| {
            let text = "element R (type radix) (volume v) (size 1M) element D (type mem) (size 64M) R -> D";
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("d.img");
            std::fs::write(&path, [b"somebody's data".to_vec(), vec![0; 64 << 20]].concat()).unwrap();
            let taken =
                text.replace("(type mem) (size 64M)", &format!("(type file) (path {})", path.display()));
            let disk = TestDisk::new(&host, crate::ALL, &taken, "R").await.unwrap();
            assert_eq!(disk.read(0, 4096).await.unwrap_err().kind(), Kind::Denied);
            assert!(std::fs::read(&path).unwrap().starts_with(b"somebody's data"));
            let small = text.replace("64M", "1M");
            let disk = TestDisk::new(&host, crate::ALL, &small, "R").await.unwrap();
            assert_eq!(disk.read(0, 4096).await.unwrap_err().kind(), Kind::NoSpace);
            let bad = text.replace("(volume v)", "(volume a/b)");
            let error = TestDisk::new(&host, crate::ALL, &bad, "R").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Invalid, "{error}");
        });
    }

    #[test]
    fn what_is_discarded_is_room_again() {
        run(1, async |host| {
            let text = "element R (type radix) (volume v) (size 1G) element D (type mem) (size 40M) R -> D";
            let disk = TestDisk::new(&host, crate::ALL, text, "R").await.unwrap();
            for _ in 0..5 {
                disk.write(0, &vec![1; 8 << 20]).await.unwrap();
                disk.op(Op::Discard, 0, 8 << 20).await.unwrap();
            }
            assert_eq!(disk.read(0, 4096).await.unwrap(), [0; 4096]);
        });
    }
}
