//! How a pool reaches its device: through a port of the graph, as an image of this process, or, for tools, as a file.

use blockmason::io::FileIo;
use blockmason::{Answer, Class, Cx, Data, Error, Flow, Kind, Op, Origin, Reply, Request, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// The way down. A copy is handed along with each request.
#[derive(Clone, Copy)]
pub(super) enum Below<'a> {
    /// Through the only out port.
    Port(Cx<'a>),
    /// A file or block device that this element has open.
    Image(&'a FileIo, Cx<'a>),
    /// The same where there is no graph: calls block.
    Plain(&'a File),
}

impl<'a> Below<'a> {
    /// Hands a request down: its offset is the pool's.
    pub(super) fn submit(self, req: Request) -> Flow<'a> {
        match self {
            Below::Port(cx) => cx.forward(0, req),
            Below::Image(io, cx) => match req.op {
                Op::Read => io.read(req, cx),
                Op::Write => io.write(req, cx),
                Op::Flush => cx.later(&req, io.sync(cx)),
                Op::Discard => io.discard(req, cx),
                Op::WriteZeroes => io.write_zeroes(req, cx),
                Op::Cache | Op::Extents | Op::Control => Flow::done(),
            },
            Below::Plain(file) => Flow::Now(plain(file, &req)),
        }
    }

    /// A request of the pool's own.
    fn own(self, mut req: Request) -> Request {
        req.origin = Origin::Internal;
        if let Below::Port(cx) | Below::Image(_, cx) = self {
            req = cx.child(&req);
            req.root = req.id;
        }
        req
    }

    pub(super) async fn read(self, offset: u64, len: u64) -> Result<Data> {
        self.submit(self.own(Request::read(offset, len))).await?.into_data()
    }

    pub(super) async fn write(self, offset: u64, data: Data) -> Result<()> {
        self.submit(self.own(Request::write(offset, data))).await.map(drop)
    }

    pub(super) async fn flush(self) -> Result<()> {
        self.submit(self.own(Request::flush())).await.map(drop)
    }

    /// Gives room back where the device can.
    pub(super) async fn discard(self, offset: u64, len: u64) -> Result<()> {
        let mut req = self.own(Request::new(Op::Discard, offset, len));
        req.class = Class::Background;
        self.submit(req).await.map(drop)
    }
}

fn plain(file: &File, req: &Request) -> Reply {
    let failed = |error| Error::io(error, "the pool's file cannot be used");
    match req.op {
        Op::Read => {
            let mut bytes = vec![0; req.len as usize];
            file.read_exact_at(&mut bytes, req.offset).map_err(failed)?;
            Ok(Answer::Data(Data::shared(bytes)))
        }
        Op::Write => {
            file.write_all_at(&req.data.to_vec(), req.offset).map_err(failed)?;
            Ok(Answer::Done)
        }
        Op::Flush => file.sync_data().map(|()| Answer::Done).map_err(failed),
        Op::Discard | Op::Cache => Ok(Answer::Done),
        Op::WriteZeroes | Op::Extents | Op::Control => {
            Err(Error::new(Kind::Unsupported, "a pool asks for no such thing"))
        }
    }
}
