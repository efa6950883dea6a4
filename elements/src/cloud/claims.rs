//! Who has opened a volume, or works on a backup, and whether he still lives.

use super::format::{Checkpoint, Claim, version};
use super::key;
use super::store::Bucket;
use crate::calendar::{clock, seconds};
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Who this process is, for others.
pub(crate) fn claim() -> Claim {
    let host = read("/proc/sys/kernel/hostname").unwrap_or_default();
    let machine = read("/etc/machine-id").filter(|id| !id.is_empty()).unwrap_or_else(|| host.clone());
    let process = std::process::id();
    Claim { host, machine, process, born: born(process).unwrap_or_default(), ..Claim::default() }
}

/// What a process has that none with the same number has before or after it: the boot, and ticks since then. None if
/// there is no such process, as far as this one can see.
fn born(process: u32) -> Option<String> {
    let stat = read(&format!("/proc/{process}/stat"))?;
    // The name of the program, in parentheses, may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // One that has died stays until its parent has noticed.
    let _lives = fields.next().filter(|state| !["Z", "X", "x"].contains(state))?;
    let ticks = fields.nth(18)?;
    Some(format!("{} {ticks}", read("/proc/sys/kernel/random/boot_id")?))
}

/// True if it is known that whoever has made a claim has died: on this machine.
pub(crate) fn has_died(owner: &Claim, me: &Claim) -> bool {
    let lives = !owner.born.is_empty() && born(owner.process).as_ref() == Some(&owner.born);
    // What this very process has claimed before, it has given up.
    owner.machine == me.machine && (!lives || owner.process == me.process)
}

/// The newest claim, if there is any.
pub(crate) async fn last_claim(bucket: &Bucket) -> Result<Option<Claim>> {
    match bucket.list(key::CLAIMS, "", 1).await?.first() {
        Some(listed) => read_claim(bucket, &listed.key).await.map(Some),
        None => Ok(None),
    }
}

async fn read_claim(bucket: &Bucket, key: &str) -> Result<Claim> {
    let damaged = || Error::new(Kind::Io, "the claim is damaged").with_path(key);
    let epoch = key::claimed(key).ok_or_else(damaged)?;
    let bytes = bucket.get_whole(key, 1 << 16).await?.ok_or_else(damaged)?;
    let claim: Claim = serde_json::from_slice(&bytes.to_vec()).map_err(|_| damaged())?;
    version(epoch, 0).and_then(|_| if claim.epoch == epoch { Ok(claim) } else { Err(damaged()) })
}

/// What is said of a volume whose newest claims somebody has deleted: a rule of the bucket, perhaps.
pub(super) const LOST: &str = "claims of the volume have been deleted, so that nobody knows who has it open: if nobody has, say so with `mason bucket take`";

/// # Errors
/// Another host has it open, as far as is known, and nobody has said that it is dead.
pub(super) fn may_be_taken(
    base: Option<&Checkpoint>,
    last: Option<&Claim>,
    me: &Claim,
    take: bool,
) -> Result<()> {
    let newest = last.map_or(0, |last| last.epoch);
    if base.is_some_and(|base| base.epoch > newest) && !take {
        return Err(Error::new(Kind::Busy, LOST));
    }
    let Some(last) = last else { return Ok(()) };
    let closed = base.is_some_and(|base| base.closed && base.epoch == last.epoch);
    if closed || take || has_died(last, me) {
        return Ok(());
    }
    let since = clock(last.time);
    let message = match last.machine == me.machine {
        true => format!(
            "the process {} of this host has had it open since {since}: it is to let go first",
            last.process
        ),
        false => format!(
            "the host {} has had it open since {since} (process {}): if that host is dead, say so with `mason bucket take`",
            last.host, last.process
        ),
    };
    Err(Error::new(Kind::Busy, message))
}

/// Claims the next epoch.
pub(super) async fn next(bucket: &Bucket, last: u64, who: &Claim) -> Result<u64> {
    for epoch in last + 1.. {
        version(epoch, 0)?;
        let claim = Claim { epoch, time: seconds(), ..who.clone() };
        let body = serde_json::to_vec(&claim).map_err(|_| Error::internal("a claim cannot be written"))?;
        if bucket.put_if_absent(&key::claim(epoch), Data::copy_of(&body)).await? {
            return Ok(epoch);
        }
    }
    Err(Error::internal("there is no epoch left"))
}

/// Somebody else has opened the volume.
pub(crate) async fn taken_over(bucket: &Bucket) -> Error {
    let who = match last_claim(bucket).await {
        Ok(Some(claim)) => format!("process {} on {}", claim.process, claim.host),
        _ => "somebody else".to_owned(),
    };
    Error::new(Kind::Busy, format!("{who} has opened the volume and owns it now: this disk has ended"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_number_and_when_it_was_born() {
        let me = claim();
        assert!(has_died(&me, &me));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = child.id();
        let other = Claim { process, born: born(process).unwrap(), ..me.clone() };
        assert!(!has_died(&other, &me));
        // Another one that had its number, or has it on another machine.
        assert!(has_died(&Claim { born: "before".to_owned(), ..other.clone() }, &me));
        assert!(!has_died(&Claim { machine: "elsewhere".to_owned(), ..other.clone() }, &me));
        child.kill().unwrap();
        // Nobody has waited for it yet.
        while !has_died(&other, &me) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(has_died(&other, &me));
    }
}
