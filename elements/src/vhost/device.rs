//! What all front-ends of an export share: the disk, its terms, and which of them runs its queues.

use super::blk;
use super::wire::protocol;
use crate::export::clients::Clients;
use blockmason::{Disk, Error, Geometry, Kind, Result};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// VHOST_F_LOG_ALL: written pages are logged.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// VHOST_USER_F_PROTOCOL_FEATURES: features of the protocol are negotiated.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// The features of the protocol that are offered.
pub(crate) const PROTOCOL: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS;

/// A front-end that still runs the queues when another wants to has so long to go.
const PATIENCE: Duration = Duration::from_secs(1);

/// The most queues: more than processors that a guest has.
pub(crate) const MOST_QUEUES: u16 = 256;

/// Complaints about front-ends are that far apart.
const QUIET: Duration = Duration::from_secs(10);

/// What an administrator decides about a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Queues, at least 1.
    pub(crate) queues: u16,
    /// The longest ring that is taken.
    pub(crate) queue_size: u16,
    /// At most 20 bytes.
    pub(crate) serial: String,
    /// Nothing may be written, whatever lies below.
    pub(crate) read_only: bool,
    /// How long an idle queue looks for requests before it waits for a kick.
    pub(crate) poll: Duration,
}

/// A disk as its front-ends see it. An export that takes the place of another of the same graph and element
/// has the same device.
pub(crate) struct Device {
    pub(crate) disk: Arc<Disk>,
    /// The element at which requests enter.
    pub(crate) source: String,
    terms: Mutex<Terms>,
    pub(crate) clients: Clients,
    owner: Mutex<Owner>,
    freed: Notify,
    next_session: AtomicU64,
    /// True if the driver has turned the volatile cache off.
    write_through: AtomicBool,
    /// Exists while that is so: a front-end tells us once, and not again after we died.
    record: PathBuf,
    closing: watch::Sender<bool>,
    /// `terms.read_only`, for every request to see.
    read_only: AtomicBool,
    /// When a front-end was last complained of: it may come again ten times a second.
    complained: Mutex<Option<Instant>>,
}

/// Who runs the queues.
#[derive(Default)]
struct Owner {
    session: Option<u64>,
    /// False once its front-end has gone; what it had in flight may not have ended.
    connected: bool,
}

impl Device {
    /// A device of a disk. `record` is where a driver's choice to do without a volatile cache is kept.
    pub(crate) fn new(disk: Arc<Disk>, source: &str, terms: Terms, record: PathBuf) -> Device {
        let write_through = AtomicBool::new(record.exists());
        let read_only = AtomicBool::new(terms.read_only);
        Device {
            disk,
            source: source.to_owned(),
            terms: Mutex::new(terms),
            clients: Clients::default(),
            owner: Mutex::default(),
            freed: Notify::new(),
            next_session: AtomicU64::new(1),
            write_through,
            record,
            closing: watch::channel(false).0,
            read_only,
            complained: Mutex::default(),
        }
    }

    pub(crate) fn terms(&self) -> Terms {
        lock(&self.terms).clone()
    }

    /// Whether front-ends that were told of these terms can live with others.
    ///
    /// # Errors
    /// [`Kind::Busy`] with what would be taken from them.
    pub(crate) fn may_have(&self, terms: &Terms) -> Result<()> {
        let old = self.terms();
        let busy = |what: String| {
            Err(Error::new(Kind::Busy, format!("a guest is connected that {what}; unplug its disk first")))
        };
        if terms.read_only && !old.read_only {
            return busy("may write, and (readonly yes) would come too late for it".to_owned());
        }
        if terms.queues < old.queues || terms.queue_size < old.queue_size {
            return busy(format!(
                "was offered {} queues of {}, and there would be {} of {}",
                old.queues, old.queue_size, terms.queues, terms.queue_size
            ));
        }
        Ok(())
    }

    /// True if nobody may write, whatever lies below.
    #[inline]
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Relaxed)
    }

    /// Tells the administrator what a front-end has done wrong, but not ten times a second.
    pub(crate) fn complain(&self, of: &str) {
        let mut last = lock(&self.complained);
        let now = blockmason::rt::now();
        if last.is_some_and(|last| now < last + QUIET) {
            return tracing::info!(export = self.source, "{of}");
        }
        *last = Some(now);
        tracing::warn!(export = self.source, "{of}");
    }

    /// For front-ends that come from now on.
    pub(crate) fn set_terms(&self, terms: Terms) {
        self.read_only.store(terms.read_only, Ordering::Relaxed);
        *lock(&self.terms) = terms;
    }

    /// A number for a session.
    pub(crate) fn next_session(&self) -> u64 {
        self.next_session.fetch_add(1, Ordering::Relaxed)
    }

    /// The disk as it is now.
    ///
    /// # Errors
    /// The graph has no such source any more.
    pub(crate) fn geometry(&self) -> Result<Geometry> {
        let graph = self.disk.graph();
        let source = graph.source(&self.source);
        let gone = || Error::new(Kind::Unavailable, "the export has been taken out of its graph");
        let below = graph.below(source.ok_or_else(gone)?)?;
        Ok(Geometry { read_only: below.read_only || self.terms().read_only, ..below })
    }

    /// The features of a device on this disk.
    pub(crate) fn features(&self, disk: &Geometry) -> u64 {
        blk::features(disk.read_only, self.terms().queues) | LOG_ALL | PROTOCOL_FEATURES
    }

    /// True if completion of a write must mean that it is durable, although the driver can flush.
    #[inline]
    pub(crate) fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// A front-end comes. A process that has handed the device over may have recorded a choice since this one looked,
    /// and acknowledged it to somebody who now comes here.
    pub(crate) fn look_at_record(&self) {
        if self.record.exists() {
            self.write_through.store(true, Ordering::Relaxed);
        }
    }

    /// The driver turns the volatile cache on or off. Known after the death of this process too.
    ///
    /// # Errors
    /// It cannot be recorded: then the cache stays off, which is always safe.
    pub(crate) fn set_write_back(&self, write_back: bool) -> Result<()> {
        let refused =
            |error| Error::io(error, "the guest's choice of cache cannot be kept").with_path(&self.record);
        if write_back {
            match std::fs::remove_file(&self.record) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(refused(error)),
                _ => self.write_through.store(false, Ordering::Relaxed),
            }
            return Ok(());
        }
        self.write_through.store(true, Ordering::Relaxed);
        let made = self.record.parent().map_or(Ok(()), std::fs::create_dir_all);
        made.and_then(|()| std::fs::write(&self.record, "")).map_err(refused)
    }

    /// Waits for the right to run the queues. One front-end has it at a time, and until what it had in flight has
    /// ended: two would complete the same requests.
    ///
    /// # Errors
    /// [`Kind::Busy`] if another one is connected and keeps it.
    pub(crate) async fn claim(self: &Arc<Self>, session: u64) -> Result<Arc<Claim>> {
        let deadline = blockmason::rt::now() + PATIENCE;
        loop {
            let freed = self.freed.notified();
            let connected = {
                let mut owner = lock(&self.owner);
                if owner.session.is_none() {
                    *owner = Owner { session: Some(session), connected: true };
                    return Ok(Arc::new(Claim { device: self.clone(), session }));
                }
                owner.connected
            };
            let left = deadline.saturating_duration_since(blockmason::rt::now());
            if connected && left.is_zero() {
                let message = "another virtual machine runs the queues of this disk; it has to stop first";
                return Err(Error::new(Kind::Busy, message));
            }
            if connected {
                let _ = blockmason::rt::timeout(left, freed).await;
            } else {
                freed.await;
            }
        }
    }

    /// No front-end is served any more unless its queues run; those end with the disk.
    pub(crate) fn close(&self) {
        self.closing.send_replace(true);
    }

    pub(crate) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to run the queues; shared by the session and its queues, and given up with the last of them.
pub(crate) struct Claim {
    device: Arc<Device>,
    session: u64,
}

impl Claim {
    /// The front-end has gone: whoever wants the queues waits for what is in flight, and not for it.
    pub(crate) fn disconnect(&self) {
        let mut owner = lock(&self.device.owner);
        if owner.session == Some(self.session) {
            owner.connected = false;
        }
        drop(owner);
        self.device.freed.notify_waiters();
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        *lock(&self.device.owner) = Owner::default();
        self.device.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::testing::{TestDisk, run};

    fn device(disk: &TestDisk, record: PathBuf) -> Arc<Device> {
        let terms =
            Terms { queues: 1, queue_size: 8, serial: String::new(), read_only: false, poll: Duration::ZERO };
        Arc::new(Device::new(disk.disk.clone(), "D", terms, record))
    }

    #[test]
    fn one_front_end_at_a_time() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, "element D (type null)", "D").await.unwrap();
            let device = device(&disk, PathBuf::from("/nonexistent/record"));
            let first = device.claim(1).await.unwrap();
            let error = device.claim(2).await.map(drop).unwrap_err();
            assert_eq!(error.kind(), Kind::Busy, "{error}");
            // It has gone, and something of it is in flight.
            let queue = first.clone();
            first.disconnect();
            drop(first);
            let mut second = std::pin::pin!(device.claim(2));
            assert!(blockmason::rt::timeout(Duration::from_secs(100), second.as_mut()).await.is_none());
            drop(queue);
            second.await.unwrap();
        });
    }

    #[test]
    fn a_choice_of_cache_outlives_the_process() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, "element D (type null)", "D").await.unwrap();
            let folder = tempfile::tempdir().unwrap();
            let record = folder.path().join("cache/D");
            let first = device(&disk, record.clone());
            assert!(!first.is_write_through());
            first.set_write_back(false).unwrap();
            let next = device(&disk, record.clone());
            assert!(next.is_write_through());
            let late = device(&disk, folder.path().join("cache/E"));
            assert!(!late.is_write_through());
            std::fs::write(folder.path().join("cache/E"), "").unwrap();
            late.look_at_record();
            assert!(late.is_write_through());
            next.set_write_back(true).unwrap();
            next.set_write_back(true).unwrap();
            assert!(!device(&disk, record).is_write_through());
            let nowhere = device(&disk, PathBuf::from("/proc/nowhere/D"));
            assert!(nowhere.set_write_back(false).is_err() && nowhere.is_write_through());
        });
    }
}
