//! Sending replies: everything that a turn has answered goes out in one vectored write.

use super::super::stream::Stream as Socket;
use blockmason::sched::Permit;
use blockmason::{Data, Segment};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite};

/// The most pieces of one write.
const PIECES: usize = 1024;

/// Heads that have been sent are given back once there are so many bytes of them.
const COMPACT: usize = 64 << 10;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Replies that wait to be sent.
#[derive(Default)]
pub(super) struct Sender {
    /// Bytes of headers and small contents, those of all pieces in a row.
    heads: Vec<u8>,
    /// How many of `heads` belong to pieces that are queued.
    sealed: usize,
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that have been sent.
    done: usize,
    queued: usize,
    moved: u64,
}

enum Piece {
    /// A range of `heads`.
    Head(usize, usize),
    Data(Data, #[allow(dead_code, reason = "gives its bytes back when the data has been sent")] Permit),
}

impl Piece {
    fn len(&self) -> usize {
        match self {
            Piece::Head(start, end) => end - start,
            Piece::Data(data, _) => data.len(),
        }
    }
}

impl Sender {
    /// Bytes sent so far.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.queued + self.heads.len() - self.sealed
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where headers and small contents are appended.
    pub(super) fn head(&mut self) -> &mut Vec<u8> {
        &mut self.heads
    }

    /// Makes a piece of what was appended to the heads.
    fn seal(&mut self) {
        let (start, end) = (self.sealed, self.heads.len());
        if start < end {
            self.pieces.push_back(Piece::Head(start, end));
            self.sealed = end;
            self.queued += end - start;
        }
    }

    /// Queues data, and what is to be held until it has been sent.
    pub(super) fn push(&mut self, data: Data, permit: Permit) {
        self.seal();
        self.queued += data.len();
        self.pieces.push_back(Piece::Data(data.stable(), permit));
    }

    /// Holds something until all that was queued before has been sent.
    pub(super) fn keep(&mut self, permit: Permit) {
        self.seal();
        self.pieces.push_back(Piece::Data(Data::empty(), permit));
    }

    /// Forgets everything: the client is gone.
    pub(super) fn clear(&mut self) {
        *self = Sender { moved: self.moved, ..Sender::default() };
    }

    /// Sends until everything is sent or the client takes no more.
    pub(super) fn poll_send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        mut socket: Pin<&mut Socket<S>>,
        task: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.seal();
        let mut wrote = false;
        while self.queued > 0 {
            let n = {
                let mut slices = Vec::with_capacity(self.pieces.len().min(PIECES) + 1);
                self.gather(&mut slices);
                ready!(socket.as_mut().poll_write_vectored(task, &slices))?
            };
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            wrote = true;
            self.moved += n as u64;
            self.advance(n);
            self.compact();
        }
        self.pieces.clear();
        self.heads.clear();
        self.heads.shrink_to(64 << 10);
        self.sealed = 0;
        // TLS keeps records back until it is told to flush.
        if wrote || socket.is_tls() { socket.poll_flush(task) } else { Poll::Ready(Ok(())) }
    }

    /// Calls `each` with what has not been sent, in order.
    pub(super) fn unsent(&mut self, mut each: impl FnMut(Segment<'_>)) {
        self.seal();
        let mut skip = self.done;
        for piece in &self.pieces {
            match piece {
                Piece::Head(start, end) => each(Segment::Bytes(&self.heads[start + skip..*end])),
                Piece::Data(data, _) => data.slice(skip..data.len()).for_each(&mut each),
            }
            skip = 0;
        }
    }

    fn gather<'a>(&'a self, slices: &mut Vec<IoSlice<'a>>) {
        let mut skip = self.done;
        for piece in &self.pieces {
            if slices.len() >= PIECES {
                return;
            }
            match piece {
                Piece::Head(start, end) => slices.push(IoSlice::new(&self.heads[start + skip..*end])),
                Piece::Data(data, _) => data.for_each(|segment| {
                    let len = segment.len();
                    if slices.len() < PIECES && skip < len {
                        match segment {
                            Segment::Bytes(bytes) => slices.push(IoSlice::new(&bytes[skip..])),
                            Segment::Zeros(len) => gather_zeros(len - skip, slices),
                            // `push` has made it stable.
                            Segment::Foreign(_) => debug_assert!(false, "foreign memory in a reply"),
                        }
                    }
                    skip = skip.saturating_sub(len);
                }),
            }
            skip = 0;
        }
    }

    /// Gives back what has been sent of the heads, while a client that never catches up keeps some of
    /// them queued.
    fn compact(&mut self) {
        let first = self.pieces.iter().find_map(|piece| match piece {
            Piece::Head(start, _) => Some(*start),
            Piece::Data(..) => None,
        });
        let sent = first.unwrap_or(self.sealed);
        if sent < COMPACT {
            return;
        }
        self.heads.drain(..sent);
        self.sealed -= sent;
        for piece in &mut self.pieces {
            if let Piece::Head(start, end) = piece {
                (*start, *end) = (*start - sent, *end - sent);
            }
        }
    }

    fn advance(&mut self, mut n: usize) {
        self.queued -= n;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    proptest! {
        /// Everything arrives once and in order, however little the client takes at a time, and sent
        /// heads do not pile up.
        #[test]
        fn replies_arrive_in_order(
            replies in proptest::collection::vec((1usize..40, 0usize..9000, 0usize..200_000), 1..40),
            window in 1usize..5000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (near, mut far) = tokio::io::duplex(window);
                let mut near = Socket::Plain(near);
                let mut sender = Sender::default();
                let mut expected = Vec::new();
                let mut got = Vec::new();
                for (ix, (head, data, zeros)) in replies.into_iter().enumerate() {
                    let (head, data) = (vec![ix as u8; head], vec![ix as u8 | 0x80; data]);
                    sender.head().extend_from_slice(&head);
                    sender.push(Data::copy_of(&data), Permit::default());
                    sender.push(Data::zeros(zeros), Permit::default());
                    expected.extend(head.into_iter().chain(data).chain(vec![0; zeros]));
                    // As far as the window goes, which is rarely all.
                    let once = std::future::poll_fn(|task| {
                        Poll::Ready(sender.poll_send(Pin::new(&mut near), task).is_ready())
                    });
                    once.await;
                    let mut some = vec![0; window];
                    let n = far.read(&mut some).await.unwrap();
                    got.extend_from_slice(&some[..n]);
                    assert!(sender.sealed <= COMPACT + sender.queued, "{} of heads", sender.sealed);
                }
                let rest = expected.len() - got.len();
                let mut tail = vec![0; rest];
                let send = std::future::poll_fn(|task| sender.poll_send(Pin::new(&mut near), task));
                let (sent, read) = tokio::join!(send, far.read_exact(&mut tail));
                sent.unwrap();
                read.unwrap();
                got.extend(tail);
                assert!(got == expected && sender.is_empty());
            });
        }
    }
}
