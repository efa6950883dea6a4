//! The server's side of the handshake: from the greeting to a chosen export.
//!
//! [`negotiate`] reads from the stream exactly what belongs to the handshake, byte for byte, so nothing
//! is left in a buffer when it returns: the next byte of the stream is the first of the transmission
//! phase. For the same reason plaintext that someone slipped in behind NBD_OPT_STARTTLS is read as part
//! of the TLS handshake, and ends it.
//!
//! The caller applies the deadline, and drops the connection when an error is returned.

mod haggle;
#[cfg(test)]
pub(super) mod tests;

use super::handshake::{BlockSizes, HandshakeError, read_array};
use super::meta::Selected;
use super::stream::Stream;
use super::wire::{
    ClientFlags, HandshakeFlags, MAGIC_INIT, MAGIC_OPTION, MAX_PAYLOAD, ReplyStyle, Rules, TransmissionFlags,
};
use haggle::{End, Haggle};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// The most options that one client may send before the connection is dropped.
pub const MAX_OPTIONS: u32 = 1000;
/// The most bytes of an unwanted option that are read and thrown away; a longer one costs the
/// connection.
pub const MAX_DRAIN: u32 = 32 << 20;

/// What a server offers.
pub trait Exports {
    /// What the caller calls an export; comes back in [`Negotiated`].
    type Handle;

    /// The exports that a listing shows. Hidden ones are left out here and found by name.
    fn list(&self) -> Vec<Listed>;

    /// The export of this name; the empty name is the default export's. At most 4096 bytes of UTF-8.
    fn find(&self, name: &str) -> Option<Export<Self::Handle>>;

    /// True while the server shuts down: every option but NBD_OPT_ABORT is refused.
    fn is_closing(&self) -> bool {
        false
    }
}

/// A line of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// The name to ask for.
    pub name: String,
    /// A line for people; may be empty.
    pub description: String,
}

/// An export that was found.
#[derive(Clone, Debug)]
pub struct Export<H> {
    /// What the caller calls it.
    pub handle: H,
    /// What clients are told.
    pub info: ExportInfo,
}

/// What clients are told of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its canonical name, at most 4096 bytes.
    pub name: String,
    /// A line for people, at most 4096 bytes; may be empty.
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Everything it can do. What depends on the client (SEND_DF, BLOCK_STATUS_PAYLOAD) is taken out
    /// for clients that did not agree to what it needs.
    pub flags: TransmissionFlags,
    /// Its block sizes; must be legal.
    pub blocks: BlockSizes,
    /// Names of the metadata contexts that it offers, of which the first [`super::meta::MAX_CONTEXTS`]
    /// count. A context's id is its place here.
    pub contexts: Vec<String>,
}

/// Whether clients may or must use TLS.
#[derive(Clone, Debug, Default)]
pub enum TlsPolicy {
    /// There is none.
    #[default]
    Off,
    /// A client may ask for it.
    #[cfg(feature = "tls")]
    Offered(std::sync::Arc<rustls::ServerConfig>),
    /// Nothing goes on without it.
    #[cfg(feature = "tls")]
    Required(std::sync::Arc<rustls::ServerConfig>),
}

/// What client and server have agreed on.
#[derive(Debug)]
pub struct Negotiated<S, H> {
    /// The connection, at the first byte of the transmission phase.
    pub stream: Stream<S>,
    /// The export that was chosen.
    pub export: Export<H>,
    /// The transmission flags that the client was told.
    pub flags: TransmissionFlags,
    /// How replies look. [`ReplyStyle::Extended`] stands for extended requests as well.
    pub style: ReplyStyle,
    /// The contexts that every block status reply must cover; empty if there may be none.
    pub contexts: Vec<Selected>,
}

impl<S, H> Negotiated<S, H> {
    /// True if requests and replies have extended headers.
    pub fn is_extended(&self) -> bool {
        self.style == ReplyStyle::Extended
    }

    /// The rules that requests on this connection are checked by.
    pub fn rules(&self) -> Rules {
        Rules {
            size: self.export.info.size,
            transmission: self.flags,
            extended: self.is_extended(),
            contexts: !self.contexts.is_empty(),
            max_payload: self.export.info.blocks.maximum.min(MAX_PAYLOAD),
        }
    }
}

/// What of the greeting lasts for the whole connection.
#[derive(Clone, Copy, Debug)]
struct Greeting {
    /// The client speaks fixed newstyle.
    fixed: bool,
    /// No zeroes after NBD_OPT_EXPORT_NAME.
    no_zeroes: bool,
}

/// Where the connection stands with TLS.
#[cfg_attr(not(feature = "tls"), allow(dead_code, reason = "without TLS there is only one state"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Security {
    /// TLS is not to be had.
    Plain,
    /// TLS is to be had.
    Upgradable,
    /// Nothing but STARTTLS and ABORT is answered.
    Locked,
    /// TLS is in use.
    Secure,
}

/// Leads a client through the handshake. None if the client left politely.
pub async fn negotiate<S, E>(
    mut stream: S,
    exports: &E,
    tls: &TlsPolicy,
) -> Result<Option<Negotiated<S, E::Handle>>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Exports,
{
    let greeting = greet(&mut stream).await?;
    let security = match tls {
        TlsPolicy::Off => Security::Plain,
        #[cfg(feature = "tls")]
        TlsPolicy::Offered(_) => Security::Upgradable,
        #[cfg(feature = "tls")]
        TlsPolicy::Required(_) => Security::Locked,
    };
    match Haggle::new(&mut stream, exports, greeting, security).run().await? {
        End::Left => Ok(None),
        End::Chosen(chosen) => Ok(Some(chosen.with(Stream::Plain(stream)))),
        #[cfg(feature = "tls")]
        End::StartTls => {
            let (TlsPolicy::Offered(config) | TlsPolicy::Required(config)) = tls else {
                return Err(HandshakeError::protocol("NBD_OPT_STARTTLS without TLS"));
            };
            let acceptor = tokio_rustls::TlsAcceptor::from(config.clone());
            let mut stream = Box::new(tokio_rustls::TlsStream::Server(
                acceptor.accept(stream).await.map_err(HandshakeError::Tls)?,
            ));
            // A new haggle: nothing that was agreed in the open survives.
            match Haggle::new(&mut *stream, exports, greeting, Security::Secure).run().await? {
                End::Chosen(chosen) => Ok(Some(chosen.with(Stream::Tls(stream)))),
                End::Left | End::StartTls => {
                    // The client is leaving; whether it still hears the goodbye does not matter.
                    let _ = stream.shutdown().await;
                    Ok(None)
                }
            }
        }
        #[cfg(not(feature = "tls"))]
        End::StartTls => Err(HandshakeError::protocol("NBD_OPT_STARTTLS without TLS")),
    }
}

/// Greets the client and hears its flags.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) -> Result<Greeting, HandshakeError> {
    let mut hello = [0; 18];
    hello[..8].copy_from_slice(&MAGIC_INIT.to_be_bytes());
    hello[8..16].copy_from_slice(&MAGIC_OPTION.to_be_bytes());
    let offer = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    hello[16..].copy_from_slice(&offer.0.to_be_bytes());
    stream.write_all(&hello).await?;
    stream.flush().await?;
    let flags = ClientFlags(u32::from_be_bytes(read_array(stream).await?));
    let known = ClientFlags::FIXED_NEWSTYLE | ClientFlags::NO_ZEROES;
    if !known.contains(flags) {
        return Err(HandshakeError::protocol(format!("unknown client flags {:#x}", flags.0)));
    }
    Ok(Greeting {
        fixed: flags.contains(ClientFlags::FIXED_NEWSTYLE),
        no_zeroes: flags.contains(ClientFlags::NO_ZEROES),
    })
}
