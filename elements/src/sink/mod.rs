//! Where requests end.

pub mod file;
pub mod mem;
pub mod nbd_client;
pub mod null;
pub mod volatile;
