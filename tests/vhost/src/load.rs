//! A load for measurements: one thread a queue, as a guest has a processor a queue, each keeping so many requests
//! in flight.

mod libblkio;
mod plain;

use crate::measure::{Histogram, cpu_of};
use std::path::PathBuf;
use std::time::Duration;

/// What is done.
#[derive(Clone, Debug)]
pub struct Job {
    /// The export's socket.
    pub socket: PathBuf,
    /// Queues, and threads.
    pub queues: usize,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// Bytes of a request, a multiple of 512.
    pub block: usize,
    /// Writes instead of reads.
    pub write: bool,
    /// One offset after the other instead of random ones.
    pub sequential: bool,
    /// For how long.
    pub time: Duration,
    /// Looks at the used ring again and again instead of waiting to be called.
    pub poll: bool,
    /// Bytes of the disk that are used; all of it without.
    pub span: Option<u64>,
    /// Which driver.
    pub client: Client,
    /// Whose processor time is counted.
    pub server: Option<u32>,
    /// For how long the guest does nothing afterwards.
    pub idle: Duration,
}

/// Whose rings and connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Those of the crate `virtio-driver`, which libblkio uses. Its rings lie in a memfd that cannot be sealed.
    Libblkio,
    /// Those of this crate's tests: everything lies in one sealed memfd, at addresses that are not the process's.
    Plain,
}

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Requests that were answered.
    pub requests: u64,
    /// Of these, those that failed.
    pub errors: u64,
    /// From the first to the last.
    pub time: Duration,
    /// Times that the device was told of something.
    pub kicks: u64,
    /// Times that the guest waited.
    pub waits: u64,
    /// How long requests took.
    pub latencies: Histogram,
    /// Processor time of the server, where one was named.
    pub server_cpu: Option<Duration>,
    /// Processor time of the server while the guest did nothing afterwards.
    pub server_idle_cpu: Option<Duration>,
    /// Processor time of this process.
    pub client_cpu: Duration,
}

/// A queue with a buffer for each request in flight, numbered from 0.
trait Queue: Send {
    /// Makes a request available, from or into the buffer of that number.
    fn submit(&mut self, buffer: usize, offset: u64);
    /// Tells the device of what was submitted, if it wants to be told. Returns whether it was.
    fn tell(&mut self) -> bool;
    /// The buffer of a request that was answered, and whether it succeeded.
    fn next(&mut self) -> Option<(usize, bool)>;
    /// Whether something was answered that was not taken.
    fn is_ready(&mut self) -> bool;
    /// Whether the device shall call when something is answered.
    fn want_call(&mut self, wanted: bool);
    /// Waits until the device calls.
    fn wait(&mut self);
}

/// A connection, its queues taken out.
trait Connection {
    /// The configuration space begins with the size of the disk in sectors.
    fn sectors(&self) -> Result<u64, String>;
    /// Ends it.
    fn close(self: Box<Self>) -> Result<(), String>;
}

type Opened = (Box<dyn Connection>, Vec<Box<dyn Queue>>);

/// Runs a job.
pub fn run(job: &Job) -> Result<Outcome, String> {
    let (connection, queues) = match job.client {
        Client::Libblkio => libblkio::open(job)?,
        Client::Plain => plain::open(job)?,
    };
    let span = job.span.unwrap_or(u64::MAX).min(connection.sectors()? * 512);
    let blocks = span / job.block as u64;
    if blocks == 0 {
        return Err(format!("{span} bytes have no room for a block"));
    }
    let (server, client) = (job.server.map(cpu_of), cpu_of(std::process::id()));
    let begun = crate::now();
    let mut queues = queues;
    let parts: Vec<Outcome> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (ix, queue) in queues.iter_mut().enumerate() {
            threads.push(scope.spawn(move || drive(job, &mut **queue, ix, blocks)));
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut outcome = Outcome { time: begun.elapsed(), ..Outcome::default() };
    for part in parts {
        outcome.requests += part.requests;
        outcome.errors += part.errors;
        outcome.kicks += part.kicks;
        outcome.waits += part.waits;
        outcome.latencies.add(&part.latencies);
    }
    outcome.server_cpu = job.server.map(|pid| cpu_of(pid).saturating_sub(server.unwrap()));
    outcome.client_cpu = cpu_of(std::process::id()).saturating_sub(client);
    outcome.server_idle_cpu = job.server.filter(|_| !job.idle.is_zero()).map(|pid| idle_cpu(pid, job.idle));
    drop(queues);
    connection.close()?;
    Ok(outcome)
}

/// Processor time of the server in a while without requests. What it does once to go to rest is over by then.
#[allow(clippy::disallowed_methods, reason = "another process does not follow a stopped clock")]
fn idle_cpu(server: u32, time: Duration) -> Duration {
    std::thread::sleep(Duration::from_millis(100));
    let before = cpu_of(server);
    std::thread::sleep(time);
    cpu_of(server).saturating_sub(before)
}

/// Keeps a queue busy until the time is over, and waits for what is in flight then.
fn drive(job: &Job, queue: &mut dyn Queue, ix: usize, blocks: u64) -> Outcome {
    let mut offsets = Offsets {
        rng: fastrand::Rng::with_seed(ix as u64),
        next: blocks * ix as u64 / job.queues as u64,
        sequential: job.sequential,
        blocks,
    };
    let mut outcome = Outcome::default();
    let mut idle: Vec<usize> = (0..job.depth).collect();
    let mut now = crate::now();
    let mut started = vec![now; job.depth];
    let end = now + job.time;
    queue.want_call(false);
    while now < end || idle.len() < job.depth {
        while now < end
            && let Some(buffer) = idle.pop()
        {
            started[buffer] = now;
            queue.submit(buffer, offsets.draw() * job.block as u64);
        }
        outcome.kicks += u64::from(queue.tell());
        outcome.waits += until_ready(queue, job.poll);
        // One look at the clock for a batch, as for what is submitted.
        now = crate::now();
        while let Some((buffer, well)) = queue.next() {
            outcome.requests += 1;
            outcome.errors += u64::from(!well);
            outcome.latencies.record(now - started[buffer]);
            idle.push(buffer);
        }
    }
    outcome
}

/// Until something is answered. Returns how often this thread waited for it.
fn until_ready(queue: &mut dyn Queue, poll: bool) -> u64 {
    let mut waits = 0;
    while !queue.is_ready() {
        if poll {
            std::hint::spin_loop();
            continue;
        }
        queue.want_call(true);
        if !queue.is_ready() {
            queue.wait();
            waits += 1;
        }
        queue.want_call(false);
    }
    waits
}

/// Which block comes next.
struct Offsets {
    rng: fastrand::Rng,
    next: u64,
    sequential: bool,
    blocks: u64,
}

impl Offsets {
    fn draw(&mut self) -> u64 {
        if !self.sequential {
            return self.rng.u64(..self.blocks);
        }
        let block = self.next;
        self.next = (block + 1) % self.blocks;
        block
    }
}
