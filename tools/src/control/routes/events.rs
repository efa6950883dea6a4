//! What has happened, and what happens.

use crate::control::daemon::Daemon;
use crate::control::refusal::{Refusal, RefusalBody};
use crate::view::EventView;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use blockmason::events::Follower;
use serde::Deserialize;
use std::convert::Infallible;
use std::sync::Arc;
use utoipa::IntoParams;

/// Events that are taken at a time.
const BATCH: usize = 64;

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// Begin with so many of the last events; those that are kept are at most 1024
    #[serde(default)]
    last: u32,
    /// Go on with what comes
    #[serde(default)]
    follow: bool,
    /// Only events of this graph
    graph: Option<String>,
}

/// Events, a JSON object a line
///
/// To a reader that is too slow for them, `{"dropped": N}` says how many have been lost.
#[utoipa::path(get, path = "/v1/events", tag = "daemon", operation_id = "events", params(Wanted),
    responses(
        (status = 200, content_type = "application/x-ndjson", body = EventView),
        (status = 400, body = RefusalBody),
    ))]
pub(super) async fn events(
    State(daemon): State<Arc<Daemon>>,
    wanted: Result<Query<Wanted>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(wanted) = wanted.map_err(|error| Refusal::invalid(error.body_text()))?;
    let follower = daemon.host.events().follow(wanted.last as usize);
    let lines = futures::stream::unfold((follower, wanted), async |(mut follower, wanted)| {
        let lines = lines(&mut follower, &wanted).await?;
        Some((Ok::<_, Infallible>(Bytes::from(lines)), (follower, wanted)))
    });
    let ty = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((ty, Body::from_stream(lines)).into_response())
}

/// The next lines; None at the end.
async fn lines(follower: &mut Follower, wanted: &Wanted) -> Option<String> {
    loop {
        if wanted.follow {
            follower.wait().await;
        }
        let news = follower.take(BATCH);
        if news.events.is_empty() {
            return None;
        }
        let mut lines = String::new();
        if news.dropped > 0 {
            lines += &format!("{{\"dropped\":{}}}\n", news.dropped);
        }
        for event in news.events {
            if wanted.graph.as_ref().is_none_or(|graph| *graph == event.graph) {
                lines += &serde_json::to_string(&*event).ok()?;
                lines.push('\n');
            }
        }
        if !lines.is_empty() {
            return Some(lines);
        }
    }
}
