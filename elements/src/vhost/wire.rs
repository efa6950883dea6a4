//! Messages of the vhost-user protocol, parsed and written: no sockets, no state.
//!
//! Source: QEMU's specification "Vhost-user Protocol", sections "Message Specification" and "Front-end
//! message types". Numbers are in the byte order of the machine: both ends run on one.

/// Bytes of a header: request, flags, size of the payload.
pub const HEADER: usize = 12;

/// The longest payload that is taken, in bytes; a longer one ends the session.
pub const LONGEST: usize = 4096;

/// The most descriptors that come with one message: one for each region of a memory table.
pub const MOST_FDS: usize = 32;

/// Bytes of a virtio configuration space that a front-end may ask for.
pub const CONFIG: u32 = 256;

const VERSION: u32 = 1;
const VERSION_BITS: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What a header says of its message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The number of the request.
    pub code: u32,
    /// True if the front-end waits for an acknowledgement of a message that has no answer of its own.
    pub need_reply: bool,
    /// Bytes of the payload, at most [`LONGEST`].
    pub size: usize,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// What is wrong with it: nothing that follows can be understood.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Header, &'static str> {
        let mut fields = Fields(bytes);
        let (code, flags, size) = (fields.u32()?, fields.u32()?, fields.u32()? as usize);
        if flags & VERSION_BITS != VERSION {
            return Err("a message of another version of the protocol");
        }
        if flags & REPLY != 0 {
            return Err("a reply where a request was expected");
        }
        if size > LONGEST {
            return Err("a message that is too long");
        }
        Ok(Header { code, need_reply: flags & NEED_REPLY != 0, size })
    }
}

/// An answer to a request, header and payload.
pub fn reply(code: u32, payload: &[u8]) -> Vec<u8> {
    message(code, VERSION | REPLY, payload)
}

/// A message of the back-end's own on its channel: the configuration has changed.
pub fn config_changed() -> Vec<u8> {
    const CONFIG_CHANGE_MSG: u32 = 2;
    message(CONFIG_CHANGE_MSG, VERSION, &[])
}

fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for field in [code, flags, payload.len() as u32] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Features of the protocol, by their bits.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1;
    /// A log of written pages in shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// Acknowledgements on request.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// A channel for messages of the back-end.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// The configuration space is the back-end's.
    pub const CONFIG: u64 = 1 << 9;
    /// The requests in flight stand in memory that outlives the back-end.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// The device can be reset.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory comes and goes region by region.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
}

/// A piece of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MemoryRegion {
    /// Where the guest has it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end has it mapped: rings are named by such addresses.
    pub user: u64,
    /// Where it starts in its file.
    pub offset: u64,
}

/// Where a ring is, in the front-end's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RingAddress {
    /// Bit 0: writes to the used ring are to be logged.
    pub flags: u32,
    /// The table of descriptors.
    pub desc: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub avail: u64,
    /// The guest's address of the used ring, for the log.
    pub log: u64,
}

/// Memory for the requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct InflightArea {
    /// Bytes.
    pub size: u64,
    /// Where it starts in its file.
    pub offset: u64,
    /// How many queues it is for.
    pub queues: u16,
    /// Entries of each.
    pub entries: u16,
}

impl InflightArea {
    /// As a payload; padded as the structure is in the front-ends' own code.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(24);
        bytes.extend_from_slice(&self.size.to_ne_bytes());
        bytes.extend_from_slice(&self.offset.to_ne_bytes());
        bytes.extend_from_slice(&self.queues.to_ne_bytes());
        bytes.extend_from_slice(&self.entries.to_ne_bytes());
        bytes.resize(24, 0);
        bytes
    }
}

/// A request of the front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the specification's own names")]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<MemoryRegion>),
    SetLogBase { size: u64, offset: u64 },
    SetLogFd,
    SetVringNum { index: u32, num: u32 },
    SetVringAddr { index: u32, address: RingAddress },
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringKick { index: u8, fd: bool },
    SetVringCall { index: u8, fd: bool },
    SetVringErr { index: u8, fd: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable { index: u32, enable: bool },
    SetBackendReqFd,
    GetConfig { offset: u32, size: u32, flags: u32 },
    SetConfig { offset: u32, data: Vec<u8> },
    GetInflightFd(InflightArea),
    SetInflightFd(InflightArea),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(MemoryRegion),
    RemMemReg(MemoryRegion),
}

impl Message {
    /// Reads the payload of a request with this number. Total: whatever the bytes are.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(code: u32, payload: &[u8]) -> Result<Message, &'static str> {
        let mut fields = Fields(payload);
        let message = match code {
            1 => Message::GetFeatures,
            2 => Message::SetFeatures(fields.u64()?),
            3 => Message::SetOwner,
            4 => Message::ResetOwner,
            5 => Message::SetMemTable(fields.table()?),
            6 => Message::SetLogBase { size: fields.u64()?, offset: fields.u64()? },
            7 => Message::SetLogFd,
            8 => Message::SetVringNum { index: fields.u32()?, num: fields.u32()? },
            9 => {
                let (index, flags) = (fields.u32()?, fields.u32()?);
                let (desc, used) = (fields.u64()?, fields.u64()?);
                let (avail, log) = (fields.u64()?, fields.u64()?);
                Message::SetVringAddr { index, address: RingAddress { flags, desc, used, avail, log } }
            }
            10 => Message::SetVringBase { index: fields.u32()?, base: fields.u32()? },
            11 => {
                let index = fields.u32()?;
                fields.u32()?;
                Message::GetVringBase { index }
            }
            12 => fields.ring_fd().map(|(index, fd)| Message::SetVringKick { index, fd })?,
            13 => fields.ring_fd().map(|(index, fd)| Message::SetVringCall { index, fd })?,
            14 => fields.ring_fd().map(|(index, fd)| Message::SetVringErr { index, fd })?,
            15 => Message::GetProtocolFeatures,
            16 => Message::SetProtocolFeatures(fields.u64()?),
            17 => Message::GetQueueNum,
            18 => {
                let index = fields.u32()?;
                let enable = match fields.u32()? {
                    0 => false,
                    1 => true,
                    _ => return Err("a queue is enabled by 1 and disabled by 0"),
                };
                Message::SetVringEnable { index, enable }
            }
            21 => Message::SetBackendReqFd,
            24 => {
                let (offset, size, flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
                fields.config(offset, size)?;
                Message::GetConfig { offset, size, flags }
            }
            25 => {
                let (offset, size, _flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
                Message::SetConfig { offset, data: fields.config(offset, size)?.to_vec() }
            }
            31 => Message::GetInflightFd(fields.inflight()?),
            32 => Message::SetInflightFd(fields.inflight()?),
            34 => Message::ResetDevice,
            36 => Message::GetMaxMemSlots,
            37 => Message::AddMemReg(fields.single_region()?),
            38 => Message::RemMemReg(fields.single_region()?),
            _ => return Err("a request that was not offered"),
        };
        if fields.0.is_empty() { Ok(message) } else { Err("a message with something left over at its end") }
    }

    /// How many descriptors come with it: the fewest and the most.
    pub fn fds(&self) -> (usize, usize) {
        match self {
            Message::SetMemTable(regions) => (regions.len(), regions.len()),
            Message::SetVringKick { fd, .. }
            | Message::SetVringCall { fd, .. }
            | Message::SetVringErr { fd, .. } => (usize::from(*fd), usize::from(*fd)),
            Message::SetLogBase { .. }
            | Message::SetLogFd
            | Message::SetBackendReqFd
            | Message::SetInflightFd(_)
            | Message::AddMemReg(_) => (1, 1),
            // Some front-ends send one that means nothing; the specification lets it pass.
            Message::RemMemReg(_) => (0, 1),
            _ => (0, 0),
        }
    }

    /// True if it has an answer of its own, so that it is never acknowledged by a number.
    pub fn has_answer(&self) -> bool {
        matches!(
            self,
            Message::GetFeatures
                | Message::SetLogBase { .. }
                | Message::GetVringBase { .. }
                | Message::GetProtocolFeatures
                | Message::GetQueueNum
                | Message::GetConfig { .. }
                | Message::GetInflightFd(_)
                | Message::GetMaxMemSlots
        )
    }
}

/// What is left of a payload.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (first, rest) = self.0.split_first_chunk().ok_or("a message that is too short")?;
        self.0 = rest;
        Ok(*first)
    }

    fn u16(&mut self) -> Result<u16, &'static str> {
        self.take().map(u16::from_ne_bytes)
    }

    fn u32(&mut self) -> Result<u32, &'static str> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.take().map(u64::from_ne_bytes)
    }

    /// A queue's number, and whether a descriptor comes with it.
    fn ring_fd(&mut self) -> Result<(u8, bool), &'static str> {
        let value = self.u64()?;
        if value >> 9 != 0 { Err("reserved bits are set") } else { Ok((value as u8, value & 0x100 == 0)) }
    }

    fn region(&mut self) -> Result<MemoryRegion, &'static str> {
        let (guest, size, user, offset) = (self.u64()?, self.u64()?, self.u64()?, self.u64()?);
        let ends = [guest, user, offset].map(|start| start.checked_add(size));
        if size == 0 || ends.contains(&None) {
            return Err("a region of memory that is empty or wraps around");
        }
        Ok(MemoryRegion { guest, size, user, offset })
    }

    fn single_region(&mut self) -> Result<MemoryRegion, &'static str> {
        self.u64()?;
        self.region()
    }

    fn table(&mut self) -> Result<Vec<MemoryRegion>, &'static str> {
        let count = self.u32()? as usize;
        self.u32()?;
        if count > MOST_FDS {
            return Err("a memory table with too many regions");
        }
        (0..count).map(|_| self.region()).collect()
    }

    fn config(&mut self, offset: u32, size: u32) -> Result<&'a [u8], &'static str> {
        if offset.checked_add(size).is_none_or(|end| end > CONFIG) || self.0.len() != size as usize {
            return Err("a configuration space of another size");
        }
        Ok(std::mem::take(&mut self.0))
    }

    fn inflight(&mut self) -> Result<InflightArea, &'static str> {
        let (size, offset) = (self.u64()?, self.u64()?);
        let (queues, entries) = (self.u16()?, self.u16()?);
        // With or without the padding that a compiler puts behind the last number.
        if self.0.len() == 4 {
            self.u32()?;
        }
        Ok(InflightArea { size, offset, queues, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(code: u32, flags: u32, size: u32) -> [u8; HEADER] {
        message(code, flags, &[])[..8].iter().copied().chain(size.to_ne_bytes()).collect::<Vec<_>>().try_into().unwrap()
    }

    #[test]
    fn headers() {
        assert_eq!(Header::parse(&header(5, 9, 8)), Ok(Header { code: 5, need_reply: true, size: 8 }));
        for (flags, size) in [(2, 0), (1 | REPLY, 0), (1, 4097)] {
            assert!(Header::parse(&header(1, flags, size)).is_err());
        }
    }

    #[test]
    fn a_ring_without_a_descriptor_says_so() {
        let parse = |value: u64| Message::parse(12, &value.to_ne_bytes());
        assert_eq!(parse(3), Ok(Message::SetVringKick { index: 3, fd: true }));
        assert_eq!(parse(0x103).unwrap().fds(), (0, 0));
        assert!(parse(0x203).is_err());
    }

    #[test]
    fn an_inflight_area_with_and_without_padding() {
        let area = InflightArea { size: 4096, offset: 0, queues: 2, entries: 128 };
        let bytes = area.to_bytes();
        assert_eq!(Message::parse(32, &bytes), Ok(Message::SetInflightFd(area)));
        assert_eq!(Message::parse(32, &bytes[..20]), Ok(Message::SetInflightFd(area)));
    }

    #[test]
    fn regions_do_not_wrap_around() {
        let region = |guest: u64, size: u64| {
            let fields = [0, guest, size, 0x7000_0000, 0];
            Message::parse(37, &fields.map(u64::to_ne_bytes).concat())
        };
        assert!(region(0, 4096).is_ok());
        assert!(region(0, 0).is_err() && region(u64::MAX - 10, 4096).is_err());
    }

    proptest! {
        #[test]
        fn parsing_is_total(code in 0u32..50, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::parse(code, &payload) {
                prop_assert!(message.fds().1 <= MOST_FDS);
            }
        }
    }
}
