//! Records when requests come, what they ask for and how long they take, to be replayed.

use crate::workload::{BLOCK_LEN, Block, Head, Log, MOST, Record};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::{FilePath, Size};
use blockmason::{
    Children, Cx, Element, Error, Flow, Kind, LocalBoxFuture, Op, Open, Prepared, Request, Result, rt,
};
use futures::future::{Either, select};
use rustix::fs::FlockOperation;
use std::any::Any;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::Notify;

blockmason::params! {
    /// Records what is asked for, and when.
    struct Params {
        /// The file. One that is there is continued.
        log: FilePath,
        /// When the file has so many bytes nothing more is recorded.
        limit: Size = "1G",
        /// Records nothing for now.
        paused: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "workload_log",
    summary: "records the workload, to be replayed",
    doc: "Requests pass unmodified. Of each that has been answered 32 bytes are kept: when it came, what it asked for, of which bytes, \
          how long it took, what came of it. Of the data nothing is kept. `mason replay` shows what a log has, and asks the same of another \
          graph, at the times at which it was asked, or faster.\n\n\
          What is recorded is written to the file once in a second, and costs requests a fraction of a microsecond: the disk \
          that the log is on holds nobody up. Where it is too slow, records are lost, and counted. When the process dies, the last second is \
          missing; after a loss of power perhaps more. Several elements may not share a file. Format: \
          [formats/workload.md](../formats/workload.md).\n\n\
          Put it right below an export to record what guests ask for, deeper to see what becomes of that.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "paused", access: Access::ReadWrite, doc: "yes while nothing is recorded" },
        Handler {
            name: "records",
            access: Access::Read,
            doc: "requests that have been recorded since the start",
        },
        Handler {
            name: "lost",
            access: Access::Read,
            doc: "requests that could not be recorded since the start",
        },
        Handler { name: "size", access: Access::Read, doc: "bytes of the file" },
        Handler {
            name: "error",
            access: Access::Read,
            doc: "why the file cannot be written; empty if it can",
        },
        Handler {
            name: "flush",
            access: Access::Call,
            doc: "writes to the file what has been recorded until now",
        },
    ],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:workload.sock)\n\
              element Workload (type workload_log) (log vm1.workload)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Workload -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(WorkloadLog::new(build.read(Params::from)?))),
    ..ElementType::BASE
};

/// How often it is written.
const OFTEN: Duration = Duration::from_secs(1);

/// Records that are written before that.
const MANY: usize = 8 << 10;

/// Records that wait to be written, at most: 4 MiB.
const WAITING: usize = 64 << 10;

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is guarded is complete before anything can panic.
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been recorded and not been written yet.
#[derive(Default)]
struct Fresh {
    records: Vec<Record>,
    /// That came before these and could not be kept.
    lost: u32,
}

/// The file.
struct Writer {
    file: File,
    head: Head,
    /// Of the block that is being filled.
    number: u64,
    block: Block,
}

impl Writer {
    /// Goes on with a log, or begins one.
    fn open(path: &Path, size: u64) -> Result<Writer> {
        let mut options = File::options();
        // A pipe in its place must not hold anybody up.
        let flags = (rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY).bits();
        let options = options.read(true).write(true).create(true).mode(0o600).custom_flags(flags as i32);
        let file = options.open(path).map_err(|error| Error::io(error, "the log cannot be opened"))?;
        let meta = file.metadata().map_err(unwritten)?;
        if !meta.is_file() {
            return Err(Error::invalid("it is no regular file"));
        }
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::new(Kind::Busy, "somebody else writes to it"))?;
        if meta.len() == 0 {
            let start = rt::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let head = Head { size, start: start.as_nanos() as u64 };
            file.write_all_at(&head.encode(), 0).map_err(unwritten)?;
            return Ok(Writer { file, head, number: 1, block: Block::default() });
        }
        let mut log = Log::read(file.try_clone().map_err(unwritten)?)?;
        let (mut number, mut block) = (1, Block::default());
        while let Some(next) = log.block()? {
            (number, block) = (log.number(), next);
        }
        if block.records.len() == MOST {
            (number, block) = (number + 1, Block::default());
        }
        Ok(Writer { file, head: log.head(), number, block })
    }

    fn len(&self) -> u64 {
        (self.number + u64::from(!self.block.records.is_empty())) * BLOCK_LEN as u64
    }

    /// Adds records as long as the file has fewer bytes than that. How many it has taken.
    ///
    /// # Errors
    /// None of them is there; those before are.
    fn append(&mut self, fresh: Fresh, limit: u64) -> Result<usize> {
        let (first, before) = (self.number, self.block.clone());
        let (mut bytes, mut taken) = (Vec::new(), 0);
        self.block.lost = self.block.lost.saturating_add(fresh.lost);
        for record in fresh.records {
            if self.block.records.is_empty() && self.len() + BLOCK_LEN as u64 > limit {
                break;
            }
            self.block.records.push(record);
            taken += 1;
            if self.block.records.len() == MOST {
                bytes.extend(self.block.encode(self.number, self.head.start));
                (self.number, self.block) = (self.number + 1, Block::default());
            }
        }
        if !self.block.records.is_empty() {
            bytes.extend(self.block.encode(self.number, self.head.start));
        }
        let written = self.file.write_all_at(&bytes, first * BLOCK_LEN as u64);
        match written {
            Ok(()) => Ok(taken),
            Err(error) => {
                // A log with a hole would end there: what comes next takes its place.
                (self.number, self.block) = (first, before);
                Err(unwritten(error))
            }
        }
    }
}

fn unwritten(error: std::io::Error) -> Error {
    Error::io(error, "the log cannot be written")
}

/// What elements share that follow each other in a graph: a file has one writer.
struct Shared {
    /// When it was opened, by the clock of requests, and how long the log had gone on by then.
    since: (tokio::time::Instant, Duration),
    fresh: Mutex<Fresh>,
    writer: Mutex<Writer>,
    full: AtomicBool,
    records: AtomicU64,
    lost: AtomicU64,
    error: Mutex<String>,
}

impl Shared {
    fn open(path: &Path, size: u64) -> Result<Shared> {
        let writer = Writer::open(path, size).map_err(|error| error.with_path(path))?;
        let now = rt::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let gone = now.saturating_sub(Duration::from_nanos(writer.head.start));
        Ok(Shared {
            since: (rt::now(), gone),
            fresh: Mutex::default(),
            writer: Mutex::new(writer),
            full: AtomicBool::new(false),
            records: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            error: Mutex::default(),
        })
    }
}

struct WorkloadLog {
    path: PathBuf,
    limit: u64,
    paused: AtomicBool,
    /// Bytes of the disk.
    size: AtomicU64,
    shared: OnceLock<Arc<Shared>>,
    /// There is much to write.
    wake: Notify,
}

impl WorkloadLog {
    fn new(params: Params) -> WorkloadLog {
        WorkloadLog {
            path: params.log.0,
            limit: params.limit.0,
            paused: AtomicBool::new(params.paused),
            size: AtomicU64::new(0),
            shared: OnceLock::new(),
            wake: Notify::new(),
        }
    }
}

impl WorkloadLog {
    fn note(&self, shared: &Shared, record: Record) {
        let mut fresh = locked(&shared.fresh);
        if fresh.records.len() == WAITING {
            fresh.lost = fresh.lost.saturating_add(1);
            drop(fresh);
            shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        fresh.records.push(record);
        if fresh.records.len() == MANY {
            self.wake.notify_one();
        }
    }
}

/// Writing it down.
impl Shared {
    /// Writes what has been recorded. Blocks. What is to be told, if anything.
    fn write(&self, limit: u64) -> Result<Option<String>> {
        let mut writer = locked(&self.writer);
        let fresh = {
            let mut fresh = locked(&self.fresh);
            // How many were lost is said with the next one that is not.
            if fresh.records.is_empty() {
                return Ok(None);
            }
            std::mem::take(&mut *fresh)
        };
        let count = fresh.records.len();
        let lost = fresh.lost;
        let done = writer.append(fresh, limit);
        let taken = *done.as_ref().unwrap_or(&0);
        self.records.fetch_add(taken as u64, Ordering::Relaxed);
        self.lost.fetch_add((count - taken) as u64, Ordering::Relaxed);
        let error = done.as_ref().err().map(ToString::to_string).unwrap_or_default();
        *locked(&self.error) = error;
        if done.is_err() {
            // The next block that is written says so.
            let mut fresh = locked(&self.fresh);
            fresh.lost =
                fresh.lost.saturating_add(lost).saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        }
        done?;
        let is_full = taken < count;
        let was_full = self.full.swap(is_full, Ordering::Relaxed);
        let told = || format!("the log has {} bytes: nothing more is recorded", writer.len());
        Ok((is_full && !was_full).then(told))
    }
}

impl WorkloadLog {
    /// Writes to the file until the graph ends.
    async fn keep(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut failing = false;
        loop {
            let soon = pin!(rt::timeout(OFTEN, self.wake.notified()));
            if let Either::Left(_) = select(closing.as_mut(), soon).await {
                return;
            }
            let Some(shared) = self.shared.get().cloned() else { continue };
            let limit = self.limit;
            let written = rt::blocking(move || shared.write(limit)).await;
            match written.unwrap_or_else(|| Err(Error::internal("writing the log was given up"))) {
                Ok(told) => {
                    failing = false;
                    told.into_iter().for_each(|told| cx.notice(told));
                }
                Err(error) if !std::mem::replace(&mut failing, true) => {
                    cx.notice(format!("{error}: what is asked for meanwhile is not recorded"));
                }
                Err(_) => {}
            }
        }
    }

    fn shared(&self) -> Result<&Arc<Shared>> {
        self.shared.get().ok_or_else(|| Error::new(Kind::Unavailable, "the log is not open yet"))
    }
}

impl Element for WorkloadLog {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        self.size.store(below.size, Ordering::Relaxed);
        Ok(Prepared::of(below.above()))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let Some(shared) = self.shared.get() else { return cx.forward(0, req) };
        let idle = self.paused.load(Ordering::Relaxed) || shared.full.load(Ordering::Relaxed);
        if idle || req.op == Op::Control {
            return cx.forward(0, req);
        }
        let Request { op, offset, len, flags, origin, class, .. } = req;
        let came = cx.now();
        cx.forward(0, req).then(move |reply| {
            let errno = reply.as_ref().err().map_or(0, |error| error.errno().raw_os_error());
            let (opened, gone) = shared.since;
            self.note(
                shared,
                Record {
                    at: gone + came.saturating_duration_since(opened),
                    op,
                    offset,
                    len,
                    flags,
                    origin,
                    class,
                    took: cx.now() - came,
                    errno: errno as u16,
                },
            );
            reply
        })
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        if self.shared.get().is_none() {
            let shared = Arc::new(Shared::open(&self.path, self.size.load(Ordering::Relaxed))?);
            self.shared.get_or_init(|| shared);
        }
        Ok(None)
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(self.keep(cx)))
    }

    fn close(&self) {
        if let Some(Err(error)) = self.shared.get().map(|shared| shared.write(self.limit)) {
            tracing::warn!("{error}: the last second is missing");
        }
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        let old = (old as &dyn Any).downcast_ref::<WorkloadLog>().filter(|old| old.path == self.path);
        if let Some(shared) = old.and_then(|old| old.shared.get()) {
            // A larger limit may leave room again.
            shared.full.store(false, Ordering::Relaxed);
            self.shared.get_or_init(|| shared.clone());
        }
        Ok(())
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(Error::unsupported("its log has one writer: take the element out of the graph first"))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let count = |of: fn(&Shared) -> u64| self.shared().map(|shared| of(shared).to_string());
        match handler {
            "paused" => Ok(if self.paused.load(Ordering::Relaxed) { "yes" } else { "no" }.to_owned()),
            "records" => count(|shared| {
                shared.records.load(Ordering::Relaxed) + locked(&shared.fresh).records.len() as u64
            }),
            "lost" => count(|shared| shared.lost.load(Ordering::Relaxed)),
            "size" => count(|shared| locked(&shared.writer).len()),
            "error" => self.shared().map(|shared| locked(&shared.error).clone()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        match (handler, value) {
            ("paused", "yes" | "no") => self.paused.store(value == "yes", Ordering::Relaxed),
            ("paused", _) => return Err(Error::invalid(format!("expected yes or no, found `{value:.40}`"))),
            _ => return Err(Error::no_handler(handler)),
        }
        Ok(())
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        match handler {
            "flush" => self.shared()?.write(self.limit).map(|_| String::new()),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ALL as CATALOGUE;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Class, Data, Disk, Flags, Origin};

    const BELOW: &str = "(type mem) (size 1M)";

    fn over(log: &Path, more: &str, below: &str) -> String {
        format!("element D (type workload_log) (log {}) {more} element B {below} D -> B", log.display())
    }

    /// All records of a file.
    fn records(path: &Path) -> (Vec<Record>, u64) {
        let (mut log, mut all) = (Log::open(path).unwrap(), Vec::new());
        while let Some(more) = log.next_block().unwrap() {
            all.extend(more);
        }
        (all, log.lost())
    }

    fn element(disk: &TestDisk) -> Arc<dyn Element> {
        disk.disk.graph().instances().find(|instance| instance.name == "D").unwrap().element.clone()
    }

    #[test]
    fn behaves_like_a_vector() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = over(&folder.path().join("log"), "", BELOW);
            let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
            play_against_model(&disk, 1, 300).await;
        });
    }

    #[test]
    fn what_was_asked_for_is_there_with_its_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        run(1, async |host| {
            let text = over(&path, "", "(type delay) (all 5ms) element M (type mem) (size 1M) B -> M");
            let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
            let mut write = Request::write(4096, Data::zeros(512)).with(Flags::FUA);
            (write.origin, write.class) = (Origin::Copy, Class::Background);
            disk.submit(write).await.unwrap();
            rt::sleep(Duration::from_millis(100)).await;
            disk.submit(Request::read(0, 100)).await.unwrap();
            element(&disk).call("flush", "").unwrap();
            assert_eq!(
                (element(&disk).get("records").unwrap(), element(&disk).get("lost").unwrap()),
                ("2".into(), "0".into())
            );
        });
        let (all, lost) = records(&path);
        let [write, read] = all[..] else { panic!("{all:?}") };
        let took = Duration::from_millis(5);
        let expected = Record {
            at: write.at,
            op: Op::Write,
            offset: 4096,
            len: 512,
            flags: Flags::FUA,
            origin: Origin::Copy,
            class: Class::Background,
            took,
            errno: 0,
        };
        assert_eq!((write, lost), (expected, 0));
        assert_eq!(
            (read.op, read.at - write.at, read.origin),
            (Op::Read, Duration::from_millis(105), Origin::Guest)
        );
        assert_eq!(Log::open(&path).unwrap().head().size, 1 << 20);
    }

    #[test]
    fn a_log_is_continued_and_a_torn_end_is_written_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let text = over(&path, "", BELOW);
        let ask = |count: u64| {
            run(1, async |host| {
                let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
                for offset in 0..count {
                    disk.submit(Request::read(offset, 1)).await.unwrap();
                }
                element(&disk).call("flush", "").unwrap();
            });
        };
        ask(300);
        ask(100);
        let (all, _) = records(&path);
        let offsets: Vec<u64> = all.iter().map(|record| record.offset).collect();
        assert_eq!(offsets, (0..300).chain(0..100).collect::<Vec<_>>());
        assert!(all.is_sorted_by_key(|record| record.at));
        // 400 records are four blocks, of which the last has 19.
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 5 * BLOCK_LEN);
        std::fs::write(&path, &bytes[..4 * BLOCK_LEN + 100]).unwrap();
        ask(1);
        assert_eq!(records(&path).0.len(), 3 * MOST + 1);
    }

    #[test]
    fn a_file_that_is_no_log_or_has_a_writer_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, [7; 5000]).unwrap();
        run(1, async |host| {
            let text = over(&path, "", BELOW);
            let refused = async |what: &str| {
                let graph = graph(&host, CATALOGUE, &text, "D").unwrap();
                let error = Disk::serve(&host, graph).await.err().unwrap().to_string();
                assert!(error.contains(what), "{error}");
            };
            refused("no log of a workload").await;
            assert_eq!(std::fs::read(&path).unwrap(), [7; 5000]);
            std::fs::remove_file(&path).unwrap();
            let _other = Writer::open(&path, 1).unwrap();
            refused("somebody else writes to it").await;
        });
    }

    #[test]
    fn it_stops_at_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        run(1, async |host| {
            let text = over(&path, "(limit 12k)", BELOW);
            let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
            for _ in 0..3 * MOST {
                disk.submit(Request::read(0, 1)).await.unwrap();
            }
            let element = element(&disk);
            element.call("flush", "").unwrap();
            disk.submit(Request::read(0, 1)).await.unwrap();
            let get = |handler: &str| element.get(handler).unwrap().parse::<usize>().unwrap();
            assert_eq!((get("records"), get("lost"), get("size")), (2 * MOST, MOST, 12 << 10));
        });
        assert_eq!(records(&path).0.len(), 2 * MOST);
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_said_in_the_next_block() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut writer = Writer::open(&path, 1 << 20).unwrap();
        let record = Record {
            at: Duration::ZERO,
            op: Op::Read,
            offset: 1,
            len: 1,
            flags: Flags::NONE,
            origin: Origin::Guest,
            class: Class::Interactive,
            took: Duration::ZERO,
            errno: 0,
        };
        let fresh = |count: usize, lost| Fresh { records: vec![record; count], lost };
        assert_eq!(writer.append(fresh(MOST + 3, 0), u64::MAX).unwrap(), MOST + 3);
        let file = std::mem::replace(&mut writer.file, File::open("/dev/null").unwrap());
        writer.append(fresh(MOST, 0), u64::MAX).unwrap_err();
        writer.file = file;
        assert_eq!(writer.append(fresh(2, MOST as u32), u64::MAX).unwrap(), 2);
        let (all, lost) = records(&path);
        assert_eq!((all.len(), lost), (MOST + 5, MOST as u64));
    }

    #[test]
    fn an_element_that_takes_its_place_goes_on_with_the_same_file() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = over(&folder.path().join("log"), "", BELOW);
            let disk = TestDisk::new(&host, CATALOGUE, &text, "D").await.unwrap();
            let element = element(&disk);
            let old = (&*element as &dyn Any).downcast_ref::<WorkloadLog>().unwrap();
            let log = |name: &str| FilePath(folder.path().join(name));
            for (name, goes_on) in [("log", true), ("other", false)] {
                let next = WorkloadLog::new(Params { log: log(name), limit: Size(1 << 20), paused: false });
                next.take_state(old).unwrap();
                let same = next.shared.get().is_some_and(|next| Arc::ptr_eq(next, old.shared().unwrap()));
                assert_eq!(same, goes_on, "{name}");
            }
        });
    }
}
