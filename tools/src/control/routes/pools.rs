//! Pools that graphs of this daemon serve.

use super::Json as Body;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::view::PoolRequest;
use axum::Json;
use blockmason::rt;
use blockmason_elements::parallax::tool::{self, Operation};
use std::path::PathBuf;

/// Do something with a pool
///
/// Answered when it is done, durably; `null` where there is nothing to say.
#[utoipa::path(post, path = "/v1/pools", tag = "pools", operation_id = "ask_pool", request_body = PoolRequest,
    responses(
        (status = 200, description = "what was found out", body = serde_json::Value),
        (status = 400, description = "it makes no sense", body = RefusalBody),
        (status = 409, description = "it may not be done now", body = RefusalBody),
    ))]
pub(super) async fn ask(Body(wanted): Body<PoolRequest>) -> Result<Json<serde_json::Value>, Refusal> {
    let operation: Operation = serde_json::from_value(wanted.operation)
        .map_err(|error| Refusal::invalid(format!("the pool can do no such thing: {error}")))?;
    let path = PathBuf::from(wanted.pool);
    let done = rt::blocking(move || tool::open(&path)?.carry_out(&operation)).await;
    let done = done.ok_or_else(|| Refusal::new("internal", "it panicked"))?;
    done.map(Json).map_err(|error| Refusal::of(&error))
}
