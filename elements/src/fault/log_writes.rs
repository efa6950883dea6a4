//! Records every change in the on-disk format of the Linux kernel's dm-log-writes target, so that its
//! replay tools can walk every state in which a crash could have left the disk.

use blockmason::data::Segment;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::geometry::MAX_REQUEST;
use blockmason::lang::value::{FilePath, Size};
use blockmason::{
    Children, Cx, Data, Element, Error, Flow, Geometry, Kind, Op, Open, Prepared, Request, Result,
};
use rustix::fs::FlockOperation;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

blockmason::params! {
    /// Records every change.
    struct Params {
        /// The log. Made anew whenever the graph is opened; another kind of file is not overwritten.
        log: FilePath,
        /// What the log counts in: 512 bytes or 4k. The size of the disk is a multiple of it.
        sector: Sector = "512",
    }
}

/// 512 or 4096.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sector(u64);

impl FromStr for Sector {
    type Err = String;

    fn from_str(text: &str) -> Result<Sector, String> {
        match text.parse::<Size>() {
            Ok(Size(bytes @ (512 | 4096))) => Ok(Sector(bytes)),
            _ => Err(format!("expected `512` or `4k`, found `{text:.40}`")),
        }
    }
}

impl fmt::Display for Sector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

blockmason::text_value!(Sector, "512 or 4k");

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "log_writes",
    summary: "records every change for replaying crashes",
    doc: "Hands every request on and writes the changes that succeeded below to a log in the format of the \
          kernel's dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst): a superblock, \
          then for each entry one sector that describes it and its data. `replay-log` of xfstests brings an \
          image to any entry.\n\n\
          Order is that of completion. What is not FUA is held back until the next flush comes in, then \
          logged, and the flush after it when it has succeeded: so what a flush must not be trusted to cover \
          comes after it, and an FUA write before older ones that were never flushed. Unlike in the kernel, \
          a FUA change of bytes that are held back comes after these, and no more than 8 MiB are held back: \
          all of it is then logged early. Every prefix of the log is a state in which a loss of \
          power may leave the disk.\n\n\
          A write of zeros is logged as a write, whose data is a hole in the log, and a discard as a \
          discard; both in entries of 64 MiB at the most. Failed changes are not logged: what they left is \
          open.\n\n\
          When the log cannot be written, the change fails whose entry is missing, and every later change \
          and flush: a log with a hole is worthless. Reads go on. The log is written with plain calls on \
          the shard; it belongs on a file system that takes them quickly.",
    family: Family::Fault,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "entries", access: Access::Read, doc: "how many entries the log has" },
        Handler { name: "mark", access: Access::Call, doc: "adds a mark, a name to replay the log up to" },
    ],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:log.sock)\n\
              element Log (type log_writes) (log writes.log)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Log -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let Params { log, sector } = build.read(Params::from)?;
        Ok(Arc::new(LogWrites { path: log.0, sector: sector.0, state: Mutex::new(State::New) }))
    },
    ..ElementType::BASE
};

const MAGIC: u64 = 0x6a_7366_7773_6872;
const VERSION: u64 = 1;

const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// Bytes of one entry that describe it, before a mark's name.
const HEAD: usize = 32;

/// Entries held back until the next flush, in bytes of memory: a flush writes them on the shard.
const HELD: usize = 8 << 20;

/// Bytes that one entry covers at the most. Replay tools allocate as much, and skip discards of 128 MiB.
const PIECE: u64 = MAX_REQUEST as u64;

/// One entry, as it will be in the log.
struct Entry {
    /// What it changes, in bytes of the disk.
    range: Range<u64>,
    bytes: Vec<u8>,
    /// Zeros that follow in the log.
    hole: u64,
}

impl Entry {
    fn new(range: Range<u64>, flags: u64, sector: u64, text: &[u8]) -> Entry {
        let mut bytes = Vec::with_capacity(sector as usize);
        let words = [range.start / sector, (range.end - range.start) / sector, flags, text.len() as u64];
        words.iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        bytes.extend(text);
        bytes.resize(sector as usize, 0);
        Entry { range, bytes, hole: 0 }
    }

    fn with_data(mut self, data: &Data) -> Entry {
        self.bytes.reserve_exact(data.len());
        data.for_each(|segment| match segment {
            Segment::Bytes(bytes) => self.bytes.extend(bytes),
            Segment::Zeros(len) => self.bytes.resize(self.bytes.len() + len, 0),
            Segment::Foreign(_) => unreachable!("the payload has been made stable"),
        });
        self
    }

    /// The entries of a change, which covers whole sectors.
    fn of(req: &Request, sector: u64) -> Vec<Entry> {
        let fua = if req.is_fua() { FUA } else { 0 };
        if req.op == Op::Write {
            return vec![Entry::new(req.offset..req.end(), fua, sector, &[]).with_data(&req.data)];
        }
        let discard = if req.op == Op::Discard { DISCARD } else { 0 };
        let piece = |start: u64| {
            let mut entry = Entry::new(start..req.end().min(start + PIECE), fua | discard, sector, &[]);
            entry.hole = if req.op == Op::Discard { 0 } else { entry.range.end - start };
            entry
        };
        (req.offset..req.end()).step_by(PIECE as usize).map(piece).collect()
    }
}

struct Log {
    file: File,
    sector: u64,
    /// Where the next entry goes, in bytes.
    end: u64,
    entries: u64,
    /// Not in the log yet, oldest first.
    held: Vec<Entry>,
    held_bytes: usize,
}

impl Log {
    /// Makes an empty log, in the place of an older one.
    fn create(path: &Path, sector: u64) -> Result<Log> {
        let refused = |error, what: &'static str| Error::io(error, what).with_path(path);
        let open = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let file = open.map_err(|error| refused(error, "the log cannot be opened"))?;
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(Error::new(Kind::Busy, "somebody else writes this log").with_path(path));
        }
        let mut magic = [0; 8];
        let other = file.metadata().map_err(|error| refused(error, "it cannot be looked at"))?.len() > 0
            && (file.read_exact_at(&mut magic, 0).is_err() || u64::from_le_bytes(magic) != MAGIC);
        if other {
            return Err(Error::invalid("this is no log of writes, and would be overwritten").with_path(path));
        }
        file.set_len(0).map_err(|error| refused(error, "the log cannot be emptied"))?;
        let mut log = Log { file, sector, end: sector, entries: 0, held: Vec::new(), held_bytes: 0 };
        log.publish()?;
        Ok(log)
    }

    /// Makes the entries so far count: a reader believes the superblock.
    fn publish(&mut self) -> Result<()> {
        let mut block = vec![0; self.sector as usize];
        block[..8].copy_from_slice(&MAGIC.to_le_bytes());
        block[8..16].copy_from_slice(&VERSION.to_le_bytes());
        block[16..24].copy_from_slice(&self.entries.to_le_bytes());
        block[24..28].copy_from_slice(&(self.sector as u32).to_le_bytes());
        self.file.write_all_at(&block, 0).map_err(unwritten)
    }

    fn append(&mut self, entry: &Entry) -> Result<()> {
        self.file.write_all_at(&entry.bytes, self.end).map_err(unwritten)?;
        self.end += entry.bytes.len() as u64 + entry.hole;
        if entry.hole > 0 {
            self.file.set_len(self.end).map_err(unwritten)?;
        }
        self.entries += 1;
        Ok(())
    }

    /// Logs the `count` oldest entries that are held back.
    fn release(&mut self, count: usize) -> Result<()> {
        for entry in self.held.drain(..count).collect::<Vec<_>>() {
            self.held_bytes -= entry.bytes.len();
            self.append(&entry)?;
        }
        Ok(())
    }

    fn release_all(&mut self) -> Result<()> {
        self.release(self.held.len())?;
        self.publish()
    }

    /// Takes up a change that has succeeded.
    fn change(&mut self, req: &Request) -> Result<()> {
        let entries = Entry::of(req, self.sector);
        if !req.is_fua() {
            self.held_bytes += entries.iter().map(|entry| entry.bytes.len()).sum::<usize>();
            self.held.extend(entries);
            if self.held_bytes <= HELD {
                return Ok(());
            }
            return self.release_all();
        }
        let overlaps = |held: &Entry| held.range.start < req.end() && req.offset < held.range.end;
        let before = self.held.iter().rposition(overlaps).map_or(0, |last| last + 1);
        self.release(before)?;
        entries.iter().try_for_each(|entry| self.append(entry))?;
        self.publish()
    }

    fn note(&mut self, flags: u64, text: &[u8]) -> Result<()> {
        self.append(&Entry::new(0..0, flags, self.sector, text))?;
        self.publish()
    }
}

fn unwritten(error: std::io::Error) -> Error {
    Error::io(error, "the log cannot be written")
}

enum State {
    /// Not made yet: a graph that is never handed over to leaves an older log alone.
    New,
    Open(Log),
    /// Closed, or it could not be written.
    Over(Error),
}

struct LogWrites {
    path: PathBuf,
    sector: u64,
    state: Mutex<State>,
}

impl LogWrites {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the log. The first error ends it.
    fn with<T>(&self, work: impl FnOnce(&mut Log) -> Result<T>) -> Result<T> {
        let mut state = self.state();
        let done = loop {
            match &mut *state {
                State::New => match Log::create(&self.path, self.sector) {
                    Ok(log) => *state = State::Open(log),
                    Err(error) => break Err(error),
                },
                State::Open(log) => break work(log).map_err(|error| error.with_path(&self.path)),
                State::Over(error) => return Err(error.clone()),
            }
        };
        done.inspect_err(|error| {
            tracing::error!("{error}; changes fail from now on");
            *state = State::Over(error.clone());
        })
    }
}

impl Element for LogWrites {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        if below.size % self.sector != 0 {
            let message =
                format!("a log in sectors of {} cannot describe a disk of {}", self.sector, below.size);
            return Err(Error::invalid(message));
        }
        Ok(Prepared::of(Geometry { min_block: self.sector as u32, ..below.above() }))
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(Error::unsupported(
            "another process would begin the log anew: take the element out of the graph first",
        ))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let came = match req.op {
            Op::Read | Op::Cache | Op::Extents | Op::Control => return cx.forward(0, req),
            Op::Flush => self.with(Log::release_all),
            Op::Write | Op::Discard | Op::WriteZeroes => self.with(|_| Ok(())),
        };
        if let Err(error) = came {
            return cx.fail(&req, error);
        }
        // The log and the disk get the same bytes, whatever a guest does to its memory meanwhile.
        req.stabilise();
        cx.forward(0, req.clone()).then(move |reply| {
            let answer = reply?;
            let logged = self.with(|log| match req.op {
                Op::Flush => log.note(FLUSH, &[]),
                _ => log.change(&req),
            });
            match logged {
                Ok(()) => Ok(answer),
                Err(error) => Err(error.in_element(cx.name()).at(req.op.name(), req.offset)),
            }
        })
    }

    fn open(&self, _cx: &Open<'_>) -> Result<Option<String>> {
        self.with(|_| Ok(None))
    }

    fn close(&self) {
        // What fails here has been reported, and nobody is left to tell.
        let _ = self.with(|log| {
            log.release_all()?;
            log.note(MARK, b"dm-log-writes-end")?;
            log.file.sync_all().map_err(unwritten)
        });
        *self.state() = State::Over(Error::new(Kind::Unavailable, "the log is closed"));
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "entries" => self.with(|log| Ok(log.entries.to_string())),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        if handler != "mark" {
            return Err(Error::no_handler(handler));
        }
        // Replay tools read the name as a C string.
        let longest = self.sector as usize - HEAD - 1;
        if argument.is_empty() || argument.len() > longest || argument.contains('\0') {
            return Err(Error::invalid(format!("a mark has a name of 1 to {longest} bytes")));
        }
        self.with(|log| {
            log.note(MARK, argument.as_bytes())?;
            Ok(format!("entry {}", log.entries - 1))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::Flags;
    use blockmason::testing::{TestDisk, graph, run};
    use std::collections::HashMap;

    const SIZE: usize = 64 << 10;

    async fn disk(host: &Arc<blockmason::Host>, log: &Path, more: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!(
            "element L (type log_writes) (log {}) {more}\n\
             element D (type delay)\nelement M (type mem) (size 64k)\nL -> D -> M",
            log.display()
        );
        let graph = graph(host, crate::ALL, &text, "L").unwrap();
        let element = graph.instances().find(|instance| instance.name == "L").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, element)
    }

    /// One entry as a reader finds it: sector, sectors, flags and what follows.
    #[derive(Debug, PartialEq)]
    struct Found {
        sector: u64,
        sectors: u64,
        flags: u64,
        data: Vec<u8>,
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// Reads a log by the description in the kernel's documentation.
    fn read_log(path: &Path) -> (u64, Vec<Found>) {
        let log = std::fs::read(path).unwrap();
        assert_eq!(&log[..8], b"rhswfsj\0", "magic");
        assert_eq!(word(&log, 8), 1, "version");
        let size = u32::from_le_bytes(log[24..28].try_into().unwrap()) as usize;
        let mut at = size;
        let mut found = Vec::new();
        for _ in 0..word(&log, 16) {
            let (sectors, flags, text) =
                (word(&log, at + 8), word(&log, at + 16), word(&log, at + 24) as usize);
            let sector = word(&log, at);
            let (start, padding) =
                if flags & MARK != 0 { (at + 32, at + 32 + text) } else { (at + size, at + 32) };
            assert!(log[padding..at + size].iter().all(|byte| *byte == 0), "padding is zeros");
            let len = match flags {
                _ if flags & MARK != 0 => text,
                _ if flags & DISCARD != 0 => 0,
                _ => sectors as usize * size,
            };
            let data = log[start..start + len].to_vec();
            at += size + if flags & MARK != 0 { 0 } else { len };
            found.push(Found { sector, sectors, flags, data });
        }
        assert_eq!(at, log.len(), "nothing follows the last entry");
        (size as u64, found)
    }

    fn replay(entry: &Found, size: u64, image: &mut [u8]) {
        let range = (entry.sector * size) as usize..((entry.sector + entry.sectors) * size) as usize;
        match entry.flags {
            flags if flags & MARK != 0 => {}
            flags if flags & DISCARD != 0 => image[range].fill(0),
            _ => image[range].copy_from_slice(&entry.data),
        }
    }

    /// Random changes; after each flush a mark and a copy of the disk under the mark's name.
    async fn play(disk: &TestDisk, element: &dyn Element, seed: u64) -> HashMap<String, Vec<u8>> {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut snapshots = HashMap::new();
        for step in 0..300 {
            let offset = rng.u64(0..SIZE as u64);
            let len = rng.u64(1..=(SIZE as u64 - offset).min(9000));
            let op = [Op::Write, Op::Write, Op::WriteZeroes, Op::Discard, Op::Flush][rng.usize(0..5)];
            let mut req = Request::new(op, offset, len);
            match op {
                Op::Write => req.data = Data::copy_of(&vec![rng.u8(..); len as usize]),
                Op::Flush => req = Request::flush(),
                _ => {}
            }
            if rng.u8(0..4) == 0 && op != Op::Flush {
                req = req.with(Flags::FUA);
            }
            disk.submit(req).await.unwrap();
            if op == Op::Flush {
                let name = format!("step {step}");
                element.call("mark", &name).unwrap();
                snapshots.insert(name, disk.read(0, SIZE as u64).await.unwrap());
            }
        }
        snapshots.insert("dm-log-writes-end".to_owned(), disk.read(0, SIZE as u64).await.unwrap());
        disk.disk.stop().await.unwrap();
        snapshots
    }

    #[test]
    fn replayed_up_to_any_flush_it_is_the_disk_of_that_moment() {
        for seed in 0..10 {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("log");
            let more = if seed % 2 == 0 { "" } else { "(sector 4k)" };
            let mut snapshots = run(seed, async |host| {
                let (disk, element) = disk(&host, &path, more).await;
                play(&disk, &*element, seed).await
            });
            let (size, entries) = read_log(&path);
            assert_eq!(size, if seed % 2 == 0 { 512 } else { 4096 });
            let mut image = vec![0; SIZE];
            for (ix, entry) in entries.iter().enumerate() {
                replay(entry, size, &mut image);
                if entry.flags == MARK {
                    let name = String::from_utf8(entry.data.clone()).unwrap();
                    let snapshot = snapshots.remove(&name).unwrap();
                    assert!(image == snapshot, "seed {seed}, {name}, entry {ix}");
                }
            }
            assert!(snapshots.is_empty(), "every mark is there: {:?}", snapshots.keys());
        }
    }

    fn summary(path: &Path) -> Vec<(u64, u64)> {
        read_log(path).1.iter().map(|entry| (entry.flags, entry.sector)).collect()
    }

    fn write(sector: u64) -> Request {
        Request::write(sector * 512, Data::copy_of(&[sector as u8; 512]))
    }

    #[test]
    fn a_flush_releases_what_was_done_before_it_came() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        run(1, async |host| {
            let (disk, element) = disk(&host, &path, "").await;
            disk.submit(write(1)).await.unwrap();
            disk.submit(write(2)).await.unwrap();
            disk.submit(write(3).with(Flags::FUA)).await.unwrap();
            assert_eq!(summary(&path), [(FUA, 3)], "held back until a flush");
            disk.submit(write(2).with(Flags::FUA)).await.unwrap();
            assert_eq!(summary(&path)[1..], [(0, 1), (0, 2), (FUA, 2)], "in order where they overlap");
            disk.submit(write(4)).await.unwrap();
            disk.op(Op::Flush, 0, 0).await.unwrap();
            assert_eq!(summary(&path)[4..], [(0, 4), (FLUSH, 0)]);
            disk.op(Op::Discard, 512, 1024).await.unwrap();
            disk.op(Op::WriteZeroes, 512, 512).await.unwrap();
            assert_eq!(element.get("entries").unwrap(), "6");
            element.call("mark", "here").unwrap();
            disk.disk.stop().await.unwrap();
            assert_eq!(summary(&path)[6..], [(MARK, 0), (DISCARD, 1), (0, 1), (FLUSH, 0), (MARK, 0)]);
        });
    }

    #[test]
    fn what_is_under_way_comes_after_the_flush() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        run(1, async |host| {
            let (disk, _) = disk(&host, &path, "").await;
            let graph = disk.disk.graph();
            let delay = graph.instances().find(|instance| instance.name == "D").unwrap().element.clone();
            drop(graph);
            disk.submit(write(1)).await.unwrap();
            // The second write is answered while the flush is under way, and the flush is not.
            delay.set("write", "10ms").unwrap();
            delay.set("flush", "20ms").unwrap();
            let second = disk.send(write(2));
            let flush = disk.send(Request::flush());
            second.await.unwrap().unwrap();
            flush.await.unwrap().unwrap();
            disk.op(Op::Flush, 0, 0).await.unwrap();
            assert_eq!(summary(&path), [(0, 1), (FLUSH, 0), (0, 2), (FLUSH, 0)]);
        });
    }

    #[test]
    fn only_so_much_is_held_back_and_long_zeros_are_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let mut log = Log::create(&path, 512).unwrap();
        for ix in 0..20 {
            log.change(&Request::write(ix << 20, Data::zeros(1 << 20))).unwrap();
            assert!(log.held_bytes <= HELD && log.held.len() < 9);
        }
        let zeros = Request::new(Op::WriteZeroes, 0, 150 << 20);
        log.change(&zeros).unwrap();
        log.release_all().unwrap();
        assert_eq!(log.held_bytes, 0);
        assert_eq!(log.entries, 23, "150 MiB of zeros take three");
        assert_eq!(log.end, std::fs::metadata(&path).unwrap().len());
        let taken = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap()) * 512;
        assert!(taken < 30 << 20, "{taken} bytes on disk");
    }

    #[test]
    fn other_files_and_logs_in_use_are_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "something dear").unwrap();
        assert_eq!(Log::create(&path, 512).err().unwrap().kind(), Kind::Invalid);
        assert_eq!(std::fs::read(&path).unwrap(), b"something dear");
        std::fs::remove_file(&path).unwrap();
        let log = Log::create(&path, 512).unwrap();
        assert_eq!(Log::create(&path, 512).err().unwrap().kind(), Kind::Busy);
        drop(log);
        Log::create(&path, 4096).unwrap();
        assert_eq!(read_log(&path), (4096, Vec::new()));
    }

    /// A log that can be opened and not be written.
    static BROKEN: ElementType = ElementType {
        name: "broken_log",
        check: |_| Ok(()),
        build: |_| {
            let file = File::open("/dev/null").unwrap();
            let log = Log { file, sector: 512, end: 512, entries: 0, held: Vec::new(), held_bytes: 0 };
            let state = Mutex::new(State::Open(log));
            Ok(Arc::new(LogWrites { path: "/dev/null".into(), sector: 512, state }))
        },
        ..TYPE
    };
    static WITH_BROKEN: &[&ElementType] = &[&BROKEN, &crate::sink::mem::TYPE];

    #[test]
    fn without_its_log_nothing_changes_any_more() {
        run(1, async |host| {
            let text = "element L (type broken_log) element M (type mem) (size 64k) L -> M";
            let disk = TestDisk::new(&host, WITH_BROKEN, text, "L").await.unwrap();
            let error = disk.submit(write(1).with(Flags::FUA)).await.unwrap_err();
            assert_eq!(error.to_string(), "L: write at 512: /dev/null: the log cannot be written");
            for req in [write(2), Request::flush(), Request::new(Op::Discard, 0, 512)] {
                assert!(disk.submit(req).await.is_err());
            }
            assert_eq!(disk.read(1024, 512).await.unwrap(), [0; 512], "it never went down");
        });
    }

    #[test]
    fn what_it_cannot_describe_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        run(1, async |host| {
            let text = format!(
                "element L (type log_writes) (log {}) element M (type mem) (size 1000) L -> M",
                path.display()
            );
            let error = TestDisk::new(&host, crate::ALL, &text, "L").await.err().unwrap();
            assert_eq!(error.kind(), Kind::Invalid, "{error}");
            assert!(!path.exists(), "a graph that is not served leaves no log");
            let (_disk, element) = disk(&host, &path, "").await;
            for name in ["", &"x".repeat(480), "a\0b"] {
                assert!(element.call("mark", name).is_err());
            }
            element.call("mark", &"x".repeat(479)).unwrap();
        });
    }
}
