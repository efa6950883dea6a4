//! The block store: label, owners, extent records.

use super::{BLOCK, EXTENT, Id, damaged, expect_zeros, is_sound, put, seal, u32_at, u64_at};
use blockmason::{Error, Kind, Result};

const LABEL: &[u8; 8] = b"MASONPX1";
const OWNERS: &[u8; 8] = b"MASONOWN";
const VERSION: u32 = 1;
/// Bytes of an extent's record.
pub(in super::super) const EXTENT_RECORD: u64 = 128;

/// What whoever opens it has to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Features {
    /// Whoever does not know them may go on.
    pub(in super::super) compatible: u64,
    /// ... may only read.
    pub(in super::super) read_only: u64,
    /// ... may not open it.
    pub(in super::super) incompatible: u64,
}

impl Features {
    pub(super) fn at(bytes: &[u8], at: usize) -> Features {
        let word = |ix: usize| u64_at(bytes, at + 8 * ix);
        Features { compatible: word(0), read_only: word(1), incompatible: word(2) }
    }

    pub(super) fn put(self, bytes: &mut [u8], at: usize) {
        for (ix, word) in [self.compatible, self.read_only, self.incompatible].into_iter().enumerate() {
            put(bytes, at + 8 * ix, 8, word);
        }
    }

    /// Of a label: owners have keys.
    pub(in super::super) const KEYS: u64 = 1;
    /// Of an owner: the catalog says what has come from other pools.
    pub(in super::super) const STREAMS: u64 = 1;
    /// Of an owner: snapshots may be held.
    pub(in super::super) const HOLDS: u64 = 2;
    /// Of an owner: there may be packs.
    pub(in super::super) const PACKS: u64 = 4;
    /// Those of an owner that this program knows.
    pub(in super::super) const OWNERS: u64 =
        Features::STREAMS | Features::HOLDS | if cfg!(feature = "compress") { Features::PACKS } else { 0 };

    /// Whether this program, which knows these of the incompatible features, may do that with it.
    pub(in super::super) fn allow(self, known: u64, write: bool, what: &str) -> Result<()> {
        let refuse = |bits: u64, verb: &str| {
            let message = format!(
                "{what} has features that this program does not know ({bits:#x}): a newer one can {verb} it"
            );
            Err(Error::new(Kind::Unsupported, message))
        };
        match self {
            Features { incompatible, .. } if incompatible & !known != 0 => {
                refuse(incompatible & !known, "open")
            }
            Features { read_only: 1.., .. } if write => refuse(self.read_only, "write"),
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Label {
    pub(in super::super) id: Id,
    pub(in super::super) extents: u64,
    pub(in super::super) capacity: u64,
    pub(in super::super) sequence: u64,
    pub(in super::super) features: Features,
}

impl Label {
    /// Where the two copies are.
    pub(in super::super) const PLACES: [u64; 2] = [0, 256];

    /// Extents that one copy of the table takes.
    pub(in super::super) fn table(&self) -> u64 {
        (self.capacity * EXTENT_RECORD).div_ceil(BLOCK * EXTENT)
    }

    /// The first extent that may be given away.
    pub(in super::super) fn first(&self) -> u64 {
        1 + 2 * self.table()
    }

    /// Where the record of an extent is, in bytes, in each copy of the table.
    pub(in super::super) fn record(&self, extent: u64) -> [u64; 2] {
        [1, 1 + self.table()].map(|table| table * EXTENT * BLOCK + extent * EXTENT_RECORD)
    }

    pub(in super::super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        bytes[..8].copy_from_slice(LABEL);
        put(&mut bytes, 12, 4, u64::from(VERSION));
        bytes[16..32].copy_from_slice(&self.id);
        put(&mut bytes, 32, 8, self.extents);
        put(&mut bytes, 40, 8, self.capacity);
        put(&mut bytes, 48, 8, self.sequence);
        self.features.put(&mut bytes, 56);
        seal(&mut bytes, 8);
        bytes
    }

    /// True if it looks like a label, damaged or not.
    pub(in super::super) fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(LABEL)
    }

    pub(in super::super) fn decode(bytes: &[u8]) -> Result<Label> {
        if !Label::is_one(bytes) || bytes.len() != BLOCK as usize {
            return Err(Error::new(Kind::Denied, "it is no pool"));
        }
        if !is_sound(bytes, 8) {
            return Err(damaged("the pool's label is damaged"));
        }
        let version = u32_at(bytes, 12);
        if version != VERSION {
            let message =
                format!("the pool has version {version} of the format, and this program knows {VERSION}");
            return Err(Error::new(Kind::Unsupported, message));
        }
        expect_zeros(&bytes[80..], "the label")?;
        let id = std::array::from_fn(|ix| bytes[16 + ix]);
        let label = Label {
            id,
            extents: u64_at(bytes, 32),
            capacity: u64_at(bytes, 40),
            sequence: u64_at(bytes, 48),
            features: Features::at(bytes, 56),
        };
        let fits = label.capacity < super::LIMIT / EXTENT
            && label.extents <= label.capacity
            && label.first() < label.extents;
        fits.then_some(label).ok_or_else(|| damaged("the pool's label has a size that cannot be"))
    }
}

/// Whoever keeps something in extents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Owner {
    pub(in super::super) number: u32,
    pub(in super::super) format: u32,
    pub(in super::super) root: u64,
    pub(in super::super) features: Features,
    /// Empty, or by which it is told from others of its format: see [`is_key`].
    pub(in super::super) key: String,
}

/// Bytes of a key, at most.
pub(in super::super) const MOST_KEY: usize = 24;

/// True of letters, digits, `.`, `_` and `-`, of which a key has one at least.
pub(in super::super) fn is_key(key: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MOST_KEY).contains(&key.len()) && key.bytes().all(fits)
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Owners {
    pub(in super::super) id: Id,
    pub(in super::super) sequence: u64,
    pub(in super::super) all: Vec<Owner>,
}

impl Owners {
    /// Where the two copies are.
    pub(in super::super) const PLACES: [u64; 2] = [1, 257];
    const EACH: usize = 64;
    const MOST: usize = (BLOCK as usize - 64) / Owners::EACH;

    /// True if it looks like a list of owners.
    pub(in super::super) fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(OWNERS)
    }

    pub(in super::super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        bytes[..8].copy_from_slice(OWNERS);
        put(&mut bytes, 12, 4, self.all.len() as u64);
        bytes[16..32].copy_from_slice(&self.id);
        put(&mut bytes, 32, 8, self.sequence);
        for (owner, at) in self.all.iter().zip((64..).step_by(Owners::EACH)) {
            put(&mut bytes, at, 4, u64::from(owner.number));
            put(&mut bytes, at + 4, 4, u64::from(owner.format));
            put(&mut bytes, at + 8, 8, owner.root);
            owner.features.put(&mut bytes, at + 16);
            let key = owner.key.as_bytes();
            bytes[at + 40..at + 40 + key.len()].copy_from_slice(key);
        }
        seal(&mut bytes, 8);
        bytes
    }

    pub(in super::super) fn decode(bytes: &[u8], label: &Label) -> Result<Owners> {
        if !bytes.starts_with(OWNERS) || !is_sound(bytes, 8) || bytes[16..32] != label.id {
            return Err(damaged("the list of the pool's owners is damaged"));
        }
        let count = u32_at(bytes, 12) as usize;
        if count > Owners::MOST {
            return Err(damaged("the pool has more owners than there is room for"));
        }
        expect_zeros(&bytes[40..64], "the list of owners")?;
        expect_zeros(&bytes[64 + count * Owners::EACH..], "the list of owners")?;
        let one = |ix: usize| {
            let at = 64 + ix * Owners::EACH;
            Ok(Owner {
                number: u32_at(bytes, at),
                format: u32_at(bytes, at + 4),
                root: u64_at(bytes, at + 8),
                features: Features::at(bytes, at + 16),
                key: key_at(&bytes[at + 40..at + Owners::EACH])?,
            })
        };
        let all: Vec<Owner> = (0..count).map(one).collect::<Result<_>>()?;
        let outside = |owner: &Owner| !(label.first()..label.extents).contains(&owner.root);
        if all.iter().any(outside) {
            return Err(damaged("an owner's root is outside the pool"));
        }
        Ok(Owners { id: label.id, sequence: u64_at(bytes, 32), all })
    }
}

/// A key, with zeros behind it.
fn key_at(bytes: &[u8]) -> Result<String> {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    expect_zeros(&bytes[len..], "an owner")?;
    let key = std::str::from_utf8(&bytes[..len]).ok().filter(|key| key.is_empty() || is_key(key));
    key.map(str::to_owned).ok_or_else(|| damaged("the key of an owner is none"))
}

/// Whose an extent is, and which of its blocks are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct ExtentRecord {
    pub(in super::super) owner: u32,
    pub(in super::super) epoch: u64,
    pub(in super::super) used: [u64; 8],
    /// What the pool is on has room for all of it.
    pub(in super::super) backed: bool,
}

impl ExtentRecord {
    pub(in super::super) fn encode(&self) -> [u8; EXTENT_RECORD as usize] {
        let mut bytes = [0; EXTENT_RECORD as usize];
        if *self == ExtentRecord::default() {
            return bytes;
        }
        put(&mut bytes, 0, 4, u64::from(self.owner));
        put(&mut bytes, 8, 8, self.epoch);
        for (ix, word) in self.used.into_iter().enumerate() {
            put(&mut bytes, 16 + 8 * ix, 8, word);
        }
        put(&mut bytes, 80, 4, u64::from(self.backed));
        seal(&mut bytes, 4);
        bytes
    }

    /// None if it is damaged.
    pub(in super::super) fn decode(bytes: &[u8]) -> Option<ExtentRecord> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Some(ExtentRecord::default());
        }
        let flags = u32_at(bytes, 80);
        let sound =
            is_sound(bytes, 4) && flags <= 1 && expect_zeros(&bytes[84..], "an extent's record").is_ok();
        let record = sound.then(|| ExtentRecord {
            owner: u32_at(bytes, 0),
            epoch: u64_at(bytes, 8),
            used: std::array::from_fn(|ix| u64_at(bytes, 16 + 8 * ix)),
            backed: flags == 1,
        });
        // Nobody's has no checksum either.
        record.filter(|record| *record != ExtentRecord::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn label() -> Label {
        let features = Features::default();
        Label { id: [7; 16], extents: 512, capacity: 8192, sequence: 3, features }
    }

    #[test]
    fn a_label_says_what_was_written_and_no_flipped_bit_is_believed() {
        let bytes = label().encode();
        assert_eq!(Label::decode(&bytes).unwrap(), label());
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(Label::decode(&other).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn unknown_features_are_refused_as_they_ask() {
        let some = |compatible, read_only, incompatible| Features { compatible, read_only, incompatible };
        assert!(some(1, 0, 0).allow(0, true, "it").is_ok());
        assert!(some(0, 1, 0).allow(0, false, "it").is_ok() && some(0, 1, 0).allow(0, true, "it").is_err());
        assert!(some(0, 0, 1).allow(0, false, "it").is_err());
        assert!(some(0, 0, 1).allow(1, false, "it").is_ok() && some(0, 0, 3).allow(1, false, "it").is_err());
    }

    #[test]
    fn owners_and_extents_say_what_was_written() {
        let owner = |number, key: &str| {
            let key = key.to_owned();
            Owner { number, format: 1, root: 9, features: Features::default(), key }
        };
        let all = vec![owner(2, ""), owner(3, "v2"), owner(4, "exactly.twenty-4_letters")];
        let owners = Owners { id: [7; 16], sequence: 1, all };
        assert_eq!(Owners::decode(&owners.encode(), &label()).unwrap(), owners);
        for bad in ["a/b", "a\0b", "\u{e9}"] {
            let bytes = Owners { all: vec![owner(2, bad)], ..owners.clone() }.encode();
            assert!(Owners::decode(&bytes, &label()).is_err(), "{bad:?}");
        }
        let extent = ExtentRecord { owner: 2, epoch: 5, used: [1, 2, 3, 4, 5, 6, 7, u64::MAX], backed: true };
        assert_eq!(ExtentRecord::decode(&extent.encode()), Some(extent));
        assert_eq!(ExtentRecord::default().encode(), [0; 128]);
        for bit in 0..EXTENT_RECORD as usize * 8 {
            let mut bytes = extent.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(ExtentRecord::decode(&bytes), None, "bit {bit}");
        }
    }

    #[test]
    fn everything_of_the_store_lies_side_by_side() {
        let label = label();
        assert_eq!((label.table(), label.first()), (1, 3));
        assert_eq!(label.record(0), [1 << 21, 2 << 21]);
        assert!(label.record(label.capacity - 1)[0] + EXTENT_RECORD <= label.record(0)[1]);
    }
}
