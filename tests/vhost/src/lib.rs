//! A vhost-user-blk guest without a guest: memory, split rings and requests, for measuring an export and for
//! seeing what it does with rings and messages, good and bad.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "tests panic")]

pub mod blk;
pub mod device;
pub mod inflight;
pub mod load;
pub mod measure;
pub mod memory;
pub mod model;
pub mod raw;
pub mod ring;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The clock, for what another process does: that runs in real time.
#[allow(clippy::disallowed_methods, reason = "another process does not follow a stopped clock")]
pub fn now() -> Instant {
    Instant::now()
}

/// Waits until an eventfd is written to, and takes what was written. Returns false when nothing was in time.
/// (Reading alone would not wait: qemu-storage-daemon makes the descriptors that it is sent non-blocking, and so
/// the sender's.)
pub fn wait_for(event: &impl AsRawFd, patience: Option<Duration>) -> bool {
    // SAFETY: the descriptor stays open while its owner is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let patience = patience.map(|time| Timespec::try_from(time).unwrap());
    let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], patience.as_ref()).unwrap();
    if ready > 0 {
        // Only this side reads, so there is something.
        rustix::io::read(fd, &mut [0; 8]).unwrap();
    }
    ready > 0
}
