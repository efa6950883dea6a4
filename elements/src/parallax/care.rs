//! What elements that serve a volume do for it and its pool beside requests: all of them have the parameters for that.

use super::below::Below;
use super::schedule::Schedule;
use super::scrub::Scrubbing;
use super::volume::Volume;
use blockmason::{Cx, Result};
use futures::future::{OptionFuture, join3};
use std::time::Duration;

/// Parameters of an element that serves a volume: its own, and behind them those that all have.
macro_rules! volume_params {
    ($(#[$meta:meta])* struct $name:ident { $($own:tt)* }) => {
        blockmason::params! {
            $(#[$meta])*
            struct $name {
                $($own)*
                /// What a write does for which there is no room: it fails (`error`), or waits (`queue`).
                on_full: $crate::parallax::volume::OnFull = "error",
                /// How long it waits, at most; then it fails.
                full_timeout: blockmason::lang::value::Time = "60s",
                /// Takes a snapshot of it whenever so much time of UTC is over, `1h` or `24h`, if it has changed since its newest one. Their names
                /// begin with `auto-`, which no others may. The first one is taken when the graph starts, if none was taken before.
                snapshot_every: Option<blockmason::lang::value::Time>,
                /// So many of those are kept; older ones are deleted, unless they are served or have a clone. What is held is not
                /// deleted, and does not count.
                keep: usize = "24",
                /// Reads all that the volume's pool has whenever so much time of UTC is over, `7d`, and mends what is damaged in one
                /// copy, as `mason pool scrub` does. One of several volumes of a pool does it for all.
                scrub_every: Option<blockmason::lang::value::Time>,
            }
        }

        impl $name {
            fn care(&self) -> blockmason::Result<$crate::parallax::care::Care> {
                let of = |time: &Option<blockmason::lang::value::Time>| time.as_ref().map(|time| time.0);
                let snapshots = (of(&self.snapshot_every), self.keep);
                $crate::parallax::care::Care::new(snapshots, of(&self.scrub_every), self.snapshot.is_none())
            }

            /// What is wrong with what is said, all of it.
            fn check_all(
                given: &blockmason::lang::Params,
            ) -> std::result::Result<(), Vec<blockmason::lang::ParamError>> {
                let params = $name::from(given)?;
                params.care().map(drop).map_err(|error| {
                    let scrubs = $crate::parallax::scrub::Scrubbing::new(params.scrub_every.as_ref().map(|time| time.0));
                    let key = match (params.keep, scrubs) {
                        (0, _) => "keep",
                        (_, Err(_)) => "scrub_every",
                        (_, Ok(_)) => "snapshot_every",
                    };
                    vec![given.error(key, error.message().to_string())]
                })
            }

            fn full(&self) -> $crate::parallax::volume::Full {
                $crate::parallax::volume::Full { on_full: self.on_full, timeout: self.full_timeout.0 }
            }
        }
    };
}
pub(super) use volume_params;

/// What is done from time to time.
#[derive(Clone, Copy)]
pub(super) struct Care {
    snapshots: Option<Schedule>,
    scrubs: Option<Scrubbing>,
}

impl Care {
    /// What the parameters say of a volume, or of a snapshot, which is not written.
    pub(super) fn new(
        (snapshot_every, keep): (Option<Duration>, usize),
        scrub_every: Option<Duration>,
        writable: bool,
    ) -> Result<Care> {
        Ok(Care {
            snapshots: Schedule::new(snapshot_every, keep, writable)?,
            scrubs: Scrubbing::new(scrub_every)?,
        })
    }

    /// Tends the volume's pool until the graph closes. `may` says whether there is anything to keep yet.
    pub(super) async fn run(self, volume: &Volume, may: impl Fn() -> bool, below: Below<'_>, cx: Cx<'_>) {
        let taking = self.snapshots.map(|schedule| schedule.run(volume, may, below, cx));
        let scrubbing = self.scrubs.map(|scrubs| scrubs.run(&volume.pool, below, cx));
        let (taking, scrubbing) = (OptionFuture::from(taking), OptionFuture::from(scrubbing));
        join3(volume.pool.tend(below, cx), taking, scrubbing).await;
    }
}
