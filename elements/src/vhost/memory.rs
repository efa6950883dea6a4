//! A guest's memory: the regions that its front-end has shared, mapped.

use super::fault::{self, Guard};
use super::wire::MemoryRegion;
use blockmason::{Error, Kind, Result};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use vm_memory::{FileOffset, MmapRegion};

/// Regions that a guest's memory may have.
pub(crate) const MOST_REGIONS: usize = 509;

/// Part of a file, mapped and shared with whoever else has it mapped.
///
/// Nothing of it is ever borrowed as a Rust reference: others may write it at any time, and its owner
/// may cut the file short, which is survived (see [`fault`]).
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Goes before the mapping does.
    guard: Guard,
    region: MmapRegion<()>,
    /// Where the part starts in the mapping.
    offset: usize,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes from `offset` on.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the file has not so many, or cannot be mapped.
    pub(crate) fn new(file: File, offset: u64, len: u64) -> Result<Mapping> {
        let invalid = |what: String| Error::invalid(format!("shared memory cannot be mapped: {what}"));
        let stat =
            rustix::fs::fstat(&file).map_err(|errno| Error::os(errno, "shared memory is of no use"))?;
        let end = offset.checked_add(len).filter(|end| len > 0 && *end <= stat.st_size as u64);
        let Some(end) = end else {
            return Err(invalid(format!("{len} bytes at {offset} of a file of {}", stat.st_size)));
        };
        // From the start: an offset need not be a multiple of the size of a huge page.
        let (size, flags) = (end as usize, libc::MAP_SHARED | libc::MAP_NORESERVE);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let region = MmapRegion::build(Some(FileOffset::new(file, 0)), size, prot, flags)
            .map_err(|error| invalid(error.to_string()))?;
        // SAFETY: the mapping is this struct's, which drops the guard first and hands out raw pointers only.
        let guard = unsafe { fault::guard(region.as_ptr() as usize, size) };
        let guard = guard.ok_or_else(|| Error::new(Kind::Busy, "too much shared memory is mapped"))?;
        Ok(Mapping { guard, region, offset: offset as usize, len: len as usize })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it starts in its file.
    pub(crate) fn offset(&self) -> u64 {
        self.offset as u64
    }

    /// A place in it, which may be its end. Panics outside.
    pub(crate) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.len, "{offset} of {}", self.len);
        // SAFETY: self.offset + offset is at most the size of the mapping.
        let at = unsafe { self.region.as_ptr().add(self.offset + offset) };
        NonNull::new(at).expect("a mapping is not at address 0")
    }

    /// True if its owner has cut the file short: nothing of it is shared any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }

    /// The file.
    pub(crate) fn file(&self) -> Result<BorrowedFd<'_>> {
        let file = self.region.file_offset().map(FileOffset::file);
        file.map(AsFd::as_fd).ok_or_else(|| Error::internal("a mapping of no file"))
    }
}

/// A region of a guest's memory.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) place: MemoryRegion,
    pub(crate) mapping: Mapping,
}

impl Region {
    fn new(place: MemoryRegion, fd: OwnedFd) -> Result<Arc<Region>> {
        let mapping = Mapping::new(File::from(fd), place.offset, place.size)?;
        Ok(Arc::new(Region { place, mapping }))
    }

    fn holds(&self, start: u64, address: u64) -> bool {
        address >= start && address - start < self.place.size
    }
}

/// All of a guest's memory. Does not change: a table with other regions is another one.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// By guest address, without overlaps.
    regions: Vec<Arc<Region>>,
}

impl Memory {
    /// A whole table.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if regions overlap or cannot be mapped.
    pub(crate) fn new(table: impl IntoIterator<Item = (MemoryRegion, OwnedFd)>) -> Result<Memory> {
        table.into_iter().try_fold(Memory::default(), |memory, (place, fd)| memory.with(place, fd))
    }

    /// The same with one more region.
    pub(crate) fn with(&self, place: MemoryRegion, fd: OwnedFd) -> Result<Memory> {
        if self.regions.len() >= MOST_REGIONS {
            return Err(Error::invalid(format!("a guest has at most {MOST_REGIONS} regions of memory")));
        }
        let ends_before = |other: &Arc<Region>| other.place.guest + other.place.size <= place.guest;
        let at = self.regions.partition_point(ends_before);
        if self.regions.get(at).is_some_and(|next| next.place.guest < place.guest + place.size) {
            return Err(Error::invalid("regions of a guest's memory overlap"));
        }
        let mut regions = self.regions.clone();
        regions.insert(at, Region::new(place, fd)?);
        Ok(Memory { regions })
    }

    /// The same without a region; by its place in both address spaces.
    pub(crate) fn without(&self, place: MemoryRegion) -> Result<Memory> {
        let same = |region: &Arc<Region>| {
            let known = region.place;
            (known.guest, known.user, known.size) == (place.guest, place.user, place.size)
        };
        let mut regions = self.regions.clone();
        let at = regions.iter().position(same).ok_or_else(|| Error::invalid("there is no such region"))?;
        regions.remove(at);
        Ok(Memory { regions })
    }

    /// The regions, by guest address.
    pub(crate) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// True if some of it is not shared any more.
    pub(crate) fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    #[inline]
    fn find(&self, guest: u64) -> Option<&Region> {
        // A guest has few, and almost all requests are in the largest.
        self.regions.iter().map(|region| &**region).find(|region| region.holds(region.place.guest, guest))
    }

    /// `len` bytes from a guest's address on, if one region holds them all.
    #[inline]
    pub(crate) fn get(&self, guest: u64, len: u64) -> Option<NonNull<u8>> {
        let region = self.find(guest)?;
        let from = guest - region.place.guest;
        (len <= region.place.size - from).then(|| region.mapping.at(from as usize))
    }

    /// The pieces of `len` bytes from a guest's address on, which regions that touch may share.
    ///
    /// # Errors
    /// Some of it is not the guest's; pieces may have been given out before.
    #[inline]
    pub(crate) fn pieces(
        &self,
        mut guest: u64,
        mut len: u64,
        mut each: impl FnMut(NonNull<u8>, usize),
    ) -> Result<(), Outside> {
        while len > 0 {
            let region = self.find(guest).ok_or(Outside)?;
            let from = guest - region.place.guest;
            let n = len.min(region.place.size - from);
            each(region.mapping.at(from as usize), n as usize);
            guest = guest.checked_add(n).ok_or(Outside)?;
            len -= n;
        }
        Ok(())
    }

    /// `len` bytes from an address of the front-end's on, if one region holds them all.
    pub(crate) fn get_user(&self, user: u64, len: u64) -> Option<NonNull<u8>> {
        let region = self.regions.iter().find(|region| region.holds(region.place.user, user))?;
        let from = user - region.place.user;
        (len <= region.place.size - from).then(|| region.mapping.at(from as usize))
    }

    /// The guest's address of a byte that is mapped here.
    pub(crate) fn guest_address(&self, at: NonNull<u8>) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let from = (at.as_ptr() as usize).checked_sub(region.mapping.at(0).as_ptr() as usize)?;
            (from < region.mapping.len()).then(|| region.place.guest + from as u64)
        })
    }
}

/// An address that is not the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outside;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::memory_file;

    fn place(guest: u64, size: u64, user: u64) -> MemoryRegion {
        MemoryRegion { guest, size, user, offset: 0 }
    }

    fn fd(size: u64) -> OwnedFd {
        memory_file(size).into()
    }

    #[test]
    fn regions_are_found_by_both_addresses() {
        let table = [(place(0x10000, 0x2000, 0x7000), fd(0x2000)), (place(0, 0x1000, 0x5000), fd(0x1000))];
        let memory = Memory::new(table).unwrap();
        assert!(memory.get(0, 0x1000).is_some() && memory.get(0, 0x1001).is_none());
        assert!(memory.get(0x1000, 1).is_none() && memory.get(u64::MAX, 1).is_none());
        assert_eq!(memory.get(0x10010, 8), memory.get_user(0x7010, 8));
        assert!(memory.get_user(0x8ffc, 8).is_none());
        let at = memory.get(0x11fff, 1).unwrap();
        assert_eq!(memory.guest_address(at), Some(0x11fff));
    }

    #[test]
    fn overlaps_are_refused_and_neighbours_are_joined() {
        let memory = Memory::new([(place(0x1000, 0x1000, 0), fd(0x1000))]).unwrap();
        for guest in [0x800, 0x1000, 0x1fff] {
            assert!(memory.with(place(guest, 0x1000, 0x9000), fd(0x1000)).is_err());
        }
        let memory = memory.with(place(0x2000, 0x1000, 0x9000), fd(0x1000)).unwrap();
        let mut pieces = Vec::new();
        memory.pieces(0x1ff0, 0x20, |_, len| pieces.push(len)).unwrap();
        assert_eq!(pieces, [16, 16]);
        assert_eq!(memory.pieces(0x2ff0, 0x20, |_, _| ()), Err(Outside));
        assert_eq!(memory.pieces(u64::MAX - 1, 0x20, |_, _| ()), Err(Outside));
    }

    #[test]
    fn a_region_goes_by_the_place_it_came_with() {
        let memory = Memory::new([(place(0, 0x1000, 0x5000), fd(0x1000))]).unwrap();
        assert!(memory.without(place(0, 0x1000, 0x6000)).is_err());
        assert!(memory.without(place(0, 0x1000, 0x5000)).unwrap().regions().is_empty());
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        assert!(Memory::new([(place(0, 0x2000, 0), fd(0x1000))]).is_err());
        assert!(Mapping::new(memory_file(4096), 4096, 1).is_err());
    }
}
