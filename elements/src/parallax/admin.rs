//! What an administrator does with volumes and snapshots. Each of it is one checkpoint: after a crash it has happened or it
//! has not.

use super::below::Below;
use super::checkpoint::Frozen;
use super::format::{BLOCK, Compress, Entry, EntryKind, Features, Limits, Ptr, SLOTS};
use super::merge::{Merge, Who, height};
use super::open::need_feature;
use super::pool::{Core, Pool, with_nodes};
use super::repair::Fix;
use super::settings::{NewSettings, Settings};
use super::streams::Step;
use crate::calendar::seconds;
use blockmason::{Error, Kind, Result};
use std::collections::BTreeMap;
use std::iter::once;
use std::ops::Range;

/// Leaves that a volume which is deleted loses in one step.
const LEAVES: usize = if cfg!(test) { 1 } else { 256 };
/// Parts of its dead list that a snapshot does.
const PARTS: usize = if cfg!(test) { 1 } else { 64 };

fn busy(message: impl Into<String>) -> Error {
    Error::new(Kind::Busy, message.into())
}

pub(super) fn gone(what: &str, name: &str) -> Error {
    Error::new(Kind::Unavailable, format!("there is no {what} {name}"))
}

pub(super) fn taken(name: &str) -> Error {
    busy(format!("there is a volume {name} already"))
}

/// Whether something may be called that.
pub(super) fn check_name(name: &str) -> Result<()> {
    let fits = (1..=Entry::NAME).contains(&name.len());
    let bad = |c: char| c.is_control() || c.is_whitespace() || "/@()\"{}".contains(c);
    if !fits || name.contains(bad) || name.starts_with(['.', '-']) {
        let message = format!(
            "`{name}` is no name: it has 1 to {} bytes, no spaces, none of / @ ( ) {{ }} \", and begins with neither . nor -",
            Entry::NAME
        );
        return Err(Error::invalid(message));
    }
    Ok(())
}

/// Whether a volume may have so many bytes.
pub(super) fn check_size(size: u64) -> Result<()> {
    match size > 0 && size.is_multiple_of(BLOCK) && size <= 1 << 48 {
        true => Ok(()),
        false => Err(Error::invalid("a volume has a multiple of 4096 bytes, 256 TiB at most")),
    }
}

impl Core {
    /// What a volume is called, which its entry has this name for.
    pub(super) fn called(&self, name: &str) -> String {
        if self.key.is_empty() { name.to_owned() } else { format!("{}:{name}", self.key) }
    }

    /// What people know a volume or a snapshot as.
    pub(super) fn title(&self, entry: &Entry) -> String {
        match &entry.kind {
            EntryKind::Snapshot { volume, .. } => {
                let of = self.catalog.get(volume).map_or(String::new(), |entry| self.called(&entry.name));
                format!("{of}@{}", entry.name)
            }
            EntryKind::Volume { .. } => self.called(&entry.name),
        }
    }

    /// The name that the entry has of a volume that is called so.
    fn plain<'a>(&self, called: &'a str) -> Option<&'a str> {
        if self.key.is_empty() { Some(called) } else { called.strip_prefix(&self.key)?.strip_prefix(':') }
    }

    /// The number of a volume.
    pub(super) fn volume(&self, called: &str) -> Option<u32> {
        let name = self.plain(called)?;
        let is = |entry: &Entry| entry.is(name) && matches!(entry.kind, EntryKind::Volume { .. });
        self.catalog.iter().find(|(_, entry)| is(entry)).map(|(number, _)| *number)
    }

    /// Names of a volume's snapshots, the oldest first.
    pub(super) fn snapshots(&self, called: &str) -> Vec<String> {
        let number = self.volume(called);
        let of = |entry: &&Entry| match entry.kind {
            EntryKind::Snapshot { volume, .. } => Some(volume) == number && !entry.deleting,
            EntryKind::Volume { .. } => false,
        };
        self.catalog.values().filter(of).map(|entry| entry.name.clone()).collect()
    }

    /// The number of a snapshot of a volume.
    pub(super) fn snapshot(&self, volume: u32, name: &str) -> Option<u32> {
        let of = |entry: &Entry| matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == volume);
        self.catalog.iter().find(|(_, entry)| entry.is(name) && of(entry)).map(|(number, _)| *number)
    }

    /// The number of a volume, or of a snapshot of it.
    pub(super) fn find(&self, volume: &str, snapshot: Option<&str>) -> Result<u32> {
        let number = self.volume(volume).ok_or_else(|| gone("volume", volume))?;
        let Some(name) = snapshot else { return Ok(number) };
        self.snapshot(number, name).ok_or_else(|| gone("snapshot", &format!("{volume}@{name}")))
    }

    pub(super) fn need_free(&self, number: u32, what: &str) -> Result<()> {
        match self.served.contains_key(&number) {
            true => Err(busy(format!("{what} is in use: a graph serves it"))),
            false => Ok(()),
        }
    }

    /// The name that the entry of a new volume has which is called so.
    fn new_name(&self, called: &str) -> Result<String> {
        let name = self.plain(called).ok_or_else(|| {
            Error::invalid(format!("the name begins with the key of its trees: {}:{called}", self.key))
        })?;
        check_name(name)?;
        if name.contains(':') {
            let message = format!(
                "`{name}`: what comes before a : is a key, whose volumes are made by a graph with that key"
            );
            return Err(Error::invalid(message));
        }
        match self.volume(called) {
            Some(_) => Err(taken(called)),
            None => Ok(name.to_owned()),
        }
    }

    /// Volumes that are clones of a snapshot.
    fn clones(&self, snapshot: u32) -> Vec<&Entry> {
        let of =
            |entry: &&Entry| matches!(entry.kind, EntryKind::Volume { origin, .. } if origin.0 == snapshot);
        self.catalog.values().filter(of).collect()
    }

    /// Its oldest snapshot that is not being deleted.
    fn any_snapshot(&self, volume: u32) -> Option<&Entry> {
        let of = |entry: &&Entry| {
            !entry.deleting && matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == volume)
        };
        self.catalog.values().find(of)
    }

    /// What is being deleted, snapshots before the volumes that they are of.
    pub(super) fn deleting(&self) -> Option<u32> {
        let all = || self.catalog.iter().filter(|(_, entry)| entry.deleting);
        let snapshot = all().find(|(_, entry)| matches!(entry.kind, EntryKind::Snapshot { .. }));
        snapshot.or_else(|| all().next()).map(|(number, _)| *number)
    }

    pub(super) fn next_number(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }
}

impl Entry {
    /// It is called that, and is not being deleted: then nobody finds it any more.
    pub(super) fn is(&self, name: &str) -> bool {
        self.name == name && !self.deleting
    }
}

/// The catalog as an operation sees it and changes it. Nobody else changes it meanwhile.
pub(super) struct Catalog<'a> {
    pub(super) pool: &'a Pool,
    pub(super) changed: &'a mut BTreeMap<u32, Option<Entry>>,
}

impl Catalog<'_> {
    pub(super) fn get(&self, number: u32) -> Option<Entry> {
        match self.changed.get(&number) {
            Some(entry) => entry.clone(),
            None => self.pool.core().catalog.get(&number).cloned(),
        }
    }

    fn set(&mut self, number: u32, entry: Option<Entry>) {
        self.changed.insert(number, entry);
    }

    pub(super) fn change(&mut self, number: u32, change: impl FnOnce(&mut Entry)) {
        if let Some(mut entry) = self.get(number) {
            change(&mut entry);
            self.set(number, Some(entry));
        }
    }

    pub(super) fn volume(&self, number: u32) -> Option<(Entry, u32, (u32, u64))> {
        let entry = self.get(number)?;
        match entry.kind {
            EntryKind::Volume { newest, origin, .. } => Some((entry, newest, origin)),
            EntryKind::Snapshot { .. } => None,
        }
    }

    pub(super) fn snapshot(&self, number: u32) -> Option<Snapshot> {
        let entry = self.get(number)?;
        match entry.kind {
            EntryKind::Snapshot { before, volume, birth, dead, .. } => {
                Some(Snapshot { before, volume, birth, dead, entry })
            }
            EntryKind::Volume { .. } => None,
        }
    }

    /// What in a line names a snapshot as the one before it names another one instead.
    fn relink_within(&mut self, volume: u32, from: u32, to: u32) {
        let line = self.line(volume);
        for number in once(volume).chain(line) {
            self.change(number, |entry| {
                let (EntryKind::Volume { newest: link, .. } | EntryKind::Snapshot { before: link, .. }) =
                    &mut entry.kind;
                *link = if *link == from { to } else { *link };
            });
        }
    }

    /// Snapshots of a line, the newest first.
    pub(super) fn line(&self, volume: u32) -> Vec<u32> {
        let mut line = Vec::new();
        let mut next = self.volume(volume).map_or(0, |(_, newest, _)| newest);
        let all = self.pool.core().catalog.len();
        while let Some(snapshot) = self.snapshot(next).filter(|_| line.len() < all) {
            line.push(next);
            next = snapshot.before;
        }
        line
    }
}

pub(super) struct Snapshot {
    before: u32,
    volume: u32,
    pub(super) birth: u64,
    pub(super) dead: Ptr,
    pub(super) entry: Entry,
}

/// What is to be done, by numbers.
#[derive(Clone)]
pub(super) enum Plan {
    Make {
        number: u32,
        entry: Box<Entry>,
    },
    /// It is deleted, and its room comes back piece by piece.
    Delete(u32),
    /// The next piece.
    DeleteSome(u32),
    /// The first becomes what the second is; what it was becomes the volume with that number and name, or is deleted.
    Rollback {
        volume: u32,
        snapshot: u32,
        old: (u32, String),
        deleted: bool,
    },
    Promote(u32),
    Rename(u32, String),
    Grow(u32, u64),
    Set {
        volume: u32,
        limits: Limits,
        ordered: bool,
        compress: Compress,
    },
    Receive(u32, Step),
    Hold(u32, bool),
    Repair(Box<Fix>),
}

/// Entries of the catalog that a change of it rewrites, about.
const CHANGED: u64 = 4;

impl Plan {
    /// It may use what is kept for that.
    fn makes_room(&self) -> bool {
        matches!(self, Plan::Delete(_) | Plan::DeleteSome(_) | Plan::Rollback { deleted: true, .. })
    }

    /// It is done to what the trees are before anything is brought into them.
    pub(super) fn comes_first(&self) -> bool {
        matches!(self, Plan::Repair(_))
    }
}

impl Plan {
    /// Does it, with everything that has been answered in the trees.
    pub(super) async fn carry_out(
        &self,
        merge: &mut Merge<'_>,
        pool: &Pool,
        frozen: &mut Frozen,
    ) -> Result<()> {
        let births = frozen.root.births;
        let mut catalog = Catalog { pool, changed: &mut frozen.entries };
        match self {
            Plan::Make { number, entry } => catalog.set(*number, Some((**entry).clone())),
            Plan::Delete(number) => catalog.change(*number, |entry| entry.deleting = true),
            Plan::DeleteSome(number) => delete_some(merge, &mut catalog, *number).await?,
            Plan::Rollback { volume, snapshot, old, deleted } => {
                rollback(merge, &mut catalog, (*volume, *snapshot), old).await?;
                catalog.change(old.0, |entry| entry.deleting = *deleted);
            }
            Plan::Promote(number) => promote(merge, &mut catalog, *number).await?,
            Plan::Rename(number, name) => catalog.change(*number, |entry| entry.name.clone_from(name)),
            Plan::Grow(number, size) => grow(merge, &mut catalog, (*number, *size), births).await?,
            Plan::Set { volume, limits: new, ordered, compress } => catalog.change(*volume, |entry| {
                (entry.ordered, entry.compress) = (*ordered, *compress);
                if let EntryKind::Volume { limits, .. } = &mut entry.kind {
                    *limits = *new;
                }
            }),
            Plan::Repair(fix) => fix.carry_out(merge, &mut catalog, &mut frozen.root).await?,
            Plan::Hold(snapshot, held) => catalog.change(*snapshot, |entry| entry.held = *held),
            Plan::Receive(volume, step) => {
                if let Step::Begun { size, .. } = step {
                    grow(merge, &mut catalog, (*volume, *size), births).await?;
                }
                catalog.change(*volume, |entry| step.change(entry));
                if let Step::Whole { snapshot, .. } = step {
                    catalog.change(*snapshot, |entry| step.change(entry));
                }
            }
        }
        Ok(())
    }
}

async fn delete_some(merge: &mut Merge<'_>, catalog: &mut Catalog<'_>, number: u32) -> Result<()> {
    match catalog.snapshot(number) {
        Some(snapshot) => delete_of_snapshot(merge, catalog, number, snapshot).await,
        None => delete_of_volume(merge, catalog, number).await,
    }
}

async fn delete_of_volume(merge: &mut Merge<'_>, catalog: &mut Catalog<'_>, number: u32) -> Result<()> {
    let Some((mut entry, _, origin)) = catalog.volume(number) else { return Ok(()) };
    let who = Who { volume: number, newest: 0, origin: origin.1 };
    let mut leaves = LEAVES;
    entry.root = merge.drop_some(who, entry.root, (entry.height, 0), &mut leaves).await?;
    let left = !entry.root.is_hole();
    catalog.set(number, left.then_some(entry));
    Ok(())
}

/// What only the snapshot sees was born after the one before it, and has died since: it is in its dead list.
pub(super) async fn delete_of_snapshot(
    merge: &mut Merge<'_>,
    catalog: &mut Catalog<'_>,
    number: u32,
    snapshot: Snapshot,
) -> Result<()> {
    let older = catalog.snapshot(snapshot.before);
    let birth = older.as_ref().map_or(0, |older| older.birth);
    let (left, list) = merge.take_dead(number, snapshot.dead, PARTS).await?;
    for dead in list {
        match dead.birth > birth {
            true => merge.free(dead.at..dead.at + u64::from(dead.len)),
            false => merge.dead.push(dead),
        }
    }
    if let Some(older) = older {
        let list = merge.add_dead(snapshot.before, older.dead).await?;
        catalog.change(snapshot.before, |entry| set_dead(entry, list));
    }
    if left.is_hole() {
        catalog.relink_within(snapshot.volume, number, snapshot.before);
        catalog.set(number, None);
    } else {
        catalog.change(number, |entry| set_dead(entry, left));
    }
    Ok(())
}

pub(super) fn set_dead(entry: &mut Entry, list: Ptr) {
    if let EntryKind::Snapshot { dead, .. } = &mut entry.kind {
        *dead = list;
    }
}

/// What the line was since the snapshot becomes a line of its own, with the snapshot as its origin: nothing is copied, and
/// nothing is lost.
async fn rollback(
    merge: &mut Merge<'_>,
    catalog: &mut Catalog<'_>,
    (volume, number): (u32, u32),
    old: &(u32, String),
) -> Result<()> {
    let (Some((entry, newest, _)), Some(snapshot)) = (catalog.volume(volume), catalog.snapshot(number))
    else {
        return Ok(());
    };
    let newer: Vec<u32> = catalog.line(volume).into_iter().take_while(|other| *other != number).collect();
    for other in &newer {
        forget_older(merge, catalog, *other, snapshot.birth).await?;
        catalog.change(*other, |entry| {
            if let EntryKind::Snapshot { volume, before, .. } = &mut entry.kind {
                *volume = old.0;
                *before = if *before == number { 0 } else { *before };
            }
        });
    }
    let newest = if newer.is_empty() { 0 } else { newest };
    let kind = EntryKind::Volume {
        newest,
        origin: (number, snapshot.birth),
        limits: Limits::default(),
        own: 0,
        receiving: None,
    };
    catalog.set(old.0, Some(Entry { name: old.1.clone(), made: seconds(), kind, ..entry }));
    // The line sees again what it had let go of.
    merge.take_dead(number, snapshot.dead, usize::MAX).await?;
    catalog.change(number, |entry| set_dead(entry, Ptr::default()));
    catalog.change(volume, |entry| {
        (entry.root, entry.height, entry.size, entry.mapped) =
            (snapshot.entry.root, snapshot.entry.height, snapshot.entry.size, snapshot.entry.mapped);
        if let EntryKind::Volume { newest, own, receiving, .. } = &mut entry.kind {
            (*newest, *own, *receiving) = (number, 0, None);
        }
    });
    Ok(())
}

/// A line becomes a clone: from now on its snapshots list nothing that its origin sees.
async fn forget_older(
    merge: &mut Merge<'_>,
    catalog: &mut Catalog<'_>,
    number: u32,
    birth: u64,
) -> Result<()> {
    let Some(snapshot) = catalog.snapshot(number) else { return Ok(()) };
    (_, merge.dead) = merge.take_dead(number, snapshot.dead, usize::MAX).await?;
    merge.dead.retain(|dead| dead.birth > birth);
    let list = merge.add_dead(number, Ptr::default()).await?;
    catalog.change(number, |entry| set_dead(entry, list));
    Ok(())
}

/// A line is no clone of that origin any more: its snapshots list what the line has let go of that the origin sees.
async fn recall_older(
    merge: &mut Merge<'_>,
    catalog: &mut Catalog<'_>,
    (number, next): (u32, &Entry),
    births: Range<u64>,
) -> Result<()> {
    let Some(snapshot) = catalog.snapshot(number) else { return Ok(()) };
    merge.lost_between(births.start, &snapshot.entry, next).await?;
    merge.dead.retain(|dead| dead.birth <= births.end);
    let list = merge.add_dead(number, snapshot.dead).await?;
    catalog.change(number, |entry| set_dead(entry, list));
    Ok(())
}

/// A clone takes its origin, and all before that, from the line they are in, which becomes a clone instead.
async fn promote(merge: &mut Merge<'_>, catalog: &mut Catalog<'_>, number: u32) -> Result<()> {
    let Some((clone, _, (origin, birth))) = catalog.volume(number) else { return Ok(()) };
    let Some(snapshot) = catalog.snapshot(origin) else { return Ok(()) };
    let line = snapshot.volume;
    let Some((_, _, former)) = catalog.volume(line) else { return Ok(()) };
    let moved: Vec<u32> = catalog.line(line).into_iter().skip_while(|other| *other != origin).collect();
    let own = catalog.line(number);
    let oldest = own.last().copied();
    for other in catalog.line(line).into_iter().take_while(|other| *other != origin) {
        forget_older(merge, catalog, other, birth).await?;
    }
    merge.take_dead(origin, snapshot.dead, usize::MAX).await?;
    catalog.change(origin, |entry| set_dead(entry, Ptr::default()));
    let mut next = clone;
    for other in own.into_iter().chain([origin]) {
        recall_older(merge, catalog, (other, &next), former.1..birth).await?;
        next = catalog.get(other).unwrap_or(next);
    }
    catalog.relink_within(line, origin, 0);
    for other in moved {
        catalog.change(other, |entry| {
            if let EntryKind::Snapshot { volume, .. } = &mut entry.kind {
                *volume = number;
            }
        });
    }
    catalog.change(line, |entry| {
        if let EntryKind::Volume { origin: of, .. } = &mut entry.kind {
            *of = (origin, birth);
        }
    });
    match oldest {
        Some(oldest) => catalog.change(oldest, |entry| {
            if let EntryKind::Snapshot { before, .. } = &mut entry.kind {
                *before = origin;
            }
        }),
        None => catalog.change(number, |entry| {
            if let EntryKind::Volume { newest, .. } = &mut entry.kind {
                *newest = origin;
            }
        }),
    }
    catalog.change(number, |entry| {
        if let EntryKind::Volume { origin, .. } = &mut entry.kind {
            *origin = former;
        }
    });
    Ok(())
}

async fn grow(
    merge: &mut Merge<'_>,
    catalog: &mut Catalog<'_>,
    (number, size): (u32, u64),
    births: u64,
) -> Result<()> {
    let Some((mut entry, ..)) = catalog.volume(number) else { return Ok(()) };
    let wanted = height(size.div_ceil(BLOCK * SLOTS as u64));
    while entry.height < wanted {
        entry.height += 1;
        if !entry.root.is_hole() {
            entry.root = merge.above(entry.root, entry.height, number, births).await?;
        }
    }
    entry.size = size;
    catalog.set(number, Some(entry));
    Ok(())
}

impl Pool {
    /// Does something with the catalog. `plan` says what, or why it may not be; nothing has changed then.
    pub(super) async fn administer(
        &self,
        below: Below<'_>,
        plan: impl FnOnce(&mut Core) -> Result<Plan>,
    ) -> Result<()> {
        self.check()?;
        let _alone = self.administering.write().await;
        self.checkpoint(below).await?;
        let plan = plan(&mut self.core())?;
        if !plan.makes_room() {
            self.keep_room(CHANGED, below).await?;
        }
        self.checkpoint_with(&plan, below).await
    }

    /// Makes an empty volume, durably. Its number.
    pub(super) async fn make_volume(
        &self,
        name: &str,
        size: u64,
        settings: Settings,
        below: Below<'_>,
    ) -> Result<u32> {
        check_size(size)?;
        let Settings { checksums, ordered, compress, quota, reserve, format: _ } = settings;
        self.need_packs(compress, below).await?;
        let entry = Entry {
            name: name.to_owned(),
            size,
            height: height(size.div_ceil(BLOCK * SLOTS as u64)),
            root: Ptr::default(),
            checksums,
            deleting: false,
            ordered,
            held: false,
            compress,
            mapped: 0,
            made: seconds(),
            features: Features::default(),
            kind: EntryKind::Volume {
                newest: 0,
                origin: (0, 0),
                limits: Limits { quota, reserve },
                own: 0,
                receiving: None,
            },
        };
        let mut made = 0;
        let plan = |core: &mut Core| {
            let entry = Entry { name: core.new_name(name)?, ..entry };
            self.need_room(core, reserve.div_ceil(BLOCK), name)?;
            made = core.next_number();
            Ok(Plan::Make { number: made, entry: Box::new(entry) })
        };
        self.administer(below, plan).await?;
        Ok(made)
    }

    /// Changes how much room a volume may take, and what is left of it after a loss of power.
    pub(super) async fn set(&self, name: &str, new: NewSettings, below: Below<'_>) -> Result<()> {
        self.need_packs(new.compress.unwrap_or_default(), below).await?;
        let plan = |core: &mut Core| {
            let volume = core.find(name, None)?;
            let Some(Entry { kind: EntryKind::Volume { limits, .. }, ordered, compress, .. }) =
                core.catalog.get(&volume)
            else {
                return Err(gone("volume", name));
            };
            let wanted = Limits {
                quota: new.quota.unwrap_or(limits.quota),
                reserve: new.reserve.unwrap_or(limits.reserve),
            };
            let more = wanted.reserve.saturating_sub(limits.reserve).div_ceil(BLOCK);
            let ordered = new.ordered.unwrap_or(*ordered);
            let compress = new.compress.unwrap_or(*compress);
            self.need_room(core, more, name)?;
            // From now on: what is written meanwhile is replayed as that of an ordered volume.
            if let Some(entry) = core.catalog.get_mut(&volume) {
                entry.ordered |= ordered;
            }
            Ok(Plan::Set { volume, limits: wanted, ordered, compress })
        };
        self.administer(below, plan).await
    }

    /// There may be packs from now on, if that compresses.
    async fn need_packs(&self, compress: Compress, below: Below<'_>) -> Result<()> {
        if compress == Compress::No {
            return Ok(());
        }
        if !cfg!(feature = "compress") {
            return Err(Error::unsupported("this program was built without what compresses"));
        }
        need_feature(self, Features::PACKS, below).await
    }

    /// # Errors
    /// [`Kind::NoSpace`] if so many blocks cannot be kept for a volume beside what is kept for others.
    fn need_room(&self, core: &Core, blocks: u64, name: &str) -> Result<()> {
        if blocks == 0 || self.space.has_room(core.kept() + with_nodes(blocks)) {
            return Ok(());
        }
        Err(Error::new(Kind::NoSpace, format!("there is no room for what is to be reserved for {name}")))
    }

    /// Deletes a volume without snapshots.
    pub(super) async fn delete_volume(&self, name: &str, below: Below<'_>) -> Result<()> {
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_free(number, name)?;
            match core.any_snapshot(number) {
                None => {
                    core.receivers.remove(&number);
                    Ok(Plan::Delete(number))
                }
                Some(snapshot) => {
                    let snapshot = &snapshot.name;
                    Err(busy(format!("{name} has snapshots, {name}@{snapshot} for one: delete those first")))
                }
            }
        };
        self.administer(below, plan).await
    }

    /// Deletes a snapshot of which there is no clone.
    pub(super) async fn delete_snapshot(&self, volume: &str, name: &str, below: Below<'_>) -> Result<()> {
        let plan = |core: &mut Core| {
            let snapshot = core.find(volume, Some(name))?;
            core.need_free(snapshot, &format!("{volume}@{name}"))?;
            if core.catalog.get(&snapshot).is_some_and(|entry| entry.held) {
                return Err(busy(format!("{volume}@{name} is held: release it first")));
            }
            match core.clones(snapshot)[..] {
                [] => Ok(Plan::Delete(snapshot)),
                [Entry { name: clone, deleting: true, .. }, ..] => Err(busy(format!(
                    "{clone}, a clone of {volume}@{name}, is still being deleted: try again when it is gone"
                ))),
                [Entry { name: clone, .. }, ..] => {
                    let message =
                        format!("{clone} is a clone of {volume}@{name}: delete or promote it first");
                    Err(busy(message))
                }
            }
        };
        self.administer(below, plan).await
    }

    /// Keeps a snapshot from being deleted, or does not any more.
    pub(super) async fn hold(&self, volume: &str, name: &str, held: bool, below: Below<'_>) -> Result<()> {
        need_feature(self, Features::HOLDS, below).await?;
        let plan = |core: &mut Core| Ok(Plan::Hold(core.find(volume, Some(name))?, held));
        self.administer(below, plan).await
    }

    /// Gets back some of the room of what is deleted. False if there is nothing left to do.
    pub(super) async fn delete_some(&self, below: Below<'_>) -> Result<bool> {
        if !self.writable || self.core().deleting().is_none() {
            return Ok(false);
        }
        self.check()?;
        let _alone = self.administering.write().await;
        let Some(number) = self.core().deleting() else { return Ok(false) };
        self.checkpoint_with(&Plan::DeleteSome(number), below).await?;
        Ok(true)
    }

    /// Gets back all of it.
    pub(super) async fn delete_all(&self, below: Below<'_>) -> Result<()> {
        while self.delete_some(below).await? {}
        Ok(())
    }

    /// Makes a volume that begins as a snapshot. Its number.
    pub(super) async fn clone_volume(
        &self,
        volume: &str,
        snapshot: &str,
        name: &str,
        below: Below<'_>,
    ) -> Result<u32> {
        let mut made = 0;
        let plan = |core: &mut Core| {
            let origin = core.find(volume, Some(snapshot))?;
            let name = core.new_name(name)?;
            made = core.next_number();
            let Some(entry) = core.catalog.get(&origin).cloned() else {
                return Err(gone("snapshot", snapshot));
            };
            let EntryKind::Snapshot { birth, .. } = entry.kind else {
                return Err(gone("snapshot", snapshot));
            };
            let (origin, limits) = ((origin, birth), Limits::default());
            let kind = EntryKind::Volume { newest: 0, origin, limits, own: 0, receiving: None };
            let entry = Entry { name, made: seconds(), kind, held: false, ..entry };
            Ok(Plan::Make { number: made, entry: Box::new(entry) })
        };
        self.administer(below, plan).await?;
        Ok(made)
    }

    /// Makes a volume what one of its snapshots is. What it was since, with the snapshots that are newer, becomes a volume
    /// of the name `old`, a clone of the snapshot.
    pub(super) async fn rollback(
        &self,
        volume: &str,
        snapshot: &str,
        old: &str,
        below: Below<'_>,
    ) -> Result<()> {
        let plan = |core: &mut Core| {
            let (volume_number, snapshot) = (core.find(volume, None)?, core.find(volume, Some(snapshot))?);
            core.need_free(volume_number, volume)?;
            core.need_whole(volume_number)?;
            let name = core.new_name(old)?;
            let old = (core.next_number(), name);
            Ok(Plan::Rollback { volume: volume_number, snapshot, old, deleted: false })
        };
        self.administer(below, plan).await
    }

    /// Gives a clone the snapshot that it was made of, and all older ones; the volume that had them becomes its clone.
    pub(super) async fn promote(&self, name: &str, below: Below<'_>) -> Result<()> {
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            match core.catalog.get(&number).map(|entry| &entry.kind) {
                Some(EntryKind::Volume { origin: (1.., _), .. }) => Ok(Plan::Promote(number)),
                _ => Err(Error::invalid(format!("{name} is no clone"))),
            }
        };
        self.administer(below, plan).await
    }

    pub(super) async fn rename(&self, name: &str, new: &str, below: Below<'_>) -> Result<()> {
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_free(number, name)?;
            let new = core.new_name(new)?;
            core.receivers.remove(&number);
            Ok(Plan::Rename(number, new))
        };
        self.administer(below, plan).await
    }

    /// Makes a volume larger. It reads as zeros behind its old end.
    pub(super) async fn grow(&self, name: &str, size: u64, below: Below<'_>) -> Result<()> {
        check_size(size)?;
        let plan = |core: &mut Core| {
            let number = core.find(name, None)?;
            core.need_whole(number)?;
            let has = core.catalog.get(&number).map_or(0, |entry| entry.size);
            match size < has {
                true => Err(Error::invalid(format!("{name} has {has} bytes already: volumes only grow"))),
                false => Ok(Plan::Grow(number, size)),
            }
        };
        self.administer(below, plan).await
    }
}
