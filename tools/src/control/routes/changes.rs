//! Changes of a graph that serves.

use super::Json as Body;
use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::graphs::Reader;
use crate::view::{ChangeView, EditRequest, ReloadRequest};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use std::sync::Arc;

/// Replace the graph by another one
///
/// Answered when every new request enters it, or nothing has changed and the graph has never stopped
/// serving. Others that want to change it meanwhile wait. The graph keeps its name.
#[utoipa::path(post, path = "/v1/graphs/{name}/reload", tag = "changes", operation_id = "reload_graph",
    request_body = ReloadRequest,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = ChangeView),
        (status = 400, description = "the graph is not good", body = RefusalBody),
        (status = 404, body = RefusalBody),
        (status = 409, description = "a client could not live with it, or requests did not end in time",
            body = RefusalBody),
        (status = "default", description = "it cannot be served", body = RefusalBody),
    ))]
pub(super) async fn reload(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(request): Body<ReloadRequest>,
) -> Result<Json<ChangeView>, Refusal> {
    let served = daemon.find(&name)?;
    let reader = Reader { given: request.defines.or(&daemon.reader.given), ..daemon.reader.clone() };
    let file = reader.read_sources(&request.sources).map_err(|diagnostics| Refusal::graph(&diagnostics))?;
    if !request.options.dry_run {
        file.make_folders().map_err(|failure| Refusal::new("unavailable", failure))?;
    }
    Ok(Json(served.reload(&daemon, file.spec, &request.options).await?))
}

/// Make single edits
///
/// They are made one after the other, and take effect together. What nothing reaches any more goes along.
#[utoipa::path(post, path = "/v1/graphs/{name}/edits", tag = "changes", operation_id = "edit_graph",
    request_body = EditRequest,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = ChangeView),
        (status = 400, description = "an edit names what is not there, or the graph that comes out is not good",
            body = RefusalBody),
        (status = 404, body = RefusalBody),
        (status = 409, description = "a client could not live with it, or requests did not end in time",
            body = RefusalBody),
        (status = "default", description = "it cannot be served", body = RefusalBody),
    ))]
pub(super) async fn edit(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(request): Body<EditRequest>,
) -> Result<Json<ChangeView>, Refusal> {
    let served = daemon.find(&name)?;
    Ok(Json(served.edit(&daemon, &request.edits, &request.folder, &request.options).await?))
}

/// Replace the graph file by the graph as it runs
#[utoipa::path(post, path = "/v1/graphs/{name}/save", tag = "changes", operation_id = "save_graph",
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 204, description = "the file says what runs"),
        (status = 404, body = RefusalBody),
        (status = "default", description = "the file cannot be written", body = RefusalBody),
    ))]
pub(super) async fn save(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<StatusCode, Refusal> {
    daemon.find(&name)?.save().await?;
    Ok(StatusCode::NO_CONTENT)
}
