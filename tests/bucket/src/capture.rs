//! Every byte that comes and goes over TCP, for tests of what is readable there.

use std::io::Result;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// What came over one connection, and what went.
type Record = Arc<Mutex<[Vec<u8>; 2]>>;

/// What is kept, once a test has asked for it: one record for each connection, for bytes of two would be torn apart.
#[derive(Clone, Default)]
pub(crate) struct Captured(Arc<Mutex<Option<Vec<Record>>>>);

impl Captured {
    /// Keeps what comes from now on. Returns what was kept so far.
    pub(crate) fn begin(&self) -> Vec<[Vec<u8>; 2]> {
        let before = self.0.lock().unwrap().replace(Vec::new()).unwrap_or_default();
        before.iter().map(|record| record.lock().unwrap().clone()).collect()
    }

    /// The record of a connection that begins; None if nothing is kept.
    pub(crate) fn record(&self) -> Option<Record> {
        let mut records = self.0.lock().unwrap();
        let record = Record::default();
        records.as_mut()?.push(record.clone());
        Some(record)
    }
}

/// A connection whose bytes are kept.
pub(crate) struct Recorded(pub(crate) TcpStream, pub(crate) Option<Record>);

impl Recorded {
    fn keep(&self, way: usize, bytes: &[u8]) {
        if let Some(record) = &self.1 {
            record.lock().unwrap()[way].extend_from_slice(bytes);
        }
    }
}

impl AsyncRead for Recorded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
        self.keep(0, &buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Recorded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize>> {
        let sent = ready!(Pin::new(&mut self.0).poll_write(cx, bytes))?;
        self.keep(1, &bytes[..sent]);
        Poll::Ready(Ok(sent))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
