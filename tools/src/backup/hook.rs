//! Commands around the instant of a backup: they freeze what guests hold, and thaw it.

use crate::failure::{Failure, Outcome};
use crate::output::printable;
use blockmason::rt;
use rustix::process::{Pid, Signal, kill_process_group};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it is looked whether it has ended.
const EVERY: Duration = Duration::from_millis(10);

/// Runs a command of the shell to its end. It may write to standard error.
///
/// # Errors
/// It has failed, or has not ended in time: then it is killed.
pub(super) fn run(option: &str, command: &str) -> Outcome {
    let failed = |what: String| Failure::new(printable(&format!("{option} {command}: {what}")));
    let mut shell = Command::new("sh");
    shell.args(["-c", command]).stdin(Stdio::null()).stdout(std::io::stderr()).process_group(0);
    let mut child = shell.spawn().map_err(|error| failed(format!("it cannot be run: {error}")))?;
    match wait(&mut child) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(failed(format!("it has failed: {status}"))),
        Ok(None) => Err(failed(format!("it has not ended in {} s", PATIENCE.as_secs()))),
        Err(error) => Err(failed(format!("it cannot be waited for: {error}"))),
    }
}

/// None if it had to be killed.
#[expect(clippy::disallowed_methods, reason = "no shard is blocked: this process serves nothing")]
fn wait(child: &mut Child) -> std::io::Result<Option<ExitStatus>> {
    let since = rt::now();
    while rt::now() - since < PATIENCE {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        std::thread::sleep(EVERY);
    }
    // With all that it has started.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    child.wait().map(|_| None)
}

/// What an interrupt does to this process.
struct Interrupts {
    listening: bool,
    /// It is put off.
    held: bool,
    /// It has come.
    asked: bool,
    /// What is said then.
    sentence: String,
}

static INTERRUPTS: Mutex<Interrupts> =
    Mutex::new(Interrupts { listening: false, held: false, asked: false, sentence: String::new() });

fn interrupts() -> MutexGuard<'static, Interrupts> {
    INTERRUPTS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interrupts {
    fn end_if_asked(&self) {
        if self.asked && !self.held {
            if !self.sentence.is_empty() {
                eprintln!("mason: {}", self.sentence);
            }
            std::process::exit(130);
        }
    }
}

/// Until this is dropped, this process does not end by an interrupt: what was frozen would stay so.
pub(super) struct Outlive;

impl Outlive {
    /// Whether to begin what comes next.
    ///
    /// # Errors
    /// This process was to end meanwhile.
    pub(super) fn go_on(&self) -> Outcome {
        match interrupts().asked {
            true => Err(Failure::new("it was interrupted: nothing has begun")),
            false => Ok(()),
        }
    }
}

impl Drop for Outlive {
    fn drop(&mut self) {
        interrupts().held = false;
    }
}

/// Puts off the end by an interrupt.
pub(super) fn outlive_interrupts() -> Outlive {
    interrupts().held = true;
    listen();
    Outlive
}

/// An interrupt ends this process with that sentence, also one that was put off.
pub(super) fn say_when_interrupted(sentence: String) {
    interrupts().sentence = sentence;
    listen();
    interrupts().end_if_asked();
}

/// Listens from now on, once.
fn listen() {
    if std::mem::replace(&mut interrupts().listening, true) {
        return;
    }
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let (Ok(mut interrupt), Ok(mut end)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            let _ = tell.send(());
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = end.recv() => {}
                }
                let mut now = interrupts();
                now.asked = true;
                now.end_if_asked();
            }
        });
    });
    // An error says that it could not be arranged: then it is as without.
    let _ = told.recv();
}
