//! `mason reload`, and what all commands share that change a running graph.

use crate::control::client::{Client, path};
use crate::control::find::{self, ControlArgs};
use crate::failure::{Failure, Outcome};
use crate::folders::Folders;
use crate::graphs::{DefineArgs, Reader};
use crate::output::{self, printable_lines};
use crate::units::Nanos;
use crate::view::{ChangeOptions, ChangeView, GraphSummary};
use blockmason::lang::value::Time;
use std::path::{Path, PathBuf};

/// Replace a running graph by another one, while its clients use it.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason reload vm1.mason --dry-run
  mason reload vm1.mason
  mason reload other.mason --graph vm1 --save

Elements with the same name, type and parameters go on; the others are built anew. Where only elements
change that need not see every request (probe, delay, throttle ...), requests do not wait; else they wait at
a gate until those in flight have ended. When anything fails, the old graph has never stopped serving.

Where the graph then runs differently from its own file, the next `mason run` says so or serves what ran;
--save writes the file anew instead, without its comments, parameters and includes.")]
pub(crate) struct Args {
    /// The graph file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    defines: DefineArgs,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Which graph changes, and how.
#[derive(clap::Args)]
pub(crate) struct ChangeArgs {
    /// The running graph's name, or the path of its file [default: the only one]
    #[arg(long, value_name = "GRAPH")]
    pub(crate) graph: Option<String>,

    /// Says what would change, and changes nothing
    #[arg(long)]
    dry_run: bool,

    /// Writes the graph as it then runs into its file
    #[arg(long, conflicts_with = "dry_run")]
    save: bool,

    /// Sends clients away that could not live with the change, instead of refusing it
    #[arg(long)]
    disconnect: bool,

    /// Serves volumes even if their heads name another layout; the heads stay as they are
    #[arg(long)]
    force: bool,

    /// Makes the graph's layout that of its volumes: their heads are written anew
    #[arg(long, conflicts_with = "force")]
    sign: bool,

    /// How long requests in flight may take to end before the change is given up
    #[arg(long, value_name = "TIME", default_value = "5s")]
    deadline: Time,

    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

impl ChangeArgs {
    /// An option that writes files which a trial leaves alone.
    pub(crate) fn written_by(&self) -> Option<&'static str> {
        match (self.save, self.sign) {
            (true, _) => Some("--save"),
            (_, true) => Some("--sign"),
            _ => None,
        }
    }

    pub(crate) fn options(&self) -> ChangeOptions {
        ChangeOptions {
            dry_run: self.dry_run,
            save: self.save,
            disconnect: self.disconnect,
            force: self.force,
            sign: self.sign,
            deadline_seconds: Some(self.deadline.0.as_secs_f64()),
        }
    }
}

/// What has happened, in words.
pub(crate) fn summary(view: &ChangeView) -> String {
    let mut out = printable_lines(&view.text);
    if !view.done {
        return out;
    }
    if let (true, Some(pause), Some(took)) = (view.changes, view.pause_seconds, view.took_seconds) {
        out += &match pause > 0.0 {
            true => format!("done in {}, the gate was closed for {}\n", time(took), time(pause)),
            false => format!("done in {}\n", time(took)),
        };
    }
    for request in &view.left {
        out += &format!("still on its way in the graph before: {}\n", printable_lines(request));
    }
    if view.differs_from_file {
        out += "the graph's file says something else: `mason save` writes it anew\n";
    }
    out
}

fn time(seconds: f64) -> Nanos {
    Nanos((seconds * 1e9) as u64)
}

/// Reads a graph file for a running graph: the daemon, the graph, and what it is to be sent.
pub(crate) fn read(
    file: &Path,
    defines: &DefineArgs,
    change: &ChangeArgs,
) -> Outcome<(Client, GraphSummary, serde_json::Value)> {
    let (here, given) = defines.read()?;
    let (client, daemon) = change.control.connect()?;
    let graph = find::graph(&client, change.graph.as_deref())?;
    // As the daemon will read it, so that what is wrong is drawn here, where the file is.
    let reader = Reader {
        folders: Folders { state: daemon.state, run: daemon.run },
        here,
        given: given.clone().or(&daemon.defines),
    };
    let file = reader.read_or_say(file)?;
    let request = serde_json::json!({
        "sources": &*file.spec.sources, "defines": given, "options": change.options(),
    });
    Ok((client, graph, request))
}

pub(crate) fn main(args: &Args) -> Outcome {
    let (client, graph, request) = read(&args.file, &args.defines, &args.change)?;
    let view: ChangeView = client.post(&path(&["v1", "graphs", &graph.name, "reload"]), &request)?;
    if args.change.json { output::json(&view) } else { output::text(&summary(&view)) }
}

/// Write a running graph into its file.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason save
  mason save vm1

The file is replaced as a whole: at every moment it is the old one or the new one. Comments, parameters and
includes are not kept.")]
pub(crate) struct SaveArgs {
    /// The graph's name, or the path of its file [default: the only one]
    #[arg(value_name = "GRAPH")]
    graph: Option<String>,

    #[command(flatten)]
    control: ControlArgs,

    /// Writes one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn save(args: &SaveArgs) -> Outcome {
    let (client, _) = args.control.connect()?;
    let graph = find::graph(&client, args.graph.as_deref())?;
    client.post::<()>(&path(&["v1", "graphs", &graph.name, "save"]), &serde_json::json!({}))?;
    let saved = graph.path.to_str().ok_or_else(|| Failure::new("the path of the file is no text"))?;
    if args.json { output::json(&serde_json::json!({ "saved": saved })) } else { Ok(()) }
}
