//! Limits how much goes by: bytes and requests in a second.

use super::gauge::Gauge;
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::{Rate, Time};
use blockmason::{Class, Cx, Element, Error, Flow, LocalBoxFuture, Op, Reply, Request, Result, rt};
use futures::future::select;
use std::fmt;
use std::pin::pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

/// Bytes in a second, or no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bandwidth(pub(crate) Option<u64>);

/// Requests in a second, or no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frequency(pub(crate) Option<u64>);

impl FromStr for Bandwidth {
    type Err = String;

    fn from_str(text: &str) -> Result<Bandwidth, String> {
        match text.parse() {
            _ if text == "unlimited" => Ok(Bandwidth(None)),
            Ok(Rate(0)) => Err("nothing would ever pass at 0/s".to_owned()),
            Ok(Rate(rate)) => Ok(Bandwidth(Some(rate))),
            Err(error) => {
                Err(error.replace("a rate such as `50M/s`", "a rate such as `50M/s`, or `unlimited`"))
            }
        }
    }
}

impl fmt::Display for Bandwidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(rate) => Rate(rate).fmt(f),
            None => f.write_str("unlimited"),
        }
    }
}

impl FromStr for Frequency {
    type Err = String;

    fn from_str(text: &str) -> Result<Frequency, String> {
        match text.parse() {
            _ if text == "unlimited" => Ok(Frequency(None)),
            Ok(0u64) => Err("nothing would ever pass at 0 requests a second".to_owned()),
            Ok(number) => Ok(Frequency(Some(number))),
            Err(_) => Err(format!("expected requests in a second, or `unlimited`, found `{text:.40}`")),
        }
    }
}

impl fmt::Display for Frequency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(number) => number.fmt(f),
            None => f.write_str("unlimited"),
        }
    }
}

blockmason::text_value!(Bandwidth, "rate or `unlimited`");
blockmason::text_value!(Frequency, "number or `unlimited`");

blockmason::params! {
    /// Limits how much goes by.
    struct Params {
        /// Bytes that may be read and written in a second.
        rate: Bandwidth = "unlimited",
        /// Requests in a second.
        iops: Frequency = "unlimited",
        /// Bytes that may be read in a second.
        read_rate: Bandwidth = "unlimited",
        /// Reads in a second; hints and questions about extents count as reads.
        read_iops: Frequency = "unlimited",
        /// Bytes that may be written in a second.
        write_rate: Bandwidth = "unlimited",
        /// Changes in a second: writes, writes of zeros, discards.
        write_iops: Frequency = "unlimited",
        /// How much may pass at once after a rest: what is allowed in this time. Waits are kept to the
        /// millisecond, rounded up: with less than a few of them here, less than the limits passes.
        burst: Time = "100ms",
        /// Only requests of these classes count and wait, `interactive` or `background`; all of them if none is
        /// named.
        class: Vec<Class>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "throttle",
    summary: "limits bytes and requests in a second",
    doc: "Keeps one guest from taking everything, or a slow link from being flooded. Each limit is a bucket that \
          fills at its rate up to what `burst` allows; a request passes once the buckets that it counts in are \
          not in debt, and takes what it costs. So a request larger than the burst passes, and the next ones \
          wait for it. On average over any time the limits are kept, `burst` and one request aside.\n\n\
          Requests pass in the order in which they came; reads wait for no limit of writes, nor writes for one \
          of reads. Writes of zeros and discards count as requests that write no bytes. A flush keeps its place \
          behind the changes that came before it and costs nothing, as does a control request.\n\n\
          Every request that passes here counts, whoever made it: those of a copier or a cache above, too. What \
          elements below make of a request does not. With `(class background)` only the work counts for which \
          nobody waits, and guests pass as if nothing stood here. Errors from below pass.\n\n\
          Limits that are set while the graph runs count at once, for those that wait as well. A reload starts \
          with full buckets.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "rate", access: Access::ReadWrite, doc: "bytes in a second, or `unlimited`" },
        Handler { name: "iops", access: Access::ReadWrite, doc: "requests in a second, or `unlimited`" },
        Handler { name: "read_rate", access: Access::ReadWrite, doc: "bytes read in a second" },
        Handler { name: "read_iops", access: Access::ReadWrite, doc: "reads in a second" },
        Handler { name: "write_rate", access: Access::ReadWrite, doc: "bytes written in a second" },
        Handler { name: "write_iops", access: Access::ReadWrite, doc: "changes in a second" },
        Handler { name: "burst", access: Access::ReadWrite, doc: "how much may pass at once, as time" },
        Handler { name: "waiting", access: Access::Read, doc: "requests that wait now" },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:throttle.sock)\n\
              element Limit (type throttle) (rate 20M/s) (iops 500)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Limit -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| Ok(Arc::new(Throttle::new(&build.read(Params::from)?))),
    ..ElementType::BASE
};

/// Fills by `rate` tokens a second. Counted in billionths of a token, so that a nanosecond's worth is whole.
#[derive(Default)]
pub(crate) struct Bucket {
    pub(crate) rate: Option<u64>,
    /// In debt below zero.
    level: i128,
}

const BILLION: i128 = 1_000_000_000;

impl Bucket {
    /// Fills it with what `time` is worth, to what `burst` is worth at the most.
    pub(crate) fn fill(&mut self, time: Duration, burst: Duration) {
        let rate = i128::from(self.rate.unwrap_or(0));
        let worth = |time: Duration| rate.saturating_mul(time.as_nanos() as i128);
        self.level = self.level.saturating_add(worth(time)).min(worth(burst));
    }

    /// How long it will be in debt.
    pub(crate) fn debt(&self) -> Duration {
        let (Some(rate), true) = (self.rate.map(i128::from), self.level < 0) else { return Duration::ZERO };
        Duration::from_nanos(u64::try_from((-self.level + rate - 1) / rate).unwrap_or(u64::MAX))
    }

    pub(crate) fn take(&mut self, tokens: u64) {
        if self.rate.is_some() {
            self.level -= i128::from(tokens) * BILLION;
        }
    }

    /// Gives back what was taken and not needed.
    pub(crate) fn give(&mut self, tokens: u64) {
        if self.rate.is_some() {
            self.level += i128::from(tokens) * BILLION;
        }
    }

    /// A limit where there was none starts without a debt; one that changes keeps what is owed.
    pub(crate) fn limit(&mut self, rate: Option<u64>) {
        if self.rate.is_none() || rate.is_none() {
            self.level = 0;
        }
        self.rate = rate;
    }
}

/// What requests of one kind pass, one after the other.
pub(crate) struct Gate {
    /// Whoever is first in the queue has it. Tokio's semaphore hands it on in the order of asking.
    turn: Semaphore,
    buckets: Mutex<Buckets>,
    /// Told when a limit has changed.
    changed: Notify,
}

pub(crate) struct Buckets {
    pub(crate) bytes: Bucket,
    pub(crate) requests: Bucket,
    burst: Duration,
    /// When they were filled last.
    filled: Option<Instant>,
}

/// What a request takes out of the buckets; nothing for a flush.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) bytes: u64,
    pub(crate) requests: u64,
}

impl Buckets {
    fn fill(&mut self, now: Instant) {
        // The first time they become full.
        let time = self.filled.map_or(Duration::MAX, |filled| now.saturating_duration_since(filled));
        self.filled = Some(now);
        self.bytes.fill(time, self.burst);
        self.requests.fill(time, self.burst);
    }

    /// Takes it out, or says how long it will take before that can be tried again.
    fn take(&mut self, cost: Cost, now: Instant) -> Duration {
        self.fill(now);
        let mut wait = Duration::ZERO;
        if cost.bytes > 0 {
            wait = wait.max(self.bytes.debt());
        }
        if cost.requests > 0 {
            wait = wait.max(self.requests.debt());
        }
        if wait.is_zero() {
            self.bytes.take(cost.bytes);
            self.requests.take(cost.requests);
        }
        wait
    }
}

impl Gate {
    pub(crate) fn new(rate: Bandwidth, iops: Frequency, burst: Time) -> Gate {
        let bucket = |rate| Bucket { rate, level: 0 };
        let (bytes, requests) = (bucket(rate.0), bucket(iops.0));
        let buckets = Buckets { bytes, requests, burst: burst.0, filled: None };
        Gate { turn: Semaphore::new(1), buckets: Mutex::new(buckets), changed: Notify::new() }
    }

    pub(crate) fn buckets(&self) -> MutexGuard<'_, Buckets> {
        // Every change of them is complete before anything can panic.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes if nobody waits and nothing has to be waited for.
    fn try_pass(&self, cost: Cost, cx: Cx<'_>) -> bool {
        let Ok(_turn) = self.turn.try_acquire() else { return false };
        self.buckets().take(cost, cx.now()).is_zero()
    }

    pub(crate) async fn pass(&self, cost: Cost, cx: Cx<'_>) {
        // It is never closed; an error would let the request pass.
        let _turn = self.turn.acquire().await;
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let wait = self.buckets().take(cost, cx.now());
            if wait.is_zero() {
                return;
            }
            select(pin!(cx.sleep(wait)), changed).await;
        }
    }

    /// Changes limits as of now.
    pub(crate) fn set(&self, change: impl FnOnce(&mut Buckets)) {
        let mut buckets = self.buckets();
        if buckets.filled.is_some() {
            buckets.fill(rt::now());
        }
        change(&mut buckets);
        drop(buckets);
        self.changed.notify_waiters();
    }
}

struct Throttle {
    reads: Gate,
    changes: Gate,
    all: Gate,
    /// What counts; all if it is empty.
    classes: Vec<Class>,
    waiting: Gauge,
}

impl Throttle {
    fn new(params: &Params) -> Throttle {
        Throttle {
            reads: Gate::new(params.read_rate, params.read_iops, params.burst),
            changes: Gate::new(params.write_rate, params.write_iops, params.burst),
            all: Gate::new(params.rate, params.iops, params.burst),
            classes: params.class.clone(),
            waiting: Gauge::default(),
        }
    }

    /// The gate of its kind, and what it costs.
    fn cost(&self, req: &Request) -> (&Gate, Cost) {
        let (gate, bytes, requests) = match req.op {
            Op::Read => (&self.reads, req.len, 1),
            Op::Cache | Op::Extents => (&self.reads, 0, 1),
            Op::Write => (&self.changes, req.len, 1),
            Op::Discard | Op::WriteZeroes => (&self.changes, 0, 1),
            Op::Flush | Op::Control => (&self.changes, 0, 0),
        };
        (gate, Cost { bytes, requests })
    }
}

impl Element for Throttle {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !self.classes.is_empty() && !self.classes.contains(&req.class) {
            return cx.forward(0, req);
        }
        let (gate, cost) = self.cost(&req);
        let passed = gate.try_pass(cost, cx);
        if passed && self.all.try_pass(cost, cx) {
            return cx.forward(0, req);
        }
        let waiting = self.waiting.enter();
        let mut flow: LocalBoxFuture<'a, Reply> = Box::pin(async move {
            if !passed {
                gate.pass(cost, cx).await;
            }
            self.all.pass(cost, cx).await;
            drop(waiting);
            cx.forward(0, req).await
        });
        // Takes its place in the queue now: parked flows are first polled in no order. They are polled once more
        // by whoever parks them, so nothing is lost by a waker that wakes nobody.
        match flow.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(reply) => Flow::Now(reply),
            Poll::Pending => Flow::Later(flow),
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        let rate = |gate: &Gate| Bandwidth(gate.buckets().bytes.rate).to_string();
        let iops = |gate: &Gate| Frequency(gate.buckets().requests.rate).to_string();
        Ok(match handler {
            "rate" => rate(&self.all),
            "iops" => iops(&self.all),
            "read_rate" => rate(&self.reads),
            "read_iops" => iops(&self.reads),
            "write_rate" => rate(&self.changes),
            "write_iops" => iops(&self.changes),
            "burst" => Time(self.all.buckets().burst).to_string(),
            "waiting" => self.waiting.now().to_string(),
            _ => return Err(Error::no_handler(handler)),
        })
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        let gate = match handler {
            "rate" | "iops" => &self.all,
            "read_rate" | "read_iops" => &self.reads,
            "write_rate" | "write_iops" => &self.changes,
            "burst" => {
                let Time(burst) = value.parse().map_err(Error::invalid)?;
                for gate in [&self.all, &self.reads, &self.changes] {
                    gate.set(|buckets| buckets.burst = burst);
                }
                return Ok(());
            }
            _ => return Err(Error::no_handler(handler)),
        };
        if handler.ends_with("rate") {
            let Bandwidth(rate) = value.parse().map_err(Error::invalid)?;
            gate.set(|buckets| buckets.bytes.limit(rate));
        } else {
            let Frequency(iops) = value.parse().map_err(Error::invalid)?;
            gate.set(|buckets| buckets.requests.limit(iops));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::Data;
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use futures::StreamExt;
    use futures::stream::FuturesUnordered;

    async fn serve(host: &Arc<blockmason::Host>, limits: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!("element T (type throttle) {limits} element M (type mem) (size 8M) T -> M");
        let graph = graph(host, crate::ALL, &text, "T").unwrap();
        let throttle = graph.instances().find(|instance| instance.name == "T").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, throttle)
    }

    fn write(len: usize) -> Request {
        Request::write(0, Data::zeros(len))
    }

    /// Sends all at once. Returns which was answered when, in the order of the answers.
    async fn answers(disk: &TestDisk, requests: Vec<Request>) -> Vec<(usize, u64)> {
        let since = rt::now();
        let sent: FuturesUnordered<_> = requests
            .into_iter()
            .enumerate()
            .map(|(ix, req)| {
                let reply = disk.send(req);
                async move {
                    reply.await.unwrap().unwrap();
                    (ix, (rt::now() - since).as_millis() as u64)
                }
            })
            .collect();
        sent.collect().await
    }

    #[test]
    fn bytes_and_requests_pass_at_their_rate_and_in_their_order() {
        for limits in ["(rate 1M/s)", "(iops 16)", "(read_rate 1M/s)", "(read_iops 16)"] {
            run(1, async |host| {
                let (disk, _) = serve(&host, limits).await;
                // 64 requests of 64k: four seconds of either.
                let answers = answers(&disk, vec![Request::read(0, 64 << 10); 64]).await;
                assert!(answers.iter().map(|(ix, _)| *ix).eq(0..64), "{limits}: {answers:?}");
                for (ix, ms) in answers {
                    // In `burst`, 1.6 of them pass at once, and another one into debt.
                    let least = (ix as u64 * 1000 / 16).saturating_sub(163);
                    assert!((least..least + 165).contains(&ms), "{limits}: {ix} after {ms} ms");
                }
            });
        }
    }

    #[test]
    fn what_was_not_used_is_saved_up_to_the_burst() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(iops 10) (burst 1s)").await;
            for _ in 0..2 {
                let answers = answers(&disk, vec![Request::read(0, 1); 13]).await;
                let at_once = answers.iter().filter(|(_, ms)| *ms == 0).count();
                assert_eq!((at_once, answers[12].1), (11, 200), "{answers:?}");
                rt::sleep(Duration::from_secs(1000)).await;
            }
        });
    }

    #[test]
    fn one_direction_does_not_wait_for_the_other() {
        run(1, async |host| {
            let (disk, throttle) = serve(&host, "(write_rate 1M/s) (write_iops 1000)").await;
            let mut requests = vec![write(1 << 20), write(1 << 20), write(1)];
            requests.extend(vec![Request::read(0, 1 << 20); 3]);
            let waits = async {
                rt::sleep(Duration::from_millis(1)).await;
                throttle.get("waiting").unwrap()
            };
            let (answers, waiting) = tokio::join!(answers(&disk, requests), waits);
            assert_eq!(waiting, "2");
            assert_eq!(answers, [(0, 0), (3, 0), (4, 0), (5, 0), (1, 900), (2, 1900)]);
            assert_eq!(throttle.get("waiting").unwrap(), "0");
        });
    }

    #[test]
    fn both_directions_share_what_is_for_both_in_turn() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(iops 10) (burst 0s)").await;
            let requests = (0..20).map(|ix| if ix % 2 == 0 { write(1) } else { Request::read(0, 1) });
            let answers = answers(&disk, requests.collect()).await;
            assert!(answers.iter().map(|(ix, _)| *ix).eq(0..20), "{answers:?}");
            assert_eq!(answers[19].1, 1900);
        });
    }

    #[test]
    fn a_flush_keeps_its_place_and_costs_nothing() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(write_iops 1) (iops 1000)").await;
            assert!(answers(&disk, vec![Request::flush(); 100]).await.iter().all(|(_, ms)| *ms == 0));
            let changes = [write(1), Request::new(Op::Discard, 0, 1), Request::flush(), write(1)];
            let answers = answers(&disk, changes.into()).await;
            assert_eq!(answers, [(0, 0), (1, 900), (2, 900), (3, 1900)]);
        });
    }

    #[test]
    fn a_new_limit_counts_for_those_that_wait() {
        run(1, async |host| {
            let (disk, throttle) = serve(&host, "(rate 1k/s) (burst 0s)").await;
            let later = async {
                rt::sleep(Duration::from_secs(1)).await;
                // 99k are owed.
                throttle.set("rate", "11k/s").unwrap();
                rt::sleep(Duration::from_secs(20)).await;
                throttle.set("rate", "unlimited").unwrap();
            };
            let requests = vec![Request::read(0, 100 << 10), Request::read(0, 1 << 20), Request::read(0, 1)];
            let (answers, ()) = tokio::join!(answers(&disk, requests), later);
            assert_eq!(answers, [(0, 0), (1, 10_000), (2, 21_000)]);
            assert_eq!(throttle.get("rate").unwrap(), "unlimited");
            throttle.set("burst", "2s").unwrap();
            assert_eq!(throttle.get("burst").unwrap(), "2s");
        });
    }

    #[test]
    fn what_is_no_limit_is_refused() {
        run(1, async |host| {
            let (_, throttle) = serve(&host, "(iops 500)").await;
            assert_eq!(throttle.get("iops").unwrap(), "500");
            for (handler, value) in
                [("iops", "0"), ("iops", "5M/s"), ("rate", "0/s"), ("rate", "5"), ("burst", "5")]
            {
                assert!(throttle.set(handler, value).is_err(), "{handler} {value}");
            }
            let said = throttle.set("write_rate", "fast").unwrap_err().to_string();
            assert!(said.contains("50M/s") && said.contains("unlimited"), "{said}");
            assert!(throttle.set("waiting", "1").is_err() && throttle.get("colour").is_err());
            assert_eq!(throttle.get("iops").unwrap(), "500");
        });
    }

    #[test]
    fn a_client_that_goes_lets_the_next_one_pass() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(iops 1) (burst 0s)").await;
            // Replies that nobody waits for: the requests run to their end all the same.
            drop((disk.send(write(1)), disk.send(write(1))));
            assert_eq!(answers(&disk, vec![Request::read(0, 1)]).await, [(0, 2000)]);
        });
    }

    #[test]
    fn only_the_classes_that_are_named_count_and_wait() {
        run(1, async |host| {
            let (disk, _) = serve(&host, "(iops 1) (burst 0s) (class background)").await;
            let background = Request { class: Class::Background, ..write(1) };
            let requests = vec![background.clone(), write(1), write(1), background.clone(), write(1)];
            assert_eq!(answers(&disk, requests).await, [(0, 0), (1, 0), (2, 0), (4, 0), (3, 1000)]);
        });
    }

    #[test]
    fn is_the_disk_below_it() {
        run(3, async |host| {
            let (disk, _) = serve(&host, "(rate 100M/s) (write_iops 1000)").await;
            play_against_model(&disk, 3, 100).await;
        });
    }
}
