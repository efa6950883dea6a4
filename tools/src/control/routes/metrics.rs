//! Counters for Prometheus.

use crate::control::daemon::Daemon;
use crate::control::metrics;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use std::sync::Arc;

/// All counters, in the text format of Prometheus, version 0.0.4
#[utoipa::path(get, path = "/metrics", tag = "daemon", operation_id = "metrics",
    responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(daemon): State<Arc<Daemon>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], metrics::text(&daemon))
}
