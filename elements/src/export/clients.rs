//! What connected clients were promised, and sending them away.

use blockmason::{Disk, Error, Geometry, Kind, Result};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// What a client may rely on until it disconnects: the protocol has no way to take it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Promise {
    /// Bytes of the disk. It may grow: clients that come later see it.
    pub size: u64,
    /// True if it may write.
    pub writable: bool,
}

impl Promise {
    /// What of it a disk that looks like `below` does not keep.
    fn broken_by(self, below: &Geometry) -> Option<String> {
        if below.size < self.size {
            return Some(format!("was told {} bytes, and there would be {}", self.size, below.size));
        }
        (self.writable && below.read_only).then(|| "may write, and the disk would be read-only".to_owned())
    }
}

/// The clients of an export.
#[derive(Default)]
pub struct Clients {
    list: Mutex<List>,
    /// Another process goes on, and those that it cannot be given go.
    parting: watch::Sender<bool>,
}

#[derive(Default)]
struct List {
    next: u64,
    clients: HashMap<u64, (Promise, watch::Sender<bool>)>,
}

/// A client's place in the list; given up when it is dropped.
pub struct Admitted<'a> {
    clients: &'a Clients,
    number: u64,
    /// Becomes true when the client has to go.
    pub dismissed: watch::Receiver<bool>,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.clients.list().clients.remove(&self.number);
    }
}

impl Admitted<'_> {
    /// The client has been told of a larger disk, and relies on that from now on.
    pub fn promise_size(&self, size: u64) {
        if let Some((promise, _)) = self.clients.list().clients.get_mut(&self.number) {
            promise.size = promise.size.max(size);
        }
    }
}

impl Clients {
    fn list(&self) -> MutexGuard<'_, List> {
        // Every change is complete before anything can panic.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a client in with what it was promised; None if the disk, as it is now or is about to
    /// be, does not keep it any more.
    pub fn admit(&self, promise: Promise, disk: &Disk, source: &str) -> Option<Admitted<'_>> {
        let (dismiss, dismissed) = watch::channel(false);
        let mut list = self.list();
        let number = list.next;
        list.next += 1;
        list.clients.insert(number, (promise, dismiss));
        drop(list);
        let admitted = Admitted { clients: self, number, dismissed };
        // In this order: a change that has not seen this client in the list is seen here.
        let kept = [Some(disk.graph()), disk.next_graph()].into_iter().flatten().all(|graph| {
            let below = graph.source(source).and_then(|source| graph.below(source).ok());
            below.is_some_and(|below| promise.broken_by(&below).is_none())
        });
        (kept && disk.takes_clients()).then_some(admitted)
    }

    /// Sends those away that cannot be given to the process which goes on.
    pub fn part(&self) {
        self.parting.send_replace(true);
    }

    /// Waits for that.
    pub(crate) async fn parting(&self) {
        // The sender is ours: it does not go.
        let _ = self.parting.subscribe().wait_for(|parting| *parting).await;
    }

    /// Whether all clients can live with another disk, or without the export.
    ///
    /// # Errors
    /// [`Kind::Busy`] with the reason.
    pub fn can_live_with(&self, below: Option<&Geometry>) -> Result<()> {
        let list = self.list();
        let broken: Vec<_> =
            list.clients.values().filter_map(|(promise, _)| broken(*promise, below)).collect();
        let message = match broken.as_slice() {
            [] => return Ok(()),
            [reason] => format!("a client is connected that {reason}"),
            [reason, ..] => format!("{} clients are connected, one of which {reason}", broken.len()),
        };
        Err(Error::new(Kind::Busy, format!("{message}; end it first, or send it away with --disconnect")))
    }

    /// Sends away those that cannot.
    pub fn dismiss(&self, below: Option<&Geometry>) {
        for (promise, dismiss) in self.list().clients.values() {
            if broken(*promise, below).is_some() {
                dismiss.send_replace(true);
            }
        }
    }

    /// Sends all away.
    pub fn dismiss_all(&self) {
        self.dismiss(None);
    }
}

fn broken(promise: Promise, below: Option<&Geometry>) -> Option<String> {
    match below {
        Some(below) => promise.broken_by(below),
        None => Some("would lose its disk".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promise(size: u64, writable: bool) -> Promise {
        Promise { size, writable }
    }

    #[test]
    fn a_promise_is_kept_by_a_larger_disk_and_broken_by_less() {
        let disk = |size, read_only| Geometry { read_only, ..Geometry::new(size) };
        assert_eq!(promise(10, true).broken_by(&disk(11, false)), None);
        assert_eq!(promise(10, false).broken_by(&disk(10, true)), None);
        let smaller = promise(10, true).broken_by(&disk(9, false));
        assert_eq!(smaller.as_deref(), Some("was told 10 bytes, and there would be 9"));
        assert!(promise(10, true).broken_by(&disk(10, true)).is_some());
    }

    #[test]
    fn only_those_whose_promise_is_broken_are_sent_away() {
        let clients = Clients::default();
        let admit = |promise| {
            let (dismiss, dismissed) = watch::channel(false);
            let mut list = clients.list();
            let number = list.clients.len() as u64;
            list.clients.insert(number, (promise, dismiss));
            Admitted { clients: &clients, number, dismissed }
        };
        let (reader, writer) = (admit(promise(10, false)), admit(promise(10, true)));
        let read_only = Geometry { read_only: true, ..Geometry::new(10) };
        let error = clients.can_live_with(Some(&read_only)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a client is connected that may write, and the disk would be read-only; end it first, or send it away \
             with --disconnect"
        );
        clients.dismiss(Some(&read_only));
        assert!(!*reader.dismissed.borrow() && *writer.dismissed.borrow());
        assert!(clients.can_live_with(None).unwrap_err().to_string().starts_with("2 clients"));
        reader.promise_size(9);
        clients.can_live_with(Some(&read_only.clone())).unwrap_err();
        reader.promise_size(20);
        let error = clients.can_live_with(Some(&Geometry::new(19))).unwrap_err();
        assert!(error.to_string().contains("was told 20 bytes, and there would be 19"), "{error}");
        drop((reader, writer));
        clients.can_live_with(None).unwrap();
    }
}
