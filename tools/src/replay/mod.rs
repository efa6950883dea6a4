//! `mason replay`: shows what a log of a workload has, and asks the same of a graph.

mod ahead;
mod stream;

use crate::bench::{serve_within, shown, sources, within};
use crate::failure::{Failure, Outcome};
use crate::graphs::{GraphArgs, GraphFile};
use crate::output::{self, printable};
use crate::units::{Bytes, Nanos, Seconds, Stamp, table};
use crate::view::{OpView, SourceView};
use ahead::{Ordered, read_ahead};
use blockmason::describe::Family;
use blockmason::graph::OpReading;
use blockmason::sched::serve;
use blockmason::{Disk, Graph, Host, Op};
use blockmason_elements::workload::{Head, Log};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::Arc;
use stream::{Replay, Way};
use tokio::sync::oneshot;

/// Show what a log of a workload has, or ask the same of a graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason replay vm1.workload
  mason replay vm1.workload other.mason
  mason replay vm1.workload scratch.mason --write --speed 2
  mason replay vm1.workload scratch.mason --write --speed max --depth 16 --json

The element `workload_log` records such a log: `mason elements workload_log`. Without a graph it says what the log has. The graph is built and
opened as by `mason run`, but its exports listen to nobody: requests enter where theirs would, at the times at which they came when they were recorded,
however long those before them take. Of the data nothing is recorded: what is written is random.")]
pub(crate) struct Args {
    /// The log
    log: PathBuf,

    /// A graph file
    graph: Option<PathBuf>,

    #[command(flatten)]
    parameters: GraphArgs,

    /// The export where requests enter [default: the only one]
    #[arg(long, value_name = "ELEMENT", requires = "graph")]
    export: Option<String>,

    /// Asks for what changes the disk, too: what is on it is lost. Without it that is left out
    #[arg(long, requires = "graph")]
    write: bool,

    /// How many times as fast as it was, 0.5 or 10; `max` asks for the next one when one is answered
    #[arg(long, value_name = "TIMES", default_value = "1", requires = "graph", value_parser = speed)]
    speed: Speed,

    /// Requests in flight with `--speed max`; else at most 4096
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u32).range(1..=65536))]
    depth: u32,

    /// Threads that carry requests [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    shards: Option<u16>,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

/// None: as fast as it goes.
#[derive(Clone, Copy)]
struct Speed(Option<f64>);

fn speed(text: &str) -> Result<Speed, String> {
    if text == "max" {
        return Ok(Speed(None));
    }
    let times = text.parse().ok().filter(|times: &f64| (0.001..=1e6).contains(times));
    times
        .map(|times| Speed(Some(times)))
        .ok_or_else(|| "expected `max`, or a number from 0.001 to 1000000".to_owned())
}

/// Requests in flight where their times are kept.
const MOST: u32 = 4096;

/// What a log has.
#[derive(Serialize)]
struct Described {
    /// Seconds since 1970.
    start: f64,
    /// From the first request to the last.
    seconds: f64,
    /// Bytes of the disk when the log was begun.
    disk: u64,
    /// Requests that could not be recorded.
    lost: u64,
    operations: Vec<OpView>,
}

/// What became of a replay.
#[derive(Serialize)]
struct Report {
    seconds: f64,
    requests: u64,
    errors: u64,
    /// Requests that would have changed the disk.
    left_out: u64,
    /// Requests beyond the end of this disk.
    beyond_the_end: u64,
    /// How late requests came, by the times of the log.
    late: Option<Late>,
    /// What the same requests took when they were recorded.
    recorded: Vec<OpView>,
    sources: Vec<SourceView>,
}

#[derive(Serialize)]
struct Late {
    p50_ns: u64,
    p99_ns: u64,
    max_ns: u64,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let log = Log::open(&args.log).map_err(|error| Failure::from_error(&error))?;
    match &args.graph {
        None => describe(args, log),
        Some(graph) => replay(args, log, graph),
    }
}

fn views(readings: &[OpReading]) -> Vec<OpView> {
    let came = Op::ALL.iter().zip(readings).filter(|(_, reading)| reading.requests > 0);
    came.map(|(op, reading)| OpView::of(*op, reading)).collect()
}

fn describe(args: &Args, log: Log) -> Outcome {
    let Head { size, start } = log.head();
    let (mut readings, mut first, mut last) = (vec![stream::nothing(); Op::ALL.len()], None, None);
    let mut log = Ordered::new(log);
    while let Some(record) = log.next().map_err(|error| Failure::from_error(&error))? {
        stream::count(&mut readings[record.op as usize], &record);
        first.get_or_insert(record.at);
        last = Some(record.at);
    }
    let span = last.unwrap_or_default().saturating_sub(first.unwrap_or_default());
    let found = Described {
        start: start as f64 / 1e9,
        seconds: span.as_secs_f64(),
        disk: size,
        lost: log.lost(),
        operations: views(&readings),
    };
    if args.json {
        return output::json(&found);
    }
    let mut out =
        format!("a disk of {}, from {} on, {}\n", Bytes(size), Stamp(found.start), Seconds(found.seconds));
    if found.lost > 0 {
        let _ = writeln!(out, "{} requests could not be recorded", found.lost);
    }
    output::text(&(out + &operations(&found.operations)))
}

/// A table of what was recorded.
fn operations(operations: &[OpView]) -> String {
    let row = |op: &OpView| {
        let mut row = vec![
            op.operation.clone(),
            op.requests.to_string(),
            Bytes(op.bytes).to_string(),
            op.errors.to_string(),
        ];
        row.extend([op.p50_ns, op.p90_ns, op.p99_ns, op.p999_ns, op.max_ns].map(|ns| Nanos(ns).to_string()));
        row
    };
    let head = ["operation", "requests", "bytes", "errors", "p50", "p90", "p99", "p99.9", "max"];
    table(&head, operations.iter().map(row).collect(), 1..9)
}

fn replay(args: &Args, log: Log, graph: &std::path::Path) -> Outcome {
    let reader = args.parameters.reader()?;
    let file = reader.read_or_say(graph)?;
    let report = within(reader.folders.state, args.shards, async |host| run(args, log, &file, &host).await)?;
    if args.json {
        output::json(&report)?;
    } else {
        output::text(&text(&report))?;
    }
    match report.errors {
        0 => Ok(()),
        errors => Err(Failure::new(format!("{errors} of {} requests failed", report.requests))),
    }
}

/// The element where requests enter, and the bytes of the disk below it.
fn entrance(wanted: Option<&str>, graph: &Graph) -> Outcome<(String, u64)> {
    let exports = graph.instances().enumerate().filter(|(_, instance)| instance.ty.family == Family::Export);
    let exports: Vec<_> = exports.map(|(node, instance)| (node, instance.name.clone())).collect();
    let names = || exports.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ");
    let found = match wanted {
        Some(wanted) => exports.iter().find(|(_, name)| name == wanted),
        None if exports.len() > 1 => {
            return Err(Failure::Usage(format!(
                "the graph has several exports, name one with --export: {}",
                names()
            )));
        }
        None => exports.first(),
    };
    let Some((node, name)) = found else {
        let wanted = printable(wanted.unwrap_or("any"));
        return Err(Failure::new(format!("the graph has no export {wanted}; it has: {}", names())));
    };
    let below = graph.below(*node).map_err(|error| Failure::from_error(&error))?;
    Ok((name.clone(), below.size))
}

async fn run(args: &Args, log: Log, file: &GraphFile, host: &Arc<Host>) -> Outcome<Report> {
    let disk = serve_within(file, host, args.write).await?;
    let done = ask(args, log, &disk, host).await;
    disk.stop().await.map_err(|error| Failure::in_graph(&error, &file.spec))?;
    done
}

async fn ask(args: &Args, log: Log, disk: &Arc<Disk>, host: &Arc<Host>) -> Outcome<Report> {
    let (source, size) = entrance(args.export.as_deref(), &disk.graph())?;
    let from = read_ahead(log).map_err(Failure::new)?;
    let Speed(speed) = args.speed;
    let depth = if speed.is_some() { MOST } else { args.depth };
    let way = Way { speed, depth, writes: args.write, size };
    let (tell, told) = oneshot::channel();
    let (to, begun) = (disk.clone(), blockmason::rt::now());
    host.spawn_stream(move || async move {
        let replay = Replay::new(way, from);
        let served = serve(&to, &source, &replay).await;
        drop(to);
        // Whoever asked may have been interrupted.
        let _ = tell.send((served.map(|_| ()), replay.outcome()));
    })
    .map_err(|error| Failure::from_error(&error))?;
    let (served, outcome) = told.await.map_err(|_| Failure::new("the replay has panicked"))?;
    served.map_err(|error| Failure::from_error(&error))?;
    if let Some(error) = outcome.error {
        return Err(Failure::from_error(&error));
    }
    let sources = sources(&disk.graph());
    let ops = || sources.iter().flat_map(|source| &source.operations);
    let late = |outcome: &stream::Came| Late {
        p50_ns: outcome.late.quantile_ns(0.5),
        p99_ns: outcome.late.quantile_ns(0.99),
        max_ns: outcome.late.quantile_ns(1.0),
    };
    Ok(Report {
        seconds: begun.elapsed().as_secs_f64(),
        requests: ops().map(|op| op.requests).sum(),
        errors: ops().map(|op| op.errors).sum(),
        left_out: outcome.left_out,
        beyond_the_end: outcome.beyond,
        late: speed.map(|_| late(&outcome)),
        recorded: views(&outcome.recorded),
        sources,
    })
}

fn text(report: &Report) -> String {
    let mut out = format!(
        "recorded\n{}\nnow\n{}",
        operations(&report.recorded),
        shown(&report.sources, report.seconds)
    );
    let _ = writeln!(out, "\n  {} requests in {:.1} s", report.requests, report.seconds);
    if let Some(late) = &report.late {
        let [p50, p99, max] = [late.p50_ns, late.p99_ns, late.max_ns].map(Nanos);
        let _ = writeln!(out, "  late by {p50} (p50), {p99} (p99), {max} (max)");
    }
    for (count, what) in [
        (report.left_out, "that change the disk are left out: --write asks for them, too"),
        (report.beyond_the_end, "reach past the end of this disk, and are left out"),
    ] {
        if count > 0 {
            let _ = writeln!(out, "  {count} requests {what}");
        }
    }
    out
}
