//! `mason events`: what has happened in a running daemon, and what happens.

use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::graphs::name_of;
use crate::output::{self, printable};
use crate::units::Stamp;
use blockmason::events::Event;
use serde::Deserialize;
use std::ops::ControlFlow;
use std::path::PathBuf;

/// Show what has happened in a running daemon: graphs that came, changed and went, errors, notices.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason events
  mason events --follow
  mason events --follow --graph vm1 --json | jq -r .message

The daemon keeps the last 1024 events. Of one kind and element it takes ten in ten seconds; the next one says how
many more there were. Whoever reads more slowly than they come loses the oldest: dropped: N")]
pub(crate) struct Args {
    /// Goes on with what comes, until it is interrupted
    #[arg(short, long)]
    follow: bool,

    /// Begins with the last N events
    #[arg(long, value_name = "N", default_value_t = 100)]
    last: u32,

    /// Only events of this graph: its name, or the path of its file
    #[arg(long, value_name = "GRAPH")]
    graph: Option<PathBuf>,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes a JSON object a line
    #[arg(long)]
    json: bool,
}

/// A line of the stream.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Event(Event),
    Dropped { dropped: u64 },
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let follow = args.follow;
    let mut query = format!("/v1/events?last={}&follow={follow}", args.last);
    if let Some(graph) = &args.graph {
        // A graph that has gone has events all the same, so nobody asks whether it is there.
        query += &crate::control::client::path(&[&name_of(graph)]).replacen('/', "&graph=", 1);
    }
    client.lines(&query, |line| {
        if args.json {
            output::text(&(printable(line) + "\n"))?;
        } else {
            let line: Line = serde_json::from_str(line)
                .map_err(|error| Failure::new(format!("the daemon says what is no event: {error}")))?;
            output::text(&text(&line))?;
        }
        Ok(ControlFlow::Continue(()))
    })?;
    if follow { Err(Failure::new("the daemon has ended")) } else { Ok(()) }
}

fn text(line: &Line) -> String {
    let event = match line {
        Line::Dropped { dropped } => return format!("dropped: {dropped}\n"),
        Line::Event(event) => event,
    };
    let element = event.element.as_ref().map_or_else(String::new, |element| format!("{element}: "));
    // An error names its element itself.
    let element = if event.message.starts_with(&element) { "" } else { &element };
    let details: Vec<_> = event.fields.iter().map(|(key, value)| format!("{key} {value}")).collect();
    let details = if details.is_empty() { String::new() } else { format!(" ({})", details.join(", ")) };
    // An event is a line; the others (how layouts differ, say) are in --json and were said to whoever asked.
    let (message, more) = match event.message.split_once('\n') {
        Some((first, _)) => (first, " ..."),
        None => (event.message.as_str(), ""),
    };
    let line =
        format!("{} {} {} {element}{message}{more}{details}", Stamp(event.time), event.graph, event.kind);
    printable(&line) + "\n"
}
