//! Sends every operation through every type of element, and compares with a model.
//!
//! Every type of the table has a row in [`FRAGMENTS`]: a small graph in which it is transparent. What it
//! breaks or refuses on purpose is tested beside its code.
#![allow(clippy::unwrap_used, reason = "tests panic")]

use blockmason::describe::{Catalogue, ElementType, Family, Ports};
use blockmason::testing::{TestDisk, play_against_model, run};
use blockmason::{
    Answer, Children, Cx, Data, Element, Extent, ExtentState, Flags, Flow, Geometry, Host, Op, Ops, Prepared,
    Request, Result,
};
use blockmason_elements::ALL;
use blockmason_elements::parallax::tool::{self, Operation, Settings};
use std::cell::RefCell;
use std::path::Path;
use std::sync::{Arc, LazyLock};

/// What a graph does with what is written.
#[derive(Clone, Copy, PartialEq)]
enum Nature {
    /// It is a disk.
    Disk,
    /// It reads as zeros.
    Forgets,
    /// It refuses to change.
    ReadOnly,
}

/// A type, and a graph with an element `X` of that type on top, or with one beside it where no request comes to. `{sink}` stands for a sink of 64k,
/// `{odd}` for one whose size divides by nothing, `{roomy}` for one with room for that and more, `{folder}`
/// for a folder of the test's own.
struct Fragment {
    ty: &'static str,
    graph: &'static str,
    nature: Nature,
}

const fn disk(ty: &'static str, graph: &'static str) -> Fragment {
    Fragment { ty, graph, nature: Nature::Disk }
}

/// What these types pass on are requests of trees, which are the disk.
const IN_PIECES: &str = "element X (type radix) (volume v) (size 76k) element I (type isolation) \
    element B (type block_store) element S (type mem) (size 40M) X -> I -> B -> S";

/// Sorted as the table is.
const FRAGMENTS: &[Fragment] = &[
    disk("file", "element X (type file) (path {folder}/disk.img) (size 70001)"),
    disk("mem", "element X (type mem) (size 70001)"),
    Fragment { ty: "null", graph: "element X (type null) (size 70001)", nature: Nature::Forgets },
    disk("volatile", "element X (type volatile) (size 70001)"),
    disk("copy", "element X {odd} element N {odd} element C (type copy) (C, from) -> X (C, to) -> N"),
    disk("debug_log", "element X (type debug_log) (logfile {folder}/log) element S {odd} X -> S"),
    disk("filter", "element X (type filter) element S {odd} X -> S"),
    disk(
        "if",
        "element X (type if) (test L) element L (type log_dirty) (written dirty) element S {odd} X -> L -> S",
    ),
    disk("linear", "element X (type linear) element A {odd} element B {sink} (X, a) -> A (X, b) -> B"),
    disk("log_dirty", "element X (type log_dirty) element S {odd} X -> S"),
    disk(
        "notify",
        "element X (type notify) (exec /bin/true) (latency 1h) (errors 1000000) element S {odd} X -> S",
    ),
    disk("on_error", "element X (type on_error) element S {odd} (X, only) -> S"),
    disk("prioritise", "element X (type prioritise) element S {odd} X -> S"),
    disk("probe", "element X (type probe) element S {odd} X -> S"),
    Fragment {
        ty: "readonly",
        graph: "element X (type readonly) element S {odd} X -> S",
        nature: Nature::ReadOnly,
    },
    disk("slice", "element X (type slice) (offset 1k) (length 50001) element S {odd} X -> S"),
    disk(
        "stripe",
        "element X (type stripe) (chunk 4k) element A {odd} element B {sink} (X, a) -> A (X, b) -> B",
    ),
    disk("tee", "element X (type tee) element S {odd} (X, only) -> S"),
    disk("throttle", "element X (type throttle) (rate 50M/s) (write_iops 5000) element S {odd} X -> S"),
    disk("blocksize", "element X (type blocksize) (block 4k) (gather 1ms) element S {odd} X -> S"),
    disk(
        "cache",
        "element X (type cache) (path {folder}/x.cache) (size 400k) (line 4k) (mode write_back) element S {odd} X -> S",
    ),
    disk(
        "checksum",
        "element X (type checksum) (block 512) (create yes) element S (type mem) (size 90k) X -> S",
    ),
    disk(
        "compress",
        "element X (type compress) (cluster 16k) (create yes) element S (type mem) (size 120k) X -> S",
    ),
    disk(
        "cow",
        "element X (type cow) (block 4k) element B {odd} element O {roomy} (X, base) -> B (X, overlay) -> O",
    ),
    disk(
        "crypto",
        "element X (type crypto) (key_file {folder}/vm1.key) (create yes) element S (type mem) (size 2209k) X -> S",
    ),
    disk(
        "wal",
        "element X (type wal) element S {odd} element L (type mem) (size 128k) (X, out) -> S (X, log) -> L",
    ),
    disk("block_store", IN_PIECES),
    disk("isolation", IN_PIECES),
    disk("parallax", "element X (type parallax) (pool {folder}/x.pool) (volume v)"),
    disk("radix", "element X (type radix) (volume v) (size 76k) element S (type mem) (size 40M) X -> S"),
    disk("workload_log", "element X (type workload_log) (log {folder}/workload) element S {odd} X -> S"),
    disk("delay", "element X (type delay) (all 1ms) (jitter 3ms) element S {odd} X -> S"),
    disk("error", "element X (type error) (probability 0%) element S {odd} X -> S"),
    disk("flip", "element X (type flip) (probability 0%) element S {odd} X -> S"),
    disk("log_writes", "element X (type log_writes) (log {folder}/log) element S {sink} X -> S"),
];

/// Types that keep changes and hand on what they make of them later, or elsewhere; flags and flushes end there; and one
/// whose requests have another length below. What reaches the disks below is tested beside their code.
const KEEPERS: &[&str] =
    &["cache", "checksum", "compress", "crypto", "wal", "block_store", "isolation", "radix"];

/// Types that need a server, on which time cannot be stopped, and the test that plays operations through
/// them against the same model.
const ELSEWHERE: &[(&str, &str)] = &[
    ("nbd_client", "tests/tests/nbd_client.rs"),
    ("s3", "elements/tests/buckets.rs"),
    ("meter", "elements/tests/buckets.rs"),
];

#[test]
fn what_is_tested_elsewhere_is_tested_there() {
    for (ty, file) in ELSEWHERE {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(ty) && text.contains("play_against_model"), "{file} does not test {ty}");
    }
}

/// The fragments of all types in the table but exports, which have tests with real clients.
fn fragments() -> impl Iterator<Item = &'static Fragment> {
    let elsewhere = |ty: &ElementType| ELSEWHERE.iter().any(|(name, _)| *name == ty.name);
    let types = ALL.iter().filter(move |ty| ty.family != Family::Export && !elsewhere(ty));
    types.map(|ty| {
        let found = FRAGMENTS.iter().find(|fragment| fragment.ty == ty.name);
        found.unwrap_or_else(|| panic!("{} has no row in FRAGMENTS: how is it sent operations?", ty.name))
    })
}

impl Fragment {
    fn text(&self, sink: &str, folder: &Path) -> String {
        self.graph
            .replace("{sink}", &format!("(type {sink}) (size 64k)"))
            .replace("{odd}", &format!("(type {sink}) (size 70001)"))
            .replace("{roomy}", &format!("(type {sink}) (size 100k)"))
            .replace("{folder}", &folder.display().to_string())
    }

    async fn serve(&self, host: &Arc<Host>, sink: &str, folder: &Path) -> TestDisk {
        let pool = folder.join("x.pool");
        if self.graph.contains("x.pool") && !pool.exists() {
            tool::create(&pool, Some(64 << 20)).unwrap();
            let made = Operation::CreateVolume {
                name: "v".to_owned(),
                size: 76 << 10,
                settings: Settings::default(),
            };
            tool::open(&pool).unwrap().carry_out(&made).unwrap();
        }
        if self.graph.contains("vm1.key") {
            std::fs::write(folder.join("vm1.key"), [7; 32]).unwrap();
        }
        let made = TestDisk::new(host, *WITH_RECORDER, &self.text(sink, folder), "X").await;
        made.unwrap_or_else(|error| panic!("{}: {error}", self.ty))
    }
}

thread_local! {
    /// What has arrived at the recorders of this test.
    static ARRIVED: RefCell<Vec<(Op, Flags, u64)>> = const { RefCell::new(Vec::new()) };
}

/// A sink that does everything, forgets it, and remembers what it was asked.
struct Recorder(u64);

impl Element for Recorder {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(self.0) }))
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        ARRIVED.with_borrow_mut(|arrived| arrived.push((req.op, req.flags, req.len)));
        match req.op {
            Op::Read => Flow::Now(Ok(Answer::Data(Data::zeros(req.len as usize)))),
            Op::Extents => {
                Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])))
            }
            Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Control => Flow::done(),
        }
    }
}

static RECORDER: ElementType = ElementType {
    name: "recorder",
    summary: "remembers what it was asked",
    family: Family::Sink,
    ports: Ports::SINK,
    build: |build| {
        let size = build.params.get("size").unwrap()[0].text();
        Ok(Arc::new(Recorder(size.parse::<blockmason::lang::value::Size>().unwrap().0)))
    },
    ..ElementType::BASE
};

static WITH_RECORDER: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(ALL.iter().copied().chain([&RECORDER]).collect()));

#[test]
fn every_element_is_the_disk_that_it_says() {
    for fragment in fragments().filter(|fragment| fragment.nature == Nature::Disk) {
        for seed in 0..5 {
            let folder = tempfile::tempdir().unwrap();
            // A failure names the type by the file of the test's output, hence the line.
            println!("{}, seed {seed}", fragment.ty);
            run(seed, async |host| {
                let disk = fragment.serve(&host, "mem", folder.path()).await;
                play_against_model(&disk, seed, 150).await;
            });
        }
    }
}

/// Ranges of a disk with an edge in each of them.
fn ranges(size: u64) -> Vec<(u64, u64)> {
    let mut ranges =
        vec![(0, size), (0, 0), (size, 0), (size - 1, 1), (size, 1), (0, size + 1), (u64::MAX, 2)];
    for (offset, len) in [(0, 4096), (4096, 8192), (1, 1), (1, 511), (511, 2), (513, 1000), (4095, 4098)] {
        ranges.push((offset, len));
        ranges.push((size - offset - len, len));
    }
    ranges
}

fn request(op: Op, offset: u64, len: u64, flags: Flags) -> Request {
    let mut req = Request::new(op, offset, len).with(flags);
    if op == Op::Write {
        req.data = Data::zeros(len as usize);
    }
    req
}

/// What is wrong with a reply, if anything.
fn fault(req: &Request, nature: Nature, size: u64, reply: blockmason::Reply) -> Option<String> {
    let inside = req.op == Op::Flush || req.offset.checked_add(req.len).is_some_and(|end| end <= size);
    let refused = nature == Nature::ReadOnly && req.op.changes_data();
    match (reply, req.op) {
        (_, Op::Control) => None,
        (Ok(_), _) if !inside || refused => Some("it was not refused".to_owned()),
        (Err(_), _) if !inside || refused || req.len == 0 => None,
        (Err(_), Op::WriteZeroes) if req.flags.has(Flags::FAST_ONLY) => None,
        (Err(error), _) => Some(error.to_string()),
        (Ok(Answer::Data(data)), Op::Read) => {
            (data.len() as u64 != req.len).then(|| format!("{} bytes were read", data.len()))
        }
        (Ok(Answer::Extents(extents)), Op::Extents) => {
            let bad = extents.is_empty() || extents.iter().any(|extent| extent.len == 0);
            (bad && req.len > 0).then(|| format!("{extents:?}"))
        }
        (Ok(Answer::Done), Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache) => None,
        (Ok(answer), _) => Some(format!("answered with {answer:?}")),
    }
}

#[test]
fn every_operation_is_answered_wherever_it_points() {
    let flags = [Flags::NONE, Flags::FUA, Flags::MAY_UNMAP, Flags::FAST_ONLY, Flags::ONE];
    for fragment in fragments() {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let disk = fragment.serve(&host, "mem", folder.path()).await;
            let size = disk.size();
            for op in Op::ALL {
                for (offset, len) in ranges(size) {
                    for flags in flags {
                        let req = request(op, offset, len, flags);
                        let reply = disk.submit(req.clone()).await;
                        if let Some(fault) = fault(&req, fragment.nature, size, reply) {
                            panic!("{}: {op} {flags:?} {offset}+{len} of {size}: {fault}", fragment.ty);
                        }
                    }
                }
            }
            assert!(!disk.disk.graph().is_failed(), "{} has panicked", fragment.ty);
        });
    }
}

#[test]
fn requests_arrive_below_with_their_flags() {
    let cases = [
        (Op::Read, Flags::NONE),
        (Op::Write, Flags::NONE),
        (Op::Write, Flags::FUA),
        (Op::Discard, Flags::FUA),
        (Op::WriteZeroes, Flags::FUA.with(Flags::MAY_UNMAP)),
        (Op::WriteZeroes, Flags::FAST_ONLY),
        (Op::Cache, Flags::NONE),
        (Op::Extents, Flags::ONE),
    ];
    let comes = |fragment: &Fragment| ALL.iter().any(|ty| ty.name == fragment.ty && ty.ports.input);
    let through = |fragment: &&Fragment| {
        comes(fragment) && fragment.graph.contains("->") && !KEEPERS.contains(&fragment.ty)
    };
    for fragment in fragments().filter(through) {
        let folder = tempfile::tempdir().unwrap();
        run(1, async |host| {
            let disk = fragment.serve(&host, "recorder", folder.path()).await;
            // What the first change of a place entails is behind it.
            let _ = disk.submit(request(Op::Write, 8192, 4096, Flags::NONE)).await;
            disk.op(Op::Flush, 0, 0).await.unwrap();
            for (op, flags) in cases {
                ARRIVED.take();
                let reply = disk.submit(request(op, 8192, 4096, flags)).await;
                let arrived = ARRIVED.take();
                if fragment.nature == Nature::ReadOnly && op.changes_data() {
                    assert!(reply.is_err() && arrived.is_empty(), "{}: {op}: {arrived:?}", fragment.ty);
                    continue;
                }
                let same = arrived.iter().filter(|(found, with, _)| *found == op && *with == flags);
                let bytes: u64 = same.map(|(_, _, len)| len).sum();
                let place = format!("{}: {op} {flags:?}: {arrived:?}", fragment.ty);
                assert!(reply.is_ok() && bytes == 4096, "{place}");
            }
            ARRIVED.take();
            disk.op(Op::Flush, 0, 0).await.unwrap();
            let below = ARRIVED.take();
            let sinks = ["{odd}", "{sink}", "{roomy}"].iter();
            let sinks: usize = sinks.map(|sink| fragment.graph.matches(sink).count()).sum();
            let flushes = below.iter().filter(|(op, ..)| *op == Op::Flush).count();
            assert_eq!(flushes, sinks, "{}: a flush reaches every sink: {below:?}", fragment.ty);
        });
    }
}
