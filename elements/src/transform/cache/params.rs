//! The values of the parameters, and which of them go together.

use crate::route::throttle::Bandwidth;
use blockmason::describe::Param;
use blockmason::lang::value::{FilePath, Size, Time};
use blockmason::lang::{self, ParamError};
use std::fmt;
use std::str::FromStr;

/// Bytes of a line: sizes in which memory is handed out without loss.
pub(super) const LINES: [u64; 4] = [4 << 10, 16 << 10, 64 << 10, 256 << 10];

/// The fewest lines.
const FEWEST: u64 = 8;

blockmason::params! {
    /// A cache.
    pub(super) struct Params {
        /// Without `path`, the memory that it takes, all of it. With `path`, the size of the file that is made
        /// if there is none.
        size: Option<Size>,
        /// A file or block device on an SSD, which keeps the cache over restarts. It belongs to the disk below.
        path: Option<FilePath>,
        /// `write_through`: a change is answered when the disk below has it. `write_back`: when the cache has it.
        mode: Mode = "write_through",
        /// Agrees that what was answered and not flushed is lost if this process dies: asked for with
        /// `(mode write_back)` in memory.
        lossy: bool = "no",
        /// What is read from below at once, and kept or forgotten: 4k, 16k, 64k or 256k. In memory it is 16k if nothing is
        /// said, four pages of a guest: of a longer one little would be used where guests read here and there, and
        /// streams are read ahead anyhow. On an SSD 64k: below is something slow, and a table of its lines is in memory.
        line: Option<Line>,
        /// Up to this much is read ahead of a stream of reads; 0 is nothing.
        read_ahead: Size = "1M",
        /// A stream of reads that is longer than this is not kept; 0 keeps them all.
        bypass: Size = "8M",
        /// The most that has been answered and is not below: in memory part of `size`, 64M or half of it if nothing is
        /// said. On an SSD all that fits into its log.
        dirty: Option<Size>,
        /// How long a change may wait before it goes below.
        dirty_time: Time = "5s",
        /// Bytes in a second that go below at the most, unless somebody waits for them.
        rate: Bandwidth = "unlimited",
        /// What a flush waits for on an SSD: `local`, the SSD; `remote`, the disk below.
        durability: Durability = "local",
        /// The part of the file that is the log of changes, when the file is made: half of it with
        /// `(mode write_back)`, nearly nothing otherwise.
        log: Option<Size>,
        /// What to do with changes that are only in the cache if somebody else has written the disk below meanwhile:
        /// `refuse` to serve, `discard` the changes, or `replay` them over what is there.
        stale: Stale = "refuse",
    }
}

/// Makes a type whose values are words.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident, $kind:literal, $($(#[$doc:meta])* $value:ident $word:literal),*) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum $name {
            $($(#[$doc])* $value,)*
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(word: &str) -> Result<$name, String> {
                match word {
                    $($word => Ok($name::$value),)*
                    _ => Err(format!("expected {}, found `{word:.40}`", $kind)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self {
                    $($name::$value => $word,)*
                })
            }
        }

        blockmason::text_value!($name, $kind);
    };
}

words!(
    /// When a change is answered.
    Mode, "`write_through` or `write_back`", Through "write_through", Back "write_back"
);
words!(
    /// What a flush waits for.
    Durability, "`local` or `remote`", Local "local", Remote "remote"
);
words!(
    /// What becomes of changes for a disk that is another one now.
    Stale, "`refuse`, `discard` or `replay`", Refuse "refuse", Discard "discard", Replay "replay"
);

/// Bytes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line(pub(super) u64);

impl FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Line, String> {
        let Size(bytes) = text.parse()?;
        let fits = LINES.contains(&bytes);
        fits.then_some(Line(bytes)).ok_or(format!("expected 4k, 16k, 64k or 256k, found `{text:.40}`"))
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

blockmason::text_value!(Line, "size");

impl Params {
    pub(super) const TABLE: &'static [Param] = Params::PARAMS;

    pub(super) fn line(&self) -> u64 {
        let usual = if self.path.is_some() { 64 << 10 } else { 16 << 10 };
        self.line.map_or(usual, |line| line.0)
    }

    /// Bytes of memory for changes that are not below.
    pub(super) fn memory(&self) -> u64 {
        let size = self.size.map_or(0, |size| size.0);
        match self.mode {
            Mode::Back => self.dirty.map_or((64 << 20).min(size / 2), |dirty| dirty.0),
            Mode::Through => 0,
        }
    }

    /// How many lines fit into the memory.
    pub(super) fn lines(&self) -> u64 {
        let size = self.size.map_or(0, |size| size.0);
        size.saturating_sub(self.memory()) / (self.line() + super::lines::OVERHEAD)
    }

    /// Reads them, and sees whether they go together.
    pub(super) fn sound(params: &lang::Params) -> Result<Params, Vec<ParamError>> {
        let read = Params::from(params)?;
        let wrong = |key: &str, message: &str| Err(vec![params.error(key, message)]);
        if read.path.is_some() {
            return Ok(read);
        }
        if read.size.is_none() {
            return wrong(
                "size",
                "how much memory? a cache in memory needs `(size 100M)`, say; one on an SSD a `path`",
            );
        }
        if read.mode == Mode::Back && !read.lossy {
            let message = "a cache in memory that writes back loses what it has answered and not written below when this \
                           process dies: agree with `(lossy yes)`, or give it a `path` on an SSD";
            return wrong("mode", message);
        }
        if read.mode == Mode::Back && read.memory() < 64 << 10 {
            return wrong("dirty", "what is not below yet needs 64k at the least");
        }
        if read.lines() < FEWEST {
            let message = "it is too little: besides what is not below yet, eight lines must fit";
            return wrong("size", message);
        }
        for (key, given) in
            [("durability", read.durability == Durability::Remote), ("log", read.log.is_some())]
        {
            if given {
                return wrong(key, "it is about a cache on an SSD, which has a `path`");
            }
        }
        Ok(read)
    }

    pub(super) fn are_sound(params: &lang::Params) -> Result<(), Vec<ParamError>> {
        Params::sound(params).map(drop)
    }
}
