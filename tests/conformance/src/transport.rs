//! The byte stream to a server: unix or TCP, plain or TLS, with a deadline on every step.
//!
//! A step (one send, one receive) ends by its own deadline, and all steps of a test by the test's. So a
//! server that sends a byte now and then is as harmless as a silent one.

use crate::stop::{Check, Stop, fail};
use crate::uri::{Place, Uri};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most that is received at once: memory grows with what arrives, not with what was announced.
const GROWTH: usize = 1 << 16;

/// The time a connection has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// For one step.
    pub(crate) step: Duration,
    /// The end of the whole test.
    pub(crate) end: Instant,
}

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A socket whose every call ends by `until`.
struct Plain {
    socket: Socket,
    until: Instant,
}

impl Plain {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Plain {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.socket {
            Socket::Unix(socket) => socket.set_read_timeout(left).and_then(|()| socket.read(buffer)),
            Socket::Tcp(socket) => socket.set_read_timeout(left).and_then(|()| socket.read(buffer)),
        }
    }
}

impl Write for Plain {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let left = self.left()?;
        match &mut self.socket {
            Socket::Unix(socket) => socket.set_write_timeout(left).and_then(|()| socket.write(buffer)),
            Socket::Tcp(socket) => socket.set_write_timeout(left).and_then(|()| socket.write(buffer)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Layer {
    Plain(Plain),
    Tls(Box<StreamOwned<ClientConnection, Plain>>),
}

/// How a server ended a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// In TLS with a `close_notify`; without TLS with an orderly end of the stream.
    Orderly,
    /// By a reset, or in TLS without `close_notify`.
    Abrupt,
}

/// A connection to a server.
pub(crate) struct Stream {
    layer: Layer,
    limits: Limits,
}

impl Stream {
    /// Opens the plain connection.
    pub(crate) fn open(uri: &Uri, limits: Limits) -> Check<Self> {
        let socket = match &uri.place {
            Place::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
            Place::Tcp(host, port) => connect_tcp(host, *port, limits.step).map(Socket::Tcp),
        };
        let socket = socket.map_err(|error| Stop::Fail(format!("cannot connect: {error}")))?;
        Ok(Self { layer: Layer::Plain(Plain { socket, until: limits.end }), limits })
    }

    /// Runs the TLS handshake over the connection.
    pub(crate) fn start_tls(self, config: Arc<ClientConfig>, host: &str) -> Check<Self> {
        let Layer::Plain(mut plain) = self.layer else { return fail("TLS runs already") };
        let name = rustls_pki_types::ServerName::try_from(host.to_owned())
            .map_err(|error| Stop::Fail(format!("'{host}' is not a TLS host name: {error}")))?;
        let mut tls = ClientConnection::new(config, name)
            .map_err(|error| Stop::Fail(format!("cannot start TLS: {error}")))?;
        plain.until = deadline(self.limits);
        while tls.is_handshaking() {
            tls.complete_io(&mut plain).map_err(|error| stop(error, "the TLS handshake"))?;
        }
        let layer = Layer::Tls(Box::new(StreamOwned::new(tls, plain)));
        Ok(Self { layer, limits: self.limits })
    }

    fn step(&mut self) -> &mut dyn ReadWrite {
        let until = deadline(self.limits);
        match &mut self.layer {
            Layer::Plain(plain) => {
                plain.until = until;
                plain
            }
            Layer::Tls(tls) => {
                tls.sock.until = until;
                tls.as_mut()
            }
        }
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(&mut self, bytes: &[u8], what: &str) -> Check {
        let io = self.step();
        io.write_all(bytes).and_then(|()| io.flush()).map_err(|error| stop(error, what))
    }

    /// Receives exactly as many bytes as `buffer` holds.
    pub(crate) fn receive(&mut self, buffer: &mut [u8], what: &str) -> Check {
        self.step().read_exact(buffer).map_err(|error| stop(error, what))
    }

    /// Receives `len` bytes. The caller has checked `len` against a limit of its own.
    pub(crate) fn receive_vec(&mut self, len: usize, what: &str) -> Check<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let start = bytes.len();
            bytes.resize(len.min(start + GROWTH), 0);
            self.receive(&mut bytes[start..], what)?;
        }
        Ok(bytes)
    }

    /// Waits for the server to close the connection; any byte before that is a failure.
    pub(crate) fn closed(&mut self, what: &str) -> Check<Ending> {
        let mut byte = [0];
        match self.step().read(&mut byte) {
            Ok(0) => Ok(Ending::Orderly),
            Ok(_) => fail(format!("the server sent more bytes instead of closing, after {what}")),
            Err(error) => match stop(error, what) {
                Stop::Closed(_) => Ok(Ending::Abrupt),
                Stop::Silent(_) => fail(format!("the server kept the connection open after {what}")),
                other => Err(other),
            },
        }
    }
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

fn deadline(limits: Limits) -> Instant {
    limits.end.min(Instant::now() + limits.step)
}

fn connect_tcp(host: &str, port: u16, step: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::from(ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, step) {
            Ok(socket) => {
                socket.set_nodelay(true)?;
                return Ok(socket);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn stop(error: io::Error, what: &str) -> Stop {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Stop::Silent(what.to_owned()),
        ErrorKind::UnexpectedEof
        | ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe => Stop::Closed(what.to_owned()),
        _ => Stop::Fail(format!("{what}: {error}")),
    }
}

/// TLS settings: trust the certificates in the PEM file `ca` and no others.
pub(crate) fn tls_config(ca: &std::path::Path, only_tls12: bool) -> Result<Arc<ClientConfig>, String> {
    use rustls_pki_types::pem::PemObject;
    let said = |error: &dyn std::fmt::Display| format!("{}: {error}", ca.display());
    let mut roots = rustls::RootCertStore::empty();
    let certificates = rustls_pki_types::CertificateDer::pem_file_iter(ca).map_err(|error| said(&error))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| said(&error))?;
        roots.add(certificate).map_err(|error| said(&error))?;
    }
    let versions: &[&rustls::SupportedProtocolVersion] =
        if only_tls12 { &[&rustls::version::TLS12] } else { rustls::ALL_VERSIONS };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .map_err(|error| error.to_string())?;
    Ok(Arc::new(config.with_root_certificates(roots).with_no_client_auth()))
}
