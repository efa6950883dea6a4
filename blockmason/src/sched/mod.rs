//! The scheduler: what moves requests between elements, and the threads they move on.
//!
//! A request belongs to one shard, an OS thread, from entering to leaving. A stream of requests (a
//! connection, a queue) is served by [`serve`], which keeps one block of parked flows for each epoch
//! of its disk: a new graph takes new requests while the old one finishes its own.

mod background;
mod bell;
mod budget;
mod coalesce;
mod cx;
mod depends;
mod detach;
mod disk;
mod fit;
mod flows;
mod handover;
mod home;
mod host;
#[cfg(test)]
mod models;
mod order;
mod ranges;
mod recorder;
mod scatter;
mod serve;
mod shard;
mod sockets;
mod sync;
#[cfg(test)]
mod tests;
mod trace;
mod woken;

pub use budget::{Budget, Permit};
pub use coalesce::Coalesced;
pub use cx::Cx;
pub(crate) use cx::Lane;
pub use depends::{Ties, Until};
pub use detach::Detached;
pub use disk::{Disk, InFlight, Slot};
pub use handover::{CalledOff, Change, Changed, Commit, Entering, Leaving, Setting, way};
pub(crate) use handover::{contained, knows_disk};
pub use host::{Host, HostConfig};
pub use order::Held;
pub(crate) use order::Order;
pub use ranges::{Claim, Holder, Mode, RangeGuard, RangeLock, Waiting};
pub use recorder::{Hop, LONGEST_ERROR, Way};
pub use scatter::Part;
pub use serve::{Admit, Served, Stream, serve};
pub use shard::Shard;
pub use sockets::Sockets;
pub(crate) use trace::Traced;
pub use trace::{EVERY, Trace, Tracer};
