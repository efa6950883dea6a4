//! What a meter wants of a disk in a bucket.

use super::counts::Sum;
use super::ledger::Book;
use blockmason::lang::value::Service;
use std::sync::Weak;

/// A disk that is paid for by request and by what is stored.
pub(crate) trait Metered: Send + Sync {
    /// The volume's id.
    fn volume(&self) -> [u8; 16];

    /// What has been asked of the store since this was called last, by whomever.
    fn take_unbilled(&self) -> Sum;

    /// Bytes stored now; None while the volume is not open.
    fn stored(&self) -> Option<u64>;

    /// From now on work in the background rests, but for what must be done lest requests wait; or it goes on.
    fn rest(&self, rests: bool);

    /// Where to write what leaving the volume has cost, for that is after the meter has been closed.
    fn finish_in(&self, book: Weak<Book>);
}

impl Service for dyn Metered {
    const NAME: &'static str = "metered";
}
