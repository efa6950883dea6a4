//! Where requests enter.

pub mod nbd;
