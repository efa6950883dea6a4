//! Numbers and headers of the handshake.

use super::{BadMagic, MAGIC_OPTION, MAGIC_OPTION_REPLY, be_u32, be_u64, codes, flags};

flags! {
    /// What the server offers in its greeting.
    HandshakeFlags(u16) {
        /// Unknown options are answered, not punished.
        FIXED_NEWSTYLE = 0;
        /// The zeroes after NBD_OPT_EXPORT_NAME can be left out.
        NO_ZEROES = 1;
    }
}

flags! {
    /// What the client takes of the greeting.
    ClientFlags(u32) {
        /// It speaks fixed newstyle.
        FIXED_NEWSTYLE = 0;
        /// The zeroes after NBD_OPT_EXPORT_NAME are to be left out.
        NO_ZEROES = 1;
    }
}

codes! {
    /// What a client asks for during the handshake.
    OptionCode(u32) {
        /// Choose an export and begin; cannot fail politely.
        EXPORT_NAME = 1, "NBD_OPT_EXPORT_NAME";
        /// Leave.
        ABORT = 2, "NBD_OPT_ABORT";
        /// List the exports.
        LIST = 3, "NBD_OPT_LIST";
        /// Go on under TLS.
        STARTTLS = 5, "NBD_OPT_STARTTLS";
        /// Describe an export.
        INFO = 6, "NBD_OPT_INFO";
        /// Choose an export and begin.
        GO = 7, "NBD_OPT_GO";
        /// Use structured replies.
        STRUCTURED_REPLY = 8, "NBD_OPT_STRUCTURED_REPLY";
        /// List metadata contexts of an export.
        LIST_META_CONTEXT = 9, "NBD_OPT_LIST_META_CONTEXT";
        /// Select metadata contexts of an export.
        SET_META_CONTEXT = 10, "NBD_OPT_SET_META_CONTEXT";
        /// Use 64-bit headers.
        EXTENDED_HEADERS = 11, "NBD_OPT_EXTENDED_HEADERS";
    }
}

/// Set in every reply code that is an error.
const ERROR_BIT: u32 = 1 << 31;

codes! {
    /// What the server answers to an option.
    ReplyCode(u32) {
        /// Done.
        ACK = 1, "NBD_REP_ACK";
        /// One export.
        SERVER = 2, "NBD_REP_SERVER";
        /// One piece of information about an export.
        INFO = 3, "NBD_REP_INFO";
        /// One metadata context.
        META_CONTEXT = 4, "NBD_REP_META_CONTEXT";
        /// The option is unknown.
        ERR_UNSUP = ERROR_BIT + 1, "NBD_REP_ERR_UNSUP";
        /// The option is known, and forbidden here.
        ERR_POLICY = ERROR_BIT + 2, "NBD_REP_ERR_POLICY";
        /// The option makes no sense, in itself or now.
        ERR_INVALID = ERROR_BIT + 3, "NBD_REP_ERR_INVALID";
        /// The platform cannot do it.
        ERR_PLATFORM = ERROR_BIT + 4, "NBD_REP_ERR_PLATFORM";
        /// TLS first.
        ERR_TLS_REQD = ERROR_BIT + 5, "NBD_REP_ERR_TLS_REQD";
        /// There is no such export.
        ERR_UNKNOWN = ERROR_BIT + 6, "NBD_REP_ERR_UNKNOWN";
        /// The server is going away.
        ERR_SHUTDOWN = ERROR_BIT + 7, "NBD_REP_ERR_SHUTDOWN";
        /// The client must ask for block sizes first.
        ERR_BLOCK_SIZE_REQD = ERROR_BIT + 8, "NBD_REP_ERR_BLOCK_SIZE_REQD";
        /// The option or its answer is too long.
        ERR_TOO_BIG = ERROR_BIT + 9, "NBD_REP_ERR_TOO_BIG";
        /// Extended headers first, or, after them, no way back.
        ERR_EXT_HEADER_REQD = ERROR_BIT + 10, "NBD_REP_ERR_EXT_HEADER_REQD";
    }
}

impl ReplyCode {
    /// True if the reply ends the option with an error.
    pub const fn is_error(self) -> bool {
        self.0 & ERROR_BIT != 0
    }
}

codes! {
    /// Kinds of information about an export.
    Info(u16) {
        /// Its size and transmission flags.
        EXPORT = 0, "NBD_INFO_EXPORT";
        /// Its canonical name.
        NAME = 1, "NBD_INFO_NAME";
        /// A line about it for people.
        DESCRIPTION = 2, "NBD_INFO_DESCRIPTION";
        /// Its block sizes.
        BLOCK_SIZE = 3, "NBD_INFO_BLOCK_SIZE";
    }
}

/// The start of an option: what, and how many bytes of data follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// What the client asks for.
    pub option: OptionCode,
    /// Bytes of data that follow; any 32-bit number, and nobody vouches for it.
    pub len: u32,
}

/// The start of an option's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option it answers.
    pub option: OptionCode,
    /// The answer.
    pub code: ReplyCode,
    /// Bytes of data that follow; any 32-bit number, and nobody vouches for it.
    pub len: u32,
}

/// The 16 bytes before an option's data.
pub fn encode_option(header: &OptionHeader) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&MAGIC_OPTION.to_be_bytes());
    out[8..12].copy_from_slice(&header.option.0.to_be_bytes());
    out[12..].copy_from_slice(&header.len.to_be_bytes());
    out
}

/// The option that these 16 bytes start.
pub fn decode_option(bytes: &[u8; 16]) -> Result<OptionHeader, BadMagic> {
    let magic = be_u64(bytes, 0);
    if magic != MAGIC_OPTION {
        return Err(BadMagic(magic));
    }
    Ok(OptionHeader { option: OptionCode(be_u32(bytes, 8)), len: be_u32(bytes, 12) })
}

/// The 20 bytes before a reply's data.
pub fn encode_option_reply(reply: &OptionReply) -> [u8; 20] {
    let mut out = [0; 20];
    out[..8].copy_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
    out[8..12].copy_from_slice(&reply.option.0.to_be_bytes());
    out[12..16].copy_from_slice(&reply.code.0.to_be_bytes());
    out[16..].copy_from_slice(&reply.len.to_be_bytes());
    out
}

/// The reply that these 20 bytes start.
pub fn decode_option_reply(bytes: &[u8; 20]) -> Result<OptionReply, BadMagic> {
    let magic = be_u64(bytes, 0);
    if magic != MAGIC_OPTION_REPLY {
        return Err(BadMagic(magic));
    }
    Ok(OptionReply {
        option: OptionCode(be_u32(bytes, 8)),
        code: ReplyCode(be_u32(bytes, 12)),
        len: be_u32(bytes, 16),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_survive_the_wire(option: u32, code: u32, len: u32) {
            let header = OptionHeader { option: OptionCode(option), len };
            prop_assert_eq!(decode_option(&encode_option(&header)), Ok(header));
            let reply = OptionReply { option: OptionCode(option), code: ReplyCode(code), len };
            prop_assert_eq!(decode_option_reply(&encode_option_reply(&reply)), Ok(reply));
        }
    }

    #[test]
    fn a_wrong_magic_is_an_error() {
        assert_eq!(decode_option(&[0x11; 16]), Err(BadMagic(0x1111_1111_1111_1111)));
        assert_eq!(decode_option_reply(&[0; 20]), Err(BadMagic(0)));
    }
}
