//! How a pool reaches its device: through a port of the graph, as an image of this process, or, for tools, as a file.

use super::format::BLOCK;
use blockmason::io::FileIo;
use blockmason::{Answer, Cx, Data, Error, Extra, Flow, Kind, Op, Origin, Reply, Request, Result};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};

/// Waits for what does not need the thread's own tasks. Where that is a task of tokio itself, locks of tokio would now and then
/// say that others should have their turn, for ever.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    futures::executor::block_on(tokio::task::unconstrained(future))
}

/// The way down. A copy is handed along with each request.
#[derive(Clone, Copy)]
pub(super) enum Below<'a> {
    /// Through the only out port.
    Port(Cx<'a>),
    /// A file or block device that this element has open.
    Image(&'a FileIo, Cx<'a>),
    /// The same on a thread that may wait for the device, while graphs may use it.
    Blocking(&'a FileIo),
    /// A file that nobody else uses; calls block.
    Plain(BorrowedFd<'a>),
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
            Below::Blocking(io) if req.op == Op::Flush => Flow::later(io.sync_here()),
            Below::Blocking(io) => Flow::Now(plain(io.image().file().as_fd(), &req)),
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

    /// Asks something of whatever is below. Only graphs have that.
    pub(super) async fn control(self, verb: &str, argument: String) -> Result<String> {
        let mut req = self.own(Request::new(Op::Control, 0, 0));
        let control = Some((verb.to_owned(), argument));
        req.extra = Some(Box::new(Extra { control, ..Extra::default() }));
        match (self, self.submit(req).await?) {
            (Below::Port(_), Answer::Text(text)) => Ok(text),
            _ => Err(Error::unsupported("what is below answers no such thing")),
        }
    }

    /// Something that an operator wants to know, if this is about a graph.
    pub(super) fn notice(self, what: String) {
        if let Below::Port(cx) | Below::Image(_, cx) = self {
            cx.notice(what);
        }
    }

    /// Sets room aside for blocks, where a pool is on a file: no write to them fails for want of room.
    ///
    /// # Errors
    /// [`Kind::NoSpace`].
    pub(super) async fn allocate(self, blocks: Range<u64>) -> Result<()> {
        match self {
            // A disk has the room that it says it has.
            Below::Port(_) => Ok(()),
            Below::Image(io, _) => {
                let image = io.image().clone();
                let done = blockmason::rt::blocking(move || allocate(image.file().as_fd(), blocks)).await;
                done.unwrap_or_else(|| Err(Error::internal("setting room aside has panicked")))
            }
            Below::Blocking(io) => allocate(io.image().file().as_fd(), blocks),
            Below::Plain(file) => allocate(file, blocks),
        }
    }

    pub(super) async fn flush(self) -> Result<()> {
        self.submit(self.own(Request::flush())).await.map(drop)
    }
}

fn allocate(file: BorrowedFd<'_>, blocks: Range<u64>) -> Result<()> {
    let (at, len) = (blocks.start * BLOCK, (blocks.end - blocks.start) * BLOCK);
    loop {
        return match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, at, len) {
            // A device, or a file system that has no such promise to make.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NODEV | Errno::INVAL) => Ok(()),
            Err(Errno::INTR) => continue,
            Err(Errno::NOSPC | Errno::DQUOT) => {
                Err(Error::new(Kind::NoSpace, "the file system that the pool is on is full"))
            }
            Err(errno) => Err(Error::os(errno, "no room can be set aside in the pool's file")),
        };
    }
}

fn plain(file: BorrowedFd<'_>, req: &Request) -> Reply {
    let failed = |errno| Error::os(errno, "the pool's file cannot be used").at(req.op.name(), req.offset);
    match req.op {
        Op::Read => {
            let mut bytes = vec![0; req.len as usize];
            let mut done = 0;
            while done < bytes.len() {
                match rustix::io::pread(file, &mut bytes[done..], req.offset + done as u64) {
                    Ok(0) => return Err(failed(Errno::IO)),
                    Ok(count) => done += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            Ok(Answer::Data(Data::shared(bytes)))
        }
        Op::Write => {
            let (bytes, mut done) = (req.data.to_vec(), 0);
            while done < bytes.len() {
                match rustix::io::pwrite(file, &bytes[done..], req.offset + done as u64) {
                    Ok(count) => done += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            Ok(Answer::Done)
        }
        Op::Flush => rustix::fs::fdatasync(file).map(|()| Answer::Done).map_err(failed),
        Op::Discard => {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(file, flags, req.offset, req.len) {
                Ok(()) => Ok(Answer::Done),
                Err(Errno::OPNOTSUPP) => {
                    Err(Error::new(Kind::Unsupported, "what the pool is on takes no room back"))
                }
                Err(errno) => Err(failed(errno)),
            }
        }
        Op::WriteZeroes | Op::Cache | Op::Extents | Op::Control => {
            Err(Error::new(Kind::Unsupported, "a pool asks for no such thing"))
        }
    }
}
