//! Changes of graphs, with every failure and interleaving forced by hand.

use super::{Diff, Fate, Heads, Live, Options, Setup};
use crate::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use crate::element::{Children, Element, Flow, LocalBoxFuture, Open, Prepared};
use crate::error::{Error, Kind, Result};
use crate::geometry::{Geometry, Ops};
use crate::lang::value::Size;
use crate::request::{Answer, Request};
use crate::sched::{Cx, Host};
use crate::testing::{CLIENT, TestDisk, checked, live, run};
use proptest::prelude::*;
use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;

static ALL: &[&ElementType] = &[&CLIENT, &WAITER, &STORE, &HOP, &HELD, &FANOUT, &WORKER];

crate::params! {
    /// Everything a test wants to go wrong.
    struct Params {
        /// Bytes.
        size: Size = "64k",
        /// A value that changes in place.
        rate: u64 = "1",
        /// A value that does not.
        colour: String = "red",
    }
}

const BASE: ElementType = ElementType {
    family: Family::Route,
    params: Params::PARAMS,
    check: Params::check,
    handlers: &[Handler { name: "rate", access: Access::ReadWrite, doc: "a value" }],
    ..ElementType::BASE
};

/// Ends requests at once.
static STORE: ElementType = ElementType {
    name: "store",
    family: Family::Sink,
    ports: Ports::SINK,
    build: |build| make(build, Kindof::Store),
    ..BASE
};
/// Passes everything on, and need not see it.
static HOP: ElementType =
    ElementType { name: "hop", handover: Handover::Free, build: |build| make(build, Kindof::Hop), ..BASE };
/// Passes everything on once the test lets it.
static HELD: ElementType = ElementType { name: "held", build: |build| make(build, Kindof::Held), ..BASE };
/// Passes everything on to its first child.
static FANOUT: ElementType = ElementType {
    name: "fanout",
    ports: Ports { input: true, out: crate::describe::Outs::Variadic { min: 1 } },
    build: |build| make(build, Kindof::Hop),
    ..BASE
};
/// Passes everything on, and has work of its own.
static WORKER: ElementType =
    ElementType { name: "worker", build: |build| make(build, Kindof::Worker), ..BASE };

/// A client whose graph stands by.
static WAITER: ElementType = ElementType {
    name: "waiter",
    family: Family::Export,
    ports: Ports::SOURCE,
    build: |build| make(build, Kindof::Waiter),
    ..BASE
};

#[derive(Clone, Copy, PartialEq)]
enum Kindof {
    Waiter,
    Store,
    Hop,
    Held,
    Worker,
}

thread_local! {
    /// Everything that was done to elements, in order.
    static LOG: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    /// The call that fails or panics.
    static FAIL: RefCell<String> = const { RefCell::new(String::new()) };
    /// What lets each held request go, by element.
    static HELD_BACK: RefCell<HashMap<String, Vec<oneshot::Sender<()>>>> = RefCell::default();
}

fn fail_at(what: &str) {
    FAIL.set(what.to_owned());
}

fn log() -> Vec<String> {
    LOG.take()
}

struct Thing {
    name: String,
    kind: Kindof,
    size: u64,
    rate: AtomicU64,
    colour: String,
    learnt: Mutex<String>,
}

fn make(build: &Build<'_>, kind: Kindof) -> Result<Arc<dyn Element>> {
    let params = build.read(Params::from)?;
    let thing = Thing {
        name: build.name.to_owned(),
        kind,
        size: params.size.0,
        rate: AtomicU64::new(params.rate),
        colour: params.colour,
        learnt: Mutex::default(),
    };
    if thing.colour == "unbuildable" {
        return Err(Error::invalid("of a test"));
    }
    Ok(Arc::new(thing))
}

impl Thing {
    /// Notes a call, and fails it if the test wants that.
    fn note(&self, call: &str) -> Result<()> {
        let line = format!("{call} {} {}", self.name, self.colour);
        LOG.with_borrow_mut(|log| log.push(line.clone()));
        let wanted = FAIL.with_borrow(String::clone);
        assert!(wanted != format!("panic {line}"), "of a test");
        if wanted == line { Err(Error::new(Kind::Unavailable, "of a test")) } else { Ok(()) }
    }
}

impl Element for Thing {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        if self.kind == Kindof::Store {
            return Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(self.size) }));
        }
        let below = children.iter().next().ok_or_else(|| Error::invalid("no child"))?;
        Ok(Prepared::of(below.above()))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match self.kind {
            Kindof::Store => Flow::Now(Ok(Answer::Done)),
            Kindof::Hop | Kindof::Worker | Kindof::Waiter => cx.forward(0, req),
            Kindof::Held => Flow::later(async move {
                let (go, gone) = oneshot::channel();
                HELD_BACK.with_borrow_mut(|held| held.entry(self.name.clone()).or_default().push(go));
                gone.await.map_err(|_| Error::internal("the test has gone"))?;
                cx.forward(0, req).await
            }),
        }
    }

    fn run<'a>(&'a self, cx: Cx<'a>) -> Option<LocalBoxFuture<'a, ()>> {
        (self.kind == Kindof::Worker).then(|| -> LocalBoxFuture<'a, ()> {
            Box::pin(async move {
                self.note("begin").unwrap();
                cx.closing().await;
                if self.colour == "slow" {
                    cx.sleep(Duration::from_secs(1)).await;
                }
                self.note("end").unwrap();
            })
        })
    }

    fn stands_by(&self) -> bool {
        self.kind == Kindof::Waiter
    }

    fn open(&self, _open: &Open<'_>) -> Result<Option<String>> {
        self.note("open").map(|()| None)
    }

    fn close(&self) {
        self.note("close").unwrap();
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        assert_eq!(handler, "rate");
        self.note(&format!("set {value}"))?;
        self.rate.store(value.parse().map_err(|_| Error::invalid("no number"))?, Ordering::Relaxed);
        Ok(())
    }

    fn take_state(&self, old: &dyn Element) -> Result<()> {
        let old = (old as &dyn Any).downcast_ref::<Thing>().unwrap();
        *self.learnt.lock().unwrap() = old.colour.clone();
        self.note("take")
    }
}

fn held(element: &str) -> usize {
    HELD_BACK.with_borrow(|all| all.get(element).map_or(0, Vec::len))
}

fn release(element: &str) {
    HELD_BACK.with_borrow_mut(|all| all.get_mut(element).unwrap().remove(0)).send(()).unwrap();
}

async fn settle() {
    for _ in 0..30 {
        tokio::task::yield_now().await;
    }
}

/// Lets everything go on until something has happened: elements are built on another thread.
async fn until(happened: impl Fn() -> bool) {
    for _ in 0..1_000_000 {
        if happened() {
            return settle().await;
        }
        std::thread::yield_now();
        tokio::task::yield_now().await;
    }
    panic!("it has not happened");
}

async fn start(host: &Arc<Host>, text: &str) -> (Arc<Live>, TestDisk) {
    log();
    let started = live(host, ALL, &with_client(text)).await.unwrap();
    log();
    started
}

fn with_client(text: &str) -> String {
    format!("element Client (type client) {text}")
}

async fn reload(live: &Live, text: &str) -> Result<super::Report> {
    live.reload(checked(ALL, &with_client(text)).unwrap(), &Options::default()).await
}

#[test]
fn the_same_graph_changes_nothing() {
    run(1, async |host| {
        let text = "element S (type store) Client -> S";
        let (live, _disk) = start(&host, text).await;
        let before = live.disk().graph();
        let report = reload(&live, "element S (type store) (size 64k) (rate 1)  Client -> S").await.unwrap();
        assert!(report.diff.is_empty(), "{}", report.diff);
        assert!(Arc::ptr_eq(&before, &live.disk().graph()) && log().is_empty());
        assert_eq!(live.reloads(), (0, 0));
    });
}

#[test]
fn an_element_goes_on_under_another_name() {
    run(1, async |host| {
        let old = "element F (type fanout) element A (type store) element B (type store) (size 128k)\n\
                   Client -> F (F, a) -> A (F, b) -> B";
        let (live, disk) = start(&host, old).await;
        let element = |name: &str| {
            let graph = live.disk().graph();
            let found = graph.instances().find(|instance| instance.name == name).unwrap().element.clone();
            Arc::as_ptr(&found).cast::<()>()
        };
        let was = element("B");
        let options = Options { renames: vec![("B".to_owned(), "A".to_owned())], ..Options::default() };
        let next = checked(ALL, &with_client("element A (type store) (size 128k) Client -> A")).unwrap();
        live.reload(next, &options).await.unwrap();
        assert_eq!(element("A"), was);
        assert_eq!(log(), ["close F red", "close A red"], "it was neither opened nor closed");
        assert_eq!(disk.size(), 128 << 10);
        // What is another element cannot go on as one.
        let next = checked(ALL, &with_client("element C (type store) (size 64k) Client -> C")).unwrap();
        let options = Options { renames: vec![("A".to_owned(), "C".to_owned())], ..Options::default() };
        assert_eq!(live.reload(next, &options).await.unwrap_err().kind(), Kind::Internal);
        assert_eq!(log(), [""; 0]);
    });
}

#[test]
fn a_commit_comes_last_behind_the_gate_and_undoes_all_if_it_fails() {
    for fails in [false, true] {
        run(1, async |host| {
            let old = "element D (type held) element S (type store) Client -> D -> S";
            let (live, disk) = start(&host, old).await;
            let inside = disk.send(Request::read(0, 1));
            settle().await;
            let commit: crate::sched::Commit = Arc::new(move || {
                LOG.with_borrow_mut(|log| log.push("commit".to_owned()));
                let done = if fails { Err(Error::new(Kind::Unavailable, "of a test")) } else { Ok(()) };
                Box::pin(std::future::ready(done))
            });
            let changing = tokio::task::spawn_local({
                let live = live.clone();
                async move {
                    let text = with_client("element S (type store) (colour blue) Client -> S");
                    let options = Options { commit: Some(commit), ..Options::default() };
                    live.reload(checked(ALL, &text).unwrap(), &options).await
                }
            });
            // What leaves is flushed before the gate closes, and again behind it.
            until(|| held("D") == 2).await;
            assert_eq!((log(), live.disk().gated()), (Vec::new(), 0));
            release("D");
            release("D");
            inside.await.unwrap().unwrap();
            until(|| held("D") == 1).await;
            assert_eq!((log(), live.disk().gated()), (Vec::new(), 1), "something is in flight");
            release("D");
            let changed = changing.await.unwrap();
            assert_eq!(changed.is_err(), fails);
            let expected: &[&str] = match fails {
                false => &["take S blue", "open S blue", "commit", "close D red", "close S red"],
                true => &["take S blue", "open S blue", "commit", "close S blue"],
            };
            assert_eq!(log(), expected);
            let again = disk.send(Request::read(0, 1));
            settle().await;
            if fails {
                release("D");
            }
            again.await.unwrap().unwrap();
        });
    }
}

#[test]
fn a_hop_comes_and_goes_without_a_pause() {
    run(1, async |host| {
        let (live, disk) =
            start(&host, "element D (type held) element S (type store) Client -> D -> S").await;
        let inside = disk.send(Request::read(0, 1));
        settle().await;
        let changing = tokio::task::spawn_local({
            let live = live.clone();
            async move {
                let text =
                    "element H (type hop) element D (type held) element S (type store) Client -> H -> D -> S";
                reload(&live, text).await
            }
        });
        until(|| !LOG.with_borrow(Vec::is_empty)).await;
        let second = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!(held("D"), 2, "new requests do not wait for old ones");
        assert!(!changing.is_finished(), "it waits for the old ones, to say what is left");
        release("D");
        inside.await.unwrap().unwrap();
        let report = changing.await.unwrap().unwrap();
        assert!(!report.diff.gate && report.pause_seconds == 0.0 && report.left.is_empty());
        assert_eq!(log(), ["open H red"]);
        release("D");
        second.await.unwrap().unwrap();
        reload(&live, "element D (type held) element S (type store) Client -> D -> S").await.unwrap();
        assert_eq!(log(), ["close H red"]);
    });
}

#[test]
fn without_a_pause_what_is_stuck_is_left_behind_and_closed_when_it_ends() {
    run(1, async |host| {
        let with = "element H (type hop) element D (type held) element S (type store) Client -> H -> D -> S";
        let (live, disk) = start(&host, with).await;
        let stuck = disk.send(Request::read(512, 7));
        settle().await;
        let report =
            reload(&live, "element D (type held) element S (type store) Client -> D -> S").await.unwrap();
        assert!(
            report.left.len() == 1 && report.left[0].starts_with("Client: read of 7 at 512"),
            "{:?}",
            report.left
        );
        assert!(log().is_empty(), "the hop is still in use");
        release("D");
        stuck.await.unwrap().unwrap();
        settle().await;
        assert_eq!(log(), ["close H red"]);
    });
}

#[test]
fn a_sink_is_exchanged_behind_the_gate() {
    run(1, async |host| {
        let (live, disk) =
            start(&host, "element D (type held) element A (type store) Client -> D -> A").await;
        let inside = disk.send(Request::read(0, 1));
        settle().await;
        let changing = tokio::task::spawn_local({
            let live = live.clone();
            async move { reload(&live, "element D (type held) element B (type store) Client -> D -> B").await }
        });
        // The flush of what goes, while requests go on.
        until(|| held("D") == 2).await;
        HELD_BACK.with_borrow_mut(|all| all.get_mut("D").unwrap().remove(1)).send(()).unwrap();
        settle().await;
        let outside = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!(held("D"), 1, "the gate is closed");
        release("D");
        inside.await.unwrap().unwrap();
        // The flush behind the gate.
        until(|| held("D") == 1).await;
        release("D");
        let report = changing.await.unwrap().unwrap();
        assert!(report.diff.gate);
        settle().await;
        assert_eq!(held("D"), 1, "it enters the new graph");
        release("D");
        outside.await.unwrap().unwrap();
        assert_eq!(log(), ["open B red", "close A red"]);
        assert_eq!(live.reloads(), (1, 0));
        assert_eq!(live.pauses().0.iter().sum::<u64>(), 1);
    });
}

#[test]
fn what_does_not_end_in_time_is_listed_and_the_old_graph_goes_on() {
    run(1, async |host| {
        let (live, disk) = start(&host, "element D (type held) element F (type fanout) element A (type store) Client -> D -> F (F, a) -> A").await;
        let stuck = disk.send(Request::read(4096, 512));
        settle().await;
        let since = crate::rt::now();
        let error = reload(&live, "element D (type held) element F (type fanout) element A (type store) Client -> D -> F (F, b) -> A").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("Client: read of 512 at 4096, for 5.0s"), "{error}");
        assert!((crate::rt::now() - since).as_secs() < 6);
        let second = disk.send(Request::read(0, 1));
        settle().await;
        assert_eq!(held("D"), 2, "the gate is open again");
        release("D");
        release("D");
        stuck.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        assert_eq!(live.reloads(), (0, 1));
        assert!(log().is_empty());
        assert_eq!(live.spec().edges[2].from_port, "a");
    });
}

const FIVE: &str = "element A (type hop) (colour blue) element B (type worker) (colour blue) (rate 7)
    element C (type fanout) (colour blue) element D (type store) (colour blue) element E (type store) (colour blue)
    element G (type fanout) (rate 5)
    Client -> A -> B -> G (G, x) -> C (C, a) -> D (C, b) -> E";
const OLD: &str =
    "element A (type hop) element B (type worker) element C (type fanout) element D (type store)
    element Z (type store) element G (type fanout) Client -> A -> B -> G (G, x) -> C (C, a) -> D (C, z) -> Z";

/// Every call that a change makes fails or panics in turn: the old graph serves on, everything that was
/// done is undone, and the change works when it is made again.
#[test]
fn a_failure_at_every_step_undoes_all_steps_before() {
    let mut steps = Vec::new();
    run(1, async |host| {
        let (live, _disk) = start(&host, OLD).await;
        settle().await;
        log();
        reload(&live, FIVE).await.unwrap();
        settle().await;
        let all = log();
        steps = all
            .iter()
            .filter(|s| ["open", "take", "set"].iter().any(|c| s.starts_with(c)))
            .cloned()
            .collect();
    });
    assert_eq!(steps.len(), 4 + 5 + 1, "{steps:?}");
    for step in steps.iter().flat_map(|step| [step.clone(), format!("panic {step}")]) {
        run(1, async |host| {
            let (live, disk) = start(&host, OLD).await;
            settle().await;
            log();
            fail_at(&step);
            let before = live.disk().graph();
            let error = reload(&live, FIVE).await.unwrap_err();
            fail_at("");
            assert!(
                error.to_string().contains("of a test") || error.to_string().contains("panicked"),
                "{error}"
            );
            settle().await;
            let done = log();
            // Whatever was opened is closed again, whatever was set is set back, the work goes on.
            for line in
                done.iter().filter(|line| line.starts_with("open ") && **line != step.replace("panic ", ""))
            {
                let closed = line.replace("open", "close");
                assert!(done.contains(&closed), "{step}: {line} is not undone: {done:?}");
            }
            let count = |what: &str| done.iter().filter(|line| *line == what).count();
            assert_eq!(count("end B red"), 1, "{done:?}");
            assert_eq!(count("begin B red"), 1, "the work of its own has begun again: {done:?}");
            let node = before.node("G").unwrap();
            let rate = (&*before.nodes[node].element as &dyn Any).downcast_ref::<Thing>().unwrap();
            assert_eq!(rate.rate.load(Ordering::Relaxed), 1, "{step}");
            assert!(Arc::ptr_eq(&before, &live.disk().graph()));
            disk.write(0, b"x").await.unwrap();
            assert!(reload(&live, FIVE).await.is_ok(), "{step}");
            disk.write(0, b"x").await.unwrap();
            settle().await;
            assert!(log().contains(&"close Z red".to_owned()));
        });
    }
}

#[test]
fn what_cannot_be_built_leaves_everything_alone() {
    run(1, async |host| {
        let (live, disk) = start(&host, "element S (type store) Client -> S").await;
        let text = "element S (type store) element H (type hop) (colour unbuildable) Client -> H -> S";
        let error = reload(&live, text).await.unwrap_err();
        assert_eq!(error.to_string(), "H (test.mason:1:61): of a test");
        assert!(log().is_empty());
        disk.write(0, b"x").await.unwrap();
    });
}

#[test]
fn parameters_change_in_place_and_others_are_taken_over() {
    run(1, async |host| {
        let (live, _disk) =
            start(&host, "element H (type worker) element S (type store) Client -> H -> S").await;
        let before = live.disk().graph();
        let text = "element H (type worker) (rate 5) element S (type store) Client -> H -> S";
        let report = reload(&live, text).await.unwrap();
        assert_eq!(report.diff.fate("H"), Some(Fate::Set));
        assert!(!report.diff.gate);
        assert!(log().contains(&"set 5 H red".to_owned()));
        assert!(before.has(live.disk().graph().instances().find(|i| i.name == "H").unwrap()));

        let text = "element H (type worker) (rate 5) (colour green) element S (type store) Client -> H -> S";
        let report = reload(&live, text).await.unwrap();
        assert_eq!(report.diff.fate("H"), Some(Fate::Rebuilt));
        settle().await;
        let done = log();
        let at =
            |line: &str| done.iter().position(|l| l == line).unwrap_or_else(|| panic!("{line}: {done:?}"));
        assert!(at("end H red") < at("take H green") && at("take H green") < at("open H green"));
        assert!(
            at("open H green") < at("close H red") && at("close H red") < at("begin H green"),
            "{done:?}"
        );
    });
}

#[test]
fn a_handler_named_as_a_parameter_is_the_parameter() {
    run(1, async |host| {
        let file = "element H (type hop) element S (type store) Client -> H -> S";
        let (live, _disk) = start(&host, file).await;
        live.set("H", "rate", "9").await.unwrap();
        assert!(live.set("H", "rate", "many").await.is_err());
        let text = crate::lang::print(&live.spec(), ALL, std::path::Path::new("/"));
        assert!(text.contains("(rate 9)"), "{text}");
        let report = reload(&live, file).await.unwrap();
        assert_eq!(
            report.diff.to_string(),
            "~ H (hop) changed in place; rate: 9 -> 1\n  2 kept\nwithout a pause\n"
        );
    });
}

#[test]
fn work_of_its_own_begins_when_the_old_graph_is_empty() {
    run(1, async |host| {
        let old = "element W (type worker) (colour slow) element S (type store) Client -> W -> S";
        let (live, _disk) = start(&host, old).await;
        settle().await;
        assert_eq!(log(), ["begin W slow"]);
        let report = reload(&live, "element W (type worker) (colour slow) element H (type hop) element S (type store) Client -> H -> W -> S").await.unwrap();
        assert!(!report.diff.gate);
        settle().await;
        assert_eq!(log(), ["open H red", "end W slow", "begin W slow"]);
        // Twice in a row, and the second change must not find two of them at work.
        let (a, b) = (live.clone(), live.clone());
        let first = tokio::task::spawn_local(async move { reload(&a, old).await });
        let last = tokio::task::spawn_local(async move {
            reload(&b, "element W (type worker) (colour slow) element R (type hop) element S (type store) Client -> R -> W -> S").await
        });
        first.await.unwrap().unwrap();
        last.await.unwrap().unwrap();
        settle().await;
        let done = log();
        let steps: Vec<_> =
            done.iter().filter(|l| l.contains(" W ")).map(|l| l.split(' ').next().unwrap()).collect();
        assert_eq!(steps, ["end", "begin", "end", "begin"], "{done:?}");
    });
}

#[test]
fn stopping_ends_everything_once() {
    run(1, async |host| {
        let (live, disk) =
            start(&host, "element W (type worker) element S (type store) Client -> W -> S").await;
        disk.write(0, b"x").await.unwrap();
        live.stop().await.unwrap();
        assert_eq!(log(), ["begin W red", "end W red", "close W red", "close S red"]);
        let error = reload(&live, "element S (type store) Client -> S").await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable);
    });
}

/// Small random graphs: a chain of hops, workers and fanouts down to stores.
fn graphs() -> impl Strategy<Value = String> {
    let link = (0..3usize, 0..4u8, 0..2u8, 0..2u8);
    (proptest::collection::vec(link, 0..5), 0..2u8).prop_map(|(links, colour)| {
        let mut text = format!("element S (type store) (colour c{colour})\n");
        let mut names = Vec::new();
        for (ty, name, rate, colour) in links {
            let name = format!("{}{name}", ["H", "W", "F"][ty]);
            if !names.contains(&name) {
                text += &format!(
                    "element {name} (type {}) (rate {rate}) (colour c{colour})\n",
                    ["hop", "worker", "fanout"][ty]
                );
                names.push(name);
            }
        }
        let mut above = "Client".to_owned();
        for name in names {
            text += &format!("{above} -> {name}\n");
            above = if name.starts_with('F') { format!("({name}, x)") } else { name };
        }
        text + &format!("{above} -> S\n")
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// What a dry run says of the way is the way that is gone; a change and the change back leave the
    /// graph as it was; and the difference between equal graphs is empty.
    #[test]
    fn the_difference_tells_the_truth(texts in proptest::collection::vec(graphs(), 2..5)) {
        run(1, async |host| {
            let (live, disk) = start(&host, &texts[0]).await;
            for text in texts.iter().chain([&texts[0]]) {
                let next = checked(ALL, &with_client(text)).unwrap();
                let diff = live.diff(&next);
                let before = live.disk().graph();
                let report = reload(&live, text).await.unwrap();
                assert_eq!(report.diff, diff);
                assert!(live.diff(&next).is_empty());
                if !diff.is_empty() {
                    let way = crate::sched::way(&before, &live.disk().graph());
                    assert_eq!(way == Handover::Gate, diff.gate, "{diff}");
                }
                for element in &diff.elements {
                    let stays = matches!(element.fate, Fate::Kept | Fate::Set);
                    let now = live.disk().graph();
                    let same = now.instances().any(|i| i.name == element.name && before.has(i));
                    assert_eq!(stays, same, "{diff}");
                }
                disk.write(0, b"x").await.unwrap();
            }
            settle().await;
            let opened = LOG.with_borrow(|log| log.iter().filter(|l| l.starts_with("open")).count());
            let closed = LOG.with_borrow(|log| log.iter().filter(|l| l.starts_with("close")).count());
            let started = checked(ALL, &with_client(&texts[0])).unwrap().elements.len() - 1;
            assert_eq!(opened, closed, "{started}: {:?}", LOG.take());
        });
    }
}

#[test]
fn differences_in_words() {
    let spec = |text: &str| checked(ALL, &with_client(text)).unwrap();
    let before = spec(
        "element A (type store) element B (type store) element F (type fanout) Client -> F (F, a) -> A (F, b) -> B",
    );
    let next = spec("element B (type store) (size 128k) element A (type store) element F (type fanout) element H (type hop)
        Client -> H -> F (F, b) -> B (F, a) -> A");
    let words = "! B (store) rebuilt; size: 64k -> 128k\n+ H (hop)\n- Client -> F\n+ Client -> H\n+ H -> F\n\
        ! F: its edges in another order\n  3 kept\nrequests wait at a gate while it changes\n";
    assert_eq!(Diff::between(&before, &next, ALL).to_string(), words);
}

#[test]
fn a_graph_that_stands_by_opens_nothing_but_its_sources_until_it_is_activated() {
    const GRAPH: &str =
        "element Client (type waiter) element W (type worker) element S (type store) Client -> W -> S";
    let setup = |host: &Arc<Host>| Setup {
        catalogue: ALL,
        name: "test".to_owned(),
        state_dir: host.state_dir().to_owned(),
    };
    let stand_by =
        async |host: &Arc<Host>| Live::stand_by(host, setup(host), checked(ALL, GRAPH)?, Heads::Verify).await;
    run(1, async |host| {
        fail_at("open Client red");
        assert!(stand_by(&host).await.is_err());
        assert_eq!(log(), ["open Client red"]);
        fail_at("");

        let live = stand_by(&host).await.unwrap();
        let disk = TestDisk::connect(live.disk().clone());
        assert!(live.stands_by());
        assert_eq!(disk.size(), 65536);
        let mut waiting = disk.send(Request::read(0, 512));
        settle().await;
        assert_eq!(log(), ["open Client red"]);
        assert!(waiting.try_recv().is_err(), "it waits");
        let error = reload(&live, FIVE).await.unwrap_err();
        assert!(error.to_string().contains("`mason activate test`"), "{error}");
        assert_eq!(live.call("W", "anything", "").unwrap_err().kind(), Kind::Unavailable);
        assert_eq!(live.depart().err().unwrap().kind(), Kind::Unavailable);
        assert!(log().is_empty());

        assert!(live.activate().await.unwrap());
        let mut opened = log();
        opened.retain(|line| line.starts_with("open"));
        opened.sort();
        assert_eq!(opened, ["open S red", "open W red"]);
        waiting.await.unwrap().unwrap();
        assert!(!live.stands_by());
        assert!(!live.activate().await.unwrap());
        disk.write(0, b"x").await.unwrap();
        assert!(reload(&live, FIVE).await.is_ok());
    });
    for step in ["open W red", "open S red", "panic open S red"] {
        run(2, async |host| {
            let live = stand_by(&host).await.unwrap();
            let disk = TestDisk::connect(live.disk().clone());
            let mut waiting = disk.send(Request::read(0, 512));
            log();
            fail_at(step);
            assert!(live.activate().await.is_err());
            fail_at("");
            settle().await;
            let done = log();
            for line in done.iter().filter(|line| line.starts_with("open") && !step.ends_with(*line)) {
                assert!(done.contains(&line.replace("open", "close")), "{step}: {done:?}");
            }
            assert!(live.stands_by() && waiting.try_recv().is_err(), "{step}: {done:?}");
            assert!(live.activate().await.unwrap());
            waiting.await.unwrap().unwrap();
            live.stop().await.unwrap();
        });
    }
    run(3, async |host| {
        let live = stand_by(&host).await.unwrap();
        let disk = TestDisk::connect(live.disk().clone());
        let waiting = disk.send(Request::read(0, 512));
        settle().await;
        log();
        live.stop().await.unwrap();
        assert_eq!(log(), ["close Client red"], "what was not opened is not closed");
        drop(disk);
        assert!(waiting.await.is_err() && live.activate().await.is_err());
    });
}
