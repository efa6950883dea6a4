//! The serving end of the control socket: connections, and what a request may cost.

use super::daemon::Daemon;
use super::patient::Patient;
use super::refusal::Refusal;
use super::routes;
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use blockmason::rt;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Connections at a time. One more is told so, and closed.
const MOST_CONNECTIONS: usize = 64;

/// For the head of a request to arrive, and so how long a connection may be idle; for its body; and for
/// the other end to take something of an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The longest body, in bytes: a graph with all that it includes has at most 16 MiB, as JSON a little more.
const LONGEST_BODY: usize = 32 << 20;

/// Bytes of bodies that are kept at a time, over all connections.
const BODIES: usize = 2 * LONGEST_BODY;

/// Answers on the socket for as long as the runtime lives.
pub(crate) fn serve(listener: std::os::unix::net::UnixListener, daemon: Arc<Daemon>) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let bodies = Arc::new(Semaphore::new(BODIES));
    let router = routes::router(daemon)
        .layer(DefaultBodyLimit::disable())
        .layer(middleware::from_fn_with_state(bodies, receive));
    spawn(accept(listener, router));
    Ok(())
}

/// Answers with counters, to whoever can connect.
pub(crate) fn serve_metrics(listener: std::net::TcpListener, daemon: Arc<Daemon>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let router = routes::metrics_router(daemon);
    spawn(async move {
        let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            // Those who ask for counters can wait for their turn.
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => take(stream, permit, &router),
                Err(error) => pause("metrics", &error).await,
            }
        }
    });
    Ok(())
}

/// Serves a connection by itself.
fn take<S>(stream: S, permit: OwnedSemaphorePermit, router: &Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let connection = attend(stream, router.clone());
    spawn(async move {
        connection.await;
        drop(permit);
    });
}

/// Out of descriptors, most likely: some time has to pass before it can be better.
async fn pause(what: &str, error: &io::Error) {
    tracing::info!("the {what} socket cannot accept: {error}");
    rt::sleep(Duration::from_millis(100)).await;
}

/// Runs something of the control side by itself.
#[expect(clippy::disallowed_methods, reason = "no request of a disk passes here: this is the control side")]
pub(super) fn spawn<T: Send + 'static>(
    body: impl Future<Output = T> + Send + 'static,
) -> tokio::task::JoinHandle<T> {
    tokio::spawn(body)
}

async fn accept(listener: UnixListener, router: Router) {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        match listener.accept().await {
            Ok((stream, _)) if !is_friend(&stream) => {
                tracing::info!("another user's connection to the control socket is refused");
            }
            Ok((stream, _)) => match connections.clone().try_acquire_owned() {
                Ok(permit) => take(stream, permit, &router),
                Err(_) => refuse(&stream),
            },
            Err(error) => pause("control", &error).await,
        }
    }
}

/// Tells a connection too many what it is, before it has asked.
fn refuse(stream: &UnixStream) {
    tracing::info!("a connection too many to the control socket is refused");
    let error =
        Refusal::new("too_many", "too many connections to the control socket: end some, then try again");
    let body = serde_json::json!({ "error": error }).to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close";
    // A socket that was just made has room for this; if not, it is closed without a word.
    let _ = stream.try_write(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes());
}

fn is_friend(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

/// Serves one connection to its end.
async fn attend<S>(stream: S, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = TokioIo::new(Patient::new(stream, PATIENCE));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(64 << 10)
        .serve_connection(stream, TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!("a connection to the control socket ended: {error}");
    }
}

/// Reads the whole body, within limits, before anything is done; then answers, to the end even if
/// whoever asked has gone: nothing stays half done.
async fn receive(State(bodies): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let told = head.headers.get("content-length").and_then(|value| value.to_str().ok()?.parse().ok());
    let chunked = head.headers.contains_key("transfer-encoding");
    let length: usize = if chunked { LONGEST_BODY } else { told.unwrap_or(0) };
    let too_large = || Refusal::new("too_large", format!("a body has at most {} MiB", LONGEST_BODY >> 20));
    if length > LONGEST_BODY {
        return too_large().into_response();
    }
    let read = rt::timeout(PATIENCE, async {
        let room = bodies.acquire_many_owned(length as u32).await;
        (room, to_bytes(body, LONGEST_BODY).await)
    });
    let (room, body) = match read.await {
        Some((room, Ok(body))) => (room, body),
        Some((_, Err(_))) => return too_large().into_response(),
        None => return Refusal::new("too_slow", "the body has not arrived in time").into_response(),
    };
    let answer = spawn(async move {
        let answer = next.run(Request::from_parts(head, Body::from(body))).await;
        drop(room);
        answer
    });
    answer.await.unwrap_or_else(|_| {
        Refusal::new("internal", "the daemon made a mistake; its log says more").into_response()
    })
}
