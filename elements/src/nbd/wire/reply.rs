//! Replies of the transmission phase.

use super::{
    BadMagic, BadReply, ErrorCode, MAGIC_EXTENDED_REPLY, MAGIC_SIMPLE_REPLY, MAGIC_STRUCTURED_REPLY,
    MAX_DESCRIPTORS, MAX_STRING, Reader, RequestHeader, be_u16, be_u32, be_u64, codes, fit, flags,
};

/// Which messages a server answers with, as the handshake decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyStyle {
    /// Simple replies only.
    #[default]
    Simple,
    /// Structured chunks for reads and block status; simple replies remain legal for the rest.
    Structured,
    /// Extended chunks for everything.
    Extended,
}

flags! {
    /// Flags of a chunk.
    ReplyFlags(u16) {
        /// The last chunk of its reply.
        DONE = 0;
    }
}

codes! {
    /// What a chunk holds.
    ChunkType(u16) {
        /// Nothing; the end of the reply.
        NONE = 0, "NBD_REPLY_TYPE_NONE";
        /// An offset and data.
        OFFSET_DATA = 1, "NBD_REPLY_TYPE_OFFSET_DATA";
        /// An offset and a number of zeroes.
        OFFSET_HOLE = 2, "NBD_REPLY_TYPE_OFFSET_HOLE";
        /// Descriptors of 8 bytes for one context.
        BLOCK_STATUS = 5, "NBD_REPLY_TYPE_BLOCK_STATUS";
        /// Descriptors of 16 bytes for one context.
        BLOCK_STATUS_EXT = 6, "NBD_REPLY_TYPE_BLOCK_STATUS_EXT";
        /// An error.
        ERROR = (1 << 15) + 1, "NBD_REPLY_TYPE_ERROR";
        /// An error at an offset.
        ERROR_OFFSET = (1 << 15) + 2, "NBD_REPLY_TYPE_ERROR_OFFSET";
    }
}

impl ChunkType {
    /// True for every kind of error, known or not.
    #[inline]
    pub const fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

/// The header of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Whether more follow.
    pub flags: ReplyFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset; on the wire only in the extended form.
    pub offset: u64,
    /// Bytes of payload that follow.
    pub len: u64,
}

/// The header of a reply, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply. The data of a successful read follows it.
    Simple {
        /// Success or not.
        error: ErrorCode,
        /// The request's cookie.
        cookie: u64,
    },
    /// A structured or extended chunk. Its payload follows.
    Chunk(Chunk),
}

/// The 16 bytes of a simple reply.
#[inline]
pub fn encode_simple_reply(error: ErrorCode, cookie: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&MAGIC_SIMPLE_REPLY.to_be_bytes());
    out[4..8].copy_from_slice(&error.0.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

/// Appends a simple reply.
#[inline]
pub fn put_simple_reply(out: &mut Vec<u8>, error: ErrorCode, cookie: u64) {
    out.extend_from_slice(&encode_simple_reply(error, cookie));
}

/// A chunk's header, in 32 bytes of which the first `usize` count: 20 structured, 32 extended. A
/// structured header holds 32 bits of length; callers keep `len` below [`super::MAX_PAYLOAD`] plus the
/// fixed part.
#[inline]
pub fn encode_chunk(extended: bool, chunk: &Chunk) -> ([u8; 32], usize) {
    let mut out = [0; 32];
    let magic = if extended { MAGIC_EXTENDED_REPLY } else { MAGIC_STRUCTURED_REPLY };
    out[..4].copy_from_slice(&magic.to_be_bytes());
    out[4..6].copy_from_slice(&chunk.flags.0.to_be_bytes());
    out[6..8].copy_from_slice(&chunk.kind.0.to_be_bytes());
    out[8..16].copy_from_slice(&chunk.cookie.to_be_bytes());
    if extended {
        out[16..24].copy_from_slice(&chunk.offset.to_be_bytes());
        out[24..].copy_from_slice(&chunk.len.to_be_bytes());
        (out, 32)
    } else {
        debug_assert!(chunk.len <= u64::from(u32::MAX), "a structured chunk holds 32 bits of length");
        out[16..20].copy_from_slice(&(chunk.len as u32).to_be_bytes());
        (out, 20)
    }
}

/// Where the chunks of one reply belong: what each repeats of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
    /// True for extended chunks, false for structured ones.
    pub extended: bool,
}

impl ReplyTo {
    /// For the chunks that answer `request`.
    #[inline]
    pub fn new(request: &RequestHeader, extended: bool) -> ReplyTo {
        ReplyTo { cookie: request.cookie, offset: request.offset, extended }
    }

    /// Appends the header of a chunk with `len` bytes of payload, which the caller sends next.
    #[inline]
    pub fn put_chunk(&self, out: &mut Vec<u8>, kind: ChunkType, done: bool, len: u64) {
        let flags = if done { ReplyFlags::DONE } else { ReplyFlags::NONE };
        let chunk = Chunk { flags, kind, cookie: self.cookie, offset: self.offset, len };
        let (bytes, used) = encode_chunk(self.extended, &chunk);
        out.extend_from_slice(&bytes[..used]);
    }

    /// Appends a chunk that says: done, and no error unless an earlier chunk said so.
    #[inline]
    pub fn put_none(&self, out: &mut Vec<u8>) {
        self.put_chunk(out, ChunkType::NONE, true, 0);
    }

    /// Appends the start of a data chunk. `len` bytes (at least one), read from the export at `offset`,
    /// are to follow; once they are promised they must be sent, so `done` only if no error can come.
    #[inline]
    pub fn put_data(&self, out: &mut Vec<u8>, done: bool, offset: u64, len: u32) {
        debug_assert!(len > 0, "a data chunk describes at least one byte");
        self.put_chunk(out, ChunkType::OFFSET_DATA, done, u64::from(len) + 8);
        out.extend_from_slice(&offset.to_be_bytes());
    }

    /// Appends a chunk that says: `len` bytes (at least one) at `offset` are zeroes.
    #[inline]
    pub fn put_hole(&self, out: &mut Vec<u8>, done: bool, offset: u64, len: u32) {
        debug_assert!(len > 0, "a hole chunk describes at least one byte");
        self.put_chunk(out, ChunkType::OFFSET_HOLE, done, 12);
        out.extend_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(&len.to_be_bytes());
    }

    /// Appends an error chunk; with `at`, an offset inside the request, for that offset only. The
    /// message is for people and is cut to what a string may hold. `error` must not be
    /// [`ErrorCode::OK`].
    #[cold]
    pub fn put_error(&self, out: &mut Vec<u8>, done: bool, error: ErrorCode, message: &str, at: Option<u64>) {
        debug_assert!(error != ErrorCode::OK, "an error chunk holds an error");
        let message = fit(message);
        let (kind, tail) = match at {
            Some(_) => (ChunkType::ERROR_OFFSET, 8),
            None => (ChunkType::ERROR, 0),
        };
        self.put_chunk(out, kind, done, (6 + message.len() + tail) as u64);
        out.extend_from_slice(&error.0.to_be_bytes());
        // `fit` keeps the message below MAX_STRING, which 16 bits hold.
        out.extend_from_slice(&(message.len() as u16).to_be_bytes());
        out.extend_from_slice(message.as_bytes());
        if let Some(offset) = at {
            out.extend_from_slice(&offset.to_be_bytes());
        }
    }
}

/// Bytes of the reply header that starts with these four, the magic number included.
#[inline]
pub fn reply_header_len(style: ReplyStyle, magic: [u8; 4]) -> Result<usize, BadMagic> {
    match (u32::from_be_bytes(magic), style) {
        (MAGIC_SIMPLE_REPLY, ReplyStyle::Simple | ReplyStyle::Structured) => Ok(16),
        (MAGIC_STRUCTURED_REPLY, ReplyStyle::Structured) => Ok(20),
        (MAGIC_EXTENDED_REPLY, ReplyStyle::Extended) => Ok(32),
        (magic, _) => Err(BadMagic(u64::from(magic))),
    }
}

/// The reply at the start of `bytes` and the length of its header; None if more bytes are needed.
/// `offset` of a structured chunk is 0, since it is not on the wire.
#[inline]
pub fn decode_reply(style: ReplyStyle, bytes: &[u8]) -> Result<Option<(Reply, usize)>, BadMagic> {
    let Some(magic) = bytes.first_chunk::<4>() else { return Ok(None) };
    let header_len = reply_header_len(style, *magic)?;
    if bytes.len() < header_len {
        return Ok(None);
    }
    if header_len == 16 {
        let (error, cookie) = (ErrorCode(be_u32(bytes, 4)), be_u64(bytes, 8));
        return Ok(Some((Reply::Simple { error, cookie }, header_len)));
    }
    let (offset, len) = match style {
        ReplyStyle::Extended => (be_u64(bytes, 16), be_u64(bytes, 24)),
        _ => (0, u64::from(be_u32(bytes, 16))),
    };
    let flags = ReplyFlags(be_u16(bytes, 4));
    let kind = ChunkType(be_u16(bytes, 6));
    Ok(Some((Reply::Chunk(Chunk { flags, kind, cookie: be_u64(bytes, 8), offset, len }), header_len)))
}

impl Chunk {
    /// True if no further chunk of this reply follows.
    #[inline]
    pub fn is_done(&self) -> bool {
        self.flags.contains(ReplyFlags::DONE)
    }

    /// Whether a client that asked for at most `max_data` bytes can go on: the length fits the type,
    /// the type fits the style, and the payload is small enough to be taken in. An error means: drop
    /// the connection.
    pub fn check(&self, extended: bool, max_data: u32) -> Result<(), BadReply> {
        let descriptors = u64::from(MAX_DESCRIPTORS);
        let ok = match self.kind {
            ChunkType::NONE => self.len == 0 && self.is_done(),
            ChunkType::OFFSET_DATA => self.len > 8 && self.len - 8 <= u64::from(max_data),
            ChunkType::OFFSET_HOLE => self.len == 12,
            ChunkType::BLOCK_STATUS => {
                let rest = self.len.wrapping_sub(4);
                !extended && rest != 0 && rest.is_multiple_of(8) && rest / 8 <= descriptors
            }
            ChunkType::BLOCK_STATUS_EXT => {
                let rest = self.len.wrapping_sub(8);
                extended && rest != 0 && rest.is_multiple_of(16) && rest / 16 <= descriptors
            }
            kind if kind.is_error() => {
                let least = if kind == ChunkType::ERROR_OFFSET { 14 } else { 6 };
                // Room for a string and for what a later specification might add.
                (least..=2 * MAX_STRING as u64).contains(&self.len)
            }
            _ => return Err(BadReply("unknown chunk type")),
        };
        if ok { Ok(()) } else { Err(BadReply("chunk length does not fit its type")) }
    }
}

/// The payload of an error chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// The error, never [`ErrorCode::OK`].
    pub error: ErrorCode,
    /// What the server says to people; empty if it is silent or not UTF-8.
    pub message: &'a str,
    /// Where it happened, for NBD_REPLY_TYPE_ERROR_OFFSET.
    pub offset: Option<u64>,
}

/// The offset and the data of an NBD_REPLY_TYPE_OFFSET_DATA payload.
#[inline]
pub fn decode_data(payload: &[u8]) -> Result<(u64, &[u8]), BadReply> {
    match payload.split_first_chunk::<8>() {
        Some((offset, data)) if !data.is_empty() => Ok((u64::from_be_bytes(*offset), data)),
        _ => Err(BadReply("data chunk without data")),
    }
}

/// The offset and the length of an NBD_REPLY_TYPE_OFFSET_HOLE payload.
pub fn decode_hole(payload: &[u8]) -> Result<(u64, u32), BadReply> {
    let mut reader = Reader(payload);
    match (reader.u64(), reader.u32(), reader.0) {
        (Some(offset), Some(len), []) if len != 0 => Ok((offset, len)),
        _ => Err(BadReply("hole chunk of the wrong length or without a hole")),
    }
}

/// The payload of an error chunk of any type, known or not.
#[cold]
pub fn decode_error(kind: ChunkType, payload: &[u8]) -> Result<ErrorChunk<'_>, BadReply> {
    let bad = BadReply("error chunk is shorter than its parts");
    let mut reader = Reader(payload);
    let error = ErrorCode(reader.u32().ok_or(bad)?);
    let message_len = reader.u16().ok_or(bad)?;
    let message = super::string(reader.bytes(usize::from(message_len)).ok_or(bad)?).unwrap_or_default();
    let offset = match kind {
        ChunkType::ERROR_OFFSET => Some(reader.u64().ok_or(bad)?),
        _ => None,
    };
    match error {
        ErrorCode::OK => Err(BadReply("error chunk without an error")),
        error => Ok(ErrorChunk { error, message, offset }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TO: ReplyTo = ReplyTo { cookie: 7, offset: 512, extended: false };

    fn chunk_of(extended: bool, bytes: &[u8]) -> (Chunk, &[u8]) {
        let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
        match decode_reply(style, bytes) {
            Ok(Some((Reply::Chunk(chunk), used))) => {
                assert_eq!(chunk.len as usize, bytes.len() - used);
                (chunk, &bytes[used..])
            }
            other => panic!("not a chunk: {other:?}"),
        }
    }

    proptest! {
        #[test]
        fn headers_survive_the_wire(flags: u16, kind: u16, cookie: u64, offset: u64, len: u32, extended: bool) {
            let offset = if extended { offset } else { 0 };
            let chunk = Chunk {
                flags: ReplyFlags(flags), kind: ChunkType(kind), cookie, offset, len: u64::from(len),
            };
            let (bytes, used) = encode_chunk(extended, &chunk);
            let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
            prop_assert_eq!(decode_reply(style, &bytes[..used]), Ok(Some((Reply::Chunk(chunk), used))));
            prop_assert_eq!(decode_reply(style, &bytes[..used - 1]), Ok(None));
            let simple = encode_simple_reply(ErrorCode(len), cookie);
            let decoded = (Reply::Simple { error: ErrorCode(len), cookie }, 16);
            prop_assert_eq!(decode_reply(ReplyStyle::Simple, &simple), Ok(Some(decoded)));
            prop_assert_eq!(decode_reply(ReplyStyle::Structured, &simple), Ok(Some(decoded)));
            prop_assert!(decode_reply(ReplyStyle::Extended, &simple).is_err());
        }

        #[test]
        fn errors_survive_the_wire(
            code in 1_u32.., message in "[^\0]{0,300}", at: Option<u64>, done: bool, extended: bool,
        ) {
            let mut out = Vec::new();
            let to = ReplyTo { extended, ..TO };
            to.put_error(&mut out, done, ErrorCode(code), &message, at);
            let (chunk, payload) = chunk_of(extended, &out);
            prop_assert_eq!(chunk.check(extended, 0), Ok(()));
            prop_assert_eq!(chunk.is_done(), done);
            let decoded = decode_error(chunk.kind, payload);
            prop_assert_eq!(decoded, Ok(ErrorChunk { error: ErrorCode(code), message: &message, offset: at }));
        }

        #[test]
        fn holes_and_data_survive_the_wire(offset: u64, len in 1_u32..5000, done: bool, extended: bool) {
            let to = ReplyTo { extended, ..TO };
            let mut out = Vec::new();
            to.put_hole(&mut out, done, offset, len);
            let (chunk, payload) = chunk_of(extended, &out);
            prop_assert_eq!(chunk.check(extended, 0), Ok(()));
            prop_assert_eq!(decode_hole(payload), Ok((offset, len)));
            let mut out = Vec::new();
            to.put_data(&mut out, done, offset, len);
            out.extend(std::iter::repeat_n(0x5a, len as usize));
            let (chunk, payload) = chunk_of(extended, &out);
            prop_assert_eq!(chunk.check(extended, len), Ok(()));
            prop_assert!(chunk.check(extended, len - 1).is_err());
            let data = vec![0x5a; len as usize];
            prop_assert_eq!(decode_data(payload), Ok((offset, data.as_slice())));
        }

        #[test]
        fn no_payload_panics(kind: u16, payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = decode_error(ChunkType(kind), &payload);
            let _ = decode_hole(&payload);
            let _ = decode_data(&payload);
            for style in [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended] {
                let _ = decode_reply(style, &payload);
            }
        }

        #[test]
        fn no_header_asks_for_unbounded_memory(flags: u16, kind: u16, len: u64, extended: bool) {
            let chunk = Chunk {
                flags: ReplyFlags(flags), kind: ChunkType(kind), cookie: 0, offset: 0, len,
            };
            if chunk.check(extended, 1 << 20).is_ok() {
                prop_assert!(len <= 8 + 16 * u64::from(MAX_DESCRIPTORS));
            }
        }
    }

    #[test]
    fn layouts_are_those_of_the_specification() {
        let simple = [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 7];
        assert_eq!(encode_simple_reply(ErrorCode::IO, 7), simple);
        let mut out = Vec::new();
        TO.put_hole(&mut out, true, 0x0200, 0x10);
        let mut bytes = vec![0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 12];
        bytes.extend([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0x10]);
        assert_eq!(out, bytes);
        let mut out = Vec::new();
        ReplyTo { extended: true, ..TO }.put_none(&mut out);
        let mut bytes = vec![0x6e, 0x8a, 0x27, 0x8c, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        bytes.extend([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(out, bytes);
    }

    #[test]
    fn impossible_chunks_are_refused() {
        let chunk = |kind, len| Chunk { flags: ReplyFlags::NONE, kind, cookie: 0, offset: 0, len };
        let cases = [
            (ChunkType::NONE, 0),
            (ChunkType::OFFSET_DATA, 8),
            (ChunkType::OFFSET_HOLE, 11),
            (ChunkType::BLOCK_STATUS, 4),
            (ChunkType::BLOCK_STATUS, 2),
            (ChunkType::BLOCK_STATUS, 13),
            (ChunkType::BLOCK_STATUS_EXT, 24),
            (ChunkType::ERROR, 5),
            (ChunkType::ERROR_OFFSET, 13),
            (ChunkType::ERROR, 1 << 20),
            (ChunkType(3), 0),
        ];
        for (kind, len) in cases {
            assert!(chunk(kind, len).check(false, 1 << 20).is_err(), "{kind} {len}");
        }
        assert!(chunk(ChunkType::BLOCK_STATUS, 12).check(false, 0).is_ok());
        assert!(chunk(ChunkType::BLOCK_STATUS, 12).check(true, 0).is_err());
        assert!(chunk(ChunkType::BLOCK_STATUS_EXT, 24).check(true, 0).is_ok());
        assert!(chunk(ChunkType((1 << 15) + 9), 6).check(false, 0).is_ok());
    }

    #[test]
    fn a_message_of_any_length_is_cut() {
        let mut out = Vec::new();
        TO.put_error(&mut out, true, ErrorCode::IO, &"ß".repeat(70_000), None);
        let (chunk, payload) = chunk_of(false, &out);
        assert_eq!(decode_error(chunk.kind, payload).unwrap().message.len(), MAX_STRING);
    }
}
