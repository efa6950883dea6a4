//! The element library of Block Mason: one file for each element, one visible table of them all.

mod advice;
#[cfg_attr(not(feature = "s3"), expect(dead_code, reason = "months are for what is paid by the month"))]
mod calendar;
#[cfg(feature = "s3")]
pub mod cloud;
mod compression;
pub mod export;
pub mod fault;
pub mod migrate;
pub mod nbd;
pub mod parallax;
pub mod route;
pub mod services;
pub mod sink;
pub mod transform;
#[cfg(feature = "vhost")]
pub mod vhost;
pub mod workload;

pub use advice::advice;

use blockmason::describe::ElementType;

/// Every type of element, in the order of the reference.
pub static ALL: &[&ElementType] = &[
    &export::nbd::TYPE,
    #[cfg(feature = "vhost")]
    &export::vhost_user_blk::TYPE,
    &migrate::copy::TYPE,
    &route::debug_log::TYPE,
    &route::filter::TYPE,
    &route::r#if::TYPE,
    &route::linear::TYPE,
    &migrate::log_dirty::TYPE,
    #[cfg(feature = "s3")]
    &route::meter::TYPE,
    &route::notify::TYPE,
    &route::on_error::TYPE,
    &route::prioritise::TYPE,
    &route::probe::TYPE,
    &route::readonly::TYPE,
    &route::slice::TYPE,
    &route::stripe::TYPE,
    &route::tee::TYPE,
    &route::throttle::TYPE,
    &route::workload_log::TYPE,
    &sink::file::TYPE,
    &sink::mem::TYPE,
    &sink::nbd_client::TYPE,
    &sink::null::TYPE,
    #[cfg(feature = "s3")]
    &sink::s3::TYPE,
    &sink::volatile::TYPE,
    &transform::blocksize::TYPE,
    &transform::cache::TYPE,
    &transform::checksum::TYPE,
    #[cfg(feature = "compress")]
    &transform::compress::TYPE,
    &transform::cow::TYPE,
    #[cfg(feature = "crypto")]
    &transform::crypto::TYPE,
    &transform::wal::TYPE,
    &parallax::block_store::TYPE,
    &parallax::isolation::TYPE,
    &parallax::parallax::TYPE,
    &parallax::radix::TYPE,
    &fault::delay::TYPE,
    &fault::error::TYPE,
    &fault::flip::TYPE,
    &fault::log_writes::TYPE,
];
