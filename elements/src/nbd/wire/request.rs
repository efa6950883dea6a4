//! Requests of the transmission phase.

use super::{
    BadMagic, ErrorCode, MAGIC_REQUEST, MAGIC_REQUEST_EXTENDED, TransmissionFlags, be_u16, be_u32, be_u64,
    codes, flags,
};

codes! {
    /// What a request asks for.
    Command(u16) {
        /// Read a range.
        READ = 0, "NBD_CMD_READ";
        /// Write a range; the data follows.
        WRITE = 1, "NBD_CMD_WRITE";
        /// Disconnect once everything is answered. Has no reply.
        DISC = 2, "NBD_CMD_DISC";
        /// Make all completed writes durable.
        FLUSH = 3, "NBD_CMD_FLUSH";
        /// A range is no longer needed.
        TRIM = 4, "NBD_CMD_TRIM";
        /// A range will be needed soon.
        CACHE = 5, "NBD_CMD_CACHE";
        /// A range is to read as zeroes.
        WRITE_ZEROES = 6, "NBD_CMD_WRITE_ZEROES";
        /// Describe a range.
        BLOCK_STATUS = 7, "NBD_CMD_BLOCK_STATUS";
    }
}

flags! {
    /// How a request is to be done.
    CommandFlags(u16) {
        /// Durable before it is answered.
        FUA = 0;
        /// WRITE_ZEROES: leave no hole.
        NO_HOLE = 1;
        /// READ: answer in one content chunk.
        DF = 2;
        /// BLOCK_STATUS: one extent per context.
        REQ_ONE = 3;
        /// WRITE_ZEROES: only if it is faster than writing.
        FAST_ZERO = 4;
        /// Extended headers: the length is that of a payload which follows.
        PAYLOAD_LEN = 5;
    }
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub command: Command,
    /// The client's name for the request; replies repeat it.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range, or, with [`CommandFlags::PAYLOAD_LEN`], of the payload. Bytes.
    pub len: u64,
}

/// What a connection has agreed on, as far as it decides which requests are legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Size of the export, in bytes.
    pub size: u64,
    /// The flags that were sent to the client.
    pub transmission: TransmissionFlags,
    /// True if extended headers are in use.
    pub extended: bool,
    /// True if the client selected at least one metadata context of this export.
    pub contexts: bool,
    /// Longest READ or WRITE, in bytes.
    pub max_payload: u32,
}

/// The request that these 28 bytes start.
#[inline]
pub fn decode_request(bytes: &[u8; 28]) -> Result<RequestHeader, BadMagic> {
    let magic = be_u32(bytes, 0);
    if magic != MAGIC_REQUEST {
        return Err(BadMagic(u64::from(magic)));
    }
    Ok(RequestHeader {
        flags: CommandFlags(be_u16(bytes, 4)),
        command: Command(be_u16(bytes, 6)),
        cookie: be_u64(bytes, 8),
        offset: be_u64(bytes, 16),
        len: u64::from(be_u32(bytes, 24)),
    })
}

/// The request that these 32 bytes start, when extended headers are in use.
#[inline]
pub fn decode_request_extended(bytes: &[u8; 32]) -> Result<RequestHeader, BadMagic> {
    let magic = be_u32(bytes, 0);
    if magic != MAGIC_REQUEST_EXTENDED {
        return Err(BadMagic(u64::from(magic)));
    }
    Ok(RequestHeader {
        flags: CommandFlags(be_u16(bytes, 4)),
        command: Command(be_u16(bytes, 6)),
        cookie: be_u64(bytes, 8),
        offset: be_u64(bytes, 16),
        len: be_u64(bytes, 24),
    })
}

/// The 28 bytes of a compact request; None if its length needs more than 32 bits.
#[inline]
pub fn encode_request(header: &RequestHeader) -> Option<[u8; 28]> {
    let len = u32::try_from(header.len).ok()?;
    let mut out = [0; 28];
    out[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
    put_middle(&mut out, header);
    out[24..].copy_from_slice(&len.to_be_bytes());
    Some(out)
}

/// The 32 bytes of an extended request.
#[inline]
pub fn encode_request_extended(header: &RequestHeader) -> [u8; 32] {
    let mut out = [0; 32];
    out[..4].copy_from_slice(&MAGIC_REQUEST_EXTENDED.to_be_bytes());
    put_middle(&mut out, header);
    out[24..].copy_from_slice(&header.len.to_be_bytes());
    out
}

/// The fields that both layouts have in the same place.
#[inline]
fn put_middle(out: &mut [u8], header: &RequestHeader) {
    out[4..6].copy_from_slice(&header.flags.0.to_be_bytes());
    out[6..8].copy_from_slice(&header.command.0.to_be_bytes());
    out[8..16].copy_from_slice(&header.cookie.to_be_bytes());
    out[16..24].copy_from_slice(&header.offset.to_be_bytes());
}

impl RequestHeader {
    /// Bytes of payload that follow this header, whether the request is legal or not: they must be
    /// taken off the stream (or the connection dropped) before the next header. With extended headers
    /// this can be any 64-bit number; one beyond the largest payload is a reason to drop.
    #[inline]
    pub fn payload_len(&self, extended: bool) -> u64 {
        // QEMU's client (10.0) sends its writes without the flag. Nothing else could be meant: a write
        // always has data.
        let has_payload =
            self.command == Command::WRITE || extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if has_payload { self.len } else { 0 }
    }

    /// True if the request is the form of NBD_CMD_BLOCK_STATUS whose payload holds the length of the
    /// range and the contexts wanted; see [`crate::nbd::meta::StatusQuery`].
    #[inline]
    pub fn is_status_query(&self) -> bool {
        self.command == Command::BLOCK_STATUS && self.flags.contains(CommandFlags::PAYLOAD_LEN)
    }

    /// Whether the request may be carried out, and if not, which error it gets. NBD_CMD_DISC always
    /// passes, since it has no reply. A length of zero passes but for block status, which has no way to
    /// describe nothing. For [`RequestHeader::is_status_query`] only the offset is checked here; the
    /// range itself arrives in the payload, see [`Rules::check_range`].
    #[inline]
    pub fn check(&self, rules: &Rules) -> Result<(), ErrorCode> {
        if self.command == Command::DISC {
            return Ok(());
        }
        if !rules.legal_flags(self.command)?.contains(self.flags) {
            return Err(ErrorCode::INVAL);
        }
        match self.command {
            Command::FLUSH if self.offset != 0 || self.len != 0 => Err(ErrorCode::INVAL),
            Command::FLUSH => Ok(()),
            Command::BLOCK_STATUS if self.is_status_query() => {
                rules.check_range(self.command, self.offset, 0)
            }
            Command::BLOCK_STATUS if self.len == 0 => Err(ErrorCode::INVAL),
            _ => rules.check_range(self.command, self.offset, self.len),
        }
    }
}

impl Rules {
    /// The flags that `command` may carry; an error if the command itself is not offered here.
    #[inline]
    fn legal_flags(&self, command: Command) -> Result<CommandFlags, ErrorCode> {
        let has = |flag| self.transmission.contains(flag);
        let writes = matches!(command, Command::WRITE | Command::TRIM | Command::WRITE_ZEROES);
        if writes && has(TransmissionFlags::READ_ONLY) {
            return Err(ErrorCode::PERM);
        }
        let only_if = |offered: bool, flags: CommandFlags| if offered { flags } else { CommandFlags::NONE };
        let (offered, special) = match command {
            Command::READ => (true, only_if(has(TransmissionFlags::SEND_DF), CommandFlags::DF)),
            Command::WRITE => (true, only_if(self.extended, CommandFlags::PAYLOAD_LEN)),
            Command::FLUSH => (has(TransmissionFlags::SEND_FLUSH), CommandFlags::NONE),
            Command::TRIM => (has(TransmissionFlags::SEND_TRIM), CommandFlags::NONE),
            Command::CACHE => (has(TransmissionFlags::SEND_CACHE), CommandFlags::NONE),
            Command::WRITE_ZEROES => (
                has(TransmissionFlags::SEND_WRITE_ZEROES),
                CommandFlags::NO_HOLE
                    | only_if(has(TransmissionFlags::SEND_FAST_ZERO), CommandFlags::FAST_ZERO),
            ),
            Command::BLOCK_STATUS => {
                let payload = self.extended && has(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
                (self.contexts, CommandFlags::REQ_ONE | only_if(payload, CommandFlags::PAYLOAD_LEN))
            }
            _ => (false, CommandFlags::NONE),
        };
        match offered {
            // FUA is legal on every command, writing or not, once it is offered.
            true => Ok(special | only_if(has(TransmissionFlags::SEND_FUA), CommandFlags::FUA)),
            false => Err(ErrorCode::INVAL),
        }
    }

    /// Whether `command` may work on this range: inside the export, and not too long for a payload.
    #[inline]
    pub fn check_range(&self, command: Command, offset: u64, len: u64) -> Result<(), ErrorCode> {
        let carries_data = matches!(command, Command::READ | Command::WRITE);
        if carries_data && len > u64::from(self.max_payload) {
            return Err(ErrorCode::INVAL);
        }
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        match command {
            _ if inside => Ok(()),
            Command::WRITE | Command::WRITE_ZEROES => Err(ErrorCode::NOSPC),
            _ => Err(ErrorCode::INVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: TransmissionFlags = TransmissionFlags(0b1_1101_1110_1101);

    fn rules() -> Rules {
        Rules { size: 1 << 20, transmission: ALL, extended: false, contexts: true, max_payload: 1 << 16 }
    }

    fn request(command: Command, flags: CommandFlags, offset: u64, len: u64) -> RequestHeader {
        RequestHeader { flags, command, cookie: 7, offset, len }
    }

    prop_compose! {
        fn any_header()(flags: u16, command: u16, cookie: u64, offset: u64, len: u64) -> RequestHeader {
            let (flags, command) = (CommandFlags(flags), Command(command));
            RequestHeader { flags, command, cookie, offset, len }
        }
    }

    proptest! {
        #[test]
        fn extended_requests_survive_the_wire(header in any_header()) {
            prop_assert_eq!(decode_request_extended(&encode_request_extended(&header)), Ok(header));
        }

        #[test]
        fn compact_requests_survive_the_wire(mut header in any_header()) {
            prop_assert_eq!(encode_request(&header).is_some(), header.len <= u64::from(u32::MAX));
            header.len &= u64::from(u32::MAX);
            prop_assert_eq!(decode_request(&encode_request(&header).unwrap()), Ok(header));
        }

        #[test]
        fn what_passes_the_check_lies_inside_the_export(header in any_header(), extended: bool) {
            let rules = Rules { extended, ..rules() };
            let end = header.offset.checked_add(header.len);
            if header.check(&rules).is_ok() && header.command != Command::DISC && !header.is_status_query() {
                prop_assert!(end.is_some_and(|end| end <= rules.size));
            }
        }
    }

    #[test]
    fn layouts_are_those_of_the_specification() {
        let header = request(Command::WRITE, CommandFlags::FUA, 0x0102, 0x0304);
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7];
        bytes.extend([0, 0, 0, 0, 0, 0, 1, 2]);
        let mut extended = bytes.clone();
        bytes.extend([0, 0, 3, 4]);
        assert_eq!(encode_request(&header).unwrap().as_slice(), bytes);
        extended[..4].copy_from_slice(&[0x21, 0xe4, 0x1c, 0x71]);
        extended.extend([0, 0, 0, 0, 0, 0, 3, 4]);
        assert_eq!(encode_request_extended(&header).as_slice(), extended);
    }

    #[test]
    fn a_wrong_magic_is_an_error() {
        assert_eq!(decode_request(&[0; 28]), Err(BadMagic(0)));
        let extended = encode_request_extended(&request(Command::READ, CommandFlags::NONE, 0, 0));
        let mut compact = [0; 28];
        compact.copy_from_slice(&extended[..28]);
        assert_eq!(decode_request(&compact), Err(BadMagic(u64::from(MAGIC_REQUEST_EXTENDED))));
    }

    #[test]
    fn payloads_follow_writes_and_flagged_requests() {
        let write = request(Command::WRITE, CommandFlags::NONE, 0, 512);
        assert_eq!((write.payload_len(false), write.payload_len(true)), (512, 512));
        let flagged = request(Command::READ, CommandFlags::PAYLOAD_LEN, 0, 512);
        assert_eq!((flagged.payload_len(false), flagged.payload_len(true)), (0, 512));
    }

    /// One flag each, with the commands it is legal for and the transmission flag it needs.
    #[test]
    fn flags_are_legal_only_where_documented() {
        let commands = [0, 1, 3, 4, 5, 6, 7].map(Command);
        let table = [
            (CommandFlags::FUA, &commands[..], TransmissionFlags::SEND_FUA),
            (CommandFlags::NO_HOLE, &[Command::WRITE_ZEROES], TransmissionFlags::SEND_WRITE_ZEROES),
            (CommandFlags::DF, &[Command::READ], TransmissionFlags::SEND_DF),
            (CommandFlags::REQ_ONE, &[Command::BLOCK_STATUS], TransmissionFlags::HAS_FLAGS),
            (CommandFlags::FAST_ZERO, &[Command::WRITE_ZEROES], TransmissionFlags::SEND_FAST_ZERO),
            (CommandFlags::PAYLOAD_LEN, &[], TransmissionFlags::HAS_FLAGS),
            (CommandFlags(1 << 6), &[], TransmissionFlags::HAS_FLAGS),
        ];
        for (flag, legal, needs) in table {
            for command in commands {
                let len = if command == Command::FLUSH { 0 } else { 512 };
                let checked = request(command, flag, 0, len).check(&rules());
                assert_eq!(checked.is_ok(), legal.contains(&command), "{command} {flag:?}");
                let without = Rules { transmission: ALL.without(needs), ..rules() };
                if needs != TransmissionFlags::HAS_FLAGS {
                    assert!(request(command, flag, 0, len).check(&without).is_err(), "{command} {flag:?}");
                }
            }
        }
    }

    #[test]
    fn commands_need_to_be_offered() {
        let bare = Rules { transmission: TransmissionFlags::HAS_FLAGS, contexts: false, ..rules() };
        for command in 0..20 {
            let checked = request(Command(command), CommandFlags::NONE, 0, 0).check(&bare);
            let expected = if command <= 2 { Ok(()) } else { Err(ErrorCode::INVAL) };
            assert_eq!(checked, expected, "{command}");
        }
    }

    #[test]
    fn an_extended_write_may_go_without_the_payload_flag() {
        let extended = Rules { extended: true, ..rules() };
        let plain = request(Command::WRITE, CommandFlags::NONE, 0, 512);
        let flagged = request(Command::WRITE, CommandFlags::PAYLOAD_LEN, 0, 512);
        assert_eq!(plain.check(&extended), Ok(()));
        assert_eq!(flagged.check(&extended), Ok(()));
        assert_eq!(flagged.check(&rules()), Err(ErrorCode::INVAL));
    }

    #[test]
    fn errors_of_range_and_permission_are_the_recommended_ones() {
        let beyond = |command| request(command, CommandFlags::NONE, (1 << 20) - 1, 2).check(&rules());
        assert_eq!(beyond(Command::READ), Err(ErrorCode::INVAL));
        assert_eq!(beyond(Command::WRITE), Err(ErrorCode::NOSPC));
        assert_eq!(beyond(Command::WRITE_ZEROES), Err(ErrorCode::NOSPC));
        assert_eq!(beyond(Command::TRIM), Err(ErrorCode::INVAL));
        assert_eq!(beyond(Command::BLOCK_STATUS), Err(ErrorCode::INVAL));
        let read_only = Rules { transmission: ALL | TransmissionFlags::READ_ONLY, ..rules() };
        for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES] {
            let checked = request(command, CommandFlags::NONE, 0, 512).check(&read_only);
            assert_eq!(checked, Err(ErrorCode::PERM), "{command}");
        }
        let overflow = request(Command::TRIM, CommandFlags::NONE, u64::MAX, 2);
        assert_eq!(overflow.check(&rules()), Err(ErrorCode::INVAL));
        let long = request(Command::READ, CommandFlags::NONE, 0, (1 << 16) + 1);
        assert_eq!(long.check(&rules()), Err(ErrorCode::INVAL));
        let long = request(Command::TRIM, CommandFlags::NONE, 0, 1 << 20);
        assert_eq!(long.check(&rules()), Ok(()));
        let flush = request(Command::FLUSH, CommandFlags::NONE, 1, 0);
        assert_eq!(flush.check(&rules()), Err(ErrorCode::INVAL));
    }
}
