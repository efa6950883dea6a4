//! A snapshot as a stream of bytes: docs/formats/volume-stream.md.

use crate::failure::{Failure, Outcome};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};

const MAGIC: &[u8; 8] = b"MASONVS2";
/// Bytes of a description, at most.
const MOST_TEXT: usize = 64 << 10;
/// Bytes of data of one record, at most.
pub(super) const MOST_DATA: u64 = 1 << 20;
pub(super) const BLOCK: u64 = 4096;
const HEAD: usize = 24;
const SUM: usize = 32;

/// What a stream is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct About {
    pub(super) volume: String,
    pub(super) size: u64,
    pub(super) checksums: bool,
    pub(super) ordered: bool,
    pub(super) snapshot: Taken,
    pub(super) since: Option<Since>,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// The snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Taken {
    pub(super) name: String,
    pub(super) id: String,
    pub(super) made: u64,
}

/// The one that it says the changes since.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Since {
    pub(super) name: String,
    pub(super) id: String,
}

/// What a stream says of a range.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Data { offset: u64, bytes: Vec<u8> },
    Zeros { offset: u64, len: u64 },
}

impl Change {
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        match self {
            Change::Data { offset, bytes } => *offset..offset + bytes.len() as u64,
            Change::Zeros { offset, len } => *offset..offset + len,
        }
    }
}

/// The head of a record, with the checksum of all of it and of what came before it.
fn head(before: [u8; 4], kind: u8, numbers: [u64; 2], data: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[0] = kind;
    head[8..16].copy_from_slice(&numbers[0].to_le_bytes());
    head[16..24].copy_from_slice(&numbers[1].to_le_bytes());
    let mut sum = crc32fast::Hasher::new();
    sum.update(&before);
    sum.update(&head);
    sum.update(data);
    head[4..8].copy_from_slice(&sum.finalize().to_le_bytes());
    head
}

fn checksum(head: &[u8; HEAD]) -> [u8; 4] {
    std::array::from_fn(|ix| head[4 + ix])
}

/// Writes a stream.
pub(super) struct Writer<W> {
    to: W,
    sum: blake3::Hasher,
    /// The checksum of the last record, or of the description.
    last: [u8; 4],
    records: u64,
}

impl<W: Write> Writer<W> {
    pub(super) fn begin(to: W, about: &About) -> Outcome<Writer<W>> {
        let text = serde_json::to_vec(about).map_err(Failure::new)?;
        let last = crc32fast::hash(&text).to_le_bytes();
        let mut writer = Writer { to, sum: blake3::Hasher::new(), last, records: 0 };
        writer.put(MAGIC)?;
        writer.put(&(text.len() as u32).to_le_bytes())?;
        writer.put(&last)?;
        writer.put(&text)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Outcome {
        self.sum.update(bytes);
        self.to
            .write_all(bytes)
            .map_err(|error| Failure::new(format!("the stream cannot be written: {error}")))
    }

    fn record(&mut self, kind: u8, numbers: [u64; 2], data: &[u8]) -> Outcome {
        let head = head(self.last, kind, numbers, data);
        self.last = checksum(&head);
        self.put(&head)?;
        self.put(data)
    }

    pub(super) fn change(&mut self, change: &Change) -> Outcome {
        self.records += 1;
        match change {
            Change::Data { offset, bytes } => self.record(1, [*offset, bytes.len() as u64], bytes),
            Change::Zeros { offset, len } => self.record(2, [*offset, *len], &[]),
        }
    }

    pub(super) fn end(mut self) -> Outcome {
        let sum = *self.sum.finalize().as_bytes();
        self.record(3, [self.records, SUM as u64], &sum)?;
        self.to.flush().map_err(|error| Failure::new(format!("the stream cannot be written: {error}")))
    }
}

/// Reads a stream that may hold anything.
pub(super) struct Reader<R> {
    from: R,
    sum: blake3::Hasher,
    /// As in [`Writer`].
    last: [u8; 4],
    records: u64,
    /// Where the last record ended.
    at: u64,
    /// What has been read is not what was sent, though each record is.
    pub(super) spoilt: bool,
    pub(super) about: About,
}

impl<R: Read> Reader<R> {
    pub(super) fn begin(mut from: R) -> Outcome<Reader<R>> {
        let mut sum = blake3::Hasher::new();
        let magic = take::<8>(&mut from, &mut sum)?;
        if magic != *MAGIC {
            return Err(Failure::new(match magic {
                [b'M', b'A', b'S', b'O', b'N', b'V', b'S', b'1'] => {
                    "the stream is of an older form: have it sent anew, by this program"
                }
                [b'M', b'A', b'S', b'O', b'N', b'V', b'S', _] => {
                    "the stream is of a newer form: a newer program can receive it"
                }
                _ => "this is no stream of a volume",
            }));
        }
        let len = u32::from_le_bytes(take(&mut from, &mut sum)?) as usize;
        let last = take(&mut from, &mut sum)?;
        if len > MOST_TEXT {
            return Err(changed());
        }
        let mut text = vec![0; len];
        fill(&mut from, &mut sum, &mut text)?;
        if crc32fast::hash(&text).to_le_bytes() != last {
            return Err(changed());
        }
        let about: About = serde_json::from_slice(&text)
            .map_err(|_| Failure::new("the stream says of itself what this program does not know"))?;
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK) && bytes <= 1 << 48;
        if !whole(about.size) || !whole(about.offset) || about.offset > about.size {
            return Err(changed());
        }
        let at = about.offset;
        Ok(Reader { from, sum, last, records: 0, at, spoilt: false, about })
    }

    /// The next change; none at the end, when all of it is known to be as it was sent.
    pub(super) fn next(&mut self) -> Outcome<Option<Change>> {
        let before = *self.sum.finalize().as_bytes();
        let bytes = take::<HEAD>(&mut self.from, &mut self.sum)?;
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|ix| bytes[at + ix]));
        let (kind, offset, len) = (bytes[0], number(8), number(16));
        let fits = match kind {
            1 | 2 => {
                let end = offset.checked_add(len).filter(|end| *end <= self.about.size);
                let whole = offset.is_multiple_of(BLOCK) && len.is_multiple_of(BLOCK) && len > 0;
                end.is_some() && whole && offset >= self.at && (kind == 2 || len <= MOST_DATA)
            }
            3 => len == SUM as u64,
            _ => false,
        };
        if !fits {
            return Err(changed());
        }
        let mut data = vec![0; if kind == 2 { 0 } else { len as usize }];
        fill(&mut self.from, &mut self.sum, &mut data)?;
        if head(self.last, kind, [offset, len], &data) != bytes {
            return Err(changed());
        }
        self.last = checksum(&bytes);
        if kind == 3 {
            return self.end(offset, &data, &before).map(|()| None);
        }
        (self.at, self.records) = (offset + len, self.records + 1);
        Ok(Some(match kind {
            1 => Change::Data { offset, bytes: data },
            _ => Change::Zeros { offset, len },
        }))
    }

    /// Reads the rest of it and forgets it.
    pub(super) fn skip(mut self) -> Outcome {
        std::io::copy(&mut self.from, &mut std::io::sink()).map(drop).map_err(|error| unread(&error))
    }

    fn end(&mut self, records: u64, sum: &[u8], before: &[u8]) -> Outcome {
        if records != self.records || sum != before {
            self.spoilt = true;
            return Err(changed());
        }
        match self.from.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(Failure::new("there is something behind the end of the stream")),
            Err(error) => Err(unread(&error)),
        }
    }
}

fn changed() -> Failure {
    Failure::new("the stream has been changed on its way")
}

fn unread(error: &std::io::Error) -> Failure {
    Failure::new(match error.kind() {
        ErrorKind::UnexpectedEof => "the stream ends early".to_owned(),
        _ => format!("the stream cannot be read: {error}"),
    })
}

fn fill(from: &mut impl Read, sum: &mut blake3::Hasher, bytes: &mut [u8]) -> Outcome {
    from.read_exact(bytes).map_err(|error| unread(&error))?;
    sum.update(bytes);
    Ok(())
}

fn take<const N: usize>(from: &mut impl Read, sum: &mut blake3::Hasher) -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    fill(from, sum, &mut bytes).map(|()| bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn about() -> About {
        About {
            volume: "vm1".into(),
            size: 1 << 30,
            checksums: false,
            ordered: true,
            snapshot: Taken { name: "b".into(), id: "0f".repeat(16), made: 7 },
            since: Some(Since { name: "a".into(), id: "1e".repeat(16) }),
            offset: 4096,
            bytes: 12_288,
        }
    }

    fn stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, &about()).ok().unwrap();
        for change in changes() {
            assert!(writer.change(&change).is_ok());
        }
        assert!(writer.end().is_ok());
        bytes
    }

    fn changes() -> [Change; 3] {
        [
            Change::Data { offset: 4096, bytes: vec![5; 8192] },
            Change::Zeros { offset: 1 << 20, len: 1 << 28 },
            Change::Data { offset: (1 << 30) - 4096, bytes: vec![6; 4096] },
        ]
    }

    /// All changes, if the end is reached.
    fn read(bytes: &[u8]) -> Outcome<(About, Vec<Change>)> {
        let mut reader = Reader::begin(bytes)?;
        let mut all = Vec::new();
        while let Some(change) = reader.next()? {
            all.push(change);
        }
        Ok((reader.about, all))
    }

    #[test]
    fn what_was_sent_is_what_comes() {
        let (found, all) = read(&stream()).ok().unwrap();
        assert_eq!((found, &all[..]), (about(), &changes()[..]));
    }

    #[test]
    fn what_is_cut_or_longer_has_no_end() {
        let bytes = stream();
        for len in (0..bytes.len()).step_by(7).chain([bytes.len() - 1]) {
            assert!(read(&bytes[..len]).is_err(), "{len}");
        }
        assert!(read(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_newer_form_is_called_that() {
        let mut bytes = stream();
        bytes[7] = b'3';
        assert!(read(&bytes).err().unwrap().to_string().contains("newer"));
    }

    /// The bytes of a stream: its header, its records, its end.
    fn parts() -> Vec<Vec<u8>> {
        let mut bytes = stream();
        let data = |change: &Change| if let Change::Data { bytes, .. } = change { bytes.len() } else { 0 };
        let records = changes().iter().map(|change| HEAD + data(change)).sum::<usize>();
        let header = bytes.len() - (HEAD + SUM) - records;
        let mut parts = Vec::new();
        for len in [header].into_iter().chain(changes().iter().map(|change| HEAD + data(change))) {
            parts.push(bytes.drain(..len).collect());
        }
        parts.push(bytes);
        parts
    }

    /// What comes out before a failure.
    fn until_it_fails(bytes: &[u8]) -> (Vec<Change>, bool) {
        let mut reader = Reader::begin(bytes).ok().unwrap();
        let mut all = Vec::new();
        loop {
            match reader.next() {
                Ok(Some(change)) => all.push(change),
                Ok(None) => panic!("it is believed"),
                Err(_) => return (all, reader.spoilt),
            }
        }
    }

    #[test]
    fn what_is_missing_or_exchanged_is_noticed_before_what_follows_is_believed() {
        for missing in 1..4 {
            let mut parts = parts();
            parts.remove(missing);
            assert_eq!(
                until_it_fails(&parts.concat()),
                (changes().into_iter().take(missing - 1).collect(), false)
            );
        }
        for first in 1..4 {
            let mut parts = parts();
            parts.swap(first, first + 1);
            assert_eq!(
                until_it_fails(&parts.concat()),
                (changes().into_iter().take(first - 1).collect(), false)
            );
        }
    }

    /// A stream of which each record is right, and all of it is not.
    #[test]
    fn what_only_the_end_notices_is_called_spoilt() {
        let mut bytes = Vec::new();
        let mut writer = Writer::begin(&mut bytes, &about()).ok().unwrap();
        for change in changes() {
            assert!(writer.change(&change).is_ok());
        }
        assert!(writer.record(3, [3, SUM as u64], &[1; SUM]).is_ok());
        assert_eq!(until_it_fails(&bytes), (changes().into(), true));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
        #[test]
        fn no_flipped_bit_is_believed(at in 0usize..13_000, bit in 0u8..8) {
            let mut bytes = stream();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(read(&bytes).is_err());
        }

        /// Whatever is there: no panic, and no more memory than there are bytes.
        #[test]
        fn any_bytes_end_in_words(mut bytes in prop::collection::vec(any::<u8>(), 0..600), like in any::<bool>()) {
            if like {
                bytes.splice(..0, stream().into_iter().take(300));
            }
            prop_assert!(read(&bytes).is_err());
        }

        /// Records that are well formed, in whatever order: what comes out is in order and inside.
        #[test]
        fn records_out_of_order_are_refused(places in prop::collection::vec((0u64..300_000, 1u64..5), 1..6)) {
            let mut bytes = Vec::new();
            let mut writer = Writer::begin(&mut bytes, &about()).ok().unwrap();
            for (block, blocks) in &places {
                let change = Change::Zeros { offset: block * BLOCK, len: blocks * BLOCK };
                prop_assert!(writer.change(&change).is_ok());
            }
            prop_assert!(writer.end().is_ok());
            let mut at = 1;
            let sound = places.iter().all(|(block, blocks)| {
                let before = std::mem::replace(&mut at, block + blocks);
                *block >= before && at <= (1 << 30) / BLOCK
            });
            prop_assert_eq!(read(&bytes).is_ok(), sound);
        }
    }
}
