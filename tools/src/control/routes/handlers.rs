//! Handlers of the elements of running graphs.

use super::Json as Body;
use crate::control::daemon::{Daemon, Served};
use crate::control::refusal::{Refusal, RefusalBody};
use crate::view::{HandlerArgument, HandlerValue, HandlerView};
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use blockmason::describe::Access;
use blockmason::graph::handlers::HandlerReading;
use blockmason::rt;
use std::sync::Arc;

type Names = Path<(String, String, String)>;

/// Every handler of a graph, with its value if it can be read
#[utoipa::path(get, path = "/v1/graphs/{name}/handlers", tag = "handlers", operation_id = "list_handlers",
    params(("name" = String, Path, description = "the graph's name")),
    responses((status = 200, body = Vec<HandlerView>), (status = 404, body = RefusalBody)))]
pub(super) async fn list(
    State(daemon): State<Arc<Daemon>>,
    Path(name): Path<String>,
) -> Result<Json<Vec<HandlerView>>, Refusal> {
    let served = daemon.find(&name)?;
    Ok(Json(all(&served)))
}

fn all(served: &Served) -> Vec<HandlerView> {
    let graph = served.live.disk().graph();
    let view = |reading: HandlerReading<'_>| {
        let (value, error) = match reading.value {
            None => (None, None),
            Some(Ok(value)) => (Some(value), None),
            Some(Err(error)) => (None, Some(error.to_string())),
        };
        let access = match reading.handler.access {
            Access::Read => "read",
            Access::ReadWrite => "read_write",
            Access::Call => "call",
        };
        let (element, handler) = (reading.element.to_owned(), reading.handler.name.to_owned());
        HandlerView { element, handler, access: access.to_owned(), value, error }
    };
    graph.readings().into_iter().map(view).collect()
}

/// The value of a handler
#[utoipa::path(get, path = "/v1/graphs/{name}/elements/{element}/handlers/{handler}", tag = "handlers",
    operation_id = "get_handler",
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the element's full name, `Move.Copy`"),
        ("handler" = String, Path),
    ),
    responses(
        (status = 200, body = HandlerValue),
        (status = 400, description = "no such element or handler, or it cannot be read", body = RefusalBody),
        (status = 404, description = "no such graph", body = RefusalBody),
    ))]
pub(super) async fn get(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element, handler)): Names,
) -> Result<Json<HandlerValue>, Refusal> {
    let value = daemon.find(&name)?.get(&element, &handler)?;
    Ok(Json(HandlerValue { value }))
}

/// Set a handler
///
/// Answered when the new value counts.
#[utoipa::path(put, path = "/v1/graphs/{name}/elements/{element}/handlers/{handler}", tag = "handlers",
    operation_id = "set_handler", request_body = HandlerValue,
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the element's full name, `Move.Copy`"),
        ("handler" = String, Path),
    ),
    responses(
        (status = 204, description = "it is set"),
        (status = 400, description = "no such element or handler, or a value that it does not take",
            body = RefusalBody),
        (status = 404, description = "no such graph", body = RefusalBody),
    ))]
pub(super) async fn set(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element, handler)): Names,
    Body(wanted): Body<HandlerValue>,
) -> Result<StatusCode, Refusal> {
    daemon.find(&name)?.set(&daemon, &element, &handler, &wanted.value).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Call a handler
#[utoipa::path(post, path = "/v1/graphs/{name}/elements/{element}/handlers/{handler}", tag = "handlers",
    operation_id = "call_handler", request_body = HandlerArgument,
    params(
        ("name" = String, Path, description = "the graph's name"),
        ("element" = String, Path, description = "the element's full name, `Move.Copy`"),
        ("handler" = String, Path),
    ),
    responses(
        (status = 200, description = "what it answers", body = HandlerValue),
        (status = 400, description = "no such element or handler, or an argument that it does not take",
            body = RefusalBody),
        (status = 404, description = "no such graph", body = RefusalBody),
    ))]
pub(super) async fn call(
    State(daemon): State<Arc<Daemon>>,
    Path((name, element, handler)): Names,
    Body(wanted): Body<HandlerArgument>,
) -> Result<Json<HandlerValue>, Refusal> {
    let served = daemon.find(&name)?;
    // It may have to wait for a disk.
    let called = rt::blocking(move || served.call(&element, &handler, &wanted.argument)).await;
    let value = called.unwrap_or_else(|| Err(Refusal::new("internal", "the handler panicked")))?;
    Ok(Json(HandlerValue { value }))
}
