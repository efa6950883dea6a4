//! The process: its shards, its control runtime, what its elements share.

use super::background::Background;
use super::cx::Lane;
use super::home::{Harbour, Post};
use super::{Hop, Shard, Sockets};
use crate::error::{Error, Result};
use crate::events::Events;
use crate::graph::Graph;
use crate::io::Ring;
use crate::request::{Reply, Request};
use futures::future::{Either, select};
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// How a host is laid out.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Threads of the data plane, at least 1. Default: the processors this process may use.
    pub shards: usize,
    /// Where state is kept.
    pub state_dir: PathBuf,
}

impl HostConfig {
    /// The defaults, with state kept in `state_dir`.
    pub fn new(state_dir: impl Into<PathBuf>) -> HostConfig {
        let shards = std::thread::available_parallelism().map_or(1, usize::from);
        HostConfig { shards, state_dir: state_dir.into() }
    }
}

/// A shard's stack, in bytes: room for the frames of the longest chain that the checker lets pass, in a
/// debug build too. Pages that are never touched cost nothing.
const STACK: usize = 16 << 20;

type Job = Box<dyn FnOnce(&Rc<Shard>) + Send>;

/// What serves.
pub struct Host {
    shards: Vec<ShardHandle>,
    state_dir: PathBuf,
    services: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
    events: Arc<Events>,
    sockets: Sockets,
    background: Background,
    next: AtomicUsize,
}

struct ShardHandle {
    jobs: mpsc::UnboundedSender<Job>,
    /// Streams that it serves now.
    streams: Arc<AtomicUsize>,
}

impl Host {
    /// Starts the shards. They end when the host is dropped.
    pub fn start(config: HostConfig) -> Result<Arc<Host>> {
        let post = Post::new(config.shards.max(1));
        let events = Arc::<Events>::default();
        let shards = (0..config.shards.max(1)).map(|id| start_shard(id, &post, &events));
        let shards = shards.collect::<Result<_>>()?;
        Ok(Arc::new(Host {
            shards,
            state_dir: config.state_dir,
            services: Mutex::default(),
            events,
            sockets: Sockets::default(),
            background: Background::default(),
            next: AtomicUsize::new(0),
        }))
    }

    /// A host whose only shard is the current thread, within a paused or plain runtime of a test.
    /// Its jobs run as local tasks of that runtime.
    #[cfg(any(test, feature = "testing"))]
    pub fn on_this_thread(seed: u64, state_dir: &Path) -> Arc<Host> {
        let events = Arc::<Events>::default();
        let harbour = Harbour::new(Post::new(1), 0);
        let shard = Shard::new(0, Some(seed), None, harbour, events.clone());
        std::mem::forget(shard.enter());
        let (jobs, queue) = mpsc::unbounded_channel();
        tokio::task::spawn_local(take_jobs(shard, queue));
        let handle = ShardHandle { jobs, streams: Arc::default() };
        Arc::new(Host {
            shards: vec![handle],
            state_dir: state_dir.to_owned(),
            services: Mutex::default(),
            events,
            sockets: Sockets::default(),
            background: Background::default(),
            next: AtomicUsize::new(0),
        })
    }

    /// How many shards there are.
    pub fn shards(&self) -> usize {
        self.shards.len()
    }

    /// Where state is kept.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// What happens that an operator wants to know of.
    pub fn events(&self) -> &Arc<Events> {
        &self.events
    }

    /// What listens, for a successor in another process.
    pub fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// The one `T` of this process, made when it is first asked for: what elements of one kind share.
    pub fn service<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let service = services
            .entry(TypeId::of::<T>())
            .or_insert_with(|| Arc::new(make()) as Arc<dyn Any + Send + Sync>);
        match service.clone().downcast() {
            Ok(service) => service,
            Err(_) => unreachable!("the map's key is the value's type"),
        }
    }

    /// Runs `job` on a shard, soon.
    pub fn on(&self, shard: usize, job: impl FnOnce(&Rc<Shard>) + Send + 'static) -> Result<()> {
        let sent = self.shards[shard % self.shards.len()].jobs.send(Box::new(job));
        sent.map_err(|_| Error::internal("a shard has ended"))
    }

    /// Runs `job` on every shard; returns when each has.
    pub async fn on_every(&self, job: impl Fn(&Rc<Shard>) + Clone + Send + 'static) -> Result<()> {
        let mut answers = Vec::new();
        for shard in 0..self.shards.len() {
            let (job, (tx, rx)) = (job.clone(), oneshot::channel());
            self.on(shard, move |shard| {
                job(shard);
                // Whoever asked may have gone.
                let _ = tx.send(());
            })?;
            answers.push(rx);
        }
        for answer in answers {
            answer.await.map_err(|_| Error::internal("a shard has ended"))?;
        }
        Ok(())
    }

    /// Returns when every shard has polled what was woken on it before.
    pub async fn turn(&self) -> Result<()> {
        let mut answers = Vec::new();
        for shard in 0..self.shards.len() {
            let (tx, rx) = oneshot::channel();
            self.spawn_on(shard, move || async move {
                // Who yields goes behind all that is ready; the first time that may be what has just come from
                // other threads.
                tokio::task::yield_now().await;
                tokio::task::yield_now().await;
                // Whoever asked may have gone.
                let _ = tx.send(());
            })?;
            answers.push(rx);
        }
        for answer in answers {
            answer.await.map_err(|_| Error::internal("a shard has ended"))?;
        }
        Ok(())
    }

    /// Runs a future on a shard, to its end.
    pub fn spawn_on<F>(&self, shard: usize, make: impl FnOnce() -> F + Send + 'static) -> Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        self.on(shard, move |_| drop(tokio::task::spawn_local(make())))
    }

    /// Runs a future that serves no request, on a thread beside the shards: it may start processes and use
    /// sockets of its own. What has not ended when the host is dropped is dropped too.
    pub fn background<F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        self.background.spawn(make)
    }

    /// Runs a future that serves a stream on the shard that serves the fewest.
    pub fn spawn_stream<F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        // Ties go round, so that idle shards take turns.
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let load = |ix: &usize| self.shards[ix % self.shards.len()].streams.load(Ordering::Relaxed);
        let shard = (first..first + self.shards.len()).min_by_key(load).unwrap_or(0) % self.shards.len();
        let streams = self.shards[shard].streams.clone();
        streams.fetch_add(1, Ordering::Relaxed);
        let counted = CountedStream(streams);
        self.spawn_on(shard, move || {
            let stream = make();
            async move {
                let _counted = counted;
                stream.await;
            }
        })
    }

    /// Sends one request of the framework's own into a graph, by an out port of one of its elements. The reply
    /// comes when what elements have detached for it has ended, too: a flush on a leg that lags, say.
    pub async fn submit(&self, graph: &Arc<Graph>, node: usize, port: usize, mut req: Request) -> Reply {
        let (tx, rx) = oneshot::channel();
        let graph = graph.clone();
        self.on(0, move |shard| {
            req.id = shard.next_id();
            req.root = req.id;
            let lane = Lane::new(graph, shard.clone());
            drop(tokio::task::spawn_local(async move {
                let (mut tx, changes) = (tx, req.op.changes_data());
                let run = std::pin::pin!(super::serve::run_one(&lane, node, port, req));
                let reply = match select(run, std::pin::pin!(tx.closed())).await {
                    Either::Left((reply, _)) => reply,
                    Either::Right(((), run)) => {
                        // Nobody waits for a flush or a read any more, and no graph need.
                        if !changes {
                            lane.only_left();
                        }
                        run.await
                    }
                };
                // Whoever asked may have gone.
                let _ = tx.send(reply);
            }));
        })?;
        rx.await.map_err(|_| Error::internal("an element panicked"))?
    }

    /// The flight recorders of all shards; each in the order in which its hops ended.
    pub async fn recorded(&self) -> Result<Vec<Hop>> {
        let hops = Arc::new(Mutex::new(Vec::new()));
        let to = hops.clone();
        self.on_every(move |shard| {
            to.lock().unwrap_or_else(PoisonError::into_inner).extend(shard.recorder.borrow().hops().cloned());
        })
        .await?;
        Ok(std::mem::take(&mut *hops.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

struct CountedStream(Arc<AtomicUsize>);

impl Drop for CountedStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn take_jobs(shard: Rc<Shard>, mut queue: mpsc::UnboundedReceiver<Job>) {
    while let Some(job) = queue.recv().await {
        job(&shard);
    }
}

fn start_shard(id: usize, post: &Arc<Post>, events: &Arc<Events>) -> Result<ShardHandle> {
    let (post, events) = (post.clone(), events.clone());
    let (jobs, queue) = mpsc::unbounded_channel();
    let (ready, started) = std::sync::mpsc::sync_channel(1);
    let body = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(Shard::submit)
            .build_local(tokio::runtime::LocalOptions::default());
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready.send(Err(error))),
        };
        runtime.block_on(async move {
            let ring = Ring::open(id);
            let shard = Shard::new(id, None, ring, Harbour::new(post, id), events);
            let _entered = shard.enter();
            if shard.ring().is_some() {
                tokio::task::spawn_local(Ring::reap(shard.clone()));
            }
            tokio::task::spawn_local(Harbour::ferry(shard.clone()));
            // The starter waits for this; it is not gone.
            let _ = ready.send(Ok(()));
            take_jobs(shard, queue).await;
        });
    };
    std::thread::Builder::new()
        .name(format!("shard-{id}"))
        .stack_size(STACK)
        .spawn(body)
        .map_err(|error| Error::io(error, "cannot start a thread"))?;
    match started.recv() {
        Ok(Ok(())) => Ok(ShardHandle { jobs, streams: Arc::default() }),
        Ok(Err(error)) => Err(Error::io(error, "cannot make a shard's runtime")),
        Err(_) => Err(Error::internal("a shard ended while it started")),
    }
}
