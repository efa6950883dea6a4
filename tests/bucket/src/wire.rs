//! Between the connection and S3: every request is read to its end, suffers what the rules say, and is noted.

use crate::s3::IgnoreConditions;
use crate::{Action, Operation, Rule};
use futures::stream;
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::http::request::Parts;
use hyper::{Request, Response};
use s3s::Body;
use s3s::service::S3Service;
use std::io::{Error, Result};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A body as it goes out, which may end too early.
type Outgoing = UnsyncBoxBody<Bytes, Error>;

/// One request that was carried out, or refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it asked for.
    pub operation: Operation,
    /// Of which object; see [`Operation`] for those that name none or many.
    pub key: String,
    /// The length of its body.
    pub received: u64,
    /// The length of the body of its answer, as it was promised.
    pub sent: u64,
    /// What was answered; nothing where the connection was closed instead.
    pub status: Option<u16>,
}

/// S3 behind its faults.
pub(crate) struct Wire {
    pub(crate) service: S3Service,
    pub(crate) rules: Mutex<Vec<Rule>>,
    pub(crate) log: Mutex<Vec<Entry>>,
    pub(crate) latency: Mutex<Duration>,
}

impl Wire {
    /// Answers one request. An error closes the connection.
    pub(crate) async fn serve(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Outgoing>> {
        let (parts, body) = request.into_parts();
        // A body that breaks off is no request.
        let body = body.collect().await.map_err(Error::other)?.to_bytes();
        // In a task of its own: what has arrived is carried out, even when its client has gone.
        let task = tokio::runtime::Handle::current().spawn(self.carry_out(parts, body));
        task.await.map_err(Error::other)?
    }

    async fn carry_out(self: Arc<Self>, parts: Parts, body: Bytes) -> Result<Response<Outgoing>> {
        let (operation, key) = Operation::of(&parts);
        let received = body.len() as u64;
        let actions = self.happening(operation, &key);
        let answer = self.answer(parts, body, &actions).await;
        let (status, sent) = match &answer {
            Ok(answer) => (Some(answer.status().as_u16()), answer.body().len() as u64),
            Err(_) => (None, 0),
        };
        self.log.lock().unwrap().push(Entry { operation, key, received, sent, status });
        Ok(sent_off(answer?, &actions))
    }

    fn happening(&self, operation: Operation, key: &str) -> Vec<Action> {
        let mut rules = self.rules.lock().unwrap();
        rules.iter_mut().filter_map(|rule| rule.happens(operation, key)).collect()
    }

    async fn answer(&self, parts: Parts, body: Bytes, actions: &[Action]) -> Result<Response<Bytes>> {
        let latency = *self.latency.lock().unwrap();
        pause(latency).await;
        let mut request = Request::from_parts(parts, Body::from(body));
        for action in actions {
            match action {
                Action::Delay(time) => pause(*time).await,
                Action::Hold(hold) => hold.pass().await,
                Action::ErrorBefore(status, code) => return Ok(error(*status, code)),
                Action::CloseBefore => return Err(Error::other("closed before")),
                Action::IgnoreConditions => drop(request.extensions_mut().insert(IgnoreConditions)),
                _ => {}
            }
        }
        let (head, body) =
            self.service.call(request).await.map_err(|_| Error::other("no answer"))?.into_parts();
        let body = body.collect().await.map_err(Error::other)?.to_bytes();
        for action in actions {
            match action {
                Action::ErrorAfter(status, code) => return Ok(error(*status, code)),
                Action::CloseAfter => return Err(Error::other("closed after")),
                _ => {}
            }
        }
        Ok(Response::from_parts(head, body))
    }
}

/// The answer on its way, spoilt where that is wanted.
fn sent_off(answer: Response<Bytes>, actions: &[Action]) -> Response<Outgoing> {
    let (head, mut body) = answer.into_parts();
    let mut cut = None;
    for action in actions {
        match action {
            Action::TruncateBody(length) => cut = Some(*length),
            Action::Endless(length) => return Response::new(endless(*length)),
            Action::FlipBit(bit) if !body.is_empty() => {
                let mut bytes = body.to_vec();
                let bit = bit % (bytes.len() * 8);
                bytes[bit / 8] ^= 1 << (bit % 8);
                body = bytes.into();
            }
            _ => {}
        }
    }
    let body = match cut {
        Some(length) if length < body.len() => broken_off(body.slice(..length)),
        _ => Full::new(body).map_err(|never| match never {}).boxed_unsync(),
    };
    Response::from_parts(head, body)
}

/// A body that fails after these bytes, which closes the connection. It yields in between, so that they are sent first.
fn broken_off(bytes: Bytes) -> Outgoing {
    let pieces = stream::unfold(Some(bytes), async |bytes| match bytes {
        Some(bytes) => Some((Ok(Frame::data(bytes)), None)),
        None => {
            tokio::task::yield_now().await;
            Some((Err(Error::other("broken off")), None))
        }
    });
    StreamBody::new(pieces).boxed_unsync()
}

/// A body without an end, and without a word of its length.
fn endless(piece: usize) -> Outgoing {
    let piece = Bytes::from(vec![b' '; piece]);
    StreamBody::new(stream::repeat_with(move || Ok(Frame::data(piece.clone())))).boxed_unsync()
}

fn error(status: u16, code: &str) -> Response<Bytes> {
    let xml = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?><Error><Code>{code}</Code></Error>");
    let answer = Response::builder().status(status).header("content-type", "application/xml");
    answer.body(Bytes::from(xml)).unwrap()
}

#[allow(clippy::disallowed_methods, reason = "a server is slow in real time")]
async fn pause(time: Duration) {
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}
