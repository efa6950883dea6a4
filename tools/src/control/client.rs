//! The asking end of the control socket: HTTP over a unix socket, without a word about what is asked.

use super::refusal::RefusalBody;
use crate::failure::{Failure, Outcome};
use crate::output::printable;
use axum::body::{Body, to_bytes};
use futures::StreamExt;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// A daemon that does not answer a question within this time counts as one that hangs. Changes take as long
/// as they take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: usize = 256 << 20;

/// The longest line of a stream, in bytes.
const LONGEST_LINE: usize = 1 << 20;

/// A daemon that can be asked.
pub(crate) struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

/// A path on the control socket. Each segment stays one, whatever a name contains.
pub(crate) fn path(segments: &[&str]) -> String {
    segments.iter().map(|text| format!("/{}", segment(text))).collect()
}

/// A segment of a path, or a value of a query.
pub(crate) fn segment(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

impl Client {
    /// A client of the daemon behind a socket. Nothing is sent yet.
    pub(crate) fn new(socket: impl Into<PathBuf>) -> Outcome<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Client { socket: socket.into(), runtime: runtime.map_err(Failure::new)? })
    }

    /// Waits for something of the client's own.
    pub(crate) fn block_on<T>(&self, body: impl Future<Output = T>) -> T {
        self.runtime.block_on(body)
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks. Waits five seconds at most.
    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Outcome<T> {
        self.runtime.block_on(async {
            let asked = blockmason::rt::timeout(PATIENCE, self.exchange(Method::GET, path, Vec::new()));
            let hangs = || self.about(format!("the daemon has not answered in {} s", PATIENCE.as_secs()));
            self.parse(&asked.await.unwrap_or_else(|| Err(hangs()))?)
        })
    }

    /// Asks for something to be done, and waits until it is.
    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Outcome<T> {
        self.change(Method::POST, path, serde_json::to_vec(body).map_err(Failure::new)?)
    }

    /// Asks for something to be set, and waits until it is.
    pub(crate) fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Outcome<T> {
        self.change(Method::PUT, path, serde_json::to_vec(body).map_err(Failure::new)?)
    }

    /// Asks for something to be taken away, and waits until it is.
    pub(crate) fn delete(&self, path: &str) -> Outcome {
        self.change(Method::DELETE, path, Vec::new())
    }

    fn change<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Outcome<T> {
        let answer = self.runtime.block_on(self.exchange(method, path, body));
        self.parse(&answer?)
    }

    /// Takes an answer line by line, for as long as `each` goes on or the daemon does.
    pub(crate) fn lines(&self, path: &str, each: impl FnMut(&str) -> Outcome<ControlFlow<()>>) -> Outcome {
        self.lines_until(path, std::future::pending(), each)
    }

    /// The same, until `stop` resolves at the latest.
    pub(crate) fn lines_until(
        &self,
        path: &str,
        stop: impl Future<Output = ()>,
        mut each: impl FnMut(&str) -> Outcome<ControlFlow<()>>,
    ) -> Outcome {
        let lines = async {
            let answer = self.ask(Method::GET, path, Vec::new()).await?;
            let mut body = self.accepted(answer).await?.into_data_stream();
            let mut rest = Vec::new();
            while let Some(part) = body.next().await {
                rest.extend_from_slice(&part.map_err(|error| self.broken(&error))?);
                while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    let line = std::str::from_utf8(&line[..end]).map_err(|error| self.broken(&error))?;
                    if each(line)?.is_break() {
                        return Ok(());
                    }
                }
                if rest.len() > LONGEST_LINE {
                    return Err(self.broken(&"a line without end"));
                }
            }
            Ok(())
        };
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = stop => Ok(()),
                ended = lines => ended,
            }
        })
    }

    /// Takes an answer as text.
    pub(crate) fn text(&self, path: &str) -> Outcome<String> {
        let body = self.runtime.block_on(self.exchange(Method::GET, path, Vec::new()))?;
        String::from_utf8(body).map_err(|error| self.broken(&error))
    }

    /// One request and the whole answer.
    async fn exchange(&self, method: Method, path: &str, body: Vec<u8>) -> Outcome<Vec<u8>> {
        let answer = self.accepted(self.ask(method, path, body).await?).await?;
        let body = to_bytes(answer, LONGEST_ANSWER).await.map_err(|error| self.broken(&error))?;
        Ok(body.into())
    }

    async fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> Outcome<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| {
            self.about(match error.kind() {
                std::io::ErrorKind::NotFound => "no daemon runs there: there is no such socket".to_owned(),
                std::io::ErrorKind::ConnectionRefused => {
                    "no daemon runs there: the socket is a dead one".to_owned()
                }
                _ => format!("the daemon cannot be reached: {error}"),
            })
        })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(&error))?;
        // It ends with its sender and the answer's body; what goes wrong with it is seen by those.
        super::server::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "mason")
            .header("content-type", "application/json")
            .body(Body::from(body))
            .map_err(|error| self.broken(&error))?;
        sender.send_request(request).await.map_err(|error| self.broken(&error))
    }

    fn parse<T: DeserializeOwned>(&self, body: &[u8]) -> Outcome<T> {
        // Done, with nothing to say.
        let body = if body.is_empty() { b"null" } else { body };
        let mut value = serde_json::from_slice(body).map_err(|error| self.broken(&error))?;
        harmless(&mut value);
        serde_json::from_value(value).map_err(|error| self.broken(&error))
    }

    /// With the socket that it is about.
    fn about(&self, sentence: impl Display) -> Failure {
        Failure::new(format!("{}: {sentence}", self.socket.display()))
    }

    fn broken(&self, error: &dyn Display) -> Failure {
        self.about(format!("this is no control socket of mason: {}", printable(&error.to_string())))
    }

    /// The body of an answer that says yes.
    async fn accepted(&self, answer: Response<Incoming>) -> Outcome<Body> {
        let (head, body) = answer.into_parts();
        let body = Body::new(body);
        if head.status.is_success() {
            return Ok(body);
        }
        let body = to_bytes(body, LONGEST_LINE).await.unwrap_or_default();
        match serde_json::from_slice::<RefusalBody>(&body) {
            Ok(refused) => Err(refused.error.into()),
            Err(_) => Err(self.about(format!("the daemon answers {}", head.status))),
        }
    }
}

/// Takes away what could do something to a terminal. Line breaks and tabs stay: values may have several lines.
fn harmless(value: &mut serde_json::Value) {
    let is_harmful = |c: char| c.is_control() && c != '\n' && c != '\t';
    match value {
        serde_json::Value::String(text) if text.contains(is_harmful) => {
            *text = text.replace(is_harmful, "?");
        }
        serde_json::Value::Array(values) => values.iter_mut().for_each(harmless),
        serde_json::Value::Object(values) => values.values_mut().for_each(harmless),
        _ => {}
    }
}
