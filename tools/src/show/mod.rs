//! `mason show`: a graph drawn in several ways.

mod dot;
mod explain;
mod svg;
mod text;

use crate::control::find::ControlArgs;
use crate::failure::{Failure, Outcome};
use crate::graphs::{CATALOGUE, GraphArgs, GraphFile, Reader};
use crate::output::{self, printable};
use crate::view::{GraphView, Status};
use std::path::PathBuf;

/// Draw a graph: a graph file, or with no GRAPH what a running daemon serves.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason show vm1.mason
  mason show vm1.mason --svg > vm1.svg
  mason show vm1.mason --explain
  mason show                          what the running daemon serves, with counters
  mason show --explain                its geometry, without opening anything

--explain with a GRAPH builds the graph: it opens the files that the graph names, and makes them where
the graph says so. The other forms open nothing but graph files.")]
pub(crate) struct Args {
    /// A graph file [default: the graphs of the running daemon]
    #[arg(value_name = "GRAPH")]
    file: Option<PathBuf>,

    #[command(flatten)]
    form: Form,

    #[command(flatten)]
    parameters: GraphArgs,

    #[command(flatten)]
    control: ControlArgs,
}

/// How it is drawn; as a tree if nothing else is asked for.
#[derive(clap::Args)]
#[group(multiple = false)]
struct Form {
    /// For Graphviz
    #[arg(long)]
    dot: bool,

    /// As a picture
    #[arg(long)]
    svg: bool,

    /// As a JSON array of graphs
    #[arg(long)]
    json: bool,

    /// What each element looks like from above: size, blocks, operations
    #[arg(long)]
    explain: bool,

    /// As a graph file without parameters, includes and compounds
    #[arg(long, requires = "file")]
    graph: bool,
}

pub(crate) fn main(args: &Args) -> Outcome {
    let graphs = match &args.file {
        Some(path) => {
            let reader = args.parameters.reader()?;
            let file = reader.read_or_say(path)?;
            if args.form.graph {
                return output::text(&blockmason::lang::print(&file.spec, CATALOGUE, &reader.here));
            }
            vec![if args.form.explain {
                built(&reader, &file)?
            } else {
                GraphView::of_spec(&file.name, &file.spec)
            }]
        }
        None => args.control.connect()?.0.get::<Status>("/v1/status")?.graphs,
    };
    let Form { dot, svg, json, explain, .. } = args.form;
    if json {
        return output::json(&graphs);
    }
    let draw = match (dot, svg, explain) {
        (true, ..) => dot::draw,
        (_, true, _) => svg::draw,
        (.., true) => explain::draw,
        _ => text::draw,
    };
    if svg && graphs.len() != 1 {
        return Err(Failure::new("a picture has room for one graph: name a graph file"));
    }
    let drawn: Vec<String> = graphs.iter().map(draw).collect();
    output::text(&drawn.join("\n"))
}

/// The graph with what is known once it is built.
fn built(reader: &Reader, file: &GraphFile) -> Outcome<GraphView> {
    let state = reader.folders.state.clone().unwrap_or_default();
    file.make_folders()?;
    let graph = file.build(&state, 1).map_err(|error| Failure::in_graph(&error, &file.spec))?;
    Ok(GraphView::of_spec(&file.name, &file.spec).with_geometry(&graph))
}

/// `path disk.img, size 1G`.
fn parameters(element: &crate::view::ElementView) -> String {
    let given = element.parameters.iter().map(|p| format!("{} {}", p.name, p.values.join(" ")));
    printable(&given.collect::<Vec<_>>().join(", "))
}

/// What stands at an edge: its ports where they are not `out` and `in`.
fn ports(edge: &crate::view::EdgeView) -> String {
    match (edge.port.as_str(), edge.to_port.as_str()) {
        ("out", "in") => String::new(),
        (port, "in") => port.to_owned(),
        (port, to) => format!("{port} -> {to}"),
    }
}
