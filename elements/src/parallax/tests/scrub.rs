//! Scrubs: whatever is damaged in one copy is mended by them, and what is not is named, once.

use super::super::below::Below;
use super::super::check::{Meaning, check, reach};
use super::super::format::{BLOCK, Format};
use super::super::pool::Pool;
use super::super::scrub::Stage;
use super::crash::seeds;
use super::lines::Model;
use futures::executor::block_on;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

pub(super) fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

fn scrub(pool: &Pool, file: &File, mut between: impl FnMut(Stage)) -> Vec<String> {
    let (mut stage, mut said) = (Stage::FIRST, Vec::new());
    loop {
        let piece = block_on(pool.scrub(stage, Below::Plain(file.as_fd()))).unwrap();
        said.extend(piece.said.all);
        let Some(next) = piece.next else { return said };
        assert_ne!(next, stage, "it does not get on");
        stage = next;
        between(stage);
    }
}

/// The first copy of every node, the second of every third.
fn damage(model: &Model, file: &File) -> usize {
    let reached = block_on(reach(&model.pool, Below::Plain(file.as_fd())));
    assert_eq!(reached.findings.said.all, [] as [String; 0]);
    let nodes: Vec<u64> = reached.claims.seen.iter().copied().collect();
    nodes.iter().for_each(|at| flip(file, at * BLOCK + 70));
    nodes.len()
}

fn models() -> impl Iterator<Item = Model> {
    let seeds = seeds().step_by(4);
    seeds.flat_map(|seed| [Model::of(seed, Format::One), Model::of(seed + 1, Format::Two)])
}

#[test]
fn every_node_is_read_and_mended() {
    for mut model in models() {
        (0..80).for_each(|_| model.step());
        block_on(model.pool.checkpoint(Below::Plain(model.file.as_fd()))).unwrap();
        let file = model.file.try_clone().unwrap();
        let nodes = damage(&model, &file);
        let said = scrub(&model.pool, &file, |_| ());
        assert_eq!(said.len(), nodes, "{said:?}");
        assert!(said.iter().all(|said| said.ends_with("was damaged, and is written anew")), "{said:?}");
        let found = block_on(check(&model.pool, Below::Plain(file.as_fd()))).unwrap();
        assert_eq!(found.said.all, [] as [String; 0]);
        assert_eq!(scrub(&model.pool, &file, |_| ()), [] as [String; 0]);
        model.reopen();
    }
}

/// What a pool does meanwhile hides nothing that is there all along.
#[test]
fn while_everything_changes() {
    for mut model in models() {
        (0..80).for_each(|_| model.step());
        block_on(model.pool.checkpoint(Below::Plain(model.file.as_fd()))).unwrap();
        let (file, pool) = (model.file.try_clone().unwrap(), model.pool.clone());
        damage(&model, &file);
        // The pool has room for so much.
        let mut left = 40;
        scrub(&pool, &file, |_| {
            left -= i32::from(left > 0);
            if left > 0 {
                model.step();
            }
        });
        let found = block_on(check(&pool, Below::Plain(file.as_fd()))).unwrap();
        assert_eq!(found.said.all, [] as [String; 0]);
        model.reopen();
    }
}

/// Data that has a checksum is compared once, whoever sees it.
#[test]
fn damaged_data_is_named() {
    let mut damaged = 0;
    for mut model in models() {
        (0..80).for_each(|_| model.step());
        block_on(model.pool.checkpoint(Below::Plain(model.file.as_fd()))).unwrap();
        let file = model.file.try_clone().unwrap();
        let below = Below::Plain(file.as_fd());
        let claims = block_on(reach(&model.pool, below)).claims;
        let data = claims.known.iter().filter(|(_, meaning)| matches!(meaning, Meaning::Data(..)));
        let data: Vec<u64> = data.map(|(at, _)| *at).collect();
        // All of it, so that each that has a checksum is among them.
        data.iter().for_each(|at| flip(&file, at * BLOCK + 9));
        let of_check = block_on(check(&model.pool, below)).unwrap().said;
        let said = scrub(&model.pool, &file, |_| ());
        assert!(said.iter().all(|said| said.ends_with("are damaged")), "{said:?}");
        let unique: std::collections::HashSet<&String> = said.iter().collect();
        assert_eq!(unique.len(), said.len(), "{said:?}");
        assert_eq!(said.is_empty(), of_check.all.is_empty());
        damaged += said.len();
        data.iter().for_each(|at| flip(&file, at * BLOCK + 9));
        model.reopen();
    }
    assert!(damaged > 0);
}
