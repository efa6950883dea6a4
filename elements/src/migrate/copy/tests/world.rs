//! Disks that do each request when the test says so, or after a random time, well or not; and a mirror with a leg that
//! guests do not wait for.

use super::super::Copy;
use crate::migrate::map::{DirtyMap, Intent};
use blockmason::describe::{Build, Catalogue, ElementType, Family, Outs, Ports};
use blockmason::lang::value::{Ref, Size};
use blockmason::testing::{CLIENT, TestDisk, graph};
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Extent, ExtentState, Flow, Geometry, Host, Instance, Op, Ops,
    Prepared, Reply, Request, Result,
};
use futures::FutureExt;
use futures::future::Shared;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::oneshot;

const BASE: ElementType = ElementType { family: Family::Sink, ports: Ports::SINK, ..ElementType::BASE };
const MANY: Ports = Ports { input: true, out: Outs::Variadic { min: 2 } };

static HAND: ElementType = ElementType { name: "hand", build: |build| disk(build, true), ..BASE };
static SLOW: ElementType = ElementType { name: "slow", build: |build| disk(build, false), ..BASE };
static TWIN: ElementType = ElementType {
    name: "twin",
    family: Family::Route,
    ports: MANY,
    mirrors: true,
    params: TwinParams::PARAMS,
    build: |build| Ok(Arc::new(Twin(build.refer(&build.read(TwinParams::from)?.map)?))),
    ..BASE
};

/// All types with those of this file.
pub(super) static ALL: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&CLIENT, &HAND, &SLOW, &TWIN]).collect()));

/// A request that a disk has not done.
struct Parked {
    op: Op,
    range: Range<u64>,
    go: oneshot::Sender<bool>,
}

/// What the disks of one test share with it.
pub(super) struct World {
    bytes: BTreeMap<String, Vec<u8>>,
    parked: BTreeMap<String, Vec<Parked>>,
    /// What disks that are built can do.
    pub(super) ops: Ops,
    /// How many in a hundred changes of a disk fail.
    pub(super) failing: BTreeMap<String, u8>,
    /// Milliseconds that a slow disk takes at the most.
    pub(super) slow: u64,
    /// Bytes read and written, by disk.
    pub(super) moved: BTreeMap<String, u64>,
    /// What has come to the disks.
    pub(super) seen: Vec<(String, Op, Range<u64>)>,
    legs: Vec<(Range<u64>, Shared<oneshot::Receiver<()>>)>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

impl World {
    fn new() -> World {
        let (bytes, parked, failing, moved) = Default::default();
        World { bytes, parked, failing, moved, ops: Ops::NONE, slow: 5, seen: Vec::new(), legs: Vec::new() }
    }

    pub(super) fn bytes_mut(&mut self, disk: &str) -> &mut [u8] {
        self.bytes.get_mut(disk).unwrap()
    }
}

/// A new world for a test.
pub(super) fn fresh(ops: Ops) {
    WORLD.set(World { ops, ..World::new() });
}

pub(super) fn world<T>(f: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with_borrow_mut(f)
}

pub(super) fn bytes(disk: &str) -> Vec<u8> {
    world(|world| world.bytes[disk].clone())
}

pub(super) fn set(disk: &str, bytes: impl Into<Vec<u8>>) {
    world(|world| world.bytes.insert(disk.to_owned(), bytes.into()));
}

/// What waits at the disks: which, and the place in its queue.
pub(super) fn parked() -> Vec<(String, usize, Op, Range<u64>)> {
    let each = |(disk, all): (&String, &Vec<Parked>)| -> Vec<_> {
        let known = |(ix, req): (usize, &Parked)| (disk.clone(), ix, req.op, req.range.clone());
        all.iter().enumerate().map(known).collect()
    };
    world(|world| world.parked.iter().flat_map(each).collect())
}

pub(super) fn release(disk: &str, ix: usize, well: bool) {
    let parked = world(|world| world.parked.get_mut(disk).unwrap().remove(ix));
    // A flow that was dropped does not wait any more.
    let _ = parked.go.send(well);
}

/// Lets everything run that does not wait for time.
pub(super) async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

pub(super) async fn pass(ms: u64) {
    blockmason::rt::sleep(Duration::from_millis(ms)).await;
}

struct Disk {
    name: String,
    by_hand: bool,
    geometry: Geometry,
}

fn disk(build: &Build<'_>, by_hand: bool) -> Result<Arc<dyn Element>> {
    let size = build.params.get("size").unwrap()[0].text().parse::<Size>().unwrap().0;
    let ops = world(|world| {
        world.bytes.entry(build.name.to_owned()).or_insert_with(|| vec![0; size as usize]);
        world.ops
    });
    Ok(Arc::new(Disk {
        name: build.name.to_owned(),
        by_hand,
        geometry: Geometry { ops, ..Geometry::new(size) },
    }))
}

impl Disk {
    /// A change that fails has been done in part.
    fn answer(&self, req: &Request, well: bool) -> Reply {
        world(|world| {
            let range = req.offset as usize..req.end() as usize;
            let size = self.geometry.size as usize;
            // What serves a graph that can be changed builds it on another thread, with a world of its own.
            let bytes = &mut world.bytes.entry(self.name.clone()).or_insert_with(|| vec![0; size])[range];
            let half = bytes.len().div_ceil(2);
            match req.op {
                Op::Read if well => {
                    *world.moved.entry(self.name.clone()).or_default() += req.len;
                    return Ok(Answer::Data(Data::copy_of(bytes)));
                }
                Op::Control => return Err(Error::unsupported("of a test")),
                Op::Extents => return Ok(Answer::Extents(extents(bytes))),
                Op::Write if well => {
                    req.data.copy_to(bytes);
                    *world.moved.entry(self.name.clone()).or_default() += req.len;
                }
                Op::Write => req.data.slice(0..half).copy_to(&mut bytes[..half]),
                Op::WriteZeroes | Op::Discard if well => bytes.fill(0),
                Op::WriteZeroes | Op::Discard => bytes[..half].fill(0),
                Op::Read | Op::Flush | Op::Cache => {}
            }
            if well { Ok(Answer::Done) } else { Err(Error::internal("of a test")) }
        })
    }
}

fn extents(bytes: &[u8]) -> Vec<Extent> {
    let state =
        |page: &[u8]| if page.iter().all(|byte| *byte == 0) { ExtentState::HOLE } else { ExtentState::DATA };
    let pages = bytes.chunks(4096).map(|page| Extent { len: page.len() as u64, state: state(page) });
    blockmason::request::join_extents(pages.collect())
}

impl Element for Disk {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(self.geometry))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        world(|world| world.seen.push((self.name.clone(), req.op, req.offset..req.end())));
        if !req.op.locks() {
            return Flow::Now(self.answer(&req, true));
        }
        if self.by_hand {
            let (go, wait) = oneshot::channel();
            let parked = Parked { op: req.op, range: req.offset..req.end(), go };
            world(|world| world.parked.entry(self.name.clone()).or_default().push(parked));
            return cx.later(&req.clone(), async move { self.answer(&req, wait.await == Ok(true)) });
        }
        let (failing, slow) =
            world(|world| (world.failing.get(&self.name).copied().unwrap_or(0), world.slow));
        let (well, time) = cx.rng(|rng| (rng.u8(0..100) >= failing, rng.u64(0..=slow)));
        cx.later(&req.clone(), async move {
            pass(time).await;
            self.answer(&req, well)
        })
    }
}

blockmason::params! {
    /// A mirror.
    struct TwinParams {
        /// What is told of changes.
        map: Ref<DirtyMap>,
    }
}

/// Guests wait for the first leg only. The second one keeps the order of what overlaps.
struct Twin(Arc<DirtyMap>);

/// A change on its way down both legs.
struct Change {
    intent: Intent,
    refused: Cell<bool>,
}

impl Drop for Change {
    fn drop(&mut self) {
        // Whatever the second leg has made of it.
        if self.refused.get() {
            self.intent.failed();
        }
    }
}

impl Twin {
    /// Those before it on the second leg, and what tells those behind it of its end.
    fn queue(range: &Range<u64>) -> (Vec<Shared<oneshot::Receiver<()>>>, oneshot::Sender<()>) {
        let (end, ended) = oneshot::channel();
        let overlaps = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        world(|world| {
            world.legs.retain(|(_, leg)| leg.clone().now_or_never().is_none());
            let before =
                world.legs.iter().filter(|(other, _)| overlaps(other)).map(|(_, leg)| leg.clone()).collect();
            world.legs.push((range.clone(), ended.shared()));
            (before, end)
        })
    }

    async fn change(&self, mut req: Request, cx: Cx<'_>) -> Reply {
        if req.op == Op::Discard {
            req.op = Op::WriteZeroes;
        }
        let range = req.offset..req.end();
        let intent = self.0.intend(range.clone()).await?;
        let change = Rc::new(Change { intent, refused: Cell::new(false) });
        let (before, end) = Twin::queue(&range);
        let (copy, shared) = (cx.child(&req), change.clone());
        drop(cx.detach_with(move |cx| {
            Flow::later(async move {
                for leg in before {
                    let _ = leg.await;
                }
                let reply = cx.forward(1, copy).await;
                drop((shared, end));
                reply
            })
        }));
        let reply = cx.forward(0, req).await;
        change.refused.set(reply.is_err());
        reply
    }
}

impl Element for Twin {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let size = children.iter().map(|below| below.size).min().unwrap_or(0);
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(size) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Write | Op::WriteZeroes | Op::Discard if req.len > 0 => {
                cx.later(&req.clone(), self.change(req, cx))
            }
            _ => cx.forward(0, req),
        }
    }
}

/// A disk that is being copied, with a client.
pub(super) struct Moving {
    pub(super) disk: TestDisk,
    /// The copier.
    pub(super) copy: Arc<Instance>,
}

impl Moving {
    /// Serves a graph with a copier `C` to a client at `top`.
    pub(super) async fn new(host: &Arc<Host>, text: &str, top: &str) -> Moving {
        let graph = graph(host, *ALL, text, top).unwrap();
        let copy = graph.instances().find(|instance| instance.name == "C").unwrap().clone();
        Moving { disk: TestDisk::serve(host, graph).await, copy }
    }

    /// A mirror whose second leg, or both, are of that type.
    pub(super) fn text(ty: &str, old: u64, new: u64, parameters: &str) -> String {
        format!(
            "element T (type twin) (map L) element Old (type {ty}) (size {old})
             element L (type log_dirty) (granule 4k) element New (type {ty}) (size {new})
             element C (type copy) (only L) {parameters}
             (T, old) -> Old (T, new) -> L L -> New (C, from) -> Old (C, to) -> L"
        )
    }

    pub(super) fn get(&self, handler: &str) -> String {
        self.copy.element.get(handler).unwrap()
    }

    pub(super) fn number(&self, handler: &str) -> u64 {
        self.get(handler).parse().unwrap()
    }

    pub(super) fn set(&self, handler: &str, value: &str) {
        self.copy.element.set(handler, value).unwrap();
    }

    pub(super) fn call(&self, handler: &str) {
        self.copy.element.call(handler, "").unwrap();
    }

    /// Waits for a state.
    pub(super) async fn until(&self, state: &str) {
        for _ in 0..200_000 {
            if self.get("state") == state {
                return;
            }
            pass(1).await;
        }
        panic!("it never was {state}: {}", self.get("progress"));
    }

    /// Waits until no change of a guest is on its way: it has been answered before.
    pub(super) async fn landed(&self) {
        let copy: &Copy = (&*self.copy.element as &dyn Any).downcast_ref().unwrap();
        copy.only.as_ref().unwrap().settled(0..u64::MAX).await;
    }

    /// Compares both disks, and finds them alike.
    pub(super) async fn verify(&self) {
        self.call("verify");
        self.until("clean").await;
        assert_eq!(self.get("verified"), self.get("total"), "{}", self.get("progress"));
    }
}
