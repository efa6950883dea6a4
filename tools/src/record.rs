//! What a later process must know: JSON in a file, with the version of its form.

use crate::control::refusal::Refusal;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// The longest that is read, in bytes: a graph file has at most 16 MiB, as JSON a little more, and a record may have two.
const LONGEST: u64 = 64 << 20;

/// Of a record that may be of any version.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Reads one; None if there is none. `bad` makes a refusal of what is wrong with it: `is damaged`.
///
/// # Errors
/// It cannot be read, is too large, is no record, or of another version.
pub(crate) fn read<T: DeserializeOwned>(
    path: &Path,
    version: u32,
    bad: impl Fn(&dyn Display) -> Refusal,
) -> Result<Option<T>, Refusal> {
    let unread = |error| bad(&format!("cannot be read: {error}"));
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(unread)?,
    };
    let mut bytes = Vec::new();
    // One byte more than allowed, so that a longer file is noticed.
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(unread)?;
    if bytes.len() as u64 > LONGEST {
        return Err(bad(&"is too large to be one"));
    }
    let damaged = |error| bad(&format!("is damaged: {error}"));
    // First: of another version the rest means nothing.
    let found = serde_json::from_slice::<Version>(&bytes).map_err(damaged)?.version;
    if found != version {
        return Err(bad(&format!("has version {found}, not {version}")));
    }
    serde_json::from_slice(&bytes).map(Some).map_err(damaged)
}

/// Writes one, durably.
///
/// # Errors
/// It cannot be written; what was there before is.
pub(crate) fn write(path: &Path, record: &impl Serialize) -> std::io::Result<()> {
    blockmason::io::replace_file(path, &serde_json::to_vec(record)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Record {
        version: u32,
        name: String,
    }

    #[test]
    fn what_is_written_reads_back_and_nothing_else_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        let bad = |what: &dyn Display| Refusal::invalid(format!("it {what}"));
        let read = || read::<Record>(&path, 2, bad).map_err(|refusal| refusal.message);
        assert_eq!(read(), Ok(None));
        let record = Record { version: 2, name: "x".to_owned() };
        write(&path, &record).unwrap();
        assert_eq!(read(), Ok(Some(record)));
        for (text, says) in [
            ("{\"version\": 3, \"other\": 1}", "it has version 3, not 2"),
            ("{\"version\": 2}", "it is damaged: missing field `name`"),
            ("", "it is damaged: EOF"),
        ] {
            std::fs::write(&path, text).unwrap();
            let said = read().unwrap_err();
            assert!(said.starts_with(says), "{said}");
        }
        std::fs::File::create(&path).unwrap().set_len(LONGEST + 1).unwrap();
        assert_eq!(read().unwrap_err(), "it is too large to be one");
    }
}
