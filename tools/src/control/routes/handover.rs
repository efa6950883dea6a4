//! The daemon goes, and another process serves.

use super::Json as Body;
use crate::control::daemon::{Daemon, Gone};
use crate::control::refusal::{Refusal, RefusalBody};
use crate::control::server::Ended;
use crate::handover::giving::hand_over;
use crate::view::{HandedOver, HandoverRequest};
use axum::extract::State;
use axum::http::header::CONNECTION;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use std::sync::Arc;

/// Replace the program
///
/// Answered when the new process serves; the old one then ends, and with it its connections to this socket,
/// whose path is the new one's. Or nothing has changed, but that requests may have waited.
#[utoipa::path(post, path = "/v1/handover", tag = "daemon", operation_id = "hand_over",
    request_body = HandoverRequest,
    responses(
        (status = 200, body = HandedOver),
        (status = 400, description = "a graph has what cannot be handed over", body = RefusalBody),
        (status = 404, description = "there is no such program", body = RefusalBody),
        (status = 409, description = "something is being changed, or requests did not end in time",
            body = RefusalBody),
        (status = "default", description = "the new program has failed; the old one goes on", body = RefusalBody),
    ))]
pub(super) async fn handover(
    State(daemon): State<Arc<Daemon>>,
    Extension(told): Extension<Ended>,
    Body(request): Body<HandoverRequest>,
) -> Result<Response, Refusal> {
    let handed = hand_over(&daemon, &request).await?;
    daemon.go(Gone { to: handed.to, told });
    // The connection ends when the answer has been sent, and then this process does.
    Ok(([(CONNECTION, "close")], Json(handed)).into_response())
}
