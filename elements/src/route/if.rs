//! Sends on what another element says yes to.

use crate::services::Test;
use blockmason::describe::{Build, ElementType, Family, Ports};
use blockmason::lang::value::Ref;
use blockmason::sched::Part;
use blockmason::{
    Answer, Children, Cx, Data, Element, Extent, ExtentState, Flow, Geometry, Op, Ops, Prepared, Reply,
    Request, Result,
};
use std::ops::Range;
use std::sync::Arc;

blockmason::params! {
    /// Sends on what another element says yes to.
    struct Params {
        /// The element that is asked: a `log_dirty` whether a part is dirty, a `filter` whether a request is one
        /// that it names.
        test: Ref<dyn Test>,
        /// Sends on what it says no to instead.
        not: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "if",
    summary: "sends on only what another element says yes to",
    doc: "Asks another element of each request whether it matches. What matches goes down; what does not is \
          done here: it succeeds without going down. A request of which only parts match is cut there, and the \
          parts go their own ways at once. A very long one with very many parts is done piece by piece, in the order of \
          addresses.\n\n\
          A part that stays here is answered like one that a `filter` drops: a read with zeros, an extents \
          request with data everywhere, everything else as done. So whoever reads through this cannot tell zeros from what \
          was not sent on. `copy` does not rely on it: it asks the map itself while it holds the range, and reads \
          from the disk.\n\n\
          Flushes and control requests always go down.",
    family: Family::Route,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    passes_through: true,
    example: "element Guest (type nbd) (listen unix:if.sock)\n\
              element Large (type filter) (drop read) (size 1M-)\n\
              element OnlySmall (type if) (test Large) (not yes)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> OnlySmall -> Large -> Disk\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        Ok(Arc::new(If { test: build.refer(&params.test)?, not: params.not }))
    },
    ..ElementType::BASE
};

/// The most parts that go down at once.
const PARTS: usize = 1024;

/// In place of a port: the part is answered here.
const HERE: usize = usize::MAX;

struct If {
    test: Arc<dyn Test>,
    not: bool,
}

impl If {
    /// Where the byte at `at` goes, and up to where all go there.
    fn way(&self, req: &Request, at: u64) -> (usize, u64) {
        let (matches, end) = self.test.test(req, at);
        (if matches == self.not { HERE } else { 0 }, end.clamp(at + 1, req.end()))
    }

    /// The parts of a request from a byte on, as many as go down at once.
    fn parts(&self, req: &Request, from: u64) -> Vec<(usize, Range<u64>)> {
        let (mut parts, mut at) = (Vec::<(usize, Range<u64>)>::new(), from);
        while at < req.end() {
            let (port, end) = self.way(req, at);
            let full = parts.len() == PARTS;
            match parts.last_mut() {
                Some((last, range)) if *last == port => range.end = end,
                _ if full => break,
                _ => parts.push((port, at..end)),
            }
            at = end;
        }
        parts
    }
}

fn send<'a>(cx: Cx<'a>, port: usize, req: Request) -> Flow<'a> {
    if port != HERE {
        return cx.forward(port, req);
    }
    Flow::Now(Ok(match req.op {
        Op::Read => Answer::Data(Data::zeros(req.len as usize)),
        Op::Extents => Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }]),
        Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Control => Answer::Done,
    }))
}

/// A piece of a request, in parts that cover it.
fn scatter<'a>(cx: Cx<'a>, piece: &Request, parts: Vec<(usize, Range<u64>)>) -> Flow<'a> {
    let part = |(port, range): (usize, Range<u64>)| {
        Part::new(port, range.start, range.end - range.start, range.start - piece.offset)
    };
    cx.scatter_by(piece, parts.into_iter().map(part), |port, part| send(cx, port, part))
}

impl If {
    /// A request of more parts than go down at once.
    async fn by_pieces(&self, req: Request, cx: Cx<'_>) -> Reply {
        let (mut at, mut read) = (req.offset, Vec::new());
        while at < req.end() {
            let parts = self.parts(&req, at);
            let end = parts.last().map_or(req.end(), |(_, range)| range.end);
            let piece = req.part(at - req.offset, end - at, at);
            match scatter(cx, &piece, parts).await? {
                Answer::Data(data) => read.push(data),
                // Whoever asks for extents asks again for the rest.
                extents @ Answer::Extents(_) => return Ok(extents),
                Answer::Done | Answer::Text(_) => {}
            }
            at = end;
        }
        Ok(if req.op == Op::Read { Answer::Data(Data::concat(read)) } else { Answer::Done })
    }
}

impl Element for If {
    /// Each operation may be done here, under its own name, also where the disk below does it by other means.
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?.above();
        let fast_zero = below.ops.write_zeroes && below.ops.fast_zero;
        Ok(Prepared::of(Geometry { ops: Ops { fast_zero, ..Ops::ALL }, ..below }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !req.op.has_range() || req.len == 0 {
            return cx.forward(0, req);
        }
        let parts = self.parts(&req, req.offset);
        match parts.as_slice() {
            [(port, range)] if range.end == req.end() => send(cx, *port, req),
            [.., (_, range)] if range.end < req.end() => cx.later(&req.clone(), self.by_pieces(req, cx)),
            _ => scatter(cx, &req, parts),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Extent, ExtentState, Op};

    const DIRTY: &str =
        "element X (type if) (test L) element L (type log_dirty) (granule 4k) element M (type mem)";

    async fn serve(host: &std::sync::Arc<blockmason::Host>, text: &str) -> TestDisk {
        TestDisk::new(host, crate::ALL, text, "X").await.unwrap()
    }

    #[test]
    fn what_is_always_dirty_behaves_like_a_vector() {
        for seed in 0..3 {
            run(seed, async |host| {
                let disk = serve(
                    &host,
                    &format!("{DIRTY} (size 40001) X -> L -> M").replace("4k)", "4k) (written dirty)"),
                )
                .await;
                play_against_model(&disk, seed, 200).await;
            });
        }
    }

    #[test]
    fn only_dirty_parts_go_down_and_the_others_read_as_zeros() {
        run(1, async |host| {
            let disk = serve(&host, &format!("{DIRTY} (size 40k) X -> L -> M")).await;
            disk.write(4096, &[1; 8192]).await.unwrap();
            disk.write(0, &[2; 40 << 10]).await.unwrap();
            // All is clean by now, so nothing goes down.
            disk.write(0, &[3; 4096]).await.unwrap();
            assert_eq!(disk.read(0, 40 << 10).await.unwrap(), vec![0; 40 << 10]);
            assert_eq!(disk.extents(0, 10).await.unwrap(), [Extent { len: 10, state: ExtentState::DATA }]);
            let node = disk.disk.graph().instances().find(|instance| instance.name == "L").unwrap().clone();
            assert_eq!(node.element.get("remaining").unwrap(), "0");
        });
    }

    #[test]
    fn what_does_not_match_goes_down_with_not() {
        run(1, async |host| {
            let text = "element X (type if) (test F) (not yes) element F (type filter) (drop write) (range 10-20)\n\
                        element M (type mem) (size 1k) element K (type filter) X -> K -> M F -> M";
            let disk = serve(&host, text).await;
            disk.write(0, &[1; 100]).await.unwrap();
            let read = disk.read(0, 100).await.unwrap();
            let expected: Vec<u8> = (0..100).map(|at| u8::from(!(10..20).contains(&at))).collect();
            assert_eq!(read, expected);
            disk.op(Op::WriteZeroes, 0, 1024).await.unwrap();
            assert_eq!(disk.read(0, 100).await.unwrap(), [0; 100]);
        });
    }

    /// Every other granule is dirty: more parts than go down at once.
    #[test]
    fn a_request_of_very_many_parts_is_done_by_pieces() {
        run(1, async |host| {
            let text = format!("{DIRTY} (size 16M) X -> L -> M")
                .replace("4k)", "4k) (initially clean) (written dirty)");
            let disk = serve(&host, &text).await;
            let node = disk.disk.graph().instances().find(|instance| instance.name == "L").unwrap().clone();
            let map = node.element.provide("dirty_map").unwrap();
            let map = map.downcast::<std::sync::Arc<crate::migrate::map::DirtyMap>>().unwrap();
            let granule = |ix: u64| ix * 4096..(ix + 1) * 4096;
            (0..4096).step_by(2).for_each(|ix| map.set(granule(ix)));
            disk.write(0, &vec![7; 16 << 20]).await.unwrap();
            let read = disk.read(0, 16 << 20).await.unwrap();
            let chunks = read.chunks(4096).enumerate();
            assert!(chunks.clone().all(|(ix, chunk)| chunk[0] == if ix % 2 == 0 { 7 } else { 0 }));
            assert_eq!(chunks.count(), 4096);
            assert_eq!(disk.extents(0, 16 << 20).await.unwrap().len(), 1);
            disk.op(Op::WriteZeroes, 0, 16 << 20).await.unwrap();
            assert!(disk.read(0, 16 << 20).await.unwrap().iter().all(|byte| *byte == 0));
        });
    }
}
