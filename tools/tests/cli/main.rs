//! Tests that run the real `mason`, as its users do.

#![allow(clippy::unwrap_used, reason = "tests panic")]

mod bench;
mod check;
mod control;
mod elements;
mod harness;
mod refused;
mod run;
mod show;
