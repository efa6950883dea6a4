//! A head as a file: docs/formats/head.md.

use crate::error::{Errno, Error, Result};
use crate::io::{remove_file, replace_file};
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The version of the format.
const VERSION: u64 = 1;

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
    crc32: String,
}

/// Only its version, of a file that may be of any.
#[derive(Deserialize)]
struct Version {
    #[serde(rename = "mason-head")]
    version: u64,
}

impl Head {
    fn checksum(&self) -> String {
        let mut text = format!("{VERSION}\n{}\n{}\n", self.volume, self.complete);
        for way in &self.ways {
            way.iter().for_each(|line| text.extend([line.as_str(), "\n"]));
            text.push('\n');
        }
        format!("{:08x}", crc32fast::hash(text.as_bytes()))
    }

    /// The text of the file.
    ///
    /// # Errors
    /// If the layout is too large.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let written = Written {
            version: VERSION,
            volume: self.volume.clone(),
            complete: self.complete,
            layout: self.ways.iter().cloned().collect(),
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
        if version.version != VERSION {
            let message = format!(
                "its format is version {}, this program knows {VERSION}: use the program that wrote it",
                version.version
            );
            return Err(Error::unsupported(message));
        }
        let written: Written = serde_json::from_slice(bytes)
            .map_err(|error| damaged("it is not understood").with_source(error))?;
        let digits = |text: &str, count| {
            text.len() == count && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        if !digits(&written.volume, 32) {
            return Err(damaged("the volume's name is none"));
        }
        let lines = || written.layout.iter().flatten();
        if lines().count() > MOST_LINES {
            return Err(damaged("its layout is too long"));
        }
        if lines().any(|line| line.is_empty() || line.chars().any(char::is_control)) {
            return Err(damaged("its layout is no text"));
        }
        let (count, ways) = (written.layout.len(), written.layout.into_iter().collect::<BTreeSet<_>>());
        let head = Head { volume: written.volume, complete: written.complete, ways };
        if head.checksum() != written.crc32 || head.ways.len() != count {
            return Err(damaged("the checksum does not fit"));
        }
        Ok(head)
    }
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
