//! `mason load`: one more graph for a running daemon.

use crate::control::client::path;
use crate::control::find::ControlArgs;
use crate::failure::Outcome;
use crate::folders::Folders;
use crate::graphs::{DefineArgs, Reader};
use crate::output::{self, printable};
use crate::view::GraphSummary;
use std::path::PathBuf;

/// Serve one more graph from a running daemon.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason load vm2.mason
  mason load vm2.mason -D image=/srv/vm2.img
  mason load vm2.mason --control /run/mason/control.sock --json

Returns when every export accepts, with one line on stdout for each: ready ELEMENT URI
The graph files are read here, with all that they include; what they name is opened by the daemon.
Where -D is silent, that of the daemon's `mason run` counts.")]
pub(crate) struct Args {
    /// The graph file
    #[arg(value_name = "GRAPH")]
    file: PathBuf,

    #[command(flatten)]
    defines: DefineArgs,

    #[command(flatten)]
    left: crate::left::LeftArgs,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (here, given) = args.defines.read()?;
    let (client, daemon) = args.control.connect()?;
    // As the daemon will read it, so that what is wrong is drawn here, where the file is.
    let reader = Reader {
        folders: Folders { state: daemon.state, run: daemon.run },
        here,
        given: given.clone().or(&daemon.defines),
    };
    let file = reader.read_or_say(&args.file)?;
    let texts = serde_json::json!({ "sources": &*file.spec.sources, "defines": given, "as_it": args.left.word(), "force": args.left.force });
    let loaded: GraphSummary = client.post(&path(&["v1", "graphs"]), &texts)?;
    if args.json {
        return output::json(&loaded);
    }
    let lines = loaded.exports.iter().map(|export| format!("ready {} {}\n", export.element, export.uri));
    output::text(&lines.map(|line| printable(line.trim_end()) + "\n").collect::<String>())
}
