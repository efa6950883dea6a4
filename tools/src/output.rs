//! Writing results to stdout.

use crate::failure::{Failure, Outcome};
use serde::Serialize;
use std::io::{ErrorKind, Write};

/// Writes text to stdout. A reader that has seen enough (`| head`) is no failure.
pub(crate) fn text(text: &str) -> Outcome {
    open_text(text).map(drop)
}

/// Writes text to stdout. False if nobody reads it any more.
pub(crate) fn open_text(text: &str) -> Outcome<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::new(format!("stdout cannot be written: {error}"))),
    }
}

/// Writes a value as JSON, over several lines.
pub(crate) fn json(value: &impl Serialize) -> Outcome {
    let drawn = serde_json::to_string_pretty(value).map_err(Failure::new)?;
    text(&(drawn + "\n"))
}

/// A text of several lines from elsewhere, as it may be sent to a terminal.
pub(crate) fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// A text from elsewhere, a graph file or a daemon, as it may be sent to a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
