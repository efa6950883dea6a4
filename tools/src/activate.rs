//! `mason activate`: a graph that stands by serves.

use crate::control::client::path;
use crate::control::find::{self, ControlArgs};
use crate::failure::Outcome;
use crate::output::{self, printable};
use crate::view::Activated;

/// Serve a graph that stands by.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason activate vm1
  mason activate vm1 --control /run/mason/control.sock --json

A graph with (standby yes) on an export only listens: clients connect and learn how large the disk is, and what they ask
for waits. This claims the volumes, opens everything else and lets requests in; when it returns, the graph serves. If
something cannot be opened, the graph stands by as before.

For a virtual machine that moves: the host it moves to loads the graph and connects; when the machine stands still, the
host before ends service with `mason unload`, and this one activates. A daemon that starts again serves what was activated
at once, until the graph is unloaded.")]
pub(crate) struct Args {
    /// The graph's name, or the path of its file; needless where only one is served
    #[arg(value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    let answer: Activated =
        client.post(&path(&["v1", "graphs", &graph.name, "activate"]), &serde_json::json!({}))?;
    if args.json {
        return output::json(&answer);
    }
    let what = if answer.activated { "serves" } else { "served before" };
    output::text(&format!("{} {what}\n", printable(&answer.graph)))
}
