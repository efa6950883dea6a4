//! The serving end of the control socket.

use super::STATUS;
use crate::graphs::GraphFile;
use crate::view::{ExportView, GraphView, LiveView, SourceView, Status};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use blockmason::Disk;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Instant;

/// What is served, as far as the control socket has to know.
pub(crate) struct Daemon {
    pub(crate) started: Instant,
    pub(crate) served: Vec<Served>,
}

/// A graph that serves.
pub(crate) struct Served {
    pub(crate) file: GraphFile,
    pub(crate) disk: Arc<Disk>,
    /// Each export's element and URI.
    pub(crate) exports: Vec<(String, String)>,
}

/// Answers on the socket for as long as the runtime lives.
pub(crate) fn serve(listener: std::os::unix::net::UnixListener, daemon: Arc<Daemon>) -> io::Result<()> {
    let listener = Guarded(UnixListener::from_std(listener)?);
    let router = Router::new().route(STATUS, get(status)).fallback(unknown).with_state(daemon);
    #[expect(
        clippy::disallowed_methods,
        reason = "no request of a disk passes here: this is the control side"
    )]
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(())
}

async fn status(State(daemon): State<Arc<Daemon>>) -> Json<Status> {
    Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_seconds: daemon.started.elapsed().as_secs_f64(),
        graphs: daemon.served.iter().map(Served::view).collect(),
    })
}

async fn unknown() -> (StatusCode, Json<serde_json::Value>) {
    (StatusCode::NOT_FOUND, Json(serde_json::json!({ "error": "there is no such path" })))
}

impl Served {
    fn view(&self) -> GraphView {
        let graph = self.disk.graph();
        let sources = graph.instances().enumerate().filter(|(_, instance)| !instance.ty.ports.input);
        let live = LiveView {
            failed: graph.is_failed(),
            in_flight_bytes: self.disk.budget().used(),
            exports: self
                .exports
                .iter()
                .map(|(element, uri)| ExportView { element: element.clone(), uri: uri.clone() })
                .collect(),
            sources: sources.map(|(node, instance)| SourceView::read(&graph, node, &instance.name)).collect(),
        };
        let view = GraphView::of_file(&self.file).with_geometry(&graph).with_counters(&graph);
        GraphView { live: Some(live), ..view }
    }
}

/// A listener that takes connections of this user and of root.
struct Guarded(UnixListener);

impl axum::serve::Listener for Guarded {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, from)) if is_friend(&stream) => return (stream, from),
                Ok(_) => tracing::info!("another user's connection to the control socket is refused"),
                Err(error) => {
                    tracing::info!("the control socket cannot accept: {error}");
                    // Out of descriptors, most likely: some time has to pass before it can be better.
                    blockmason::rt::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn is_friend(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}
