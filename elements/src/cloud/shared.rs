//! The volumes that this process has open: each once, whichever elements serve it.

use super::counts::Counts;
use super::format::Description;
use super::keeper::keep;
use super::open;
use super::store::{Bucket, ObjectStore};
use super::volume::{Opening, Volume};
use blockmason::{Error, Kind, Result};
use futures::FutureExt;
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

/// Where requests to stores are made, and volumes kept: the data path waits for nothing there.
static RUNTIME: LazyLock<std::io::Result<Runtime>> = LazyLock::new(|| {
    Builder::new_multi_thread().worker_threads(2).thread_name("bucket").enable_all().build()
});

/// How long a command, or opening a volume, waits for a store that does not answer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How long what is left may take when a volume is left; it is durable in commits anyway.
const LEAVING: Duration = Duration::from_secs(60);

/// # Errors
/// This process may have no more threads.
pub(crate) fn runtime() -> Result<Handle> {
    match &*RUNTIME {
        Ok(runtime) => Ok(runtime.handle().clone()),
        Err(error) => Err(Error::internal(format!("cannot make a runtime for buckets: {error}"))),
    }
}

/// Waits on this thread for what is done on the runtime for stores.
///
/// # Errors
/// What it says, or that it panicked.
pub(crate) fn block_on<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = futures::executor::block_on(runtime()?.spawn(work));
    done.unwrap_or_else(|_| Err(Error::internal("work with a bucket has panicked")))
}

/// A volume that is open.
pub(crate) struct Shared {
    pub(crate) volume: Arc<Volume>,
    graph: String,
    /// Goes last: another one may open it then.
    _listed: Listed,
}

/// That a volume is among those that are open, or are just being opened or left.
struct Listed(String);

static OPEN: Mutex<BTreeMap<String, Weak<Shared>>> = Mutex::new(BTreeMap::new());
static CHANGED: Condvar = Condvar::new();

fn all() -> MutexGuard<'static, BTreeMap<String, Weak<Shared>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Listed {
    fn drop(&mut self) {
        all().remove(&self.0);
        CHANGED.notify_all();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let volume = self.volume.clone();
        let say = volume.say.clone();
        if let Err(error) = block_on(async move { open::close(&volume, LEAVING).await }) {
            say(&format!("it was not left in order: {error}"));
        }
    }
}

/// The volume that is called so, if it is open; else nobody opens it as long as what is returned is there.
fn find(url: &str) -> std::result::Result<Arc<Shared>, Listed> {
    let mut all = all();
    while let Some(shared) = all.get(url) {
        if let Some(shared) = shared.upgrade() {
            return Ok(shared);
        }
        all = CHANGED.wait(all).unwrap_or_else(PoisonError::into_inner);
    }
    all.insert(url.to_owned(), Weak::new());
    Err(Listed(url.to_owned()))
}

impl Shared {
    /// The volume of that URL, opened if this process has not opened it yet: then what it asks for is counted there. Blocks.
    ///
    /// # Errors
    /// Another graph has it; as [`open::open`].
    pub(crate) fn open(
        url: &str,
        graph: &str,
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        counts: Arc<Counts>,
        opening: Opening,
        say: Arc<dyn Fn(&str) + Send + Sync>,
    ) -> Result<Arc<Shared>> {
        let listed = match find(url) {
            Ok(shared) if shared.graph == graph => return Ok(shared),
            Ok(shared) => {
                let message = format!("the graph {} has it open", shared.graph);
                return Err(Error::new(Kind::Busy, message));
            }
            Err(listed) => listed,
        };
        let bucket = Bucket::new(store, prefix, Some(PATIENCE)).counted(counts);
        let told = say.clone();
        bucket.tell(move |message| told(message));
        let volume = block_on(async move {
            let volume = open::open(bucket, opening, say).await?;
            runtime()?.spawn(guarded(volume.clone()));
            Ok(volume)
        })?;
        let shared = Arc::new(Shared { volume, graph: graph.to_owned(), _listed: listed });
        all().insert(url.to_owned(), Arc::downgrade(&shared));
        CHANGED.notify_all();
        Ok(shared)
    }

    /// What the volume of that URL looks like, and its size: of the open one, or as it is in the bucket. Blocks.
    ///
    /// # Errors
    /// As [`open::describe`].
    pub(crate) fn look(
        url: &str,
        store: Arc<dyn ObjectStore>,
        prefix: &str,
        counts: Arc<Counts>,
    ) -> Result<(Description, u64)> {
        let open = all().get(url).and_then(Weak::upgrade);
        if let Some(shared) = open {
            let size = shared.volume.state().size;
            return Ok((shared.volume.description.clone(), size));
        }
        let bucket = Bucket::new(store, prefix, Some(PATIENCE)).counted(counts);
        block_on(async move {
            let description = open::describe(&bucket).await?;
            let last = open::last_checkpoint(&bucket, description.id()?).await?;
            let size = last.map_or(description.size, |last| last.size);
            Ok((description, size))
        })
    }
}

/// A panic ends the volume, and nothing else.
pub(crate) async fn guarded(volume: Arc<Volume>) {
    if AssertUnwindSafe(keep(volume.clone())).catch_unwind().await.is_err() {
        volume.die(
            Kind::Internal,
            "what keeps the volume has panicked: nothing is served until it is opened anew",
        );
    }
}
