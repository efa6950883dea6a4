//! The corpora of the fuzz targets, replayed, and some thousand mutations of them. The mutations are the
//! same in every run; a fuzzer goes on from there.
#![allow(clippy::unwrap_used)]

use blockmason_tests::fuzz::{self, MAX_INPUT, TARGETS};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Mutations of one corpus: all of them together take some seconds.
const MUTATIONS: u64 = 5000;

/// The most files and bytes of one corpus, which every clone of the repository carries.
const MOST_FILES: usize = 150;
const MOST_BYTES: usize = 100 << 10;

/// Numbers that lengths and offsets go wrong at.
const NUMBERS: [u64; 12] =
    [0, 1, 7, 8, 512, 4096, 16_384, 20_000, 1 << 31, u32::MAX as u64, 1 << 63, u64::MAX];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// The files of a corpus, in the order of their names.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = folder().join("corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|file| file.unwrap().path())
        .map(|path| (path.display().to_string(), std::fs::read(path).unwrap()))
        .collect();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.sort();
    files
}

/// Runs one input; `what` names it if it fails.
fn run(target: fn(&[u8]), input: &[u8], what: impl FnOnce() -> String) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(input))) {
        eprintln!("{} failed on: {}", what(), input.escape_ascii());
        resume_unwind(panic);
    }
}

fn replay(name: &str) {
    // One counts the descriptors of the process: threads of other tests must not open any meanwhile.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let target = TARGETS.iter().find(|target| target.0 == name).unwrap().1;
    let files = corpus(name);
    let size: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(files.len() <= MOST_FILES && size <= MOST_BYTES, "{name}: {} files, {size} bytes", files.len());
    target(&[]);
    for (path, bytes) in &files {
        run(target, bytes, || path.clone());
    }
    for seed in 0..MUTATIONS {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut input = files[rng.usize(0..files.len())].1.clone();
        for _ in 0..rng.u32(1..=4) {
            mutate(&mut input, &files[rng.usize(0..files.len())].1, &mut rng);
        }
        input.truncate(MAX_INPUT);
        run(target, &input, || format!("{name}, mutation {seed}"));
    }
}

/// Changes an input a little; `other` is one to take something from.
fn mutate(input: &mut Vec<u8>, other: &[u8], rng: &mut fastrand::Rng) {
    let at = rng.usize(0..=input.len());
    let end = (at + rng.usize(0..64)).min(input.len());
    match rng.u8(0..7) {
        0 if at < input.len() => input[at] ^= 1 << rng.u8(0..8),
        1 if at < input.len() => input[at] = rng.u8(..),
        2 => drop(input.drain(at..end)),
        3 => {
            let again = input[at..end].to_vec();
            input.splice(at..at, again);
        }
        4 => {
            let from = rng.usize(0..=other.len());
            let to = (from + rng.usize(0..256)).min(other.len());
            input.splice(at..end, other[from..to].iter().copied());
        }
        5 => input.truncate(at),
        _ => {
            let number = NUMBERS[rng.usize(0..NUMBERS.len())].to_be_bytes();
            let width = [2, 4, 8][rng.usize(0..3)];
            let end = (at + width).min(input.len());
            input.splice(at..end, number[8 - width..].iter().copied());
        }
    }
}

#[test]
fn graph() {
    replay("graph");
}

#[test]
fn handshake() {
    replay("handshake");
}

#[test]
fn client() {
    replay("client");
}

#[test]
fn transmission() {
    replay("transmission");
}

#[test]
fn uri() {
    replay("uri");
}

#[test]
fn chain() {
    replay("chain");
}

#[test]
fn vhost_messages() {
    replay("vhost_messages");
}

#[test]
fn parallax_structures() {
    replay("parallax_structures");
}

#[test]
fn parallax_pool() {
    replay("parallax_pool");
}

/// The examples of all elements are valid, and so print as themselves.
#[test]
fn examples_of_elements() {
    for ty in blockmason_elements::ALL {
        run(fuzz::graph, ty.example.as_bytes(), || ty.name.to_owned());
    }
}

/// Each entrance has a fuzz target and each fuzz target an entrance.
#[test]
fn targets_are_complete() {
    let files = std::fs::read_dir(folder().join("fuzz_targets")).unwrap();
    let found: BTreeSet<_> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    let named: BTreeSet<_> = TARGETS.iter().map(|(name, _)| format!("{name}.rs")).collect();
    assert_eq!(found, named);
    let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
    }
}
