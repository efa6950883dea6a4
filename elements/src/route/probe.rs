//! Counts what passes: operations, sizes, latencies, and where on the disk it goes.

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::graph::{Histogram, OpReading};
use blockmason::lang::value::Size;
use blockmason::{Children, Cx, Element, Error, Flow, Op, Prepared, Request, Result};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

blockmason::params! {
    /// Counts what passes.
    pub struct Params {}
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "probe",
    summary: "counts requests, sizes, latencies and where on the disk they go",
    doc: "Requests pass unmodified, and so do their replies; they are counted when the reply comes. Put \
          one where you want to know what goes by: below a cache it shows what the cache lets through.\n\n\
          The handlers give tables as text. Latencies are those of everything below. `heat` counts \
          requests by their first byte, in up to 64 equal stretches of the disk; a reload that changes \
          the disk's size starts it afresh, all else stays.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler {
            name: "counts",
            access: Access::Read,
            doc: "by operation: requests, bytes, errors, median and 99 % latency in us",
        },
        Handler { name: "sizes", access: Access::Read, doc: "by operation and size: requests up to it" },
        Handler { name: "latency", access: Access::Read, doc: "by operation and latency in us: requests" },
        Handler { name: "heat", access: Access::Read, doc: "by offset: requests from there to the next" },
        Handler { name: "reset", access: Access::Call, doc: "starts all counts from 0" },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:probe.sock)\n\
              element Probe (type probe)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Probe -> Disk\n",
    check: Params::check,
    build: |_: &Build<'_>| Ok(Arc::new(Probe::default())),
    ..ElementType::BASE
};

/// Sizes are counted by the power of two that they do not exceed.
const SIZES: usize = 64;

/// Stretches of the disk at the most.
const STRETCHES: usize = 64;

#[derive(Default)]
struct Probe {
    /// By shard. Only the shard itself writes to its counters, so that no addition is locked.
    shards: OnceLock<Box<[[Counters; Op::ALL.len()]]>>,
    /// The sums at the last reset, by operation.
    base: Mutex<Vec<Vec<u64>>>,
    /// The maps of the graphs that there are, the newest last.
    heats: Mutex<Vec<Weak<Heat>>>,
}

/// One operation's counters on one shard.
struct Counters {
    bytes: AtomicU64,
    errors: AtomicU64,
    sizes: [AtomicU64; SIZES],
    latency: Histogram,
}

impl Default for Counters {
    fn default() -> Counters {
        let zero = || AtomicU64::new(0);
        let sizes = std::array::from_fn(|_| zero());
        Counters { bytes: zero(), errors: zero(), sizes, latency: Histogram::default() }
    }
}

impl Counters {
    fn count(&self, len: u64, failed: bool, ns: u64) {
        // With a single writer a load and a store lose nothing.
        let add = |count: &AtomicU64, n| count.store(count.load(Ordering::Relaxed) + n, Ordering::Relaxed);
        add(&self.bytes, len);
        add(&self.errors, u64::from(failed));
        add(&self.sizes[(64 - len.saturating_sub(1).leading_zeros()) as usize % SIZES], 1);
        self.latency.record(ns);
    }

    /// Bytes, errors, then the sizes, then the latencies.
    fn read(&self) -> impl Iterator<Item = u64> {
        let counts = [&self.bytes, &self.errors].into_iter().chain(&self.sizes);
        counts.map(|count| count.load(Ordering::Relaxed)).chain(self.latency.read())
    }
}

/// Where on a disk of this size the requests go.
struct Heat {
    size: u64,
    shift: u32,
    stretches: [AtomicU64; STRETCHES],
}

impl Heat {
    fn new(size: u64) -> Heat {
        let bits = 64 - size.saturating_sub(1).leading_zeros();
        let shift = bits.saturating_sub(STRETCHES.trailing_zeros());
        Heat { size, shift, stretches: std::array::from_fn(|_| AtomicU64::new(0)) }
    }

    fn count(&self, offset: u64) {
        if let Some(stretch) = self.stretches.get((offset >> self.shift) as usize) {
            stretch.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has passed of one operation.
struct Passed {
    op: Op,
    sizes: Vec<u64>,
    reading: OpReading,
}

impl Probe {
    fn sums(&self) -> Vec<Vec<u64>> {
        let mut sums = vec![vec![0; 2 + SIZES + Histogram::BUCKETS]; Op::ALL.len()];
        for counters in self.shards.get().into_iter().flatten() {
            for (sums, counters) in sums.iter_mut().zip(counters) {
                sums.iter_mut().zip(counters.read()).for_each(|(sum, count)| *sum += count);
            }
        }
        sums
    }

    /// The operations that there were any of since the last reset.
    fn passed(&self) -> Vec<Passed> {
        let mut sums = self.sums();
        for (sums, base) in sums.iter_mut().zip(&*lock(&self.base)) {
            sums.iter_mut().zip(base).for_each(|(sum, base)| *sum = sum.saturating_sub(*base));
        }
        let all = Op::ALL.into_iter().zip(sums).map(|(op, mut sums)| {
            let latency = sums.split_off(2 + SIZES);
            let sizes = sums.split_off(2);
            let requests = latency.iter().sum();
            let (bytes, errors) = (sums[0], sums[1]);
            let reading = OpReading { requests, bytes, errors, latency, ..OpReading::default() };
            Passed { op, sizes, reading }
        });
        all.filter(|passed| passed.reading.requests > 0).collect()
    }

    fn heat(&self) -> Option<Arc<Heat>> {
        lock(&self.heats).iter().rev().find_map(Weak::upgrade)
    }
}

/// Microseconds, with the histogram's own precision.
fn us(ns: u64) -> String {
    format!("{:.1}", ns as f64 / 1000.0)
}

fn counts(all: &[Passed]) -> String {
    let mut text = String::from("operation requests bytes errors p50 p99\n");
    for Passed { op, reading, .. } in all {
        let OpReading { requests, bytes, errors, .. } = reading;
        let (p50, p99) = (us(reading.quantile_ns(0.5)), us(reading.quantile_ns(0.99)));
        let _ = writeln!(text, "{op} {requests} {bytes} {errors} {p50} {p99}");
    }
    text
}

/// A line for each bucket of each operation that has a count.
fn buckets(all: &[Passed], counts: fn(&Passed) -> &[u64], name: fn(usize) -> String) -> String {
    let mut text = String::new();
    for passed in all {
        for (bucket, count) in counts(passed).iter().enumerate().filter(|(_, count)| **count > 0) {
            let _ = writeln!(text, "{} {} {count}", passed.op, name(bucket));
        }
    }
    text
}

fn heat_map(heat: &Heat) -> String {
    let mut text = String::new();
    for (stretch, count) in heat.stretches.iter().enumerate() {
        let start = (stretch as u64) << heat.shift;
        if start < heat.size {
            let _ = writeln!(text, "{} {}", Size(start), count.load(Ordering::Relaxed));
        }
    }
    text
}

impl Element for Probe {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let geometry = children.single()?.above();
        let mut heats = lock(&self.heats);
        let known = heats.iter().filter_map(Weak::upgrade).find(|heat| heat.size == geometry.size);
        let heat = known.unwrap_or_else(|| Arc::new(Heat::new(geometry.size)));
        let newest = Arc::downgrade(&heat);
        heats.retain(|heat| heat.strong_count() > 0 && !heat.ptr_eq(&newest));
        heats.push(newest);
        Ok(Prepared::with(geometry, heat))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op.has_range() {
            cx.prepared::<Arc<Heat>>().count(req.offset);
        }
        let shards = self.shards.get_or_init(|| (0..cx.shards()).map(|_| Default::default()).collect());
        let (counters, len, since) = (&shards[cx.shard().id()][req.op as usize], req.len, cx.now());
        cx.forward(0, req).then(move |reply| {
            counters.count(len, reply.is_err(), (cx.now() - since).as_nanos() as u64);
            reply
        })
    }

    fn get(&self, handler: &str) -> Result<String> {
        match handler {
            "counts" => Ok(counts(&self.passed())),
            "sizes" => Ok(buckets(&self.passed(), |p| &p.sizes, |bucket| Size(1 << bucket).to_string())),
            "latency" => {
                let upper = |bucket| us(Histogram::upper_ns(bucket));
                Ok(buckets(&self.passed(), |p| &p.reading.latency, upper))
            }
            "heat" => Ok(self.heat().map_or_else(String::new, |heat| heat_map(&heat))),
            _ => Err(Error::no_handler(handler)),
        }
    }

    fn call(&self, handler: &str, _argument: &str) -> Result<String> {
        if handler != "reset" {
            return Err(Error::no_handler(handler));
        }
        *lock(&self.base) = self.sums();
        self.heat().iter().flat_map(|heat| &heat.stretches).for_each(|n| n.store(0, Ordering::Relaxed));
        Ok("counting from 0".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::testing::{CATALOGUE, tail_call};
    use blockmason::Host;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use proptest::prelude::*;

    async fn probed(host: &Arc<Host>, below: &str) -> (TestDisk, Arc<dyn Element>) {
        let made =
            graph(host, CATALOGUE, &format!("element P (type probe) element B {below} P -> B"), "P").unwrap();
        let element = made.instances().find(|instance| instance.name == "P").unwrap().element.clone();
        (TestDisk::serve(host, made).await, element)
    }

    #[test]
    fn behaves_like_a_vector() {
        run(1, async |host| {
            let (disk, _) = probed(&host, "(type mem) (size 33001)").await;
            play_against_model(&disk, 1, 300).await;
        });
    }

    #[test]
    fn counts_sizes_and_latencies() {
        run(1, async |host| {
            let (disk, probe) = probed(&host, "(type broken) (size 1M) (after 100ms)").await;
            for len in [1, 4096, 4096, 4097] {
                disk.read(64 << 10, len).await.unwrap_err();
            }
            disk.op(Op::Flush, 0, 0).await.unwrap_err();
            let counts = probe.get("counts").unwrap();
            let lines: Vec<_> = counts.lines().collect();
            assert_eq!(lines[0], "operation requests bytes errors p50 p99");
            assert!(lines[1].starts_with("read 4 12290 4 1"), "{counts}");
            assert!(lines[2].starts_with("flush 1 0 1 1") && lines.len() == 3, "{counts}");
            assert_eq!(probe.get("sizes").unwrap(), "read 1 1\nread 4k 2\nread 8k 1\nflush 1 1\n");
            let latency = probe.get("latency").unwrap();
            let upper: f64 = latency.split(' ').nth(1).unwrap().parse().unwrap();
            assert!((100_000.0..=114_000.0).contains(&upper), "{latency}");
            assert_eq!(probe.get("heat").unwrap().lines().nth(4), Some("64k 4"));
        });
    }

    #[test]
    fn reset_counts_from_0() {
        run(1, async |host| {
            let (disk, probe) = probed(&host, "(type mem) (size 64)").await;
            disk.read(0, 10).await.unwrap();
            disk.read(63, 1).await.unwrap();
            let heat = probe.get("heat").unwrap();
            assert!(heat.starts_with("0 1\n1 0\n") && heat.ends_with("63 1\n"), "{heat}");
            probe.call("reset", "").unwrap();
            assert_eq!(probe.get("counts").unwrap().lines().count(), 1);
            assert!(!probe.get("heat").unwrap().contains(" 1\n"));
            disk.read(0, 10).await.unwrap();
            assert!(probe.get("counts").unwrap().contains("read 1 10 0 "));
            assert!(probe.call("restart", "").is_err() && probe.get("count").is_err());
        });
    }

    #[test]
    fn a_size_of_its_own_for_each_graph() {
        let probe = Probe::default();
        let prepare = |size| {
            let ports = [("out".to_owned(), blockmason::Geometry::new(size))];
            probe.prepare(Children { ports: &ports }).unwrap()
        };
        let small = prepare(64);
        let heat = |prepared: &Prepared| {
            prepared.state.as_ref().unwrap().downcast_ref::<Arc<Heat>>().unwrap().clone()
        };
        heat(&small).count(63);
        let again = prepare(64);
        assert!(Arc::ptr_eq(&heat(&small), &heat(&again)), "a reload that changes nothing goes on counting");
        assert_eq!(lock(&probe.heats).len(), 1);
        let large = prepare(128);
        heat(&large).count(63);
        assert!(probe.get("heat").unwrap().contains("62 1\n"), "the newest graph is shown");
        drop(large);
        assert!(probe.get("heat").unwrap().contains("63 1\n"), "rolled back, the one before is");
    }

    #[test]
    fn memory_below_answers_at_once() {
        let text = "element P (type probe) element M (type mem) (size 1k) P -> M";
        assert!(tail_call(text, "P", Request::read(0, 1)).starts_with("now Ok"));
    }

    proptest! {
        #[test]
        fn the_map_covers_the_disk(size in 1u64..1 << 50) {
            let heat = Heat::new(size);
            prop_assert!((size - 1) >> heat.shift < STRETCHES as u64);
            prop_assert!(heat.shift == 0 || (size - 1) >> (heat.shift - 1) >= STRETCHES as u64);
        }
    }
}
