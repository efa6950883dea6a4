//! Repairs: what could be read before can be read after, byte for byte, also where a repair is cut short; and what a repair has ended
//! is a sound pool.

use super::super::below::Below;
use super::super::check::{Meaning, reach};
use super::super::format::{BLOCK, EXTENT_RECORD, Format, Label, seal};
use super::super::fuzzing::{contents, restore};
use super::super::open::{Opening, create, open};
use super::super::repair::{Repaired, Repairing, repair};
use super::super::settings::Settings;
use super::super::volume::Volume;
use super::crash::seeds;
use super::kit::find;
use super::lines::{Model, delete_all, is_empty, opened};
use super::rig;
use super::scrub::flip;
use blockmason::describe::{Catalogue, ElementType, Family, Outs, Ports};
use blockmason::testing::{TestDisk, graph, run};
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Extra, Flow, Kind, Op, Prepared, Request, Result,
};
use futures::executor::block_on;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, LazyLock};

const KEEP: Repairing = Repairing { act: true, zero: false };
const ZERO: Repairing = Repairing { act: true, zero: true };

fn repaired(file: &File, how: Repairing) -> Result<Repaired> {
    block_on(repair(how, file.metadata().unwrap().len(), Below::Plain(file.as_fd())))
}

/// Every block that can be read, by format, number and place: its checksum. And how many cannot.
fn readable(file: &File) -> (BTreeMap<(u32, u32, u64), u32>, usize) {
    let below = Below::Plain(file.as_fd());
    let (mut found, mut lost) = (BTreeMap::new(), 0);
    let Ok(opened) = block_on(open(Opening::read_only(1 << 20), file.metadata().unwrap().len(), below))
    else {
        return (found, usize::MAX);
    };
    for pool in opened.trees.into_iter().map(Arc::new) {
        let all: Vec<(u32, u64)> = {
            let core = pool.core();
            let there = core.catalog.iter().filter(|(_, entry)| !entry.deleting);
            there.map(|(number, entry)| (*number, entry.size / BLOCK)).collect()
        };
        for (number, blocks) in all {
            let volume = Volume::new(pool.clone(), number);
            let read = |first: u64, len: u64| {
                let read = Request::read(first * BLOCK, len * BLOCK);
                block_on(volume.read_pieces(read, below))
                    .and_then(Answer::into_data)
                    .map(|data| data.to_vec())
            };
            let mut note = |first: u64, bytes: Vec<u8>| {
                for (at, block) in (first..).zip(bytes.chunks(BLOCK as usize)) {
                    found.insert((pool.format.number(), number, at), crc32fast::hash(block));
                }
            };
            for first in (0..blocks).step_by(64) {
                let len = 64.min(blocks - first);
                match read(first, len) {
                    Ok(bytes) => note(first, bytes),
                    Err(_) => (first..first + len).for_each(|at| match read(at, 1) {
                        Ok(bytes) => note(at, bytes),
                        Err(_) => lost += 1,
                    }),
                }
            }
        }
    }
    (found, lost)
}

/// What a model is made of, before it is damaged.
struct Whole {
    model: Model,
    base: Vec<(u64, Vec<u8>)>,
    size: u64,
    /// First blocks of nodes that are led to.
    nodes: Vec<u64>,
    label: Label,
}

impl Whole {
    fn new(seed: u64, format: Format) -> Whole {
        let mut model = Model::of(seed, format);
        (0..70).for_each(|_| model.step());
        let reached = block_on(reach(&model.pool, Below::Plain(model.file.as_fd())));
        let mut nodes: Vec<u64> = reached.claims.seen.into_iter().collect();
        nodes.sort_unstable();
        if nodes.len() < 8 {
            return Whole::new(seed + 1000, format);
        }
        let (base, size) = (contents(&model.file), model.file.metadata().unwrap().len());
        let label = model.pool.space.label();
        Whole { model, base, size, nodes, label }
    }

    fn word(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.model.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Both copies of a node that is none of the catalog.
    fn hurt_node(&mut self) -> String {
        loop {
            let at = self.nodes[self.model.rng.usize(0..self.nodes.len())] * BLOCK;
            let kind = self.word(at + 8) as u8;
            if kind != 3 {
                let places = [self.word(at + 32), self.word(at + 40)];
                places.iter().for_each(|at| flip(&self.model.file, at * BLOCK + 70));
                return format!("both copies of a node of kind {kind} at {places:?}");
            }
        }
    }

    /// Both copies of a record are something else.
    fn hurt_record(&mut self, change: impl FnOnce(&mut [u8], &mut fastrand::Rng)) -> u64 {
        let first = self.label.first();
        // Where something is.
        let used: Vec<u64> = (first..self.label.extents)
            .filter(|extent| self.word(self.label.record(*extent)[0]) != 0)
            .collect();
        let extent = used[self.model.rng.usize(0..used.len())];
        let places = self.label.record(extent);
        let mut record = [0; EXTENT_RECORD as usize];
        self.model.file.read_exact_at(&mut record, places[0]).unwrap();
        change(&mut record, &mut self.model.rng);
        places.iter().for_each(|at| self.model.file.write_all_at(&record, *at).unwrap());
        extent
    }

    fn hurt(&mut self) -> String {
        match self.model.rng.u8(0..7) {
            0 => {
                let at = self.nodes[self.model.rng.usize(0..self.nodes.len())];
                flip(&self.model.file, at * BLOCK + 80);
                format!("one copy at {at}")
            }
            1..=3 => self.hurt_node(),
            4 => format!("the record of {}", self.hurt_record(|record, _| record[20] ^= 255)),
            5 => format!("the record of {} is zeros", self.hurt_record(|record, _| record.fill(0))),
            _ => {
                let marks = |record: &mut [u8], rng: &mut fastrand::Rng| {
                    for _ in 0..rng.usize(1..20) {
                        record[rng.usize(16..80)] ^= 1 << rng.u8(0..8);
                    }
                    seal(record, 4);
                };
                format!("marks of {}", self.hurt_record(marks))
            }
        }
    }

    fn restore(&self) {
        restore(&self.model.file, self.size, &self.base);
    }
}

/// What was there is there.
fn holds(before: &BTreeMap<(u32, u32, u64), u32>, file: &File, what: &str) -> usize {
    let (after, lost) = readable(file);
    for (at, sum) in before {
        assert_eq!(after.get(at), Some(sum), "{what}: block {at:?} is another one");
    }
    lost
}

/// Nothing is left to repair.
fn is_repaired(file: &File, what: &str) {
    let Repaired { problems, steps, left, .. } = repaired(file, Repairing::default()).unwrap();
    assert_eq!((problems.all, steps, left), Default::default(), "{what}");
}

#[test]
fn whatever_is_damaged_is_repaired_and_nothing_else_changes() {
    let (mut holes, mut refused, mut lists) = (0, 0, 0);
    for (seed, format) in seeds().step_by(2).flat_map(|seed| [(seed, Format::One), (seed + 1, Format::Two)]) {
        let mut whole = Whole::new(seed, format);
        for round in 0..10 {
            whole.restore();
            let damage: Vec<String> = (0..whole.model.rng.usize(1..4)).map(|_| whole.hurt()).collect();
            let what = format!("seed {seed}, format {format}, round {round}: {damage:?}");
            let file = &whole.model.file;
            let (before, lost) = readable(file);
            holes += usize::from(lost > 0);
            let said = repaired(file, Repairing::default()).unwrap();
            if said.left.iter().any(|left| left.contains("cannot be opened")) {
                // The log has data in an extent that is said to be nobody's.
                continue;
            }
            assert!(holds(&before, file, &what) == lost, "{what}: something has been changed");
            match repaired(file, KEEP) {
                Ok(kept) => {
                    lists += usize::from(kept.steps.iter().any(|step| step.contains("dead list")));
                    assert_eq!(kept.steps, said.steps, "{what}");
                    assert_eq!(holds(&before, file, &what), lost, "{what}");
                    let after = kept.after.unwrap();
                    let all = kept.left.is_empty();
                    assert!(!all || after.all.is_empty(), "{what}: {after:?} {:?}", kept.steps);
                }
                Err(error) => {
                    assert!(error.to_string().contains("--lost zero"), "{what}: {error}");
                    assert_eq!(holds(&before, file, &what), lost, "{what}");
                    refused += 1;
                }
            }
            let zeroed = repaired(file, ZERO).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(zeroed.after.unwrap().all, [] as [String; 0], "{what}");
            assert_eq!(holds(&before, file, &what), 0, "{what}");
            is_repaired(file, &what);
        }
        if repaired(&whole.model.file, ZERO)
            .unwrap()
            .left
            .iter()
            .any(|left| left.contains("cannot be opened"))
        {
            continue;
        }
        // All of it can be deleted, and nothing is left: dead lists are what they should be.
        whole.model.pool = opened(&whole.model.file, &[format]).remove(0);
        delete_all(&mut whole.model);
        // What a clone had of a snapshot that has become a hole is found to be free by the next repair.
        repaired(&whole.model.file, ZERO).unwrap();
        whole.model.pool = opened(&whole.model.file, &[format]).remove(0);
        is_empty(&whole.model);
    }
    assert!(holes > 3 && lists > 3, "{holes} with something lost, {lists} with lists, {refused} refused");
}

/// What was written while a leaf was good cannot go into it any more: the pool is open for reading, until the leaf is given up.
#[test]
fn trees_that_cannot_be_changed_can_be_repaired() {
    for format in [Format::One, Format::Two] {
        let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
        file.set_len(128 << 20).unwrap();
        let below = Below::Plain(file.as_fd());
        block_on(create([3; 16], 128 << 20, below)).unwrap();
        let pool = opened(&file, &[format]).remove(0);
        let settings = Settings { checksums: true, ..Settings::default() };
        let number = block_on(pool.make_volume("v", 64 << 20, settings, below)).unwrap();
        let write = |at: u64, byte: u8| {
            let write = Request::write(at * BLOCK, Data::copy_of(&[byte; 2 * BLOCK as usize]));
            block_on(Volume::new(pool.clone(), number).write_pieces(write, below)).unwrap();
        };
        write(0, 1);
        write(40, 1);
        write(600, 1);
        block_on(pool.checkpoint(below)).unwrap();
        let known = block_on(reach(&pool, below)).claims.known;
        write(0, 2);
        drop(pool);
        let leaf = |meaning: &Meaning| matches!(meaning, Meaning::Node(_, 0, 0));
        let is_tree = |at: u64| {
            let mut kind = [0; 9];
            file.read_exact_at(&mut kind, at * BLOCK).unwrap();
            kind.starts_with(b"PXND") && kind[8] == 1
        };
        let leaves: Vec<u64> =
            known.iter().filter(|(at, meaning)| leaf(meaning) && is_tree(**at)).map(|(at, _)| *at).collect();
        assert_eq!(leaves.len(), 2, "{leaves:?}");
        leaves.iter().for_each(|at| flip(&file, at * BLOCK + 70));
        let (before, lost) = readable(&file);
        assert_eq!(lost, 510, "all of the leaf but what the log has");
        let pool = opened(&file, &[format]).remove(0);
        assert!(pool.broken().is_some_and(|why| why.contains("both copies of a node")));
        drop(pool);
        let kept = repaired(&file, KEEP).unwrap();
        assert!(kept.steps.is_empty() && kept.left[0].contains("--lost zero"), "{kept:?}");
        assert_eq!(holds(&before, &file, "kept"), 510);
        assert_eq!(repaired(&file, ZERO).unwrap().after.unwrap().all, [] as [String; 0]);
        assert_eq!(holds(&before, &file, "zeroed"), 0);
        let pool = opened(&file, &[format]).remove(0);
        assert!(pool.broken().is_none());
        let volume = Volume::new(pool.clone(), number);
        let write = Request::write(100 * BLOCK, Data::copy_of(&[5; BLOCK as usize]));
        block_on(volume.write_pieces(write, below)).unwrap();
        block_on(pool.checkpoint(below)).unwrap();
    }
}

/// Repairs the pool on the disk below when it is told to.
struct Mender;

impl Element for Mender {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?;
        Ok(Prepared::with(below.above(), below.size))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let size = *cx.prepared::<u64>();
        cx.later(&req, async move {
            let done = repair(ZERO, size, Below::Port(cx)).await?;
            match done.after.map(|said| said.all) {
                Some(after) if after.is_empty() => Ok(Answer::Done),
                after => Err(Error::new(Kind::Internal, format!("{after:?}"))),
            }
        })
    }
}

static MENDER: ElementType = ElementType {
    name: "mender",
    family: Family::Fault,
    ports: Ports { input: true, out: Outs::Named(&["out"]) },
    build: |_| Ok(Arc::new(Mender)),
    ..ElementType::BASE
};

static TYPES: LazyLock<Catalogue> =
    LazyLock::new(|| Vec::leak(crate::ALL.iter().copied().chain([&MENDER]).collect()));

/// Cuts a repair short at the `nth` write, with what the power leaves, and looks at the disk. False if it was not cut short.
fn cut_short(whole: &Whole, damaged: &[(u64, Vec<u8>)], nth: u64, power: bool, what: &str) -> bool {
    restore(&whole.model.file, whole.size, damaged);
    let (before, _) = readable(&whole.model.file);
    run(nth, async |host| {
        // From then on nothing is written any more.
        let text = format!(
            "element M (type mender) element E (type error) (op write) (after {nth}) \
             element D (type volatile) (size {}) (seed {nth}) M -> E -> D",
            whole.size
        );
        let graph = graph(&host, *TYPES, &text, "M").unwrap();
        let sink = find(&graph, "D");
        let below = rig::below(&host, &text, &sink, *TYPES).await;
        for (at, block) in damaged {
            below.write(at * BLOCK, block).await.unwrap();
        }
        below.op(Op::Flush, 0, 0).await.unwrap();
        let disk = TestDisk::serve(&host, graph).await;
        let mut req = Request::new(Op::Control, 0, 0);
        let control = Some(("repair".to_owned(), String::new()));
        req.extra = Some(Box::new(Extra { control, ..Extra::default() }));
        let done = disk.submit(req).await;
        if power {
            sink.element.call("lose_power", "").unwrap();
        }
        let file = &whole.model.file;
        restore(file, whole.size, &[]);
        for at in (0..whole.size).step_by(1 << 20) {
            let bytes = below.read(at, 1 << 20).await.unwrap();
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(&bytes, at).unwrap();
            }
        }
        let what = format!("{what}, write {nth}, power {power}, {:?}", done.as_ref().err());
        holds(&before, file, &what);
        let again = repaired(file, ZERO).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(again.after.unwrap().all, [] as [String; 0], "{what}");
        assert_eq!(holds(&before, file, &what), 0, "{what}");
        done.is_err()
    })
}

#[test]
fn a_repair_that_is_cut_short_makes_nothing_worse() {
    let mut most = 0;
    for (seed, format) in
        seeds().step_by(8).flat_map(|seed| [(seed + 3, Format::One), (seed + 4, Format::Two)])
    {
        let mut whole = Whole::new(seed, format);
        let mut damage: Vec<String> = (0..3).map(|_| whole.hurt_node()).collect();
        damage.extend((0..2).map(|_| whole.hurt()));
        let damaged = contents(&whole.model.file);
        let what = format!("seed {seed}, format {format}: {damage:?}");
        let mut nth = 0;
        while cut_short(&whole, &damaged, nth, nth % 2 == 0, &what) {
            nth += 3;
        }
        most = most.max(nth);
    }
    assert!(most > 5, "there were only {most} writes");
}
