//! Sizes that are powers of two, as parameters.

use blockmason::lang::value::Size;
use std::fmt;
use std::str::FromStr;

/// A power of two from `MIN` to `MAX` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Power<const MIN: u64, const MAX: u64>(pub(super) u64);

/// A block that is protected as a whole.
pub(super) type Block = Power<512, { 64 << 10 }>;
/// A block that is copied as a whole.
pub(super) type Chunk = Power<{ 4 << 10 }, { 1 << 20 }>;
/// A block of whatever lies below.
pub(super) type Unit = Power<512, { 16 << 20 }>;
/// What is compressed together.
#[cfg(feature = "compress")]
pub(super) type Cluster = Power<{ 16 << 10 }, { 4 << 20 }>;
/// What room is taken and given back in.
#[cfg(feature = "compress")]
pub(super) type Room = Power<512, { 1 << 20 }>;

blockmason::text_value!(Block, "size");
blockmason::text_value!(Chunk, "size");
blockmason::text_value!(Unit, "size");
#[cfg(feature = "compress")]
blockmason::text_value!(Cluster, "size");
#[cfg(feature = "compress")]
blockmason::text_value!(Room, "size");

impl<const MIN: u64, const MAX: u64> Power<MIN, MAX> {
    /// True if it may be so many bytes.
    pub(super) fn may_be(bytes: u64) -> bool {
        bytes.is_power_of_two() && (MIN..=MAX).contains(&bytes)
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Power<MIN, MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Size(bytes) = text.parse()?;
        let (min, max) = (Size(MIN), Size(MAX));
        let found = Self::may_be(bytes).then_some(Power(bytes));
        found.ok_or_else(|| format!("expected a power of two from {min} to {max}, found `{text}`"))
    }
}

impl<const MIN: u64, const MAX: u64> fmt::Display for Power<MIN, MAX> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}
