//! What the catalog says of volumes and snapshots.

use super::store::Features;
use super::{BLOCK, Compress, Ptr, damaged, expect_zeros, put, u32_at, u40_at, u64_at};
use blockmason::Result;

/// Records of one page of the catalog.
pub(in super::super) const RECORDS: usize = 31;

/// How much room a volume may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct Limits {
    /// Bytes of it that may hold data, 0 any.
    pub(in super::super) quota: u64,
    /// Bytes that can be written since its newest snapshot, whatever others do.
    pub(in super::super) reserve: u64,
}

/// A snapshot's identity, in every pool that has it.
pub(in super::super) type SnapshotId = [u8; 16];

/// What a volume is being filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Receiving {
    /// The first bytes of the identity of the snapshot that it becomes.
    pub(in super::super) id: [u8; 10],
    /// What comes before that block is there, durably.
    pub(in super::super) blocks: u64,
}

impl Receiving {
    /// So many blocks stand for what is no part of that snapshot: no volume has as many.
    pub(in super::super) const SPOILT: u64 = (1 << 40) - 2;

    fn put(self, bytes: &mut [u8]) {
        put(bytes, 48, 5, self.blocks + 1);
        bytes[53..63].copy_from_slice(&self.id);
    }

    fn at(bytes: &[u8]) -> Option<Receiving> {
        let blocks = u40_at(bytes, 48).checked_sub(1)?;
        Some(Receiving { id: std::array::from_fn(|ix| bytes[53 + ix]), blocks })
    }
}

/// What differs between volumes and snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Kind {
    Volume {
        /// Its newest snapshot, 0 none.
        newest: u32,
        /// The snapshot it is a clone of, 0 none, and that one's birth.
        origin: (u32, u64),
        limits: Limits,
        /// Blocks that only it sees, at least: those born since its newest snapshot.
        own: u64,
        receiving: Option<Receiving>,
    },
    Snapshot {
        /// The one before it in the same line, 0 none.
        before: u32,
        volume: u32,
        birth: u64,
        /// Its dead list.
        dead: Ptr,
        /// If it came from another pool.
        id: Option<SnapshotId>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Entry {
    pub(in super::super) name: String,
    pub(in super::super) size: u64,
    pub(in super::super) height: u8,
    pub(in super::super) root: Ptr,
    pub(in super::super) checksums: bool,
    pub(in super::super) deleting: bool,
    /// After a loss of power it is what it was at some instant since the last flush.
    pub(in super::super) ordered: bool,
    /// A snapshot that is not to be deleted.
    pub(in super::super) held: bool,
    /// How what is written is compressed.
    pub(in super::super) compress: Compress,
    /// Blocks that hold data.
    pub(in super::super) mapped: u64,
    /// Seconds since 1970.
    pub(in super::super) made: u64,
    pub(in super::super) features: Features,
    pub(in super::super) kind: Kind,
}

impl Entry {
    pub(super) const BYTES: usize = 256;
    /// The longest name.
    pub(in super::super) const NAME: usize = 127;

    /// Into zeros.
    pub(super) fn encode(&self, bytes: &mut [u8]) {
        bytes[1] = self.height;
        let flags = [self.checksums, self.deleting, self.ordered, self.held];
        bytes[2] = flags.into_iter().zip(0..).map(|(flag, bit)| u8::from(flag) << bit).sum();
        bytes[3] = self.name.len() as u8;
        bytes[12] = self.compress.code();
        self.root.put(bytes, 16);
        put(bytes, 32, 8, self.size);
        put(bytes, 64, 8, self.made);
        self.features.put(bytes, 72);
        bytes[128..128 + self.name.len()].copy_from_slice(self.name.as_bytes());
        put(bytes, 112, 8, self.mapped);
        let (number, links, birth) = match &self.kind {
            Kind::Volume { newest, origin, limits, own, receiving } => {
                put(bytes, 96, 8, limits.quota);
                put(bytes, 104, 8, limits.reserve);
                put(bytes, 120, 8, *own);
                if let Some(receiving) = receiving {
                    receiving.put(bytes);
                }
                (1, [*newest, origin.0], origin.1)
            }
            Kind::Snapshot { before, volume, birth, dead, id } => {
                dead.put(bytes, 48);
                bytes[96..112].copy_from_slice(&id.unwrap_or_default());
                (2, [*before, *volume], *birth)
            }
        };
        bytes[0] = number;
        put(bytes, 4, 4, u64::from(links[0]));
        put(bytes, 8, 4, u64::from(links[1]));
        put(bytes, 40, 5, birth);
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Option<Entry>> {
        if bytes[0] == 0 {
            return expect_zeros(bytes, "an empty record of the catalog").map(|()| None);
        }
        let (links, birth) = ([u32_at(bytes, 4), u32_at(bytes, 8)], u40_at(bytes, 40));
        let kind = match bytes[0] {
            1 => {
                let receiving = Receiving::at(bytes);
                if receiving.is_none() {
                    expect_zeros(&bytes[48..63], "a volume's record")?;
                }
                Kind::Volume {
                    newest: links[0],
                    origin: (links[1], birth),
                    limits: Limits { quota: u64_at(bytes, 96), reserve: u64_at(bytes, 104) },
                    own: u64_at(bytes, 120),
                    receiving,
                }
            }
            2 => {
                expect_zeros(&bytes[120..128], "a snapshot's record")?;
                let id: SnapshotId = std::array::from_fn(|ix| bytes[96 + ix]);
                let id = (id != SnapshotId::default()).then_some(id);
                Kind::Snapshot { before: links[0], volume: links[1], birth, dead: Ptr::at(bytes, 48), id }
            }
            _ => return Err(damaged("the catalog has a record of no known kind")),
        };
        for gap in [13..16, 31..32, 45..48, 63..64] {
            expect_zeros(&bytes[gap], "a record of the catalog")?;
        }
        let len = bytes[3] as usize;
        let name = bytes.get(128..128 + len).and_then(|name| std::str::from_utf8(name).ok());
        let name = name.filter(|name| (1..=Entry::NAME).contains(&name.len()));
        let name = name.ok_or_else(|| damaged("the catalog has a name that is none"))?.to_owned();
        expect_zeros(&bytes[128 + len..], "a record of the catalog")?;
        let compress = Compress::of(bytes[12])
            .ok_or_else(|| damaged("the catalog names a way to compress that there is not"))?;
        let entry = Entry {
            name,
            size: u64_at(bytes, 32),
            height: bytes[1],
            root: Ptr::at(bytes, 16),
            checksums: bytes[2] & 1 != 0,
            deleting: bytes[2] & 2 != 0,
            ordered: bytes[2] & 4 != 0,
            held: bytes[2] & 8 != 0,
            compress,
            mapped: u64_at(bytes, 112),
            made: u64_at(bytes, 64),
            features: Features::at(bytes, 72),
            kind,
        };
        let sane =
            bytes[2] < 16 && entry.height <= 4 && entry.size.is_multiple_of(BLOCK) && entry.size <= 1 << 48;
        sane.then_some(Some(entry)).ok_or_else(|| damaged("the catalog has numbers that cannot be"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_what_was_written() {
        let limits = Limits { quota: 1 << 40, reserve: 12345 };
        let volume = |receiving| Kind::Volume { newest: 3, origin: (4, 99), limits, own: 77, receiving };
        let receiving = Receiving { id: [9; 10], blocks: 1 << 36 };
        let spoilt = Receiving { id: [9; 10], blocks: Receiving::SPOILT };
        let dead = Ptr { at: [5, 6], birth: 7 };
        let snapshot = |id| Kind::Snapshot { before: 1, volume: 2, birth: 1 << 39, dead, id };
        for kind in [
            volume(None),
            volume(Some(receiving)),
            volume(Some(spoilt)),
            snapshot(None),
            snapshot(Some([3; 16])),
        ] {
            let entry = Entry {
                name: "vm1/ä".to_owned(),
                size: 1 << 30,
                height: 2,
                root: Ptr { at: [8, 9], birth: 10 },
                checksums: true,
                deleting: false,
                ordered: true,
                held: true,
                compress: Compress::Zstd,
                mapped: 999,
                made: 1_700_000_000,
                features: Features { compatible: 1, read_only: 2, incompatible: 4 },
                kind,
            };
            let mut bytes = [0; Entry::BYTES];
            entry.encode(&mut bytes);
            assert_eq!(Entry::decode(&bytes).unwrap(), Some(entry));
        }
        assert_eq!(Entry::decode(&[0; Entry::BYTES]).unwrap(), None);
        assert!(Entry::decode(&[1; Entry::BYTES]).is_err());
    }
}
