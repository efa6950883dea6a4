//! The stores that the tests of a disk in a bucket run against: an S3 server in memory that fails as it is told, and
//! Ceph's, which is somebody else's reading of the same interface.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests panic")]

mod capture;
mod faults;
mod operation;
mod rgw;
mod s3;
mod server;
mod store;
mod wire;

pub use faults::{Action, Hold, Rule};
pub use operation::Operation;
pub use rgw::Rgw;
pub use server::Server;
pub use store::{Object, Settings, Store};
pub use wire::Entry;

use std::time::{Duration, Instant};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks until the answer is yes; panics with `what` when that takes too long.
#[allow(clippy::disallowed_methods, reason = "servers of a test run in real time, beside its thread")]
pub fn until(what: &str, mut yes: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !yes() {
        assert!(begun.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
