//! Where a tree store begins, and pointers to nodes.

use super::{BLOCK, Id, LIMIT, damaged, expect_zeros, is_sound, put, seal, u32_at, u40_at, u64_at};
use blockmason::Result;

const MAGIC: &[u8; 8] = b"MASONRT1";

/// Where the two copies of a node are. `at[0]` 0: there is none, and nothing below it is mapped since `birth`. `at[1]` 0: there
/// is none either, and what it would lead to lies in a row from `at[0]` on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(in super::super) struct Ptr {
    pub(in super::super) at: [u64; 2],
    pub(in super::super) birth: u64,
}

impl Ptr {
    pub(in super::super) const BYTES: usize = 15;

    pub(in super::super) fn hole(birth: u64) -> Ptr {
        Ptr { at: [0; 2], birth }
    }

    pub(in super::super) fn is_hole(&self) -> bool {
        self.at[0] == 0
    }

    /// All that it leads to is in a row, from that block on: a superpage. In format 2 alone.
    pub(in super::super) fn row(at: u64, birth: u64) -> Ptr {
        Ptr { at: [at, 0], birth }
    }

    /// It leads to a node, and neither is a hole nor a superpage.
    pub(in super::super) fn is_node(&self) -> bool {
        self.at.iter().all(|at| *at != 0)
    }

    pub(super) fn at(bytes: &[u8], at: usize) -> Ptr {
        Ptr { at: [u40_at(bytes, at), u40_at(bytes, at + 5)], birth: u40_at(bytes, at + 10) }
    }

    pub(super) fn put(self, bytes: &mut [u8], at: usize) {
        put(bytes, at, 5, self.at[0]);
        put(bytes, at + 5, 5, self.at[1]);
        put(bytes, at + 10, 5, self.birth);
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Root {
    pub(in super::super) owner: u32,
    pub(in super::super) id: Id,
    pub(in super::super) sequence: u64,
    pub(in super::super) epoch: u64,
    pub(in super::super) births: u64,
    /// First block of the log and how many there are.
    pub(in super::super) log: [u64; 2],
    /// Where in the log the next record is expected, and its number.
    pub(in super::super) tail: (u64, u64),
    pub(in super::super) next: u32,
    pub(in super::super) height: u8,
    pub(in super::super) catalog: Ptr,
    pub(in super::super) journal: u64,
    pub(in super::super) used: u64,
}

impl Root {
    /// Where the copies of a slot are, in blocks of the root extent.
    pub(in super::super) fn places(sequence: u64) -> [u64; 2] {
        [sequence % 2, 256 + sequence % 2]
    }

    pub(in super::super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        bytes[..8].copy_from_slice(MAGIC);
        put(&mut bytes, 12, 4, u64::from(self.owner));
        bytes[16..32].copy_from_slice(&self.id);
        let words =
            [self.sequence, self.epoch, self.births, self.log[0], self.log[1], self.tail.0, self.tail.1];
        for (word, at) in words.into_iter().zip((32..).step_by(8)) {
            put(&mut bytes, at, 8, word);
        }
        put(&mut bytes, 88, 4, u64::from(self.next));
        bytes[92] = self.height;
        self.catalog.put(&mut bytes, 96);
        put(&mut bytes, 112, 8, self.journal);
        put(&mut bytes, 120, 8, self.used);
        seal(&mut bytes, 8);
        bytes
    }

    pub(in super::super) fn decode(bytes: &[u8], id: &Id, owner: u32) -> Result<Root> {
        let own = bytes.len() == BLOCK as usize && bytes.starts_with(MAGIC) && is_sound(bytes, 8);
        if !own || bytes[16..32] != *id || u32_at(bytes, 12) != owner {
            return Err(damaged("it is no root of this pool's trees"));
        }
        expect_zeros(&bytes[93..96], "the root")?;
        expect_zeros(&bytes[111..112], "the root")?;
        expect_zeros(&bytes[128..], "the root")?;
        let root = Root {
            owner,
            id: *id,
            sequence: u64_at(bytes, 32),
            epoch: u64_at(bytes, 40),
            births: u64_at(bytes, 48),
            log: [u64_at(bytes, 56), u64_at(bytes, 64)],
            tail: (u64_at(bytes, 72), u64_at(bytes, 80)),
            next: u32_at(bytes, 88),
            height: bytes[92],
            catalog: Ptr::at(bytes, 96),
            journal: u64_at(bytes, 112),
            used: u64_at(bytes, 120),
        };
        // Each of them is counted on.
        let counts =
            root.sequence.max(root.epoch).max(root.tail.1) < u64::MAX / 2 && root.next < u32::MAX / 2;
        let sane = counts
            && root.births < LIMIT
            && root.height <= 4
            && root.tail.0 < root.log[1]
            && root.tail.1 > 0
            && root.next > 0;
        sane.then_some(root).ok_or_else(|| damaged("the root has numbers that cannot be"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_says_what_was_written_and_no_flipped_bit_is_believed() {
        let root = Root {
            owner: 2,
            id: [9; 16],
            sequence: 12,
            epoch: 3,
            births: LIMIT - 1,
            log: [2048, 4096],
            tail: (17, 400),
            next: 5,
            height: 2,
            catalog: Ptr { at: [1000, LIMIT - 1], birth: 70 },
            journal: 99,
            used: 1234,
        };
        let bytes = root.encode();
        assert_eq!(Root::decode(&bytes, &[9; 16], 2).unwrap(), root);
        assert!(Root::decode(&bytes, &[8; 16], 2).is_err() && Root::decode(&bytes, &[9; 16], 3).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(Root::decode(&other, &[9; 16], 2).is_err(), "bit {bit}");
        }
    }
}
