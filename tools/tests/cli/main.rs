//! Tests that run the real `mason`, as its users do.

#![allow(clippy::unwrap_used, reason = "tests panic")]
#![allow(clippy::disallowed_methods, reason = "the program under test lives by the real clock")]

mod bench;
#[cfg(feature = "s3")]
mod bill;
mod changes;
mod check;
mod control;
mod drain;
mod elements;
mod events;
mod guest;
mod handlers;
mod handover;
mod harness;
mod heads;
mod images;
mod live;
mod load;
mod metrics;
mod moving;
mod pools;
mod receivers;
mod refused;
mod replay;
mod run;
mod show;
mod streams;
mod tidy;
#[cfg(feature = "tui")]
mod top;
mod trace;
