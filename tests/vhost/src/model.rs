//! Random requests with stamped blocks, and a model of what each block holds. Requests on the same block are never
//! in flight together unless all of them read, as no file system has them: so every block's content is known, and
//! an acknowledged write that is lost, or an older one that is carried out again after it, shows.

use crate::blk::{Blk, Done, FLUSH, OK, Request, SECTOR, WRITE_ZEROES};
use std::collections::HashMap;
use std::time::Duration;

/// Bytes of a block.
pub const BLOCK: u64 = 4096;

/// Blocks of a request, at most.
const LONGEST: u64 = 8;

/// A disk under random requests.
pub struct Load {
    /// The disk.
    pub blk: Blk,
    rng: fastrand::Rng,
    /// The stamp of each block; 0 where it is zeros.
    holds: Vec<u64>,
    /// Readers of each block, or -1 for a writer.
    users: Vec<i32>,
    flying: HashMap<(usize, u16), Action>,
    stamps: u64,
    /// Requests that were completed.
    pub completed: u64,
    /// Of these, those that changed something.
    pub changes: u64,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Read { first: u64, count: u64 },
    Write { first: u64, count: u64, stamp: u64 },
    Flush,
}

impl Action {
    fn blocks(self) -> std::ops::Range<u64> {
        match self {
            Action::Read { first, count } | Action::Write { first, count, .. } => first..first + count,
            Action::Flush => 0..0,
        }
    }
}

impl Load {
    /// Random requests on a disk of so many blocks, all of them zeros.
    pub fn new(blk: Blk, blocks: u64, seed: u64) -> Load {
        let (holds, users) = (vec![0; blocks as usize], vec![0; blocks as usize]);
        let rng = fastrand::Rng::with_seed(seed);
        Load { blk, rng, holds, users, flying: HashMap::new(), stamps: 0, completed: 0, changes: 0 }
    }

    /// Fills all queues with requests, and tells the device.
    pub fn fill(&mut self) {
        for queue in 0..self.blk.shape().queues {
            while self.blk.has_room(queue) {
                // When nearly all blocks are in use, fewer requests are in flight.
                let Some((action, request)) = self.draw() else { break };
                let head = self.blk.submit(queue, request);
                self.flying.insert((queue, head), action);
            }
            self.blk.kick(queue);
        }
    }

    /// Takes and checks what is completed. Returns how many requests that were.
    pub fn collect(&mut self) -> u64 {
        let before = self.completed;
        for queue in 0..self.blk.shape().queues {
            while let Some(done) = self.blk.collect(queue) {
                self.check(queue, &done);
            }
        }
        self.completed - before
    }

    /// Leaves the processor to the device until it calls, for a millisecond at most.
    pub fn rest(&mut self) {
        let queue = self.rng.usize(..self.blk.shape().queues);
        self.blk.rings[queue].arm();
        if !self.blk.rings[queue].is_ready() {
            crate::wait_for(&self.blk.device.vrings[queue].call, Some(Duration::from_millis(1)));
        }
    }

    /// Waits for all that is in flight, and checks it.
    pub fn drain(&mut self) {
        for queue in 0..self.blk.shape().queues {
            while self.flying.keys().any(|(of, _)| *of == queue) {
                let done = self.blk.next(queue);
                self.check(queue, &done);
            }
        }
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// Reads every block of the disk and checks it; nothing may be in flight.
    pub fn check_all(&mut self) {
        for block in 0..self.holds.len() as u64 {
            let found = self.blk.read(block * (BLOCK / SECTOR), BLOCK as u32);
            check_block(&found, block, self.holds[block as usize]);
        }
    }

    /// Checks the image of a back-end that has died: a block holds what was acknowledged last, or, in sectors, what a
    /// request in flight was to write.
    pub fn check_image(&self, image: &[u8]) {
        let mut pending: HashMap<u64, u64> = HashMap::new();
        for action in self.flying.values() {
            if let Action::Write { stamp, .. } = action {
                pending.extend(action.blocks().map(|block| (block, *stamp)));
            }
        }
        for (block, found) in (0_u64..).zip(image.chunks(BLOCK as usize)) {
            let holds = self.holds[block as usize];
            match pending.get(&block) {
                None => check_block(found, block, holds),
                Some(new) => {
                    let (old, new) = (contents(block, holds), contents(block, *new));
                    let sector = SECTOR as usize;
                    for (ix, found) in found.chunks(sector).enumerate() {
                        let at = ix * sector..(ix + 1) * sector;
                        let is = found == &old[at.clone()] || found == &new[at];
                        assert!(is, "sector {ix} of block {block} holds neither its old nor its new content");
                    }
                }
            }
        }
    }

    fn draw(&mut self) -> Option<(Action, Request)> {
        let pieces = self.rng.usize(1..=6);
        let dice = self.rng.u32(..100);
        if dice < 4 {
            return Some((Action::Flush, Request::of(FLUSH, 0)));
        }
        let (first, count) = self.room(dice >= 40)?;
        let sector = first * (BLOCK / SECTOR);
        if dice < 40 {
            self.users[first as usize..][..count as usize].iter_mut().for_each(|users| *users += 1);
            let request = Request::read(sector, (count * BLOCK) as u32).in_pieces(pieces);
            return Some((Action::Read { first, count }, request));
        }
        self.users[first as usize..][..count as usize].fill(-1);
        if dice < 46 {
            let range = (sector, (count * BLOCK / SECTOR) as u32, self.rng.u32(..2));
            let action = Action::Write { first, count, stamp: 0 };
            return Some((action, Request::ranges(WRITE_ZEROES, &[range])));
        }
        self.stamps += 1;
        let stamp = self.stamps;
        let data: Vec<u8> = (first..first + count).flat_map(|block| contents(block, stamp)).collect();
        Some((Action::Write { first, count, stamp }, Request::write(sector, &data).in_pieces(pieces)))
    }

    /// Some blocks that nobody uses, or only reads where this reads, too.
    fn room(&mut self, write: bool) -> Option<(u64, u64)> {
        let blocks = self.holds.len() as u64;
        for _ in 0..16 {
            let count = self.rng.u64(1..=LONGEST);
            // Half of all requests go to a small part, so that blocks are written again soon.
            let end = if self.rng.bool() { blocks } else { blocks / 16 };
            let first = self.rng.u64(..end - count);
            let users = &self.users[first as usize..][..count as usize];
            if users.iter().all(|users| if write { *users == 0 } else { *users >= 0 }) {
                return Some((first, count));
            }
        }
        None
    }

    fn check(&mut self, queue: usize, done: &Done) {
        let action = self.flying.remove(&(queue, done.head)).expect("what is completed was in flight");
        assert_eq!(done.status, OK, "{action:?} has failed");
        self.completed += 1;
        match action {
            Action::Flush => {}
            Action::Read { .. } => {
                for (block, found) in action.blocks().zip(done.data.chunks(BLOCK as usize)) {
                    check_block(found, block, self.holds[block as usize]);
                    self.users[block as usize] -= 1;
                }
            }
            Action::Write { stamp, .. } => {
                self.changes += 1;
                for block in action.blocks() {
                    self.holds[block as usize] = stamp;
                    self.users[block as usize] = 0;
                }
            }
        }
    }
}

/// What a block with a stamp is filled with.
pub fn contents(block: u64, stamp: u64) -> Vec<u8> {
    let words = if stamp == 0 { [0; 4] } else { [stamp, block, !stamp, 0x7374_616d_7021] };
    words.map(u64::to_le_bytes).concat().repeat(BLOCK as usize / 32)
}

fn check_block(found: &[u8], block: u64, stamp: u64) {
    if found == contents(block, stamp) {
        return;
    }
    let word = |ix: usize| u64::from_le_bytes(found[ix * 8..][..8].try_into().unwrap());
    panic!("block {block} must have stamp {stamp}; it begins with stamp {} of block {}", word(0), word(1));
}
