//! What is kept twice beside nodes: the label, the list of owners, the root, the space journal.

use super::below::Below;
use super::examine::{Said, outcome};
use super::format::{BLOCK, EXTENT, Label, Owners, Root, damaged};
use super::open::journal_part;
use super::pool::Pool;
use blockmason::{Data, Result};

/// Looks at both copies of everything of which there are two beside nodes, and writes anew what is damaged. A sentence for
/// each of those. The caller keeps checkpoints off.
///
/// # Errors
/// Neither copy of something can be read.
pub(super) async fn examine_copies(pool: &Pool, below: Below<'_>) -> Result<Said> {
    let mut said = examine_heads(pool, below).await?;
    let mut next = Some(0);
    while let Some(at) = next {
        let (found, left) = pool.space.blocks.examine(at, below).await?;
        found.into_iter().for_each(|what| said.say(what));
        next = left;
    }
    Ok(said)
}

/// The same without the table of extents.
pub(super) async fn examine_heads(pool: &Pool, below: Below<'_>) -> Result<Said> {
    let blocks = &pool.space.blocks;
    let _owners = blocks.naming.lock().await;
    let _label = blocks.granting.lock().await;
    let label = blocks.label();
    let mut said = Said::default();
    // Of a block store below those are its own.
    if !blocks.leased {
        examine_store(pool, &label, &mut said, below).await?;
    }
    // Of trees that take no changes it is not known what is on the device.
    if pool.broken().is_none() {
        let (root, journal) = {
            let core = pool.core();
            (core.root.clone(), core.journal.clone())
        };
        let is_root = |bytes: &[u8]| {
            Root::decode(bytes, &pool.id, root.owner).is_ok_and(|found| found.sequence == root.sequence)
        };
        let places = Root::places(root.sequence).map(|place| pool.root_extent * EXTENT + place);
        if !mend(pool, ("root", places), is_root, &mut said, below).await {
            said.say("both copies of the root are damaged: the next checkpoint writes another".to_owned());
        }
        for pair in journal.chunks_exact(2) {
            let is_part = |bytes: &[u8]| journal_part(bytes, &label, &root).is_some();
            let places = [pair[0], pair[1]];
            if !mend(pool, ("space journal", places), is_part, &mut said, below).await {
                said.say(format!("both copies of the space journal at block {} are damaged: the next checkpoint writes another", pair[0]));
            }
        }
    }
    Ok(said)
}

async fn examine_store(pool: &Pool, label: &Label, said: &mut Said, below: Below<'_>) -> Result<()> {
    for (place, found) in Label::PLACES.into_iter().zip(both(Label::PLACES, below).await) {
        if found.as_ref() == Some(&label.encode()) {
            continue;
        }
        let mended = write(place, label.encode(), below).await;
        // Whoever made the pool, or made it larger, may have died between the two.
        let is_behind = |bytes: Vec<u8>| bytes.iter().all(|byte| *byte == 0) || Label::decode(&bytes).is_ok();
        if !mended || !found.is_some_and(is_behind) {
            said.say(told(pool, "label", place, mended));
        }
    }
    let is_list = |bytes: &[u8]| Owners::decode(bytes, label).is_ok();
    if !mend(pool, ("list of owners", Owners::PLACES), is_list, said, below).await {
        return Err(damaged("both copies of the list of the pool's owners are damaged"));
    }
    Ok(())
}

/// Writes a copy anew that is damaged from the other one. False if neither is good.
async fn mend(
    pool: &Pool,
    (what, places): (&str, [u64; 2]),
    is_good: impl Fn(&[u8]) -> bool,
    said: &mut Said,
    below: Below<'_>,
) -> bool {
    let found = both(places, below).await;
    let is_good = |bytes: &&Vec<u8>| is_good(bytes);
    let Some(good) = found.iter().flatten().find(is_good) else { return false };
    for (place, found) in places.into_iter().zip(&found) {
        if found.as_ref().filter(is_good).is_none() {
            let mended = write(place, good.clone(), below).await;
            said.say(told(pool, what, place, mended));
        }
    }
    true
}

fn told(pool: &Pool, what: &str, place: u64, mended: bool) -> String {
    format!("the copy of the {what} at block {place} was damaged, and {}", outcome(pool, mended))
}

async fn write(place: u64, bytes: Vec<u8>, below: Below<'_>) -> bool {
    below.write(place * BLOCK, Data::shared(bytes)).await.is_ok()
}

/// Both copies of a block, where they can be read.
async fn both(places: [u64; 2], below: Below<'_>) -> [Option<Vec<u8>>; 2] {
    let copy = async |place: u64| below.read(place * BLOCK, BLOCK).await.ok().map(|data| data.to_vec());
    [copy(places[0]).await, copy(places[1]).await]
}
