//! Exports of a process: their sockets, and the front-ends that come.

use super::device::{Device, Terms};
use super::queue::News;
use super::session::Session;
use super::socket::{Received, Socket};
use super::wire::{self, Message};
use crate::nbd::clients::Promise;
use crate::nbd::listen::{SocketRights, open_unix};
use blockmason::sched::Served;
use blockmason::{Disk, Host, Result};
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

/// Front-ends that may be connected to one export. Few are needed: one, and another that it migrates to.
const MOST_SESSIONS: usize = 64;

/// A front-end that does not read its answers for so long is cut off.
const PATIENCE: Duration = Duration::from_secs(10);

/// The exports of a process.
#[derive(Default)]
pub(crate) struct Exports(Mutex<Open>);

#[derive(Default)]
struct Open {
    listeners: HashMap<PathBuf, Weak<Listener>>,
    devices: Vec<Weak<Lease>>,
}

/// A socket.
struct Listener {
    path: PathBuf,
    rights: SocketRights,
    lease: Arc<Lease>,
    /// Device and inode, by which the path is known to be ours still.
    inode: Option<(u64, u64)>,
    closing: watch::Sender<bool>,
}

/// A device that exports have; the last one closes it.
struct Lease {
    device: Arc<Device>,
    sessions: AtomicUsize,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.device.close();
    }
}

impl Listener {
    /// Its path goes first.
    fn shut(&self) {
        let meta = std::fs::symlink_metadata(&self.path);
        // Somebody else may have put theirs there meanwhile.
        if meta.is_ok_and(|meta| Some((meta.dev(), meta.ino())) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
        self.closing.send_replace(true);
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shut();
    }
}

/// An export that is open. Closed when it is dropped; those of the same device share what they have in common.
pub(crate) struct Export {
    listener: Arc<Listener>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Exports {
    /// Opens an export. One of the same disk and element, if there is one, makes room: its front-ends stay.
    ///
    /// # Errors
    /// [`blockmason::Kind::Busy`] if somebody else serves the socket.
    pub(crate) fn open(
        &self,
        host: &Arc<Host>,
        (path, rights): (&Path, SocketRights),
        (disk, source): (&Arc<Disk>, &str),
        terms: Terms,
        record: PathBuf,
    ) -> Result<Export> {
        let mut open = lock(&self.0);
        open.devices.retain(|lease| lease.strong_count() > 0);
        open.listeners.retain(|_, listener| listener.strong_count() > 0);
        let same =
            |lease: &Arc<Lease>| Arc::ptr_eq(&lease.device.disk, disk) && lease.device.source == source;
        let known = open.devices.iter().filter_map(Weak::upgrade).find(same);
        let lease = known.unwrap_or_else(|| {
            let device = Arc::new(Device::new(disk.clone(), source, terms.clone(), record));
            Arc::new(Lease { device, sessions: AtomicUsize::new(0) })
        });
        let there = open.listeners.get(path).and_then(Weak::upgrade);
        let listener = match there.filter(|listener| Arc::ptr_eq(&listener.lease, &lease)) {
            Some(listener) if listener.rights == rights => listener,
            before => {
                before.iter().for_each(|listener| listener.shut());
                listen(host, path, rights, lease.clone())?
            }
        };
        lease.device.set_terms(terms);
        open.devices.push(Arc::downgrade(&lease));
        open.listeners.insert(path.to_owned(), Arc::downgrade(&listener));
        Ok(Export { listener })
    }
}

impl Export {
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.listener.lease.device
    }
}

fn listen(host: &Arc<Host>, path: &Path, rights: SocketRights, lease: Arc<Lease>) -> Result<Arc<Listener>> {
    let socket = open_unix(path, &rights)?;
    let inode = std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let (closing, mut watch) = watch::channel(false);
    let (to, weak) = (host.clone(), Arc::downgrade(&lease));
    let listener = Arc::new(Listener { path: path.to_owned(), rights, lease, inode, closing });
    host.background(move || async move {
        let accepting = async {
            match UnixListener::from_std(socket) {
                Ok(socket) => accept(&socket, &to, &weak).await,
                Err(error) => tracing::error!("front-ends cannot be waited for: {error}"),
            }
        };
        tokio::select! {
            () = accepting => {}
            _ = watch.wait_for(|closing| *closing) => {}
        }
    })?;
    Ok(listener)
}

async fn accept(socket: &UnixListener, host: &Arc<Host>, lease: &Weak<Lease>) {
    loop {
        let stream = match socket.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or memory: others may give some back.
                tracing::warn!("a front-end could not be accepted: {error}");
                blockmason::rt::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(lease) = lease.upgrade() else { return };
        if lease.sessions.fetch_add(1, Ordering::Relaxed) >= MOST_SESSIONS {
            lease.sessions.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(
                export = lease.device.source,
                "a front-end is turned away: too many are connected"
            );
            continue;
        }
        let device = lease.device.clone();
        let counted = Counted(Arc::downgrade(&lease));
        let session = move || async move {
            let _counted = counted;
            serve_front_end(stream, &device).await;
        };
        if let Err(error) = host.background(session) {
            tracing::error!("a front-end cannot be served: {error}");
        }
    }
}

struct Counted(Weak<Lease>);

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(lease) = self.0.upgrade() {
            lease.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// What a session waits for.
enum Next {
    Message(std::io::Result<Option<Received>>),
    News(Option<(usize, News)>),
    Closing,
    Dismissed,
    Changed,
}

pub(super) async fn serve_front_end(stream: UnixStream, device: &Arc<Device>) {
    let export = device.source.as_str();
    let Ok(disk) = device.geometry() else { return };
    let promise = Promise { size: disk.size, writable: !disk.read_only };
    let Some(mut admitted) = device.clients.admit(promise, &device.disk, export) else {
        return tracing::info!(export, "the disk changed while a front-end came");
    };
    tracing::info!(export, "a front-end has come");
    let (reporter, mut news) = mpsc::unbounded_channel();
    let mut session = Session::new(device, reporter);
    let mut socket = Socket::new(stream);
    let mut closing = device.closing();
    let mut changes = device.disk.changes();
    let mut size = disk.size;
    let why = loop {
        let next = tokio::select! {
            biased;
            news = news.recv() => Next::News(news),
            _ = admitted.dismissed.wait_for(|dismissed| *dismissed) => Next::Dismissed,
            _ = closing.wait_for(|closing| *closing), if !session.runs() => Next::Closing,
            _ = changes.changed() => Next::Changed,
            message = socket.receive() => Next::Message(message),
        };
        match next {
            Next::Message(Ok(None)) => break "it has disconnected".to_owned(),
            Next::Message(Err(error)) => break error.to_string(),
            Next::Message(Ok(Some(received))) => {
                if let Err(why) = answer(&mut session, &socket, received).await {
                    break why;
                }
            }
            Next::News(Some((index, News::Ended(served)))) => {
                session.ended(index);
                if matches!(served, Served::Closing | Served::Gone) && !session.runs() {
                    break "the disk has closed".to_owned();
                }
            }
            Next::News(_) => break "it cannot be served any more".to_owned(),
            Next::Closing => break "the disk closes".to_owned(),
            Next::Dismissed => {
                // What is in flight is completed; the guest learns of it if it comes again.
                let _ = session.stop_all().await;
                break "it was sent away".to_owned();
            }
            Next::Changed => {
                if let Some(disk) = device.geometry().ok().filter(|disk| disk.size != size) {
                    size = disk.size;
                    session.config_changed();
                }
            }
        }
    };
    tracing::info!(export, "a front-end has gone: {why}");
}

/// Does what a message asks for, and answers it.
///
/// # Errors
/// Why the session cannot go on.
async fn answer(session: &mut Session, socket: &Socket, received: Received) -> Result<(), String> {
    let Received { header, payload, fds } = received;
    let message = Message::parse(header.code, &payload)
        .map_err(|why| format!("{why}, number {} with {} bytes", header.code, payload.len()))?;
    let (least, most) = message.fds();
    if fds.len() < least || fds.len() > most {
        return Err(format!("a message with {} descriptors, number {}", fds.len(), header.code));
    }
    let answers = message.has_answer();
    let acknowledge = header.need_reply && session.acknowledges() && !answers;
    let outcome = session.handle(message, fds).await;
    let (payload, fd) = match outcome {
        Ok(Some(answer)) => (answer.payload, answer.fd),
        Ok(None) if acknowledge => (0u64.to_ne_bytes().to_vec(), None),
        Ok(None) => return Ok(()),
        Err(error) if acknowledge => {
            tracing::info!("a front-end's message, number {}, is refused: {error}", header.code);
            (1u64.to_ne_bytes().to_vec(), None)
        }
        Err(error) => return Err(format!("{error} (message number {})", header.code)),
    };
    let bytes = wire::reply(header.code, &payload);
    let send = socket.send(&bytes, fd.as_ref().map(AsFd::as_fd));
    match blockmason::rt::timeout(PATIENCE, send).await {
        Some(sent) => sent.map_err(|error| error.to_string()),
        None => Err("it does not read its answers".to_owned()),
    }
}
