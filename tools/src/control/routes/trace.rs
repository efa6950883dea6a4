//! The ways of sampled requests: as they happen, and what the flight recorder holds.

use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::hops::{HopView, TraceLine};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use blockmason::sched::Tracer;
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::time::Instant;

/// Hops in one piece of the answer.
const BATCH: usize = 256;

#[derive(Deserialize)]
pub(super) struct Wanted {
    sample: Option<u64>,
}

/// The hops of sampled requests, as they end
///
/// One JSON object a line: a hop, or `{"dropped":N}` when N hops so far were lost since they were not taken in
/// time. Ends when whoever asked goes, or with the graph. While it lasts, one client's request in `sample` is
/// recorded; of several, the most curious counts for all.
#[utoipa::path(get, path = "/v1/graphs/{name}/trace", tag = "trace", operation_id = "trace_graph",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("sample" = Option<u64>, Query, description = "one request in so many; all if it is missing"),
    ),
    responses(
        (status = 200, content_type = "application/x-ndjson", body = HopView),
        (status = 404, body = RefusalBody),
        (status = 409, description = "too many watch it already", body = RefusalBody),
    ))]
pub(super) async fn trace(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
    wanted: Result<Query<Wanted>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(wanted) = wanted.map_err(Refusal::invalid)?;
    let served = daemon.find(&name)?;
    let tracer = served.live.disk().trace(wanted.sample.unwrap_or(1)).await;
    let tracer = tracer.map_err(|error| Refusal::of(&error))?;
    let lines = futures::stream::unfold((tracer, 0, daemon.started), lines);
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// The next piece of the answer. The count is of what was dropped when it was last said.
async fn lines(
    (mut tracer, said, started): (Tracer, u64, Instant),
) -> Option<(Result<Bytes, Infallible>, (Tracer, u64, Instant))> {
    let mut hop = Some(tracer.next().await?);
    let mut out = Vec::new();
    for _ in 0..BATCH {
        let Some(found) = hop else { break };
        push(&mut out, &TraceLine::Hop(Box::new(HopView::of(&found, started))));
        hop = tracer.try_next();
    }
    if let Some(last) = hop {
        push(&mut out, &TraceLine::Hop(Box::new(HopView::of(&last, started))));
    }
    let dropped = tracer.dropped();
    if dropped > said {
        push(&mut out, &TraceLine::Dropped { dropped });
    }
    Some((Ok(out.into()), (tracer, dropped, started)))
}

fn push(out: &mut Vec<u8>, line: &TraceLine) {
    // Strings and numbers into memory: neither can fail.
    let _ = serde_json::to_writer(&mut *out, line);
    out.push(b'\n');
}

/// What the flight recorder holds
///
/// The last hops of sampled requests, one request in 1024 unless somebody traces; each shard remembers 1024
/// hops, over all graphs.
#[utoipa::path(get, path = "/v1/graphs/{name}/hops", tag = "trace", operation_id = "last_hops",
    params(("name" = String, Path, description = "the graph's name")),
    responses((status = 200, body = Vec<HopView>), (status = 404, body = RefusalBody)))]
pub(super) async fn last(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<Vec<HopView>>, Refusal> {
    daemon.find(&name)?;
    let hops = daemon.host.recorded().await.map_err(|error| Refusal::of(&error))?;
    let of_graph = hops.iter().filter(|hop| hop.way.graph == name);
    Ok(Json(of_graph.map(|hop| HopView::of(hop, daemon.started)).collect()))
}
