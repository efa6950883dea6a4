//! Where requests end.

pub mod file;
pub mod mem;
pub mod nbd_client;
pub mod null;
#[cfg(feature = "s3")]
pub mod s3;
pub mod volatile;

use blockmason::{Answer, Cx, Error, Flow, Request};
use std::sync::atomic::{AtomicU64, Ordering};

/// Answers a control request to a sink. All that it knows is `incarnation`: a text that changes whenever
/// the sink may have forgotten what was written and not flushed.
fn control<'a>(req: &Request, cx: Cx<'a>, incarnation: impl FnOnce() -> Option<String>) -> Flow<'a> {
    let verb = req.extra.as_ref().and_then(|extra| extra.control.as_ref()).map(|(verb, _)| verb.as_str());
    let known = if verb == Some("incarnation") { incarnation() } else { None };
    match known {
        Some(text) => Flow::Now(Ok(Answer::Text(text))),
        None => cx.fail(req, Error::unsupported("there is nothing of that kind to control here")),
    }
}

/// Why a disk in memory stays where it is.
fn only_here() -> Error {
    Error::unsupported(
        "its contents are in this process's memory and would be lost; `mason replace` puts a file in its place",
    )
}

/// Names a disk in memory apart from all others of this process, which its contents do not outlive.
fn unique(what: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    format!("{what} {}", NEXT.fetch_add(1, Ordering::Relaxed))
}
