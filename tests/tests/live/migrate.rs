//! A disk that moves under a guest: what `mason migrate` leaves behind when all goes well, and what the tests of
//! everything else share.

use crate::crashes::refused;
use crate::{Site, read_log, run_logged};
use blockmason_tests::control::{Ended, command};
use blockmason_tests::ledger::{Guests, Ledger};
use blockmason_tests::mason::{Mason, until};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Bytes of the disks.
pub(crate) const SIZE: u64 = 16 << 20;

/// A disk as a guest sees it.
pub(crate) const GRAPH: &str = "element Guest (type nbd) (listen unix:vm.nbd)
element A (type file) (path a.img) (size 16M)
Guest -> A
";

/// Where it moves to in most tests.
pub(crate) const TO: &str = "file (path b.img)";

/// A daemon with a disk, whose guests work all along.
pub(crate) struct World {
    guests: Option<Guests>,
    pub(crate) daemon: Mason,
    pub(crate) site: Site,
}

impl World {
    /// Of a graph whose export listens on `vm.nbd`.
    pub(crate) fn of(graph: &str) -> World {
        let site = Site::new();
        site.write("vm.mason", graph);
        let daemon = run_logged(&site, &["vm.mason"]);
        let guests = Guests::start(daemon.socket(), Ledger::shares(2, SIZE, 1));
        guests.go_on(50);
        World { site, daemon, guests: Some(guests) }
    }

    pub(crate) fn new() -> World {
        World::of(GRAPH)
    }

    /// `mason migrate vm A --to TO MORE`
    pub(crate) fn migrate(&self, to: &str, more: &[&str]) -> Ended {
        self.mason(&[&["migrate", "vm", "A", "--to", to], more].concat())
    }

    /// The same, as far as both disks are the same.
    pub(crate) fn make_ready(&self) {
        let said = self.migrate(TO, &["--cutover", "manual", "--until", "ready"]).done();
        assert!(said.contains("ready"), "{said}");
    }

    pub(crate) fn mason(&self, args: &[&str]) -> Ended {
        self.site.mason(args)
    }

    /// One that is not waited for.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = command(self.site.folder(), &[args, &["--control", "c.sock"]].concat());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Guests get on.
    pub(crate) fn go_on(&self) {
        self.guests.as_ref().unwrap().go_on(50);
    }

    /// Guests read what they have written, and no more is written.
    pub(crate) fn verify(&mut self) -> Vec<Ledger> {
        self.guests.take().unwrap().finish(self.daemon.socket())
    }

    /// Guests are answered, and the disk is where it was, with nothing of a move.
    #[track_caller]
    pub(crate) fn is_as_before(&mut self) {
        self.go_on();
        let ledgers = self.verify();
        assert_eq!(self.site.head("a.img"), "none");
        self.site.has_no_move();
        let graph = self.mason(&["show", "--graph", "vm"]).done();
        assert!(graph.contains("a.img)") && !graph.contains("A_"), "{graph}");
        self.guests = Some(Guests::start(self.daemon.socket(), ledgers));
    }

    /// Ends everything, and a plain start serves what guests have written.
    pub(crate) fn starts_anew(mut self) -> Site {
        let mut ledgers = self.verify();
        self.daemon.stop_well();
        let daemon = run_logged(&self.site, &["vm.mason"]);
        ledgers.iter_mut().for_each(|ledger| ledger.verify(daemon.socket()));
        daemon.stop_well();
        assert_eq!(read_log(&self.site), "");
        self.site
    }

    /// The daemon is killed and started again, and guests that know this go on.
    pub(crate) fn killed_and_started(self, ledgers: Vec<Ledger>) -> World {
        self.harmed_while_dead(ledgers, |_| {})
    }

    /// The same, and meanwhile something is done to its files.
    pub(crate) fn harmed_while_dead(self, mut ledgers: Vec<Ledger>, harm: impl FnOnce(&Site)) -> World {
        let World { guests, daemon, site } = self;
        daemon.kill();
        drop(guests);
        harm(&site);
        let daemon = run_logged(&site, &["vm.mason"]);
        ledgers.iter_mut().for_each(|ledger| ledger.verify(daemon.socket()));
        let guests = Some(Guests::start(daemon.socket(), ledgers));
        World { guests, daemon, site }
    }

    /// What `mason migrate status` says of A.
    pub(crate) fn status(&self) -> Value {
        self.site.moves().into_iter().find(|one| one["element"] == "A").unwrap_or(Value::Null)
    }

    pub(crate) fn until_state(&self, state: &str) {
        until(&format!("the move is {state}"), || self.status()["state"] == state);
    }
}

impl Site {
    /// What the head of an image says of a move.
    pub(crate) fn head(&self, image: &str) -> String {
        match std::fs::read(self.path(&format!("{image}.mason-head"))) {
            Ok(head) => {
                let head: Value = serde_json::from_slice(&head).unwrap();
                head["state"].as_str().unwrap_or("active").to_owned()
            }
            Err(_) => "none".to_owned(),
        }
    }

    /// Every move that the daemon knows.
    pub(crate) fn moves(&self) -> Vec<Value> {
        let said = self.mason(&["migrate", "status", "--json"]).done();
        serde_json::from_str(&said).unwrap()
    }

    /// No later process finds a move.
    #[track_caller]
    pub(crate) fn has_no_record(&self) {
        let left = files(self.path("state/mason/moving"));
        assert!(left.is_empty(), "{left:?}");
    }

    /// Nor that the graph is not the one in its file.
    #[track_caller]
    pub(crate) fn has_no_move(&self) {
        self.has_no_record();
        let left = files(self.path("state/mason/left"));
        assert!(left.is_empty(), "{left:?}");
    }

    #[track_caller]
    pub(crate) fn are_same(&self, one: &str, other: &str) {
        let (mut one, mut other) =
            (File::open(self.path(one)).unwrap(), File::open(self.path(other)).unwrap());
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        for at in 0..SIZE >> 20 {
            one.read_exact(&mut left).unwrap();
            other.read_exact(&mut right).unwrap();
            let differs = (0..2048).find(|ix| left[ix * 512..][..512] != right[ix * 512..][..512]);
            assert_eq!(differs, None, "the first sector that differs, after {at} MiB");
        }
    }
}

/// What is in a folder, which need not be there.
fn files(folder: PathBuf) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let names = entries.map(|entry| entry.unwrap().path());
    // A process that is killed while it writes a file leaves one that nobody reads.
    names.filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.')).collect()
}

#[test]
fn a_disk_moves_while_its_guest_uses_it() {
    let mut world = World::new();
    let said = world.migrate(TO, &["--verify"]).done();
    assert!(said.contains("vm A: done") && said.contains("b.img now"), "{said}");
    world.go_on();
    assert_eq!(
        (world.site.head("a.img"), world.site.head("b.img")),
        ("moved".to_owned(), "active".to_owned())
    );
    let text = std::fs::read_to_string(world.site.path("vm.mason")).unwrap();
    assert!(text.contains("b.img") && !text.contains("a.img"), "{text}");
    world.verify();
    world.site.has_no_move();
}

#[test]
fn both_disks_are_the_same_at_the_cut_over() {
    let mut world = World::new();
    world.make_ready();
    world.verify();
    world.mason(&["migrate", "cutover"]).done();
    world.site.are_same("a.img", "b.img");
    world.daemon.stop_well();
}

#[test]
fn the_disk_that_was_is_served_only_by_force() {
    let world = World::new();
    world.migrate(TO, &[]).done();
    let site = world.starts_anew();
    site.write("vm.mason", GRAPH);
    let said = refused(&site);
    assert!(said.contains("it has moved to") && said.contains("b.img"), "{said}");
    run_logged(&site, &["vm.mason", "--force"]).stop_well();
}

#[test]
fn a_disk_moves_there_and_back() {
    let world = World::new();
    world.migrate(TO, &[]).done();
    world.go_on();
    let said = world.migrate("file (path a.img)", &[]).done();
    assert!(said.contains("a.img now"), "{said}");
    world.go_on();
    assert_eq!(
        (world.site.head("a.img"), world.site.head("b.img")),
        ("active".to_owned(), "moved".to_owned())
    );
    world.starts_anew();
}
