//! The daemon itself.

use crate::control::daemon::Daemon;
use crate::view::{DaemonView, Status};
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

/// Who serves, and how it understands graph files
#[utoipa::path(get, path = "/v1/daemon", tag = "daemon", responses((status = 200, body = DaemonView)))]
pub(super) async fn daemon(State(daemon): State<Arc<Daemon>>) -> Json<DaemonView> {
    Json(DaemonView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: daemon.started.elapsed().as_secs_f64(),
        graphs: daemon.served().iter().map(|served| served.live.name().to_owned()).collect(),
        state: daemon.reader.folders.state.clone(),
        run: daemon.reader.folders.run.clone(),
        defines: daemon.reader.given.clone(),
    })
}

/// Everything that serves, with its counters
#[utoipa::path(get, path = "/v1/status", tag = "daemon", responses((status = 200, body = Status)))]
pub(super) async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Status> {
    Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: daemon.started.elapsed().as_secs_f64(),
        graphs: daemon.served().iter().map(|served| served.view()).collect(),
    })
}
