//! `mason unload`: a running daemon ends service of a graph.

use crate::control::client::path;
use crate::control::find::{self, ControlArgs};
use crate::failure::Outcome;
use crate::output;

/// End service of one graph of a running daemon.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason unload vm2
  mason unload vm2.mason
  mason unload vm2 --undrained
  mason unload vm2 --control /run/mason/control.sock

The graph's exports close, requests in flight end, what was written is flushed; then it returns. While a cache on an SSD has
what is not below yet, it is refused: another host would find an older disk there. Call the cache's `drain` before.
The daemon goes on, also when that was its last graph: `mason load` gives it another one, SIGTERM ends it.")]
pub(crate) struct Args {
    /// The graph's name, or the path of its file
    #[arg(value_name = "GRAPH")]
    graph: String,

    /// Leaves in caches on this machine what is not below yet, for when the graph is loaded here again
    #[arg(long)]
    undrained: bool,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, _) = args.control.connect()?;
    let graph = find::graph(&client, Some(&args.graph))?;
    let how = if args.undrained { "?undrained=true" } else { "" };
    client.delete(&(path(&["v1", "graphs", &graph.name]) + how))?;
    if args.json { output::json(&serde_json::json!({ "unloaded": graph.name })) } else { Ok(()) }
}
