//! A front-end's socket: whole messages with their descriptors.

use super::wire::{HEADER, Header, MOST_FDS};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

/// How long the rest of a message may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A message as it came.
pub(crate) struct Received {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A connection of a front-end.
pub(crate) struct Socket {
    stream: UnixStream,
    /// What has come of the next message.
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// When it began.
    begun: Option<Instant>,
}

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> Socket {
        Socket { stream, bytes: Vec::new(), fds: Vec::new(), begun: None }
    }

    /// One of which another process has received this of a message.
    pub(crate) fn resume(stream: UnixStream, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Socket {
        Socket { stream, bytes, fds, begun: None }
    }

    /// The connection itself.
    pub(crate) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// What has come of the next message.
    pub(crate) fn received(&self) -> (&[u8], &[OwnedFd]) {
        (&self.bytes, &self.fds)
    }

    /// True if part of a message is there.
    #[cfg(test)]
    pub(crate) fn is_amid_a_message(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The next message; None when the front-end has gone. May be dropped and called again.
    ///
    /// # Errors
    /// The connection is broken, or what comes is no message.
    pub(crate) async fn receive(&mut self) -> io::Result<Option<Received>> {
        let broken = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
        loop {
            let header = match self.bytes.first_chunk::<HEADER>() {
                Some(bytes) => Some(Header::parse(bytes).map_err(broken)?),
                None => None,
            };
            let wanted = HEADER + header.map_or(0, |header| header.size);
            if let Some(header) = header.filter(|_| self.bytes.len() == wanted) {
                let payload = self.bytes.split_off(HEADER);
                self.bytes.clear();
                return Ok(Some(Received { header, payload, fds: std::mem::take(&mut self.fds) }));
            }
            if self.bytes.is_empty() {
                self.begun = None;
            } else if self.begun.is_none() {
                self.begun = Some(blockmason::rt::now());
            }
            let left =
                self.begun.map(|begun| (begun + PATIENCE).saturating_duration_since(blockmason::rt::now()));
            let read = self.read(wanted.saturating_sub(self.bytes.len()));
            // The rest of a message does not take long, in however many parts it comes.
            let read = match left {
                Some(left) => blockmason::rt::timeout(left, read).await.unwrap_or_else(|| {
                    Err(io::Error::new(io::ErrorKind::TimedOut, "half a message, and no more for too long"))
                })?,
                None => read.await?,
            };
            if read == 0 {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(broken("the end of half a message"))
                };
            }
        }
    }

    /// Reads at most `n` bytes, so that descriptors are those of this message.
    async fn read(&mut self, n: usize) -> io::Result<usize> {
        let Socket { stream, bytes, fds, .. } = self;
        stream.async_io(Interest::READABLE, || receive_some(stream.as_fd(), n, bytes, fds)).await
    }

    /// Sends an answer. The front-end waits for it: it has room.
    ///
    /// # Errors
    /// The connection is broken.
    pub(crate) async fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let fd = fd.filter(|_| sent == 0);
            let send = || send_some(self.stream.as_fd(), &bytes[sent..], fd);
            sent += self.stream.async_io(Interest::WRITABLE, send).await?;
        }
        Ok(())
    }
}

fn receive_some(
    socket: BorrowedFd<'_>,
    n: usize,
    bytes: &mut Vec<u8>,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buf = vec![0; n];
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut buf)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MOST_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more descriptors than a message may have"));
    }
    bytes.extend_from_slice(&buf[..received.bytes]);
    Ok(received.bytes)
}

/// Sends some bytes, with a descriptor.
pub(crate) fn send_some(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let fds: Vec<_> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::testing::memory_file;
    use crate::vhost::wire;

    fn pair() -> (UnixStream, Socket) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Socket::new(theirs))
    }

    fn request(code: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = wire::reply(code, payload);
        bytes[4..8].copy_from_slice(&1u32.to_ne_bytes());
        bytes
    }

    #[tokio::test]
    async fn messages_come_whole_with_their_descriptors() {
        let (ours, mut socket) = pair();
        let file = memory_file(4096);
        let both = [request(32, &[1; 24]), request(1, &[])].concat();
        // In pieces, as a stream may bring them; a receive that is given up in between loses nothing.
        send_some(ours.as_fd(), &both[..5], Some(file.as_fd())).unwrap();
        let early = tokio::time::timeout(Duration::from_millis(20), socket.receive()).await;
        assert!(early.is_err() && socket.is_amid_a_message());
        send_some(ours.as_fd(), &both[5..], None).unwrap();
        let first = socket.receive().await.unwrap().unwrap();
        assert_eq!((first.header.code, first.payload.len(), first.fds.len()), (32, 24, 1));
        let second = socket.receive().await.unwrap().unwrap();
        assert_eq!((second.header.code, second.fds.len()), (1, 0));
        drop(ours);
        assert!(socket.receive().await.unwrap().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_message_is_not_waited_for_for_ever() {
        for n in [1, HEADER, HEADER + 1] {
            let (ours, mut socket) = pair();
            let (begun, bytes) = (blockmason::rt::now(), request(2, &[0; 8]));
            send_some(ours.as_fd(), &bytes[..n], None).unwrap();
            let error = socket.receive().await.map(drop).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert!((PATIENCE..2 * PATIENCE).contains(&(blockmason::rt::now() - begun)));
        }
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        for bytes in [vec![0xff; 12], request(1, &[])[..7].to_vec()] {
            let (ours, mut socket) = pair();
            send_some(ours.as_fd(), &bytes, None).unwrap();
            drop(ours);
            assert!(socket.receive().await.is_err());
        }
    }

    #[tokio::test]
    async fn too_many_descriptors_are_an_error() {
        let (ours, mut socket) = pair();
        let fds = [ours.as_fd(); MOST_FDS + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = request(1, &[]);
        rustix::net::sendmsg(&ours, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
        assert!(socket.receive().await.is_err());
    }
}
