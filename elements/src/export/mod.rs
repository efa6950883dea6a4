//! Where requests enter.

pub mod nbd;
mod socket;
#[cfg(feature = "vhost")]
pub mod vhost_user_blk;
