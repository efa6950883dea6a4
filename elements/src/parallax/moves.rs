//! Blocks of a volume that go elsewhere, or become holes, while guests use it, and are to them what they were.
//!
//! A move is a write of what is there already. So it must not come after a write that it does not know of: while a *window* of
//! the volume is open nothing is written in place to it, and what else changes in it is noted. The move is one part of a record of the log,
//! and what of it is not true any more is taken out when that record is made: all records before it have been applied by then, and
//! what stands before it in the same one is looked at. A replay of the log finds only moves that were right where they stand.

use super::format::{Change, SLOTS};
use super::log::Part;
use super::pool::{Core, Pool};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The blocks of one leaf of a volume, which are being moved. It changes under the lock of the pool's core only.
pub(super) struct Window {
    volume: u32,
    leaf: u64,
    /// A bit for each block that has changed, or that a snapshot sees by now.
    changed: [AtomicU64; SLOTS / 64],
    /// Blocks that were moved.
    moved: AtomicU64,
}

impl Window {
    fn new(volume: u32, leaf: u64) -> Window {
        Window { volume, leaf, changed: Default::default(), moved: AtomicU64::new(0) }
    }

    pub(super) fn blocks(&self) -> Range<u64> {
        self.leaf * SLOTS as u64..(self.leaf + 1) * SLOTS as u64
    }

    /// Those of these blocks that are its own, as the word and the bit of each.
    fn bits(&self, blocks: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
        let own = self.blocks();
        let inside = blocks.start.max(own.start)..blocks.end.min(own.end);
        inside.map(move |block| block - own.start).map(|ix| ((ix / 64) as usize, 1 << (ix % 64)))
    }

    fn note(&self, blocks: Range<u64>) {
        for (word, bit) in self.bits(blocks) {
            self.changed[word].fetch_or(bit, Ordering::Relaxed);
        }
    }

    fn has_changed(&self, blocks: Range<u64>) -> bool {
        self.bits(blocks).any(|(word, bit)| self.changed[word].load(Ordering::Relaxed) & bit != 0)
    }
}

/// The volume of a change, and the blocks of it that are not to be moved after it.
fn touched(change: &Change) -> (u32, Range<u64>) {
    match change {
        Change::Map { volume, first, len, .. } => (*volume, *first..first + u64::from(*len)),
        // It sees all of them: from now on a move takes room, and does not make any.
        Change::Snapshot { volume, .. } => (*volume, 0..u64::MAX),
    }
}

impl Core {
    /// True if one of these blocks of a volume is being moved, and not written in place.
    pub(super) fn moves(&self, volume: u32, blocks: Range<u64>) -> bool {
        let window = self.lines.get(&volume).and_then(|line| line.window.as_ref());
        window.is_some_and(|window| window.bits(blocks).next().is_some())
    }

    /// A move does not come after this.
    pub(super) fn note_change(&self, change: &Change) {
        let (volume, blocks) = touched(change);
        if let Some(window) = self.lines.get(&volume).and_then(|line| line.window.as_ref()) {
            window.note(blocks);
        }
    }

    /// Takes out of moves what is not true any more. A record is made of these parts now, and is the next one.
    pub(super) fn settle_moves(&mut self, parts: &mut [Part]) {
        for part in parts {
            let Some(window) = part.window.clone() else {
                part.changes.iter().for_each(|change| self.note_change(change));
                continue;
            };
            let holds = |change: &Change| !window.has_changed(touched(change).1);
            let (kept, gone): (Vec<_>, Vec<_>) =
                std::mem::take(&mut part.changes).into_iter().partition(holds);
            let blocks = kept.iter().map(|change| touched(change).1).map(|blocks| blocks.end - blocks.start);
            window.moved.store(blocks.sum(), Ordering::Relaxed);
            part.changes = kept;
            self.let_go(gone);
        }
    }

    /// The blocks of a window may be written in place again, wherever they are now.
    pub(super) fn close_window(&mut self, window: &Arc<Window>) {
        if let Some(line) = self.lines.get_mut(&window.volume) {
            line.window.take_if(|open| Arc::ptr_eq(open, window));
        }
    }
}

impl Pool {
    /// Opens a window once nothing is written in place to it any more. Other blocks of the volume are, meanwhile. None if there is one
    /// already.
    pub(super) async fn open_window(&self, volume: u32, leaf: u64) -> Option<Mover<'_>> {
        let window = Arc::new(Window::new(volume, leaf));
        loop {
            // Whoever has opened one before may have gone too early to wait for those.
            let before = self.core().lines.get(&volume)?.in_place[1].clone();
            before.none().await;
            let mut core = self.core();
            let line = core.lines.get_mut(&volume)?;
            if line.window.is_some() {
                return None;
            }
            if Arc::ptr_eq(&before, &line.in_place[1]) {
                line.window = Some(window.clone());
                // Those that come from now on are not waited for: they are elsewhere.
                line.in_place = [Arc::default(), line.in_place[0].clone()];
                break;
            }
        }
        let mover = Mover { pool: self, window, logged: AtomicBool::new(false) };
        let before = self.core().lines.get(&volume)?.in_place[1].clone();
        before.none().await;
        Some(mover)
    }
}

/// Whoever moves blocks of a window. It is closed when he has gone, or once the record of the move has been applied.
pub(super) struct Mover<'a> {
    pool: &'a Pool,
    window: Arc<Window>,
    /// The move is on its way into the log.
    logged: AtomicBool,
}

impl Mover<'_> {
    /// The changes of the move: their data, if they have any, has been written. Each happens as a whole or not at all.
    pub(super) fn part(&self, changes: Vec<Change>) -> Part {
        self.logged.store(true, Ordering::Relaxed);
        Part::of_move(changes, self.window.clone())
    }

    /// Blocks that were moved, once it has been logged.
    pub(super) fn moved(&self) -> u64 {
        self.window.moved.load(Ordering::Relaxed)
    }
}

impl Drop for Mover<'_> {
    fn drop(&mut self) {
        let mut core = self.pool.core();
        if self.logged.load(Ordering::Relaxed) {
            // What is still on its way is not to happen when nobody knows any more what happens beside it.
            self.window.note(self.window.blocks());
        } else {
            core.close_window(&self.window);
        }
        drop(core);
        // Writes for which there is only room in place.
        self.pool.space.blocks.room.notify_waiters();
    }
}
