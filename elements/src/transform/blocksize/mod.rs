//! Makes requests of the size that suits the disk below: whole blocks, no longer than it likes, and small writes
//! joined.
//!
//! That requests come in whole blocks is the framework's work, at the demand of this element, under the ranges of the
//! disk below: so writes that come to it by another way are not lost either. Joining small writes is done here.

mod gather;
#[cfg(test)]
mod tests;

use super::power::Unit;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::lang::value::Time;
use blockmason::lang::{ParamError, Params as Given};
use blockmason::{
    Children, Cx, Demand, Element, Error, Flow, Geometry, Op, Origin, Prepared, Request, Result,
};
use gather::Gathering;
use std::sync::Arc;
use std::time::Duration;

blockmason::params! {
    /// Makes requests of the size that suits the disk below.
    struct Params {
        /// Nothing but whole blocks of so many bytes reaches the disk below: a power of two from 512 to 16M. Without it
        /// blocks are what that disk asks for.
        block: Option<Unit>,
        /// What guests are told to prefer: a power of two from 512 to 16M, not less than `block`. Without it what the disk below
        /// prefers, or `block` if that is more.
        preferred: Option<Unit>,
        /// The longest read or write that reaches the disk below: a power of two from 512 to 16M, not less than `block`.
        maximum: Option<Unit>,
        /// So long a write that is shorter than `preferred` is held for others beside it to come; a second at the most. `0s`
        /// holds none.
        gather: Time = "0s",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "blocksize",
    summary: "requests of the size that suits the disk below: whole blocks, small writes joined",
    doc: "Guests may send what they like, down to a byte. A write of part of a block is completed by what is read from \
          below, and written with it; while that goes on, whoever changes the same block waits, also if it reaches the \
          disk by another way. Requests longer than `maximum` are split. Bytes stay where they are: the element may come and go.\n\n\
          **When to use it.** A disk that says what it takes (`file` with `direct`, most NBD servers, a pool) needs none: every \
          request is made to fit there anyhow. It is for a server that demands whole blocks and does not say so, or is slow with \
          anything else (`block`, `maximum`); for guests that should write in larger pieces (`preferred`); and for many small writes at \
          a time to a far disk (`gather`). Where parts of a block are only dear, and not refused, use `preferred` and `gather` \
          without `block`: reads are rounded to whole blocks, too.\n\n\
          **Gathering.** A guest's write that is shorter than `preferred` is held until what is held of its piece of \
          `preferred` bytes would fill it, until a flush or a write with FUA for the same piece comes, or until `gather` is over; then \
          what lies side by side is one write. It is answered when that is answered and not before, so nothing \
          is promised that is not kept, and a guest that waits for each write waits that much longer: it pays with many at once. FUA \
          holds for all of a joined write. Only what guests write is held, not what elements above write of themselves; nor a \
          request that is traced.\n\n\
          **Zeros, discards.** Zeros are written to what does not fill a block; discards leave it alone. Flags are passed on.\n\n\
          **Ends.** If the size of the disk is no multiple of `block`, the last block is shorter, and reaches the disk below as \
          that.\n\n\
          Of what the disk below writes as a whole or not at all, two blocks are taken off, since completing a write may \
          add as much.",
    family: Family::Transform,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "gather", access: Access::ReadWrite, doc: "how long a small write is held" },
        Handler { name: "waiting", access: Access::Read, doc: "writes that are held now" },
        Handler { name: "gathered", access: Access::Read, doc: "writes that have been held" },
        Handler { name: "joined", access: Access::Read, doc: "writes that they became" },
    ],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:blocksize.sock)\n\
              element Blocks (type blocksize) (block 64k) (gather 2ms)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Blocks -> Disk\n",
    check,
    build: |build: &Build<'_>| Ok(Arc::new(Blocksize::new(&build.read(Params::from)?))),
    ..ElementType::BASE
};

/// The out port.
const OUT: usize = 0;

/// A guest that waits longer for a write takes its disk for dead sooner or later.
const LONGEST: Duration = Duration::from_secs(1);

fn check(given: &Given) -> Result<(), Vec<ParamError>> {
    let params = Params::from(given)?;
    let block = params.block.map_or(0, |block| block.0);
    let least = |name: &str, value: Option<Unit>| {
        let small = value.is_some_and(|value| value.0 < block);
        small.then(|| given.error(name, "it is less than `block`"))
    };
    let long = (params.gather.0 > LONGEST).then(|| given.error("gather", "expected a second at the most"));
    let wrong = [least("preferred", params.preferred), least("maximum", params.maximum), long];
    let wrong: Vec<_> = wrong.into_iter().flatten().collect();
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

struct Blocksize {
    block: u32,
    preferred: Option<u32>,
    maximum: u32,
    gathering: Gathering,
}

/// What one graph makes of it.
struct Place {
    /// Bytes of a piece of the disk whose writes are gathered together, a power of two.
    piece: u64,
}

impl Blocksize {
    fn new(params: &Params) -> Blocksize {
        let bytes = |unit: Unit| unit.0 as u32;
        Blocksize {
            block: params.block.map_or(Demand::NONE.min_block, bytes),
            preferred: params.preferred.map(bytes),
            maximum: params.maximum.map_or(Demand::NONE.max_len, bytes),
            gathering: Gathering::new(params.gather.0),
        }
    }

    /// True if a write may wait for others.
    fn may_wait(&self, req: &Request, piece: u64) -> bool {
        // What is tied to other requests, or traced, has a way of its own.
        req.len > 0
            && req.len < piece
            && req.origin == Origin::Guest
            && req.extra.is_none()
            && self.gathering.is_on()
    }
}

impl Element for Blocksize {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        let block = self.block.max(below.min_block);
        let preferred = self.preferred.unwrap_or(below.preferred_block.max(block));
        let longest = self.maximum.min(below.max_len);
        if preferred < block || longest < block {
            let message = format!(
                "it would prefer {preferred} and send at most {longest} bytes at once, and a block has {block}: set `preferred` and \
                 `maximum` to a block at least, or `block` to what the disk below takes"
            );
            return Err(Error::invalid(message));
        }
        let demand = Demand { min_block: block, max_len: longest & !(block - 1) };
        let fitted = Geometry { min_block: block, max_len: demand.max_len, ..below };
        let geometry =
            Geometry { preferred_block: preferred, atomic: fitted.reach() as u32, ..below.above() };
        let piece = preferred.min(demand.max_len);
        Ok(Prepared::with(geometry, Place { piece: u64::from(piece) }).asking(demand))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Write => {
                let piece = cx.prepared::<Place>().piece;
                match self.may_wait(&req, piece) && (!req.is_fua() || self.gathering.has(&req, piece)) {
                    true => cx.later(&req.clone(), self.gathering.write(req, piece, cx)),
                    false => cx.forward(OUT, req),
                }
            }
            Op::Flush => {
                self.gathering.let_go();
                cx.forward(OUT, req)
            }
            Op::Read | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Extents | Op::Control => {
                cx.forward(OUT, req)
            }
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        self.gathering.get(handler)
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        match (handler, value.parse()) {
            ("gather", Ok(Time(time))) if time <= LONGEST => {
                self.gathering.set(time);
                Ok(())
            }
            ("gather", _) => {
                Err(Error::invalid(format!("expected a second at the most, found `{value:.40}`")))
            }
            _ => Err(Error::no_handler(handler)),
        }
    }
}
