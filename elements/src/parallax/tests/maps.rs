//! How much room the maps of trees take: a tree is told where blocks are, and nobody writes them.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::{BLOCK, Change, EXTENT_RECORD, ExtentRecord, Format};
use super::super::log::Part;
use super::super::open::{Opening, add_trees, create, open};
use super::super::pool::Pool;
use super::super::settings::Settings;
use super::super::space::Want;
use super::kit::find;
use super::rig::HOLD;
use blockmason::describe::{Catalogue, ElementType, Family, Outs, Ports};
use blockmason::testing::{TestDisk, graph, run};
use blockmason::{Answer, Children, Cx, Element, Error, Extra, Flow, Op, Prepared, Reply, Request, Result};
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

/// Has a pool on the disk below, and does with its trees what control requests ask for.
#[derive(Default)]
struct Mapper {
    pool: Mutex<Option<Arc<Pool>>>,
    /// Trees of format 1, where the others are of format 2.
    other: Mutex<Option<Arc<Pool>>>,
}

impl Mapper {
    /// A new pool with one volume.
    async fn make(&self, words: &[u64], size: u64, below: Below<'_>) -> Result<()> {
        let format = Format::numbered(words[0] as u32).unwrap();
        create([5; 16], size, below).await?;
        let opened = open(Opening::writable(64 << 20), size, below).await?;
        let pool = match opened.take(format)? {
            Ok(pool) => pool,
            Err(others) => {
                let added = add_trees(format, &others, below).await?;
                *self.other.lock().unwrap() = Some(Arc::new(others));
                added
            }
        };
        pool.make_volume("v", words[1], Settings::default(), below).await?;
        *self.pool.lock().unwrap() = Some(Arc::new(pool));
        Ok(())
    }

    fn pool(&self) -> Arc<Pool> {
        self.pool.lock().unwrap().clone().unwrap()
    }

    /// Gives blocks places, as writes of so many at once would.
    async fn place(&self, blocks: Range<u64>, most: u64, below: Below<'_>) -> Result<()> {
        let pool = self.pool();
        let (mut first, mut changes) = (blocks.start, Vec::new());
        while first < blocks.end {
            let near = pool.core().lines[&1].near;
            let want = Want { least: 1, most: most.min(blocks.end - first) };
            let taken = pool.space.take(near, want, below).await?;
            pool.core().lines.get_mut(&1).unwrap().near = Some(taken.end);
            let len = taken.end - taken.start;
            changes.push(Change::Map {
                volume: 1,
                first,
                len: len as u32,
                at: taken.start,
                crc: 0,
                pack: None,
                crcs: Vec::new(),
            });
            first += len;
            if changes.len() == 512 || first == blocks.end {
                pool.log(Part::after_data(std::mem::take(&mut changes)), below).await?;
                if pool.core().is_due() {
                    pool.checkpoint(below).await?;
                }
            }
        }
        pool.checkpoint(below).await
    }

    async fn control(&self, verb: &str, words: Vec<u64>, size: u64, below: Below<'_>) -> Reply {
        match verb {
            "make" => self.make(&words, size, below).await?,
            "place" => self.place(words[0]..words[1], words[2], below).await?,
            // Blocks here and there, each by itself.
            "scatter" => {
                let mut rng = fastrand::Rng::with_seed(words[1]);
                for _ in 0..words[0] {
                    let block = rng.u64(0..words[2]);
                    self.place_one(block, below).await?;
                }
                self.pool().checkpoint(below).await?;
            }
            "check" => assert_eq!(check(&self.pool(), below).await?.said.all, [] as [String; 0]),
            "check_other" => {
                let other = self.other.lock().unwrap().clone().unwrap();
                assert_eq!(check(&other, below).await?.said.all, [] as [String; 0]);
            }
            // Where the second copy of the table is.
            "table" => return Ok(Answer::Text((self.pool().space.label().record(0)[1] / BLOCK).to_string())),
            "compare" => self.compare(below).await?,
            _ => return Err(Error::unsupported("nothing of that kind")),
        }
        let core = self.pool().core().root.used;
        let mapped = self.pool().core().catalog[&1].mapped;
        Ok(Answer::Text(((core - mapped) * BLOCK).to_string()))
    }

    /// The table says what is known.
    async fn compare(&self, below: Below<'_>) -> Result<()> {
        let space = &self.pool().space;
        for (extent, used) in space.committed() {
            for place in space.label().record(extent) {
                let block = below.read(place / BLOCK * BLOCK, BLOCK).await?.to_vec();
                let record =
                    ExtentRecord::decode(&block[(place % BLOCK) as usize..][..EXTENT_RECORD as usize]);
                assert_eq!(record.unwrap().used, used, "extent {extent}");
            }
        }
        Ok(())
    }

    async fn place_one(&self, block: u64, below: Below<'_>) -> Result<()> {
        let pool = self.pool();
        let at = pool.space.take(None, Want { least: 1, most: 1 }, below).await?.start;
        let change =
            Change::Map { volume: 1, first: block, len: 1, at, crc: 0, pack: None, crcs: Vec::new() };
        pool.log(Part::after_data(vec![change]), below).await?;
        if pool.core().is_due() {
            pool.checkpoint(below).await?;
        }
        Ok(())
    }
}

impl Element for Mapper {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        Ok(Prepared::with(below.above(), below.size))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (verb, argument) = req.extra.as_ref().and_then(|extra| extra.control.clone()).unwrap();
        let words = argument.split(' ').filter_map(|word| word.parse().ok()).collect();
        let size = *cx.prepared::<u64>();
        cx.later(&req, async move { self.control(&verb, words, size, Below::Port(cx)).await })
    }
}

static MAPPER: ElementType = ElementType {
    name: "mapper",
    family: Family::Fault,
    ports: Ports { input: true, out: Outs::Named(&["out"]) },
    build: |_| Ok(Arc::new(Mapper::default())),
    ..ElementType::BASE
};

static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&MAPPER, &HOLD]).collect()));

fn send(disk: &TestDisk, verb: &str, argument: String) -> oneshot::Receiver<Reply> {
    let mut req = Request::new(Op::Control, 0, 0);
    req.extra = Some(Box::new(Extra { control: Some((verb.to_owned(), argument)), ..Extra::default() }));
    disk.send(req)
}

/// Bytes of nodes, of the catalog among them, after something has been done.
async fn ask(disk: &TestDisk, verb: &str, argument: String) -> u64 {
    match send(disk, verb, argument).await.unwrap().unwrap() {
        Answer::Text(text) => text.parse().unwrap(),
        other => panic!("{other:?}"),
    }
}

/// What is written in a row, and what is written here and there over it, takes as much as docs/performance.md says.
#[test]
fn a_map_is_as_long_as_what_is_in_it() {
    let gigabytes = std::env::var("PARALLAX_MAP").ok().and_then(|size| size.parse().ok()).unwrap_or(8_u64);
    let size = gigabytes << 30;
    run(1, async |host| {
        let text = format!(
            "element M (type mapper) element D (type mem) (size {}M) M -> D",
            (size >> 20) * 5 / 4 + 200
        );
        let disk = TestDisk::new(&host, *TYPES, &text, "M").await.unwrap();
        let few = ask(&disk, "make", format!("2 {size}")).await;
        let row = ask(&disk, "place", format!("0 {} 256", size / BLOCK)).await - few;
        println!("{gigabytes} GiB: {row} bytes in a row");
        let scattered = (size / BLOCK / 64).min(100_000);
        let here_and_there = ask(&disk, "scatter", format!("{scattered} 7 {}", size / BLOCK)).await - few;
        if gigabytes <= 64 {
            ask(&disk, "check", String::new()).await;
        }
        println!("{here_and_there} bytes with {scattered} blocks here and there");
        // Both copies of everything, and no more for each block than a leaf and the map above it.
        assert!(row * 1024 / gigabytes <= 16 << 20, "{row}");
        assert!(here_and_there <= row + scattered * 5 * 4 * BLOCK, "{here_and_there}");
    });
}

/// A check of one format compares both copies of the table, of which it has read the first, while the other format's
/// checkpoint writes to both.
#[test]
fn a_check_leaves_what_another_checkpoint_writes() {
    run(2, async |host| {
        let text =
            "element M (type mapper) element H (type hold) element D (type mem) (size 200M) M -> H -> D";
        let graph = graph(&host, *TYPES, text, "M").unwrap();
        let hold = find(&graph, "H").element.clone();
        let disk = TestDisk::serve(&host, graph).await;
        ask(&disk, "make", format!("2 {}", 64 << 20)).await;
        ask(&disk, "place", "0 100 100".to_owned()).await;
        let second = ask(&disk, "table", String::new()).await;
        hold.call("", &format!("read {second}")).unwrap();
        let checked = send(&disk, "check_other", String::new());
        while hold.get("held").unwrap() == "0" {
            blockmason::rt::sleep(Duration::from_millis(1)).await;
        }
        let placed = send(&disk, "place", "200 300 50".to_owned());
        blockmason::rt::sleep(Duration::from_millis(100)).await;
        hold.call("", "").unwrap();
        checked.await.unwrap().unwrap();
        placed.await.unwrap().unwrap();
        ask(&disk, "compare", String::new()).await;
    });
}
