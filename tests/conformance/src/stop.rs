//! How a test ends early: it cannot run here, the server broke a rule, or the server went away.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

/// Why a test stopped before its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The server does not offer what the test needs.
    Skip(String),
    /// The server broke a rule.
    Fail(String),
    /// The server closed the connection; the text says during what.
    Closed(String),
    /// The server did not answer before the deadline; the text says to what.
    Silent(String),
}

/// The result of a test or of one of its steps.
pub(crate) type Check<T = ()> = Result<T, Stop>;

/// The most notes a test keeps; a server that breaks SHOULDs in more ways is known well enough.
const NOTES_MAX: usize = 32;

/// Notes on broken SHOULDs, shared by a test and its sessions. A set, because one habit of a server shows in
/// many replies.
#[derive(Debug, Clone, Default)]
pub(crate) struct Notes(Rc<RefCell<BTreeSet<String>>>);

impl Notes {
    /// Adds a note.
    pub(crate) fn add(&self, text: impl Into<String>) {
        let mut notes = self.0.borrow_mut();
        if notes.len() < NOTES_MAX {
            notes.insert(text.into());
        }
    }

    /// Takes all notes out.
    pub(crate) fn take(&self) -> Vec<String> {
        self.0.take().into_iter().collect()
    }
}

/// Ends the test with a broken rule.
pub(crate) fn fail<T>(text: impl Into<String>) -> Check<T> {
    Err(Stop::Fail(text.into()))
}

/// Ends the test because its precondition is missing.
pub(crate) fn skip<T>(text: impl Into<String>) -> Check<T> {
    Err(Stop::Skip(text.into()))
}

/// Fails with `text` unless `good`.
pub(crate) fn ensure(good: bool, text: impl FnOnce() -> String) -> Check {
    if good { Ok(()) } else { fail(text()) }
}

impl std::fmt::Display for Stop {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Skip(text) | Stop::Fail(text) => out.write_str(text),
            Stop::Closed(what) => write!(out, "the server closed the connection during: {what}"),
            Stop::Silent(what) => write!(out, "no answer before the deadline to: {what}"),
        }
    }
}
