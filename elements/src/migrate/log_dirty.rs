//! Keeps account of which parts of the disk below differ from another one.

use super::map::{DirtyMap, Intent};
use crate::services::Test;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::element::BoxFuture;
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
          one that fails makes it dirty. With `(written dirty)` it stands above a disk of which there is a backup: \
          a change makes the granules that it touches dirty before it is issued.\n\n\
          A `tee` above that refers to the map announces changes to it before it sends them down any leg.\n\n\
          With `file` the map outlives the process, also one that is killed: a change is marked there before it is \
          issued. After a loss of power all of a region is dirty in which there had been changes a few seconds \
          before; regions are of 64 MiB, or more on large disks. The first change in a region waits until that is durable, and \
          after some seconds without changes the disk below is flushed and the region is taken back; one of which everything is dirty is marked from the start. A file of another \
          disk, or of other granules, is refused, as is one that somebody else has open, and never overwritten. \
          The file knows nothing of changes that are made while no `log_dirty` keeps it: delete it then. Format: \
          docs/formats/dirty.md.\n\n\
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
    provides: &["dirty_map", "test"],
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
        Ok(Arc::new(LogDirty { map: Arc::new(map), cleans: params.written == Written::Clean }))
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
        if !regions.is_empty() {
            if let Err(error) = self.flush(cx, last).await {
                tracing::warn!(graph = cx.graph_name(), element = cx.name(), "regions stay marked: {error}");
                regions.clear();
            }
        }
        if let Err(error) = self.map.rest(regions).await {
            tracing::warn!(graph = cx.graph_name(), element = cx.name(), "regions stay marked: {error}");
        }
    }

    /// Flushes the disk below. Where the graph closes nobody waits long for a disk that may not answer.
    async fn flush(&self, cx: Cx<'_>, last: bool) -> Reply {
        let flush = Request { origin: Origin::Internal, class: Class::Background, ..Request::flush() };
        let flushed = cx.detach(0, cx.child(&flush));
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
        self.map.cover(below.size)?;
        Ok(Prepared::of(below))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Write | Op::WriteZeroes | Op::Discard if req.len > 0 => {}
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
mod tests {
    use blockmason::describe::{Catalogue, ElementType};
    use blockmason::live::Options;
    use blockmason::testing::{CLIENT, TestDisk, checked, live, play_against_model, run};
    use std::path::Path;
    use std::sync::LazyLock;
    use std::time::Duration;

    async fn get(disk: &TestDisk, handler: &str) -> String {
        let graph = disk.disk.graph();
        let found = graph.instances().find(|instance| instance.name == "L").unwrap();
        found.element.get(handler).unwrap()
    }

    fn kept(folder: &Path, more: &str) -> String {
        let file = folder.join("map").display().to_string();
        format!(
            "element L (type log_dirty) (granule 4k) (file {file}) {more} element M (type mem) (size 200M)"
        )
    }

    /// The first word of the regions in the file.
    fn regions(folder: &Path) -> u64 {
        let bytes = std::fs::read(folder.join("map")).unwrap();
        u64::from_le_bytes(bytes[4096..4104].try_into().unwrap())
    }

    #[test]
    fn whole_granules_become_clean() {
        run(1, async |host| {
            let text = "element L (type log_dirty) (granule 4k) element M (type mem) (size 10k) L -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            assert_eq!(get(&disk, "granules").await, "3/3");
            disk.write(100, &[1; 8000]).await.unwrap();
            assert_eq!(get(&disk, "granules").await, "3/3");
            disk.write(0, &[1; 4096]).await.unwrap();
            disk.write(8192, &[1; 2048]).await.unwrap();
            assert_eq!(
                (get(&disk, "granules").await, get(&disk, "remaining").await),
                ("1/3".into(), "4096".into())
            );
        });
    }

    #[test]
    fn since_a_backup_every_change_is_dirty_also_one_that_fails() {
        run(1, async |host| {
            let text = "element L (type log_dirty) (granule 4k) (initially clean) (written dirty)\n\
                        element E (type error) (op write) (range 4k-8k) element M (type mem) (size 12k) L -> E -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            disk.write(100, &[1; 8]).await.unwrap();
            assert_eq!(get(&disk, "granules").await, "1/3");
            assert!(disk.write(5000, &[1; 8]).await.is_err());
            assert_eq!(get(&disk, "granules").await, "2/3");
        });
    }

    #[test]
    fn with_a_file_it_behaves_like_a_vector() {
        let folder = tempfile::tempdir().unwrap();
        run(3, async |host| {
            let text = kept(folder.path(), "").replace("200M", "70001") + " L -> M";
            let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
            play_against_model(&disk, 3, 200).await;
        });
    }

    #[test]
    fn regions_are_marked_by_the_first_change_and_taken_back_after_some_seconds() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = kept(folder.path(), "(initially clean) (written dirty)") + " L -> M";
            let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
            assert_eq!(regions(folder.path()), 0);
            disk.write(130 << 20, &[1; 8]).await.unwrap();
            assert_eq!(regions(folder.path()), 0b100);
            blockmason::rt::sleep(Duration::from_secs(3)).await;
            disk.write(10, &[1; 8]).await.unwrap();
            blockmason::rt::sleep(Duration::from_secs(30)).await;
            assert_eq!(regions(folder.path()), 0);
            assert_eq!(get(&disk, "granules").await, "2/51200");
        });
        run(1, async |host| {
            let text = kept(folder.path(), "(initially dirty)") + " L -> M";
            let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
            assert_eq!(get(&disk, "granules").await, "2/51200", "the file knows better");
        });
    }

    #[test]
    fn a_region_stays_marked_as_long_as_the_disk_cannot_be_flushed() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = kept(folder.path(), "(initially clean)")
                + " element E (type error) (op flush) (count 3) L -> E -> M";
            let disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
            disk.write(0, &[1; 8]).await.unwrap();
            blockmason::rt::sleep(Duration::from_secs(12)).await;
            assert_eq!(regions(folder.path()), 1);
            blockmason::rt::sleep(Duration::from_secs(60)).await;
            assert_eq!(regions(folder.path()), 0);
        });
    }

    #[test]
    fn a_graph_that_is_only_built_leaves_nothing_behind_and_an_occupied_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let text = kept(folder.path(), "") + " L -> M";
            drop(blockmason::testing::graph(&host, crate::ALL, &text, "L").unwrap());
            assert!(!folder.path().join("map").exists());
            let _disk = TestDisk::new(&host, crate::ALL, &text, "L").await.unwrap();
            let twice = text.replace("element L", "element K").replace("L ->", "K ->");
            let error = TestDisk::new(&host, crate::ALL, &twice, "K").await.err().unwrap().to_string();
            assert!(error.contains("the element L keeps its map there"), "{error}");
            let coarse = text.replace("4k", "8k");
            let error = TestDisk::new(&host, crate::ALL, &coarse, "L").await.err().unwrap().to_string();
            assert!(error.contains("granules have 4096 bytes"), "{error}");
        });
    }

    static WITH_CLIENT: LazyLock<Catalogue> = LazyLock::new(|| {
        let all = crate::ALL.iter().copied().chain([&CLIENT]).collect::<Vec<&'static ElementType>>();
        Vec::leak(all)
    });

    #[test]
    fn a_reload_turns_nothing_clean_with_a_file_or_without() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let graph = |log: &str| {
                let text = format!(
                    "element Client (type client) element L (type log_dirty) {log} (written dirty)\n\
                     element M (type mem) (size 1M) Client -> L -> M"
                );
                checked(*WITH_CLIENT, &text).map(|_| text).unwrap()
            };
            let file = format!("(file {})", folder.path().join("map").display());
            let first = graph("(granule 4k) (initially clean)");
            let (live, disk) = live(&host, *WITH_CLIENT, &first).await.unwrap();
            disk.write(0, &[1; 8]).await.unwrap();
            let steps = [
                ("(granule 8k) (initially clean)".to_owned(), "1/128"),
                (format!("(granule 8k) (initially clean) {file}"), "2/128"),
                (format!("(granule 8k) (initially dirty) {file}"), "3/128"),
                ("(granule 4k) (initially clean)".to_owned(), "8/256"),
            ];
            for (step, (log, expected)) in steps.iter().enumerate() {
                live.reload(checked(*WITH_CLIENT, &graph(log)).unwrap(), &Options::default()).await.unwrap();
                assert_eq!(get(&disk, "granules").await, *expected, "{log}");
                disk.write((step as u64 + 1) << 16, &[1; 8]).await.unwrap();
            }
        });
    }

    #[test]
    fn a_successor_in_another_process_has_the_map_that_this_one_had() {
        run(1, async |host| {
            let text = "element L (type log_dirty) (granule 4k) element M (type mem) (size 1M) L -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            disk.write(8192, &[1; 40960]).await.unwrap();
            let next = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            let element = |disk: &TestDisk| {
                disk.disk.graph().instances().find(|instance| instance.name == "L").unwrap().element.clone()
            };
            let open = blockmason::Open { host: &host, disk: &disk.disk, name: "L" };
            let luggage = element(&disk).hand_over(&open).await.unwrap();
            element(&next).take_over(luggage, &open).await.unwrap();
            assert_eq!(get(&next, "granules").await, "246/256");
        });
    }
}
