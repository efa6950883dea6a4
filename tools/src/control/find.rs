//! Which daemon is meant, and which of its graphs.

use super::client::{Client, path};
use crate::failure::{Failure, Outcome};
use crate::folders::Folders;
use crate::output::printable;
use crate::view::{DaemonView, GraphSummary};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Which daemon is meant.
#[derive(clap::Args)]
pub(crate) struct ControlArgs {
    /// The control socket of the daemon [default: the only one in $XDG_RUNTIME_DIR/mason; for root
    /// /run/mason, else /tmp/mason-UID]
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
}

impl ControlArgs {
    /// The daemon that is meant. It has just answered.
    pub(crate) fn connect(&self) -> Outcome<(Client, DaemonView)> {
        match &self.control {
            Some(path) => ask(path),
            None => only_daemon(&Folders::find(None).run),
        }
    }
}

fn ask(socket: &Path) -> Outcome<(Client, DaemonView)> {
    let client = Client::new(socket)?;
    let view = client.get("/v1/daemon")?;
    Ok((client, view))
}

/// The only daemon that answers in a folder.
fn only_daemon(folder: &Path) -> Outcome<(Client, DaemonView)> {
    let mut answers = Vec::new();
    let mut silent = Vec::new();
    for socket in sockets(folder) {
        match ask(&socket) {
            Ok(answer) => answers.push(answer),
            Err(failure) => silent.push(failure),
        }
    }
    match answers.len() {
        1 => Ok(answers.swap_remove(0)),
        0 => Err(silent.pop().unwrap_or_else(|| {
            Failure::new(format!("no daemon runs: there is no control socket in {}", folder.display()))
        })),
        _ => {
            let name = |(client, view): &(Client, DaemonView)| {
                let graphs = printable(&view.graphs.join(", "));
                format!("{} (process {}: {graphs})", client.socket().display(), view.pid)
            };
            let list: Vec<_> = answers.iter().map(name).collect();
            Err(Failure::new(format!(
                "several daemons run, name one with --control PATH: {}",
                list.join(", ")
            )))
        }
    }
}

/// Every socket in a folder that is named like a control socket.
fn sockets(folder: &Path) -> Vec<PathBuf> {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let is_socket = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|ty| ty.is_socket());
    let paths = entries.filter(is_socket).map(|entry| entry.path());
    let mut paths: Vec<_> = paths.filter(|path| path.extension().is_some_and(|e| e == "sock")).collect();
    paths.sort();
    paths
}

/// The graph that is meant: by its name, by the path of its file, or, where nothing is said, the only one.
pub(crate) fn graph(client: &Client, wanted: Option<&str>) -> Outcome<GraphSummary> {
    let graphs: Vec<GraphSummary> = client.get(&path(&["v1", "graphs"]))?;
    let names: Vec<_> = graphs.iter().map(|graph| printable(&graph.name)).collect();
    let Some(wanted) = wanted else {
        return match <[GraphSummary; 1]>::try_from(graphs) {
            Ok([graph]) => Ok(graph),
            Err(none) if none.is_empty() => Err(Failure::new("the daemon serves no graph")),
            Err(_) => Err(Failure::new(format!("several graphs are served, name one: {}", names.join(", ")))),
        };
    };
    let file = std::path::absolute(wanted).ok();
    let found = graphs.iter().find(|graph| graph.name == wanted);
    let found = found.or_else(|| graphs.iter().find(|graph| Some(&graph.path) == file.as_ref()));
    found.cloned().ok_or_else(|| {
        let there = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        Failure::new(format!("no graph {wanted} is served; served: {there}"))
    })
}
