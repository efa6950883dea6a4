//! What says that a disk was made by an element, and how: written when it is made, and never changed.

use super::own::Io;
use super::slots::Layout;
use blockmason::{Data, Error, Kind, Result};
use std::sync::OnceLock;

/// Bytes of a label: no write of a sector is torn, on any disk.
const LABEL: usize = 512;
/// Where its copies are.
const COPIES: [u64; 2] = [0, 4096];
/// Where everything else may begin.
pub(super) const END: u64 = 8192;
const SUM_AT: usize = LABEL - 4;
const VERSION: u32 = 1;
/// So much behind the labels is looked at before a disk is taken for empty.
const LOOK: u64 = 1 << 20;

/// A disk's id.
pub(super) type Id = [u8; 16];

/// What an element expects.
pub(super) struct Wanted {
    pub(super) magic: &'static [u8; 8],
    /// What such a disk is called.
    pub(super) what: &'static str,
    pub(super) layout: Layout,
    /// What else must be as it was, and how that is set.
    pub(super) kind: u32,
    pub(super) kind_says: fn(u32) -> Option<String>,
    /// Makes a disk of an empty one.
    pub(super) create: bool,
}

/// A label that can be believed.
#[derive(Debug, PartialEq)]
struct Label {
    id: Id,
    size: u64,
    block: u32,
    kind: u32,
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(Kind::Denied, message.into())
}

impl Label {
    fn encode(&self, magic: &[u8; 8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LABEL);
        bytes.extend_from_slice(magic);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(&self.size.to_le_bytes());
        bytes.extend_from_slice(&self.block.to_le_bytes());
        bytes.extend_from_slice(&self.kind.to_le_bytes());
        bytes.resize(SUM_AT, 0);
        let sum = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// What is in a copy; None if it is not whole, or of something else.
    ///
    /// # Errors
    /// It is one, and this program does not know what it says.
    fn decode(bytes: &[u8], magic: &[u8; 8]) -> Result<Option<Label>> {
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes.len() != LABEL
            || !bytes.starts_with(magic)
            || crc32fast::hash(&bytes[..SUM_AT]) != u32_at(SUM_AT)
        {
            return Ok(None);
        }
        if (u32_at(8), u32_at(12)) != (VERSION, 0) {
            let (version, features) = (u32_at(8), u32_at(12));
            return Err(denied(format!(
                "the disk below has version {version} and features {features:#x}; this program knows version {VERSION} and none"
            )));
        }
        let mut id = [0; 16];
        id.copy_from_slice(&bytes[16..32]);
        let size = u64::from(u32_at(36)) << 32 | u64::from(u32_at(32));
        Ok(Some(Label { id, size, block: u32_at(40), kind: u32_at(44) }))
    }

    /// True if this is a disk of the kind that is wanted.
    fn suits(&self, wanted: &Wanted) -> Result<()> {
        let (layout, what) = (wanted.layout, wanted.what);
        if u64::from(self.block) != layout.block {
            let block = self.block;
            return Err(denied(format!("the {what} disk below has blocks of {block} bytes: set that")));
        }
        if self.kind != wanted.kind {
            let says = (wanted.kind_says)(self.kind);
            let says =
                says.unwrap_or_else(|| format!("something that this program does not know, {}", self.kind));
            return Err(denied(format!("the {what} disk below was made with {says}: set that")));
        }
        if layout.size < self.size {
            let (was, now) = (self.size, layout.size);
            return Err(denied(format!(
                "the {what} disk had {was} bytes, and on the disk below is room for {now}"
            )));
        }
        Ok(())
    }
}

/// The id of the disk below, once it is known.
#[derive(Default)]
pub(super) struct Opened {
    id: OnceLock<Id>,
    opening: tokio::sync::Mutex<()>,
}

impl Opened {
    /// The same, found out if need be.
    pub(super) async fn id(&self, io: &Io<'_>, wanted: &Wanted) -> Result<&Id> {
        if let Some(id) = self.id.get() {
            return Ok(id);
        }
        let _alone = self.opening.lock().await;
        if let Some(id) = self.id.get() {
            return Ok(id);
        }
        let id = open(io, wanted).await?;
        Ok(self.id.get_or_init(|| id))
    }
}

/// Opens the disk below, or makes something of an empty one.
async fn open(io: &Io<'_>, wanted: &Wanted) -> Result<Id> {
    let [first, second] = COPIES.map(|at| io.read(at, LABEL as u64));
    let copies = [first.await?.to_vec(), second.await?.to_vec()];
    let [first, second] = copies.each_ref().map(|copy| Label::decode(copy, wanted.magic));
    let (first, second) = (first?, second?);
    let whole = first.is_some() && second.is_some();
    let Some(label) = first.or(second) else {
        if copies.iter().flatten().any(|byte| *byte != 0) {
            return Err(denied(format!(
                "there is something else on the disk below, or its label is lost: it is no {} one",
                wanted.what
            )));
        }
        return create(io, wanted).await;
    };
    label.suits(wanted)?;
    if !whole && !io.cx.geometry().read_only {
        store(io, &label, wanted.magic).await?;
        io.cx.notice("one of two copies of the label was damaged; it is whole again");
    }
    Ok(label.id)
}

async fn create(io: &Io<'_>, wanted: &Wanted) -> Result<Id> {
    let what = wanted.what;
    if !wanted.create {
        return Err(denied(format!("the disk below is empty; (create yes) makes a {what} disk of it")));
    }
    let Layout { start, slot, block, size } = wanted.layout;
    let behind = io.read(start, LOOK.min(size / block * slot)).await?;
    if !behind.is_zero() {
        return Err(denied(
            "both copies of the label are zeros, and there is something behind them: it is lost",
        ));
    }
    let id = io.cx.rng(|rng| rng.u128(..)).to_le_bytes();
    let label = Label { id, size, block: block as u32, kind: wanted.kind };
    store(io, &label, wanted.magic).await?;
    io.cx.notice(format!("the disk below is a {what} one from now on"));
    Ok(id)
}

async fn store(io: &Io<'_>, label: &Label, magic: &[u8; 8]) -> Result<()> {
    let bytes = Data::copy_of(&label.encode(magic));
    for at in COPIES {
        io.write(at, bytes.clone()).await?;
        io.flush().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8; 8] = b"MASONTST";

    #[test]
    fn a_label_is_read_as_it_was_written_and_not_otherwise() {
        let label = Label { id: [7; 16], size: 5 << 40, block: 4096, kind: 3 };
        let bytes = label.encode(MAGIC);
        assert_eq!(bytes.len(), LABEL);
        assert_eq!(Label::decode(&bytes, MAGIC).unwrap(), Some(label));
        for at in 0..LABEL {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert_eq!(Label::decode(&bad, MAGIC).unwrap(), None, "byte {at}");
        }
        let mut newer = bytes[..SUM_AT].to_vec();
        newer[12] = 1;
        let sum = crc32fast::hash(&newer);
        newer.extend_from_slice(&sum.to_le_bytes());
        assert!(Label::decode(&newer, MAGIC).unwrap_err().to_string().contains("features 0x1"));
    }

    #[test]
    fn random_bytes_are_no_label() {
        let mut rng = fastrand::Rng::with_seed(1);
        for len in [0, 8, 511, 512, 513] {
            let mut bytes = vec![0; len];
            rng.fill(&mut bytes);
            bytes.iter_mut().zip(MAGIC).for_each(|(byte, magic)| *byte = *magic);
            assert_eq!(Label::decode(&bytes, MAGIC).unwrap(), None);
        }
    }
}
