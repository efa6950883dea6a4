//! Disks in buckets of object stores: docs/decisions/0010-cloud.md, docs/formats/bucket.md.

mod backup;
pub(crate) mod claims;
pub(crate) mod client;
pub(crate) mod counts;
pub(crate) mod credentials;
mod format;
mod found;
mod grow;
pub(crate) mod holds;
mod keeper;
mod key;
pub mod ledger;
mod map;
pub(crate) mod metered;
pub(crate) mod open;
mod pieces;
pub(crate) mod price;
pub(crate) mod shared;
pub(crate) mod store;
pub mod tool;
pub(crate) mod volume;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
