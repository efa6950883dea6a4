//! Crashes at every moment, of power and of the process, of a cache on an SSD that writes back.

use super::*;
use blockmason::testing::run;
use blockmason::{Connection, Instance};
use std::time::Duration;

const SIZE: u64 = 40 * 512 + 100;

/// What lies below the cache.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Far {
    /// A store that commits what comes between two flushes.
    Commits,
    /// A disk that tears and reorders what has not been flushed.
    Tears,
}

/// A cache with a small ring and a few lines, on a disk that can lose its power.
fn text(seed: u64, far: Far) -> String {
    let (delay, jitter) = [("0s", "0s"), ("1ms", "3ms")][seed as usize % 2];
    let (dirty, time) = [("64k", "5s"), ("20k", "3ms"), ("64k", "1ms")][seed as usize % 3];
    let far = match far {
        Far::Commits => "store",
        Far::Tears => "volatile",
    };
    format!(
        "element C (type cached) (path /none) (size 130k) (line 4k) (log 64k) (mode write_back) (dirty {dirty}) \
         (dirty_time {time}) (read_ahead 0) \
         element P (type plug) element Q (type plug) \
         element D (type {far}) (size {SIZE}) element L (type volatile) (size 130k) (seed {seed}) \
         element S (type delay) (write {delay}) (jitter {jitter}) element T (type delay) (all {delay}) (jitter {jitter}) \
         (C, out) -> S S -> P P -> D (C, ssd) -> T T -> Q Q -> L"
    )
}

/// Makes a graph in which only the disks are those of `before`; the SSD is another one if it was lost. What is left of the
/// life before waits behind its pulled plugs for ever.
fn reborn(host: &Arc<Host>, before: &Graph, text: &str, lost: bool) -> Arc<Graph> {
    let fresh = graph(host, *TYPES, text, "C").unwrap();
    let new = |name: &str| name != "D" && (name != "L" || lost);
    let find = |name: &str| before.instances().find(|instance| instance.name == name).unwrap().clone();
    let instances: Vec<Arc<Instance>> = fresh
        .instances()
        .map(|instance| if new(&instance.name) { instance.clone() } else { find(&instance.name) })
        .collect();
    let place = |name: &str| instances.iter().position(|instance| instance.name == name).unwrap();
    let edges = [
        ("C", "out", "S"),
        ("S", "out", "P"),
        ("P", "out", "D"),
        ("C", "ssd", "T"),
        ("T", "out", "Q"),
        ("Q", "out", "L"),
        ("Client", "out", "C"),
    ];
    let edges =
        edges.map(|(from, port, to)| Connection { from: place(from), port: port.into(), to: place(to) });
    Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap())
}

async fn turns(count: usize) {
    for _ in 0..count {
        tokio::task::yield_now().await;
    }
}

/// A change that a test has sent, and whether it has been answered.
struct Sent {
    range: Range<usize>,
    byte: u8,
    fua: bool,
    reply: oneshot::Receiver<Reply>,
    done: bool,
}

/// What a client knows: every state of the disk so far, and what it has sent since the last start.
struct Client {
    disk: TestDisk,
    /// The last one is that at the start.
    states: Vec<Vec<u8>>,
    sent: Vec<Sent>,
    flushes: Vec<(usize, oneshot::Receiver<Reply>)>,
    /// Changes that are there after any crash; after the death of this process.
    flushed: usize,
    answered: usize,
}

impl Client {
    fn new(disk: TestDisk, states: Vec<Vec<u8>>) -> Client {
        Client { disk, states, sent: Vec::new(), flushes: Vec::new(), flushed: 0, answered: 0 }
    }

    /// Sends a change, and lets it take its place in the log.
    async fn change(&mut self, rng: &mut fastrand::Rng) {
        let start = rng.usize(0..SIZE as usize);
        let longest = [200, 1500, 8000][rng.usize(0..3)].min(SIZE as usize - start);
        let range = start..start + rng.usize(1..=longest);
        let byte = rng.u8(1..);
        let (req, byte) = match rng.u8(0..8) {
            0 => (Request::new(Op::WriteZeroes, range.start as u64, range.len() as u64), 0),
            1 => (Request::new(Op::Discard, range.start as u64, range.len() as u64), 0),
            _ => (Request::write(range.start as u64, Data::copy_of(&vec![byte; range.len()])), byte),
        };
        let fua = rng.u8(0..10) == 0;
        let req = if fua { req.with(Flags::FUA) } else { req };
        let reply = self.disk.send(req);
        self.sent.push(Sent { range, byte, fua, reply, done: false });
        turns(2).await;
    }

    fn flush(&mut self) {
        self.look();
        self.flushes.push((self.answered, self.disk.send(Request::flush())));
    }

    /// Takes the replies that are here.
    fn look(&mut self) {
        for (ix, sent) in self.sent.iter_mut().enumerate().filter(|(_, sent)| !sent.done) {
            if let Ok(reply) = sent.reply.try_recv() {
                reply.unwrap();
                sent.done = true;
                self.answered = self.answered.max(ix + 1);
                if sent.fua {
                    self.flushed = self.flushed.max(ix + 1);
                }
            }
        }
        for (covers, reply) in &mut self.flushes {
            if let Ok(reply) = reply.try_recv() {
                reply.unwrap();
                self.flushed = self.flushed.max(*covers);
            }
        }
    }

    /// The disk after each number of changes since the start.
    fn since(&self) -> Vec<Vec<u8>> {
        let mut states = vec![self.states.last().unwrap().clone()];
        for sent in &self.sent {
            let mut next = states.last().unwrap().clone();
            next[sent.range.clone()].fill(sent.byte);
            states.push(next);
        }
        states
    }

    /// What has become of the disk, which must be one of its states, late enough: all of them up to it.
    fn after(&self, found: &[u8], at_least: usize, place: &str) -> Vec<Vec<u8>> {
        let since = self.since();
        let Some(at) = since.iter().rposition(|state| state == found) else {
            let wrong = (0..found.len()).filter(|ix| found[*ix] != since[since.len() - 1][*ix]);
            panic!("{place}: no prefix, {} bytes are not as at the end", wrong.count());
        };
        assert!(at >= at_least, "{place}: {at} of {} changes, at least {at_least}", self.sent.len());
        let mut states = self.states.clone();
        states.extend_from_slice(&since[1..=at]);
        states
    }
}

/// What a crash takes away.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Crash {
    Process,
    Power,
    /// The SSD.
    Ssd,
}

/// Pulls the plugs; takes the power from what is on this machine.
fn crash(graph: &Graph, what: Crash, far: Far) {
    for name in ["P", "Q"] {
        element(graph, name).call("pull", "").unwrap();
    }
    if what != Crash::Process {
        element(graph, "L").call("cut", "").unwrap();
    }
    // A store loses what has not been committed with its client, whatever that dies of; a disk loses it with the power.
    if what != Crash::Process || far == Far::Commits {
        element(graph, "D").call("cut", "").unwrap();
    }
}

async fn restart(host: &Arc<Host>, before: &TestDisk, text: &str, lost: bool) -> TestDisk {
    let graph = before.disk.graph();
    for name in ["D", "L"] {
        element(&graph, name).call("restore", "").unwrap();
    }
    let disk = TestDisk::serve(host, reborn(host, &graph, text, lost)).await;
    turns(1).await;
    disk
}

fn committed(graph: &Graph) -> Vec<u8> {
    let store = element(graph, "D");
    let store: &Store = (&*store as &dyn std::any::Any).downcast_ref().unwrap();
    lock(&store.0).committed.clone()
}

/// Lives of one disk that all end in a crash. Returns how many crashes lost a change.
async fn lives(host: &Arc<Host>, seed: u64, what: Crash, far: Far) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed);
    let text = text(seed, far);
    let disk = TestDisk::new(host, *TYPES, &text, "C").await.unwrap();
    let found = disk.read(0, SIZE).await.unwrap();
    let mut client = Client::new(disk, vec![found]);
    let mut missing = 0;
    for life in 0..3 {
        for _ in 0..rng.usize(1..50) {
            match rng.u8(0..9) {
                0 => client.flush(),
                1 => drop(client.disk.send(Request::read(rng.u64(0..SIZE - 3000), 3000))),
                2 if seed.is_multiple_of(2) => turns(rng.usize(0..30)).await,
                2 => blockmason::rt::sleep(Duration::from_micros(rng.u64(0..5000))).await,
                _ => client.change(&mut rng).await,
            }
        }
        let most = [1, 6, 60][rng.usize(0..3)];
        turns(rng.usize(0..most)).await;
        if seed % 2 == 1 {
            blockmason::rt::sleep(Duration::from_micros(rng.u64(0..100) * most as u64)).await;
        }
        client.look();
        let place = format!("seed {seed}, life {life}, {what:?}, {far:?}");
        crash(&client.disk.disk.graph(), what, far);
        if far == Far::Commits {
            let below = committed(&client.disk.disk.graph());
            let known = client.states.contains(&below) || client.since().contains(&below);
            assert!(known, "{place}: the disk below is no prefix");
        }
        let mut disk = restart(host, &client.disk, &text, what == Crash::Ssd).await;
        // Sometimes it crashes again while it opens or brings changes below.
        while what != Crash::Ssd && rng.u8(0..3) == 0 {
            turns(rng.usize(0..80)).await;
            if seed % 2 == 1 {
                blockmason::rt::sleep(Duration::from_millis(rng.u64(0..50))).await;
            }
            crash(&disk.disk.graph(), what, far);
            disk = restart(host, &disk, &text, false).await;
        }
        let found = disk.read(0, SIZE).await.unwrap();
        if what == Crash::Ssd {
            let known: Vec<_> = client.states.iter().cloned().chain(client.since()).collect();
            assert!(known.contains(&found), "{place}: the disk below is no prefix");
            client = Client::new(disk, vec![found]);
            continue;
        }
        let at_least = if what == Crash::Power { client.flushed } else { client.answered };
        let states = client.after(&found, at_least, &place);
        missing += usize::from(found != *client.since().last().unwrap());
        client = Client::new(disk, states);
    }
    missing
}

fn all(what: Crash, far: Far) -> usize {
    (0..200).map(|seed| run(seed, async |host| lives(&host, seed, what, far).await)).sum()
}

#[test]
fn the_death_of_the_process_loses_nothing_that_was_answered() {
    let missing = all(Crash::Process, Far::Commits) + all(Crash::Process, Far::Tears);
    assert!(missing > 20, "only {missing} crashes lost anything: they test little");
}

#[test]
fn a_loss_of_power_leaves_a_prefix_that_reaches_to_the_last_flush() {
    let missing = all(Crash::Power, Far::Commits) + all(Crash::Power, Far::Tears);
    assert!(missing > 50, "only {missing} crashes lost anything: they test little");
}

#[test]
fn without_the_ssd_the_disk_below_is_what_it_was_at_a_flush() {
    all(Crash::Ssd, Far::Commits);
}
