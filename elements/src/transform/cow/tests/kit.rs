//! Disks that several graphs in a row lead to, processes that die, and requests that are held.

use blockmason::describe::{Catalogue, ElementType};
use blockmason::testing::{self, SHARED, TestDisk, graph};
use blockmason::{Children, Cx, Element, Error, Flow, Geometry, Host, Kind, Op, Prepared, Request, Result};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::oneshot;

pub(super) static CATALOGUE: Catalogue = &[
    &super::super::TYPE,
    &SHARED,
    &PLUG,
    &HOLD,
    &COARSE,
    &crate::sink::file::TYPE,
    &crate::sink::mem::TYPE,
    &crate::sink::null::TYPE,
    &crate::sink::volatile::TYPE,
    &crate::route::linear::TYPE,
];

thread_local! {
    static FUSE: RefCell<Arc<Fuse>> = RefCell::default();
    static HELD: RefCell<Vec<(String, oneshot::Sender<()>)>> = RefCell::default();
}

/// [`testing::share`], of these types.
pub(super) fn share(host: &Host, name: &str, text: &str) -> Arc<dyn Element> {
    testing::share(host, CATALOGUE, name, text)
}

/// When a process dies, counted in requests to its disks.
#[derive(Default)]
pub(super) struct Fuse {
    left: AtomicU64,
    pub(super) dead: AtomicBool,
    power: bool,
    /// Nobody below knows the incarnation.
    mute: bool,
    sinks: Vec<Arc<dyn Element>>,
}

impl Fuse {
    /// For the graphs that are built next.
    pub(super) fn new(left: u64, power: bool, mute: bool, sinks: &[Arc<dyn Element>]) -> Arc<Fuse> {
        let fuse = Fuse { left: AtomicU64::new(left), power, mute, sinks: sinks.to_vec(), ..Fuse::default() };
        let fuse = Arc::new(fuse);
        FUSE.set(fuse.clone());
        fuse
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// The process is gone, or the power.
    pub(super) fn blow(&self) {
        if !self.dead.swap(true, Ordering::Relaxed) && self.power {
            self.sinks.iter().for_each(|sink| drop(sink.call("lose_power", "").unwrap()));
        }
    }
}

fn dead() -> Error {
    Error::new(Kind::Unavailable, "the process is dead")
}

/// Passes everything on until its process dies.
struct Plug(Arc<Fuse>);

static PLUG: ElementType = ElementType {
    name: "plug",
    build: |_| Ok(Arc::new(Plug(FUSE.with_borrow(Arc::clone)))),
    ..ElementType::BASE
};

impl Element for Plug {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let fuse = &self.0;
        if fuse.is_dead() || (req.op == Op::Control && fuse.mute) {
            return Flow::fail(dead());
        }
        if req.op != Op::Control && fuse.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            fuse.blow();
            if fuse.power || req.op != Op::Write {
                return Flow::fail(dead());
            }
            // It dies in the middle of a write, between two sectors.
            let middle = (req.offset + req.len / 2) / 512 * 512;
            let half = req.part(0, middle.saturating_sub(req.offset), req.offset);
            return cx.forward(0, half).then(|_| Err(dead()));
        }
        cx.forward(0, req).then(|reply| if fuse.is_dead() { Err(dead()) } else { reply })
    }
}

/// Holds every request until the test lets it go.
struct Hold;

static HOLD: ElementType = ElementType { name: "hold", build: |_| Ok(Arc::new(Hold)), ..ElementType::BASE };

impl Element for Hold {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (release, released) = oneshot::channel();
        let label = format!("{} {} {}+{}", cx.name(), req.op, req.offset, req.len);
        HELD.with_borrow_mut(|held| held.push((label, release)));
        Flow::later(async move {
            let _ = released.await;
            cx.forward(0, req).await
        })
    }
}

/// Lets the `nth` of the held requests go, and says which it was.
pub(super) fn release(nth: usize) -> String {
    let (label, release) = HELD.with_borrow_mut(|held| held.remove(nth));
    let _ = release.send(());
    label
}

/// How many requests are held once everything that can go on has gone on.
pub(super) async fn held() -> usize {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    HELD.with_borrow(Vec::len)
}

/// A disk in blocks of 4 KiB: what reaches it is in whole blocks.
struct Coarse;

static COARSE: ElementType =
    ElementType { name: "coarse", build: |_| Ok(Arc::new(Coarse)), ..ElementType::BASE };

impl Element for Coarse {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { min_block: 4096, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let end = req.end() == cx.geometry().size || req.end().is_multiple_of(4096);
        assert!(!req.op.has_range() || req.offset.is_multiple_of(4096) && end, "{req:?}");
        cx.forward(0, req)
    }
}

/// A graph with a cow `C` in it, served.
pub(super) struct Served {
    pub(super) disk: TestDisk,
    pub(super) cow: Arc<dyn Element>,
}

impl Served {
    pub(super) async fn new(host: &Arc<Host>, text: &str) -> Result<Served> {
        let graph = graph(host, CATALOGUE, text, "C")?;
        let cow = graph.instances().find(|found| found.name == "C").unwrap().element.clone();
        Ok(Served { disk: TestDisk::serve(host, graph).await, cow })
    }

    pub(super) fn get(&self, handler: &str) -> String {
        self.cow.get(handler).unwrap()
    }

    /// Waits for a state.
    pub(super) async fn reaches(&self, state: &str) {
        for _ in 0..100_000 {
            if self.cow.get("state").is_ok_and(|found| found == state) {
                return;
            }
            blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
        panic!("not {state}: {:?}, {}", self.cow.get("state"), self.get("error"));
    }
}

/// A cow over `base` and `overlay`, each an element in the words of the language.
pub(super) fn text(block: &str, base: &str, overlay: &str) -> String {
    format!(
        "element C (type cow) (block {block})\n\
         element B {base}\n\
         element O {overlay}\n\
         (C, base) -> B\n\
         (C, overlay) -> O\n"
    )
}
