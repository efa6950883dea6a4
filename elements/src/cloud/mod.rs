//! Disks in buckets of object stores: docs/decisions/0010-cloud.md, docs/formats/bucket.md.

#[cfg(feature = "s3")]
mod client;
mod counts;
#[cfg(feature = "s3")]
mod credentials;
mod format;
mod keeper;
mod map;
mod open;
mod pieces;
mod store;
mod volume;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
