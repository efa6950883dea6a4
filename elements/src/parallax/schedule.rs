//! Snapshots that are taken from time to time, and deleted when there are enough newer ones.

use super::below::Below;
use super::format::{Entry, EntryKind};
use super::pool::Core;
use super::volume::Volume;
use crate::calendar::{clock, seconds};
use blockmason::{Cx, Error, Kind, Result};
use futures::future::{Either, select};
use std::pin::pin;
use std::time::Duration;

/// What their names begin with, and what nobody else may call a snapshot.
const PREFIX: &str = "auto-";

/// The time of day is looked at again after so long: it may jump.
const LOOK: Duration = Duration::from_secs(60);

/// When snapshots are taken, and how many are kept.
#[derive(Clone, Copy)]
pub(super) struct Schedule {
    /// Seconds between two of them, which are taken at multiples of that since 1970.
    every: u64,
    keep: usize,
}

impl Schedule {
    /// What the parameters `snapshot_every` and `keep` say, of a volume that can be written.
    pub(super) fn new(every: Option<Duration>, keep: usize, writable: bool) -> Result<Option<Schedule>> {
        let Some(every) = every else { return Ok(None) };
        let wrong = match (every.as_secs(), writable) {
            (_, false) => "of a snapshot no snapshots are taken",
            (0, _) => "snapshots are taken a second apart at least",
            _ if keep == 0 => "one snapshot is kept at least",
            (every, _) => return Ok(Some(Schedule { every, keep })),
        };
        Err(Error::invalid(wrong))
    }

    /// Takes them until the graph closes. `may` says whether there is anything to keep yet.
    pub(super) async fn run(self, volume: &Volume, may: impl Fn() -> bool, below: Below<'_>, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut told = false;
        // When it was last seen to; what there is in the pool counts at the start.
        let mut last = volume.pool.core().last_scheduled(volume.number());
        loop {
            let now = seconds();
            // After a clock has been set back it would be long until then.
            let due =
                last.filter(|last| *last <= now).map_or(now, |last| (last / self.every + 1) * self.every);
            if due <= now && may() {
                match self.take(volume, now, below, cx).await {
                    Ok(()) => told = false,
                    Err(error) if !told => {
                        cx.notice(format!("no snapshot is taken: {error}"));
                        told = true;
                    }
                    Err(_) => {}
                }
                last = Some(now);
                continue;
            }
            let wait = Duration::from_secs(due.saturating_sub(now)).clamp(Duration::from_secs(1), LOOK);
            if let Either::Left(_) = select(closing.as_mut(), pin!(cx.sleep(wait))).await {
                return;
            }
        }
    }

    async fn take(self, volume: &Volume, now: u64, below: Below<'_>, cx: Cx<'_>) -> Result<()> {
        let (pool, number, of) = (&volume.pool, volume.number(), volume.name());
        if pool.core().has_changed(number) {
            pool.snapshot(&[(number, name(now))], now, below).await?;
            cx.notice(format!("the snapshot {of}@{} has been taken", name(now)));
        }
        let scheduled: Vec<String> = {
            let core = pool.core();
            let all = core.scheduled(number).filter(|entry| !entry.held);
            all.map(|entry| entry.name.clone()).collect()
        };
        let spare = scheduled.len().saturating_sub(self.keep);
        for name in &scheduled[..spare] {
            match pool.delete_snapshot(&of, name, below).await {
                // It is served, or has a clone, or has just been held: later, then.
                Err(error) if error.kind() == Kind::Busy => {}
                done => {
                    done?;
                    cx.notice(format!("the snapshot {of}@{name} has been deleted: {} are kept", self.keep));
                }
            }
        }
        Ok(())
    }
}

/// `auto-2026-11-30T12-00-00Z`.
fn name(now: u64) -> String {
    let time = clock(now);
    let time = time.strip_suffix(" UTC").unwrap_or(&time);
    format!("{PREFIX}{}Z", time.replace(' ', "T").replace(':', "-"))
}

/// Whether it is exactly such a name.
fn is_name(name: &str) -> bool {
    let form = b"0000-00-00T00-00-00Z";
    let fits = |(is, should): (u8, &u8)| if *should == b'0' { is.is_ascii_digit() } else { is == *should };
    name.strip_prefix(PREFIX).is_some_and(|time| time.len() == form.len() && time.bytes().zip(form).all(fits))
}

/// Whether somebody may call a snapshot that.
///
/// # Errors
/// It is no name, or a schedule might take it for one of its own.
pub(super) fn check_taken_name(name: &str) -> Result<()> {
    super::admin::check_name(name)?;
    match name.starts_with(PREFIX) {
        true => Err(Error::invalid(format!(
            "`{name}`: what begins with {PREFIX} is taken and deleted by schedules; call it something else"
        ))),
        false => Ok(()),
    }
}

impl Core {
    /// A volume's snapshots that were taken by a schedule, wherever that was, the oldest first.
    fn scheduled(&self, volume: u32) -> impl DoubleEndedIterator<Item = &Entry> {
        let of =
            move |kind: &EntryKind| matches!(kind, EntryKind::Snapshot { volume: of, .. } if *of == volume);
        self.catalog.values().filter(move |entry| of(&entry.kind) && !entry.deleting && is_name(&entry.name))
    }

    /// When the newest of them was taken.
    fn last_scheduled(&self, volume: u32) -> Option<u64> {
        self.scheduled(volume).next_back().map(|entry| entry.made)
    }

    /// True if a volume may have changed since its newest snapshot.
    fn has_changed(&self, volume: u32) -> bool {
        let ((_, birth), _) = self.ancestors(volume);
        let in_tree = self.catalog.get(&volume).is_some_and(|entry| entry.root.birth > birth);
        let line = self.lines.get(&volume);
        in_tree || line.is_some_and(|line| line.has_runs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_when() {
        assert_eq!(name(1_795_996_799), "auto-2026-11-29T23-59-59Z");
        super::super::admin::check_name(&name(0)).unwrap();
        assert!(is_name(&name(0)) && is_name(&name(u64::MAX)));
        for other in
            ["auto-", "auto-before-upgrade", "auto-2026-11-29T23-59-59Z2", "auto-2026-11-29T23:59:59Z"]
        {
            assert!(!is_name(other) && check_taken_name(other).is_err(), "{other}");
        }
        assert!(check_taken_name("automatic").is_ok());
    }

    #[test]
    fn schedules_that_make_no_sense() {
        let new =
            |every: u64, keep, writable| Schedule::new(Some(Duration::from_millis(every)), keep, writable);
        assert!(new(1000, 1, true).is_ok_and(|schedule| schedule.is_some()));
        for (every, keep, writable) in [(999, 1, true), (1000, 0, true), (1000, 1, false)] {
            assert!(new(every, keep, writable).is_err());
        }
        assert!(Schedule::new(None, 0, false).is_ok_and(|schedule| schedule.is_none()));
    }
}
