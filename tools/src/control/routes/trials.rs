//! Trying a graph over copies on write.

use super::Json as Body;
use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::graphs::Reader;
use crate::view::{ChangeOptions, ChangeView, ReloadRequest};
use axum::Json;
use axum::extract::{Path, State};
use std::sync::Arc;

/// Try a graph
///
/// It replaces the one that runs, with a copy on write above each disk: the disks stay as they are.
#[utoipa::path(post, path = "/v1/graphs/{name}/try", tag = "trials", operation_id = "try_graph",
    request_body = ReloadRequest,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = ChangeView),
        (status = 400, description = "the graph is not good", body = RefusalBody),
        (status = 404, body = RefusalBody),
        (status = 409, description = "one is being tried, or clients or requests are in the way",
            body = RefusalBody),
        (status = "default", description = "it cannot be served", body = RefusalBody),
    ))]
pub(super) async fn try_graph(
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
    Ok(Json(served.try_graph(&daemon, file, &request.options).await?))
}

/// Keep what a tried graph wrote
///
/// Everything is merged into the disks while clients go on, then the copies on write are taken out; then comes
/// the answer. It goes on whether whoever asked is still there or not. After a failure it may be asked for
/// again.
#[utoipa::path(post, path = "/v1/graphs/{name}/commit", tag = "trials", operation_id = "commit_graph",
    request_body = ChangeOptions,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = ChangeView),
        (status = 400, description = "it is not being tried", body = RefusalBody),
        (status = 404, body = RefusalBody),
        (status = "default", description = "it could not be merged", body = RefusalBody),
    ))]
pub(super) async fn commit(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(options): Body<ChangeOptions>,
) -> Result<Json<ChangeView>, Refusal> {
    Ok(Json(daemon.find(&name)?.commit(&daemon, &options).await?))
}

/// Forget what a tried graph wrote
///
/// The graph before runs again, and its disks are as they were. Refused while a client is connected, unless
/// `disconnect` says otherwise: a mounted file system must not see it.
#[utoipa::path(post, path = "/v1/graphs/{name}/discard", tag = "trials", operation_id = "discard_graph",
    request_body = ChangeOptions,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = ChangeView),
        (status = 400, description = "it is not being tried", body = RefusalBody),
        (status = 404, body = RefusalBody),
        (status = 409, description = "a client is connected, or a commit has begun", body = RefusalBody),
        (status = "default", description = "the graph before cannot be served", body = RefusalBody),
    ))]
pub(super) async fn discard(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(options): Body<ChangeOptions>,
) -> Result<Json<ChangeView>, Refusal> {
    Ok(Json(daemon.find(&name)?.discard(&daemon, &options).await?))
}
