//! A few threads for calls that may block where there is no io_uring, or where one was slow.

use std::sync::{Arc, LazyLock, Mutex, PoisonError, mpsc};
use tokio::sync::oneshot;

/// Enough to keep a disk busy; more only queue up in the kernel.
const THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

static JOBS: LazyLock<mpsc::Sender<Job>> = LazyLock::new(|| {
    let (tx, rx) = mpsc::channel::<Job>();
    let rx = Arc::new(Mutex::new(rx));
    for ix in 0..THREADS {
        let rx = rx.clone();
        let work = move || {
            loop {
                let job = rx.lock().unwrap_or_else(PoisonError::into_inner).recv();
                match job {
                    Ok(job) => job(),
                    Err(_) => return,
                }
            }
        };
        // With fewer threads the pool is slower; with none, jobs fail when they are sent.
        if let Err(error) = std::thread::Builder::new().name(format!("file-{ix}")).spawn(work) {
            tracing::warn!("cannot start a thread for file I/O: {error}");
        }
    }
    tx
});

/// Runs `job` on one of the threads.
pub(super) async fn run<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> std::io::Result<T> {
    let lost = || std::io::Error::other("no thread for file I/O");
    // A clock that stands still while there is anything to do has to know of this as well.
    #[cfg(any(test, feature = "testing"))]
    if crate::testing::clock_stands() {
        return crate::rt::blocking(job).await.ok_or_else(lost);
    }
    let (tx, rx) = oneshot::channel();
    let job = Box::new(move || drop(tx.send(job())));
    JOBS.send(job).map_err(|_| lost())?;
    rx.await.map_err(|_| lost())
}
