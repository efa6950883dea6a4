//! Tells somebody what happens to the graph: runs a command, or calls a web server.

mod exec;
mod queue;
#[cfg(test)]
mod tests;
mod watch;
mod webhook;

use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::element::Open;
use blockmason::events::{Event, EventKind, Follower};
use blockmason::lang::value::{Time, Uri};
use blockmason::lang::{ParamError, Params as Written};
use blockmason::{Cx, Element, Error, Flow, Kind, LocalBoxFuture, Request, Result, rt};
use exec::Command;
use futures::future::{join, select};
use queue::{Counts, Limiter, Message, QUEUE, Targets};
use std::fmt;
use std::path::PathBuf;
use std::pin::pin;
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use watch::{Bounds, Counters, Crossing, Sums, Watch};
use webhook::Webhook;

/// A kind of event that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct On(EventKind);

/// All but `unloaded`.
const KINDS: [EventKind; 9] = [
    EventKind::Loaded,
    EventKind::Reload,
    EventKind::ReloadFailed,
    EventKind::HandedOver,
    EventKind::HandoverFailed,
    EventKind::Error,
    EventKind::Failed,
    EventKind::Notice,
    EventKind::Threshold,
];

/// What is told if nothing else is said.
const WITHOUT_ON: &[EventKind] = &[
    EventKind::Error,
    EventKind::Failed,
    EventKind::ReloadFailed,
    EventKind::HandoverFailed,
    EventKind::Notice,
    EventKind::Threshold,
];

impl FromStr for On {
    type Err = String;

    fn from_str(word: &str) -> Result<On, String> {
        if let Some(kind) = KINDS.into_iter().find(|kind| kind.name() == word) {
            return Ok(On(kind));
        }
        if word == EventKind::Unloaded.name() {
            return Err("an element is gone when its graph is `unloaded`; follow `mason events`".to_owned());
        }
        let names = KINDS.map(EventKind::name).join(", ");
        Err(format!("expected one of {names}, found `{word:.40}`"))
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

blockmason::text_value!(On, "kind of event");

blockmason::params! {
    /// Tells somebody what happens to the graph.
    struct Params {
        /// Kinds of events, as `mason events` shows them: `loaded`, `reload`, `reload_failed`, `handed_over`, `handover_failed`, `error`, `failed`,
        /// `notice`, `threshold`. Without it all but `loaded`, `reload` and `handed_over`.
        on: Vec<On>,
        /// A command and its arguments, run for each event. With a `/` in it, it is a path, and a relative
        /// one starts in the folder of the graph; else it is looked up in PATH.
        exec: Vec<String>,
        /// Where each event is posted: `http://host:port/path`, or `unix:PATH` for a server on a unix socket.
        webhook: Option<Uri>,
        /// At most so many events, 1 to 1000, in the time `per`.
        rate: u32 = "6",
        /// See `rate`.
        per: Time = "1m",
        /// A `threshold` event comes when the slowest hundredth of the requests of a window took longer.
        latency: Option<Time>,
        /// A `threshold` event comes when more requests than this fail in a window.
        errors: Option<u64>,
        /// How long `latency` and `errors` are measured before they are compared; at least 1s.
        window: Time = "10s",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "notify",
    summary: "runs a command or calls a web server when something happens to the graph",
    doc: "Requests pass unmodified. From the moment its graph is opened, the element follows the graph's events, \
          and tells of those named by `on`. The command and the web server get the event as one JSON object \
          on one line, as `mason events --json` writes it, with `suppressed`: how many events before it \
          nobody was told of.\n\n\
          The command gets it on standard input, and in the variables MASON_GRAPH, MASON_KIND, \
          MASON_ELEMENT, MASON_MESSAGE and MASON_SUPPRESSED. It runs as the user of the daemon, without a \
          shell: what a message says is never a command. After 30 s it is killed, with the children that \
          are still in its process group; if it fails, the end of its output is in the log. Mail needs a \
          command that writes the head of one: `(exec ./mail.sh)`, with\n\n\
          \x20   #!/bin/sh\n\
          \x20   { printf 'To: root\\nSubject: disk %s: %s\\n\\n' \"$MASON_GRAPH\" \"$MASON_KIND\"\n\
          \x20     printf '%s\\n' \"$MASON_MESSAGE\"; } | exec sendmail -t\n\n\
          Keep messages out of the head of a mail, as it does: they may have several lines.\n\n\
          The web server gets a POST, and has 10 s to answer. If there is no connection, or it answers 5xx, \
          it is tried twice more. There is no https: post to a relay on the same machine, or use `exec`.\n\n\
          Requests never wait for any of this, which happens on a thread of its own. Four events are told at \
          a time; 64 wait. What comes while these wait, or beyond the rate, is counted, and the next one \
          that is told says so. Whatever fails is in the log and the handlers; it is no event itself. What \
          waits when the daemon ends is lost; a command that runs then may be killed.\n\n\
          `latency` and `errors` watch what passes here. An event comes once when the bound is passed, and once \
          when a window is below it again, with the details `quantity`, `state` (`above` or `below`), `value`, `bound` and \
          `window`. A window in which nothing was answered though all of it was waited for counts as above. \
          Errors that are a client's own mistake do not count. Without these two parameters the element costs \
          a request nothing but the call.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "sent", access: Access::Read, doc: "events that were told" },
        Handler { name: "failed", access: Access::Read, doc: "events that could not be told" },
        Handler { name: "suppressed", access: Access::Read, doc: "events left out: too many, too fast" },
        Handler { name: "last", access: Access::Read, doc: "what came of the last one; empty before" },
        Handler {
            name: "test",
            access: Access::Call,
            doc: "tells of a test, beyond the rate; the argument is its message",
        },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:notify.sock)\n\
              element Alarm (type notify) (exec logger --tag mason) (latency 50ms) (errors 5)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Alarm -> Disk\n",
    check,
    build: |build: &Build<'_>| Ok(Arc::new(Notify::new(build)?)),
    ..ElementType::BASE
};

fn check(written: &Written) -> Result<(), Vec<ParamError>> {
    let params = Params::from(written)?;
    let mut errors = Vec::new();
    let mut unless = |fine: bool, key: &str, why: &str| {
        if !fine {
            errors.push(written.error(key, why));
        }
    };
    let second = Time(Duration::from_secs(1));
    unless((1..=1000).contains(&params.rate), "rate", "expected a number from 1 to 1000");
    unless(params.per >= second, "per", "expected at least 1s");
    unless(params.window >= second, "window", "expected at least 1s");
    unless(params.exec.first().is_none_or(|program| !program.is_empty()), "exec", "the command has no name");
    unless(
        params.exec.iter().all(|word| !word.contains('\0')),
        "exec",
        "a command cannot contain a NUL byte",
    );
    let does = !params.exec.is_empty()
        || params.webhook.is_some()
        || params.latency.is_some()
        || params.errors.is_some();
    unless(does, "exec", "nothing to do: give it `exec`, `webhook`, `latency` or `errors`");
    if let Some(Err(why)) = params.webhook.as_ref().map(Webhook::new) {
        unless(false, "webhook", &why);
    }
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

struct Notify {
    graph: String,
    name: String,
    on: Vec<EventKind>,
    targets: Arc<Targets>,
    counts: Arc<Counts>,
    limiter: Mutex<Limiter>,
    /// From [`Element::open`] to [`Element::close`].
    open: Mutex<Option<Following>>,
    bounds: Bounds,
    /// By shard.
    shards: OnceLock<Box<[Counters]>>,
    watch: Mutex<Watch>,
}

struct Following {
    events: Follower,
    queue: mpsc::Sender<Message>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes guard is complete before anything can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Notify {
    fn new(build: &Build<'_>) -> Result<Notify> {
        let params = build.read(Params::from)?;
        let folder = build.params.get("exec").and_then(|values| values.first()).map(|first| first.folder());
        let mut words = params.exec.into_iter();
        let exec = words.next().map(|program| {
            let relative = folder.filter(|_| program.contains('/'));
            let program = relative.map_or_else(|| PathBuf::from(&program), |folder| folder.join(&program));
            Command { program, args: words.collect() }
        });
        let webhook = params.webhook.as_ref().map(Webhook::new).transpose().map_err(Error::invalid)?;
        let on: Vec<_> = params.on.iter().map(|On(kind)| *kind).collect();
        let latency = params.latency.map(|Time(latency)| latency);
        Ok(Notify {
            graph: build.graph.to_owned(),
            name: build.name.to_owned(),
            on: if on.is_empty() { WITHOUT_ON.to_vec() } else { on },
            targets: Arc::new(Targets { element: build.name.to_owned(), exec, webhook }),
            counts: Arc::default(),
            limiter: Mutex::new(Limiter::new(params.rate, params.per.0)),
            open: Mutex::default(),
            bounds: Bounds { latency, errors: params.errors, window: params.window.0 },
            shards: OnceLock::new(),
            watch: Mutex::default(),
        })
    }

    /// Tells of the events that come.
    async fn follow(&self) {
        loop {
            let Some(events) = lock(&self.open).as_ref().map(|open| open.events.clone()) else { return };
            events.wait().await;
            self.tell();
            // Others on this shard take their turn, however many events there are.
            tokio::task::yield_now().await;
        }
    }

    /// Hands on what has come, and waits for nothing.
    fn tell(&self) {
        const MOST: usize = 64;
        let mut open = lock(&self.open);
        let Some(Following { events, queue }) = &mut *open else { return };
        let news = events.take(MOST);
        let mut limiter = lock(&self.limiter);
        let skip = |limiter: &mut Limiter, count| {
            limiter.skip(count);
            self.counts.suppressed.fetch_add(count, Ordering::Relaxed);
        };
        // Nobody knows whose they were.
        skip(&mut limiter, news.dropped);
        for event in news.events {
            if self.targets.is_empty() || event.graph != self.graph || !self.on.contains(&event.kind) {
                continue;
            }
            match queue.try_reserve() {
                Err(_) => skip(&mut limiter, 1),
                Ok(place) => match limiter.admit(rt::now()) {
                    Some(suppressed) => place.send(Message { event, suppressed }),
                    None => drop(self.counts.suppressed.fetch_add(1, Ordering::Relaxed)),
                },
            }
        }
    }

    /// Compares what passes with the bounds, once in a window.
    async fn measure(&self, cx: Cx<'_>) {
        if self.bounds.are_none() {
            return;
        }
        loop {
            cx.sleep(self.bounds.window).await;
            let sums = Sums::of(self.shards.get().into_iter().flatten());
            let crossings = lock(&self.watch).window(&self.bounds, sums);
            for crossing in crossings {
                cx.shard().events().publish(self.threshold(&crossing));
            }
        }
    }

    fn threshold(&self, crossing: &Crossing) -> Event {
        let Crossing { quantity, above, value, bound } = crossing;
        let state = if *above { "above" } else { "below" };
        let message = match *above {
            true => format!("{quantity} is above {bound}: {value}"),
            false => format!("{quantity} is no longer above {bound}: {value}"),
        };
        Event::new(EventKind::Threshold, &self.graph, message)
            .of(&self.name)
            .with("quantity", quantity)
            .with("state", state)
            .with("value", value)
            .with("bound", bound)
            .with("window", Time(self.bounds.window))
    }

    /// Queues an event that nobody else sees.
    fn test(&self, message: &str) -> Result<String> {
        if self.targets.is_empty() {
            return Err(Error::invalid("there is nobody to tell: give the element `exec` or `webhook`"));
        }
        let message = if message.is_empty() { "this is a test" } else { message };
        let mut event =
            Event::new(EventKind::Notice, &self.graph, message).of(&self.name).with("test", "yes");
        event.time =
            rt::wall_clock().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let message = Message { event: Arc::new(event), suppressed: 0 };
        let sent = lock(&self.open).as_ref().is_some_and(|open| open.queue.try_send(message).is_ok());
        if !sent {
            return Err(Error::new(Kind::Busy, format!("{QUEUE} events wait already; see `last`")));
        }
        Ok("queued: `last` says what comes of it".to_owned())
    }
}

impl Element for Notify {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if self.bounds.are_none() {
            return cx.forward(0, req);
        }
        let shards = self.shards.get_or_init(|| (0..cx.shards()).map(|_| Counters::default()).collect());
        let passing = shards[cx.shard().id()].begin(cx.now());
        cx.forward(0, req).then(move |reply| {
            passing.answered(&reply, cx.now());
            reply
        })
    }

    fn open(&self, cx: &Open<'_>) -> Result<Option<String>> {
        let (queue, messages) = mpsc::channel(QUEUE);
        let (targets, counts) = (self.targets.clone(), self.counts.clone());
        cx.host.background(move || queue::send_all(messages, targets, counts))?;
        *lock(&self.open) = Some(Following { events: cx.host.events().follow(0), queue });
        Ok(None)
    }

    fn close(&self) {
        // What is queued is still sent.
        *lock(&self.open) = None;
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        Some(Box::pin(async move {
            let work = join(self.follow(), self.measure(cx));
            select(pin!(cx.closing()), pin!(work)).await;
            // What came before that; the rest is for the next graph that has this instance.
            self.tell();
        }))
    }

    fn get(&self, handler: &str) -> Result<String> {
        let count = match handler {
            "sent" => &self.counts.sent,
            "failed" => &self.counts.failed,
            "suppressed" => &self.counts.suppressed,
            "last" => return Ok(self.counts.last()),
            _ => return Err(Error::no_handler(handler)),
        };
        Ok(count.load(Ordering::Relaxed).to_string())
    }

    fn call(&self, handler: &str, argument: &str) -> Result<String> {
        match handler {
            "test" => self.test(argument),
            _ => Err(Error::no_handler(handler)),
        }
    }
}
