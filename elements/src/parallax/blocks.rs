//! The block store: whose each extent of a pool is, and which blocks are free.
//!
//! Trees of one format are one owner of extents; all owners of a pool share what is nobody's, and what another one has and
//! uses nothing of. What an owner knows and does is in [`Space`](super::space::Space).

use super::below::Below;
use super::format::{BLOCK, EXTENT, EXTENT_RECORD, ExtentRecord, Features, Label};
use super::lease::Lease;
use blockmason::{Data, Error, Kind, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The owner of what the block store itself keeps.
pub(super) const STORE: u32 = 1;

/// Of an extent, a bit for each block.
pub(super) type Map = [u64; 8];

/// Kept for what makes room: deletions, checkpoints.
const LEAST_SLOP: u64 = (16 << 20) / BLOCK;
const MOST_SLOP: u64 = (256 << 20) / BLOCK;

/// An extent that somebody owns whose format this program knows.
///
/// Two maps: what is *used* now, from which blocks are given out, and what is *committed*, which is what the extent's record
/// says: reachable from the owner's newest root. A block is used before it is committed, and stays used until nobody can
/// read it any more.
pub(super) struct Owned {
    owner: u32,
    /// Both copies of its record are damaged: it counts as full, and as his who says that it is.
    doubtful: bool,
    /// They are, and an owner was found to use it.
    adopted: bool,
    pub(super) epoch: u64,
    pub(super) used: Map,
    pub(super) committed: Map,
    /// Free blocks in it.
    pub(super) free: u16,
    /// What the pool is on has room for all of it.
    pub(super) backed: bool,
}

impl Owned {
    /// What the table says of it.
    pub(super) fn record(&self) -> ExtentRecord {
        ExtentRecord { owner: self.owner, epoch: self.epoch, used: self.committed, backed: self.backed }
    }

    /// It is his who is sure of that, if its record does not say otherwise. False if it does.
    fn adopt(&mut self, owner: u32) -> bool {
        if self.doubtful {
            (self.owner, self.doubtful, self.adopted) = (owner, false, true);
        }
        self.owner == owner
    }

    /// Whether both copies of its record are damaged; none if it is not known to be the owner's.
    pub(super) fn adopted(&self) -> Option<bool> {
        (!self.doubtful).then_some(self.adopted)
    }

    pub(super) fn is_empty(&self) -> bool {
        u64::from(self.free) == EXTENT
    }
}

/// A pool has a million of them for each 2 TiB: those that nobody owns take next to nothing.
pub(super) enum Extent {
    Nobodys,
    /// His who is not known, or not to be given away.
    Foreign(u32),
    Owned(Box<Owned>),
}

impl Extent {
    pub(super) fn of(record: &ExtentRecord, owners: &[u32]) -> Extent {
        match record.owner {
            0 => Extent::Nobodys,
            owner if owners.contains(&owner) => Extent::Owned(Box::new(Owned {
                owner,
                doubtful: false,
                adopted: false,
                epoch: record.epoch,
                used: record.used,
                committed: record.used,
                free: (EXTENT - ones(&record.used)) as u16,
                backed: record.backed,
            })),
            owner => Extent::Foreign(owner),
        }
    }

    /// One that is in use though its record says that it is nobody's: nothing of it is given out, and nothing is marked yet.
    pub(super) fn full(owner: u32, epoch: u64) -> Extent {
        let record = ExtentRecord { owner, epoch, used: [u64::MAX; 8], backed: false };
        let mut extent = Extent::of(&record, &[owner]);
        if let Extent::Owned(owned) = &mut extent {
            owned.committed = [0; 8];
        }
        extent
    }

    /// One whose record is damaged.
    fn doubtful(owners: &[u32]) -> Extent {
        let Some(owner) = owners.first() else { return Extent::Foreign(0) };
        let record = ExtentRecord { owner: *owner, epoch: 0, used: [u64::MAX; 8], backed: true };
        let mut extent = Extent::of(&record, owners);
        if let Extent::Owned(owned) = &mut extent {
            owned.doubtful = true;
        }
        extent
    }

    fn owned(&self) -> Option<&Owned> {
        match self {
            Extent::Owned(owned) => Some(owned),
            Extent::Nobodys | Extent::Foreign(_) => None,
        }
    }

    pub(super) fn owned_by(&self, owner: u32) -> Option<&Owned> {
        self.owned().filter(|owned| owned.owner == owner)
    }

    /// The same, for whoever is sure that it is his.
    fn owned_by_mut(&mut self, owner: u32) -> Option<&mut Owned> {
        let Extent::Owned(owned) = self else { return None };
        owned.adopt(owner).then_some(&mut **owned)
    }
}

/// Room of an owner, in blocks.
#[derive(Clone, Copy, Default)]
pub(super) struct Account {
    /// Free ones in its extents for which there is room.
    pub(super) free: u64,
    /// Free ones for which room has to be set aside first.
    pub(super) hollow: u64,
    /// Extents in which all are free.
    empty: u64,
    /// Those that are promised to what is not written yet.
    pub(super) reserved: u64,
    /// Those that are kept for volumes which may want them.
    pub(super) kept: u64,
    /// The extent from which blocks were given out last.
    pub(super) last: u64,
}

impl Account {
    fn add(&mut self, owned: &Owned) {
        *if owned.backed { &mut self.free } else { &mut self.hollow } += u64::from(owned.free);
        self.empty += u64::from(owned.is_empty());
    }

    fn remove(&mut self, owned: &Owned) {
        *if owned.backed { &mut self.free } else { &mut self.hollow } -= u64::from(owned.free);
        self.empty -= u64::from(owned.is_empty());
    }

    fn has(&self) -> u64 {
        self.free + self.hollow
    }
}

/// Everything that changes, under one lock, which is held for no longer than a look takes.
pub(super) struct State {
    pub(super) label: Label,
    pub(super) extents: Vec<Extent>,
    /// Extents that are nobody's.
    unowned: u64,
    accounts: BTreeMap<u32, Account>,
}

impl State {
    pub(super) fn account(&self, owner: u32) -> Account {
        self.accounts.get(&owner).copied().unwrap_or_default()
    }

    pub(super) fn account_mut(&mut self, owner: u32) -> &mut Account {
        self.accounts.entry(owner).or_default()
    }

    /// Changes an extent of an owner, whose account follows.
    pub(super) fn change<T>(
        &mut self,
        owner: u32,
        extent: u64,
        change: impl FnOnce(&mut Owned) -> T,
    ) -> Option<T> {
        let owned = self.extents.get_mut(extent as usize)?.owned_by_mut(owner)?;
        let account = self.accounts.entry(owner).or_default();
        account.remove(owned);
        let done = change(owned);
        account.add(owned);
        Some(done)
    }

    /// An extent is his, if it is or both copies of its record are damaged. False if it is another's.
    pub(super) fn adopt(&mut self, extent: u64, owner: u32) -> bool {
        match self.extents.get_mut(extent as usize) {
            Some(Extent::Owned(owned)) => owned.adopt(owner),
            _ => false,
        }
    }

    /// Makes an extent something else. What it was.
    pub(super) fn replace(&mut self, extent: u64, new: Extent) -> Option<Extent> {
        let place = self.extents.get_mut(extent as usize)?;
        let old = std::mem::replace(place, new);
        let mut count = |extent: &Extent, more: bool| match extent {
            Extent::Nobodys => self.unowned = if more { self.unowned + 1 } else { self.unowned - 1 },
            Extent::Foreign(_) => {}
            Extent::Owned(owned) => {
                let account = self.accounts.entry(owned.owner).or_default();
                if more { account.add(owned) } else { account.remove(owned) }
            }
        };
        count(&old, false);
        count(place, true);
        Some(old)
    }

    /// Blocks that nobody but the trees themselves may use, of each owner.
    pub(super) fn slop(&self) -> u64 {
        let blocks = self.extents.len() as u64 * EXTENT;
        (blocks / 64).clamp(LEAST_SLOP, MOST_SLOP).min(blocks / 8)
    }

    /// Free blocks of all owners and of nobody.
    fn free(&self) -> u64 {
        self.unowned * EXTENT + self.accounts.values().map(Account::has).sum::<u64>()
    }

    /// Whole extents of another owner that he can do without, in blocks; less than none if he counts on what is nobody's.
    fn surplus(&self, account: &Account) -> i64 {
        let wants = account.reserved + account.kept + self.slop();
        match account.has().checked_sub(wants) {
            Some(more) => (account.empty.min(more / EXTENT) * EXTENT) as i64,
            None => -(((wants - account.has()).div_ceil(EXTENT) * EXTENT) as i64),
        }
    }

    /// Whole extents that an owner can do without.
    pub(super) fn spare(&self, owner: u32) -> u64 {
        self.surplus(&self.account(owner)).max(0) as u64 / EXTENT
    }

    fn others(&self, owner: u32) -> impl Iterator<Item = (u32, &Account)> {
        self.accounts
            .iter()
            .map(|(other, account)| (*other, account))
            .filter(move |(other, _)| *other != owner)
    }

    /// So many blocks are free for an owner and promised to nobody.
    pub(super) fn has(&self, owner: u32, blocks: u64) -> bool {
        let account = self.account(owner);
        let others: i64 = self.others(owner).map(|(_, other)| self.surplus(other)).sum();
        let all = (account.has() + self.unowned * EXTENT).saturating_add_signed(others);
        account.reserved + blocks <= all
    }

    /// Extents in a row that nobody owns, or that another owner has no use for; at most `want`, the first such row behind the
    /// last one used.
    pub(super) fn to_grant(&self, owner: u32, want: u64) -> Range<u64> {
        let last = self.account(owner).last;
        let nobodys = self.row_near(last, want, |extent| matches!(extent, Extent::Nobodys));
        if !nobodys.is_empty() {
            return nobodys;
        }
        self.to_take(owner, want)
    }

    /// The same of those that another owner has no use for.
    fn to_take(&self, owner: u32, want: u64) -> Range<u64> {
        let spares = self.others(owner).find_map(|(other, account)| {
            let spare = self.surplus(account) / EXTENT as i64;
            (spare > 0).then_some((other, spare as u64))
        });
        let Some((other, spare)) = spares else { return 0..0 };
        self.row_near(self.account(owner).last, want.min(spare), |extent| {
            extent.owned_by(other).is_some_and(Owned::is_empty)
        })
    }

    /// True of an extent that may be given away.
    pub(super) fn is_unused(&self, extent: u64) -> bool {
        match &self.extents[extent as usize] {
            Extent::Nobodys => true,
            Extent::Foreign(_) => false,
            Extent::Owned(owned) => owned.is_empty(),
        }
    }

    pub(super) fn row_near(&self, last: u64, want: u64, is: impl Fn(&Extent) -> bool) -> Range<u64> {
        let is = |ix: &u64| is(&self.extents[*ix as usize]);
        let count = self.extents.len() as u64;
        let Some(start) = (last..count).chain(0..last).find(is) else { return 0..0 };
        let end = count.min(start + want);
        start..(start..end).find(|ix| !is(ix)).unwrap_or(end)
    }
}

/// The block store of an open pool.
pub(super) struct Blocks {
    state: Mutex<State>,
    /// Held by whoever gives extents away, or looks at what the table says of them.
    pub(super) granting: tokio::sync::Mutex<()>,
    /// Held by whoever writes records to both copies of the table, or compares them.
    table: tokio::sync::Mutex<()>,
    /// Held by whoever changes the list of owners, from reading it to having written it.
    pub(super) naming: tokio::sync::Mutex<()>,
    /// A block store that is an element below gives extents away, and knows of what is nobody's.
    pub(super) leased: bool,
    /// There may be room where there was none.
    pub(super) room: Notify,
}

/// Reads the table of extents, and tells of each record, or of none where both copies are damaged.
pub(super) async fn read_table(
    label: &Label,
    below: Below<'_>,
    mut each: impl FnMut(Option<ExtentRecord>),
) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let bytes = label.extents * EXTENT_RECORD;
    let [first, second] = label.record(0);
    for at in (0..bytes).step_by(PIECE as usize) {
        let len = PIECE.min(bytes - at);
        let (piece, mut copy) = match below.read(first + at, len).await {
            // Nobody's, as most are in a pool that is new or large.
            Ok(piece) if piece.is_zero() => {
                (0..len / EXTENT_RECORD).for_each(|_| each(Some(ExtentRecord::default())));
                continue;
            }
            Ok(piece) => (piece.to_vec(), None),
            // There is no other copy left to compare with.
            Err(_) => (below.read(second + at, len).await?.to_vec(), Some(Vec::new())),
        };
        for (ix, record) in piece.chunks(EXTENT_RECORD as usize).enumerate() {
            let mut found = ExtentRecord::decode(record);
            if found.is_none() {
                if copy.is_none() {
                    let other = below.read(second + at, len).await;
                    copy = Some(other.map(|other| other.to_vec()).unwrap_or_default());
                }
                let place = ix * EXTENT_RECORD as usize;
                let other = copy.as_ref().and_then(|copy| copy.get(place..place + EXTENT_RECORD as usize));
                found = other.and_then(ExtentRecord::decode);
            }
            each(found);
        }
    }
    Ok(())
}

/// Says on the device that the pool has so many extents. The label that it has then.
///
/// # Errors
/// [`Kind::Invalid`] if it would be smaller, or larger than it can be.
pub(super) async fn write_size(mut label: Label, extents: u64, below: Below<'_>) -> Result<Label> {
    if extents < label.extents || extents > label.capacity {
        let size = |extents: u64| extents * EXTENT * BLOCK;
        let (now, most) = (size(label.extents), size(label.capacity));
        return Err(Error::invalid(match extents < label.extents {
            true => format!("the pool has {now} bytes, and pools do not shrink"),
            false => format!("the pool was made so that it can have {most} bytes at most; it has {now}"),
        }));
    }
    (label.extents, label.sequence) = (extents, label.sequence + 1);
    write_label(&label, below).await?;
    Ok(label)
}

/// Writes both copies, each durably.
async fn write_label(label: &Label, below: Below<'_>) -> Result<()> {
    for place in Label::PLACES {
        below.write(place * BLOCK, Data::shared(label.encode())).await?;
        below.flush().await?;
    }
    Ok(())
}

impl Blocks {
    /// Reads whose the extents of a pool are: of these owners, or of others, which are left alone.
    pub(super) async fn read(label: Label, owners: &[u32], below: Below<'_>) -> Result<Blocks> {
        let mut extents = Vec::with_capacity(label.extents as usize);
        read_table(&label, below, |record| {
            let extent = record.map(|record| Extent::of(&record, owners));
            extents.push(extent.unwrap_or_else(|| Extent::doubtful(owners)));
        })
        .await?;
        let first = label.first();
        extents.iter_mut().take(first as usize).for_each(|extent| *extent = Extent::Foreign(STORE));
        let unowned = extents.iter().filter(|extent| matches!(extent, Extent::Nobodys)).count() as u64;
        let mut accounts = BTreeMap::new();
        for owner in owners {
            let mut account = Account { last: first, ..Account::default() };
            extents.iter().filter_map(|extent| extent.owned_by(*owner)).for_each(|owned| account.add(owned));
            accounts.insert(*owner, account);
        }
        let state = Mutex::new(State { label, extents, unowned, accounts });
        let (granting, table, naming) = Default::default();
        Ok(Blocks { state, granting, table, naming, leased: false, room: Notify::new() })
    }

    /// The same of an owner who has a lease of a block store below.
    pub(super) async fn leased(label: Label, lease: Lease, below: Below<'_>) -> Result<Blocks> {
        let mut blocks = Blocks::read(label, &[lease.owner], below).await?;
        blocks.leased = true;
        let mut state = blocks.state();
        for extent in &mut state.extents {
            if matches!(extent, Extent::Nobodys) {
                *extent = Extent::Foreign(STORE);
            }
        }
        state.unowned = lease.free;
        drop(state);
        Ok(blocks)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn label(&self) -> Label {
        self.state().label.clone()
    }

    /// Extents that nobody owns.
    pub(super) fn unowned(&self) -> u64 {
        self.state().unowned
    }

    /// As the block store below has said.
    pub(super) fn note_unowned(&self, extents: u64) {
        self.state().unowned = extents;
        self.room.notify_waiters();
    }

    /// Owners may have keys from now on, durably.
    pub(super) async fn allow_keys(&self, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let mut label = self.label();
        if label.features.incompatible & Features::KEYS == 0 {
            label.features.incompatible |= Features::KEYS;
            label.sequence += 1;
            write_label(&label, below).await?;
            self.state().label = label;
        }
        Ok(())
    }

    /// Gives an owner extents in a row that are nobody's, durably, close behind one: as many as he wants, or less.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn hand_out(
        &self,
        owner: u32,
        (near, want): (u64, u64),
        epoch: u64,
        below: Below<'_>,
    ) -> Result<Range<u64>> {
        let _alone = self.granting.lock().await;
        let row = {
            let state = self.state();
            let near = near.min(state.extents.len() as u64);
            state.row_near(near, want, |extent| matches!(extent, Extent::Nobodys))
        };
        if row.is_empty() {
            return Err(Error::new(Kind::NoSpace, "the pool is full"));
        }
        let record = ExtentRecord { owner, epoch, used: [0; 8], backed: true };
        self.assign(row.clone(), record, &[], below).await.map(|()| row)
    }

    /// Makes extents somebody's that nobody uses, durably. He is one of these owners, or none of ours.
    pub(super) async fn assign(
        &self,
        chosen: Range<u64>,
        record: ExtentRecord,
        owners: &[u32],
        below: Below<'_>,
    ) -> Result<()> {
        // Another owner may have begun to use some of them.
        let chosen: Vec<(u64, Extent)> = {
            let mut state = self.state();
            let free = |extent: &u64| state.is_unused(*extent);
            let free: Vec<u64> = chosen.filter(free).collect();
            free.into_iter().filter_map(|at| Some((at, state.replace(at, Extent::Foreign(STORE))?))).collect()
        };
        let records: Vec<(u64, ExtentRecord)> = chosen.iter().map(|(at, _)| (*at, record)).collect();
        let done = async {
            self.write_records(&records, below).await?;
            below.flush().await
        };
        let done = done.await;
        let mut state = self.state();
        for (at, before) in chosen {
            let now = if done.is_ok() { Extent::of(&record, owners) } else { before };
            state.replace(at, now);
        }
        done
    }

    /// Takes extents back of which an owner uses nothing.
    ///
    /// # Errors
    /// [`Kind::Denied`] if they are not his.
    pub(super) async fn take_back(&self, owner: u32, first: u64, count: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let end = first.checked_add(count).filter(|end| *end <= self.label().extents);
        let his = |extent: &Extent| matches!(extent, Extent::Foreign(other) if *other == owner);
        let row = end.map(|end| first..end).filter(|row| {
            let state = self.state();
            row.clone().all(|at| his(&state.extents[at as usize]))
        });
        let row = row.ok_or_else(|| Error::new(Kind::Denied, "those extents are somebody else's"))?;
        let records: Vec<(u64, ExtentRecord)> = row.clone().map(|at| (at, ExtentRecord::default())).collect();
        self.write_records(&records, below).await?;
        let mut state = self.state();
        row.for_each(|at| drop(state.replace(at, Extent::Nobodys)));
        Ok(())
    }

    /// What an owner has is left alone from now on.
    pub(super) fn disown(&self, owner: u32) {
        let mut state = self.state();
        for extent in 0..state.extents.len() as u64 {
            if state.extents[extent as usize].owned_by(owner).is_some() {
                state.replace(extent, Extent::Foreign(owner));
            }
        }
        state.accounts.remove(&owner);
    }

    /// Gives extents in a row, full, to an owner who is not known yet, durably: so many, or some less, but two at least.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn settle(&self, owner: u32, count: u64, below: Below<'_>) -> Result<Range<u64>> {
        let _alone = self.granting.lock().await;
        let left: Vec<(u64, ExtentRecord)> = {
            let state = self.state();
            let is = |extent: &Extent| matches!(extent, Extent::Foreign(number) if *number == owner);
            let left = state.extents.iter().enumerate().filter(|(_, extent)| is(extent));
            left.map(|(at, _)| (at as u64, ExtentRecord::default())).collect()
        };
        // Somebody has begun with that, and died before the owner was there.
        self.write_records(&left, below).await?;
        let row = {
            let mut state = self.state();
            left.iter().for_each(|(at, _)| drop(state.replace(*at, Extent::Nobodys)));
            let mut row = state.row_near(0, count, |extent| matches!(extent, Extent::Nobodys));
            if row.end - row.start < 2 {
                row = state.to_take(owner, count);
            }
            if row.end - row.start < 2 || !state.has(owner, (row.end - row.start + 1) * EXTENT) {
                return Err(Error::new(
                    Kind::NoSpace,
                    "the pool has no room for trees of another format or key",
                ));
            }
            row.clone().for_each(|at| drop(state.replace(at, Extent::Foreign(owner))));
            row
        };
        below.allocate(row.start * EXTENT..row.end * EXTENT).await?;
        let record = ExtentRecord { owner, epoch: 0, used: [u64::MAX; 8], backed: true };
        let records: Vec<(u64, ExtentRecord)> = row.clone().map(|at| (at, record)).collect();
        self.write_records(&records, below).await?;
        below.flush().await?;
        let mut state = self.state();
        row.clone().for_each(|at| drop(state.replace(at, Extent::of(&record, &[owner]))));
        Ok(row)
    }

    /// Extents both copies of whose records are damaged, and that nobody was found to use.
    pub(super) fn doubtful(&self) -> Vec<u64> {
        let state = self.state();
        let is = |extent: &Extent| extent.owned().is_some_and(|owned| owned.doubtful);
        let all = state.extents.iter().enumerate();
        all.filter(|(_, extent)| is(extent)).map(|(at, _)| at as u64).collect()
    }

    /// Those are nobody's, durably.
    pub(super) async fn free_doubtful(&self, extents: &[u64], below: Below<'_>) -> Result<()> {
        if extents.is_empty() {
            return Ok(());
        }
        let records: Vec<(u64, ExtentRecord)> =
            extents.iter().map(|at| (*at, ExtentRecord::default())).collect();
        self.write_records(&records, below).await?;
        below.flush().await?;
        let mut state = self.state();
        extents.iter().for_each(|at| drop(state.replace(*at, Extent::Nobodys)));
        Ok(())
    }

    /// Free blocks, promised ones among them.
    pub(super) fn free(&self) -> u64 {
        self.state().free()
    }

    /// Blocks of owners that are left alone.
    pub(super) fn foreign(&self) -> u64 {
        let state = self.state();
        let is = |extent: &&Extent| matches!(extent, Extent::Foreign(owner) if *owner != STORE);
        state.extents.iter().filter(is).count() as u64 * EXTENT
    }

    /// Those for which room has been set aside.
    pub(super) fn backed(&self) -> u64 {
        self.state().accounts.values().map(|account| account.free).sum()
    }

    /// Blocks of the pool that can hold anything.
    pub(super) fn all(&self) -> u64 {
        let label = self.label();
        (label.extents - label.first()) * EXTENT
    }

    /// Makes the pool larger, durably.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it would be smaller, or larger than it can be.
    pub(super) async fn grow(&self, extents: u64, below: Below<'_>) -> Result<()> {
        let _alone = self.granting.lock().await;
        let label = write_size(self.label(), extents, below).await?;
        let mut state = self.state();
        state.unowned += extents - state.extents.len() as u64;
        state.extents.resize_with(extents as usize, || Extent::Nobodys);
        state.label = label;
        Ok(())
    }

    /// Writes records to both copies of the table, neighbours at once.
    pub(super) async fn write_records(
        &self,
        records: &[(u64, ExtentRecord)],
        below: Below<'_>,
    ) -> Result<()> {
        let _whole = self.table.lock().await;
        self.put_records(records, below).await
    }

    async fn put_records(&self, records: &[(u64, ExtentRecord)], below: Below<'_>) -> Result<()> {
        let label = self.label();
        for row in records.chunk_by(|one, other| one.0 + 1 == other.0) {
            let bytes: Vec<u8> = row.iter().flat_map(|(_, record)| record.encode()).collect();
            let data = Data::shared(bytes);
            for place in label.record(row[0].0) {
                below.write(place, data.clone()).await?;
            }
        }
        Ok(())
    }

    /// Looks at both copies of the table from an offset on, as far as is done at once, and writes records anew that are damaged in
    /// one. A sentence for each, and where it goes on.
    ///
    /// # Errors
    /// Neither copy can be read.
    pub(super) async fn examine(&self, at: u64, below: Below<'_>) -> Result<(Vec<String>, Option<u64>)> {
        const PIECE: u64 = 1 << 20;
        // Checkpoints of all owners write to the table.
        let _whole = self.table.lock().await;
        let label = self.label();
        let (places, bytes) = (label.record(0), label.extents * EXTENT_RECORD);
        let len = PIECE.min(bytes.saturating_sub(at));
        let next = Some(at + len).filter(|next| *next < bytes);
        let copies = [below.read(places[0] + at, len).await, below.read(places[1] + at, len).await];
        let mut problems = Vec::new();
        let [one, other] = match copies {
            [Err(error), Err(_)] => return Err(error),
            copies => copies.map(|copy| copy.map(|copy| copy.to_vec()).unwrap_or_default()),
        };
        if one == other {
            return Ok((problems, next));
        }
        let each = EXTENT_RECORD as usize;
        for place in (0..len as usize).step_by(each) {
            let extent = (at + place as u64) / EXTENT_RECORD;
            // What others have they change by themselves, and it is not for us to mend.
            if self.leased && self.state().extents[extent as usize].owned().is_none() {
                continue;
            }
            let [one, other] = [&one, &other].map(|copy| copy.get(place..place + each));
            let (first, second) = (one.and_then(ExtentRecord::decode), other.and_then(ExtentRecord::decode));
            if first.is_none() && second.is_none() {
                problems.push(format!("both copies of the record of extent {extent} are damaged"));
            }
            let Some(record) = first.or(second).filter(|_| one != other) else { continue };
            let mended = self.put_records(&[(extent, record)], below).await.is_ok();
            // Both are sound where a process has died between the two: nothing relies on that record yet.
            if first.is_none() || second.is_none() {
                let outcome = if mended { "is" } else { "is to be" };
                problems.push(format!(
                    "a copy of the record of extent {extent} was damaged, and {outcome} written anew"
                ));
            }
        }
        Ok((problems, next))
    }
}

pub(super) fn ones(map: &Map) -> u64 {
    map.iter().map(|word| u64::from(word.count_ones())).sum()
}
