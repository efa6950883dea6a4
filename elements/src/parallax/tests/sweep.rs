//! One story, told again and again: each time another write or another flush of it fails, or its answer is lost. Whatever
//! was answered must be there afterwards, and the pool must be sound.

use super::super::below::Below;
use super::super::check::check;
use super::super::format::BLOCK;
use super::super::open::{Opening, open_newest};
use super::kit::{bytes, misfit, read_all};
use super::rig::Rig;
use blockmason::testing::run;
use blockmason::{Answer, Data, Flags, Host, Op, Request, Result};
use futures::executor::block_on;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Blocks of the volume: two leaves, the second one not full.
const BLOCKS: usize = 600;

/// What a block may hold: versions in the order in which they were sent.
#[derive(Clone)]
struct Block {
    versions: Vec<u32>,
    /// The first of them that may be there after the death of the process; after a loss of power.
    answered: usize,
    flushed: usize,
}

/// A snapshot that was answered, and of each block the first version and the last one that may be in it.
struct Snapshot(String, Vec<(usize, usize)>);

struct Tale {
    rig: Rig,
    blocks: Vec<Block>,
    snapshots: Vec<Snapshot>,
    next: u32,
    what: String,
    /// What has failed has said that nothing may be changed any more.
    over: bool,
    failures: usize,
    /// What is to fail has been seen to.
    seen: bool,
    /// A flush of the open pool has failed.
    lost: bool,
    flushes: bool,
}

impl Tale {
    async fn new(host: &Arc<Host>, error: &str, what: String) -> Tale {
        let volume = format!("(size {}k)", BLOCKS * 4);
        let way = [format!("E (type error) {error}")];
        let way: Vec<&str> = way.iter().map(String::as_str).collect();
        let rig = Rig::new(host, &volume, &way, "(type volatile) (size 33M)").await;
        let block = Block { versions: vec![0], answered: 0, flushed: 0 };
        Tale {
            rig,
            blocks: vec![block; BLOCKS],
            snapshots: Vec::new(),
            next: 1,
            what,
            over: false,
            failures: 0,
            seen: false,
            lost: false,
            flushes: error.contains("flush"),
        }
    }

    /// True if it has succeeded.
    fn note(&mut self, step: &str, done: Result<()>) -> bool {
        let was_lost = self.lost;
        if !self.seen && self.failed() {
            self.seen = true;
            self.lost = self.flushes && self.blocks.iter().any(|block| block.answered > 0);
        }
        let Err(error) = done else {
            assert!(!self.over && !was_lost, "{}: {step} is done, and nothing may be", self.what);
            return true;
        };
        self.failures += 1;
        let said = error.to_string();
        let told = said.contains("the pool takes no more changes");
        assert!(told || !self.over, "{}: {step} fails otherwise: {said}", self.what);
        self.over = told;
        false
    }

    /// What is to fail has.
    fn failed(&self) -> bool {
        self.rig.element("E").get("failed").unwrap() == "1"
    }

    async fn change(&mut self, op: Op, first: usize, len: usize, fua: bool) {
        let version = if op == Op::Write { self.next } else { 0 };
        self.next += 1;
        let mut data = Vec::new();
        for block in first..first + len {
            data.extend(bytes(block, version));
            self.blocks[block].versions.push(version);
        }
        let offset = first as u64 * BLOCK;
        let mut req = match op {
            Op::Write => Request::write(offset, Data::copy_of(&data)),
            _ => Request::new(op, offset, len as u64 * BLOCK).with(Flags::MAY_UNMAP),
        };
        if fua {
            req = req.with(Flags::FUA);
        }
        let done = self.rig.disk.submit(req).await.map(drop);
        if self.note("a change", done) {
            for block in &mut self.blocks[first..first + len] {
                block.answered = block.versions.len() - 1;
                block.flushed = if fua { block.answered } else { block.flushed };
            }
        }
    }

    async fn write(&mut self, first: usize, len: usize) {
        self.change(Op::Write, first, len, false).await;
    }

    /// Zeros are written as other data is.
    async fn write_zeros(&mut self, first: usize, len: usize) {
        let next = std::mem::take(&mut self.next);
        self.write(first, len).await;
        self.next = next;
    }

    async fn tidy(&mut self, order: &str) {
        let done = self.rig.control("tidy", order).await.unwrap();
        if let (Ok(Answer::Text(said)), 0) = (&done, self.failures) {
            assert!(!said.contains("\"moved\":0,"), "there was nothing to be done: {said}");
        }
        self.note("putting it in order", done.map(drop));
    }

    fn all_is_flushed(&mut self) {
        self.blocks.iter_mut().for_each(|block| block.flushed = block.answered);
    }

    async fn flush(&mut self) {
        let done = self.rig.flush().await;
        if self.note("a flush", done) {
            self.all_is_flushed();
        }
    }

    async fn checkpoint(&mut self) {
        let done = self.rig.checkpoint().await;
        if self.note("a checkpoint", done) {
            self.all_is_flushed();
        }
    }

    async fn snapshot(&mut self, name: &str) {
        let done = self.rig.control("snapshot", name).await.unwrap().map(drop);
        if self.note("a snapshot", done) {
            self.all_is_flushed();
            let may = self.blocks.iter().map(|block| (block.answered, block.versions.len() - 1));
            self.snapshots.push(Snapshot(name.to_owned(), may.collect()));
        }
    }

    async fn delete_snapshot(&mut self, name: &str) {
        // If it fails nobody knows whether it is there.
        self.snapshots.retain(|snapshot| snapshot.0 != name);
        let done = self.rig.control("delete_snapshot", name).await.unwrap().map(drop);
        self.note("deleting a snapshot", done);
    }

    /// What is read is what was answered last, or what came after it, whatever has failed.
    async fn read(&self) {
        let Ok(found) = self.rig.disk.read(0, BLOCKS as u64 * BLOCK).await else {
            // There is no pool yet.
            assert!(
                self.failures > 0 && self.blocks.iter().all(|block| block.answered == 0),
                "{}",
                self.what
            );
            return;
        };
        self.holds(&found, |block| block.answered);
    }

    fn holds(&self, found: &[u8], from: impl Fn(&Block) -> usize) {
        for (ix, (block, found)) in self.blocks.iter().zip(found.chunks(BLOCK as usize)).enumerate() {
            let allowed = &block.versions[from(block)..];
            if let Some(said) = misfit(ix, found, allowed) {
                panic!("{}: block {ix} has {said}, not one of {allowed:?}", self.what);
            }
        }
    }

    async fn tell(&mut self) {
        self.write(0, 3).await;
        self.write(500, 60).await;
        self.flush().await;
        for block in [520, 530, 540] {
            self.write(block, 1).await;
        }
        self.write(1, 1).await;
        self.change(Op::Write, 590, 5, true).await;
        self.checkpoint().await;
        self.tidy("rows").await;
        self.write_zeros(544, 3).await;
        self.tidy("holes").await;
        self.write(0, 5).await;
        self.snapshot("a").await;
        self.write(2, 500).await;
        self.change(Op::Discard, 4, 2, false).await;
        self.read().await;
        self.snapshot("b").await;
        self.write(0, 9).await;
        self.checkpoint().await;
        self.change(Op::WriteZeroes, 500, 50, false).await;
        self.write(3, 3).await;
        self.flush().await;
        self.delete_snapshot("a").await;
        self.change(Op::Write, 100, 2, true).await;
        self.write(100, 4).await;
        self.read().await;
        self.checkpoint().await;
        self.write(7, 1).await;
    }

    /// The process dies, or the power is lost as well: what another process finds, and what it can do.
    async fn end(&mut self, power: bool) {
        self.rig.element("P").call("pull", "").unwrap();
        if power {
            self.rig.lose_power();
        }
        let image = self.rig.image().await;
        let (below, size) = (Below::Plain(image.as_fd()), image.metadata().unwrap().len());
        let opening = Opening::writable(1 << 20);
        let pool = match block_on(open_newest(opening, size, below)) {
            Ok(pool) => Arc::new(pool),
            // It failed before there was one.
            Err(_) if self.blocks.iter().all(|block| block.answered == 0) => return,
            Err(error) => panic!("{}: {error}", self.what),
        };
        let findings = block_on(check(&pool, below)).unwrap();
        assert_eq!(findings.said.all, [] as [String; 0], "{}", self.what);
        let leaked = pool.space.leaked(&pool.core().journal);
        assert_eq!(leaked, [] as [u64; 0], "{}: used, and in no tree", self.what);
        let Some(number) = pool.core().volume("v") else {
            assert!(self.blocks.iter().all(|block| block.answered == 0), "{}: no volume", self.what);
            return;
        };
        let from = |block: &Block| if power { block.flushed } else { block.answered };
        self.holds(&read_all(&pool, number, BLOCKS, below), from);
        for Snapshot(name, may) in &self.snapshots {
            let taken = pool.core().snapshot(number, name);
            let taken = taken.unwrap_or_else(|| panic!("{}: snapshot {name} is gone", self.what));
            let found = read_all(&pool, taken, BLOCKS, below);
            for (ix, ((first, last), found)) in may.iter().zip(found.chunks(BLOCK as usize)).enumerate() {
                let allowed = &self.blocks[ix].versions[*first..=*last];
                let said = misfit(ix, found, allowed);
                assert_eq!(said, None, "{}: snapshot {name}, block {ix}: {allowed:?}", self.what);
            }
        }
    }
}

/// Tells the story with the `nth` of those requests failing. False if there are not so many.
fn tell(error: &str, nth: u64, power: bool) -> bool {
    run(nth, async |host| {
        let what = format!("{error}, number {nth}, power {power}");
        let mut tale = Tale::new(&host, &format!("{error} (after {nth}) (count 1)"), what).await;
        tale.tell().await;
        let failed = tale.failed();
        assert!(failed || tale.failures == 0, "{}: failed for no reason", tale.what);
        tale.end(power).await;
        failed
    })
}

/// Every so manieth of them, or all of them if that is asked for.
fn sweep(error: &str, most: u64) {
    let every = std::env::var("PARALLAX_EVERY").ok().and_then(|every| every.parse().ok()).unwrap_or(most);
    let mut nth = 0;
    // There are few flushes, and what matters about them is what the power leaves.
    while tell(error, nth, nth / every % 2 == 1) && (every > 1 || tell(error, nth, nth % 2 == 0)) {
        nth += every;
    }
    assert!(nth > 20, "there were only {nth} of them: {error}");
}

#[test]
fn any_write_may_fail() {
    sweep("(op write)", 3);
}

#[test]
fn any_write_may_find_no_room() {
    sweep("(op write) (errno ENOSPC)", 4);
}

#[test]
fn the_answer_to_any_write_may_be_lost() {
    sweep("(op write) (late yes)", 4);
}

#[test]
fn any_flush_may_fail() {
    sweep("(op flush)", 1);
}
