//! The client's side of the handshake.
//!
//! [`connect`] and [`list`] read from the stream exactly what belongs to the handshake. Nothing that a
//! server sends is believed before it is bounded: the data of one reply by
//! [`super::handshake::MAX_OPTION`], all replies to one option by [`MAX_REPLIES`].
//!
//! The caller applies the deadline.

mod haggle;
#[cfg(test)]
mod tests;

use super::handshake::{BlockSizes, HandshakeError, read_array};
use super::meta::Selected;
use super::server::Listed;
use super::stream::Stream;
use super::wire::{
    ClientFlags, EXPORT_NAME_ZEROES, HandshakeFlags, Info, MAGIC_INIT, MAGIC_OLDSTYLE, MAGIC_OPTION,
    MAX_STRING, OptionCode, ReplyCode, ReplyStyle, TransmissionFlags,
};
use haggle::{Described, Haggle};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The most bytes of replies to one option, headers included.
pub const MAX_REPLIES: u64 = 8 << 20;

/// What to ask a server for.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// The export's name; empty for the default export.
    pub export: &'a str,
    /// The strongest style to ask for. A server that cannot do it decides on a weaker one.
    pub style: ReplyStyle,
    /// Metadata contexts to select, by their exact names. Those the server lacks are left out.
    pub contexts: &'a [&'a str],
    /// Whether to use TLS.
    pub tls: ClientTls,
}

/// Whether to use TLS.
#[derive(Clone, Debug, Default)]
pub enum ClientTls {
    /// No.
    #[default]
    Off,
    /// If the server has it. Whoever sits in between can prevent it.
    #[cfg(feature = "tls")]
    IfOffered(TlsIdentity),
    /// Yes, or not at all.
    #[cfg(feature = "tls")]
    Required(TlsIdentity),
}

/// How a client proves itself and whom it expects.
#[cfg(feature = "tls")]
#[derive(Clone, Debug)]
pub struct TlsIdentity {
    /// Whom to trust, and the client's own certificate.
    pub config: std::sync::Arc<rustls::ClientConfig>,
    /// The name that the server's certificate must carry.
    pub name: rustls_pki_types::ServerName<'static>,
}

/// A server that is ready for requests.
#[derive(Debug)]
pub struct Server<S> {
    /// The connection, at the first byte of the transmission phase.
    pub stream: Stream<S>,
    /// Bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Its block sizes, legal; None if the server did not say.
    pub blocks: Option<BlockSizes>,
    /// How replies look. [`ReplyStyle::Extended`] stands for extended requests as well.
    pub style: ReplyStyle,
    /// The contexts that the server selected; each reply to a block status request covers all of them.
    pub contexts: Vec<Selected>,
}

/// Leads the handshake to the transmission phase with the export that is wanted.
pub async fn connect<S>(stream: S, wanted: &Wanted<'_>) -> Result<Server<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut stream, greeting) = open(stream, &wanted.tls).await?;
    if wanted.export.len() > MAX_STRING {
        return Err(HandshakeError::protocol("the export's name is too long for NBD"));
    }
    if !greeting.fixed {
        let described = by_export_name(&mut stream, wanted.export, greeting).await?;
        return Ok(server(stream, described, ReplyStyle::Simple, Vec::new()));
    }
    match agree(&mut stream, wanted, greeting).await {
        Ok((described, style, contexts)) => Ok(server(stream, described, style, contexts)),
        Err(error) => Err(leave(&mut stream, error).await),
    }
}

/// Asks a server for its exports, and leaves.
pub async fn list<S>(stream: S, tls: &ClientTls) -> Result<Vec<Listed>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (mut stream, greeting) = open(stream, tls).await?;
    if !greeting.fixed {
        return Err(HandshakeError::protocol("the NBD server is too old to list its exports"));
    }
    let listed = Haggle::new(&mut stream).list().await;
    match listed {
        Ok(listed) => {
            abort(&mut stream).await;
            Ok(listed)
        }
        Err(error) => Err(leave(&mut stream, error).await),
    }
}

fn server<S>(
    stream: Stream<S>,
    described: Described,
    style: ReplyStyle,
    contexts: Vec<Selected>,
) -> Server<S> {
    let Described { size, mut flags, blocks } = described;
    // A server may offer only what was agreed on; what it offers beyond that is not to be used.
    if style == ReplyStyle::Simple {
        flags = flags.without(TransmissionFlags::SEND_DF);
    }
    if style != ReplyStyle::Extended {
        flags = flags.without(TransmissionFlags::BLOCK_STATUS_PAYLOAD);
    }
    Server { stream, size, flags, blocks, style, contexts }
}

/// What the greeting settles.
#[derive(Clone, Copy, Debug)]
struct Greeting {
    /// Options get replies.
    fixed: bool,
    /// No zeroes after NBD_OPT_EXPORT_NAME.
    no_zeroes: bool,
}

/// Hears the greeting, answers it, and begins TLS.
async fn open<S>(mut stream: S, tls: &ClientTls) -> Result<(Stream<S>, Greeting), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if u64::from_be_bytes(read_array(&mut stream).await?) != MAGIC_INIT {
        return Err(HandshakeError::protocol("what answers is no NBD server"));
    }
    match u64::from_be_bytes(read_array(&mut stream).await?) {
        MAGIC_OPTION => {}
        MAGIC_OLDSTYLE => {
            return Err(HandshakeError::protocol(
                "the server speaks the oldstyle NBD handshake, which has no export names and is not supported",
            ));
        }
        other => return Err(HandshakeError::protocol(format!("bad NBD magic number {other:#x}"))),
    }
    let offered = HandshakeFlags(u16::from_be_bytes(read_array(&mut stream).await?));
    let greeting = Greeting {
        fixed: offered.contains(HandshakeFlags::FIXED_NEWSTYLE),
        no_zeroes: offered.contains(HandshakeFlags::NO_ZEROES),
    };
    let known = HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES;
    // Both flags have the same bits on the way back, and only what was offered may be taken.
    let taken = ClientFlags(u32::from(offered.0 & known.0));
    stream.write_all(&taken.0.to_be_bytes()).await?;
    stream.flush().await?;
    Ok((secure(stream, tls, greeting).await?, greeting))
}

#[cfg(not(feature = "tls"))]
async fn secure<S>(stream: S, _tls: &ClientTls, _greeting: Greeting) -> Result<Stream<S>, HandshakeError> {
    Ok(Stream::Plain(stream))
}

/// Begins TLS if it is wanted and to be had.
#[cfg(feature = "tls")]
async fn secure<S>(mut stream: S, tls: &ClientTls, greeting: Greeting) -> Result<Stream<S>, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (identity, required) = match tls {
        ClientTls::Off => return Ok(Stream::Plain(stream)),
        ClientTls::IfOffered(identity) => (identity, false),
        ClientTls::Required(identity) => (identity, true),
    };
    if !greeting.fixed {
        return match required {
            true => Err(HandshakeError::protocol("TLS is required, and the NBD server is too old for it")),
            false => Ok(Stream::Plain(stream)),
        };
    }
    match Haggle::new(&mut stream).simple(OptionCode::STARTTLS).await {
        Ok(()) => {}
        Err(HandshakeError::Refused { .. }) if !required => return Ok(Stream::Plain(stream)),
        Err(error) => return Err(leave(&mut stream, error).await),
    }
    let connector = tokio_rustls::TlsConnector::from(identity.config.clone());
    let secured = connector.connect(identity.name.clone(), stream).await.map_err(HandshakeError::Tls)?;
    Ok(Stream::Tls(Box::new(tokio_rustls::TlsStream::Client(secured))))
}

/// The options of fixed newstyle, up to the chosen export.
async fn agree<S>(
    stream: &mut S,
    wanted: &Wanted<'_>,
    greeting: Greeting,
) -> Result<(Described, ReplyStyle, Vec<Selected>), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut haggle = Haggle::new(stream);
    let mut style = ReplyStyle::Simple;
    if wanted.style == ReplyStyle::Extended && haggle.granted(OptionCode::EXTENDED_HEADERS).await? {
        style = ReplyStyle::Extended;
    } else if wanted.style != ReplyStyle::Simple && haggle.granted(OptionCode::STRUCTURED_REPLY).await? {
        style = ReplyStyle::Structured;
    }
    let mut contexts = Vec::new();
    if style != ReplyStyle::Simple && !wanted.contexts.is_empty() {
        contexts = haggle.select(wanted.export, wanted.contexts).await?;
    }
    match haggle.go(wanted.export).await {
        Ok(described) => Ok((described, style, contexts)),
        Err(HandshakeError::Refused { code: ReplyCode::ERR_UNSUP, .. }) if style != ReplyStyle::Extended => {
            Ok((by_export_name(stream, wanted.export, greeting).await?, style, contexts))
        }
        Err(error) => Err(error),
    }
}

/// NBD_OPT_EXPORT_NAME, for servers that know nothing better.
async fn by_export_name<S>(
    stream: &mut S,
    name: &str,
    greeting: Greeting,
) -> Result<Described, HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    Haggle::new(stream).send(OptionCode::EXPORT_NAME, name.as_bytes()).await?;
    let answer: std::io::Result<[u8; 10]> = read_array(stream).await;
    let answer = answer.map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => {
            HandshakeError::protocol(format!("the NBD server hung up on the export name {name:?}"))
        }
        _ => HandshakeError::Io(error),
    })?;
    if !greeting.no_zeroes {
        stream.read_exact(&mut [0; EXPORT_NAME_ZEROES]).await?;
    }
    Ok(Described::new(&answer, None))
}

/// Leaves the server with the politeness that the error allows, and hands the error back.
async fn leave<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, error: HandshakeError) -> HandshakeError {
    if matches!(error, HandshakeError::Refused { .. }) {
        abort(stream).await;
    }
    error
}

/// NBD_OPT_ABORT. The answer does not matter, nor whether there is one.
async fn abort<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S) {
    if Haggle::new(stream).send(OptionCode::ABORT, &[]).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}

/// The information that [`connect`] asks for.
const REQUESTED: Info = Info::BLOCK_SIZE;
