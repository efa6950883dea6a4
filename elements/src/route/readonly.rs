//! A disk that nobody can change from above.

use blockmason::describe::{Build, Carries, ElementType, Family, Handover, Ports};
use blockmason::{Children, Cx, Element, Error, Flow, Geometry, Kind, Prepared, Request, Result};
use std::sync::Arc;

blockmason::params! {
    /// A disk that nobody can change from above.
    pub struct ReadOnly {}
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "readonly",
    summary: "refuses every change of the disk below",
    doc: "Writes, discards and writes of zeros are refused with EPERM, and exports above announce a \
          read-only disk. Everything else passes as it is. For a golden image that several guests share, \
          or a leg of a graph that must not be changed.\n\n\
          A flush passes: it covers what others wrote to the disk below.",
    family: Family::Route,
    params: ReadOnly::PARAMS,
    ports: Ports::THROUGH,
    passes_through: true,
    carries: |_| Carries::NO_WRITES,
    handover: Handover::Free,
    example: "element Guest (type nbd) (listen unix:readonly.sock)\n\
              element Sealed (type readonly)\n\
              element Disk (type file) (path disk.img) (size 64M)\n\
              Guest -> Sealed -> Disk\n",
    check: ReadOnly::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(ReadOnly::from)?)),
    ..ElementType::BASE
};

impl Element for ReadOnly {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { read_only: true, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op.changes_data() {
            return cx.fail(&req, Error::new(Kind::Denied, "the disk is read-only"));
        }
        cx.forward(0, req)
    }
}

#[cfg(test)]
mod tests {
    use crate::route::testing::{every_op, tail_call};
    use blockmason::testing::{TestDisk, run};
    use blockmason::{Errno, Kind, Op, Request};

    #[test]
    fn changes_are_refused_at_the_source_and_by_the_element() {
        let text = "element R (type readonly) element E (type echo) R -> E";
        for req in every_op().filter(|req| req.op.changes_data()) {
            let reply = tail_call(text, "R", req.clone());
            assert!(reply.starts_with("now Err(R: ") && reply.contains("Denied"), "{reply}");
            run(1, async |host| {
                let text = "element R (type readonly) element M (type mem) (size 1k) R -> M";
                let disk = TestDisk::new(&host, crate::ALL, text, "R").await.unwrap();
                let error = disk.submit(req).await.unwrap_err();
                assert_eq!((error.kind(), error.errno()), (Kind::Denied, Errno::PERM));
            });
        }
    }

    #[test]
    fn everything_else_is_a_tail_call() {
        let text = "element R (type readonly) element E (type echo) R -> E";
        assert_eq!(tail_call(text, "R", Request::read(1, 2)), "read 1+2");
        for req in every_op().filter(|req| !req.op.changes_data()) {
            let wanted = format!("{} {}+{}", req.op, req.offset, req.len);
            assert_eq!(tail_call(text, "R", req), wanted);
        }
        let text = "element R (type readonly) element M (type mem) (size 1k) R -> M";
        assert!(tail_call(text, "R", Request::new(Op::Cache, 0, 2)).starts_with("now Ok"));
    }
}
