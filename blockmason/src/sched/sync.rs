//! What threads share is made of these, so that a test can put in its place what tries every interleaving
//! (see `models`).

pub(super) use futures::task::AtomicWaker;
pub(super) use std::sync::atomic::{AtomicBool, AtomicU64};
pub(super) use std::sync::{Mutex, MutexGuard};
