//! A disk in memory, sparse: pages that were never written, or were zeroed, take no room.
//!
//! Replies share its pages instead of copying them. A page that a reply still holds is copied when it
//! is written, so that a reply never changes.

use super::{control, unique};
use blockmason::describe::{Build, ElementType, Family, Ports, Survives};
use blockmason::geometry::MAX_REQUEST;
use blockmason::lang::value::Size;
use blockmason::request::join_extents;
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Extent, ExtentState, Flow, Geometry, Op, Ops, Prepared,
    Request, Result,
};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

blockmason::params! {
    /// A disk in memory.
    pub struct Params {
        /// Bytes that the disk has.
        size: Size,
        /// Agrees that a guest which outlives this process loses what it was told is written: asked for below
        /// `vhost_user_blk`.
        lossy: bool = "no",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "mem",
    summary: "a sparse disk in memory, gone when the process ends",
    doc: "Keeps pages of 4 KiB that were written; zeroed and discarded pages give their memory back. \
          Reads share pages instead of copying them.\n\n\
          Answered writes are seen by every later read; a flush has nothing to do, since nothing \
          survives the process. Under an export for guests that outlive this process it needs thought.",
    family: Family::Sink,
    params: Params::PARAMS,
    ports: Ports::SINK,
    survives: Survives::Nothing,
    example: "element Guest (type nbd) (listen unix:mem.sock)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        Ok(Arc::new(Mem::new(params.size.0, params.lossy)?))
    },
    ..ElementType::BASE
};

const PAGE: usize = 4096;

/// Pages of one lock: 2 MiB, so that shards rarely meet at one.
const PAGES: usize = 512;

/// Stretches that are made together when one of them is first used: a GiB.
const STRETCHES: usize = 512;

/// The largest disk: more than the memory of any machine, and its table is small.
const MOST: u64 = 64 << 40;

/// The pages of one stretch of the disk. Absent pages are zeros.
struct Stretch(Vec<Option<Data>>);

struct Mem {
    size: u64,
    lossy: bool,
    incarnation: String,
    stretches: Vec<OnceLock<Box<[Mutex<Stretch>]>>>,
}

impl Mem {
    fn new(size: u64, lossy: bool) -> Result<Mem> {
        if size > MOST {
            let message = format!("a disk in memory has {} at the most, not {}", Size(MOST), Size(size));
            return Err(Error::invalid(message));
        }
        let count = size.div_ceil((PAGE * PAGES * STRETCHES) as u64) as usize;
        let stretches = (0..count).map(|_| OnceLock::new()).collect();
        Ok(Mem { size, lossy, incarnation: unique("memory"), stretches })
    }

    fn stretch(&self, ix: usize) -> &Mutex<Stretch> {
        let made = || (0..STRETCHES).map(|_| Mutex::new(Stretch(Vec::new()))).collect();
        &self.stretches[ix / STRETCHES].get_or_init(made)[ix % STRETCHES]
    }

    /// Calls `visit` with every page that a range touches, in order: its place, and which of its bytes.
    fn pages(&self, req: &Request, mut visit: impl FnMut(&mut Option<Data>, std::ops::Range<usize>)) {
        let mut at = req.offset;
        while at < req.end() {
            let page = (at / PAGE as u64) as usize;
            let mut stretch = self.stretch(page / PAGES).lock().unwrap_or_else(PoisonError::into_inner);
            if stretch.0.is_empty() {
                stretch.0.resize(PAGES, None);
            }
            for place in &mut stretch.0[page % PAGES..] {
                let from = (at % PAGE as u64) as usize;
                let to = PAGE.min(from + (req.end() - at) as usize);
                visit(place, from..to);
                at += (to - from) as u64;
                if at == req.end() {
                    break;
                }
            }
        }
    }

    fn read(&self, req: &Request) -> Data {
        let mut pieces = Vec::new();
        self.pages(req, |place, part| {
            pieces.push(match place {
                None => Data::zeros(part.len()),
                Some(page) => page.slice(part),
            });
        });
        if pieces.len() == 1 { pieces.swap_remove(0) } else { Data::concat(pieces) }
    }

    fn write(&self, req: &Request) {
        // One piece of payload in one page is what most writes are.
        let mut rest = Vec::new();
        let data = match req.data.as_slice() {
            Some(bytes) => bytes,
            None => {
                rest = vec![0; req.data.len()];
                req.data.copy_to(&mut rest);
                &rest
            }
        };
        let mut done = 0;
        self.pages(req, |place, part| {
            let bytes = &data[done..done + part.len()];
            done += part.len();
            let page = place.get_or_insert_with(|| Data::zeros(PAGE));
            page.make_mut()[part].copy_from_slice(bytes);
        });
        drop(rest);
    }

    fn zero(&self, req: &Request) {
        self.pages(req, |place, part| {
            if part.len() == PAGE {
                *place = None;
            } else if let Some(page) = place {
                page.make_mut()[part].fill(0);
            }
        });
    }

    fn extents(&self, req: &Request) -> Vec<Extent> {
        let mut extents = Vec::new();
        self.pages(req, |place, part| {
            let state = if place.is_some() { ExtentState::DATA } else { ExtentState::HOLE };
            extents.push(Extent { len: part.len() as u64, state });
        });
        join_extents(extents)
    }
}

impl Element for Mem {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        // Whatever dies, half a write is not there afterwards: either nothing died, or nothing is left.
        let atomic = MAX_REQUEST;
        let geometry = Geometry { ops: Ops::ALL, volatile: !self.lossy, atomic, ..Geometry::new(self.size) };
        Ok(Prepared::of(geometry))
    }

    fn may_hand_over(&self) -> Result<()> {
        Err(super::only_here())
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Read => return Flow::Now(Ok(Answer::Data(self.read(&req)))),
            Op::Write if req.data.is_known_zero() => self.zero(&req),
            Op::Write => self.write(&req),
            Op::Discard | Op::WriteZeroes => self.zero(&req),
            Op::Flush | Op::Cache => {}
            Op::Extents if req.extra.as_ref().is_some_and(|extra| extra.map.is_some()) => {
                return cx.fail(&req, Error::unsupported("memory knows of no such map"));
            }
            Op::Extents => return Flow::Now(Ok(Answer::Extents(self.extents(&req)))),
            Op::Control => return control(&req, cx, || Some(self.incarnation.clone())),
        }
        Flow::done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmason::Segment;
    use blockmason::testing::{TestDisk, play_against_model, run};

    const GRAPH: &str = "element M (type mem) (size 300k)";

    #[test]
    fn a_disk_larger_than_memory_takes_none_and_one_that_cannot_be_is_refused() {
        run(1, async |host| {
            let graph = "element M (type mem) (size 64T)";
            let disk = TestDisk::new(&host, crate::ALL, graph, "M").await.unwrap();
            let last = (64 << 40) - 512;
            disk.write(last, &[7; 512]).await.unwrap();
            assert_eq!(disk.read(last, 512).await.unwrap(), [7; 512]);
            for size in ["65T", "1P", "1E"] {
                let graph = format!("element M (type mem) (size {size})");
                let error = TestDisk::new(&host, crate::ALL, &graph, "M").await.err().unwrap().to_string();
                assert!(error.contains(&format!("64T at the most, not {size}")), "{error}");
            }
        });
    }

    #[test]
    fn behaves_like_a_vector() {
        for seed in 0..20 {
            run(seed, async |host| {
                let disk = TestDisk::new(&host, crate::ALL, GRAPH, "M").await.unwrap();
                play_against_model(&disk, seed, 300).await;
            });
        }
    }

    #[test]
    fn a_reply_does_not_change_when_its_page_is_written() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, GRAPH, "M").await.unwrap();
            disk.write(0, &[1; 4096]).await.unwrap();
            let held = disk.submit(Request::read(0, 4096)).await.unwrap().into_data().unwrap();
            disk.write(0, &[2; 4096]).await.unwrap();
            assert_eq!(held.to_vec(), [1; 4096]);
            assert_eq!(disk.read(0, 4096).await.unwrap(), [2; 4096]);
        });
    }

    #[test]
    fn zeroed_pages_give_their_memory_back() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, GRAPH, "M").await.unwrap();
            disk.write(0, &[1; 20000]).await.unwrap();
            disk.op(Op::WriteZeroes, 4000, 8192).await.unwrap();
            let extents = disk.extents(0, 20480).await.unwrap();
            let lens: Vec<_> = extents.iter().map(|extent| (extent.len, extent.state.hole)).collect();
            assert_eq!(lens, [(4096, false), (4096, true), (12288, false)]);
        });
    }

    #[test]
    fn filling_a_guests_memory_is_left_to_the_export() {
        let mem = Mem::new(8192, false).unwrap();
        mem.write(&Request::write(0, Data::copy_of(b"hello")));
        let data = mem.read(&Request::read(0, 5));
        let mut whole = false;
        data.for_each(|segment| whole = matches!(segment, Segment::Bytes(b"hello")));
        assert!(whole, "shared, in one piece");
    }
}
