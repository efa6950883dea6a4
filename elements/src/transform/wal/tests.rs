//! Crashes at every moment, of power and of the process; full logs, failing disks, foreign logs.

use super::format::{SECTOR, Superblock};
use super::*;
use blockmason::describe::Catalogue;
use blockmason::testing::{TestDisk, graph, play_against_model, run};
use blockmason::{Connection, Graph, Host, Instance};
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::LazyLock;
use tokio::sync::oneshot;

thread_local! {
    /// The plugs that have been pulled.
    static PULLED: RefCell<HashSet<String>> = RefCell::default();
}

fn pull(names: &[&str]) {
    PULLED.with_borrow_mut(|pulled| pulled.extend(names.iter().map(|name| name.to_string())));
}

fn plug_in() {
    PULLED.take();
}

/// Lets nothing through once it has been pulled: what stands above it is dead to what lies below.
struct Plug(String);

impl Element for Plug {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if PULLED.with_borrow(|pulled| pulled.contains(&self.0)) {
            return cx.fail(&req, Error::new(Kind::Unavailable, "the plug has been pulled"));
        }
        cx.forward(0, req)
    }
}

static PLUG: ElementType = ElementType {
    name: "plug",
    family: Family::Fault,
    passes_through: true,
    build: |build| Ok(Arc::new(Plug(build.name.to_owned()))),
    ..ElementType::BASE
};

/// Sends a write twice, the second one first, though it depends on the first one.
struct Backwards;

impl Element for Backwards {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op != Op::Write {
            return cx.forward(0, req);
        }
        cx.later(&req.clone(), async move {
            let (mut first, mut second) = (cx.child(&req), cx.child(&req));
            second.offset += 4096;
            cx.add_dependency(&mut second, &mut first, Until::Durable)?;
            let second = cx.forward(0, second);
            let (second, first) = futures::future::join(second, cx.forward(0, first)).await;
            first.and(second)
        })
    }
}

static BACKWARDS: ElementType =
    ElementType { name: "backwards", build: |_| Ok(Arc::new(Backwards)), ..ElementType::BASE };

static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&PLUG, &BACKWARDS]).collect()));

/// A graph with two disks that can lose their power, and plugs above them.
fn text(seed: u64, format: bool) -> String {
    let format = if format { "(format yes)" } else { "" };
    let (delay, jitter) = [("0s", "0s"), ("1ms", "3ms")][seed as usize % 2];
    format!(
        "element W (type wal) {format} element P (type plug) element Q (type plug) \
         element D (type volatile) (size {SIZE}) (seed {seed}) \
         element L (type volatile) (size 73728) (seed {}) \
         element S (type delay) (write {delay}) (jitter {jitter}) \
         element T (type delay) (all {delay}) (jitter {jitter}) \
         (W, out) -> S S -> P P -> D (W, log) -> T T -> Q Q -> L",
        seed + 1000
    )
}

/// Not a multiple of a sector.
const SIZE: u64 = 40 * 512 + 100;

fn find(graph: &Graph, name: &str) -> Arc<Instance> {
    graph.instances().find(|instance| instance.name == name).unwrap().clone()
}

/// Serves a graph whose `W` is new and all else that of `before`.
fn reborn(host: &Arc<Host>, before: &Graph, text: &str) -> Arc<Graph> {
    let fresh = graph(host, *TYPES, text, "W").unwrap();
    let instances: Vec<_> = fresh
        .instances()
        .map(|instance| if instance.name == "W" { instance.clone() } else { find(before, &instance.name) })
        .collect();
    let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
    let edges = [
        ("W", "out", "S"),
        ("S", "out", "P"),
        ("P", "out", "D"),
        ("W", "log", "T"),
        ("T", "out", "Q"),
        ("Q", "out", "L"),
        ("Client", "out", "W"),
    ];
    let edges =
        edges.map(|(from, port, to)| Connection { from: place(from), port: port.into(), to: place(to) });
    Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap())
}

async fn settle(turns: usize) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

/// A change that a test has sent, and whether it has been answered.
struct Sent {
    range: Range<usize>,
    byte: u8,
    fua: bool,
    reply: oneshot::Receiver<Reply>,
    done: bool,
}

/// What a client knows: the disk when it came, and what it has sent since.
struct Client {
    disk: TestDisk,
    before: Vec<u8>,
    sent: Vec<Sent>,
    /// Flushes, each with how many changes it covers.
    flushes: Vec<(usize, oneshot::Receiver<Reply>)>,
    /// Changes that are there after any crash; after the death of this process.
    flushed: usize,
    answered: usize,
}

impl Client {
    fn new(disk: TestDisk, before: Vec<u8>) -> Client {
        Client { disk, before, sent: Vec::new(), flushes: Vec::new(), flushed: 0, answered: 0 }
    }

    /// Sends a change, and lets it take its place in the log: what arrives in one turn of the shard has
    /// no order.
    async fn change(&mut self, rng: &mut fastrand::Rng) {
        let start = rng.usize(0..SIZE as usize);
        let longest = [200, 1500, 8000][rng.usize(0..3)].min(SIZE as usize - start);
        let mut range = start..start + rng.usize(1..=longest);
        let byte = rng.u8(1..);
        let (req, byte) = match rng.u8(0..8) {
            0 => (Request::new(Op::WriteZeroes, range.start as u64, range.len() as u64), 0),
            1 => {
                // Only whole sectors are sure to be discarded.
                range = range.start / 512 * 512..(range.start / 512 * 512 + 1024).min(40 * 512);
                range.start = range.start.min(39 * 512);
                (Request::new(Op::Discard, range.start as u64, range.len() as u64), 0)
            }
            _ => (Request::write(range.start as u64, Data::copy_of(&vec![byte; range.len()])), byte),
        };
        let fua = rng.u8(0..10) == 0;
        let req = if fua { req.with(Flags::FUA) } else { req };
        let reply = self.disk.send(req);
        self.sent.push(Sent { range, byte, fua, reply, done: false });
        settle(2).await;
    }

    fn flush(&mut self) {
        self.look();
        self.flushes.push((self.answered, self.disk.send(Request::flush())));
    }

    /// Takes the replies that are here.
    fn look(&mut self) {
        for (ix, sent) in self.sent.iter_mut().enumerate().filter(|(_, sent)| !sent.done) {
            if let Ok(reply) = sent.reply.try_recv() {
                reply.unwrap();
                sent.done = true;
                self.answered = self.answered.max(ix + 1);
                if sent.fua {
                    self.flushed = self.flushed.max(ix + 1);
                }
            }
        }
        for (covers, reply) in &mut self.flushes {
            if let Ok(reply) = reply.try_recv() {
                reply.unwrap();
                self.flushed = self.flushed.max(*covers);
            }
        }
    }

    /// The disk after the first `count` changes.
    fn after(&self, count: usize) -> Vec<u8> {
        let mut bytes = self.before.clone();
        for sent in &self.sent[..count] {
            bytes[sent.range.clone()].fill(sent.byte);
        }
        bytes
    }

    /// Checks that `found` is what some prefix of the changes makes, and a long enough one.
    fn check(&self, found: &[u8], at_least: usize, place: &str) {
        let fits = (at_least..=self.sent.len()).any(|count| self.after(count) == found);
        if !fits {
            let short = (0..at_least).find(|count| self.after(*count) == found);
            let whole = self.after(self.sent.len());
            let wrong = (0..found.len()).filter(|ix| found[*ix] != whole[*ix]);
            let wrong: Vec<_> = wrong.map(|ix| (ix, found[ix], whole[ix], self.before[ix])).collect();
            let (first, last) = (wrong.first(), wrong.last());
            let sent: Vec<_> = self.sent.iter().map(|sent| (&sent.range, sent.byte, sent.done)).collect();
            panic!(
                "{place}: no prefix of at least {at_least}, but {short:?}: {first:?} to {last:?} ({}) is not as at \
                    the end: {sent:?}",
                wrong.len()
            );
        }
    }
}

/// Pulls the plugs, and if `power`, takes the power from both disks in the same moment.
fn crash(graph: &Graph, power: bool) {
    pull(&["P", "Q"]);
    if power {
        // Off until the next start: what is held on its way to a disk is not stopped by a plug above it.
        for name in ["D", "L"] {
            find(graph, name).element.call("cut", "").unwrap();
        }
    }
}

/// Serves the disks of `before` anew, when what was left above them is gone.
async fn restart(host: &Arc<Host>, before: &TestDisk, text: &str) -> TestDisk {
    let graph = before.disk.graph();
    // What it cannot flush any more it says, and that is right.
    let _ = before.disk.stop().await;
    plug_in();
    for name in ["D", "L"] {
        find(&graph, name).element.call("restore", "").unwrap();
    }
    let disk = TestDisk::serve(host, reborn(host, &graph, text)).await;
    // Its client is there before it can be stopped.
    settle(1).await;
    disk
}

/// What a crash takes away.
#[derive(Clone, Copy, Debug)]
enum Crash {
    Process,
    Power,
    /// Now the one, now the other.
    Either,
}

/// Lives of one disk that all end in a crash; returns how many crashes lost a change.
async fn lives(host: &Arc<Host>, seed: u64, what: Crash) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed);
    let text = text(seed, false);
    let disk = TestDisk::new(host, *TYPES, &text, "W").await.unwrap();
    let found = disk.read(0, SIZE).await.unwrap();
    let mut client = Client::new(disk, found);
    let mut missing = 0;
    for life in 0..3 {
        for _ in 0..rng.usize(1..40) {
            match rng.u8(0..8) {
                0 => client.flush(),
                1 if seed.is_multiple_of(2) => settle(rng.usize(0..30)).await,
                1 => blockmason::rt::sleep(Duration::from_micros(rng.u64(0..5000))).await,
                _ => client.change(&mut rng).await,
            }
        }
        let most = [1, 6, 60][rng.usize(0..3)];
        settle(rng.usize(0..most)).await;
        if seed % 2 == 1 {
            blockmason::rt::sleep(Duration::from_micros(rng.u64(0..100) * most as u64)).await;
        }
        client.look();
        let graph = client.disk.disk.graph();
        let is_power = |rng: &mut fastrand::Rng| match what {
            Crash::Process => false,
            Crash::Power => true,
            Crash::Either => rng.bool(),
        };
        let mut power = is_power(&mut rng);
        crash(&graph, power);
        let mut disk = restart(host, &client.disk, &text).await;
        // Sometimes it crashes again while it recovers.
        while rng.u8(0..3) == 0 {
            settle(rng.usize(0..50)).await;
            if seed % 2 == 1 {
                blockmason::rt::sleep(Duration::from_millis(rng.u64(0..50))).await;
            }
            let again = is_power(&mut rng);
            power |= again;
            crash(&disk.disk.graph(), again);
            disk = restart(host, &disk, &text).await;
        }
        let found = disk.read(0, SIZE).await.unwrap();
        let at_least = if power { client.flushed } else { client.answered };
        client.check(&found, at_least, &format!("seed {seed}, life {life}, {what:?}, power {power}"));
        missing += usize::from(found != client.after(client.sent.len()));
        client = Client::new(disk, found);
    }
    missing
}

#[test]
fn a_loss_of_power_leaves_a_prefix_that_reaches_to_the_last_flush() {
    let missing: usize =
        (0..300).map(|seed| run(seed, async |host| lives(&host, seed, Crash::Power).await)).sum();
    assert!(missing > 100, "only {missing} crashes lost anything: they test little");
}

#[test]
fn the_death_of_the_process_loses_nothing_that_was_answered() {
    let missing: usize =
        (0..300).map(|seed| run(seed, async |host| lives(&host, seed, Crash::Process).await)).sum();
    assert!(missing > 20, "only {missing} crashes lost anything: they test little");
}

#[test]
fn what_only_caches_hold_does_not_overtake_the_log() {
    let missing: usize =
        (0..300).map(|seed| run(seed, async |host| lives(&host, seed, Crash::Either).await)).sum();
    assert!(missing > 50, "only {missing} crashes lost anything: they test little");
}

#[test]
fn behaves_like_a_vector() {
    for seed in 0..12 {
        let sinks = [("mem", "mem"), ("volatile", "volatile"), ("mem", "volatile")][seed as usize % 3];
        run(seed, async |host| {
            let text = format!(
                "element W (type wal) element D (type {}) (size 100001) element L (type {}) (size 80k) \
                 (W, out) -> D (W, log) -> L",
                sinks.0, sinks.1
            );
            let disk = TestDisk::new(&host, *TYPES, &text, "W").await.unwrap();
            play_against_model(&disk, seed, 300).await;
        });
    }
}

const SLOW: &str = "element W (type wal) element T (type delay) (write 20ms) element D (type mem) (size 1M) \
                    element L (type mem) (size 80k) (W, out) -> T T -> D (W, log) -> L";

fn number(graph: &Graph, handler: &str) -> u64 {
    find(graph, "W").element.get(handler).unwrap().parse().unwrap()
}

#[test]
fn a_full_log_makes_changes_wait_and_no_longer() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, SLOW, "W").await.unwrap();
        let graph = disk.disk.graph();
        let replies: Vec<_> = (0..100u64)
            .map(|ix| disk.send(Request::write(ix * 4096, Data::copy_of(&[ix as u8; 4096]))))
            .collect();
        let mut most = 0;
        for reply in replies {
            reply.await.unwrap().unwrap();
            most = most.max(number(&graph, "used"));
        }
        assert!(most > 60 << 10 && most <= 72 << 10, "{most} bytes of the log were used");
        // Longer than the log, in several records.
        disk.write(5000, &[7; 200_000]).await.unwrap();
        assert_eq!(disk.read(4999, 200_002).await.unwrap()[1..200_001], [7; 200_000]);
        assert!(number(&graph, "sequence") > 110);
        while number(&graph, "pending") > 0 {
            host_sleep().await;
        }
        assert_eq!(disk.read(4999, 200_002).await.unwrap()[1..200_001], [7; 200_000]);
        find(&graph, "W").element.call("checkpoint", "").unwrap();
        host_sleep().await;
        assert_eq!(number(&graph, "used"), 0);
    });
}

/// Time stands still until everything waits.
async fn host_sleep() {
    blockmason::rt::sleep(Duration::from_millis(50)).await;
}

#[test]
fn reads_see_what_is_not_on_the_disk_yet() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, SLOW, "W").await.unwrap();
        disk.write(0, &[1; 2000]).await.unwrap();
        disk.write(1000, &[2; 2000]).await.unwrap();
        disk.op(Op::WriteZeroes, 500, 700).await.unwrap();
        let graph = disk.disk.graph();
        assert_eq!(number(&graph, "pending"), 3);
        let found = disk.read(0, 4000).await.unwrap();
        let expected: Vec<u8> = [(1, 500), (0, 700), (2, 1800), (0, 1000)]
            .into_iter()
            .flat_map(|(byte, count)| std::iter::repeat_n(byte, count))
            .collect();
        assert!(found == expected);
        assert_eq!(disk.read(600, 100).await.unwrap(), [0; 100], "by a single one");
        assert_eq!(number(&graph, "pending"), 3, "nobody has waited");
        let extents = disk.extents(0, 1 << 20).await.unwrap();
        assert!(!extents[0].state.zero && number(&graph, "pending") == 0, "extents wait: {extents:?}");
        assert!(disk.read(0, 4000).await.unwrap() == expected);
    });
}

#[test]
fn while_the_disk_fails_the_log_takes_changes_until_it_is_full() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, &text(1, false), "W").await.unwrap();
        let graph = disk.disk.graph();
        disk.write(0, &[1; 512]).await.unwrap();
        pull(&["P"]);
        for round in 0..4 {
            disk.write(512, &[round; 8000]).await.unwrap();
        }
        disk.op(Op::Flush, 0, 0).await.unwrap();
        assert_eq!(disk.read(512, 8000).await.unwrap(), [3; 8000], "from memory");
        let mut error = None;
        for _ in 0..8 {
            error = error.or(disk.write(512, &[9; 8000]).await.err());
        }
        assert_eq!(error.unwrap().kind(), Kind::Unavailable, "full at last");
        plug_in();
        disk.write(0, &[4; 512]).await.unwrap();
        blockmason::rt::sleep(2 * PATIENCE).await;
        assert_eq!(number(&graph, "pending"), 0, "tried again by itself");
        assert_eq!(disk.read(0, 513).await.unwrap()[..512], [4; 512]);
    });
}

#[test]
fn while_the_log_fails_changes_fail_and_then_go_on_behind() {
    for power in [false, true] {
        run(1, async |host| {
            let disk = TestDisk::new(&host, *TYPES, &text(1, false), "W").await.unwrap();
            disk.write(0, &[1; 512]).await.unwrap();
            pull(&["Q"]);
            let lost: Vec<_> =
                (0..5).map(|_| disk.send(Request::write(0, Data::copy_of(&[2; 512])))).collect();
            for lost in lost {
                assert!(lost.await.unwrap().is_err());
            }
            assert!(disk.op(Op::Flush, 0, 0).await.is_err());
            assert!(disk.write(0, &[3; 512]).await.is_err());
            assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
            plug_in();
            disk.write(512, &[5; 512]).await.unwrap();
            disk.op(Op::Flush, 0, 0).await.unwrap();
            crash(&disk.disk.graph(), power);
            let disk = restart(&host, &disk, &text(1, false)).await;
            let found = disk.read(0, 1024).await.unwrap();
            assert!(found[..512] == [1; 512] && found[512..] == [5; 512]);
        });
    }
}

#[test]
fn dependents_find_their_order_in_the_log() {
    run(1, async |host| {
        let text = text(1, false) + " element B (type backwards) B -> W";
        let disk = TestDisk::new(&host, *TYPES, &text, "B").await.unwrap();
        for byte in 1..5 {
            disk.write(0, &[byte; 512]).await.unwrap();
            let found = disk.read(0, 8192).await.unwrap();
            assert!(found[..512] == [byte; 512] && found[4096..4608] == [byte; 512]);
        }
    });
}

/// What a graph says to its first request.
async fn first_error(host: &Arc<Host>, text: &str) -> Error {
    let disk = TestDisk::new(host, *TYPES, text, "W").await.unwrap();
    let error = disk.read(0, 1).await.unwrap_err();
    assert_eq!(disk.write(0, b"x").await.unwrap_err().kind(), error.kind());
    assert!(disk.op(Op::Flush, 0, 0).await.is_err());
    error
}

#[test]
fn what_is_no_log_of_this_disk_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (log, disk) = (folder.path().join("log"), folder.path().join("disk"));
    let text = |size: u64, more: &str| {
        let (log, disk) = (log.display(), disk.display());
        format!(
            "element W (type wal) {more} element D (type file) (path {disk}{size}) (size {size}) \
             element L (type file) (path {log}) (size 80k) (W, out) -> D (W, log) -> L"
        )
    };
    run(1, async |host| {
        let mut foreign = vec![0; 80 << 10];
        foreign[70_000] = 1;
        std::fs::write(&log, &foreign).unwrap();
        let error = first_error(&host, &text(65536, "")).await;
        assert!(error.kind() == Kind::Invalid && error.to_string().contains("(format yes)"), "{error}");
        assert!(std::fs::read(&log).unwrap() == foreign);

        let disk = TestDisk::new(&host, *TYPES, &text(65536, "(format yes)"), "W").await.unwrap();
        disk.write(0, b"kept").await.unwrap();
        disk.disk.stop().await.unwrap();
        let disk = TestDisk::new(&host, *TYPES, &text(65536, "(format yes)"), "W").await.unwrap();
        assert_eq!(disk.read(0, 4).await.unwrap(), b"kept", "a log is not made anew");
        disk.disk.stop().await.unwrap();

        let error = first_error(&host, &text(131072, "")).await;
        assert!(
            error.to_string().contains("belongs to a disk of 65536 bytes, not to one of 131072"),
            "{error}"
        );

        let good = std::fs::read(&log).unwrap();
        std::fs::write(&log, &good[..75_000]).unwrap();
        let error = first_error(&host, &text(65536, "")).await;
        assert!(error.to_string().contains("the device below `log` only 75000"), "{error}");

        let mut other = good;
        for slot in [0, 4096] {
            other[slot + 12] = 2;
            other[slot + 8..slot + 12].fill(0);
            let sum = crc32fast::hash(&other[slot..slot + 96]);
            other[slot + 8..slot + 12].copy_from_slice(&sum.to_le_bytes());
        }
        std::fs::write(&log, &other).unwrap();
        let error = first_error(&host, &text(65536, "(format yes)")).await;
        assert!(error.kind() == Kind::Unsupported && error.to_string().contains("version 2"), "{error}");
        assert!(std::fs::read(&log).unwrap() == other);
    });
}

#[test]
fn one_damaged_superblock_is_not_missed() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text = format!(
        "element W (type wal) element D (type file) (path {}) (size 64k) element L (type file) (path {}) \
         (size 80k) (W, out) -> D (W, log) -> L",
        path("disk"),
        path("log")
    );
    run(1, async |host| {
        for round in 0..4u8 {
            let disk = TestDisk::new(&host, *TYPES, &text, "W").await.unwrap();
            let before = if round == 0 { [0; 512] } else { [round; 512] };
            assert_eq!(disk.read(0, 512).await.unwrap(), before);
            disk.write(0, &[round + 1; 512]).await.unwrap();
            disk.disk.stop().await.unwrap();
            // As a torn write of the next one would leave it; the older one counts.
            let mut bytes = std::fs::read(path("log")).unwrap();
            let slots = [0, 4096].map(|at| Superblock::decode(&bytes[at..at + SECTOR]));
            let [format::Slot::Valid(a), format::Slot::Valid(b)] = slots else { continue };
            let older = if a.generation < b.generation { 0 } else { 4096 };
            bytes[older + 20] ^= 1;
            std::fs::write(path("log"), bytes).unwrap();
        }
    });
}

#[test]
fn a_log_that_cannot_be_one_is_refused_when_the_graph_is_built() {
    run(1, async |host| {
        let text = |log: &str| {
            format!("element W (type wal) element D (type mem) (size 1M) {log} (W, out) -> D (W, log) -> L")
        };
        for (log, wanted) in [
            ("element L (type mem) (size 64k)", "no log fits"),
            ("element L (type readonly) element M (type mem) (size 1M) L -> M", "its log is read-only"),
        ] {
            let error = graph(&host, *TYPES, &text(log), "W").err().unwrap();
            assert!(error.to_string().contains(wanted) && error.element() == Some("W"), "{error}");
        }
    });
}

#[test]
fn a_log_takes_what_its_device_has_grown_by_and_promises_no_more_than_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.log");
    for (size, byte) in [(72u64 << 10, 1u8), (200 << 10, 2), (40 << 20, 3), (40 << 20, 4)] {
        std::fs::OpenOptions::new().create(true).append(true).open(&path).unwrap().set_len(size).unwrap();
        run(1, async |host| {
            let disk = folder.path().join("x.img");
            let text = format!(
                "element W (type wal) element D (type file) (path {}) (size 4M) element L (type file) (path {}) \
                 (W, out) -> D (W, log) -> L",
                disk.display(),
                path.display()
            );
            let disk = TestDisk::new(&host, *TYPES, &text, "W").await.unwrap();
            let graph = disk.disk.graph();
            let atomic = u64::from(graph.geometry(graph.node("W").unwrap()).atomic);
            assert_eq!(atomic, ((size - 8192) / 4 / 4096 * 4096 - 64).min(1 << 20));
            assert_eq!(disk.read(10_000, 1).await.unwrap(), [byte - 1]);
            let before: u64 = number(&graph, "sequence");
            disk.write(0, &vec![byte; atomic as usize]).await.unwrap();
            assert_eq!(number(&graph, "sequence"), before + 1, "one change");
            assert_eq!(disk.read(atomic - 1, 1).await.unwrap(), [byte]);
            disk.disk.stop().await.unwrap();
        });
    }
}

#[test]
fn zeros_are_fast_where_the_disk_does_them_fast() {
    run(1, async |host| {
        let text = "element W (type wal) element D (type null) (size 1M) element L (type mem) (size 1M) \
                    (W, out) -> D (W, log) -> L";
        let disk = TestDisk::new(&host, *TYPES, text, "W").await.unwrap();
        let fast = || Request::new(Op::WriteZeroes, 0, 512).with(Flags::FAST_ONLY);
        let geometry = disk.disk.graph().geometry(disk.disk.graph().node("D").unwrap());
        assert_eq!(disk.submit(fast()).await.is_ok(), geometry.ops.fast_zero);
    });
}

#[test]
fn a_graph_that_is_replaced_goes_on_with_the_same_log() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, *TYPES, &text(1, false), "W").await.unwrap();
        disk.write(0, &[1; 512]).await.unwrap();
        let before = disk.disk.graph();
        // A new instance, as if a parameter had changed, and then the same one under another graph.
        disk.disk.replace(reborn(&host, &before, &text(1, true)), &Default::default()).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [1; 512]);
        disk.write(0, &[2; 512]).await.unwrap();
        assert_eq!(number(&disk.disk.graph(), "sequence"), 3);
        let now = disk.disk.graph();
        let instances: Vec<_> = now.instances().cloned().collect();
        let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
        // The same instances without the plugs.
        let kept: Vec<_> = ["W", "D", "L", "Client"].map(|name| instances[place(name)].clone()).into();
        let edges = [(0, "out", 1), (0, "log", 2), (3, "out", 0)].map(|(from, port, to)| Connection {
            from,
            port: port.into(),
            to,
        });
        let next = Arc::new(Graph::assemble("test", &kept, &edges, host.shards()).unwrap());
        disk.disk.replace(next, &Default::default()).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [2; 512]);
        disk.write(0, &[3; 512]).await.unwrap();
        assert_eq!(disk.read(0, 512).await.unwrap(), [3; 512]);
        assert_eq!(number(&disk.disk.graph(), "sequence"), 4, "it has not been recovered again");
    });
}
