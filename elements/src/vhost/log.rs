//! The log of written pages, for a guest that migrates while it runs (VHOST_F_LOG_ALL): a bitmap in memory
//! that the front-end shares, one bit for each page of 4 KiB of the guest's memory.

use super::memory::Mapping;
use std::sync::atomic::{AtomicU8, Ordering};

const PAGE: u64 = 4096;

/// A log of written pages.
#[derive(Debug)]
pub(crate) struct DirtyLog(Mapping);

impl DirtyLog {
    pub(crate) fn new(mapping: Mapping) -> DirtyLog {
        DirtyLog(mapping)
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.0
    }

    /// The bytes from a guest's address on have been written: before anybody may believe that they have.
    pub(crate) fn mark(&self, guest: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = guest.saturating_add(len - 1) / PAGE;
        for page in guest / PAGE..=last {
            let byte = page / 8;
            // The front-end gives a log that covers the guest's memory; what lies outside cannot be told.
            if byte >= self.0.len() as u64 {
                return;
            }
            // SAFETY: inside of the mapping; a byte is aligned, and everybody who writes it does so
            // atomically.
            let bits = unsafe { AtomicU8::from_ptr(self.0.at(byte as usize).as_ptr()) };
            bits.fetch_or(1 << (page % 8), Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::memory_file;

    #[test]
    fn every_page_that_is_touched_and_no_other() {
        let log = DirtyLog::new(Mapping::new(memory_file(4096), 0, 4096).unwrap());
        log.mark(4095, 2);
        log.mark(20 * PAGE, 0);
        log.mark(17 * PAGE + 5, 3 * PAGE);
        log.mark(u64::MAX - 1, 100);
        log.mark(4096 * 8 * PAGE - 1, 2);
        // SAFETY: inside of the mapping.
        let byte = |at: usize| unsafe { log.mapping().at(at).as_ptr().read_volatile() };
        assert_eq!([byte(0), byte(1), byte(2), byte(3)], [0b11, 0, 0b1_1110, 0]);
        assert_eq!(byte(4095), 0x80);
    }
}
