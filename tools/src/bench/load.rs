//! The load generator: a stream of requests as deep as it was told to be.

use blockmason::data::Data;
use blockmason::describe::{ElementType, Family, Ports};
use blockmason::sched::{Admit, Stream, serve};
use blockmason::{Cx, Disk, Element, Error, Flags, Flow, Host, Reply, Request, Result};
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::sync::watch;

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Pattern {
    /// Blocks of the whole disk, in no order.
    Random,
    /// One block after the other; each stream starts at its own share of the disk.
    Sequential,
}

/// What one stream does. Lengths in bytes.
pub(super) struct Job {
    pub(super) block: u64,
    /// Whole blocks that the disk has, at least one.
    pub(super) blocks: u64,
    /// Where a sequential stream starts.
    pub(super) first: u64,
    pub(super) depth: u32,
    pub(super) pattern: Pattern,
    pub(super) read_percent: u8,
    pub(super) fua: bool,
    /// Each block once, then the stream ends.
    pub(super) once: bool,
    pub(super) seed: u64,
}

/// Stands in the place of an export.
pub(super) struct Load;

impl Element for Load {
    fn submit<'a>(&'a self, _req: Request, _cx: Cx<'a>) -> Flow<'a> {
        Flow::fail(Error::internal("nothing leads to a load generator"))
    }
}

/// The type of what stands in the place of an export.
pub(super) static LOAD: ElementType = ElementType {
    name: "load",
    summary: "sends requests to measure what lies below",
    family: Family::Export,
    ports: Ports::SOURCE,
    passes_through: true,
    build: |_| Ok(Arc::new(Load)),
    ..ElementType::BASE
};

/// Tells the streams to stop, and knows how many are left.
pub(super) struct Phase {
    stopped: AtomicBool,
    running: watch::Sender<usize>,
}

impl Default for Phase {
    fn default() -> Phase {
        Phase { stopped: AtomicBool::new(false), running: watch::Sender::new(0) }
    }
}

impl Phase {
    /// No stream makes new requests from now on.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Resolves when every stream that was started has ended.
    pub(super) async fn ended(&self) {
        // The sender is this phase's own, so the channel is open.
        let _ = self.running.subscribe().wait_for(|running| *running == 0).await;
    }
}

/// Counts as a running stream while it lives.
struct Running(Arc<Phase>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| *running -= 1);
    }
}

/// Starts a stream that enters at `source`.
pub(super) fn start(
    host: &Host,
    disk: &Arc<Disk>,
    source: String,
    job: Job,
    phase: &Arc<Phase>,
) -> Result<()> {
    phase.running.send_modify(|running| *running += 1);
    let (running, disk, phase) = (Running(phase.clone()), disk.clone(), phase.clone());
    host.spawn_stream(move || async move {
        let generator = Generator::new(job, phase);
        if let Err(error) = serve(&disk, &source, &generator).await {
            tracing::error!("{source}: {error}");
        }
        drop((disk, running));
    })
}

struct Generator {
    job: Job,
    phase: Arc<Phase>,
    rng: RefCell<fastrand::Rng>,
    /// How many requests there have been.
    sent: Cell<u64>,
    /// From block to block where each is to be asked for once in no order: has no divisor in common with their number.
    stride: u64,
    in_flight: Cell<u32>,
    /// What is written.
    data: Data,
}

impl Generator {
    fn new(job: Job, phase: Arc<Phase>) -> Generator {
        let mut rng = fastrand::Rng::with_seed(job.seed);
        let mut bytes = vec![0; if job.read_percent < 100 { job.block as usize } else { 0 }];
        rng.fill(&mut bytes);
        Generator {
            phase,
            rng: RefCell::new(rng),
            sent: Cell::new(0),
            stride: stride(job.blocks),
            in_flight: Cell::new(0),
            data: Data::shared(bytes),
            job,
        }
    }

    fn request(&self) -> Request {
        let mut rng = self.rng.borrow_mut();
        let Job { block, blocks, first, pattern, read_percent, fua, once, .. } = self.job;
        let sent = self.sent.replace(self.sent.get() + 1);
        let offset = block
            * match pattern {
                Pattern::Random if once => {
                    (u128::from(sent) * u128::from(self.stride) % u128::from(blocks)) as u64
                }
                Pattern::Random => rng.u64(0..blocks),
                Pattern::Sequential => (first + sent) % blocks,
            };
        if read_percent == 100 || rng.u8(0..100) < read_percent {
            return Request::read(offset, block);
        }
        let write = Request::write(offset, self.data.clone());
        if fua { write.with(Flags::FUA) } else { write }
    }

    fn is_over(&self) -> bool {
        self.phase.stopped.load(Ordering::Relaxed) || self.job.once && self.sent.get() == self.job.blocks
    }
}

/// A number, somewhat more than half as large, that has no divisor in common with this one.
fn stride(blocks: u64) -> u64 {
    let divisor = |mut a: u64, mut b: u64| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    // Golden section: what follows on each other lies far apart.
    let from = (blocks as f64 * 0.618) as u64;
    (from.max(1)..).find(|stride| divisor(*stride, blocks) == 1).unwrap_or(1)
}

impl Stream for Generator {
    type Tag = ();

    fn poll_next(&self, _task: &mut Context<'_>) -> Poll<Admit<()>> {
        if self.is_over() {
            return Poll::Ready(Admit::End);
        }
        // With the depth in flight the next reply polls this again.
        if self.in_flight.get() >= self.job.depth {
            return Poll::Pending;
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Poll::Ready(Admit::Request((), self.request()))
    }

    fn reply(&self, (): (), _reply: Reply) {
        // The framework counts it, an error too.
        self.in_flight.set(self.in_flight.get() - 1);
    }

    fn poll_flush(&self, _task: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_block_is_asked_for_once() {
        for blocks in [1, 2, 7, 4096, 30_030] {
            let job = Job {
                block: 512,
                blocks,
                first: 0,
                depth: 1,
                pattern: Pattern::Random,
                read_percent: 100,
                fua: false,
                once: true,
                seed: 1,
            };
            let generator = Generator::new(job, Arc::default());
            let mut seen = HashSet::new();
            while !generator.is_over() {
                assert!(seen.insert(generator.request().offset / 512));
            }
            assert_eq!(seen.len() as u64, blocks);
        }
    }
}
