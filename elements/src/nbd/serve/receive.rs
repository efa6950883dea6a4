//! Receiving requests: parsed out of one buffer, payloads into memory of their own.

use super::super::stream::Stream as Socket;
use super::super::wire::{
    Command, ErrorCode, RequestHeader, Rules, decode_request, decode_request_extended, encode_request,
    encode_request_extended,
};
use blockmason::sched::{Budget, Permit};
use blockmason::{Data, Error, PoolBuf, Result, Segment};
use serde::{Deserialize, Serialize};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The buffer that requests are parsed out of, in bytes: a deep queue of small writes in one read.
const BUFFER: usize = 256 << 10;

/// A payload of this size is long, in bytes: the client's next is expected to be too, so that only its
/// header is read into the buffer and the payload straight into memory of its own.
const LONG: u64 = 64 << 10;

/// What is read into the buffer where a long payload is expected, in bytes.
const PEEK: usize = 4 << 10;

/// A payload is received in pieces of this size at the most: memory follows what arrives.
const PIECE: u64 = 1 << 20;

/// The longest payload of a refused request that is read and thrown away; a longer one costs the
/// connection.
const DRAIN: u64 = u32::MAX as u64;

/// What came in.
pub(super) enum Received {
    /// A legal request with its payload.
    Request(RequestHeader, Permit, Data),
    /// An illegal one; its payload has been thrown away.
    Refused(RequestHeader, ErrorCode),
    /// The client leaves.
    Goodbye,
    /// The connection is of no use any more.
    Broken(String),
}

#[derive(Default)]
pub(super) struct Receiver {
    /// Taken while there is something to parse: idle connections hold no memory.
    buffer: Option<PoolBuf>,
    start: usize,
    end: usize,
    partial: Option<Partial>,
    /// What another process has received, and how much of it has been read here; comes before what the
    /// socket has.
    inherited: Option<(Vec<u8>, usize)>,
    /// The last payload was long.
    long: bool,
    moved: u64,
}

/// A request whose payload has not arrived in full.
struct Partial {
    header: RequestHeader,
    permit: Permit,
    pieces: Vec<Data>,
    /// The piece that is being filled, and how far.
    piece: Option<(PoolBuf, usize)>,
    /// Bytes of payload still to come, those of `piece` among them.
    left: u64,
    /// Set if the request is refused and the payload thrown away.
    refused: Option<ErrorCode>,
}

/// A refused request whose payload is being thrown away.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Draining {
    /// The bytes of its header, hexadecimal.
    header: String,
    /// Bytes still to come.
    left: u64,
    /// What the reply will say.
    code: u32,
}

/// Reads what another process has left, then from the socket.
fn poll_read<S: AsyncRead + AsyncWrite + Unpin>(
    inherited: &mut Option<(Vec<u8>, usize)>,
    socket: Pin<&mut Socket<S>>,
    target: &mut ReadBuf<'_>,
    task: &mut Context<'_>,
) -> Poll<std::io::Result<()>> {
    let Some((bytes, done)) = inherited else { return socket.poll_read(task, target) };
    let n = target.remaining().min(bytes.len() - *done);
    target.put_slice(&bytes[*done..*done + n]);
    *done += n;
    if *done == bytes.len() {
        *inherited = None;
    }
    Poll::Ready(Ok(()))
}

/// A header as it came.
fn encoded(header: &RequestHeader, extended: bool) -> Vec<u8> {
    match encode_request(header).filter(|_| !extended) {
        Some(compact) => compact.to_vec(),
        None => encode_request_extended(header).to_vec(),
    }
}

/// Of another process.
impl Receiver {
    /// True if nothing has been received that is not taken up.
    pub(super) fn is_empty(&self) -> bool {
        let partial = self.partial.as_ref().is_some_and(|partial| partial.refused.is_none());
        !partial && self.start == self.end && self.inherited.is_none()
    }

    /// Calls `each` with what has been received and not been taken up, as it came.
    pub(super) fn waiting(&self, extended: bool, mut each: impl FnMut(Segment<'_>)) {
        if let Some(partial) = self.partial.as_ref().filter(|partial| partial.refused.is_none()) {
            each(Segment::Bytes(&encoded(&partial.header, extended)));
            partial.pieces.iter().for_each(|piece| piece.for_each(&mut each));
            if let Some((piece, filled)) = &partial.piece {
                each(Segment::Bytes(&piece[..*filled]));
            }
        }
        if let Some(buffer) = &self.buffer {
            each(Segment::Bytes(&buffer[self.start..self.end]));
        }
        if let Some((bytes, done)) = &self.inherited {
            each(Segment::Bytes(&bytes[*done..]));
        }
    }

    /// The refused request whose payload is being thrown away.
    pub(super) fn draining(&self, extended: bool) -> Option<Draining> {
        let partial = self.partial.as_ref()?;
        let code = partial.refused?;
        let header = encoded(&partial.header, extended).iter().map(|byte| format!("{byte:02x}")).collect();
        Some(Draining { header, left: partial.left, code: code.0 })
    }

    /// Goes on where another process has stopped.
    ///
    /// # Errors
    /// It contradicts itself.
    pub(super) fn resume(
        &mut self,
        bytes: Vec<u8>,
        draining: Option<Draining>,
        extended: bool,
    ) -> Result<()> {
        if !bytes.is_empty() {
            self.inherited = Some((bytes, 0));
        }
        let Some(draining) = draining else { return Ok(()) };
        let damaged = || Error::invalid("a connection was handed over with a request that is none");
        let digit = |at: usize| u8::from_str_radix(draining.header.get(at..at + 2)?, 16).ok();
        let header = (0..draining.header.len().min(64)).step_by(2).map(digit).collect::<Option<Vec<u8>>>();
        let header = header.ok_or_else(damaged)?;
        let header = match extended {
            true => header.as_slice().try_into().ok().and_then(|bytes| decode_request_extended(bytes).ok()),
            false => header.as_slice().try_into().ok().and_then(|bytes| decode_request(bytes).ok()),
        };
        self.partial = Some(Partial {
            header: header.ok_or_else(damaged)?,
            permit: Permit::default(),
            pieces: Vec::new(),
            piece: None,
            left: draining.left.min(DRAIN),
            refused: Some(ErrorCode(draining.code)),
        });
        Ok(())
    }
}

impl Receiver {
    /// Bytes received so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// True if the client owes us bytes of a payload. False while we make it wait for memory.
    pub(super) fn awaits_payload(&self) -> bool {
        self.partial.as_ref().is_some_and(|partial| partial.piece.is_some())
    }

    /// The next request.
    pub(super) fn poll<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Socket<S>>,
        rules: &Rules,
        budget: &Arc<Budget>,
        task: &mut Context<'_>,
    ) -> Poll<Received> {
        loop {
            if self.partial.is_some() {
                return self.poll_payload(socket, budget, task);
            }
            let header = match self.header(rules.extended) {
                Some((Ok(header), used)) => {
                    self.start += used;
                    header
                }
                Some((Err(magic), _)) => return Poll::Ready(Received::Broken(magic)),
                None => match ready!(self.poll_fill(socket.as_mut(), task)) {
                    Ok(0) => return Poll::Ready(Received::Goodbye),
                    Ok(_) => continue,
                    Err(error) => return Poll::Ready(Received::Broken(error.to_string())),
                },
            };
            if header.command == Command::DISC {
                return Poll::Ready(Received::Goodbye);
            }
            let payload = header.payload_len(rules.extended);
            self.long = payload >= LONG;
            let refused = header.check(rules).err();
            if payload > DRAIN {
                return Poll::Ready(Received::Broken(format!("a payload of {payload} bytes")));
            }
            // Only a refused request may announce more than the largest payload: it is not kept.
            let refused = refused.or((payload > u64::from(rules.max_payload)).then_some(ErrorCode::INVAL));
            if payload == 0 && refused.is_some() {
                return Poll::Ready(Received::Refused(header, refused.unwrap_or(ErrorCode::INVAL)));
            }
            self.partial = Some(Partial {
                header,
                permit: Permit::default(),
                pieces: Vec::new(),
                piece: None,
                left: payload,
                refused,
            });
        }
    }

    /// Ready once the client has left, or what it says makes no sense. What it asks for stays where it is; once that fills the
    /// buffer, what the client does after it is not seen.
    pub(super) fn poll_end<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Socket<S>>,
        extended: bool,
        task: &mut Context<'_>,
    ) -> Poll<()> {
        while self.partial.is_none() {
            let asks = match self.header(extended) {
                Some((Ok(header), _)) if header.command != Command::DISC => true,
                Some(_) => return Poll::Ready(()),
                None => false,
            };
            if asks && self.end - self.start >= self.room() {
                break;
            }
            match ready!(self.poll_fill(socket.as_mut(), task)) {
                Ok(1..) => {}
                Ok(0) | Err(_) => return Poll::Ready(()),
            }
        }
        Poll::Pending
    }

    /// The header at the front of the buffer, and its length there.
    fn header(&self, extended: bool) -> Option<(Result<RequestHeader, String>, usize)> {
        let buffer = self.buffer.as_ref()?;
        let bytes = &buffer[self.start..self.end];
        let (header, used) = if extended {
            (decode_request_extended(bytes.first_chunk()?), 32)
        } else {
            (decode_request(bytes.first_chunk()?), 28)
        };
        Some((header.map_err(|magic| magic.to_string()), used))
    }

    /// How much of the buffer is used, in bytes.
    fn room(&self) -> usize {
        if self.long { PEEK } else { BUFFER }
    }

    /// Reads what is there into the buffer, which is not full. 0 is the end.
    fn poll_fill<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        socket: Pin<&mut Socket<S>>,
        task: &mut Context<'_>,
    ) -> Poll<std::io::Result<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            let (start, end) = (self.start, self.end);
            if let Some(buffer) = &mut self.buffer {
                buffer.copy_within(start..end, 0);
            }
            (self.start, self.end) = (0, end - start);
        }
        let room = self.room();
        let buffer = self.buffer.get_or_insert_with(|| PoolBuf::new(BUFFER));
        let mut target = ReadBuf::new(&mut buffer[self.end..room]);
        match poll_read(&mut self.inherited, socket, &mut target, task) {
            Poll::Pending => {
                if self.end == 0 {
                    self.buffer = None;
                }
                Poll::Pending
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Ready(Ok(())) => {
                let n = target.filled().len();
                self.end += n;
                self.moved += n as u64;
                Poll::Ready(Ok(n))
            }
        }
    }

    fn poll_payload<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Socket<S>>,
        budget: &Arc<Budget>,
        task: &mut Context<'_>,
    ) -> Poll<Received> {
        let Some(partial) = &mut self.partial else { return Poll::Pending };
        if partial.refused.is_none() && partial.left == 0 && partial.header.command == Command::READ {
            ready!(budget.poll_grow(&mut partial.permit, partial.header.len, task));
        }
        while partial.left > 0 {
            if partial.piece.is_none() {
                let len = partial.left.min(PIECE);
                if partial.refused.is_none() {
                    ready!(budget.poll_grow(&mut partial.permit, len, task));
                }
                partial.piece = Some((PoolBuf::new(len as usize), 0));
            }
            let Some((piece, filled)) = &mut partial.piece else { continue };
            let mut n = piece.len() - *filled;
            if self.start < self.end {
                n = n.min(self.end - self.start);
                if let Some(buffer) = &self.buffer {
                    piece[*filled..*filled + n].copy_from_slice(&buffer[self.start..self.start + n]);
                }
                self.start += n;
            } else {
                let mut target = ReadBuf::new(&mut piece[*filled..]);
                if let Err(error) = ready!(poll_read(&mut self.inherited, socket.as_mut(), &mut target, task))
                {
                    return Poll::Ready(Received::Broken(error.to_string()));
                }
                n = target.filled().len();
                self.moved += n as u64;
                if n == 0 {
                    return Poll::Ready(Received::Broken("the client left amid a request".to_owned()));
                }
            }
            *filled += n;
            partial.left -= n as u64;
            if *filled == piece.len() {
                let full = partial.piece.take().filter(|_| partial.refused.is_none());
                partial.pieces.extend(full.map(|(piece, _)| piece.freeze()));
            }
        }
        let Some(partial) = self.partial.take() else { return Poll::Pending };
        Poll::Ready(match partial.refused {
            Some(code) => Received::Refused(partial.header, code),
            None => Received::Request(partial.header, partial.permit, Data::concat(partial.pieces)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::{CommandFlags, TransmissionFlags};
    use std::future::poll_fn;
    use tokio::io::AsyncWriteExt;

    fn request(command: Command, len: u64) -> Vec<u8> {
        let header = RequestHeader { flags: CommandFlags::NONE, command, cookie: 1, offset: 0, len };
        encode_request(&header).unwrap().to_vec()
    }

    /// After a long payload only the beginning of the buffer is read into; more than that may be in it.
    #[test]
    fn who_waits_behind_the_gate_with_more_than_is_read_then_may_leave() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let mut near = Socket::Plain(near);
            let rules = Rules {
                size: 1 << 20,
                transmission: TransmissionFlags::HAS_FLAGS,
                extended: false,
                contexts: false,
                max_payload: 1 << 20,
            };
            let long = [request(Command::WRITE, LONG), vec![7; LONG as usize]].concat();
            far.write_all(&long).await.unwrap();
            far.write_all(&request(Command::READ, 1).repeat(400)).await.unwrap();
            let (mut receiver, budget) = (Receiver::default(), Budget::new(1 << 30));
            let first = poll_fn(|task| receiver.poll(Pin::new(&mut near), &rules, &budget, task)).await;
            assert!(matches!(first, Received::Request(header, ..) if header.command == Command::WRITE));
            assert!(receiver.long && receiver.end - receiver.start > PEEK);
            let mut end = async || {
                poll_fn(|task| Poll::Ready(receiver.poll_end(Pin::new(&mut near), false, task))).await
            };
            assert!(end().await.is_pending());
            // What it asks for is still there.
            assert!(end().await.is_pending());
        });
    }
}
