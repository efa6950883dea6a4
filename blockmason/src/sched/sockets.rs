//! Listening sockets of a process, by address, so that a successor in another process can go on with them.

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// The sockets. Whoever listens asks for its address with [`inherited`](Sockets::inherited) first, then
/// shows what it listens on with [`keep`](Sockets::keep), and takes it back when it closes. It accepts
/// only while it is not [`held`](Sockets::held).
#[derive(Default)]
pub struct Sockets {
    both: Mutex<Both>,
    /// A handover goes on: whoever connects waits in the sockets' queues for one of the two processes.
    hold: watch::Sender<bool>,
}

#[derive(Default)]
struct Both {
    /// Copies of those that are open here.
    open: HashMap<String, OwnedFd>,
    /// From the process before, and nobody has asked for them yet.
    inherited: HashMap<String, OwnedFd>,
}

impl Sockets {
    fn both(&self) -> MutexGuard<'_, Both> {
        // Every change is complete before anything can panic.
        self.both.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket that the process before had at this address: it accepts already.
    pub fn inherited(&self, address: &str) -> Option<OwnedFd> {
        self.both().inherited.remove(address)
    }

    /// A socket listens at that address. A copy of it is kept, so it stays open until
    /// [`forget`](Self::forget) is called.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn keep(&self, address: &str, socket: impl AsFd) -> Result<()> {
        let copy = socket.as_fd().try_clone_to_owned();
        let copy = copy.map_err(|error| Error::io(error, "the socket's descriptor cannot be copied"))?;
        self.both().open.insert(address.to_owned(), copy);
        Ok(())
    }

    /// The socket at that address closes.
    pub fn forget(&self, address: &str) {
        self.both().open.remove(address);
    }

    /// From now on nobody accepts, until [`release`](Self::release).
    pub fn hold(&self) {
        self.hold.send_replace(true);
    }

    /// Whoever connects is accepted again.
    pub fn release(&self) {
        self.hold.send_replace(false);
    }

    /// Accepts by `accept`, but while the sockets are held.
    pub async fn accept<T>(&self, accept: impl Future<Output = T>) -> T {
        let mut accept = std::pin::pin!(accept);
        loop {
            self.released().await;
            tokio::select! {
                biased;
                () = self.held() => {}
                accepted = &mut accept => return accepted,
            }
        }
    }

    /// Waits until nobody may accept.
    pub async fn held(&self) {
        // The sender is ours: it does not go.
        let _ = self.hold.subscribe().wait_for(|hold| *hold).await;
    }

    /// Waits until clients may be accepted, which is most of the time.
    pub async fn released(&self) {
        let _ = self.hold.subscribe().wait_for(|hold| !*hold).await;
    }

    /// Copies of all sockets, for a successor.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn carry(&self) -> Result<Vec<(String, OwnedFd)>> {
        let copy = |(address, socket): (&String, &OwnedFd)| {
            let copy = socket.try_clone();
            copy.map(|copy| (address.clone(), copy))
                .map_err(|error| Error::io(error, "the socket's descriptor cannot be copied"))
        };
        self.both().open.iter().map(copy).collect()
    }

    /// Sockets of the process before, by address, for whoever will listen there.
    pub fn expect(&self, sockets: impl IntoIterator<Item = (String, OwnedFd)>) {
        self.both().inherited.extend(sockets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn a_socket_goes_on_and_is_given_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let (old, new) = (Sockets::default(), Sockets::default());
        let listener = UnixListener::bind(&path).unwrap();
        old.keep("unix:a", &listener).unwrap();
        new.expect(old.carry().unwrap());
        old.forget("unix:a");
        drop(listener);
        let _waits = UnixStream::connect(&path).unwrap();
        let listener = UnixListener::from(new.inherited("unix:a").unwrap());
        assert!(new.inherited("unix:a").is_none() && new.carry().unwrap().is_empty());
        listener.accept().unwrap();
    }
}
