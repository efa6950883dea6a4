//! Corrupts data and says nothing: what checksums are for.

use super::{Chance, Count};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::{ByteRange, Percent};
use blockmason::{Answer, Cx, Data, Element, Flow, Op, Request, Result};
use std::ops::Range;
use std::sync::Arc;

blockmason::params! {
    /// Corrupts data and says nothing.
    struct Params {
        /// Whether data is corrupted on its way up or down.
        on: Way = "read",
        /// Only these bytes are corrupted.
        range: Option<ByteRange>,
        /// Lets this many requests pass, then begins.
        after: u64 = "0",
        /// Corrupts this many requests, then no more.
        count: Count = "unlimited",
        /// How likely each of them is to be corrupted.
        probability: Percent = "100%",
        /// Inverts this many bytes in a row; 0 flips a single bit.
        bytes: u64 = "0",
    }
}

blockmason::words! {
    /// The way on which data is corrupted.
    enum Way {
        Read = "read",
        Write = "write",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "flip",
    summary: "corrupts data silently",
    doc: "Flips a bit, or inverts some bytes, of what is read or of what is written, at a place chosen at \
          random within the request and the range. For testing whether what lies above notices: a file \
          system with checksums, a mirror that compares.\n\n\
          With `(on read)` the data below stays as it is and the next read may be right; with `(on write)` \
          the damage is stored. Zeroing and discarding carry no data and pass. Order, durability and errors \
          are those of what lies below.",
    family: Family::Fault,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "probability", access: Access::ReadWrite, doc: "how likely a request is to be hit" },
        Handler { name: "count", access: Access::ReadWrite, doc: "how many requests are left to corrupt" },
        Handler { name: "flipped", access: Access::Read, doc: "how many requests it has corrupted" },
    ],
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:flip.sock)\n\
              element Rot (type flip) (probability 1%)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Rot -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let chance = Chance::new(params.range, params.after, params.count, params.probability);
        Ok(Arc::new(Flip { params, chance }))
    },
    ..ElementType::BASE
};

struct Flip {
    params: Params,
    chance: Chance,
}

/// What is corrupted in a request's data: these bytes are combined with the mask.
struct Damage {
    bytes: Range<usize>,
    mask: u8,
}

impl Damage {
    fn apply(&self, mut data: Data) -> Data {
        // Copies what is shared, with the sink or a tee's other legs.
        data.make_mut()[self.bytes.clone()].iter_mut().for_each(|byte| *byte ^= self.mask);
        data
    }
}

impl Flip {
    /// Decides whether a request is hit, and where.
    fn damage(&self, way: Way, req: &Request, cx: Cx<'_>) -> Option<Damage> {
        if way != self.params.on || req.len == 0 || !self.chance.hits(req, cx) {
            return None;
        }
        let (start, end) = self.chance.bounds();
        let (start, end) = (start.max(req.offset) - req.offset, end.min(req.end()) - req.offset);
        let (first, bit) = cx.rng(|rng| (rng.u64(start..end), rng.u8(0..8)));
        let (len, mask) = match self.params.bytes {
            0 => (1, 1 << bit),
            bytes => (bytes.min(end - first), 0xff),
        };
        Some(Damage { bytes: first as usize..(first + len) as usize, mask })
    }
}

impl Element for Flip {
    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Read => match self.damage(Way::Read, &req, cx) {
                None => cx.forward(0, req),
                Some(damage) => cx.forward(0, req).then(move |reply| {
                    reply.and_then(Answer::into_data).map(|data| Answer::Data(damage.apply(data)))
                }),
            },
            Op::Write => {
                if let Some(damage) = self.damage(Way::Write, &req, cx) {
                    req.data = damage.apply(req.data);
                }
                cx.forward(0, req)
            }
            Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Extents | Op::Control => {
                cx.forward(0, req)
            }
        }
    }

    fn get(&self, handler: &str) -> Result<String> {
        self.chance.get(handler, "flipped")
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        self.chance.set(handler, value)
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Data, Element, Host, Request};
    use std::sync::Arc;

    async fn disk(host: &Arc<Host>, parameters: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!("element F (type flip) {parameters} element M (type mem) (size 64k) F -> M");
        let graph = graph(host, crate::ALL, &text, "F").unwrap();
        let element = graph.instances().find(|instance| instance.name == "F").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, element)
    }

    fn bits(bytes: &[u8]) -> u32 {
        bytes.iter().map(|byte| byte.count_ones()).sum()
    }

    #[test]
    fn a_read_is_wrong_by_one_bit_and_the_disk_is_not() {
        run(1, async |host| {
            let (disk, element) = disk(&host, "(count 50)").await;
            disk.write(4096, &[0xff; 4096]).await.unwrap();
            // Whole pages are shared with the memory disk, zeros have no memory at all.
            for _ in 0..25 {
                assert_eq!(bits(&disk.read(0, 4096).await.unwrap()), 1);
                assert_eq!(bits(&disk.read(4096, 4096).await.unwrap()), 8 * 4096 - 1);
            }
            assert_eq!(element.get("flipped").unwrap(), "50");
            assert_eq!(bits(&disk.read(0, 8192).await.unwrap()), 8 * 4096, "the count is used up");
        });
    }

    #[test]
    fn a_write_is_stored_wrong_and_its_payload_stays_right() {
        run(1, async |host| {
            let (disk, _) = disk(&host, "(on write) (bytes 10)").await;
            let payload = Data::copy_of(&[0; 4096]);
            disk.submit(Request::write(0, payload.clone())).await.unwrap();
            assert!(payload.is_zero(), "the sender's copy");
            let stored = disk.read(0, 4096).await.unwrap();
            let first = stored.iter().position(|byte| *byte != 0).unwrap();
            let len = stored[first..].iter().take_while(|byte| **byte == 0xff).count();
            assert!(bits(&stored) as usize == 8 * len && (len == 10 || first + len == 4096), "{first}+{len}");
        });
    }

    #[test]
    fn only_the_range_is_hit() {
        run(1, async |host| {
            let (disk, _) = disk(&host, "(range 1000-1003) (bytes 100)").await;
            for _ in 0..50 {
                let found = disk.read(900, 200).await.unwrap();
                assert!(bits(&found) >= 8 && bits(&found[..100]) + bits(&found[103..]) == 0);
                assert_eq!(bits(&disk.read(0, 1000).await.unwrap()), 0);
            }
        });
    }

    #[test]
    fn does_nothing_at_no_probability() {
        run(1, async |host| {
            let (disk, element) = disk(&host, "(probability 0%)").await;
            play_against_model(&disk, 1, 300).await;
            element.set("probability", "100%").unwrap();
            disk.op(blockmason::Op::WriteZeroes, 0, 65536).await.unwrap();
            assert_eq!(bits(&disk.read(0, 65536).await.unwrap()), 1);
        });
    }
}
