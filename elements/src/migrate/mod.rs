//! What moves a disk that is in use to another place: what differs there, and who copies it.

pub mod copy;
pub mod log_dirty;
pub mod map;
