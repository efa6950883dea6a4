//! How a test ends early: it cannot run here, the server broke a rule, or the server went away.

use std::collections::BTreeSet;

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

/// Notes on broken SHOULDs. A set, because one habit of a server shows in many replies.
pub(crate) type Notes = std::rc::Rc<std::cell::RefCell<BTreeSet<String>>>;

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
