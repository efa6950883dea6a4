//! The vhost-user protocol and virtio's block device, seen from the device. docs/decisions/0007-vhost-user.md
//! says why it is written here, and on what.
//!
//! ```text
//! socket ─▶ wire ─▶ session ─▶ queue ─▶ graph       session: one for each front-end, beside the shards
//!                      │         │                   queue:   one for each virtqueue, on a shard
//!                      ▼         ▼
//!                   memory     port ─▶ ring, inflight, log    (memory that the front-end shares)
//! ```

mod attend;
mod blk;
mod chain;
pub(crate) mod device;
pub(crate) mod export;
mod fault;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod inflight;
mod log;
mod memory;
mod polling;
mod port;
mod queue;
mod ring;
mod session;
mod socket;
#[cfg(test)]
mod testing;
pub mod wire;
