//! Frames of JSON with descriptors, over a socket between two processes: docs/formats/handover.md.

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Begins every frame: whoever says something else by mistake is found out.
const MAGIC: [u8; 8] = *b"masonhnd";

/// Bytes of a frame's text, at most: a daemon has some graphs, and some thousand clients.
const LONGEST: usize = 64 << 20;

/// Descriptors of a frame, at most.
const MOST_DESCRIPTORS: usize = 65_536;

/// Descriptors that travel with one byte: the kernel takes 253.
const BATCH: usize = 200;

/// Bytes that are asked for at once.
const PIECE: usize = 64 << 10;

/// One end.
pub(super) struct Channel(UnixStream);

impl Channel {
    /// Within a runtime.
    pub(super) fn new(socket: OwnedFd) -> Result<Channel> {
        let socket = std::os::unix::net::UnixStream::from(socket);
        socket.set_nonblocking(true)?;
        UnixStream::from_std(socket).map(Channel)
    }

    /// Sends a frame. The descriptors are copied.
    pub(super) async fn send(&self, message: &impl Serialize, descriptors: &[OwnedFd]) -> Result<()> {
        let text = serde_json::to_vec(message)?;
        if text.len() > LONGEST || descriptors.len() > MOST_DESCRIPTORS {
            let (bytes, count) = (text.len(), descriptors.len());
            return Err(Error::other(format!(
                "{bytes} bytes and {count} descriptors are too much for a message"
            )));
        }
        let mut frame = Vec::with_capacity(16 + text.len());
        frame.extend(MAGIC);
        frame.extend((text.len() as u32).to_le_bytes());
        frame.extend((descriptors.len() as u32).to_le_bytes());
        frame.extend(text);
        let mut done = 0;
        while done < frame.len() {
            done += self.put(&frame[done..], &[]).await?;
        }
        for batch in descriptors.chunks(BATCH) {
            let batch: Vec<_> = batch.iter().map(AsFd::as_fd).collect();
            self.put(&[0], &batch).await?;
        }
        Ok(())
    }

    async fn put(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize> {
        let send = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(Error::other("more descriptors than a batch has"));
            }
            // A process that has ended is an error, not a signal.
            Ok(sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
        };
        self.0.async_io(Interest::WRITABLE, send).await
    }

    /// Receives a frame.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] if the other end is closed.
    pub(super) async fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>)> {
        let bad = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
        let head = self.take(16).await?;
        if head[..8] != MAGIC {
            return Err(bad("the other end says something else than frames"));
        }
        let number =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]) as usize;
        let (length, count) = (number(8), number(12));
        if length > LONGEST || count > MOST_DESCRIPTORS {
            return Err(bad("a frame is too large"));
        }
        let text = self.take(length).await?;
        let mut descriptors = Vec::new();
        while descriptors.len() < count {
            let wanted = BATCH.min(count - descriptors.len());
            let batch = self.take_batch().await?;
            if batch.len() != wanted {
                return Err(bad("descriptors are missing: the limit of open files may be too low"));
            }
            descriptors.extend(batch);
        }
        let message = serde_json::from_slice(&text)
            .map_err(|error| bad(&format!("a message is not what belongs here: {error}")))?;
        Ok((message, descriptors))
    }

    /// So many bytes. Memory follows what arrives.
    async fn take(&self, count: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let done = bytes.len();
            bytes.resize(count.min(done + PIECE), 0);
            let read = self.0.async_io(Interest::READABLE, || self.0.try_read(&mut bytes[done..])).await?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            bytes.truncate(done + read);
        }
        Ok(bytes)
    }

    /// One byte, and what comes with it.
    async fn take_batch(&self) -> Result<Vec<OwnedFd>> {
        let receive = || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let parts = &mut [IoSliceMut::new(&mut byte)];
            let received = recvmsg(&self.0, parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            if received.bytes == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let mut batch = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    batch.extend(descriptors);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) {
                return Err(Error::other("descriptors were lost: the limit of open files is too low"));
            }
            Ok(batch)
        };
        self.0.async_io(Interest::READABLE, receive).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    fn pair() -> (Channel, Channel) {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        (Channel::new(one.into()).unwrap(), Channel::new(other.into()).unwrap())
    }

    #[tokio::test]
    async fn any_number_of_descriptors_arrives_in_order() {
        let (from, to) = pair();
        for count in [0, 1, 199, 200, 201, 433] {
            let files: Vec<OwnedFd> = (0..count)
                .map(|number: u32| {
                    let mut file = tempfile::tempfile().unwrap();
                    file.write_all(&number.to_le_bytes()).unwrap();
                    file.into()
                })
                .collect();
            let text = "x".repeat(300_000);
            let (sent, received) = tokio::join!(from.send(&text, &files), to.receive::<String>());
            sent.unwrap();
            let (arrived, descriptors) = received.unwrap();
            assert!(arrived == text && descriptors.len() == count as usize);
            for (number, descriptor) in descriptors.into_iter().enumerate() {
                let flags = rustix::io::fcntl_getfd(&descriptor).unwrap();
                assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "{}", descriptor.as_raw_fd());
                let mut file = std::fs::File::from(descriptor);
                let mut bytes = [0; 4];
                std::io::Seek::rewind(&mut file).unwrap();
                file.read_exact(&mut bytes).unwrap();
                assert_eq!(u32::from_le_bytes(bytes) as usize, number);
            }
        }
    }

    async fn given(bytes: &[u8]) -> ErrorKind {
        let (mut one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        one.write_all(bytes).unwrap();
        drop(one);
        Channel::new(other.into()).unwrap().receive::<String>().await.unwrap_err().kind()
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        let frame = |length: u32, count: u32, rest: &[u8]| {
            [&MAGIC[..], &length.to_le_bytes(), &count.to_le_bytes(), rest].concat()
        };
        assert_eq!(given(b"").await, ErrorKind::UnexpectedEof);
        assert_eq!(given(b"hello, I am another program").await, ErrorKind::InvalidData);
        assert_eq!(given(&frame(u32::MAX, 0, b"")).await, ErrorKind::InvalidData);
        assert_eq!(given(&frame(2, u32::MAX, b"\"\"")).await, ErrorKind::InvalidData);
        assert_eq!(given(&frame(40 << 20, 0, b"short")).await, ErrorKind::UnexpectedEof);
        assert_eq!(given(&frame(2, 1, b"\"\"\0")).await, ErrorKind::InvalidData, "none came");
        assert_eq!(given(&frame(3, 0, b"{\"}")).await, ErrorKind::InvalidData);
    }
}
