//! A thread beside the shards, for what elements do outside the data path: run a command, call a web server.

use crate::error::{Error, Result};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use tokio::sync::mpsc;

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// The thread of a host, started when it is first needed.
#[derive(Default)]
pub(super) struct Background(Mutex<Option<mpsc::UnboundedSender<Job>>>);

impl Background {
    /// Runs a future there, with its clock and its sockets.
    pub(super) fn spawn<F>(&self, make: impl FnOnce() -> F + Send + 'static) -> Result<()>
    where
        F: Future<Output = ()> + 'static,
    {
        let mut jobs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = match &*jobs {
            Some(jobs) => jobs,
            None => jobs.insert(start()?),
        };
        let sent = jobs.send(Box::new(|| Box::pin(make())));
        sent.map_err(|_| Error::internal("the thread for background work has ended"))
    }
}

/// Starts the thread. It ends when its sender goes, and drops what it has not finished.
fn start() -> Result<mpsc::UnboundedSender<Job>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io(error, "cannot make a runtime for background work"))?;
    let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
    let body = move || {
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async move {
            while let Some(make) = queue.recv().await {
                // A task of its own even while it is made: a panic ends nothing else.
                drop(tokio::task::spawn_local(async move { make().await }));
            }
        });
    };
    std::thread::Builder::new()
        .name("background".to_owned())
        .spawn(body)
        .map_err(|error| Error::io(error, "cannot start a thread for background work"))?;
    Ok(jobs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::sync::oneshot;

    #[test]
    fn work_runs_beside_the_caller_and_a_panic_harms_no_other() {
        let background = Background::default();
        background.spawn(|| async { panic!("contained") }).unwrap();
        let (tx, rx) = oneshot::channel();
        let work = || async move {
            crate::rt::sleep(Duration::from_millis(1)).await;
            tx.send(std::thread::current().id()).unwrap();
        };
        background.spawn(work).unwrap();
        assert_ne!(rx.blocking_recv().unwrap(), std::thread::current().id());
    }

    #[test]
    fn it_ends_with_its_host() {
        struct Told(Option<oneshot::Sender<()>>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.take().map(|told| told.send(()));
            }
        }
        let background = Background::default();
        let (tx, rx) = oneshot::channel();
        let told = Told(Some(tx));
        let work = || async move {
            let _told = told;
            std::future::pending().await
        };
        background.spawn(work).unwrap();
        drop(background);
        rx.blocking_recv().unwrap();
    }
}
