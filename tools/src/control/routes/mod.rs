//! What the control socket answers: one file for each subject. Every route is given to the router with its
//! description, so that docs/openapi.json has all of them.

mod backups;
mod changes;
mod counters;
mod daemon;
mod events;
mod graphs;
mod handlers;
mod handover;
mod metrics;
mod moves;
mod pools;
mod text;
mod trace;
mod trials;

use super::daemon::Daemon;
use super::refusal::Refusal;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use serde::de::DeserializeOwned;
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

#[derive(OpenApi)]
#[openapi(info(
    title = "mason",
    description = "The control socket of a running mason: HTTP/1.1 over a unix socket, for the user who \
                   runs the daemon and for root. Whoever asks for a change is answered when it has taken \
                   effect."
))]
struct Document;

fn described() -> OpenApiRouter<Arc<Daemon>> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(daemon::daemon))
        .routes(routes!(daemon::status))
        .routes(routes!(handover::handover))
        .routes(routes!(events::events))
        .routes(routes!(metrics::metrics))
        .routes(routes!(graphs::list, graphs::load))
        .routes(routes!(graphs::show, graphs::unload))
        .routes(routes!(graphs::activate))
        .routes(routes!(changes::reload))
        .routes(routes!(changes::edit))
        .routes(routes!(changes::save))
        .routes(routes!(trials::try_graph))
        .routes(routes!(trials::commit))
        .routes(routes!(trials::discard))
        .routes(routes!(moves::list, moves::begin))
        .routes(routes!(moves::show))
        .routes(routes!(moves::ask))
        .routes(routes!(moves::together))
        .routes(routes!(backups::list, backups::begin))
        .routes(routes!(backups::show))
        .routes(routes!(backups::abort))
        .routes(routes!(pools::ask))
        .routes(routes!(text::text))
        .routes(routes!(counters::counters))
        .routes(routes!(trace::trace))
        .routes(routes!(trace::last))
        .routes(routes!(handlers::list))
        .routes(routes!(handlers::get, handlers::set, handlers::call))
}

/// Answers every request.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    let (router, _) = described().split_for_parts();
    router.fallback(unknown).method_not_allowed_fallback(wrong_method).with_state(daemon)
}

/// Answers with counters, and nothing else.
pub(super) fn metrics_router(daemon: Arc<Daemon>) -> Router {
    let (router, _) = OpenApiRouter::new().routes(routes!(metrics::metrics)).split_for_parts();
    router.fallback(unknown).method_not_allowed_fallback(wrong_method).with_state(daemon)
}

/// The description of all routes, docs/openapi.json.
pub(crate) fn document() -> utoipa::openapi::OpenApi {
    described().into_openapi()
}

async fn unknown() -> Refusal {
    Refusal::not_found("there is no such path")
}

async fn wrong_method() -> Refusal {
    Refusal::new("unsupported", "that cannot be done with this path")
}

/// A body of JSON.
struct Json<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Json<T>, Refusal> {
        let body = Bytes::from_request(request, state).await.map_err(Refusal::invalid)?;
        let parsed = serde_json::from_slice(&body);
        parsed
            .map(Json)
            .map_err(|error| Refusal::invalid(format!("the body is not what belongs here: {error}")))
    }
}
