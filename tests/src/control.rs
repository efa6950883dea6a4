//! The control socket of a daemon, spoken to without the program's own client: HTTP on a connection that is kept.

use crate::mason::program;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// A connection.
pub struct Control(BufReader<UnixStream>);

/// An answer: its status, and its body where that is JSON.
pub type Answer = (u16, Value);

impl Control {
    /// Connects.
    pub fn connect(socket: &Path) -> Control {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Control(BufReader::new(stream))
    }

    /// Sends a request. The answer is left for [`answer`](Self::answer).
    pub fn send(&mut self, method: &str, path: &str, body: &Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let length = body.len();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: m\r\ncontent-length: {length}\r\n\r\n{body}");
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
    }

    /// The next answer; panics when the connection ends before.
    pub fn answer(&mut self) -> Answer {
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "the daemon has closed the control connection");
            let line = line.trim_end();
            match line.split_once(':') {
                _ if line.is_empty() => break,
                _ if line.starts_with("HTTP/1.1 ") => status = line[9..12].parse().unwrap(),
                Some(("content-length", value)) => length = value.trim().parse().unwrap(),
                _ => {}
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (status, serde_json::from_slice(&body).unwrap_or_default())
    }

    /// Asks.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        self.send(method, path, body);
        self.answer()
    }

    /// Asks, and the answer must be yes.
    #[track_caller]
    pub fn done(&mut self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert!((200..300).contains(&status), "{method} {path} {body}: {status} {answer}");
        answer
    }

    /// What `GET /v1/graphs/NAME` says.
    #[track_caller]
    pub fn graph(&mut self, name: &str) -> Value {
        self.done("GET", &format!("/v1/graphs/{name}"), &Value::Null)
    }
}

/// The body of a reload to a graph file of this text, as if it were at `path`.
pub fn reload(path: &Path, text: &str, options: &Value) -> Value {
    json!({ "sources": [{ "path": "next.mason", "opened": path, "text": text }], "options": options })
}

/// The body of an edit: an element put between two others.
pub fn insert(element: &str, above: &str, below: &str) -> Value {
    let edit = json!({ "edit": "insert", "element": element, "above": above, "below": below });
    json!({ "edits": [edit], "folder": "/" })
}

/// The body of an edit: an element taken away.
pub fn remove(element: &str) -> Value {
    json!({ "edits": [{ "edit": "remove", "element": element }], "folder": "/" })
}

/// What a command of `mason` has done.
#[derive(Debug)]
pub struct Ended {
    /// None if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Ended {
    /// Its standard output, if it has done its work.
    #[track_caller]
    pub fn done(self) -> String {
        assert_eq!(self.code, Some(0), "{}{}", self.out, self.err);
        self.out
    }

    /// What it said, if it has refused.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.code, Some(1), "{}{}", self.out, self.err);
        self.out + &self.err
    }
}

/// `mason` with these arguments, started in `folder`, which is its home, too.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(args).current_dir(folder).env("HOME", folder).env("XDG_RUNTIME_DIR", folder);
    command.env("XDG_STATE_HOME", folder.join("state")).stdin(Stdio::null());
    command
}

/// Runs `mason` to its end.
pub fn mason(folder: &Path, args: &[&str]) -> Ended {
    ended(&command(folder, args).output().unwrap_or_else(|error| panic!("mason: {error}")))
}

/// What a program has said and done.
pub fn ended(output: &Output) -> Ended {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
}
