//! `mason bench`: loads a graph from within and measures.

mod load;

use crate::failure::{Failure, Outcome};
use crate::graphs::{GraphArgs, GraphFile};
use crate::output;
use crate::units::{Bytes, Nanos, table};
use crate::view::{OpView, SourceView};
use blockmason::describe::Family;
use blockmason::graph::build::connections;
use blockmason::heads;
use blockmason::lang::value::{Size, Time};
use blockmason::sched::HostConfig;
use blockmason::{Disk, Graph, Host, Instance};
use load::{Job, LOAD, Load, Pattern, Phase};
use serde::Serialize;
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Load a graph from within the process and measure it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason bench vm1.mason
  mason bench vm1.mason --block 64k --depth 8 --pattern sequential --time 10s
  mason bench scratch.mason --read-percent 70 --write
  mason bench scratch.mason --read-percent 0 --write --once    (fills the disk)

The graph is built and opened as by `mason run`, but its exports listen to nobody: requests enter where
theirs would. So files must not be in use, and CPU time includes the generator's own.")]
pub(crate) struct Args {
    /// A graph file
    graph: PathBuf,

    #[command(flatten)]
    parameters: GraphArgs,

    /// How many of 100 requests read; the others write random data
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: u8,

    /// Allows requests that write: what is on the disk is lost
    #[arg(long)]
    write: bool,

    /// Bytes of a request
    #[arg(long, value_name = "SIZE", default_value = "4k")]
    block: Size,

    /// Requests in flight in each stream
    #[arg(long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u32).range(1..=65536))]
    depth: u32,

    /// Where requests go
    #[arg(long, value_enum, default_value = "random")]
    pattern: Pattern,

    /// Each write is durable when it is answered
    #[arg(long, requires = "write")]
    fua: bool,

    /// Asks for each block once, in this pattern, and ends then
    #[arg(long, conflicts_with = "streams")]
    once: bool,

    /// How long, at most
    #[arg(long, value_name = "DURATION", default_value = "5s", default_value_if("once", "true", "1h"))]
    time: Time,

    /// Streams that enter at each export, as clients with a connection each would
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=1024))]
    streams: u32,

    /// Threads that carry requests [default: one for each processor]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    shards: Option<u16>,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Serialize)]
struct Report {
    seconds: f64,
    requests: u64,
    errors: u64,
    requests_per_second: f64,
    bytes_per_second: f64,
    /// Of this process, the generator included.
    cpu_seconds_per_million_requests: f64,
    sources: Vec<SourceView>,
}

pub(crate) fn main(args: &Args) -> Outcome {
    if args.read_percent < 100 && !args.write {
        let sentence = "--read-percent below 100 overwrites what is on the disk: say --write as well";
        return Err(Failure::Usage(sentence.to_owned()));
    }
    if args.block.0 == 0 || args.block.0 > u64::from(blockmason::geometry::MAX_REQUEST) {
        return Err(Failure::Usage("--block must be from 1 byte to 64M".to_owned()));
    }
    let reader = args.parameters.reader()?;
    let file = reader.read_or_say(&args.graph)?;
    let report = within(reader.folders.state, args.shards, async |host| measure(args, &file, &host).await)?;
    if args.json {
        output::json(&report)?
    } else {
        output::text(&text(args, &report))?
    }
    match report.errors {
        0 => Ok(()),
        errors => Err(Failure::new(format!("{errors} of {} requests failed", report.requests))),
    }
}

/// Runs something on a host of its own, which keeps its state in that folder.
pub(crate) fn within<T>(
    state: Option<PathBuf>,
    shards: Option<u16>,
    work: impl AsyncFnOnce(Arc<Host>) -> Outcome<T>,
) -> Outcome<T> {
    let Some(state) = state else {
        return Err(Failure::new("there is no folder for state: give one with --state DIR, or set HOME"));
    };
    let mut config = HostConfig::new(state);
    if let Some(shards) = shards {
        config.shards = usize::from(shards);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime
        .map_err(Failure::new)?
        .block_on(async { work(Host::start(config).map_err(|error| Failure::from_error(&error))?).await })
}

/// Serves the graph of a file to whoever enters where its exports would: they listen to nobody.
pub(crate) async fn serve_within(file: &GraphFile, host: &Arc<Host>, writes: bool) -> Outcome<Arc<Disk>> {
    let failed = |error| Failure::in_graph(&error, &file.spec);
    let graph = build(file, host)?;
    if writes {
        // What is written here no account of changes has.
        heads::Unkept::of(&file.spec, &graph).forget().map_err(failed)?;
    }
    Disk::serve(host, Arc::new(graph)).await.map_err(failed)
}

/// The graph with the generator in the place of its exports.
fn build(file: &GraphFile, host: &Host) -> Outcome<Graph> {
    let failed = |error| Failure::in_graph(&error, &file.spec);
    file.make_folders()?;
    let graph = file.build(host.state_dir(), host.shards()).map_err(failed)?;
    let generator = |instance: &Arc<Instance>| match instance.ty.family {
        Family::Export => Instance::new(&instance.name, &LOAD, &instance.place, Arc::new(Load)),
        _ => instance.clone(),
    };
    let instances: Vec<_> = graph.instances().map(generator).collect();
    let connections = connections(&file.spec);
    Graph::assemble(&file.name, &instances, &connections, host.shards()).map_err(failed)
}

async fn measure(args: &Args, file: &GraphFile, host: &Arc<Host>) -> Outcome<Report> {
    let failed = |error| Failure::in_graph(&error, &file.spec);
    let disk = serve_within(file, host, args.write).await?;
    let jobs = jobs(args, &disk.graph())?;
    let phase = Arc::new(Phase::default());
    let (cpu, start) = (cpu_seconds(), blockmason::rt::now());
    for (source, stream) in jobs {
        load::start(host, &disk, source, stream, &phase).map_err(failed)?;
    }
    tokio::select! {
        () = show_progress(&disk, args.time.0) => {}
        // What has been measured so far is worth something.
        _ = tokio::signal::ctrl_c() => {}
        () = phase.ended() => {}
    }
    phase.stop();
    phase.ended().await;
    let (seconds, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let sources = sources(&disk.graph());
    disk.stop().await.map_err(failed)?;
    Ok(Report::new(seconds, cpu, sources))
}

/// Waits for `time`, and says every second on a terminal how far it has come.
async fn show_progress(disk: &Disk, time: Duration) {
    let end = blockmason::rt::now() + time;
    let mut last = 0;
    loop {
        let left = end - blockmason::rt::now();
        blockmason::rt::sleep(left.min(Duration::from_secs(1))).await;
        if blockmason::rt::now() >= end {
            break;
        }
        if std::io::stderr().is_terminal() {
            let total: u64 = disk.graph().read_edges().iter().map(|edge| edge.requests).sum();
            eprint!("\r  {:.0} s left, {} requests/s on all edges  ", left.as_secs_f64() - 1.0, total - last);
            last = total;
        }
    }
    if last > 0 {
        eprintln!();
    }
}

/// The streams and the element that each enters at.
fn jobs(args: &Args, graph: &Graph) -> Outcome<Vec<(String, Job)>> {
    let mut jobs = Vec::new();
    for (node, instance) in graph.instances().enumerate() {
        if instance.ty.family != Family::Export {
            continue;
        }
        let below = graph.below(node).map_err(|error| Failure::from_error(&error))?;
        let blocks = below.size / args.block.0;
        if blocks == 0 {
            let size = Bytes(below.size);
            return Err(Failure::new(format!(
                "{} ({}): the disk has {size}, less than a block",
                instance.name, instance.place
            )));
        }
        if below.read_only && args.read_percent < 100 {
            return Err(Failure::new(format!(
                "{} ({}): the disk is read-only",
                instance.name, instance.place
            )));
        }
        for stream in 0..args.streams {
            jobs.push((
                instance.name.clone(),
                Job {
                    block: args.block.0,
                    blocks,
                    first: blocks * u64::from(stream) / u64::from(args.streams),
                    depth: args.depth,
                    pattern: args.pattern,
                    read_percent: args.read_percent,
                    fua: args.fua,
                    once: args.once,
                    seed: jobs.len() as u64,
                },
            ));
        }
    }
    Ok(jobs)
}

/// What has entered where exports would be.
pub(crate) fn sources(graph: &Graph) -> Vec<SourceView> {
    let exports = graph.instances().enumerate().filter(|(_, instance)| instance.ty.family == Family::Export);
    exports.map(|(node, instance)| SourceView::read(graph, node, &instance.name)).collect()
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

impl Report {
    fn new(seconds: f64, cpu: f64, sources: Vec<SourceView>) -> Report {
        let ops = || sources.iter().flat_map(|source| &source.operations);
        let sum = |of: fn(&OpView) -> u64| ops().map(of).sum::<u64>();
        let (requests, bytes) = (sum(|op| op.requests), sum(|op| op.bytes));
        Report {
            seconds,
            requests,
            errors: sum(|op| op.errors),
            requests_per_second: requests as f64 / seconds,
            bytes_per_second: bytes as f64 / seconds,
            cpu_seconds_per_million_requests: cpu * 1e6 / requests.max(1) as f64,
            sources,
        }
    }
}

/// What entered, as a table.
pub(crate) fn shown(sources: &[SourceView], seconds: f64) -> String {
    let mut rows = Vec::new();
    for source in sources {
        for op in &source.operations {
            let per_second = |count: u64| count as f64 / seconds;
            let mut row = vec![source.element.clone(), op.operation.clone()];
            row.push(format!("{:.0}", per_second(op.requests)));
            row.push(format!("{}/s", Bytes(per_second(op.bytes) as u64)));
            row.push(op.errors.to_string());
            let latencies = [op.p50_ns, op.p90_ns, op.p99_ns, op.p999_ns, op.max_ns];
            row.extend(latencies.map(|ns| Nanos(ns).to_string()));
            rows.push(row);
        }
    }
    let head = ["source", "operation", "IOPS", "bandwidth", "errors", "p50", "p90", "p99", "p99.9", "max"];
    table(&head, rows, 2..10)
}

fn text(args: &Args, report: &Report) -> String {
    let mut out = shown(&report.sources, report.seconds);
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "\n  {} x {} in flight, blocks of {}, {:.1} s; {:.2} CPU seconds for a million requests",
        args.streams, args.depth, args.block, report.seconds, report.cpu_seconds_per_million_requests
    );
    out
}
