//! What is on the disk below, as docs/formats/crypto.md has it: places, header, session table, slots.

use super::keys::{Secret, Wrapped};
use crate::transform::power::Block;
use crate::transform::slots::Layout;

/// Bytes of a copy of the header.
pub(super) const HEADER: usize = 4096;
/// Where its copies are.
pub(super) const COPIES: [u64; 2] = [0, 16 << 10];
/// Where the session table is.
pub(super) const TABLE: u64 = 32 << 10;
/// Bytes of an entry: no write of one touches another, on any disk.
pub(super) const ENTRY: usize = 512;
/// Entries of the table: more than ten years of a new one each day.
pub(super) const SESSIONS: u32 = 4096;
/// The last ones are for rotations, which make the others free.
pub(super) const RESERVED: u32 = 64;
/// Where the slots begin.
pub(super) const DATA: u64 = TABLE + SESSIONS as u64 * ENTRY as u64;
/// What a slot has behind its block.
pub(super) const TRAILER: usize = 32;
/// Where the tag is in it.
pub(super) const TAG: usize = 16;
/// Key slots.
pub(super) const SLOTS: usize = 8;
/// Begins the header, and what each block is authenticated with.
pub(super) const MAGIC: &[u8; 8] = b"MASONCRY";

const VERSION: u32 = 1;
const SLOT_AT: usize = 128;
const SLOT: usize = 128;
const KEYS_AT: usize = 1152;
const KEY: usize = 80;
const MAC_AT: usize = 4060;
const SUM_AT: usize = 4092;

/// A volume's id.
pub(super) type Id = [u8; 16];

blockmason::words! {
    /// How blocks are encrypted and authenticated.
    pub(super) enum Cipher: "cipher" {
        /// The fastest where the processor has AES.
        Gcm = "aes-256-gcm",
        /// Gives away only which blocks are equal if a nonce should ever be used twice.
        GcmSiv = "aes-256-gcm-siv",
    }
}

impl Cipher {
    pub(super) fn number(self) -> u32 {
        match self {
            Cipher::Gcm => 1,
            Cipher::GcmSiv => 2,
        }
    }

    fn from(number: u32) -> Option<Cipher> {
        [Cipher::Gcm, Cipher::GcmSiv].into_iter().find(|cipher| cipher.number() == number)
    }
}

/// Where the blocks of a disk of so many bytes are.
pub(super) fn layout(block: u64, size: u64) -> Layout {
    Layout { block, slot: block + TRAILER as u64, start: DATA, size }
}

/// What a passphrase costs to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cost {
    /// KiB.
    pub(super) memory: u32,
    pub(super) passes: u32,
    pub(super) lanes: u32,
}

impl Cost {
    /// A header can ask for no more than this machine should give before anything is known to be right.
    fn is_sane(self) -> bool {
        (1..=16).contains(&self.passes)
            && (1..=16).contains(&self.lanes)
            && (8 * self.lanes..=1 << 20).contains(&self.memory)
    }
}

/// What a key slot is opened with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opener {
    Passphrase(Cost),
    Key,
}

impl Opener {
    pub(super) fn kind(self) -> u32 {
        match self {
            Opener::Passphrase(_) => 1,
            Opener::Key => 2,
        }
    }
}

/// A key slot that is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) opener: Opener,
    pub(super) salt: [u8; 32],
    pub(super) master: Wrapped,
}

/// A data key as the header has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DataKey {
    pub(super) id: u32,
    pub(super) key: Wrapped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) id: Id,
    pub(super) sequence: u64,
    pub(super) cipher: Cipher,
    /// Of the disk when it was formatted.
    pub(super) layout: Layout,
    pub(super) erased: bool,
    /// Blocks before this one have the newest key.
    pub(super) rotated: u64,
    pub(super) slots: [Option<Slot>; SLOTS],
    /// One, or two while a rotation is under way; none of an erased volume.
    pub(super) keys: Vec<DataKey>,
}

/// Why a copy of a header is of no use.
#[derive(Debug)]
pub(super) enum Fault {
    /// All zeros.
    Empty,
    /// Another magic, or a wrong checksum.
    Unreadable,
    /// It is a header, and says something that cannot be done.
    Refused(String),
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// The bytes at a place, as an array.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

impl Header {
    /// The bytes, sealed by the key of the HMAC; none for an erased volume.
    pub(super) fn encode(&self, mac: Option<&Secret>) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &VERSION.to_le_bytes());
        put(&mut bytes, 16, &self.id);
        put(&mut bytes, 32, &self.sequence.to_le_bytes());
        put(&mut bytes, 40, &self.cipher.number().to_le_bytes());
        put(&mut bytes, 44, &(self.layout.block as u32).to_le_bytes());
        put(&mut bytes, 48, &self.layout.size.to_le_bytes());
        put(&mut bytes, 56, &TABLE.to_le_bytes());
        put(&mut bytes, 64, &SESSIONS.to_le_bytes());
        put(&mut bytes, 68, &u32::from(self.erased).to_le_bytes());
        put(&mut bytes, 72, &DATA.to_le_bytes());
        put(&mut bytes, 80, &self.rotated.to_le_bytes());
        for (ix, slot) in self.slots.iter().enumerate() {
            if let Some(slot) = slot {
                slot.encode(&mut bytes[SLOT_AT + ix * SLOT..][..SLOT]);
            }
        }
        for (ix, key) in self.keys.iter().enumerate() {
            let place = &mut bytes[KEYS_AT + ix * KEY..][..KEY];
            put(place, 0, &key.id.to_le_bytes());
            put(place, 8, &key.key.nonce);
            put(place, 32, &key.key.bytes);
        }
        if let Some(mac) = mac {
            let sum = mac.sign(&bytes[..MAC_AT]);
            put(&mut bytes, MAC_AT, &sum);
        }
        let sum = crc32fast::hash(&bytes[..SUM_AT]);
        put(&mut bytes, SUM_AT, &sum.to_le_bytes());
        bytes
    }

    /// A copy of the header. What it says is bounded, and believed only once
    /// [`is_authentic`](Header::is_authentic) has said so.
    pub(super) fn decode(bytes: &[u8]) -> std::result::Result<Header, Fault> {
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(Fault::Empty);
        }
        if bytes.len() != HEADER
            || !bytes.starts_with(MAGIC)
            || crc32fast::hash(&bytes[..SUM_AT]) != u32_at(bytes, SUM_AT)
        {
            return Err(Fault::Unreadable);
        }
        let refused = |what: &str| Fault::Refused(format!("the header {what}"));
        let (version, features) = (u32_at(bytes, 8), u32_at(bytes, 12));
        if version != VERSION || features != 0 {
            return Err(refused(&format!(
                "has version {version} and features {features:#x}; this program knows version {VERSION} and none"
            )));
        }
        let block = u64::from(u32_at(bytes, 44));
        let size = u64_at(bytes, 48);
        let places = (u64_at(bytes, 56), u32_at(bytes, 64), u64_at(bytes, 72));
        let sane = Block::may_be(block)
            && size > 0
            && size.is_multiple_of(block)
            && places == (TABLE, SESSIONS, DATA);
        let (Some(cipher), true, state @ 0..=1) = (Cipher::from(u32_at(bytes, 40)), sane, u32_at(bytes, 68))
        else {
            return Err(refused("makes no sense, although its checksum is right"));
        };
        let mut slots = [const { None }; SLOTS];
        for (ix, slot) in slots.iter_mut().enumerate() {
            *slot = Slot::decode(&bytes[SLOT_AT + ix * SLOT..][..SLOT])
                .ok_or_else(|| refused("has a key slot that makes no sense"))?;
        }
        let keys = (0..2).map(|ix| &bytes[KEYS_AT + ix * KEY..][..KEY]).filter(|key| u32_at(key, 0) != 0);
        let keys: Vec<_> = keys
            .map(|key| DataKey {
                id: u32_at(key, 0),
                key: Wrapped { nonce: array(key, 8), bytes: array(key, 32) },
            })
            .collect();
        if !keys.is_sorted_by(|a, b| a.id < b.id) || keys.is_empty() != (state == 1) {
            return Err(refused("has data keys that make no sense"));
        }
        Ok(Header {
            id: array(bytes, 16),
            sequence: u64_at(bytes, 32),
            cipher,
            layout: layout(block, size),
            erased: state == 1,
            rotated: u64_at(bytes, 80),
            slots,
            keys,
        })
    }

    /// True if these bytes of a header were written by someone who has the key of the HMAC.
    pub(super) fn is_authentic(bytes: &[u8], mac: &Secret) -> bool {
        bytes.len() == HEADER && mac.verifies(&bytes[..MAC_AT], &bytes[MAC_AT..SUM_AT])
    }

    /// Id of the key that is written with; 0 of an erased volume.
    pub(super) fn newest(&self) -> u32 {
        self.keys.last().map_or(0, |key| key.id)
    }

    /// Id of the oldest key that a block may have.
    pub(super) fn oldest(&self) -> u32 {
        self.keys.first().map_or(0, |key| key.id)
    }
}

impl Slot {
    fn encode(&self, bytes: &mut [u8]) {
        put(bytes, 0, &self.opener.kind().to_le_bytes());
        if let Opener::Passphrase(cost) = self.opener {
            put(bytes, 4, &cost.memory.to_le_bytes());
            put(bytes, 8, &cost.passes.to_le_bytes());
            put(bytes, 12, &cost.lanes.to_le_bytes());
        }
        put(bytes, 16, &self.salt);
        put(bytes, 48, &self.master.nonce);
        put(bytes, 64, &self.master.bytes);
    }

    /// What is in a key slot, if anything; None if it makes no sense.
    fn decode(bytes: &[u8]) -> Option<Option<Slot>> {
        let cost = Cost { memory: u32_at(bytes, 4), passes: u32_at(bytes, 8), lanes: u32_at(bytes, 12) };
        let opener = match u32_at(bytes, 0) {
            0 => return Some(None),
            1 if cost.is_sane() => Opener::Passphrase(cost),
            2 => Opener::Key,
            _ => return None,
        };
        let master = Wrapped { nonce: array(bytes, 48), bytes: array(bytes, 64) };
        Some(Some(Slot { opener, salt: array(bytes, 16), master }))
    }
}

/// An entry of the session table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Free,
    /// Somebody's who cannot be asked any more.
    Damaged,
    Used {
        key: u32,
        salt: [u8; 32],
    },
}

impl Entry {
    /// Where the entry of a session is.
    pub(super) fn place(session: u32) -> u64 {
        TABLE + u64::from(session - 1) * ENTRY as u64
    }

    pub(super) fn encode(id: &Id, session: u32, key: u32, salt: &[u8; 32]) -> Vec<u8> {
        let mut bytes = vec![0; ENTRY];
        put(&mut bytes, 0, &session.to_le_bytes());
        put(&mut bytes, 4, &key.to_le_bytes());
        put(&mut bytes, 8, salt);
        let sum = checksum(id, &bytes);
        put(&mut bytes, ENTRY - 4, &sum.to_le_bytes());
        bytes
    }

    fn decode(id: &Id, session: u32, bytes: &[u8]) -> Entry {
        if bytes.iter().all(|byte| *byte == 0) {
            return Entry::Free;
        }
        if checksum(id, bytes) != u32_at(bytes, ENTRY - 4) || u32_at(bytes, 0) != session {
            return Entry::Damaged;
        }
        Entry::Used { key: u32_at(bytes, 4), salt: array(bytes, 8) }
    }

    /// The whole table; session `n` is at `n - 1`.
    pub(super) fn decode_all(id: &Id, bytes: &[u8]) -> Vec<Entry> {
        (1..)
            .zip(bytes.chunks_exact(ENTRY))
            .map(|(session, bytes)| Entry::decode(id, session, bytes))
            .collect()
    }
}

fn checksum(id: &Id, entry: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(id);
    sum.update(&entry[..ENTRY - 4]);
    sum.finalize()
}

/// What stands behind a block, but for the tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    /// 0 is none: the slot is of zeros.
    pub(super) session: u32,
    pub(super) counter: u64,
}

impl Trailer {
    /// Of the last bytes of a slot.
    pub(super) fn decode(bytes: &[u8]) -> Trailer {
        Trailer { session: u32_at(bytes, 0), counter: u64_at(bytes, 8) }
    }

    /// All but the tag.
    pub(super) fn encode(self, bytes: &mut [u8]) {
        put(bytes, 0, &self.session.to_le_bytes());
        put(bytes, 4, &[0; 4]);
        put(bytes, 8, &self.counter.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_where_the_format_says() {
        let layout = layout(4096, 1 << 20);
        assert_eq!(layout.places(&(0..4096)), 2_129_920..2_129_920 + 4128);
        assert_eq!(layout.places(&(8192..16384)), 2_129_920 + 2 * 4128..2_129_920 + 4 * 4128);
    }
}
