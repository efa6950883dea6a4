//! Making a volume larger that this process alone has open: docs/formats/bucket.md, "Growing".

use super::key;
use super::volume::Volume;
use blockmason::data::Data;
use blockmason::{Error, Kind, Result};
use std::sync::Arc;

/// Gives a volume another size, durably; what is new reads as zeros. Nobody may use the volume meanwhile.
///
/// # Errors
/// It is smaller, or larger than a volume can be; the store does not answer. The size is the one before, or, if the
/// answer was lost, the new one.
pub(super) async fn grow(volume: &Arc<Volume>, size: u64) -> Result<()> {
    let before = volume.state().size;
    if size < before {
        return Err(Error::invalid(format!(
            "it has {before} bytes: a disk in a bucket cannot become smaller"
        )));
    }
    volume.description.sized(size).check()?;
    // Nothing waits in memory for the last block, and its object is the one that stays.
    volume.settle().await?;
    let (last, old, version) = {
        let mut state = volume.state();
        let last = before.saturating_sub(1) / volume.block;
        (last, state.map.get(last), state.version(volume.epoch)?)
    };
    let (is, will_be) = (volume.range_of(last, before), volume.range_of(last, size));
    let is_short = old != 0 && is.end < will_be.end;
    if is_short {
        let key = key::block(last, old);
        let found = volume.bucket.get_range(&key, 0..is.end - is.start).await?;
        let found = found.ok_or_else(|| Error::new(Kind::Io, "it is missing").with_path(&key))?;
        let longer = Data::concat([found, Data::zeros((will_be.end - is.end) as usize)]);
        volume.bucket.put(&key::block(last, version), longer).await?;
    }
    {
        // In one checkpoint: a block is as long as the size says.
        let mut state = volume.state();
        state.size = size;
        state.map.grow(size.div_ceil(volume.block));
        if is_short {
            state.map.set(last, version);
            state.doom(last, old);
        }
    }
    volume.settle().await
}
