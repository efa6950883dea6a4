//! Error values of replies.

use super::{Command, CommandFlags, RequestHeader, codes};
use blockmason::Errno;

codes! {
    /// The error field of a reply.
    ErrorCode(u32) {
        /// No error.
        OK = 0, "success";
        /// The export is read-only, or permission is missing.
        PERM = 1, "NBD_EPERM";
        /// The device failed.
        IO = 5, "NBD_EIO";
        /// The server ran out of memory.
        NOMEM = 12, "NBD_ENOMEM";
        /// The request makes no sense.
        INVAL = 22, "NBD_EINVAL";
        /// There is no room left, or a write goes beyond the end.
        NOSPC = 28, "NBD_ENOSPC";
        /// The request is too long to be answered in one piece.
        OVERFLOW = 75, "NBD_EOVERFLOW";
        /// Zeroing this range would be no faster than writing it.
        NOTSUP = 95, "NBD_ENOTSUP";
        /// The server is going away; the client must disconnect.
        SHUTDOWN = 108, "NBD_ESHUTDOWN";
    }
}

impl ErrorCode {
    /// What `request` is answered with when it failed with `errno`.
    ///
    /// NBD_EOVERFLOW and NBD_ENOTSUP may be sent in one situation each, and are NBD_EINVAL in every
    /// other. NBD_ESHUTDOWN never comes from an errno: it orders the client to disconnect, and a server
    /// further down that goes away is no reason to; only the export itself says so.
    #[cold]
    pub fn for_errno(errno: Errno, request: &RequestHeader) -> ErrorCode {
        match errno {
            Errno::PERM | Errno::ACCESS | Errno::ROFS => ErrorCode::PERM,
            Errno::NOMEM => ErrorCode::NOMEM,
            Errno::INVAL => ErrorCode::INVAL,
            Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorCode::NOSPC,
            Errno::OVERFLOW => {
                if request.command == Command::READ && request.flags.contains(CommandFlags::DF) {
                    ErrorCode::OVERFLOW
                } else {
                    ErrorCode::INVAL
                }
            }
            Errno::OPNOTSUPP | Errno::NOSYS => {
                if request.command == Command::WRITE_ZEROES && request.flags.contains(CommandFlags::FAST_ZERO)
                {
                    ErrorCode::NOTSUP
                } else {
                    ErrorCode::INVAL
                }
            }
            _ => ErrorCode::IO,
        }
    }

    /// The errno that a server's error stands for; None for success. A value that the specification
    /// does not name counts as EINVAL.
    pub fn errno(self) -> Option<Errno> {
        Some(match self {
            ErrorCode::OK => return None,
            ErrorCode::PERM => Errno::PERM,
            ErrorCode::IO => Errno::IO,
            ErrorCode::NOMEM => Errno::NOMEM,
            ErrorCode::NOSPC => Errno::NOSPC,
            ErrorCode::OVERFLOW => Errno::OVERFLOW,
            ErrorCode::NOTSUP => Errno::OPNOTSUPP,
            ErrorCode::SHUTDOWN => Errno::SHUTDOWN,
            _ => Errno::INVAL,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(command: Command, flags: CommandFlags) -> RequestHeader {
        RequestHeader { flags, command, cookie: 1, offset: 0, len: 512 }
    }

    #[test]
    fn every_errno_becomes_an_allowed_code() {
        let allowed = [1, 5, 12, 22, 28];
        for raw in 1..134 {
            let code = ErrorCode::for_errno(
                Errno::from_raw_os_error(raw),
                &request(Command::WRITE, CommandFlags::FUA),
            );
            assert!(allowed.contains(&code.0), "errno {raw} became {code}");
        }
    }

    #[test]
    fn the_restricted_codes_appear_only_where_they_may() {
        let fast = request(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO);
        let slow = request(Command::WRITE_ZEROES, CommandFlags::NO_HOLE);
        assert_eq!(ErrorCode::for_errno(Errno::OPNOTSUPP, &fast), ErrorCode::NOTSUP);
        assert_eq!(ErrorCode::for_errno(Errno::OPNOTSUPP, &slow), ErrorCode::INVAL);
        let whole = request(Command::READ, CommandFlags::DF);
        let parts = request(Command::READ, CommandFlags::NONE);
        assert_eq!(ErrorCode::for_errno(Errno::OVERFLOW, &whole), ErrorCode::OVERFLOW);
        assert_eq!(ErrorCode::for_errno(Errno::OVERFLOW, &parts), ErrorCode::INVAL);
        assert_eq!(ErrorCode::for_errno(Errno::SHUTDOWN, &parts), ErrorCode::IO);
        assert_eq!(ErrorCode::for_errno(Errno::DQUOT, &parts), ErrorCode::NOSPC);
    }

    #[test]
    fn a_code_survives_the_way_there_and_back() {
        let whole = request(Command::READ, CommandFlags::DF);
        let fast = request(Command::WRITE_ZEROES, CommandFlags::FAST_ZERO);
        for (code, request) in [
            (ErrorCode::PERM, whole),
            (ErrorCode::IO, whole),
            (ErrorCode::NOMEM, whole),
            (ErrorCode::INVAL, whole),
            (ErrorCode::NOSPC, whole),
            (ErrorCode::OVERFLOW, whole),
            (ErrorCode::NOTSUP, fast),
        ] {
            assert_eq!(ErrorCode::for_errno(code.errno().unwrap(), &request), code);
        }
        assert_eq!(ErrorCode::OK.errno(), None);
        assert_eq!(ErrorCode(4711).errno(), Some(Errno::INVAL));
    }
}
