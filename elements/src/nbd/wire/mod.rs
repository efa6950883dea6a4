//! Messages as bytes: constants, headers, encoders and decoders.
//!
//! Everything here is a pure function over byte slices. Encoders return arrays or append to a
//! `Vec<u8>`; decoders borrow. All integers are big-endian on the wire.

mod error;
mod option;
mod reply;
mod request;

pub use error::ErrorCode;
pub use option::{
    ClientFlags, HandshakeFlags, Info, OptionCode, OptionHeader, OptionReply, ReplyCode, decode_option,
    decode_option_reply, encode_option, encode_option_reply,
};
pub use reply::{
    Chunk, ChunkType, ErrorChunk, Reply, ReplyFlags, ReplyStyle, ReplyTo, decode_data, decode_error,
    decode_hole, decode_reply, encode_chunk, encode_simple_reply, put_simple_reply, reply_header_len,
};
pub use request::{
    Command, CommandFlags, RequestHeader, Rules, decode_request, decode_request_extended, encode_request,
    encode_request_extended,
};

/// The first eight bytes that any server sends.
pub const MAGIC_INIT: u64 = 0x4e42_444d_4147_4943;
/// The next eight bytes of a newstyle server, and the first of every option. ASCII `IHAVEOPT`.
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
/// The next eight bytes of an oldstyle server, which is refused.
pub const MAGIC_OLDSTYLE: u64 = 0x0000_4202_8186_1253;
/// The first eight bytes of every option reply.
pub const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// The first four bytes of a compact request.
pub const MAGIC_REQUEST: u32 = 0x2560_9513;
/// The first four bytes of an extended request.
pub const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
/// The first four bytes of a simple reply.
pub const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;
/// The first four bytes of a structured reply chunk.
pub const MAGIC_STRUCTURED_REPLY: u32 = 0x668e_33ef;
/// The first four bytes of an extended reply chunk.
pub const MAGIC_EXTENDED_REPLY: u32 = 0x6e8a_278c;

/// The IANA-assigned TCP port.
pub const DEFAULT_PORT: u16 = 10_809;
/// The longest string (export name, context name, message) that the specification allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// The largest payload of one request or one chunk, in bytes. Twice what every peer must accept.
pub const MAX_PAYLOAD: u32 = 64 << 20;
/// The most descriptors in one block status chunk that a peer need expect.
pub const MAX_DESCRIPTORS: u32 = 1 << 20;
/// Zero bytes after the answer to NBD_OPT_EXPORT_NAME, unless both sides agreed to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// A length that the server must be able to read in one chunk, in bytes, when a client forbids fragments.
pub const MIN_UNFRAGMENTED: u32 = 65_536;

/// The bytes are no message: a wrong magic number. The stream is out of step and must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad NBD magic number {0:#x}")]
pub struct BadMagic(pub u64);

/// A reply chunk contradicts the specification or itself. The connection must be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad NBD reply: {0}")]
pub struct BadReply(pub &'static str);

/// A newtype of flag bits with named constants.
macro_rules! flags {
    ($(#[$doc:meta])* $name:ident($raw:ty) { $($(#[$item_doc:meta])* $item:ident = $bit:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub $raw);

        impl $name {
            /// No flag.
            pub const NONE: Self = Self(0);
            $($(#[$item_doc])* pub const $item: Self = Self(1 << $bit);)*

            /// True if every flag of `other` is set here.
            #[inline]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// These flags and those of `other`.
            #[inline]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// These flags less those of `other`.
            #[inline]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            #[inline]
            fn bitor(self, other: Self) -> Self {
                self.with(other)
            }
        }
    };
}

/// A newtype of a number with named constants, which prints as the specification's name. Any number
/// can be held, since peers may send any.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($raw:ty) {
        $($(#[$item_doc:meta])* $item:ident = $value:expr, $label:literal;)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name(pub $raw);

        impl $name {
            $($(#[$item_doc])* pub const $item: Self = Self($value);)*
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match *self {
                    $(Self::$item => f.write_str($label),)*
                    Self(other) => write!(f, "{} {other:#x}", stringify!($name)),
                }
            }
        }
    };
}
pub(crate) use {codes, flags};

flags! {
    /// What an export can do, sent to the client when it is chosen.
    TransmissionFlags(u16) {
        /// Always set.
        HAS_FLAGS = 0;
        /// Writes are refused.
        READ_ONLY = 1;
        /// NBD_CMD_FLUSH is understood.
        SEND_FLUSH = 2;
        /// [`CommandFlags::FUA`] is understood.
        SEND_FUA = 3;
        /// The medium rotates.
        ROTATIONAL = 4;
        /// NBD_CMD_TRIM is understood.
        SEND_TRIM = 5;
        /// NBD_CMD_WRITE_ZEROES is understood.
        SEND_WRITE_ZEROES = 6;
        /// [`CommandFlags::DF`] is understood. Only with structured replies or extended headers.
        SEND_DF = 7;
        /// A flush or FUA on one connection covers what was completed on any of them.
        CAN_MULTI_CONN = 8;
        /// NBD_CMD_RESIZE is understood; an experiment that this code does not take part in.
        SEND_RESIZE = 9;
        /// NBD_CMD_CACHE is understood.
        SEND_CACHE = 10;
        /// [`CommandFlags::FAST_ZERO`] is understood. Only with [`TransmissionFlags::SEND_WRITE_ZEROES`].
        SEND_FAST_ZERO = 11;
        /// Block status requests may choose contexts in a payload. Only with extended headers.
        BLOCK_STATUS_PAYLOAD = 12;
    }
}

/// The integer at `at`. Callers pass constants that lie inside the array, so no check remains.
#[inline]
pub(crate) fn be_u16(bytes: &[u8], at: usize) -> u16 {
    let mut raw = [0; 2];
    raw.copy_from_slice(&bytes[at..at + 2]);
    u16::from_be_bytes(raw)
}

/// As [`be_u16`], 32 bits.
#[inline]
pub(crate) fn be_u32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(raw)
}

/// As [`be_u16`], 64 bits.
#[inline]
pub(crate) fn be_u64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(raw)
}

/// Takes integers and bytes off the front of a payload whose length nobody vouches for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    /// The next 16 bits, or None at the end.
    pub(crate) fn u16(&mut self) -> Option<u16> {
        let (raw, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_be_bytes(*raw))
    }

    /// The next 32 bits, or None at the end.
    pub(crate) fn u32(&mut self) -> Option<u32> {
        let (raw, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*raw))
    }

    /// The next 64 bits, or None at the end.
    pub(crate) fn u64(&mut self) -> Option<u64> {
        let (raw, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_be_bytes(*raw))
    }

    /// The next `len` bytes, or None if there are fewer.
    pub(crate) fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
}

/// The string that these bytes are, by the specification's rules: UTF-8, no NUL, at most
/// [`MAX_STRING`] bytes. None if they are none.
pub fn string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > MAX_STRING || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// The start of `text` that fits a string on the wire: cut at [`MAX_STRING`] bytes and at a NUL.
pub(crate) fn fit(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    &text[..text.floor_char_boundary(MAX_STRING)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_bounded_and_clean() {
        assert_eq!(string(b"disk"), Some("disk"));
        assert_eq!(string(b"di\0sk"), None);
        assert_eq!(string(b"\xff"), None);
        assert!(string(&[b'a'; MAX_STRING]).is_some());
        assert!(string(&[b'a'; MAX_STRING + 1]).is_none());
        let long = "ä".repeat(MAX_STRING);
        assert_eq!(fit(&long).len(), MAX_STRING);
        assert_eq!(fit(&format!("a{long}")).len(), MAX_STRING - 1);
        assert_eq!(fit("before\0after"), "before");
    }

    #[test]
    fn codes_print_as_the_specification_names_them() {
        assert_eq!(Command::WRITE_ZEROES.to_string(), "NBD_CMD_WRITE_ZEROES");
        assert_eq!(Command(99).to_string(), "Command 0x63");
    }
}
