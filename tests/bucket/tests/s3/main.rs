//! What the servers do, seen by Amazon's own client.
#![allow(clippy::unwrap_used, reason = "tests panic")]

mod client;
mod conformance;
mod faults;
mod program;
