//! Makes a pool, and opens one: finds the newest root, and brings back what the log says has happened since.

use super::below::Below;
use super::blocks::Blocks;
use super::format::{
    BLOCK, Body, Change, EXTENT, Entry, ExtentRecord, Features, Format, Id, Label, Owner, Owners, Ptr,
    RECORDS, Record, Root, SLOTS, damaged, is_sound, short, u32_at, u64_at,
};
use super::lease::{self, Ask, Free, Lease};
use super::log::Log;
use super::merge::span;
use super::nodes::{Nodes, Place, Tree};
use super::pool::{Core, Pool};
use super::space::Space;
use blockmason::{Data, Error, Kind, LocalBoxFuture, Result};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// The number of the first owner of extents.
const OWNER: u32 = 2;
/// A pool may grow to so many times the size that it is made with.
const GROWTH: u64 = 16;
/// Extents of the log, at most: 32 MiB.
const LOG: u64 = 16;
/// The smallest pool, in extents.
const LEAST: u64 = 16;

/// How a pool is opened.
#[derive(Clone, Copy)]
pub(super) struct Opening {
    pub(super) writable: bool,
    /// Bytes that nodes may take in memory.
    pub(super) memory: u64,
    /// Trees of newer formats than this one are somebody else's.
    pub(super) newest: u32,
}

impl Opening {
    pub(super) fn writable(memory: u64) -> Opening {
        Opening { writable: true, memory, newest: Format::Two.number() }
    }

    pub(super) fn read_only(memory: u64) -> Opening {
        Opening { writable: false, ..Opening::writable(memory) }
    }
}

/// Makes an empty pool on a device that reads as zeros. It is one once its label is there, at the end.
///
/// # Errors
/// [`Kind::NoSpace`] if the device is too small.
pub(super) async fn create(id: Id, size: u64, below: Below<'_>) -> Result<()> {
    let extents = size / (BLOCK * EXTENT);
    if extents < LEAST {
        let least = LEAST * BLOCK * EXTENT;
        return Err(Error::new(
            Kind::NoSpace,
            format!("a pool has at least {least} bytes, and this has {size}"),
        ));
    }
    let label = Label { id, extents, capacity: extents * GROWTH, sequence: 1, features: Features::default() };
    let (first, log) = (label.first(), (extents / 64).clamp(1, LOG));
    if first + log + 4 > extents {
        return Err(Error::new(Kind::NoSpace, "the device is too small for a pool"));
    }
    let owners = Owners { id, sequence: 1, all: vec![owner(OWNER, Format::One, first, "")] };
    // What is written there later, amid other things, must not fail for want of room.
    below.allocate(0..EXTENT).await?;
    below.allocate(first * EXTENT..(first + log + 1) * EXTENT).await?;
    let record = ExtentRecord { owner: OWNER, epoch: 0, used: [u64::MAX; 8], backed: true };
    let records = record.encode().repeat(log as usize + 1);
    for place in label.record(first) {
        below.write(place, Data::copy_of(&records)).await?;
    }
    write_first_root(&owners.all[0], [(first + 1) * EXTENT, log * EXTENT], &id, below).await?;
    for place in Owners::PLACES {
        below.write(place * BLOCK, Data::shared(owners.encode())).await?;
    }
    below.flush().await?;
    for place in Label::PLACES {
        below.write(place * BLOCK, Data::shared(label.encode())).await?;
        below.flush().await?;
    }
    Ok(())
}

/// One of whose format nothing is unusual.
fn owner(number: u32, format: Format, root: u64, key: &str) -> Owner {
    Owner { number, format: format.number(), root, features: Features::default(), key: key.to_owned() }
}

/// Makes the places zero from which a pool is read that `create` does not write: those of a device may hold anything.
pub(super) async fn clear(size: u64, below: Below<'_>) -> Result<()> {
    const PIECE: u64 = 1 << 20;
    let extents = size / (BLOCK * EXTENT);
    let label = Label {
        id: [0; 16],
        extents,
        capacity: extents * GROWTH,
        sequence: 0,
        features: Features::default(),
    };
    for at in (0..(label.first() + 1) * EXTENT * BLOCK).step_by(PIECE as usize) {
        below.write(at, Data::zeros(PIECE as usize)).await?;
    }
    Ok(())
}

/// True if the device has no pool, and reads as zeros in its first 2 MiB, but for what is left of a pool that was half made.
pub(super) async fn is_empty(below: Below<'_>) -> Result<bool> {
    for place in Label::PLACES {
        // One copy says enough, whatever becomes of the other.
        if below.read(place * BLOCK, BLOCK).await.is_ok_and(|data| !data.is_zero()) {
            return Ok(false);
        }
    }
    let found = below.read(0, EXTENT * BLOCK).await?.to_vec();
    let mut blocks = found.chunks(BLOCK as usize).zip(0..);
    Ok(blocks.all(|(block, at)| {
        block.iter().all(|byte| *byte == 0) || Owners::PLACES.contains(&at) && Owners::is_one(block)
    }))
}

/// Trees that are there and cannot be opened.
pub(super) struct Lacking {
    pub(super) format: Format,
    pub(super) key: String,
    pub(super) why: Error,
}

impl Lacking {
    /// Which volumes those are.
    pub(super) fn what(&self) -> String {
        match self.key.as_str() {
            "" => format!("volumes of format {}", self.format),
            key => format!("volumes of format {} with the key {key}", self.format),
        }
    }
}

/// A pool that has just been opened.
pub(super) struct Opened {
    /// Of each format and key one, at most.
    pub(super) trees: Vec<Pool>,
    /// They are left alone, and the others work.
    pub(super) lacking: Vec<Lacking>,
}

impl Opened {
    /// The trees of a format that have no key, or others if there are none.
    ///
    /// # Errors
    /// They are there, and cannot be opened.
    pub(super) fn take(mut self, format: Format) -> Result<Result<Pool, Pool>> {
        let is = |lacking: &Lacking| lacking.format == format && lacking.key.is_empty();
        if let Some(lacking) = self.lacking.into_iter().find(is) {
            return Err(lacking.why);
        }
        let found = self.trees.iter().position(|trees| trees.format == format && trees.core().key.is_empty());
        let trees = self.trees.swap_remove(found.unwrap_or(0));
        Ok(if found.is_some() { Ok(trees) } else { Err(trees) })
    }
}

/// Opens the pool, all of which works. Its newest trees.
#[cfg(test)]
pub(super) async fn open_newest(opening: Opening, size: u64, below: Below<'_>) -> Result<Pool> {
    let mut opened = open(opening, size, below).await?;
    match opened.lacking.pop() {
        Some(lacking) => Err(lacking.why),
        None => Ok(opened.trees.remove(opened.trees.len() - 1)),
    }
}

/// What was found of the trees of one owner.
struct Found {
    pool: Pool,
    journal: Vec<(u64, ExtentRecord)>,
}

/// What there is in a pool, before anything has been written.
pub(super) struct All {
    pub(super) blocks: Arc<Blocks>,
    found: Vec<(Owner, Found)>,
    pub(super) lacking: Vec<Lacking>,
    /// Owners whose format this program does not know.
    pub(super) unknown: usize,
}

impl All {
    /// The trees, as they are.
    pub(super) fn trees(&self) -> impl Iterator<Item = &Pool> {
        self.found.iter().map(|(_, trees)| &trees.pool)
    }

    /// Brings to the table what the journals of these trees say.
    pub(super) async fn write_journal(&self, trees: &Pool, below: Below<'_>) -> Result<()> {
        match self.found.iter().find(|(_, found)| std::ptr::eq(&found.pool, trees)) {
            Some((_, found)) => found.write_journal(below).await,
            None => Ok(()),
        }
    }
}

/// Finds all trees of the pool on a device of that size.
///
/// # Errors
/// [`Kind::Denied`] if there is none; [`Kind::Io`] if it is damaged.
pub(super) async fn find_all(opening: Opening, size: u64, below: Below<'_>) -> Result<All> {
    let label = read_label(below).await?;
    label.features.allow(Features::KEYS, opening.writable, "the pool")?;
    need_size(&label, size)?;
    let owners = read_owners(&label, below).await?.all;
    let count = owners.len();
    let known = |owner: Owner| {
        let format = Format::numbered(owner.format).filter(|_| owner.format <= opening.newest)?;
        Some((format, owner))
    };
    let owners: Vec<(Format, Owner)> = owners.into_iter().filter_map(known).collect();
    let numbers: Vec<u32> = owners.iter().map(|(_, owner)| owner.number).collect();
    let nodes = Arc::new(Nodes::new(label.id, opening.memory));
    let blocks = Arc::new(Blocks::read(label, &numbers, below).await?);
    let unknown = count - owners.len();
    let mut all = All { blocks: blocks.clone(), found: Vec::new(), lacking: Vec::new(), unknown };
    // First whose all blocks are: only then may anybody take some.
    for (format, owner) in owners {
        match find_trees((format, &owner), opening.writable, (&blocks, &nodes), below).await {
            Ok(trees) => all.found.push((owner, trees)),
            Err(why) => {
                blocks.disown(owner.number);
                all.lacking.push(Lacking { format, key: owner.key, why });
            }
        }
    }
    Ok(all)
}

/// Opens the pool on a device of that size. Trees that have damage in the way of their first checkpoint are open for reading only, and
/// say so to whoever writes.
///
/// # Errors
/// As those of [`find_all`], and none of its trees can be opened.
pub(super) async fn open(opening: Opening, size: u64, below: Below<'_>) -> Result<Opened> {
    let All { blocks, found, lacking, .. } = find_all(opening, size, below).await?;
    let mut opened = Opened { trees: Vec::new(), lacking };
    for (owner, trees) in found {
        let begun = if opening.writable { trees.begin(below).await } else { Ok(()) };
        match begun {
            Ok(()) => opened.trees.push(trees.pool),
            // What is there can be read, what the log has with it.
            Err(error) if error.kind() == Kind::Io => {
                trees.pool.break_down(&error);
                opened.trees.push(trees.pool);
            }
            Err(why) => {
                blocks.disown(owner.number);
                opened.lacking.push(Lacking { format: trees.pool.format, key: owner.key, why });
            }
        }
    }
    if opened.trees.is_empty() {
        let none = || Error::new(Kind::Unsupported, "the pool has no volumes of a known format");
        return Err(opened.lacking.into_iter().next().map_or_else(none, |lacking| lacking.why));
    }
    Ok(opened)
}

/// # Errors
/// The device is smaller than the pool.
pub(super) fn need_size(label: &Label, size: u64) -> Result<()> {
    let bytes = label.extents * EXTENT * BLOCK;
    match bytes > size {
        true => Err(damaged(format!("the pool has {bytes} bytes, and there are only {size}"))),
        false => Ok(()),
    }
}

async fn find_trees(
    (format, owner): (Format, &Owner),
    writable: bool,
    (blocks, nodes): (&Arc<Blocks>, &Arc<Nodes>),
    below: Below<'_>,
) -> Result<Found> {
    owner.features.allow(Features::OWNERS, writable, "what the pool holds")?;
    let label = blocks.label();
    let root = read_root(&label, owner, below).await?;
    let journal = read_journal(&label, &root, below).await?;
    let epoch = root.epoch + u64::from(writable);
    let space = Space::new(blocks.clone(), owner.number, epoch, &journal.records);
    let catalog = read_catalog(nodes, &root, below).await?;
    let log = Log::new(root.log, root.epoch, root.tail);
    let mut core = Core::new((format, &owner.key), root, log, catalog);
    core.journal = journal.blocks;
    for block in &core.journal {
        space.mark(*block..block + 1)?;
    }
    replay(&mut core, &space, below).await?;
    let tail = core.log.head();
    if writable {
        // What the log has is in memory now, and goes into the trees before anything else is done.
        core.root.epoch = epoch;
        core.opened = true;
    }
    let mut log = Log::new(core.root.log, epoch, tail);
    log.begin_full(core.root.tail);
    core.log = log;
    let pool = Pool::new(format, space, nodes.clone(), owner.root, core, writable);
    Ok(Found { pool, journal: journal.records })
}

impl Found {
    /// Makes it writable.
    async fn begin(&self, below: Below<'_>) -> Result<()> {
        self.write_journal(below).await?;
        self.pool.checkpoint(below).await?;
        self.pool.space.back_slop(below).await
    }

    async fn write_journal(&self, below: Below<'_>) -> Result<()> {
        let extents: Vec<u64> = self.journal.iter().map(|(extent, _)| *extent).collect();
        self.pool.space.write_known(&extents, below).await
    }
}

/// Makes trees of another format beside those of a pool that is open for writing.
///
/// # Errors
/// [`Kind::NoSpace`].
pub(super) async fn add_trees(format: Format, others: &Pool, below: Below<'_>) -> Result<Pool> {
    let (blocks, nodes) = (&others.space.blocks, &others.nodes);
    let owner = {
        // Whoever else changes the list of owners has read it before, or reads it after this.
        let _alone = blocks.naming.lock().await;
        add_owner(format, "", blocks, below).await?
    };
    let trees = find_trees((format, &owner), true, (blocks, nodes), below).await?;
    trees.begin(below).await?;
    Ok(trees.pool)
}

/// Opens the trees that a block store below serves, which knows of one owner only and asks the store for extents.
///
/// # Errors
/// As [`open`].
pub(super) async fn open_leased(lease: Lease, memory: u64, below: Below<'_>) -> Result<Pool> {
    let label = read_label(below).await?;
    label.features.allow(Features::KEYS, true, "the pool")?;
    let owners = read_owners(&label, below).await?.all.into_iter();
    let found = owners.filter_map(|owner| Some((Format::numbered(owner.format)?, owner)));
    let found = found.into_iter().find(|(_, owner)| owner.number == lease.owner);
    let (format, owner) =
        found.ok_or_else(|| damaged("the block store speaks of an owner that is not there"))?;
    // Whoever has the key has nothing to tell it from.
    let owner = Owner { key: String::new(), ..owner };
    let nodes = Arc::new(Nodes::new(label.id, memory));
    let blocks = Arc::new(Blocks::leased(label, lease, below).await?);
    let trees = find_trees((format, &owner), true, (&blocks, &nodes), below).await?;
    trees.begin(below).await?;
    Ok(trees.pool)
}

/// The owner of that format and key, if there is one. Of a key all trees are of one format, so that a name is one volume's.
///
/// # Errors
/// [`Kind::Busy`] if they are of another one.
pub(super) async fn find_owner(
    format: Format,
    key: &str,
    label: &Label,
    below: Below<'_>,
) -> Result<Option<Owner>> {
    let mut all = read_owners(label, below).await?.all.into_iter().filter(|owner| owner.key == key);
    match all.next() {
        Some(first) if first.format == format.number() => Ok(Some(first)),
        None => Ok(None),
        Some(first) => {
            let whose = if key.is_empty() { "without a key".to_owned() } else { format!("of the key {key}") };
            let message = format!(
                "the trees {whose} are of format {}: give those of another format a key of their own",
                first.format
            );
            Err(Error::new(Kind::Busy, message))
        }
    }
}

/// Makes an owner of extents, whose trees are empty. The caller holds [`Blocks::naming`].
///
/// # Errors
/// [`Kind::NoSpace`].
pub(super) async fn add_owner(format: Format, key: &str, blocks: &Blocks, below: Below<'_>) -> Result<Owner> {
    if !key.is_empty() {
        blocks.allow_keys(below).await?;
    }
    let label = blocks.label();
    let mut owners = read_owners(&label, below).await?;
    let number = owners.all.iter().map(|owner| owner.number).max().map_or(OWNER, |last| last + 1);
    let log = (label.extents / 64).clamp(1, LOG);
    let extents = blocks.settle(number, 1 + log, below).await?;
    let (first, log) = (extents.start, extents.end - extents.start - 1);
    let owner = owner(number, format, first, key);
    write_first_root(&owner, [(first + 1) * EXTENT, log * EXTENT], &label.id, below).await?;
    below.flush().await?;
    owners.sequence += 1;
    owners.all.push(owner.clone());
    write_owners(&owners, below).await?;
    Ok(owner)
}

/// Whoever opens these trees has to know that feature from now on, durably.
pub(super) async fn need_feature(trees: &Pool, feature: u64, below: Below<'_>) -> Result<()> {
    if trees.space.lease().is_some() {
        return lease::ask::<Free>(Ask::Need { feature }, below).await.map(drop);
    }
    let number = trees.core().root.owner;
    note_feature(&trees.space.blocks, number, feature, below).await
}

/// The list of owners says that this one's trees have a feature from now on, durably.
pub(super) async fn note_feature(blocks: &Blocks, owner: u32, feature: u64, below: Below<'_>) -> Result<()> {
    let _alone = blocks.naming.lock().await;
    let mut owners = read_owners(&blocks.label(), below).await?;
    let ours = owners.all.iter_mut().find(|one| one.number == owner);
    let features = ours.map(|owner| &mut owner.features.incompatible);
    if let Some(features) = features.filter(|features| **features & feature == 0) {
        *features |= feature;
        owners.sequence += 1;
        write_owners(&owners, below).await?;
    }
    Ok(())
}

/// Writes both copies, each durably.
async fn write_owners(owners: &Owners, below: Below<'_>) -> Result<()> {
    for place in Owners::PLACES {
        below.write(place * BLOCK, Data::shared(owners.encode())).await?;
        below.flush().await?;
    }
    Ok(())
}

/// The root of trees that are empty.
async fn write_first_root(owner: &Owner, log: [u64; 2], id: &Id, below: Below<'_>) -> Result<()> {
    let root = Root {
        owner: owner.number,
        id: *id,
        sequence: 1,
        epoch: 0,
        births: 1,
        log,
        tail: (0, 1),
        next: 1,
        height: 0,
        catalog: Ptr::default(),
        journal: 0,
        used: 0,
    };
    // Another slot may have a root that was there before.
    let (data, nothing) = (Data::shared(root.encode()), Data::zeros(BLOCK as usize));
    for place in Root::places(root.sequence + 1) {
        below.write((owner.root * EXTENT + place) * BLOCK, nothing.clone()).await?;
    }
    for place in Root::places(root.sequence) {
        below.write((owner.root * EXTENT + place) * BLOCK, data.clone()).await?;
    }
    Ok(())
}

pub(super) async fn read_label(below: Below<'_>) -> Result<Label> {
    let mut best: Option<Label> = None;
    let mut refused = None;
    for place in Label::PLACES {
        let read = below.read(place * BLOCK, BLOCK).await;
        match read.and_then(|data| Label::decode(&data.to_vec())) {
            Ok(label) if best.as_ref().is_none_or(|best| best.sequence < label.sequence) => {
                best = Some(label)
            }
            Ok(_) => {}
            // What is damaged says more than what is not there.
            Err(error) if refused.is_none() || error.kind() != Kind::Denied => refused = Some(error),
            Err(_) => {}
        }
    }
    best.ok_or_else(|| refused.unwrap_or_else(|| Error::new(Kind::Denied, "it is no pool")))
}

pub(super) async fn read_owners(label: &Label, below: Below<'_>) -> Result<Owners> {
    let mut best: Option<Owners> = None;
    for place in Owners::PLACES {
        let read = below.read(place * BLOCK, BLOCK).await;
        if let Ok(owners) = read.and_then(|data| Owners::decode(&data.to_vec(), label))
            && best.as_ref().is_none_or(|best| best.sequence < owners.sequence)
        {
            best = Some(owners);
        }
    }
    best.ok_or_else(|| damaged("both copies of the list of the pool's owners are damaged"))
}

async fn read_root(label: &Label, owner: &Owner, below: Below<'_>) -> Result<Root> {
    let mut best: Option<Root> = None;
    for slot in [0, 1] {
        let (mut unread, mut good) = (None, false);
        for place in Root::places(slot) {
            match below.read((owner.root * EXTENT + place) * BLOCK, BLOCK).await {
                Ok(data) => {
                    let Ok(root) = Root::decode(&data.to_vec(), &label.id, owner.number) else { continue };
                    good = true;
                    if best.as_ref().is_none_or(|best| best.sequence < root.sequence) {
                        best = Some(root);
                    }
                }
                Err(error) => unread = Some(error),
            }
        }
        // It may be the newest one: an older one must not take its place.
        if let Some(error) = unread.filter(|_| !good) {
            return Err(error);
        }
    }
    let root = best.ok_or_else(|| damaged("all copies of the root are damaged"))?;
    let end = root.log[0].checked_add(root.log[1]);
    match end.is_some_and(|end| end <= label.extents * EXTENT) {
        true => Ok(root),
        false => Err(damaged("the log lies outside the pool")),
    }
}

/// What the space journal of a root says.
#[derive(Default)]
struct Journal {
    records: Vec<(u64, ExtentRecord)>,
    blocks: Vec<u64>,
}

async fn read_journal(label: &Label, root: &Root, below: Below<'_>) -> Result<Journal> {
    let mut journal = Journal::default();
    let mut at = root.journal;
    while at != 0 {
        let most = 2 * (label.extents / 29 + 1);
        if at + 1 >= label.extents * EXTENT || journal.blocks.len() as u64 > most {
            return Err(damaged("the space journal leads out of the pool, or back to itself"));
        }
        let mut part = None;
        for copy in [at, at + 1] {
            // One copy is enough.
            if let (None, Ok(bytes)) = (&part, below.read(copy * BLOCK, BLOCK).await) {
                part = journal_part(&bytes.to_vec(), label, root);
            }
        }
        let (next, mut records) =
            part.ok_or_else(|| damaged("both copies of the space journal are damaged"))?;
        journal.records.append(&mut records);
        journal.blocks.extend([at, at + 1]);
        at = next;
    }
    Ok(journal)
}

/// One block of it: the next one, and its records.
pub(super) fn journal_part(
    bytes: &[u8],
    label: &Label,
    root: &Root,
) -> Option<(u64, Vec<(u64, ExtentRecord)>)> {
    let own = bytes.starts_with(b"PXSJ")
        && is_sound(bytes, 4)
        && [u64_at(bytes, 8), u64_at(bytes, 16)] == [short(&label.id), root.sequence];
    let count = own.then(|| u32_at(bytes, 32) as usize).filter(|count| *count <= 29)?;
    let record = |ix: usize| {
        let place = 64 + 136 * ix;
        let record = ExtentRecord::decode(&bytes[place + 8..place + 136])?;
        // Records are written to where their extents say.
        let inside = (label.first()..label.extents).contains(&u64_at(bytes, place));
        inside.then(|| (u64_at(bytes, place), record))
    };
    let records = (0..count).map(record).collect::<Option<_>>()?;
    Some((u64_at(bytes, 24), records))
}

async fn read_catalog(nodes: &Nodes, root: &Root, below: Below<'_>) -> Result<BTreeMap<u32, Entry>> {
    let mut catalog = BTreeMap::new();
    read_pages(nodes, root.catalog, (root.height, 0), &mut catalog, below).await?;
    Ok(catalog)
}

fn read_pages<'a>(
    nodes: &'a Nodes,
    ptr: Ptr,
    (level, index): (u8, u64),
    catalog: &'a mut BTreeMap<u32, Entry>,
    below: Below<'a>,
) -> LocalBoxFuture<'a, Result<()>> {
    Box::pin(async move {
        if ptr.is_hole() || index * span(level) * RECORDS as u64 > u64::from(u32::MAX) {
            return Ok(());
        }
        let node = nodes.get(&Place { tree: Tree::Catalog, ptr, level, index }, below).await?;
        match &node.body {
            Body::Catalog(page) => {
                let numbered = (index * RECORDS as u64..).zip(page);
                catalog.extend(
                    numbered
                        .filter_map(|(number, entry)| Some((u32::try_from(number).ok()?, entry.clone()?))),
                );
            }
            Body::Inner(children) => {
                for (ix, child) in children.iter().enumerate() {
                    let place = (level - 1, index * SLOTS as u64 + ix as u64);
                    read_pages(nodes, *child, place, catalog, below).await?;
                }
            }
            _ => return Err(damaged("a page of the catalog was expected")),
        }
        Ok(())
    })
}

/// Brings back what the log says.
async fn replay(core: &mut Core, space: &Space, below: Below<'_>) -> Result<()> {
    let mut records = Vec::new();
    while let Some((record, behind)) = next_record(core, &space.label().id, below).await? {
        core.log.written(record.number, record.settled, behind);
        records.push(record);
    }
    let settled = records.iter().map(|record| record.settled).max().unwrap_or(0);
    // Ordered volumes of which something has not happened: nor has anything that came after it.
    let mut ended = HashSet::new();
    for Record { number, changes, .. } in records {
        let mut happened = Vec::new();
        for change in changes {
            let volume = fits(core, space, &change)?;
            if ended.contains(&volume) {
                continue;
            }
            let has_happened = has_happened(&change, number <= settled, below).await?;
            if !has_happened && core.catalog.get(&volume).is_some_and(|entry| entry.ordered) {
                ended.insert(volume);
            }
            if has_happened {
                space.mark(change.room())?;
                happened.push(change);
            }
        }
        core.apply(number, happened);
    }
    Ok(())
}

/// The record at the head of the log, if there is one, and where the log goes on behind it.
async fn next_record(core: &Core, id: &Id, below: Below<'_>) -> Result<Option<(Record, u64)>> {
    let ([first, blocks], (head, number)) = (core.root.log, core.log.head());
    // One that did not fit before the end is at the start.
    for at in [head, 0] {
        let place = (first + at) * BLOCK;
        let block = below.read(place, BLOCK).await?.to_vec();
        let Some(span) = Record::span(&block, id, core.root.epoch, number) else { continue };
        if at + span as u64 / BLOCK > blocks {
            continue;
        }
        let bytes = below.read(place, span as u64).await?.to_vec();
        if let Some(record) = Record::decode(&bytes, id, core.root.epoch, number) {
            return Ok(Some((record, (at + span as u64 / BLOCK) % blocks)));
        }
    }
    Ok(None)
}

/// The volume that a change is of.
///
/// # Errors
/// It says something of blocks that a volume or the pool does not have, or of a snapshot that is there already.
fn fits(core: &Core, space: &Space, change: &Change) -> Result<u32> {
    let (volume, end, is_new) = match change {
        Change::Map { volume, first, len, .. } => {
            let inside = change.room().end <= space.label().extents * EXTENT;
            (volume, first + u64::from(*len), *len > 0 && inside)
        }
        Change::Snapshot { number, volume, .. } => {
            (volume, 0, *number < u32::MAX / 2 && !core.catalog.contains_key(number))
        }
    };
    let is_volume = core.lines.contains_key(volume);
    match core.catalog.get(volume).filter(|entry| is_volume && is_new && end * BLOCK <= entry.size) {
        Some(_) => Ok(*volume),
        None => Err(damaged("the log speaks of what no volume has")),
    }
}

/// Blocks that are read at once to compare them.
const PIECE: u64 = 256;

/// Whether a change is to be believed.
async fn has_happened(change: &Change, settled: bool, below: Below<'_>) -> Result<bool> {
    match change {
        Change::Map { at: 1.., .. } if settled => Ok(true),
        Change::Map { at: 1.., crc, .. } => {
            let room = change.room();
            let mut hasher = crc32fast::Hasher::new();
            // A damaged record may speak of the whole pool.
            for first in room.clone().step_by(PIECE as usize) {
                let blocks = PIECE.min(room.end - first);
                hasher.update(&below.read(first * BLOCK, blocks * BLOCK).await?.to_vec());
            }
            Ok(hasher.finalize() == *crc)
        }
        Change::Map { .. } | Change::Snapshot { .. } => Ok(true),
    }
}

/// The checksum of data.
pub(super) fn crc_of(data: &Data) -> u32 {
    match data.as_slice() {
        Some(bytes) => crc32fast::hash(bytes),
        None => crc32fast::hash(&data.to_vec()),
    }
}
