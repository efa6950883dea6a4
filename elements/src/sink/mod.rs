//! Where requests end.

pub mod file;
pub mod mem;
pub mod null;
pub mod volatile;
