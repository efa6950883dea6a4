//! A disk in memory with a write cache that can lose its power: the disk that lies the least about
//! what a disk may do, for testing what lies above it.

use super::{control, unique};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports, Survives};
use blockmason::lang::value::Size;
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Extent, ExtentState, Flow, Geometry, Kind, Op, Ops, PoolBuf,
    Prepared, Reply, Request, Result,
};
use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

blockmason::params! {
    /// A disk in memory that can lose its power.
    struct Params {
        /// Bytes that the disk has.
        size: Size,
        /// Where the random numbers start that decide what a loss of power leaves.
        seed: u64 = "0",
        /// Agrees that a guest which outlives this process loses what it was told is written: asked for below
        /// `vhost_user_blk`.
        lossy: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "volatile",
    summary: "a disk in memory that can lose its power, and with it what was not flushed",
    doc: "A sparse memory disk behind a write cache. A flush makes durable what was answered before it came, \
          and not what was only under way; FUA makes its own sectors durable before the answer.\n\n\
          When the power goes, each 512-byte sector that is not durable turns into any one of the versions \
          written since it last was, or the durable one, chosen at random and independently of its \
          neighbours, also within one write. Requests under way fail. The same seed and the same requests \
          give the same losses. A sector that is changed eight times without a flush is written back as a \
          disk's cache does when it is full: its oldest versions are then past.\n\n\
          It imitates a disk that survives a loss of power; being memory, it survives nothing itself.",
    family: Family::Sink,
    params: Params::PARAMS,
    ports: Ports::SINK,
    handlers: &[
        Handler {
            name: "unflushed",
            access: Access::Read,
            doc: "sectors whose newest version is not durable",
        },
        Handler { name: "lose_power", access: Access::Call, doc: "cuts the power and restores it at once" },
        Handler { name: "cut", access: Access::Call, doc: "cuts the power: every request fails with EIO" },
        Handler { name: "restore", access: Access::Call, doc: "restores the power: serves what survived" },
    ],
    survives: Survives::Nothing,
    example: "element Guest (type nbd) (listen unix:volatile.sock)\n\
              element Disk (type volatile) (size 64M) (seed 7)\n\
              Guest -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Volatile::new(&build.read(Params::from)?))),
    ..ElementType::BASE
};

/// What is torn in no case, in bytes.
const SECTOR: u64 = 512;

/// Versions of one sector that the cache holds. Each is a legal outcome of a loss, so fewer test less;
/// more take more memory.
const VERSIONS: usize = 8;

/// The bytes of one sector, the last of a disk perhaps shorter; None is zeros.
type Bytes = Option<Box<[u8]>>;

struct Version {
    change: u64,
    bytes: Bytes,
}

struct State {
    powered: bool,
    /// What a loss of power leaves for sure, by sector. Absent ones are zeros.
    durable: BTreeMap<u64, Box<[u8]>>,
    /// What is newer, oldest first, never empty.
    cache: BTreeMap<u64, Vec<Version>>,
    /// The changes that are not answered yet, by number.
    in_flight: BTreeSet<u64>,
    next: u64,
    /// How often the power went.
    losses: u64,
    rng: fastrand::Rng,
}

/// Makes the `count` oldest cached versions of a sector durable, that is, the last of them.
fn settle(durable: &mut BTreeMap<u64, Box<[u8]>>, sector: u64, versions: &mut Vec<Version>, count: usize) {
    match versions.drain(..count).next_back().map(|version| version.bytes) {
        Some(Some(bytes)) => drop(durable.insert(sector, bytes)),
        Some(None) => drop(durable.remove(&sector)),
        None => {}
    }
}

fn sectors(req: &Request) -> Range<u64> {
    req.offset / SECTOR..req.end().div_ceil(SECTOR)
}

impl State {
    fn read(&self, req: &Request) -> Data {
        let mut data = PoolBuf::new(req.len as usize);
        for (sector, to) in sectors(req).zip(data.chunks_mut(SECTOR as usize)) {
            let cached = self.cache.get(&sector).and_then(|versions| versions.last());
            let newest = cached.map_or(self.durable.get(&sector), |version| version.bytes.as_ref());
            match newest {
                Some(bytes) => to.copy_from_slice(bytes),
                None => to.fill(0),
            }
        }
        data.freeze()
    }

    /// Puts a change into the cache, under way. Returns its number.
    fn begin(&mut self, req: &Request) -> u64 {
        let change = self.next;
        self.next += 1;
        self.in_flight.insert(change);
        if req.op == Op::Write && !req.data.is_known_zero() {
            let data = req.data.to_vec();
            for (sector, bytes) in sectors(req).zip(data.chunks(SECTOR as usize)) {
                self.push(sector, Version { change, bytes: Some(bytes.into()) });
            }
        } else {
            // Where nothing was ever written it is zeros already, whatever the power does.
            let durable = self.durable.range(sectors(req)).map(|(sector, _)| *sector);
            let known: BTreeSet<_> =
                durable.chain(self.cache.range(sectors(req)).map(|(sector, _)| *sector)).collect();
            known.into_iter().for_each(|sector| self.push(sector, Version { change, bytes: None }));
        }
        change
    }

    fn push(&mut self, sector: u64, version: Version) {
        let versions = self.cache.entry(sector).or_default();
        if versions.len() == VERSIONS {
            settle(&mut self.durable, sector, versions, 1);
        }
        versions.push(version);
    }

    /// Ends a change: it may be answered.
    fn end(&mut self, change: u64, req: &Request) -> Reply {
        if !self.in_flight.remove(&change) {
            return Err(off("the power went while it was under way"));
        }
        if req.is_fua() {
            let touched: Vec<u64> = self.cache.range(sectors(req)).map(|(sector, _)| *sector).collect();
            for sector in touched {
                let Entry::Occupied(mut versions) = self.cache.entry(sector) else { continue };
                let count = versions.get().partition_point(|version| version.change <= change);
                settle(&mut self.durable, sector, versions.get_mut(), count);
                if versions.get().is_empty() {
                    versions.remove();
                }
            }
        }
        Ok(Answer::Done)
    }

    fn flush(&mut self) {
        self.cache.retain(|sector, versions| {
            let answered = |version: &Version| !self.in_flight.contains(&version.change);
            let count = versions.iter().rposition(answered).map_or(0, |last| last + 1);
            settle(&mut self.durable, *sector, versions, count);
            !versions.is_empty()
        });
    }

    /// The power goes. Returns how many sectors were not durable.
    fn lose(&mut self) -> usize {
        let cache = std::mem::take(&mut self.cache);
        let unflushed = cache.len();
        for (sector, mut versions) in cache {
            let survivor = self.rng.usize(0..=versions.len());
            settle(&mut self.durable, sector, &mut versions, survivor);
        }
        self.in_flight.clear();
        self.losses += 1;
        unflushed
    }
}

struct Volatile {
    size: u64,
    lossy: bool,
    name: String,
    state: Mutex<State>,
}

fn off(message: &'static str) -> Error {
    Error::new(Kind::Unavailable, message)
}

impl Volatile {
    fn new(params: &Params) -> Volatile {
        let state = State {
            powered: true,
            durable: BTreeMap::new(),
            cache: BTreeMap::new(),
            in_flight: BTreeSet::new(),
            next: 0,
            losses: 0,
            rng: fastrand::Rng::with_seed(params.seed),
        };
        Volatile {
            size: params.size.0,
            lossy: params.lossy,
            name: unique("volatile"),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between two steps of a change leaves other sectors whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A change is answered two turns of the shard after it came: in the one between, a flush or a loss
    /// of power may come and find it under way.
    fn change<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let change = self.state().begin(&req);
        Flow::later(async move {
            tokio::task::yield_now().await;
            tokio::task::yield_now().await;
            let reply = self.state().end(change, &req);
            cx.answer(&req, reply).await
        })
    }
}

impl Element for Volatile {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        let geometry = Geometry { volatile: !self.lossy, ..Geometry::new(self.size) };
        Ok(Prepared::of(Geometry { min_block: SECTOR as u32, ops: Ops::ALL, needs_flush: true, ..geometry }))
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(super::only_here())
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !self.state().powered {
            return cx.fail(&req, off("the power is off"));
        }
        let unsupported = |message| cx.fail(&req, Error::unsupported(message));
        match req.op {
            Op::Read => Flow::Now(Ok(Answer::Data(self.state().read(&req)))),
            Op::Write | Op::Discard | Op::WriteZeroes => self.change(req, cx),
            Op::Flush => {
                self.state().flush();
                Flow::done()
            }
            Op::Cache => Flow::done(),
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                unsupported("memory knows of no such map")
            }
            Op::Extents => {
                Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])))
            }
            Op::Control => control(&req, cx, || Some(format!("{}, loss {}", self.name, self.state().losses))),
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "unflushed" => Ok(self.state().cache.len().to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        let mut state = self.state();
        match handler {
            "lose_power" | "cut" => {
                state.powered = state.powered && handler == "lose_power";
                Ok(format!("{} sectors were not durable", state.lose()))
            }
            "restore" => {
                state.powered = true;
                Ok("the power is on".to_owned())
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Data, Element, Errno, Flags, Host, Op, Reply, Request};
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    async fn disk(host: &Arc<Host>, parameters: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!("element V (type volatile) {parameters}");
        let graph = graph(host, crate::ALL, &text, "V").unwrap();
        let element = graph.instances().find(|instance| instance.name == "V").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, element)
    }

    #[test]
    fn behaves_like_a_vector_while_the_power_is_on() {
        for (seed, size) in ["64k", "100001", "511", "1000"].iter().enumerate() {
            run(seed as u64, async |host| {
                let (disk, _) = disk(&host, &format!("(size {size})")).await;
                play_against_model(&disk, seed as u64, 400).await;
            });
        }
    }

    /// What a test does to the disk.
    #[derive(Clone, Debug)]
    enum Step {
        Change { op: Op, at: u64, len: u64, byte: u8, fua: bool },
        Flush,
        Lose,
    }

    /// Not a multiple of a sector.
    const SIZE: u64 = 12 * 512 + 100;

    fn step() -> impl Strategy<Value = Step> {
        let op = prop_oneof![4 => Just(Op::Write), 1 => Just(Op::WriteZeroes), 1 => Just(Op::Discard)];
        let change = (op, 0..SIZE, 1..2000u64, 1..=255u8, prop::bool::weighted(0.2))
            .prop_map(|(op, at, len, byte, fua)| Step::Change { op, at, len: len.min(SIZE - at), byte, fua });
        prop_oneof![12 => change, 2 => Just(Step::Flush), 1 => Just(Step::Lose)]
    }

    /// A disk as its definition has it: what it reads as, and what each sector may turn into.
    struct Model {
        now: Vec<u8>,
        legal: Vec<BTreeSet<Vec<u8>>>,
    }

    impl Model {
        fn new() -> Model {
            let now = vec![0; SIZE as usize];
            let legal = now.chunks(512).map(|sector| BTreeSet::from([sector.to_vec()])).collect();
            Model { now, legal }
        }

        fn change(&mut self, at: u64, bytes: &[u8], fua: bool) {
            self.now[at as usize..][..bytes.len()].copy_from_slice(bytes);
            let touched = at / 512..(at + bytes.len() as u64).div_ceil(512);
            for (ix, sector) in (0..).zip(self.now.chunks(512)).filter(|(ix, _)| touched.contains(ix)) {
                if fua {
                    self.legal[ix as usize].clear();
                }
                self.legal[ix as usize].insert(sector.to_vec());
            }
        }

        fn flush(&mut self) {
            for (legal, sector) in self.legal.iter_mut().zip(self.now.chunks(512)) {
                *legal = BTreeSet::from([sector.to_vec()]);
            }
        }
    }

    async fn play(disk: &TestDisk, element: &dyn Element, steps: &[Step]) {
        let mut model = Model::new();
        for step in steps {
            match *step {
                Step::Change { op, at, len, byte, fua } => {
                    let fill = if op == Op::Write { byte } else { 0 };
                    let bytes = vec![fill; len as usize];
                    let mut req = Request::new(op, at, len);
                    if op == Op::Write {
                        req.data = Data::copy_of(&bytes);
                    }
                    if fua {
                        req = req.with(Flags::FUA);
                    }
                    disk.submit(req).await.unwrap();
                    // Discarding is for whole sectors; what it does to others is open.
                    let (start, end) = (at.next_multiple_of(512), (at + len) / 512 * 512);
                    let end = if at + len == SIZE { SIZE } else { end };
                    match op {
                        Op::Discard if end <= start => {}
                        Op::Discard => model.change(start, &bytes[..(end - start) as usize], fua),
                        _ => model.change(at, &bytes, fua),
                    }
                }
                Step::Flush => {
                    disk.op(Op::Flush, 0, 0).await.unwrap();
                    model.flush();
                    assert_eq!(element.get("unflushed").unwrap(), "0");
                }
                Step::Lose => {
                    element.call("lose_power", "").unwrap();
                    model.now = disk.read(0, SIZE).await.unwrap();
                    for (ix, sector) in model.now.chunks(512).enumerate() {
                        assert!(model.legal[ix].contains(sector), "sector {ix} has an illegal value");
                    }
                    model.flush();
                }
            }
            assert!(disk.read(0, SIZE).await.unwrap() == model.now);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

        #[test]
        fn a_loss_of_power_leaves_legal_values(seed in 0..u64::MAX, steps in prop::collection::vec(step(), 1..80)) {
            run(seed, async |host| {
                let (disk, element) = disk(&host, &format!("(size {SIZE}) (seed {seed})")).await;
                play(&disk, &*element, &steps).await;
            });
        }
    }

    /// Writes twice to 8 sectors in one request each, loses the power, and says what is there.
    async fn after_a_loss(host: &Arc<Host>, seed: u64) -> Vec<u8> {
        let (disk, element) = disk(host, &format!("(size 4k) (seed {seed})")).await;
        disk.write(0, &[1; 4096]).await.unwrap();
        disk.write(0, &[2; 4096]).await.unwrap();
        assert_eq!(element.get("unflushed").unwrap(), "8");
        element.call("lose_power", "").unwrap();
        disk.read(0, 4096).await.unwrap().chunks(512).map(|sector| sector[0]).collect()
    }

    #[test]
    fn every_outcome_happens_and_writes_are_torn() {
        run(1, async |host| {
            let outcomes: BTreeSet<_> = {
                let mut outcomes = BTreeSet::new();
                for seed in 0..30 {
                    outcomes.insert(after_a_loss(&host, seed).await);
                }
                outcomes
            };
            assert!(outcomes.len() > 25, "outcomes differ from seed to seed");
            for value in 0..3 {
                assert!(outcomes.iter().any(|sectors| sectors[3] == value), "{value} is legal");
            }
            assert_eq!(after_a_loss(&host, 5).await, after_a_loss(&host, 5).await, "but not for one seed");
        });
    }

    /// Writes to the first sector, and comes back when the write is in but not answered.
    async fn under_way(disk: &TestDisk, element: &dyn Element) -> tokio::sync::oneshot::Receiver<Reply> {
        let write = disk.send(Request::write(0, Data::copy_of(&[2; 512])));
        while element.get("unflushed").unwrap() == "0" {
            tokio::task::yield_now().await;
        }
        write
    }

    #[test]
    fn a_flush_does_not_cover_what_is_under_way() {
        run(1, async |host| {
            let mut lost = 0;
            for seed in 0..20 {
                let (disk, element) = disk(&host, &format!("(size 4k) (seed {seed})")).await;
                disk.write(0, &[1; 512]).await.unwrap();
                disk.op(Op::Flush, 0, 0).await.unwrap();
                let mut write = under_way(&disk, &*element).await;
                let flush = disk.send(Request::flush());
                tokio::task::yield_now().await;
                assert!(write.try_recv().is_err(), "not answered before the flush is in");
                write.await.unwrap().unwrap();
                flush.await.unwrap().unwrap();
                element.call("lose_power", "").unwrap();
                let found = disk.read(0, 1).await.unwrap()[0];
                assert!(found == 1 || found == 2, "{found}: what was answered before the flush is there");
                lost += u32::from(found == 1);
            }
            assert!(lost > 3, "{lost} of 20");
        });
    }

    #[test]
    fn fua_covers_its_own_sectors_only() {
        run(1, async |host| {
            let mut lost = 0;
            for seed in 0..20 {
                let (disk, element) = disk(&host, &format!("(size 4k) (seed {seed})")).await;
                disk.write(0, &[1; 1024]).await.unwrap();
                let fua = Request::write(512, Data::copy_of(&[2; 512])).with(Flags::FUA);
                disk.submit(fua).await.unwrap();
                element.call("lose_power", "").unwrap();
                assert_eq!(disk.read(512, 512).await.unwrap(), [2; 512]);
                lost += u32::from(disk.read(0, 1).await.unwrap() == [0]);
            }
            assert!(lost > 3, "{lost} of 20");
        });
    }

    #[test]
    fn nothing_is_answered_without_power() {
        run(1, async |host| {
            let (disk, element) = disk(&host, "(size 4k)").await;
            disk.write(0, &[1; 512]).await.unwrap();
            disk.op(Op::Flush, 0, 0).await.unwrap();
            let write = under_way(&disk, &*element).await;
            element.call("cut", "").unwrap();
            assert_eq!(write.await.unwrap().unwrap_err().errno(), Errno::IO);
            for op in Op::ALL {
                let mut req = Request::new(op, 0, 512);
                if op == Op::Write {
                    req.data = Data::zeros(512);
                }
                assert_eq!(disk.submit(req).await.unwrap_err().errno(), Errno::IO, "{op}");
            }
            element.call("restore", "").unwrap();
            let found = disk.read(0, 512).await.unwrap();
            assert!(found == [1; 512] || found == [2; 512]);
        });
    }
}
