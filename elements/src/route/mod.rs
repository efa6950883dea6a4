//! What decides where requests go, and what watches them.

pub mod linear;
pub mod readonly;
pub mod slice;
pub mod stripe;

#[cfg(test)]
mod testing;
