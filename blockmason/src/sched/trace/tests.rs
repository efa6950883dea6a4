//! What is recorded of requests, and that recording changes nothing.

use super::*;
use crate::describe::{Build, ElementType, Family, Outs, Ports, Survives};
use crate::element::{Children, Element, Prepared};
use crate::geometry::{Geometry, Ops};
use crate::request::{Answer, Op};
use crate::sched::Part;
use crate::testing::{CLIENT, TestDisk, live, play_against_model, run};
use crate::{Data, Flags, Origin};
use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

const BASE: ElementType =
    ElementType { family: Family::Route, survives: Survives::Nothing, ..ElementType::BASE };

static ALL: &[&ElementType] = &[
    &CLIENT,
    &ElementType { name: "hop", build: |_: &Build<'_>| Ok(Arc::new(Through::Hop)), ..BASE },
    &ElementType { name: "behind", build: |_| Ok(Arc::new(Through::Behind)), ..BASE },
    &ElementType { name: "panic", build: |_| Ok(Arc::new(Through::Panic)), ..BASE },
    &ElementType {
        name: "halves",
        ports: Ports { input: true, out: Outs::Variadic { min: 2 } },
        build: |_| Ok(Arc::new(Halves)),
        ..BASE
    },
    &ElementType { name: "blocks", ports: Ports::SINK, build: |_| Ok(Arc::new(Blocks::default())), ..BASE },
];

enum Through {
    Hop,
    /// Answers writes at once and writes them down behind the client's back.
    Behind,
    /// Panics at zeros once they have come back.
    Panic,
}

impl Element for Through {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match self {
            Through::Behind if req.op == Op::Write => {
                drop(cx.detach(0, cx.child(&req)));
                Flow::done()
            }
            Through::Panic if req.op == Op::WriteZeroes => Flow::later(async move {
                let _ = cx.forward(0, req).await;
                panic!("of a test");
            }),
            Through::Hop | Through::Behind | Through::Panic => cx.forward(0, req),
        }
    }
}

const HALF: u64 = 4096;

/// The first half is on the first child, the second on the second.
struct Halves;

impl Element for Halves {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(children.united(2 * HALF)))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !req.op.has_range() {
            return cx.broadcast(req);
        }
        let middle = HALF.clamp(req.offset, req.end());
        let mut parts = Vec::new();
        if req.offset < middle {
            parts.push(Part::new(0, req.offset, middle - req.offset, 0));
        }
        if middle < req.end() {
            parts.push(Part::new(1, middle - HALF, req.end() - middle, middle - req.offset));
        }
        cx.scatter(&req, parts)
    }
}

/// Takes whole blocks of 512 bytes, four at the most, a millisecond each.
#[derive(Default)]
struct Blocks(Mutex<Vec<u8>>);

impl Element for Blocks {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        self.0.lock().unwrap().resize(HALF as usize, 0);
        let ops = Ops { write_zeroes: true, ..Ops::NONE };
        Ok(Prepared::of(Geometry { min_block: 512, max_len: 2048, ops, ..Geometry::new(HALF) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!((req.offset | req.len).is_multiple_of(512) && req.len <= 2048, "{req:?}");
        cx.later(&req.clone(), async move {
            cx.sleep(Duration::from_millis(1)).await;
            let range = req.offset as usize..req.end() as usize;
            let mut bytes = self.0.lock().unwrap();
            match req.op {
                Op::Read => return Ok(Answer::Data(Data::copy_of(&bytes[range]))),
                Op::Write => req.data.copy_to(&mut bytes[range]),
                Op::WriteZeroes => bytes[range].fill(0),
                Op::Flush => {}
                _ => return Err(Error::unsupported("none of a test")),
            }
            Ok(Answer::Done)
        })
    }
}

/// The hops that are there, each before those below it, indented.
fn tree(hops: &[Hop]) -> Vec<String> {
    fn below(hops: &[Hop], parent: Option<u64>, depth: usize, out: &mut Vec<String>) {
        let mut mine: Vec<_> = hops.iter().filter(|hop| hop.parent == parent).collect();
        mine.sort_by_key(|hop| hop.number);
        for hop in mine {
            let Hop { way, op, len, offset, .. } = hop;
            out.push(format!("{}{way}: {op} {len} at {offset}", "  ".repeat(depth)));
            below(hops, Some(hop.number), depth + 1, out);
        }
    }
    let mut out = Vec::new();
    below(hops, None, 0, &mut out);
    assert_eq!(out.len(), hops.len(), "every hop has its place: {hops:#?}");
    out
}

async fn take(tracer: &mut Tracer, count: usize) -> Vec<Hop> {
    let mut hops = Vec::new();
    while hops.len() < count {
        let next = crate::rt::timeout(Duration::from_secs(1), tracer.next()).await;
        hops.push(next.unwrap_or_else(|| panic!("no more than {hops:#?}")).unwrap());
    }
    assert!(tracer.hops.try_recv().is_err(), "no hop more");
    hops
}

async fn settle() {
    for _ in 0..30 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_is_made_of_a_request_is_below_it() {
    run(1, async |host| {
        let text = "element H (type hop) element S (type halves) element A (type blocks) \
                    element B (type blocks) H -> S (S, a) -> A (S, b) -> B";
        let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
        let mut tracer = disk.disk.trace(1).await.unwrap();
        let write = Request::write(1000, Data::zeros(5000)).with(Flags::FUA);
        disk.submit(write).await.unwrap();
        let hops = take(&mut tracer, 10).await;
        let wanted = [
            "Client: write 5000 at 1000",
            "  Client -> H: write 5000 at 1000",
            "    H -> S: write 5000 at 1000",
            "      (S, a) -> A: write 3096 at 1000",
            "        (S, a) -> A: read 512 at 512",
            "        (S, a) -> A: write 2048 at 512",
            "        (S, a) -> A: write 1536 at 2560",
            "      (S, b) -> B: write 1904 at 0",
            "        (S, b) -> B: read 512 at 1536",
            "        (S, b) -> B: write 2048 at 0",
        ];
        assert_eq!(tree(&hops), wanted);
        assert!(hops.iter().all(|hop| hop.root == hops[0].root && hop.error.is_none()));
        let root = hops.last().unwrap();
        assert_eq!((root.parent, root.request, root.flags), (None, root.root, Flags::FUA));
        assert_eq!(root.took, Duration::from_millis(2), "a read, then writes side by side");
        let read = hops.iter().find(|hop| hop.op == Op::Read).unwrap();
        assert_eq!((read.origin, read.flags), (Origin::Internal, Flags::NONE));
        let edges = disk.disk.graph().read_edges();
        let to_s = edges.iter().find(|edge| edge.to == "S").unwrap();
        assert_eq!((to_s.requests, to_s.sampled, to_s.sampled_ns), (1, 1, 2_000_000));
    });
}

#[test]
fn a_request_that_outlives_its_parent_is_recorded_too() {
    run(1, async |host| {
        let text = "element W (type behind) element B (type blocks) W -> B";
        let disk = TestDisk::new(&host, ALL, text, "W").await.unwrap();
        let mut tracer = disk.disk.trace(1).await.unwrap();
        disk.write(0, &[7; 512]).await.unwrap();
        let hops = take(&mut tracer, 3).await;
        assert_eq!(
            tree(&hops),
            ["Client: write 512 at 0", "  Client -> W: write 512 at 0", "    W -> B: write 512 at 0"]
        );
        assert_eq!(hops[2].way.to, "B", "the last to end");
    });
}

#[test]
fn what_is_refused_and_what_panics_leaves_its_hops() {
    run(1, async |host| {
        let text = "element P (type panic) element B (type blocks) P -> B";
        let disk = TestDisk::new(&host, ALL, text, "P").await.unwrap();
        let mut tracer = disk.disk.trace(1).await.unwrap();
        disk.read(HALF, 1).await.unwrap_err();
        let refused = take(&mut tracer, 1).await;
        assert!(refused[0].error.as_ref().unwrap().contains("past the end"), "{refused:?}");
        disk.op(Op::WriteZeroes, 0, 512).await.unwrap_err();
        let hops = take(&mut tracer, 4).await;
        let errors: HashMap<_, _> =
            hops.iter().map(|hop| (hop.way.to_string(), hop.error.as_deref())).collect();
        assert_eq!(errors["P -> B"], None);
        assert_eq!(errors["Client -> P"], Some("dropped without a reply"));
        assert_eq!(errors["Client"], Some("dropped without a reply"));
        assert_eq!(host.recorded().await.unwrap().len(), 5, "the flight recorder has the same");
        // A flush of a failed graph is refused.
        disk.op(Op::Flush, 0, 0).await.unwrap_err();
        assert_eq!(take(&mut tracer, 1).await[0].op, Op::Flush);
    });
}

#[test]
fn recording_changes_no_answer() {
    for seed in 0..20 {
        run(seed, async |host| {
            let text = "element H (type hop) element S (type halves) element A (type blocks) \
                        element B (type blocks) H -> S (S, a) -> A (S, b) -> B";
            let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
            let tracer = disk.disk.trace(1 + seed % 3).await.unwrap();
            play_against_model(&disk, seed, 200).await;
            assert!(tracer.hops.len() > 100 && tracer.dropped() == 0);
        });
    }
}

#[test]
fn the_most_curious_tracer_counts_until_it_has_gone() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        let sampled = async |tracer: &mut Tracer, requests: usize| {
            for _ in 0..requests {
                disk.op(Op::Flush, 0, 0).await.unwrap();
            }
            let roots = std::iter::from_fn(|| tracer.hops.try_recv().ok()).filter(|hop| hop.parent.is_none());
            roots.count()
        };
        let mut slow = disk.disk.trace(100).await.unwrap();
        let mut fast = disk.disk.trace(1).await.unwrap();
        assert_eq!(disk.disk.sampled_every(), 1);
        assert_eq!((sampled(&mut fast, 50).await, slow.hops.len()), (50, 100), "both get everything");
        drop(fast);
        assert_eq!(disk.disk.sampled_every(), 100);
        settle().await;
        sampled(&mut slow, 1).await;
        let some = sampled(&mut slow, 10_000).await;
        assert!((60..=160).contains(&some), "one in a hundred: {some}");
        drop(slow);
        assert_eq!(disk.disk.sampled_every(), EVERY);
        settle().await;
        let before = host.recorded().await.unwrap().len();
        // What the last one has left to be chosen is chosen yet.
        for _ in 0..300 {
            disk.op(Op::Flush, 0, 0).await.unwrap();
        }
        assert!(host.recorded().await.unwrap().len() <= before + 4);
    });
}

#[test]
fn every_kind_of_request_is_chosen() {
    run(3, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        let mut tracer = disk.disk.trace(4).await.unwrap();
        for _ in 0..200 {
            for _ in 0..3 {
                disk.read(0, 512).await.unwrap();
            }
            disk.op(Op::Flush, 0, 0).await.unwrap();
        }
        let hops: Vec<Hop> = std::iter::from_fn(|| tracer.hops.try_recv().ok()).collect();
        let roots = |op| hops.iter().filter(|hop| hop.op == op && hop.parent.is_none()).count();
        assert!(roots(Op::Read) > 75 && roots(Op::Flush) > 25, "{} {}", roots(Op::Read), roots(Op::Flush));
    });
}

#[test]
fn what_is_not_taken_is_dropped_and_counted() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        let mut tracer = disk.disk.trace(1).await.unwrap();
        for _ in 0..QUEUE {
            disk.op(Op::Flush, 0, 0).await.unwrap();
        }
        assert_eq!(tracer.dropped(), QUEUE as u64, "two hops each");
        let taken = std::iter::from_fn(|| tracer.hops.try_recv().ok()).count();
        assert_eq!(taken, QUEUE);
        // The flight recorder has the last ones whatever the tracer does, and no more.
        assert_eq!(host.recorded().await.unwrap().len(), 1024);
    });
}

#[test]
fn tracers_are_bounded_and_end_with_the_disk() {
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, "element B (type blocks)", "B").await.unwrap();
        assert_eq!(disk.disk.trace(0).await.err().unwrap().kind(), Kind::Invalid);
        let mut all = Vec::new();
        for _ in 0..MOST_TRACERS {
            all.push(disk.disk.trace(7).await.unwrap());
        }
        assert_eq!(disk.disk.trace(1).await.err().unwrap().kind(), Kind::Busy);
        disk.disk.stop().await.unwrap();
        assert!(all[3].next().await.is_none());
        assert_eq!(disk.disk.trace(1).await.err().unwrap().kind(), Kind::Unavailable);
    });
}

#[test]
fn counters_go_on_where_a_reload_keeps_the_edge() {
    run(1, async |host| {
        let text = |middle: &str, name: &str| {
            format!(
                "element Client (type client) element H (type {middle}) element {name} (type blocks) \
                 Client -> H -> {name}"
            )
        };
        let (live, disk) = live(&host, ALL, &text("hop", "B")).await.unwrap();
        let tracer = disk.disk.trace(1).await.unwrap();
        for _ in 0..5 {
            disk.read(0, 512).await.unwrap();
        }
        let reload = async |text: String| {
            let spec = crate::testing::checked(ALL, &text).unwrap();
            live.reload(spec, &crate::live::Options::default()).await.unwrap();
        };
        // Another type of the same name: the edges are the same.
        reload(text("behind", "B")).await;
        for _ in 0..3 {
            disk.read(0, 512).await.unwrap();
        }
        let counts = || {
            let edges = disk.disk.graph().read_edges();
            // Not all: a reload flushes.
            let reads = |edge: &crate::graph::EdgeReading| edge.ops[Op::Read as usize].requests;
            let count = |edge: &crate::graph::EdgeReading| (edge.to.clone(), reads(edge), edge.sampled);
            let mut counts: Vec<_> = edges.iter().map(count).collect();
            counts.sort();
            counts
        };
        assert_eq!(counts(), [("B".to_owned(), 8, 8), ("H".to_owned(), 8, 8)]);
        reload(text("behind", "C")).await;
        disk.read(0, 512).await.unwrap();
        assert_eq!(counts(), [("C".to_owned(), 1, 1), ("H".to_owned(), 9, 9)]);
        let graph = disk.disk.graph();
        let source = graph.read_source(graph.node("Client").unwrap());
        assert_eq!(source.ops[Op::Read as usize].requests, 9);
        drop(tracer);
    });
}
