//! The daemon dies at each step of a move, by strace, and at any instant under load. The next start serves without
//! being asked, with everything that was acknowledged, and the move ends.

use crate::migrate::{GRAPH, SIZE, TO};
use crate::{Site, read_log, run_logged};
use blockmason_tests::control::command;
use blockmason_tests::ledger::{Guests, Ledger};
use blockmason_tests::mason::{Mason, now, pause, until};
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// What a move leaves on disk comes by these.
const STEPS: [&str; 6] = ["rename", "fsync", "unlink", "openat", "unlinkat", "mkdir"];

/// More steps than any part of a move has.
const MOST: u32 = 200;

/// Kills a process when one of its threads makes a call for the given time, before it does anything; or does something
/// else to it.
pub(crate) struct Tracer(Child);

impl Tracer {
    fn attach(daemon: &Mason, step: &str, call: u32, site: &Site) -> Tracer {
        Tracer::inject(daemon, step, &format!("signal=KILL:when={call}"), site)
    }

    /// Does something to calls of a process.
    pub(crate) fn inject(daemon: &Mason, step: &str, what: &str, site: &Site) -> Tracer {
        let pid = daemon.pid().to_string();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-p", &pid, "-o", "/dev/null", "-e", &format!("trace={step}"), "-e"]);
        strace.arg(format!("inject={step}:{what}"));
        strace.stdin(Stdio::null()).stderr(File::create(site.path("strace.log")).unwrap());
        let strace = strace.spawn().unwrap_or_else(|error| panic!("strace: {error}: tests/run installs it"));
        until("strace has attached", || all_traced(daemon.pid()));
        Tracer(strace)
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // The daemon is let go, or is rid of its last threads. Asked politely, strace may wait for one of these.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn all_traced(pid: u32) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.filter_map(Result::ok).all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        // The kernel's own workers make no calls, and nobody follows those that come later.
        status.starts_with("Name:\tiou-wrk-") || !status.contains("TracerPid:\t0\n")
    })
}

/// A daemon, and what its guests know of the disk.
struct Run {
    site: Site,
    ledgers: Vec<Ledger>,
}

impl Run {
    fn new(seed: u64) -> Run {
        let site = Site::new();
        site.write("vm.mason", GRAPH);
        Run { site, ledgers: Ledger::shares(2, SIZE, seed) }
    }

    fn work(&mut self, daemon: &Mason) -> Guests {
        Guests::start(daemon.socket(), std::mem::take(&mut self.ledgers))
    }

    /// A command whose daemon may die amid it.
    fn ask(&self, args: &[&str]) {
        let _ = self.site.mason(args);
    }

    /// At most one of the disks says that it may be served by anybody.
    #[track_caller]
    fn one_is_the_disk(&self, told: &str) {
        let (old, new) = (self.site.head("a.img"), self.site.head("b.img"));
        assert!(old != "moved" || ["active", "moving"].contains(&&*new), "{told}: neither: {old}, {new}");
        let served = |head: &str| head == "none" || head == "active";
        let both = served(&old) && new == "active";
        assert!(!both, "{told}: both: {old}, {new}");
    }

    /// Starts again: everything is there, and the move ends.
    fn recovers(&mut self, told: &str) -> Outcome {
        self.one_is_the_disk(told);
        let began = self.site.path("state/mason/moving").exists() && has_record(&self.site);
        // Guests may have gone on with the new disk alone.
        let had_moved = ["active", "moving"].contains(&&*self.site.head("b.img"));
        let daemon = run_logged(&self.site, &["vm.mason"]);
        let log = read_log(&self.site);
        assert!(!began || log.contains("A is ") || log.contains("A has moved"), "{told}: {log}");
        self.ledgers.iter_mut().for_each(|ledger| ledger.verify(daemon.socket()));
        until(&format!("{told}: the move ends"), || self.is_over());
        self.one_is_the_disk(told);
        self.ledgers.iter_mut().for_each(|ledger| ledger.verify(daemon.socket()));
        self.site.has_no_move();
        daemon.stop_well();
        match self.site.head("b.img").as_str() {
            "active" => {
                if !had_moved {
                    self.site.are_same("a.img", "b.img");
                }
                Outcome::Moved
            }
            _ => Outcome::Stayed,
        }
    }

    /// Whether the move has ended. One that waits for an operator is told to.
    fn is_over(&self) -> bool {
        let moves = self.site.moves();
        if moves.iter().any(|one| one["state"] == "ready") {
            self.site.mason(&["migrate", "cutover"]).done();
        }
        if moves.iter().any(|one| one["state"] == "mirroring") {
            self.site.mason(&["migrate", "abort"]).done();
        }
        moves.iter().all(|one| ["done", "aborted"].contains(&one["state"].as_str().unwrap()))
    }
}

#[derive(Debug, PartialEq)]
enum Outcome {
    Moved,
    Stayed,
}

/// True if a record of a move is there.
fn has_record(site: &Site) -> bool {
    let folders = std::fs::read_dir(site.path("state/mason/moving")).unwrap();
    folders.filter_map(Result::ok).any(|folder| folder.path().join("A/move.json").exists())
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// Kills the daemon at each call of `last`, which follows `before`, until there is no more of them. Returns how many
/// there were.
fn each_step(before: &[&[&str]], last: &[&str]) -> u32 {
    STEPS
        .iter()
        .map(|step| (1..MOST).take_while(|call| is_killed(before, last, step, *call)).count() as u32)
        .sum()
}

/// False if `last` was over before that.
fn is_killed(before: &[&[&str]], last: &[&str], step: &str, call: u32) -> bool {
    let told = format!("{last:?}, killed at {step} {call}");
    let mut run = Run::new(u64::from(call));
    let daemon = run_logged(&run.site, &["vm.mason"]);
    let guests = run.work(&daemon);
    guests.go_on(30);
    before.iter().for_each(|args| drop(run.site.mason(args).done()));
    let tracer = Tracer::attach(&daemon, step, call, &run.site);
    run.ask(last);
    let killed = !is_alive(daemon.pid());
    drop(tracer);
    daemon.kill();
    run.ledgers = guests.part();
    let outcome = run.recovers(&told);
    eprintln!("{told}: {killed}, {outcome:?}");
    killed
}

const READY: &[&str] = &["migrate", "vm", "A", "--to", TO, "--cutover", "manual", "--until", "ready"];

#[test]
fn killed_at_each_step_of_the_start() {
    let steps = each_step(&[], &["migrate", "vm", "A", "--to", TO, "--until", "begun"]);
    eprintln!("start: {steps} steps");
    assert!(steps > 5);
}

#[test]
fn killed_at_each_step_of_the_cut_over() {
    let moved = each_step(&[READY], &["migrate", "cutover"]);
    eprintln!("cut-over: {moved} steps");
    assert!(moved > 5);
}

#[test]
fn killed_at_each_step_of_an_abort() {
    let steps = each_step(&[READY], &["migrate", "abort"]);
    eprintln!("abort: {steps} steps");
    assert!(steps > 5);
}

#[test]
fn killed_at_each_step_of_letting_go_of_a_mirror() {
    let mirror = ["migrate", "vm", "A", "--to", TO, "--keep-mirror"];
    let steps = each_step(&[&mirror], &["migrate", "abort"]);
    eprintln!("abort of a mirror: {steps} steps");
    assert!(steps > 5);
}

/// Random instants of moves under load.
pub(crate) fn killed_at_random(kills: u32, seed: u64) -> (usize, usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut moved, mut stayed) = (0, 0);
    for kill in 0..kills {
        let told = format!("seed {seed}, kill {kill}");
        let mut run = Run::new(rng.u64(..));
        let daemon = run_logged(&run.site, &["vm.mason"]);
        let guests = run.work(&daemon);
        guests.go_on(rng.u64(..100));
        let mut more = vec!["migrate", "vm", "A", "--to", TO, "--control", "c.sock"];
        if rng.bool() {
            more.push("--verify");
        }
        let mut tool = command(run.site.folder(), &more);
        let mut tool = tool.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // A whole move takes about half a second.
        pause(Duration::from_micros(rng.u64(..700_000)));
        daemon.kill();
        run.ledgers = guests.part();
        let since = now();
        while tool.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < Duration::from_secs(20), "{told}: the tool goes on without a daemon");
            pause(Duration::from_millis(2));
        }
        match run.recovers(&told) {
            Outcome::Moved => moved += 1,
            Outcome::Stayed => stayed += 1,
        }
    }
    (moved, stayed)
}

#[test]
fn killed_at_any_instant() {
    let outcomes = killed_at_random(20, 1);
    eprintln!("any instant: {outcomes:?} moved and stayed");
    assert!(outcomes.0 > 0, "{outcomes:?}");
}
