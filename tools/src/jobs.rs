//! What the commands share that ask for long jobs of a daemon: moves, backups.

use crate::control::client::{Client, path};
use crate::control::find::{self, ControlArgs};
use crate::failure::Outcome;
use crate::view::GraphSummary;
use serde::de::DeserializeOwned;

/// What every form of them takes.
#[derive(clap::Args)]
pub(crate) struct JobArgs {
    #[command(flatten)]
    pub(crate) control: ControlArgs,

    /// Writes JSON: one object for what is begun, a list of them for what several may be
    #[arg(long)]
    pub(crate) json: bool,
}

/// All jobs of a kind, `moves`: of one graph, or of every one.
pub(crate) fn list<V: DeserializeOwned>(client: &Client, graph: Option<&str>, kind: &str) -> Outcome<Vec<V>> {
    let names = match graph {
        Some(_) => vec![find::graph(client, graph)?.name],
        None => client.get::<Vec<GraphSummary>>("/v1/graphs")?.into_iter().map(|graph| graph.name).collect(),
    };
    let mut all = Vec::new();
    for name in names {
        all.extend(client.get::<Vec<V>>(&path(&["v1", "graphs", &name, kind]))?);
    }
    Ok(all)
}
