//! The other end of a connection: it says what it was given, hears everything, and leaves.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What went over the stream, also once it was given away.
#[derive(Default)]
pub(super) struct Traffic {
    /// Everything that the peer was told.
    pub(super) heard: RefCell<Vec<u8>>,
    /// Bytes of the peer's that were read.
    pub(super) read: Cell<usize>,
}

/// A stream over bytes that are there from the start.
pub(super) struct Peer<'a> {
    says: &'a [u8],
    traffic: Rc<Traffic>,
    /// The most bytes that one read or one write moves, and whether the next one has to wait: None for
    /// a peer that never makes anyone wait.
    chop: Option<(usize, bool)>,
}

impl<'a> Peer<'a> {
    /// A peer that is always ready.
    pub(super) fn new(says: &'a [u8]) -> Peer<'a> {
        Peer { says, traffic: Rc::default(), chop: None }
    }

    /// A peer that moves `step` bytes at a time, and makes the other side wait in between.
    pub(super) fn chopped(says: &'a [u8], step: usize) -> Peer<'a> {
        Peer { chop: Some((step, false)), ..Peer::new(says) }
    }

    /// What goes over the stream.
    pub(super) fn traffic(&self) -> Rc<Traffic> {
        self.traffic.clone()
    }

    /// How many of `len` bytes move now, or none yet.
    fn poll_step(&mut self, len: usize, task: &Context<'_>) -> Poll<usize> {
        let Some((step, waits)) = &mut self.chop else { return Poll::Ready(len) };
        *waits = !*waits;
        if *waits {
            task.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(len.min(*step))
    }
}

impl AsyncRead for Peer<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let len = self.says.len().min(buf.remaining());
        self.poll_step(len, task).map(|n| {
            let (now, later) = self.says.split_at(n);
            buf.put_slice(now);
            self.says = later;
            self.traffic.read.set(self.traffic.read.get() + n);
            Ok(())
        })
    }
}

impl AsyncWrite for Peer<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.poll_step(bytes.len(), task).map(|n| {
            self.traffic.heard.borrow_mut().extend_from_slice(&bytes[..n]);
            Ok(n)
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _task: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _task: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
