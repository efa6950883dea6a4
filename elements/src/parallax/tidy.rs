//! Brings order into a volume while guests use it: what lies here and there in the pool lies in a row again, and what holds only
//! zeros becomes a hole. One leaf of the volume, 2 MiB, at a time; what is in order is left alone, so there is nothing to remember.

use super::below::Below;
use super::format::{BLOCK, Change, SLOTS};
use super::moves::Mover;
use super::open::crc_of;
use super::pool::{Fresh, with_nodes};
use super::promise::Promise;
use super::space::Want;
use super::volume::{Hold, Volume};
use blockmason::{Data, Error, Kind, Result};
use serde::Serialize;
use std::ops::{AddAssign, Range};
use std::time::Duration;

const LEAF: u64 = SLOTS as u64;

/// Blocks in a row, 256 KiB: longer rows make reading no faster that would be worth copying them.
const ROW: u64 = 64;

/// Blocks of which one change of a move speaks: where a guest has written to one of them, all stay where they are.
const TOGETHER: u64 = 16;

/// How long leaves are looked at that are in order, before whoever asks hears of it.
const LOOK: Duration = Duration::from_millis(50);

/// What is to be done.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tidying {
    /// Blocks lie in a row; those as well that others see, if that is wanted, which takes room.
    Rows { unshare: bool },
    /// Blocks of zeros are holes.
    Holes,
}

/// What has been done. Sizes are in bytes.
#[derive(Default, Serialize)]
pub(super) struct Tidied {
    /// Leaves that have something.
    windows: u64,
    /// Those of them in which something has moved.
    moved_windows: u64,
    /// What has moved, or has become a hole.
    moved: u64,
    /// Rows in the pool before and after that.
    pieces_before: u64,
    pieces_after: u64,
    /// What stays as it is because others see it, in leaves that are not in order.
    shared: u64,
    /// What stays because guests have changed it meanwhile.
    busy: u64,
    /// Leaves that stay because there is no room to spare.
    no_room: u64,
    /// Where something is damaged, which stays as it is: bytes of the volume.
    damaged: Vec<u64>,
}

impl AddAssign for Tidied {
    fn add_assign(&mut self, mut other: Tidied) {
        self.windows += other.windows;
        self.moved_windows += other.moved_windows;
        self.moved += other.moved;
        self.pieces_before += other.pieces_before;
        self.pieces_after += other.pieces_after;
        self.shared += other.shared;
        self.busy += other.busy;
        self.no_room += other.no_room;
        self.damaged.append(&mut other.damaged);
    }
}

/// A block of the volume that is no hole.
struct Block {
    block: u64,
    at: u64,
    /// In volumes that have checksums.
    crc: Option<u32>,
    /// Nobody else sees it.
    own: bool,
}

/// What is in a leaf, and stays where it is as long as that is held.
struct Leaf {
    blocks: Vec<Block>,
    _hold: Hold,
}

impl Leaf {
    fn own(&self) -> u64 {
        self.blocks.iter().filter(|block| block.own).count() as u64
    }

    /// Rows in the pool, whatever holes there are between.
    fn pieces(&self) -> u64 {
        self.blocks.chunk_by(|one, next| one.at + 1 == next.at).count() as u64
    }

    /// The same if all that moves lay in one row.
    fn pieces_then(&self, moves: impl Fn(&Block) -> bool) -> u64 {
        let goes_on = |one: &Block, next: &Block| match (moves(one), moves(next)) {
            (true, true) => true,
            (false, false) => one.at + 1 == next.at,
            _ => false,
        };
        self.blocks.chunk_by(goes_on).count() as u64
    }

    /// The most rows with which it is in order.
    fn enough(&self) -> u64 {
        (self.blocks.len() as u64).div_ceil(ROW)
    }
}

impl Volume {
    /// Does that from an offset on, until something has been done or some time has passed. The offset at which to go on; none at
    /// the end.
    ///
    /// # Errors
    /// [`Kind::Busy`] if somebody else does it just now.
    pub(super) async fn tidy(
        &self,
        offset: u64,
        order: Tidying,
        below: Below<'_>,
    ) -> Result<(Tidied, Option<u64>)> {
        self.pool.check()?;
        let (begun, mut tidied) = (blockmason::rt::now(), Tidied::default());
        let mut leaf = offset / (LEAF * BLOCK);
        while let Some(next) = self.next_leaf(leaf, below).await? {
            let done = self.tidy_leaf(next, order, below).await?;
            let ends = done.moved > 0 || done.no_room > 0 || begun.elapsed() > LOOK;
            tidied += done;
            leaf = next + 1;
            if ends {
                return Ok((tidied, Some(leaf * LEAF * BLOCK)));
            }
        }
        Ok((tidied, None))
    }

    /// The first leaf from there on that has something.
    async fn next_leaf(&self, mut leaf: u64, below: Below<'_>) -> Result<Option<u64>> {
        loop {
            let left = leaf * LEAF..self.blocks_of();
            if left.is_empty() {
                return Ok(None);
            }
            let (pieces, _hold) = self.find(left, 1, false, below).await?;
            let Some(hole) = pieces.first().filter(|piece| piece.at == 0) else { return Ok(Some(leaf)) };
            let behind = (hole.first + hole.len) / LEAF;
            if behind == leaf && (hole.first + hole.len) < self.blocks_of() {
                return Ok(Some(leaf));
            }
            leaf = behind.max(leaf + 1);
        }
    }

    async fn tidy_leaf(&self, leaf: u64, order: Tidying, below: Below<'_>) -> Result<Tidied> {
        // What others see of it does not change otherwise than by a snapshot.
        let _settled = self.pool.administering.read().await;
        match order {
            Tidying::Rows { unshare } => self.to_rows(leaf, unshare, below).await,
            Tidying::Holes => self.to_holes(leaf, below).await,
        }
    }

    async fn see(&self, leaf: u64, below: Below<'_>) -> Result<Leaf> {
        let range = leaf * LEAF..((leaf + 1) * LEAF).min(self.blocks_of());
        let (pieces, _hold) = self.find(range.clone(), usize::MAX, false, below).await?;
        let ((_, newest), origin) = self.pool.core().ancestors(self.number());
        let young = self.born_after_in(range, newest.max(origin), below).await?;
        let mut own = [false; SLOTS];
        for block in young.into_iter().flatten() {
            own[(block % LEAF) as usize] = true;
        }
        let mut blocks = Vec::new();
        // What is compressed lies in a row already.
        for piece in pieces.iter().filter(|piece| piece.at != 0 && piece.pack.is_none()) {
            blocks.extend((0..piece.len).map(|ix| Block {
                block: piece.first + ix,
                at: piece.at + ix,
                crc: piece.crcs.get(ix as usize).copied(),
                own: own[((piece.first + ix) % LEAF) as usize],
            }));
        }
        Ok(Leaf { blocks, _hold })
    }

    /// Opens a window over a leaf.
    async fn mover(&self, leaf: u64) -> Result<Mover<'_>> {
        let mover = self.pool.open_window(self.number(), leaf).await;
        mover.ok_or_else(|| Error::new(Kind::Busy, format!("{} is being put in order already", self.name())))
    }

    /// What these blocks hold, in one row; those that cannot be read, or are damaged, are left out, and named.
    async fn contents(
        &self,
        blocks: Vec<Block>,
        damaged: &mut Vec<u64>,
        below: Below<'_>,
    ) -> (Vec<Block>, Vec<u8>) {
        let (mut good, mut bytes) = (Vec::new(), Vec::new());
        let mut left = blocks.into_iter().peekable();
        while let Some(first) = left.next() {
            let mut row = vec![first];
            while let Some(next) = left.next_if(|next| row[0].at + row.len() as u64 == next.at) {
                row.push(next);
            }
            let read = below.read(row[0].at * BLOCK, row.len() as u64 * BLOCK).await;
            for (block, from) in row.into_iter().zip((0..).step_by(BLOCK as usize)) {
                let data = read.as_ref().ok().map(|data| data.slice(from..from + BLOCK as usize));
                match data.filter(|data| block.crc.is_none_or(|crc| crc == crc_of(data))) {
                    Some(data) => {
                        bytes.extend_from_slice(&data.to_vec());
                        good.push(block);
                    }
                    None => damaged.push(block.block * BLOCK),
                }
            }
        }
        (good, bytes)
    }

    async fn to_rows(&self, leaf: u64, unshare: bool, below: Below<'_>) -> Result<Tidied> {
        let moves = |block: &Block| unshare || block.own;
        let seen = self.see(leaf, below).await?;
        let (pieces, enough) = (seen.pieces(), seen.enough());
        let mut tidied =
            Tidied { windows: 1, pieces_before: pieces, pieces_after: pieces, ..Tidied::default() };
        if pieces <= enough {
            return Ok(tidied);
        }
        if !unshare {
            tidied.shared = (seen.blocks.len() as u64 - seen.own()) * BLOCK;
        }
        let then = seen.pieces_then(moves);
        if then > enough && then > pieces / 2 {
            return Ok(tidied);
        }
        drop(seen);
        if !self.has_room_to_move(below).await? {
            tidied.no_room = 1;
            return Ok(tidied);
        }
        let mover = self.mover(leaf).await?;
        let Leaf { blocks, _hold } = self.see(leaf, below).await?;
        let blocks = blocks.into_iter().filter(moves).collect();
        let (blocks, bytes) = self.contents(blocks, &mut tidied.damaged, below).await;
        let wanted = blocks.len() as u64;
        if self.put_in_rows(leaf, (blocks, bytes), &mover, below).await? {
            tidied.moved = mover.moved() * BLOCK;
            tidied.busy = (wanted - mover.moved()) * BLOCK;
        } else {
            tidied.no_room = 1;
        }
        drop((mover, _hold));
        if tidied.moved > 0 {
            (tidied.moved_windows, tidied.pieces_after) = (1, self.see(leaf, below).await?.pieces());
        }
        Ok(tidied)
    }

    /// True if a leaf may be copied, and enough is left for guests, who do not write in place to it meanwhile.
    async fn has_room_to_move(&self, below: Below<'_>) -> Result<bool> {
        let has = || {
            let core = self.pool.core();
            let blocks = with_nodes(LEAF) + core.nodes_for(self.number());
            self.pool.space.has_room(core.kept() + 2 * blocks + self.pool.space.slop())
        };
        if has() {
            return Ok(true);
        }
        // What has been moved leaves room where it was.
        self.pool.checkpoint(below).await?;
        Ok(has())
    }

    /// Writes blocks to new places, in a row, and logs that. False if there is no room.
    async fn put_in_rows(
        &self,
        leaf: u64,
        (blocks, bytes): (Vec<Block>, Vec<u8>),
        mover: &Mover<'_>,
        below: Below<'_>,
    ) -> Result<bool> {
        if blocks.is_empty() {
            return Ok(true);
        }
        let near = self.behind(leaf, below).await?;
        let more = blocks.iter().filter(|block| !block.own).count() as u64;
        let fresh = Fresh { placed: more, filled: 0 };
        let count = blocks.len() as u64;
        let promise =
            self.promise_blocks(count, fresh, &(leaf * LEAF..(leaf + 1) * LEAF), false, below).await;
        let mut promise = match promise {
            Err(error) if error.kind() == Kind::NoSpace => return Ok(false),
            promise => promise?,
        };
        let Some(rows) = self.take_rows(count, near, &mut promise, below).await? else { return Ok(false) };
        let data = Data::shared(bytes);
        let changes = self.changes(&blocks, rows.iter().cloned().flatten(), &data);
        let mut from = 0;
        for row in rows {
            let len = ((row.end - row.start) * BLOCK) as usize;
            if let Err(error) = below.write(row.start * BLOCK, data.slice(from..from + len)).await {
                self.pool.core().let_go(changes);
                return Err(error);
            }
            from += len;
        }
        self.pool.log(mover.part(changes), below).await?;
        promise.keep();
        Ok(true)
    }

    /// Behind where the block lies that comes before a leaf.
    async fn behind(&self, leaf: u64, below: Below<'_>) -> Result<Option<u64>> {
        let Some(before) = (leaf * LEAF).checked_sub(1) else { return Ok(None) };
        let (pieces, _hold) = self.find(before..before + 1, 1, false, below).await?;
        Ok(pieces.first().filter(|piece| piece.at != 0).map(|piece| piece.at + 1))
    }

    /// Free blocks in one row, or in few. None if there are none.
    async fn take_rows(
        &self,
        count: u64,
        near: Option<u64>,
        promise: &mut Promise<'_>,
        below: Below<'_>,
    ) -> Result<Option<Vec<Range<u64>>>> {
        let space = &self.pool.space;
        let (mut rows, mut left) = (Vec::new(), count);
        while left > 0 {
            let row = match space.take(near, Want { least: left, most: left }, below).await {
                Ok(row) => Some(row),
                Err(error) if error.kind() == Kind::NoSpace => {
                    space.take_now(near, Want { least: left.min(ROW), most: left })
                }
                Err(error) => {
                    self.pool.fails_with(&error);
                    return Err(error);
                }
            };
            let Some(row) = row else {
                // Nobody knows of them.
                rows.into_iter().for_each(|row| space.give(row));
                return Ok(None);
            };
            left -= row.end - row.start;
            promise.placed(row.end - row.start);
            rows.push(row);
        }
        Ok(Some(rows))
    }

    /// What is said of blocks that have gone to these places.
    fn changes(&self, blocks: &[Block], places: impl Iterator<Item = u64>, data: &Data) -> Vec<Change> {
        let placed: Vec<(&Block, u64)> = blocks.iter().zip(places).collect();
        let together = |one: &(&Block, u64), next: &(&Block, u64)| {
            one.0.block + 1 == next.0.block && one.1 + 1 == next.1 && !next.0.block.is_multiple_of(TOGETHER)
        };
        let (mut changes, mut from) = (Vec::new(), 0);
        for run in placed.chunk_by(together) {
            let to = from + run.len() * BLOCK as usize;
            changes.push(Change::Map {
                volume: self.number(),
                first: run[0].0.block,
                len: run.len() as u32,
                at: run[0].1,
                crc: crc_of(&data.slice(from..to)),
                pack: None,
                crcs: run.iter().filter_map(|(block, _)| block.crc).collect(),
            });
            from = to;
        }
        changes
    }

    async fn to_holes(&self, leaf: u64, below: Below<'_>) -> Result<Tidied> {
        let seen = self.see(leaf, below).await?;
        let shared = (seen.blocks.len() as u64 - seen.own()) * BLOCK;
        let mut tidied = Tidied { windows: 1, shared, ..Tidied::default() };
        if self.zeros(seen, &mut tidied.damaged, below).await.is_empty() {
            return Ok(tidied);
        }
        tidied.damaged.clear();
        let row = leaf * LEAF..(leaf + 1) * LEAF;
        let promise = self.promise_to_punch(&row, below).await?;
        let mover = self.mover(leaf).await?;
        let seen = self.see(leaf, below).await?;
        let zeros = self.zeros(seen, &mut tidied.damaged, below).await;
        if zeros.is_empty() {
            return Ok(tidied);
        }
        let together = |one: &u64, next: &u64| one + 1 == *next && !next.is_multiple_of(TOGETHER);
        let hole = |run: &[u64]| Change::Map {
            volume: self.number(),
            first: run[0],
            len: run.len() as u32,
            at: 0,
            crc: 0,
            pack: None,
            crcs: Vec::new(),
        };
        let changes = zeros.chunk_by(together).map(hole).collect();
        self.pool.log(mover.part(changes), below).await?;
        promise.keep();
        tidied.moved = mover.moved() * BLOCK;
        tidied.busy = zeros.len() as u64 * BLOCK - tidied.moved;
        tidied.moved_windows = u64::from(tidied.moved > 0);
        Ok(tidied)
    }

    /// Those blocks of a leaf that only the volume sees, and that hold zeros.
    async fn zeros(&self, seen: Leaf, damaged: &mut Vec<u64>, below: Below<'_>) -> Vec<u64> {
        let Leaf { blocks, _hold } = seen;
        let own = blocks.into_iter().filter(|block| block.own).collect();
        let (blocks, bytes) = self.contents(own, damaged, below).await;
        let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        let found = blocks.iter().zip(bytes.chunks(BLOCK as usize));
        found.filter(|(_, bytes)| is_zero(bytes)).map(|(block, _)| block.block).collect()
    }
}
