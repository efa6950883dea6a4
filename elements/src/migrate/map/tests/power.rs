//! Power is lost at any moment, and of what was stored and not made durable any part is left: of the map's file by
//! sectors, of both disks by granules.

use super::super::format::{HEADER, this_boot};
use super::super::mapping::Mapping;
use super::super::store::{Durable, Store, get, put};
use super::*;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};

const GRANULE: u64 = 16;
const REGION: u64 = 2048;
const SIZE: u64 = 10_000;
/// Words of what a medium writes in one piece.
const SECTOR: usize = 64;

/// A map's file.
struct Medium {
    file: File,
    words: Mapping,
    past: Mutex<Past>,
    fails: AtomicBool,
}

/// What may be on the medium: what was made durable, and whatever was stored since.
#[derive(Clone, Default)]
struct Past {
    states: Vec<Vec<u64>>,
    /// The states just before something was made durable.
    moments: Vec<Vec<Vec<u64>>>,
}

impl Medium {
    fn new(layout: Layout) -> Arc<Medium> {
        let file: File = rustix::fs::memfd_create(c"medium", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(layout.len()).unwrap();
        let words = Mapping::new(&file, layout.len() as usize).unwrap();
        let (past, fails) = Default::default();
        let medium = Medium { file, words, past, fails };
        medium.look();
        Arc::new(medium)
    }

    fn now(&self) -> Vec<u64> {
        self.words.iter().map(get).collect()
    }

    fn look(&self) {
        let now = self.now();
        let mut past = self.past.lock().unwrap();
        if past.states.last() != Some(&now) {
            past.states.push(now);
        }
    }

    /// What may be left, by turns of what was stored when.
    fn remains(states: &[Vec<u64>], rng: &mut fastrand::Rng) -> Vec<u64> {
        let sectors = (0..states[0].len()).step_by(SECTOR);
        sectors.flat_map(|at| states[rng.usize(0..states.len())][at..at + SECTOR].to_vec()).collect()
    }
}

impl Durable for Medium {
    fn sync(&self) -> Result<()> {
        self.look();
        let now = self.now();
        let mut past = self.past.lock().unwrap();
        let before = past.states.clone();
        past.moments.push(before);
        if self.fails.load(Ordering::Relaxed) {
            return Err(Error::internal("the medium has failed"));
        }
        past.states = vec![now];
        Ok(())
    }

    fn head(&self, _bytes: &[u8; HEADER]) -> Result<()> {
        Ok(())
    }
}

fn store(layout: Layout, medium: &Arc<Medium>) -> Store {
    Store::new(layout, Mapping::new(&medium.file, layout.len() as usize).unwrap(), medium.clone())
}

/// An open map over an empty file.
fn over(layout: Layout, medium: &Arc<Medium>) -> Arc<DirtyMap> {
    let map = DirtyMap::new(GRANULE, false);
    assert!(map.known.set(Known { layout, bits: Bits::new(layout.granules(), false) }).is_ok());
    map.flights().regions.reset(layout.region, (0..layout.regions()).map(|_| false));
    assert!(map.store.set(store(layout, medium)).is_ok());
    Arc::new(map)
}

/// A number for each granule.
#[derive(Clone)]
struct Disk {
    now: Vec<u64>,
    durable: Vec<u64>,
}

impl Disk {
    fn new() -> Disk {
        let empty = vec![0; SIZE.div_ceil(GRANULE) as usize];
        Disk { now: empty.clone(), durable: empty }
    }

    fn write(&mut self, granules: &Range<u64>, number: u64) {
        self.now[granules.start as usize..granules.end as usize].fill(number);
    }

    fn flush(&mut self) {
        self.durable = self.now.clone();
    }

    fn remains(&self, rng: &mut fastrand::Rng) -> Vec<u64> {
        self.now
            .iter()
            .zip(&self.durable)
            .map(|(now, durable)| if rng.bool() { *now } else { *durable })
            .collect()
    }
}

/// A change on its way: what it has come to.
struct Way {
    intent: Intent,
    granules: Range<u64>,
    number: u64,
    steps: u8,
}

struct World {
    layout: Layout,
    medium: Arc<Medium>,
    map: Arc<DirtyMap>,
    rng: fastrand::Rng,
    /// The disk, and its copy.
    disks: [Disk; 2],
    ways: Vec<Way>,
    resting: Vec<Resting>,
    /// The disk when the backup began.
    frozen: Option<Vec<u64>>,
    number: u64,
}

impl World {
    fn new(seed: u64) -> World {
        let layout = Layout::with_regions(SIZE, GRANULE, REGION);
        let medium = Medium::new(layout);
        let (map, rng) = (over(layout, &medium), fastrand::Rng::with_seed(seed));
        let disks = [Disk::new(), Disk::new()];
        World { layout, medium, map, rng, disks, ways: vec![], resting: vec![], frozen: None, number: 0 }
    }

    async fn begin(&mut self) {
        let start = self.rng.u64(0..self.layout.granules());
        let end = (start + self.rng.u64(1..9)).min(self.layout.granules());
        if self.ways.iter().any(|way| overlap(&way.granules, &(start..end))) {
            return;
        }
        self.number += 1;
        let (number, granules) = (self.number, start..end);
        if let Ok(intent) = self.map.intend(start * GRANULE..end * GRANULE).await {
            self.ways.push(Way { intent, granules, number, steps: 0 });
        }
    }

    /// A step of a mirror's change: it comes to one disk, then to the other, and ends.
    fn mirror(&mut self) {
        if self.ways.is_empty() {
            return;
        }
        let ix = self.rng.usize(0..self.ways.len());
        let way = &mut self.ways[ix];
        way.steps += 1;
        match way.steps {
            1 | 2 => self.disks[usize::from((way.number + u64::from(way.steps)).is_multiple_of(2))]
                .write(&way.granules, way.number),
            3 if self.rng.u8(0..4) == 0 => way.intent.failed(),
            3 => way.intent.synced(),
            _ => drop(self.ways.swap_remove(ix)),
        }
    }

    /// A step of a change of a disk that has a backup.
    fn change(&mut self) {
        if self.ways.is_empty() {
            return;
        }
        let ix = self.rng.usize(0..self.ways.len());
        let way = &mut self.ways[ix];
        way.steps += 1;
        match way.steps {
            1 => way.intent.failed(),
            2 => self.disks[0].write(&way.granules, way.number),
            _ => drop(self.ways.swap_remove(ix)),
        }
    }

    async fn rest(&mut self, copy: usize) {
        if self.resting.is_empty() {
            self.resting = self.map.resting(self.rng.bool());
            self.disks[copy].flush();
        } else {
            let _ = self.map.rest(std::mem::take(&mut self.resting)).await;
        }
    }

    async fn backup(&mut self) {
        match self.frozen.take() {
            None => {
                let then = self.disks[0].now.clone();
                if self.map.freeze().await.is_ok() {
                    self.frozen = Some(then);
                    self.disks[0].flush();
                }
            }
            Some(then) => {
                let failed = self.rng.bool();
                if !failed {
                    self.disks[1] = Disk { now: then.clone(), durable: then };
                }
                let _ = self.map.thaw(failed).await;
            }
        }
    }

    /// No granule that differs is called clean, by the map or by what any crash leaves.
    fn check(&mut self, place: &str) {
        self.medium.look();
        let past = {
            let mut past = self.medium.past.lock().unwrap();
            let moments = std::mem::take(&mut past.moments);
            moments.into_iter().chain([past.states.clone()]).collect::<Vec<_>>()
        };
        self.compare(&self.medium.now(), true, self.disks.each_ref().map(|disk| disk.now.clone()), place);
        for states in past {
            for _ in 0..3 {
                let words = Medium::remains(&states, &mut self.rng);
                let disks = self.disks.each_ref().map(|disk| disk.remains(&mut self.rng));
                self.compare(&words, false, disks, place);
            }
        }
    }

    fn compare(&self, words: &[u64], same_boot: bool, [disk, copy]: [Vec<u64>; 2], place: &str) {
        let left = Medium::new(self.layout);
        left.words.iter().zip(words).for_each(|(word, value)| put(word, *value));
        let dirty = store(self.layout, &left).load(same_boot);
        for (granule, differs) in disk.iter().zip(&copy).map(|(a, b)| a != b).enumerate() {
            let how = if same_boot { "killed" } else { "without power" };
            assert!(
                !differs || dirty.has(granule as u64),
                "{place}, {how}: granule {granule} is called clean"
            );
        }
    }

    /// Nothing is on its way and everything was flushed: the file says just what the map says.
    async fn end(mut self, copy: usize, place: &str) {
        self.ways.clear();
        self.medium.fails.store(false, Ordering::Relaxed);
        self.disks.iter_mut().for_each(Disk::flush);
        let number = self.map.flush_begins();
        self.map.flushed(number);
        if self.frozen.take().is_some() {
            self.map.thaw(true).await.unwrap();
        }
        self.resting.clear();
        for _ in 0..2 {
            self.disks[copy].flush();
            self.map.rest(self.map.resting(true)).await.unwrap();
        }
        assert!(!self.map.is_at_work(), "{place}: regions are left");
        let loaded = store(self.layout, &self.medium).load(false);
        let known = &self.map.known.get().unwrap().bits;
        let same = |ix| loaded.word(ix) == known.word(ix);
        assert!((0..known.words.len()).all(same), "{place}: the file is dirtier than the map");
    }
}

fn play(seeds: Range<u64>, mirrored: bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for seed in seeds {
        runtime.block_on(async {
            let mut world = World::new(seed);
            if mirrored {
                world.map.mirror();
            }
            for step in 0..120 {
                match world.rng.u8(0..20) {
                    0..6 => world.begin().await,
                    6..14 if mirrored => world.mirror(),
                    6..14 => world.change(),
                    14 | 15 => world.rest(usize::from(mirrored)).await,
                    16 if mirrored => {
                        let number = world.map.flush_begins();
                        world.disks[0].flush();
                        world.map.flushed(number);
                    }
                    16 | 17 if !mirrored => world.backup().await,
                    18 => world.medium.fails.store(world.rng.u8(0..3) == 0, Ordering::Relaxed),
                    _ => {}
                }
                world.check(&format!("seed {seed}, step {step}"));
            }
            world.end(usize::from(mirrored), &format!("seed {seed}")).await;
        });
    }
}

#[test]
fn a_mirror_is_never_called_clean_where_its_legs_differ() {
    play(0..60, true);
}

#[test]
fn a_backup_never_misses_what_has_changed() {
    play(0..60, false);
}

/// Where granules are large, a word of marks has those of several regions.
#[tokio::test]
async fn what_is_frozen_keeps_its_mark_until_it_is_durable_also_when_a_neighbour_lands() {
    let layout = Layout::with_regions(SIZE, GRANULE, 4 * GRANULE);
    let medium = Medium::new(layout);
    let map = over(layout, &medium);
    map.intend(0..1).await.unwrap().failed();
    map.rest(map.resting(true)).await.unwrap();
    assert!(!map.is_at_work());
    let neighbour = map.intend(8 * GRANULE..9 * GRANULE).await.unwrap();
    map.begin_freeze().unwrap();
    medium.look();
    drop(neighbour);
    medium.look();
    let (states, mut rng) = (medium.past.lock().unwrap().states.clone(), fastrand::Rng::with_seed(1));
    for _ in 0..100 {
        let left = Medium::new(layout);
        let words = Medium::remains(&states, &mut rng);
        left.words.iter().zip(words).for_each(|(word, value)| put(word, value));
        assert!(store(layout, &left).load(false).has(0), "what was frozen is called clean");
    }
}

#[test]
fn a_map_of_which_all_is_dirty_is_made_durable_once_for_all_of_its_regions() {
    let layout = Layout { size: SIZE, granule: GRANULE, region: REGION };
    let medium = Medium::new(layout);
    let map = over(layout, &medium);
    map.set(0..SIZE);
    let (store, syncs) = (map.store.get().unwrap(), || medium.past.lock().unwrap().moments.len());
    map.set_dirty_regions(store, layout.regions(), layout.region);
    store.adopt(this_boot()).unwrap();
    map.flights().regions.reset(REGION, (0..layout.regions()).map(|region| store.has_region(region)));
    let before = syncs();
    for at in (0..SIZE).step_by(REGION as usize) {
        assert!(map.intend_now(at..at + GRANULE).is_some(), "a change at {at} waits");
    }
    assert_eq!((before, syncs()), (2, 2), "as for a map that is opened anyway");
    assert!(map.resting(false).is_empty() && map.resting(false).is_empty(), "they stay");
    map.intend_now(0..GRANULE).unwrap().synced();
    map.resting(false);
    assert_eq!(map.resting(false).len(), 1);
}
