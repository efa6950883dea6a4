//! What a graph leaves behind while it runs differently from its file, so that the next start knows.
//!
//! One file for each graph file below STATE/left, written before a change takes effect: whatever ends the
//! process, the next start serves what ran or says how it differs, never silently the old graph.

use crate::control::refusal::Refusal;
use crate::graphs::{CATALOGUE, GraphFile};
use crate::record;
use blockmason::io::remove_file;
use blockmason::lang::{Defines, Diagnostics, NoFiles, Spec, parse_checked, print};
use blockmason::live::{Diff, Heads};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The newest form of the record.
const VERSION: u32 = 1;

/// What to serve where a graph was left different from its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The file, with a warning, unless layout or sinks differ: then neither.
    #[default]
    Ask,
    /// The file.
    File,
    /// What was left.
    Left,
}

/// Which of the two is meant, on a command line.
#[derive(clap::Args)]
pub(crate) struct LeftArgs {
    /// Serves a graph that was changed while it ran and not saved as it ran
    #[arg(long, conflicts_with = "as_file")]
    as_left: bool,

    /// Serves a graph that was changed while it ran and not saved as its file says
    #[arg(long)]
    as_file: bool,

    /// Serves volumes even if their heads name another layout; the heads stay as they are
    #[arg(long)]
    pub(crate) force: bool,
}

impl LeftArgs {
    pub(crate) fn choice(&self) -> Choice {
        match (self.as_left, self.as_file) {
            (true, _) => Choice::Left,
            (_, true) => Choice::File,
            _ => Choice::Ask,
        }
    }

    pub(crate) fn heads(&self) -> Heads {
        if self.force { Heads::Ignore } else { Heads::Verify }
    }

    /// As the control socket takes it.
    pub(crate) fn word(&self) -> Option<&'static str> {
        match self.choice() {
            Choice::Ask => None,
            Choice::File => Some("file"),
            Choice::Left => Some("left"),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    /// The graph file, absolute.
    file: PathBuf,
    /// The graph as it ran, as a graph file; paths in it are absolute.
    graph: String,
}

/// The record of one graph file.
pub(crate) struct Left {
    file: PathBuf,
    record: PathBuf,
}

impl Left {
    /// The record of a graph file, by its absolute path.
    pub(crate) fn of(state: &Path, file: &Path) -> Left {
        let record = state.join("left").join(format!("{}.json", key(file)));
        Left { file: file.to_owned(), record }
    }

    /// Remembers, durably, that `running` serves instead of what the file says.
    pub(crate) fn remember(&self, running: &Spec) -> std::io::Result<()> {
        let graph = print(running, CATALOGUE, Path::new("/"));
        let record = Record { version: VERSION, file: self.file.clone(), graph };
        record::write(&self.record, &record)
    }

    /// The file says what serves.
    pub(crate) fn forget(&self) -> std::io::Result<()> {
        remove_file(&self.record)
    }

    /// What was left, if anything was.
    fn read(&self) -> Result<Option<Spec>, Refusal> {
        let bad = |what: &dyn std::fmt::Display| {
            let help = "`--as-file` serves the graph file and forgets it";
            Refusal::invalid(format!(
                "{}: what was left of the running graph {what}; {help}",
                self.record.display()
            ))
        };
        let Some(record) = record::read::<Record>(&self.record, VERSION, bad)? else { return Ok(None) };
        if record.file != self.file {
            return Err(bad(&format!("is that of {}", record.file.display())));
        }
        let name = PathBuf::from(format!("{} (as it was left)", self.file.display()));
        let parsed = parse_printed(&name, &self.file, record.graph);
        parsed
            .map(Some)
            .map_err(|diagnostics| bad(&format!("is no good graph: {}", diagnostics.first_line())))
    }

    /// Changes what was left, if anything was.
    pub(crate) fn revise(&self, next: impl FnOnce(&Spec) -> Result<Spec, Refusal>) -> Result<(), Refusal> {
        let Some(left) = self.read()? else { return Ok(()) };
        self.remember(&next(&left)?).map_err(|error| {
            Refusal::new("unavailable", format!("{}: it cannot be written: {error}", self.record.display()))
        })
    }

    /// What is to be served: `file`, or what was left.
    ///
    /// # Errors
    /// They differ in what decides where data is, and nobody has said which one is meant.
    pub(crate) fn choose(&self, file: GraphFile, choice: Choice) -> Result<GraphFile, Refusal> {
        let left = match choice {
            Choice::File => None,
            Choice::Ask | Choice::Left => self.read()?,
        };
        let shown = file.path.display();
        let Some(left) = left else {
            if choice == Choice::Left {
                tracing::warn!("{shown}: nothing was left of it: it is served as its file says");
            }
            return Ok(file);
        };
        let diff = Diff::between(&file.spec, &left, CATALOGUE);
        if choice == Choice::Left {
            return Ok(file.with(left));
        }
        if diff.layout {
            return Err(Refusal::busy(format!(
                "{shown}: the graph was changed while it ran and not saved, and its layout or sinks differ:\n\
                 {}`--as-left` serves it as it ran, `--as-file` as the file says",
                diff.changes()
            )));
        }
        if diff.is_empty() {
            // Else it would speak against a file that is changed later.
            if let Err(error) = self.forget() {
                tracing::warn!("what the graph left behind cannot be forgotten: {error}");
            }
        } else {
            tracing::warn!(
                "{shown}: the graph was changed while it ran and not saved; the file is served, and `--as-left` \
                 would serve it as it ran: {}",
                diff.changes().trim_end().replace('\n', "; ")
            );
        }
        Ok(file)
    }
}

/// A graph that was printed with absolute paths. Messages call it `name`; it was that of the graph file `file`.
pub(crate) fn parse_printed(name: &Path, file: &Path, text: String) -> Result<Spec, Diagnostics> {
    let opened = Path::new("/").join(file.file_name().unwrap_or_default());
    parse_checked(&NoFiles, name, opened, text, &Defines::new(), CATALOGUE)
}

/// What state of a graph file is kept under: by its path, since names may be the same.
pub(crate) fn key(file: &Path) -> String {
    let short: String = crate::graphs::name_of(file).chars().take(40).collect();
    format!("{short}-{:016x}", fingerprint(file.as_os_str().as_encoded_bytes()))
}

/// FNV-1a, 64 bits: no defence against anybody. Of a name, the record says whose it is.
pub(crate) fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}
