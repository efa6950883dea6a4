//! Changes, flushes, and what else is about them.

use super::Cache;
use super::clean::PATIENCE;
use super::format::{Kind, Record, record_len};
use super::journal::{Journal, Room, Standing, Ticket};
use super::params::Durability;
use blockmason::{
    Answer, Class, Cx, Data, Error, Extent, ExtentState, Flow, Kind as ErrorKind, Op, Reply, Request, Result,
};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What a change takes in memory beside its bytes, about.
const OVERHEAD: u64 = 256;

/// A record that is on its way to the ring. Dropped, nobody knows what became of it: it counts as failed.
struct Landing<'a> {
    cache: &'a Cache,
    ticket: Ticket,
    landed: bool,
}

impl Landing<'_> {
    fn end(mut self, outcome: Result<()>) {
        self.landed = true;
        self.cache.update(|journal| journal.landed(self.ticket, outcome));
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        if !self.landed {
            let dropped = Err(Error::new(ErrorKind::Unavailable, "it was dropped before it ended"));
            self.cache.update(|journal| journal.landed(self.ticket, dropped));
        }
    }
}

/// A change that goes past the journal.
struct Passing<'a>(&'a Cache);

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.0.update(Journal::passed);
    }
}

impl Cache {
    /// Hands a change below, and keeps lines right.
    pub(super) fn through<'a>(&'a self, mut req: Request, cx: Cx<'a>) -> Flow<'a> {
        req.stabilise();
        let bytes = match req.op {
            Op::Write if self.ssd.is_none() => Some(req.data.clone()),
            Op::WriteZeroes if self.ssd.is_none() => {
                u32::try_from(req.len).ok().map(|len| Data::zeros(len as usize))
            }
            // What is on the SSD is read again. What is discarded, the disk below decides.
            _ => None,
        };
        let change = self.lines().begin(&(req.offset..req.end()));
        cx.forward(0, req).then(move |reply| {
            self.lines().end(&change, bytes.as_ref().filter(|_| reply.is_ok()));
            reply
        })
    }

    /// Keeps a change, to bring it below later; or, where that is not possible, hands it below.
    pub(super) async fn back(self: &Arc<Self>, req: Request, cx: Cx<'_>) -> Reply {
        let longest = self.longest.load(Ordering::Relaxed);
        let piece = if req.op == Op::Write { longest } else { req.len };
        for from in (0..req.len).step_by(piece as usize) {
            let part = req.part(from, piece.min(req.len - from), req.offset + from);
            loop {
                if self.keep_change(&part, cx).await? {
                    break;
                }
                if let Some(reply) = self.pass(&part, cx).await {
                    reply?;
                    break;
                }
            }
        }
        match req.is_fua() {
            true => self.flush(Request::flush(), cx).await,
            false => Ok(Answer::Done),
        }
    }

    /// True if the change is kept; false if it has to go below.
    async fn keep_change(&self, req: &Request, cx: Cx<'_>) -> Result<bool> {
        if self.is_passing() {
            return Ok(false);
        }
        let _keeping = self.hold(cx).await?;
        let range = req.offset..req.end();
        // In memory of its own, exactly as much as it needs, that nobody changes.
        let data = if req.op == Op::Write { Data::from(req.data.to_vec()) } else { Data::empty() };
        let record = Record { kind: Kind::of(req), range, data };
        let Some(ticket) = self.append(&record, cx).await? else { return Ok(false) };
        let kept = self.wait(|journal| journal.is_kept(ticket)).await;
        if kept {
            // What was in a line, or is on its way there, is older.
            self.lines().drop_range(&record.range);
        }
        Ok(kept)
    }

    /// Gives a change its place and writes it there. None if changes are not kept now.
    async fn append(&self, record: &Record, cx: Cx<'_>) -> Result<Option<Ticket>> {
        let Some(ticket) = self.room(record, cx).await? else { return Ok(None) };
        self.put(ticket, record, cx).await;
        Ok(Some(ticket))
    }

    async fn put(&self, ticket: Ticket, record: &Record, cx: Cx<'_>) {
        let landing = Landing { cache: self, ticket, landed: false };
        let Some(ssd) = &self.ssd else { return landing.end(Ok(())) };
        let written = ssd.append(ticket, record, cx).await;
        if let Err(error) = &written {
            self.broke(error, cx);
        }
        landing.end(written);
    }

    /// Waits for room, in the order of asking, and sees to it that a turn comes first where one must.
    async fn room(&self, record: &Record, cx: Cx<'_>) -> Result<Option<Ticket>> {
        let _turn = self.turn.lock().await;
        loop {
            if let Some(room) = self.reserve(record, cx).await? {
                return Ok(room);
            }
            let life = cx.rng(|rng| rng.u64(..));
            let turn = Record { kind: Kind::Turn, range: life..life, data: Data::empty() };
            if let Some(Some(ticket)) = self.reserve(&turn, cx).await? {
                self.put(ticket, &turn, cx).await;
            }
        }
    }

    /// None if a turn has to come first; no ticket if changes are not kept.
    async fn reserve(&self, record: &Record, cx: Cx<'_>) -> Result<Option<Option<Ticket>>> {
        let payload = record.data.len() as u64;
        let (size, data) = match &self.ssd {
            Some(_) => (record_len(payload), None),
            None => (OVERHEAD + payload, Some(record.data.clone())),
        };
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let room = match &mut *self.journal() {
                Some(journal) => journal.reserve(record.kind, &record.range, data.clone(), size, cx.now()),
                None => return Err(Error::internal("changes are not kept here")),
            };
            match room {
                Room::Here(ticket) => return Ok(Some(Some(ticket))),
                Room::Pass => return Ok(Some(None)),
                Room::Turn => return Ok(None),
                Room::Refused(error) => return Err(error),
                Room::Wait => changed.await,
                Room::Clean => {
                    // Guests wait as long as the disk below takes nothing; they are told no error.
                    if self.clean(Class::Interactive, cx).await.is_err() {
                        cx.sleep(PATIENCE).await;
                    }
                }
            }
        }
    }

    /// Hands a change below when all that is kept has gone before. None if changes are kept again meanwhile.
    async fn pass(&self, req: &Request, cx: Cx<'_>) -> Option<Reply> {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let standing = self.journal().as_ref().map(|journal| journal.standing.clone());
            match standing {
                Some(Standing::Passing) => {}
                Some(Standing::Lost(error)) => return Some(Err(error)),
                Some(Standing::Keeping) | None => return None,
            }
            if self.journal().as_mut().is_some_and(Journal::pass) {
                break;
            }
            let waits = self.journal().as_ref().is_some_and(|journal| journal.batch(1).is_none());
            if waits {
                changed.await;
            } else if self.clean(Class::Interactive, cx).await.is_err() {
                cx.sleep(PATIENCE).await;
            }
        }
        let passing = Passing(self);
        self.owes_flush.store(true, Ordering::SeqCst);
        let reply = self.through(cx.child(req), cx).await;
        drop(passing);
        Some(reply)
    }

    /// Makes durable what has been answered.
    pub(super) async fn flush(&self, req: Request, cx: Cx<'_>) -> Reply {
        let standing = self.journal().as_ref().map(|journal| journal.standing.clone());
        let local = match standing {
            None => false,
            Some(Standing::Lost(error)) => return Err(error),
            // What is on its way below is durable there.
            Some(Standing::Passing) => {
                self.settle(cx).await?;
                false
            }
            Some(Standing::Keeping) => self.ssd.is_some() && self.params.durability == Durability::Local,
        };
        match &self.ssd {
            Some(ssd) if local => ssd.sync(cx).await?,
            _ => self.settle(cx).await?,
        }
        // What went past the journal is below and not flushed there.
        let owes = self.owes_flush.swap(false, Ordering::SeqCst);
        if local && !owes {
            return Ok(Answer::Done);
        }
        let reply = cx.forward(0, cx.child(&req)).await;
        match (&reply, &self.ssd) {
            (Err(_), _) => _ = self.owes_flush.fetch_or(owes, Ordering::SeqCst),
            (Ok(_), Some(ssd)) if !self.keeps() => ssd.remember(cx).await?,
            _ => {}
        }
        reply
    }

    /// What has to see all changes: a snapshot below, say.
    pub(super) async fn settled(&self, req: Request, cx: Cx<'_>) -> Reply {
        let range = if req.op == Op::Extents { req.offset..req.end() } else { 0..u64::MAX };
        let below = self.journal().as_ref().is_none_or(|journal| journal.is_below(&range));
        let map = req.extra.as_ref().is_some_and(|extra| extra.map.is_some());
        if !below && req.op == Op::Extents && !map {
            // What is not below yet is data, whatever is below.
            return Ok(Answer::Extents(vec![Extent { len: req.len, state: ExtentState::DATA }]));
        }
        if !below {
            self.settle(cx).await?;
        }
        let control = req.extra.as_ref().and_then(|extra| extra.control.as_ref());
        let asks = control.is_some_and(|(verb, _)| verb == "incarnation");
        let reply = cx.forward(0, req).await;
        match reply {
            Ok(Answer::Text(text)) if asks => Ok(Answer::Text(format!("{text}, {}", self.incarnation(cx)?))),
            reply => reply,
        }
    }

    /// Changes whenever what was answered and not flushed may have been lost here.
    fn incarnation(&self, cx: Cx<'_>) -> Result<String> {
        if self.ssd.is_some() {
            let boot = crate::sink::file::boot();
            return boot
                .ok_or_else(|| Error::unsupported("the kernel does not say which life of it this is"));
        }
        let name = || format!("cache {:016x}", cx.rng(|rng| rng.u64(..)));
        Ok(self.incarnation.get_or_init(name).clone())
    }
}
