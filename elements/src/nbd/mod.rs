//! The NBD protocol: its wire format, both sides of its handshake, and its URIs.
//!
//! Pure protocol, shared by the NBD export and the NBD client. It knows nothing of graphs; the
//! transmission phase belongs to those two, who build and take apart its messages with [`wire`] and
//! [`meta`].
//!
//! Written from `doc/proto.md` and `doc/uri.md` of <https://github.com/NetworkBlockDevice/nbd> at
//! commit `89ba7b5379548d6ebbfa36db15f2b8e3787a09ea` (master, 2026-05-02), and, for extended headers,
//! from `doc/proto.md` of the branch `extension-ext-header` at commit
//! `e6f3b94a9345cd36d36774694ab298e25003afe6`.
//!
//! Everything that arrives is bounded before it is believed: no allocation follows from a length on
//! the wire, and no input panics.

// A test may unwrap: what it unwraps is its own.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub(crate) mod attend;
pub mod client;
pub mod handshake;
#[cfg(test)]
mod interop;
pub mod link;
pub mod listen;
pub mod meta;
pub mod serve;
pub mod server;
pub mod stream;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(all(test, feature = "tls"))]
mod tls_tests;
pub mod uri;
pub mod wire;
