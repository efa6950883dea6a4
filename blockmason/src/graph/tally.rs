//! Counting what goes by. Each shard has its own counters, so that counting is a plain addition;
//! readers add them up.

use super::Node;
use crate::request::Op;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counter with one writer, its shard, and any number of readers.
#[derive(Default)]
struct Count(AtomicU64);

impl Count {
    #[inline]
    fn add(&self, n: u64) {
        // Not fetch_add: with a single writer a load and a store lose nothing and lock nothing.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One shard's counters of one graph. Each is shared with the graphs before and after that have the same
/// edge or source: a shard writes them all, so each still has one writer.
pub(crate) struct Tally {
    pub(crate) edges: Box<[Arc<EdgeCount>]>,
    /// By node; only elements without an in port have one.
    pub(super) sources: Box<[Option<Arc<SourceTally>>]>,
}

/// What an edge has carried, by operation.
#[derive(Default)]
pub(crate) struct EdgeCount {
    requests: [Count; Op::ALL.len()],
    /// Of reads and of writes: nothing else moves bytes.
    bytes: [Count; 2],
}

impl EdgeCount {
    #[inline]
    pub(crate) fn add(&self, op: Op, len: u64) {
        self.requests[op as usize].add(1);
        if let Some(bytes) = self.bytes.get(op as usize) {
            bytes.add(len);
        }
    }

    /// How many requests it has carried.
    pub(super) fn requests(&self) -> u64 {
        self.requests.iter().map(Count::get).sum()
    }

    /// Adds it to a sum.
    pub(crate) fn read(&self, sum: &mut [Moved; Op::ALL.len()]) {
        for (count, sum) in self.requests.iter().zip(sum.iter_mut()) {
            sum.requests += count.get();
        }
        for (count, sum) in self.bytes.iter().zip(sum) {
            sum.bytes += count.get();
        }
    }
}

// `bytes` is indexed by operation.
const _: () = assert!(Op::Read as usize == 0 && Op::Write as usize == 1);

/// How much has gone by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Requests.
    pub requests: u64,
    /// Bytes that they moved: the lengths of reads and writes.
    pub bytes: u64,
}

#[derive(Default)]
pub(super) struct SourceTally {
    ops: [OpTally; Op::ALL.len()],
}

#[derive(Default)]
struct OpTally {
    bytes: Count,
    errors: Count,
    latency: Histogram,
}

/// What an edge has carried, summed over the shards.
#[derive(Clone, Debug)]
pub struct EdgeReading {
    /// The element above.
    pub from: String,
    /// Its out port.
    pub port: String,
    /// The element below.
    pub to: String,
    /// Requests since there is such an edge: a reload that keeps it does not begin anew.
    pub requests: u64,
    /// Bytes that they moved: the lengths of reads and writes.
    pub bytes: u64,
    /// The same by operation, in the order of [`Op::ALL`].
    pub ops: [Moved; Op::ALL.len()],
    /// Of them sampled, and answered.
    pub sampled: u64,
    /// How long those took together, from the edge down and back, in nanoseconds.
    pub sampled_ns: u64,
}

/// What has entered at a source, by operation in the order of [`Op::ALL`].
#[derive(Clone, Debug, Default)]
pub struct SourceReading {
    /// One for each operation.
    pub ops: [OpReading; Op::ALL.len()],
}

/// What has entered of one operation.
#[derive(Clone, Debug, Default)]
pub struct OpReading {
    /// Requests answered.
    pub requests: u64,
    /// Bytes that they moved: the lengths of reads and writes.
    pub bytes: u64,
    /// How many of them with an error.
    pub errors: u64,
    /// Requests by latency bucket; see [`Histogram::upper_ns`].
    pub latency: Vec<u64>,
    /// Their latencies together, in nanoseconds.
    pub latency_sum_ns: u64,
}

impl SourceReading {
    /// All operations together.
    pub fn sum(&self) -> OpReading {
        let mut sum = OpReading { latency: vec![0; Histogram::BUCKETS], ..OpReading::default() };
        for op in &self.ops {
            sum.requests += op.requests;
            sum.bytes += op.bytes;
            sum.errors += op.errors;
            sum.latency_sum_ns += op.latency_sum_ns;
            for (sum, count) in sum.latency.iter_mut().zip(&op.latency) {
                *sum += count;
            }
        }
        sum
    }
}

impl OpReading {
    /// The latency that a share `q` (0 to 1) of the requests stayed within, in nanoseconds.
    pub fn quantile_ns(&self, q: f64) -> u64 {
        let wanted = (self.requests as f64 * q).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (bucket, count) in self.latency.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Histogram::upper_ns(bucket);
            }
        }
        0
    }
}

impl Tally {
    pub(crate) fn new(nodes: &[Node], edges: usize) -> Tally {
        let source = |node: &Node| (!node.instance.ty.ports.input).then(Arc::default);
        Tally {
            edges: (0..edges).map(|_| Arc::default()).collect(),
            sources: nodes.iter().map(source).collect(),
        }
    }

    /// Counts a root request that has been answered.
    #[inline]
    pub(crate) fn root(&self, node: usize, op: Op, len: u64, failed: bool, took: Duration) {
        let Some(source) = &self.sources[node] else { return };
        let tally = &source.ops[op as usize];
        if matches!(op, Op::Read | Op::Write) {
            tally.bytes.add(len);
        }
        tally.errors.add(u64::from(failed));
        tally.latency.record(took.as_nanos() as u64);
    }

    pub(crate) fn read_source(&self, node: usize, sum: &mut SourceReading) {
        let Some(source) = &self.sources[node] else { return };
        for (tally, sum) in source.ops.iter().zip(&mut sum.ops) {
            sum.bytes += tally.bytes.get();
            sum.errors += tally.errors.get();
            sum.latency_sum_ns += tally.latency.sum_ns();
            sum.latency.resize(Histogram::BUCKETS, 0);
            for (bucket, count) in sum.latency.iter_mut().enumerate() {
                let n = tally.latency.buckets[bucket].get();
                *count += n;
                sum.requests += n;
            }
        }
    }
}

/// A log-linear histogram of durations: eight buckets for each power of two of nanoseconds, so that
/// a quantile is at most 12.5 % off. Durations past 18 minutes count as that.
pub struct Histogram {
    buckets: [Count; Histogram::BUCKETS],
    sum_ns: Count,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = [const { Count(AtomicU64::new(0)) }; Histogram::BUCKETS];
        Histogram { buckets, sum_ns: Count::default() }
    }
}

impl Histogram {
    /// How many buckets there are.
    pub const BUCKETS: usize = 38 * 8;

    /// The bucket of a duration.
    pub fn bucket(ns: u64) -> usize {
        if ns < 8 {
            return ns as usize;
        }
        let power = 63 - ns.leading_zeros() as usize;
        let eighth = (ns >> (power - 3) & 7) as usize;
        ((power - 2) * 8 + eighth).min(Histogram::BUCKETS - 1)
    }

    /// The largest duration of a bucket, in nanoseconds.
    pub fn upper_ns(bucket: usize) -> u64 {
        if bucket < 8 {
            return bucket as u64;
        }
        let (power, eighth) = (bucket / 8 + 2, bucket as u64 % 8);
        ((9 + eighth) << (power - 3)) - 1
    }

    /// Counts one duration.
    #[inline]
    pub fn record(&self, ns: u64) {
        self.buckets[Histogram::bucket(ns)].add(1);
        self.sum_ns.add(ns);
    }

    /// All durations together, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns.get()
    }

    /// The counts, by bucket.
    pub fn read(&self) -> Vec<u64> {
        self.buckets.iter().map(Count::get).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_duration_is_in_its_bucket(ns in 0u64..1 << 40) {
            let bucket = Histogram::bucket(ns);
            prop_assert!(ns <= Histogram::upper_ns(bucket));
            prop_assert!(bucket == 0 || ns > Histogram::upper_ns(bucket - 1));
            prop_assert!(ns < 64 || (Histogram::upper_ns(bucket) - ns) * 8 <= ns);
        }
    }

    #[test]
    fn the_longest_durations_share_the_last_bucket() {
        assert_eq!(Histogram::bucket(u64::MAX), Histogram::BUCKETS - 1);
    }

    #[test]
    fn quantiles() {
        let histogram = Histogram::default();
        (1..=100u64).for_each(|us| histogram.record(us * 1000));
        let reading = OpReading { requests: 100, latency: histogram.read(), ..OpReading::default() };
        for (q, us) in [(0.5, 50.0), (0.99, 99.0)] {
            let found = reading.quantile_ns(q) as f64 / 1000.0;
            assert!((found - us) / us < 0.13 && found >= us, "{q}: {found}");
        }
    }
}
