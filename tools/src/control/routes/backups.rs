//! Disks that are backed up.

use super::Json as Body;
use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::view::{BackupRequest, BackupView};
use axum::Json;
use axum::extract::{Path, State};
use std::sync::Arc;

/// Back a disk up
///
/// Answered when guests go on: the backup is the disk as it was before that. It is copied in the background, whether
/// anybody asks how far it is or not; what guests write meanwhile is merged into the disk at the end. One disk of a
/// graph is backed up at a time, and the graph does not change otherwise meanwhile.
#[utoipa::path(post, path = "/v1/graphs/{name}/backups", tag = "backups", operation_id = "begin_backup",
    request_body = BackupRequest,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = BackupView),
        (status = 400, description = "it cannot be backed up there", body = RefusalBody),
        (status = 404, description = "there is no such graph or element", body = RefusalBody),
        (status = 409, description = "the graph is being backed up, moved or tried, or the target belongs to somebody",
            body = RefusalBody),
        (status = "default", description = "the target cannot be served", body = RefusalBody),
    ))]
pub(super) async fn begin(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(request): Body<BackupRequest>,
) -> Result<Json<BackupView>, Refusal> {
    Ok(Json(daemon.find(&name)?.begin_backup(&daemon, &request).await?))
}

/// List the backups of a graph
///
/// The one that goes on, and the last one of each disk that is over.
#[utoipa::path(get, path = "/v1/graphs/{name}/backups", tag = "backups", operation_id = "list_backups",
    params(("name" = String, Path, description = "the graph's name")),
    responses((status = 200, body = Vec<BackupView>), (status = 404, body = RefusalBody)))]
pub(super) async fn list(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<Vec<BackupView>>, Refusal> {
    Ok(Json(daemon.find(&name)?.backups()))
}

/// Show the backup of a disk
#[utoipa::path(get, path = "/v1/graphs/{name}/backups/{element}", tag = "backups", operation_id = "show_backup",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the disk"),
    ),
    responses((status = 200, body = BackupView), (status = 404, body = RefusalBody)))]
pub(super) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element)): Path<(String, String)>,
) -> Result<Json<BackupView>, Refusal> {
    let served = daemon.find(&name)?;
    Ok(Json(served.backup_of(&element)?.view(&served)))
}

/// Give the backup of a disk up
///
/// Answered at once: how far it is says `GET`.
#[utoipa::path(post, path = "/v1/graphs/{name}/backups/{element}/abort", tag = "backups",
    operation_id = "abort_backup",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the disk"),
    ),
    responses(
        (status = 200, body = BackupView),
        (status = 400, description = "it is over", body = RefusalBody),
        (status = 404, body = RefusalBody),
    ))]
pub(super) async fn abort(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element)): Path<(String, String)>,
) -> Result<Json<BackupView>, Refusal> {
    let served = daemon.find(&name)?;
    let job = served.backup_of(&element)?;
    job.abort()?;
    Ok(Json(job.view(&served)))
}
