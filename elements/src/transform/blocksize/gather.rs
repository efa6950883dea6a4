//! Small writes that wait for others beside them.
//!
//! The disk is cut into pieces. The first small write to a piece opens a group, and leads it: it waits, takes what has
//! come until then, writes that, and tells the others what became of it.

use super::OUT;
use blockmason::lang::value::Time;
use blockmason::{Answer, Cx, Error, Flags, Kind, PoolBuf, Reply, Request, Result, rt};
use futures::future::join_all;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};

pub(super) struct Gathering {
    /// How long a group stays open, in nanoseconds.
    time: AtomicU64,
    /// Those that are open, by the number of their piece.
    groups: Mutex<HashMap<u64, Group>>,
    gathered: AtomicU64,
    joined: AtomicU64,
}

#[derive(Default)]
struct Group {
    /// In the order in which they came.
    writes: Vec<Waiting>,
    bytes: u64,
    /// Tells its leader not to wait any longer.
    go: Arc<Notify>,
}

struct Waiting {
    req: Request,
    tell: oneshot::Sender<Result<()>>,
}

/// Whoever leads a group. If it is dropped, because its graph has failed, those who wait are told so.
struct Lead<'a> {
    gathering: &'a Gathering,
    /// Its group, until it has taken that.
    number: Option<u64>,
}

impl Lead<'_> {
    fn take(&mut self) -> Vec<Waiting> {
        let group = self.number.take().and_then(|number| self.gathering.groups().remove(&number));
        group.map(|group| group.writes).unwrap_or_default()
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

impl Gathering {
    pub(super) fn new(time: Duration) -> Gathering {
        let gathering = Gathering {
            time: AtomicU64::new(0),
            groups: Mutex::default(),
            gathered: AtomicU64::new(0),
            joined: AtomicU64::new(0),
        };
        gathering.set(time);
        gathering
    }

    /// Of groups that open from now on.
    pub(super) fn set(&self, time: Duration) {
        self.time.store(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn time(&self) -> Duration {
        Duration::from_nanos(self.time.load(Ordering::Relaxed))
    }

    pub(super) fn is_on(&self) -> bool {
        !self.time().is_zero()
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<u64, Group>> {
        // Every change of them is complete before anything can panic.
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if a write meets others that wait.
    pub(super) fn has(&self, req: &Request, piece: u64) -> bool {
        let groups = self.groups();
        !groups.is_empty()
            && (req.offset / piece..=(req.end() - 1) / piece).any(|number| groups.contains_key(&number))
    }

    /// What is held goes at once.
    pub(super) fn let_go(&self) {
        self.groups().values().for_each(|group| group.go.notify_one());
    }

    /// Holds a write, which is shorter than a piece; in two parts if it reaches into the next piece.
    pub(super) async fn write(&self, req: Request, piece: u64, cx: Cx<'_>) -> Reply {
        self.gathered.fetch_add(1, Ordering::Relaxed);
        let middle = (req.offset / piece + 1) * piece;
        let parts = [req.offset..req.end().min(middle), middle..req.end()];
        let parts = parts.into_iter().filter(|part| !part.is_empty());
        let held = parts.map(|part| {
            let part = req.part(part.start - req.offset, part.end - part.start, part.start);
            self.hold(part, piece, cx)
        });
        // Both have ended, whatever became of the other.
        join_all(held).await.into_iter().collect::<Result<()>>()?;
        Ok(Answer::Done)
    }

    async fn hold(&self, req: Request, piece: u64, cx: Cx<'_>) -> Result<()> {
        let number = req.offset / piece;
        let (tell, told) = oneshot::channel();
        let lead = {
            let mut groups = self.groups();
            let group = groups.entry(number).or_default();
            group.bytes += req.len;
            if req.is_fua() || group.bytes >= piece {
                group.go.notify_one();
            }
            group.writes.push(Waiting { req, tell });
            let first = group.writes.len() == 1;
            first.then(|| (Lead { gathering: self, number: Some(number) }, group.go.clone()))
        };
        if let Some((mut lead, go)) = lead {
            let _ = rt::timeout(self.time(), go.notified()).await;
            self.send(lead.take(), cx).await;
        }
        let gone = || Error::new(Kind::Unavailable, "who was to write it has failed");
        told.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Writes what was held, and tells those who wait.
    async fn send(&self, mut writes: Vec<Waiting>, cx: Cx<'_>) {
        let runs = runs(writes.iter().map(|write| write.req.offset..write.req.end()).collect());
        self.joined.fetch_add(runs.len() as u64, Ordering::Relaxed);
        let sent = runs.into_iter().map(|run| {
            let (mine, others) = writes.drain(..).partition(|write| run.contains(&write.req.offset));
            writes = others;
            send_run(run, mine, cx)
        });
        let sent: Vec<_> = sent.collect();
        join_all(sent).await;
    }

    pub(super) fn get(&self, handler: &str) -> Result<String> {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed).to_string();
        match handler {
            "gather" => Ok(Time(self.time()).to_string()),
            "waiting" => {
                Ok(self.groups().values().map(|group| group.writes.len()).sum::<usize>().to_string())
            }
            "gathered" => Ok(count(&self.gathered)),
            "joined" => Ok(count(&self.joined)),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

/// What lies side by side, or overlaps, in one.
fn runs(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match runs.last_mut() {
            Some(run) if run.end >= range.start => run.end = run.end.max(range.end),
            _ => runs.push(range),
        }
    }
    runs
}

/// Writes a run, of which the writes cover every byte: later ones over earlier ones.
async fn send_run(run: Range<u64>, writes: Vec<Waiting>, cx: Cx<'_>) {
    let Some(first) = writes.first() else { return };
    let mut whole = cx.child(&first.req);
    if writes.len() > 1 {
        let mut bytes = PoolBuf::new((run.end - run.start) as usize);
        for Waiting { req, .. } in &writes {
            req.data.copy_to(&mut bytes[(req.offset - run.start) as usize..(req.end() - run.start) as usize]);
            whole.flags = whole.flags.with(if req.is_fua() { Flags::FUA } else { Flags::NONE });
        }
        (whole.offset, whole.len, whole.data) = (run.start, run.end - run.start, bytes.freeze());
    }
    let reply = cx.forward(OUT, whole).await.map(drop);
    for Waiting { tell, .. } in writes {
        // Who does not wait any more needs no answer.
        let _ = tell.send(reply.clone());
    }
}
