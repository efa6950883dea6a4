//! Pools that are damaged: they end in an error, in findings, or in what was there, and never in other contents.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::{BLOCK, EXTENT, EntryKind, Format, Label, Owners, seal};
use super::super::fuzzing::{contents, pool, restore, seal_at, sealed, structures, survives};
use super::super::open::{Opening, create, open_newest};
use super::super::settings::Settings;
use super::super::shared::{Shared, make};
use super::super::tool::{self, Operation, Repairing};
use super::super::volume::Volume;
use super::lines::Model;
use base64::prelude::{BASE64_STANDARD, Engine};
use blockmason::{Data, Error, Kind, Op, Request};
use futures::executor::block_on;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

fn blank() -> File {
    tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap()
}

/// What has been done to a pool.
struct Damage {
    what: String,
    /// Data has been overwritten, of which nobody has a checksum.
    of_data: bool,
}

/// A block, or the whole node that begins there.
fn whole(base: &[(u64, Vec<u8>)], at: u64) -> Vec<u8> {
    let block = |at: u64| match base.binary_search_by_key(&at, |(at, _)| *at) {
        Ok(ix) => base[ix].1.clone(),
        Err(_) => vec![0; BLOCK as usize],
    };
    let first = block(at);
    if first.starts_with(b"PXND") { [first, block(at + 1)].concat() } else { first }
}

/// Does something to one block or two that hold something; nodes take the place of others as a whole.
fn damage(rng: &mut fastrand::Rng, file: &File, base: &[(u64, Vec<u8>)], data_from: u64) -> Damage {
    let is_data = |at: u64| {
        let block = whole(base, at);
        // The second block of a node looks like data, and hardly any other block does not.
        at >= data_from && sealed(&block).is_none() && !whole(base, at - 1).starts_with(b"PXND")
    };
    // Half of the time something that says something of others.
    let told: Vec<u64> = base
        .iter()
        .map(|(at, block)| (*at, sealed(block)))
        .filter_map(|(at, seal)| seal.map(|_| at))
        .collect();
    let mut any =
        || if rng.bool() { told[rng.usize(0..told.len())] } else { base[rng.usize(0..base.len())].0 };
    let (at, other) = (any(), any());
    let (block, there) = (whole(base, at), whole(base, other));
    let mut of_data = is_data(at) || there.len() > block.len() && is_data(at + 1);
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at * BLOCK).unwrap();
    let what = match rng.u8(0..5) {
        0 => {
            let bit = rng.usize(0..BLOCK as usize * 8);
            file.write_all_at(&[block[bit / 8] ^ 1 << (bit % 8)], at * BLOCK + bit as u64 / 8).unwrap();
            format!("bit {bit} of block {at}")
        }
        1 => {
            put(at, &[0; BLOCK as usize]);
            format!("block {at} is zeros")
        }
        2 => {
            put(at, &there);
            format!("block {other} over block {at}")
        }
        3 => {
            put(at, &there);
            put(other, &block);
            of_data |= is_data(other) || block.len() > there.len() && is_data(other + 1);
            format!("blocks {at} and {other} swapped")
        }
        _ => {
            let noise: Vec<u8> = (0..BLOCK).map(|_| rng.u8(..)).collect();
            put(at, &noise);
            format!("block {at} is noise")
        }
    };
    Damage { what, of_data }
}

#[test]
fn a_damaged_pool_never_has_other_contents() {
    let mut whole = 0;
    let seeds = super::crash::seeds().step_by(8);
    for (seed, format) in seeds.flat_map(|seed| [(seed, Format::One), (seed + 1, Format::Two)]) {
        let mut model = Model::of(seed, format);
        (0..60).for_each(|_| model.step());
        model.reopen();
        let base = contents(&model.file);
        let (size, file) = (model.file.metadata().unwrap().len(), blank());
        let data_from = model.pool.space.label().first() * EXTENT;
        for _ in 0..20 {
            restore(&file, size, &base);
            let Damage { what, of_data } = damage(&mut model.rng, &file, &base, data_from);
            survives(&file, |pool, number, found| {
                let Ok(found) = found.map(|data| data.to_vec()) else { return };
                whole += 1;
                let wanted = model.bytes_of(pool, number);
                assert!(of_data || found == wanted, "seed {seed}: {what}: {number} has other contents");
            });
        }
    }
    assert!(whole > 100, "only {whole} have been read");
}

/// Fields that are what they should not be under checksums that are right: nothing panics, nothing goes on for ever.
#[test]
fn whatever_a_structure_says_ends() {
    let formats = [Format::One, Format::Two].into_iter().cycle();
    for (seed, format) in super::crash::seeds().step_by(4).zip(formats) {
        let mut model = Model::of(seed, format);
        (0..40).for_each(|_| model.step());
        let base = contents(&model.file);
        let (size, file) = (model.file.metadata().unwrap().len(), blank());
        let told: Vec<u64> =
            base.iter().filter(|(_, block)| sealed(block).is_some()).map(|(at, _)| *at).collect();
        for _ in 0..30 {
            restore(&file, size, &base);
            for _ in 0..model.rng.usize(1..4) {
                let at = told[model.rng.usize(0..told.len())];
                let most = [128, BLOCK as usize - 8][model.rng.usize(0..2)];
                let word = [0, 1, u64::MAX, 1 << 39, u64::from(u32::MAX), 2049][model.rng.usize(0..6)];
                let len = model.rng.usize(1..=8);
                let place = at * BLOCK + model.rng.u64(8..most as u64);
                file.write_all_at(&word.to_le_bytes()[..len], place).unwrap();
                seal_at(&file, at);
            }
            survives(&file, |_, _, _| {});
        }
    }
}

#[test]
fn inputs_at_random_end() {
    for seed in super::crash::seeds() {
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..40 {
            let input: Vec<u8> = (0..rng.usize(0..64)).map(|_| rng.u8(..)).collect();
            structures(&input);
            pool(&input);
        }
    }
}

fn try_open(file: &File, writable: bool) -> Result<(), Error> {
    let opening = Opening { writable, ..Opening::writable(1 << 20) };
    let size = file.metadata().unwrap().len();
    block_on(open_newest(opening, size, Below::Plain(file.as_fd()))).map(drop)
}

#[test]
fn a_pool_that_is_cut_off_is_refused() {
    let mut model = Model::new(3);
    (0..60).for_each(|_| model.step());
    model.reopen();
    let base = contents(&model.file);
    let (size, file) = (model.file.metadata().unwrap().len(), blank());
    for _ in 0..20 {
        restore(&file, size, &base);
        file.set_len(model.rng.u64(0..size)).unwrap();
        assert!(try_open(&file, model.rng.bool()).is_err());
    }
}

/// Both copies of a block of a small pool get other bytes in one place, under a right checksum.
fn with(places: [u64; 2], at: usize, bytes: &[u8]) -> File {
    let file = blank();
    file.set_len(32 << 20).unwrap();
    block_on(create([1; 16], 32 << 20, Below::Plain(file.as_fd()))).unwrap();
    for place in places {
        let mut block = vec![0; BLOCK as usize];
        file.read_exact_at(&mut block, place * BLOCK).unwrap();
        block[at..at + bytes.len()].copy_from_slice(bytes);
        seal(&mut block, 8);
        file.write_all_at(&block, place * BLOCK).unwrap();
    }
    file
}

#[test]
fn what_a_newer_program_has_made_is_left_alone() {
    // Where it stands; whether it may be read, and written; and what is said of it.
    let told = "features that this program does not know";
    let cases = [
        (Label::PLACES, 12, 2, false, false, "version 2"),
        (Label::PLACES, 56, 1, true, true, ""),
        (Label::PLACES, 64, 1, true, false, told),
        (Label::PLACES, 72, 1, true, true, ""),
        (Label::PLACES, 72, 2, false, false, told),
        (Owners::PLACES, 64 + 4, 3, false, false, "no volumes of a known format"),
        (Owners::PLACES, 64 + 16, 1, true, true, ""),
        (Owners::PLACES, 64 + 24, 1, true, false, told),
        (Owners::PLACES, 64 + 32, 1, true, true, ""),
        (Owners::PLACES, 64 + 32, 3, true, true, ""),
        (Owners::PLACES, 64 + 32, 4, cfg!(feature = "compress"), cfg!(feature = "compress"), ""),
        (Owners::PLACES, 64 + 32, 8, false, false, told),
    ];
    for (places, at, value, read, write, said) in cases {
        let file = with(places, at, &[value]);
        let before = contents(&file);
        for (writable, may) in [(false, read), (true, write)] {
            let done = try_open(&file, writable);
            assert_eq!(done.is_ok(), may, "byte {at}, writable {writable}: {done:?}");
            if let Err(error) = done {
                assert!(error.to_string().contains(said) && error.kind() == Kind::Unsupported, "{error}");
                assert!(contents(&file) == before, "it has been changed");
            }
        }
    }
}

/// A pool that was only half made is none, or all of one.
#[test]
fn a_pool_that_is_half_made() {
    let whole = with([0, 256], 0, b"MASONPX1");
    let made = contents(&whole);
    let order = |at: &u64| if Label::PLACES.contains(at) { (1, *at) } else { (0, *at) };
    let mut blocks = made.clone();
    blocks.sort_by_key(|(at, _)| order(at));
    let file = blank();
    for done in 0..=blocks.len() {
        restore(&file, 32 << 20, &blocks[..done]);
        let has_label = done > blocks.len() - 2;
        let opened = try_open(&file, true);
        assert_eq!(opened.is_ok(), has_label, "{done} of {} blocks: {opened:?}", blocks.len());
        if let Err(error) = opened {
            assert_eq!(error.kind(), Kind::Denied, "{error}");
            block_on(create([2; 16], 32 << 20, Below::Plain(file.as_fd()))).unwrap();
            try_open(&file, true).unwrap();
        }
    }
}

#[test]
fn a_pool_that_another_process_has_open_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    make(&path, Some(32 << 20), [1; 16]).unwrap();
    let first = Shared::open(&path, 1 << 20).unwrap();
    let second = Shared::open(&path, 1 << 20).unwrap();
    assert!(std::sync::Arc::ptr_eq(&first, &second), "one process has it once");
    // Whoever comes past all locks all the same ends the other's changes: its checkpoints are refused.
    let file = File::options().read(true).write(true).open(&path).unwrap();
    try_open(&file, true).unwrap();
    let below = Below::Plain(file.as_fd());
    let error = block_on(first.any().make_volume("v", 4096, Settings::default(), below)).unwrap_err();
    assert!(error.kind() == Kind::Busy && error.to_string().contains("somebody else"), "{error}");
    assert!(first.any().core().catalog.values().all(|entry| !matches!(entry.kind, EntryKind::Volume { .. })));
}

/// There are two of everything that leads to data: a check looks at both, mends one that is damaged, and says so.
#[test]
fn a_check_finds_and_mends_any_copy_that_is_damaged() {
    let (size, file) = (64 << 20, blank());
    file.set_len(size).unwrap();
    let below = Below::Plain(file.as_fd());
    let opening = Opening::writable(1 << 20);
    block_on(create([5; 16], size, below)).unwrap();
    let pool = Arc::new(block_on(open_newest(opening, size, below)).unwrap());
    let number = block_on(pool.make_volume("v", 64 << 20, Settings::default(), below)).unwrap();
    let volume = Volume::new(pool.clone(), number);
    for at in [0, 8 << 20, 40 << 20] {
        let write = Request::write(at, Data::shared(vec![1; 1 << 20]));
        block_on(volume.write_pieces(write, below)).unwrap();
    }
    block_on(pool.snapshot(&[(number, "s".to_owned())], 1, below)).unwrap();
    block_on(volume.punch(Request::new(Op::Discard, 0, 4096), below)).unwrap();
    block_on(pool.checkpoint(below)).unwrap();
    let label = pool.space.label();
    let root = pool.core().catalog[&number].root;
    let records = label.record(root.at[0] / EXTENT);
    let places = [
        root.at.map(|at| at * BLOCK),
        Label::PLACES.map(|at| at * BLOCK),
        Owners::PLACES.map(|at| at * BLOCK),
        records,
    ];
    for (what, places) in ["node", "label", "list of owners", "record"].into_iter().zip(places) {
        for (ix, place) in places.into_iter().enumerate() {
            let told = format!("copy {ix} of a {what}");
            let byte = |at: u64| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0]
            };
            let before = byte(place + 20);
            file.write_all_at(&[!before], place + 20).unwrap();
            let found = block_on(check(&pool, below)).unwrap().said.all;
            assert!(
                found.len() == 1 && found[0].contains("damaged") && found[0].contains(what),
                "{told}: {found:?}"
            );
            assert_eq!(byte(place + 20), before, "{told}");
            assert_eq!(block_on(check(&pool, below)).unwrap().said.all, [] as [String; 0], "{told}");
        }
    }
}

/// What is wrong with trees of one format keeps nobody from those of the other, which leave them alone until they are mended.
#[test]
fn trees_that_cannot_be_opened_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.pool");
    make(&path, Some(128 << 20), [7; 16]).unwrap();
    let data = BASE64_STANDARD.encode([9; 8192]);
    {
        let pool = tool::open(&path).unwrap();
        for (name, format) in [("old", Format::One), ("new", Format::Two)] {
            let settings = Settings { format, ..Settings::default() };
            let made = Operation::CreateVolume { name: name.into(), size: 1 << 30, settings };
            pool.carry_out(&made).unwrap();
            let write =
                Operation::Write { volume: name.into(), offset: 4096, data: data.clone(), receiver: None };
            pool.carry_out(&write).unwrap();
        }
    }
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let block = |at: u64| {
        let mut bytes = vec![0; BLOCK as usize];
        file.read_exact_at(&mut bytes, at * BLOCK).unwrap();
        bytes
    };
    let owners = Owners::decode(&block(Owners::PLACES[0]), &Label::decode(&block(0)).unwrap()).unwrap();
    let places = [0, 1, 256, 257].map(|place| owners.all[1].root * EXTENT + place);
    let roots = places.map(block);
    places.iter().for_each(|at| file.write_all_at(&[1; BLOCK as usize], at * BLOCK).unwrap());
    {
        let pool = tool::open(&path).unwrap();
        let listed = pool.carry_out(&Operation::List).unwrap();
        assert_eq!(listed["volumes"].as_array().unwrap().len(), 1, "{listed}");
        let said = "volumes of format 2 cannot be used, and are left as they are";
        assert!(listed["unusable"][0].as_str().unwrap().starts_with(said), "{listed}");
        let found = pool.carry_out(&Operation::Check).unwrap();
        assert!(found["problems"][0].as_str().unwrap().starts_with(said), "{found}");
        let stat = pool.carry_out(&Operation::Stat { volume: None, snapshot: None }).unwrap();
        assert!(stat["foreign"].as_u64().unwrap() >= 4 << 20, "{stat}");
        let read = |volume: &str| Operation::Read {
            volume: volume.into(),
            snapshot: None,
            offset: 4096,
            len: 8192,
            number: None,
        };
        assert_eq!(pool.carry_out(&read("old")).unwrap(), data.as_str());
        let error = pool.carry_out(&read("new")).unwrap_err();
        assert!(
            error.to_string().contains("there is no volume new; volumes of format 2 cannot be used"),
            "{error}"
        );
        let settings = Settings { format: Format::Two, ..Settings::default() };
        let made = Operation::CreateVolume { name: "more".into(), size: 1 << 20, settings };
        assert_eq!(pool.carry_out(&made).unwrap_err().kind(), Kind::Io);
        // All the room that there is.
        let mut offset = 1 << 20;
        let full = BASE64_STANDARD.encode(vec![5; 1 << 20]);
        let error = loop {
            let write = Operation::Write { volume: "old".into(), offset, data: full.clone(), receiver: None };
            match pool.carry_out(&write) {
                Ok(_) => offset += 1 << 20,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), Kind::NoSpace, "{error}");
    }
    places.iter().zip(&roots).for_each(|(at, root)| file.write_all_at(root, at * BLOCK).unwrap());
    let pool = tool::open(&path).unwrap();
    let read =
        Operation::Read { volume: "new".into(), snapshot: None, offset: 4096, len: 8192, number: None };
    assert_eq!(pool.carry_out(&read).unwrap(), data.as_str());
    assert_eq!(pool.carry_out(&Operation::Check).unwrap()["problems"], serde_json::json!([]));
}

/// What a dead list has lost is room, and no reason to refuse anything; a repair makes the list anew, and nothing is lost.
#[test]
fn a_dead_list_without_a_good_copy_is_in_nobodys_way() {
    for format in [Format::One, Format::Two] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.pool");
        make(&path, Some(128 << 20), [7; 16]).unwrap();
        let write = |byte: u8, at: u64| Operation::Write {
            volume: "v".into(),
            offset: at * BLOCK,
            data: BASE64_STANDARD.encode([byte; 2 * BLOCK as usize]),
            receiver: None,
        };
        let snapshot = |name: &str| Operation::Snapshot { volumes: vec!["v".into()], name: name.into() };
        let list = {
            let pool = tool::open(&path).unwrap();
            let settings = Settings { format, ..Settings::default() };
            pool.carry_out(&Operation::CreateVolume { name: "v".into(), size: 1 << 30, settings }).unwrap();
            pool.carry_out(&write(1, 0)).unwrap();
            pool.carry_out(&write(1, 40)).unwrap();
            pool.carry_out(&snapshot("s")).unwrap();
            pool.carry_out(&write(2, 0)).unwrap();
            pool.carry_out(&Operation::Check).unwrap();
            Shared::look(&path, |trees, _| {
                let trees = trees.iter().find(|trees| trees.format == format).unwrap();
                let core = trees.core();
                let EntryKind::Snapshot { dead, .. } = core.catalog[&core.find("v", Some("s")).unwrap()].kind
                else {
                    panic!("a snapshot was expected")
                };
                Ok(dead.at)
            })
            .unwrap()
        };
        assert_ne!(list[0], 0);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let diff = |since: Option<&str>| Operation::Diff {
            volume: "v".into(),
            until: None,
            since: since.map(str::to_owned),
            number: None,
            since_number: None,
        };
        let read = |at: u64| Operation::Read {
            volume: "v".into(),
            snapshot: None,
            offset: at * BLOCK,
            len: 2 * BLOCK,
            number: None,
        };
        list.iter().for_each(|at| file.write_all_at(&[1; 8192], at * BLOCK).unwrap());
        {
            let pool = tool::open(&path).unwrap();
            pool.carry_out(&write(3, 1)).unwrap();
            pool.carry_out(&write(4, 40)).unwrap();
        }
        for round in 0..2 {
            let pool = tool::open(&path).unwrap();
            let data = |byte: u8| serde_json::json!(BASE64_STANDARD.encode([byte; 8192]));
            assert_eq!(pool.carry_out(&read(1)).unwrap(), data(3), "{round}");
            assert_eq!(pool.carry_out(&read(40)).unwrap(), data(4));
            assert_eq!(
                pool.carry_out(&diff(Some("s"))).unwrap(),
                serde_json::json!([[0, 3 * BLOCK], [40 * BLOCK, 2 * BLOCK]])
            );
            pool.carry_out(&write(5, 0)).unwrap();
            pool.carry_out(&write(2, 0)).unwrap();
            pool.carry_out(&write(3, 1)).unwrap();
            let found = pool.carry_out(&Operation::Check).unwrap();
            let problems = found["problems"].as_array().unwrap();
            assert!(problems.iter().any(|said| said.as_str().unwrap().contains("v@s")), "{found}");
        }
        let done = tool::repair(&path, Repairing { act: true, zero: false }).unwrap();
        assert_eq!(done["after"]["problems"], serde_json::json!([]), "{done}");
        let pool = tool::open(&path).unwrap();
        let list =
            |pool: &tool::Open| pool.carry_out(&Operation::Stat { volume: None, snapshot: None }).unwrap();
        let before = list(&pool)["free"].as_u64().unwrap();
        pool.carry_out(&Operation::DeleteSnapshot { volume: "v".into(), name: "s".into() }).unwrap();
        pool.carry_out(&Operation::Check).unwrap();
        pool.carry_out(&Operation::Gc).unwrap();
        // What was written over, its leaf and what leads to that, and the list.
        assert!(list(&pool)["free"].as_u64().unwrap() >= before + 4 * BLOCK);
        assert_eq!(pool.carry_out(&Operation::Check).unwrap()["problems"], serde_json::json!([]));
    }
}
