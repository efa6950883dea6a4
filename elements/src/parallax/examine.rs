//! Looks at everything that leads to data: at both copies of each node, of which one that is damaged is written anew from the
//! other, and at data that has a checksum. A scrub and a check do that, and a check keeps account of what it has seen besides.

use super::below::Below;
use super::check::Claims;
use super::format::{
    BLOCK, Body, Dead, EXTENT, Entry, LIMIT, NODE, Node, Pack, Ptr, RECORDS, SLOTS, Slot, unit,
};
use super::items::Item;
use super::merge::span;
use super::nodes::{Place, Tree};
use super::open::crc_of;
use super::pool::Pool;
use blockmason::{Data, LocalBoxFuture};
use std::ops::Range;
use std::sync::Arc;

/// Problems that are told one by one.
const MOST: usize = 100;

/// Blocks of data that are read at once.
const PIECE: usize = 256;

/// What has become of a copy that was damaged.
pub(super) fn outcome(pool: &Pool, mended: bool) -> &'static str {
    match (mended, pool.writable) {
        (true, _) => "is written anew",
        (false, true) => "cannot be written anew",
        (false, false) => "is to be written anew",
    }
}

/// What has been found: one sentence each.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) all: Vec<String>,
    /// Beside those.
    pub(super) more: u64,
}

impl Said {
    pub(super) fn say(&mut self, what: impl Into<String>) {
        match self.all.len() < MOST {
            true => self.all.push(what.into()),
            false => self.more += 1,
        }
    }

    pub(super) fn append(&mut self, other: Said) {
        other.all.into_iter().for_each(|what| self.say(what));
        self.more += other.more;
    }
}

/// Something of which no copy is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// A page of the catalog.
    Page,
    /// The node of a tree that leads to so many blocks.
    Node(u64),
    /// Part of the dead list of that snapshot.
    DeadList(u32),
}

/// True of a pointer that cannot be one.
pub(super) fn is_odd(ptr: Ptr) -> bool {
    ptr.at[0] == ptr.at[1] || ptr.at.iter().any(|at| *at >= LIMIT)
}

/// A volume or snapshot that is looked at.
pub(super) struct Subject<'e> {
    /// As people know it.
    pub(super) name: String,
    pub(super) entry: &'e Entry,
}

pub(super) struct Examiner<'a> {
    pub(super) pool: &'a Pool,
    below: Below<'a>,
    pub(super) said: Said,
    pub(super) lost: Vec<Lost>,
    /// Of a check: everything that has been seen.
    pub(super) claims: Option<Claims>,
    /// What comes before this block has been looked at.
    from: u64,
    /// What is not younger than this has been.
    newer: u64,
    /// Bytes that have been read, and those after which it is enough.
    pub(super) bytes: u64,
    enough: u64,
    /// Data in a row that has not been compared yet: its first block, and what is said of each.
    row: (u64, Vec<Slot>),
    /// The pack that was looked at last, and what is in it.
    pack: Option<(u64, Option<Data>)>,
}

impl<'a> Examiner<'a> {
    /// Looks at all of what it is told.
    pub(super) fn new(pool: &'a Pool, below: Below<'a>) -> Examiner<'a> {
        Examiner {
            pool,
            below,
            said: Said::default(),
            lost: Vec::new(),
            claims: None,
            from: 0,
            newer: 0,
            bytes: 0,
            enough: u64::MAX,
            row: (0, Vec::new()),
            pack: None,
        }
    }

    /// Looks at what lies in a tree from a block on and is younger than that, until so many bytes have been read.
    pub(super) fn of(
        pool: &'a Pool,
        (from, newer, enough): (u64, u64, u64),
        below: Below<'a>,
    ) -> Examiner<'a> {
        Examiner { from, newer, enough, ..Examiner::new(pool, below) }
    }

    pub(super) fn problem(&mut self, what: impl Into<String>) {
        self.said.say(what);
    }

    /// A node, if it can be read.
    async fn node(&mut self, place: Place, what: &str, lost: Lost) -> Option<Arc<Node>> {
        let Place { ptr, level, index, .. } = place;
        if is_odd(ptr) {
            self.lost.push(lost);
            self.problem(format!("{what} points to {ptr:?}"));
            return None;
        }
        // What has been looked at on the device once is in memory, or as good as that.
        let of_tree = matches!(place.tree, Tree::Volume(_));
        let again = of_tree && index * span(level + 1) < self.from
            || self.claims.as_ref().is_some_and(|claims| claims.seen.contains(&ptr.at[0]));
        let found = match again {
            true => self.pool.nodes.get(&place, self.below).await.map(|node| (node, None)),
            false => self.pool.nodes.examine(&place, self.below).await,
        };
        self.bytes += if again { 0 } else { 2 * NODE * BLOCK };
        let (node, damaged) = match found {
            Ok(found) => found,
            Err(error) => {
                self.lost.push(lost);
                self.problem(format!("{what} cannot be read: {error}"));
                return None;
            }
        };
        if let Some((at, mended)) = damaged {
            let outcome = outcome(self.pool, mended);
            self.problem(format!("{what}: the copy of a node at block {at} was damaged, and {outcome}"));
        }
        if node.body.birth() > ptr.birth {
            self.problem(format!("{what}: the node at block {} has something younger than it is", ptr.at[0]));
        }
        if let Some(claims) = &mut self.claims {
            claims.node(&place, &node.body, &mut self.said);
        }
        Some(node)
    }

    /// Pages of the catalog.
    pub(super) fn pages(&mut self, ptr: Ptr, level: u8, index: u64) -> LocalBoxFuture<'_, ()> {
        Box::pin(async move {
            if ptr.is_hole() || index * span(level) * RECORDS as u64 > u64::from(u32::MAX) {
                return;
            }
            let place = Place { tree: Tree::Catalog, ptr, level, index };
            let Some(node) = self.node(place, "the catalog", Lost::Page).await else { return };
            if let Body::Inner(children) = &node.body {
                for (ix, child) in children.iter().enumerate() {
                    self.pages(*child, level - 1, index * SLOTS as u64 + ix as u64).await;
                }
            }
        })
    }

    /// A dead list: what it lists must be older than its snapshot. All that it lists, if that is kept account of.
    pub(super) async fn dead_list(
        &mut self,
        mut list: Ptr,
        (snapshot, birth): (u32, u64),
        what: &str,
    ) -> Vec<Dead> {
        let (mut parts, mut all) = (0, Vec::new());
        while !list.is_hole() {
            parts += 1;
            if parts > self.pool.space.blocks.all() / NODE {
                self.lost.push(Lost::DeadList(snapshot));
                self.problem(format!("{what}: its dead list leads back to itself"));
                break;
            }
            let place = Place { tree: Tree::DeadList, ptr: list, level: 0, index: u64::from(snapshot) };
            let told = format!("{what}: its dead list");
            let Some(node) = self.node(place, &told, Lost::DeadList(snapshot)).await else { break };
            let Body::Dead(next, dead) = &node.body else { break };
            if let Some(Dead { at, birth: young, .. }) = dead.iter().find(|dead| dead.birth > birth) {
                self.problem(format!("{what} lists block {at} as dead, which was born after it ({young})"));
            }
            if self.claims.is_some() {
                all.extend(dead);
            }
            list = *next;
        }
        all
    }

    /// A tree, or what is to be seen of it. The block from which it goes on, if that was not all.
    pub(super) async fn tree(&mut self, subject: &Subject<'_>) -> Option<u64> {
        let Entry { root, height, .. } = subject.entry;
        let left = self.below_ptr((*root, *height, 0), subject).await;
        self.compare(subject).await;
        left
    }

    fn below_ptr<'w>(
        &'w mut self,
        (ptr, level, index): (Ptr, u8, u64),
        subject: &'w Subject<'w>,
    ) -> LocalBoxFuture<'w, Option<u64>> {
        Box::pin(async move {
            let format = self.pool.format;
            let items = match Item::of(format, ptr, level, index) {
                run @ Item::Run { .. } => vec![run],
                Item::Node(place) => {
                    let told = subject.told(index * span(level + 1), span(level + 1));
                    let lost = Lost::Node(span(level + 1));
                    let node = self.node(place, &told, lost).await?;
                    // Of a check: what is below has been looked at.
                    if self.claims.as_mut().is_some_and(|claims| !claims.seen.insert(ptr.at[0])) {
                        return None;
                    }
                    Item::all(format, &node.body, level, index)
                }
            };
            for item in items {
                let (first, end, birth) = match &item {
                    Item::Run { first, len, slot, .. } => (*first, first + len, slot.birth),
                    Item::Node(place) => {
                        let len = span(place.level + 1);
                        (place.index * len, (place.index + 1) * len, place.ptr.birth)
                    }
                };
                if end <= self.from || birth <= self.newer && self.newer > 0 {
                    continue;
                }
                if self.bytes >= self.enough && first > self.from {
                    return Some(first);
                }
                let left = match item {
                    Item::Run { len, slot, room, .. } => {
                        if slot.at != 0 {
                            self.run((first, len), (slot, room), subject).await;
                        }
                        None
                    }
                    Item::Node(Place { ptr, level, index, .. }) => {
                        self.below_ptr((ptr, level, index), subject).await
                    }
                };
                if left.is_some() {
                    return left;
                }
            }
            None
        })
    }

    /// Blocks that are in a row in the pool, or in a pack.
    async fn run(
        &mut self,
        (first, len): (u64, u64),
        (slot, room): (Slot, Range<u64>),
        subject: &Subject<'_>,
    ) {
        let what = &subject.name;
        if (first + len) * BLOCK > subject.entry.size {
            self.problem(format!("{what} has a block behind its end: {}", first + len - 1));
        }
        if room.end > self.pool.space.label().extents * EXTENT {
            return self.problem(format!("{what} has blocks outside the pool, from {} on", slot.at));
        }
        if let Some(claims) = &mut self.claims {
            claims.data(first, (slot, room), &mut self.said);
        }
        if let Some(pack) = slot.pack {
            return self.packed(first, (slot, pack), subject).await;
        }
        if !subject.entry.checksums {
            return;
        }
        for ix in 0..len {
            let slot = Slot { at: slot.at + ix, ..slot };
            let (begin, row) = &self.row;
            let joins = *begin + row.len() as u64 == first + ix
                && row.last().is_some_and(|last| last.at + 1 == slot.at)
                && row.len() < PIECE;
            if !joins {
                self.compare(subject).await;
                self.row.0 = first + ix;
            }
            self.row.1.push(slot);
            self.bytes += BLOCK;
        }
    }

    /// A block that is in a pack, which has a checksum in any case.
    async fn packed(&mut self, block: u64, (slot, pack): (Slot, Pack), subject: &Subject<'_>) {
        if self.pack.as_ref().is_none_or(|(at, _)| *at != slot.at) {
            let bytes = u64::from(pack.blocks) * BLOCK;
            let found = self.below.read(slot.at * BLOCK, bytes).await;
            self.pack = Some((slot.at, found.and_then(|found| pack.open(&found)).ok()));
            self.bytes += bytes;
        }
        let at = ((block - unit(block).start) * BLOCK) as usize;
        let contents = self.pack.as_ref().and_then(|(_, contents)| contents.as_ref());
        let found = contents.map(|contents| contents.slice(at..at + BLOCK as usize));
        let is = |data: Data| !subject.entry.checksums || crc_of(&data) == slot.crc;
        if !found.is_some_and(is) {
            let told = subject.told(block, 1);
            self.problem(format!("{told} are damaged"));
        }
    }

    /// Compares data with its checksums.
    async fn compare(&mut self, subject: &Subject<'_>) {
        let (first, row) = std::mem::take(&mut self.row);
        let Some(at) = row.first().map(|slot| slot.at * BLOCK) else { return };
        let read = self.below.read(at, row.len() as u64 * BLOCK).await;
        for (ix, slot) in row.iter().enumerate() {
            let told = subject.told(first + ix as u64, 1);
            let place = ix * BLOCK as usize;
            let found = match &read {
                Ok(data) => Ok(data.slice(place..place + BLOCK as usize)),
                // One block may be why all of them could not be read.
                Err(_) => self.below.read(slot.at * BLOCK, BLOCK).await,
            };
            match found {
                Ok(data) if crc_of(&data) == slot.crc => {}
                Ok(_) => self.problem(format!("{told} are damaged")),
                Err(error) => self.problem(format!("{told} cannot be read: {error}")),
            }
        }
    }
}

impl Subject<'_> {
    /// Which bytes of it those blocks are.
    fn told(&self, first: u64, len: u64) -> String {
        let end = ((first + len) * BLOCK).min(self.entry.size);
        let at = first * BLOCK;
        format!("{}: the {} bytes at {at}", self.name, end.saturating_sub(at))
    }
}
