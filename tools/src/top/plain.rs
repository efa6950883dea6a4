//! A look as plain tables.

use super::rates::{Row, View};
use crate::output::printable;
use crate::units::{Bytes, Nanos, Seconds, table};
use std::fmt::Write;

/// Above the columns of [`cells`].
pub(super) const HEAD: [&str; 9] =
    ["name", "operation", "req/s", "bytes/s", "p50", "p99", "mean", "errors", "requests"];

/// One table for each graph.
pub(super) fn text(view: &View, many: bool) -> String {
    let up = Seconds(view.uptime_seconds);
    let mut out = format!("mason {}, process {}, up {up}\n", printable(&view.version), view.pid);
    for graph in &view.graphs {
        let failed = if graph.failed { ", FAILED: answers errors until it is reloaded" } else { "" };
        let (in_flight, bytes) = (graph.in_flight, Bytes(graph.in_flight_bytes));
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{}  {}, {in_flight} in flight ({bytes}), 1/{} sampled{failed}",
            printable(&graph.name),
            printable(&graph.file),
            graph.sampled_every
        );
        out += &table(&HEAD, graph.rows.iter().map(|row| cells(row).to_vec()).collect(), 2..9);
    }
    if many {
        out.push('\n');
    }
    out
}

/// A row as text.
pub(super) fn cells(row: &Row) -> [String; 9] {
    let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), |ns| Nanos(ns).to_string());
    [
        printable(&row.name),
        row.operation.as_deref().map_or_else(String::new, printable),
        count(row.requests_per_second),
        Bytes(row.bytes_per_second as u64).to_string(),
        time(row.p50_ns),
        time(row.p99_ns),
        row.sampled_mean_ns.map_or_else(|| "-".to_owned(), |ns| format!("~{}", Nanos(ns))),
        row.errors.map_or_else(|| "-".to_owned(), |errors| errors.to_string()),
        row.requests.to_string(),
    ]
}

/// Few with a decimal, many without.
fn count(rate: f64) -> String {
    if rate > 0.0 && rate < 100.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}
