//! A daemon that serves a disk in a bucket dies at any instant, under load, while its store fails, and while it starts. As
//! long as the SSD is there, everything that was acknowledged is. Without it the disk is what it was at one moment: with
//! all that was flushed before, where a flush waits for the bucket.

use crate::cloud::Cloud;
use blockmason_tests::control::command;
use blockmason_tests::history::{Found, History, Kept, look};
use blockmason_tests::ledger::Guests;
use blockmason_tests::mason::{Mason, pause};
use mason_bucket::{Action, Hold, Operation, Rule};
use std::process::Stdio;
use std::time::Duration;

/// Bytes that guests use; the disk is larger.
const USED: u64 = 12 << 20;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// What has happened.
#[derive(Debug, Default)]
struct Counts {
    requests: u64,
    /// Starts that were killed.
    starts: u64,
    /// Requests to the store that were spoilt, at the most.
    faults: u64,
    /// How often the SSD was lost with the daemon, and what was found then.
    ssds: u64,
    found: Found,
}

struct Run {
    cloud: Cloud,
    histories: Vec<History>,
    rng: fastrand::Rng,
    /// Requests that are on their way, some from daemons long dead.
    late: Vec<Hold>,
    /// Whether a flush waits for the bucket.
    remote: bool,
    counts: Counts,
}

impl Run {
    fn new(seed: u64) -> Run {
        let mut run = Run {
            cloud: Cloud::new("20M"),
            histories: History::shares(3, USED, seed),
            rng: fastrand::Rng::with_seed(seed),
            late: Vec::new(),
            remote: false,
            counts: Counts::default(),
        };
        run.choose_graph();
        run
    }

    /// What changes from one daemon to the next. Short times bring much to the bucket.
    fn choose_graph(&mut self) {
        self.remote = self.rng.bool();
        let durability = if self.remote { "remote" } else { "local" };
        let time = ["1ms", "30ms", "300ms", "5s"][self.rng.usize(..4)];
        // Of a new file; the small one is full all the time.
        let size = ["256M", "16M"][self.rng.usize(..2)];
        self.cloud.serve_with(&format!("(size {size}) (durability {durability}) (dirty_time {time})"));
    }

    /// Some requests to the store fail from now on. `late`: some stay on their way for longer than the daemon lives.
    fn spoil(&mut self, late: bool) {
        self.cloud.server.set_latency(Duration::from_millis(self.rng.u64(..8)));
        for _ in 0..self.rng.u8(..6) {
            let action = match self.rng.u8(..8) {
                0 => Action::ErrorAfter(500, "InternalError"),
                1 => Action::ErrorBefore(500, "InternalError"),
                2 => Action::SLOW_DOWN,
                3 => Action::CONFLICT,
                4 => Action::CloseBefore,
                5 => Action::CloseAfter,
                6 => Action::Delay(Duration::from_millis(self.rng.u64(..200))),
                _ if late => {
                    self.late.push(Hold::default());
                    Action::Hold(self.late.last().unwrap().clone())
                }
                _ => Action::CloseAfter,
            };
            let holds = matches!(action, Action::Hold(_));
            let (skip, times) = (self.rng.u64(..12), self.rng.u64(1..3));
            let rule = Rule::once(action).skip(skip).times(times);
            self.counts.faults += times;
            // Whatever is asked for, or what changes something.
            self.cloud.server.fault(match self.rng.u8(..4) {
                0 if !holds => rule,
                1 => rule.on(Operation::DeleteMany).skip(0),
                2 => rule.on(Operation::Put).prefix("vm1/wal/"),
                _ => rule.on(Operation::Put),
            });
        }
    }

    /// Some of what is on its way arrives.
    fn arrive(&mut self) {
        let rng = &mut self.rng;
        self.late.retain(|late| {
            let stays = rng.bool();
            if !stays {
                late.release();
            }
            stays
        });
    }

    /// The daemon dies under load.
    fn die(&mut self, daemon: Mason) {
        for history in &mut self.histories {
            history.flushes_count = self.remote || !self.cloud.has_ssd();
        }
        let guests = Guests::start(daemon.socket(), std::mem::take(&mut self.histories));
        guests.go_on(30);
        self.spoil(true);
        pause(Duration::from_millis(self.rng.u64(..200)));
        self.arrive();
        pause(Duration::from_millis(self.rng.u64(..100)));
        daemon.kill();
        self.cloud.server.clear_faults();
        self.counts.requests += guests.requests();
        self.histories = guests.part();
    }

    /// A daemon that dies while it starts.
    fn die_young(&mut self) {
        self.counts.starts += 1;
        let _ = std::fs::remove_file(self.cloud.site.path("c.sock"));
        let args = ["run", "cloud.mason", "--control", "c.sock"];
        let mut daemon = command(self.cloud.site.folder(), &args);
        let mut daemon = daemon.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        pause(Duration::from_millis(self.rng.u64(..400)));
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// The next daemon, which has what must be there.
    fn start(&mut self, told: &str) -> Mason {
        let file = self.cloud.site.path("vm1.cache");
        let had_ssd = self.cloud.has_ssd();
        let loses = had_ssd && self.rng.u8(..5) < 2;
        let kept = match (loses, self.remote) {
            (false, _) => Kept::Answered,
            (true, true) => Kept::Flushed,
            (true, false) => Kept::Nothing,
        };
        if loses {
            self.counts.ssds += 1;
            std::fs::remove_file(&file).unwrap();
            // Nobody goes on without it before somebody has said so.
            self.cloud.server.clear_faults();
            self.cloud.bucket("take", &[]).done();
        }
        if self.rng.u8(..3) == 0 {
            self.cloud.check(told);
        }
        self.choose_graph();
        if !file.exists() && self.rng.u8(..3) == 0 {
            self.cloud.without("Ssd");
        }
        // From here on nothing is lost that is in the bucket.
        let all_below = !file.exists();
        for _ in 0..self.rng.u8(..3) {
            self.spoil(false);
            self.die_young();
        }
        self.spoil(false);
        let daemon = self.cloud.run();
        self.cloud.server.clear_faults();
        self.arrive();
        let found = look(&mut self.histories, daemon.socket(), kept, told);
        if all_below {
            self.histories.iter_mut().for_each(History::forget);
        }
        if loses {
            self.counts.found.there += found.there;
            self.counts.found.lost += found.lost;
        }
        daemon
    }

    /// All of it is in the bucket in the end, whatever is still on its way.
    fn end(mut self, daemon: Mason) -> Counts {
        if self.cloud.has_ssd() {
            self.cloud.drain();
        }
        daemon.stop_well();
        self.late.drain(..).for_each(|late| late.release());
        self.cloud.check("the end");
        if self.cloud.has_ssd() {
            self.cloud.without("Ssd");
        }
        let daemon = self.cloud.run();
        look(&mut self.histories, daemon.socket(), Kept::Answered, "the end");
        daemon.stop_well();
        self.counts
    }
}

#[test]
fn killed_at_any_instant() {
    let (seed, rounds) = (number("CLOUD_SEED", 1), number("CLOUD_KILLS", 8));
    let mut run = Run::new(seed);
    let mut daemon = run.cloud.run();
    for round in 0..rounds {
        let told = format!("seed {seed}, round {round}");
        run.die(daemon);
        daemon = run.start(&told);
    }
    let Counts { requests, starts, faults, ssds, found: Found { there, lost } } = run.end(daemon);
    println!(
        "cloud: {rounds} kills and {starts} of starts, {requests} requests, {faults} faults of the store; {ssds} times \
         without the SSD, with {there} changes there and {lost} lost, seed {seed}"
    );
    assert!(requests > rounds * 30);
    // Otherwise it would prove little.
    assert!(rounds < 8 || (there > 0 && lost > 0));
}
