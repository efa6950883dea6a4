//! The meter above a disk whose bill the test writes, on a clock that stands still until everything waits.

use super::*;
use crate::calendar::DAY;
use crate::cloud::counts::{Call, Counts, Sum};
use blockmason::describe::Catalogue;
use blockmason::events::Follower;
use blockmason::lang::value::Service;
use blockmason::live::Options;
use blockmason::testing::{TestDisk, live, play_against_model, run, set_wall_clock};
use blockmason::{Answer, Data, Geometry, Host, Live, Op, Ops, Prepared, Reply};
use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Weak;
use std::sync::atomic::AtomicU64;

/// A disk of which everything costs what the test says.
#[derive(Default)]
struct Shop {
    counts: Counts,
    stored: AtomicU64,
    rests: AtomicBool,
    book: Mutex<Weak<Book>>,
}

struct Sink(Arc<Shop>);

/// By their names.
static SHOPS: Mutex<BTreeMap<String, Arc<Shop>>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// That of the test of this thread.
    static SHOP: RefCell<Arc<Shop>> = RefCell::default();
}

fn shop() -> Arc<Shop> {
    SHOP.with_borrow(Arc::clone)
}

blockmason::params! {
    /// Which one it is.
    struct Which {
        /// Its name.
        name: String,
    }
}

impl Shop {
    /// So many dollars are spent, at five for a thousand puts.
    fn spend(&self, dollars: f64) {
        (0..(dollars * 200.0).round() as u64).for_each(|_| self.counts.add(Call::Put, 0));
    }
}

impl Metered for Shop {
    fn volume(&self) -> [u8; 16] {
        [1; 16]
    }

    fn take_unbilled(&self) -> Sum {
        self.counts.take_unbilled()
    }

    fn stored(&self) -> Option<u64> {
        Some(self.stored.load(Ordering::Relaxed))
    }

    fn rest(&self, rests: bool) {
        self.rests.store(rests, Ordering::Relaxed);
    }

    fn finish_in(&self, book: Weak<Book>) {
        *self.book.lock().unwrap() = book;
    }
}

impl Element for Sink {
    fn prepare(&self, _children: blockmason::Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(64 << 10) }))
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        Flow::Now(Ok(match req.op {
            Op::Read => Answer::Data(Data::zeros(req.len as usize)),
            _ => Answer::Done,
        }))
    }

    fn provide(&self, service: &str) -> Option<Box<dyn Any>> {
        (service == <dyn Metered>::NAME).then(|| Box::new(self.0.clone() as Arc<dyn Metered>) as Box<dyn Any>)
    }
}

static SHOP_TYPE: ElementType = ElementType {
    name: "shop",
    summary: "costs what a test says",
    family: Family::Sink,
    ports: Ports::SINK,
    provides: &["metered"],
    params: Which::PARAMS,
    check: Which::check,
    build: |build| Ok(Arc::new(Sink(SHOPS.lock().unwrap()[&build.read(Which::from)?.name].clone()))),
    ..ElementType::BASE
};

static CATALOGUE: Catalogue = &[&TYPE, &SHOP_TYPE, &blockmason::testing::CLIENT, &crate::sink::mem::TYPE];

/// Noon of 2026-11-30, the last day of its month, in seconds since 1970.
const NOON: u64 = 1_796_040_000;
const HALF_A_DAY: Duration = Duration::from_secs(DAY / 2);

fn text(folder: &Path, parameters: &str) -> String {
    format!(
        "element Client (type client)\n\
         element M (type meter) (of S) (ledger {folder}/ledger) (prices put=5) {parameters}\n\
         element S (type shop) (name {folder})\n\
         Client -> M -> S\n",
        folder = folder.display()
    )
}

/// A meter that is served, and what the test asks of it.
struct Rig {
    live: Arc<Live>,
    disk: TestDisk,
    events: Follower,
}

impl Rig {
    async fn new(host: &Arc<Host>, folder: &Path, parameters: &str) -> Rig {
        let events = host.events().follow(0);
        let (live, disk) = live(host, CATALOGUE, &text(folder, parameters)).await.unwrap();
        Rig { live, disk, events }
    }

    fn get(&self, handler: &str) -> String {
        self.live.get("M", handler).unwrap()
    }

    fn call(&self, handler: &str, argument: &str) -> String {
        self.live.call("M", handler, argument).unwrap()
    }

    /// Spends, and waits until it has been looked.
    async fn spend(&self, dollars: f64) {
        shop().spend(dollars);
        rt::sleep(Duration::from_millis(1001)).await;
    }

    /// What was told since the last time: step, `above` or `below`.
    fn told(&mut self) -> Vec<String> {
        let news = self.events.take(100).events;
        let news = news.iter().filter(|event| event.kind == EventKind::Threshold);
        news.map(|event| {
            format!("{} {} {}", event.fields["quantity"], event.fields["step"], event.fields["state"])
        })
        .collect()
    }

    fn write(&self) -> tokio::sync::oneshot::Receiver<Reply> {
        self.disk.send(Request::write(0, Data::zeros(4096)))
    }

    async fn stop(self) {
        self.live.stop().await.unwrap();
    }
}

/// A test whose day is 2026-11-30, noon.
fn story(body: impl AsyncFnOnce(Arc<Host>, &Path)) {
    let folder = tempfile::tempdir().unwrap();
    SHOP.set(Arc::default());
    SHOPS.lock().unwrap().insert(folder.path().display().to_string(), shop());
    run(1, async |host| {
        set_wall_clock(NOON);
        body(host, folder.path()).await;
    });
}

/// Lets everybody do what can be done without time.
async fn turn() {
    rt::sleep(Duration::from_millis(1)).await;
}

#[test]
fn steps_come_one_after_the_other_and_end_with_the_day() {
    story(async |host, folder| {
        let mut rig = Rig::new(&host, folder, "(day warn=1 stop_background=2 throttle=3 queue=4)").await;
        for (step, rests) in [("warn", false), ("stop_background", true), ("throttle", true), ("queue", true)]
        {
            rig.spend(0.99).await;
            assert_ne!(rig.get("state"), step);
            rig.spend(0.01).await;
            assert_eq!(
                (rig.get("state").as_str(), rig.told()),
                (step, vec![format!("dollars_day {step} above")])
            );
            assert_eq!(shop().rests.load(Ordering::Relaxed), rests);
        }
        assert_eq!(rig.get("spent_today"), "4.000000");
        rt::sleep(HALF_A_DAY).await;
        assert_eq!((rig.get("state").as_str(), shop().rests.load(Ordering::Relaxed)), ("within", false));
        let below =
            ["warn", "stop_background", "throttle", "queue"].map(|step| format!("dollars_day {step} below"));
        assert_eq!(rig.told(), below);
        assert_eq!((rig.get("spent_today"), rig.get("spent_month")), ("0.000000".into(), "0.000000".into()));
        rig.stop().await;
    });
}

#[test]
fn changes_wait_for_the_next_day_and_everything_else_passes() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(day queue=1)").await;
        rig.spend(1.0).await;
        let mut waits = Vec::new();
        for op in [Op::Discard, Op::WriteZeroes] {
            waits.push(rig.disk.send(Request::new(op, 0, 4096)));
        }
        waits.push(rig.write());
        rig.disk.read(0, 4096).await.unwrap();
        rig.disk.op(Op::Flush, 0, 0).await.unwrap();
        rt::sleep(HALF_A_DAY - Duration::from_secs(10)).await;
        assert_eq!(rig.get("waiting"), "3");
        assert!(waits.iter_mut().all(|wait| wait.try_recv().is_err()), "it is still today");
        rt::sleep(Duration::from_secs(11)).await;
        for wait in waits {
            wait.await.unwrap().unwrap();
        }
        assert_eq!(rig.get("waiting"), "0");
        rig.stop().await;
    });
}

#[test]
fn what_waits_passes_when_the_budget_is_raised_and_waits_again_when_that_is_used_up() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(month queue=1)").await;
        rig.spend(1.5).await;
        let wait = rig.write();
        turn().await;
        assert_eq!(rig.get("waiting"), "1");
        assert!(rig.call("raise", "month 1").contains("1 $ later until this month ends"));
        wait.await.unwrap().unwrap();
        rig.spend(0.5).await;
        let wait = rig.write();
        turn().await;
        assert_eq!((rig.get("waiting"), rig.get("state")), ("1".into(), "queue".into()));
        rig.call("raise", "month 2");
        wait.await.unwrap().unwrap();
        assert!(
            rig.call("bill", "").contains(r#""raised":{"day":0.0,"month":2.0}"#),
            "{}",
            rig.call("bill", "")
        );
        rig.call("raise", "month 0");
        assert_eq!(rig.get("state"), "queue");
        for wrong in ["", "month", "year 5", "day -1", "day five", "day inf"] {
            assert!(rig.live.call("M", "raise", wrong).is_err(), "{wrong}");
        }
        // December is another month.
        rig.call("raise", "month 100");
        rt::sleep(HALF_A_DAY).await;
        rig.spend(1.0).await;
        assert_eq!(rig.get("state"), "queue");
        rig.stop().await;
    });
}

#[test]
fn only_read_only_makes_errors() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(day queue=1 read_only=2)").await;
        rig.spend(1.0).await;
        let wait = rig.write();
        rig.spend(1.0).await;
        let error = wait.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), error.element()), (Kind::NoSpace, Some("M")), "{error}");
        assert_eq!(rig.disk.write(0, &[1; 512]).await.unwrap_err().kind(), Kind::NoSpace);
        rig.disk.read(0, 4096).await.unwrap();
        rig.disk.op(Op::Flush, 0, 0).await.unwrap();
        rt::sleep(HALF_A_DAY).await;
        rig.disk.write(0, &[1; 512]).await.unwrap();
        rig.stop().await;
    });
}

#[test]
fn throttled_requests_pass_at_their_rate_and_at_once_when_it_is_over() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(day throttle=1) (rate 4k/s)").await;
        rig.spend(1.0).await;
        let since = rt::now();
        for _ in 0..4 {
            rig.write().await.unwrap().unwrap();
        }
        let took = (rt::now() - since).as_millis();
        // A second's worth at once, and one request into debt.
        assert!((1990..=2010).contains(&took), "{took}");
        rig.disk.op(Op::Flush, 0, 0).await.unwrap();
        rig.live.set("M", "rate", "1k/s").await.unwrap();
        assert_eq!(rig.get("rate"), "1k/s");
        rig.write().await.unwrap().unwrap();
        let wait = rig.write();
        turn().await;
        assert_eq!(rig.get("waiting"), "1");
        rig.call("raise", "day 10");
        let since = rt::now();
        wait.await.unwrap().unwrap();
        assert_eq!(rt::now(), since);
        rig.stop().await;
    });
}

#[test]
fn what_waits_holds_up_neither_a_change_of_the_graph_nor_its_end() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(day queue=1)").await;
        rig.spend(1.0).await;
        let wait = rig.write();
        turn().await;
        let next =
            blockmason::testing::checked(CATALOGUE, &text(folder, "(day queue=1) (month warn=1)")).unwrap();
        rig.live.reload(next, &Options::default()).await.unwrap();
        wait.await.unwrap().unwrap();
        // The successor knows what was spent before.
        assert_eq!((rig.get("state").as_str(), rig.get("spent_today").as_str()), ("queue", "1.000000"));
        let wait = rig.write();
        turn().await;
        assert_eq!(rig.get("waiting"), "1");
        rig.stop().await;
        wait.await.unwrap().unwrap();
    });
}

#[test]
fn a_restart_knows_all_of_it_and_a_crash_all_but_the_last_seconds() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "(day queue=3)").await;
        rig.spend(2.0).await;
        rig.call("raise", "day 1");
        rig.stop().await;
        // What leaving the volume costs comes last.
        let rig = Rig::new(&host, folder, "(day queue=3)").await;
        assert_eq!(rig.get("spent_today"), "2.000000");
        rig.spend(1.0).await;
        assert_eq!(rig.get("state"), "within");
        rt::sleep(SOON).await;
        turn().await;
        rig.spend(0.5).await;
        // As a crash would leave it.
        let ledger = crate::cloud::ledger::read(&folder.join("ledger"), None).unwrap();
        assert_eq!(ledger["today"]["dollars"], 3.0);
        assert_eq!(rig.get("spent_today"), "3.500000");
        rig.spend(0.5).await;
        assert_eq!(rig.get("state"), "queue");
        rig.stop().await;
    });
}

#[test]
fn what_is_stored_is_paid_for_while_nothing_runs_too() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "").await;
        shop().stored.store(1_000_000_000_000, Ordering::Relaxed);
        turn().await;
        assert_eq!(rig.get("stored"), "1000000000000");
        rig.spend(0.0).await;
        rig.stop().await;
        rt::sleep(Duration::from_secs(10 * DAY)).await;
        let rig = Rig::new(&host, folder, "").await;
        // Half a day of November's thirty, nine and a half of December's 31.
        let spent: f64 = rig.get("spent_month").parse().unwrap();
        assert!((spent - 23.0 * 9.5 / 31.0).abs() < 0.001, "{spent}");
        let bill: serde_json::Value = serde_json::from_str(&rig.call("bill", "none,month=1")).unwrap();
        assert_eq!(bill["days"].as_array().unwrap().len(), 11);
        let day = &bill["days"][3];
        assert!((day["dollars"].as_f64().unwrap() - 1000.0 / 31.0).abs() < 0.001, "{day}");
        assert!(rig.live.call("M", "bill", "gold").is_err());
        rig.stop().await;
    });
}

#[test]
fn the_file_is_written_seldom_where_only_time_passes_and_never_both_halves() {
    story(async |host, folder| {
        let rig = Rig::new(&host, folder, "").await;
        let path = folder.join("ledger");
        let kept = std::fs::read(&path).unwrap();
        rt::sleep(SELDOM - LOOK).await;
        assert!(std::fs::read(&path).unwrap() == kept);
        rt::sleep(2 * LOOK).await;
        let now = std::fs::read(&path).unwrap();
        let differs: Vec<bool> =
            (0..2).map(|slot| kept[slot * 65536..][..65536] != now[slot * 65536..][..65536]).collect();
        assert_eq!(differs.iter().filter(|it| **it).count(), 1);
        rig.stop().await;
    });
}

#[test]
fn wrong_parameters_are_refused_with_a_sentence() {
    story(async |host, folder| {
        for (parameters, wanted) in [
            ("(day warn=3 warn=4)", "`warn` is there twice"),
            ("(month queue=3 warn=4)", "`warn=4` comes after `queue=3`, which includes it"),
            ("(day stop=3)", "stop"),
        ] {
            let error = live(&host, CATALOGUE, &text(folder, parameters)).await.err().unwrap();
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let text = text(folder, "")
            .replace("(of S)", "(of D)")
            .replace("element S", "element D (type mem) (size 1M) element S");
        let error = live(&host, CATALOGUE, &text).await.err().unwrap();
        assert!(error.to_string().contains("metered"), "{error}");
        std::fs::write(folder.join("ledger"), "my diary").unwrap();
        let error = live(&host, CATALOGUE, &self::text(folder, "")).await.err().unwrap();
        assert!(error.to_string().contains("not overwritten"), "{error}");
    });
}

#[test]
fn is_the_disk_below_it() {
    story(async |host, folder| {
        let text = text(folder, "(day throttle=0) (rate 100M/s)") + "element D (type mem) (size 70001)\n";
        let text = text.replace("Client -> M -> S", "Client -> M -> D");
        let (_live, disk) = live(&host, CATALOGUE, &text).await.unwrap();
        play_against_model(&disk, 3, 100).await;
    });
}
