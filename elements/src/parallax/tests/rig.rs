//! A volume over elements that fail or hold what passes, and the disk below them by itself.

use super::super::below::Below;
use super::super::format::{BLOCK, Body, SLOTS};
use super::super::merge::span;
use super::super::nodes::{Place, Tree};
use super::super::open::{Opening, open_newest};
use super::super::pool::Pool;
use super::kit::{PLUG, find, read_all};
use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::testing::{TestDisk, graph};
use blockmason::{
    Connection, Cx, Element, Error, Extra, Flow, Graph, Host, Instance, Op, Reply, Request, Result,
};
use futures::executor::block_on;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use tokio::sync::{Notify, oneshot};

/// Holds the next request of one operation that touches one block, until it is told to let it go.
#[derive(Default)]
struct Hold {
    what: Mutex<Option<(Op, u64)>>,
    changed: Notify,
    held: AtomicUsize,
}

impl Hold {
    fn catches(&self, req: &Request) -> bool {
        let mut what = self.what.lock().unwrap();
        let caught = what.take_if(|(op, block)| {
            req.op == *op && req.offset < (*block + 1) * BLOCK && req.end() > *block * BLOCK
        });
        caught.is_some()
    }
}

impl Element for Hold {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !self.catches(&req) {
            return cx.forward(0, req);
        }
        self.held.fetch_add(1, Ordering::Relaxed);
        cx.later(&req.clone(), async move {
            self.changed.notified().await;
            self.held.fetch_sub(1, Ordering::Relaxed);
            cx.forward(0, req).await
        })
    }

    /// How many it holds.
    fn get(&self, _handler: &str) -> Result<String> {
        Ok(self.held.load(Ordering::Relaxed).to_string())
    }

    /// `read 17` holds the next read of that block; nothing lets it go.
    fn call(&self, _handler: &str, argument: &str) -> Result<String> {
        match argument.split_once(' ') {
            Some((op, block)) => {
                let op = Op::ALL.into_iter().find(|known| known.name() == op).unwrap();
                *self.what.lock().unwrap() = Some((op, block.parse().unwrap()));
            }
            None => self.changed.notify_one(),
        }
        Ok(String::new())
    }
}

pub(super) static HOLD: ElementType = ElementType {
    name: "hold",
    family: Family::Fault,
    passes_through: true,
    build: |_| Ok(Arc::new(Hold::default())),
    ..ElementType::BASE
};

pub(super) static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&PLUG, &HOLD]).collect()));

pub(super) struct Rig {
    host: Arc<Host>,
    text: String,
    /// All elements, from the top.
    names: Vec<String>,
    graph: Arc<Graph>,
    pub(super) disk: TestDisk,
    /// The disk below, past everything that is above it.
    pub(super) below: TestDisk,
}

impl Rig {
    /// A volume `v` with these parameters, over these elements, over that disk.
    pub(super) async fn new(host: &Arc<Host>, volume: &str, way: &[&str], disk: &str) -> Rig {
        let elements: Vec<String> = way.iter().map(|element| (*element).to_owned()).collect();
        let mut elements = [vec![format!("R (type radix) (volume v) {volume}")], elements].concat();
        elements.extend(["P (type plug)".to_owned(), format!("D {disk}")]);
        let name = |element: &String| element.split(' ').next().unwrap().to_owned();
        let names: Vec<String> = elements.iter().map(name).collect();
        let text: String = elements.iter().map(|element| format!("element {element} ")).collect();
        let text = format!("{text} {}", names.join(" -> "));
        let graph = graph(host, *TYPES, &text, "R").unwrap();
        let below = below(host, &text, &find(&graph, "D"), *TYPES).await;
        let disk = TestDisk::serve(host, graph.clone()).await;
        Rig { host: host.clone(), text, names, graph, disk, below }
    }

    /// The process dies; a new one serves what the disk has. Its elements are new, too.
    pub(super) async fn reopen(&mut self) {
        self.element("P").call("pull", "").unwrap();
        let fresh = graph(&self.host, *TYPES, &self.text, "R").unwrap();
        let sink = find(&self.graph, "D");
        let instance = |instance: &Arc<Instance>| match instance.name == "D" {
            true => sink.clone(),
            false => instance.clone(),
        };
        let instances: Vec<_> = fresh.instances().map(instance).collect();
        let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
        let row: Vec<&str> = ["Client"].into_iter().chain(self.names.iter().map(String::as_str)).collect();
        let edges = row.windows(2);
        let edges: Vec<_> = edges
            .map(|pair| Connection { from: place(pair[0]), port: "out".into(), to: place(pair[1]) })
            .collect();
        self.graph = Arc::new(Graph::assemble("test", &instances, &edges, self.host.shards()).unwrap());
        self.disk = TestDisk::serve(&self.host, self.graph.clone()).await;
    }

    /// The graph ends. False if it has failed.
    pub(super) async fn stop(&self) -> bool {
        let _ = self.disk.disk.stop().await;
        !self.graph.is_failed()
    }

    pub(super) fn element(&self, name: &str) -> Arc<dyn Element> {
        find(&self.graph, name).element.clone()
    }

    /// What is not durable is lost, or not.
    pub(super) fn lose_power(&self) {
        self.element("D").call("lose_power", "").unwrap();
    }

    /// A handler of one of the elements is set.
    pub(super) fn set(&self, name: &str, handler: &str, value: &str) {
        self.element(name).set(handler, value).unwrap();
    }

    pub(super) fn control(&self, verb: &str, argument: &str) -> oneshot::Receiver<Reply> {
        let mut req = Request::new(Op::Control, 0, 0);
        let control = Some((verb.to_owned(), argument.to_owned()));
        req.extra = Some(Box::new(Extra { control, ..Extra::default() }));
        self.disk.send(req)
    }

    pub(super) async fn checkpoint(&self) -> Result<()> {
        self.control("checkpoint", "").await.unwrap().map(drop)
    }

    pub(super) async fn flush(&self) -> Result<()> {
        self.disk.op(Op::Flush, 0, 0).await
    }

    /// Fills blocks.
    pub(super) async fn fill(&self, first: u64, blocks: u64, byte: u8) -> Result<()> {
        self.disk.write(first * BLOCK, &vec![byte; (blocks * BLOCK) as usize]).await
    }

    /// What a block is filled with.
    pub(super) async fn filled(&self, block: u64) -> Result<u8> {
        let found = self.disk.read(block * BLOCK, BLOCK).await?;
        assert!(found.iter().all(|byte| *byte == found[0]), "block {block} is torn");
        Ok(found[0])
    }

    /// A copy of what the disk has.
    pub(super) async fn image(&self) -> File {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        file.set_len(self.below.size()).unwrap();
        for at in (0..self.below.size()).step_by(1 << 20) {
            let bytes = self.below.read(at, 1 << 20).await.unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes, at).unwrap();
            }
        }
        file
    }

    /// Looks at what another process would find.
    pub(super) async fn look<T>(&self, look: impl FnOnce(&Arc<Pool>, Below<'_>) -> T) -> T {
        let image = self.image().await;
        let below = Below::Plain(image.as_fd());
        let opening = Opening::read_only(1 << 20);
        let pool = block_on(open_newest(opening, image.metadata().unwrap().len(), below)).unwrap();
        look(&Arc::new(pool), below)
    }

    /// The blocks of both copies of a leaf of the volume, as the newest root has it.
    pub(super) async fn leaf(&self, index: u64) -> [u64; 2] {
        self.look(|pool, below| leaf(pool, index, below)).await
    }

    /// What another process would find in a snapshot.
    pub(super) async fn snapshot(&self, name: &str, blocks: usize) -> Option<Vec<u8>> {
        self.look(|pool, below| {
            let number = pool.core().find("v", Some(name)).ok()?;
            Some(read_all(pool, number, blocks, below))
        })
        .await
    }

    /// `H` holds the next request of that kind from now on.
    pub(super) fn hold(&self, op: Op, block: u64) {
        self.element("H").call("hold", &format!("{op} {block}")).unwrap();
    }

    /// Everything that can go on has done so, and `H` holds something.
    pub(super) async fn stands(&self) {
        // Time goes on when everything waits.
        blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        assert_eq!(self.element("H").get("held").unwrap(), "1", "nothing is held");
    }

    pub(super) fn let_go(&self) {
        self.element("H").call("let_go", "").unwrap();
    }

    /// Inverts a byte of the disk.
    pub(super) async fn damage(&self, at: u64) {
        let byte = self.below.read(at, 1).await.unwrap()[0];
        self.below.write(at, &[!byte]).await.unwrap();
    }
}

fn leaf(pool: &Pool, index: u64, below: Below<'_>) -> [u64; 2] {
    let (mut ptr, mut level) = {
        let core = pool.core();
        let entry = &core.catalog[&core.find("v", None).unwrap()];
        (entry.root, entry.height)
    };
    while level > 0 {
        let place = Place { tree: Tree::Volume(pool.format), ptr, level, index: index / span(level) };
        let node = block_on(pool.nodes.get(&place, below)).unwrap();
        let Body::Inner(children) = &node.body else { panic!("an inner node was expected") };
        (ptr, level) = (children[(index / span(level - 1)) as usize % SLOTS], level - 1);
    }
    assert!(!ptr.is_hole(), "leaf {index} is not in the tree");
    ptr.at
}

/// A disk that is the bottom of others.
pub(super) async fn below(host: &Arc<Host>, text: &str, sink: &Arc<Instance>, types: Catalogue) -> TestDisk {
    let fresh = graph(host, types, text, "D").unwrap();
    let client = find(&fresh, "Client");
    let edges = [Connection { from: 0, port: "out".into(), to: 1 }];
    let graph = Graph::assemble("below", &[client, sink.clone()], &edges, host.shards()).unwrap();
    TestDisk::serve(host, Arc::new(graph)).await
}

/// The error that a request must have ended with.
pub(super) fn failure<T>(reply: Result<T>) -> Error {
    reply.err().expect("it should have failed")
}
