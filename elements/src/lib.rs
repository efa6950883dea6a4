//! The element library of Block Mason: one file for each element, one visible table of them all.

pub mod export;
pub mod fault;
pub mod nbd;
pub mod route;
pub mod sink;
pub mod transform;

use blockmason::describe::ElementType;
use blockmason::lang::ParamError;
use blockmason::{Error, Result};

/// Every type of element, in the order of the reference.
pub static ALL: &[&ElementType] = &[
    &export::nbd::TYPE,
    &route::debug_log::TYPE,
    &route::filter::TYPE,
    &route::linear::TYPE,
    &route::probe::TYPE,
    &route::readonly::TYPE,
    &route::slice::TYPE,
    &route::stripe::TYPE,
    &sink::file::TYPE,
    &sink::mem::TYPE,
    &sink::null::TYPE,
    &sink::volatile::TYPE,
    &fault::delay::TYPE,
    &fault::error::TYPE,
    &fault::flip::TYPE,
    &fault::log_writes::TYPE,
];
pub static ALL: &[&ElementType] =
    &[&export::nbd::TYPE, &sink::file::TYPE, &sink::mem::TYPE, &sink::nbd_client::TYPE, &sink::null::TYPE];

/// Parameters that the checker has been over: what is wrong with them all the same is one sentence.
pub(crate) fn params<T>(read: Result<T, Vec<ParamError>>) -> Result<T> {
    read.map_err(|errors| {
        let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
        Error::invalid(all.join("; "))
    })
}
