//! The control socket: HTTP with JSON, for this user and root alone. docs/openapi.json describes it.
//!
//! `daemon` is what is served, `server` carries requests to it, `routes` answers them, one file for
//! each subject; `client` asks, `find` says whom. Both ends share `refusal`, and the views.

pub(crate) mod backing;
mod change;
pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod find;
pub(crate) mod graph_file;
mod metrics;
pub(crate) mod moving;
mod patient;
pub(crate) mod refusal;
pub(crate) mod routes;
pub(crate) mod server;
pub(crate) mod trial;
