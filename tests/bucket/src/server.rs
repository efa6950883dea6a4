//! The server: its port, its connections, and what tests see and set of it.

use crate::capture::{Captured, Recorded};
use crate::wire::Wire;
use crate::{Entry, Operation, Rule, Store};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

/// An S3 server in memory, on threads of its own. Requests are signed with SigV4 and name the bucket in the path.
pub struct Server {
    /// Taken only when the server is dropped.
    runtime: Option<Runtime>,
    address: SocketAddr,
    access: String,
    secret: String,
    store: Store,
    wire: Arc<Wire>,
    captured: Captured,
    /// While its port is open.
    open: Option<Open>,
}

struct Open {
    accepting: tokio::task::AbortHandle,
    /// Ends when the port and all connections are closed.
    closed: mpsc::Receiver<()>,
}

impl Default for Server {
    fn default() -> Server {
        Server::new()
    }
}

impl Server {
    /// Serves on any free port of 127.0.0.1, with keys that only tests have.
    pub fn new() -> Server {
        Server::on(SocketAddr::from(([127, 0, 0, 1], 0)), "mason", "mason-secret").unwrap()
    }

    /// Serves on `address`, to who has these keys.
    pub fn on(address: SocketAddr, access: &str, secret: &str) -> std::io::Result<Server> {
        let store = Store::default();
        let mut service = S3ServiceBuilder::new(store.clone());
        service.set_auth(SimpleAuth::from_single(access, secret));
        let wire = Wire {
            service: service.build(),
            rules: Mutex::default(),
            log: Mutex::default(),
            latency: Mutex::default(),
        };
        // Two threads, so that requests that race do.
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = TcpListener::bind(address)?;
        let mut server = Server {
            runtime: Some(runtime),
            address: listener.local_addr()?,
            access: access.to_owned(),
            secret: secret.to_owned(),
            store,
            wire: Arc::new(wire),
            captured: Captured::default(),
            open: None,
        };
        server.accept(listener)?;
        Ok(server)
    }

    /// Where it is, as a URL.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The access key that it knows.
    pub fn access(&self) -> &str {
        &self.access
    }

    /// The secret of that key.
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Its objects.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Adds a rule to those that are there.
    pub fn fault(&self, rule: Rule) {
        self.wire.rules.lock().unwrap().push(rule);
    }

    /// Takes all rules away. What is held stays so until it is released.
    pub fn clear_faults(&self) {
        self.wire.rules.lock().unwrap().clear();
    }

    /// Adds this time to each request from now on.
    pub fn set_latency(&self, latency: Duration) {
        *self.wire.latency.lock().unwrap() = latency;
    }

    /// The requests that have ended, in the order of their ends.
    pub fn log(&self) -> Vec<Entry> {
        self.wire.log.lock().unwrap().clone()
    }

    /// Forgets the requests that have ended.
    pub fn clear_log(&self) {
        self.wire.log.lock().unwrap().clear();
    }

    /// How many requests of this operation have ended.
    pub fn count(&self, operation: Operation) -> usize {
        self.wire.log.lock().unwrap().iter().filter(|entry| entry.operation == operation).count()
    }

    /// Keeps all bytes that come and go over TCP, of connections that begin from now on. Returns those kept so far: of each
    /// connection what came, and what went.
    pub fn capture(&self) -> Vec<[Vec<u8>; 2]> {
        self.captured.begin()
    }

    /// Closes the port and all connections. Objects stay, and requests that have arrived are carried out.
    pub fn stop(&mut self) {
        if let Some(Open { accepting, closed }) = self.open.take() {
            accepting.abort();
            // It carries no value: this returns when all senders are gone.
            let _ = closed.recv();
        }
    }

    /// Opens the same port again.
    pub fn start(&mut self) {
        if self.open.is_some() {
            return;
        }
        let mut bound = None;
        // Another process may have been given the port for a moment.
        crate::until("the port again", || {
            bound = TcpListener::bind(self.address).ok();
            bound.is_some()
        });
        self.accept(bound.unwrap()).unwrap();
    }

    fn accept(&mut self, listener: TcpListener) -> std::io::Result<()> {
        listener.set_nonblocking(true)?;
        let runtime = self.runtime.as_ref().unwrap();
        let _entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (open, closed) = mpsc::channel();
        let accepting = accepting(open, listener, self.wire.clone(), self.captured.clone());
        let accepting = runtime.spawn(accepting).abort_handle();
        self.open = Some(Open { accepting, closed });
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Not waited for: this may be a thread of another runtime, and held requests never end.
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// Takes connections until it is aborted, which closes them all. `open` goes last, for it tells that the rest has gone.
async fn accepting(
    open: mpsc::Sender<()>,
    listener: tokio::net::TcpListener,
    wire: Arc<Wire>,
    captured: Captured,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        // A client that has gone already is no matter.
        let Ok((stream, _)) = accepted else { continue };
        let (wire, open) = (wire.clone(), open.clone());
        let record = captured.record();
        connections.spawn(async move {
            let _open = open;
            // Without it an answer waits for the client's acknowledgement.
            let _ = stream.set_nodelay(true);
            let service = service_fn(|request| wire.clone().serve(request));
            // Cut by the client or by a rule: both are meant.
            let _ =
                http1::Builder::new().serve_connection(TokioIo::new(Recorded(stream, record)), service).await;
        });
    }
}
