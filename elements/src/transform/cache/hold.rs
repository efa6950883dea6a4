//! What the disk below knows of this cache: that it may have changes which the disk has not. A disk in a bucket remembers that, and
//! is served without this cache only if somebody says that those are lost.

use super::Cache;
use super::journal::Standing;
use super::ssd::ask_below;
use blockmason::{Cx, Error, Kind, Result, rt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How long a cache that has nothing any more waits for the disk below to hear of it: else it is one that may have something.
const LEAVING: Duration = Duration::from_secs(5);

/// Whether the disk below has been told.
#[derive(Default)]
pub(super) struct Hold {
    is_told: AtomicBool,
    /// Changes that are being kept.
    keeping: AtomicU64,
    /// One at a time tells.
    telling: tokio::sync::Mutex<()>,
}

/// A change is being kept as long as this lives.
pub(super) struct Keeping<'a>(&'a Hold);

impl Drop for Keeping<'_> {
    fn drop(&mut self) {
        self.0.keeping.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Cache {
    /// Before a change is kept the disk below knows that there may be one.
    ///
    /// Either [`let_go`](Self::let_go) sees this change, or this sees that the disk below is told anew.
    pub(super) async fn hold(&self, cx: Cx<'_>) -> Result<Keeping<'_>> {
        self.hold.keeping.fetch_add(1, Ordering::SeqCst);
        let keeping = Keeping(&self.hold);
        if self.hold.is_told.load(Ordering::SeqCst) {
            return Ok(keeping);
        }
        let _one = self.hold.telling.lock().await;
        if !self.hold.is_told.load(Ordering::SeqCst) {
            if self.ssd.is_some() {
                ask_below("hold", &format!("{} {}", self.id()?, self.place()), cx).await?;
            }
            self.hold.is_told.store(true, Ordering::SeqCst);
        }
        Ok(keeping)
    }

    /// There is nothing any more that only this cache has, as far as that is so.
    pub(super) async fn let_go(&self, cx: Cx<'_>) {
        if self.ssd.is_none() || !self.hold.is_told.load(Ordering::SeqCst) {
            return;
        }
        let _one = self.hold.telling.lock().await;
        self.hold.is_told.store(false, Ordering::SeqCst);
        let has_some = self.journal().as_ref().is_some_and(|journal| journal.is_dirty());
        if has_some || self.hold.keeping.load(Ordering::SeqCst) > 0 {
            return self.hold.is_told.store(true, Ordering::SeqCst);
        }
        if let Some(Err(error)) = rt::timeout(LEAVING, ask_below("release", "", cx)).await {
            tracing::info!("the disk below goes on taking this cache for one that may have changes: {error}");
        }
    }

    /// # Errors
    /// [`Kind::Denied`] if another cache may have changes that the disk below has not.
    pub(super) async fn is_alone(&self, cx: Cx<'_>) -> Result<()> {
        let Some(others) = ask_below("holders", &self.id()?, cx).await? else { return Ok(()) };
        match others.as_str() {
            "" => {}
            // From an earlier life.
            "own" => self.hold.is_told.store(true, Ordering::SeqCst),
            why => return Err(Error::new(Kind::Denied, why.to_owned())),
        }
        Ok(())
    }

    /// The disk below may have ended for good: then nothing that is kept will ever be there, and nothing more is taken.
    pub(super) async fn look_for_end(&self, cx: Cx<'_>) {
        let Ok(Some(why)) = ask_below("ended", "", cx).await else { return };
        if why.is_empty() || self.ended.load(Ordering::SeqCst) {
            return;
        }
        let error = Error::new(Kind::Io, format!("the disk below has ended: {why}"));
        *super::lock(&self.error) = error.to_string();
        self.ended.store(true, Ordering::SeqCst);
        cx.notice(&error);
        self.update(|journal| journal.standing = Standing::Lost(error));
    }

    fn id(&self) -> Result<String> {
        Ok(format!("{:016x}", self.ssd()?.label()?.id))
    }

    /// Where it is, for people.
    fn place(&self) -> String {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let path = self.params.path.as_ref().map_or(Path::new(""), |path| path.0.as_path());
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        format!("{}:{}", host.trim(), path.display())
    }
}
