//! All of a disk compared with its checksums, while guests go on.

use super::sum::Volume;
use crate::transform::own::Io;
use blockmason::sched::Mode;
use blockmason::{Cx, Error, Kind, Result, rt};
use futures::future::{Either, select};
use std::ops::Range;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Bytes that are held at a time.
const STEP: u64 = 1 << 20;
/// The longest that it steps back for guests between two steps.
const STEP_BACK: Duration = Duration::from_millis(100);
/// How long what has failed waits before it is tried again.
const RETRY: Duration = Duration::from_secs(5);
/// So many damaged blocks are named at the end; more are only counted.
const NAMED: usize = 16;

#[derive(Default)]
pub(super) struct Verify {
    run: Mutex<Run>,
    wake: Notify,
}

#[derive(Clone, Default)]
struct Run {
    /// Where it is, and how large the disk is; None if none is under way.
    at: Option<(u64, u64)>,
    found: u64,
    /// The first of those.
    named: Vec<u64>,
    /// Its error was told.
    waits: bool,
}

impl Verify {
    fn run(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) -> Result<String> {
        let mut run = self.run();
        if run.at.is_some() {
            return Err(Error::new(
                Kind::Busy,
                "the disk is being compared already; `verified` says how far",
            ));
        }
        *run = Run { at: Some((0, 0)), ..Run::default() };
        self.wake.notify_one();
        Ok("the disk is being compared; `verified` says how far, `found` what".to_owned())
    }

    pub(super) fn stop(&self) -> Result<String> {
        self.run().at = None;
        Ok("nothing is being compared any more".to_owned())
    }

    pub(super) fn get(&self, handler: &str) -> Result<String> {
        let run = self.run().clone();
        match (handler, run.at) {
            ("verified", None) => Ok("none".to_owned()),
            ("verified", Some((at, size))) => Ok(format!("{}%", at.saturating_mul(100) / size.max(1))),
            ("found", _) => Ok(run.found.to_string()),
            _ => Err(Error::no_handler(handler)),
        }
    }

    /// Does what is asked for until the graph closes; what is not done by then goes on in the next one.
    pub(super) async fn work<'a>(&self, open: impl AsyncFn() -> Result<&'a Volume>, cx: Cx<'a>) {
        let mut closing = pin!(cx.closing());
        loop {
            let asked = self.run().at;
            let wait = match asked {
                None => None,
                Some((at, _)) => Some(self.go_on(&open, at, cx).await),
            };
            let pause = async {
                match wait {
                    None => self.wake.notified().await,
                    Some(Duration::ZERO) => rt::pass().await,
                    Some(time) => cx.sleep(time).await,
                }
            };
            if let Either::Left(_) = select(closing.as_mut(), pin!(pause)).await {
                return;
            }
        }
    }

    /// Compares the next part. How long to wait then.
    async fn go_on<'a>(&self, open: &impl AsyncFn() -> Result<&'a Volume>, at: u64, cx: Cx<'a>) -> Duration {
        let (begun, guests) = (cx.now(), cx.guest_requests());
        match self.step(open, at, cx).await {
            Ok(()) => {
                let active = cx.guest_requests() != guests;
                if active { (cx.now() - begun).min(STEP_BACK) } else { Duration::ZERO }
            }
            Err(error) => {
                let told = std::mem::replace(&mut self.run().waits, true);
                if !told {
                    cx.notice(format!("the disk cannot be compared, and will be later: {}", error.message()));
                }
                RETRY
            }
        }
    }

    async fn step<'a>(&self, open: &impl AsyncFn() -> Result<&'a Volume>, at: u64, cx: Cx<'a>) -> Result<()> {
        let volume = open().await?;
        let layout = volume.layout;
        let most = STEP.min(u64::from(cx.geometry().max_len)).max(layout.block);
        let range = at..layout.size.min(at + most);
        let bad = compare(volume, &range, cx).await?;
        let mut run = self.run();
        // It may have been stopped, or begun again, meanwhile.
        if run.at.is_none_or(|(now, _)| now != at) {
            return Ok(());
        }
        let first = bad.first().copied().filter(|_| run.found == 0);
        run.found += bad.len() as u64;
        let room = NAMED.saturating_sub(run.named.len());
        run.named.extend(bad.into_iter().take(room));
        run.waits = false;
        run.at = (range.end < layout.size).then_some((range.end, layout.size));
        let done = run.at.is_none().then(|| run.clone());
        drop(run);
        if let Some(block) = first {
            cx.notice(format!("block {block}, at {}, does not match its checksum", block * layout.block));
        }
        if let Some(run) = done {
            cx.notice(summary(&run, layout.size / layout.block));
        }
        Ok(())
    }
}

fn summary(run: &Run, blocks: u64) -> String {
    let compared = format!("{blocks} blocks were compared with their checksums");
    let named: Vec<_> = run.named.iter().map(ToString::to_string).collect();
    match run.found {
        0 => format!("{compared}, all match"),
        found if found > named.len() as u64 => {
            format!("{compared}, {found} differ, the first are {}", named.join(", "))
        }
        found => format!("{compared}, {found} differ: {}", named.join(", ")),
    }
}

/// The damaged blocks of a range.
async fn compare(volume: &Volume, range: &Range<u64>, cx: Cx<'_>) -> Result<Vec<u64>> {
    let io = Io::background(cx);
    let _held = volume.ranges.claim(io.holder("verify"), Mode::Shared, std::slice::from_ref(range)).await;
    let places = volume.layout.places(range);
    let slots = io.read(places.start, places.end - places.start).await?;
    volume.mismatches(range.start / volume.layout.block, &slots).await
}
