//! Block Mason's framework: requests, elements, the graph language and the scheduler.
//!
//! This crate knows no element by name; `blockmason-elements` is the library of them.

// The macros of `lang` name this crate by its path, also when they are used inside it.
extern crate self as blockmason;

pub mod data;
pub mod describe;
pub mod element;
pub mod error;
pub mod events;
pub mod geometry;
pub mod graph;
pub mod heads;
pub mod io;
pub mod lang;
pub mod live;
pub mod luggage;
pub mod request;
pub mod rt;
pub mod sched;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use data::{Data, PoolBuf, Segment};
pub use element::{Children, Demand, Element, Flow, LocalBoxFuture, Open, Prepared};
pub use error::{Errno, Error, Kind, Result};
pub use geometry::{Geometry, Ops};
pub use graph::{Connection, Graph, Instance};
pub use live::Live;
pub use luggage::Luggage;
pub use request::{Answer, Class, Extent, ExtentState, Extra, Flags, Op, Origin, Reply, Request};
pub use sched::{Cx, Disk, Host, Shard, Until};
