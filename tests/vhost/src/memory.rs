//! The memory of a guest: one memfd, seen by the back-end in two regions.

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, Ordering::Relaxed};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
};

/// Where the first region begins; nothing lies below.
pub const LOW: u64 = 1 << 20;

/// Where the second region begins, as memory above 4 GiB does in a guest.
pub const HIGH: u64 = 1 << 32;

/// Whether the memfd may become smaller.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// It cannot: F_SEAL_SHRINK.
    Shrink,
    /// It can, at any time: what a guest with bad manners would use.
    Nothing,
}

/// Guest memory. It outlives every connection.
pub struct Memory {
    map: GuestMemoryMmap<()>,
    file: Arc<File>,
    half: u64,
    /// The next free bytes of each half.
    free: [AtomicU64; 2],
}

/// Which half something lies in.
#[derive(Clone, Copy)]
pub enum Half {
    /// The region at [`LOW`].
    Low = 0,
    /// The region at [`HIGH`].
    High = 1,
}

impl Memory {
    /// Memory of twice `half` bytes, a multiple of the page size.
    pub fn new(half: u64, seal: Seal) -> Arc<Memory> {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let file = Arc::new(File::from(file));
        file.set_len(half * 2).unwrap();
        if seal == Seal::Shrink {
            fcntl_add_seals(&*file, SealFlags::SHRINK | SealFlags::SEAL).unwrap();
        }
        let range = |start, offset| {
            let from = FileOffset::from_arc(file.clone(), offset);
            (GuestAddress(start), usize::try_from(half).unwrap(), Some(from))
        };
        let map = GuestMemoryMmap::from_ranges_with_files([range(LOW, 0), range(HIGH, half)]).unwrap();
        Arc::new(Memory { map, file, half, free: [AtomicU64::new(LOW), AtomicU64::new(HIGH)] })
    }

    /// Bytes that nobody has taken yet. Returns their guest address; they are zeros and never given back.
    pub fn take(&self, half: Half, bytes: u64, align: u64) -> u64 {
        let free = &self.free[half as usize];
        let start = free.load(Relaxed).next_multiple_of(align);
        let end = start + bytes;
        let base = if matches!(half, Half::Low) { LOW } else { HIGH };
        assert!(end <= base + self.half, "the guest has too little memory");
        free.store(end, Relaxed);
        start
    }

    /// The regions as `SET_MEM_TABLE` has them.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map.iter().map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()).collect()
    }

    /// The address in this process of a guest address, which is what ring addresses are sent as.
    pub fn host(&self, guest: u64) -> u64 {
        self.map.get_host_address(GuestAddress(guest)).unwrap() as u64
    }

    /// The memfd.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of each region.
    pub fn half(&self) -> u64 {
        self.half
    }

    /// Cuts the upper region off, which nobody may touch afterwards.
    pub fn shrink(&self) {
        self.file.set_len(self.half).unwrap();
    }

    /// A value at a guest address.
    pub fn get<T: ByteValued>(&self, guest: u64) -> T {
        self.map.read_obj(GuestAddress(guest)).unwrap()
    }

    /// Sets a value.
    pub fn set<T: ByteValued>(&self, guest: u64, value: T) {
        self.map.write_obj(value, GuestAddress(guest)).unwrap();
    }

    /// Reads what the other side publishes.
    pub fn load<T: AtomicAccess>(&self, guest: u64) -> T {
        self.map.load(GuestAddress(guest), Ordering::SeqCst).unwrap()
    }

    /// Publishes what was written before.
    pub fn store<T: AtomicAccess>(&self, guest: u64, value: T) {
        self.map.store(value, GuestAddress(guest), Ordering::SeqCst).unwrap();
    }

    /// Copies out.
    pub fn read(&self, guest: u64, into: &mut [u8]) {
        self.map.read_slice(into, GuestAddress(guest)).unwrap();
    }

    /// Copies in.
    pub fn write(&self, guest: u64, from: &[u8]) {
        self.map.write_slice(from, GuestAddress(guest)).unwrap();
    }
}
