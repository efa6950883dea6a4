//! What changes data or addresses on the way, or keeps some back.

pub mod blocksize;
pub mod cache;
pub mod cow;
#[cfg(feature = "crypto")]
pub mod crypto;
mod power;
pub mod wal;
