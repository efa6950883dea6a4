//! A front-end that does what bytes say, or what is right.

use blockmason_elements::vhost::wire::{HEADER, LONGEST, Message};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// What the guest's memory is called among mappings.
pub(super) const GUEST: &str = "fuzz-guest";

/// Bytes of the guest's memory, and of another file that serves as log or the record of what is in flight.
const MEMORY: u64 = 64 << 10;
const OTHER: u64 = 8 << 10;

/// The most descriptors of a message: one more than are taken.
const MOST_FDS: usize = 33;

/// Where a good front-end has the guest's memory, for the guest and for itself.
const AT: u64 = 1 << 20;
const USER: u64 = 0x7000_0000;

const VERSION: u32 = 1;
const REPLY: u32 = 4;

/// See the module.
pub(super) struct Frontend {
    stream: UnixStream,
    memory: File,
    kick: OwnedFd,
    fds: Vec<OwnedFd>,
    /// Everything that was sent.
    sent: Vec<u8>,
}

/// What the back-end has answered.
pub(super) struct Answer {
    code: u32,
    payload: Vec<u8>,
    fds: usize,
}

impl Answer {
    /// It is a yes or a no to this message.
    pub(super) fn acknowledges(&self, message: &Message) {
        let number = <[u8; 8]>::try_from(&self.payload[..]).map(u64::from_ne_bytes);
        assert!(matches!(number, Ok(0 | 1)), "{message:?} is acknowledged by {:?}", self.payload);
        assert_eq!(self.fds, 0);
    }

    /// It is what this message asks for.
    pub(super) fn answers(&self, message: &Message) {
        let (len, fds) = match message {
            Message::GetConfig { size, .. } => (12 + *size as usize, 0),
            Message::GetInflightFd(_) => (24, 1),
            _ => (8, 0),
        };
        assert_eq!((self.payload.len(), self.fds), (len, fds), "the answer {} to {message:?}", self.code);
    }
}

fn file(name: &str, size: u64) -> File {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).expect("memory"));
    file.set_len(size).expect("memory");
    file
}

impl Frontend {
    pub(super) fn new(stream: UnixStream) -> Frontend {
        let (memory, kick) = (file(GUEST, MEMORY), event());
        let pipe = std::io::pipe().expect("a pipe");
        let pair = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        let copy = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().expect("a descriptor");
        let fds = vec![
            copy(memory.as_fd()),
            copy(kick.as_fd()),
            file(GUEST, OTHER).into(),
            event(),
            pair.0.into(),
            pipe.1.into(),
            File::open("/proc/self/exe").expect("this program").into(),
            file(GUEST, 1 << 50).into(),
        ];
        Frontend { stream, memory, kick, fds, sent: Vec::new() }
    }

    /// Does what each record says. Below 64 it is a message of that number, with the flags that the next byte says;
    /// from there on see `deed`. The lower half of the third byte says which descriptor goes with it, the upper half
    /// how often.
    pub(super) async fn act(&mut self, mut records: &[u8]) {
        while let Some((&[what, flags, fds, len], rest)) = records.split_first_chunk() {
            let (payload, rest) = rest.split_at(rest.len().min(len.into()));
            records = rest;
            let done = match what {
                ..64 => self.send(&message(what.into(), flags.into(), payload), fds).await,
                _ => self.deed(what, payload, fds).await,
            };
            if done.is_err() {
                return;
            }
        }
    }

    async fn deed(&mut self, what: u8, payload: &[u8], fds: u8) -> io::Result<()> {
        let (number, rest) = payload.split_first_chunk().unwrap_or((&[0; 2], &[]));
        let number = u64::from(u16::from_le_bytes(*number));
        match what % 8 {
            // No message, or half of one.
            0 => self.send(payload, fds).await?,
            // The guest writes into its memory.
            1 => self.memory.write_all_at(rest, number).expect("memory"),
            2 => drop(rustix::io::write(&self.kick, &1_u64.to_ne_bytes())),
            // Time passes: requests end.
            3 => blockmason::rt::sleep(Duration::from_millis(number + 1)).await,
            // Memory goes, and may come back.
            4 => self.memory.set_len(number).expect("memory"),
            5 => self.memory.set_len(MEMORY).expect("memory"),
            // Whoever is ready has a turn.
            _ => tokio::task::yield_now().await,
        }
        Ok(())
    }

    async fn send(&mut self, bytes: &[u8], fds: u8) -> io::Result<()> {
        let (which, count) = (usize::from(fds & 7), usize::from(fds >> 4));
        let count = if count == 15 { MOST_FDS } else { count };
        let fds = vec![self.fds[which].as_fd(); if bytes.is_empty() { 0 } else { count }];
        let mut done = 0;
        while done < bytes.len() {
            let fds = if done == 0 { &fds[..] } else { &[] };
            let send = || send_some(self.stream.as_fd(), &bytes[done..], fds);
            let now = self.stream.async_io(Interest::WRITABLE, send).await?;
            self.sent.extend_from_slice(&bytes[done..done + now]);
            done += now;
        }
        Ok(())
    }

    /// Says that nothing more comes. Returns what was sent, and what was answered to the end.
    pub(super) async fn leave(&mut self) -> (Vec<u8>, Vec<Answer>) {
        // The other side may have gone first.
        let _ = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Write);
        let mut answers = Vec::new();
        while let Some(answer) = self.receive().await {
            answers.push(answer);
        }
        (std::mem::take(&mut self.sent), answers)
    }

    /// The next answer; None at the end.
    async fn receive(&mut self) -> Option<Answer> {
        let (header, fds) = self.exactly(HEADER).await?;
        let word = |ix: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[4 * ix + byte]));
        assert_eq!(word(1), VERSION | REPLY, "the flags of an answer");
        let len = word(2) as usize;
        assert!(len <= LONGEST, "an answer of {len} bytes");
        let (payload, more) = self.exactly(len).await.expect("the rest of an answer");
        assert_eq!(more, 0, "descriptors in the middle of an answer");
        Some(Answer { code: word(0), payload, fds })
    }

    /// So many bytes, and how many descriptors came with them; None at the end.
    async fn exactly(&mut self, count: usize) -> Option<(Vec<u8>, usize)> {
        let (mut bytes, mut fds) = (vec![0; count], 0);
        let mut have = 0;
        while have < count {
            let receive = || receive_some(self.stream.as_fd(), &mut bytes[have..]);
            match self.stream.async_io(Interest::READABLE, receive).await {
                Ok((0, _)) => {
                    assert_eq!(have, 0, "half an answer");
                    return None;
                }
                Ok((more, with)) => (have, fds) = (have + more, fds + with),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
        Some((bytes, fds))
    }

    /// As a good front-end does: reads a sector of zeros into memory of ones, and leaves.
    pub(super) async fn read_a_sector(&mut self) {
        self.set_up().await;
        let sector = AT + 0x4000;
        let chain = [(AT + 0x3000, 16, 1, 1), (sector, 512, 3, 2), (sector + 512, 1, 2, 0)];
        let table: Vec<u8> = chain.into_iter().flat_map(descriptor).collect();
        for (place, bytes) in [(0, &table[..]), (0x4000, &[0xee; 513]), (0x1000, &[0, 0, 1, 0, 0, 0])] {
            self.memory.write_all_at(bytes, place).expect("memory");
        }
        self.deed(2, &[], 0).await.expect("a kick");
        blockmason::rt::sleep(Duration::from_secs(1)).await;
        self.good(11, &[0; 8], 0).await;
        let answer = self.receive().await.expect("the queue stops");
        assert_eq!(answer.payload, [0, 0, 0, 0, 1, 0, 0, 0], "where the queue goes on");
        let mut bytes = [1; 513];
        self.memory.read_exact_at(&mut bytes, 0x4000).expect("memory");
        assert_eq!(bytes, [0; 513], "a sector, and the status");
        let mut used = [0; 12];
        self.memory.read_exact_at(&mut used, 0x2000).expect("memory");
        assert_eq!((used[2], &used[4..]), (1, &[0, 0, 0, 0, 1, 2, 0, 0][..]), "the used ring");
        assert!(self.leave().await.1.is_empty(), "an answer to nothing");
    }

    /// Starts a queue of sixteen entries.
    async fn set_up(&mut self) {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        let numbers =
            |numbers: &[u64]| numbers.iter().flat_map(|number| number.to_ne_bytes()).collect::<Vec<_>>();
        self.good(3, &[], 0).await;
        self.good(1, &[], 0).await;
        let offered = self.receive().await.expect("the features");
        let wanted = 1_u64 << 32 | 1 << 30;
        let offered = u64::from_ne_bytes(offered.payload.try_into().expect("a number"));
        assert_eq!(offered & wanted, wanted);
        self.good(2, &numbers(&[wanted]), 0).await;
        self.good(5, &[words(&[1, 0]), numbers(&[AT, MEMORY, USER, 0])].concat(), 0x10).await;
        self.good(8, &words(&[0, 16]), 0).await;
        self.good(10, &words(&[0, 0]), 0).await;
        let rings = numbers(&[USER, USER + 0x2000, USER + 0x1000, 0]);
        self.good(9, &[words(&[0, 0]), rings].concat(), 0).await;
        self.good(12, &numbers(&[0]), 0x11).await;
        self.good(13, &numbers(&[0]), 0x13).await;
        self.good(18, &words(&[0, 1]), 0).await;
    }

    async fn good(&mut self, code: u32, payload: &[u8], fds: u8) {
        self.send(&message(code, VERSION, payload), fds).await.expect("a good front-end is served");
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an event counter")
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let header = [code, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

fn descriptor((address, len, flags, next): (u64, u32, u16, u16)) -> Vec<u8> {
    [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

fn send_some(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(fds));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags)?)
}

/// Bytes, and how many descriptors came with them.
fn receive_some(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, usize)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, flags)?;
    let rights = control.drain().map(|message| match message {
        RecvAncillaryMessage::ScmRights(rights) => rights.count(),
        _ => 0,
    });
    Ok((received.bytes, rights.sum()))
}
