//! A volume, or a backup of one, as it is found in a bucket by somebody who does not own it.

use super::format::{Backup, Checkpoint, Commit, Description, Entry, Id, LARGEST, Link, decode_part, key};
use super::keeper::keys_of;
use super::map::Map;
use super::open;
use super::store::{Bucket, Listed};
use blockmason::{Error, Kind, Result};
use std::collections::BTreeSet;

/// What its newest checkpoint says.
pub(super) struct Found {
    pub(super) description: Description,
    /// It is a backup of that volume.
    pub(super) is_backup: bool,
    pub(super) id: Id,
    pub(super) size: u64,
    pub(super) last: Option<Checkpoint>,
    pub(super) map: Map,
    pub(super) problems: Vec<String>,
}

/// Where the contents of a disk are, besides in its newest checkpoint.
#[derive(Default)]
pub(super) struct Needed {
    /// Blocks and parts.
    pub(super) plain: BTreeSet<String>,
    /// Commits, in their order.
    pub(super) commits: Vec<String>,
}

impl Needed {
    pub(super) fn keys(&self) -> impl Iterator<Item = &String> {
        self.plain.iter().chain(&self.commits)
    }
}

/// What is at a place: the description of a volume, or that of the volume that a backup is of, and which of the two.
///
/// # Errors
/// There is neither.
pub(super) async fn describe(bucket: &Bucket) -> Result<(Description, bool)> {
    match backup_of(bucket).await? {
        Some(description) => Ok((description, true)),
        None => open::describe(bucket).await.map(|description| (description, false)),
    }
}

/// The volume that a backup is of; None where there is no backup.
pub(super) async fn backup_of(bucket: &Bucket) -> Result<Option<Description>> {
    let found = bucket.get_whole(key::BACKUP, 1 << 16).await?;
    found.map(|bytes| Backup::decode(&bytes.to_vec())).transpose()
}

impl Found {
    pub(super) async fn look(bucket: &Bucket) -> Result<Found> {
        let (description, is_backup) = describe(bucket).await?;
        let id = description.id()?;
        let last = open::last_checkpoint(bucket, id).await?;
        let size = last.as_ref().map_or(description.size, |last| last.size);
        let mut map = Map::new(size.div_ceil(description.block));
        let mut problems = Vec::new();
        for (part, version) in last.iter().flat_map(|last| last.parts.clone()) {
            let key = key::part(part, version);
            let found = match bucket.get_whole(&key, 1 << 20).await? {
                Some(_) if part >= map.parts() => Err(Error::new(Kind::Io, "is of blocks beyond the end")),
                Some(bytes) => decode_part(&bytes.to_vec(), id, part),
                None => Err(Error::new(Kind::Io, "is missing")),
            };
            match found {
                Ok(versions) => map.load(part, version, versions),
                Err(error) => problems.push(format!("{key}: {error}: reads of its 8192 blocks fail")),
            }
        }
        Ok(Found { description, is_backup, id, size, last, map, problems })
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(self.description.block)
    }

    /// Objects that the map has, and their bytes.
    pub(super) fn stored(&self) -> (u64, u64) {
        let (present, block) = (self.map.present(0..self.blocks()), self.description.block);
        let last = self.blocks() - 1;
        let short = if self.map.get(last) != 0 { (last + 1) * block - self.size } else { 0 };
        (present, present * block - short)
    }

    /// Every key that the newest checkpoint and the commits after it lead to.
    pub(super) async fn needed(&mut self, bucket: &Bucket) -> Result<Needed> {
        let mut needed = Needed::default();
        for block in (0..self.blocks()).filter(|block| self.map.get(*block) != 0) {
            needed.plain.insert(key::block(block, self.map.get(block)));
        }
        let Some(last) = self.last.clone() else { return Ok(needed) };
        needed.plain.extend(last.parts.iter().map(|(part, version)| key::part(*part, *version)));
        let replays = last.replays.iter().flat_map(|span| (span.first..=span.last).map(|n| (span.epoch, n)));
        for (epoch, n) in replays {
            if self.commit(bucket, epoch, n, &mut needed).await?.is_none() {
                self.problems.push(format!("{}: is missing, and is not in the map", key::wal(epoch, n)));
            }
        }
        for n in last.done + 1.. {
            if self.commit(bucket, last.epoch, n, &mut needed).await? != Some(false) {
                break;
            }
        }
        Ok(needed)
    }

    /// Looks at a commit: None if there is none, else whether it is an end.
    async fn commit(
        &mut self,
        bucket: &Bucket,
        epoch: u64,
        n: u64,
        needed: &mut Needed,
    ) -> Result<Option<bool>> {
        let key = key::wal(epoch, n);
        let Some(bytes) = bucket.get_whole(&key, LARGEST).await? else { return Ok(None) };
        match Commit::decode(&bytes, self.id, self.size) {
            Ok(Link::End) => return Ok(Some(true)),
            Ok(Link::One(commit)) => {
                for entry in commit.entries {
                    if let Entry::Block { block, version } = entry {
                        needed.plain.insert(key::block(block, version));
                    }
                }
            }
            Err(error) => self.problems.push(format!("{key}: {error}: the volume cannot be opened")),
        }
        needed.commits.push(key);
        Ok(Some(false))
    }
}

/// What is no longer ends a chain, and is kept for ever.
const END_LEN: u64 = 44;

/// What a listing has shown.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) keys: BTreeSet<String>,
    pub(super) bytes: u64,
    /// What nothing leads to, with its bytes.
    pub(super) stray: Vec<(String, u64)>,
    pub(super) problems: Vec<String>,
}

impl Seen {
    /// Lists every object.
    pub(super) async fn list(bucket: &Bucket, found: &Found, needed: &Needed) -> Result<Seen> {
        let known = known(found, needed);
        let mut seen = Seen::default();
        let mut after = String::new();
        loop {
            let listed = bucket.list("", &after, 1000).await?;
            let Some(last) = listed.last() else { return Ok(seen) };
            after = last.key.clone();
            listed.iter().for_each(|listed| seen.one(found, &known, listed));
        }
    }

    fn one(&mut self, found: &Found, known: &BTreeSet<String>, listed: &Listed) {
        // Other volumes may lie below, and what is no volume's.
        if !key::is_ours(&listed.key) {
            return;
        }
        self.bytes += listed.len;
        self.keys.insert(listed.key.clone());
        let end = |key: &str| (key::mapped(key).or(key::logged(key))).is_some() && listed.len <= END_LEN;
        if !known.contains(&listed.key) {
            if key::claimed(&listed.key).is_none() && !end(&listed.key) {
                self.stray.push((listed.key.clone(), listed.len));
            }
        } else if let Some((block, version)) = key::blocked(&listed.key) {
            let start = block * found.description.block;
            let len = (start + found.description.block).min(found.size) - start;
            if found.map.get(block) == version && listed.len != len {
                self.problems
                    .push(format!("{}: has {} bytes of {len}: it is damaged", listed.key, listed.len));
            }
        }
    }

    /// What is needed and was not seen.
    pub(super) fn missing<'a>(&self, needed: &'a Needed) -> impl Iterator<Item = &'a String> {
        needed.keys().filter(|key| !self.keys.contains(*key))
    }
}

/// All that is there for a reason.
fn known(found: &Found, needed: &Needed) -> BTreeSet<String> {
    let root = if found.is_backup { key::BACKUP } else { key::VOLUME };
    let mut known: BTreeSet<String> = needed.keys().cloned().collect();
    known.insert(root.to_owned());
    if let Some(last) = &found.last {
        known.insert(key::map(last.epoch, last.n));
        // What is named as gone is deleted by whoever opens the volume next.
        known.extend(keys_of(&last.gone).filter(|_| !found.is_backup));
    }
    known
}
