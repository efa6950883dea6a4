//! `mason trace`: the ways of requests through a running graph.

mod perfetto;
mod text;
mod tree;
mod wanted;

use crate::control::client::{Client, path};
use crate::control::find::{self, ControlArgs};
use crate::failure::{Failure, Outcome};
use crate::hops::{HopView, TraceLine};
use crate::output;
use crate::view::GraphView;
use blockmason::lang::value::Time;
use blockmason::rt;
use std::ops::ControlFlow;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tree::{Tree, Trees};
use wanted::Wanted;

/// Show the ways of requests through a running graph, with the time that each hop takes.
#[derive(clap::Args)]
#[command(after_help = r#"Examples:
  mason trace                           every request, until Ctrl-C
  mason trace Disk --min 1ms            those that were slow at the element Disk
  mason trace '(Mirror, a) -> Disk'     those that took this edge
  mason trace --sample 1/100 --for 10s --format perfetto > trace.json
  mason trace --errors --json | jq .error
  mason trace --last                    what the flight recorder holds: nothing is recorded for this

A request is shown with all of its hops if one of them is at the element or edge named, took at least --min
and, with --errors, failed. Times: of a hop's begin since the request came, of the hop with all below it, of the
hop without those. A hop is recorded when its reply is there.

Recording a request costs it some microseconds. Where many come, sample some: what cannot be taken in time is lost
and counted on stderr. No request waits for it."#)]
pub(crate) struct Args {
    /// An element, or an edge as in a graph file: 'A -> B', '(A, port) -> B'
    #[arg(value_name = "ELEMENT|EDGE")]
    at: Option<String>,

    /// Records one request in N
    #[arg(long, value_name = "1/N", default_value = "1/1", value_parser = sample)]
    sample: u64,

    /// The graph's name, or the path of its file [default: the only one]
    #[arg(long, value_name = "GRAPH")]
    graph: Option<String>,

    /// Ends after so many requests
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// Ends after this time
    #[arg(long = "for", value_name = "DURATION")]
    time: Option<Time>,

    /// Only requests that took as long
    #[arg(long, value_name = "DURATION")]
    min: Option<Time>,

    /// Only requests that failed somewhere
    #[arg(long)]
    errors: bool,

    /// Shows what the flight recorder holds now: the last hops of one request in 1024
    #[arg(long, conflicts_with_all = ["sample", "time"])]
    last: bool,

    /// How it is written
    #[arg(long, value_enum, default_value = "text")]
    format: Format,

    /// The same as --format json
    #[arg(long, conflicts_with = "format")]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Format {
    /// A tree for each request
    Text,
    /// One JSON object a line for each hop, in the order of the tree
    Json,
    /// For ui.perfetto.dev and chrome://tracing
    Perfetto,
}

/// `1/100`, or `100`.
fn sample(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix("1/").unwrap_or(text).parse().ok().filter(|every| *every > 0);
    number.ok_or_else(|| "write 1/100 for one request in a hundred".to_owned())
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?.name;
    let at = match &args.at {
        Some(text) => {
            let view: GraphView = client.get(&path(&["v1", "graphs", &graph]))?;
            wanted::At::parse(text, &view)?
        }
        None => wanted::At::Anywhere,
    };
    let min_ns = args.min.map_or(0, |min| min.0.as_nanos() as u64);
    let wanted = Wanted { at, min_ns, errors: args.errors };
    let format = if args.json { Format::Json } else { args.format };
    let mut show = Show { wanted, left: args.count, out: Out::new(format), dropped: 0 };
    let ended =
        if args.last { last(&client, &graph, &mut show) } else { follow(args, &client, &graph, &mut show) };
    let finished = show.out.finish();
    if show.dropped > 0 {
        eprintln!(
            "mason: dropped: {} hops came faster than they were taken; try a lower --sample",
            show.dropped
        );
    }
    ended.and(finished)
}

fn last(client: &Client, graph: &str, show: &mut Show) -> Outcome {
    let hops: Vec<HopView> = client.get(&path(&["v1", "graphs", graph, "hops"]))?;
    for tree in tree::all(hops) {
        if show.tree(&tree)?.is_break() {
            break;
        }
    }
    Ok(())
}

fn follow(args: &Args, client: &Client, graph: &str, show: &mut Show) -> Outcome {
    let mut trees = Trees::default();
    let path = format!("{}?sample={}", path(&["v1", "graphs", graph, "trace"]), args.sample);
    let followed = client.lines_until(&path, stop(args.time.map(|time| time.0)), |line| {
        let line = serde_json::from_str(line);
        match line.map_err(|error| Failure::new(format!("a line that is no hop: {error}")))? {
            TraceLine::Dropped { dropped } => {
                show.dropped = dropped;
                Ok(ControlFlow::Continue(()))
            }
            TraceLine::Hop(hop) => match trees.add(*hop) {
                Some(tree) => show.tree(&tree),
                None => Ok(ControlFlow::Continue(())),
            },
        }
    });
    show.dropped += trees.lost();
    followed
}

/// Resolves after a time, or when somebody wants this to end.
async fn stop(time: Option<Duration>) {
    let watch = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            // Then the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    let over = async {
        match time {
            Some(time) => rt::sleep(time).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = over => {}
        () = watch(SignalKind::interrupt()) => {}
        () = watch(SignalKind::terminate()) => {}
    }
}

/// What is shown of what comes.
struct Show {
    wanted: Wanted,
    /// How many more requests are to be shown.
    left: Option<u64>,
    out: Out,
    dropped: u64,
}

impl Show {
    fn tree(&mut self, tree: &Tree) -> Outcome<ControlFlow<()>> {
        if !self.wanted.matches(tree) {
            return Ok(ControlFlow::Continue(()));
        }
        // What outlives its request belongs to one that has been counted.
        let counts = !tree.is_late();
        if self.left == Some(0) || !self.out.tree(tree)? {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(left) = self.left.as_mut().filter(|_| counts) {
            *left -= 1;
        }
        Ok(if self.left == Some(0) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }
}

/// Where it is written.
struct Out {
    format: Format,
    perfetto: perfetto::Tracks,
    /// True once something has been written.
    begun: bool,
    /// Nobody reads any more.
    closed: bool,
}

impl Out {
    fn new(format: Format) -> Out {
        Out { format, perfetto: perfetto::Tracks::default(), begun: false, closed: false }
    }

    /// Writes a tree. False if nobody reads any more.
    fn tree(&mut self, tree: &Tree) -> Outcome<bool> {
        let mut text = String::new();
        match self.format {
            Format::Text => {
                if !self.begun {
                    text += text::HEAD;
                }
                text += &text::draw(tree);
            }
            Format::Json => {
                for node in &tree.nodes {
                    text += &serde_json::to_string(&node.hop).map_err(Failure::new)?;
                    text.push('\n');
                }
            }
            Format::Perfetto => {
                for event in self.perfetto.events(tree) {
                    text += if self.begun || !text.is_empty() { ",\n" } else { "[\n" };
                    text += &event.to_string();
                }
            }
        }
        self.begun = true;
        self.write(&text)?;
        Ok(!self.closed)
    }

    /// Writes what must stand at the end.
    fn finish(&mut self) -> Outcome {
        match (self.format, self.begun) {
            (Format::Perfetto, true) => self.write("\n]\n"),
            (Format::Perfetto, false) => self.write("[]\n"),
            _ => Ok(()),
        }
    }

    fn write(&mut self, text: &str) -> Outcome {
        self.closed |= !output::open_text(text)?;
        Ok(())
    }
}
