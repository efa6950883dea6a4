//! Keys, below the prefix of a volume or a backup: docs/formats/bucket.md.

use super::format::unhex;

pub(crate) const VOLUME: &str = "volume";
pub(crate) const BACKUP: &str = "backup";
pub(crate) const RESTORING: &str = "restoring";
pub(crate) const CLAIMS: &str = "claim/";
pub(crate) const MAPS: &str = "map/";
pub(crate) const WALS: &str = "wal/";
pub(crate) const PARTS: &str = "part/";
pub(crate) const BLOCKS: &str = "b/";
pub(crate) const PROBES: &str = "probe/";
pub(crate) const RUNS: &str = "run/";
pub(crate) const POINTS: &str = "point/";
pub(crate) const HOLDS: &str = "hold/";

/// What keys begin with that have more than one part.
pub(crate) const FOLDERS: [&str; 9] = [CLAIMS, MAPS, WALS, PARTS, BLOCKS, PROBES, RUNS, POINTS, HOLDS];

/// What the key of a run has behind its number once it is over.
const OVER: &str = ".over";

fn newest_first(number: u64) -> u64 {
    u64::MAX - number
}

pub(crate) fn claim(epoch: u64) -> String {
    format!("{CLAIMS}{:016x}", newest_first(epoch))
}

pub(crate) fn map(epoch: u64, n: u64) -> String {
    format!("{MAPS}{:016x}-{:016x}", newest_first(epoch), newest_first(n))
}

pub(crate) fn part(part: u64, version: u64) -> String {
    format!("{PARTS}{part:016x}.{version:016x}")
}

pub(crate) fn wal(epoch: u64, n: u64) -> String {
    format!("{WALS}{epoch:016x}-{n:016x}")
}

pub(crate) fn block(block: u64, version: u64) -> String {
    format!("{BLOCKS}{:02x}/{block:016x}.{version:016x}", block & 0xff)
}

pub(crate) fn run(number: u64) -> String {
    format!("{RUNS}{:016x}", newest_first(number))
}

pub(crate) fn over(number: u64) -> String {
    format!("{}{OVER}", run(number))
}

pub(crate) fn point(number: u64) -> String {
    format!("{POINTS}{:016x}", newest_first(number))
}

pub(crate) fn hold(cache: u64, version: u64) -> String {
    format!("{HOLDS}{cache:016x}.{version:016x}")
}

/// The cache and the version of a hold's key.
pub(crate) fn held(key: &str) -> Option<(u64, u64)> {
    pair(key.strip_prefix(HOLDS)?, '.')
}

fn pair(text: &str, between: char) -> Option<(u64, u64)> {
    let (a, b) = text.split_once(between)?;
    let number = |text: &str| (text.len() == 16).then(|| u64::from_str_radix(text, 16).ok())?;
    Some((number(a)?, number(b)?))
}

/// A number that counts down.
fn single(text: &str) -> Option<u64> {
    let number = (text.len() == 16).then_some(text)?;
    u64::from_str_radix(number, 16).ok().map(newest_first)
}

/// The epoch of a claim's key.
pub(crate) fn claimed(key: &str) -> Option<u64> {
    single(key.strip_prefix(CLAIMS)?)
}

/// The number of a run's key, and whether it says that the run is over.
pub(crate) fn ran(key: &str) -> Option<(u64, bool)> {
    let text = key.strip_prefix(RUNS)?;
    match text.strip_suffix(OVER) {
        Some(text) => single(text).map(|number| (number, true)),
        None => single(text).map(|number| (number, false)),
    }
}

/// The number of a point's key.
pub(crate) fn pointed(key: &str) -> Option<u64> {
    single(key.strip_prefix(POINTS)?)
}

/// Epoch and number of a checkpoint's key.
pub(crate) fn mapped(key: &str) -> Option<(u64, u64)> {
    pair(key.strip_prefix(MAPS)?, '-').map(|(epoch, n)| (newest_first(epoch), newest_first(n)))
}

/// Epoch and number of a commit's key.
pub(crate) fn logged(key: &str) -> Option<(u64, u64)> {
    pair(key.strip_prefix(WALS)?, '-')
}

/// Number and version of a part's key.
pub(crate) fn parted(key: &str) -> Option<(u64, u64)> {
    pair(key.strip_prefix(PARTS)?, '.')
}

/// True if a volume may have a key like that.
pub(crate) fn is_ours(key: &str) -> bool {
    let probe = key.strip_prefix(PROBES).is_some_and(|id| unhex(id).is_some());
    [VOLUME, BACKUP, RESTORING].contains(&key)
        || probe
        || claimed(key).or(pointed(key)).is_some()
        || ran(key).is_some()
        || mapped(key).or(logged(key)).or(parted(key)).or(blocked(key)).is_some()
}

/// Block and version of a block's key.
pub(crate) fn blocked(key: &str) -> Option<(u64, u64)> {
    let (spread, rest) = key.strip_prefix(BLOCKS)?.split_once('/')?;
    pair(rest, '.').filter(|(block, _)| spread == format!("{:02x}", block & 0xff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_back_and_the_newest_comes_first() {
        assert!(claim(2) < claim(1));
        assert!(map(2, 1) < map(1, 9) && map(2, 2) < map(2, 1));
        assert!(point(2) < point(1) && run(2) < run(1));
        // Of one run the beginning comes first.
        assert!(run(2) < over(2) && over(2) < run(1));
        assert_eq!(claimed(&claim(77)), Some(77));
        assert_eq!(mapped(&map(5, 6)), Some((5, 6)));
        assert_eq!(logged(&wal(5, 6)), Some((5, 6)));
        assert_eq!(parted(&part(5, 6)), Some((5, 6)));
        assert_eq!(pointed(&point(5)), Some(5));
        assert_eq!((ran(&run(5)), ran(&over(5))), (Some((5, false)), Some((5, true))));
        assert_eq!(blocked(&block(0x1234, 6)), Some((0x1234, 6)));
        assert_eq!(blocked("b/00/0000000000001234.0000000000000006"), None);
        for key in [claim(1), map(1, 2), wal(1, 2), part(1, 2), point(1), run(1), over(1), block(1, 2)] {
            assert!(is_ours(&key) && !is_ours(&format!("{key}0")), "{key}");
        }
    }
}
