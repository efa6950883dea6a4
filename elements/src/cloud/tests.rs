//! Stories of volumes in a store that fails: random ones against a model, and each race by itself.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests panic, and have one runtime for all"
)]

mod backups;
mod grows;
mod opens;
mod races;
mod stories;

use super::format::Claim;
use super::keeper;
use super::open;
use super::store::Bucket;
use super::testing::Memory;
use super::volume::{Opening, Volume};
use blockmason::{Data, Op, Origin, Request, Result};
use std::sync::Arc;
use std::time::Duration;

/// A disk that is no multiple of its blocks.
const BLOCK: u64 = 4096;
const SIZE: u64 = 12 * BLOCK + 100;

fn bucket(memory: &Memory) -> Bucket {
    Bucket::new(Arc::new(memory.clone()), "some/disk/", Some(Duration::from_secs(3600)))
}

fn opening(machine: &str) -> Opening {
    let claim = Claim { machine: machine.to_owned(), host: machine.to_owned(), ..Claim::default() };
    Opening { claim, memory: 1 << 30, idle: Duration::from_secs(10), take: false, patience: None }
}

async fn create(memory: &Memory) {
    open::create(&bucket(memory), SIZE, BLOCK, true).await.unwrap();
}

/// Opens the volume, and keeps it until the runtime goes.
async fn open(memory: &Memory, opening: Opening) -> Result<Arc<Volume>> {
    let volume = open::open(bucket(memory), opening, Arc::new(|_: &str| {})).await?;
    tokio::spawn(keeper::keep(volume.clone()));
    Ok(volume)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap()
}

async fn read_all(volume: &Arc<Volume>) -> Vec<u8> {
    let read = volume.clone().serve(Request::read(0, SIZE)).await;
    read.unwrap().into_data().unwrap().to_vec()
}

fn write(offset: u64, bytes: &[u8], origin: Origin) -> Request {
    let mut req = Request::write(offset, Data::copy_of(bytes));
    req.origin = origin;
    req
}

fn op(op: Op, offset: u64, len: u64) -> Request {
    Request::new(op, offset, len)
}
