//! Disks in buckets of object stores: docs/decisions/0010-cloud.md, docs/formats/bucket.md.

mod counts;
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
