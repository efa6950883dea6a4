//! A client that does as it is told, bad manners among it: blocking, one connection, no checks beyond
//! what a test needs. The numbers are those of the NBD protocol's document (NetworkBlockDevice/nbd,
//! doc/proto.md).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// A connection.
pub struct Raw(pub UnixStream);

/// NBD_CMD_READ.
pub const READ: u16 = 0;
/// NBD_CMD_WRITE.
pub const WRITE: u16 = 1;
/// NBD_CMD_DISC.
pub const DISC: u16 = 2;
/// NBD_CMD_FLUSH.
pub const FLUSH: u16 = 3;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Makes a cookie of an offset.
const COOKIE: u64 = 0xabcd;
const OPT_EXPORT_NAME: u32 = 1;

impl Raw {
    /// Connects, and says nothing.
    pub fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        Raw(stream)
    }

    /// Connects and goes through the shortest handshake: the default export, simple replies.
    pub fn ready(socket: &Path) -> Raw {
        Raw::ready_with_size(socket).0
    }

    /// The same, and how many bytes the disk has.
    pub fn ready_with_size(socket: &Path) -> (Raw, u64) {
        let mut raw = Raw::connect(socket);
        raw.greet();
        raw.option(OPT_EXPORT_NAME, 0, b"");
        // Size and flags; the zeros after them were declined.
        let size = u64::from_be_bytes(raw.bytes(10)[..8].try_into().unwrap());
        (raw, size)
    }

    /// Takes the server's greeting and answers it.
    pub fn greet(&mut self) {
        let greeting = self.bytes(18);
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        self.send(&3_u32.to_be_bytes());
    }

    /// Sends an option that announces `extra` bytes more than it has.
    pub fn option(&mut self, option: u32, extra: u32, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap() + extra;
        self.send(&[b"IHAVEOPT", &option.to_be_bytes()[..], &length.to_be_bytes(), data].concat());
    }

    /// Takes the reply to an option. Returns its type.
    pub fn option_reply(&mut self) -> u32 {
        let header = self.bytes(20);
        assert_eq!(&header[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        self.bytes(u32::from_be_bytes(header[16..].try_into().unwrap()) as usize);
        u32::from_be_bytes(header[12..16].try_into().unwrap())
    }

    /// Sends a request's header.
    pub fn request(&mut self, command: u16, offset: u64, length: u32) {
        self.try_request(command, offset, length).unwrap();
    }

    /// As [`request`](Self::request), where the connection may have ended or may be full.
    pub fn try_request(&mut self, command: u16, offset: u64, length: u32) -> io::Result<()> {
        let cookie = offset ^ COOKIE;
        let parts = [
            &REQUEST_MAGIC.to_be_bytes()[..],
            &0_u16.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ];
        self.0.write_all(&parts.concat())
    }

    /// Sends a request with its data and takes the header of its reply. Returns the error in it, 0 for none.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn ask(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) -> io::Result<u32> {
        self.try_request(command, offset, length)?;
        self.0.write_all(data)?;
        let header = self.try_bytes(16)?;
        assert_eq!(&header[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        Ok(u32::from_be_bytes(header[4..8].try_into().unwrap()))
    }

    /// Takes the header of a reply. Returns the error in it, 0 for none.
    pub fn reply(&mut self) -> u32 {
        self.reply_to().0
    }

    /// Takes the header of a reply. Returns the error in it, and the offset of the request that it answers.
    pub fn reply_to(&mut self) -> (u32, u64) {
        let header = self.bytes(16);
        assert_eq!(&header[..4], SIMPLE_REPLY_MAGIC.to_be_bytes());
        let cookie = u64::from_be_bytes(header[8..].try_into().unwrap());
        (u32::from_be_bytes(header[4..8].try_into().unwrap()), cookie ^ COOKIE)
    }

    /// Reads from the disk.
    pub fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        self.request(READ, offset, length);
        assert_eq!(self.reply(), 0);
        self.bytes(length as usize)
    }

    /// Writes to the disk.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.request(WRITE, offset, u32::try_from(data.len()).unwrap());
        self.send(data);
        assert_eq!(self.reply(), 0);
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    /// Takes so many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        self.try_bytes(count).unwrap()
    }

    /// As [`bytes`](Self::bytes), where the connection may have ended.
    pub fn try_bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// True once the server has closed the connection; what it sent before is dropped.
    pub fn ended(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.0.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}
