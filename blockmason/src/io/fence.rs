//! Waiting for what a dead process has left in the kernel: its requests go on for a while after it, and pin the open
//! file, with its locks. Whoever executes them again must come after them.

use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// How long what is left of a dead process may take. An O_DIRECT file was seen locked for 85 ms.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(2);

/// Record locks for whole files end here. Beyond it each graph that only reads has a byte of its own, by which its
/// successor knows that it is gone: many may read at once, so the lock of the whole file does not tell.
pub(super) const END: i64 = 1 << 62;

/// Takes a lock; waits for it while nobody alive is known to hold it.
///
/// # Errors
/// [`Errno::AGAIN`] if a living process holds it, or something of a dead one does for too long.
pub(super) fn lock_after_the_dead<T>(
    inode: (u64, u64),
    mut lock: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    let deadline = now() + PATIENCE;
    loop {
        match lock() {
            Err(Errno::AGAIN | Errno::ACCESS) if !is_held_by_the_living(inode) && now() < deadline => pause(),
            outcome => return outcome,
        }
    }
}

/// Whether a process that is alive holds a lock of the file. Unknown counts as no.
fn is_held_by_the_living((device, inode): (u64, u64)) -> bool {
    let Ok(locks) = std::fs::read_to_string("/proc/locks") else { return false };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    locks.lines().filter(|line| line.split_whitespace().any(|word| word == file)).any(|line| {
        // `1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE 0 EOF`; locks of descriptions have -1 for the process.
        line.split_whitespace().nth(4).and_then(|pid| pid.parse().ok()).is_some_and(is_alive)
    })
}

fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state stands behind the name, which may hold anything.
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    !matches!(state, None | Some('Z' | 'X'))
}

/// Takes the byte of a graph that only reads, once its predecessor has let go of it.
pub(super) fn come_after_reads(file: &OwnedFd, holder: &str) {
    let start = END + (fnv(holder) >> 3) as i64;
    let deadline = now() + PATIENCE;
    while is_read(file, start) {
        if now() > deadline {
            tracing::warn!(
                "another graph {holder} reads the same image, or a dead one's requests do not end"
            );
            break;
        }
        pause();
    }
    let lock = record(libc::F_RDLCK, start, 1);
    // SAFETY: the descriptor is open, and the kernel only reads the structure. Where there are no such locks
    // nothing can be known, and nothing is lost.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) };
}

fn is_read(file: &OwnedFd, start: i64) -> bool {
    let mut lock = record(libc::F_WRLCK, start, 1);
    // SAFETY: the descriptor is open, and the structure ours.
    let known = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    known == 0 && i32::from(lock.l_type) != libc::F_UNLCK
}

/// A record lock.
pub(super) fn record(kind: libc::c_int, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}

/// A number below 2^64 for a name, the same in every program.
fn fnv(name: &str) -> u64 {
    name.bytes()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[allow(clippy::disallowed_methods, reason = "waits for the kernel, which no test clock stops")]
fn now() -> Instant {
    Instant::now()
}

#[allow(clippy::disallowed_methods, reason = "graphs are built on a thread of their own, which may wait")]
fn pause() {
    std::thread::sleep(PAUSE);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FlockOperation, flock};
    use std::os::unix::fs::MetadataExt;

    fn lock(file: &OwnedFd) -> Result<(), Errno> {
        flock(file, FlockOperation::NonBlockingLockExclusive)
    }

    #[test]
    fn the_living_are_not_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first: OwnedFd = file.reopen().unwrap().into();
        let second: OwnedFd = file.reopen().unwrap().into();
        lock(&first).unwrap();
        let meta = file.as_file().metadata().unwrap();
        let since = now();
        assert_eq!(lock_after_the_dead((meta.dev(), meta.ino()), || lock(&second)), Err(Errno::AGAIN));
        assert!(now() - since < PATIENCE / 2);
    }

    /// A child locks a description that it shares with us, and dies: nobody alive has locked it, as with requests
    /// that a dead process has left in the kernel.
    #[test]
    fn what_the_dead_have_left_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let left: OwnedFd = file.reopen().unwrap().into();
        let ours: OwnedFd = file.reopen().unwrap().into();
        let shared = left.try_clone().unwrap();
        let locked = std::process::Command::new("flock").args(["-n", "0"]).stdin(shared).status().unwrap();
        assert!(locked.success());
        assert_eq!(lock(&ours), Err(Errno::AGAIN));
        let meta = file.as_file().metadata().unwrap();
        let (mut left, mut tries) = (Some(left), 0);
        let locked = lock_after_the_dead((meta.dev(), meta.ino()), || {
            tries += 1;
            // The last request of the dead ends.
            left = left.take().filter(|_| tries < 5);
            lock(&ours)
        });
        assert_eq!((locked, tries), (Ok(()), 5));
    }

    #[test]
    fn readers_of_one_name_come_after_each_other_and_others_beside() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(file.reopen().unwrap());
        let (first, second) = (open(), open());
        come_after_reads(&first, "vm1");
        come_after_reads(&second, "vm2");
        let third = open();
        assert!(is_read(&third, END + (fnv("vm1") >> 3) as i64));
        drop(first);
        assert!(!is_read(&third, END + (fnv("vm1") >> 3) as i64));
    }
}
