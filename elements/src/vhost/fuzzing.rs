//! Entrances for fuzzers: a queue's rings and a device's front-ends, each as in earnest and told of in plain values.

use super::attend::serve_front_end;
use super::blk;
use super::chain::{Chain, Pieces};
use super::device::{self, Terms};
use super::export::Lease;
use super::memory::Memory;
use super::port::Port;
use super::ring::Ring;
use super::wire::{MemoryRegion, RingAddress};
use blockmason::{Disk, Result};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;

/// The features of the protocol that are offered.
pub const PROTOCOL: u64 = device::PROTOCOL;

/// A piece of the guest's memory: its address and how many bytes it has.
pub type Piece = (u64, usize);

/// A request as it was taken from its queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Where its chain starts.
    pub head: u16,
    /// All of its memory, for us to read and for us to write.
    pub chain: [Vec<Piece>; 2],
    /// What is left of that once it was taken apart.
    pub data: [Vec<Piece>; 2],
    /// Where its status goes.
    pub status: u64,
    /// What it asks for, in words.
    pub job: String,
}

/// A queue that nobody serves.
pub struct Rings {
    memory: Arc<Memory>,
    port: Port,
    indirect: bool,
}

impl Rings {
    /// A queue of `size` entries that goes on at `next`, in memory of these regions.
    ///
    /// # Errors
    /// What a front-end is told of it.
    pub fn open(
        table: impl IntoIterator<Item = (MemoryRegion, OwnedFd)>,
        address: &RingAddress,
        size: u16,
        next: u16,
        (indirect, event_idx): (bool, bool),
    ) -> Result<Rings> {
        let memory = Arc::new(Memory::new(table)?);
        let port = Port::new(Ring::new(&memory, address, size)?, None, next, event_idx);
        Ok(Rings { memory, port, indirect })
    }

    /// The next request that is there.
    ///
    /// # Errors
    /// Why the queue is stopped.
    pub fn take(&mut self) -> Result<Option<Taken>, &'static str> {
        let Some(head) = self.port.take()? else { return Ok(None) };
        let mut chain = Chain::default();
        chain.read(self.port.ring(), head, self.indirect)?;
        let whole = [self.places(&chain.readable), self.places(&chain.writable)];
        let (job, status) = blk::parse(&mut chain)?;
        let data = [self.places(&chain.readable), self.places(&chain.writable)];
        let job = format!("{job:?}");
        Ok(Some(Taken { head, chain: whole, data, status: self.place(status), job }))
    }

    fn place(&self, at: NonNull<u8>) -> u64 {
        self.memory.guest_address(at).expect("an address outside of all memory")
    }

    fn places(&self, pieces: &Pieces) -> Vec<Piece> {
        pieces.iter().map(|(at, len)| (self.place(*at), *len)).collect()
    }

    /// Completes requests, and asks for a kick when more come. Returns idx of the used ring.
    pub fn complete(&mut self, heads: &[u16]) -> u16 {
        heads.iter().for_each(|head| self.port.complete(*head, 1, 0));
        self.port.publish();
        self.port.ask_for_kick();
        self.port.ring().used_idx()
    }
}

/// A device that is served to one front-end after another.
pub struct Device(Arc<Lease>);

impl Device {
    /// A device of a disk that is entered at `source`.
    pub fn new(disk: &Arc<Disk>, source: &str, queues: u16, read_only: bool, record: PathBuf) -> Device {
        let terms =
            Terms { queues, queue_size: 256, serial: "fuzz".to_owned(), read_only, poll: Duration::ZERO };
        Device(Lease::new(device::Device::new(disk.clone(), source, terms, record)))
    }

    /// Serves a front-end until it has gone or was thrown out.
    pub async fn serve(&self, stream: UnixStream) {
        if let Some(place) = self.0.enter() {
            serve_front_end(stream, &self.0.device, place).await;
        }
    }
}
