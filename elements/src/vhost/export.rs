//! Exports of a process, and their sockets.

use super::attend::{self, Ask};
use super::device::{Device, Terms};
use crate::export::socket::{self, Bound, SocketRights, nonblocking, open_unix};
use blockmason::{Disk, Host, Luggage, Result};
use std::collections::HashMap;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

/// Front-ends that may be connected to one export. Few are needed: one, and another that it migrates to.
const MOST_FRONT_ENDS: usize = 64;

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
    bound: Option<Bound>,
    host: Weak<Host>,
    closing: watch::Sender<bool>,
}

/// A device that exports have; the last one closes it.
pub(super) struct Lease {
    pub(super) device: Arc<Device>,
    present: Mutex<Present>,
}

/// The front-ends that are connected: who serves each of them, by a number.
#[derive(Default)]
struct Present {
    next: u64,
    served: HashMap<u64, Served>,
}

/// A front-end that is connected.
#[derive(Clone)]
pub(super) struct Served {
    pub(super) ask: mpsc::UnboundedSender<Ask>,
    /// A queue of its runs: it would be missed.
    pub(super) runs: Arc<AtomicBool>,
}

/// A front-end's place among them; given up when it is dropped.
pub(super) struct Place {
    lease: Weak<Lease>,
    number: u64,
    /// What whoever serves it is asked.
    pub(super) asked: mpsc::UnboundedReceiver<Ask>,
    runs: Arc<AtomicBool>,
}

impl Place {
    /// Whether a queue runs.
    pub(super) fn set_runs(&self, runs: bool) {
        self.runs.store(runs, Ordering::Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.upgrade() {
            lock(&lease.present).served.remove(&self.number);
        }
    }
}

impl Lease {
    pub(super) fn new(device: Device) -> Arc<Lease> {
        Arc::new(Lease { device: Arc::new(device), present: Mutex::default() })
    }

    /// A place for one more front-end; None if there are too many.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Place> {
        let mut present = lock(&self.present);
        if present.served.len() >= MOST_FRONT_ENDS {
            return None;
        }
        let (ask, asked) = mpsc::unbounded_channel();
        let number = present.next;
        present.next += 1;
        let runs = Arc::<AtomicBool>::default();
        present.served.insert(number, Served { ask, runs: runs.clone() });
        Some(Place { lease: Arc::downgrade(self), number, asked, runs })
    }

    /// Those who are connected, in the order in which they came.
    pub(super) fn present(&self) -> Vec<Served> {
        let present = lock(&self.present);
        let mut served: Vec<_> = present.served.iter().collect();
        served.sort_unstable_by_key(|(number, _)| **number);
        served.into_iter().map(|(_, served)| served.clone()).collect()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.device.close();
    }
}

impl Listener {
    /// Its path goes first. Once: somebody else may listen there afterwards.
    fn shut(&self) {
        if *self.closing.borrow() {
            return;
        }
        self.bound.iter().for_each(Bound::remove);
        if let Some(host) = self.host.upgrade() {
            host.sockets().forget(&socket::key(&self.path));
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
        if let Some(lease) = known.as_ref().filter(|lease| !lease.present().is_empty()) {
            lease.device.may_have(&terms)?;
        }
        let lease =
            known.unwrap_or_else(|| Lease::new(Device::new(disk.clone(), source, terms.clone(), record)));
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

    /// Its front-ends, for another process.
    pub(crate) fn hand_over(&self) -> impl Future<Output = Result<Luggage>> + Send + use<> {
        let lease = self.listener.lease.clone();
        async move { attend::hand_over(&lease).await }
    }

    /// Goes on with the front-ends of another process.
    pub(crate) fn take_over(
        &self,
        host: &Arc<Host>,
        luggage: Luggage,
    ) -> impl Future<Output = Result<()>> + Send + use<> {
        let (host, lease) = (host.clone(), self.listener.lease.clone());
        async move { attend::take_over(&host, &lease, luggage).await }
    }
}

/// The socket that the process before has listened on, else a new one.
fn open_socket(host: &Host, path: &Path, rights: &SocketRights) -> Result<StdListener> {
    let key = socket::key(path);
    let socket = match host.sockets().inherited(&key) {
        Some(socket) => StdListener::from(socket),
        None => open_unix(path, rights)?,
    };
    nonblocking(socket.set_nonblocking(true))?;
    host.sockets().keep(&key, &socket)?;
    Ok(socket)
}

fn listen(host: &Arc<Host>, path: &Path, rights: SocketRights, lease: Arc<Lease>) -> Result<Arc<Listener>> {
    let socket = open_socket(host, path, &rights)?;
    let bound = Bound::at(path);
    let (closing, mut watch) = watch::channel(false);
    let (to, weak) = (host.clone(), Arc::downgrade(&lease));
    let (path, host) = (path.to_owned(), Arc::downgrade(host));
    let listener = Arc::new(Listener { path, rights, lease, bound, host, closing });
    to.clone().background(move || async move {
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
        let stream = match host.sockets().accept(socket.accept()).await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors or memory: others may give some back.
                tracing::warn!("a front-end could not be accepted: {error}");
                blockmason::rt::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(lease) = lease.upgrade() else { return };
        let Some(place) = lease.enter() else {
            let export = lease.device.source.as_str();
            tracing::warn!(export, "a front-end is turned away: too many are connected");
            continue;
        };
        let device = lease.device.clone();
        let serve = move || async move { attend::serve_front_end(stream, &device, place).await };
        if let Err(error) = host.background(serve) {
            tracing::error!("a front-end cannot be served: {error}");
        }
    }
}
