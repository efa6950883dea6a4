//! Blocks to slots, and back.

use super::format::{Cipher, Id, MAGIC, TAG, TRAILER, Trailer};
use super::keys::Secret;
use crate::transform::slots::flat;
use aws_lc_rs::aead::{Aad, LessSafeKey, Nonce};
use blockmason::data::is_zero;
use blockmason::{Data, Error, PoolBuf, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Blocks of one session: the bound of GCM for random nonces, far below that for counted ones.
const MOST: u64 = 1 << 32;

/// Bytes of what a block is authenticated with.
const AAD: usize = 72;

/// A session: a key, and the nonces that it has used.
pub(super) struct Session {
    pub(super) number: u32,
    /// Id of its data key.
    pub(super) key: u32,
    cipher: LessSafeKey,
    /// All but the number of the block.
    aad: [u8; AAD],
    next: AtomicU64,
}

impl Session {
    pub(super) fn new(
        cipher: Cipher,
        id: &Id,
        number: u32,
        (key, data_key): (u32, &Secret),
        salt: &[u8; 32],
    ) -> Result<Session> {
        let info: [&[u8]; 3] = [b"mason crypto session", &cipher.number().to_le_bytes(), id];
        let cipher = data_key.derive(salt, &info)?.cipher(cipher)?;
        let mut aad = [0; AAD];
        aad[..8].copy_from_slice(MAGIC);
        aad[8..24].copy_from_slice(id);
        aad[24..56].copy_from_slice(salt);
        aad[56..60].copy_from_slice(&number.to_le_bytes());
        aad[60..64].copy_from_slice(&key.to_le_bytes());
        Ok(Session { number, key, cipher, aad, next: AtomicU64::new(0) })
    }

    /// Nonces for so many blocks, the first of them; None if the session has not as many left.
    pub(super) fn take(&self, blocks: u64) -> Option<u64> {
        // It cannot wrap around: once it is past the end it grows by 2^17 a request.
        let first = self.next.fetch_add(blocks, Ordering::Relaxed);
        (first + blocks <= MOST).then_some(first)
    }

    /// True if another one has to begin.
    pub(super) fn is_over(&self) -> bool {
        self.next.load(Ordering::Relaxed) >= MOST
    }

    fn aad(&self, block: u64) -> Aad<[u8; AAD]> {
        let mut aad = self.aad;
        aad[64..].copy_from_slice(&block.to_le_bytes());
        Aad::from(aad)
    }

    fn nonce(counter: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&counter.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    fn seal(&self, block: u64, counter: u64, plain: &[u8], slot: &mut [u8]) -> Result<()> {
        let (sealed, trailer) = slot.split_at_mut(plain.len());
        Trailer { session: self.number, counter }.encode(trailer);
        let (nonce, tag) = (Session::nonce(counter), &mut trailer[TAG..]);
        self.cipher
            .seal_out_of_place_scatter(nonce, self.aad(block), plain, sealed, &[], tag)
            .map_err(|_| Error::internal("the cryptographic library refused to encrypt"))
    }

    /// True if the block is authentic; `plain` holds it then, and nothing to be used otherwise.
    fn open(&self, block: u64, slot: &[u8], plain: &mut [u8]) -> bool {
        let (sealed, trailer) = slot.split_at(plain.len());
        let nonce = Session::nonce(Trailer::decode(trailer).counter);
        // These four bytes are the only ones of a slot that nothing else covers.
        let unused = u32::from_le_bytes([trailer[4], trailer[5], trailer[6], trailer[7]]);
        unused == 0
            && self
                .cipher
                .open_separate_gather(nonce, self.aad(block), sealed, &trailer[TAG..], plain)
                .is_ok()
    }
}

/// Blocks from the `first` on, as slots, with the nonces from `counter` on.
pub(super) fn seal(session: &Session, first: u64, counter: u64, block: usize, plain: &Data) -> Result<Data> {
    let blocks = plain.len() / block;
    let mut slots = PoolBuf::new(blocks * (block + TRAILER));
    let mut scratch = Vec::new();
    for (ix, slot) in slots.chunks_exact_mut(block + TRAILER).enumerate() {
        let piece = plain.slice(ix * block..(ix + 1) * block);
        session.seal(first + ix as u64, counter + ix as u64, flat(&piece, &mut scratch), slot)?;
    }
    Ok(slots.freeze())
}

/// The blocks in slots, from the `first` on; None in the place of a session is a block of zeros.
///
/// # Errors
/// The first block that is not what was written there.
pub(super) fn open(
    sessions: &[Option<Arc<Session>>],
    first: u64,
    block: usize,
    slots: &Data,
) -> Result<Data, u64> {
    let mut plain = PoolBuf::new(sessions.len() * block);
    let (mut scratch, len) = (Vec::new(), block + TRAILER);
    for (ix, (out, session)) in plain.chunks_exact_mut(block).zip(sessions).enumerate() {
        let slot = slots.slice(ix * len..(ix + 1) * len);
        let bytes = flat(&slot, &mut scratch);
        let number = first + ix as u64;
        let authentic = match session {
            Some(session) => session.open(number, bytes, out),
            None => {
                out.fill(0);
                is_zero(bytes)
            }
        };
        if !authentic {
            return Err(number);
        }
    }
    Ok(plain.freeze())
}

/// The trailers of slots.
pub(super) fn trailers(block: usize, slots: &Data) -> Vec<Trailer> {
    let len = block + TRAILER;
    let trailer = |ix: usize| {
        let mut bytes = [0; TRAILER];
        slots.slice(ix * len + block..(ix + 1) * len).copy_to(&mut bytes);
        Trailer::decode(&bytes)
    };
    (0..slots.len() / len).map(trailer).collect()
}
