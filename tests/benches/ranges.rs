//! What it costs to claim a range that nobody else wants, and to give it back, while so many others are held.
#![allow(missing_docs)]

use blockmason::sched::RangeLock;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};

fn ranges(c: &mut Criterion) {
    let mut group = c.benchmark_group("claim and release");
    for held in [0u64, 32, 256] {
        let lock = RangeLock::default();
        let others: Vec<_> = (0..held).map(|ix| lock.lock(ix * 8192..ix * 8192 + 4096).now().ok()).collect();
        group.bench_function(BenchmarkId::from_parameter(held), |b| {
            b.iter(|| drop(lock.lock(4096..8192).now().ok()));
        });
        drop(others);
    }
    group.finish();
}

criterion_group!(benches, ranges);
criterion_main!(benches);
