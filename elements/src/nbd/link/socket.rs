//! A socket to a server, which can be made on one runtime and used on another.

use crate::nbd::uri::Address;
use std::io::{Error, IoSlice, Result, Write};
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// A connection over TCP or a unix socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    /// On no runtime; None only while it is moved, or if that failed.
    Parked(Option<Parked>),
}

#[derive(Debug)]
pub(super) enum Parked {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Socket {
    pub(super) async fn dial(address: &Address) -> Result<Socket> {
        Ok(match address {
            Address::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), *port)).await?;
                // Every write is a whole turn's requests: nothing is gained by waiting for more.
                socket.set_nodelay(true)?;
                Socket::Tcp(socket)
            }
            Address::Unix(path) => Socket::Unix(UnixStream::connect(path).await?),
        })
    }

    /// Takes the socket off its runtime.
    pub(super) fn park(&mut self) -> Result<()> {
        *self = Socket::Parked(Some(match std::mem::replace(self, Socket::Parked(None)) {
            Socket::Tcp(socket) => Parked::Tcp(socket.into_std()?),
            Socket::Unix(socket) => Parked::Unix(socket.into_std()?),
            Socket::Parked(parked) => parked.ok_or_else(gone)?,
        }));
        Ok(())
    }

    /// Brings a parked socket onto the current runtime.
    pub(super) fn unpark(&mut self) -> Result<()> {
        if let Socket::Parked(parked) = self {
            *self = match parked.take().ok_or_else(gone)? {
                Parked::Tcp(socket) => Socket::Tcp(TcpStream::from_std(socket)?),
                Parked::Unix(socket) => Socket::Unix(UnixStream::from_std(socket)?),
            };
        }
        Ok(())
    }

    /// Writes a few bytes on a parked socket as far as that does not block.
    pub(super) fn say(&mut self, bytes: &[u8]) {
        // Only a courtesy: whether it arrives does not matter.
        let _ = match self {
            Socket::Parked(Some(Parked::Tcp(socket))) => socket.write(bytes),
            Socket::Parked(Some(Parked::Unix(socket))) => socket.write(bytes),
            _ => Ok(0),
        };
    }
}

fn gone() -> Error {
    Error::other("the socket is not in use")
}

/// Calls one poll function of whichever socket there is.
macro_rules! either {
    ($this:expr, $socket:ident => $call:expr) => {
        match $this.get_mut() {
            Socket::Tcp(inner) => {
                let $socket = Pin::new(inner);
                $call
            }
            Socket::Unix(inner) => {
                let $socket = Pin::new(inner);
                $call
            }
            Socket::Parked(_) => Poll::Ready(Err(gone())),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        either!(self, socket => socket.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<Result<usize>> {
        either!(self, socket => socket.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        either!(self, socket => socket.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        either!(self, socket => socket.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        either!(self, socket => socket.poll_shutdown(cx))
    }
}
