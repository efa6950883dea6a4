//! Sending requests: everything that a turn has goes out in one vectored write.

use crate::nbd::stream::Stream;
use blockmason::{Data, Segment};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite};

/// The most pieces of one write.
const PIECES: usize = 1024;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Requests that wait to be sent.
#[derive(Default)]
pub(super) struct Sender {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have been sent.
    done: usize,
    unflushed: bool,
}

enum Piece {
    /// A header: so many of these bytes.
    Head([u8; 32], usize),
    /// A payload, not foreign.
    Data(Data),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Head(_, len) => *len,
            Piece::Data(data) => data.len(),
        }
    }
}

impl Sender {
    /// Queues a header of at most 32 bytes.
    pub(super) fn head(&mut self, header: &[u8]) {
        let mut bytes = [0; 32];
        bytes[..header.len()].copy_from_slice(header);
        self.pieces.push_back(Piece::Head(bytes, header.len()));
    }

    /// Queues a payload, which must not be foreign memory.
    pub(super) fn data(&mut self, data: Data) {
        if !data.is_empty() {
            self.pieces.push_back(Piece::Data(data));
        }
    }

    /// Sends until everything is sent or the server takes no more.
    pub(super) fn poll_send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Stream<S>>,
        task: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        while !self.pieces.is_empty() {
            let n = {
                let mut slices = Vec::with_capacity(self.pieces.len().min(PIECES) + 1);
                self.gather(&mut slices);
                ready!(socket.as_mut().poll_write_vectored(task, &slices))?
            };
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.advance(n);
        }
        if self.unflushed {
            // TLS keeps records back until it is told to flush.
            ready!(socket.poll_flush(task))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn gather<'a>(&'a self, slices: &mut Vec<IoSlice<'a>>) {
        let mut skip = self.done;
        for piece in &self.pieces {
            if slices.len() >= PIECES {
                return;
            }
            match piece {
                Piece::Head(bytes, len) => slices.push(IoSlice::new(&bytes[skip..*len])),
                Piece::Data(data) => data.for_each(|segment| {
                    let len = segment.len();
                    if slices.len() < PIECES && skip < len {
                        match segment {
                            Segment::Bytes(bytes) => slices.push(IoSlice::new(&bytes[skip..])),
                            Segment::Zeros(len) => gather_zeros(len - skip, slices),
                            Segment::Foreign(_) => debug_assert!(false, "`data` takes no foreign memory"),
                        }
                    }
                    skip = skip.saturating_sub(len);
                }),
            }
            skip = 0;
        }
    }

    fn advance(&mut self, mut n: usize) {
        while let Some(first) = self.pieces.front() {
            let left = first.len() - self.done;
            if n < left {
                self.done += n;
                return;
            }
            n -= left;
            self.done = 0;
            self.pieces.pop_front();
        }
    }
}

/// As many zeros as fit the pieces of one write; what is left over is sent by the next.
fn gather_zeros(len: usize, slices: &mut Vec<IoSlice<'_>>) {
    let mut left = len;
    while left > 0 && slices.len() < PIECES {
        let n = left.min(ZEROS.len());
        slices.push(IoSlice::new(&ZEROS[..n]));
        left -= n;
    }
}
