//! Graphs that serve: which there are, one more, one less.

use super::Json as Body;
use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::graphs::Reader;
use crate::view::{Activated, GraphSummary, GraphTexts, GraphView};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use blockmason::live::Heads;
use serde::Deserialize;
use std::sync::Arc;

/// The graphs that serve
#[utoipa::path(get, path = "/v1/graphs", tag = "graphs", operation_id = "list_graphs",
    responses((status = 200, body = Vec<GraphSummary>)))]
pub(super) async fn list(State(daemon): State<Arc<Daemon>>) -> Json<Vec<GraphSummary>> {
    Json(daemon.served().iter().map(|served| served.summary()).collect())
}

/// Serve one more graph
///
/// Answered when its exports accept. Its name is the stem of its file.
#[utoipa::path(post, path = "/v1/graphs", tag = "graphs", operation_id = "load_graph",
    request_body = GraphTexts,
    responses(
        (status = 201, body = GraphSummary),
        (status = 400, description = "the graph is not good", body = RefusalBody),
        (status = 409, description = "a graph of that name serves, or something it needs is in use",
            body = RefusalBody),
        (status = "default", description = "it cannot be served", body = RefusalBody),
    ))]
pub(super) async fn load(
    State(daemon): State<Arc<Daemon>>,
    Body(texts): Body<GraphTexts>,
) -> Result<(StatusCode, Json<GraphSummary>), Refusal> {
    let (choice, heads) = (texts.choice(), if texts.force { Heads::Ignore } else { Heads::Verify });
    let given = texts.defines.or(&daemon.reader.given);
    let reader = Reader { given, ..daemon.reader.clone() };
    let file = reader.read_sources(&texts.sources).map_err(|diagnostics| Refusal::graph(&diagnostics))?;
    drop(texts.sources);
    let served = daemon.load(file, choice, heads).await?;
    Ok((StatusCode::CREATED, Json(served.summary())))
}

/// One graph, with its counters
#[utoipa::path(get, path = "/v1/graphs/{name}", tag = "graphs", operation_id = "show_graph",
    params(("name" = String, Path, description = "the graph's name")),
    responses((status = 200, body = GraphView), (status = 404, body = RefusalBody)))]
pub(super) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<GraphView>, Refusal> {
    Ok(Json(daemon.find(&name)?.view()))
}

/// How a graph is unloaded.
#[derive(Deserialize)]
pub(super) struct Unload {
    undrained: Option<bool>,
}

/// End service of a graph
///
/// Its exports close, requests in flight end, what was written is flushed; then comes the answer. A flush that
/// failed is an error, and the graph has gone all the same.
#[utoipa::path(delete, path = "/v1/graphs/{name}", tag = "graphs", operation_id = "unload_graph",
    params(("name" = String, Path, description = "the graph's name"),
        ("undrained" = Option<bool>, Query,
            description = "leaves what only a cache on this machine has, for when the graph is loaded here again")),
    responses(
        (status = 204, description = "it has gone"),
        (status = 404, body = RefusalBody),
        (status = 409, description = "it is being unloaded already, or a cache has what is not below yet", body = RefusalBody),
        (status = "default", description = "it has gone, and what it held was not all flushed",
            body = RefusalBody),
    ))]
pub(super) async fn unload(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    how: Result<Query<Unload>, QueryRejection>,
) -> Result<StatusCode, Refusal> {
    let Query(Unload { undrained }) = how.map_err(Refusal::invalid)?;
    daemon.unload(&name, undrained.unwrap_or(false)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Serve a graph that stands by
///
/// Claims its volumes, opens everything and lets requests in. Answered when that is done; also if it serves already.
#[utoipa::path(post, path = "/v1/graphs/{name}/activate", tag = "graphs", operation_id = "activate_graph",
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, description = "it serves", body = Activated),
        (status = 404, body = RefusalBody),
        (status = "default", description = "something cannot be opened, or belongs to somebody else; it stands by as before",
            body = RefusalBody),
    ))]
pub(super) async fn activate(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<Activated>, Refusal> {
    let activated = daemon.find(&name)?.activate(&daemon).await?;
    Ok(Json(Activated { graph: name, activated }))
}
