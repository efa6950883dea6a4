//! A vhost-user connection that sends what it is told to, right or wrong.

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The version in a header's flags.
pub const VERSION: u32 = 1;
/// A header's flag of replies.
pub const REPLY: u32 = 4;
/// A header's flag of requests that want a reply.
pub const NEED_REPLY: u32 = 8;

/// VHOST_USER_GET_FEATURES.
pub const GET_FEATURES: u32 = 1;
/// VHOST_USER_SET_FEATURES.
pub const SET_FEATURES: u32 = 2;
/// VHOST_USER_SET_OWNER.
pub const SET_OWNER: u32 = 3;
/// VHOST_USER_SET_MEM_TABLE.
pub const SET_MEM_TABLE: u32 = 5;
/// VHOST_USER_SET_LOG_BASE.
pub const SET_LOG_BASE: u32 = 6;
/// VHOST_USER_SET_LOG_FD.
pub const SET_LOG_FD: u32 = 7;
/// VHOST_USER_SET_VRING_NUM.
pub const SET_VRING_NUM: u32 = 8;
/// VHOST_USER_SET_VRING_ADDR.
pub const SET_VRING_ADDR: u32 = 9;
/// VHOST_USER_SET_VRING_BASE.
pub const SET_VRING_BASE: u32 = 10;
/// VHOST_USER_GET_VRING_BASE.
pub const GET_VRING_BASE: u32 = 11;
/// VHOST_USER_SET_VRING_KICK.
pub const SET_VRING_KICK: u32 = 12;
/// VHOST_USER_SET_VRING_CALL.
pub const SET_VRING_CALL: u32 = 13;
/// VHOST_USER_GET_PROTOCOL_FEATURES.
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// VHOST_USER_SET_PROTOCOL_FEATURES.
pub const SET_PROTOCOL_FEATURES: u32 = 16;
/// VHOST_USER_SET_VRING_ENABLE.
pub const SET_VRING_ENABLE: u32 = 18;
/// VHOST_USER_SET_BACKEND_REQ_FD.
pub const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_GET_CONFIG.
pub const GET_CONFIG: u32 = 24;
/// VHOST_USER_GET_INFLIGHT_FD.
pub const GET_INFLIGHT_FD: u32 = 31;
/// VHOST_USER_SET_INFLIGHT_FD.
pub const SET_INFLIGHT_FD: u32 = 32;
/// VHOST_USER_ADD_MEM_REG.
pub const ADD_MEM_REG: u32 = 37;
/// VHOST_USER_REM_MEM_REG.
pub const REM_MEM_REG: u32 = 38;

/// A connection.
pub struct Raw(UnixStream);

impl From<UnixStream> for Raw {
    fn from(stream: UnixStream) -> Raw {
        Raw(stream)
    }
}

impl Raw {
    /// Connects.
    pub fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
        stream.set_write_timeout(Some(crate::PATIENCE)).unwrap();
        Raw(stream)
    }

    /// Connects and agrees on the protocol features, of those that are offered.
    pub fn greeted(socket: &Path, protocol: u64) -> Raw {
        let raw = Raw::connect(socket);
        raw.send(GET_FEATURES, &[], &[]);
        raw.reply(GET_FEATURES).expect("the back-end greets");
        raw.send(GET_PROTOCOL_FEATURES, &[], &[]);
        let offered = raw.reply(GET_PROTOCOL_FEATURES).expect("the back-end tells its protocol features");
        let offered = u64::from_le_bytes(offered.try_into().unwrap());
        raw.send(SET_PROTOCOL_FEATURES, &(offered & protocol).to_le_bytes(), &[]);
        raw.send(SET_OWNER, &[], &[]);
        raw
    }

    /// Sends a message.
    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd]) {
        self.message(request, VERSION, payload.len() as u32, payload, fds);
    }

    /// Sends a message that may lie about its size.
    pub fn message(&self, request: u32, flags: u32, size: u32, payload: &[u8], fds: &[BorrowedFd]) {
        let header = [request, flags, size].map(u32::to_le_bytes).concat();
        self.bytes(&[&header, payload].concat(), fds);
    }

    /// Sends bytes.
    pub fn bytes(&self, bytes: &[u8], fds: &[BorrowedFd]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // The back-end may have closed the connection, which is for `ended` to see.
        let _ = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    }

    /// Whether the back-end has read all that was sent.
    pub fn is_read(&self) -> bool {
        let mut left: libc::c_int = 0;
        // SAFETY: the call writes one integer.
        let asked = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TIOCOUTQ, &raw mut left) };
        assert_eq!(asked, 0, "{}", std::io::Error::last_os_error());
        left == 0
    }

    /// The payload of the reply to a request; none when the connection has ended.
    pub fn reply(&self, request: u32) -> Option<Vec<u8>> {
        let header = self.exactly(12)?;
        let word = |ix: usize| u32::from_le_bytes(header[ix * 4..][..4].try_into().unwrap());
        assert_eq!((word(0), word(1) & 7), (request, VERSION | REPLY), "the header of a reply");
        assert!(word(2) <= 4096, "a reply of {} bytes", word(2));
        self.exactly(word(2) as usize)
    }

    /// Sends a message that is to be acknowledged. Returns whether it was; the connection may have ended instead.
    pub fn acknowledged(&self, request: u32, payload: &[u8], fds: &[BorrowedFd]) -> bool {
        self.message(request, VERSION | NEED_REPLY, payload.len() as u32, payload, fds);
        self.reply(request).is_some_and(|answer| answer == [0; 8])
    }

    /// Waits until the back-end has closed the connection; what it sends before is dropped. Returns false when it
    /// keeps it open.
    pub fn ended(&self) -> bool {
        while let Ok(count) = self.take(&mut [0; 4096]) {
            if count == 0 {
                return true;
            }
        }
        false
    }

    /// Ends this side's half of the connection.
    pub fn finish(&self) {
        // It may have ended.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
    }

    fn exactly(&self, count: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; count];
        let mut have = 0;
        while have < count {
            match self.take(&mut bytes[have..]).expect("a reply") {
                0 => return None,
                more => have += more,
            }
        }
        Some(bytes)
    }

    /// As `recv`, where a reset is an end.
    fn take(&self, into: &mut [u8]) -> rustix::io::Result<usize> {
        match recv(&self.0, &mut *into, RecvFlags::empty()) {
            Ok((count, _)) => Ok(count),
            Err(rustix::io::Errno::CONNRESET) => Ok(0),
            Err(error) => Err(error),
        }
    }
}
