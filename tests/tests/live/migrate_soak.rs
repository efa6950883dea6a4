//! Moves without end, under load: `tests/long` runs it. The new disk is slow and fails at random; moves are given up,
//! the graph is changed, the daemon handed over and killed. After each round everything acknowledged is there, and
//! after a move without writes at its end both disks are the same.

use crate::migrate::{GRAPH, SIZE};
use crate::migrate_crash::killed_at_random;
use crate::{Site, run_logged};
use blockmason_tests::handover::{Heir, is_running};
use blockmason_tests::ledger::{Guests, Ledger};
use blockmason_tests::mason::{Mason, now, pause, until};
use std::path::PathBuf;
use std::time::Duration;

/// The disk moves from one to the other and back.
const IMAGES: [&str; 2] = ["a.img", "b.img"];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Who serves: the daemon that was started, or one that it was handed over to.
enum Server {
    First(Mason),
    Heir(Heir),
}

impl Server {
    fn die(self) {
        match self {
            Server::First(first) => first.kill(),
            Server::Heir(heir) => {
                let pid = heir.pid();
                drop(heir);
                until("the daemon is gone", || !is_running(pid));
            }
        }
    }
}

/// What has happened.
#[derive(Debug, Default)]
struct Counts {
    rounds: u64,
    moved: u64,
    compared: u64,
    given_up: u64,
    kills: u64,
    handovers: u64,
    inserts: u64,
    requests: u64,
}

struct Soak {
    server: Option<Server>,
    site: Site,
    ledgers: Vec<Ledger>,
    rng: fastrand::Rng,
    /// Which of the images is the disk.
    disk: usize,
    counts: Counts,
}

impl Soak {
    fn new(seed: u64) -> Soak {
        let site = Site::new();
        site.write("vm.mason", GRAPH);
        site.write("b.img", vec![0; SIZE as usize]);
        let server = Some(Server::First(run_logged(&site, &["vm.mason"])));
        let ledgers = Ledger::shares(3, SIZE, seed);
        Soak {
            server,
            site,
            ledgers,
            rng: fastrand::Rng::with_seed(seed),
            disk: 0,
            counts: Counts::default(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.site.path("vm.nbd")
    }

    /// The new disk, mostly on a way that is slow, and fails until the cut-over. Its elements stay, so no two rounds
    /// call them the same.
    fn target(&mut self, fails: bool) -> String {
        let image = IMAGES[1 - self.disk];
        if self.rng.u8(..3) == 0 {
            return format!("file (path {image})");
        }
        let (round, wait) = (self.counts.rounds, self.rng.u8(..4));
        let share = if fails { self.rng.u8(..4) } else { 0 };
        format!(
            "element D{round} (type delay) (write {wait}ms) (jitter 2ms)\n\
             element E{round} (type error) (op write write_zeroes discard) (probability {share}%)\n\
             element F{round} (type file) (path {image})\nD{round} -> E{round} -> F{round}"
        )
    }

    fn begin(&mut self, manual: bool) {
        let to = self.target(manual);
        let mut args = vec!["migrate", "vm", "A", "--to", &to, "--until", "begun"];
        if manual {
            args.extend(["--cutover", "manual"]);
        }
        if self.rng.u8(..3) == 0 {
            args.push("--verify");
        }
        if self.rng.bool() {
            args.extend(["--rate", "32M/s"]);
        }
        self.site.mason(&args).done();
    }

    /// Something happens amid the move, which may be over by then. Guests that lose the daemon are parted with.
    fn disturb(&mut self, guests: Guests) -> Guests {
        pause(Duration::from_micros(self.rng.u64(..300_000)));
        match self.rng.u8(..10) {
            0 => drop(self.site.mason(&["migrate", "abort", "vm", "A"])),
            1 | 2 => self.hand_over(),
            3 | 4 => {
                let probe = format!("P{} (type probe)", self.counts.rounds);
                let done = self.site.mason(&["insert", &probe, "between", "Guest", "and", "A_tee"]);
                self.counts.inserts += u64::from(done.code == Some(0));
            }
            5 | 6 => return self.kill(guests),
            _ => {}
        }
        guests
    }

    fn hand_over(&mut self) {
        let Some((heir, _)) = Heir::try_take_over(self.site.folder()) else { return };
        if let Some(Server::First(first)) = self.server.replace(Server::Heir(heir)) {
            assert!(first.ended_well(), "the daemon that was replaced");
        }
        self.counts.handovers += 1;
    }

    fn kill(&mut self, guests: Guests) -> Guests {
        self.server.take().into_iter().for_each(Server::die);
        self.counts.kills += 1;
        self.counts.requests += guests.requests();
        let mut ledgers = guests.part();
        self.server = Some(Server::First(run_logged(&self.site, &["vm.mason"])));
        ledgers.iter_mut().for_each(|ledger| ledger.verify(&self.socket()));
        Guests::start(&self.socket(), ledgers)
    }

    fn round(&mut self) {
        let manual = self.rng.bool();
        let mut guests = Guests::start(&self.socket(), std::mem::take(&mut self.ledgers));
        self.begin(manual);
        for _ in 0..self.rng.u8(..4) {
            guests = self.disturb(guests);
        }
        guests.go_on(self.rng.u64(..200));
        self.counts.requests += guests.requests();
        self.ledgers = guests.finish(&self.socket());
        until("the move ends", || self.is_over());
        self.ledgers.iter_mut().for_each(|ledger| ledger.verify(&self.site.path("vm.nbd")));
        self.conclude(manual);
        self.counts.rounds += 1;
    }

    /// Whether the move has ended. One that waits for an operator is told to.
    fn is_over(&self) -> bool {
        let moves = self.site.moves();
        if moves.iter().any(|one| one["state"] == "ready") {
            // There may be none; and the move may have begun to fail since.
            let error = format!("E{}.probability", self.counts.rounds);
            let _ = self.site.mason(&["set", &error, "0%"]);
            let _ = self.site.mason(&["migrate", "cutover"]);
        }
        moves.iter().all(|one| ["done", "aborted"].contains(&one["state"].as_str().unwrap()))
    }

    /// Which of the two is the disk now, and only that one; and what came amid the move goes.
    fn conclude(&mut self, quiet: bool) {
        let heads = IMAGES.map(|image| self.site.head(image));
        let (old, new) = (&heads[self.disk], &heads[1 - self.disk]);
        match (old.as_str(), new.as_str()) {
            ("moved", "active") => {
                self.disk = 1 - self.disk;
                self.counts.moved += 1;
                if quiet {
                    self.site.are_same(IMAGES[0], IMAGES[1]);
                    self.counts.compared += 1;
                }
            }
            ("none" | "active", "filling") => self.counts.given_up += 1,
            _ => panic!("the heads say {heads:?}"),
        }
        let _ = self.site.mason(&["remove", &format!("P{}", self.counts.rounds), "--save"]);
        self.site.has_no_record();
    }
}

#[test]
#[ignore = "takes minutes: tests/long runs it"]
fn moves_without_end() {
    let (seed, seconds) = (number("MIGRATE_SEED", 1), number("MIGRATE_SECONDS", 60));
    println!("migrate: seed {seed}");
    let (since, mut soak) = (now(), Soak::new(seed));
    while since.elapsed() < Duration::from_secs(seconds) {
        soak.round();
    }
    println!("migrate: {:?} in {seconds} s, seed {seed}", soak.counts);
    assert!(soak.counts.moved > 0);
}

#[test]
#[ignore = "takes minutes: tests/long runs it"]
fn kills_without_end() {
    let (seed, kills) = (number("MIGRATE_SEED", 1), number("MIGRATE_KILLS", 500));
    println!("migrate: seed {seed}");
    let (moved, stayed) = killed_at_random(kills as u32, seed);
    println!(
        "migrate: {kills} kills at random instants, seed {seed}: {moved} moved in the end, {stayed} had not begun"
    );
}
