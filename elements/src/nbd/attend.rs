//! Serving a client from its first byte to its last, also where that was on another process.

use super::listen::{Entry, Listener, Shaking, lock};
use super::serve::Connection;
use super::serve::carry::Carried;
use super::server::negotiate;
use super::wire::TransmissionFlags;
use crate::export::clients::{Clients, Promise};
use blockmason::luggage::Descriptors;
use blockmason::sched::{Host, serve};
use blockmason::{Error, Kind, Luggage, Result, Shard};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::oneshot;

/// A client that has not finished the handshake by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// For handshakes that go on when everything is handed over: a client that says nothing holds up all others.
const GRACE: Duration = Duration::from_millis(50);

/// The form of what is handed over to another process.
const VERSION: u32 = 1;

/// What a client is connected by.
pub(super) trait Peer: AsyncRead + AsyncWrite + Unpin + 'static {
    /// The one descriptor that is all of it; None if there is no such.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
}

impl Peer for UnixStream {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Peer for TcpStream {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl<R: AsyncRead + Unpin + 'static, W: AsyncWrite + Unpin + 'static> Peer for tokio::io::Join<R, W> {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Leads a client through the handshake, and serves it.
pub(super) async fn serve_client<S: Peer>(socket: S, listener: &Arc<Listener>, shaking: Shaking) {
    let mut closing = listener.closing.subscribe();
    let tls = lock(&listener.terms).tls.clone();
    let handshake = blockmason::rt::timeout(HANDSHAKE, negotiate(socket, listener, &tls));
    let negotiated = tokio::select! {
        negotiated = handshake => negotiated,
        _ = closing.wait_for(|closing| *closing) => return,
    };
    let negotiated = match negotiated {
        Some(Ok(Some(negotiated))) => negotiated,
        Some(Ok(None)) => return,
        Some(Err(error)) => return tracing::info!("an NBD handshake failed: {error}"),
        None => return tracing::info!("an NBD handshake took too long"),
    };
    let entry = negotiated.export.handle.clone();
    tracing::info!(export = entry.name, "an NBD client has come");
    let info = &negotiated.export.info;
    let promise = Promise { size: info.size, writable: !info.flags.contains(TransmissionFlags::READ_ONLY) };
    let connection =
        Rc::new(Connection::new(negotiated, entry.disk.budget().clone()).with_maps(entry.maps()));
    attend(connection, &entry, promise, |_| drop(shaking)).await;
}

/// Serves a client whose handshake is done. `admitted` hears whether it may come in; if so, it is present.
async fn attend<S: Peer>(
    connection: Rc<Connection<S>>,
    entry: &Entry,
    promise: Promise,
    admitted: impl FnOnce(bool),
) {
    let Some(mut place) = entry.clients.admit(promise, &entry.disk, &entry.source) else {
        admitted(false);
        return tracing::info!(export = entry.name, "the disk changed while an NBD client came");
    };
    let _attending = entry.disk.attend();
    let present = Present::join(entry.clients.clone(), connection.clone());
    admitted(true);
    let mut serving = std::pin::pin!(serve(&entry.disk, &entry.source, &*connection));
    let served = tokio::select! {
        // In this order: whoever is sent away gets no request into the graph that it does not fit.
        biased;
        () = entry.clients.parting(), if connection.is_tls() => {
            // Behind the gate nothing is in flight; another process goes on, without this client.
            return connection.finish().await;
        }
        _ = place.dismissed.wait_for(|dismissed| *dismissed) => {
            connection.end();
            serving.await
        }
        served = &mut serving => served,
    };
    drop(present);
    match served {
        Ok(served) => tracing::info!(export = entry.name, "an NBD client has gone: {served:?}"),
        Err(error) => tracing::warn!(export = entry.name, "an NBD client could not be served: {error}"),
    }
    connection.finish().await;
}

/// A connection, whatever its socket.
trait Portable {
    /// What another process needs to serve it; None if it has to end with this process.
    fn carry(&self) -> Result<Option<Packed>>;
}

impl<S: Peer> Portable for Connection<S> {
    fn carry(&self) -> Result<Option<Packed>> {
        if self.has_ended() || self.is_tls() {
            return Ok(None);
        }
        let copy = self.with_socket(|socket| match socket {
            super::stream::Stream::Plain(socket) => {
                socket.descriptor().map(|descriptor| descriptor.try_clone_to_owned())
            }
            #[cfg(feature = "tls")]
            super::stream::Stream::Tls(_) => None,
        });
        let Some(copy) = copy else { return Ok(None) };
        let socket = copy.map_err(|error| Error::io(error, "a client's descriptor cannot be copied"))?;
        let (carried, bytes) = Connection::carry(self)?;
        Ok(Some(Packed { carried, socket, bytes }))
    }
}

/// A connection without its process.
struct Packed {
    carried: Carried,
    socket: OwnedFd,
    /// A file of what is on its way, if anything is.
    bytes: Option<OwnedFd>,
}

/// The clients of this shard that are being served.
#[derive(Default)]
struct Presence {
    list: RefCell<Vec<Known>>,
    next: Cell<u64>,
}

/// One of them.
struct Known {
    number: u64,
    /// Those of its export.
    clients: Arc<Clients>,
    connection: Rc<dyn Portable>,
}

/// A client that is being served, until this is dropped.
struct Present {
    presence: Option<Rc<Presence>>,
    number: u64,
}

impl Present {
    fn join(clients: Arc<Clients>, connection: Rc<dyn Portable>) -> Present {
        let presence = Shard::current().map(|shard| shard.local(0, Presence::default));
        let number = presence.as_ref().map_or(0, |presence| {
            let number = presence.next.get();
            presence.next.set(number + 1);
            presence.list.borrow_mut().push(Known { number, clients, connection });
            number
        });
        Present { presence, number }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        if let Some(presence) = &self.presence {
            presence.list.borrow_mut().retain(|known| known.number != self.number);
        }
    }
}

/// As it is written down: descriptors by their place.
#[derive(Serialize, Deserialize)]
struct Written {
    socket: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<usize>,
    #[serde(flatten)]
    connection: Carried,
}

#[derive(Serialize, Deserialize)]
struct AllWritten {
    connections: Vec<Written>,
}

/// The connections of an export, for another process. Its disk's gate is closed, and nothing is in flight.
/// Handshakes that go on are waited for, `shaken`, but not for long.
pub(crate) async fn hand_over(
    host: &Host,
    clients: &Arc<Clients>,
    shaken: impl Future<Output = ()>,
) -> Result<Luggage> {
    let _ = blockmason::rt::timeout(GRACE, shaken).await;
    let found = Arc::<Mutex<Vec<Result<Packed>>>>::default();
    let (to, whose) = (found.clone(), clients.clone());
    host.on_every(move |shard| {
        let presence = shard.local(0, Presence::default);
        let list = presence.list.borrow();
        let own = list.iter().filter(|known| Arc::ptr_eq(&known.clients, &whose));
        let packed = own.filter_map(|known| known.connection.carry().transpose());
        to.lock().unwrap_or_else(PoisonError::into_inner).extend(packed);
    })
    .await?;
    let found = std::mem::take(&mut *found.lock().unwrap_or_else(PoisonError::into_inner));
    let (mut connections, mut fds) = (Vec::new(), Descriptors::default());
    for packed in found {
        let Packed { carried, socket, bytes } = packed?;
        let bytes = bytes.map(|bytes| fds.put(bytes)).transpose()?;
        connections.push(Written { socket: fds.put(socket)?, bytes, connection: carried });
    }
    Ok(Luggage { fds: fds.into_fds(), ..Luggage::of(VERSION, &AllWritten { connections })? })
}

/// Takes up the connections of an export that another process has served.
pub(crate) async fn take_over(host: &Arc<Host>, entry: &Arc<Entry>, luggage: Luggage) -> Result<()> {
    let written: AllWritten = luggage.read(VERSION)?;
    let mut fds = Descriptors::from(luggage.fds);
    let mut answers = Vec::new();
    for Written { socket, bytes, connection } in written.connections {
        let socket = fds.take(socket)?;
        let bytes = bytes.map(|place| fds.take(place)).transpose()?;
        answers.push(spawn(host, entry.clone(), Packed { carried: connection, socket, bytes })?);
    }
    for answer in answers {
        answer.await.map_err(|_| Error::internal("a client was lost on its way"))??;
    }
    Ok(())
}

/// Serves a connection; the answer comes when it is admitted. Its requests wait at the gate.
fn spawn(host: &Arc<Host>, entry: Arc<Entry>, packed: Packed) -> Result<oneshot::Receiver<Result<()>>> {
    let (answer, answered) = oneshot::channel();
    let domain = rustix::net::sockopt::socket_domain(&packed.socket)
        .map_err(|errno| Error::os(errno, "a client's descriptor is no socket"))?;
    rustix::io::ioctl_fionbio(&packed.socket, true)
        .map_err(|errno| Error::os(errno, "a client's socket cannot be made non-blocking"))?;
    let unix = domain == rustix::net::AddressFamily::UNIX;
    host.spawn_stream(move || async move {
        let Packed { carried, socket, bytes } = packed;
        match unix {
            true => resume(UnixStream::from_std(socket.into()), carried, bytes, &entry, answer).await,
            false => resume(TcpStream::from_std(socket.into()), carried, bytes, &entry, answer).await,
        }
    })?;
    Ok(answered)
}

async fn resume<S: Peer>(
    socket: std::io::Result<S>,
    carried: Carried,
    bytes: Option<OwnedFd>,
    entry: &Arc<Entry>,
    answer: oneshot::Sender<Result<()>>,
) {
    let flags = TransmissionFlags(carried.flags);
    let promise = Promise { size: carried.size, writable: !flags.contains(TransmissionFlags::READ_ONLY) };
    let connection = socket
        .map_err(|error| Error::io(error, "a client's descriptor is of no use"))
        .and_then(|socket| Connection::resume(carried, bytes, socket, entry.disk.budget().clone()))
        .map(|connection| connection.with_maps(entry.maps()));
    // Whoever asks waits for this; if not, nobody has to be told.
    match connection {
        Err(error) => drop(answer.send(Err(error))),
        Ok(connection) => {
            let admitted = |admitted| {
                let message = "a client was told what the disk here does not keep";
                let gone = || Err(Error::new(Kind::Busy, message));
                drop(answer.send(if admitted { Ok(()) } else { gone() }));
            };
            attend(Rc::new(connection), entry, promise, admitted).await;
        }
    }
}
