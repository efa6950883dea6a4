//! `mason status`: what a running daemon serves.

use crate::control::find::ControlArgs;
use crate::failure::Outcome;
use crate::output::{self, printable};
use crate::units::{Bytes, Nanos, Seconds, table};
use crate::view::{GraphView, LiveView, Status};
use std::fmt::Write;

/// Show what a running daemon serves, with counts and latencies.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason status
  mason status --control /run/mason/vm1.sock
  mason status --json | jq '.graphs[].live.exports[].uri'")]
pub(crate) struct Args {
    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let status: Status = args.control.connect()?.0.get("/v1/status")?;
    if args.json { output::json(&status) } else { output::text(&text(&status)) }
}

fn text(status: &Status) -> String {
    let up = Seconds(status.uptime_seconds);
    let mut out = format!("mason {}, process {}, up {up}\n", printable(&status.version), status.pid);
    for graph in &status.graphs {
        // Writing to a String cannot fail.
        let _ = write!(out, "\n{}  {}\n", printable(&graph.name), printable(&graph.file));
        if let Some(live) = &graph.live {
            out += &live_text(graph, live);
        }
    }
    out
}

fn live_text(graph: &GraphView, live: &LiveView) -> String {
    let mut out = String::new();
    if live.failed {
        out += "  failed: an element has panicked, it answers errors until it is reloaded\n";
    }
    if live.standby {
        let _ = writeln!(
            out,
            "  stands by: what clients ask for waits for `mason activate {}`",
            printable(&graph.name)
        );
    }
    for fault in &live.faults {
        let _ = writeln!(out, "  {} does not work: {}", printable(&fault.element), printable(&fault.error));
    }
    for export in &live.exports {
        let size = graph.element(&export.element).and_then(|element| element.geometry.as_ref());
        let size = size.map_or_else(String::new, |geometry| format!("  {}", Bytes(geometry.size)));
        let _ = writeln!(out, "  {}  {}{size}", printable(&export.element), printable(&export.uri));
    }
    let _ = writeln!(out, "  {} in flight", Bytes(live.in_flight_bytes));
    let mut rows = Vec::new();
    for source in &live.sources {
        for op in &source.operations {
            let latencies = [op.p50_ns, op.p90_ns, op.p99_ns, op.p999_ns, op.max_ns];
            let mut row = vec![printable(&source.element), printable(&op.operation), op.requests.to_string()];
            row.extend([Bytes(op.bytes).to_string(), op.errors.to_string()]);
            row.extend(latencies.map(|ns| Nanos(ns).to_string()));
            rows.push(row);
        }
    }
    if !rows.is_empty() {
        let head =
            ["source", "operation", "requests", "bytes", "errors", "p50", "p90", "p99", "p99.9", "max"];
        out += &table(&head, rows, 2..10);
    }
    out
}
