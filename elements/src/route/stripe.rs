//! Disks side by side: the chunks of one disk dealt out to its children in turn.

use blockmason::describe::{Build, ElementType, Family, Outs, Ports};
use blockmason::lang::value::Size;
use blockmason::sched::Part;
use blockmason::{Children, Cx, Element, Error, Flow, Op, Prepared, Request, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

blockmason::params! {
    /// Disks side by side.
    pub struct Stripe {
        /// Bytes in a row on one disk: a power of two, at least 512.
        chunk: Chunk = "64k",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "stripe",
    summary: "spreads one disk over several in chunks, for speed (RAID-0)",
    doc: "Chunk 0 is on the first edge's disk, chunk 1 on the second's, and so on in turn, in the order of \
          the edges; so several disks serve one guest. Losing one disk loses all data.\n\n\
          Every disk holds the same number of whole chunks: the size is that of the smallest disk, rounded \
          down to chunks, times the number of disks; what other disks have beyond that is not used.\n\n\
          A request within one chunk goes to its disk as it is. A larger one becomes one request for each \
          disk that it touches, however many chunks it has there: all run at once and to their end, and \
          the reply is the error of the first that failed, in the order of their first bytes. A flush goes \
          to all disks at once and is answered when all have answered; FUA holds for each part. A write of \
          zeros that must be fast is refused before anything changes unless all disks are fast. A control \
          request succeeds if all disks answer it alike.\n\n\
          `chunk` and the order of the disks are the layout: the bytes make sense only with the same ones.",
    family: Family::Route,
    params: Stripe::PARAMS,
    ports: Ports { input: true, out: Outs::Variadic { min: 1 } },
    layout: true,
    example: "element Guest (type nbd) (listen unix:stripe.sock)\n\
              element Both (type stripe) (chunk 128k)\n\
              element Left (type file) (path left.img) (size 64M)\n\
              element Right (type file) (path right.img) (size 64M)\n\
              Guest -> Both\n\
              (Both, left) -> Left\n\
              (Both, right) -> Right\n",
    check: Stripe::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Stripe::from)?)),
    ..ElementType::BASE
};

/// A power of two, at least 512 and at most 1 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk(u64);

impl FromStr for Chunk {
    type Err = String;

    fn from_str(text: &str) -> Result<Chunk, String> {
        let Size(bytes) = text.parse()?;
        let fits = bytes.is_power_of_two() && (512..=1 << 30).contains(&bytes);
        fits.then_some(Chunk(bytes)).ok_or(format!("expected a power of two from 512 to 1G, found `{text}`"))
    }
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

blockmason::text_value!(Chunk, "size");

/// The longest extents request that is answered at once, in rows of chunks: bounds the answer.
const EXTENT_ROWS: u64 = 1024;

impl Stripe {
    /// How many bytes of child `port` of `count` lie before `offset`.
    fn before(&self, offset: u64, port: u64, count: u64) -> u64 {
        let Chunk(chunk) = self.chunk;
        let row = offset % (chunk * count);
        offset / (chunk * count) * chunk + row.saturating_sub(port * chunk).min(chunk)
    }

    /// The parts of a request, one for each child that it touches, in the order of their first bytes.
    fn parts(&self, req: &Request, count: u64) -> impl Iterator<Item = Part> {
        let Chunk(chunk) = self.chunk;
        let first = req.offset / chunk;
        // As many chunks from the first on as there are children are on a child each.
        (first..first + count).map_while(move |nth| {
            let start = req.offset.max(nth * chunk);
            let port = nth % count;
            let (from, to) = (self.before(start, port, count), self.before(req.end(), port, count));
            let part = Part::new(port as usize, from, to.checked_sub(from)?, start - req.offset);
            (part.len > 0).then_some(part.striped(chunk, (count - 1) * chunk))
        })
    }
}

impl Element for Stripe {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let Chunk(chunk) = self.chunk;
        let smallest = children.iter().map(|child| child.size).min().unwrap_or(0);
        if smallest < chunk {
            let message = format!("the smallest disk, {smallest} bytes, holds no chunk of {chunk}");
            return Err(Error::invalid(message));
        }
        let (each, count) = (smallest / chunk * chunk, children.ports.len() as u64);
        let size = each.checked_mul(count).ok_or_else(|| {
            Error::invalid(format!("{count} times {each} bytes are more than a disk may have"))
        })?;
        Ok(Prepared::of(children.united(size)))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let (Chunk(chunk), count) = (self.chunk, cx.outs() as u64);
        match req.op {
            Op::Flush | Op::Control => cx.broadcast(req),
            Op::Read | Op::Write | Op::Discard | Op::WriteZeroes | Op::Cache => {
                if req.offset % chunk + req.len > chunk {
                    return cx.scatter(&req, self.parts(&req, count));
                }
                let port = req.offset / chunk % count;
                req.offset = self.before(req.offset, port, count);
                cx.forward(port as usize, req)
            }
            // What is known of bytes past the chunk is of no use here: the parts cut it off.
            Op::Extents => {
                req.len = req.len.min(EXTENT_ROWS * chunk * count);
                cx.scatter(&req, self.parts(&req, count))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::testing::{CATALOGUE, tail_call};
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Flags, Kind};
    use proptest::prelude::*;

    /// A stripe over memory disks of these sizes.
    fn over(chunk: &str, sizes: &[u64]) -> String {
        let child = |(ix, size): (usize, &u64)| {
            format!("element M{ix} (type mem) (size {size}) (S, p{ix}) -> M{ix}\n")
        };
        let children: String = sizes.iter().enumerate().map(child).collect();
        format!("element S (type stripe) (chunk {chunk})\n{children}")
    }

    #[test]
    fn behaves_like_a_vector() {
        for (seed, sizes) in
            [&[5000, 5000][..], &[9000, 4096, 5119], &[20000; 5], &[70001]].iter().enumerate()
        {
            for seed in [seed as u64, seed as u64 + 100] {
                run(seed, async |host| {
                    let disk = TestDisk::new(&host, crate::ALL, &over("512", sizes), "S").await.unwrap();
                    let smallest = sizes.iter().min().unwrap() / 512 * 512;
                    assert_eq!(disk.size(), smallest * sizes.len() as u64);
                    play_against_model(&disk, seed, 300).await;
                });
            }
        }
    }

    proptest! {
        #[test]
        fn every_byte_has_its_place(count in 1u64..6, power in 9u32..12, offset in 0u64..50_000, len in 1u64..30_000) {
            let chunk = 1 << power;
            let stripe = Stripe { chunk: Chunk(chunk) };
            let parts: Vec<Part> = stripe.parts(&Request::read(offset, len), count).collect();
            prop_assert_eq!(parts.iter().map(|part| part.len).sum::<u64>(), len);
            prop_assert!(parts.is_sorted_by_key(|part| part.from));
            for part in parts {
                let first = offset + part.from;
                prop_assert_eq!(part.port as u64, first / chunk % count);
                prop_assert_eq!(part.offset, first / (chunk * count) * chunk + first % chunk);
                let last = (offset..offset + len).rev().find(|at| at / chunk % count == part.port as u64).unwrap();
                prop_assert_eq!(part.offset + part.len - 1, last / (chunk * count) * chunk + last % chunk);
            }
        }
    }

    #[test]
    fn a_long_request_is_one_for_each_disk() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, &over("512", &[1 << 20; 3]), "S").await.unwrap();
            disk.write(100, &[1; 1 << 20]).await.unwrap();
            let edges = disk.disk.graph().read_edges();
            let counts: Vec<u64> =
                edges.iter().filter(|edge| edge.from == "S").map(|edge| edge.requests).collect();
            assert_eq!(counts, [1, 1, 1]);
        });
    }

    #[test]
    fn a_request_within_a_chunk_is_a_tail_call() {
        let text = "element S (type stripe) (chunk 1k) element A (type echo) element B (type echo)\n\
            (S, a) -> A (S, b) -> B";
        let read = |offset, len| tail_call(text, "S", Request::read(offset, len));
        assert_eq!(
            [read(0, 1024), read(1030, 10), read(5 << 10, 1)],
            ["read 0+1024", "read 6+10", "read 2048+1"]
        );
        assert!(tail_call(&over("512", &[512, 512]), "S", Request::read(600, 5)).starts_with("now Ok"));
    }

    #[test]
    fn errors() {
        run(1, async |host| {
            let text = "element S (type stripe) (chunk 512) element A (type mem) (size 1k)\n\
                element Late (type broken) (errno 28) (after 5ms) element Bad (type broken) (fast_zero no)\n\
                (S, a) -> A (S, late) -> Late (S, bad) -> Bad";
            let disk = TestDisk::new(&host, CATALOGUE, text, "S").await.unwrap();
            assert_eq!(disk.write(0, &[3; 2000]).await.unwrap_err().kind(), Kind::NoSpace);
            assert_eq!(disk.read(0, 512).await.unwrap(), [3; 512], "the other parts ran to their end");
            assert_eq!(disk.write(1024, &[3; 1024]).await.unwrap_err().kind(), Kind::Io);
            let zeroes = Request::new(Op::WriteZeroes, 0, 1024).with(Flags::FAST_ONLY);
            assert_eq!(disk.submit(zeroes).await.unwrap_err().kind(), Kind::Unsupported);
            assert_eq!(disk.read(0, 512).await.unwrap(), [3; 512]);
        });
    }

    #[test]
    fn what_cannot_be_striped() {
        run(1, async |host| {
            for (chunk, says) in
                [("100", "power of two"), ("256", "from 512"), ("2G", "to 1G"), ("x", "a size")]
            {
                let error = TestDisk::new(&host, crate::ALL, &over(chunk, &[4096]), "S").await.err().unwrap();
                assert!(error.to_string().contains(says), "{error}");
            }
            let error =
                TestDisk::new(&host, crate::ALL, &over("4k", &[4095, 9000]), "S").await.err().unwrap();
            let text = error.to_string();
            assert!(text.contains("4095") && text.contains("4096"), "{text}");
        });
    }
}
