//! Dependents and what they wait for, with interleavings forced by hand, and at random.

mod closure;
mod ends;
mod legs;

use super::*;
use crate::data::Data;
use crate::describe::{Build, ElementType, Ports, Survives};
use crate::element::{Children, Element, Prepared};
use crate::error::Kind;
use crate::geometry::{Geometry, Ops};
use crate::request::Answer;
use crate::sched::cx::Lane;
use crate::sched::{Host, Part, Shard};
use crate::testing::{TestDisk, graph, run};
use std::cell::RefCell;
use std::time::Duration;
use tokio::sync::oneshot;

const BASE: ElementType = ElementType {
    family: Family::Sink,
    ports: Ports::SINK,
    survives: Survives::Nothing,
    ..ElementType::BASE
};
const ROUTE: ElementType = ElementType { family: Family::Route, ports: Ports::THROUGH, ..BASE };

static ALL: &[&ElementType] = &[
    &ElementType { name: "sink", build: |build| made(Sink::new(build, 1, false)), ..BASE },
    &ElementType { name: "blocks", build: |build| made(Sink::new(build, 512, false)), ..BASE },
    &ElementType { name: "chance", build: |build| made(Sink::new(build, 512, true)), ..BASE },
    &ElementType { name: "hop", build: |_| made(Hop), ..ROUTE },
    &ElementType { name: "whole", build: |_| made(Whole), ..ROUTE },
    &ElementType { name: "cache", family: Family::Transform, build: |_| made(Hop), ..ROUTE },
    &ElementType { name: "halves", build: |_| made(Halves), ..ROUTE },
    &ElementType { name: "pair", build: |_| made(Pair), ..ROUTE },
    &ElementType { name: "panic", build: |_| made(Panic), ..ROUTE },
    &ElementType {
        name: "mirror",
        ports: Ports { input: true, out: crate::describe::Outs::Variadic { min: 1 } },
        mirrors: true,
        build: |_| made(Mirror),
        ..ROUTE
    },
];

fn made(element: impl Element) -> Result<Arc<dyn Element>> {
    Ok(Arc::new(element))
}

/// What happened at the sinks, in order.
#[derive(Clone, Debug, PartialEq)]
enum Event {
    Issued(String, Op, u64, u64),
    Ended(String, Op, u64, u64, bool),
}

struct Parked {
    sink: String,
    op: Op,
    offset: u64,
    go: oneshot::Sender<Reply>,
}

thread_local! {
    static EVENTS: RefCell<Vec<Event>> = RefCell::default();
    static PARKED: RefCell<Vec<Parked>> = RefCell::default();
}

/// What has been issued: sink, operation and offset, in short.
fn issued() -> Vec<String> {
    EVENTS.with_borrow(|events| {
        let issue = |event: &Event| match event {
            Event::Issued(sink, op, offset, _) => Some(format!("{sink} {op} {offset}")),
            Event::Ended(..) => None,
        };
        events.iter().filter_map(issue).collect()
    })
}

fn answer(sink: &str, op: Op, offset: u64, reply: Reply) {
    let parked = PARKED.with_borrow_mut(|all| {
        let found = all.iter().position(|one| one.sink == sink && one.op == op && one.offset == offset);
        all.remove(found.unwrap_or_else(|| panic!("no {op} at {offset} of {sink} is parked")))
    });
    // Its flow may have been dropped.
    let _ = parked.go.send(reply);
}

fn done(sink: &str, offset: u64) {
    answer(sink, Op::Write, offset, Ok(Answer::Done));
}

fn fail(sink: &str, offset: u64) {
    answer(sink, Op::Write, offset, Err(Error::new(Kind::NoSpace, "of a test")));
}

/// Writes down what comes and goes; answers when the test says so, or after a random time.
struct Sink {
    name: String,
    block: u32,
    chance: bool,
}

impl Sink {
    fn new(build: &Build<'_>, block: u32, chance: bool) -> Sink {
        Sink { name: build.name.to_owned(), block, chance }
    }
}

impl Element for Sink {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        let geometry = Geometry { min_block: self.block, ops: Ops::ALL, ..Geometry::new(1 << 20) };
        Ok(Prepared::of(Geometry { max_len: 4 * self.block.max(256), ..geometry }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (sink, op, offset, len) = (self.name.clone(), req.op, req.offset, req.len);
        if op == Op::Read {
            return Flow::Now(Ok(Answer::Data(Data::zeros(len as usize))));
        }
        EVENTS.with_borrow_mut(|events| events.push(Event::Issued(sink.clone(), op, offset, len)));
        let (go, wait) = oneshot::channel();
        if !self.chance {
            PARKED.with_borrow_mut(|all| all.push(Parked { sink: sink.clone(), op, offset, go }));
        }
        cx.later(&req, async move {
            let reply = if self.chance {
                cx.sleep(Duration::from_millis(cx.rng(|rng| rng.u64(0..20)))).await;
                let fails = op == Op::Write && cx.rng(|rng| rng.u8(0..12)) == 0;
                if fails { Err(Error::new(Kind::Io, "of a test")) } else { Ok(Answer::Done) }
            } else {
                wait.await.map_err(|_| Error::internal("dropped"))?
            };
            let event = Event::Ended(sink, op, offset, len, reply.is_ok());
            EVENTS.with_borrow_mut(|events| events.push(event));
            reply
        })
    }
}

struct Hop;

impl Element for Hop {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

/// Wants whole blocks: the edge into it reads, modifies, writes, and locks.
struct Whole;

impl Element for Whole {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { min_block: 512, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

/// Sends each request in two halves.
struct Halves;

impl Element for Halves {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !req.op.has_range() || req.len < 2 {
            return cx.forward(0, req);
        }
        let half = req.len / 2;
        let second = Part::new(0, req.offset + half, req.len - half, half);
        cx.scatter(&req, [Part::new(0, req.offset, half, 0), second])
    }
}

/// Sends each write twice, the second one, 4096 bytes on, when the first one is durable.
struct Pair;

impl Element for Pair {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op != Op::Write {
            return cx.forward(0, req);
        }
        cx.later(&req.clone(), async move {
            let (mut first, mut second) = (cx.child(&req), cx.child(&req));
            second.offset += 4096;
            cx.add_dependency(&mut second, &mut first, Until::Durable)?;
            let second = cx.forward(0, second);
            let (first, second) = futures::future::join(cx.forward(0, first), second).await;
            first.and(second)
        })
    }
}

struct Panic;

impl Element for Panic {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!(req.offset != 0, "of a test");
        cx.forward(0, req)
    }
}

/// Sends everything to all of its legs, and answers when they have ended, with the best reply.
struct Mirror;

impl Element for Mirror {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(children.iter().next().unwrap().above()))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let legs: Vec<_> = (0..cx.outs()).map(|port| cx.forward(port, cx.leg(&req, port))).collect();
        cx.later(&req, async move {
            let replies = join_all(legs).await;
            let mut replies = replies.into_iter();
            let first = replies.next().unwrap();
            replies.fold(first, |best, reply| best.or(reply))
        })
    }
}

/// A place in a graph from which a test issues requests.
struct Bench {
    lane: Lane,
    client: usize,
}

impl Bench {
    fn new(host: &Arc<Host>, text: &str) -> Bench {
        EVENTS.take();
        PARKED.take();
        let graph = graph(host, ALL, text, "Top").unwrap();
        let client = graph.node("Client").unwrap();
        Bench { lane: Lane::new(graph, Shard::current().unwrap()), client }
    }

    fn cx(&self) -> Cx<'_> {
        self.lane.cx(self.client)
    }

    fn write(&self, offset: u64, len: u64) -> Request {
        let parent = Request::write(offset, Data::zeros(len as usize));
        self.cx().child(&parent)
    }

    /// Sends a request on its way.
    fn send(&self, req: Request) -> Sent<'_> {
        let mut flow = self.cx().forward(0, req);
        let reply = poll(&mut flow);
        Sent { flow: Some(flow), reply }
    }
}

fn poll(flow: &mut Flow<'_>) -> Option<Reply> {
    match Pin::new(flow).poll(&mut Context::from_waker(std::task::Waker::noop())) {
        Poll::Ready(reply) => Some(reply),
        Poll::Pending => None,
    }
}

struct Sent<'a> {
    flow: Option<Flow<'a>>,
    reply: Option<Reply>,
}

impl Sent<'_> {
    /// Lets it go on as far as it can; its reply, if it has ended.
    fn reply(&mut self) -> Option<&Reply> {
        for _ in 0..4 {
            if let (None, Some(flow)) = (&self.reply, &mut self.flow) {
                self.reply = poll(flow);
            }
        }
        self.reply.as_ref()
    }

    fn is_ok(&mut self) -> bool {
        matches!(self.reply(), Some(Ok(_)))
    }

    fn error(&mut self) -> &Error {
        self.reply().expect("it has ended").as_ref().expect_err("it has failed")
    }
}

fn at(text: &str, body: impl FnOnce(&Bench)) {
    run(1, async |host| {
        let bench = Bench::new(&host, text);
        body(&bench);
    });
}

const PLAIN: &str = "element Top (type hop) element A (type sink) Top -> A";

#[test]
fn a_dependent_is_issued_when_its_predecessor_has_completed() {
    at(PLAIN, |bench| {
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        assert!(!bench.cx().is_independent(&second) && bench.cx().is_independent(&first));
        let again = second.clone();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        assert!(second.reply().is_none());
        assert_eq!(issued(), ["A write 0"]);
        done("A", 0);
        assert!(second.reply().is_none());
        assert_eq!(issued(), ["A write 0"], "answered below, but not seen by its issuer");
        assert!(first.is_ok() && bench.cx().is_independent(&again));
        assert!(second.reply().is_none());
        assert_eq!(issued(), ["A write 0", "A write 4096"]);
        done("A", 4096);
        assert!(second.is_ok());
    });
}

#[test]
fn failure_is_passed_on_with_its_cause_and_nothing_is_issued() {
    at(PLAIN, |bench| {
        let cx = bench.cx();
        let mut all = [bench.write(0, 512), bench.write(4096, 512), bench.write(8192, 512)];
        let id = all[0].id;
        let [a, b, c] = &mut all;
        cx.add_dependency(b, a, Until::Completed).unwrap();
        cx.add_dependency(c, b, Until::Completed).unwrap();
        let [mut a, mut b, mut c] = all.map(|req| bench.send(req));
        fail("A", 0);
        assert_eq!(a.error().kind(), Kind::NoSpace);
        let error = b.error();
        assert_eq!(error.kind(), Kind::NoSpace);
        let text = error.to_string();
        let wanted =
            format!("A: write at 4096: not issued: it depends on write at 0 of Client (request {id})");
        assert!(text.starts_with(&wanted) && text.ends_with("of a test"), "{text}");
        assert!(c.error().to_string().contains("of a test"), "and so on");
        assert_eq!(issued(), ["A write 0"]);
    });
}

#[test]
fn what_is_cancelled_or_never_issued_has_failed() {
    at(PLAIN, |bench| {
        let cx = bench.cx();
        let (mut a, mut b, mut c) = (bench.write(0, 512), bench.write(4096, 512), bench.write(8192, 512));
        cx.add_dependency(&mut b, &mut a, Until::Completed).unwrap();
        cx.add_dependency(&mut c, &mut b, Until::Completed).unwrap();
        let (a, mut c) = (bench.send(a), bench.send(c));
        drop(a);
        // As if b waited elsewhere, and that were given up.
        let (kept, mut sent) = (b.clone(), bench.send(b));
        assert!(sent.error().to_string().ends_with("it was cancelled before it ended"));
        drop(kept);
        assert_eq!(c.error().kind(), Kind::Unavailable);

        let (mut a, mut b) = (bench.write(0, 512), bench.write(4096, 512));
        cx.add_dependency(&mut b, &mut a, Until::Completed).unwrap();
        let mut b = bench.send(b);
        assert!(b.reply().is_none());
        let child = cx.child(&a);
        drop(a);
        assert!(b.reply().is_none(), "a child is left");
        drop(child);
        assert!(b.error().to_string().ends_with("it was dropped before it was issued"));
        assert_eq!(issued(), ["A write 0"]);
    });
}

#[test]
fn several_predecessors_and_chains() {
    at(PLAIN, |bench| {
        let cx = bench.cx();
        let [mut a, mut b, mut c, mut d] = [0, 1, 2, 3].map(|ix| bench.write(ix * 4096, 512));
        cx.add_dependency(&mut c, &mut a, Until::Completed).unwrap();
        cx.add_dependency(&mut c, &mut b, Until::Completed).unwrap();
        cx.add_dependency(&mut d, &mut c, Until::Completed).unwrap();
        let [mut d, mut c, mut b, mut a] = [d, c, b, a].map(|req| bench.send(req));
        assert_eq!(issued(), ["A write 4096", "A write 0"]);
        done("A", 0);
        assert!(a.is_ok() && c.reply().is_none() && d.reply().is_none());
        assert_eq!(issued().len(), 2);
        done("A", 4096);
        assert!(b.is_ok() && c.reply().is_none() && d.reply().is_none());
        assert_eq!(issued()[2..], ["A write 8192"]);
        done("A", 8192);
        assert!(c.is_ok() && d.reply().is_none());
        assert_eq!(issued()[3..], ["A write 12288"]);
    });
}

#[test]
fn circles_are_refused() {
    at(PLAIN, |bench| {
        let cx = bench.cx();
        let depend = |a: &mut Request, b: &mut Request| cx.add_dependency(a, b, Until::Completed);
        let [mut a, mut b, mut c] = [0, 1, 2].map(|ix| bench.write(ix * 4096, 512));
        depend(&mut b, &mut a).unwrap();
        depend(&mut c, &mut b).unwrap();
        assert_eq!(depend(&mut a, &mut c).unwrap_err().kind(), Kind::Invalid);
        assert!(depend(&mut a.clone(), &mut a).is_err());
        // A request waits for its children, and so does what depends on it.
        let mut child = cx.child(&a);
        assert!(depend(&mut child, &mut a).is_err());
        assert!(depend(&mut child, &mut c).is_err());
        let mut other = bench.write(0, 1);
        depend(&mut child, &mut other).unwrap();
        assert!(depend(&mut other, &mut c).is_err(), "c waits for a, a for its child, that one for this one");

        let mut chain: Vec<_> = (0..1100).map(|ix| bench.write(ix, 1)).collect();
        for ix in 1..chain.len() {
            let (before, after) = chain.split_at_mut(ix);
            depend(&mut after[0], &mut before[ix - 1]).unwrap();
        }
        let (first, last) = chain.split_at_mut(1);
        let error = depend(&mut first[0], last.last_mut().unwrap()).unwrap_err();
        assert!(error.to_string().contains("more than 1024"), "{error}");
    });
}

const SPLIT: &str = "element Top (type halves) element B (type halves) element A (type sink) Top -> B -> A";

const MIRROR: &str =
    "element Top (type mirror) element A (type sink) element B (type sink) (Top, a) -> A (Top, b) -> B";

#[test]
fn a_request_in_pieces_has_completed_when_all_have() {
    at(SPLIT, |bench| {
        let (mut first, mut second) = (bench.write(0, 4096), bench.write(8192, 8));
        bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let (mut second, mut first) = (bench.send(second), bench.send(first));
        assert_eq!(issued().len(), 4);
        for offset in [1024, 0, 3072] {
            done("A", offset);
            assert!(first.reply().is_none() && second.reply().is_none());
        }
        assert_eq!(issued().len(), 4);
        done("A", 2048);
        assert!(first.is_ok() && second.reply().is_none());
        assert_eq!(issued()[4..], ["A write 8192", "A write 8194", "A write 8196", "A write 8198"]);
    });
}

#[test]
fn what_an_element_scatters_itself_counts_as_issued() {
    at(
        "element Top (type mirror) element A (type sink) element B (type sink) (Top, a) -> A (Top, b) -> B",
        |bench| {
            let cx = bench.lane.cx(bench.lane.graph.node("Top").unwrap());
            let parts = |req: &Request| cx.scatter(req, [Part::new(0, 0, 256, 0), Part::new(1, 0, 256, 256)]);
            let (mut first, mut second) = (bench.write(0, 512), bench.write(0, 512));
            cx.add_dependency(&mut second, &mut first, Until::Completed).unwrap();
            let (mut dependent, mut flow) = (parts(&second), parts(&first));
            assert!(poll(&mut dependent).is_none() && poll(&mut flow).is_none());
            assert_eq!(issued(), ["A write 0", "B write 0"]);
            drop(first);
            done("A", 0);
            assert!(poll(&mut flow).is_none() && poll(&mut dependent).is_none());
            assert_eq!(issued().len(), 2);
            done("B", 0);
            assert!(poll(&mut flow).is_some() && poll(&mut dependent).is_none());
            assert_eq!(issued().len(), 4);
        },
    );
}

#[test]
fn a_block_that_both_need_is_not_held_while_waiting() {
    for text in [
        "element Top (type hop) element A (type blocks) Top -> A",
        "element Top (type whole) element A (type sink) Top -> A",
        "element Top (type whole) element M (type mirror) element A (type sink) Top -> M (M, a) -> A",
    ] {
        at(text, |bench| {
            // Neighbours in one block, the dependent first.
            let (mut first, mut second) = (bench.write(100, 50), bench.write(0, 50));
            bench.cx().add_dependency(&mut second, &mut first, Until::Completed).unwrap();
            let (mut second, mut first) = (bench.send(second), bench.send(first));
            assert!(second.reply().is_none() && first.reply().is_none());
            assert_eq!(issued(), ["A write 0"], "the block of the first: {text}");
            done("A", 0);
            assert!(first.is_ok() && second.reply().is_none());
            done("A", 0);
            assert!(second.is_ok());
        });
    }
}

#[test]
fn elements_that_order_requests_wait_before_they_do() {
    at(PLAIN, |bench| {
        let cx = bench.cx();
        let (mut first, mut second) = (bench.write(0, 512), bench.write(4096, 512));
        cx.add_dependency(&mut second, &mut first, Until::Completed).unwrap();
        let again = &mut second;
        let mut wait = Box::pin(cx.await_dependencies(again));
        let mut task = Context::from_waker(std::task::Waker::noop());
        assert!(wait.as_mut().poll(&mut task).is_pending());
        let mut first = bench.send(first);
        done("A", 0);
        assert!(first.is_ok() && wait.as_mut().poll(&mut task).is_ready());
        drop(wait);
        let mut second = bench.send(second);
        assert!(second.reply().is_none());
        assert_eq!(issued()[1..], ["A write 4096"]);
    });
}

/// Lets everything that can go on go on.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// Answers flushes, the disk's own too, until there are no more.
async fn answer_flushes() {
    while PARKED.with_borrow(|all| all.iter().any(|one| one.op == Op::Flush)) {
        answer("A", Op::Flush, 0, Ok(Answer::Done));
        settle().await;
    }
}
