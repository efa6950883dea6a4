//! The counters of all graphs, for those who look again and again.

use crate::control::daemon::Daemon;
use crate::control::refusal::Refusal;
use crate::counters::{CountersView, GraphCounters};
use axum::Json;
use axum::extract::State;
use std::sync::Arc;

/// The counters of every graph
///
/// They go on over a reload where source or edge stay: rates are differences of two answers.
#[utoipa::path(get, path = "/v1/counters", tag = "daemon", responses((status = 200, body = CountersView)))]
pub(super) async fn counters(State(daemon): State<Arc<Daemon>>) -> Result<Json<CountersView>, Refusal> {
    let mut graphs = Vec::new();
    for served in daemon.served() {
        let in_flight = served.live.disk().count_in_flight().await.map_err(|error| Refusal::of(&error))?;
        graphs.push(GraphCounters::read(served.summary(), served.live.disk(), in_flight as u64));
    }
    Ok(Json(CountersView {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: daemon.started.elapsed().as_secs_f64(),
        graphs,
    }))
}
