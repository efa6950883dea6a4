//! One request in flight: the rules its reply must keep, chunk by chunk, and what the reply amounts to.

use crate::coverage::Coverage;
use crate::session::Mode;
use crate::stop::{Check, Notes, ensure, fail};
use crate::wire::{self, In, cf, chunk, cmd, errno};

/// The most descriptors a server should put in one status chunk.
const STATUS_SHOULD_MAX: usize = 1 << 20;
/// The most chunks of one reply: enough for a read of `DATA_MAX` in pieces of 512 bytes.
const CHUNKS_MAX: usize = 1 << 18;
/// The most error chunks of one reply.
const ERRORS_MAX: usize = 1 << 10;
/// The longest read whose data is received and kept, in bytes; no test needs a longer one to succeed.
pub(crate) const DATA_MAX: u64 = 1 << 26;

/// A request that waits for its reply.
pub(crate) struct Pending {
    pub(crate) command: u16,
    pub(crate) flags: u16,
    pub(crate) offset: u64,
    /// The length of the range the command works on, in bytes.
    pub(crate) effect: u64,
    /// The metadata contexts a status reply must describe.
    pub(crate) contexts: Vec<u32>,
    reply: Reply,
    coverage: Coverage,
    error_offsets: Vec<u64>,
    chunks: usize,
    errors: usize,
}

/// A finished reply.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    /// The first error value, zero for success.
    pub(crate) error: u32,
    /// The data of a read, holes as zeroes.
    pub(crate) data: Vec<u8>,
    /// The number of content chunks.
    pub(crate) contents: usize,
    /// Per status chunk its context and extents: length in bytes and flags.
    pub(crate) statuses: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Reply {
    /// Fails unless the reply is a success.
    pub(crate) fn ok(self, what: &str) -> Check<Self> {
        match self.error {
            0 => Ok(self),
            error => fail(format!("{what} failed with {}", errno::name(error))),
        }
    }
}

impl Pending {
    pub(crate) fn new(command: u16, flags: u16, offset: u64, effect: u64, contexts: Vec<u32>) -> Self {
        let (reply, coverage) = (Reply::default(), Coverage::default());
        Self {
            command,
            flags,
            offset,
            effect,
            contexts,
            reply,
            coverage,
            error_offsets: Vec::new(),
            chunks: 0,
            errors: 0,
        }
    }

    /// The longest payload a chunk of the reply may have.
    pub(crate) fn payload_max(&self, kind: u16) -> u64 {
        const ERROR_MAX: u64 = 1 << 16;
        match kind {
            chunk::OFFSET_DATA => self.effect.min(DATA_MAX) + 8,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => 1 << 25,
            _ => ERROR_MAX,
        }
    }

    fn say(&self, text: impl std::fmt::Display) -> String {
        format!("{} {}+{}: {text}", cmd::name(self.command), self.offset, self.effect)
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.effect)
    }

    /// Takes a chunk; true when it was the last one.
    pub(crate) fn take(
        &mut self,
        flags: u16,
        kind: u16,
        data: &[u8],
        mode: Mode,
        notes: &Notes,
    ) -> Check<bool> {
        if flags & !chunk::DONE != 0 {
            notes.add(format!("a chunk has unknown reply flags {flags:#x}"));
        }
        let done = flags & chunk::DONE != 0;
        self.chunks += 1;
        ensure(self.chunks <= CHUNKS_MAX, || self.say("chunks without end"))?;
        match kind {
            chunk::NONE => {
                ensure(data.is_empty(), || self.say("a NONE chunk has a payload"))?;
                ensure(done, || self.say("a NONE chunk without the DONE flag"))?;
            }
            chunk::OFFSET_DATA => self.take_data(data)?,
            chunk::OFFSET_HOLE => self.take_hole(data)?,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => self.take_status(kind, data, mode, notes)?,
            kind if kind & chunk::ERROR_BIT != 0 => self.take_error(kind, data, notes)?,
            kind => return fail(self.say(format_args!("a chunk of unknown type {kind}"))),
        }
        Ok(done)
    }

    fn content(&mut self, start: u64, len: u64) -> Check {
        let end = start.saturating_add(len);
        ensure(self.command == cmd::READ, || self.say("a content chunk, which only READ may get"))?;
        ensure(start >= self.offset && end <= self.end(), || {
            self.say(format_args!("a content chunk {start}..{end} outside the request"))
        })?;
        ensure(self.coverage.add(start, end), || {
            self.say(format_args!("a content chunk {start}..{end} overlaps an earlier one"))
        })?;
        let after_error = self.error_offsets.iter().any(|offset| (start..end).contains(offset));
        ensure(!after_error, || self.say("a content chunk covers the offset of an earlier error chunk"))?;
        self.reply.contents += 1;
        ensure(self.reply.contents == 1 || self.flags & cf::DF == 0, || {
            self.say("more than one content chunk despite the DF flag")
        })
    }

    fn take_data(&mut self, data: &[u8]) -> Check {
        ensure(data.len() >= 9, || self.say(format_args!("an OFFSET_DATA chunk of {} bytes", data.len())))?;
        let mut input = In(data);
        let start = input.u64().unwrap_or(0);
        let bytes = input.rest();
        self.content(start, bytes.len() as u64)?;
        self.put(start, bytes.len(), Some(bytes));
        Ok(())
    }

    fn take_hole(&mut self, data: &[u8]) -> Check {
        ensure(data.len() == 12, || self.say(format_args!("an OFFSET_HOLE chunk of {} bytes", data.len())))?;
        let mut input = In(data);
        let (start, len) = (input.u64().unwrap_or(0), input.u32().unwrap_or(0));
        ensure(len != 0, || self.say("a hole of no bytes"))?;
        self.content(start, u64::from(len))?;
        self.put(start, len as usize, None);
        Ok(())
    }

    /// Puts content at its place; `content` has shown that it lies within the request.
    fn put(&mut self, start: u64, len: usize, bytes: Option<&[u8]>) {
        if self.effect > DATA_MAX {
            return;
        }
        let at = (start - self.offset) as usize;
        if self.reply.data.len() < at + len {
            self.reply.data.resize(at + len, 0);
        }
        match bytes {
            Some(bytes) => self.reply.data[at..at + len].copy_from_slice(bytes),
            None => self.reply.data[at..at + len].fill(0),
        }
    }

    fn take_status(&mut self, kind: u16, data: &[u8], mode: Mode, notes: &Notes) -> Check {
        let extended = mode == Mode::Extended;
        let fits = (kind == chunk::BLOCK_STATUS_EXT) == extended;
        ensure(fits, || self.say(format_args!("a status chunk of type {kind} in {mode:?} mode")))?;
        ensure(self.command == cmd::BLOCK_STATUS, || self.say("a status chunk, for BLOCK_STATUS only"))?;
        let (head, size) = if extended { (8, 16) } else { (4, 8) };
        ensure(data.len() >= head + size && (data.len() - head).is_multiple_of(size), || {
            self.say(format_args!("a status chunk of {} bytes", data.len()))
        })?;
        let mut input = In(data);
        let id = input.u32().unwrap_or(0);
        let count = (data.len() - head) / size;
        if extended {
            let claimed = input.u32().unwrap_or(0);
            ensure(claimed as usize == count, || {
                self.say(format_args!("a status chunk claims {claimed} descriptors and has {count}"))
            })?;
        }
        if count > STATUS_SHOULD_MAX {
            notes.add(format!("a status chunk has {count} descriptors, more than 2^20"));
        }
        ensure(self.contexts.contains(&id), || {
            self.say(format_args!("status for context {id}, not asked for"))
        })?;
        let again = self.reply.statuses.iter().any(|(other, _)| *other == id);
        ensure(!again, || self.say(format_args!("a second status chunk for context {id}")))?;
        let extents = self.extents(input, count, extended)?;
        self.reply.statuses.push((id, extents));
        Ok(())
    }

    fn extents(&self, mut input: In<'_>, count: usize, extended: bool) -> Check<Vec<(u64, u64)>> {
        let one = self.flags & cf::REQ_ONE != 0;
        ensure(!one || count == 1, || self.say(format_args!("{count} descriptors despite REQ_ONE")))?;
        let mut extents = Vec::new();
        let mut sum = 0u64;
        for _ in 0..count {
            ensure(sum < self.effect || extents.is_empty(), || {
                self.say("the descriptors before the last cover the whole request already")
            })?;
            let mut next = || if extended { input.u64() } else { input.u32().map(u64::from) };
            let (len, flags) = (next().unwrap_or(0), next().unwrap_or(0));
            ensure(len != 0, || self.say("a status descriptor of no bytes"))?;
            sum = sum.saturating_add(len);
            extents.push((len, flags));
        }
        ensure(!one || sum <= self.effect, || {
            self.say(format_args!("REQ_ONE got a descriptor of {sum} bytes"))
        })?;
        Ok(extents)
    }

    fn take_error(&mut self, kind: u16, data: &[u8], notes: &Notes) -> Check {
        self.errors += 1;
        ensure(self.errors <= ERRORS_MAX, || self.say("error chunks without end"))?;
        let mut input = In(data);
        let (error, len) = (input.u32(), input.u16().unwrap_or(0));
        let least = if kind == chunk::ERROR_OFFSET { 14 } else { 6 };
        ensure(data.len() >= least, || self.say(format_args!("an error chunk of {} bytes", data.len())))?;
        let Some(text) = input.bytes(usize::from(len)) else {
            return fail(self.say("the text of an error chunk is longer than the chunk"));
        };
        if let Some(fault) = wire::string_fault(text) {
            return fail(self.say(format_args!("the text of an error chunk {fault}")));
        }
        if kind == chunk::ERROR_OFFSET {
            let Some(offset) = input.u64() else {
                return fail(self.say("an ERROR_OFFSET chunk without offset"));
            };
            let inside = (self.offset..self.end()).contains(&offset);
            ensure(inside, || self.say(format_args!("an error at {offset}, outside the request")))?;
            self.error_offsets.push(offset);
        }
        self.fails_with(error.unwrap_or(0), notes)
    }

    /// Notes the error value of a chunk or a simple reply.
    pub(crate) fn fails_with(&mut self, error: u32, notes: &Notes) -> Check {
        ensure(error != 0, || self.say("an error chunk with error 0"))?;
        if !errno::KNOWN.contains(&error) {
            notes.add(format!("error value {error} is not one of the protocol"));
        }
        if self.reply.error == 0 {
            self.reply.error = error;
        }
        Ok(())
    }

    /// Takes the payload of a successful simple reply to a read.
    pub(crate) fn simple_data(&mut self, data: Vec<u8>) {
        self.reply.data = data;
    }

    /// The reply as a whole, after its last chunk.
    pub(crate) fn finish(mut self, cookie: u64, chunks: bool) -> Check<Reply> {
        self.reply.cookie = cookie;
        if self.reply.error == errno::EOVERFLOW && self.flags & cf::DF != 0 {
            ensure(self.reply.contents == 0, || self.say("EOVERFLOW for DF with a content chunk"))?;
        }
        if self.reply.error != 0 || !chunks {
            return Ok(self.reply);
        }
        if self.command == cmd::READ {
            ensure(self.coverage.covers(self.offset, self.end()), || {
                self.say("success, but the content chunks leave bytes out")
            })?;
        }
        if self.command == cmd::BLOCK_STATUS {
            let missing =
                self.contexts.iter().find(|id| !self.reply.statuses.iter().any(|(got, _)| got == *id));
            ensure(missing.is_none(), || {
                self.say(format_args!("success without status for context {missing:?}"))
            })?;
        }
        Ok(self.reply)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Out;

    fn read(flags: u16) -> Pending {
        Pending::new(cmd::READ, flags, 1000, 20, vec![])
    }

    fn feed(pending: &mut Pending, flags: u16, kind: u16, data: Vec<u8>) -> Check<bool> {
        pending.take(flags, kind, &data, Mode::Structured, &Notes::default())
    }

    fn data(offset: u64, len: usize) -> Vec<u8> {
        Out::new().u64(offset).bytes(&vec![7; len]).done()
    }

    #[test]
    fn chunks_out_of_order_make_one_reply() {
        let mut pending = read(0);
        let hole = Out::new().u64(1000).u32(5).done();
        assert_eq!(feed(&mut pending, 0, chunk::OFFSET_DATA, data(1005, 15)), Ok(false));
        assert_eq!(feed(&mut pending, chunk::DONE, chunk::OFFSET_HOLE, hole), Ok(true));
        let reply = pending.finish(1, true).expect("a reply");
        assert_eq!(reply.data, [[0; 5].as_slice(), &[7; 15]].concat());
    }

    #[test]
    fn broken_chunks_are_refused() {
        let bad = [
            (chunk::NONE, vec![]),
            (chunk::NONE, vec![1]),
            (chunk::OFFSET_DATA, data(1000, 0)),
            (chunk::OFFSET_DATA, data(999, 2)),
            (chunk::OFFSET_DATA, data(1019, 2)),
            (chunk::OFFSET_DATA, data(u64::MAX, 2)),
            (chunk::OFFSET_HOLE, Out::new().u64(1000).u32(0).done()),
            (chunk::BLOCK_STATUS, vec![0; 12]),
            (chunk::ERROR_BIT + 1, Out::new().u32(0).u16(0).done()),
            (chunk::ERROR_BIT + 1, Out::new().u32(5).u16(9).done()),
            (chunk::ERROR_OFFSET, Out::new().u32(5).u16(0).u64(1020).done()),
            (77, vec![]),
        ];
        for (kind, payload) in bad {
            assert!(feed(&mut read(0), 0, kind, payload.clone()).is_err(), "{kind} {payload:?}");
        }
    }

    #[test]
    fn overlap_gaps_and_a_broken_promise_of_one_chunk_are_refused() {
        let mut pending = read(0);
        feed(&mut pending, 0, chunk::OFFSET_DATA, data(1000, 10)).expect("the first chunk");
        assert!(feed(&mut pending, 0, chunk::OFFSET_DATA, data(1009, 2)).is_err());
        assert!(pending.finish(1, true).is_err());
        let mut pending = read(cf::DF);
        feed(&mut pending, 0, chunk::OFFSET_DATA, data(1000, 10)).expect("the first chunk");
        assert!(feed(&mut pending, 0, chunk::OFFSET_DATA, data(1010, 10)).is_err());
    }

    #[test]
    fn status_lengths_keep_their_rules() {
        let status = |flags| Pending::new(cmd::BLOCK_STATUS, flags, 0, 100, vec![3]);
        let chunk_of = |id: u32, lens: &[u32]| {
            lens.iter().fold(Out::new().u32(id), |out, &len| out.u32(len).u32(0)).done()
        };
        let try_one = |flags, data| feed(&mut status(flags), chunk::DONE, chunk::BLOCK_STATUS, data);
        assert_eq!(try_one(0, chunk_of(3, &[50, 500])), Ok(true));
        assert_eq!(try_one(0, chunk_of(3, &[500])), Ok(true));
        assert!(try_one(0, chunk_of(3, &[100, 1])).is_err());
        assert!(try_one(0, chunk_of(3, &[0])).is_err());
        assert!(try_one(0, chunk_of(4, &[50])).is_err());
        assert!(try_one(cf::REQ_ONE, chunk_of(3, &[50, 50])).is_err());
        assert!(try_one(cf::REQ_ONE, chunk_of(3, &[101])).is_err());
        assert!(status(0).finish(1, true).is_err());
    }
}
