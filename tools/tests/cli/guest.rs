//! A client of an export, as small as can be.

use crate::harness::Home;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

pub(crate) struct Guest(UnixStream);

impl Guest {
    /// Connects to the export without a name behind a socket.
    pub(crate) fn connect(home: &Home, socket: &str) -> Guest {
        let mut stream = UnixStream::connect(home.path(socket)).unwrap();
        stream.read_exact(&mut [0; 18]).unwrap();
        // Fixed newstyle without padding; the option that goes on with the export of no name.
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        stream.write_all(&[b"IHAVEOPT", &1u32.to_be_bytes()[..], &0u32.to_be_bytes()].concat()).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Guest(stream)
    }

    fn ask(&mut self, command: u16, offset: u64, len: u32, payload: &[u8]) -> u32 {
        let head = [&0x2560_9513u32.to_be_bytes()[..], &0u16.to_be_bytes(), &command.to_be_bytes()].concat();
        let range = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        self.0.write_all(&[&head, &b"a cookie"[..], &range, payload].concat()).unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!((&reply[..4], &reply[8..]), (&0x6744_6698u32.to_be_bytes()[..], &b"a cookie"[..]));
        u32::from_be_bytes(reply[4..8].try_into().unwrap())
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) {
        assert_eq!(self.ask(0, offset, len, &[]), 0);
        self.0.read_exact(&mut vec![0; len as usize]).unwrap();
    }

    /// The error number of a write.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> u32 {
        self.ask(1, offset, bytes.len() as u32, bytes)
    }
}
