//! What a disk looks like from above.

use crate::request::Op;

/// Size, block sizes and abilities, negotiated upwards when a graph is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes, exactly.
    pub size: u64,
    /// Requests that enter the element must start and end at multiples of this, a power of two. The
    /// framework sees to it on the edge into the element by reading, modifying and writing whole
    /// blocks under a range lock; so the demand does not travel further up.
    pub min_block: u32,
    /// The size below which requests are dear, a power of two: the physical block.
    pub preferred_block: u32,
    /// The longest read or write that may enter the element, a multiple of `min_block`; the
    /// framework splits longer ones.
    pub max_len: u32,
    /// The operations done below at little cost.
    pub ops: Ops,
    /// True if a flush is needed before answered writes are durable.
    pub needs_flush: bool,
    /// True if a seek costs milliseconds.
    pub rotational: bool,
    /// True if nothing may be written.
    pub read_only: bool,
    /// True if acknowledged writes die with this process, and nobody has said `(lossy yes)` to that.
    pub volatile: bool,
    /// True if what was answered and not flushed may be lost while this machine goes on: a server has it.
    pub forgetful: bool,
    /// The longest write, in bytes, of which all or nothing is there afterwards, whatever dies meanwhile: what holds
    /// authenticated data needs it. So too of writes of zeros. 0 if no length is promised.
    pub atomic: u32,
}

impl Geometry {
    /// A disk of memory: any request, any length.
    pub fn new(size: u64) -> Geometry {
        Geometry {
            size,
            min_block: 1,
            preferred_block: 4096,
            max_len: NO_LIMIT,
            ops: Ops::NONE,
            needs_flush: false,
            rotational: false,
            read_only: false,
            volatile: false,
            forgetful: false,
            atomic: 0,
        }
    }

    /// The same as what an element above sees that makes no demands of its own.
    pub fn above(self) -> Geometry {
        Geometry { min_block: 1, max_len: NO_LIMIT, atomic: self.atomic.min(self.max_len), ..self }
    }

    /// How much can be written at once, all or nothing, by whoever stands above: what is read and written to
    /// complete blocks counts, too. In bytes, [`MAX_REQUEST`] at the most.
    pub fn reach(&self) -> u64 {
        let around = if self.min_block > 1 { 2 * u64::from(self.min_block) } else { 0 };
        u64::from(self.above().atomic.min(MAX_REQUEST)).saturating_sub(around)
    }

    /// What two disks side by side or in a row have in common: their size is the caller's business.
    pub fn meet(self, other: Geometry) -> Geometry {
        Geometry {
            size: self.size,
            min_block: self.min_block.max(other.min_block),
            preferred_block: self.preferred_block.max(other.preferred_block),
            max_len: self.max_len.min(other.max_len),
            ops: self.ops.and(other.ops),
            needs_flush: self.needs_flush || other.needs_flush,
            rotational: self.rotational || other.rotational,
            read_only: self.read_only || other.read_only,
            volatile: self.volatile || other.volatile,
            forgetful: self.forgetful || other.forgetful,
            atomic: self.atomic.min(other.atomic),
        }
    }
}

/// A `max_len` that limits nothing: the largest request is far below.
pub const NO_LIMIT: u32 = 1 << 31;

/// The largest request that a source admits, in bytes.
pub const MAX_REQUEST: u32 = 64 << 20;

/// A set of optional operations. Read, Write, Flush and Control need no mention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ops {
    /// Space is given back.
    pub discard: bool,
    /// Zeros without sending them.
    pub write_zeroes: bool,
    /// ... and faster than sending them, so that `FAST_ONLY` succeeds.
    pub fast_zero: bool,
    /// A hint is of use.
    pub cache: bool,
    /// Allocation is known.
    pub extents: bool,
}

impl Ops {
    /// None of them.
    pub const NONE: Ops =
        Ops { discard: false, write_zeroes: false, fast_zero: false, cache: false, extents: false };
    /// All of them.
    pub const ALL: Ops =
        Ops { discard: true, write_zeroes: true, fast_zero: true, cache: true, extents: true };

    fn and(self, other: Ops) -> Ops {
        Ops {
            discard: self.discard && other.discard,
            write_zeroes: self.write_zeroes && other.write_zeroes,
            fast_zero: self.fast_zero && other.fast_zero,
            cache: self.cache && other.cache,
            extents: self.extents && other.extents,
        }
    }

    /// True if `op` is done at little cost.
    pub fn has(self, op: Op) -> bool {
        match op {
            Op::Read | Op::Write | Op::Flush | Op::Control => true,
            Op::Discard => self.discard,
            Op::WriteZeroes => self.write_zeroes,
            Op::Cache => self.cache,
            Op::Extents => self.extents,
        }
    }
}
