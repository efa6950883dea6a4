//! Overlapping requests above mirrors and copiers, with every order of events that matters forced by hand or
//! tried one after the other.

use super::{ALL as OTHERS, BASE, settle};
use crate::describe::{Build, ElementType, Family, Handover, Outs, Ports};
use crate::element::{Children, Element, Flow, LocalBoxFuture, Prepared};
use crate::error::{Error, Kind, Result};
use crate::geometry::{Geometry, Ops};
use crate::graph::{Connection, Graph};
use crate::lang::{Defines, parse_str};
use crate::request::{Answer, Op, Reply, Request};
use crate::sched::{Change, Cx, Host, way};
use crate::testing::{TestDisk, graph, run};
use crate::{Data, Instance};
use futures::future::{Either, FutureExt, join_all, select};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

const SIZE: usize = 4096;
const MANY: Ports = Ports { input: true, out: Outs::Variadic { min: 2 } };
const FROM_TO: Ports = Ports { input: false, out: Outs::Named(&["from", "to"]) };

static TEE: ElementType =
    ElementType { name: "tee", ports: MANY, mirrors: true, build: |_| Ok(Arc::new(Tee)), ..BASE };
static COPY: ElementType =
    ElementType { name: "copy", ports: FROM_TO, serialises: true, build: |_| Ok(Arc::new(Copy)), ..BASE };
static LOAD: ElementType =
    ElementType { name: "load", ports: Ports::SOURCE, build: |_| Ok(Arc::new(Load)), ..BASE };
static LEG: ElementType = ElementType { name: "leg", build: leg::<false>, ..BASE };
static SLOW: ElementType = ElementType { name: "slow", build: leg::<true>, ..BASE };
static SLICE: ElementType =
    ElementType { name: "slice", ports: Ports::THROUGH, build: |_| Ok(Arc::new(super::Hop)), ..BASE };

/// The types of this file with those of the tests around it.
static ALL: &[&ElementType] =
    &[&TEE, &COPY, &LOAD, &LEG, &SLOW, &SLICE, OTHERS[0], OTHERS[1], OTHERS[2], OTHERS[3], OTHERS[4]];

/// What lets a request in a leg go: done, or failed.
type Go = oneshot::Sender<bool>;

/// What the elements of one test share with it.
#[derive(Default)]
struct World {
    bytes: BTreeMap<String, Vec<u8>>,
    parked: BTreeMap<String, Vec<Go>>,
    orders: Option<mpsc::UnboundedSender<Job>>,
    loads: usize,
}

/// What a copier is told to do: to hold a range and to copy one.
type Job = (Range<u64>, Range<u64>, oneshot::Sender<Reply>);

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

fn bytes(leg: &str) -> Vec<u8> {
    WORLD.with_borrow(|world| world.bytes[leg].clone())
}

fn set(leg: &str, bytes: Vec<u8>) {
    WORLD.with_borrow_mut(|world| world.bytes.insert(leg.to_owned(), bytes));
}

/// How many requests every leg holds.
fn parked() -> Vec<(String, usize)> {
    WORLD.with_borrow(|world| world.parked.iter().map(|(leg, all)| (leg.clone(), all.len())).collect())
}

fn parked_in(leg: &str) -> usize {
    WORLD.with_borrow(|world| world.parked.get(leg).map_or(0, Vec::len))
}

fn release(leg: &str, ix: usize, well: bool) {
    let go = WORLD.with_borrow_mut(|world| world.parked.get_mut(leg).unwrap().remove(ix));
    // A flow that was dropped does not wait any more.
    let _ = go.send(well);
}

async fn release_all() {
    settle().await;
    while let Some((leg, _)) = parked().into_iter().find(|(_, count)| *count > 0) {
        release(&leg, 0, true);
        settle().await;
    }
}

fn copy(hold: Range<u64>, copy: Range<u64>) -> oneshot::Receiver<Reply> {
    let (tx, rx) = oneshot::channel();
    let sent = WORLD.with_borrow(|world| world.orders.as_ref().unwrap().send((hold, copy, tx)));
    sent.unwrap_or_else(|_| panic!("the copier has ended"));
    rx
}

fn write(range: Range<u64>, byte: u8) -> Request {
    Request::write(range.start, Data::copy_of(&vec![byte; (range.end - range.start) as usize]))
}

/// Memory that does each request when the test lets it, or after a random time.
struct Leg<const SLOW: bool>(String);

fn leg<const SLOW: bool>(build: &Build<'_>) -> Result<Arc<dyn Element>> {
    set(build.name, vec![0; SIZE]);
    Ok(Arc::new(Leg::<SLOW>(build.name.to_owned())))
}

impl<const SLOW: bool> Leg<SLOW> {
    fn parked(&self) -> oneshot::Receiver<bool> {
        let (go, wait) = oneshot::channel();
        WORLD.with_borrow_mut(|world| world.parked.entry(self.0.clone()).or_default().push(go));
        wait
    }

    fn answer(&self, req: &Request) -> Reply {
        let range = req.offset as usize..req.end() as usize;
        WORLD.with_borrow_mut(|world| {
            let bytes = world.bytes.get_mut(&self.0).unwrap();
            match req.op {
                Op::Read => return Ok(Answer::Data(Data::copy_of(&bytes[range]))),
                Op::Write => req.data.copy_to(&mut bytes[range]),
                Op::WriteZeroes | Op::Discard => bytes[range].fill(0),
                Op::Flush | Op::Cache | Op::Extents | Op::Control => {}
            }
            Ok(Answer::Done)
        })
    }
}

impl<const SLOW: bool> Element for Leg<SLOW> {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(SIZE as u64) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !req.op.locks() {
            return Flow::Now(self.answer(&req));
        }
        let wait = (!SLOW).then(|| self.parked());
        let time = Duration::from_millis(cx.rng(|rng| rng.u64(0..5)));
        Flow::later(async move {
            match wait {
                Some(wait) => match wait.await {
                    Ok(true) => {}
                    _ => return Err(Error::internal("of a test")),
                },
                None => cx.sleep(time).await,
            }
            self.answer(&req)
        })
    }
}

/// Sends what changes data to every leg, reads from the first.
struct Tee;

impl Element for Tee {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(children.iter().reduce(Geometry::meet).unwrap_or(Geometry::new(0)).above()))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op.changes_data() { cx.broadcast(req) } else { cx.forward(0, req) }
    }
}

/// Copies what it is told to, under a guard.
struct Copy;

impl Copy {
    async fn copy(cx: Cx<'_>, hold: Range<u64>, copy: Range<u64>) -> Reply {
        let held = cx.hold(hold).await;
        let data = held.forward(0, Request::read(copy.start, copy.end - copy.start)).await?.into_data()?;
        held.forward(1, Request::write(copy.start, data)).await
    }
}

impl Element for Copy {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry::new(0)))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.fail(&req, Error::internal("nothing leads to a copier"))
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        let (tx, mut jobs) = mpsc::unbounded_channel::<Job>();
        WORLD.with_borrow_mut(|world| world.orders = Some(tx));
        Some(Box::pin(async move {
            let mut closing = pin!(cx.closing());
            // What it holds it finishes first.
            while let Either::Right((Some(job), _)) = select(closing.as_mut(), pin!(jobs.recv())).await {
                let (hold, range, done) = job;
                assert!(!hold.is_empty(), "of a test");
                // The test may not care.
                let _ = done.send(Copy::copy(cx, hold, range).await);
            }
        }))
    }
}

/// Plays random changes of its own, some at once.
struct Load;

fn random_change(rng: &mut fastrand::Rng) -> Request {
    let (offset, len) = (rng.u64(0..60), rng.u64(1..40));
    match rng.u8(0..4) {
        0 => Request::new(Op::WriteZeroes, offset, len),
        1 => Request::new(Op::Discard, offset, len),
        _ => write(offset..offset + len, rng.u8(1..)),
    }
}

impl Element for Load {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry::new(0)))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.fail(&req, Error::internal("nothing leads to a load"))
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        WORLD.with_borrow_mut(|world| world.loads += 1);
        Some(Box::pin(async move {
            for _ in 0..20 {
                let few = cx.rng(|rng| rng.usize(1..6));
                join_all((0..few).map(|_| cx.forward(0, cx.rng(random_change)))).await;
            }
            WORLD.with_borrow_mut(|world| world.loads -= 1);
        }))
    }
}

fn fresh() {
    WORLD.set(World::default());
}

/// Several streams at once into a mirror whose legs take random times.
#[test]
fn both_legs_end_alike() {
    for seed in 0..60 {
        fresh();
        run(seed, async |host| {
            let text = "element L1 (type load) element L2 (type load) element H (type hop)
                element T (type tee) element A (type slow) element B (type slow)
                L1 -> T L2 -> H -> T (T, a) -> A (T, b) -> B";
            let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut reads = Vec::new();
            let mut changes = Vec::new();
            for _ in 0..100 {
                changes.push(disk.send(random_change(&mut rng)));
                reads.push(disk.send(Request::read(0, 100)));
                crate::rt::sleep(Duration::from_millis(rng.u64(0..3))).await;
            }
            for reply in changes.into_iter().chain(reads) {
                reply.await.unwrap().unwrap();
            }
            while WORLD.with_borrow(|world| world.loads) > 0 {
                crate::rt::sleep(Duration::from_millis(1)).await;
            }
            assert!(bytes("A") == bytes("B"), "seed {seed}");
            assert!(disk.disk.graph().conflicts().is_empty());
        });
    }
}

const MIGRATION: &str =
    "element T (type tee) element H (type hop) element Old (type leg) element New (type leg)
    element Copy (type copy) (T, old) -> Old (T, new) -> H -> New (Copy, from) -> Old (Copy, to) -> New";

/// One run's choices: those of the run before up to where another one is due, then the first ones.
#[derive(Default)]
struct Choices {
    /// Each choice with how many there were.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&mut self, of: usize) -> usize {
        if self.at == self.taken.len() {
            self.taken.push((0, of));
        }
        let (choice, known) = self.taken[self.at];
        assert_eq!(known, of, "the run does not repeat");
        self.at += 1;
        choice
    }

    /// Moves on to the next run; false if there is none.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((choice, of)) = self.taken.pop() {
            if choice + 1 < of {
                self.taken.push((choice + 1, of));
                return true;
            }
        }
        false
    }
}

/// Something that may happen next.
#[derive(Clone, Debug)]
enum Event {
    Copy,
    Guest(u8),
    Release(String, usize),
}

/// Lets a copier copy a range and a guest write to parts of it, in the order of `choices`.
async fn migrate(host: Arc<Host>, failing: Option<u8>, choices: &mut Choices) {
    let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
    set("Old", vec![1; SIZE]);
    settle().await;
    let mut waiting = vec![Event::Copy, Event::Guest(2), Event::Guest(3)];
    let mut expected = vec![1u8; SIZE];
    expected[8..].fill(0);
    let (mut copied, mut written, mut order) = (None, Vec::new(), Vec::new());
    loop {
        settle().await;
        let mut events: Vec<Event> =
            parked().iter().flat_map(|(leg, n)| (0..*n).map(|ix| Event::Release(leg.clone(), ix))).collect();
        // The guest's writes come in their order, the copier's job at any time.
        events.extend(waiting.iter().filter(|event| matches!(event, Event::Copy)).cloned());
        events.extend(waiting.iter().find(|event| matches!(event, Event::Guest(_))).cloned());
        if events.is_empty() {
            break;
        }
        let event = events.swap_remove(choices.choose(events.len()));
        order.push(event.clone());
        match event {
            Event::Copy => {
                waiting.retain(|event| !matches!(event, Event::Copy));
                copied = Some(copy(0..8, 0..8));
            }
            Event::Guest(byte) => {
                waiting.retain(|event| !matches!(event, Event::Guest(other) if *other == byte));
                let range = if byte == 2 { 2..7 } else { 0..4 };
                if failing != Some(byte) {
                    expected[range.start as usize..range.end as usize].fill(byte);
                }
                written.push(disk.send(write(range, byte)));
            }
            // A write that is to fail does so in both legs. The guest's second one waits for the first.
            Event::Release(leg, ix) => release(&leg, ix, failing.is_none_or(|byte| !holds(&disk, byte))),
        }
    }
    copied.unwrap().await.unwrap().unwrap();
    for (reply, byte) in written.into_iter().zip([2, 3]) {
        assert_eq!(reply.await.unwrap().is_err(), failing == Some(byte), "{order:?}");
    }
    let first = |leg: &str| bytes(leg)[..8].to_vec();
    assert_eq!((first("Old"), first("New")), (expected[..8].to_vec(), expected[..8].to_vec()), "{order:?}");
}

/// True if the guest's write of that byte holds its range.
fn holds(disk: &TestDisk, byte: u8) -> bool {
    let range = if byte == 2 { 2..7 } else { 0..4 };
    let conflicts = disk.disk.graph().conflicts();
    let mut holding = conflicts.iter().filter(|found| found.claim.waits_for == 0);
    holding.any(|found| found.claim.holder.doing == "write" && found.claim.ranges[0] == range)
}

/// Every order of the copier's read and write with the guest's writes coming and ending, well or not.
#[test]
fn a_copier_never_undoes_what_the_guest_wrote() {
    for failing in [None, Some(2), Some(3)] {
        let (mut choices, mut runs) = (Choices::default(), 0);
        loop {
            fresh();
            run(1, async |host| migrate(host, failing, &mut choices).await);
            runs += 1;
            if !choices.next() {
                break;
            }
        }
        assert!(runs > 50, "{runs} orders were tried");
    }
}

#[test]
fn guests_are_active_when_their_requests_enter_and_not_when_a_copier_works() {
    fresh();
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
        settle().await;
        let copied = copy(0..10, 2..6);
        release_all().await;
        copied.await.unwrap().unwrap();
        assert_eq!(disk.disk.graph().guest_requests(), 0);
        let waiting = disk.send(write(0..4, 2));
        let hint = disk.send(Request::flush());
        settle().await;
        assert_eq!(disk.disk.graph().guest_requests(), 2, "one of them is not answered yet");
        release_all().await;
        waiting.await.unwrap().unwrap();
        hint.await.unwrap().unwrap();
        assert_eq!(disk.disk.graph().guest_requests(), 2);
    });
}

#[test]
fn a_guard_lets_its_own_requests_pass_and_no_others() {
    fresh();
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
        settle().await;
        let copied = copy(0..10, 2..6);
        settle().await;
        let mut overlapping = disk.send(Request::read(9, 2));
        let beside = disk.send(Request::read(10, 2));
        settle().await;
        assert_eq!(parked_in("Old"), 2, "the copier's read and the one beside");
        let listed: Vec<_> = disk.disk.graph().conflicts().iter().map(ToString::to_string).collect();
        assert!(
            listed[0].starts_with("T: request ") && listed[0].ends_with(", hold, holds 0..10, for 0.0ns"),
            "{listed:?}"
        );
        assert!(listed[1].contains(", read, waits for an earlier one to release 9..11, "), "{listed:?}");
        assert!(listed[2].contains(", read, holds 10..12, "), "{listed:?}");
        // Flushes and hints do not wait.
        disk.op(Op::Flush, 0, 0).await.unwrap();
        disk.op(Op::Cache, 0, 10).await.unwrap();
        assert!(overlapping.try_recv().is_err());
        release_all().await;
        for reply in [copied, overlapping, beside] {
            reply.await.unwrap().unwrap();
        }

        let beyond = copy(0..10, 5..11).await.unwrap().unwrap_err();
        assert_eq!(beyond.kind(), Kind::Internal);
        assert!(beyond.to_string().contains("more than the range"), "{beyond}");
        assert!(disk.disk.graph().conflicts().is_empty());
    });
}

#[test]
fn a_drain_ends_with_ranges_held_and_waited_for() {
    fresh();
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
        settle().await;
        let copied = copy(0..8, 0..8);
        settle().await;
        let replies: Vec<_> = (0..4).map(|ix| disk.send(write(ix..ix + 3, 9))).collect();
        settle().await;
        let before = disk.disk.graph();
        let next = || graph(&host, ALL, "element B (type park)", "B").unwrap();
        let stuck = disk.disk.replace(next(), &Change::default()).await.unwrap_err();
        assert_eq!(stuck.kind(), Kind::Busy);
        let said = stuck.to_string();
        assert!(said.contains(", hold, holds 0..8") && said.contains("waits for 2 earlier ones"), "{said}");

        // Once what is held is let go, the change goes through.
        let (changing, next) = (disk.disk.clone(), next());
        let changed =
            tokio::task::spawn_local(async move { changing.replace(next, &Change::default()).await });
        release_all().await;
        assert_eq!(changed.await.unwrap().unwrap().way, Handover::Gate);
        for reply in replies {
            reply.await.unwrap().unwrap();
        }
        copied.await.unwrap().unwrap();
        assert!(before.is_drained() && before.conflicts().is_empty());
    });
}

#[test]
fn panics_release_what_they_hold() {
    fresh();
    run(1, async |host| {
        let text = "element T (type tee) element P (type panic) element Old (type leg) element New (type leg)
            element Copy (type copy) (T, old) -> Old (T, new) -> P -> New (Copy, from) -> Old (Copy, to) -> New";
        let disk = TestDisk::new(&host, ALL, text, "T").await.unwrap();
        settle().await;
        let reads = [disk.send(Request::read(0, 4)), disk.send(Request::read(8, 4))];
        settle().await;
        let waits = disk.send(write(0..2, 1));
        settle().await;
        // Panics at once in the second leg, while the first has it.
        assert!(disk.submit(write(20..22, 1)).await.is_err());
        for reply in reads.into_iter().chain([waits]) {
            assert!(reply.await.unwrap().is_err());
        }
        settle().await;
        assert!(disk.disk.graph().conflicts().is_empty(), "{:?}", disk.disk.graph().conflicts());

        let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
        settle().await;
        // The copier's own panic, which says so to its graph.
        assert!(copy(0..0, 0..1).await.is_err());
        assert!(disk.disk.graph().is_failed() && disk.disk.graph().conflicts().is_empty());
    });
}

#[test]
fn a_flow_that_is_dropped_gives_up_its_place() {
    fresh();
    run(1, async |host| {
        let disk = TestDisk::new(&host, ALL, MIGRATION, "T").await.unwrap();
        let graph = disk.disk.graph();
        let lane = crate::sched::cx::Lane::new(graph.clone(), crate::Shard::current().unwrap());
        let client = lane.cx(graph.node("Client").unwrap());
        let holds = client.forward(0, write(0..10, 1));
        let waits = client.forward(0, write(5..15, 2));
        let mut behind = Box::pin(client.forward(0, write(12..20, 3)));
        assert!(behind.as_mut().now_or_never().is_none());
        drop(waits);
        assert!(behind.as_mut().now_or_never().is_none());
        assert_eq!(parked_in("Old"), 2, "the first and the last");
        drop((holds, behind));
        assert!(graph.conflicts().is_empty());
    });
}

/// A graph of the instances of another one, and what is added.
fn again(graph: &Graph, more: &[Arc<Instance>], edges: &[(&str, &str, &str)]) -> Arc<Graph> {
    let instances: Vec<_> = graph.instances().chain(more).cloned().collect();
    let ix = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
    let connection = |(from, port, to): &(&str, &str, &str)| Connection {
        from: ix(from),
        port: (*port).to_owned(),
        to: ix(to),
    };
    let connections: Vec<_> = edges.iter().map(connection).collect();
    Arc::new(Graph::assemble("test", &instances, &connections, 1).unwrap())
}

#[test]
fn two_epochs_keep_one_order() {
    fresh();
    run(1, async |host| {
        let text = "element T (type tee) element A (type leg) element B (type leg) (T, a) -> A (T, b) -> B";
        let disk = TestDisk::new(&host, ALL, text, "T").await.unwrap();
        let before = disk.disk.graph();
        let first = disk.send(write(0..10, 1));
        settle().await;
        static FREE: ElementType = ElementType { name: "free", handover: Handover::Free, ..super::THROUGH };
        let hop = Instance::new("H", &FREE, "", Arc::new(super::Hop));
        let legs = [("T", "a", "A"), ("T", "b", "B")];
        let next = again(&before, &[hop], &[legs[0], legs[1], ("Client", "out", "H"), ("H", "out", "T")]);
        assert_eq!(way(&before, &next), Handover::Free);
        super::swap(&disk.disk, next).await.unwrap();
        let second = disk.send(write(5..15, 2));
        settle().await;
        assert_eq!(
            (parked_in("A"), parked_in("B")),
            (1, 1),
            "the new graph's request waits for the old one's"
        );
        release_all().await;
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        assert_eq!(bytes("A")[..15], [[1; 5], [2; 5], [2; 5]].concat());
        assert!(bytes("A") == bytes("B"));
    });
}

#[test]
fn what_changes_the_order_goes_through_the_gate() {
    fresh();
    run(1, async |host| {
        let text = "element T (type tee) element A (type leg) element B (type leg) (T, a) -> A (T, b) -> B";
        let tee = graph(&host, ALL, text, "T").unwrap();
        let client = ("Client", "out", "T");
        let legs = [("T", "a", "A"), ("T", "b", "B")];
        assert_eq!(way(&tee, &again(&tee, &[], &[legs[0], legs[1], client])), Handover::Free);
        // Whatever the types say of themselves: a copier of one port that need not see every request.
        static READER: ElementType = ElementType {
            name: "reader",
            ports: Ports::SOURCE,
            serialises: true,
            handover: Handover::Free,
            ..BASE
        };
        let reader = Instance::new("Reader", &READER, "", Arc::new(Load));
        let with_reader = again(&tee, &[reader], &[legs[0], legs[1], client, ("Reader", "out", "A")]);
        assert_eq!(with_reader.places()[0].len(), 2);
        assert_eq!(way(&tee, &with_reader), Handover::Gate);
        assert_eq!(way(&with_reader, &tee), Handover::Gate);
    });
}

#[test]
fn whoever_completes_a_block_claims_all_of_it() {
    fresh();
    run(1, async |host| {
        let text =
            "element T (type tee) element A (type leg) element B (type blocks) (T, a) -> A (T, b) -> B";
        let disk = TestDisk::new(&host, ALL, text, "T").await.unwrap();
        let replies = [disk.send(write(500..510, 1)), disk.send(write(1000..1030, 1))];
        settle().await;
        let ranges: Vec<_> =
            disk.disk.graph().conflicts().into_iter().filter(|found| found.element == "T").collect();
        assert_eq!(ranges[0].claim.ranges[0], 0..512);
        assert_eq!(ranges[1].claim.ranges[0], 512..1536);
        release_all().await;
        for reply in replies {
            release_all().await;
            reply.await.unwrap().unwrap();
        }
    });
}

#[test]
fn sampled_requests_are_ordered_too() {
    fresh();
    run(1, async |host| {
        let text = "element H (type hop) element T (type tee) element A (type slow) element B (type slow)
            H -> T (T, a) -> A (T, b) -> B";
        let disk = TestDisk::new(&host, ALL, text, "H").await.unwrap();
        // By chance one in 1024; the seed makes it certain.
        for _ in 0..10_000 {
            disk.write(0, b"x").await.unwrap();
        }
        let hops = host.recorded().await.unwrap();
        let names: BTreeSet<_> = hops.iter().map(|hop| hop.way.to.as_str()).collect();
        assert_eq!(names, BTreeSet::from(["A", "B", "Client", "H", "T"]));
    });
}

#[test]
fn addresses_that_differ_are_refused() {
    let text = "element G (type guest) element T (type tee) element S (type slice)
element Old (type leg) element New (type leg) element C (type copy)
G -> T
(T, old) -> Old
(T, new) -> S -> New
(C, from) -> Old
(C, to) -> New
";
    static GUEST: ElementType =
        ElementType { name: "guest", family: Family::Export, ports: Ports::SOURCE, ..BASE };
    static WITH_GUEST: &[&ElementType] = &[&GUEST, &TEE, &COPY, &LEG, &SLICE];
    let spec = parse_str("t.mason", text, Path::new("."), &Defines::new()).unwrap();
    let refused = crate::lang::check(&spec, WITH_GUEST).unwrap_err().to_string();
    for said in ["mason::addresses", "G -> T -> S -> New and C -> New", "`slice` changes", "move `S`"] {
        assert!(refused.contains(said), "{said}: {refused}");
    }
    run(1, async |host| {
        let text = text.replace("element G (type guest)", "").replace("G -> T\n", "");
        let refused = graph(&host, ALL, &text, "T").map(drop).unwrap_err().to_string();
        assert!(refused.contains("Client -> T -> S -> New and C -> New"), "{refused}");
    });
}
