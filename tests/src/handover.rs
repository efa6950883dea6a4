//! A daemon that is replaced by another process, again and again.

use crate::control::mason;
use crate::mason::until;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

/// The process that serves now. It is no child of the test; it is killed when this is dropped.
pub struct Heir {
    pid: u32,
    process: OwnedFd,
}

/// What a handover took.
pub struct Handed {
    /// From process to process.
    pub from: u32,
    /// The gate was closed for so long.
    pub pause: Duration,
}

impl Heir {
    /// Hands the daemon over whose control socket is `c.sock` in `folder`.
    #[track_caller]
    pub fn take_over(folder: &Path, more: &[&str]) -> (Heir, Handed) {
        Heir::of(&mason(folder, &[&["handover", "--control", "c.sock", "--json"], more].concat()).done())
    }

    /// The same; None where a graph is just being changed.
    #[track_caller]
    pub fn try_take_over(folder: &Path) -> Option<(Heir, Handed)> {
        let ended = mason(folder, &["handover", "--control", "c.sock", "--json"]);
        match ended.err.contains("try again when that is done") {
            true => None,
            false => Some(Heir::of(&ended.done())),
        }
    }

    /// By what the command has said.
    fn of(said: &str) -> (Heir, Handed) {
        let said: Value = serde_json::from_str(said).unwrap();
        let number = |key: &str| u32::try_from(said[key].as_u64().unwrap()).unwrap();
        let pid = number("to");
        let raw = Pid::from_raw(pid.cast_signed()).unwrap();
        let heir = Heir { pid, process: pidfd_open(raw, PidfdFlags::empty()).unwrap() };
        let pause = Duration::from_secs_f64(said["pause_seconds"].as_f64().unwrap());
        (heir, Handed { from: number("from"), pause })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.process, signal);
    }

    /// Asks it to end; waits until it has taken its socket away, which comes first, and is gone.
    pub fn stop(self, socket: &Path) {
        self.signal(Signal::TERM);
        until("the socket goes", || !socket.exists());
        until("the process ends", || !is_running(self.pid));
    }
}

impl Drop for Heir {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// False too of one that has ended and that nobody has waited for.
pub fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}
