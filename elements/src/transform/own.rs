//! Requests of the element's own to the disk below it.

use blockmason::sched::Holder;
use blockmason::{Class, Cx, Data, Op, Origin, Reply, Request, Result};

/// The out port.
pub(super) const OUT: usize = 0;

/// Makes requests on behalf of nobody above.
#[derive(Clone)]
pub(super) struct Io<'a> {
    pub(super) cx: Cx<'a>,
    like: Request,
}

impl<'a> Io<'a> {
    /// For what somebody waits for.
    pub(super) fn new(cx: Cx<'a>) -> Io<'a> {
        let mut like = cx.child(&Request::flush());
        (like.root, like.origin) = (like.id, Origin::Internal);
        Io { cx, like }
    }

    /// For what may wait.
    pub(super) fn background(cx: Cx<'a>) -> Io<'a> {
        let mut io = Io::new(cx);
        io.like.class = Class::Background;
        io
    }

    /// For whom a range is held.
    pub(super) fn holder(&self, doing: &'static str) -> Holder {
        Holder { root: self.like.root, doing }
    }

    async fn send(&self, make: impl FnOnce(&mut Request)) -> Reply {
        let mut req = self.cx.child(&self.like);
        make(&mut req);
        self.cx.forward(OUT, req).await
    }

    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<Data> {
        let read = |req: &mut Request| (req.op, req.offset, req.len) = (Op::Read, offset, len);
        self.send(read).await?.into_data()
    }

    pub(super) async fn write(&self, offset: u64, data: Data) -> Result<()> {
        let write = |req: &mut Request| {
            (req.op, req.offset, req.len) = (Op::Write, offset, data.len() as u64);
            req.data = data;
        };
        self.send(write).await.map(drop)
    }

    #[cfg(feature = "compress")]
    pub(super) async fn discard(&self, range: std::ops::Range<u64>) -> Result<()> {
        let discard = |req: &mut Request| {
            (req.op, req.offset, req.len) = (Op::Discard, range.start, range.end - range.start);
        };
        self.send(discard).await.map(drop)
    }

    pub(super) async fn flush(&self) -> Result<()> {
        self.send(|_| ()).await.map(drop)
    }
}
