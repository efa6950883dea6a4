//! Latencies, and the processor time of processes.

use std::time::Duration;

/// Steps for each doubling: what is read out is at most 1/32 too high.
const STEPS: u64 = 32;

/// How often each latency was seen, up to some hours.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { counts: vec![0; 45 * STEPS as usize], total: 0, max: Duration::ZERO }
    }
}

impl Histogram {
    /// Counts a latency.
    pub fn record(&mut self, latency: Duration) {
        let last = self.counts.len() - 1;
        self.counts[bucket(latency.as_nanos() as u64).min(last)] += 1;
        self.total += 1;
        self.max = self.max.max(latency);
    }

    /// Counts what another one has counted.
    pub fn add(&mut self, other: &Histogram) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// The latency that the given share of requests did not exceed.
    pub fn percentile(&self, share: f64) -> Duration {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (ix, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(end_of(ix)).min(self.max);
            }
        }
        self.max
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        self.max
    }
}

/// Small values have a bucket each; above, every doubling has [`STEPS`].
fn bucket(nanos: u64) -> usize {
    if nanos < STEPS {
        return nanos as usize;
    }
    let shift = nanos.ilog2() - STEPS.ilog2();
    (u64::from(shift) * STEPS + (nanos >> shift)) as usize
}

/// The highest value of a bucket.
fn end_of(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < 2 * STEPS {
        return bucket;
    }
    let shift = bucket / STEPS - 1;
    ((bucket % STEPS + STEPS + 1) << shift) - 1
}

/// Processor time of a process, threads that have ended included: to the nanosecond, where /proc/PID/stat counts
/// hundredths of a second. Zero when there is no such process.
pub fn cpu_of(pid: u32) -> Duration {
    // The kernel's encoding of the clock of a process: the inverted number, and 2 for what the scheduler counts.
    let clock = (!(pid as libc::clockid_t) << 3) | 2;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel checks the clock and writes a timespec.
    let failed = unsafe { libc::clock_gettime(clock, &raw mut time) } != 0;
    if failed { Duration::ZERO } else { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_close() {
        let mut histogram = Histogram::default();
        for micros in 1..=10_000 {
            histogram.record(Duration::from_micros(micros));
        }
        for (share, wanted) in [(0.5, 5_000.0), (0.99, 9_900.0), (0.999, 9_990.0)] {
            let found = histogram.percentile(share).as_secs_f64() * 1e6;
            assert!((wanted..wanted * 1.04).contains(&found), "{share}: {found} instead of {wanted}");
        }
        assert_eq!(histogram.percentile(1.0), Duration::from_millis(10));
    }

    #[test]
    fn buckets_follow_each_other() {
        for nanos in 0..100_000 {
            let bucket = bucket(nanos);
            assert!(nanos <= end_of(bucket) && (bucket == 0 || nanos > end_of(bucket - 1)), "{nanos}");
        }
    }

    #[test]
    fn time_of_this_process_passes() {
        let before = cpu_of(std::process::id());
        let mut sum = 0_u64;
        while cpu_of(std::process::id()) == before {
            sum = std::hint::black_box(sum + 1);
        }
        assert_eq!(cpu_of(u32::MAX >> 4), Duration::ZERO);
    }
}
