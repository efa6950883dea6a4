//! Disks in buckets of object stores: docs/decisions/0010-cloud.md, docs/formats/bucket.md.

mod client;
mod counts;
mod credentials;
mod format;
mod keeper;
mod map;
mod open;
mod pieces;
mod price;
pub mod s3;
mod shared;
mod store;
pub mod tool;
mod volume;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
