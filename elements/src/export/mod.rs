//! Where requests enter.

pub mod clients;
pub mod nbd;
pub mod socket;
#[cfg(feature = "vhost")]
pub mod vhost_user_blk;
