//! A volume over a disk that loses its power, a client that knows what may be there, and what is there.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::BLOCK;
use super::super::open::{Opening, open_newest};
use super::super::pool::Pool;
use super::super::volume::Volume;
use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::testing::{TestDisk, graph};
use blockmason::{
    Connection, Cx, Data, Element, Error, Extra, Flags, Flow, Graph, Host, Instance, Kind, Op, Reply, Request,
};
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use tokio::sync::oneshot;

/// Lets nothing through once it has been pulled: what stands above it is dead to what lies below.
#[derive(Default)]
struct Plug(AtomicBool);

impl Element for Plug {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if self.0.load(Ordering::Relaxed) {
            return cx.fail(&req, Error::new(Kind::Unavailable, "the plug has been pulled"));
        }
        cx.forward(0, req)
    }

    fn call(&self, _handler: &str, _argument: &str) -> blockmason::Result<String> {
        self.0.store(true, Ordering::Relaxed);
        Ok(String::new())
    }
}

pub(super) static PLUG: ElementType = ElementType {
    name: "plug",
    family: Family::Fault,
    passes_through: true,
    build: |_| Ok(Arc::new(Plug::default())),
    ..ElementType::BASE
};

static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&PLUG]).collect()));

/// Blocks of the volume: two leaves, the second one not full.
pub(super) const BLOCKS: usize = 600;
const SECTORS: usize = 8;

/// What one block may hold: versions in the order in which they were sent, 0 is zeros.
#[derive(Clone, Default)]
struct Block {
    versions: Vec<u32>,
    /// When each of them was sent, and when it was seen to be answered.
    times: Vec<(u64, u64)>,
    /// The first of them that may still be there after a loss of power; after the death of the process.
    flushed: usize,
    answered: usize,
}

/// What is under way.
struct Sent {
    /// Blocks with the version that each of them gets, by its place in the list.
    blocks: Vec<(usize, usize)>,
    fua: bool,
    reply: oneshot::Receiver<Reply>,
}

/// A snapshot: what each block may be in it, then what it is.
struct Snapshot {
    lowest: Vec<usize>,
    highest: Option<Vec<usize>>,
    contents: Option<Vec<u8>>,
    reply: Option<oneshot::Receiver<Reply>>,
}

pub(super) struct Story {
    host: Arc<Host>,
    text: String,
    /// All elements, from the top.
    names: Vec<&'static str>,
    pub(super) rng: fastrand::Rng,
    seed: u64,
    graph: Arc<Graph>,
    disk: Option<TestDisk>,
    /// The volume is ordered.
    ordered: bool,
    /// One more with each request.
    now: u64,
    blocks: Vec<Block>,
    next: u32,
    sent: Vec<Sent>,
    /// Reads: the first block, and of each the first version that may be read.
    reads: Vec<(usize, Vec<usize>, oneshot::Receiver<Reply>)>,
    /// Flushes, each with what was answered before it.
    flushes: Vec<(Vec<usize>, oneshot::Receiver<Reply>)>,
    snapshots: BTreeMap<String, Snapshot>,
    /// The volume is being put in order.
    tidying: Option<oneshot::Receiver<Reply>>,
}

pub(super) fn find(graph: &Graph, name: &str) -> Arc<Instance> {
    graph.instances().find(|instance| instance.name == name).unwrap().clone()
}

/// A block's bytes in a version.
pub(super) fn bytes(block: usize, version: u32) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK as usize];
    if version > 0 {
        for word in bytes.chunks_mut(8) {
            word[..4].copy_from_slice(&(block as u32).to_le_bytes());
            word[4..].copy_from_slice(&version.to_le_bytes());
        }
        // Some of them are harder to compress than others.
        let mut rng = fastrand::Rng::with_seed(u64::from(version) << 32 | block as u64);
        for word in bytes.chunks_mut(8).take(version as usize % 4 * 170) {
            rng.fill(&mut word[2..4]);
            rng.fill(&mut word[6..]);
        }
    }
    bytes
}

impl Story {
    /// A volume with these parameters, over these elements, which have names of one letter.
    pub(super) async fn begin(host: &Arc<Host>, seed: u64, more: &str, way: &[&'static str]) -> Story {
        let jitter = ["0s", "2ms"][seed as usize % 2];
        // Trees of another format take room beside the first.
        let size = if more.contains("format 2") || !way.is_empty() { "52M" } else { "36M" };
        let text = format!(
            "element R (type radix) (volume v) (size {}k) {more} element P (type plug) \
             element T (type delay) (all {jitter}) (jitter {jitter}) \
             element D (type volatile) (size {size}) (seed {seed}) ",
            BLOCKS * 4
        );
        let between: String = way.iter().map(|element| format!("element {element} ")).collect();
        let names =
            [vec!["R"], way.iter().map(|element| &element[..1]).collect(), vec!["T", "P", "D"]].concat();
        let text = format!("{text} {between} {}", names.join(" -> "));
        let graph = graph(host, *TYPES, &text, "R").unwrap();
        let disk = TestDisk::serve(host, graph.clone()).await;
        disk.read(0, 4096).await.unwrap();
        let block = Block { versions: vec![0], times: vec![(0, 0)], ..Block::default() };
        Story {
            host: host.clone(),
            text,
            names,
            rng: fastrand::Rng::with_seed(seed),
            seed,
            graph,
            disk: Some(disk),
            ordered: more.contains("prefix"),
            now: 0,
            blocks: vec![block; BLOCKS],
            next: 1,
            sent: Vec::new(),
            reads: Vec::new(),
            flushes: Vec::new(),
            snapshots: BTreeMap::new(),
            tidying: None,
        }
    }

    fn disk(&self) -> &TestDisk {
        self.disk.as_ref().unwrap()
    }

    /// Sends something at random, unless it would overlap what is under way.
    pub(super) fn send(&mut self) {
        match self.rng.u8(0..100) {
            0..20 => self.read(),
            20..60 => self.change(Op::Write),
            60..68 => self.change(Op::WriteZeroes),
            68..76 => self.change(Op::Discard),
            76..86 => self.flush(),
            86..90 => drop(self.control("checkpoint", String::new())),
            90..94 => self.tidy(),
            _ => self.snapshot(),
        }
    }

    fn tidy(&mut self) {
        if self.tidying.is_none() {
            let order = ["rows", "rows", "unshare", "holes"][self.rng.usize(0..4)];
            self.tidying = Some(self.control("tidy", order.to_owned()));
        }
    }

    fn change(&mut self, op: Op) {
        let first = self.rng.usize(0..BLOCKS);
        let most = [2, 9, 40, 600][self.rng.usize(0..4)];
        let range = first..(first + self.rng.usize(1..=most)).min(BLOCKS);
        let busy =
            |block: &usize| self.sent.iter().any(|sent| sent.blocks.iter().any(|(other, _)| other == block));
        if range.clone().any(|block| busy(&block)) {
            return;
        }
        // Zeros are written, too.
        let version = if op == Op::Write && self.rng.u8(0..8) > 0 { self.next } else { 0 };
        self.next += 1;
        self.now += 1;
        let mut data = Vec::new();
        let mut blocks = Vec::new();
        for block in range.clone() {
            data.extend(bytes(block, version));
            self.blocks[block].versions.push(version);
            self.blocks[block].times.push((self.now, u64::MAX));
            blocks.push((block, self.blocks[block].versions.len() - 1));
        }
        let (offset, len) = (range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
        let mut req = match op {
            Op::Write => Request::write(offset, Data::copy_of(&data)),
            _ => Request::new(op, offset, len).with(Flags::MAY_UNMAP),
        };
        let fua = self.rng.u8(0..6) == 0;
        if fua {
            req = req.with(Flags::FUA);
        }
        let reply = self.disk().send(req);
        self.sent.push(Sent { blocks, fua, reply });
    }

    fn read(&mut self) {
        let first = self.rng.usize(0..BLOCKS);
        let range = first..(first + self.rng.usize(1..=40)).min(BLOCKS);
        let lowest = self.blocks[range.clone()].iter().map(|block| block.answered).collect();
        let read = Request::read(range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
        let reply = self.disk().send(read);
        self.reads.push((first, lowest, reply));
    }

    fn flush(&mut self) {
        let answered = self.blocks.iter().map(|block| block.answered).collect();
        let reply = self.disk().send(Request::flush());
        self.flushes.push((answered, reply));
    }

    fn control(&self, verb: &str, argument: String) -> oneshot::Receiver<Reply> {
        let mut req = Request::new(Op::Control, 0, 0);
        req.extra = Some(Box::new(Extra { control: Some((verb.to_owned(), argument)), ..Extra::default() }));
        self.disk().send(req)
    }

    fn snapshot(&mut self) {
        // Several at once of one volume are refused, which is tested elsewhere.
        if self.snapshots.len() >= 12 || self.snapshots.values().any(|snapshot| snapshot.reply.is_some()) {
            return;
        }
        let name = format!("s{}", self.next);
        self.next += 1;
        let reply = Some(self.control("snapshot", name.clone()));
        let lowest = self.blocks.iter().map(|block| block.answered).collect();
        self.snapshots.insert(name, Snapshot { lowest, highest: None, contents: None, reply });
    }

    /// Takes notice of what has been answered.
    pub(super) fn look(&mut self) {
        let Story { sent, blocks, reads, flushes, snapshots, tidying, seed, now, .. } = self;
        if let Some(Ok(reply)) = tidying.as_mut().map(|reply| reply.try_recv()) {
            reply.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            *tidying = None;
        }
        reads.retain_mut(|(first, lowest, reply)| {
            let Ok(reply) = reply.try_recv() else { return true };
            let found = reply
                .and_then(|answer| answer.into_data())
                .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            for ((ix, from), found) in (*first..).zip(lowest).zip(found.to_vec().chunks(BLOCK as usize)) {
                let allowed = &blocks[ix].versions[*from..];
                if let Some(said) = misfit(ix, found, allowed) {
                    panic!("seed {seed}: block {ix} is read as {said}, not one of {allowed:?}");
                }
            }
            false
        });
        sent.retain_mut(|sent| {
            let Ok(reply) = sent.reply.try_recv() else { return true };
            reply.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            for (block, version) in &sent.blocks {
                let block = &mut blocks[*block];
                block.answered = *version;
                block.times[*version].1 = *now;
                if sent.fua {
                    block.flushed = *version;
                }
            }
            false
        });
        flushes.retain_mut(|(answered, reply)| {
            let Ok(reply) = reply.try_recv() else { return true };
            reply.unwrap();
            for (block, answered) in blocks.iter_mut().zip(answered) {
                block.flushed = block.flushed.max(*answered);
            }
            false
        });
        for snapshot in snapshots.values_mut() {
            let Some(Ok(reply)) = snapshot.reply.as_mut().map(|reply| reply.try_recv()) else { continue };
            reply.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            snapshot.reply = None;
            snapshot.highest = Some(blocks.iter().map(|block| block.versions.len() - 1).collect());
            for (block, lowest) in blocks.iter_mut().zip(&snapshot.lowest) {
                block.flushed = block.flushed.max(*lowest);
            }
        }
    }

    /// Waits for everything.
    pub(super) async fn settle(&mut self) {
        while self.tidying.is_some()
            || !self.sent.is_empty()
            || !self.reads.is_empty()
            || !self.flushes.is_empty()
            || self.snapshots.values().any(|s| s.reply.is_some())
        {
            blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
            self.look();
        }
    }

    /// The process dies, or the power is lost, and a new process begins. Then everything is looked at.
    pub(super) async fn crash(&mut self, power: bool) {
        self.look();
        find(&self.graph, "P").element.call("pull", "").unwrap();
        let sink = find(&self.graph, "D");
        if power {
            sink.element.call("lose_power", "").unwrap();
        }
        self.disk = None;
        self.forget();
        self.graph = reborn(&self.host, &self.graph, &self.text, &self.names);
        self.verify(&self.copy(&sink).await, power);
        let disk = TestDisk::serve(&self.host, self.graph.clone()).await;
        let found = disk.read(0, BLOCKS as u64 * BLOCK).await.unwrap();
        self.hold(&found, power);
        self.disk = Some(disk);
    }

    /// Forgets what was under way: nobody knows what has become of it.
    fn forget(&mut self) {
        self.sent.clear();
        self.reads.clear();
        self.flushes.clear();
        self.tidying = None;
        self.snapshots.retain(|_, snapshot| snapshot.reply.is_none());
    }

    /// A copy of what the disk has.
    async fn copy(&self, sink: &Arc<Instance>) -> File {
        let fresh = graph(&self.host, *TYPES, &self.text, "D").unwrap();
        let instances: Vec<_> = fresh
            .instances()
            .filter(|instance| ["D", "Client"].contains(&instance.name.as_str()))
            .map(|instance| if instance.name == "D" { sink.clone() } else { instance.clone() })
            .collect();
        let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
        let edges = [Connection { from: place("Client"), port: "out".into(), to: place("D") }];
        let graph = Arc::new(Graph::assemble("copy", &instances, &edges, self.host.shards()).unwrap());
        let disk = TestDisk::serve(&self.host, graph).await;
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        file.set_len(disk.size()).unwrap();
        for at in (0..disk.size()).step_by(1 << 20) {
            let bytes = disk.read(at, 1 << 20).await.unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes, at).unwrap();
            }
        }
        file
    }

    /// Opens a copy of the pool, checks it, and looks at all that is in it.
    fn verify(&mut self, copy: &File, power: bool) {
        let below = Below::Plain(copy.as_fd());
        let opening = Opening::writable(1 << 20);
        let size = copy.metadata().unwrap().len();
        let pool = block_on(open_newest(opening, size, below))
            .unwrap_or_else(|error| panic!("seed {}: {error}", self.seed));
        let pool = Arc::new(pool);
        let findings = block_on(check(&pool, below)).unwrap();
        assert_eq!(findings.said.all, [] as [String; 0], "seed {}", self.seed);
        let unused: Vec<_> = pool.space.leaked(&pool.core().journal);
        assert_eq!(unused, [] as [u64; 0], "seed {}: used, and in no tree", self.seed);
        self.hold_snapshots(&pool, below);
        let number = volume_of(&pool);
        self.hold(&read_all(&pool, number, BLOCKS, below), power);
    }

    /// Each snapshot holds what it may, and is always what it was when it was read first.
    fn hold_snapshots(&mut self, pool: &Arc<Pool>, below: Below<'_>) {
        let number = volume_of(pool);
        for (name, snapshot) in &mut self.snapshots {
            let taken = pool.core().snapshot(number, name);
            let taken = taken.unwrap_or_else(|| panic!("seed {}: snapshot {name} is gone", self.seed));
            let found = read_all(pool, taken, BLOCKS, below);
            match (&snapshot.contents, &snapshot.highest) {
                (Some(contents), _) => {
                    let differs =
                        contents.chunks(4096).zip(found.chunks(4096)).position(|(one, other)| one != other);
                    assert_eq!(differs, None, "seed {}: snapshot {name} has changed at a block", self.seed);
                }
                (None, Some(highest)) => {
                    for (ix, found) in found.chunks(BLOCK as usize).enumerate() {
                        let allowed = &self.blocks[ix].versions[snapshot.lowest[ix]..=highest[ix]];
                        if let Some(said) = misfit(ix, found, allowed) {
                            panic!(
                                "seed {}: snapshot {name}, block {ix} has {said}, not one of {allowed:?}",
                                self.seed
                            );
                        }
                    }
                }
                (None, None) => panic!("a snapshot that was not answered was forgotten"),
            }
            snapshot.contents = Some(found);
        }
    }

    /// What is found must be what may be. From now on it is that.
    fn hold(&mut self, found: &[u8], power: bool) {
        for (ix, (block, found)) in self.blocks.iter().zip(found.chunks(BLOCK as usize)).enumerate() {
            let allowed = &block.versions[if power { block.flushed } else { block.answered }..];
            if let Some(said) = misfit(ix, found, allowed) {
                panic!("seed {}: block {ix} has {said}, not one of {allowed:?}; power {power}", self.seed);
            }
        }
        if self.ordered && power {
            self.hold_order(found);
        }
        // A block that is torn now may be found as it is for ever: only one that is whole narrows what may be.
        for (ix, (block, found)) in self.blocks.iter_mut().zip(found.chunks(BLOCK as usize)).enumerate() {
            let from = if power { block.flushed } else { block.answered };
            if let Some(place) =
                (from..block.versions.len()).rev().find(|place| bytes(ix, block.versions[*place]) == found)
            {
                block.versions = vec![block.versions[place]];
                block.times = vec![block.times[place]];
                (block.flushed, block.answered) = (0, 0);
            } else {
                block.versions.drain(..from);
                block.times.drain(..from);
                (block.flushed, block.answered) = (0, 0);
            }
        }
    }

    /// What is there is what there was at one instant: nothing is missing that was answered before anything that is there
    /// was sent.
    fn hold_order(&self, found: &[u8]) {
        let places =
            self.blocks.iter().zip(found.chunks(BLOCK as usize)).enumerate().map(|(ix, (block, found))| {
                let is = |place: &usize| bytes(ix, block.versions[*place]) == found;
                let mut all = (block.flushed..block.versions.len()).filter(is);
                let first = all.next().unwrap_or_else(|| panic!("seed {}: block {ix} is torn", self.seed));
                (ix, block, first, all.next_back().unwrap_or(first))
            });
        let places: Vec<_> = places.collect();
        let there = places.iter().map(|(ix, block, first, _)| (block.times[*first].0, *ix)).max();
        let (sent, newest) = there.unwrap_or_default();
        for (ix, block, _, last) in places {
            let missing = block.times[last + 1..].iter().find(|(_, answered)| *answered < sent);
            assert_eq!(
                missing, None,
                "seed {}: block {ix} lacks it, and block {newest} has {sent}",
                self.seed
            );
        }
    }

    /// Looks at everything without any crash.
    pub(super) async fn look_inside(&mut self) {
        self.settle().await;
        let sink = find(&self.graph, "D");
        let copy = self.copy(&sink).await;
        let below = Below::Plain(copy.as_fd());
        let opening = Opening::read_only(1 << 20);
        let pool = Arc::new(block_on(open_newest(opening, copy.metadata().unwrap().len(), below)).unwrap());
        self.hold_snapshots(&pool, below);
    }
}

/// The volume's number, whatever the key of its trees.
fn volume_of(pool: &Pool) -> u32 {
    let core = pool.core();
    core.volume(&core.called("v")).unwrap()
}

/// What of a block is none of these versions, each sector by itself.
pub(super) fn misfit(block: usize, found: &[u8], allowed: &[u32]) -> Option<String> {
    let sectors = found.chunks(BLOCK as usize / SECTORS).enumerate();
    let mut bad = sectors.filter(|(sector, found)| {
        let is = |version: &u32| bytes(block, *version)[sector * found.len()..].starts_with(found);
        !allowed.iter().any(is)
    });
    bad.next().map(|(sector, found)| {
        let word = |at: usize| u16::from_le_bytes([found[at], found[at + 1]]);
        format!("version {} of block {} in sector {sector}", word(4), word(0))
    })
}

/// Everything that a volume or snapshot has.
pub(super) fn read_all(pool: &Arc<Pool>, number: u32, blocks: usize, below: Below<'_>) -> Vec<u8> {
    let volume = Volume::new(pool.clone(), number);
    block_on(volume.read_pieces(Request::read(0, blocks as u64 * BLOCK), below))
        .unwrap()
        .into_data()
        .unwrap()
        .to_vec()
}

/// The same graph, of which only the disk is what it was: all else has died.
fn reborn(host: &Arc<Host>, before: &Graph, text: &str, names: &[&'static str]) -> Arc<Graph> {
    let fresh = graph(host, *TYPES, text, "R").unwrap();
    let instance = |instance: &Arc<Instance>| match instance.name == "D" {
        true => find(before, "D"),
        false => instance.clone(),
    };
    let instances: Vec<_> = fresh.instances().map(instance).collect();
    let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
    let row = [&["Client"], names].concat();
    let edge = |pair: &[&str]| Connection { from: place(pair[0]), port: "out".into(), to: place(pair[1]) };
    let edges: Vec<_> = row.windows(2).map(edge).collect();
    Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap())
}
