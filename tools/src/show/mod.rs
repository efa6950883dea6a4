//! `mason show`: a graph drawn in several ways.

mod dot;
mod explain;
mod live;
mod svg;
mod text;

use crate::control::client::{path, segment};
use crate::control::find::{self, ControlArgs};
use crate::failure::{Failure, Outcome};
use crate::graphs::{CATALOGUE, GraphArgs, GraphFile, Reader};
use crate::output::{self, printable};
use crate::view::{GraphView, Status};
use blockmason::heads;
use blockmason::lang::value::Time;
use std::path::{Path, PathBuf};

/// Draw a graph: a graph file, or one that a running daemon serves.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  mason show vm1.mason
  mason show vm1.mason --svg > vm1.svg
  mason show vm1.mason --explain
  mason show                          what the running daemon serves, with counters
  mason show vm1 --interval 1s        its graph vm1, with the rates of a second
  mason show vm1 --graph              as a graph file, with what handlers have set
  mason show --explain                its geometry, without opening anything

GRAPH is a graph file if there is one of that path, or if it looks like a path; else the name of a running graph.
Edges of a running graph show the requests and bytes that they have carried since they came to the graph; a reload
that keeps an edge goes on counting. --interval looks twice and shows rates.
--explain with a graph file builds the graph: it opens the files that the graph names, and makes them where
the graph says so. The other forms open nothing but graph files.")]
pub(crate) struct Args {
    /// A graph file, or the name of a running graph [default: all graphs of the running daemon]
    #[arg(value_name = "GRAPH")]
    which: Option<PathBuf>,

    /// Shows the rates of this time instead of sums
    #[arg(long, value_name = "DURATION")]
    interval: Option<Time>,

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
    #[arg(long)]
    graph: bool,
}

/// What is meant by GRAPH.
enum Meaning<'a> {
    File(&'a Path),
    Running(Option<&'a str>),
}

impl Args {
    fn meaning(&self) -> Meaning<'_> {
        let Some(path) = self.which.as_deref() else { return Meaning::Running(None) };
        let is_path = path.exists() || path.extension().is_some() || path.components().count() > 1;
        match path.to_str() {
            Some(name) if !is_path => Meaning::Running(Some(name)),
            _ => Meaning::File(path),
        }
    }

    fn of_file(&self, path: &Path) -> Outcome {
        if self.interval.is_some() {
            return Err(Failure::Usage("--interval is for running graphs: a file has no rates".to_owned()));
        }
        let reader = self.parameters.reader()?;
        let file = reader.read_or_say(path)?;
        if self.form.graph {
            return output::text(&blockmason::lang::print(&file.spec, CATALOGUE, &reader.here));
        }
        let view = if self.form.explain {
            built(&reader, &file)?
        } else {
            GraphView::of_spec(&file.name, &file.spec)
        };
        self.draw(&[view])
    }

    fn of_daemon(&self, name: Option<&str>) -> Outcome {
        let (client, _) = self.control.connect()?;
        if self.form.graph {
            let graph = find::graph(&client, name)?.name;
            let here = self.parameters.reader()?.here;
            let here = here.to_str().map_or_else(String::new, |here| format!("?folder={}", segment(here)));
            return output::text(&client.text(&(path(&["v1", "graphs", &graph, "text"]) + &here))?);
        }
        let look = || -> Outcome<Vec<GraphView>> {
            match name {
                Some(name) => {
                    let graph = find::graph(&client, Some(name))?.name;
                    Ok(vec![client.get(&path(&["v1", "graphs", &graph]))?])
                }
                None => Ok(client.get::<Status>("/v1/status")?.graphs),
            }
        };
        let mut graphs = look()?;
        if let Some(interval) = self.interval {
            let before = std::mem::take(&mut graphs);
            client.block_on(blockmason::rt::sleep(interval.0));
            graphs = look()?;
            graphs.iter_mut().for_each(|graph| live::set_rates(graph, &before, interval.0));
        }
        self.draw(&graphs)
    }

    fn draw(&self, graphs: &[GraphView]) -> Outcome {
        let Form { dot, svg, json, explain, .. } = self.form;
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
            return Err(Failure::new("a picture has room for one graph: name one"));
        }
        let drawn: Vec<String> = graphs.iter().map(draw).collect();
        output::text(&drawn.join("\n"))
    }
}

pub(crate) fn main(args: &Args) -> Outcome {
    match args.meaning() {
        Meaning::File(path) => args.of_file(path),
        Meaning::Running(name) => args.of_daemon(name),
    }
}

/// The graph with what is known once it is built.
fn built(reader: &Reader, file: &GraphFile) -> Outcome<GraphView> {
    let state = reader.folders.state.clone().unwrap_or_default();
    file.make_folders()?;
    let graph = file.build(&state, 1).map_err(|error| Failure::in_graph(&error, &file.spec))?;
    let volumes = heads::survey(&[(&file.spec, &graph)], heads::Names::Keep);
    let volumes = volumes.map_err(|error| Failure::from_error(&error))?;
    Ok(GraphView::of_spec(&file.name, &file.spec).with_geometry(&graph).with_heads(&volumes))
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
