//! What decides where requests go, and what watches them.

pub mod debug_log;
pub mod filter;
mod gauge;
pub mod r#if;
pub mod linear;
#[cfg(feature = "s3")]
pub mod meter;
pub mod notify;
pub mod on_error;
pub mod prioritise;
pub mod probe;
pub mod readonly;
pub mod slice;
pub mod stripe;
pub mod tee;
pub mod throttle;
pub mod workload_log;

#[cfg(test)]
mod testing;
