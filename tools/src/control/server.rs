//! The serving end of the control socket: connections, and what a request may cost.

use super::daemon::Daemon;
use super::patient::Patient;
use super::refusal::Refusal;
use super::routes;
use crate::handover::{CONTROL, METRICS};
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use blockmason::{Host, rt};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

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
    listener.set_nonblocking(true)?;
    let host = daemon.host.clone();
    host.sockets().keep(CONTROL, &listener).map_err(io::Error::other)?;
    let listener = UnixListener::from_std(listener)?;
    spawn(accept(listener, limited(routes::router(daemon)), host));
    Ok(())
}

/// The same with limits to what a body may cost.
fn limited(router: Router) -> Router {
    let bodies = Arc::new(Semaphore::new(BODIES));
    router.layer(DefaultBodyLimit::disable()).layer(middleware::from_fn_with_state(bodies, receive))
}

/// Answers with counters, to whoever can connect.
pub(crate) fn serve_metrics(listener: std::net::TcpListener, daemon: Arc<Daemon>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let host = daemon.host.clone();
    host.sockets().keep(METRICS, &listener).map_err(io::Error::other)?;
    let listener = TcpListener::from_std(listener)?;
    let router = routes::metrics_router(daemon);
    spawn(async move {
        let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
        loop {
            // Those who ask for counters can wait for their turn.
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            match host.sockets().accept(listener.accept()).await {
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

async fn accept(listener: UnixListener, router: Router, host: Arc<Host>) {
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    // Those too many are told so, as far as that does not become too many itself.
    let refusals = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let refuse = Router::new().fallback(too_many);
    loop {
        match host.sockets().accept(listener.accept()).await {
            Ok((stream, _)) if !is_friend(&stream) => {
                tracing::info!("another user's connection to the control socket is refused");
            }
            Ok((stream, _)) => match connections.clone().try_acquire_owned() {
                Ok(permit) => take(stream, permit, &router),
                Err(_) => {
                    tracing::info!("a connection too many to the control socket is refused");
                    if let Ok(permit) = refusals.clone().try_acquire_owned() {
                        take(stream, permit, &refuse);
                    }
                }
            },
            Err(error) => pause("control", &error).await,
        }
    }
}

/// What a connection too many is told.
async fn too_many() -> Refusal {
    Refusal::new("too_many", "too many connections to the control socket: end some, then try again")
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
    let (open, ended) = watch::channel(());
    let router = router.layer(Extension(Ended(ended)));
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
    drop(open);
}

/// Lets a handler know when the connection on which it was asked has ended.
#[derive(Clone)]
pub(crate) struct Ended(watch::Receiver<()>);

impl Ended {
    /// Waits for that.
    pub(crate) async fn wait(mut self) {
        // Nothing is ever sent: this fails when the connection has ended.
        while self.0.changed().await.is_ok() {}
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::{get, post};
    use std::sync::atomic::{AtomicBool, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::task::JoinHandle;

    /// A connection to a server with a short answer at `/`, an endless one at `/long`, and work that takes a
    /// second at `/work`, which it says it has done.
    fn connect(done: &Arc<AtomicBool>) -> (DuplexStream, JoinHandle<()>) {
        let (near, far) = tokio::io::duplex(4096);
        let done = done.clone();
        let work = async move || {
            rt::sleep(Duration::from_secs(1)).await;
            done.store(true, Ordering::Relaxed);
        };
        let router = Router::new().route("/", get(async || "hello"));
        let router = router.route("/long", get(async || "x".repeat(1 << 20))).route("/work", post(work));
        (near, spawn(attend(far, limited(router))))
    }

    /// Sends, and reads to the end; with the time that took in seconds.
    async fn exchange(parts: &[&str]) -> (String, u64) {
        let since = rt::now();
        let (mut stream, served) = connect(&Arc::default());
        for part in parts {
            let _ = stream.write_all(part.as_bytes()).await;
            rt::sleep(Duration::from_secs(1)).await;
        }
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        served.await.unwrap();
        (answer, (rt::now() - since).as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_idle_ends() {
        assert_eq!(exchange(&[]).await.1, 10);
        let (answer, seconds) = exchange(&["GET / HTTP/1.1\r\nhost: m\r\n\r\n"]).await;
        assert!(answer.ends_with("hello") && (10..12).contains(&seconds), "{seconds}: {answer}");
        let (_, seconds) = exchange(&["G"; 60]).await;
        assert_eq!(seconds, 60, "the writer took that long; the other end had gone");
        let (answer, seconds) = exchange(&["GET / HTTP/1.1\r\n", "host: m\r\n", "a: b\r\n"]).await;
        assert!(!answer.contains("200") && seconds <= 11, "{seconds}: {answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stalls_or_is_too_large_is_refused() {
        let head = "POST /work HTTP/1.1\r\nhost: m\r\nconnection: close\r\ncontent-length:";
        let (answer, seconds) = exchange(&[&format!("{head} 100\r\n\r\nabc")]).await;
        assert!(answer.starts_with("HTTP/1.1 408") && answer.contains("too_slow"), "{answer}");
        assert!((10..12).contains(&seconds), "{seconds}");
        let (answer, _) = exchange(&[&format!("{head} {}\r\n\r\n", LONGEST_BODY + 1)]).await;
        assert!(answer.starts_with("HTTP/1.1 413") && answer.contains("too_large"), "{answer}");
        let chunked = "POST /work HTTP/1.1\r\nhost: m\r\ntransfer-encoding: chunked\r\n\r\n";
        let large = format!("{chunked}{:x}\r\n{}", LONGEST_BODY + 1, "x".repeat(LONGEST_BODY + 1));
        let (mut stream, _served) = connect(&Arc::default());
        let (mut from, mut to) = tokio::io::split(&mut stream);
        let mut answer = vec![0; 12];
        let (_, read) = tokio::join!(to.write_all(large.as_bytes()), from.read_exact(&mut answer));
        read.unwrap();
        assert_eq!(answer, b"HTTP/1.1 413");
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_read_is_left() {
        let (mut stream, served) = connect(&Arc::default());
        let since = rt::now();
        stream.write_all(b"GET /long HTTP/1.1\r\nhost: m\r\n\r\n").await.unwrap();
        served.await.unwrap();
        assert_eq!((rt::now() - since).as_secs(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_begun_is_done_even_if_nobody_waits() {
        let done = Arc::default();
        let (mut stream, served) = connect(&done);
        stream.write_all(b"POST /work HTTP/1.1\r\nhost: m\r\ncontent-length: 0\r\n\r\n").await.unwrap();
        rt::sleep(Duration::from_millis(500)).await;
        drop(stream);
        served.await.unwrap();
        assert!(!done.load(Ordering::Relaxed));
        rt::sleep(Duration::from_secs(1)).await;
        assert!(done.load(Ordering::Relaxed));
    }
}
