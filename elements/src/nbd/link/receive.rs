//! Receiving replies: parsed out of one buffer; the bytes of large reads go right where they belong.

use super::calls::{Bad, Calls};
use super::fence::Fence;
use crate::nbd::stream::Stream;
use crate::nbd::wire::{Chunk, ChunkType, Reply, ReplyStyle, be_u64, decode_hole, decode_reply};
use blockmason::PoolBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The buffer that replies are parsed out of, in bytes: a deep queue of small reads in one go.
const BUFFER: usize = 256 << 10;

/// As much of it as is used while large reads are in flight: any header, little of what follows.
const HEADERS: usize = 64;

/// How the replies of a connection look.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    pub(super) style: ReplyStyle,
    /// The id of `base:allocation`, if it was selected.
    pub(super) allocation: Option<u32>,
}

/// What comes next on the wire.
#[derive(Default)]
enum Next {
    #[default]
    Header,
    /// Bytes of a read: so many more, from this place of the read on.
    Data { slot: u32, at: usize, left: usize, done: bool },
    /// The payload of any other chunk, gathered as it comes.
    Payload { slot: u32, chunk: Chunk, bytes: Vec<u8> },
}

#[derive(Default)]
pub(super) struct Receiver {
    /// Taken while there is something to parse: idle connections hold no memory.
    buffer: Option<PoolBuf>,
    start: usize,
    end: usize,
    next: Next,
}

fn io(error: &std::io::Error) -> String {
    format!("the connection failed: {error}")
}

impl Receiver {
    /// Takes in all that is here. Ready only with what is wrong.
    pub(super) fn poll<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Stream<S>>,
        manner: Manner,
        calls: &mut Calls,
        fence: &Fence,
        task: &mut Context<'_>,
    ) -> Poll<String> {
        loop {
            match self.step(manner, calls, fence) {
                Ok(true) => continue,
                Ok(false) => {}
                Err(Bad(what)) => return Poll::Ready(what.to_owned()),
            }
            let received = match &mut self.next {
                Next::Data { slot, at, left, .. } => {
                    let mut target = ReadBuf::new(calls.place(*slot, *at..*at + *left));
                    let result = ready!(socket.as_mut().poll_read(task, &mut target));
                    let n = target.filled().len();
                    (*at, *left) = (*at + n, *left - n);
                    result.map(|()| n)
                }
                _ => ready!(self.poll_fill(socket.as_mut(), calls.reads_large(), task)),
            };
            match received {
                Ok(0) => return Poll::Ready("the server hung up".to_owned()),
                Ok(_) => {}
                Err(error) => return Poll::Ready(io(&error)),
            }
        }
    }

    fn buffered(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[self.start..self.end])
    }

    /// Uses what is in the buffer. False if more is needed.
    fn step(&mut self, manner: Manner, calls: &mut Calls, fence: &Fence) -> Result<bool, Bad> {
        match std::mem::take(&mut self.next) {
            Next::Header => self.header(manner, calls, fence),
            Next::Data { slot, at, left, done } => {
                let n = left.min(self.end - self.start);
                calls.place(slot, at..at + n).copy_from_slice(&self.buffered()[..n]);
                self.start += n;
                if n < left {
                    self.next = Next::Data { slot, at: at + n, left: left - n, done };
                    return Ok(false);
                }
                calls.end_chunk(slot, done, fence)?;
                Ok(true)
            }
            Next::Payload { slot, chunk, mut bytes } => {
                let n = (chunk.len as usize - bytes.len()).min(self.end - self.start);
                bytes.extend_from_slice(&self.buffered()[..n]);
                self.start += n;
                if bytes.len() < chunk.len as usize {
                    self.next = Next::Payload { slot, chunk, bytes };
                    return Ok(false);
                }
                if chunk.kind == ChunkType::OFFSET_HOLE {
                    let (offset, len) = decode_hole(&bytes).map_err(|bad| Bad(bad.0))?;
                    calls.piece(slot, offset, u64::from(len), true)?;
                } else {
                    calls.payload(slot, &chunk, &bytes, manner.allocation)?;
                }
                calls.end_chunk(slot, chunk.is_done(), fence)?;
                Ok(true)
            }
        }
    }

    /// Takes the header at the front of the buffer.
    fn header(&mut self, manner: Manner, calls: &mut Calls, fence: &Fence) -> Result<bool, Bad> {
        let bytes = self.buffered();
        let decoded =
            decode_reply(manner.style, bytes).map_err(|_| Bad("no NBD reply: a bad magic number"))?;
        let Some((reply, used)) = decoded else { return Ok(false) };
        match reply {
            Reply::Simple { error, cookie } => {
                self.start += used;
                let slot = calls.find(cookie)?;
                let structured = manner.style != ReplyStyle::Simple;
                if calls.simple(slot, error, structured, fence)? {
                    let range = calls.call(slot).map_or(0..0, |call| call.wanted.range());
                    calls.piece(slot, range.start, range.end - range.start, false)?;
                    let left = (range.end - range.start) as usize;
                    self.next = Next::Data { slot, at: 0, left, done: true };
                }
            }
            Reply::Chunk(chunk) => {
                let slot = calls.find(chunk.cookie)?;
                calls.chunk(slot, &chunk, manner.style == ReplyStyle::Extended)?;
                if chunk.kind == ChunkType::OFFSET_DATA {
                    let Some(offset) = bytes.get(used..used + 8) else { return Ok(false) };
                    let (offset, len) = (be_u64(offset, 0), chunk.len - 8);
                    self.start += used + 8;
                    let at = calls.piece(slot, offset, len, false)?;
                    self.next = Next::Data { slot, at, left: len as usize, done: chunk.is_done() };
                } else {
                    self.start += used;
                    self.next = Next::Payload { slot, chunk, bytes: Vec::new() };
                }
            }
        }
        Ok(true)
    }

    /// Reads what is there into the buffer. 0 is the end.
    fn poll_fill<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        socket: Pin<&mut Stream<S>>,
        sparing: bool,
        task: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        let buffer = self.buffer.get_or_insert_with(|| PoolBuf::new(BUFFER));
        // Less than a header is left.
        buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let room = if sparing { HEADERS } else { BUFFER };
        let mut target = ReadBuf::new(&mut buffer[self.end..room]);
        let result = match socket.poll_read(task, &mut target) {
            Poll::Pending => {
                if self.end == 0 {
                    self.buffer = None;
                }
                return Poll::Pending;
            }
            Poll::Ready(result) => result,
        };
        let n = target.filled().len();
        self.end += n;
        Poll::Ready(result.map(|()| n))
    }
}
