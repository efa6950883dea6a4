//! A running graph as a graph file.

use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::graphs::CATALOGUE;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Deserialize)]
pub(super) struct Where {
    #[serde(default)]
    folder: PathBuf,
}

/// The graph as it runs, as a graph file
///
/// Without parameters, includes and compounds, with what handlers have set. It reads back as the same graph.
#[utoipa::path(get, path = "/v1/graphs/{name}/text", tag = "graphs", operation_id = "graph_text",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("folder" = Option<String>, Query,
            description = "where the file is to stand: paths in this folder stay relative"),
    ),
    responses((status = 200, content_type = "text/plain", body = String), (status = 404, body = RefusalBody)))]
pub(super) async fn text(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    folder: Result<Query<Where>, QueryRejection>,
) -> Result<String, Refusal> {
    let Query(Where { folder }) = folder.map_err(Refusal::invalid)?;
    Ok(blockmason::lang::print(&daemon.find(&name)?.live.spec(), CATALOGUE, &folder))
}
