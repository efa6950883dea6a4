//! What the objects of a volume in a bucket are: docs/formats/bucket.md. Every decoder takes hostile bytes.

use blockmason::{Data, Error, Kind, Result};
use serde::{Deserialize, Serialize};

/// A volume's id.
pub(crate) type Id = [u8; 16];

/// Versions in a part of the map.
pub(crate) const PART: u64 = 8192;

/// The largest checkpoint, commit or part that is read; a commit has at most 32 MiB of data.
pub(crate) const LARGEST: u64 = 96 << 20;

/// Bytes of what ends a chain; a commit and a checkpoint have more.
pub(crate) const END_LEN: u64 = 44;

/// How many epochs and objects of an epoch a version has room for.
const EPOCHS: u64 = 1 << 24;
const OBJECTS: u64 = 1 << 40;

/// The name of what the volume is to be read by.
const FORMAT: &str = "mason-bucket";

/// The same of a backup.
const BACKUP_FORMAT: &str = "mason-bucket-backup";

/// `volume`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    format: String,
    version: u32,
    pub(crate) id: String,
    pub(crate) size: u64,
    pub(crate) block: u64,
    pub(crate) created: u64,
    pub(crate) fenced: bool,
    features: Vec<String>,
}

impl Description {
    pub(crate) fn new(id: Id, size: u64, block: u64, created: u64, fenced: bool) -> Description {
        let (format, features) = (FORMAT.to_owned(), Vec::new());
        Description { format, version: 1, id: hex(&id), size, block, created, fenced, features }
    }

    /// # Errors
    /// It is another program's, a newer one's, or damaged.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Description> {
        let foreign = |error| Error::invalid("what is there is no volume of Block Mason").with_source(error);
        let found: Description = serde_json::from_slice(bytes).map_err(foreign)?;
        if found.format != FORMAT {
            return Err(Error::invalid("what is there is no volume of Block Mason"));
        }
        if found.version != 1 || !found.features.is_empty() {
            let message = format!(
                "the volume is of format {} with {:?}: a newer program has made it",
                found.version, found.features
            );
            return Err(Error::unsupported(message));
        }
        found.check()?;
        Ok(found)
    }

    /// # Errors
    /// Sizes that no volume has.
    pub(crate) fn check(&self) -> Result<()> {
        if !(BLOCKS.contains(&self.block) && (1..=MAX_SIZE).contains(&self.size)) {
            let message = format!("a disk of {} bytes in blocks of {} cannot be", self.size, self.block);
            return Err(Error::invalid(message));
        }
        self.id().map(|_| ())
    }

    /// The same volume with another size.
    pub(crate) fn sized(&self, size: u64) -> Description {
        Description { size, ..self.clone() }
    }

    pub(crate) fn id(&self) -> Result<Id> {
        unhex(&self.id).ok_or_else(|| Error::invalid("the volume's id is damaged"))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }
}

/// `backup`: what a backup is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backup {
    format: String,
    version: u32,
    volume: Description,
}

impl Backup {
    pub(crate) fn of(volume: Description) -> Backup {
        Backup { format: BACKUP_FORMAT.to_owned(), version: 1, volume }
    }

    /// # Errors
    /// It is another program's, a newer one's, or damaged.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Description> {
        let foreign = || Error::invalid("what is there is no backup of a volume of Block Mason");
        let found: Backup = serde_json::from_slice(bytes).map_err(|error| foreign().with_source(error))?;
        if found.format != BACKUP_FORMAT {
            return Err(foreign());
        }
        if found.version != 1 {
            let message = format!("the backup is of format {}: a newer program has made it", found.version);
            return Err(Error::unsupported(message));
        }
        Description::decode(&found.volume.encode())
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }
}

/// `point/<~number>`: a volume at one commit, as a backup has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Point {
    /// That of the run that made it.
    pub(crate) number: u64,
    /// Seconds since 1970: the volume is not older.
    pub(crate) time: u64,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Of the checkpoint.
    pub(crate) epoch: u64,
    pub(crate) n: u64,
    /// The last commit of that epoch that belongs to it.
    pub(crate) commit: u64,
}

impl Point {
    /// # Errors
    /// It is damaged, or not the one that its key says.
    pub(crate) fn decode(bytes: &[u8], number: u64) -> Result<Point> {
        let damaged = || Error::new(Kind::Io, "the point is damaged");
        let found: Point = serde_json::from_slice(bytes).map_err(|error| damaged().with_source(error))?;
        let fits = found.number == number && (1..=MAX_SIZE).contains(&found.size);
        if fits { Ok(found) } else { Err(damaged()) }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }
}

/// The most commits that one checkpoint or point leads to: far more than are ever left.
pub(crate) const SPANNED: u64 = 1 << 16;

/// Block sizes that there may be, in bytes.
pub(crate) const BLOCKS: std::ops::RangeInclusive<u64> = 4096..=16 << 20;

/// The largest disk, 256 TiB.
pub(crate) const MAX_SIZE: u64 = 256 << 40;

/// `claim/<~epoch>`: who has opened the volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Claim {
    pub(crate) epoch: u64,
    /// What names the host, for people.
    pub(crate) host: String,
    /// What tells one host from another.
    pub(crate) machine: String,
    pub(crate) process: u32,
    /// What tells it from another process that has that number on that machine.
    pub(crate) born: String,
    /// Seconds since 1970.
    pub(crate) time: u64,
}

/// A version: which open made it, and its number there.
pub(crate) fn version(epoch: u64, n: u64) -> Result<u64> {
    if epoch >= EPOCHS || n >= OBJECTS {
        return Err(Error::new(
            Kind::NoSpace,
            "the volume has been opened or written too often for its format",
        ));
    }
    Ok(epoch * OBJECTS + n)
}

/// A checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) epoch: u64,
    pub(crate) n: u64,
    pub(crate) size: u64,
    pub(crate) done: u64,
    pub(crate) next: u64,
    pub(crate) serial: u64,
    pub(crate) closed: bool,
    /// Commits of earlier epochs that are not in the map.
    pub(crate) replays: Vec<Span>,
    pub(crate) parts: Vec<(u64, u64)>,
    /// What may be deleted, and perhaps is: commits, parts, blocks.
    pub(crate) gone: Gone,
}

/// What nothing leads to any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gone {
    pub(crate) wals: Vec<Span>,
    pub(crate) parts: Vec<(u64, u64)>,
    pub(crate) blocks: Vec<(u64, u64)>,
}

/// Commits of an epoch, from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) epoch: u64,
    pub(crate) first: u64,
    pub(crate) last: u64,
}

/// One entry of a commit.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// Bytes of the disk.
    Piece { offset: u64, data: Data },
    /// Bytes of the disk that read as zeros.
    Zeros { offset: u64, len: u64 },
    /// A block has a new object.
    Block { block: u64, version: u64 },
}

/// A commit.
#[derive(Clone, Debug, Default)]
pub(crate) struct Commit {
    pub(crate) epoch: u64,
    pub(crate) n: u64,
    pub(crate) serial: u64,
    pub(crate) entries: Vec<Entry>,
}

/// What ends a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) epoch: u64,
    pub(crate) by: u64,
}

/// What is found in a place of a chain.
#[derive(Debug)]
pub(crate) enum Link<T> {
    One(T),
    /// Its owner may not go on.
    End,
}

const MAP: &[u8; 8] = b"MASONMAP";
const PRT: &[u8; 8] = b"MASONPRT";
const WAL: &[u8; 8] = b"MASONWAL";
const END: &[u8; 8] = b"MASONEND";
const HEADER: usize = 28;

impl Checkpoint {
    pub(crate) fn encode(&self, id: Id) -> Vec<u8> {
        let mut to = Writer::new(MAP, id);
        to.u64s(&[self.epoch, self.n, self.size, self.done, self.next, self.serial]);
        to.u32(u32::from(self.closed));
        for spans in [&self.replays, &self.gone.wals] {
            to.u32(spans.len() as u32);
            for span in spans {
                to.u64s(&[span.epoch, span.first, span.last]);
            }
        }
        for list in [&self.parts, &self.gone.parts, &self.gone.blocks] {
            to.u32(list.len() as u32);
            for (a, b) in list {
                to.u64s(&[*a, *b]);
            }
        }
        to.sealed()
    }

    pub(crate) fn decode(bytes: &[u8], id: Id) -> Result<Link<Checkpoint>> {
        if End::decode(bytes, id)?.is_some() {
            return Ok(Link::End);
        }
        let mut from = Reader::new(bytes, MAP, id)?;
        let found = from.checkpoint().filter(|_| from.0.is_empty());
        found.map(Link::One).ok_or_else(|| damaged("a checkpoint"))
    }
}

impl Commit {
    pub(crate) fn encode(&self, id: Id) -> Vec<u8> {
        let mut to = Writer::new(WAL, id);
        to.u64s(&[self.epoch, self.n, self.serial]);
        to.u32(self.entries.len() as u32);
        for entry in &self.entries {
            match entry {
                Entry::Piece { offset, data } => {
                    to.0.push(1);
                    to.u64s(&[*offset]);
                    to.u32(data.len() as u32);
                }
                Entry::Zeros { offset, len } => {
                    to.0.push(2);
                    to.u64s(&[*offset, *len]);
                }
                Entry::Block { block, version } => {
                    to.0.push(3);
                    to.u64s(&[*block, *version]);
                }
            }
        }
        for entry in &self.entries {
            if let Entry::Piece { data, .. } = entry {
                let at = to.0.len();
                to.0.resize(at + data.len(), 0);
                data.copy_to(&mut to.0[at..]);
            }
        }
        to.sealed()
    }

    /// The pieces share `bytes`. `size` is the disk's: what lies beyond it is damage.
    pub(crate) fn decode(bytes: &Data, id: Id, size: u64) -> Result<Link<Commit>> {
        let bytes = bytes.flatten();
        let slice = bytes.as_slice().unwrap_or_default();
        if End::decode(slice, id)?.is_some() {
            return Ok(Link::End);
        }
        let mut from = Reader::new(slice, WAL, id)?;
        let found = from.commit(&bytes, size).filter(|_| from.0.is_empty());
        found.map(Link::One).ok_or_else(|| damaged("a commit"))
    }
}

impl End {
    pub(crate) fn encode(self, id: Id) -> Vec<u8> {
        let mut to = Writer::new(END, id);
        to.u64s(&[self.epoch, self.by]);
        to.sealed()
    }

    fn decode(bytes: &[u8], id: Id) -> Result<Option<End>> {
        if !bytes.starts_with(END) {
            return Ok(None);
        }
        let mut from = Reader::new(bytes, END, id)?;
        let found = from.u64().zip(from.u64()).filter(|_| from.0.is_empty());
        found.map(|(epoch, by)| Some(End { epoch, by })).ok_or_else(|| damaged("an end"))
    }
}

/// A part of the map, whose number is `part`.
pub(crate) fn encode_part(id: Id, part: u64, versions: &[u64]) -> Vec<u8> {
    let mut to = Writer::new(PRT, id);
    to.u64s(&[part]);
    to.u64s(versions);
    to.sealed()
}

/// The versions of a part, [`PART`] of them.
pub(crate) fn decode_part(bytes: &[u8], id: Id, part: u64) -> Result<Vec<u64>> {
    let mut from = Reader::new(bytes, PRT, id)?;
    if from.u64() != Some(part) || from.0.len() != PART as usize * 8 {
        return Err(damaged("a part of the map"));
    }
    Ok(from.0.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
}

/// A checkpoint, part or commit of another volume.
///
/// # Errors
/// It is damaged, or not of the volume `from`.
pub(crate) fn renamed(bytes: &[u8], from: Id, to: Id) -> Result<Vec<u8>> {
    let magic = bytes.first_chunk().ok_or_else(|| damaged("an object"))?;
    let body = Reader::new(bytes, magic, from)?;
    let mut renamed = Writer::new(magic, to);
    renamed.0.extend_from_slice(body.0);
    Ok(renamed.sealed())
}

fn damaged(what: &str) -> Error {
    Error::new(Kind::Io, format!("{what} is damaged"))
}

struct Writer(Vec<u8>);

impl Writer {
    fn new(magic: &[u8; 8], id: Id) -> Writer {
        let mut bytes = magic.to_vec();
        bytes.extend([0; 4]);
        bytes.extend(id);
        Writer(bytes)
    }

    fn u32(&mut self, number: u32) {
        self.0.extend(number.to_le_bytes());
    }

    fn u64s(&mut self, numbers: &[u64]) {
        self.0.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    }

    fn sealed(mut self) -> Vec<u8> {
        let sum = crc32fast::hash(&self.0[12..]);
        self.0[8..12].copy_from_slice(&sum.to_le_bytes());
        self.0
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8], magic: &[u8; 8], id: Id) -> Result<Reader<'a>> {
        let what = String::from_utf8_lossy(magic);
        if bytes.len() < HEADER || !bytes.starts_with(magic) {
            return Err(damaged(&format!("an object {what}")));
        }
        if bytes[8..12] != crc32fast::hash(&bytes[12..]).to_le_bytes() {
            return Err(damaged(&format!("an object {what}")));
        }
        if bytes[12..HEADER] != id {
            return Err(Error::invalid(format!("an object {what} is of another volume")));
        }
        Ok(Reader(&bytes[HEADER..]))
    }

    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// A list whose length comes first: never longer than what is left says that it can be.
    fn list<T>(&mut self, each: impl Fn(&mut Self) -> Option<T>, size: usize) -> Option<Vec<T>> {
        let count = self.u32()? as usize;
        if count > self.0.len() / size {
            return None;
        }
        (0..count).map(|_| each(self)).collect()
    }

    fn pairs(&mut self) -> Option<Vec<(u64, u64)>> {
        self.list(|from| from.u64().zip(from.u64()), 16)
    }

    fn spans(&mut self) -> Option<Vec<Span>> {
        let span = |from: &mut Self| Some(Span { epoch: from.u64()?, first: from.u64()?, last: from.u64()? });
        let spans = self.list(span, 24).filter(|spans| spans.iter().all(|span| span.first <= span.last))?;
        // Whoever reads it asks for each of them.
        let count = |sum: u64, span: &Span| sum.saturating_add((span.last - span.first).saturating_add(1));
        (spans.iter().fold(0, count) <= SPANNED).then_some(spans)
    }

    fn checkpoint(&mut self) -> Option<Checkpoint> {
        let mut found = Checkpoint {
            epoch: self.u64().filter(|epoch| *epoch < EPOCHS)?,
            n: self.u64().filter(|n| *n < OBJECTS)?,
            size: self.u64().filter(|size| (1..=MAX_SIZE).contains(size))?,
            done: self.u64().filter(|n| *n < OBJECTS)?,
            next: self.u64()?,
            serial: self.u64()?,
            ..Checkpoint::default()
        };
        found.closed = self.u32().filter(|flags| *flags <= 1)? == 1;
        found.replays = self.spans()?;
        found.gone.wals = self.spans()?;
        found.parts = self.pairs()?;
        found.gone.parts = self.pairs()?;
        found.gone.blocks = self.pairs()?;
        found.parts.is_sorted_by(|a, b| a.0 < b.0).then_some(found)
    }

    fn commit(&mut self, bytes: &Data, size: u64) -> Option<Commit> {
        let mut found =
            Commit { epoch: self.u64()?, n: self.u64()?, serial: self.u64()?, entries: Vec::new() };
        let inside = |offset: u64, len: u64| {
            let end = offset.checked_add(len).filter(|end| *end <= size && len > 0);
            end.map(|_| ())
        };
        let mut lens = Vec::new();
        let entry = |from: &mut Self| {
            Some(match from.take::<1>()?[0] {
                1 => (1, from.u64()?, u64::from(from.u32()?)),
                2 => (2, from.u64()?, from.u64()?),
                3 => (3, from.u64()?, from.u64()?),
                _ => return None,
            })
        };
        for (kind, a, b) in self.list(entry, 13)? {
            if kind != 3 {
                inside(a, b)?;
            }
            lens.push((kind, a, b));
        }
        for (kind, a, b) in lens {
            found.entries.push(match kind {
                1 => {
                    let at = bytes.len() - self.0.len();
                    self.0 = self.0.get(b as usize..)?;
                    Entry::Piece { offset: a, data: bytes.slice(at..at + b as usize) }
                }
                2 => Entry::Zeros { offset: a, len: b },
                _ => Entry::Block { block: a, version: b },
            });
        }
        Some(found)
    }
}

/// Hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The id of 32 hexadecimal digits.
pub(crate) fn unhex(text: &str) -> Option<Id> {
    let sound = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    sound.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: Id = [7; 16];

    fn commit() -> Commit {
        let entries = vec![
            Entry::Piece { offset: 4096, data: Data::copy_of(b"abc") },
            Entry::Zeros { offset: 0, len: 4096 },
            Entry::Block { block: 3, version: 9 },
            Entry::Piece { offset: 1, data: Data::copy_of(b"defgh") },
        ];
        Commit { epoch: 1, n: 2, serial: 3, entries }
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            epoch: 1,
            n: 2,
            size: 1 << 30,
            done: 3,
            next: 4,
            serial: 5,
            closed: true,
            replays: vec![Span { epoch: 1, first: 2, last: 3 }],
            parts: vec![(0, 5), (7, 6)],
            gone: Gone {
                wals: vec![Span { epoch: 1, first: 1, last: 1 }],
                parts: vec![(3, 1)],
                blocks: vec![(9, 9), (8, 8)],
            },
        }
    }

    fn decoded(bytes: &[u8]) -> Result<Link<Commit>> {
        Commit::decode(&Data::copy_of(bytes), ID, 1 << 20)
    }

    #[test]
    fn what_is_written_is_read() {
        assert!(
            matches!(decoded(&commit().encode(ID)), Ok(Link::One(found)) if found.encode(ID) == commit().encode(ID))
        );
        assert!(
            matches!(Checkpoint::decode(&checkpoint().encode(ID), ID), Ok(Link::One(found)) if found == checkpoint())
        );
        let end = End { epoch: 3, by: 4 };
        assert!(matches!(decoded(&end.encode(ID)), Ok(Link::End)));
        assert!(matches!(Checkpoint::decode(&end.encode(ID), ID), Ok(Link::End)));
        assert_eq!(End::decode(&end.encode(ID), ID).unwrap(), Some(end));
        let versions: Vec<u64> = (0..PART).collect();
        assert_eq!(decode_part(&encode_part(ID, 3, &versions), ID, 3).unwrap(), versions);
        assert!(decode_part(&encode_part(ID, 3, &versions), ID, 4).is_err());
        let description = Description::new(ID, 1 << 30, 1 << 20, 9, true);
        assert_eq!(Description::decode(&description.encode()).unwrap(), description);
        let point = Point { number: 3, time: 9, size: 1 << 30, epoch: 1, n: 2, commit: 4 };
        assert_eq!(Point::decode(&point.encode(), 3).unwrap(), point);
        assert!(Point::decode(&point.encode(), 4).is_err());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        for bytes in [commit().encode(ID), checkpoint().encode(ID)] {
            let whole = |bytes: &[u8]| decoded(bytes).is_ok() || Checkpoint::decode(bytes, ID).is_ok();
            assert!(whole(&bytes));
            for at in 0..bytes.len() * 8 {
                let mut bytes = bytes.clone();
                bytes[at / 8] ^= 1 << (at % 8);
                assert!(!whole(&bytes), "bit {at}");
            }
            assert!((0..bytes.len()).all(|len| !whole(&bytes[..len])));
        }
    }

    #[test]
    fn what_is_foreign_or_newer_says_so() {
        let other = Commit::decode(&Data::copy_of(&commit().encode([1; 16])), ID, 1 << 20).unwrap_err();
        assert!(other.to_string().contains("another volume"), "{other}");
        assert!(Description::decode(b"<html>").unwrap_err().to_string().contains("no volume"));
        let newer = String::from_utf8(Description::new(ID, 1 << 30, 1 << 20, 9, true).encode()).unwrap();
        let newer = newer.replace("\"version\": 1", "\"version\": 2");
        assert_eq!(Description::decode(newer.as_bytes()).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn nobody_asks_for_commits_without_end() {
        for last in [SPANNED, u64::MAX] {
            let spans = match last {
                SPANNED => vec![Span { epoch: 1, first: 0, last: 0 }; SPANNED as usize + 1],
                _ => vec![Span { epoch: 1, first: 0, last }],
            };
            let replays = Checkpoint { replays: spans.clone(), ..checkpoint() };
            let gone = Checkpoint { gone: Gone { wals: spans, ..Gone::default() }, ..checkpoint() };
            for found in [replays, gone, Checkpoint { done: OBJECTS, ..checkpoint() }] {
                assert!(Checkpoint::decode(&found.encode(ID), ID).is_err());
            }
        }
    }

    proptest! {
        /// Bodies that no program writes, under a CRC that is right.
        #[test]
        fn hostile_bodies_are_decoded_or_refused(body in proptest::collection::vec(any::<u8>(), 0..300), small in any::<bool>()) {
            for magic in [MAP, WAL, END, PRT] {
                let mut to = Writer::new(magic, ID);
                if small {
                    to.0.extend(body.iter().map(|byte| byte & 3));
                } else {
                    to.0.extend(&body);
                }
                let bytes = to.sealed();
                if let Ok(Link::One(found)) = decoded(&bytes) {
                    prop_assert_eq!(found.encode(ID), bytes.clone());
                }
                if let Ok(Link::One(found)) = Checkpoint::decode(&bytes, ID) {
                    prop_assert_eq!(found.encode(ID), bytes.clone());
                }
                let _ = decode_part(&bytes, ID, 0);
            }
        }
    }
}
