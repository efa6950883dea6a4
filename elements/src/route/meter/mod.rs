//! Counts what a disk in a bucket costs, and keeps it within budgets.

mod budget;
#[cfg(test)]
mod tests;

use super::gauge::Gauge;
use super::throttle::{Bandwidth, Cost, Frequency, Gate};
use crate::calendar::seconds;
use crate::cloud::ledger::{Book, bill};
use crate::cloud::metered::Metered;
use crate::cloud::price::{self, Dollars, Prices, Word};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Ports};
use blockmason::events::{Event, EventKind, Events};
use blockmason::lang::value::{FilePath, Ref, Time};
use blockmason::lang::{ParamError, Params as Written};
use blockmason::{Cx, Element, Error, Flow, Kind, LocalBoxFuture, Op, Open, Request, Result, rt};
use budget::{Period, Step, Then};
use futures::future::{Either, select};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

blockmason::params! {
    /// Counts what a disk in a bucket costs.
    struct Params {
        /// The `s3` below, whose requests are counted.
        of: Ref<dyn Metered>,
        /// The file in which counts are kept, made when it is missing. It belongs to the volume.
        ledger: FilePath,
        /// A table of prices, `s3_standard` (the default) or `none`, and prices that are other than in it, in dollars: `put=0.005` for 1000 puts
        /// or listings, `get=0.0004` for 1000 gets or heads, `month=0.023` for a GB that is stored for a month, `out=0` for a GB that is
        /// fetched. A GB has 10^9 bytes.
        prices: Vec<Word>,
        /// The budget of a day: steps, each with the dollars from which on it counts, `warn=3 stop_background=4 queue=5`.
        day: Vec<Step>,
        /// The same of a month.
        month: Vec<Step>,
        /// Bytes that may be read and written in a second from the step `throttle` on.
        rate: Bandwidth = "1M/s",
        /// Requests in a second, from then on.
        iops: Frequency = "unlimited",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "meter",
    summary: "counts what a disk in a bucket costs, and keeps it within budgets",
    doc: "Stands above an `s3`, which `of` names, and counts what that asks of its store: requests and bytes by operation, and the bytes that \
          are stored, by day. With a table of prices that is money. Days and months are those of UTC. `mason bill` shows all of it. \
          Above a cache on an SSD it would hold guests up; put it below that, right above the `s3`.\n\n\
          **Budgets** have steps, each with an amount from which on it counts. A step includes those that stand before it here, and \
          ends with the day or month, or when the budget is raised:\n\n\
          - `warn`: an event of the kind `threshold`, as at each step, and another one when it is over.\n\
          - `stop_background`: the `s3` no longer brings what is in commits into its blocks' objects, unless memory or commits get scarce: then it \
          does as much as it must, so no request waits for that, and memory has its bound. Everything stays as durable as it was. What \
          comes from above is not held, also what a copier or a cache writes.\n\
          - `throttle`: reads and changes pass at `rate` and `iops`.\n\
          - `queue`: changes wait; reads and flushes pass. A flush makes durable what was taken before, which is \
          one commit at the most. To those above it is a store that does not answer: a cache on an SSD takes changes until its log is full.\n\
          - `read_only`: changes fail with ENOSPC, also those that wait. Guests see errors only because of this step. Reads and flushes \
          pass.\n\n\
          Reads always go on: 1000 of them cost less than a tenth of 1000 writes. It is looked once in a second, so a step comes up to a \
          second late. What waits when the graph is changed or ends passes, whatever it costs, lest it be lost or hold that up.\n\n\
          **The ledger** has at most 400 days, and outlives the process: a crash loses the requests of about ten seconds, and \
          what is stored while nothing runs is counted when the ledger is next opened. A file that is damaged, of another volume, or no \
          ledger is refused, and never overwritten; so is one that somebody else has open. Format: \
          [formats/ledger.md](../formats/ledger.md).\n\n\
          What is counted is each attempt of this process, opening and leaving the volume included. Not counted are \
          other programs, `mason bucket` among them, transfer that the provider prices otherwise, and taxes: the provider's bill is \
          the one that counts. [Cloud disks](../cloud.md#budgets) tells more.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "state", access: Access::Read, doc: "the step that counts now, or `within`" },
        Handler { name: "spent_today", access: Access::Read, doc: "dollars since midnight, UTC" },
        Handler { name: "spent_month", access: Access::Read, doc: "dollars since this month began" },
        Handler { name: "stored", access: Access::Read, doc: "bytes stored" },
        Handler { name: "waiting", access: Access::Read, doc: "requests that wait now" },
        Handler { name: "rate", access: Access::ReadWrite, doc: "bytes in a second while throttled" },
        Handler { name: "iops", access: Access::ReadWrite, doc: "requests in a second while throttled" },
        Handler {
            name: "raise",
            access: Access::Call,
            doc: "`day 5`: every step comes 5 $ later until the day ends, 0 as before; or `month 20`",
        },
        Handler {
            name: "bill",
            access: Access::Call,
            doc: "all days as JSON, which `mason bill` shows; the argument may be other prices",
        },
    ],
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:meter.sock)\n\
              element Meter (type meter) (of Disk) (ledger vm1.ledger) (day warn=1 queue=5)\n\
              element Disk (type s3) (bucket vms) (prefix vm1) (endpoint http://127.0.0.1:9000)\n\
              Guest -> Meter -> Disk\n",
    check,
    build: |build: &Build<'_>| Ok(Arc::new(Meter::new(build)?)),
    ..ElementType::BASE
};

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// How soon requests are in the file.
const SOON: Duration = Duration::from_secs(10);
/// How often the file is written where only time passes.
const SELDOM: Duration = Duration::from_secs(300);
/// What may pass at once while throttled, as time.
const BURST: Duration = Duration::from_secs(1);

fn check(written: &Written) -> Result<(), Vec<ParamError>> {
    let params = Params::from(written)?;
    let mut errors = Vec::new();
    if !params.prices.is_empty()
        && let Err(why) = price::check(&params.prices)
    {
        errors.push(written.error("prices", why));
    }
    for (key, steps) in [("day", &params.day), ("month", &params.month)] {
        if let Err(why) = budget::check(steps) {
            errors.push(written.error(key, why));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

struct Meter {
    metered: Arc<dyn Metered>,
    book: Arc<Book>,
    prices: Prices,
    steps: Vec<(Period, Step)>,
    /// Which of them are reached.
    reached: Mutex<Vec<bool>>,
    /// The highest of them, as [`Then::level`]; 0 without one.
    level: AtomicU8,
    /// Told when that changes.
    changed: Notify,
    gate: Gate,
    waiting: Gauge,
    /// Requests have been made that are not in the file.
    unwritten: AtomicBool,
    /// The file could not be written the last time.
    failing: AtomicBool,
    /// Between `open` and `close`.
    teller: Mutex<Option<Teller>>,
}

/// How to tell the operator.
struct Teller {
    events: Arc<Events>,
    graph: String,
    name: String,
}

impl Meter {
    fn new(build: &Build<'_>) -> Result<Meter> {
        let params = build.read(Params::from)?;
        let metered = build.refer(&params.of)?;
        let book = Book::find(&params.ledger.0, build.graph, build.name, metered.volume())?;
        let steps = |period, steps: Vec<Step>| steps.into_iter().map(move |step| (period, step));
        let steps: Vec<_> =
            steps(Period::Day, params.day).chain(steps(Period::Month, params.month)).collect();
        Ok(Meter {
            metered,
            book,
            prices: Prices::of(&params.prices),
            reached: Mutex::new(vec![false; steps.len()]),
            steps,
            level: AtomicU8::new(0),
            changed: Notify::new(),
            gate: Gate::new(params.rate, params.iops, Time(BURST)),
            waiting: Gauge::default(),
            unwritten: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            teller: Mutex::default(),
        })
    }

    fn then(&self) -> Option<Then> {
        Then::of_level(self.level.load(Ordering::Acquire))
    }

    /// Counts what has come since the last time, and does what the budgets say.
    fn look(&self) {
        let (sum, stored) = (self.metered.take_unbilled(), self.metered.stored());
        if sum.requests != [0; 5] {
            self.unwritten.store(true, Ordering::Relaxed);
        }
        let mut ledger = self.book.ledger();
        ledger.pass(seconds(), stored);
        ledger.count(&sum);
        let sums =
            [Period::Day, Period::Month].map(|it| (it.spent(&ledger, &self.prices), it.raised(&ledger)));
        drop(ledger);
        self.judge(sums);
    }

    /// Of a day and a month each what is spent, and what its budget is raised by.
    fn judge(&self, sums: [(f64, f64); 2]) {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut level = 0;
        for ((period, step), was) in self.steps.iter().zip(reached.iter_mut()) {
            let (spent, raised) = sums[*period as usize];
            let bound = step.dollars.0 + raised;
            let is = spent >= bound;
            if is {
                level = step.then.level().max(level);
            }
            if std::mem::replace(was, is) != is {
                self.tell(*period, step, is, spent, bound);
            }
        }
        // Each time: the volume may have been opened anew.
        self.metered.rest(level >= Then::StopBackground.level());
        if self.level.swap(level, Ordering::AcqRel) != level {
            self.changed.notify_waiters();
        }
    }

    fn tell(&self, period: Period, step: &Step, is: bool, spent: f64, bound: f64) {
        let (name, then) = (period.name(), step.then);
        let message = match is {
            true => format!("this {name} has cost {spent:.4} $, {bound} $ or more: {}", then.meaning()),
            false => format!("this {name} has cost {spent:.4} $, less than {bound} $: `{then}` is over"),
        };
        let teller = self.teller.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Teller { events, graph, name: element }) = &*teller {
            let event = Event::new(EventKind::Threshold, graph, message).of(element);
            let event = event.with("quantity", format!("dollars_{name}")).with("step", then);
            let event = event.with("state", if is { "above" } else { "below" });
            events.publish(event.with("value", format!("{spent:.4}")).with("bound", bound));
        }
    }

    /// Looks once in a second, and keeps the file up to date.
    async fn watch(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut written = cx.now();
        loop {
            if let Either::Left(_) = select(closing.as_mut(), pin!(cx.sleep(LOOK))).await {
                return;
            }
            self.look();
            let since = cx.now() - written;
            let soon = self.unwritten.load(Ordering::Relaxed) && since >= SOON;
            if soon || since >= SELDOM {
                self.write(cx).await;
                written = cx.now();
            }
        }
    }

    async fn write(&self, cx: Cx<'_>) {
        self.unwritten.store(false, Ordering::Relaxed);
        let book = self.book.clone();
        let written = rt::blocking(move || book.write()).await;
        let written = written.unwrap_or_else(|| Err(Error::internal("writing the ledger was given up")));
        match written {
            Ok(()) => self.failing.store(false, Ordering::Relaxed),
            Err(error) => {
                self.unwritten.store(true, Ordering::Relaxed);
                if !self.failing.swap(true, Ordering::Relaxed) {
                    cx.notice(format!(
                        "{error}; it is tried again, and a restart would lose what came since"
                    ));
                }
            }
        }
    }

    /// True if a request may have to wait, or to fail.
    fn concerns(then: Option<Then>, op: Op) -> bool {
        match then {
            None | Some(Then::Warn | Then::StopBackground) => false,
            Some(Then::Throttle) => op == Op::Read || op.changes_data(),
            Some(Then::Queue | Then::ReadOnly) => op.changes_data(),
        }
    }

    /// Waits until a request may pass.
    async fn admit(&self, req: &Request, cx: Cx<'_>) -> Result<()> {
        let bytes = if matches!(req.op, Op::Read | Op::Write) { req.len } else { 0 };
        let cost = Cost { bytes, requests: 1 };
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            match self.then() {
                then if !Meter::concerns(then, req.op) => return Ok(()),
                Some(Then::ReadOnly) => {
                    let message = "the budget is used up, and so changes are refused: raise it, or wait for the next day or month";
                    return Err(Error::new(Kind::NoSpace, message));
                }
                Some(Then::Throttle) => {
                    if let Either::Left(_) = select(pin!(self.gate.pass(cost, cx)), changed).await {
                        return Ok(());
                    }
                }
                _ => changed.await,
            }
        }
    }

    fn raise(&self, argument: &str) -> Result<String> {
        let wrong = || Error::invalid("expected `day` or `month` and dollars, as in `day 5`");
        let (period, dollars) = argument.trim().split_once(' ').ok_or_else(wrong)?;
        let period = match period {
            "day" => Period::Day,
            "month" => Period::Month,
            _ => return Err(wrong()),
        };
        let Dollars(dollars) = dollars.trim().parse().map_err(Error::invalid)?;
        self.look();
        period.raise(&mut self.book.ledger(), dollars);
        self.look();
        self.book.write()?;
        Ok(format!("every step comes {dollars} $ later until this {} ends", period.name()))
    }

    fn bill(&self, prices: &str) -> Result<String> {
        let prices = match prices.trim() {
            "" => self.prices,
            text => text.parse().map_err(Error::invalid)?,
        };
        self.look();
        let ledger = self.book.ledger();
        let mut bill = bill(&ledger, &prices);
        bill["raised"] =
            [Period::Day, Period::Month].map(|it| (it.name(), it.raised(&ledger))).into_iter().collect();
        drop(ledger);
        bill["state"] = self.get("state")?.into();
        bill["steps"] = self.steps.iter().map(|(period, step)| format!("{} {step}", period.name())).collect();
        Ok(bill.to_string())
    }
}

impl Element for Meter {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !Meter::concerns(self.then(), req.op) {
            return cx.forward(0, req);
        }
        let waiting = self.waiting.enter();
        Flow::later(async move {
            // Whatever the graph waits for passes, lest it waits until the month ends.
            let admitted = match select(pin!(self.admit(&req, cx)), pin!(cx.closing())).await {
                Either::Left((admitted, _)) => admitted,
                Either::Right(_) => Ok(()),
            };
            drop(waiting);
            match admitted {
                Ok(()) => cx.forward(0, req).await,
                Err(error) => cx.fail(&req, error).await,
            }
        })
    }

    fn open(&self, open: &Open<'_>) -> Result<Option<String>> {
        self.book.open()?;
        self.book.ledger().prices = self.prices;
        self.metered.finish_in(Arc::downgrade(&self.book));
        let (events, graph) = (open.host.events().clone(), open.disk.graph().name().to_owned());
        let teller = Teller { events, graph, name: open.name.to_owned() };
        *self.teller.lock().unwrap_or_else(PoisonError::into_inner) = Some(teller);
        // No request comes before what is known from earlier counts.
        self.look();
        Ok(None)
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(self.watch(cx)))
    }

    fn close(&self) {
        self.look();
        self.metered.rest(false);
        *self.teller.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Err(error) = self.book.write() {
            tracing::warn!("{error}: a restart loses what came since it was last written");
        }
    }

    fn renamed(&self, name: &str) {
        self.book.renamed(name);
        if let Some(teller) = &mut *self.teller.lock().unwrap_or_else(PoisonError::into_inner) {
            name.clone_into(&mut teller.name);
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        let spent = |period: Period| {
            self.look();
            format!("{:.6}", period.spent(&self.book.ledger(), &self.prices))
        };
        Ok(match handler {
            "state" => self.then().map_or_else(|| "within".to_owned(), |then| then.to_string()),
            "spent_today" => spent(Period::Day),
            "spent_month" => spent(Period::Month),
            "stored" => self.metered.stored().unwrap_or_else(|| self.book.ledger().stored).to_string(),
            "waiting" => self.waiting.now().to_string(),
            "rate" => Bandwidth(self.gate.buckets().bytes.rate).to_string(),
            "iops" => Frequency(self.gate.buckets().requests.rate).to_string(),
            _ => return Err(Error::no_handler(handler)),
        })
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        match handler {
            "rate" => {
                let Bandwidth(rate) = value.parse().map_err(Error::invalid)?;
                self.gate.set(|buckets| buckets.bytes.limit(rate));
            }
            "iops" => {
                let Frequency(iops) = value.parse().map_err(Error::invalid)?;
                self.gate.set(|buckets| buckets.requests.limit(iops));
            }
            _ => return Err(Error::no_handler(handler)),
        }
        Ok(())
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        match handler {
            "raise" => self.raise(argument),
            "bill" => self.bill(argument),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
