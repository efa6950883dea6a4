//! Requests and replies.

use crate::data::Data;
use crate::error::Error;
use std::fmt;

/// What a request asks for. There is no "other": an element that changes data, addresses or fan-out
/// matches every operation by name, and a new one stops it from compiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Bytes, please.
    Read,
    /// Put these bytes there.
    Write,
    /// Every write that was answered before this request came is durable when it is answered.
    Flush,
    /// The range's contents are not needed any more; what a read finds there afterwards is open.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes,
    /// The range will be read soon. Only a hint.
    Cache,
    /// What is known of the range: allocation, or a dirty map.
    Extents,
    /// Something rare that travels the graph so that every element on the way sees it at the same
    /// place in the stream: a snapshot, say.
    Control,
}

impl Op {
    /// Every operation, for tables and tests.
    pub const ALL: [Op; 8] =
        [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes, Op::Cache, Op::Extents, Op::Control];

    /// The word used in logs, parameters and errors.
    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write_zeroes",
            Op::Cache => "cache",
            Op::Extents => "extents",
            Op::Control => "control",
        }
    }

    /// True if the medium differs afterwards.
    pub fn changes_data(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }

    /// True if a request of another stream must not overlap it where streams are ordered: it reads or
    /// changes what the range holds. Hints, extents and flushes do not care.
    pub fn locks(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::Discard | Op::WriteZeroes)
    }

    /// True if offset and length name a range.
    pub fn has_range(self) -> bool {
        !matches!(self, Op::Flush | Op::Control)
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Modifiers of a request.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags(u8);

impl Flags {
    /// None.
    pub const NONE: Flags = Flags(0);
    /// What this request writes is durable when it is answered.
    pub const FUA: Flags = Flags(1);
    /// WriteZeroes: the range may become a hole.
    pub const MAY_UNMAP: Flags = Flags(2);
    /// WriteZeroes: refuse with `EOPNOTSUPP` if it would be no faster than writing zeros.
    pub const FAST_ONLY: Flags = Flags(4);
    /// Extents: the first extent is enough.
    pub const ONE: Flags = Flags(8);

    /// True if all of `other` are set.
    pub fn has(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// The words for those that are set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let names = [
            (Flags::FUA, "fua"),
            (Flags::MAY_UNMAP, "may_unmap"),
            (Flags::FAST_ONLY, "fast_only"),
            (Flags::ONE, "one"),
        ];
        names.into_iter().filter(move |(flag, _)| self.has(*flag)).map(|(_, name)| name)
    }

    /// With `other` set as well.
    pub fn with(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    /// With `other` cleared.
    pub fn without(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for name in self.names() {
            write!(f, "{}{name}", if first { "" } else { "," })?;
            first = false;
        }
        if first { f.write_str("-") } else { Ok(()) }
    }
}

/// Who made a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Origin {
    /// A client of an export.
    #[default]
    Guest,
    /// A background copier.
    Copy,
    /// A reader ahead of the guest.
    Prefetch,
    /// A cache that writes back.
    WriteBack,
    /// The framework itself (read-modify-write, probes).
    Internal,
}

impl Origin {
    /// Every origin.
    pub const ALL: [Origin; 5] =
        [Origin::Guest, Origin::Copy, Origin::Prefetch, Origin::WriteBack, Origin::Internal];

    /// The word used in logs and parameters.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Guest => "guest",
            Origin::Copy => "copy",
            Origin::Prefetch => "prefetch",
            Origin::WriteBack => "write_back",
            Origin::Internal => "internal",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How urgent a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(u8)]
pub enum Class {
    /// Someone waits for it.
    #[default]
    Interactive,
    /// It may wait.
    Background,
}

impl Class {
    /// Every class.
    pub const ALL: [Class; 2] = [Class::Interactive, Class::Background];

    /// The word used in parameters.
    pub fn name(self) -> &'static str {
        match self {
            Class::Interactive => "interactive",
            Class::Background => "background",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A request on its way through a graph. One cache line; rarities are boxed in `extra`.
#[derive(Clone, Debug)]
pub struct Request {
    /// What it asks for.
    pub op: Op,
    /// Modifiers.
    pub flags: Flags,
    /// Who made it.
    pub origin: Origin,
    /// How urgent it is.
    pub class: Class,
    /// Unique in the process.
    pub id: u64,
    /// The id of the request that entered at a source and whose child this is, or its own.
    pub root: u64,
    /// First byte of the range; 0 where the operation has none.
    pub offset: u64,
    /// Bytes of the range; 0 where the operation has none.
    pub len: u64,
    /// A write's payload, exactly `len` bytes. Of a read, foreign memory to fill in place, `len`
    /// bytes; or empty, and then whoever answers brings memory.
    pub data: Data,
    /// What few requests have.
    pub extra: Option<Box<Extra>>,
}

/// What few requests have.
#[derive(Clone, Debug, Default)]
pub struct Extra {
    /// Control: the verb and its argument.
    pub control: Option<(String, String)>,
    /// Extents: the dirty map asked for; None asks for allocation.
    pub map: Option<String>,
    /// What it must come after, and what must come after it; see
    /// [`Cx::add_dependency`](crate::Cx::add_dependency).
    pub ties: crate::sched::Ties,
    /// Set by the framework if its way through the graph is recorded. What is made of a request by
    /// [`Cx::child`](crate::Cx::child) is recorded with it.
    pub trace: Option<crate::sched::Trace>,
}

impl Request {
    /// A request that no source has admitted yet: id and root are given by
    /// [`Cx::child`](crate::Cx::child) or the source.
    pub fn new(op: Op, offset: u64, len: u64) -> Request {
        Request {
            op,
            flags: Flags::NONE,
            origin: Origin::Guest,
            class: Class::Interactive,
            id: 0,
            root: 0,
            offset,
            len,
            data: Data::empty(),
            extra: None,
        }
    }

    /// A read of `len` bytes.
    pub fn read(offset: u64, len: u64) -> Request {
        Request::new(Op::Read, offset, len)
    }

    /// A write of `data`.
    pub fn write(offset: u64, data: Data) -> Request {
        let mut request = Request::new(Op::Write, offset, data.len() as u64);
        request.data = data;
        request
    }

    /// A flush.
    pub fn flush() -> Request {
        Request::new(Op::Flush, 0, 0)
    }

    /// The same with these flags set as well.
    pub fn with(mut self, flags: Flags) -> Request {
        self.flags = self.flags.with(flags);
        self
    }

    /// True if what it writes must be durable when it is answered.
    pub fn is_fua(&self) -> bool {
        self.flags.has(Flags::FUA)
    }

    /// The first byte behind the range. Sources admit no range that overflows.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Makes the payload of a write safe against a guest that changes it meanwhile. Copies at most
    /// once: call it before the payload is hashed, encrypted, compared or sent twice.
    pub fn stabilise(&mut self) {
        if self.op == Op::Write {
            self.data = self.data.stable();
        }
    }

    /// The part of this request that covers `len` bytes from `from` bytes into its range on, moved
    /// to `offset`. The payload or destination is cut along with it.
    pub fn part(&self, from: u64, len: u64, offset: u64) -> Request {
        let mut part = self.clone();
        if !self.data.is_empty() {
            part.data = self.data.slice(from as usize..(from + len) as usize);
        }
        part.offset = offset;
        part.len = len;
        part
    }
}

/// What comes back.
pub type Reply = Result<Answer, Error>;

/// A reply that is no error.
#[derive(Clone, Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// A read's bytes, exactly as many as were asked for.
    Data(Data),
    /// An extents request's answer: they start at its offset, in order, without gaps, and cover at
    /// least one byte; the last one may reach past the range asked for.
    Extents(Vec<Extent>),
    /// A control request's answer.
    Text(String),
}

impl Answer {
    /// The bytes of a read's answer; an internal error for any other.
    pub fn into_data(self) -> Result<Data, Error> {
        match self {
            Answer::Data(data) => Ok(data),
            other => Err(Error::internal(format!("a read was answered with {other:?}"))),
        }
    }

    /// The extents of an extents answer; an internal error for any other.
    pub fn into_extents(self) -> Result<Vec<Extent>, Error> {
        match self {
            Answer::Extents(extents) => Ok(extents),
            other => Err(Error::internal(format!("an extents request was answered with {other:?}"))),
        }
    }
}

/// A run of bytes of which the same is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: u64,
    /// What is known of them.
    pub state: ExtentState,
}

/// What is known of a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ExtentState {
    /// Allocation: no space is taken.
    pub hole: bool,
    /// Allocation: it reads as zeros.
    pub zero: bool,
    /// A dirty map: it has changed.
    pub dirty: bool,
}

impl ExtentState {
    /// Allocated, with contents that have to be read to be known.
    pub const DATA: ExtentState = ExtentState { hole: false, zero: false, dirty: false };
    /// A hole that reads as zeros.
    pub const HOLE: ExtentState = ExtentState { hole: true, zero: true, dirty: false };
}

/// Joins neighbours of the same state.
pub fn join_extents(extents: Vec<Extent>) -> Vec<Extent> {
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents.into_iter().filter(|extent| extent.len > 0) {
        match joined.last_mut() {
            Some(last) if last.state == extent.state => last.len += extent.len,
            _ => joined.push(extent),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_cache_line() {
        assert!(size_of::<Request>() <= 64, "{}", size_of::<Request>());
        assert!(size_of::<Reply>() <= 32, "{}", size_of::<Reply>());
    }

    #[test]
    fn a_part_takes_its_payload_along() {
        let write = Request::write(1000, Data::copy_of(b"abcdefgh")).with(Flags::FUA);
        let part = write.part(2, 3, 50);
        assert_eq!((part.offset, part.len, part.is_fua()), (50, 3, true));
        assert_eq!(part.data.to_vec(), b"cde");
        assert!(Request::read(0, 10).part(5, 5, 0).data.is_empty());
    }
}
