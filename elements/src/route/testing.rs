//! Elements that only tests have.

use blockmason::describe::{Build, Catalogue, ElementType, Family, Ports};
use blockmason::lang::value::{Size, Time};
use blockmason::testing::{TestDisk, run};
use blockmason::{
    Answer, Children, Cx, Element, Errno, Error, Flow, Geometry, Op, Ops, Prepared, Request, Result,
};
use std::sync::Arc;

/// What graphs of tests are made of.
pub(crate) const CATALOGUE: Catalogue = &[
    &BROKEN,
    &ECHO,
    &SPY,
    &super::debug_log::TYPE,
    &super::filter::TYPE,
    &super::linear::TYPE,
    &super::probe::TYPE,
    &super::stripe::TYPE,
    &super::tee::TYPE,
    &super::slice::TYPE,
    &super::readonly::TYPE,
    &crate::sink::mem::TYPE,
];

const PLAIN: ElementType = ElementType { family: Family::Sink, ports: Ports::SINK, ..ElementType::BASE };

blockmason::params! {
    /// Fails every request.
    pub(crate) struct Broken {
        size: Size = "1k",
        errno: i32 = "5",
        after: Time = "0s",
        fast_zero: bool = "yes",
    }
}

static BROKEN: ElementType = ElementType {
    name: "broken",
    params: Broken::PARAMS,
    check: Broken::check,
    build: |build: &Build<'_>| Ok(Arc::new(build.read(Broken::from)?)),
    ..PLAIN
};

impl Element for Broken {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        let ops = Ops { fast_zero: self.fast_zero, ..Ops::ALL };
        Ok(Prepared::of(Geometry { ops, ..Geometry::new(self.size.0) }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.later(&req, async move {
            cx.sleep(self.after.0).await;
            Err(Error::os(Errno::from_raw_os_error(self.errno), "broken on purpose"))
        })
    }
}

/// Answers every request with a text that says which it was.
struct Echo;

static ECHO: ElementType = ElementType { name: "echo", build: |_| Ok(Arc::new(Echo)), ..PLAIN };

impl Element for Echo {
    fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { ops: Ops::ALL, ..Geometry::new(10_000) }))
    }

    fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
        let Request { op, offset, len, .. } = req;
        Flow::Now(Ok(Answer::Text(format!("{op} {offset}+{len}"))))
    }
}

/// Answers every request with a text that says whether the one below was answered at once, and how.
struct Spy;

static SPY: ElementType =
    ElementType { name: "spy", ports: Ports::THROUGH, build: |_| Ok(Arc::new(Spy)), ..PLAIN };

impl Element for Spy {
    /// Nothing is refused on the way here, so that the element below has to.
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { read_only: false, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        Flow::Now(Ok(Answer::Text(match cx.forward(0, req) {
            Flow::Now(Ok(Answer::Text(text))) => text,
            Flow::Now(reply) => format!("now {reply:?}"),
            Flow::Later(_) => "later".to_owned(),
        })))
    }
}

/// What an [`Echo`] below, which is the only element that answers with a text, says of `req`. So it is
/// certain that `req` reached it as it is, and that the reply came back at once and as it was: in a tail
/// call.
pub(crate) fn tail_call(text: &str, top: &str, req: Request) -> String {
    let text = format!("element Spy (type spy)\nSpy -> {top}\n{text}");
    run(1, async |host| {
        let disk = TestDisk::new(&host, CATALOGUE, &text, "Spy").await.unwrap();
        match disk.submit(req).await.unwrap() {
            Answer::Text(text) => text,
            other => panic!("{other:?}"),
        }
    })
}

/// Every operation on 512 bytes at 512.
pub(crate) fn every_op() -> impl Iterator<Item = Request> {
    Op::ALL.into_iter().map(|op| match op {
        Op::Write => Request::write(512, blockmason::Data::copy_of(&[1; 512])),
        op if op.has_range() => Request::new(op, 512, 512),
        op => Request::new(op, 0, 0),
    })
}
