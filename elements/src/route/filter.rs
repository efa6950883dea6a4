//! Keeps some requests from going down.

use crate::services::Test;
use blockmason::describe::{Build, Carries, ElementType, Family, Ports};
use blockmason::lang::value::{ByteRange, Service};
use blockmason::lang::{ParamError, Params};
use blockmason::sched::Part;
use blockmason::{
    Answer, Children, Class, Cx, Data, Element, Extent, ExtentState, Flow, Geometry, Op, Ops, Origin,
    Prepared, Request, Result,
};
use std::any::Any;
use std::sync::Arc;

blockmason::params! {
    /// Keeps some requests from going down.
    pub struct Filter {
        /// Drops the requests that match: these operations, if the other parameters fit too.
        drop: Vec<Op>,
        /// Keeps the requests that match and drops all others, but for flush and control. Either this
        /// or `drop` is given.
        keep: Vec<Op>,
        /// Only bytes in this range match. A request that reaches over its ends is cut there.
        range: Option<ByteRange>,
        /// Only requests of this many bytes match; `4k-64k` holds 4k and not 64k.
        size: Option<ByteRange>,
        /// Only requests of these origins match: `guest`, `copy`, `prefetch`, `write_back`, `internal`.
        origin: Vec<Origin>,
        /// Only requests of these classes match: `interactive`, for which somebody waits, and `background`.
        class: Vec<Class>,
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "filter",
    summary: "drops requests by operation, range, size, origin or class",
    doc: "A request that is dropped succeeds without going down: a read answers zeros, an extents request \
          that all is data, everything else that it is done. For a leg of a tee that must not see reads, \
          or for what a graph under test shall miss. What is not dropped passes as it is.\n\n\
          A request matches if its operation is named and all other parameters that are given fit. A \
          request that lies partly in `range` is cut: the part in it and those beside it go their own \
          ways at once, and the reply is the first error in the order of addresses.\n\n\
          A dropped write is lost, FUA or not; that is what was asked for. But a flush is dropped only \
          by `(drop flush)`, never by a `keep` that does not name it, since everything that did go down \
          would no longer be durable; and so is a control request. Neither has a range or a size: \
          where one is given, it passes.\n\n\
          An `if` that refers to this asks only whether a request matches, and drops or keeps what it is told to; \
          with a `range`, it asks of the parts.",
    family: Family::Route,
    params: Filter::PARAMS,
    ports: Ports::THROUGH,
    provides: &["test"],
    passes_through: true,
    carries,
    example: "element Guest (type nbd) (listen unix:filter.sock)\n\
              element Keep (type filter) (drop discard write_zeroes) (range 0-1M)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Keep -> Disk\n",
    check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Filter::from)?)),
    ..ElementType::BASE
};

fn check(params: &Params) -> Result<(), Vec<ParamError>> {
    let Filter { drop, keep, .. } = Filter::from(params)?;
    match (drop.is_empty(), keep.is_empty()) {
        (true, true) => Err(vec![params.error("drop", "either `drop` or `keep` must name operations")]),
        (false, false) => Err(vec![params.error("keep", "it cannot stand beside `drop`")]),
        _ => Ok(()),
    }
}

fn carries(params: &Params) -> Carries {
    let Ok(filter) = Filter::from(params) else { return Carries::ALL };
    // What some requests of an operation escape carries it.
    let some_escape = filter.range.is_some()
        || filter.size.is_some()
        || !(filter.origin.is_empty() && filter.class.is_empty());
    let passes = |op: &Op| match filter.drops() {
        true => some_escape || !filter.drop.contains(op),
        false => filter.keep.contains(op),
    };
    let changes = Op::ALL.iter().filter(|op| op.changes_data());
    Carries { reads: passes(&Op::Read), writes: changes.into_iter().any(passes) }
}

/// In place of a port: the part is answered here.
const DROPPED: usize = usize::MAX;

impl Filter {
    fn drops(&self) -> bool {
        self.keep.is_empty()
    }

    /// True if all but the range fits.
    fn fits(&self, req: &Request) -> bool {
        let named = if self.drops() { &self.drop } else { &self.keep };
        named.contains(&req.op)
            && self.size.is_none_or(|size| req.op.has_range() && size.contains(req.len))
            && (self.origin.is_empty() || self.origin.contains(&req.origin))
            && (self.class.is_empty() || self.class.contains(&req.class))
    }

    /// Where the bytes of `req` go that lie in the range, and where the others: a port.
    fn ways(&self, req: &Request) -> (usize, usize) {
        let port = |dropped: bool| if dropped { DROPPED } else { 0 };
        (port(self.fits(req) == self.drops()), port(!self.drops()))
    }
}

fn send<'a>(cx: Cx<'a>, port: usize, req: Request) -> Flow<'a> {
    if port != DROPPED {
        return cx.forward(port, req);
    }
    Flow::Now(Ok(match req.op {
        Op::Read => Answer::Data(Data::zeros(req.len as usize)),
        Op::Extents => Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }]),
        Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache | Op::Control => Answer::Done,
    }))
}

impl Test for Filter {
    fn test(&self, req: &Request, at: u64) -> (bool, u64) {
        let Some(range) = self.range else { return (self.fits(req), req.end()) };
        let end = range.end.unwrap_or(u64::MAX);
        let bounds = [range.start, end].into_iter().filter(|bound| *bound > at);
        let next = bounds.min().unwrap_or(u64::MAX).min(req.end());
        ((range.start..end).contains(&at) && self.fits(req), next)
    }
}

impl Element for Filter {
    /// What may be dropped is taken as it comes: done by other means, it would have another name.
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        let below = children.single()?.above();
        let takes = |op| below.ops.has(op) || !self.drops() || self.drop.contains(&op);
        let ops = Ops {
            discard: takes(Op::Discard),
            write_zeroes: takes(Op::WriteZeroes),
            fast_zero: below.ops.write_zeroes && below.ops.fast_zero,
            cache: takes(Op::Cache),
            extents: takes(Op::Extents),
        };
        Ok(Prepared::of(Geometry { ops, ..below }))
    }

    fn provide(&self, service: &str) -> Option<Box<dyn Any>> {
        let test = || Box::new(Arc::new(self.clone()) as Arc<dyn Test>) as Box<dyn Any>;
        (service == <dyn Test>::NAME).then(test)
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if !req.op.has_range() {
            let dropped = self.drops() && self.range.is_none() && self.fits(&req);
            return send(cx, if dropped { DROPPED } else { 0 }, req);
        }
        let (inside, outside) = self.ways(&req);
        let Some(range) = self.range else { return send(cx, inside, req) };
        let start = range.start.clamp(req.offset, req.end());
        let end = range.end.unwrap_or(u64::MAX).clamp(start, req.end());
        if start == end || inside == outside {
            return send(cx, outside, req);
        }
        if end - start == req.len {
            return send(cx, inside, req);
        }
        let ways = [(outside, req.offset..start), (inside, start..end), (outside, end..req.end())];
        let parts = ways
            .map(|(port, part)| Part::new(port, part.start, part.end - part.start, part.start - req.offset));
        cx.scatter_by(&req, parts.into_iter().filter(|part| part.len > 0), |port, part| send(cx, port, part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::testing::{every_op, tail_call};
    use blockmason::testing::{TestDisk, play_against_model, run};
    use proptest::prelude::*;

    fn over(parameters: &str, below: &str) -> String {
        format!("element F (type filter) {parameters} element B {below} F -> B")
    }

    #[test]
    fn what_is_not_dropped_behaves_like_a_vector() {
        let all_but_flush = "(keep read write discard write_zeroes cache extents)";
        for (seed, parameters) in
            ["(drop flush)", all_but_flush, "(drop write) (origin copy)"].iter().enumerate()
        {
            run(seed as u64, async |host| {
                let text = over(parameters, "(type mem) (size 33001)");
                let disk = TestDisk::new(&host, crate::ALL, &text, "F").await.unwrap();
                play_against_model(&disk, seed as u64, 300).await;
            });
        }
    }

    /// The operations that go down.
    fn pass(parameters: &str, change: impl Fn(&mut Request)) -> Vec<Op> {
        let text = over(parameters, "(type echo)");
        let passes = |req: &mut Request| {
            change(req);
            let reply = tail_call(&text, "F", req.clone());
            let wanted = format!("{} {}+{}", req.op, req.offset, req.len);
            assert!(reply == wanted || reply.starts_with("now Ok("), "{reply}");
            reply == wanted
        };
        every_op().filter_map(|mut req| passes(&mut req).then_some(req.op)).collect()
    }

    #[test]
    fn every_operation_can_be_dropped_alone_and_passes_in_a_tail_call() {
        for op in Op::ALL {
            let others: Vec<Op> = Op::ALL.into_iter().filter(|other| *other != op).collect();
            assert_eq!(pass(&format!("(drop {op})"), |_| ()), others);
        }
    }

    #[test]
    fn keeping_some_never_drops_a_flush() {
        assert_eq!(pass("(keep write)", |_| ()), [Op::Write, Op::Flush, Op::Control]);
        assert_eq!(pass("(keep write) (origin copy)", |_| ()), [Op::Flush, Op::Control]);
        assert_eq!(pass("(drop read flush) (range 0-1M)", |_| ()).len(), 7);
    }

    #[test]
    fn all_criteria_must_fit() {
        let dropped = |parameters: &str, change: fn(&mut Request)| {
            !pass(&format!("(drop read) {parameters}"), change).contains(&Op::Read)
        };
        assert!(dropped("(size 512-513)", |_| ()) && !dropped("(size 0-512)", |_| ()));
        assert!(dropped("(range 512-1k)", |_| ()) && !dropped("(range 1k-)", |_| ()));
        assert!(dropped("(range 0-) (size 512-) (origin copy guest)", |_| ()));
        assert!(!dropped("(range 0-) (size 513-) (origin guest)", |_| ()));
        assert!(
            !dropped("(origin copy)", |_| ()) && dropped("(origin copy)", |req| req.origin = Origin::Copy)
        );
        let background = |req: &mut Request| req.class = Class::Background;
        assert!(dropped("(class interactive)", |_| ()) && !dropped("(class interactive)", background));
        assert!(!dropped("(class background)", |_| ()) && dropped("(class background)", background));
    }

    #[test]
    fn what_the_disk_below_does_by_other_means_is_dropped_under_its_own_name() {
        run(1, async |host| {
            let text = "element Z (type filter) (drop write_zeroes)\n\
                element W (type filter) (keep read write flush)\n\
                element M (type mem) (size 1k) Z -> W -> M";
            let disk = TestDisk::new(&host, crate::ALL, text, "Z").await.unwrap();
            disk.write(0, &[1; 100]).await.unwrap();
            disk.op(Op::WriteZeroes, 0, 100).await.unwrap();
            assert_eq!(disk.read(0, 100).await.unwrap(), [1; 100]);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_request_is_cut_at_the_ends_of_the_range(
            (start, len) in (0u64..900, 1u64..500), (offset, n) in (0u64..900, 1u64..100), keep in any::<bool>()
        ) {
            run(1, async |host| {
                let what = if keep { "keep" } else { "drop" };
                let below = "(type mem) (size 1k)";
                let text = over(&format!("({what} write) (range {start}-{})", start + len), below);
                let disk = TestDisk::new(&host, crate::ALL, &text.replace("keep write", "keep write read"), "F").await.unwrap();
                disk.write(offset, &vec![1; n as usize]).await.unwrap();
                let read = disk.read(0, 1024).await.unwrap();
                for (at, byte) in (0u64..).zip(read) {
                    let inside = (start..start + len).contains(&at);
                    let written = (offset..offset + n).contains(&at) && inside == keep;
                    assert_eq!(byte, u8::from(written), "at {at}");
                }
            });
        }
    }

    #[test]
    fn dropped_reads_are_zeros_and_dropped_extents_data() {
        run(1, async |host| {
            let text = over("(drop read extents) (range 10-20)", "(type mem) (size 100)");
            let disk = TestDisk::new(&host, crate::ALL, &text, "F").await.unwrap();
            disk.write(0, &[1; 100]).await.unwrap();
            assert_eq!(disk.read(5, 10).await.unwrap(), [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]);
            disk.op(Op::WriteZeroes, 0, 100).await.unwrap();
            assert_eq!(disk.extents(12, 5).await.unwrap(), [Extent { len: 5, state: ExtentState::DATA }]);
        });
    }

    #[test]
    fn exactly_one_of_drop_and_keep() {
        for (parameters, says) in
            [("(range 0-1)", "either"), ("(drop read) (keep write)", "beside"), ("(drop sing)", "one of")]
        {
            let params = Params::parse("test", parameters, "/".as_ref()).unwrap();
            let errors = (TYPE.check)(&params).unwrap_err();
            assert!(errors[0].message.contains(says), "{errors:?}");
        }
    }
}
