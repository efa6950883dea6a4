//! The control socket: HTTP with JSON, for this user and root alone.

pub(crate) mod client;
pub(crate) mod server;

/// The path that answers with a [`Status`](crate::view::Status).
const STATUS: &str = "/v1/status";
