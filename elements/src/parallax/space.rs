//! What one owner has of the block store: takes blocks, gives them back, promises them; and what his records say.

use super::below::Below;
use super::blocks::{Blocks, Extent, Map, Owned, STORE, State, ones};
use super::format::{EXTENT, ExtentRecord, Label, damaged};
use super::lease::{self, Ask, Free, Row};
use blockmason::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, MutexGuard};

/// Extents that are given away at once, at most: 256 MiB of them, for which room is set aside.
const MOST_GRANT: u64 = 128;

/// Blocks that somebody wants in a row.
#[derive(Clone, Copy)]
pub(super) struct Want {
    pub(super) least: u64,
    pub(super) most: u64,
}

/// What changes in the records of extents with a checkpoint.
#[derive(Default)]
pub(super) struct Difference {
    /// By extent: blocks that have become reachable, and blocks that are not any more.
    extents: BTreeMap<u64, (Map, Map)>,
}

impl Difference {
    pub(super) fn add(&mut self, blocks: Range<u64>) {
        each_word(blocks, |extent, word, mask| self.extents.entry(extent).or_default().0[word] |= mask);
    }

    pub(super) fn remove(&mut self, blocks: Range<u64>) {
        each_word(blocks, |extent, word, mask| self.extents.entry(extent).or_default().1[word] |= mask);
    }

    /// The record of an extent is written, changed or not.
    pub(super) fn touch(&mut self, extent: u64) {
        self.extents.entry(extent).or_default();
    }
}

/// Splits blocks into words of the maps of extents.
fn each_word(blocks: Range<u64>, mut each: impl FnMut(u64, usize, u64)) {
    let mut at = blocks.start;
    while at < blocks.end {
        let end = blocks.end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
        each(at / EXTENT, (at % EXTENT / 64) as usize, mask);
        at = end;
    }
}

/// What one owner has of the block store.
pub(super) struct Space {
    owner: u32,
    epoch: u64,
    pub(super) blocks: Arc<Blocks>,
}

/// Sets room aside for the first of these extents, as many as there is room for. Which those are.
///
/// # Errors
/// [`Kind::NoSpace`] if there is none for the first.
async fn allocate(mut extents: Range<u64>, below: Below<'_>) -> Result<Range<u64>> {
    loop {
        let count = extents.end - extents.start;
        match below.allocate(extents.start * EXTENT..extents.end * EXTENT).await {
            Err(error) if error.kind() == Kind::NoSpace && count > 1 => {
                extents.end = extents.start + count / 2
            }
            done => return done.map(|()| extents),
        }
    }
}

impl Space {
    /// The space of an owner whose journal says this of some extents.
    pub(super) fn new(blocks: Arc<Blocks>, owner: u32, epoch: u64, journal: &[(u64, ExtentRecord)]) -> Space {
        let mut state = blocks.state();
        for (extent, record) in journal {
            // What he has given away since is not his again.
            let Some(backed) = state.change(owner, *extent, |ours| ours.backed) else { continue };
            // Room may have been given back since the journal was written; then the table says so.
            let record = ExtentRecord { owner, backed: record.backed && backed, ..*record };
            state.replace(*extent, Extent::of(&record, &[owner]));
        }
        drop(state);
        Space { owner, epoch, blocks }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.blocks.state()
    }

    pub(super) fn label(&self) -> Label {
        self.blocks.label()
    }

    pub(super) fn owner(&self) -> u32 {
        self.owner
    }

    /// The owner, if it is a block store below that says who that is.
    pub(super) fn lease(&self) -> Option<u32> {
        self.blocks.leased.then_some(self.owner)
    }

    /// Blocks that nobody but the trees themselves may use.
    pub(super) fn slop(&self) -> u64 {
        self.state().slop()
    }

    /// Free blocks for which room has been set aside.
    pub(super) fn backed(&self) -> u64 {
        self.state().account(self.owner).free
    }

    /// So many blocks are kept for volumes of this owner.
    pub(super) fn keep(&self, blocks: u64) {
        self.state().account_mut(self.owner).kept = blocks;
    }

    /// True if so many blocks could be promised.
    pub(super) fn has_room(&self, blocks: u64) -> bool {
        let state = self.state();
        state.has(self.owner, blocks + state.slop())
    }

    /// Promises blocks. So many others are kept for somebody else. False if more has to be [backed](Self::back) first.
    ///
    /// # Errors
    /// [`Kind::NoSpace`] if there are not so many beside those, and beside the slop, which only what makes room may use.
    pub(super) fn reserve(&self, blocks: u64, kept: u64, makes_room: bool) -> Result<bool> {
        let mut state = self.state();
        let slop = if makes_room { state.slop() / 4 } else { state.slop() };
        let kept = if makes_room { 0 } else { kept };
        if !state.has(self.owner, blocks + slop + kept) {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let account = state.account_mut(self.owner);
        let backed = account.reserved + blocks + slop <= account.free;
        account.reserved += if backed { blocks } else { 0 };
        Ok(backed)
    }

    /// Takes a promise back: it is kept, or not needed.
    pub(super) fn release(&self, blocks: u64) {
        let mut state = self.state();
        let account = state.account_mut(self.owner);
        account.reserved = account.reserved.saturating_sub(blocks);
    }

    /// Free blocks in a row, as many as are wanted if that can be, close behind `near`. Used from now on.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn take(&self, near: Option<u64>, want: Want, below: Below<'_>) -> Result<Range<u64>> {
        loop {
            if let Some(found) = self.take_now(near, want) {
                return Ok(found);
            }
            self.back(self.backed(), below).await?;
        }
    }

    /// What is kept for what makes room can be written, if that can be.
    ///
    /// # Errors
    /// Others than that there is no room.
    pub(super) async fn back_slop(&self, below: Below<'_>) -> Result<()> {
        loop {
            let had = self.backed();
            if had >= self.slop() {
                return Ok(());
            }
            match self.back(had, below).await {
                Err(error) if error.kind() == Kind::NoSpace => return Ok(()),
                done => done?,
            }
        }
    }

    /// The same of extents that are ours already; none if there are none.
    pub(super) fn take_now(&self, near: Option<u64>, want: Want) -> Option<Range<u64>> {
        self.state().take(self.owner, near, want)
    }

    /// Takes everything that is free in the first extent of ours at or behind this one that has anything and is backed, as
    /// long as more than the slop is left. That extent, and the blocks, used from now on; the extent is not backed any more.
    pub(super) fn hollow_out(&self, from: u64) -> Option<(u64, Vec<Range<u64>>)> {
        let mut state = self.state();
        let account = state.account(self.owner);
        let spare = account.free.saturating_sub(account.reserved + state.slop());
        let fits = |extent: &Extent| {
            extent
                .owned_by(self.owner)
                .is_some_and(|ours| ours.backed && (1..=spare).contains(&u64::from(ours.free)))
        };
        let at = (from..state.extents.len() as u64).find(|at| fits(&state.extents[*at as usize]))?;
        let runs = state.change(self.owner, at, |extent| {
            let (mut runs, mut next) = (Vec::new(), 0);
            while let Some(run) = free_run(&extent.used, next, Want { least: 1, most: EXTENT }) {
                next = run.end;
                let run = at * EXTENT + run.start..at * EXTENT + run.end;
                each_word(run.clone(), |_, word, mask| extent.used[word] |= mask);
                runs.push(run);
            }
            (extent.backed, extent.free) = (false, 0);
            runs
        })?;
        Some((at, runs))
    }

    /// Writes to the table what is known of extents.
    pub(super) async fn write_known(&self, extents: &[u64], below: Below<'_>) -> Result<()> {
        let records: Vec<(u64, ExtentRecord)> = {
            let state = self.state();
            let record = |at: &u64| {
                let extent = state.extents.get(*at as usize)?;
                Some((*at, extent.owned_by(self.owner)?.record()))
            };
            extents.iter().filter_map(record).collect()
        };
        self.blocks.write_records(&records, below).await
    }

    /// Marks blocks as used that a log or a tree knows of.
    pub(super) fn mark(&self, blocks: Range<u64>) -> Result<()> {
        let mut state = self.state();
        let mut foreign = false;
        if blocks.end > state.extents.len() as u64 * EXTENT {
            return Err(damaged("a block lies outside the pool"));
        }
        each_word(blocks, |extent, word, mask| {
            let ours = state.change(self.owner, extent, |ours| {
                ours.free -= (mask & !ours.used[word]).count_ones() as u16;
                ours.used[word] |= mask;
            });
            foreign |= ours.is_none();
        });
        if foreign { Err(damaged("a block lies in an extent of somebody else")) } else { Ok(()) }
    }

    /// What was used is free.
    pub(super) fn give(&self, blocks: Range<u64>) {
        let mut state = self.state();
        each_word(blocks, |extent, word, mask| {
            state.change(self.owner, extent, |ours| {
                ours.free += (mask & ours.used[word]).count_ones() as u16;
                ours.used[word] &= !mask;
            });
        });
    }

    /// Sets room aside for more extents: for those of ours that have something free, else for some that are nobody's, or that
    /// another owner does not use, and are ours from then on, durably. Returns at once if there is more free than whoever
    /// asks has seen.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn back(&self, had: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.blocks.granting.lock().await;
        if self.blocks.leased {
            let enough = self.state().account(self.owner).free > had;
            return if enough { Ok(()) } else { self.ask_for_more(below).await };
        }
        let (hollow, chosen) = {
            let state = self.state();
            if state.account(self.owner).free > had {
                return Ok(());
            }
            let want = (state.label.extents / 16).clamp(1, MOST_GRANT);
            (state.hollow_near(self.owner, want), state.to_grant(self.owner, want))
        };
        if !hollow.is_empty() {
            let hollow = allocate(hollow, below).await?;
            let mut state = self.state();
            for extent in hollow {
                state.change(self.owner, extent, |ours| ours.backed = true);
            }
            return Ok(());
        }
        if chosen.is_empty() {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let chosen = allocate(chosen, below).await?;
        let record = ExtentRecord { owner: self.owner, epoch: self.epoch, used: [0; 8], backed: true };
        self.blocks.assign(chosen, record, &[self.owner], below).await
    }

    /// Has the block store below give us extents.
    async fn ask_for_more(&self, below: Below<'_>) -> Result<()> {
        let ask = Ask::Grant { near: self.state().account(self.owner).last, epoch: self.epoch };
        let Row { first, count, free } = match lease::ask(ask, below).await {
            Err(error) if error.kind() == Kind::NoSpace => {
                self.blocks.note_unowned(0);
                return Err(error);
            }
            row => row?,
        };
        let record = ExtentRecord { owner: self.owner, epoch: self.epoch, used: [0; 8], backed: true };
        {
            let mut state = self.state();
            let end = first.checked_add(count).filter(|end| count > 0 && *end <= state.extents.len() as u64);
            let others = |at: u64| state.extents[at as usize].owned_by(self.owner).is_none();
            let row = end.map(|end| first..end).filter(|row| row.clone().all(others));
            let row = row.ok_or_else(|| damaged("the block store below gives extents that it has not"))?;
            row.for_each(|at| drop(state.replace(at, Extent::of(&record, &[self.owner]))));
        }
        self.blocks.note_unowned(free);
        Ok(())
    }

    /// Gives extents back to the block store below that are not needed, and learns how many are nobody's: true if those are
    /// more than they were. The caller keeps checkpoints off.
    ///
    /// # Errors
    /// The store does not answer: it may have what was given back.
    pub(super) async fn give_back(&self, below: Below<'_>) -> Result<bool> {
        if !self.blocks.leased {
            return Ok(false);
        }
        let _alone = self.blocks.granting.lock().await;
        let had = self.blocks.unowned();
        while let Some(row) = self.to_give_back() {
            let ask = Ask::Give { first: row.start, count: row.end - row.start };
            lease::ask::<Free>(ask, below).await?;
        }
        let Free { free } = lease::ask(Ask::Free {}, below).await?;
        self.blocks.note_unowned(free);
        Ok(free > had)
    }

    /// Extents in a row that are not needed, and not ours any more.
    fn to_give_back(&self) -> Option<Range<u64>> {
        let mut state = self.state();
        // About a region is kept, so that what is written next needs none.
        let kept = (state.extents.len() as u64 / 64).max(1);
        let spare = state.spare(self.owner).checked_sub(kept).filter(|spare| *spare > 0)?;
        let is_empty = |extent: &Extent| extent.owned_by(self.owner).is_some_and(Owned::is_empty);
        let row = state.row_near(0, spare, is_empty);
        row.clone().for_each(|at| drop(state.replace(at, Extent::Foreign(STORE))));
        Some(row)
    }

    /// The records as a checkpoint makes them, and how many more blocks are used by them.
    pub(super) fn records(&self, difference: &Difference) -> (Vec<(u64, ExtentRecord)>, i64) {
        let state = self.state();
        let (mut records, mut more) = (Vec::new(), 0);
        for (extent, (added, removed)) in &difference.extents {
            let now = state.extents.get(*extent as usize).and_then(|extent| extent.owned_by(self.owner));
            let Some(now) = now else { continue };
            let used = std::array::from_fn(|ix| (now.committed[ix] | added[ix]) & !removed[ix]);
            more += ones(&used) as i64 - ones(&now.committed) as i64;
            records.push((*extent, ExtentRecord { used, ..now.record() }));
        }
        (records, more)
    }

    /// The checkpoint is durable: these records are what counts. Writes them to the table.
    pub(super) async fn commit(&self, records: &[(u64, ExtentRecord)], below: Below<'_>) -> Result<()> {
        {
            let mut state = self.state();
            for (extent, record) in records {
                state.change(self.owner, *extent, |ours| ours.committed = record.used);
            }
        }
        self.blocks.write_records(records, below).await
    }

    /// What is reachable, as the table says: blocks of ours that are used, by extent.
    pub(super) fn committed(&self) -> Vec<(u64, Map)> {
        let state = self.state();
        let maps = state.extents.iter().enumerate();
        maps.filter_map(|(ix, extent)| Some((ix as u64, extent.owned_by(self.owner)?.committed))).collect()
    }

    /// The same, and whether both copies of the record are damaged.
    pub(super) fn marked(&self) -> Vec<(u64, Map, bool)> {
        let state = self.state();
        let maps = state.extents.iter().enumerate();
        let ours = maps.filter_map(|(ix, extent)| Some((ix as u64, extent.owned_by(self.owner)?)));
        ours.filter_map(|(ix, ours)| Some((ix, ours.committed, ours.adopted()?))).collect()
    }

    /// All of an extent of ours is in use, which has always been so. True if its record says otherwise.
    pub(super) fn fill(&self, extent: u64) -> bool {
        let full = [u64::MAX; 8];
        let fill = |ours: &mut Owned| {
            (ours.used, ours.free) = (full, 0);
            std::mem::replace(&mut ours.committed, full) != full
        };
        self.state().change(self.owner, extent, fill).unwrap_or(false)
    }

    /// An extent that our trees lead into is ours, if its record does not say that it is somebody else's: one whose record is damaged,
    /// and one that is said to be nobody's, of which nothing is given out then. False if it is another's.
    pub(super) fn adopt(&self, extent: u64) -> bool {
        let mut state = self.state();
        let whose = state.extents.get(extent as usize);
        if whose.is_some_and(|whose| matches!(whose, Extent::Nobodys)) {
            state.replace(extent, Extent::full(self.owner, self.epoch));
            return true;
        }
        state.adopt(extent, self.owner)
    }

    /// Blocks that are promised: after a checkpoint, while nobody writes, none.
    #[cfg(test)]
    pub(super) fn promised(&self) -> u64 {
        self.state().account(self.owner).reserved
    }

    /// Blocks that are used and not committed, but for these: after a checkpoint that nobody has seen the time before, none.
    #[cfg(test)]
    pub(super) fn leaked(&self, known: &[u64]) -> Vec<u64> {
        let state = self.state();
        let maps = state.extents.iter().enumerate();
        let maps = maps.filter_map(|(ix, extent)| Some((ix, extent.owned_by(self.owner)?)));
        let blocks = maps.flat_map(|(extent, maps)| {
            let differs = move |ix: &u64| {
                let (word, bit) = ((ix / 64) as usize, ix % 64);
                (maps.used[word] ^ maps.committed[word]) >> bit & 1 == 1
            };
            (0..EXTENT).filter(differs).map(move |ix| extent as u64 * EXTENT + ix)
        });
        blocks.filter(|block| !known.contains(block)).collect()
    }
}

impl State {
    fn take(&mut self, owner: u32, near: Option<u64>, want: Want) -> Option<Range<u64>> {
        let account = self.account(owner);
        if account.free == 0 {
            return None;
        }
        let near = near.unwrap_or(account.last * EXTENT);
        let (start, count) = (near / EXTENT, self.extents.len() as u64);
        // The neighbour's extent from there on, then all others, then what lies before the neighbour.
        let places = (0..=count).map(|ix| ((start + ix) % count, if ix == 0 { near % EXTENT } else { 0 }));
        for (extent, from) in places {
            let ours = self.extents[extent as usize].owned_by(owner);
            let Some(ours) = ours.filter(|ours| ours.free > 0 && ours.backed) else { continue };
            let Some(run) = free_run(&ours.used, from, want) else { continue };
            let run = extent * EXTENT + run.start..extent * EXTENT + run.end;
            self.change(owner, extent, |ours| {
                each_word(run.clone(), |_, word, mask| ours.used[word] |= mask);
                ours.free -= (run.end - run.start) as u16;
            });
            self.account_mut(owner).last = extent;
            return Some(run);
        }
        None
    }

    /// Extents in a row of an owner that are not backed, and have something free.
    fn hollow_near(&self, owner: u32, want: u64) -> Range<u64> {
        let account = self.account(owner);
        if account.hollow == 0 {
            return 0..0;
        }
        let is_hollow =
            |extent: &Extent| extent.owned_by(owner).is_some_and(|ours| !ours.backed && ours.free > 0);
        self.row_near(account.last, want, is_hollow)
    }
}

/// The first free blocks at or behind `from` of which there are enough.
fn free_run(used: &Map, from: u64, want: Want) -> Option<Range<u64>> {
    let next = |at: u64, set: bool| {
        let mut at = at;
        while at < EXTENT {
            let word = used[(at / 64) as usize];
            let word = (if set { word } else { !word }) >> (at % 64);
            if word != 0 {
                return (at + u64::from(word.trailing_zeros())).min(EXTENT);
            }
            at = (at / 64 + 1) * 64;
        }
        EXTENT
    };
    let mut start = next(from, false);
    while start < EXTENT {
        let end = next(start, true);
        if end - start >= want.least {
            return Some(start..end.min(start + want.most));
        }
        start = next(end, false);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_free_run_is_the_first(
            bits in prop::collection::vec(any::<bool>(), 512), from in 0u64..512, least in 1u64..6, more in 0u64..9,
        ) {
            let mut map = [0; 8];
            (0..512).filter(|ix| bits[*ix]).for_each(|ix| map[ix / 64] |= 1 << (ix % 64));
            let free = |start: u64| (start..512).take_while(|ix| !bits[*ix as usize]).count() as u64;
            let start = (from..512).find(|start| free(*start) >= least);
            let wanted = start.map(|start| start..start + free(start).min(least + more));
            prop_assert_eq!(free_run(&map, from, Want { least, most: least + more }), wanted);
        }
    }
}
