//! The codec: numbers and layouts of the NBD protocol, written from the specification alone.
//!
//! Nothing here is shared with any other NBD code, so that a misreading in one does not hide in both.

/// First magic of every greeting, ASCII `NBDMAGIC`.
pub(crate) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Magic of newstyle greetings and of option requests, ASCII `IHAVEOPT`.
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of option replies.
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of compact requests.
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of extended requests.
pub(crate) const EXT_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Magic of simple replies.
pub(crate) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Magic of structured reply chunks.
pub(crate) const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
/// Magic of extended reply chunks.
pub(crate) const EXT_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The longest string the protocol allows, in bytes.
pub(crate) const STRING_MAX: usize = 4096;

pub(crate) mod handshake {
    pub(crate) const FIXED_NEWSTYLE: u16 = 1;
    pub(crate) const NO_ZEROES: u16 = 2;
}

pub(crate) mod opt {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const PEEK_EXPORT: u32 = 4;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META: u32 = 9;
    pub(crate) const SET_META: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

pub(crate) mod rep {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Set in the type of every error reply.
    pub(crate) const ERROR_BIT: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub(crate) const ERR_POLICY: u32 = ERROR_BIT + 2;
    pub(crate) const ERR_INVALID: u32 = ERROR_BIT + 3;
    pub(crate) const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    pub(crate) const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;

    /// The name of a reply type, for messages.
    pub(crate) fn name(kind: u32) -> String {
        let known = match kind {
            ACK => "ACK",
            SERVER => "SERVER",
            INFO => "INFO",
            META_CONTEXT => "META_CONTEXT",
            ERR_UNSUP => "ERR_UNSUP",
            ERR_POLICY => "ERR_POLICY",
            ERR_INVALID => "ERR_INVALID",
            ERR_PLATFORM => "ERR_PLATFORM",
            ERR_TLS_REQD => "ERR_TLS_REQD",
            ERR_UNKNOWN => "ERR_UNKNOWN",
            ERR_SHUTDOWN => "ERR_SHUTDOWN",
            ERR_BLOCK_SIZE_REQD => "ERR_BLOCK_SIZE_REQD",
            ERR_TOO_BIG => "ERR_TOO_BIG",
            ERR_EXT_HEADER_REQD => "ERR_EXT_HEADER_REQD",
            other => return format!("reply type {other:#x}"),
        };
        known.to_owned()
    }
}

pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub(crate) mod tf {
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const FLUSH: u16 = 1 << 2;
    pub(crate) const FUA: u16 = 1 << 3;
    pub(crate) const TRIM: u16 = 1 << 5;
    pub(crate) const WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const DF: u16 = 1 << 7;
    pub(crate) const MULTI_CONN: u16 = 1 << 8;
    pub(crate) const CACHE: u16 = 1 << 10;
    pub(crate) const FAST_ZERO: u16 = 1 << 11;
    pub(crate) const STATUS_PAYLOAD: u16 = 1 << 12;
}

pub(crate) mod cmd {
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;

    /// The name of a command, for messages.
    pub(crate) fn name(command: u16) -> String {
        let known = match command {
            READ => "READ",
            WRITE => "WRITE",
            DISC => "DISC",
            FLUSH => "FLUSH",
            TRIM => "TRIM",
            CACHE => "CACHE",
            WRITE_ZEROES => "WRITE_ZEROES",
            BLOCK_STATUS => "BLOCK_STATUS",
            other => return format!("command {other:#x}"),
        };
        known.to_owned()
    }
}

/// Command flags.
pub(crate) mod cf {
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
    /// A bit no version of the protocol gives a meaning.
    pub(crate) const UNKNOWN: u16 = 1 << 14;
}

pub(crate) mod chunk {
    /// The flag of a reply's final chunk.
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    /// Set in the type of every error chunk.
    pub(crate) const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

/// Error values of the transmission phase.
pub(crate) mod errno {
    pub(crate) const EPERM: u32 = 1;
    pub(crate) const EIO: u32 = 5;
    pub(crate) const ENOMEM: u32 = 12;
    pub(crate) const EINVAL: u32 = 22;
    pub(crate) const ENOSPC: u32 = 28;
    pub(crate) const EOVERFLOW: u32 = 75;
    pub(crate) const ENOTSUP: u32 = 95;
    pub(crate) const ESHUTDOWN: u32 = 108;

    /// The values a reply may carry.
    pub(crate) const KNOWN: [u32; 8] = [EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN];

    /// The name of an error value, for messages.
    pub(crate) fn name(value: u32) -> String {
        const NAMES: [&str; 8] =
            ["EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN"];
        match KNOWN.iter().position(|&known| known == value) {
            Some(at) => NAMES[at].to_owned(),
            None => format!("error {value}"),
        }
    }
}

/// `base:allocation`: the extent is not allocated.
pub(crate) const STATE_HOLE: u64 = 1;
/// `base:allocation`: the extent reads as zeroes.
pub(crate) const STATE_ZERO: u64 = 2;

/// Builds messages; every number goes out big-endian.
#[derive(Debug, Default, Clone)]
pub(crate) struct Out(Vec<u8>);

impl Out {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// A string preceded by its length in 32 bits. Strings of the suite are far below 4 GiB.
    pub(crate) fn string(self, text: &str) -> Self {
        self.u32(text.len() as u32).bytes(text.as_bytes())
    }

    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

/// Takes messages apart; every read is checked against the end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct In<'a>(pub(crate) &'a [u8]);

impl<'a> In<'a> {
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Why bytes are not an NBD string, if they are not.
pub(crate) fn string_fault(bytes: &[u8]) -> Option<&'static str> {
    if bytes.len() > STRING_MAX {
        return Some("is longer than 4096 bytes");
    }
    if bytes.contains(&0) {
        return Some("contains a NUL");
    }
    std::str::from_utf8(bytes).err().map(|_| "is not UTF-8")
}

/// An option request.
pub(crate) fn option_request(option: u32, data: &[u8]) -> Vec<u8> {
    Out::new().u64(OPTION_MAGIC).u32(option).u32(data.len() as u32).bytes(data).done()
}

/// The data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
pub(crate) fn info_data(export: &str, requests: &[u16]) -> Vec<u8> {
    let out = Out::new().string(export).u16(requests.len() as u16);
    requests.iter().fold(out, |out, &request| out.u16(request)).done()
}

/// The data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
pub(crate) fn meta_data(export: &str, queries: &[&str]) -> Vec<u8> {
    let out = Out::new().string(export).u32(queries.len() as u32);
    queries.iter().fold(out, |out, query| out.string(query)).done()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magics_spell_what_the_specification_says() {
        assert_eq!(&INIT_MAGIC.to_be_bytes(), b"NBDMAGIC");
        assert_eq!(&OPTION_MAGIC.to_be_bytes(), b"IHAVEOPT");
    }

    #[test]
    fn an_option_request_has_the_documented_layout() {
        let bytes = option_request(opt::GO, &info_data("ab", &[info::BLOCK_SIZE]));
        assert_eq!(bytes, b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x02ab\0\x01\0\x03");
    }

    #[test]
    fn reads_past_the_end_are_refused() {
        let mut input = In(&[1, 2, 3]);
        assert_eq!(input.u16(), Some(0x0102));
        assert_eq!(input.u32(), None);
        assert_eq!(input.rest(), [3]);
    }

    #[test]
    fn string_faults_are_named() {
        assert_eq!(string_fault("caf\u{e9}".as_bytes()), None);
        assert!(string_fault(b"a\0b").is_some());
        assert!(string_fault(b"\xff").is_some());
        assert!(string_fault(&[b'a'; STRING_MAX + 1]).is_some());
    }
}
