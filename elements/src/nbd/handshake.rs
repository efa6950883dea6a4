//! What both sides of the handshake share.

use super::wire::{BadMagic, MAX_PAYLOAD, OptionCode, ReplyCode};
use blockmason::{Error, Kind};
use std::borrow::Cow;
use tokio::io::{AsyncRead, AsyncReadExt};

/// The longest data of one option or one reply that is taken in, in bytes.
pub const MAX_OPTION: u32 = 64 << 10;

/// Why a handshake ended without a connection to use.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection failed, or the peer closed it.
    #[error("the connection failed during the NBD handshake")]
    Io(#[from] std::io::Error),
    /// The peer broke the protocol, or asked for what cannot be answered but by hanging up.
    #[error("{0}")]
    Protocol(Cow<'static, str>),
    /// The server said no.
    #[error("the NBD server refused {option}: {code}{}{}", if .message.is_empty() { "" } else { ": " }, .message)]
    Refused {
        /// What was asked for.
        option: OptionCode,
        /// What it said.
        code: ReplyCode,
        /// What it said to people; may be empty.
        message: String,
    },
    /// The TLS handshake failed.
    #[error("the TLS handshake failed: {0}")]
    Tls(#[source] std::io::Error),
}

impl HandshakeError {
    pub(crate) fn protocol(what: impl Into<Cow<'static, str>>) -> HandshakeError {
        HandshakeError::Protocol(what.into())
    }
}

impl From<BadMagic> for HandshakeError {
    fn from(magic: BadMagic) -> HandshakeError {
        HandshakeError::protocol(magic.to_string())
    }
}

impl From<HandshakeError> for Error {
    fn from(error: HandshakeError) -> Error {
        let message = error.to_string();
        match error {
            HandshakeError::Io(source) => Error::io(source, message),
            HandshakeError::Protocol(_) => Error::new(Kind::Unavailable, message),
            HandshakeError::Tls(source) => Error::new(Kind::Denied, message).with_source(source),
            HandshakeError::Refused { code, .. } => {
                let kind = match code {
                    ReplyCode::ERR_POLICY | ReplyCode::ERR_TLS_REQD => Kind::Denied,
                    ReplyCode::ERR_UNSUP | ReplyCode::ERR_PLATFORM => Kind::Unsupported,
                    ReplyCode::ERR_INVALID | ReplyCode::ERR_TOO_BIG => Kind::Invalid,
                    _ => Kind::Unavailable,
                };
                Error::new(kind, message)
            }
        }
    }
}

/// The block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths must be multiples of this. A power of two up to 64 KiB.
    pub minimum: u32,
    /// Offsets and lengths should be multiples of this. A power of two, at least 512 and `minimum`.
    pub preferred: u32,
    /// The longest payload. At least `preferred`.
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// Any byte, pages preferred, and as much as this program takes.
    fn default() -> BlockSizes {
        BlockSizes { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD }
    }
}

impl BlockSizes {
    /// True if the sizes keep the specification's rules.
    pub fn is_legal(&self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 1 << 16
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum.max(512)
            && self.maximum >= self.preferred
    }
}

/// Reads exactly `len` bytes into `buffer`, replacing what it held. Memory grows with what arrives, not
/// with what was announced; callers bound `len`.
pub(crate) async fn read_data<S>(stream: &mut S, buffer: &mut Vec<u8>, len: u32) -> std::io::Result<()>
where
    S: AsyncRead + Unpin,
{
    debug_assert!(len <= MAX_OPTION, "callers bound the length");
    buffer.clear();
    let read = stream.take(u64::from(len)).read_to_end(buffer).await?;
    if read < len as usize { Err(std::io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Reads exactly `N` bytes.
pub(crate) async fn read_array<S, const N: usize>(stream: &mut S) -> std::io::Result<[u8; N]>
where
    S: AsyncRead + Unpin,
{
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_keep_the_rules() {
        let sizes = |minimum, preferred, maximum| BlockSizes { minimum, preferred, maximum }.is_legal();
        assert!(BlockSizes::default().is_legal());
        assert!(sizes(1, 512, 512) && sizes(65_536, 65_536, u32::MAX));
        assert!(!sizes(0, 512, 512) && !sizes(3, 512, 512) && !sizes(1 << 17, 1 << 17, 1 << 17));
        assert!(
            !sizes(1, 256, 512) && !sizes(1, 513, 4096) && !sizes(4096, 512, 4096) && !sizes(1, 4096, 512)
        );
    }

    #[tokio::test]
    async fn memory_grows_with_what_arrives() {
        let mut buffer = Vec::new();
        let result = read_data(&mut [7_u8; 10].as_slice(), &mut buffer, MAX_OPTION).await;
        assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
        assert!(buffer.capacity() < 1024, "{}", buffer.capacity());
        read_data(&mut [7_u8; 10].as_slice(), &mut buffer, 4).await.unwrap();
        assert_eq!(buffer, [7; 4]);
    }

    #[test]
    fn a_refusal_reads_well_and_has_a_kind() {
        let refused = |message: &str| HandshakeError::Refused {
            option: OptionCode::GO,
            code: ReplyCode::ERR_UNKNOWN,
            message: message.into(),
        };
        assert_eq!(refused("").to_string(), "the NBD server refused NBD_OPT_GO: NBD_REP_ERR_UNKNOWN");
        let error = Error::from(refused("no such disk"));
        assert!(error.to_string().ends_with("NBD_REP_ERR_UNKNOWN: no such disk"));
        assert_eq!(error.kind(), Kind::Unavailable);
    }
}
