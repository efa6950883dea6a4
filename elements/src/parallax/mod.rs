//! Parallax: volumes that are copy-on-write radix trees over a shared pool of blocks (docs/parallax.md).
//!
//! `format` is what is on disk, `below` how it is reached. `blocks` is the block store: extents and their owners; `space` what one owner
//! has of it. Above it is a tree store: `log` makes changes findable, `runs` keeps those that are not in a tree yet, `nodes` reads and writes
//! trees, `checkpoint` brings the log into the trees, `open` reads all that when a pool is opened, `volume` serves requests, `writes`
//! those that write, `promise` is the room for them; `tidy` brings order into a volume, `moves` keeps that apart from what guests do;
//! `examine` looks at everything, for `check`, `scrub` and `repair`. `shared` are the pools that this process has open, `parallax` and
//! `radix` the elements, `tool` what administrators do.

mod account;
mod admin;
mod below;
pub mod block_store;
mod blocks;
mod care;
mod check;
mod checkpoint;
mod copies;
mod count;
mod diff;
mod examine;
mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod history;
pub mod isolation;
mod items;
mod lease;
mod log;
mod lost;
mod maps;
mod merge;
mod moves;
mod nodes;
mod open;
#[allow(clippy::module_inception, reason = "elements are named as their types")]
pub mod parallax;
mod pool;
mod promise;
pub mod radix;
mod repair;
mod runs;
mod schedule;
mod scrub;
mod settings;
mod shared;
mod space;
mod streams;
#[cfg(test)]
mod tests;
mod tidy;
pub mod tool;
mod volume;
mod writes;

pub use parallax::Snapshots;
pub use volume::CHANGED_SINCE;
