//! Mirrors under every mix of requests, and what happens on legs that are let go by hand.

mod silence;

use super::*;
use crate::route::testing::{every_op, tail_call};
use blockmason::data::Foreign;
use blockmason::describe::Catalogue;
use blockmason::live::Options;
use blockmason::testing::{CLIENT, TestDisk, checked, graph, live, play_against_model, run};
use blockmason::{Answer, Extent, ExtentState, Graph, Host, Kind, Until, rt};
use futures::FutureExt;
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::LazyLock;
use std::time::Duration;
use tokio::sync::oneshot;

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| {
    Box::leak([&CLIENT, &HAND, &BOOM, &TIED].into_iter().chain(crate::ALL.iter().copied()).collect())
});

/// What a leg holds, and the requests that it has and that wait to be let go.
#[derive(Default)]
struct World {
    bytes: BTreeMap<String, Vec<u8>>,
    parked: BTreeMap<String, VecDeque<(String, oneshot::Sender<bool>)>>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

fn bytes(leg: &str) -> Vec<u8> {
    WORLD.with_borrow(|world| world.bytes[leg].clone())
}

fn parked(leg: &str) -> Vec<String> {
    let names = |all: &VecDeque<(String, _)>| all.iter().map(|(what, _)| what.clone()).collect();
    WORLD.with_borrow(|world| world.parked.get(leg).map_or(Vec::new(), names))
}

/// Lets the first request in a leg go: it is done, or fails.
async fn release(leg: &str, well: bool) {
    let (_, go) = WORLD.with_borrow_mut(|world| world.parked.get_mut(leg).unwrap().pop_front().unwrap());
    go.send(well).unwrap();
    settle().await;
}

async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

blockmason::params! {
    /// Memory of which the test sees everything.
    struct Hand {
        size: Size = "256k",
        /// Requests wait for the test.
        parks: bool = "yes",
        fast_zero: bool = "yes",
        read_only: bool = "no",
        /// Zeros are never fast, whatever it says.
        refuses: bool = "no",
    }
}

const SINK: ElementType = ElementType { family: Family::Sink, ports: Ports::SINK, ..ElementType::BASE };

static HAND: ElementType = ElementType {
    name: "hand",
    params: Hand::PARAMS,
    check: Hand::check,
    build: |build: &Build<'_>| {
        let hand = build.read(Hand::from)?;
        let new = vec![0; hand.size.0 as usize];
        WORLD.with_borrow_mut(|world| world.bytes.insert(build.name.to_owned(), new));
        Ok(Arc::new(ByHand { name: build.name.to_owned(), hand }))
    },
    ..SINK
};

static BOOM: ElementType =
    ElementType { name: "boom", ports: Ports::THROUGH, build: |_| Ok(Arc::new(Boom)), ..ElementType::BASE };

/// Panics at writes.
struct Boom;

impl Element for Boom {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!(req.op != Op::Write, "of a test");
        cx.forward(0, req)
    }
}

/// Does a request to the bytes of a leg.
fn answer(leg: &str, req: &Request) -> Reply {
    let range = req.offset as usize..req.end() as usize;
    WORLD.with_borrow_mut(|world| {
        let bytes = world.bytes.get_mut(leg).unwrap();
        match req.op {
            Op::Read => return Ok(Answer::Data(Data::copy_of(&bytes[range]))),
            Op::Write => req.data.copy_to(&mut bytes[range]),
            Op::WriteZeroes => bytes[range].fill(0),
            Op::Discard => bytes[range].fill(0xdd),
            Op::Extents => {
                return Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }]));
            }
            Op::Flush | Op::Cache | Op::Control => {}
        }
        Ok(Answer::Done)
    })
}

struct ByHand {
    name: String,
    hand: Hand,
}

impl Element for ByHand {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        let ops = Ops { fast_zero: self.hand.fast_zero, ..Ops::ALL };
        Ok(Prepared::of(Geometry { ops, read_only: self.hand.read_only, ..Geometry::new(self.hand.size.0) }))
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        let ByHand { name, hand } = self;
        if hand.refuses && req.flags.has(Flags::FAST_ONLY) {
            return Flow::fail(Error::unsupported("of a test"));
        }
        if !hand.parks {
            return Flow::Now(answer(name, &req));
        }
        let (go, wait) = oneshot::channel();
        let what = format!("{} {}+{} {:?}", req.op, req.offset, req.len, req.flags);
        WORLD.with_borrow_mut(|world| world.parked.entry(name.clone()).or_default().push_back((what, go)));
        Flow::later(async move {
            match wait.await {
                Ok(true) => answer(name, &req),
                _ => Err(Error::new(Kind::Io, "of a test")),
            }
        })
    }
}

/// A tee, with its graph to look into.
struct Setup {
    disk: TestDisk,
    graph: Arc<Graph>,
}

impl Setup {
    async fn new(host: &Arc<Host>, text: &str) -> Setup {
        WORLD.take();
        let graph = graph(host, *CATALOGUE, text, "T").unwrap();
        Setup { disk: TestDisk::serve(host, graph.clone()).await, graph }
    }

    /// A primary that answers at once, and a leg `New` that is let go by hand, with a log of 64k granules on it.
    async fn by_hand(host: &Arc<Host>, parameters: &str) -> Setup {
        let text = format!(
            "element T (type tee) {parameters} element Old (type hand) (parks no)\n\
             element L (type log_dirty) (initially clean) element New (type hand)\n\
             (T, old) -> Old (T, new) -> L -> New"
        );
        Setup::new(host, &text).await
    }

    fn element(&self, name: &str) -> Arc<dyn Element> {
        self.graph.instances().find(|instance| instance.name == name).unwrap().element.clone()
    }

    fn get(&self, handler: &str) -> String {
        self.element("T").get(handler).unwrap()
    }

    fn map(&self) -> Arc<DirtyMap> {
        *self.element("L").provide("dirty_map").unwrap().downcast::<Arc<DirtyMap>>().unwrap()
    }

    fn is_settled(&self) -> bool {
        self.map().settled(0..u64::MAX).now_or_never().is_some()
    }

    /// What can be read behind a port of the tee.
    async fn behind(&self, host: &Host, port: usize) -> Vec<u8> {
        let node = self.graph.node("T").unwrap();
        let read = Request::read(0, self.disk.size());
        host.submit(&self.graph, node, port, read).await.unwrap().into_data().unwrap().to_vec()
    }

    /// Waits until no leg is behind.
    async fn quiet(&self) {
        while self.get("lag").split(", ").any(|leg| !leg.is_empty() && !leg.ends_with(" 0")) {
            rt::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn write(offset: u64, bytes: &[u8]) -> Request {
    Request::write(offset, Data::copy_of(bytes))
}

const MIRROR: &str = "element D (type delay) (all 1ms) (jitter 9ms) element M (type mem) (size 33001)\n\
    element E (type delay) (all 0s) (jitter 3ms) element N (type mem) (size 40000)\n\
    element F (type delay) (all 2ms) (jitter 30ms) element O (type mem) (size 33001)\n\
    (T, a) -> D -> M (T, b) -> E -> N (T, c) -> F -> O";

#[test]
fn all_legs_end_as_the_model_does() {
    let cases = ["", "(wait b) (required c)", "(primary b) (lag 64k)", "(primary c) (required a)"];
    for (seed, parameters) in cases.iter().cycle().take(12).enumerate() {
        run(seed as u64, async |host| {
            let text = MIRROR.replace("(size 40000)", "(size 33001)");
            let setup = Setup::new(&host, &format!("element T (type tee) {parameters} {text}")).await;
            play_against_model(&setup.disk, seed as u64, 200).await;
            setup.quiet().await;
            let legs =
                [setup.behind(&host, 0).await, setup.behind(&host, 1).await, setup.behind(&host, 2).await];
            assert!(legs[0] == legs[1] && legs[1] == legs[2], "seed {seed}, {parameters}");
            assert_eq!(setup.get("errors").matches(" 0").count(), 2);
        });
    }
}

/// Any request, often one that overlaps others that are on their way.
fn random_request(rng: &mut fastrand::Rng) -> Request {
    let (offset, len) = (rng.u64(0..300), rng.u64(1..200));
    let flags = if rng.bool() { Flags::FUA } else { Flags::NONE };
    match rng.u8(0..10) {
        0 => Request::new(Op::Read, offset, len),
        1 => Request::flush(),
        2 => Request::new(Op::Discard, offset, len),
        3 => Request::new(Op::WriteZeroes, offset, len).with(flags),
        4 => Request::new(Op::WriteZeroes, offset, len).with(Flags::FAST_ONLY),
        5 => Request::new(Op::Cache, offset, len),
        6 => Request::new(Op::Extents, offset, len),
        _ => write(offset, &vec![rng.u8(1..); len as usize]).with(flags),
    }
}

#[test]
fn all_legs_end_alike_with_many_requests_of_several_clients_at_once() {
    for seed in 0..30 {
        run(seed, async |host| {
            let parameters = ["", "(lag 256k)", "(wait b)"][seed as usize % 3];
            let setup = Setup::new(&host, &format!("element T (type tee) {parameters} {MIRROR}")).await;
            let other = TestDisk::connect(setup.disk.disk.clone());
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut replies = Vec::new();
            for _ in 0..150 {
                let disk = if rng.bool() { &setup.disk } else { &other };
                replies.push(disk.send(random_request(&mut rng)));
                if rng.u8(0..3) == 0 {
                    rt::sleep(Duration::from_millis(rng.u64(0..4))).await;
                }
            }
            for reply in replies {
                reply.await.unwrap().unwrap();
            }
            setup.quiet().await;
            let legs =
                [setup.behind(&host, 0).await, setup.behind(&host, 1).await, setup.behind(&host, 2).await];
            assert!(legs[0] == legs[1][..33001] && legs[0] == legs[2], "seed {seed}");
        });
    }
}

#[test]
fn guests_are_answered_by_the_primary_alone() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "").await;
        setup.disk.submit(write(0, b"abc").with(Flags::FUA)).await.unwrap();
        assert_eq!(setup.disk.read(0, 3).await.unwrap(), b"abc");
        // The leg's FUA would make nobody wait.
        assert_eq!(parked("New"), ["write 0+3 -"]);
        assert_eq!(setup.get("lag"), "new 128k", "the read waits for the write there");
        release("New", true).await;
        assert_eq!(parked("New"), ["read 0+3 -"]);
        release("New", true).await;
        assert_eq!((setup.get("lag"), bytes("New") == bytes("Old")), ("new 0".into(), true));
    });
}

#[test]
fn on_a_leg_later_requests_stay_behind_earlier_ones_that_they_overlap() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "").await;
        for (offset, bytes) in [(0, b"aaaa"), (2, b"bbbb"), (8, b"cccc")] {
            setup.disk.write(offset, bytes).await.unwrap();
        }
        setup.disk.op(Op::Flush, 0, 0).await.unwrap();
        setup.disk.write(20, b"dddd").await.unwrap();
        setup.disk.op(Op::Discard, 4, 2).await.unwrap();
        let first = ["write 0+4 -", "write 8+4 -", "write 20+4 -"];
        assert_eq!(parked("New"), first, "the flush comes after those before it and holds nobody");
        release("New", true).await;
        assert_eq!(parked("New"), ["write 8+4 -", "write 20+4 -", "write 2+4 -"]);
        release("New", true).await;
        release("New", true).await;
        release("New", true).await;
        assert_eq!(parked("New"), ["flush 0+0 -", "write_zeroes 4+2 may_unmap"]);
        release("New", true).await;
        release("New", true).await;
        assert_eq!(bytes("New"), bytes("Old"));
        assert!(bytes("New").starts_with(b"aabb\0\0\0\0cccc"));
    });
}

#[test]
fn a_control_request_keeps_its_place_on_every_leg() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "").await;
        setup.disk.write(0, b"a").await.unwrap();
        setup.disk.op(Op::Control, 0, 0).await.unwrap();
        setup.disk.write(1, b"b").await.unwrap();
        for expected in ["write 0+1 -", "control 0+0 -", "write 1+1 -"] {
            assert_eq!(parked("New"), [expected]);
            release("New", true).await;
        }
    });
}

#[test]
fn a_leg_that_is_too_far_behind_makes_guests_wait() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(lag 128k)").await;
        setup.disk.write(0, b"a").await.unwrap();
        setup.disk.write(1, b"b").await.unwrap();
        let mut third = setup.disk.send(write(2, b"c"));
        settle().await;
        assert!(third.try_recv().is_err() && setup.get("lag") == "new 128k");
        assert_eq!(bytes("Old")[..3], *b"ab\0", "nor is it sent anywhere");
        release("New", true).await;
        third.try_recv().unwrap().unwrap();
        assert_eq!(parked("New"), ["write 1+1 -", "write 2+1 -"]);
    });
}

#[test]
fn what_a_leg_misses_is_marked_also_if_something_older_ends_there_later() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(lag 128k) (behind skip) (log L)").await;
        let granule = 64 << 10;
        // The second one waits behind the first, and covers the granule that the third one changes.
        setup.disk.write(0, &vec![1; granule]).await.unwrap();
        setup.disk.write(0, &vec![2; granule]).await.unwrap();
        assert_eq!(parked("New").len(), 1);
        setup.disk.write(10, b"x").await.unwrap();
        setup.disk.write(100_000, b"y").await.unwrap();
        setup.disk.read(0, 1).await.unwrap();
        assert_eq!(setup.get("skipped"), "new 2");
        assert!(setup.map().is_dirty(10..11) && setup.map().is_dirty(100_000..100_001));
        release("New", true).await;
        release("New", true).await;
        assert!(parked("New").is_empty() && setup.is_settled());
        let dirty = setup.map().next_dirty(0..1 << 20);
        assert_eq!(dirty, Some(0..2 * granule as u64), "it has not got what came third and fourth");
        setup.disk.write(0, &vec![3; granule]).await.unwrap();
        release("New", true).await;
        assert_eq!(setup.map().next_dirty(0..1 << 20), Some(granule as u64..2 * granule as u64));
    });
}

#[test]
fn a_change_is_announced_until_its_last_leg_has_ended() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "(log L)").await;
        setup.disk.write(0, b"a").await.unwrap();
        assert!(!setup.is_settled(), "answered, and on its way");
        assert!(setup.map().settled(70_000..80_000).now_or_never().is_some());
        release("New", true).await;
        assert!(setup.is_settled() && setup.map().dirty_bytes() == 0);
    });
}

#[test]
fn what_the_primary_refuses_and_a_leg_takes_is_marked() {
    for parameters in ["(log L)", "(log L) (wait new)", "(log L) (required new)"] {
        run(1, async |host| {
            let text = format!(
                "element T (type tee) {parameters} element E (type error) (op write)\n\
                 element Old (type hand) (parks no) element L (type log_dirty) (initially clean)\n\
                 element New (type hand) (T, old) -> E -> Old (T, new) -> L -> New"
            );
            let setup = Setup::new(&host, &text).await;
            let reply = setup.disk.send(write(0, b"a"));
            settle().await;
            assert!(!setup.is_settled() && parked("New").len() == 1);
            release("New", true).await;
            assert!(reply.await.unwrap().unwrap_err().to_string().starts_with("E: write at 0"));
            assert!(setup.is_settled() && setup.map().is_dirty(0..1));
        });
    }
}

#[test]
fn errors_of_a_leg_are_counted_and_told_and_never_reach_the_guest() {
    for parameters in ["", "(wait new)"] {
        run(1, async |host| {
            let setup = Setup::by_hand(&host, parameters).await;
            let mut events = host.events().follow(0);
            for well in [false, false, true, false] {
                let reply = setup.disk.send(write(0, b"a"));
                settle().await;
                release("New", well).await;
                reply.await.unwrap().unwrap();
            }
            assert_eq!(setup.get("errors"), "new 3");
            let told: Vec<_> = events.take(10).events.iter().map(|event| event.message.clone()).collect();
            assert!(told.len() == 2 && told[0].contains("leg `new` fails"), "{told:?}");
            assert!(setup.map().is_dirty(0..1));
        });
    }
}

#[test]
fn a_required_leg_fails_the_request_and_one_that_is_waited_for_ends_before_it() {
    run(1, async |host| {
        for (parameters, fails) in [("(required new)", true), ("(wait new)", false)] {
            let setup = Setup::by_hand(&host, parameters).await;
            let mut reply = setup.disk.send(write(0, b"a").with(Flags::FUA));
            settle().await;
            assert!(reply.try_recv().is_err() && setup.get("lag").is_empty());
            assert_eq!(parked("New"), ["write 0+1 fua"]);
            release("New", false).await;
            assert_eq!(reply.await.unwrap().is_err(), fails);
        }
    });
}

#[test]
fn answers_are_those_of_the_primary_and_a_read_fills_only_its_memory() {
    run(1, async |host| {
        let text = "element T (type tee) (required b) element A (type mem) (size 64k) element B (type hand) (parks no)\n\
            (T, a) -> A (T, b) -> B";
        let setup = Setup::new(&host, text).await;
        WORLD.with_borrow_mut(|world| world.bytes.get_mut("B").unwrap().fill(7));
        assert_eq!(setup.disk.size(), 64 << 10);
        assert_eq!(setup.disk.read(0, 4).await.unwrap(), [0; 4]);
        assert_eq!(setup.disk.extents(0, 4).await.unwrap()[0].state, ExtentState::HOLE);
        // The memory of a guest, in which a leg would leave its own bytes.
        let (memory, owner) = foreign(&[9; 4]);
        let read = Request { data: memory, ..Request::read(0, 4) };
        let found = setup.disk.submit(read).await.unwrap().into_data().unwrap();
        assert_eq!(found.to_vec(), [0; 4]);
        // SAFETY: nobody else looks at it now.
        let left = unsafe { *owner.0.get() };
        assert!(left == [9; 4] || left == [0; 4], "{left:?}");
    });
}

/// Four bytes of a guest that it changes at any time.
struct Guest(std::cell::UnsafeCell<[u8; 4]>);

// SAFETY: each test has one thread.
unsafe impl Send for Guest {}
// SAFETY: as above.
unsafe impl Sync for Guest {}

fn foreign(bytes: &[u8; 4]) -> (Data, Arc<Guest>) {
    let guest = Arc::new(Guest(std::cell::UnsafeCell::new(*bytes)));
    let at = NonNull::new(guest.0.get().cast::<u8>()).unwrap();
    // SAFETY: the memory lives as long as its owner, and the tests keep no reference to it.
    (Data::foreign(unsafe { Foreign::new(&[(at, 4)], guest.clone()) }), guest)
}

#[test]
fn a_guest_that_changes_its_memory_meanwhile_cannot_make_legs_differ() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "").await;
        let (memory, guest) = foreign(b"good");
        setup.disk.submit(Request::write(0, memory)).await.unwrap();
        // SAFETY: nobody else looks at it now.
        unsafe { *guest.0.get() = *b"evil" };
        release("New", true).await;
        assert!(bytes("New") == bytes("Old") && bytes("New").starts_with(b"good"));
    });
}

#[test]
fn discards_become_zeros_where_all_legs_are_fast_and_else_nothing() {
    for (fast, left) in [("yes", [1, 0, 0, 1]), ("no", [1; 4])] {
        run(1, async |host| {
            let text = format!(
                "element T (type tee) (wait b) element A (type hand) (parks no)\n\
                 element B (type hand) (parks no) (fast_zero {fast}) (T, a) -> A (T, b) -> B"
            );
            let setup = Setup::new(&host, &text).await;
            setup.disk.write(0, &[1; 4]).await.unwrap();
            setup.disk.op(Op::Discard, 1, 2).await.unwrap();
            assert_eq!((&bytes("A")[..4], &bytes("B")[..4]), (&left[..], &left[..]));
            let zeroes = Request::new(Op::WriteZeroes, 0, 4).with(Flags::FAST_ONLY);
            let refused = setup.disk.submit(zeroes).await.is_err();
            assert_eq!((refused, bytes("A") == bytes("B")), (fast == "no", true));
        });
    }
}

#[test]
fn zeros_that_the_primary_refuses_reach_no_other_leg() {
    run(1, async |host| {
        let text = "element T (type tee) element A (type hand) (parks no) (refuses yes) element B (type hand)\n\
            (T, a) -> A (T, b) -> B";
        let setup = Setup::new(&host, text).await;
        let zeroes = Request::new(Op::WriteZeroes, 0, 4);
        let refused = setup.disk.submit(zeroes.clone().with(Flags::FAST_ONLY)).await.unwrap_err();
        assert_eq!((refused.kind(), parked("B").len()), (Kind::Unsupported, 0));
        setup.disk.submit(zeroes).await.unwrap();
        assert_eq!(parked("B"), ["write_zeroes 0+4 -"]);
    });
}

#[test]
fn a_leg_that_may_be_slower_to_write_zeros_is_not_asked_to_be_fast() {
    run(1, async |host| {
        let text = "element T (type tee) element A (type hand) (parks no) element B (type hand) (refuses yes)\n\
            (T, a) -> A (T, b) -> B";
        let setup = Setup::new(&host, text).await;
        setup.disk.submit(Request::new(Op::WriteZeroes, 0, 4).with(Flags::FAST_ONLY)).await.unwrap();
        assert_eq!(parked("B"), ["write_zeroes 0+4 -"]);
    });
}

#[test]
fn every_operation_passes_a_single_leg_as_it_is_in_a_tail_call() {
    let text = "element T (type tee) element E (type echo) (T, only) -> E";
    for req in every_op() {
        let wanted = format!("{} {}+{}", req.op, req.offset, req.len);
        assert_eq!(tail_call(text, "T", req), wanted);
    }
}

#[test]
fn legs_that_do_not_fit_are_refused() {
    let cases = [
        ("(primary odl)", "", "did you mean `old`?"),
        ("(wait elsewhere)", "", "its ports are `old`, `new`"),
        ("(required ne)", "", "`required` names `ne`"),
        ("", "(size 100k)", "port `new` leads to 102400 bytes, fewer than the 262144 of the primary"),
        ("(wait new)", "(read_only yes)", "port `new` leads to a read-only disk"),
    ];
    for (parameters, leg, says) in cases {
        run(1, async |host| {
            let text = format!(
                "element T (type tee) {parameters} element Old (type hand) element New (type hand) {leg}\n\
                 (T, old) -> Old (T, new) -> New"
            );
            let said = graph(&host, *CATALOGUE, &text, "T").map(drop).unwrap_err().to_string();
            assert!(said.contains(says), "{said}");
        });
    }
    let params = Params::parse("test", "(behind skip)", "/".as_ref()).unwrap();
    assert!((TYPE.check)(&params).unwrap_err()[0].message.contains("log"));
}

#[test]
fn a_larger_leg_and_a_slower_one_are_hidden_behind_the_primary() {
    run(1, async |host| {
        let text = "element T (type tee) element A (type mem) (size 64k) (lossy yes) element B (type mem) (size 1M)\n\
            (T, a) -> A (T, b) -> B";
        let geometry = |text: &str| {
            let graph = graph(&host, *CATALOGUE, text, "T").unwrap();
            graph.below(graph.node("Client").unwrap()).unwrap()
        };
        let found = geometry(text);
        assert_eq!((found.size, found.volatile, found.ops), (64 << 10, false, Ops::ALL));
        assert!(geometry(&text.replace("(type tee)", "(type tee) (wait b)")).volatile);
    });
}

#[test]
fn a_change_of_graph_waits_until_all_that_was_acknowledged_is_on_every_leg() {
    run(1, async |host| {
        let leg = "element New (type mem) (size 64k)";
        let before = format!(
            "element Client (type client) element T (type tee) element Old (type mem) (size 64k) {leg}\n\
             element D (type delay) (all 1s) Client -> T (T, old) -> Old (T, new) -> D -> New"
        );
        let (live, disk) = live(&host, *CATALOGUE, &before).await.unwrap();
        let since = rt::now();
        for (ix, bytes) in [b"abcd", b"efgh", b"ijkl"].iter().enumerate() {
            disk.write(ix as u64 * 2, *bytes).await.unwrap();
        }
        assert_eq!((rt::now() - since).as_millis(), 0);
        let next = checked(*CATALOGUE, &format!("element Client (type client) {leg} Client -> New")).unwrap();
        live.reload(next, &Options { heads: blockmason::live::Heads::Ignore, ..Options::default() })
            .await
            .unwrap();
        assert!(rt::now() - since >= Duration::from_secs(1));
        assert_eq!(disk.read(0, 8).await.unwrap(), b"abefijkl");
    });
}

#[test]
fn stopping_flushes_a_leg_that_nobody_waits_for() {
    run(1, async |host| {
        let setup = Setup::by_hand(&host, "").await;
        let disk = setup.disk.disk.clone();
        let stopped = tokio::task::spawn_local(async move { disk.stop().await });
        settle().await;
        assert_eq!(parked("New"), ["flush 0+0 -"]);
        assert!(!stopped.is_finished());
        release("New", true).await;
        stopped.await.unwrap().unwrap();
    });
}

#[test]
fn a_panic_in_a_leg_fails_the_graph_and_leaves_nothing_announced_and_nothing_too_clean() {
    for parameters in ["(log L)", "(log L) (wait new)"] {
        run(1, async |host| {
            let text = format!(
                "element T (type tee) {parameters} element Old (type hand) (parks no) element B (type boom)\n\
                 element L (type log_dirty) (initially clean) element New (type hand) (parks no)\n\
                 (T, old) -> Old (T, new) -> B -> L -> New"
            );
            let setup = Setup::new(&host, &text).await;
            // The primary's answer may be first.
            let _ = setup.disk.write(0, b"a").await;
            settle().await;
            assert!(setup.graph.is_failed() && setup.is_settled());
            assert!(setup.map().is_dirty(0..1), "nobody knows whether it has got there");
            assert!(setup.get("lag").is_empty() || setup.get("lag") == "new 0");
        });
    }
}

/// Sends a flush that depends on a write before that write, for every write.
struct Tied;

impl Element for Tied {
    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op != Op::Write {
            return cx.forward(0, req);
        }
        cx.later(&req.clone(), async move {
            let mut flush = Request::flush();
            cx.add_dependency(&mut flush, &mut req, Until::Completed)?;
            let (flushed, written) = futures::future::join(cx.forward(0, flush), cx.forward(0, req)).await;
            flushed.and(written)
        })
    }
}

static TIED: ElementType =
    ElementType { name: "tied", ports: Ports::THROUGH, build: |_| Ok(Arc::new(Tied)), ..ElementType::BASE };

#[test]
fn what_depends_on_another_request_takes_no_room_that_it_needs() {
    run(1, async |host| {
        WORLD.take();
        let text = "element X (type tied) element T (type tee) (lag 64k) element Old (type hand) (parks no)\n\
            element New (type hand) X -> T (T, old) -> Old (T, new) -> New";
        let disk = TestDisk::new(&host, *CATALOGUE, text, "X").await.unwrap();
        let reply = disk.send(write(0, b"a"));
        settle().await;
        assert_eq!(parked("New"), ["write 0+1 -"]);
        release("New", true).await;
        assert_eq!(parked("New"), ["flush 0+0 -"]);
        reply.await.unwrap().unwrap();
        release("New", true).await;
    });
}

#[test]
fn legs_below_a_write_ahead_log_end_alike() {
    for seed in 0..5 {
        run(seed, async |host| {
            let text = "element W (type wal) element L (type mem) (size 128k)\n\
                element T (type tee) (lag 64k) element M (type mem) (size 33001)\n\
                element D (type delay) (all 1ms) (jitter 5ms) element N (type mem) (size 33001)\n\
                (W, out) -> T (W, log) -> L (T, a) -> M (T, b) -> D -> N";
            let graph = graph(&host, *CATALOGUE, text, "W").unwrap();
            let setup = Setup { disk: TestDisk::serve(&host, graph.clone()).await, graph };
            let played = play_against_model(&setup.disk, seed, 150);
            rt::timeout(Duration::from_secs(600), played).await.expect("nobody waits for good");
            setup.element("W").call("checkpoint", "").unwrap();
            rt::sleep(Duration::from_secs(10)).await;
            setup.quiet().await;
            assert!(setup.behind(&host, 0).await == setup.behind(&host, 1).await, "seed {seed}");
        });
    }
}

/// Guests' flushes go to the old disk and not down the leg. Until one has, a loss of power may leave there what was
/// before, and on the leg what came after.
#[test]
fn the_map_takes_nothing_back_before_the_old_disk_has_been_flushed() {
    run(1, async |host| {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "element T (type tee) (primary old) (log D)\n\
             element F (type filter) (drop read flush)\n\
             element D (type log_dirty) (granule 4k) (file \"{}/map\")\n\
             element O (type mem) (size 64k) element N (type mem) (size 64k)\n\
             (T, old) -> O (T, new) -> F -> D -> N",
            folder.path().display()
        );
        let disk = TestDisk::new(&host, *CATALOGUE, &text, "T").await.unwrap();
        let graph = disk.disk.graph();
        let log = graph.instances().find(|instance| instance.name == "D").unwrap();
        let map = *log.element.provide("dirty_map").unwrap().downcast::<Arc<DirtyMap>>().unwrap();
        disk.write(0, &[1; 4096]).await.unwrap();
        settle().await;
        assert!(map.is_at_work() && map.resting(true).is_empty());
        disk.op(Op::Flush, 0, 0).await.unwrap();
        settle().await;
        assert_eq!(map.resting(true).len(), 1);
    });
}
