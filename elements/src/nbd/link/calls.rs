//! Requests in flight on one connection, and their replies as far as they have come.

use super::fence::Fence;
use super::losses::Losses;
use crate::nbd::meta::StatusChunk;
use crate::nbd::wire::{Chunk, ChunkType, Command, CommandFlags, ErrorCode, RequestHeader, decode_error};
use blockmason::{Answer, Data, Errno, Error, Extent, ExtentState, Kind, PoolBuf, Reply};
use std::collections::VecDeque;
use std::ops::Range;
use std::task::Waker;
use std::time::Duration;
use tokio::time::Instant;

/// A read of at least so many bytes has its bytes received right where they belong.
const LARGE: u64 = 32 << 10;

/// The most chunks in a reply: a few, and one for each so many bytes that were asked for. Servers cut
/// no finer than their blocks.
const CHUNKS: u64 = 16;
const CHUNK_BYTES: u64 = 512;

/// The most extents that are kept of one reply; whoever wants more asks again behind them.
const MAX_EXTENTS: usize = 1 << 16;

/// What a request asks for.
pub(super) struct Wanted {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) len: u64,
    /// A write's payload, not foreign.
    pub(super) data: Data,
}

impl Wanted {
    pub(super) fn flush() -> Wanted {
        let (command, flags) = (Command::FLUSH, CommandFlags::NONE);
        Wanted { command, flags, offset: 0, len: 0, data: Data::empty() }
    }

    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }

    pub(super) fn is_change(&self) -> bool {
        matches!(self.command, Command::WRITE | Command::WRITE_ZEROES | Command::TRIM)
    }
}

/// A request in flight.
pub(super) struct Call {
    pub(super) wanted: Wanted,
    /// Its place in the order of submission.
    order: u64,
    /// What replies call it, once it was sent on the connection that there is.
    cookie: Option<u64>,
    sent: Option<Instant>,
    /// Since when it waits for the server to come back.
    waits: Option<Instant>,
    /// Its place in the fence, once it is replayed.
    pub(super) fence: Option<u64>,
    reply: Partial,
    outcome: Option<Reply>,
    waker: Option<Waker>,
    /// Nobody waits for the outcome any more.
    abandoned: bool,
}

/// What has come of a reply.
#[derive(Default)]
struct Partial {
    chunks: u64,
    /// As long as the read; only the pieces of it that `pieces` names are filled.
    buffer: Option<PoolBuf>,
    /// Start, length, and whether it is a hole, in the order of arrival.
    pieces: Vec<(u32, u32, bool)>,
    extents: Vec<Extent>,
    error: Option<Error>,
}

/// What is wrong with a server's reply. The connection must be dropped.
#[derive(Debug)]
pub(super) struct Bad(pub(super) &'static str);

/// The requests in flight on one connection, by slot.
#[derive(Default)]
pub(super) struct Calls {
    slots: Vec<Option<Call>>,
    free: Vec<u32>,
    /// Slots to be sent, in the order of submission.
    pub(super) unsent: VecDeque<u32>,
    next_order: u64,
    next_cookie: u32,
    /// Requests without an outcome.
    unanswered: usize,
    /// Large reads without an outcome.
    large: usize,
    /// Replies of the server so far.
    pub(super) answered: u64,
    /// Changes that were done and need a flush, since somebody has taken note of that.
    pub(super) unflushed: u64,
}

impl Calls {
    pub(super) fn insert(&mut self, wanted: Wanted, waits: Option<Instant>) -> u32 {
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        self.unanswered += 1;
        self.large += usize::from(wanted.command == Command::READ && wanted.len >= LARGE);
        let call = Call {
            wanted,
            order: self.next_order,
            cookie: None,
            sent: None,
            waits,
            fence: None,
            reply: Partial::default(),
            outcome: None,
            waker: None,
            abandoned: false,
        };
        self.next_order += 1;
        match self.slots.get_mut(slot as usize) {
            Some(free) => *free = Some(call),
            None => self.slots.push(Some(call)),
        }
        self.unsent.push_back(slot);
        slot
    }

    /// The call in a slot that is known to be in use.
    pub(super) fn call(&mut self, slot: u32) -> Option<&mut Call> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    /// True if every request has its outcome.
    pub(super) fn is_idle(&self) -> bool {
        self.unanswered == 0
    }

    /// True if large reads are in flight.
    pub(super) fn reads_large(&self) -> bool {
        self.large > 0
    }

    /// Gives a call that is about to be sent its name on the wire.
    pub(super) fn mark_sent(&mut self, slot: u32, now: Option<Instant>) -> Option<RequestHeader> {
        // With the slot come numbers that do not soon repeat: a reply that comes twice is noticed.
        let cookie = u64::from(self.next_cookie) << 32 | u64::from(slot);
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let call = self.call(slot)?;
        (call.cookie, call.sent) = (Some(cookie), now);
        let Wanted { command, flags, offset, len, .. } = call.wanted;
        Some(RequestHeader { flags, command, cookie, offset, len })
    }

    /// The slot that a reply is for.
    pub(super) fn find(&mut self, cookie: u64) -> Result<u32, Bad> {
        let slot = cookie as u32;
        match self.call(slot) {
            Some(call) if call.cookie == Some(cookie) && call.outcome.is_none() => Ok(slot),
            _ => Err(Bad("a reply to nothing that was asked")),
        }
    }

    /// The outcome of a call, if it has one; its slot is then free. Else `waker` will be woken.
    pub(super) fn poll(&mut self, slot: u32, waker: &Waker) -> Option<Reply> {
        let call = self.call(slot)?;
        let Some(outcome) = call.outcome.take() else {
            call.waker = Some(waker.clone());
            return None;
        };
        self.release(slot);
        Some(outcome)
    }

    /// Nobody waits for this call any more. It is in flight all the same.
    pub(super) fn abandon(&mut self, slot: u32) {
        if let Some(call) = self.call(slot) {
            (call.abandoned, call.waker) = (true, None);
            if call.outcome.is_some() {
                self.release(slot);
            }
        }
    }

    fn release(&mut self, slot: u32) {
        self.slots[slot as usize] = None;
        self.free.push(slot);
    }

    /// Ends a call.
    pub(super) fn finish(&mut self, slot: u32, outcome: Reply, fence: &Fence) {
        let Some(call) = self.call(slot) else { return };
        call.reply = Partial::default();
        call.cookie = None;
        let unflushed = outcome.is_ok() && Losses::needs_flush(&call.wanted);
        call.outcome = Some(outcome);
        let large = call.wanted.command == Command::READ && call.wanted.len >= LARGE;
        let (waker, entered, abandoned) = (call.waker.take(), call.fence.take(), call.abandoned);
        self.unanswered -= 1;
        self.unflushed += u64::from(unflushed);
        self.large -= usize::from(large);
        if let Some(id) = entered {
            fence.leave(id);
        }
        if abandoned {
            self.release(slot);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The connection is gone: everything without an outcome is to be sent again, in order, changes
    /// that may have been done already behind the fence.
    pub(super) fn interrupt(&mut self, since: Instant, fence: &Fence) {
        let mut unsent: Vec<(u64, u32)> = Vec::new();
        for (slot, call) in self.slots.iter_mut().enumerate() {
            if let Some(call) = call.as_mut().filter(|call| call.outcome.is_none()) {
                unsent.push((call.order, slot as u32));
                call.waits.get_or_insert(since);
            }
        }
        unsent.sort_unstable();
        for (_, slot) in &unsent {
            let Some(call) = self.call(*slot) else { continue };
            call.reply = Partial::default();
            let sent = call.cookie.take().is_some();
            if sent && call.fence.is_none() && call.wanted.is_change() {
                call.fence = Some(fence.enter(call.wanted.range()));
            }
        }
        self.unsent = unsent.into_iter().map(|(_, slot)| slot).collect();
    }

    /// Fails what has waited for the server for `patience` or longer. Only without a connection.
    pub(super) fn expire(&mut self, now: Instant, patience: Duration, error: &Error, fence: &Fence) {
        let over = |call: &Call| call.waits.is_some_and(|since| now >= since + patience);
        for slot in 0..self.slots.len() as u32 {
            if self.call(slot).is_some_and(|call| call.outcome.is_none() && over(call)) {
                self.finish(slot, Err(error.clone()), fence);
            }
        }
        let slots = &self.slots;
        let open = |slot: &u32| slots[*slot as usize].as_ref().is_some_and(|call| call.outcome.is_none());
        self.unsent.retain(open);
    }

    /// When the request was sent that has been without an answer for the longest.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let waiting = self.slots.iter().flatten().filter(|call| call.cookie.is_some());
        waiting.filter_map(|call| call.sent).min()
    }

    /// Takes a simple reply. Some if data follows: that of a whole read.
    pub(super) fn simple(
        &mut self,
        slot: u32,
        code: ErrorCode,
        structured: bool,
        fence: &Fence,
    ) -> Result<bool, Bad> {
        let call = self.call(slot).ok_or(Bad("a reply to nothing that was asked"))?;
        let command = call.wanted.command;
        let outcome = match error_of(code, "")? {
            Some(error) => Err(error),
            None if structured && matches!(command, Command::READ | Command::BLOCK_STATUS) => {
                return Err(Bad("a simple reply where a structured one is due"));
            }
            None if command == Command::READ => return Ok(true),
            None => Ok(Answer::Done),
        };
        self.answered += 1;
        self.finish(slot, outcome, fence);
        Ok(false)
    }

    /// Counts and checks a chunk before its payload is read.
    pub(super) fn chunk(&mut self, slot: u32, chunk: &Chunk, extended: bool) -> Result<(), Bad> {
        let call = self.call(slot).ok_or(Bad("a reply to nothing that was asked"))?;
        let Wanted { command, offset, len, .. } = call.wanted;
        let is_read = command == Command::READ;
        let max_data = if is_read { len as u32 } else { 0 };
        chunk.check(extended, max_data).map_err(|bad| Bad(bad.0))?;
        if extended && chunk.offset != offset {
            return Err(Bad("a chunk that names another offset than its request"));
        }
        let fits = match chunk.kind {
            ChunkType::OFFSET_DATA | ChunkType::OFFSET_HOLE => is_read,
            ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT => command == Command::BLOCK_STATUS,
            _ => true,
        };
        if !fits {
            return Err(Bad("a chunk that does not suit its request"));
        }
        let most = CHUNKS + if is_read { len / CHUNK_BYTES } else { 0 };
        if call.reply.chunks >= most {
            return Err(Bad("a reply in too many chunks"));
        }
        Ok(())
    }

    /// The next piece of a read: `len` bytes at the disk's `offset`, to be filled at the place that is
    /// returned, or a hole. Returns where in the read it starts.
    pub(super) fn piece(&mut self, slot: u32, offset: u64, len: u64, hole: bool) -> Result<usize, Bad> {
        let call = self.call(slot).ok_or(Bad("a reply to nothing that was asked"))?;
        let outside = Bad("a chunk that reaches beyond its request");
        let at = offset.checked_sub(call.wanted.offset).ok_or(Bad(outside.0))?;
        if at.checked_add(len).is_none_or(|end| end > call.wanted.len) {
            return Err(outside);
        }
        let (whole, reply) = (call.wanted.len as usize, &mut call.reply);
        if !hole {
            reply.buffer.get_or_insert_with(|| PoolBuf::new(whole));
        }
        match reply.pieces.last_mut() {
            Some((start, last, kind)) if u64::from(*start + *last) == at && *kind == hole => {
                *last += len as u32;
            }
            _ => reply.pieces.push((at as u32, len as u32, hole)),
        }
        Ok(at as usize)
    }

    /// The place of bytes of a read that [`piece`](Self::piece) has returned.
    pub(super) fn place(&mut self, slot: u32, range: Range<usize>) -> &mut [u8] {
        let buffer = self.call(slot).and_then(|call| call.reply.buffer.as_mut());
        buffer.map_or(&mut [], |buffer| &mut buffer[range])
    }

    /// Takes the payload of a chunk that is neither data nor a hole.
    pub(super) fn payload(
        &mut self,
        slot: u32,
        chunk: &Chunk,
        payload: &[u8],
        context: Option<u32>,
    ) -> Result<(), Bad> {
        let call = self.call(slot).ok_or(Bad("a reply to nothing that was asked"))?;
        if chunk.kind.is_error() {
            let error = decode_error(chunk.kind, payload).map_err(|bad| Bad(bad.0))?;
            let error = error_of(error.error, error.message)?;
            call.reply.error = call.reply.error.take().or(error);
        } else if matches!(chunk.kind, ChunkType::BLOCK_STATUS | ChunkType::BLOCK_STATUS_EXT) {
            let status = StatusChunk::parse(chunk.kind, payload).map_err(|bad| Bad(bad.0))?;
            if Some(status.context) != context || !call.reply.extents.is_empty() {
                return Err(Bad("block status of a context that was not asked for, or twice"));
            }
            call.reply.extents = extents_of(&status, call.wanted.len);
        }
        Ok(())
    }

    /// A chunk has come in full; if it was the last, so has the reply.
    pub(super) fn end_chunk(&mut self, slot: u32, done: bool, fence: &Fence) -> Result<(), Bad> {
        let call = self.call(slot).ok_or(Bad("a reply to nothing that was asked"))?;
        call.reply.chunks += 1;
        if !done {
            return Ok(());
        }
        let reply = std::mem::take(&mut call.reply);
        let outcome = match (reply.error, call.wanted.command) {
            (Some(error), _) => Err(error),
            (None, Command::READ) => {
                let data = assemble(reply.buffer, reply.pieces, call.wanted.len);
                Ok(Answer::Data(data.ok_or(Bad("a read whose chunks overlap or leave a gap"))?))
            }
            (None, Command::BLOCK_STATUS) if reply.extents.is_empty() => {
                return Err(Bad("block status that says nothing"));
            }
            (None, Command::BLOCK_STATUS) => Ok(Answer::Extents(reply.extents)),
            (None, _) => Ok(Answer::Done),
        };
        self.answered += 1;
        self.finish(slot, outcome, fence);
        Ok(())
    }
}

/// What a server's code means for whoever asked.
fn error_of(code: ErrorCode, message: &str) -> Result<Option<Error>, Bad> {
    if code == ErrorCode::SHUTDOWN {
        // An order to leave. What is in flight goes to whoever serves next.
        return Err(Bad("the server is shutting down"));
    }
    let Some(errno) = code.errno() else { return Ok(None) };
    let words: String = message.chars().filter(|letter| !letter.is_control()).collect();
    let message = if words.is_empty() { code.to_string() } else { format!("{code}: {words}") };
    let error = match errno {
        Errno::IO => Error::new(Kind::Io, format!("the server says {message}")),
        errno => Error::os(errno, format!("the server says {message}")),
    };
    Ok(Some(error))
}

/// A read's bytes, if its pieces cover it exactly once.
fn assemble(buffer: Option<PoolBuf>, mut pieces: Vec<(u32, u32, bool)>, len: u64) -> Option<Data> {
    pieces.sort_unstable();
    let mut end = 0;
    for (start, len, _) in &pieces {
        if u64::from(*start) != end {
            return None;
        }
        end += u64::from(*len);
    }
    if end != len {
        return None;
    }
    let whole = buffer.map(PoolBuf::freeze).unwrap_or_default();
    if let [(_, _, false)] = pieces[..] {
        return Some(whole);
    }
    Some(Data::concat(pieces.into_iter().map(|(start, len, hole)| {
        let (start, len) = (start as usize, len as usize);
        if hole { Data::zeros(len) } else { whole.slice(start..start + len) }
    })))
}

/// The extents within `len` bytes.
fn extents_of(status: &StatusChunk<'_>, len: u64) -> Vec<Extent> {
    let mut left = len;
    let cut = status.extents().take(MAX_EXTENTS).map_while(|extent| {
        let taken = extent.len.min(left);
        left -= taken;
        let has = |bit: u32| extent.status & u64::from(bit) != 0;
        let (hole, zero) = (has(crate::nbd::meta::STATE_HOLE), has(crate::nbd::meta::STATE_ZERO));
        (taken > 0).then_some(Extent { len: taken, state: ExtentState { hole, zero, dirty: false } })
    });
    blockmason::request::join_extents(cut.collect())
}
