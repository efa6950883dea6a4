//! Caches that may have changes which the bucket has not: docs/formats/bucket.md, "Holds".

use super::calendar::{clock, seconds};
use super::key;
use super::store::Bucket;
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// `hold/<cache>`: that cache may have changes that only it has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hold {
    /// Its id, 16 hexadecimal digits.
    pub(crate) cache: String,
    /// Where it is, for people.
    pub(crate) place: String,
    /// Seconds since 1970.
    pub(crate) time: u64,
}

/// Says so of a cache, durably.
pub(crate) async fn hold(bucket: &Bucket, cache: &str, place: &str) -> Result<()> {
    let key = key::hold(cache).ok_or_else(|| Error::invalid("that is no id of a cache"))?;
    let hold = Hold { cache: cache.to_owned(), place: place.to_owned(), time: seconds() };
    let text = serde_json::to_vec(&hold).map_err(|_| Error::internal("a hold cannot be written"))?;
    bucket.put(&key, Data::copy_of(&text)).await
}

/// It has none any more.
pub(crate) async fn release(bucket: &Bucket, cache: &str) -> Result<()> {
    bucket.delete_many(key::hold(cache)).await
}

/// All that there are. One that says nothing that makes sense is one, too.
pub(crate) async fn all(bucket: &Bucket) -> Result<Vec<Hold>> {
    let (mut holds, mut pages) = (Vec::new(), bucket.pages(key::HOLDS));
    while let Some(listed) = pages.next().await? {
        for cache in listed.iter().filter_map(|listed| key::held(&listed.key)) {
            let bytes = key::hold(cache).map(|key| async move { bucket.get_whole(&key, 1 << 16).await });
            let bytes = match bytes {
                Some(bytes) => bytes.await?,
                None => None,
            };
            // It has gone since.
            let Some(bytes) = bytes else { continue };
            let found: Hold = serde_json::from_slice(&bytes.to_vec()).unwrap_or_default();
            holds.push(Hold { cache: cache.to_owned(), ..found });
        }
    }
    Ok(holds)
}

/// Nothing holds a volume any more: what those caches have is given up.
pub(crate) async fn forget(bucket: &Bucket, holds: &[Hold]) -> Result<()> {
    bucket.delete_many(holds.iter().filter_map(|hold| key::hold(&hold.cache))).await
}

/// Why a volume is not served without that cache.
pub(crate) fn refusal(hold: &Hold) -> Error {
    let message = format!(
        "the cache {} has been written since {}, and may have changes that are not in the bucket: serve the disk with it, and let it drain; if it is lost, say so with `mason bucket take`",
        hold.place,
        clock(hold.time)
    );
    Error::new(Kind::Denied, message)
}
