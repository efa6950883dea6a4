//! Fails requests on purpose: before anything happens below, or after, as a lost acknowledgement.

use super::{Chance, Count};
use blockmason::describe::{Access, Build, ElementType, Family, Handler, Handover, Ports};
use blockmason::lang::value::{ByteRange, Percent};
use blockmason::{Cx, Element, Errno, Error, Flow, Op, Request, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

blockmason::params! {
    /// Fails requests on purpose.
    struct Params {
        /// The operations that fail: `read`, `write`, `flush`, `discard`, `write_zeroes`, `cache`,
        /// `extents`, `control`. All of them if none is named.
        op: Vec<Operation>,
        /// Only requests that touch these bytes fail. A flush touches none.
        range: Option<ByteRange>,
        /// Lets this many requests pass that would fail, then begins.
        after: u64 = "0",
        /// Fails this many requests, then no more.
        count: Count = "unlimited",
        /// How likely each of them is to fail.
        probability: Percent = "100%",
        /// What the guest sees.
        errno: Name = "EIO",
        /// Fails a request after it was done below: the acknowledgement is lost, the change is not.
        late: bool = "no",
    }
}

/// An operation by its name.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Operation(Op);

impl FromStr for Operation {
    type Err = String;

    fn from_str(text: &str) -> Result<Operation, String> {
        let found = Op::ALL.into_iter().find(|op| op.name() == text);
        found.map(Operation).ok_or_else(|| {
            let names: Vec<_> = Op::ALL.iter().map(|op| op.name()).collect();
            format!("expected one of {}, found `{text:.40}`", names.join(", "))
        })
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

blockmason::text_value!(Operation, "operation");

blockmason::words! {
    /// The errors that a disk can be asked for.
    enum Name: "errno" {
        Io = "EIO", NoSpace = "ENOSPC", Perm = "EPERM", ReadOnly = "EROFS", Invalid = "EINVAL",
        NoMemory = "ENOMEM", Unsupported = "EOPNOTSUPP", Busy = "EBUSY", TimedOut = "ETIMEDOUT",
        Shutdown = "ESHUTDOWN",
    }
}

impl Name {
    fn errno(self) -> Errno {
        match self {
            Name::Io => Errno::IO,
            Name::NoSpace => Errno::NOSPC,
            Name::Perm => Errno::PERM,
            Name::ReadOnly => Errno::ROFS,
            Name::Invalid => Errno::INVAL,
            Name::NoMemory => Errno::NOMEM,
            Name::Unsupported => Errno::OPNOTSUPP,
            Name::Busy => Errno::BUSY,
            Name::TimedOut => Errno::TIMEDOUT,
            Name::Shutdown => Errno::SHUTDOWN,
        }
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "error",
    summary: "fails requests on purpose",
    doc: "Fails requests of the chosen operations, in the chosen range, with the chosen errno: always, by \
          chance, a number of times, or from the Nth on. For testing what guests and the elements above \
          make of a bad disk. What is not hit passes as it is, errors from below too.\n\n\
          A request that fails has not gone down, so nothing has changed. With `(late yes)` it was done \
          below and only its answer is lost: a failed write may then be there, and a failed flush has \
          made things durable.",
    family: Family::Fault,
    params: Params::PARAMS,
    ports: Ports::THROUGH,
    handlers: &[
        Handler { name: "probability", access: Access::ReadWrite, doc: "how likely a request is to fail" },
        Handler { name: "count", access: Access::ReadWrite, doc: "how many requests are left to fail" },
        Handler { name: "failed", access: Access::Read, doc: "how many requests it has failed" },
    ],
    passes_through: true,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:error.sock)\n\
              element Bad (type error) (op read write) (range 1M-2M) (probability 10%)\n\
              element Memory (type mem) (size 64M)\n\
              Guest -> Bad -> Memory\n",
    check: Params::check,
    build: |build: &Build<'_>| {
        let params = build.read(Params::from)?;
        let chance = Chance::new(params.range, params.after, params.count, params.probability);
        Ok(Arc::new(Fail { params, chance }))
    },
    ..ElementType::BASE
};

struct Fail {
    params: Params,
    chance: Chance,
}

impl Fail {
    fn error(&self) -> Error {
        Error::os(self.params.errno.errno(), "failed on purpose")
    }
}

impl Element for Fail {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let concerned = self.params.op.is_empty() || self.params.op.contains(&Operation(req.op));
        if !concerned || !self.chance.hits(&req, cx) {
            return cx.forward(0, req);
        }
        let (op, offset) = (req.op, req.offset);
        let error = self.error().in_element(cx.name()).at(op.name(), offset);
        if !self.params.late {
            return Flow::fail(error);
        }
        cx.forward(0, req).then(|reply| reply.and(Err(error)))
    }

    fn get(&self, handler: &str) -> Result<String> {
        self.chance.get(handler, "failed")
    }

    fn set(&self, handler: &str, value: &str) -> Result<()> {
        self.chance.set(handler, value)
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, graph, play_against_model, run};
    use blockmason::{Element, Errno, Host, Op, Request};
    use std::sync::Arc;

    async fn disk(host: &Arc<Host>, parameters: &str) -> (TestDisk, Arc<dyn Element>) {
        let text = format!("element E (type error) {parameters} element M (type mem) (size 64k) E -> M");
        let graph = graph(host, crate::ALL, &text, "E").unwrap();
        let element = graph.instances().find(|instance| instance.name == "E").unwrap().element.clone();
        (TestDisk::serve(host, graph).await, element)
    }

    #[test]
    fn every_operation_can_fail_alone() {
        for bad in Op::ALL {
            run(1, async |host| {
                let (disk, element) = disk(&host, &format!("(op {bad}) (errno ENOSPC)")).await;
                let memory_refuses = 1;
                let mut failed = 0;
                for op in Op::ALL {
                    let mut req = Request::new(op, 0, 512);
                    if op == Op::Write {
                        req.data = blockmason::Data::zeros(512);
                    }
                    if let Err(error) = disk.submit(req).await {
                        failed += 1;
                        assert!(op == bad || op == Op::Control, "{op}: {error}");
                        if op == bad {
                            assert_eq!(error.errno(), Errno::NOSPC);
                            assert_eq!(error.to_string(), format!("E: {op} at 0: failed on purpose"));
                        }
                    }
                }
                assert_eq!(failed, if bad == Op::Control { 1 } else { 1 + memory_refuses });
                assert_eq!(element.get("failed").unwrap(), "1");
            });
        }
    }

    #[test]
    fn a_range_is_hit_by_whatever_touches_it() {
        run(1, async |host| {
            let (disk, _) = disk(&host, "(range 4k-8k)").await;
            for (offset, len, good) in
                [(0, 4096, true), (0, 4097, false), (8191, 1, false), (8192, 1, true), (4096, 4096, false)]
            {
                assert_eq!(disk.read(offset, len).await.is_ok(), good, "{offset}+{len}");
            }
            disk.op(Op::Flush, 0, 0).await.unwrap();
        });
    }

    #[test]
    fn fails_the_next_few_after_some() {
        run(1, async |host| {
            let (disk, element) = disk(&host, "(op read) (after 2) (count 3)").await;
            let mut good = Vec::new();
            for _ in 0..7 {
                disk.write(0, b"x").await.unwrap();
                good.push(disk.read(0, 1).await.is_ok());
            }
            assert_eq!(good, [true, true, false, false, false, true, true]);
            assert_eq!(element.get("count").unwrap(), "0");
            element.set("count", "1").unwrap();
            assert!(disk.read(0, 1).await.is_err());
            assert!(disk.read(0, 1).await.is_ok());
            assert_eq!(element.get("failed").unwrap(), "4");
            element.set("count", "unlimited").unwrap();
            assert_eq!(element.get("count").unwrap(), "unlimited");
            assert!(element.set("count", "some").is_err() && element.set("failed", "0").is_err());
        });
    }

    #[test]
    fn by_chance() {
        run(1, async |host| {
            let (disk, element) = disk(&host, "(probability 25%)").await;
            let mut failed = 0;
            for _ in 0..1000 {
                failed += u32::from(disk.read(0, 1).await.is_err());
            }
            assert!((180..320).contains(&failed), "{failed}");
            element.set("probability", "0%").unwrap();
            play_against_model(&disk, 1, 200).await;
        });
    }

    #[test]
    fn nothing_changes_unless_it_is_late() {
        for late in [false, true] {
            run(1, async |host| {
                let parameters = if late { "(op write) (late yes)" } else { "(op write)" };
                let (disk, _) = disk(&host, parameters).await;
                assert_eq!(disk.write(0, b"abc").await.unwrap_err().errno(), Errno::IO);
                let expected = if late { *b"abc" } else { [0; 3] };
                assert_eq!(disk.read(0, 3).await.unwrap(), expected);
            });
        }
    }
}
