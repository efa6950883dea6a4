//! A daemon that serves a volume dies at any instant, under load and amid snapshots. Everything that was acknowledged is
//! there when the next one starts, snapshots are for ever what they were, and the pool is sound.

use crate::Site;
use blockmason_tests::control::mason;
use blockmason_tests::ledger::{Guests, Ledger};
use blockmason_tests::mason::{Mason, pause};
use blockmason_tests::raw::Raw;
use std::collections::BTreeMap;
use std::time::Duration;

const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.nbd)\n\
                     element Disk (type parallax) (pool vms.pool) (volume vm)\n\
                     Guest -> Disk\n";

/// Bytes of the volume.
const SIZE: u64 = 16 << 20;

/// Snapshots that are kept at once, at most.
const MOST: usize = 5;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

struct Run {
    site: Site,
    ledgers: Vec<Ledger>,
    rng: fastrand::Rng,
    next: u32,
    /// Snapshots that were acknowledged, and what each has been read as.
    snapshots: BTreeMap<String, Option<Vec<u8>>>,
    /// A snapshot that was being taken, or deleted, when the daemon died: nobody knows.
    unknown: Vec<String>,
    answered: u64,
}

impl Run {
    fn new(seed: u64) -> Run {
        let site = Site::new();
        site.write("vm.mason", GRAPH);
        mason(site.folder(), &["pool", "create", "vms.pool", "--size", "256M"]).done();
        site.mason(&["volume", "create", "vms.pool", "vm", "--size", "16M"]).done();
        Run {
            site,
            ledgers: Ledger::shares(2, SIZE, seed),
            rng: fastrand::Rng::with_seed(seed),
            next: 0,
            snapshots: BTreeMap::new(),
            unknown: Vec::new(),
            answered: 0,
        }
    }

    /// A snapshot is taken, or one is deleted, while guests go on.
    fn step(&mut self) {
        if self.snapshots.len() >= MOST || !self.snapshots.is_empty() && self.rng.u8(..3) == 0 {
            let names: Vec<String> = self.snapshots.keys().cloned().collect();
            let name = names[self.rng.usize(..names.len())].clone();
            self.site.mason(&["volume", "delete", "vms.pool", &format!("vm@{name}")]).done();
            self.snapshots.remove(&name);
        } else {
            self.next += 1;
            let name = format!("s{}", self.next);
            self.site.mason(&["volume", "snapshot", "vms.pool", &format!("vm@{name}")]).done();
            self.snapshots.insert(name, None);
        }
    }

    /// The daemon dies under load, at any instant, half of the time amid a snapshot.
    fn die(&mut self, daemon: Mason) {
        let guests = Guests::start(daemon.socket(), std::mem::take(&mut self.ledgers));
        guests.go_on(20);
        (0..self.rng.u32(0..3)).for_each(|_| self.step());
        let wait = Duration::from_micros(self.rng.u64(..60_000));
        if self.rng.bool() {
            self.next += 1;
            let name = format!("s{}", self.next);
            let volume = format!("vm@{name}");
            let args = ["volume", "snapshot", "vms.pool", &volume, "--control", "c.sock"];
            let mut asked = blockmason_tests::control::command(self.site.folder(), &args);
            asked.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            let mut asked = asked.spawn().unwrap();
            pause(wait);
            daemon.kill();
            match asked.wait().unwrap().success() {
                true => drop(self.snapshots.insert(name, None)),
                false => self.unknown.push(name),
            }
        } else {
            pause(wait);
            daemon.kill();
        }
        self.answered += guests.requests();
        self.ledgers = guests.part();
    }

    /// Everything is there, and stays as it is.
    fn look(&mut self, daemon: &Mason, told: &str) {
        self.ledgers.iter_mut().for_each(|ledger| ledger.verify(daemon.socket()));
        let list = self.site.mason(&["volume", "list", "vms.pool"]).done();
        let has = |name: &str| list.split_whitespace().any(|word| word == format!("vm@{name}"));
        for name in self.unknown.drain(..).filter(|name| has(name)) {
            self.snapshots.insert(name, None);
        }
        let missing: Vec<_> = self.snapshots.keys().filter(|name| !has(name)).collect();
        assert!(missing.is_empty(), "{told}: {missing:?} are gone: {list}");
        for (name, contents) in &mut self.snapshots {
            let graph = GRAPH
                .replace("vm.nbd", "old.nbd")
                .replace("Guest", "OldGuest")
                .replace("Disk", "OldDisk")
                .replace("(volume vm)", &format!("(volume vm) (snapshot {name})"));
            self.site.write("old.mason", graph);
            self.site.mason(&["load", "old.mason"]).done();
            let mut raw = Raw::ready(&self.site.path("old.nbd"));
            let found: Vec<u8> = (0..SIZE).step_by(1 << 20).flat_map(|at| raw.read(at, 1 << 20)).collect();
            drop(raw);
            self.site.mason(&["unload", "old"]).done();
            let before = contents.get_or_insert_with(|| found.clone());
            let differs = before.chunks(4096).zip(found.chunks(4096)).position(|(one, other)| one != other);
            assert_eq!(differs, None, "{told}: snapshot {name} has changed at a block");
        }
        let said = self.site.mason(&["pool", "check", "vms.pool"]).done();
        assert!(said.contains("1 volumes"), "{told}: {said}");
    }
}

#[test]
fn killed_at_any_instant() {
    let (seed, rounds) = (number("PARALLAX_SEED", 1), number("PARALLAX_KILLS", 10));
    let mut run = Run::new(seed);
    let mut daemon = run.site.run(&["vm.mason"]);
    for round in 0..rounds {
        let told = format!("seed {seed}, round {round}");
        run.die(daemon);
        if round % 3 == 0 {
            // Nobody serves it: the same is done here, by whoever asks.
            let said = run.site.mason(&["pool", "check", "vms.pool"]).done();
            assert!(said.contains("1 volumes"), "{told}: {said}");
        }
        let _ = std::fs::remove_file(run.site.path("c.sock"));
        daemon = run.site.run(&["vm.mason"]);
        run.look(&daemon, &told);
    }
    daemon.stop_well();
    run.site.mason(&["pool", "check", "vms.pool"]).done();
    println!("parallax: {rounds} kills, {} requests, {} snapshots, seed {seed}", run.answered, run.next);
    assert!(run.answered > rounds * 20);
}
