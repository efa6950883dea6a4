//! How the room of a volume has come about: from each of its snapshots to the next.

use super::account::{Account, Held};
use super::below::Below;
use super::format::{Entry, EntryKind, Ptr};
use super::pool::{Core, Pool};
use blockmason::{Error, Kind, Result};

/// A snapshot of a volume, or the volume as it is now.
pub(super) struct Point {
    /// None: now.
    pub(super) snapshot: Option<Entry>,
    /// What is freed if it alone is deleted.
    pub(super) account: Account,
    /// Blocks that were written or discarded since the point before; of the first one those that it has.
    pub(super) changed: u64,
}

/// What is looked at for one of them, as it was at one instant.
struct Look {
    entry: Entry,
    number: u32,
    tree: Held,
    /// The birth of the point before, or of the volume's origin.
    before: u64,
}

impl Core {
    /// Snapshots of a volume, the oldest first, and the volume itself.
    fn line(&self, volume: u32) -> Vec<Look> {
        let of = |entry: &Entry| matches!(entry.kind, EntryKind::Snapshot { volume: of, .. } if of == volume);
        let mut all: Vec<(u64, u32)> = self
            .catalog
            .iter()
            .filter(|(_, entry)| of(entry) && !entry.deleting)
            .filter_map(|(number, _)| Some((self.birth(*number)?, *number)))
            .collect();
        all.sort_unstable();
        let (_, origin) = self.ancestors(volume);
        let mut before = origin;
        let mut line = Vec::new();
        for (birth, number) in all.into_iter().chain([(0, volume)]) {
            let Some(entry) = self.catalog.get(&number) else { continue };
            line.push(Look { entry: entry.clone(), number, tree: Held::new(entry, &self.era), before });
            before = birth;
        }
        line
    }
}

impl Pool {
    /// What a volume and its snapshots take. Reads what has changed in them, and not more.
    ///
    /// # Errors
    /// A node cannot be read.
    pub(super) async fn history(&self, volume: u32, below: Below<'_>) -> Result<Vec<Point>> {
        self.checkpoint(below).await?;
        let line = self.core().line(volume);
        if line.is_empty() {
            return Err(Error::new(Kind::Unavailable, "it has just been deleted"));
        }
        let mut points = Vec::new();
        for Look { entry, number, tree, before } in line {
            let mapped = entry.mapped;
            // All of the first one is new: nobody has to read that.
            let counted = if before == 0 { None } else { Some(self.younger(&tree, before, below).await?) };
            let changed = counted.map_or(mapped, |counted| counted.changed);
            let is_snapshot = number != volume;
            let freed = match (is_snapshot, counted) {
                (true, _) => self.dead(number, dead_of(&entry), before, below).await?,
                (false, Some(counted)) => counted.room + counted.nodes,
                (false, None) => self.account(volume, below).await?.freed,
            };
            let shared = match counted.filter(|_| !is_snapshot) {
                Some(counted) => mapped.saturating_sub(counted.data),
                None => mapped.saturating_sub(freed),
            };
            let account = Account { mapped, shared, freed, ..Account::default() };
            points.push(Point { snapshot: is_snapshot.then_some(entry), account, changed });
        }
        Ok(points)
    }
}

fn dead_of(entry: &Entry) -> Ptr {
    match entry.kind {
        EntryKind::Snapshot { dead, .. } => dead,
        EntryKind::Volume { .. } => Ptr::default(),
    }
}
