//! How volumes are made, and what of that may be changed.

use super::format::{Compress, Format};
use serde::{Deserialize, Serialize};

/// How a volume is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The format of its tree.
    pub format: Format,
    /// Each block has a checksum.
    pub checksums: bool,
    /// After a loss of power it is what it was at some instant since the last flush.
    pub ordered: bool,
    /// How what is written to it is compressed.
    pub compress: Compress,
    /// Bytes of it that may hold data, 0 any.
    pub quota: u64,
    /// Bytes that can be written to it since its newest snapshot, whatever others do.
    pub reserve: u64,
}

/// What changes of it; what is none stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs, reason = "as in Settings")]
pub struct NewSettings {
    pub ordered: Option<bool>,
    pub compress: Option<Compress>,
    pub quota: Option<u64>,
    pub reserve: Option<u64>,
}
