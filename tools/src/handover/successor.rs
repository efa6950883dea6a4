//! The new process, seen from the old one.

use super::messages::{MAGIC, Message, VERSIONS};
use super::wire::Channel;
use crate::control::refusal::Refusal;
use std::ffi::OsString;
use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

/// The new process. When this is dropped it is killed and reaped, and then its socket is closed: it
/// would take the end of the socket for the end of this process, and serve.
pub(super) struct Successor {
    child: Child,
    /// It has been told to go on: it is nobody's to kill.
    released: bool,
    channel: Channel,
    program: PathBuf,
}

impl Successor {
    /// Starts a program as this process was started.
    pub(super) fn start(program: &Path) -> Result<Successor, Refusal> {
        let cannot = |error: &dyn Display| {
            Refusal::new(
                "unavailable",
                format!("{}: the new program cannot be started: {error}", program.display()),
            )
        };
        let (here, there) = std::os::unix::net::UnixStream::pair().map_err(|error| cannot(&error))?;
        let channel = Channel::new(here.into()).map_err(|error| cannot(&error))?;
        // As its standard input: no other descriptor is open in it, and none is in what others start meanwhile.
        let child = Command::new(program)
            .args(arguments(std::env::args_os().skip(1)))
            .stdin(OwnedFd::from(there))
            .spawn()
            .map_err(|error| cannot(&error))?;
        Ok(Successor { child, released: false, channel, program: program.to_owned() })
    }

    /// Its process number.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A refusal on its behalf.
    pub(super) fn refusal(&self, kind: &str, what: impl Display) -> Refusal {
        Refusal::new(kind, format!("{}: {what}; this process goes on", self.program.display()))
    }

    pub(super) async fn send(&self, message: &Message, descriptors: &[OwnedFd]) -> Result<(), Refusal> {
        let sent = self.channel.send(message, descriptors).await;
        sent.map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => {
                self.ended(message.answer())
            }
            _ => self.refusal("unavailable", format!("the new process cannot be told everything: {error}")),
        })
    }

    fn ended(&self, instead: &str) -> Refusal {
        self.refusal("unavailable", format!("the new process has ended before `{instead}`"))
    }

    /// Its next message, unless it refuses.
    async fn receive(&self, wanted: &str) -> Result<Message, Refusal> {
        match self.channel.receive::<Message>().await {
            Ok((Message::Refused { sentence }, _)) => {
                Err(self.refusal("unavailable", format!("the new process cannot go on: {sentence}")))
            }
            Ok((message, _)) => Ok(message),
            Err(error) => Err(match error.kind() {
                std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::ConnectionReset => self.ended(wanted),
                _ => self.refusal("unavailable", format!("the new process is not understood: {error}")),
            }),
        }
    }

    /// The version of messages that both speak.
    pub(super) async fn greet(&self) -> Result<u32, Refusal> {
        let message = self.receive("hello").await?;
        let Message::Hello { magic, versions, version } = message else {
            return Err(self.unexpected(&message, "hello"));
        };
        tracing::info!("the new program has version {version}");
        let known = VERSIONS.iter().filter(|known| magic == MAGIC && versions.contains(known)).max();
        known.copied().ok_or_else(|| {
            self.refusal("unsupported", "the new program speaks another format: end this one and start that")
        })
    }

    /// Waits for a message that says nothing but its name.
    pub(super) async fn expect(&self, wanted: &Message) -> Result<(), Refusal> {
        let message = self.receive(wanted.name()).await?;
        match message.name() == wanted.name() {
            true => Ok(()),
            false => Err(self.unexpected(&message, wanted.name())),
        }
    }

    fn unexpected(&self, message: &Message, wanted: &str) -> Refusal {
        let what = format!("the new process says `{}`, and `{wanted}` was expected", message.name());
        self.refusal("unavailable", what)
    }

    /// Ends it, if it has not ended by itself, and waits for that.
    pub(super) fn end(&mut self) {
        if !self.released {
            // By its number, which is ours until it is waited for.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// From now on it lives without this process.
    pub(super) fn release(&mut self) {
        self.released = true;
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.end();
    }
}

/// The arguments of `mason run` with what makes a successor of it.
fn arguments(own: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<_> = own.filter(|argument| argument != "--inherit").collect();
    let run = arguments.iter().position(|argument| argument == "run").map_or(arguments.len(), |at| at + 1);
    arguments.insert(run, "--inherit".into());
    arguments
}

/// The program that this process was started from: what is at its path now.
pub(super) fn own_program() -> Result<PathBuf, Refusal> {
    let path = std::env::current_exe().map_err(|error| {
        Refusal::new("unavailable", format!("the path of this program is not known ({error}): give --binary"))
    })?;
    // The kernel says so of a file that has been replaced.
    let text = path.to_string_lossy();
    let path = text.strip_suffix(" (deleted)").filter(|_| !path.exists()).map_or(path.clone(), PathBuf::from);
    match path.exists() {
        true => Ok(path),
        false => {
            let what = "the program is not there any more: give another with --binary";
            Err(Refusal::new("not_found", format!("{}: {what}", path.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_successor_has_the_same_arguments_and_one_more() {
        let of = |line: &str| {
            let arguments = arguments(line.split(' ').map(OsString::from));
            arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("run vm.mason"), "run --inherit vm.mason");
        assert_eq!(of("-v run vm.mason -D a=run"), "-v run --inherit vm.mason -D a=run");
        assert_eq!(of("run --inherit -- vm.mason"), "run --inherit -- vm.mason");
    }
}
