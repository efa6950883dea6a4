//! Disks on their way to other stores.

use super::Json as Body;
use crate::control::daemon::{Daemon, Served};
use crate::control::moving::{Job, cut_over};
use crate::control::refusal::{Refusal, RefusalBody};
use crate::view::{CutoverRequest, MoveRequest, MoveState, MoveView};
use axum::Json;
use axum::extract::{Path, State};
use std::sync::Arc;

/// Move a disk to another store
///
/// Answered when the mirror is in place: from then on what guests change goes to both disks, and the rest is copied
/// in the background, whether anybody asks how far it is or not. When both are the same the new one takes over,
/// unless that is to wait for a request.
#[utoipa::path(post, path = "/v1/graphs/{name}/moves", tag = "moves", operation_id = "begin_move",
    request_body = MoveRequest,
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = MoveView),
        (status = 400, description = "it cannot move there", body = RefusalBody),
        (status = 404, description = "there is no such graph or element", body = RefusalBody),
        (status = 409, description = "it is on its way already, or the new disk belongs to somebody else",
            body = RefusalBody),
        (status = "default", description = "the new disk cannot be served", body = RefusalBody),
    ))]
pub(super) async fn begin(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    Body(request): Body<MoveRequest>,
) -> Result<Json<MoveView>, Refusal> {
    Ok(Json(daemon.find(&name)?.begin_move(&daemon, &request).await?))
}

/// List the moves of a graph
///
/// Those that go on, and the last one of each disk that is over.
#[utoipa::path(get, path = "/v1/graphs/{name}/moves", tag = "moves", operation_id = "list_moves",
    params(("name" = String, Path, description = "the graph's name")),
    responses(
        (status = 200, body = Vec<MoveView>),
        (status = 404, body = RefusalBody),
    ))]
pub(super) async fn list(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<Vec<MoveView>>, Refusal> {
    Ok(Json(daemon.find(&name)?.moves()))
}

/// Look at the move of a disk
#[utoipa::path(get, path = "/v1/graphs/{name}/moves/{element}", tag = "moves", operation_id = "show_move",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the disk"),
    ),
    responses(
        (status = 200, body = MoveView),
        (status = 404, body = RefusalBody),
    ))]
pub(super) async fn show(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element)): Path<(String, String)>,
) -> Result<Json<MoveView>, Refusal> {
    let served = daemon.find(&name)?;
    Ok(Json(served.move_of(&element)?.view(&served)))
}

/// Ask something of the move of a disk
///
/// `pause` and `resume` stop the copier and let it go on; `abort` gives the move up, and the old disk is the disk as
/// before; `cutover` lets the new disk take over as soon as both are the same. Of a disk that has moved and kept its
/// mirror, `cutover` goes back, and `abort` lets go of the mirror. Answered at once: how far it is says `GET`.
#[utoipa::path(post, path = "/v1/graphs/{name}/moves/{element}/{what}", tag = "moves", operation_id = "ask_move",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the disk"),
        ("what" = String, Path, description = "`pause`, `resume`, `abort` or `cutover`"),
    ),
    responses(
        (status = 200, body = MoveView),
        (status = 400, description = "the move is over", body = RefusalBody),
        (status = 404, body = RefusalBody),
    ))]
pub(super) async fn ask(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element, what)): Path<(String, String, String)>,
) -> Result<Json<MoveView>, Refusal> {
    let served = daemon.find(&name)?;
    let job = served.move_of(&element)?;
    match what.as_str() {
        "pause" => job.pause(&served, &daemon, true).await?,
        "resume" => job.pause(&served, &daemon, false).await?,
        "abort" => job.abort()?,
        "cutover" => job.cut()?,
        _ => {
            let message = format!("a move is asked to pause, resume, abort or cutover, not to {what:.40}");
            return Err(Refusal::not_found(message));
        }
    }
    Ok(Json(job.view(&served)))
}

/// Cut several disks over at one instant
///
/// All must be ready; a disk that has moved and kept its mirror has cut over already. No request is admitted to any of their graphs before all new disks have taken over. If one
/// cannot, all stay where they are.
#[utoipa::path(post, path = "/v1/cutover", tag = "moves", operation_id = "cut_over",
    request_body = CutoverRequest,
    responses(
        (status = 200, body = Vec<MoveView>),
        (status = 404, body = RefusalBody),
        (status = 409, description = "one is not ready, or requests did not end in time", body = RefusalBody),
        (status = "default", description = "one could not take over", body = RefusalBody),
    ))]
pub(super) async fn together(
    State(daemon): State<Arc<Daemon>>,
    Body(request): Body<CutoverRequest>,
) -> Result<Json<Vec<MoveView>>, Refusal> {
    let mut disks: Vec<(Arc<Served>, Arc<Job>)> = Vec::new();
    for name in &request.disks {
        let served = daemon.find(&name.graph)?;
        let job = served.move_of(&name.element)?;
        if job.state() == MoveState::Mirroring {
            let (disk, graph) = (&name.element, &name.graph);
            let message = format!(
                "{disk} of {graph} has cut over already: `mason migrate {graph} {disk} --back` goes back to the old disk"
            );
            return Err(Refusal::invalid(message));
        }
        job.goes_on()?;
        if !job.is_ready() {
            let message = format!("{} of {} is not ready: {}", name.element, name.graph, job.state().name());
            return Err(Refusal::busy(message));
        }
        if disks.iter().any(|(_, other)| Arc::ptr_eq(other, &job)) {
            return Err(Refusal::invalid(format!("{} of {} is named twice", name.element, name.graph)));
        }
        disks.push((served, job));
    }
    let deadline = request.deadline_seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
    cut_over(&daemon, &disks, deadline, request.force).await?;
    Ok(Json(disks.iter().map(|(served, job)| job.view(served)).collect()))
}
