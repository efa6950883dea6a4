//! A command that is told of an event.

use super::queue::Message;
use blockmason::rt;
use futures::future::{Either, join, select};
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin};

/// Bytes of its output that are kept, the last ones.
const KEPT: usize = 1024;

/// For this long its output may come after its end: a process that it has left behind may hold it open.
const GRACE: Duration = Duration::from_secs(1);

/// Variables that the service manager meant for the daemon.
const NOT_ITS: [&str; 6] =
    ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// A program and its arguments.
pub(super) struct Command {
    /// A path, or a name that is looked up in PATH.
    pub(super) program: PathBuf,
    pub(super) args: Vec<String>,
}

impl Command {
    /// Runs it to its end, or kills it, and all that is left of its process group, after `deadline`.
    ///
    /// # Errors
    /// What went wrong, and the end of its output.
    pub(super) async fn run(&self, message: &Message, deadline: Duration) -> Result<(), String> {
        let started = self.start(message);
        let (mut child, output) =
            started.map_err(|error| format!("cannot run {}: {error}", self.program.display()))?;
        let mut tail = Vec::new();
        let waited = {
            let feed = feed(child.stdin.take(), message.json());
            let mut io = pin!(join(feed, collect(output, &mut tail)));
            let wait = pin!(child.wait());
            let ended = async {
                match select(wait, io.as_mut()).await {
                    Either::Left((status, _)) => (status, false),
                    Either::Right((_, wait)) => (wait.await, true),
                }
            };
            let waited = rt::timeout(deadline, ended).await;
            if let Some((_, false)) = waited {
                // Late output is lost, the status is what counts.
                let _ = rt::timeout(GRACE, io).await;
            }
            waited.map(|(status, _)| status)
        };
        let what = match waited {
            Some(Ok(status)) if status.success() => return Ok(()),
            Some(Ok(status)) => ended(status),
            Some(Err(error)) => format!("cannot be waited for: {error}"),
            None => {
                kill(&mut child).await;
                format!("has not ended within {deadline:?} and was killed")
            }
        };
        let said = String::from_utf8_lossy(&tail);
        let said = said.trim_end();
        let said = if said.is_empty() { String::new() } else { format!("; it said {said:?}") };
        Err(format!("{} {what}{said}", self.program.display()))
    }

    fn start(&self, message: &Message) -> std::io::Result<(Child, pipe::Receiver)> {
        let (reader, writer) = std::io::pipe()?;
        let mut command = tokio::process::Command::new(&self.program);
        command.args(&self.args).stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
        // A group of its own: Ctrl-C at the daemon's terminal is not for it, and a kill finds its children.
        command.process_group(0).kill_on_drop(true);
        for name in NOT_ITS {
            command.env_remove(name);
        }
        for (name, value) in message.variables() {
            command.env(name, value);
        }
        Ok((command.spawn()?, pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?))
    }
}

fn ended(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("has failed with exit status {code}"),
        None => format!("was ended by a {status}"),
    }
}

/// Writes its standard input and closes it. One that does not read it has no need of it.
async fn feed(stdin: Option<ChildStdin>, text: String) {
    if let Some(mut stdin) = stdin {
        let _ = stdin.write_all(text.as_bytes()).await;
    }
}

/// Reads output to its end, and keeps the last of it.
async fn collect(mut output: pipe::Receiver, tail: &mut Vec<u8>) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = output.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..len]);
        tail.drain(..tail.len().saturating_sub(KEPT));
    }
}

/// Kills a child that has not been waited for, so its number is still its own, and waits for it.
async fn kill(child: &mut Child) {
    let pid = child.id().and_then(|id| Pid::from_raw(id as i32));
    if let Some(pid) = pid {
        // It fails if the child has left its group; the next call finds it all the same.
        let _ = kill_process_group(pid, Signal::KILL);
    }
    if let Err(error) = child.kill().await {
        tracing::warn!("a command cannot be killed: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::events::{Event, EventKind};
    use std::path::Path;
    use std::sync::Arc;

    const LONG: Duration = Duration::from_secs(20);

    fn message(text: &str) -> Message {
        let event = Event::new(EventKind::Error, "vm", text).of("Disk");
        Message { event: Arc::new(event), suppressed: 3 }
    }

    /// Runs a script by a shell, with the folder as its argument.
    async fn script(folder: &Path, text: &str, message: &Message, deadline: Duration) -> Result<(), String> {
        let args = vec!["-c".to_owned(), text.to_owned(), "sh".to_owned(), folder.display().to_string()];
        Command { program: "/bin/sh".into(), args }.run(message, deadline).await
    }

    #[tokio::test]
    async fn it_is_told_by_standard_input_and_by_variables() {
        let folder = tempfile::tempdir().unwrap();
        let hostile = "one\ntwo $(touch \"$1/owned\"); `id` '\"\\ \0 end";
        let text = "cat >\"$1/in\"; printf %s \"$MASON_MESSAGE\" >\"$1/message\"; \
                    echo $MASON_GRAPH $MASON_KIND $MASON_ELEMENT $MASON_SUPPRESSED >\"$1/rest\"";
        script(folder.path(), text, &message(hostile), LONG).await.unwrap();
        let read = |name| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert_eq!(read("in").lines().count(), 1, "one line, whatever the message");
        let event: serde_json::Value = serde_json::from_str(&read("in")).unwrap();
        assert_eq!((&event["message"], &event["suppressed"]), (&hostile.into(), &3.into()));
        assert_eq!(read("message"), hostile.replace('\0', "\u{fffd}"));
        assert_eq!(read("rest"), "vm error Disk 3\n");
        assert!(!folder.path().join("owned").exists());
    }

    #[tokio::test]
    async fn what_fails_says_so_with_the_end_of_its_output() {
        let folder = tempfile::tempdir().unwrap();
        let text = "head -c 100000 /dev/zero | tr '\\0' x; echo no route >&2; exit 3";
        let error = script(folder.path(), text, &message("x"), LONG).await.unwrap_err();
        assert!(error.contains("exit status 3") && error.contains("xno route\""), "{error}");
        assert!(error.len() < KEPT + 200, "{}", error.len());
        let error = script(folder.path(), "kill -9 $$", &message("x"), LONG).await.unwrap_err();
        assert!(error.contains("signal: 9"), "{error}");
        let missing = Command { program: folder.path().join("missing"), args: Vec::new() };
        let error = missing.run(&message("x"), LONG).await.unwrap_err();
        assert!(error.contains("cannot run") && error.contains("missing"), "{error}");
    }

    #[tokio::test]
    async fn what_hangs_is_killed_with_its_children_and_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let text = "sleep 1000 & echo $$ $! >\"$1/pids\"; echo started; wait";
        let since = rt::now();
        let error = script(folder.path(), text, &message("x"), Duration::from_millis(500)).await.unwrap_err();
        assert!(error.contains("killed") && error.contains("started"), "{error}");
        assert!(rt::now() - since < LONG);
        let pids = std::fs::read_to_string(folder.path().join("pids")).unwrap();
        let pids: Vec<u32> = pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        assert!(!Path::new(&format!("/proc/{}", pids[0])).exists(), "no zombie is left");
        // Its child belongs to init now, which takes its time.
        let gone = async || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", pids[1]));
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        while !gone().await {
            assert!(rt::now() - since < LONG, "the command's child lives on");
            rt::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn who_leaves_a_process_behind_or_reads_nothing_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let since = rt::now();
        let text = "sleep 30 & echo $! >\"$1/pid\"";
        script(folder.path(), text, &message(&"x".repeat(1000)), LONG).await.unwrap();
        assert!(rt::now() - since < Duration::from_secs(10));
        let pid = std::fs::read_to_string(folder.path().join("pid")).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
        rustix::process::kill_process(pid, Signal::KILL).unwrap();
    }
}
