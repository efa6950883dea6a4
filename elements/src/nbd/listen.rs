//! Listeners: sockets that several exports of several disks may share.

use super::attend::{Peer, serve_client};
use super::meta::{ALLOCATION, BITMAP, CHANGED_SINCE, DIRTY};
use super::serve::dirty::Maps;
use super::serve::flags_of;
use super::server::{Export, ExportInfo, Exports, Listed, TlsPolicy};
use crate::export::clients::Clients;
use crate::export::socket::{self, Bound, SocketRights, nonblocking, open_unix};
use crate::migrate::map::DirtyMap;
use blockmason::lang::value::Service;
use blockmason::sched::{Disk, Host};
use blockmason::{Error, Graph, Kind, Result};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(std::net::SocketAddr),
    /// The first socket that the service manager has opened for us (LISTEN_FDS).
    Inherited,
    /// One connection on standard input and output.
    Stdio,
}

impl Address {
    /// What a process that goes on with its sockets knows it by; none where there is nothing that listens.
    fn key(&self) -> Option<String> {
        match self {
            Address::Unix(path) => Some(socket::key(path)),
            Address::Tcp(address) => Some(format!("tcp:{address}")),
            Address::Inherited => Some("inherited".to_owned()),
            Address::Stdio => None,
        }
    }
}

/// What all exports of a listener agree on.
#[derive(Clone, Debug, Default)]
pub struct Terms {
    /// Who may use the socket.
    pub rights: SocketRights,
    /// Whether there is TLS.
    pub tls: TlsPolicy,
    /// What decides the rights, as the administrator wrote it, to compare.
    pub rights_written: String,
    /// What decides about TLS, as the administrator wrote it.
    pub tls_written: String,
}

impl Terms {
    fn agree_with(&self, other: &Terms) -> bool {
        self.rights_written == other.rights_written && self.tls_written == other.tls_written
    }
}

/// An export of a listener.
pub struct Entry {
    /// Its name; may be empty.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// The disk.
    pub disk: Arc<Disk>,
    /// The element at which its requests enter.
    pub source: String,
    /// The elements whose maps of changes it offers.
    pub dirty_maps: Vec<String>,
    /// The volume that says what has changed since each of its snapshots.
    pub snapshots: Option<String>,
    /// Who is connected. An export that takes the place of another of the same disk and element
    /// shares it.
    pub clients: Arc<Clients>,
}

impl Entry {
    /// True if the one takes the place of the other when a graph is replaced.
    fn succeeds(&self, other: &Entry) -> bool {
        Arc::ptr_eq(&self.disk, &other.disk) && self.source == other.source
    }

    /// The maps of its contexts, as the graph has them whenever it is asked.
    pub(crate) fn maps(self: &Arc<Entry>) -> Maps {
        let entry = self.clone();
        Rc::new(move |context| {
            let first = entry.dirty_maps.first().filter(|_| context == DIRTY).map(String::as_str);
            let name = first.or_else(|| context.strip_prefix(BITMAP))?;
            let graph = entry.disk.graph();
            let instance = graph.instances().find(|instance| instance.name == name)?;
            let map: Box<Arc<DirtyMap>> = instance.element.provide(DirtyMap::NAME)?.downcast().ok()?;
            let size = graph.below(graph.node(&entry.source)?).ok()?.size;
            (map.size() == size).then_some(*map)
        })
    }

    /// The newest snapshots that a client may choose among.
    fn names_of_snapshots(&self, graph: &Graph) -> Vec<String> {
        let volume =
            self.snapshots.as_ref().and_then(|name| graph.instances().find(|found| found.name == *name));
        // It has just been opened, or is just being closed: without any snapshots, if at all.
        let names = volume.and_then(|volume| volume.element.get("snapshots").ok()).unwrap_or_default();
        let others = self.dirty_maps.len() + 2;
        let mut names: Vec<_> = names.split_whitespace().rev().map(str::to_owned).collect();
        names.truncate(super::meta::MAX_CONTEXTS.saturating_sub(others));
        names
    }

    fn info(&self) -> Option<ExportInfo> {
        let graph = self.disk.graph();
        let below = graph.below(graph.node(&self.source)?).ok()?;
        let first = self.dirty_maps.first().map(|_| DIRTY.to_owned());
        let named = self.dirty_maps.iter().map(|name| format!("{BITMAP}{name}"));
        let since = self.names_of_snapshots(&graph).into_iter().map(|name| format!("{CHANGED_SINCE}{name}"));
        let contexts = [ALLOCATION.to_owned()].into_iter().chain(first).chain(named).chain(since).collect();
        let blocks = super::handshake::BlockSizes {
            minimum: 1,
            preferred: below.preferred_block.clamp(512, 1 << 16),
            maximum: blockmason::geometry::MAX_REQUEST,
        };
        Some(ExportInfo {
            name: self.name.clone(),
            description: self.description.clone(),
            size: below.size,
            flags: flags_of(&below),
            blocks,
            contexts,
        })
    }
}

/// Told when the client on standard input and output has gone.
#[derive(Default)]
pub struct StdioEnd(pub tokio::sync::Notify);

/// The listeners of a process.
#[derive(Default)]
pub struct Listeners {
    open: Mutex<HashMap<Address, Arc<Listener>>>,
}

/// A socket with its exports.
pub struct Listener {
    /// As it was asked for.
    address: Address,
    /// As it is: port 0 has become one.
    actual: Address,
    pub(super) terms: Mutex<Terms>,
    exports: Mutex<Vec<Arc<Entry>>>,
    pub(super) closing: watch::Sender<bool>,
    /// Of a socket in the file system.
    bound: Option<Bound>,
    host: Weak<Host>,
    /// Clients that have been accepted and whose handshake is not over.
    shaking: watch::Sender<usize>,
}

/// A client whose handshake is not over; dropped when it is.
pub(super) struct Shaking(Arc<Listener>);

impl Shaking {
    fn begin(listener: &Arc<Listener>) -> Shaking {
        listener.shaking.send_modify(|count| *count += 1);
        Shaking(listener.clone())
    }
}

impl Drop for Shaking {
    fn drop(&mut self) {
        self.0.shaking.send_modify(|count| *count -= 1);
    }
}

/// Takes an export off its listener, and the last one closes it.
pub struct Listening {
    listeners: Arc<Listeners>,
    listener: Arc<Listener>,
    entry: Arc<Entry>,
    /// The address it listens on indeed.
    pub address: Address,
}

impl Listening {
    /// Who is connected.
    pub fn clients(&self) -> &Arc<Clients> {
        &self.entry.clients
    }

    /// Waits until no handshake goes on.
    pub(crate) fn shaken(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut shaking = self.listener.shaking.subscribe();
        async move {
            // A listener that is gone has none.
            let _ = shaking.wait_for(|count| *count == 0).await;
        }
    }

    /// The export.
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Listeners {
    /// Adds an export to the listener of that address, which is opened for the first one. An export
    /// of the same disk and element makes room, and its clients stay unless the terms about TLS differ.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another process serves the address or the name is taken;
    /// [`Kind::Invalid`] if the exports of one listener disagree about TLS or rights.
    pub fn add(
        self: &Arc<Self>,
        host: &Arc<Host>,
        address: Address,
        terms: Terms,
        entry: Entry,
    ) -> Result<Listening> {
        let mut open = lock(&self.open);
        let entry = Arc::new(succeed(&open, &terms, entry));
        if let Some(listener) = open.get(&address) {
            let mut exports = lock(&listener.exports);
            let before = exports.iter().position(|other| entry.succeeds(other));
            let alone = before.is_some() && exports.len() == 1;
            if alone && lock(&listener.terms).rights_written != terms.rights_written {
                drop(exports);
                let listener = listener.clone();
                self.shut(&mut open, &listener);
                return self.listen(&mut open, host, address, terms, entry);
            }
            if alone {
                *lock(&listener.terms) = terms;
            } else if !lock(&listener.terms).agree_with(&terms) {
                return Err(Error::invalid(
                    "exports of one listener must agree about TLS, mode, owner and group",
                ));
            }
            let taken = |(ix, other): (usize, &Arc<Entry>)| other.name == entry.name && Some(ix) != before;
            if exports.iter().enumerate().any(taken) {
                let message = format!("the listener has an export named {:?} already", entry.name);
                return Err(Error::new(Kind::Busy, message));
            }
            match before {
                Some(before) => exports[before] = entry.clone(),
                None => exports.push(entry.clone()),
            }
            let (listener, address) = (listener.clone(), listener.actual.clone());
            drop(exports);
            return Ok(Listening { listeners: self.clone(), listener, entry, address });
        }
        self.listen(&mut open, host, address, terms, entry)
    }

    /// Opens a listener with its first export.
    fn listen(
        self: &Arc<Self>,
        open: &mut HashMap<Address, Arc<Listener>>,
        host: &Arc<Host>,
        address: Address,
        terms: Terms,
        entry: Arc<Entry>,
    ) -> Result<Listening> {
        let socket = Socket::open(host, &address, &terms.rights)?;
        let actual = socket.address(&address);
        let bound = match &actual {
            Address::Unix(path) => Bound::at(path),
            _ => None,
        };
        let (closing, watch) = watch::channel(false);
        let listener = Arc::new(Listener {
            address: address.clone(),
            actual: actual.clone(),
            terms: Mutex::new(terms),
            exports: Mutex::new(vec![entry.clone()]),
            closing,
            bound,
            host: Arc::downgrade(host),
            shaking: watch::Sender::default(),
        });
        socket.accept(host, listener.clone(), watch)?;
        open.insert(address, listener.clone());
        Ok(Listening { listeners: self.clone(), listener, entry, address: actual })
    }

    /// Closes a listener. Its path goes first.
    fn shut(&self, open: &mut HashMap<Address, Arc<Listener>>, listener: &Arc<Listener>) {
        // Another may have been opened at its address meanwhile.
        if open.get(&listener.address).is_some_and(|known| Arc::ptr_eq(known, listener)) {
            open.remove(&listener.address);
        }
        listener.bound.iter().for_each(Bound::remove);
        if let (Some(host), Some(key)) = (listener.host.upgrade(), listener.address.key()) {
            host.sockets().forget(&key);
        }
        listener.closing.send_replace(true);
    }
}

/// An export takes over the clients of the one whose place it takes, on whatever listener that is. With
/// other terms about TLS they have to come again.
fn succeed(open: &HashMap<Address, Arc<Listener>>, terms: &Terms, entry: Entry) -> Entry {
    for listener in open.values() {
        let Some(before) = lock(&listener.exports).iter().find(|other| entry.succeeds(other)).cloned() else {
            continue;
        };
        if lock(&listener.terms).tls_written != terms.tls_written {
            before.clients.dismiss_all();
        }
        return Entry { clients: before.clients.clone(), ..entry };
    }
    entry
}

impl Drop for Listening {
    fn drop(&mut self) {
        let mut open = lock(&self.listeners.open);
        let mut exports = lock(&self.listener.exports);
        exports.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        if !exports.is_empty() {
            return;
        }
        drop(exports);
        self.listeners.shut(&mut open, &self.listener);
    }
}

impl Exports for Arc<Listener> {
    type Handle = Arc<Entry>;

    fn list(&self) -> Vec<Listed> {
        let listed =
            |entry: &Arc<Entry>| Listed { name: entry.name.clone(), description: entry.description.clone() };
        lock(&self.exports).iter().map(listed).collect()
    }

    fn find(&self, name: &str) -> Option<Export<Arc<Entry>>> {
        let exports = lock(&self.exports);
        let named = exports.iter().find(|entry| entry.name == name);
        // The empty name asks for the default; where there is one export, it is that.
        let only = || exports.first().filter(|_| name.is_empty() && exports.len() == 1);
        let entry = named.or_else(only)?.clone();
        drop(exports);
        let info = entry.info()?;
        Some(Export { handle: entry, info })
    }

    fn is_closing(&self) -> bool {
        *self.closing.borrow()
    }
}

/// A socket that is ready to accept.
enum Socket {
    Unix(std::os::unix::net::UnixListener),
    Tcp(std::net::TcpListener),
    Stdio,
}

impl Socket {
    /// The socket that the process before has listened on, else a new one.
    fn open(host: &Host, address: &Address, rights: &SocketRights) -> Result<Socket> {
        let Some(key) = address.key() else { return Ok(Socket::Stdio) };
        let socket = match host.sockets().inherited(&key) {
            Some(socket) => Socket::inherited(socket)?,
            None => Socket::make(address, rights)?,
        };
        match &socket {
            Socket::Unix(listener) => host.sockets().keep(&key, listener)?,
            Socket::Tcp(listener) => host.sockets().keep(&key, listener)?,
            Socket::Stdio => {}
        }
        Ok(socket)
    }

    fn inherited(socket: OwnedFd) -> Result<Socket> {
        let domain = rustix::net::sockopt::socket_domain(&socket)
            .map_err(|errno| Error::os(errno, "what was handed over to listen on is no socket"))?;
        nonblocking(rustix::io::ioctl_fionbio(&socket, true).map_err(std::io::Error::from))?;
        match domain {
            rustix::net::AddressFamily::UNIX => Ok(Socket::Unix(socket.into())),
            _ => Ok(Socket::Tcp(socket.into())),
        }
    }

    fn make(address: &Address, rights: &SocketRights) -> Result<Socket> {
        match address {
            Address::Unix(path) => open_unix(path, rights).map(Socket::Unix),
            Address::Tcp(address) => {
                let listener = std::net::TcpListener::bind(address)
                    .map_err(|error| Error::io(error, format!("cannot listen on {address}")))?;
                nonblocking(listener.set_nonblocking(true))?;
                Ok(Socket::Tcp(listener))
            }
            Address::Inherited => inherited(),
            Address::Stdio => Ok(Socket::Stdio),
        }
    }

    /// The address it has indeed: port 0 has become one.
    fn address(&self, wanted: &Address) -> Address {
        match self {
            Socket::Tcp(listener) => listener.local_addr().map_or_else(|_| wanted.clone(), Address::Tcp),
            Socket::Unix(listener) if *wanted == Address::Inherited => listener
                .local_addr()
                .ok()
                .and_then(|address| address.as_pathname().map(|path| Address::Unix(path.to_owned())))
                .unwrap_or(Address::Inherited),
            _ => wanted.clone(),
        }
    }

    /// Accepts on the first shard, and serves each client on the shard that serves the fewest.
    fn accept(
        self,
        host: &Arc<Host>,
        listener: Arc<Listener>,
        mut closing: watch::Receiver<bool>,
    ) -> Result<()> {
        let to = host.clone();
        host.spawn_on(0, move || async move {
            let accepting = async {
                let ended = match self {
                    Socket::Unix(socket) => accept_unix(socket, &to, &listener).await,
                    Socket::Tcp(socket) => accept_tcp(socket, &to, &listener).await,
                    Socket::Stdio => {
                        let ended = serve_stdio(&listener).await;
                        to.service(StdioEnd::default).0.notify_one();
                        ended
                    }
                };
                if let Err(error) = ended {
                    tracing::error!("no more clients on {:?}: {error}", listener.address);
                }
            };
            tokio::select! {
                () = accepting => {}
                _ = closing.wait_for(|closing| *closing) => {}
            }
        })
    }
}

fn inherited() -> Result<Socket> {
    let mut fds = listenfd::ListenFd::from_env();
    let refused = |error| Error::io(error, "the inherited socket is of no use");
    if let Ok(Some(listener)) = fds.take_unix_listener(0) {
        listener.set_nonblocking(true).map_err(refused)?;
        return Ok(Socket::Unix(listener));
    }
    match fds.take_tcp_listener(0).map_err(refused)? {
        Some(listener) => {
            listener.set_nonblocking(true).map_err(refused)?;
            Ok(Socket::Tcp(listener))
        }
        None => Err(Error::new(Kind::Unavailable, "no socket was handed to this process (LISTEN_FDS)")),
    }
}

async fn accept_unix(
    socket: std::os::unix::net::UnixListener,
    host: &Arc<Host>,
    listener: &Arc<Listener>,
) -> Result<()> {
    let broken = |error| Error::io(error, "the listener failed");
    let socket = tokio::net::UnixListener::from_std(socket).map_err(broken)?;
    loop {
        match host.sockets().accept(socket.accept()).await.and_then(|(client, _)| client.into_std()) {
            Ok(client) if is_one_too_many(&client) => drop(client),
            Ok(client) => start(host, listener, move || tokio::net::UnixStream::from_std(client))?,
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_tcp(socket: std::net::TcpListener, host: &Arc<Host>, listener: &Arc<Listener>) -> Result<()> {
    let broken = |error| Error::io(error, "the listener failed");
    let socket = tokio::net::TcpListener::from_std(socket).map_err(broken)?;
    loop {
        match host.sockets().accept(socket.accept()).await.and_then(|(client, _)| client.into_std()) {
            Ok(client) if is_one_too_many(&client) => drop(client),
            Ok(client) => {
                // Replies are written in whole turns; waiting to fill a packet only adds latency.
                let _ = client.set_nodelay(true);
                start(host, listener, move || tokio::net::TcpStream::from_std(client))?;
            }
            Err(error) => pause(&error).await,
        }
    }
}

/// Descriptors that clients leave to others: whoever administers the disks must get through.
const OTHERS: u64 = 64;

/// The lowest number that is free is the next: one that is close to the last says that there are few left.
fn is_one_too_many(client: &impl std::os::fd::AsRawFd) -> bool {
    let most = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let few = most.is_some_and(|most| client.as_raw_fd() as u64 + OTHERS >= most);
    if few {
        tracing::warn!("a client is refused: the process may have no more files and sockets open");
    }
    few
}

/// Out of descriptors or memory: others may give some back.
async fn pause(error: &std::io::Error) {
    tracing::warn!("a client could not be accepted: {error}");
    blockmason::rt::sleep(Duration::from_millis(100)).await;
}

fn start<S>(
    host: &Arc<Host>,
    listener: &Arc<Listener>,
    make: impl FnOnce() -> std::io::Result<S> + Send + 'static,
) -> Result<()>
where
    S: Peer,
{
    let (listener, shaking) = (listener.clone(), Shaking::begin(listener));
    host.spawn_stream(move || async move {
        match make() {
            Ok(socket) => serve_client(socket, &listener, shaking).await,
            Err(error) => tracing::warn!("a client could not be taken over: {error}"),
        }
    })
}

/// One client on standard input and output: a socket, or two pipes.
async fn serve_stdio(listener: &Arc<Listener>) -> Result<()> {
    let broken = |error| Error::io(error, "standard input and output are of no use");
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().map_err(broken);
    let (input, output): (OwnedFd, OwnedFd) =
        (copy(std::io::stdin().as_fd())?, copy(std::io::stdout().as_fd())?);
    let is_socket = rustix::net::sockopt::socket_type(&input).is_ok();
    if is_socket {
        let socket = std::os::unix::net::UnixStream::from(input);
        socket.set_nonblocking(true).map_err(broken)?;
        let socket = tokio::net::UnixStream::from_std(socket).map_err(broken)?;
        serve_client(socket, listener, Shaking::begin(listener)).await;
    } else {
        use tokio::net::unix::pipe;
        let input = pipe::Receiver::from_owned_fd(input).map_err(broken)?;
        let output = pipe::Sender::from_owned_fd(output).map_err(broken)?;
        serve_client(tokio::io::join(input, output), listener, Shaking::begin(listener)).await;
    }
    Ok(())
}
