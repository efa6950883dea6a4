//! What changes data or addresses on the way, or keeps some back.

pub mod blocksize;
pub mod cache;
pub mod checksum;
#[cfg(feature = "compress")]
pub mod compress;
pub mod cow;
#[cfg(feature = "crypto")]
pub mod crypto;
mod label;
mod own;
mod power;
mod slots;
pub mod wal;
