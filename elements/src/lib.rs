//! The element library: one visible table of types.

pub mod nbd;
