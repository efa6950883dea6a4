//! The graph file as it was read or written last: who writes it anew must not overwrite what somebody else has written
//! there.

use super::daemon::Served;
use super::refusal::Refusal;
use crate::left::fingerprint;
use blockmason::io::Replacement;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What a file says, told apart from anything else that it may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sum {
    length: u64,
    hash: u64,
}

impl Sum {
    pub(crate) fn of(text: &[u8]) -> Sum {
        Sum { length: text.len() as u64, hash: fingerprint(text) }
    }

    /// Of what a file says now; None if there is none, or it is no file: a pipe is read once.
    pub(crate) fn read(path: &Path) -> Option<Sum> {
        if !path.is_file() {
            return None;
        }
        std::fs::read(path).ok().map(|text| Sum::of(&text))
    }
}

/// Why a graph file cannot be written anew, if `known` is what it is known to say.
pub(super) fn is_edited(path: &Path, known: Option<Sum>) -> Option<String> {
    (known.is_some() && Sum::read(path) != known)
        .then(|| format!("{}: it is not what was loaded from there any more", path.display()))
}

impl Served {
    /// Why the graph file cannot be made to say what is served, before anything is done that needs it. `force` for one
    /// that somebody has edited.
    ///
    /// # Errors
    /// It was edited or is gone, or cannot be replaced.
    pub(super) fn file_is_ready(&self, force: bool) -> Result<(), Refusal> {
        if self.known().is_none() {
            return Ok(());
        }
        if let Some(edited) = is_edited(&self.path, self.known()).filter(|_| !force) {
            let message = format!(
                "{edited}, and would be written anew: put it back as it was, or give the move up and reload it; \
                 `mason migrate cutover --force` overwrites it"
            );
            return Err(Refusal::busy(message));
        }
        Replacement::prepare(&self.path, &[]).map(drop).map_err(|error| {
            let what = "the graph file could not be written anew, try again once that is mended";
            Refusal::new("unavailable", format!("{}: {what}: {error}", self.path.display()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edited_file_is_known_and_a_pipe_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.mason");
        std::fs::write(&path, "one").unwrap();
        let known = Sum::read(&path);
        assert_eq!((known, is_edited(&path, known)), (Some(Sum::of(b"one")), None));
        std::fs::write(&path, "two").unwrap();
        assert!(is_edited(&path, known).is_some());
        std::fs::remove_file(&path).unwrap();
        assert!(is_edited(&path, known).is_some());
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        assert!(is_edited(&path, known).is_some());
        assert_eq!(
            (Sum::read(Path::new("/dev/null")), is_edited(Path::new("/dev/null"), None)),
            (None, None)
        );
    }
}
