//! A web server that is told of an event.

use blockmason::lang::value::Uri;
use blockmason::rt;
use futures::future::{Either, select};
use hyper::Request;
use hyper::body::{Body, Incoming};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::future::poll_fn;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// For one try, from the connection to the answer.
const DEADLINE: Duration = Duration::from_secs(10);

/// Tries, and the pause after the first; each further one is twice as long.
const TRIES: u32 = 3;
const BACKOFF: Duration = Duration::from_millis(500);

/// Bytes of the head of an answer, and of the body of one that says no.
const LONGEST_HEAD: usize = 16 << 10;
const LONGEST_BODY: usize = 500;

/// Where events are posted.
#[derive(Debug, PartialEq)]
pub(super) struct Webhook {
    address: Address,
    /// The `Host` of the request.
    host: String,
    /// Path and query.
    path: String,
    /// For one try, from the connection to the answer.
    deadline: Duration,
}

#[derive(Debug, PartialEq)]
enum Address {
    Tcp(String, u16),
    Unix(PathBuf),
}

/// Why a try has failed.
struct Fault {
    why: String,
    /// Whether another one may help, and tells nobody twice.
    again: bool,
}

impl Webhook {
    /// # Errors
    /// What cannot be called, and what to do instead.
    pub(super) fn new(uri: &Uri) -> Result<Webhook, String> {
        match uri.scheme() {
            "http" => {}
            "unix" => {
                let address = Address::Unix(uri.rest().into());
                let (host, path) = ("localhost".to_owned(), "/".to_owned());
                return Ok(Webhook { address, host, path, deadline: DEADLINE });
            }
            "https" => {
                return Err(
                    "https is not spoken here: post to a relay on this machine by `http:` or `unix:`, \
                            or run one with `exec` (curl reads standard input with `--data @-`)"
                        .to_owned(),
                );
            }
            other => return Err(format!("expected an address of `http:` or `unix:`, not of `{other}:`")),
        }
        let wrong = |why: &str| format!("`{uri}` is no address such as `http://127.0.0.1:8080/hook`: {why}");
        let parsed: hyper::Uri = uri.as_str().parse().map_err(|_| wrong("it cannot be read"))?;
        let authority = parsed.authority().ok_or_else(|| wrong("it names no server"))?;
        if authority.as_str().contains('@') {
            return Err(wrong(
                "a user or password in it would stand in logs; use `exec` with a file of yours",
            ));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let port = match authority.port() {
            _ if host.is_empty() => return Err(wrong("it names no server")),
            Some(port) => port.as_u16(),
            None if authority.as_str() == authority.host() => 80,
            None => return Err(wrong("a port is a number up to 65535")),
        };
        let path = parsed.path_and_query().map_or("/", |path| path.as_str());
        Ok(Webhook {
            address: Address::Tcp(host.to_owned(), port),
            host: authority.as_str().to_owned(),
            path: path.to_owned(),
            deadline: DEADLINE,
        })
    }

    /// Posts a JSON text. Tried again if there is no connection or the server has failed (5xx); once a
    /// request is sent and no answer comes, it may have arrived and is not repeated.
    ///
    /// # Errors
    /// Why the last try has failed.
    pub(super) async fn post(&self, json: &str) -> Result<(), String> {
        let mut pause = BACKOFF;
        for _ in 1..TRIES {
            match self.try_once(json).await {
                Ok(()) => return Ok(()),
                Err(Fault { why, again: false }) => return Err(format!("webhook: {why}")),
                Err(Fault { again: true, .. }) => rt::sleep(pause).await,
            }
            pause *= 2;
        }
        self.try_once(json).await.map_err(|fault| format!("webhook: {}, tried {TRIES} times", fault.why))
    }

    async fn try_once(&self, json: &str) -> Result<(), Fault> {
        let again = |why| Fault { why, again: true };
        let (since, deadline) = (rt::now(), self.deadline);
        let connected = match &self.address {
            Address::Tcp(host, port) => {
                let stream = rt::timeout(deadline, TcpStream::connect((host.as_str(), *port))).await;
                stream.map(|stream| stream.map(Either::Left))
            }
            Address::Unix(path) => {
                let stream = rt::timeout(deadline, UnixStream::connect(path)).await;
                stream.map(|stream| stream.map(Either::Right))
            }
        };
        let stream = match connected {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => return Err(again(format!("no connection: {error}"))),
            None => return Err(again(format!("no connection within {deadline:?}"))),
        };
        let left = deadline.saturating_sub(rt::now() - since);
        let answered = match stream {
            Either::Left(stream) => rt::timeout(left, self.exchange(stream, json)).await,
            Either::Right(stream) => rt::timeout(left, self.exchange(stream, json)).await,
        };
        answered.unwrap_or_else(|| Err(Fault { why: format!("no answer within {deadline:?}"), again: false }))
    }

    async fn exchange<S>(&self, stream: S, json: &str) -> Result<(), Fault>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let broken = |error: hyper::Error| Fault { why: format!("no answer: {error}"), again: false };
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(LONGEST_HEAD)
            .handshake::<_, String>(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let request = Request::post(&self.path)
            .header("host", &self.host)
            .header("content-type", "application/json")
            .header("connection", "close")
            .header("user-agent", concat!("mason/", env!("CARGO_PKG_VERSION")))
            .body(json.to_owned())
            .map_err(|error| Fault { why: error.to_string(), again: false })?;
        let exchange = async {
            let answer = sender.send_request(request).await.map_err(broken)?;
            let status = answer.status();
            if status.is_success() {
                return Ok(());
            }
            let said = beginning(answer.into_body()).await;
            let why = format!("the server answers {status}: {said:?}");
            Err(Fault { why, again: status.is_server_error() })
        };
        match select(pin!(exchange), pin!(connection)).await {
            Either::Left((result, _)) => result,
            // What has arrived before the connection ended is still there.
            Either::Right((_, exchange)) => exchange.await,
        }
    }
}

/// The beginning of a body, as text.
async fn beginning(mut body: Incoming) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < LONGEST_BODY {
        let Some(Ok(frame)) = poll_fn(|task| Pin::new(&mut body).poll_frame(task)).await else { break };
        if let Some(data) = frame.data_ref() {
            bytes.extend_from_slice(&data[..data.len().min(LONGEST_BODY - bytes.len())]);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, UnixListener};

    fn webhook(uri: &str) -> Result<Webhook, String> {
        Webhook::new(&uri.parse().unwrap())
    }

    /// Reads a request: head and body.
    async fn request(stream: &mut (impl AsyncRead + Unpin)) -> String {
        let mut text = String::new();
        loop {
            let length = text
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "))
                .map(|len| len.parse::<usize>().unwrap());
            if let (Some(length), Some((_, body))) = (length, text.split_once("\r\n\r\n"))
                && body.len() >= length
            {
                return text;
            }
            let mut buffer = [0; 1000];
            let len = stream.read(&mut buffer).await.unwrap();
            assert!(len > 0, "the request ends early: {text}");
            text.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
        }
    }

    /// A server that gives these answers, each on a connection of its own, and what it was asked.
    async fn serve(listener: TcpListener, answers: &[&str]) -> Vec<String> {
        let mut asked = Vec::new();
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            asked.push(request(&mut stream).await);
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        asked
    }

    async fn post(answers: &[&str]) -> (Vec<String>, Result<(), String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/hook?key=1", listener.local_addr().unwrap());
        let webhook = webhook(&uri).unwrap();
        tokio::join!(serve(listener, answers), webhook.post("{\"message\":\"a\\nb\"}\n"))
    }

    const OK: &str = "HTTP/1.1 204 No Content\r\n\r\n";
    const BUSY: &str = "HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nlater";

    #[tokio::test]
    async fn posts_the_event() {
        let (asked, result) = post(&[OK]).await;
        assert_eq!(result, Ok(()));
        assert!(asked[0].starts_with("POST /hook?key=1 HTTP/1.1\r\n"), "{asked:?}");
        assert!(asked[0].contains("content-type: application/json\r\n"), "{asked:?}");
        assert!(asked[0].ends_with("\r\n\r\n{\"message\":\"a\\nb\"}\n"), "{asked:?}");
    }

    #[tokio::test]
    async fn a_server_that_fails_is_asked_again_and_one_that_refuses_is_not() {
        let (asked, result) = post(&[BUSY, BUSY, OK]).await;
        assert_eq!((asked.len(), result), (3, Ok(())));
        let (asked, result) = post(&[BUSY; 3]).await;
        let error = result.unwrap_err();
        assert!(asked.len() == 3 && error.contains("503") && error.contains("later"), "{error}");
        let (asked, result) = post(&["HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"]).await;
        assert!(asked.len() == 1 && result.unwrap_err().contains("404"));
    }

    #[tokio::test]
    async fn answers_that_are_none_or_have_no_end_are_bounded() {
        let long = format!("HTTP/1.1 400 No\r\n\r\n{}", "x".repeat(100_000));
        let (_, result) = post(&[&long]).await;
        assert!(result.unwrap_err().len() < LONGEST_BODY + 200);
        for answer in ["", "SSH-2.0-what\r\n\r\n", "HTTP/1.1 204 ok\r\n"] {
            let (asked, result) = post(&[answer]).await;
            assert!(asked.len() == 1 && result.unwrap_err().contains("no answer"), "{answer}");
        }
        let head = format!("HTTP/1.1 204 ok\r\n{}", "x: y\r\n".repeat(10_000));
        let (_, result) = post(&[&head]).await;
        assert!(result.unwrap_err().contains("no answer"));
    }

    #[tokio::test]
    async fn unix_sockets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.sock");
        let webhook = webhook(&format!("unix:{}", path.display())).unwrap();
        let error = webhook.post("{}").await.unwrap_err();
        assert!(error.contains("no connection") && error.contains("3 times"), "{error}");
        let listener = UnixListener::bind(&path).unwrap();
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let asked = request(&mut stream).await;
            stream.write_all(OK.as_bytes()).await.unwrap();
            asked
        };
        let (asked, result) = tokio::join!(server, webhook.post("{}"));
        assert_eq!(result, Ok(()));
        assert!(asked.starts_with("POST / HTTP/1.1\r\n"), "{asked}");
    }

    #[tokio::test]
    async fn a_server_that_says_nothing_is_left_and_not_asked_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/", listener.local_addr().unwrap());
        let webhook = Webhook { deadline: Duration::from_millis(200), ..webhook(&uri).unwrap() };
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            request(&mut stream).await;
            // Until it is left.
            assert_eq!(stream.read(&mut [0; 10]).await.unwrap(), 0);
            rt::timeout(BACKOFF * 4, listener.accept()).await.is_none()
        };
        let (alone, result) = tokio::join!(server, webhook.post("{}"));
        assert!(alone && result.unwrap_err().contains("no answer within 200ms"));
    }

    #[test]
    fn addresses() {
        let tcp = |uri| match webhook(uri).unwrap() {
            Webhook { address: Address::Tcp(host, port), path, .. } => (host, port, path),
            other => panic!("{other:?}"),
        };
        assert_eq!(tcp("http://a.example"), ("a.example".to_owned(), 80, "/".to_owned()));
        assert_eq!(tcp("http://[::1]:8080/x?y=1"), ("::1".to_owned(), 8080, "/x?y=1".to_owned()));
        for (uri, part) in [
            ("https://a.example/", "exec"),
            ("http://u:p@a.example/", "password"),
            ("http:/x", "no address"),
            ("http://:80/x", "no address"),
            ("http://a:99999/x", "no address"),
            ("ftp://a/", "`ftp:`"),
        ] {
            let error = webhook(uri).unwrap_err();
            assert!(error.contains(part), "{uri}: {error}");
        }
    }
}
