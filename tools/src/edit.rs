//! `mason add`, `remove`, `connect`, `disconnect`, `insert` and `replace`: single edits of a running graph.

use crate::control::client::path;
use crate::control::find;
use crate::failure::Outcome;
use crate::folders::here;
use crate::output;
use crate::reload::{ChangeArgs, summary};
use crate::view::ChangeView;
use blockmason::lang::Edit;

/// Add statements to a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason add 'element P (type probe)  Guest -> P -> Disk'
  mason add 'element Log (type debug_log)' 'Guest -> Log -> Disk' --dry-run

An edge from a port that leads somewhere already takes the place of the old one. On stdout: the graph file
that gives the same result.")]
pub(crate) struct AddArgs {
    /// Elements and edges, in the graph language
    #[arg(required = true, value_name = "STATEMENTS")]
    statements: Vec<String>,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Remove elements from a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason remove Probe

What led to an element leads to what it led to; what nothing reaches any more goes along.")]
pub(crate) struct RemoveArgs {
    /// Their names
    #[arg(required = true, value_name = "ELEMENT")]
    elements: Vec<String>,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Connect ports of a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason connect 'Guest -> Disk'
  mason connect '(Tee, new) -> B'

An edge from a port that leads somewhere already takes the place of the old one; what nothing reaches any
more goes along.")]
pub(crate) struct ConnectArgs {
    /// Edges, in the graph language
    #[arg(required = true, value_name = "EDGE")]
    edges: Vec<String>,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Take edges out of a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason disconnect '(Tee, new) -> B'

What nothing reaches any more goes along. A port that must lead somewhere cannot be left open: `mason
connect` leads it elsewhere.")]
pub(crate) struct DisconnectArgs {
    /// Edges, in the graph language
    #[arg(required = true, value_name = "EDGE")]
    edges: Vec<String>,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Insert an element into an edge of a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason insert probe between Guest and Disk
  mason insert 'P (type probe)' between '(Tee, old)' and A
  mason insert 'Limit (type throttle) (rate 20M/s)' between Guest and Disk --save")]
pub(crate) struct InsertArgs {
    /// The element, or only its type
    element: String,

    #[arg(value_name = "between", value_parser = ["between"], hide_possible_values = true)]
    between: String,

    /// The upper end of the edge: an element, or `(ELEMENT, PORT)`
    above: String,

    #[arg(value_name = "and", value_parser = ["and"], hide_possible_values = true)]
    and: String,

    /// The lower end
    below: String,

    #[command(flatten)]
    change: ChangeArgs,
}

/// Put something else in the place of an element of a running graph.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason replace Disk '(type file) (path other.img)'
  mason replace A 'element Both (type linear) element Low (type slice) (length 512M)
                   element High (type slice) (offset 512M)
                   (Both, low) -> Low -> A  (Both, high) -> High -> A'

What led to the element leads to the first one of the statements. It stays if they lead to it.")]
pub(crate) struct ReplaceArgs {
    /// Its name
    element: String,

    /// Elements and edges, in the graph language; or its own type and parameters anew
    #[arg(value_name = "STATEMENTS")]
    by: String,

    #[command(flatten)]
    change: ChangeArgs,
}

pub(crate) fn add(args: &AddArgs) -> Outcome {
    make(&args.change, args.statements.iter().map(|text| Edit::Add { text: text.clone() }))
}

pub(crate) fn remove(args: &RemoveArgs) -> Outcome {
    make(&args.change, args.elements.iter().map(|element| Edit::Remove { element: element.clone() }))
}

pub(crate) fn connect(args: &ConnectArgs) -> Outcome {
    make(&args.change, args.edges.iter().map(|edge| Edit::Connect { edge: edge.clone() }))
}

pub(crate) fn disconnect(args: &DisconnectArgs) -> Outcome {
    make(&args.change, args.edges.iter().map(|edge| Edit::Disconnect { edge: edge.clone() }))
}

pub(crate) fn insert(args: &InsertArgs) -> Outcome {
    let (element, above, below) = (args.element.clone(), args.above.clone(), args.below.clone());
    make(&args.change, [Edit::Insert { element, above, below }])
}

pub(crate) fn replace(args: &ReplaceArgs) -> Outcome {
    make(&args.change, [Edit::Replace { element: args.element.clone(), by: args.by.clone() }])
}

/// Sends the edits. What has happened goes to stderr, so that stdout is a graph file.
fn make(change: &ChangeArgs, edits: impl IntoIterator<Item = Edit>) -> Outcome {
    let folder = here()?;
    let (client, _) = change.control.connect()?;
    let graph = find::graph(&client, change.graph.as_deref())?;
    let edits: Vec<Edit> = edits.into_iter().collect();
    let request = serde_json::json!({ "edits": edits, "folder": folder, "options": change.options() });
    let view: ChangeView = client.post(&path(&["v1", "graphs", &graph.name, "edits"]), &request)?;
    if change.json {
        return output::json(&view);
    }
    eprint!("{}", summary(&view));
    output::text(&output::printable_lines(&view.graph))
}
