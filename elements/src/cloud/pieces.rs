//! Ranges of a disk with what they hold; what is newer covers what is older.

use blockmason::Data;
use std::collections::BTreeMap;
use std::ops::Range;

/// What a range holds.
#[derive(Clone, Debug)]
pub(crate) enum Fill {
    Data(Data),
    Zeros,
}

impl Fill {
    fn part(&self, range: Range<u64>) -> Fill {
        match self {
            Fill::Data(data) => Fill::Data(data.slice(range.start as usize..range.end as usize)),
            Fill::Zeros => Fill::Zeros,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Fill::Data(data) => data.len() as u64,
            Fill::Zeros => 0,
        }
    }

    /// `len` bytes of it.
    pub(crate) fn data(&self, len: u64) -> Data {
        match self {
            Fill::Data(data) => data.clone(),
            Fill::Zeros => Data::zeros(len as usize),
        }
    }
}

/// A range that holds something since a batch.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) len: u64,
    pub(crate) fill: Fill,
    /// The batch that it came with.
    pub(crate) batch: u64,
    /// Bytes of memory that stay in use for it: those of what it was cut from.
    held: u64,
}

/// Pieces that do not overlap, by their offsets.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    pieces: BTreeMap<u64, Piece>,
    /// Of data, in bytes.
    bytes: u64,
}

impl Pieces {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Puts a piece over what is there, and returns the oldest batch of what it covers.
    pub(crate) fn put(&mut self, offset: u64, piece: Piece) -> Option<u64> {
        let range = offset..offset + piece.len;
        let covered = self.touching(range.clone()).map(|(_, piece)| piece.batch).min();
        self.cut(range);
        self.insert(offset, piece);
        covered
    }

    fn insert(&mut self, offset: u64, piece: Piece) {
        if piece.len > 0 {
            self.bytes += piece.fill.bytes();
            self.pieces.insert(offset, piece);
        }
    }

    fn remove(&mut self, offset: u64) -> Option<Piece> {
        let piece = self.pieces.remove(&offset)?;
        self.bytes -= piece.fill.bytes();
        Some(piece)
    }

    /// Takes a range out.
    pub(crate) fn cut(&mut self, range: Range<u64>) {
        self.cut_if(range, |_| true);
    }

    /// Takes out of a range what came with a batch up to this one.
    pub(crate) fn cut_until(&mut self, range: Range<u64>, batch: u64) {
        self.cut_if(range, |piece| piece.batch <= batch);
    }

    fn cut_if(&mut self, range: Range<u64>, which: impl Fn(&Piece) -> bool) {
        let touched: Vec<u64> = self.touching(range.clone()).map(|(offset, _)| offset).collect();
        for offset in touched {
            if !self.pieces.get(&offset).is_some_and(&which) {
                continue;
            }
            let Some(piece) = self.remove(offset) else { continue };
            let end = offset + piece.len;
            for rest in [offset..range.start.max(offset), range.end.min(end)..end] {
                if !rest.is_empty() {
                    self.insert(rest.start, piece.rest(rest.start - offset..rest.end - offset));
                }
            }
        }
    }

    /// Pieces that have a byte in the range, whole.
    fn touching(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Piece)> {
        let before = self.pieces.range(..range.start).next_back();
        let before = before.filter(|(offset, piece)| *offset + piece.len > range.start);
        let within = if range.is_empty() { None } else { Some(self.pieces.range(range)) };
        before.into_iter().chain(within.into_iter().flatten()).map(|(offset, piece)| (*offset, piece))
    }

    /// What the range holds, in order: pieces, and between them gaps.
    pub(crate) fn over(&self, range: Range<u64>) -> Vec<(Range<u64>, Option<Fill>)> {
        let mut found = Vec::new();
        let mut at = range.start;
        for (start, piece) in self.within(range.clone()) {
            if at < start {
                found.push((at..start, None));
            }
            at = start + piece.len;
            found.push((start..at, Some(piece.fill)));
        }
        if at < range.end {
            found.push((at..range.end, None));
        }
        found
    }

    /// True if no byte of the range is missing.
    pub(crate) fn covers(&self, range: Range<u64>) -> bool {
        let mut at = range.start;
        for (offset, piece) in self.touching(range.clone()) {
            if offset > at {
                return false;
            }
            at = offset + piece.len;
        }
        at >= range.end
    }

    /// The batch of the oldest piece.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.pieces.values().map(|piece| piece.batch).min()
    }

    /// All pieces, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &Piece)> {
        self.pieces.iter().map(|(offset, piece)| (*offset, piece))
    }

    /// What lies in the range of pieces, in order.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Piece)> {
        self.touching(range.clone()).map(move |(offset, piece)| {
            let part = offset.max(range.start)..(offset + piece.len).min(range.end);
            let fill = piece.fill.part(part.start - offset..part.end - offset);
            (part.start, Piece { len: part.end - part.start, fill, ..*piece })
        })
    }
}

impl Piece {
    /// `len` bytes, in memory of their own.
    pub(crate) fn new(len: u64, fill: Fill, batch: u64) -> Piece {
        Piece { len, fill, batch, held: len }
    }

    /// A part of it that stays when the rest goes. A small one is copied, or it would keep all the memory of the whole.
    fn rest(&self, range: Range<u64>) -> Piece {
        let len = range.end - range.start;
        match self.fill.part(range) {
            Fill::Data(data) if len * 2 < self.held => {
                Piece::new(len, Fill::Data(Data::copy_of(&data.to_vec())), self.batch)
            }
            fill => Piece { len, fill, ..*self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 64;

    fn holds(pieces: &Pieces) -> Vec<Option<(u8, u64)>> {
        let mut bytes = vec![None; SIZE];
        for (offset, piece) in pieces.iter() {
            let data = piece.fill.data(piece.len).to_vec();
            for (at, byte) in data.into_iter().enumerate() {
                bytes[offset as usize + at] = Some((byte, piece.batch));
            }
        }
        bytes
    }

    #[test]
    fn they_are_what_a_plain_row_of_bytes_is() {
        let mut rng = fastrand::Rng::with_seed(4);
        for _ in 0..300 {
            let (mut pieces, mut plain) = (Pieces::default(), vec![None; SIZE]);
            for batch in 1..40u64 {
                let start = rng.usize(..SIZE);
                let end = rng.usize(start..=SIZE);
                let range = start as u64..end as u64;
                match rng.u8(..5) {
                    0 => {
                        pieces.cut(range.clone());
                        plain[start..end].fill(None);
                    }
                    1 => {
                        let until = rng.u64(..batch);
                        pieces.cut_until(range.clone(), until);
                        let gone = |byte: &Option<(u8, u64)>| byte.is_some_and(|(_, batch)| batch <= until);
                        plain[start..end].iter_mut().filter(|byte| gone(byte)).for_each(|byte| *byte = None);
                    }
                    2 => {
                        pieces.put(range.start, Piece::new(range.end - range.start, Fill::Zeros, batch));
                        plain[start..end].fill(Some((0, batch)));
                    }
                    _ => {
                        let bytes: Vec<u8> = (start..end).map(|_| rng.u8(1..)).collect();
                        let fill = Fill::Data(Data::copy_of(&bytes));
                        pieces.put(range.start, Piece::new(range.end - range.start, fill, batch));
                        for (at, byte) in bytes.into_iter().enumerate() {
                            plain[start + at] = Some((byte, batch));
                        }
                    }
                }
                assert_eq!(holds(&pieces), plain);
                let data = |piece: &Piece| if matches!(piece.fill, Fill::Data(_)) { piece.len } else { 0 };
                assert_eq!(pieces.bytes(), pieces.iter().map(|(_, piece)| data(piece)).sum::<u64>());
                assert_eq!(pieces.covers(range.clone()), plain[start..end].iter().all(Option::is_some));
                assert_eq!(pieces.oldest(), plain.iter().flatten().map(|(_, batch)| *batch).min());
                let over = pieces.over(range.clone());
                assert_eq!(
                    over.iter().map(|(part, _)| part.end - part.start).sum::<u64>(),
                    range.end - range.start
                );
            }
        }
    }
}
