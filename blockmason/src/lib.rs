//! Block Mason's framework: requests, elements, the graph language and the scheduler.
//!
//! This crate knows no element by name; `blockmason-elements` is the library of them.

// The macros of `lang` name this crate by its path, also when they are used inside it.
extern crate self as blockmason;

pub mod describe;
pub mod element;
pub mod error;
pub mod lang;

pub use element::Element;
pub use error::{Errno, Error, Kind, Result};
