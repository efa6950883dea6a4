//! For tests of elements: a host on the current thread with stopped time and a seed, graphs from text,
//! a client that sends requests, and a model to hold the answers against.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests panic")]

use crate::data::Data;
use crate::describe::{Catalogue, ElementType, Family, Ports};
use crate::element::{Element, Flow};
use crate::error::Error;
use crate::graph::build::{Builder, connections};
use crate::graph::{Connection, Graph, Instance};
use crate::lang::{Defines, NoFiles, Spec, parse_checked, parse_str};
use crate::live::{Heads, Live, Setup};
use crate::request::{Answer, Extent, Op, Reply, Request};
use crate::rt;
use crate::sched::{Admit, Cx, Disk, Host, Served, Shard, Stream, serve};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::time::Instant;

thread_local! {
    /// The clock of this thread stands still until everything waits.
    static CLOCK_STANDS: Cell<bool> = const { Cell::new(false) };
    /// The time of day that a test has set, and when.
    static TIME_OF_DAY: Cell<Option<(SystemTime, Instant)>> = const { Cell::new(None) };
}

/// True within [`run`].
pub(crate) fn clock_stands() -> bool {
    CLOCK_STANDS.get()
}

/// Sets the time of day of this thread, in seconds since 1970, until the end of [`run`]: from now on it goes with the clock that
/// stands until everything waits.
pub fn set_wall_clock(seconds: u64) {
    TIME_OF_DAY.set(Some((SystemTime::UNIX_EPOCH + Duration::from_secs(seconds), rt::now())));
}

/// The time of day, where a test has set it.
pub(crate) fn wall_clock() -> Option<SystemTime> {
    TIME_OF_DAY.get().map(|(time, since)| time + (rt::now() - since))
}

/// Runs `body` on a shard of its own: the current thread, with a clock that stands still until
/// everything waits, files included, and random numbers from `seed`.
pub fn run<T>(seed: u64, body: impl AsyncFnOnce(Arc<Host>) -> T) -> T {
    let folder = std::env::temp_dir().join(format!("mason-test-{}-{seed}", std::process::id()));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build_local(Default::default())
        .unwrap();
    CLOCK_STANDS.set(true);
    let done = runtime.block_on(async {
        let done = body(Host::on_this_thread(seed, &folder)).await;
        Shard::leave();
        done
    });
    CLOCK_STANDS.set(false);
    TIME_OF_DAY.set(None);
    done
}

/// Where the test's client enters.
struct Client;

impl Element for Client {
    fn submit<'a>(&'a self, _req: Request, _cx: Cx<'a>) -> Flow<'a> {
        Flow::fail(Error::internal("nothing leads to a client"))
    }
}

/// The source of a [`TestDisk`], for catalogues of tests.
pub static CLIENT: ElementType = ElementType {
    name: "client",
    summary: "sends a test's requests",
    family: Family::Export,
    ports: Ports::SOURCE,
    build: |_| Ok(Arc::new(Client)),
    ..ElementType::BASE
};

thread_local! {
    static SINKS: RefCell<HashMap<String, Arc<dyn Element>>> = RefCell::default();
}

/// Makes the element `(type shared)` of that name in every graph of this thread one and the same: what outlives a process that a
/// test lets die. `text` is what stands behind its name.
pub fn share(host: &Host, catalogue: Catalogue, name: &str, text: &str) -> Arc<dyn Element> {
    let graph = graph(host, catalogue, &format!("element {name} {text}"), name).unwrap();
    let element = graph.instances().find(|found| found.name == name).unwrap().element.clone();
    share_this(name, element.clone());
    element
}

/// The same with an element that is there already.
pub fn share_this(name: &str, element: Arc<dyn Element>) {
    SINKS.with_borrow_mut(|sinks| sinks.insert(name.to_owned(), element));
}

/// What [`share`] has made, for catalogues of tests.
pub static SHARED: ElementType = ElementType {
    name: "shared",
    summary: "is the same in every graph",
    family: Family::Sink,
    ports: Ports::SINK,
    build: |build| Ok(SINKS.with_borrow(|sinks| sinks[build.name].clone())),
    ..ElementType::BASE
};

/// Builds the graph of `text` and connects a client to its element `top`.
pub fn graph(host: &Host, catalogue: Catalogue, text: &str, top: &str) -> crate::Result<Arc<Graph>> {
    let spec = parse_str("test.mason", text, Path::new("."), &Defines::new())
        .map_err(|errors| Error::invalid(errors.first_line()))?;
    let builder = Builder { catalogue, name: "test", state_dir: host.state_dir(), shards: host.shards() };
    let mut instances: Vec<_> = builder.build(&spec)?.instances().cloned().collect();
    let mut edges = connections(&spec);
    let to = spec.find(top).ok_or_else(|| Error::invalid(format!("no element {top}")))?;
    edges.push(Connection { from: instances.len(), port: "out".to_owned(), to });
    instances.push(Instance::new("Client", &CLIENT, "", Arc::new(Client)));
    builder.assemble(&instances, &edges).map(Arc::new)
}

/// Serves the graph of `text`, which names its source `Client` of type `client`, so that it can be changed.
pub async fn live(
    host: &Arc<Host>,
    catalogue: Catalogue,
    text: &str,
) -> crate::Result<(Arc<Live>, TestDisk)> {
    let setup = Setup { catalogue, name: "test".to_owned(), state_dir: host.state_dir().to_owned() };
    let live = Live::start(host, setup, checked(catalogue, text)?, Heads::Verify).await?;
    let disk = TestDisk::connect(live.disk().clone());
    Ok((live, disk))
}

/// The checked graph of a text.
pub fn checked(catalogue: Catalogue, text: &str) -> crate::Result<Spec> {
    let name = Path::new("test.mason");
    parse_checked(&NoFiles, name, PathBuf::from("/test.mason"), text.to_owned(), &Defines::new(), catalogue)
        .map_err(|errors| Error::invalid(errors.first_line()))
}

/// A disk with a client.
pub struct TestDisk {
    /// The disk, for gates and swaps.
    pub disk: Arc<Disk>,
    queue: Rc<Queue>,
}

#[derive(Default)]
struct Queue {
    waiting: RefCell<VecDeque<(Request, oneshot::Sender<Reply>)>>,
    waker: RefCell<Option<Waker>>,
}

impl Stream for Rc<Queue> {
    type Tag = oneshot::Sender<Reply>;

    fn poll_next(&self, task: &mut Context<'_>) -> Poll<Admit<Self::Tag>> {
        match self.waiting.borrow_mut().pop_front() {
            Some((req, tag)) => Poll::Ready(Admit::Request(tag, req)),
            None => {
                *self.waker.borrow_mut() = Some(task.waker().clone());
                Poll::Pending
            }
        }
    }

    fn reply(&self, tag: Self::Tag, reply: Reply) {
        let _ = tag.send(reply);
    }

    fn poll_flush(&self, _task: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

impl TestDisk {
    /// Serves the graph of `text` to a client at `top`.
    pub async fn new(
        host: &Arc<Host>,
        catalogue: Catalogue,
        text: &str,
        top: &str,
    ) -> crate::Result<TestDisk> {
        Ok(TestDisk::serve(host, graph(host, catalogue, text, top)?).await)
    }

    /// Serves a graph that [`graph`] made.
    pub async fn serve(host: &Arc<Host>, graph: Arc<Graph>) -> TestDisk {
        TestDisk::connect(Disk::serve(host, graph).await.unwrap())
    }

    /// Connects to the source `Client` of a disk.
    pub fn connect(disk: Arc<Disk>) -> TestDisk {
        let queue = Rc::new(Queue::default());
        let (served, stream) = (disk.clone(), queue.clone());
        tokio::task::spawn_local(async move {
            assert_ne!(serve(&served, "Client", &stream).await.unwrap(), Served::Ended);
        });
        TestDisk { disk, queue }
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        let graph = self.disk.graph();
        graph.below(graph.node("Client").unwrap()).unwrap().size
    }

    /// Sends a request; the reply comes when it is awaited or not.
    pub fn send(&self, req: Request) -> oneshot::Receiver<Reply> {
        let (tx, rx) = oneshot::channel();
        self.queue.waiting.borrow_mut().push_back((req, tx));
        if let Some(waker) = self.queue.waker.borrow_mut().take() {
            waker.wake();
        }
        rx
    }

    /// Sends a request and waits for its reply.
    pub async fn submit(&self, req: Request) -> Reply {
        self.send(req).await.unwrap()
    }

    /// Reads.
    pub async fn read(&self, offset: u64, len: u64) -> crate::Result<Vec<u8>> {
        let data = self.submit(Request::read(offset, len)).await?.into_data()?;
        assert_eq!(data.len() as u64, len, "a read answers as many bytes as were asked for");
        Ok(data.to_vec())
    }

    /// Writes.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> crate::Result<()> {
        self.submit(Request::write(offset, Data::copy_of(bytes))).await.map(drop)
    }

    /// Any request that answers nothing but success.
    pub async fn op(&self, op: Op, offset: u64, len: u64) -> crate::Result<()> {
        self.submit(Request::new(op, offset, len)).await.map(drop)
    }

    /// Extents of a range, as many answers as it takes.
    pub async fn extents(&self, offset: u64, len: u64) -> crate::Result<Vec<Extent>> {
        let mut found = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let asked = Request::new(Op::Extents, at, offset + len - at);
            for extent in self.submit(asked).await?.into_extents()? {
                at += extent.len;
                found.push(extent);
            }
        }
        Ok(crate::request::join_extents(found))
    }
}

/// Plays random operations of every kind against a plain vector: the disk must answer like it. Discarded
/// bytes may read as anything that a byte was, or zero; the model then takes what it reads.
///
/// `ops` operations are played with numbers from `seed`; a fifth of them are sent along with others,
/// without overlap.
pub async fn play_against_model(disk: &TestDisk, seed: u64, ops: usize) {
    let size = disk.size();
    let mut model = disk.read(0, size).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    for step in 0..ops {
        let offset = rng.u64(0..size);
        let len = match rng.u8(0..4) {
            0 => rng.u64(1..=size - offset),
            1 => rng.u64(1..=(size - offset).min(4096)),
            _ => rng.u64(1..=(size - offset).min(700)),
        };
        let range = offset as usize..(offset + len) as usize;
        let place = || format!("seed {seed}, step {step}, {offset}+{len}");
        match Op::ALL[rng.usize(0..Op::ALL.len())] {
            Op::Read => assert!(disk.read(offset, len).await.unwrap() == model[range], "read, {}", place()),
            Op::Write => {
                let mut bytes = vec![0; len as usize];
                rng.fill(&mut bytes);
                let mut req = Request::write(offset, Data::copy_of(&bytes));
                if rng.bool() {
                    req = req.with(crate::Flags::FUA);
                }
                assert!(matches!(disk.submit(req).await.unwrap(), Answer::Done));
                model[range].copy_from_slice(&bytes);
            }
            Op::WriteZeroes => {
                let mut req = Request::new(Op::WriteZeroes, offset, len);
                if rng.bool() {
                    req = req.with(crate::Flags::MAY_UNMAP);
                }
                disk.submit(req).await.unwrap();
                model[range].fill(0);
            }
            Op::Discard => {
                disk.op(Op::Discard, offset, len).await.unwrap();
                let found = disk.read(offset, len).await.unwrap();
                for (found, was) in found.iter().zip(&mut model[range]) {
                    assert!(*found == *was || *found == 0, "a discard made up bytes, {}", place());
                    *was = *found;
                }
            }
            Op::Flush => disk.op(Op::Flush, 0, 0).await.unwrap(),
            Op::Cache => disk.op(Op::Cache, offset, len).await.unwrap(),
            Op::Extents => {
                let mut at = offset as usize;
                for extent in disk.extents(offset, len).await.unwrap() {
                    let end = (at + extent.len as usize).min(model.len());
                    let zero = model[at..end].iter().all(|byte| *byte == 0);
                    assert!(!extent.state.zero || zero, "called zero but is not, {}", place());
                    at = end;
                }
                assert!(at as u64 >= offset + len, "extents leave a gap, {}", place());
            }
            Op::Control => {
                let unknown = disk.op(Op::Control, 0, 0).await;
                assert!(unknown.is_err(), "a control request that nobody knows is refused");
            }
        }
    }
    assert!(disk.read(0, size).await.unwrap() == model, "seed {seed}: the disk at the end");
}
