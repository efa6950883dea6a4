//! Volumes, snapshots, clones, and all that can be done with them, against vectors. After each few steps the pool is opened
//! anew from a copy, as after the death of its process, and everything is looked at: contents, and that exactly what is
//! reachable is marked as used.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::{BLOCK, EntryKind, Format};
use super::super::open::{Opening, add_trees, create, open};
use super::super::pool::Pool;
use super::super::settings::Settings;
use super::super::volume::{CHANGED_SINCE, Volume};
use blockmason::{Answer, Data, Extra, Kind, Op, Request};
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;

const SIZE: u64 = 96 << 20;

/// What a volume or a snapshot holds: a number for each block, 0 is zeros.
type Contents = Vec<u32>;

pub(super) struct Model {
    pub(super) file: File,
    pub(super) pool: Arc<Pool>,
    pub(super) rng: fastrand::Rng,
    seed: u64,
    next: u32,
    volumes: BTreeMap<String, Contents>,
    /// By volume and name.
    snapshots: BTreeMap<(String, String), Contents>,
}

fn bytes(range: Range<usize>, contents: &[u32]) -> Vec<u8> {
    let block = |(block, version): (usize, &u32)| {
        let word = if *version == 0 { 0 } else { u64::from(*version) << 32 | block as u64 };
        word.to_le_bytes().repeat(BLOCK as usize / 8)
    };
    range.clone().zip(&contents[range]).flat_map(block).collect()
}

/// The trees of these formats in a pool, which are made if there are none.
pub(super) fn opened(file: &File, formats: &[Format]) -> Vec<Arc<Pool>> {
    let below = Below::Plain(file.as_fd());
    let opened = block_on(open(Opening::writable(100_000), file.metadata().unwrap().len(), below)).unwrap();
    assert!(opened.lacking.is_empty());
    let mut all = opened.trees;
    for format in formats {
        if all.iter().all(|trees| trees.format != *format) {
            let added = block_on(add_trees(*format, &all[0], below)).unwrap();
            all.push(added);
        }
    }
    all.into_iter().filter(|trees| formats.contains(&trees.format)).map(Arc::new).collect()
}

fn new_pool(seed: u64, size: u64) -> File {
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    file.set_len(size).unwrap();
    block_on(create([seed as u8; 16], size, Below::Plain(file.as_fd()))).unwrap();
    file
}

impl Model {
    pub(super) fn new(seed: u64) -> Model {
        Model::of(seed, Format::One)
    }

    pub(super) fn of(seed: u64, format: Format) -> Model {
        // Each owner of extents keeps some for itself.
        let file = new_pool(seed, if format == Format::One { SIZE } else { SIZE * 3 / 2 });
        let pool = opened(&file, &[format]).remove(0);
        Model::with(seed, file, pool)
    }

    fn with(seed: u64, file: File, pool: Arc<Pool>) -> Model {
        let rng = fastrand::Rng::with_seed(seed);
        Model { file, pool, rng, seed, next: 1, volumes: BTreeMap::new(), snapshots: BTreeMap::new() }
    }

    fn name(&mut self, what: &str) -> String {
        self.next += 1;
        format!("{what}{}", self.next)
    }

    fn any_volume(&mut self) -> Option<String> {
        let all: Vec<_> = self.volumes.keys().cloned().collect();
        self.rng.choice(all)
    }

    fn any_snapshot(&mut self) -> Option<(String, String)> {
        let all: Vec<_> = self.snapshots.keys().cloned().collect();
        self.rng.choice(all)
    }

    pub(super) fn step(&mut self) {
        match self.rng.u8(0..100) {
            0..5 => self.make(),
            5..50 => self.change(),
            50..60 => self.snapshot(),
            60..67 => self.clone_one(),
            67..77 => self.delete_snapshot(),
            77..80 => self.delete_volume(),
            80..84 => self.rollback(),
            84..89 => self.promote(),
            89..92 => self.grow(),
            92..94 => self.rename(),
            94..97 => drop(block_on(self.pool.delete_some(Below::Plain(self.file.as_fd()))).unwrap()),
            _ => {
                block_on(self.pool.checkpoint(Below::Plain(self.file.as_fd()))).unwrap();
                assert_eq!(self.pool.space.promised(), 0, "seed {}", self.seed);
            }
        }
    }

    fn make(&mut self) {
        let (name, blocks) = (self.name("v"), self.rng.usize(1..1300));
        let checksums = self.rng.u8(0..4) == 0;
        let below = Below::Plain(self.file.as_fd());
        let settings = Settings { checksums, ordered: self.rng.bool(), ..Settings::default() };
        block_on(self.pool.make_volume(&name, blocks as u64 * BLOCK, settings, below)).unwrap();
        self.volumes.insert(name, vec![0; blocks]);
    }

    fn change(&mut self) {
        let Some(name) = self.any_volume() else { return };
        let number = self.pool.core().volume(&name).unwrap();
        let volume = Volume::new(self.pool.clone(), number);
        for _ in 0..self.rng.usize(1..8) {
            let contents = self.volumes.get_mut(&name).unwrap();
            let first = self.rng.usize(0..contents.len());
            let most = [3, 20, 700][self.rng.usize(0..3)];
            let range = first..(first + self.rng.usize(1..=most)).min(contents.len());
            self.next += 1;
            let zero = self.rng.u8(0..4) == 0;
            contents[range.clone()].fill(if zero { 0 } else { self.next });
            let (offset, len) = (range.start as u64 * BLOCK, range.len() as u64 * BLOCK);
            let below = Below::Plain(self.file.as_fd());
            match zero {
                true => block_on(volume.punch(Request::new(Op::Discard, offset, len), below)),
                false => {
                    let data = Data::copy_of(&bytes(range, contents));
                    block_on(volume.write_pieces(Request::write(offset, data), below))
                }
            }
            .unwrap();
            if self.rng.u8(0..5) == 0 {
                block_on(self.pool.flush(below)).unwrap();
            }
        }
    }

    fn snapshot(&mut self) {
        let count = self.rng.usize(1..4);
        let mut all: Vec<String> = self.volumes.keys().cloned().collect();
        self.rng.shuffle(&mut all);
        all.truncate(count);
        if all.is_empty() || self.snapshots.len() > 40 {
            return;
        }
        let name = self.name("s");
        let numbers: Vec<_> = all.iter().map(|volume| self.pool.core().volume(volume).unwrap()).collect();
        let wanted: Vec<_> = numbers.into_iter().map(|number| (number, name.clone())).collect();
        block_on(self.pool.snapshot(&wanted, 1, Below::Plain(self.file.as_fd()))).unwrap();
        for volume in all {
            let contents = self.volumes[&volume].clone();
            self.snapshots.insert((volume, name.clone()), contents);
        }
    }

    fn clone_one(&mut self) {
        let Some((volume, name)) = self.any_snapshot().filter(|_| self.volumes.len() < 12) else { return };
        let clone = self.name("c");
        block_on(self.pool.clone_volume(&volume, &name, &clone, Below::Plain(self.file.as_fd()))).unwrap();
        let contents = self.snapshots[&(volume, name)].clone();
        self.volumes.insert(clone, contents);
    }

    fn delete_snapshot(&mut self) {
        let Some((volume, name)) = self.any_snapshot() else { return };
        match block_on(self.pool.delete_snapshot(&volume, &name, Below::Plain(self.file.as_fd()))) {
            Ok(()) => drop(self.snapshots.remove(&(volume, name))),
            Err(error) => {
                assert_eq!(error.kind(), Kind::Busy, "{error}");
                assert!(error.to_string().contains("a clone of"), "{error}");
            }
        }
    }

    fn delete_volume(&mut self) {
        let Some(name) = self.any_volume() else { return };
        match block_on(self.pool.delete_volume(&name, Below::Plain(self.file.as_fd()))) {
            Ok(()) => drop(self.volumes.remove(&name)),
            Err(_) => assert!(self.snapshots.keys().any(|(volume, _)| *volume == name)),
        }
    }

    fn rollback(&mut self) {
        let Some((volume, name)) = self.any_snapshot().filter(|_| self.volumes.len() < 12) else { return };
        let old = self.name("o");
        block_on(self.pool.rollback(&volume, &name, &old, Below::Plain(self.file.as_fd()))).unwrap();
        let contents = self.snapshots[&(volume.clone(), name)].clone();
        let before = self.volumes.insert(volume.clone(), contents).unwrap();
        self.volumes.insert(old, before);
        self.resort();
    }

    fn promote(&mut self) {
        let Some(name) = self.any_volume() else { return };
        match block_on(self.pool.promote(&name, Below::Plain(self.file.as_fd()))) {
            Ok(()) => self.resort(),
            Err(error) => assert!(error.to_string().contains("is no clone"), "{error}"),
        }
    }

    /// Snapshots have gone to other volumes: which, the pool says. Each must be found somewhere.
    fn resort(&mut self) {
        let mut found = BTreeMap::new();
        let core = self.pool.core();
        for entry in core.catalog.values().filter(|entry| !entry.deleting) {
            let EntryKind::Snapshot { volume, .. } = entry.kind else { continue };
            let owner = core.catalog[&volume].name.clone();
            // A name may be that of several volumes' snapshots, taken at one instant: the contents tell.
            let blocks = entry.size as usize / BLOCK as usize;
            let same = self
                .snapshots
                .iter()
                .filter(|((_, name), contents)| *name == entry.name && contents.len() == blocks);
            let mut same: Vec<_> = same.collect();
            same.sort_by_key(|((volume, _), _)| *volume != owner);
            found.insert((owner, entry.name.clone()), same[0].1.clone());
        }
        drop(core);
        assert_eq!(found.len(), self.snapshots.len(), "seed {}: snapshots have got lost", self.seed);
        // What each of them holds is what is read now, if one of its name held that.
        for ((volume, name), contents) in &mut found {
            let number = self.pool.core().volume(volume).unwrap();
            let number = self.pool.core().snapshot(number, name).unwrap();
            let read = read_all(&self.pool, number, contents.len(), Below::Plain(self.file.as_fd()));
            let known = self.snapshots.iter().filter(|((_, other), _)| other == name);
            let known =
                known.map(|(_, contents)| contents).find(|known| bytes(0..known.len(), known) == read);
            *contents = known
                .unwrap_or_else(|| panic!("seed {}: {volume}@{name} is none that was", self.seed))
                .clone();
        }
        self.snapshots = found;
    }

    fn grow(&mut self) {
        let Some(name) = self.any_volume() else { return };
        let contents = self.volumes.get_mut(&name).unwrap();
        // Over the edge of a tree of one node, sometimes.
        let more = if self.rng.u8(0..5) == 0 { 1500 } else { self.rng.usize(0..100) };
        contents.resize((contents.len() + more).min(3000), 0);
        let size = contents.len() as u64 * BLOCK;
        block_on(self.pool.grow(&name, size, Below::Plain(self.file.as_fd()))).unwrap();
    }

    fn rename(&mut self) {
        let Some(name) = self.any_volume() else { return };
        let new = self.name("n");
        block_on(self.pool.rename(&name, &new, Below::Plain(self.file.as_fd()))).unwrap();
        let contents = self.volumes.remove(&name).unwrap();
        self.volumes.insert(new.clone(), contents);
        let snapshots = std::mem::take(&mut self.snapshots);
        let renamed = |((volume, name_of), contents)| match volume == name {
            true => ((new.clone(), name_of), contents),
            false => ((volume, name_of), contents),
        };
        self.snapshots = snapshots.into_iter().map(renamed).collect();
    }

    /// What a volume or snapshot holds, by the names that a pool has for it.
    pub(super) fn bytes_of(&self, pool: &Pool, number: u32) -> Vec<u8> {
        let core = pool.core();
        let entry = &core.catalog[&number];
        let contents = match entry.kind {
            EntryKind::Volume { .. } => &self.volumes[&entry.name],
            EntryKind::Snapshot { volume, .. } => {
                &self.snapshots[&(core.catalog[&volume].name.clone(), entry.name.clone())]
            }
        };
        bytes(0..contents.len(), contents)
    }

    /// The process dies; another one opens the pool.
    pub(super) fn reopen(&mut self) {
        self.pool = opened(&self.file, &[self.pool.format]).remove(0);
        self.look();
    }

    /// Everything is what it should be.
    fn look(&mut self) {
        let below = Below::Plain(self.file.as_fd());
        let findings = block_on(check(&self.pool, below)).unwrap();
        assert_eq!(findings.said.all, [] as [String; 0], "seed {}", self.seed);
        let leaked = self.pool.space.leaked(&self.pool.core().journal);
        assert_eq!(leaked, [] as [u64; 0], "seed {}: used, and in no tree", self.seed);
        assert_eq!(findings.volumes as usize, self.volumes.len());
        assert_eq!(findings.snapshots as usize, self.snapshots.len());
        for (name, contents) in &self.volumes {
            let number = self.pool.core().volume(name).unwrap();
            let found = read_all(&self.pool, number, contents.len(), below);
            assert!(found == bytes(0..contents.len(), contents), "seed {}: volume {name}", self.seed);
            let entry = &self.pool.core().catalog[&number];
            let mapped = contents.iter().filter(|version| **version != 0).count() as u64;
            assert_eq!(entry.mapped, mapped, "seed {}: volume {name}", self.seed);
            let EntryKind::Volume { own, .. } = entry.kind else { panic!("{name} is a volume") };
            assert!(own <= mapped, "seed {}: {name} has {own} of {mapped} for itself", self.seed);
        }
        for ((volume, name), contents) in &self.snapshots {
            let number = self.pool.core().volume(volume).unwrap();
            let number = self.pool.core().snapshot(number, name).unwrap();
            let found = read_all(&self.pool, number, contents.len(), below);
            assert!(
                found == bytes(0..contents.len(), contents),
                "seed {}: snapshot {volume}@{name}",
                self.seed
            );
        }
        self.compare();
    }

    /// What has changed since a snapshot is said to have changed.
    fn compare(&mut self) {
        let Some((volume, name)) = self.any_snapshot() else { return };
        let (number, birth) = {
            let core = self.pool.core();
            let number = core.volume(&volume).unwrap();
            let EntryKind::Snapshot { birth, .. } = core.catalog[&core.snapshot(number, &name).unwrap()].kind
            else {
                return;
            };
            (number, birth)
        };
        let changed =
            block_on(self.pool.changed_since(number, birth, Below::Plain(self.file.as_fd()))).unwrap();
        let (now, then) = (&self.volumes[&volume], &self.snapshots[&(volume.clone(), name.clone())]);
        let mut said = vec![false; now.len()];
        for range in changed {
            let end = range.end.min(now.len() as u64);
            said[range.start.min(end) as usize..end as usize].fill(true);
        }
        for (block, version) in now.iter().enumerate() {
            let same = then.get(block).copied().unwrap_or(0) == *version;
            assert!(same || said[block], "seed {}: block {block} has changed, and nobody says so", self.seed);
        }
        assert_eq!(
            self.map_of_changes(number, &name, now.len()),
            said,
            "seed {}: {volume}@{name}",
            self.seed
        );
    }

    /// The same as clients are told it, piece by piece.
    fn map_of_changes(&self, number: u32, since: &str, blocks: usize) -> Vec<bool> {
        let volume = Volume::new(self.pool.clone(), number);
        let mut map = Vec::new();
        while map.len() < blocks {
            let (offset, left) = (map.len() as u64 * BLOCK, (blocks - map.len()) as u64 * BLOCK);
            let mut req = Request::new(Op::Extents, offset, left);
            req.extra =
                Some(Box::new(Extra { map: Some(format!("{CHANGED_SINCE}{since}")), ..Extra::default() }));
            let answer = block_on(volume.extents(req, Below::Plain(self.file.as_fd()))).unwrap();
            let Answer::Extents(extents) = answer else { panic!("{answer:?}") };
            for extent in extents {
                map.extend(vec![extent.state.dirty; (extent.len / BLOCK) as usize]);
            }
        }
        map
    }
}

fn read_all(pool: &Arc<Pool>, number: u32, blocks: usize, below: Below<'_>) -> Vec<u8> {
    let volume = Volume::new(pool.clone(), number);
    let read = Request::read(0, blocks as u64 * BLOCK);
    block_on(volume.read_pieces(read, below)).unwrap().into_data().unwrap().to_vec()
}

/// In the end everything can be deleted.
pub(super) fn delete_all(model: &mut Model) {
    while !model.volumes.is_empty() {
        (0..20).for_each(|_| model.delete_snapshot());
        (0..10).for_each(|_| model.delete_volume());
        block_on(model.pool.delete_all(Below::Plain(model.file.as_fd()))).unwrap();
    }
}

/// Nothing is left.
pub(super) fn is_empty(model: &Model) {
    let used = model.pool.core().root.used;
    assert!(used <= 4 * 4, "seed {}: {used} blocks are left, and nothing is there", model.seed);
}

fn play(seed: u64, format: Format) {
    let mut model = Model::of(seed, format);
    for _ in 0..12 {
        (0..model.rng.usize(1..40)).for_each(|_| model.step());
        model.reopen();
    }
    delete_all(&mut model);
    model.reopen();
    is_empty(&model);
}

#[test]
fn volumes_snapshots_and_clones_are_like_vectors() {
    super::crash::seeds().step_by(8).for_each(|seed| play(seed, Format::One));
}

#[test]
fn and_so_are_those_of_format_2() {
    super::crash::seeds().step_by(8).for_each(|seed| play(seed + 1000, Format::Two));
}

#[test]
fn trees_of_both_formats_share_a_pool() {
    for seed in super::crash::seeds().step_by(8) {
        let file = new_pool(seed, 2 * SIZE);
        let formats = [Format::One, Format::Two];
        let trees = opened(&file, &formats).into_iter().enumerate();
        let mut models: Vec<Model> = trees
            .map(|(ix, pool)| Model::with(seed + 2000 + 77 * ix as u64, file.try_clone().unwrap(), pool))
            .collect();
        for round in 0..6 {
            for _ in 0..models[0].rng.usize(1..60) {
                let turn = models[0].rng.usize(0..2);
                models[turn].step();
            }
            if round == 5 {
                models.iter_mut().for_each(delete_all);
            } else if round % 3 == 2 {
                // A build that knows of the first format only leaves all others alone.
                let opening = Opening { newest: 1, ..Opening::writable(100_000) };
                let opened = block_on(open(opening, 2 * SIZE, Below::Plain(file.as_fd()))).unwrap();
                models[0].pool = Arc::new(opened.trees.into_iter().next().unwrap());
                (0..10).for_each(|_| models[0].step());
            }
            for (model, pool) in models.iter_mut().zip(opened(&file, &formats)) {
                model.pool = pool;
                model.look();
            }
        }
        models.iter().for_each(is_empty);
    }
}

/// What is discarded has changed, and not all that is as empty.
#[test]
fn a_discard_is_a_change_of_what_was_there() {
    for format in [Format::One, Format::Two] {
        let file = new_pool(3, SIZE);
        let pool = opened(&file, &[format]).remove(0);
        let below = Below::Plain(file.as_fd());
        let number =
            block_on(pool.make_volume("v", 600 << 30, Settings { format, ..Settings::default() }, below));
        let number = number.unwrap();
        let volume = Volume::new(pool.clone(), number);
        let data = Data::copy_of(&[1; 65_536]);
        block_on(volume.write_pieces(Request::write(1 << 20, data), below)).unwrap();
        let snapshot = block_on(pool.snapshot(&[(number, "s".to_owned())], 1, below)).unwrap()[0];
        block_on(volume.punch(Request::new(Op::Discard, 1 << 20, 65_536), below)).unwrap();
        let birth = pool.core().birth(snapshot).unwrap();
        let changed = block_on(pool.changed_since(number, birth, below)).unwrap();
        let blocks: u64 = changed.iter().map(|range| range.end - range.start).sum();
        assert!((16..=512).contains(&blocks), "{changed:?}");
    }
}
