//! What it costs to read and check a graph file: ten, a thousand and ten thousand elements.
#![allow(clippy::unwrap_used, missing_docs)]

use blockmason::lang::{Defines, check, parse_str};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::fmt::Write;
use std::path::Path;

/// Graphs of a hundred elements in a row, as many as it takes.
fn text(elements: usize) -> String {
    let mut text = String::new();
    for ix in 0..elements {
        match ix % 100 {
            0 => write!(text, "element E{ix} (type nbd) (listen unix:{ix}.sock) E{ix} -> E{}", ix + 1),
            99 => write!(text, "element E{ix} (type file) (path disk{ix}.img) (size 1G)"),
            _ if ix == elements - 1 => write!(text, "element E{ix} (type mem) (size 1G)"),
            _ => write!(text, "element E{ix} (type filter) (drop read) (range 4k-1M) E{ix} -> E{}", ix + 1),
        }
        .unwrap();
        text.push('\n');
    }
    text
}

fn parser(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse and check");
    for elements in [10, 1000, 10_000] {
        let text = text(elements);
        group.throughput(Throughput::Elements(elements as u64)).sample_size(10);
        group.bench_function(BenchmarkId::from_parameter(elements), |bench| {
            bench.iter(|| {
                let spec = parse_str("bench.mason", &text, Path::new("/"), &Defines::new()).unwrap();
                check(&spec, blockmason_elements::ALL).unwrap();
            });
        });
    }
    group.finish();
}

criterion_group!(benches, parser);
criterion_main!(benches);
