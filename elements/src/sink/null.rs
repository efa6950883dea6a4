//! A disk that forgets everything: reads are zeros, writes vanish. For measuring what lies above, and
//! for graphs that only need somewhere to end.

use blockmason::describe::{Build, ElementType, Family, Ports, Survives};
use blockmason::lang::value::Size;
use blockmason::{
    Answer, Children, Cx, Data, Element, Error, Extent, ExtentState, Flow, Geometry, Op, Ops, Prepared,
    Request, Result,
};
use std::sync::Arc;

blockmason::params! {
    /// A disk that forgets everything.
    pub struct Null {
        /// Bytes that it pretends to have.
        size: Size = "1G",
    }
}

/// See the module.
pub const TYPE: ElementType = ElementType {
    name: "null",
    summary: "a disk that forgets everything and reads as zeros",
    doc: "Answers every request at once. Reads are zeros, writes and all other changes are dropped. \
          For measuring what lies above it.\n\nA flush has nothing to do. Nothing survives anything.",
    family: Family::Sink,
    params: Null::PARAMS,
    ports: Ports::SINK,
    survives: Survives::Nothing,
    example: "element Guest (type nbd) (listen unix:null.sock)\n\
              element Nothing (type null) (size 1G)\n\
              Guest -> Nothing\n",
    check: Null::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Null::from)?)),
    ..ElementType::BASE
};

impl Element for Null {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(self.size.0) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        match req.op {
            Op::Read => Flow::Now(Ok(Answer::Data(Data::zeros(req.len as usize)))),
            Op::Extents => {
                Flow::Now(Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::HOLE }])))
            }
            Op::Write | Op::Flush | Op::Discard | Op::WriteZeroes | Op::Cache => Flow::done(),
            Op::Control => cx.fail(&req, Error::unsupported("there is nothing to control here")),
        }
    }
}

#[cfg(test)]
mod tests {
    use blockmason::testing::{TestDisk, run};

    #[test]
    fn reads_zeros_whatever_was_written() {
        run(1, async |host| {
            let graph = "element N (type null) (size 10k)";
            let disk = TestDisk::new(&host, crate::ALL, graph, "N").await.unwrap();
            assert_eq!(disk.size(), 10 << 10);
            disk.write(5, b"abc").await.unwrap();
            assert_eq!(disk.read(0, 100).await.unwrap(), [0; 100]);
            assert!(disk.read(10 << 10, 1).await.is_err());
        });
    }
}
