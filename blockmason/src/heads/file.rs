//! A head as a file: docs/formats/head.md.

use crate::error::{Errno, Error, Result};
use crate::io::{remove_file, replace_file};
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The version of the format, the one of heads without marks, and the one of heads of volumes that have never moved.
const VERSION: u64 = 3;
const UNMARKED: u64 = 2;
const NEVER_MOVED: u64 = 1;

/// Bytes of the name of the other volume of a move.
const LONGEST_PEER: usize = 4096;

/// Bytes of a head.
pub(super) const LARGEST: usize = 64 << 10;

/// Lines of all ways together.
const MOST_LINES: usize = 4096;

/// The layout elements from an export down to a volume, as lines.
pub(super) type Way = Vec<String>;

/// What a head says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The name of the volume: 32 hexadecimal digits.
    pub volume: String,
    /// False until the graph that it was written for has been handed over to.
    pub complete: bool,
    /// The ways from an export to the volume.
    pub ways: BTreeSet<Vec<String>>,
    /// How often the volume has moved: of two with one name the higher one is the newer.
    pub generation: u64,
    /// Where it stands in a move.
    pub standing: Standing,
    /// The account that is kept of its changes: whoever writes without keeping it takes this away first.
    pub account: Option<String>,
    /// The backup that it holds: whoever writes anything else takes this away first.
    pub backup: Option<Backup>,
}

/// One of the backups that are counted from each other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Backup {
    /// The name of the account of changes: 32 hexadecimal digits.
    pub account: String,
    /// Counted from 1. No two backups of an account have the same.
    pub number: u64,
}

/// Where a volume stands in a move from one store to another. The other one is named in words for people.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Standing {
    /// It is the volume.
    #[default]
    Active,
    /// It is the volume, and about to move there.
    Moving(String),
    /// It is being filled from there, and nothing yet; or it is a mirror.
    Filling(String),
    /// The volume is there now; this is what it was before.
    Moved(String),
    /// It is the volume but for what was written since into that overlay.
    Overlaid(String),
}

impl Standing {
    /// The word of the file, and the other volume.
    fn parts(&self) -> (&'static str, Option<&str>) {
        match self {
            Standing::Active => ("active", None),
            Standing::Moving(peer) => ("moving", Some(peer)),
            Standing::Filling(peer) => ("filling", Some(peer)),
            Standing::Moved(peer) => ("moved", Some(peer)),
            Standing::Overlaid(peer) => ("overlaid", Some(peer)),
        }
    }

    fn of_parts(word: &str, peer: Option<String>) -> Option<Standing> {
        match (word, peer) {
            ("active", None) => Some(Standing::Active),
            ("moving", Some(peer)) => Some(Standing::Moving(peer)),
            ("filling", Some(peer)) => Some(Standing::Filling(peer)),
            ("moved", Some(peer)) => Some(Standing::Moved(peer)),
            ("overlaid", Some(peer)) => Some(Standing::Overlaid(peer)),
            _ => None,
        }
    }
}

/// The file as it is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "mason-head")]
    version: u64,
    volume: String,
    complete: bool,
    layout: Vec<Way>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    generation: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    account: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backup: Option<Backup>,
    crc32: String,
}

/// Only its version, of a file that may be of any.
#[derive(Deserialize)]
struct Version {
    #[serde(rename = "mason-head")]
    version: u64,
}

impl Head {
    /// True if it has to say something about a move.
    fn has_moved(&self) -> bool {
        self.generation > 0 || self.standing != Standing::Active
    }

    /// True if it has to say something about backups.
    fn is_marked(&self) -> bool {
        let overlaid = matches!(self.standing, Standing::Overlaid(_));
        overlaid || self.account.is_some() || self.backup.is_some()
    }

    fn version(&self) -> u64 {
        match (self.is_marked(), self.has_moved()) {
            (true, _) => VERSION,
            (false, true) => UNMARKED,
            (false, false) => NEVER_MOVED,
        }
    }

    /// True if a volume without a head is the same.
    pub fn says_nothing(&self) -> bool {
        self.complete && self.version() == NEVER_MOVED && self.ways.iter().all(Vec::is_empty)
    }

    fn checksum(&self) -> String {
        let mut text = format!("{}\n{}\n{}\n", self.version(), self.volume, self.complete);
        for way in &self.ways {
            way.iter().for_each(|line| text.extend([line.as_str(), "\n"]));
            text.push('\n');
        }
        if self.version() > NEVER_MOVED {
            let (state, peer) = self.standing.parts();
            text += &format!("{}\n{state}\n{}\n", self.generation, peer.unwrap_or_default());
        }
        if self.version() > UNMARKED {
            let backup = self.backup.as_ref().map(|it| format!("{} {}", it.account, it.number));
            let account = self.account.as_deref().unwrap_or_default();
            text += &format!("{account}\n{}\n", backup.unwrap_or_default());
        }
        format!("{:08x}", crc32fast::hash(text.as_bytes()))
    }

    /// The text of the file.
    ///
    /// # Errors
    /// If the layout is too large.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let (state, peer) = self.standing.parts();
        let moved = self.version() > NEVER_MOVED;
        let written = Written {
            version: self.version(),
            volume: self.volume.clone(),
            complete: self.complete,
            layout: self.ways.iter().cloned().collect(),
            generation: moved.then_some(self.generation),
            state: moved.then(|| state.to_owned()),
            peer: peer.map(str::to_owned),
            account: self.account.clone(),
            backup: self.backup.clone(),
            crc32: self.checksum(),
        };
        let mut bytes = serde_json::to_vec_pretty(&written)
            .map_err(|error| Error::internal("a head cannot be written as JSON").with_source(error))?;
        bytes.push(b'\n');
        let lines: usize = self.ways.iter().map(Vec::len).sum();
        if bytes.len() > LARGEST || lines > MOST_LINES {
            return Err(too_large());
        }
        Ok(bytes)
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// One sentence about what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Head> {
        let damaged = |what: &str| Error::invalid(format!("it is no sound head: {what}"));
        if bytes.len() > LARGEST {
            return Err(damaged("it has more than 64 KiB"));
        }
        let version: Version = serde_json::from_slice(bytes)
            .map_err(|error| damaged("it is not understood").with_source(error))?;
        if !(NEVER_MOVED..=VERSION).contains(&version.version) {
            let message = format!(
                "its format is version {}, this program knows {VERSION}: use the program that wrote it",
                version.version
            );
            return Err(Error::unsupported(message));
        }
        let written: Written = serde_json::from_slice(bytes)
            .map_err(|error| damaged("it is not understood").with_source(error))?;
        if !is_name(&written.volume) {
            return Err(damaged("the volume's name is none"));
        }
        let mut accounts = written.account.iter().chain(written.backup.iter().map(|backup| &backup.account));
        if !accounts.all(|account| is_name(account)) {
            return Err(damaged("the account's name is none"));
        }
        let lines = || written.layout.iter().flatten();
        if lines().count() > MOST_LINES {
            return Err(damaged("its layout is too long"));
        }
        if lines().any(|line| line.is_empty() || line.chars().any(char::is_control)) {
            return Err(damaged("its layout is no text"));
        }
        let (count, ways) = (written.layout.len(), written.layout.into_iter().collect::<BTreeSet<_>>());
        if written.peer.as_ref().is_some_and(|peer| {
            peer.is_empty() || peer.len() > LONGEST_PEER || peer.chars().any(char::is_control)
        }) {
            return Err(damaged("the other volume's name is none"));
        }
        let standing = match (written.state, written.peer) {
            (None, None) => Some(Standing::Active),
            (None, Some(_)) => None,
            (Some(state), peer) => Standing::of_parts(&state, peer),
        };
        let head = Head {
            volume: written.volume,
            complete: written.complete,
            ways,
            generation: written.generation.unwrap_or(0),
            standing: standing.ok_or_else(|| damaged("its state is unknown"))?,
            account: written.account,
            backup: written.backup,
        };
        let fits = head.version() == written.version && head.ways.len() == count;
        if !fits || head.checksum() != written.crc32 {
            return Err(damaged("the checksum does not fit"));
        }
        Ok(head)
    }
}

/// True for the name of a volume or of an account.
pub(super) fn is_name(text: &str) -> bool {
    text.len() == super::NAME && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The layout needs more lines or bytes than a head may have.
pub(super) fn too_large() -> Error {
    Error::unsupported("its layout is too large for a head: too many elements, parts or ways above it")
}

/// Reads a head; None if there is none.
pub(super) fn read(path: &Path) -> Result<Option<Head>> {
    let refused = |errno| Error::os(errno, "the head cannot be read").with_path(path);
    // A pipe in its place must not hold up the start.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        // Where no file can be there is none; whether one can be written shows when it has to.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => return Ok(None),
        opened => opened.map_err(refused)?,
    };
    let stat = rustix::fs::fstat(&file).map_err(refused)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::invalid("it is no head, but no regular file").with_path(path));
    }
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a longer file is noticed.
    File::from(file)
        .take(LARGEST as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(error, "the head cannot be read").with_path(path))?;
    Head::decode(&bytes).map(Some).map_err(|error| error.with_path(path))
}

/// Writes a head, durably: when this returns it is there whole, and when it fails what was there before
/// is.
pub(super) fn write(path: &Path, head: &Head) -> Result<()> {
    let bytes = head.encode().map_err(|error| error.with_path(path))?;
    replace_file(path, &bytes).map_err(|error| Error::io(error, "the head cannot be written").with_path(path))
}

/// Removes a head, durably; one that is gone already is no failure.
pub(super) fn remove(path: &Path) -> Result<()> {
    remove_file(path).map_err(|error| Error::io(error, "the head cannot be removed").with_path(path))
}
