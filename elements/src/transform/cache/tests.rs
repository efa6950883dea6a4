//! What tests of the cache share: an element below it that holds, counts and refuses requests.

mod batches;
mod crash;
mod file;
mod policy;
mod races;
mod ram;

use super::*;
use blockmason::describe::{Catalogue, Outs};
use blockmason::lang::value::Size;
use blockmason::testing::{TestDisk, graph};
use blockmason::{Answer, Data, Graph, Host, Origin, Reply};
use std::cell::RefCell;
use std::collections::HashSet;
use std::sync::LazyLock;
use tokio::sync::oneshot;

/// What the `watch` of this thread has seen, and what it is to do.
#[derive(Default)]
struct Watching {
    seen: Vec<(Op, Origin, Range<u64>)>,
    /// Replies of these operations are held back.
    holds: Vec<Op>,
    held: Vec<oneshot::Sender<()>>,
    /// These operations fail, and reach nothing.
    fails: Vec<Op>,
}

thread_local! {
    static WATCHING: RefCell<Watching> = RefCell::default();
}

fn hold(ops: &[Op]) {
    WATCHING.with_borrow_mut(|watching| watching.holds = ops.to_vec());
}

/// Lets go of the replies that have been held back so far.
fn let_go() {
    let held = WATCHING.with_borrow_mut(|watching| std::mem::take(&mut watching.held));
    held.into_iter().for_each(|held| held.send(()).unwrap_or_default());
}

fn held() -> usize {
    WATCHING.with_borrow(|watching| watching.held.len())
}

fn fail(ops: &[Op]) {
    WATCHING.with_borrow_mut(|watching| watching.fails = ops.to_vec());
}

/// What has arrived since the last call.
fn seen() -> Vec<(Op, Origin, Range<u64>)> {
    WATCHING.with_borrow_mut(|watching| std::mem::take(&mut watching.seen))
}

/// Of that, the ranges of one operation.
fn ranges(op: Op) -> Vec<(u64, u64)> {
    seen().into_iter().filter(|(seen, ..)| *seen == op).map(|(.., range)| (range.start, range.end)).collect()
}

struct Watch;

impl Element for Watch {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let held = WATCHING.with_borrow_mut(|watching| {
            watching.seen.push((req.op, req.origin, req.offset..req.end()));
            if watching.fails.contains(&req.op) {
                return Err(());
            }
            Ok(watching.holds.contains(&req.op).then(|| {
                let (tx, rx) = oneshot::channel();
                watching.held.push(tx);
                rx
            }))
        });
        match held {
            Err(()) => cx.fail(&req, Error::new(Kind::Unavailable, "it fails for a test")),
            Ok(None) => cx.forward(0, req),
            Ok(Some(held)) => {
                let below = cx.forward(0, req);
                Flow::later(async move {
                    let reply = below.await;
                    let _ = held.await;
                    reply
                })
            }
        }
    }
}

static WATCH: ElementType = ElementType {
    name: "watch",
    family: Family::Fault,
    passes_through: true,
    build: |_| Ok(Arc::new(Watch)),
    ..ElementType::BASE
};

thread_local! {
    /// The plugs that have been pulled: `Q`, or only for one operation, `Q write`, or for the next one, `Q write once`.
    static PULLED: RefCell<HashSet<String>> = RefCell::default();
}

fn pull(names: &[&str]) {
    PULLED.with_borrow_mut(|pulled| pulled.extend(names.iter().map(|name| name.to_string())));
}

fn plug_in() {
    PULLED.take();
}

/// Lets nothing through once it has been pulled: what stands above it is dead to what lies below.
struct Plug(String, AtomicBool);

impl Element for Plug {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let one = format!("{} {}", self.0, req.op);
        let once = PULLED.with_borrow_mut(|pulled| pulled.remove(&format!("{one} once")));
        let dead = once || self.1.load(Ordering::Relaxed);
        if dead || PULLED.with_borrow(|pulled| pulled.contains(&self.0) || pulled.contains(&one)) {
            return cx.fail(&req, Error::new(Kind::Io, "the plug has been pulled"));
        }
        cx.forward(0, req)
    }

    /// This one is pulled for good.
    fn call(&self, _handler: &str, _argument: &str) -> Result<String> {
        self.1.store(true, Ordering::Relaxed);
        Ok(String::new())
    }
}

static PLUG: ElementType = ElementType {
    name: "plug",
    family: Family::Fault,
    passes_through: true,
    build: |build| Ok(Arc::new(Plug(build.name.to_owned(), AtomicBool::new(false)))),
    ..ElementType::BASE
};

/// A far disk that keeps what is written back to itself until it is flushed, and then has all of it or nothing. It
/// outlives every crash.
struct Store(Mutex<Far>);

#[derive(Default)]
struct Far {
    committed: Vec<u8>,
    pending: Vec<(Range<u64>, Option<Data>)>,
    commits: u64,
    others: u64,
}

impl Far {
    fn put(bytes: &mut [u8], (range, data): &(Range<u64>, Option<Data>)) {
        let to = &mut bytes[range.start as usize..range.end as usize];
        match data {
            Some(data) => data.copy_to(to),
            None => to.fill(0),
        }
    }

    /// What is there now, if all goes well.
    fn now(&self) -> Vec<u8> {
        let mut bytes = self.committed.clone();
        self.pending.iter().for_each(|change| Far::put(&mut bytes, change));
        bytes
    }
}

impl Element for Store {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        let size = lock(&self.0).committed.len() as u64;
        Ok(Prepared::of(Geometry { ops: Ops::ALL, needs_flush: true, ..Geometry::new(size) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let mut far = lock(&self.0);
        let range = req.offset..req.end();
        match req.op {
            Op::Read => {
                let bytes = far.now()[range.start as usize..range.end as usize].to_vec();
                return Flow::Now(Ok(Answer::Data(Data::from(bytes))));
            }
            Op::Write | Op::WriteZeroes | Op::Discard => {
                let change = (range, (req.op == Op::Write).then(|| req.data.stable()));
                match req.origin {
                    Origin::WriteBack => far.pending.push(change),
                    _ => Far::put(&mut far.committed, &change),
                }
            }
            Op::Flush => {
                far.committed = far.now();
                far.pending.clear();
                far.commits += 1;
            }
            Op::Extents | Op::Cache => {}
            Op::Control => {
                let verb = req.extra.as_ref().and_then(|extra| extra.control.clone()).unwrap_or_default().0;
                if verb == "generation" {
                    return Flow::Now(Ok(Answer::Text(format!("{} {}", far.others, far.commits))));
                }
                return cx.fail(&req, Error::unsupported("it knows no such thing"));
            }
        }
        Flow::done()
    }

    /// `lose` what is pending, or be written by `others`, or made larger by them.
    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        let mut far = lock(&self.0);
        match handler {
            "lose" | "cut" => far.pending.clear(),
            "others" => far.others += 1,
            "grow" => {
                far.others += 1;
                far.committed.resize(argument.parse().unwrap(), 0);
            }
            _ => {}
        }
        Ok(String::new())
    }
}

static STORE: ElementType = ElementType {
    name: "store",
    family: Family::Sink,
    ports: Ports::SINK,
    build: |build| {
        let size = build.params.get("size").unwrap()[0].text().parse::<Size>().unwrap().0;
        Ok(Arc::new(Store(Mutex::new(Far { committed: vec![0; size as usize], ..Far::default() }))))
    },
    ..ElementType::BASE
};

/// A cache whose SSD is the disk at its second port, so that its power can be cut.
static CACHED: ElementType = ElementType {
    name: "cached",
    ports: Ports { input: true, out: Outs::Named(&["out", "ssd"]) },
    build: |build| {
        let cache = Cache::new(build.read(Params::sound)?, build.graph)?;
        let size = cache.params.size.unwrap().0;
        assert!(cache.ssd()?.media.set(ssd::Media::Port(size)).is_ok());
        Ok(Arc::new(Handle(Arc::new(cache))))
    },
    ..TYPE
};

static TYPES: LazyLock<Catalogue> = LazyLock::new(|| {
    let own = [&WATCH, &PLUG, &STORE, &CACHED];
    Vec::leak(crate::ALL.iter().copied().chain(own).collect())
});

/// A cache `C` above a `watch` above a sink.
async fn disk(host: &Arc<Host>, cache: &str, sink: &str) -> (TestDisk, Arc<dyn Element>) {
    let text = format!("element C (type cache) {cache} element W (type watch) element S {sink} C -> W -> S");
    let graph = graph(host, *TYPES, &text, "C").unwrap_or_else(|error| panic!("{error}"));
    let element = element(&graph, "C");
    WATCHING.take();
    (TestDisk::serve(host, graph).await, element)
}

fn element(graph: &Graph, name: &str) -> Arc<dyn Element> {
    graph.instances().find(|instance| instance.name == name).unwrap().element.clone()
}

fn cache_of(element: &Arc<dyn Element>) -> Arc<Cache> {
    let handle: &Handle = (&**element as &dyn std::any::Any).downcast_ref().unwrap();
    handle.0.clone()
}

fn number(element: &Arc<dyn Element>, handler: &str) -> u64 {
    element.get(handler).unwrap().parse().unwrap()
}

async fn settle() {
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
}

async fn answered(reply: oneshot::Receiver<Reply>) -> Vec<u8> {
    reply.await.unwrap().unwrap().into_data().unwrap().to_vec()
}
