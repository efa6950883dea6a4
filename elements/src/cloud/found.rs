//! A volume, or a point of a backup of one, as it is found in a bucket by somebody who does not own it.

use super::backup::points::{newest, points};
use super::format::{
    Backup, Checkpoint, Commit, Description, END_LEN, Entry, Id, LARGEST, Link, Point, SPANNED, decode_part,
};
use super::keeper::keys_of;
use super::key;
use super::map::Map;
use super::open;
use super::store::{Bucket, Listed};
use blockmason::{Error, Kind, Result};
use std::collections::{BTreeMap, BTreeSet};

/// What a checkpoint says, and the commits after it.
pub(super) struct Found {
    pub(super) description: Description,
    /// It is of a backup of that volume.
    pub(super) is_backup: bool,
    pub(super) id: Id,
    pub(super) size: u64,
    pub(super) last: Option<Checkpoint>,
    pub(super) map: Map,
    pub(super) problems: Vec<String>,
    /// The last commit of the checkpoint's epoch that counts; None if all that are there do.
    through: Option<u64>,
}

/// Where the contents of a disk are, besides in its checkpoint.
#[derive(Default)]
pub(super) struct Needed {
    /// Blocks, with their lengths, and parts.
    pub(super) plain: BTreeMap<String, Option<u64>>,
    /// Commits with their lengths, in their order.
    pub(super) commits: Vec<(String, u64)>,
    /// The last commit of the checkpoint's epoch.
    pub(super) commit: u64,
}

impl Needed {
    pub(super) fn keys(&self) -> impl Iterator<Item = &String> {
        self.plain.keys().chain(self.commits.iter().map(|(key, _)| key))
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
    /// A volume as it is now, or the newest point of a backup.
    pub(super) async fn look(bucket: &Bucket) -> Result<Found> {
        let (description, is_backup) = describe(bucket).await?;
        if !is_backup {
            let last = open::last_checkpoint(bucket, description.id()?).await?;
            let lost = open::begun(bucket, last.as_ref()).await.err();
            let mut found = Found::of(bucket, description, false, last, None).await?;
            found.problems.extend(lost.map(|error| error.to_string()));
            return Ok(found);
        }
        match newest(bucket).await? {
            Some(point) => Found::at(bucket, &description, &point).await,
            None => Found::of(bucket, description, true, None, None).await,
        }
    }

    /// A point of a backup.
    pub(super) async fn at(bucket: &Bucket, description: &Description, point: &Point) -> Result<Found> {
        let last = open::checkpoint(bucket, description.id()?, point.epoch, point.n).await?;
        let is_there = last.is_some();
        let done = last.as_ref().map_or(0, |last| last.done);
        if is_there && point.commit.saturating_sub(done) > SPANNED {
            return Err(Error::new(Kind::Io, "the point is damaged").with_path(key::point(point.number)));
        }
        let through = Some(point.commit);
        let mut found = Found::of(bucket, description.clone(), true, last, through).await?;
        if !is_there {
            found.size = point.size;
            found.problems.push(format!("{}: is missing", key::map(point.epoch, point.n)));
        } else if found.size != point.size {
            found
                .problems
                .push(format!("{}: it says another size than its checkpoint", key::point(point.number)));
        }
        Ok(found)
    }

    async fn of(
        bucket: &Bucket,
        description: Description,
        is_backup: bool,
        last: Option<Checkpoint>,
        through: Option<u64>,
    ) -> Result<Found> {
        let id = description.id()?;
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
        Ok(Found { description, is_backup, id, size, last, map, problems, through })
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(self.description.block)
    }

    /// Bytes of a block: the last one may be short.
    fn len_of(&self, block: u64) -> u64 {
        let start = block * self.description.block;
        (start + self.description.block).min(self.size).saturating_sub(start)
    }

    /// Objects that the map has, and their bytes.
    pub(super) fn stored(&self) -> (u64, u64) {
        let (present, block) = (self.map.objects(), self.description.block);
        let last = self.blocks() - 1;
        let short = if self.map.get(last) != 0 { block - self.len_of(last) } else { 0 };
        (present, present * block - short)
    }

    /// Every key that the checkpoint and the commits after it lead to.
    pub(super) async fn needed(&mut self, bucket: &Bucket) -> Result<Needed> {
        let mut needed = Needed::default();
        for (block, version) in self.map.versions(0..self.blocks()) {
            needed.plain.insert(key::block(block, version), Some(self.len_of(block)));
        }
        let Some(last) = self.last.clone() else { return Ok(needed) };
        needed.plain.extend(last.parts.iter().map(|(part, version)| (key::part(*part, *version), None)));
        let replays = last.replays.iter().flat_map(|span| (span.first..=span.last).map(|n| (span.epoch, n)));
        for (epoch, n) in replays {
            if self.commit(bucket, epoch, n, &mut needed).await?.is_none() {
                self.problems.push(format!("{}: is missing, and is not in the map", key::wal(epoch, n)));
            }
        }
        needed.commit = last.done;
        for n in last.done + 1..=self.through.unwrap_or(u64::MAX) {
            match self.commit(bucket, last.epoch, n, &mut needed).await? {
                Some(false) => needed.commit = n,
                _ if self.through.is_some() => {
                    self.problems.push(format!("{}: is missing", key::wal(last.epoch, n)));
                }
                None => match open::ends(bucket, last.epoch, n).await {
                    Ok(_) => break,
                    Err(error) => {
                        self.problems.push(error.to_string());
                        break;
                    }
                },
                Some(_) => break,
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
                        needed.plain.insert(key::block(block, version), Some(self.len_of(block)));
                    }
                }
            }
            Err(error) => self.problems.push(format!("{key}: {error}: the volume cannot be opened")),
        }
        needed.commits.push((key, bytes.len() as u64));
        Ok(Some(false))
    }
}

/// Why an object is there.
#[derive(Clone, Copy, Default)]
struct Reason {
    /// Its length, where that is known.
    len: Option<u64>,
    /// Nothing is lost if it has gone.
    may_be_gone: bool,
    /// How many lead to it.
    leads: u32,
}

/// All that is at a place for a reason: because of the volume as it is now, or of any point of a backup.
#[derive(Default)]
pub(super) struct Reasons {
    known: BTreeMap<String, Reason>,
    pub(super) problems: Vec<String>,
}

impl Reasons {
    pub(super) async fn of(bucket: &Bucket) -> Result<Reasons> {
        let (description, is_backup) = describe(bucket).await?;
        let mut reasons = Reasons::default();
        if is_backup {
            for point in points(bucket).await? {
                reasons.point(bucket, &description, &point).await?;
            }
            reasons.lead_to(key::BACKUP.to_owned(), None);
            return Ok(reasons);
        }
        let mut found = Found::look(bucket).await?;
        reasons.found(bucket, &mut found).await?;
        reasons.lead_to(key::VOLUME.to_owned(), None);
        for key in found.last.iter().flat_map(|last| keys_of(&last.gone)) {
            // Deleted by whoever opens the volume next.
            reasons.known.entry(key).or_default().may_be_gone = true;
        }
        Ok(reasons)
    }

    /// A point of a backup, and what it leads to.
    pub(super) async fn point(&mut self, bucket: &Bucket, of: &Description, point: &Point) -> Result<()> {
        self.contents(bucket, of, point).await?;
        self.lead_to(key::point(point.number), None);
        Ok(())
    }

    /// What a point of a backup leads to.
    pub(super) async fn contents(&mut self, bucket: &Bucket, of: &Description, point: &Point) -> Result<()> {
        let mut found = Found::at(bucket, of, point).await?;
        let before = self.problems.len();
        self.found(bucket, &mut found).await?;
        for problem in &mut self.problems[before..] {
            *problem = format!("point {}: {problem}", point.number);
        }
        Ok(())
    }

    async fn found(&mut self, bucket: &Bucket, found: &mut Found) -> Result<()> {
        let needed = found.needed(bucket).await?;
        self.problems.append(&mut found.problems);
        needed.plain.into_iter().for_each(|(key, len)| self.lead_to(key, len));
        needed.commits.into_iter().for_each(|(key, len)| self.lead_to(key, Some(len)));
        if let Some(last) = &found.last {
            self.lead_to(key::map(last.epoch, last.n), None);
        }
        Ok(())
    }

    fn lead_to(&mut self, key: String, len: Option<u64>) {
        let reason = self.known.entry(key).or_default();
        reason.len = len;
        reason.leads += 1;
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.known.contains_key(key)
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &String> {
        self.known.keys()
    }

    /// Bytes of those blocks and commits.
    pub(super) fn bytes(&self, which: impl Fn(&String) -> bool) -> u64 {
        let lens = self.known.iter().filter(|(key, _)| which(key));
        lens.filter_map(|(_, why)| why.len).sum()
    }

    /// True if nothing else leads there.
    pub(super) fn is_alone(&self, key: &String) -> bool {
        self.known.get(key).is_some_and(|why| why.leads == 1)
    }
}

/// What a listing has shown.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) objects: u64,
    pub(super) bytes: u64,
    /// What nothing leads to, with its bytes.
    pub(super) stray: Vec<(String, u64)>,
    pub(super) problems: Vec<String>,
}

impl Seen {
    /// Lists every object.
    pub(super) async fn list(bucket: &Bucket, reasons: &Reasons) -> Result<Seen> {
        let mut seen = Seen::default();
        let (mut there, mut pages) = (BTreeSet::new(), bucket.pages(""));
        while let Some(listed) = pages.next().await? {
            for listed in &listed {
                seen.one(reasons, listed);
                if reasons.has(&listed.key) {
                    there.insert(listed.key.clone());
                }
            }
        }
        let missing = reasons.known.iter().filter(|(key, why)| !why.may_be_gone && !there.contains(*key));
        seen.problems.extend(missing.map(|(key, _)| format!("{key}: is missing: what it held is lost")));
        Ok(seen)
    }

    fn one(&mut self, reasons: &Reasons, listed: &Listed) {
        let key = &listed.key;
        // Other volumes may lie below, and what is no volume's.
        if !key::is_ours(key) {
            return;
        }
        self.objects += 1;
        self.bytes += listed.len;
        match reasons.known.get(key) {
            Some(Reason { len: Some(len), .. }) if *len != listed.len => {
                self.problems.push(format!("{key}: has {} bytes of {len}: it is damaged", listed.len));
            }
            Some(_) => {}
            None => {
                let is_end = (key::mapped(key).or(key::logged(key))).is_some() && listed.len <= END_LEN;
                if !is_end
                    && key::claimed(key).is_none()
                    && key::ran(key).is_none()
                    && key::held(key).is_none()
                {
                    self.stray.push((key.clone(), listed.len));
                }
            }
        }
    }
}
