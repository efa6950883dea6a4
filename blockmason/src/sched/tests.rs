//! Epochs, gates, panics, detached work, and the fitting of requests, with interleavings forced by hand.

mod conflicts;
mod ranges;

use crate::describe::{Build, ElementType, Family, Outs, Ports, Survives};
use crate::element::{Children, Demand, Element, Flow, LocalBoxFuture, Prepared};
use crate::error::{Error, Kind, Result};
use crate::geometry::{Geometry, Ops};
use crate::graph::Graph;
use crate::request::{Answer, Extent, ExtentState, Op, Request};
use crate::sched::{Cx, Disk};
use crate::testing::{TestDisk, graph, play_against_model, run};
use crate::{Data, Flags};
use futures::FutureExt;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use tokio::sync::oneshot;

const BASE: ElementType = ElementType {
    family: Family::Sink,
    ports: Ports::SINK,
    survives: Survives::Nothing,
    ..ElementType::BASE
};

const THROUGH: ElementType = ElementType { ports: Ports::THROUGH, passes_through: true, ..BASE };

static ALL: &[&ElementType] = &[&PARK, &HOP, &PANIC, &BLOCKS, &BEHIND, &ASKS, &HALVES];
static PARK: ElementType = ElementType {
    name: "park",
    build: |build: &Build<'_>| Ok(Arc::new(Park(build.name.to_owned()))),
    ..BASE
};
static HOP: ElementType = ElementType { name: "hop", build: |_| Ok(Arc::new(Hop)), ..THROUGH };
static PANIC: ElementType = ElementType { name: "panic", build: |_| Ok(Arc::new(Panic)), ..THROUGH };
static BLOCKS: ElementType =
    ElementType { name: "blocks", build: |_| Ok(Arc::new(Blocks::default())), ..BASE };
static BEHIND: ElementType =
    ElementType { name: "behind", ports: Ports::THROUGH, build: |_| Ok(Arc::new(Behind)), ..BASE };

static ASKS: ElementType = ElementType { name: "asks", build: |_| Ok(Arc::new(Asks)), ..THROUGH };
static HALVES: ElementType = ElementType {
    name: "halves",
    ports: Ports { input: true, out: Outs::Named(&["low", "high"]) },
    build: |_| Ok(Arc::new(Halves)),
    ..BASE
};

thread_local! {
    /// What lets each parked request go, by element.
    static PARKED: RefCell<HashMap<String, Vec<oneshot::Sender<()>>>> = RefCell::default();
}

fn parked(element: &str) -> usize {
    PARKED.with_borrow(|all| all.get(element).map_or(0, Vec::len))
}

fn release(element: &str) {
    let go = PARKED.with_borrow_mut(|all| all.get_mut(element).unwrap().remove(0));
    go.send(()).unwrap();
}

/// Parks every request until the test lets it go. Answers reads with its name.
struct Park(String);

impl Element for Park {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(1 << 20) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (go, wait) = oneshot::channel();
        PARKED.with_borrow_mut(|all| all.entry(self.0.clone()).or_default().push(go));
        cx.later(&req.clone(), async move {
            wait.await.map_err(|_| Error::internal("dropped"))?;
            match req.op {
                Op::Read => Ok(Answer::Data(Data::copy_of(&self.0.as_bytes()[..1]))),
                _ => Ok(Answer::Done),
            }
        })
    }
}

struct Hop;

impl Element for Hop {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

/// Panics at writes at once, at discards once they have come back.
struct Panic;

impl Element for Panic {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!(req.op != Op::Write, "of a test");
        if req.op == Op::Discard {
            return Flow::later(async move {
                let _ = cx.forward(0, req).await;
                panic!("of a test");
            });
        }
        cx.forward(0, req)
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        let body: LocalBoxFuture<'a, ()> = Box::pin(async move { assert!(cx.outs() == 9, "of a test") });
        (cx.name() == "Run").then_some(body)
    }
}

/// Answers writes at once and writes them down behind the client's back.
struct Behind;

impl Element for Behind {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op != Op::Write {
            return cx.forward(0, req);
        }
        drop(cx.detach(0, cx.child(&req)));
        Flow::done()
    }
}

/// Asks for larger and shorter requests than what lies below, and passes on what it is given.
struct Asks;

impl Element for Asks {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let geometry = children.single()?.above();
        Ok(Prepared::of(geometry).asking(Demand { min_block: 1024, max_len: 1024 }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

/// Two ways to one disk, each with a half of the addresses.
struct Halves;

impl Element for Halves {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.ports[0].1.above();
        Ok(Prepared::of(Geometry { size: 2 * below.size, ..below }))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let half = cx.geometry().size / 2;
        let high = req.op.has_range() && req.offset >= half;
        req.offset -= if high { half } else { 0 };
        cx.forward(usize::from(high), req)
    }
}

/// Takes whole blocks of 512 bytes, four at the most, and checks that.
#[derive(Default)]
struct Blocks(Mutex<Vec<u8>>);

const BLOCKS_SIZE: usize = 20 * 512;

impl Element for Blocks {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        self.0.lock().unwrap().resize(BLOCKS_SIZE, 0);
        let ops = Ops { extents: true, write_zeroes: true, discard: true, ..Ops::NONE };
        Ok(Prepared::of(Geometry { min_block: 512, max_len: 2048, ops, ..Geometry::new(BLOCKS_SIZE as u64) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!((req.offset | req.len).is_multiple_of(512) && req.len <= 2048, "{req:?}");
        let range = req.offset as usize..req.end() as usize;
        match req.op {
            Op::Read => Flow::later(async move {
                cx.sleep(std::time::Duration::from_millis(1)).await;
                Ok(Answer::Data(Data::copy_of(&self.0.lock().unwrap()[range])))
            }),
            Op::Write => Flow::later(async move {
                cx.sleep(std::time::Duration::from_millis(1)).await;
                req.data.copy_to(&mut self.0.lock().unwrap()[range]);
                Ok(Answer::Done)
            }),
            Op::WriteZeroes | Op::Discard => {
                self.0.lock().unwrap()[range].fill(0);
                Flow::done()
            }
            Op::Extents => {
                Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }])))
            }
            Op::Flush => Flow::done(),
            Op::Cache => cx.fail(&req, Error::internal("a hint that nobody wants was handed down")),
            Op::Control => cx.fail(&req, Error::unsupported("none")),
        }
    }
}

/// New requests enter `next` from now on, whatever lies between the two graphs.
async fn swap(disk: &Disk, next: Arc<Graph>) -> Result<Arc<Graph>> {
    let before = disk.graph();
    disk.set_graph(next.clone());
    disk.admit_into(Some(next)).await?;
    Ok(before)
}

/// Lets everything that can go on go on.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn requests_end_in_the_graph_they_entered() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        let first = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!(parked("A"), 1);

        let next = graph(&host, ALL, "element H (type hop) element B (type park) H -> B", "H").unwrap();
        let before = swap(&disk.disk, next).await.unwrap();
        let second = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!((parked("A"), parked("B")), (1, 1), "the new one does not wait for the old one");

        release("B");
        assert_eq!(second.await.unwrap().unwrap().into_data().unwrap().to_vec(), b"B");
        assert!(Arc::strong_count(&before) > 1, "a request is in flight in the old graph");
        release("A");
        assert_eq!(first.await.unwrap().unwrap().into_data().unwrap().to_vec(), b"A");
        settle().await;
        assert_eq!(Arc::strong_count(&before), 1, "nothing holds the old graph any more");
    });
}

#[test]
fn an_idle_stream_lets_an_old_graph_go_at_once() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        settle().await;
        let next = graph(&host, ALL, "element B (type park)", "B").unwrap();
        let before = swap(&disk.disk, next).await.unwrap();
        settle().await;
        assert_eq!(Arc::strong_count(&before), 1);
    });
}

#[test]
fn three_epochs_at_once_answer_to_one_stream() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        let mut replies = vec![disk.send(Request::read(0, 1))];
        for name in ["B", "C"] {
            settle().await;
            let next = graph(&host, ALL, &format!("element {name} (type park)"), name).unwrap();
            swap(&disk.disk, next).await.unwrap();
            replies.push(disk.send(Request::read(0, 1)));
        }
        settle().await;
        // The middle one first, then the newest, then the oldest.
        for (ix, name) in [(1, "B"), (2, "C"), (0, "A")] {
            release(name);
            let reply = (&mut replies[ix]).await.unwrap().unwrap();
            assert_eq!(reply.into_data().unwrap().to_vec(), name.as_bytes());
        }
    });
}

#[test]
fn a_closed_gate_admits_nothing_and_lets_everything_end() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        let inside = disk.send(Request::read(0, 1));
        settle().await;
        disk.disk.admit_into(None).await.unwrap();
        let mut outside = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!(parked("A"), 1, "the second one waits outside");
        release("A");
        inside.await.unwrap().unwrap();
        assert!(outside.try_recv().is_err());
        disk.disk.admit_into(Some(disk.disk.graph())).await.unwrap();
        settle().await;
        release("A");
        outside.await.unwrap().unwrap();
    });
}

#[test]
fn closing_answers_what_is_in_flight() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        let inside = disk.send(Request::read(0, 1));
        settle().await;
        let closing = tokio::task::spawn_local({
            let disk = disk.disk.clone();
            async move { disk.end_streams().await }
        });
        settle().await;
        let mut late = disk.send(Request::read(0, 1));
        settle().await;
        release("A");
        inside.await.unwrap().unwrap();
        closing.await.unwrap().unwrap();
        settle().await;
        assert!(late.try_recv().is_err(), "nothing is admitted any more");
    });
}

const WITH_PANIC: &str = "element P (type panic) element A (type park) P -> A";

#[test]
fn a_panic_fails_its_graph_and_no_other() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, WITH_PANIC, "P").await.unwrap();
        let other = TestDisk::new(&host, ALL, "element B (type park)", "B").await.unwrap();
        let in_flight = disk.send(Request::read(0, 1));
        settle().await;
        let error = disk.write(0, b"x").await.unwrap_err();
        assert_eq!((error.kind(), error.errno()), (Kind::Internal, crate::Errno::IO));
        assert!(in_flight.await.unwrap().is_err(), "nobody knows who would ever wake it");
        assert!(disk.read(0, 1).await.is_err(), "the graph answers errors from now on");
        let events = host.events().follow(100).take(100).events;
        let kinds: Vec<_> = events.iter().map(|event| event.kind.name()).collect();
        assert_eq!(
            kinds,
            ["failed", "error", "error", "error"],
            "it is said once, and what each request got"
        );
        let reply = other.send(Request::read(0, 1));
        settle().await;
        release("B");
        reply.await.unwrap().unwrap();
        // A new graph serves again.
        swap(&disk.disk, graph(&host, ALL, "element C (type park)", "C").unwrap()).await.unwrap();
        let reply = disk.send(Request::read(0, 1));
        settle().await;
        release("C");
        reply.await.unwrap().unwrap();
    });
}

#[test]
fn a_panic_in_a_parked_flow_and_in_run_are_contained_too() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, WITH_PANIC, "P").await.unwrap();
        let reply = disk.send(Request::new(Op::Discard, 0, 1));
        settle().await;
        release("A");
        assert_eq!(reply.await.unwrap().unwrap_err().kind(), Kind::Internal);
        assert!(disk.disk.graph().is_failed());

        let run = "element Run (type panic) element A (type park) Run -> A";
        let disk = TestDisk::new(&host, ALL, run, "Run").await.unwrap();
        settle().await;
        assert!(disk.disk.graph().is_failed());
    });
}

#[test]
fn detached_work_outlives_its_request_and_holds_its_graph() {
    run(1, async |host| {
        let text = "element W (type behind) element A (type park) W -> A";
        let disk = TestDisk::new(&host, ALL, text, "W").await.unwrap();
        disk.write(0, b"x").await.unwrap();
        settle().await;
        assert_eq!(parked("A"), 1, "answered, and still on its way");
        let next = graph(&host, ALL, "element B (type park)", "B").unwrap();
        let before = swap(&disk.disk, next).await.unwrap();
        settle().await;
        assert!(Arc::strong_count(&before) > 1);
        release("A");
        before.drained().await;
    });
}

#[test]
fn a_request_of_the_frameworks_own_is_answered_when_what_it_detached_has_ended() {
    run(1, async |host| {
        let text = "element W (type behind) element A (type park) W -> A";
        let graph = graph(&host, ALL, text, "W").unwrap();
        let client = graph.node("Client").unwrap();
        let mut reply = Box::pin(host.submit(&graph, client, 0, Request::write(0, Data::copy_of(b"x"))));
        assert!((&mut reply).now_or_never().is_none());
        settle().await;
        assert!((&mut reply).now_or_never().is_none());
        release("A");
        reply.await.unwrap();
    });
}

#[test]
fn any_request_fits_an_element_of_whole_blocks() {
    for seed in 0..30 {
        run(seed, async |host| {
            let text = "element H (type hop) element B (type blocks) H -> B";
            let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
            play_against_model(&disk, seed, 200).await;
        });
    }
}

#[test]
fn neighbours_in_one_block_do_not_lose_each_others_writes() {
    run(7, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        // All at once: each reads, modifies and writes the same block, one of them whole.
        let whole = disk.send(Request::write(512, Data::copy_of(&[9; 512])));
        let parts: Vec<_> =
            (0..64).map(|ix| disk.send(Request::write(512 + ix, Data::copy_of(&[ix as u8])))).collect();
        whole.await.unwrap().unwrap();
        for part in parts {
            part.await.unwrap().unwrap();
        }
        let block = disk.read(512, 512).await.unwrap();
        let expected: Vec<u8> = (0..64).chain(std::iter::repeat_n(9, 448)).collect();
        assert!(block == expected, "{block:?}");
    });
}

#[test]
fn any_request_fits_what_an_element_asks_of_its_own() {
    for seed in 0..10 {
        run(seed, async |host| {
            let text = "element A (type asks) element B (type blocks) A -> B";
            let disk = TestDisk::new(&host, ALL, text, "A").await.unwrap();
            play_against_model(&disk, seed, 200).await;
        });
    }
}

/// One of the ways reads, modifies and writes; whoever comes by the other one waits for that.
#[test]
fn neighbours_by_another_way_do_not_lose_their_writes() {
    for seed in 0..20 {
        run(seed, async |host| {
            let text = "element H (type halves) element A (type asks) element B (type blocks) (H, low) -> A -> B (H, high) -> B";
            let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut order: Vec<u64> = (0..16).collect();
            rng.shuffle(&mut order);
            let write = |ix: &u64| {
                // Whole blocks of the disk: the other way has nothing to complete.
                let past = if ix % 2 == 1 { BLOCKS_SIZE as u64 } else { 0 };
                disk.send(Request::write(past + ix * 512, Data::copy_of(&[*ix as u8 + 1; 512])))
            };
            let sent: Vec<_> = order.iter().map(write).collect();
            for reply in sent {
                reply.await.unwrap().unwrap();
            }
            let expected: Vec<u8> = (1..=16).flat_map(|ix| [ix; 512]).collect();
            assert!(disk.read(0, 16 * 512).await.unwrap() == expected, "seed {seed}");
        });
    }
}

#[test]
fn fast_zeroes_are_refused_where_they_would_not_be_fast() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        let fast = Request::new(Op::WriteZeroes, 0, 512).with(Flags::FAST_ONLY);
        assert_eq!(disk.submit(fast).await.unwrap_err().kind(), Kind::Unsupported);
    });
}

#[test]
fn what_lies_outside_is_refused_before_any_element_sees_it() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element A (type park)", "A").await.unwrap();
        for (req, kind) in [
            (Request::read(1 << 20, 1), Kind::Invalid),
            (Request::read(u64::MAX, 2), Kind::Invalid),
            (Request::write((1 << 20) - 1, Data::zeros(2)), Kind::NoSpace),
        ] {
            assert_eq!(disk.submit(req).await.unwrap_err().kind(), kind);
        }
        assert_eq!(parked("A"), 0);
    });
}

#[test]
fn sampled_requests_leave_their_hops_behind() {
    run(1, async |host| {
        let text = "element H (type hop) element B (type blocks) H -> B";
        let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
        for _ in 0..1024 {
            disk.op(Op::Flush, 0, 0).await.unwrap();
        }
        let hops = host.recorded().await.unwrap();
        let names: Vec<_> = hops.iter().map(|hop| (hop.way.to_string(), hop.op)).collect();
        let wanted = ["H -> B", "Client -> H", "Client"].map(|way| (way.to_owned(), Op::Flush));
        assert_eq!(names, wanted);
        let edges = disk.disk.graph().read_edges();
        assert!(edges.iter().all(|edge| edge.requests == 1024), "{edges:?}");
        let graph = disk.disk.graph();
        let source = graph.read_source(graph.node("Client").unwrap());
        assert_eq!(source.ops[Op::Flush as usize].requests, 1024);
    });
}
