//! Disks in a row: its children one after the other are one disk.

use blockmason::describe::{Build, ElementType, Family, Outs, Ports};
use blockmason::sched::Part;
use blockmason::{Children, Cx, Element, Error, Flow, Op, Prepared, Request, Result};
use std::sync::Arc;

blockmason::params! {
    /// Disks in a row.
    pub struct Linear {}
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "linear",
    summary: "joins disks of any sizes, one after the other, to one disk",
    doc: "The first edge's disk holds the first bytes, the next one those that follow, and so on, in the \
          order of the edges and whatever the ports are called. Sizes need not be alike or aligned; files, \
          NBD and memory mix. For one large disk out of several small ones.\n\n\
          A request that lies within one disk goes there as it is. One that spans several is split: all \
          parts run at once and to their end, and the reply is the error of the first part that failed, \
          in the order of addresses; parts that succeeded stay done. A flush goes to all disks at once \
          and is answered when all have answered; FUA holds for each part. A write of zeros that must be \
          fast is refused before anything changes unless all disks are fast. A control request succeeds \
          if all disks answer it alike.\n\n\
          Order and sizes of the disks are the layout: the bytes make sense only with the same ones.",
    family: Family::Route,
    params: Linear::PARAMS,
    ports: Ports { input: true, out: Outs::Variadic { min: 1 } },
    layout: true,
    sizes: true,
    example: "element Guest (type nbd) (listen unix:linear.sock)\n\
              element Both (type linear)\n\
              element Small (type file) (path small.img) (size 100001)\n\
              element Large (type file) (path large.img) (size 64M)\n\
              Guest -> Both\n\
              (Both, first) -> Small\n\
              (Both, second) -> Large\n",
    check: Linear::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Linear::from)?)),
    ..ElementType::BASE
};

/// The first byte of each child, then the size of them all.
struct Starts(Vec<u64>);

impl Element for Linear {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let mut starts = vec![0];
        let mut size = 0u64;
        for child in children.iter() {
            size = size.checked_add(child.size).ok_or_else(|| {
                Error::invalid(format!("{size} and {} bytes are more than a disk may have", child.size))
            })?;
            starts.push(size);
        }
        Ok(Prepared::with(children.united(size), Starts(starts)))
    }

    fn submit<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        let Starts(starts) = cx.prepared();
        match req.op {
            Op::Flush | Op::Control => cx.broadcast(req),
            Op::Read | Op::Write | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Extents => {
                let first = starts[1..cx.outs()].partition_point(|end| *end <= req.offset);
                if req.end() <= starts[first + 1] {
                    req.offset -= starts[first];
                    return cx.forward(first, req);
                }
                let reached = (first..cx.outs()).take_while(|port| starts[*port] < req.end());
                let parts = reached.map(|port| {
                    let (from, to) = (req.offset.max(starts[port]), req.end().min(starts[port + 1]));
                    Part::new(port, from - starts[port], to - from, from - req.offset)
                });
                cx.scatter(&req, parts.filter(|part| part.len > 0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::route::testing::{CATALOGUE, tail_call};
    use blockmason::testing::{TestDisk, play_against_model, run};
    use blockmason::{Flags, Kind, Op, Request};

    #[test]
    fn behaves_like_a_vector() {
        let text = "element L (type linear)\n\
            element A (type mem) (size 5001)\n\
            element None (type mem) (size 0)\n\
            element B (type mem) (size 777)\n\
            element C (type mem) (size 40000)\n\
            (L, z) -> A (L, none) -> None (L, a) -> B (L, m) -> C";
        for seed in 0..10 {
            run(seed, async |host| {
                let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
                assert_eq!(disk.size(), 45778);
                play_against_model(&disk, seed, 300).await;
            });
        }
    }

    #[test]
    fn so_does_linear_over_stripe_over_slice() {
        let text = "element L (type linear)\n\
            element S (type stripe) (chunk 512)\n\
            element P (type slice) (offset 100) (length 3000)\n\
            element Q (type slice) (offset 1)\n\
            element A (type mem) (size 5001)\n\
            element B (type mem) (size 4097)\n\
            element C (type mem) (size 999)\n\
            (L, tail) -> C (L, striped) -> S (S, x) -> P -> A (S, y) -> Q -> B";
        for seed in 0..10 {
            run(seed, async |host| {
                let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
                assert_eq!(disk.size(), 999 + 2 * 5 * 512);
                play_against_model(&disk, seed, 300).await;
            });
        }
    }

    #[test]
    fn the_order_of_the_edges_is_the_order_of_the_bytes() {
        run(1, async |host| {
            let text = "element L (type linear)\n\
                element A (type mem) (size 10)\n\
                element B (type mem) (size 20)\n\
                (L, two) -> B (L, one) -> A";
            let disk = TestDisk::new(&host, crate::ALL, text, "L").await.unwrap();
            disk.write(15, b"0123456789").await.unwrap();
            assert_eq!(disk.read(14, 12).await.unwrap(), b"\x000123456789\0");
            let edges = disk.disk.graph().read_edges();
            let bytes = |to: &str| edges.iter().find(|edge| edge.to == to).unwrap().bytes;
            assert_eq!((bytes("B"), bytes("A")), (5 + 6, 5 + 6));
        });
    }

    #[test]
    fn one_disk_hit_is_a_tail_call() {
        let text = "element L (type linear) element A (type echo) element B (type echo)\n\
            (L, a) -> A (L, b) -> B";
        let read = |offset| tail_call(text, "L", Request::read(offset, 10));
        assert_eq!([read(0), read(9990), read(10_005)], ["read 0+10", "read 9990+10", "read 5+10"]);
    }

    #[test]
    fn memory_below_answers_at_once() {
        let text = "element L (type linear) element A (type mem) (size 10) element B (type mem) (size 10)\n\
            (L, a) -> A (L, b) -> B";
        assert!(tail_call(text, "L", Request::read(12, 2)).starts_with("now Ok"));
        assert!(tail_call(text, "L", Request::read(9, 2)).starts_with("now Ok"));
    }

    const BROKEN: &str = "element L (type linear)\n\
        element A (type mem) (size 10)\n\
        element Full (type broken) (errno 28) (after 10ms)\n\
        element Bad (type broken) (errno 5)\n\
        element B (type mem) (size 10)\n\
        (L, a) -> A (L, full) -> Full (L, bad) -> Bad (L, b) -> B";

    #[test]
    fn all_parts_run_and_the_first_error_in_address_order_is_reported() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, CATALOGUE, BROKEN, "L").await.unwrap();
            let error = disk.write(0, &[7; 2068]).await.unwrap_err();
            assert_eq!((error.kind(), error.element()), (Kind::NoSpace, Some("Full")), "{error}");
            assert_eq!(disk.read(0, 10).await.unwrap(), [7; 10]);
            assert_eq!(disk.read(2058, 10).await.unwrap(), [7; 10]);
            assert_eq!(disk.op(Op::Flush, 0, 0).await.unwrap_err().kind(), Kind::NoSpace);
        });
    }

    #[test]
    fn fast_zeros_are_refused_before_anything_changes() {
        run(1, async |host| {
            let slow = BROKEN.replace("(errno 28)", "(fast_zero no)");
            let disk = TestDisk::new(&host, CATALOGUE, &slow, "L").await.unwrap();
            disk.write(0, &[7; 10]).await.unwrap();
            let zeroes = |len| disk.submit(Request::new(Op::WriteZeroes, 0, len).with(Flags::FAST_ONLY));
            assert_eq!(zeroes(11).await.unwrap_err().kind(), Kind::Unsupported);
            assert_eq!(disk.read(0, 10).await.unwrap(), [7; 10]);
            zeroes(10).await.unwrap();
            assert_eq!(disk.read(0, 10).await.unwrap(), [0; 10]);
        });
    }

    #[test]
    fn one_refusal_of_fast_zeros_refuses_the_whole() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, CATALOGUE, &BROKEN.replace("28", "95"), "L").await.unwrap();
            let zeroes = Request::new(Op::WriteZeroes, 0, 20).with(Flags::FAST_ONLY);
            assert_eq!(disk.submit(zeroes).await.unwrap_err().kind(), Kind::Unsupported);
        });
    }

    #[test]
    fn disks_that_are_too_large_together() {
        run(1, async |host| {
            let half = (i64::MAX as u64).to_string();
            let child = |name| format!("element {name} (type broken) (size {half}) (L, {name}) -> {name}\n");
            let text = ["A", "B", "C"].map(child).concat() + "element L (type linear)";
            let error = TestDisk::new(&host, CATALOGUE, &text, "L").await.err().unwrap();
            assert!(error.to_string().contains(&half), "{error}");
            assert_eq!(error.kind(), Kind::Invalid);
        });
    }
}
