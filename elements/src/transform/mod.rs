//! What changes data or addresses on the way.

pub mod cow;
