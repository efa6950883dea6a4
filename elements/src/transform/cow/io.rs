//! Requests of the element's own to the disks below it.

use super::format::LONGEST;
use blockmason::sched::Holder;
use blockmason::{Answer, Class, Cx, Data, Extra, Flags, Op, Origin, Reply, Request, Result};

/// The out ports, in the order of their names in the type.
pub(super) const BASE: usize = 0;
pub(super) const OVERLAY: usize = 1;

/// Makes requests: on behalf of one from above, or of nobody.
#[derive(Clone)]
pub(super) struct Io<'a> {
    pub(super) cx: Cx<'a>,
    like: Request,
}

impl<'a> Io<'a> {
    /// For what the element does of itself.
    pub(super) fn own(cx: Cx<'a>, origin: Origin) -> Io<'a> {
        let mut like = cx.child(&Request::flush());
        (like.root, like.origin) = (like.id, origin);
        if origin == Origin::Copy {
            like.class = Class::Background;
        }
        Io { cx, like }
    }

    /// For what a request from above entails.
    pub(super) fn of(cx: Cx<'a>, parent: &Request) -> Io<'a> {
        let mut like = Request::flush();
        (like.root, like.origin, like.class) = (parent.root, Origin::Internal, parent.class);
        Io { cx, like }
    }

    /// For whom a range is held.
    pub(super) fn holder(&self, doing: &'static str) -> Holder {
        Holder { root: self.like.root, doing }
    }

    async fn send(&self, port: usize, make: impl FnOnce(&mut Request)) -> Reply {
        let mut req = self.cx.child(&self.like);
        make(&mut req);
        self.cx.forward(port, req).await
    }

    pub(super) async fn read(&self, port: usize, offset: u64, len: u64) -> Result<Data> {
        if len == 0 {
            return Ok(Data::empty());
        }
        let read = |req: &mut Request| (req.op, req.offset, req.len) = (Op::Read, offset, len);
        self.send(port, read).await?.into_data()
    }

    pub(super) async fn write(&self, port: usize, offset: u64, data: Data, flags: Flags) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let write = |req: &mut Request| {
            (req.op, req.offset, req.len, req.flags) = (Op::Write, offset, data.len() as u64, flags);
            req.data = data;
        };
        self.send(port, write).await.map(drop)
    }

    pub(super) async fn zero(&self, port: usize, offset: u64, len: u64) -> Result<()> {
        let zero = |req: &mut Request| {
            (req.op, req.offset, req.len, req.flags) = (Op::WriteZeroes, offset, len, Flags::MAY_UNMAP);
        };
        self.send(port, zero).await.map(drop)
    }

    pub(super) async fn flush(&self, port: usize) -> Result<()> {
        self.send(port, |_| ()).await.map(drop)
    }

    /// What changes when the overlay disk may have forgotten what was not flushed. None is unknown.
    pub(super) async fn incarnation(&self) -> Option<String> {
        let ask = |req: &mut Request| {
            let control = Some(("incarnation".to_owned(), String::new()));
            (req.op, req.extra) = (Op::Control, Some(Box::new(Extra { control, ..Extra::default() })));
        };
        match self.send(OVERLAY, ask).await {
            Ok(Answer::Text(text)) if (1..=LONGEST).contains(&text.len()) => Some(text),
            // Nobody below knows, or those who know do not agree.
            Ok(_) | Err(_) => None,
        }
    }
}
