//! Bytes on their way through a graph.
//!
//! A [`Data`] is sixteen bytes, cheap to clone and to cut, and stands for shared immutable bytes:
//! pool memory, memory that an element shares (a cache page), zeros, several of these in a row, or
//! *foreign* memory that someone else may change at any time (a guest's). Whoever hashes, encrypts,
//! compares or sends twice calls [`Data::stable`] first.

mod foreign;
mod pool;

pub use foreign::{Foreign, ForeignPart};
pub use pool::{ALIGN, PoolBuf};

use std::ops::Range;
use std::sync::Arc;

/// Shared bytes: at most 4 GiB - 1 in one piece; requests are bounded far below that.
#[derive(Clone, Default)]
pub struct Data {
    /// None stands for zeros.
    chunk: Option<Arc<Chunk>>,
    off: u32,
    len: u32,
}

enum Chunk {
    Pool(pool::Block),
    Shared(Box<dyn AsRef<[u8]> + Send + Sync>),
    Foreign(Foreign),
    /// Pieces in a row, none of them `Parts` itself, with the offset at which each starts.
    Parts(Box<[(u32, Data)]>),
}

/// One contiguous piece of a [`Data`].
#[derive(Clone, Copy)]
pub enum Segment<'a> {
    /// Bytes that do not change.
    Bytes(&'a [u8]),
    /// That many zeros.
    Zeros(usize),
    /// Memory that may change while it is looked at.
    Foreign(ForeignPart<'a>),
}

impl Segment<'_> {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        match self {
            Segment::Bytes(bytes) => bytes.len(),
            Segment::Zeros(len) => *len,
            Segment::Foreign(part) => part.len(),
        }
    }

    /// True if it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("a Data holds less than 4 GiB: requests are limited to 64 MiB")
}

impl Data {
    /// No byte at all.
    pub fn empty() -> Data {
        Data::default()
    }

    /// `len` zeros, without memory. Panics at 4 GiB, as every constructor does.
    pub fn zeros(len: usize) -> Data {
        Data { chunk: None, off: 0, len: length(len) }
    }

    /// Bytes that somebody else owns and nobody changes any more.
    pub fn shared(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Data {
        let len = length(owner.as_ref().len());
        Data { chunk: Some(Arc::new(Chunk::Shared(Box::new(owner)))), off: 0, len }
    }

    /// A copy of `bytes` in pool memory.
    pub fn copy_of(bytes: &[u8]) -> Data {
        let mut buf = PoolBuf::new(bytes.len());
        buf.copy_from_slice(bytes);
        buf.freeze()
    }

    /// Memory that somebody else may change.
    pub fn foreign(foreign: Foreign) -> Data {
        let len = length(foreign.len());
        Data { chunk: Some(Arc::new(Chunk::Foreign(foreign))), off: 0, len }
    }

    fn pool(block: pool::Block, len: usize) -> Data {
        Data { chunk: Some(Arc::new(Chunk::Pool(block))), off: 0, len: length(len) }
    }

    /// The pieces in a row.
    pub fn concat(pieces: impl IntoIterator<Item = Data>) -> Data {
        let mut parts: Vec<(u32, Data)> = Vec::new();
        let mut len = 0usize;
        for piece in pieces {
            piece.for_each_piece(&mut |piece| {
                if piece.len > 0 {
                    parts.push((length(len), piece));
                    len += parts[parts.len() - 1].1.len();
                }
            });
        }
        match parts.len() {
            0 => Data::empty(),
            1 => parts.swap_remove(0).1,
            _ => Data { chunk: Some(Arc::new(Chunk::Parts(parts.into()))), off: 0, len: length(len) },
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// True if it holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of `range`, shared. Panics if the range lies outside.
    pub fn slice(&self, range: Range<usize>) -> Data {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {} bytes", self.len);
        Data {
            chunk: self.chunk.clone(),
            off: self.off + length(range.start),
            len: length(range.end - range.start),
        }
    }

    /// Calls `each` with every piece that is not itself made of pieces.
    fn for_each_piece(&self, each: &mut dyn FnMut(Data)) {
        let Some(Chunk::Parts(parts)) = self.chunk.as_deref() else { return each(self.clone()) };
        let (start, end) = (self.off, self.off + self.len);
        let first = parts.partition_point(|(at, piece)| at + piece.len <= start);
        for (at, piece) in parts[first..].iter().take_while(|(at, _)| *at < end) {
            let from = start.max(*at) - at;
            let to = end.min(at + piece.len) - at;
            each(piece.slice(from as usize..to as usize));
        }
    }

    /// Calls `each` with every contiguous piece, in order.
    pub fn for_each<'a>(&'a self, mut each: impl FnMut(Segment<'a>)) {
        fn visit<'a>(data: &'a Data, from: usize, to: usize, each: &mut dyn FnMut(Segment<'a>)) {
            let (start, end) = (data.off as usize + from, data.off as usize + to);
            match data.chunk.as_deref() {
                None => each(Segment::Zeros(to - from)),
                Some(Chunk::Pool(block)) => each(Segment::Bytes(&block.bytes()[start..end])),
                Some(Chunk::Shared(owner)) => each(Segment::Bytes(&(**owner).as_ref()[start..end])),
                Some(Chunk::Foreign(foreign)) => {
                    foreign.for_each(start..end, |part| each(Segment::Foreign(part)));
                }
                Some(Chunk::Parts(parts)) => {
                    let first = parts.partition_point(|(at, piece)| *at as usize + piece.len() <= start);
                    for (at, piece) in parts[first..].iter().take_while(|(at, _)| (*at as usize) < end) {
                        let at = *at as usize;
                        visit(piece, start.max(at) - at, end.min(at + piece.len()) - at, each);
                    }
                }
            }
        }
        if self.len > 0 {
            visit(self, 0, self.len(), &mut each);
        }
    }

    /// The bytes, if they are in one piece of memory that does not change.
    pub fn as_slice(&self) -> Option<&[u8]> {
        let (start, end) = (self.off as usize, (self.off + self.len) as usize);
        match self.chunk.as_deref() {
            Some(Chunk::Pool(block)) => Some(&block.bytes()[start..end]),
            Some(Chunk::Shared(owner)) => Some(&(**owner).as_ref()[start..end]),
            _ if self.len == 0 => Some(&[]),
            _ => None,
        }
    }

    /// Copies all bytes to `to`. Panics unless it has exactly the same length.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(to.len(), self.len(), "destination of another length");
        let mut at = 0;
        self.for_each(|segment| {
            let to = &mut to[at..at + segment.len()];
            match segment {
                Segment::Bytes(bytes) => to.copy_from_slice(bytes),
                Segment::Zeros(_) => to.fill(0),
                Segment::Foreign(part) => part.copy_to(to),
            }
            at += to.len();
        });
    }

    /// The bytes in a vector of their own.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len()];
        self.copy_to(&mut bytes);
        bytes
    }

    /// The same bytes in one contiguous piece that does not change; shared where that is so already.
    pub fn flatten(&self) -> Data {
        if self.as_slice().is_some() {
            return self.clone();
        }
        let mut buf = PoolBuf::new(self.len());
        self.copy_to(&mut buf);
        buf.freeze()
    }

    /// The bytes, to change: in place if nobody shares them, else in a copy that replaces them.
    pub fn make_mut(&mut self) -> &mut [u8] {
        let range = self.off as usize..(self.off + self.len) as usize;
        let unique = matches!(self.chunk.as_mut().and_then(Arc::get_mut), Some(Chunk::Pool(_)));
        if !unique {
            let mut buf = PoolBuf::new(self.len());
            self.copy_to(&mut buf);
            *self = buf.freeze();
            return self.make_mut();
        }
        match self.chunk.as_mut().and_then(Arc::get_mut) {
            Some(Chunk::Pool(block)) => &mut block.bytes_mut()[range],
            _ => unreachable!("it was made sure above"),
        }
    }

    /// True if somebody else may change the bytes at any time.
    pub fn is_foreign(&self) -> bool {
        match self.chunk.as_deref() {
            Some(Chunk::Foreign(_)) => self.len > 0,
            Some(Chunk::Parts(parts)) => parts.iter().any(|(_, piece)| piece.is_foreign()),
            _ => false,
        }
    }

    /// The same bytes as they are now, in memory that nobody changes: copies foreign memory, shares
    /// everything else.
    pub fn stable(&self) -> Data {
        if self.is_foreign() { self.flatten() } else { self.clone() }
    }

    /// True if it is made of zeros without looking at memory.
    pub fn is_known_zero(&self) -> bool {
        match self.chunk.as_deref() {
            None => true,
            Some(Chunk::Parts(parts)) => parts.iter().all(|(_, piece)| piece.chunk.is_none()),
            _ => false,
        }
    }

    /// True if every byte is zero, looking where need be. Foreign memory may be another an instant later.
    pub fn is_zero(&self) -> bool {
        let mut zero = true;
        self.for_each(|segment| match segment {
            Segment::Zeros(_) => {}
            Segment::Bytes(bytes) => zero = zero && is_zero(bytes),
            Segment::Foreign(part) => zero = zero && part.is_zero(),
        });
        zero
    }

    /// Writes `source` into this foreign memory; a piece of `source` that *is* this memory is left
    /// alone. Returns false, and writes nothing, unless this is foreign memory throughout. Panics if
    /// the lengths differ.
    pub fn fill_from(&self, source: &Data) -> bool {
        assert_eq!(self.len, source.len, "source of another length");
        if let Some(filled) = self.fill_at_once(source) {
            return filled;
        }
        let mut places = Vec::new();
        let mut foreign = true;
        self.for_each(|segment| match segment {
            Segment::Foreign(part) => places.push(part),
            _ => foreign = false,
        });
        if !foreign {
            return false;
        }
        let mut places = places.into_iter();
        let mut place: Option<ForeignPart<'_>> = None;
        source.for_each(|segment| {
            let mut done = 0;
            while done < segment.len() {
                let part = match place.take().filter(|part| !part.is_empty()).or_else(|| places.next()) {
                    Some(part) => part,
                    None => return,
                };
                let n = part.len().min(segment.len() - done);
                let (head, tail) = part.split_at(n);
                head.fill(segment, done);
                place = Some(tail);
                done += n;
            }
        });
        true
    }
}

impl Data {
    /// What most replies come to: it was filled in place, or one piece goes into one piece.
    fn fill_at_once(&self, source: &Data) -> Option<bool> {
        let Some(Chunk::Foreign(foreign)) = self.chunk.as_deref() else { return None };
        let same = |chunk: &Arc<Chunk>| self.chunk.as_ref().is_some_and(|own| Arc::ptr_eq(own, chunk));
        if self.off == source.off && source.chunk.as_ref().is_some_and(same) {
            return Some(true);
        }
        let place = foreign.single(self.off as usize..(self.off + self.len) as usize)?;
        match source.chunk.as_deref() {
            None => place.fill(Segment::Zeros(source.len()), 0),
            Some(Chunk::Pool(_) | Chunk::Shared(_)) => place.fill(Segment::Bytes(source.as_slice()?), 0),
            _ => return None,
        }
        Some(true)
    }
}

/// True if every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // The compiler turns the whole-chunk comparison into vector instructions.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

impl std::fmt::Debug for Data {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.chunk.as_deref() {
            None => "zeros",
            Some(Chunk::Pool(_)) => "pool",
            Some(Chunk::Shared(_)) => "shared",
            Some(Chunk::Foreign(_)) => "foreign",
            Some(Chunk::Parts(_)) => "parts",
        };
        write!(f, "Data({} bytes, {kind})", self.len)
    }
}

impl From<Vec<u8>> for Data {
    fn from(bytes: Vec<u8>) -> Data {
        Data::shared(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A Data and the bytes it stands for.
    #[derive(Clone, Debug)]
    enum Recipe {
        Zeros(usize),
        Pool(Vec<u8>),
        Shared(Vec<u8>),
        Foreign(Vec<u8>, usize),
        Cut(Box<Recipe>, usize, usize),
        Concat(Vec<Recipe>),
    }

    fn make(recipe: &Recipe) -> (Data, Vec<u8>) {
        match recipe {
            Recipe::Zeros(n) => (Data::zeros(*n), vec![0; *n]),
            Recipe::Pool(b) => (Data::copy_of(b), b.clone()),
            Recipe::Shared(b) => (Data::from(b.clone()), b.clone()),
            Recipe::Foreign(b, cut) => (Data::foreign(foreign::test_memory(b, *cut)), b.clone()),
            Recipe::Cut(inner, a, b) => {
                let (data, bytes) = make(inner);
                let (mut a, mut b) = (a % (bytes.len() + 1), b % (bytes.len() + 1));
                if a > b {
                    std::mem::swap(&mut a, &mut b);
                }
                (data.slice(a..b), bytes[a..b].to_vec())
            }
            Recipe::Concat(all) => {
                let made: Vec<_> = all.iter().map(make).collect();
                (
                    Data::concat(made.iter().map(|(data, _)| data.clone())),
                    made.iter().flat_map(|(_, bytes)| bytes.clone()).collect(),
                )
            }
        }
    }

    fn recipe() -> impl Strategy<Value = Recipe> {
        let bytes = || proptest::collection::vec(0u8..3, 0..200);
        prop_oneof![
            (0usize..300).prop_map(Recipe::Zeros),
            bytes().prop_map(Recipe::Pool),
            bytes().prop_map(Recipe::Shared),
            (bytes(), 0usize..100).prop_map(|(b, cut)| Recipe::Foreign(b, cut)),
        ]
        .prop_recursive(4, 24, 5, |inner| {
            prop_oneof![
                (inner.clone(), any::<usize>(), any::<usize>()).prop_map(|(r, a, b)| Recipe::Cut(
                    Box::new(r),
                    a,
                    b
                )),
                proptest::collection::vec(inner, 0..5).prop_map(Recipe::Concat),
            ]
        })
    }

    proptest! {
        #[test]
        fn data_is_the_bytes_it_stands_for(recipe in recipe()) {
            let (data, bytes) = make(&recipe);
            prop_assert_eq!(data.len(), bytes.len());
            prop_assert_eq!(&data.to_vec(), &bytes);
            let flat = data.flatten();
            prop_assert_eq!(flat.as_slice().unwrap(), &bytes[..]);
            prop_assert_eq!(&data.stable().to_vec(), &bytes);
            prop_assert!(!data.stable().is_foreign());
            prop_assert_eq!(data.is_zero(), bytes.iter().all(|b| *b == 0));
            prop_assert!(!data.is_known_zero() || data.is_zero());
            if let Some(slice) = data.as_slice() {
                prop_assert_eq!(slice, &bytes[..]);
            }
        }

        #[test]
        fn filling_foreign_memory(recipe in recipe(), cut in 0usize..200) {
            let (data, bytes) = make(&recipe);
            let target = Data::foreign(foreign::test_memory(&vec![7; bytes.len()], cut));
            prop_assert!(target.fill_from(&data));
            prop_assert_eq!(target.to_vec(), bytes);
        }
    }

    #[test]
    fn what_is_shared_is_copied_when_it_is_changed() {
        let mut data = Data::copy_of(b"abc");
        let at = data.as_slice().unwrap().as_ptr();
        data.make_mut()[0] = b'x';
        assert_eq!(data.as_slice().unwrap().as_ptr(), at, "alone: in place");
        let shared = data.slice(1..3);
        data.make_mut()[1] = b'y';
        assert_eq!((data.to_vec().as_slice(), shared.to_vec().as_slice()), (&b"xyc"[..], &b"bc"[..]));
        let mut zeros = Data::zeros(2);
        zeros.make_mut()[1] = 1;
        assert_eq!(zeros.to_vec(), [0, 1]);
    }

    #[test]
    fn only_foreign_memory_is_filled() {
        let data = Data::copy_of(&[1; 10]);
        assert!(!data.fill_from(&Data::zeros(10)));
        assert_eq!(data.to_vec(), [1; 10]);
    }

    #[test]
    fn filled_in_place_is_left_alone() {
        let memory = Data::foreign(foreign::test_memory(&[5; 4096], 100));
        assert!(memory.fill_from(&memory.clone()));
        assert_eq!(memory.to_vec(), [5; 4096]);
    }

    #[test]
    fn a_stable_copy_does_not_follow_the_guest() {
        let memory = Data::foreign(foreign::test_memory(&[1; 64], 10));
        let copy = memory.stable();
        assert!(memory.fill_from(&Data::copy_of(&[2; 64])));
        assert_eq!(copy.to_vec(), [1; 64]);
        assert_eq!(memory.to_vec(), [2; 64]);
    }

    #[test]
    fn small() {
        assert_eq!(size_of::<Data>(), 16);
    }
}
