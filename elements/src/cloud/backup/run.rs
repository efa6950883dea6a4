//! One at a time makes a backup or deletes points of it: docs/formats/bucket.md, "Runs".

use super::super::claims::has_died;
use super::super::format::Claim;
use super::super::key;
use super::super::store::Bucket;
use crate::calendar::{clock, seconds};
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};

/// The right to change a backup, until somebody takes it.
pub(super) struct Run<'a> {
    backup: &'a Bucket,
    pub(super) number: u64,
}

impl<'a> Run<'a> {
    /// # Errors
    /// [`Kind::Busy`] if somebody is at it, unless `take` says that he is dead. One who died on this machine is noticed.
    pub(super) async fn begin(backup: &'a Bucket, claim: Claim, take: bool) -> Result<Run<'a>> {
        let listed = backup.list(key::RUNS, "", 1000).await?;
        let before = listed.first().and_then(|listed| key::ran(&listed.key)).map_or(0, |(number, _)| number);
        let is_over = listed.iter().any(|listed| listed.key == key::over(before));
        if before > 0 && !is_over && !take {
            may_follow(backup, before, &claim).await?;
        }
        let number = before + 1;
        let claim = Claim { epoch: number, time: seconds(), ..claim };
        let claim = serde_json::to_vec(&claim).map_err(|_| Error::internal("a claim cannot be written"))?;
        if !backup.put_if_absent(&key::run(number), Data::copy_of(&claim)).await? {
            return Err(Error::new(Kind::Busy, "somebody else has just begun to work on the backup"));
        }
        // Numbers are never used again, so it does not matter when these go.
        backup.delete_many(listed.into_iter().map(|listed| listed.key)).await?;
        Ok(Run { backup, number })
    }

    /// # Errors
    /// Somebody has taken it.
    pub(super) async fn is_ours(&self) -> Result<()> {
        let listed = self.backup.list(key::RUNS, "", 1).await?;
        match listed.first().and_then(|listed| key::ran(&listed.key)) {
            Some((number, _)) if number == self.number => Ok(()),
            _ => Err(Error::new(Kind::Busy, "somebody else has taken over the work on the backup")),
        }
    }

    pub(super) async fn end(self) -> Result<()> {
        self.backup.put_if_absent(&key::over(self.number), Data::empty()).await.map(|_| ())
    }
}

/// # Errors
/// The run before lives, as far as can be known.
async fn may_follow(backup: &Bucket, before: u64, claim: &Claim) -> Result<()> {
    let Some(bytes) = backup.get_whole(&key::run(before), 1 << 16).await? else { return Ok(()) };
    let owner: Claim = serde_json::from_slice(&bytes.to_vec()).unwrap_or_default();
    // A process makes one backup at a time.
    if has_died(&owner, claim) {
        return Ok(());
    }
    let message = format!(
        "the process {} on {} has been at work on it since {}: if that one is dead, say so with --take",
        owner.process,
        owner.host,
        clock(owner.time)
    );
    Err(Error::new(Kind::Busy, message))
}
