//! Random stories: what is in the bucket after a crash is what the disk was at one instant, and everything acknowledged is there.

use super::*;
use crate::cloud::testing::Odds;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What was asked for, in order, and how far it is acknowledged.
#[derive(Default)]
struct Model {
    /// The disk after each change, and before all of them.
    states: Vec<Vec<u8>>,
    /// Changes up to here are acknowledged as durable, or the last before them that is.
    acknowledged: usize,
    /// States that a commit may end with: all, or those at flushes.
    ends: Vec<usize>,
}

impl Model {
    fn new(disk: Vec<u8>) -> Model {
        Model { states: vec![disk], acknowledged: 0, ends: vec![0] }
    }

    fn change(&mut self, range: std::ops::Range<u64>, byte: u8) -> usize {
        let mut next = self.states.last().unwrap().clone();
        next[range.start as usize..range.end as usize].fill(byte);
        self.states.push(next);
        self.states.len() - 1
    }

    /// # Panics
    /// The disk is nothing that it may be after a crash.
    fn verify(&self, disk: &[u8], what: &str) {
        let found = self.ends.iter().any(|end| *end >= self.acknowledged && self.states[*end] == disk);
        if !found {
            let last = self.states.last().unwrap();
            let differ = (0..disk.len())
                .filter(|at| disk[*at] != last[*at])
                .map(|at| (at as u64 / BLOCK, disk[at], last[at]));
            let differ: std::collections::BTreeSet<_> = differ.collect();
            eprintln!("block, found, last: {differ:?}");
            let states: Vec<_> = (0..self.states.len()).filter(|state| self.states[*state] == disk).collect();
            panic!(
                "{what}: it is the disk of {states:?}, acknowledged {}, ends {:?}",
                self.acknowledged, self.ends
            );
        }
    }
}

/// Plays one life on a runtime of its own, which ends it wherever it is.
fn live(memory: &Memory, rng: &mut fastrand::Rng, disk: Vec<u8>, write_back: bool, what: &str) -> Vec<u8> {
    let model = Rc::new(RefCell::new(Model::new(disk.clone())));
    let (steps, end) = (rng.u32(1..60), rng.u32(..3));
    let crashed = Rc::new(Cell::new(true));
    let local = tokio::task::LocalSet::new();
    let runtime = runtime();
    local.block_on(&runtime, async {
        let mut opening = opening("here");
        opening.idle = Duration::from_millis(rng.u64(..3) * 20);
        let volume = open(memory, opening).await.unwrap();
        assert_eq!(read_all(&volume).await, disk, "{what}: when it is opened");
        for _ in 0..steps {
            step(&volume, rng, &model, write_back).await;
            memory.land(rng.f64() * 0.3);
        }
        if end == 0 {
            open::close(&volume, Duration::from_secs(3600)).await.unwrap();
            let mut model = model.borrow_mut();
            (model.acknowledged, model.ends) = (model.states.len() - 1, vec![model.states.len() - 1]);
            crashed.set(false);
        }
    });
    drop((local, runtime));
    memory.land(rng.f64());
    // What the bucket holds is looked at in a copy, so that looking changes nothing.
    let found = self::runtime().block_on(async {
        let copy = memory.copy();
        let volume = open(&copy, opening("here")).await.unwrap();
        read_all(&volume).await
    });
    model.borrow().verify(&found, what);
    found
}

async fn step(volume: &Arc<Volume>, rng: &mut fastrand::Rng, model: &Rc<RefCell<Model>>, write_back: bool) {
    let start = rng.u64(..SIZE);
    let longest = if rng.u8(..3) == 0 { SIZE } else { BLOCK };
    let len = rng.u64(1..=(SIZE - start).min(longest));
    let byte = rng.u8(1..);
    let origin = if write_back { Origin::WriteBack } else { Origin::Guest };
    match rng.u8(..20) {
        0 => {
            let end = model.borrow().states.len() - 1;
            model.borrow_mut().ends.push(end);
            return volume.clone().settle().await.unwrap();
        }
        1..=3 => {
            let end = model.borrow().states.len() - 1;
            model.borrow_mut().ends.push(end);
            // What comes while it is under way is not part of what it stands for.
            volume.clone().serve(op(Op::Flush, 0, 0)).await.unwrap();
            let mut model = model.borrow_mut();
            model.acknowledged = model.acknowledged.max(end);
            return;
        }
        4..=6 => {
            let state = model.borrow().states.last().unwrap().clone();
            let read = volume.clone().serve(Request::read(start, len)).await;
            let read = read.unwrap().into_data().unwrap().to_vec();
            assert_eq!(read, state[start as usize..][..len as usize]);
            return;
        }
        _ => {}
    }
    let mut req = match rng.u8(..4) {
        0 => op(Op::WriteZeroes, start, len),
        1 => op(Op::Discard, start, len),
        _ => write(start, &vec![byte; len as usize], origin),
    };
    req.origin = origin;
    let value = if req.op == Op::Write { byte } else { 0 };
    let number = model.borrow_mut().change(start..start + len, value);
    if !write_back {
        model.borrow_mut().ends.push(number);
    }
    let (volume, model) = (volume.clone(), model.clone());
    let done = tokio::task::spawn_local(async move {
        volume.serve(req).await.unwrap();
        if !write_back {
            let mut model = model.borrow_mut();
            model.acknowledged = model.acknowledged.max(number);
        }
    });
    // It is taken before the next step; whether it is waited for, chance decides.
    tokio::task::yield_now().await;
    if rng.bool() {
        done.await.unwrap();
    }
}

fn tell(seed: u64, odds: Odds, write_back: bool) {
    // Pauses between attempts too.
    fastrand::seed(seed);
    let mut rng = fastrand::Rng::with_seed(seed);
    let memory = Memory::new(seed);
    runtime().block_on(create(&memory));
    let mut disk = vec![0; SIZE as usize];
    for life in 0..4 {
        memory.set_odds(odds);
        disk = live(&memory, &mut rng, disk, write_back, &format!("seed {seed}, life {life}"));
    }
}

/// Seeds of a test: `CLOUD_FIRST` and `CLOUD_SEEDS` name others.
fn seeds() -> std::ops::Range<u64> {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let first = number("CLOUD_FIRST", 0);
    first..first + number("CLOUD_SEEDS", 60)
}

#[test]
fn a_store_that_works() {
    seeds().for_each(|seed| tell(seed, Odds::default(), false));
}

#[test]
fn a_store_that_fails_loses_answers_and_is_late() {
    seeds().for_each(|seed| tell(seed, Odds { fails: 100, lost: 100, late: 100 }, false));
}

#[test]
fn a_cache_above_finds_the_disk_as_it_was_at_one_flush() {
    seeds().for_each(|seed| tell(seed, Odds { fails: 50, lost: 50, late: 50 }, true));
}

#[test]
fn nothing_is_left_behind_where_nothing_fails() {
    for seed in seeds() {
        let (memory, mut rng) = (Memory::new(seed), fastrand::Rng::with_seed(seed));
        runtime().block_on(create(&memory));
        runtime().block_on(async {
            let local = tokio::task::LocalSet::new();
            local
                .run_until(async {
                    let volume = open(&memory, opening("here")).await.unwrap();
                    let model = Rc::new(RefCell::new(Model::new(vec![0; SIZE as usize])));
                    for _ in 0..40 {
                        step(&volume, &mut rng, &model, false).await;
                    }
                    open::close(&volume, Duration::from_secs(60)).await.unwrap();
                    // The last block is shorter than the others.
                    let bytes = memory.stored("b/") + memory.stored("wal/");
                    assert!(
                        (bytes..bytes + BLOCK).contains(&volume.stored()),
                        "{bytes}, {}",
                        volume.stored()
                    );
                    let state = volume.state();
                    let present = state.map.versions(0..SIZE.div_ceil(BLOCK)).count() as u64;
                    let count = |prefix: &str| {
                        memory
                            .keys()
                            .iter()
                            .filter(|key| key.starts_with(&format!("some/disk/{prefix}")))
                            .count() as u64
                    };
                    let parts = u64::from(present > 0);
                    assert_eq!(
                        (count("b/"), count("part/"), count("map/"), count("wal/")),
                        (present, parts, 1, 0)
                    );
                })
                .await;
        });
    }
}
