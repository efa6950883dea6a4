//! That a graph with an export on standby was activated, so that the next start serves it at once: a guest waits for it.
//! Forgotten when the graph is unloaded.

use crate::left::key;
use crate::record;
use blockmason::io::remove_file;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The record of one graph file: that it exists is all it says; what it holds is for people.
pub(crate) struct Active(PathBuf);

#[derive(Serialize)]
struct Record<'a> {
    version: u32,
    /// The graph file, absolute.
    file: &'a Path,
}

impl Active {
    /// That of a graph file, by its absolute path.
    pub(crate) fn of(state: &Path, file: &Path) -> Active {
        Active(state.join("active").join(format!("{}.json", key(file))))
    }

    /// Where it cannot be seen, the graph stands by, which can be mended; serving what another host serves cannot.
    pub(crate) fn is_set(&self) -> bool {
        self.0.exists()
    }

    /// Remembers it, durably.
    pub(crate) fn remember(&self, file: &Path) -> std::io::Result<()> {
        record::write(&self.0, &Record { version: 1, file })
    }

    pub(crate) fn forget(&self) -> std::io::Result<()> {
        remove_file(&self.0)
    }
}
