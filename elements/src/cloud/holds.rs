//! Caches that may have changes which the bucket has not: docs/formats/bucket.md, "Holds".

use super::key;
use super::store::{Bucket, Listed};
use crate::calendar::{clock, seconds};
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// `hold/<cache>.<version>`: that cache may have changes that only it has. No key is used again, so what is put or deleted late is
/// what nobody counts on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Hold {
    /// Where the cache is, for people.
    pub(crate) place: String,
    /// Seconds since 1970.
    pub(crate) time: u64,
    #[serde(skip)]
    pub(crate) cache: u64,
    #[serde(skip)]
    pub(crate) key: String,
}

/// Says so of a cache, durably.
pub(crate) async fn put(bucket: &Bucket, key: &str, place: String) -> Result<()> {
    let hold = Hold { place, time: seconds(), ..Hold::default() };
    let text = serde_json::to_vec(&hold).map_err(|_| Error::internal("a hold cannot be written"))?;
    bucket.put(key, Data::copy_of(&text)).await
}

/// All that there are. One that says nothing that makes sense is one, too.
pub(crate) async fn all(bucket: &Bucket) -> Result<Vec<Hold>> {
    let (mut holds, mut pages) = (Vec::new(), bucket.pages(key::HOLDS));
    while let Some(listed) = pages.next().await? {
        for Listed { key, .. } in listed {
            let Some((cache, _)) = key::held(&key) else { continue };
            // It may have gone since.
            if let Some(bytes) = bucket.get_whole(&key, 1 << 16).await? {
                let found: Hold = serde_json::from_slice(&bytes.to_vec()).unwrap_or_default();
                holds.push(Hold { cache, key, ..found });
            }
        }
    }
    Ok(holds)
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
