//! One request to several out ports, and one reply of theirs: what elements with many children share.

use super::Cx;
use crate::data::Data;
use crate::element::{Children, Flow};
use crate::error::{Error, Result};
use crate::geometry::{Geometry, Ops};
use crate::request::{Answer, Extent, Flags, Op, Reply, Request, join_extents};
use futures::future::join_all;
use std::ops::Range;

/// A run of bytes of one child that belongs to a request.
///
/// It may be scattered over the request: the child's bytes up to the next multiple of `chunk` follow
/// each other there too, and every further chunk comes after `skip` bytes of other children.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The out port.
    pub port: usize,
    /// Where the run begins on the child.
    pub offset: u64,
    /// Bytes of the run, not 0.
    pub len: u64,
    /// Where its first byte is in the request, counted from the request's offset.
    pub from: u64,
    chunk: u64,
    skip: u64,
}

impl Part {
    /// A run that is in one piece in the request.
    pub fn new(port: usize, offset: u64, len: u64, from: u64) -> Part {
        Part { port, offset, len, from, chunk: u64::MAX, skip: 0 }
    }

    /// The same run in chunks: after each multiple of `chunk` on the child, `skip` bytes of the
    /// request belong to others.
    pub fn striped(self, chunk: u64, skip: u64) -> Part {
        Part { chunk, skip, ..self }
    }

    /// The pieces of the request that it is made of, in order.
    fn pieces(self) -> impl Iterator<Item = Range<u64>> {
        let (mut at, end, mut from) = (self.offset, self.offset + self.len, self.from);
        std::iter::from_fn(move || {
            let len = (self.chunk - at % self.chunk).min(end - at);
            let piece = from..from + len;
            at += len;
            from = piece.end + self.skip;
            (len > 0).then_some(piece)
        })
    }

    /// This part of `req`, with its payload or destination.
    fn cut(self, req: &Request) -> Request {
        let mut part = req.clone();
        if !req.data.is_empty() {
            let slice = |piece: Range<u64>| req.data.slice(piece.start as usize..piece.end as usize);
            part.data = Data::concat(self.pieces().map(slice));
        }
        (part.offset, part.len) = (self.offset, self.len);
        part
    }
}

impl<'a> Cx<'a> {
    /// Sends the parts of `req` down at once and answers with what they answer together. The parts
    /// are in the order of their first bytes and cover the request without overlap.
    ///
    /// Every part runs to its end, also when another fails; the error of the first one that fails, in
    /// their order, is the reply. A `FAST_ONLY` request is refused before anything changes if the
    /// element's geometry does not promise it ([`Children::united`]).
    pub fn scatter(self, req: &Request, parts: impl IntoIterator<Item = Part>) -> Flow<'a> {
        self.scatter_by(req, parts, |port, part| self.forward(port, part))
    }

    /// As [`Cx::scatter`], with a say in what becomes of each part: `send` is given its port and
    /// request.
    pub fn scatter_by(
        self,
        req: &Request,
        parts: impl IntoIterator<Item = Part>,
        mut send: impl FnMut(usize, Request) -> Flow<'a>,
    ) -> Flow<'a> {
        if req.flags.has(Flags::FAST_ONLY) && !self.geometry().ops.fast_zero {
            return self.fail(req, Error::unsupported("writing zeros is not fast on all of the range"));
        }
        let (op, issued) = (req.op, super::depends::issue(req));
        let parts: Vec<Part> = parts.into_iter().collect();
        let flows = parts.iter().map(|part| send(part.port, self.child(&part.cut(req)))).collect();
        issued.over(gather(flows, move |answers| match op {
            Op::Read => read(&parts, answers),
            Op::Extents => extents(&parts, answers),
            Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Control => {
                Ok(Answer::Done)
            }
        }))
    }

    /// Sends `req` as it is to every out port at once: a flush, a control request. All run to their
    /// end; the error of the first port that fails is the reply. Control texts must agree, or the
    /// reply is [`crate::Kind::Unsupported`].
    pub fn broadcast(self, req: Request) -> Flow<'a> {
        if self.outs() == 1 {
            return self.forward(0, req);
        }
        let issued = super::depends::issue(&req);
        issued
            .over(gather((0..self.outs()).map(|port| self.forward(port, self.child(&req))).collect(), agreed))
    }
}

impl Children<'_> {
    /// What an element that [scatters](Cx::scatter) requests over all of its children looks like: each
    /// operation that one of them does is of use, since the edges to the others do it by other means;
    /// zeros are only as fast as on the slowest, and what is sent to several is never atomic. The size is `size`.
    pub fn united(&self, size: u64) -> Geometry {
        let mut ops = Ops { fast_zero: true, ..Ops::NONE };
        for child in self.iter().map(|geometry| geometry.ops) {
            ops.discard |= child.discard;
            ops.write_zeroes |= child.write_zeroes;
            ops.fast_zero &= child.fast_zero && child.write_zeroes;
            ops.cache |= child.cache;
            ops.extents |= child.extents;
        }
        let met = self.iter().reduce(Geometry::meet).unwrap_or(Geometry::new(0));
        Geometry { size, ops, atomic: 0, ..met.above() }
    }
}

/// Waits for all flows, at once without waiting where all are answered.
fn gather<'a>(flows: Vec<Flow<'a>>, merge: impl FnOnce(Vec<Answer>) -> Reply + 'a) -> Flow<'a> {
    if flows.iter().any(|flow| matches!(flow, Flow::Later(_))) {
        return Flow::later(async move {
            let replies = join_all(flows).await;
            merge(replies.into_iter().collect::<Result<_>>()?)
        });
    }
    let replies = flows.into_iter().filter_map(|flow| match flow {
        Flow::Now(reply) => Some(reply),
        Flow::Later(_) => None,
    });
    Flow::Now(replies.collect::<Result<_>>().and_then(merge))
}

fn read(parts: &[Part], answers: Vec<Answer>) -> Reply {
    let mut pieces = Vec::with_capacity(parts.len());
    for (part, answer) in parts.iter().zip(answers) {
        let data = answer.into_data()?;
        if data.len() as u64 != part.len {
            let message = format!("{} bytes answer a read of {}", data.len(), part.len);
            return Err(Error::internal(message));
        }
        let mut done = 0;
        for piece in part.pieces() {
            let len = (piece.end - piece.start) as usize;
            pieces.push((piece.start, data.slice(done..done + len)));
            done += len;
        }
    }
    pieces.sort_by_key(|(from, _)| *from);
    Ok(Answer::Data(Data::concat(pieces.into_iter().map(|(_, data)| data))))
}

/// Joins the extents up to the first gap: a child may answer for less than it was asked.
fn extents(parts: &[Part], answers: Vec<Answer>) -> Reply {
    let mut pieces = Vec::new();
    for (part, answer) in parts.iter().zip(answers) {
        let mut known = answer.into_extents()?.into_iter();
        let mut current = known.next();
        for mut piece in part.pieces() {
            while let Some(extent) = current.as_mut().filter(|_| !piece.is_empty()) {
                let len = extent.len.min(piece.end - piece.start);
                pieces.push((piece.start, Extent { len, ..*extent }));
                (piece.start, extent.len) = (piece.start + len, extent.len - len);
                if extent.len == 0 {
                    current = known.next();
                }
            }
        }
    }
    pieces.sort_by_key(|(from, _)| *from);
    let mut end = 0;
    let whole = pieces.into_iter().take_while(|(from, extent)| {
        let follows = *from == end;
        end += extent.len;
        follows
    });
    Ok(Answer::Extents(join_extents(whole.map(|(_, extent)| extent).collect())))
}

/// The one answer that all give.
fn agreed(answers: Vec<Answer>) -> Reply {
    let mut answers = answers.into_iter();
    let first = answers.next().unwrap_or(Answer::Done);
    let same = answers.all(|answer| match (&first, &answer) {
        (Answer::Done, Answer::Done) => true,
        (Answer::Text(a), Answer::Text(b)) => a == b,
        _ => false,
    });
    if same { Ok(first) } else { Err(Error::unsupported("the disks below do not answer this alike")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::ExtentState;
    use proptest::prelude::*;

    /// The run of child `port` of `count` within a striped request, found byte by byte.
    fn naive(count: u64, chunk: u64, port: u64, range: Range<u64>) -> Vec<(u64, u64)> {
        let mine = |at: &u64| at / chunk % count == port;
        let child = |at: u64| at / (chunk * count) * chunk + at % chunk;
        range.clone().filter(mine).map(|at| (at - range.start, child(at))).collect()
    }

    fn part_of(bytes: &[(u64, u64)], port: usize, chunk: u64, skip: u64) -> Part {
        Part::new(port, bytes[0].1, bytes.len() as u64, bytes[0].0).striped(chunk, skip)
    }

    proptest! {
        #[test]
        fn pieces_are_the_bytes_of_the_run(count in 1u64..5, chunk in 1u64..9, start in 0u64..60, len in 1u64..80) {
            for port in 0..count {
                let bytes = naive(count, chunk, port, start..start + len);
                if bytes.is_empty() {
                    continue;
                }
                let part = part_of(&bytes, port as usize, chunk, (count - 1) * chunk);
                let found: Vec<u64> = part.pieces().flatten().collect();
                let wanted: Vec<u64> = bytes.iter().map(|(from, _)| *from).collect();
                prop_assert_eq!(found, wanted);
            }
        }

        #[test]
        fn what_is_cut_is_put_together_again(count in 1u64..5, chunk in 1u64..9, start in 0u64..60, len in 1u64..80) {
            let bytes: Vec<u8> = (0..len as u8).collect();
            let write = Request::write(start, Data::copy_of(&bytes));
            let parts: Vec<Part> = (0..count)
                .map(|port| (port as usize, naive(count, chunk, port, start..start + len)))
                .filter(|(_, bytes)| !bytes.is_empty())
                .map(|(port, bytes)| part_of(&bytes, port, chunk, (count - 1) * chunk))
                .collect();
            let cut = |part: &Part| Answer::Data(part.cut(&write).data);
            let whole = read(&parts, parts.iter().map(cut).collect()).unwrap().into_data().unwrap();
            prop_assert_eq!(whole.to_vec(), bytes);

            // Extents of one byte each, dirty by the byte's parity.
            let state = |byte: &u8| ExtentState { dirty: byte % 2 == 1, ..ExtentState::DATA };
            let known = |part: &Part| part.cut(&write).data.to_vec().iter().map(|b| Extent { len: 1, state: state(b) }).collect();
            let answers = parts.iter().map(|part| Answer::Extents(known(part))).collect();
            let found = extents(&parts, answers).unwrap().into_extents().unwrap();
            prop_assert_eq!(found.iter().map(|extent| extent.len).sum::<u64>(), len);
            prop_assert!(found.iter().enumerate().all(|(ix, extent)| extent.len == 1 && extent.state == state(&(ix as u8))));
        }
    }

    #[test]
    fn extents_end_at_the_first_gap_and_at_the_end_of_the_part() {
        let parts = [Part::new(0, 50, 10, 0), Part::new(1, 0, 20, 10), Part::new(2, 0, 5, 30)];
        let data = |len| Extent { len, state: ExtentState::DATA };
        let hole = |len| Extent { len, state: ExtentState::HOLE };
        let answers = [vec![data(500)], vec![hole(7)], vec![hole(5)]].map(Answer::Extents).into();
        assert_eq!(extents(&parts, answers).unwrap().into_extents().unwrap(), [data(10), hole(7)]);
    }

    #[test]
    fn one_answer_that_all_give() {
        let text = |text: &str| Answer::Text(text.to_owned());
        assert!(matches!(agreed(vec![Answer::Done, Answer::Done]), Ok(Answer::Done)));
        assert!(matches!(agreed(vec![text("a"), text("a")]), Ok(Answer::Text(a)) if a == "a"));
        assert_eq!(agreed(vec![text("a"), text("b")]).unwrap_err().kind(), crate::Kind::Unsupported);
        assert_eq!(agreed(vec![text("a"), Answer::Done]).unwrap_err().kind(), crate::Kind::Unsupported);
    }
}
