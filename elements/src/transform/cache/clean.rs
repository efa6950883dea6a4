//! Brings changes below in their order: a batch, a flush, the next batch.

use super::format::{Kind, Record};
use super::index::Index;
use super::journal::{Batch, Journal, Standing};
use super::ssd::generation;
use super::{Cache, lock};
use blockmason::{Class, Cx, Data, Error, Flags, Op, Origin, Request, Result};
use futures::future::{Either, join, select};
use futures::stream::{self, StreamExt};
use std::pin::pin;
use std::time::Duration;

/// Bytes of one batch at the most: what a disk below may have to take as one commit.
pub(super) const BATCH: u64 = 24 << 20;

/// Writes of a batch that are below at once.
const PARALLEL: usize = 16;

/// What lies side by side is written below at once, up to this many bytes.
const MERGE: u64 = 1 << 20;

/// How long after a failure it is tried again: at first, and at the most.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
pub(super) const LONGEST: Duration = Duration::from_secs(30);

impl Cache {
    /// Writes a batch below. Whoever calls meanwhile is served by the next one.
    pub(super) async fn clean(&self, class: Class, cx: Cx<'_>) -> Result<()> {
        let once = async || {
            let cleaned = self.clean_once(class, cx).await;
            if cleaned.is_err() {
                self.look_for_end(cx).await;
            }
            self.tell(&cleaned, cx);
            cleaned
        };
        self.cleaning.run(once).await
    }

    /// Everything that has been answered so far is below, and durable there, when this returns.
    pub(super) async fn settle(&self, cx: Cx<'_>) -> Result<()> {
        let end = self.journal().as_ref().map_or(0, |journal| journal.answered());
        while self.journal().as_ref().is_some_and(|journal| !journal.is_cleaned(end)) {
            self.clean(Class::Interactive, cx).await?;
        }
        Ok(())
    }

    async fn clean_once(&self, class: Class, cx: Cx<'_>) -> Result<()> {
        let Some((batch, records)) = self.loaded(cx).await? else { return Ok(()) };
        if class == Class::Background {
            self.pace(&batch, cx).await;
        }
        let (sent, ahead) =
            join(self.send(&batch, &records, class, cx), self.load_ahead(batch.end, cx)).await;
        sent?;
        *lock(&self.ahead) = ahead;
        self.update(|journal| journal.clean_to(batch.end));
        if self.is_broken() {
            self.update(Journal::forget_cleaned);
        }
        Ok(())
    }

    /// The next batch, with the bytes of its changes.
    async fn loaded(&self, cx: Cx<'_>) -> Result<Option<(Batch, Vec<Record>)>> {
        let ahead = lock(&self.ahead).take();
        let batch = {
            let journal = self.journal();
            let Some(journal) = &*journal else { return Ok(None) };
            let begins = |(batch, _): &(Batch, _)| batch.entries.first().map(|(number, _)| *number);
            if ahead.as_ref().is_some_and(|ahead| begins(ahead) == Some(journal.cleaned())) {
                return Ok(ahead);
            }
            journal.batch(BATCH)
        };
        let Some(batch) = batch else { return Ok(None) };
        let records = self.load(&batch, cx).await?;
        Ok(Some((batch, records)))
    }

    /// The batch after a number, if there is a whole one, while the one before is on its way. What cannot be read is found out
    /// when it is its turn.
    async fn load_ahead(&self, begin: u64, cx: Cx<'_>) -> Option<(Batch, Vec<Record>)> {
        let ssd = self.ssd.as_ref().filter(|_| !self.is_broken())?;
        let batch = self.journal().as_ref()?.batch_from(begin, BATCH)?;
        let bytes: u64 = batch.entries.iter().map(|(_, entry)| entry.size).sum();
        if bytes < BATCH / 2 {
            return None;
        }
        ssd.sync(cx).await.ok()?;
        let mut records = Vec::with_capacity(batch.entries.len());
        for (number, entry) in &batch.entries {
            records.push(ssd.record(*number, entry, cx).await.ok()?);
        }
        Some((batch, records))
    }

    /// Writes a batch below, durably.
    async fn send(&self, batch: &Batch, records: &[Record], class: Class, cx: Cx<'_>) -> Result<()> {
        let writes = newest(records).into_iter().map(|write| {
            let write = cx.child(&Request { origin: Origin::WriteBack, class, ..write });
            cx.forward(0, Request { root: write.id, ..write })
        });
        let mut writes = stream::iter(writes).buffer_unordered(PARALLEL);
        let mut outcome = Ok(());
        while let Some(reply) = writes.next().await {
            outcome = outcome.and(reply.map(drop));
        }
        outcome?;
        self.flush_below(batch.tail, cx).await
    }

    /// A flush of a batch, after which the log begins at `tail`.
    async fn flush_below(&self, tail: super::journal::Tail, cx: Cx<'_>) -> Result<()> {
        let flush = Request { origin: Origin::WriteBack, ..Request::flush() };
        let Some(ssd) = &self.ssd else {
            return cx.forward(0, cx.child(&flush)).await.map(drop);
        };
        let marked = ssd.before_flush(cx).await;
        cx.forward(0, cx.child(&flush)).await?;
        let text = generation(cx).await?.unwrap_or_default();
        if let Err(error) = marked.and(ssd.after_flush(tail, text, cx).await) {
            self.broke(&error, cx);
            let message = "the SSD has failed and still says that it has changes for the disk below, which would come back \
                           at the next start: take the cache out of the graph";
            let stuck = Error::new(error.kind(), message).with_source(error);
            self.update(|journal| journal.standing = Standing::Lost(stuck));
        }
        Ok(())
    }

    /// The changes of a batch with their bytes.
    async fn load(&self, batch: &Batch, cx: Cx<'_>) -> Result<Vec<Record>> {
        let Some(ssd) = &self.ssd else {
            let record = |(_, entry): &(u64, super::journal::Entry)| {
                let data = entry.data.clone().unwrap_or_default();
                Record { kind: entry.kind, range: entry.range.clone(), data }
            };
            return Ok(batch.entries.iter().map(record).collect());
        };
        // The disk below must not get what a loss of power could take from the log. Where the SSD fails, nothing is
        // better than to have it below.
        if let Err(error) = ssd.sync(cx).await {
            self.broke(&error, cx);
        }
        let mut records = Vec::with_capacity(batch.entries.len());
        for (number, entry) in &batch.entries {
            let found = match ssd.record(*number, entry, cx).await {
                Ok(found) => found,
                Err(error) => {
                    let message = "what only the cache had cannot be read any more";
                    let lost = Error::new(error.kind(), message).with_source(error);
                    self.update(|journal| journal.standing = Standing::Lost(lost.clone()));
                    return Err(lost);
                }
            };
            records.push(found);
        }
        Ok(records)
    }

    /// Waits as long as the batches before have taken too little time.
    async fn pace(&self, batch: &Batch, cx: Cx<'_>) {
        let bytes: u64 = batch.entries.iter().map(|(_, entry)| entry.size).sum();
        let wait = {
            let mut tuning = self.tuning();
            let now = cx.now();
            let wait = tuning.next.map_or(Duration::ZERO, |next| next.saturating_duration_since(now));
            let takes = tuning
                .rate
                .0
                .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(bytes as f64 / rate as f64));
            tuning.next = Some(now + wait + takes);
            wait
        };
        cx.sleep(wait).await;
    }

    /// Tells the operator when the disk below stops taking changes, and when it takes them again.
    fn tell(&self, cleaned: &Result<()>, cx: Cx<'_>) {
        let mut tuning = self.tuning();
        match cleaned {
            Ok(()) if tuning.failing => {
                tuning.failing = false;
                cx.notice("changes are written below again");
            }
            Err(error) if !tuning.failing => {
                tuning.failing = true;
                let dirty = self.journal().as_ref().map_or(0, |journal| journal.dirty());
                cx.notice(format!("changes cannot be written below, {dirty} bytes wait: {error}"));
            }
            _ => {}
        }
    }

    /// Brings changes below when they are old enough, or many, until the graph closes.
    pub(super) async fn keep_clean(&self, cx: Cx<'_>) {
        let mut closing = pin!(cx.closing());
        let mut patience = PATIENCE;
        loop {
            let due = pin!(self.due(cx));
            let Either::Right(((), rest)) = select(closing, due).await else { return };
            closing = rest;
            let class = match self.is_passing() {
                true => Class::Interactive,
                false => Class::Background,
            };
            // Not called off in between: what has been sent below stays sent.
            if self.clean(class, cx).await.is_ok() {
                patience = PATIENCE;
                if self.is_passing() {
                    self.let_go(cx).await;
                }
                continue;
            }
            let Either::Right(((), rest)) = select(closing, pin!(cx.sleep(patience))).await else { return };
            closing = rest;
            patience = LONGEST.min(2 * patience);
        }
    }

    /// Waits until something is to be brought below.
    async fn due(&self, cx: Cx<'_>) {
        loop {
            let mut changed = pin!(self.changed.notified());
            changed.as_mut().enable();
            let (time, wanted) = {
                let tuning = self.tuning();
                (tuning.dirty_time, tuning.wanted)
            };
            let wait = match &*self.journal() {
                Some(journal) if journal.batch(1).is_none() => None,
                Some(journal) if journal.is_crowded() || !journal.is_cleaned(wanted) => Some(Duration::ZERO),
                Some(journal) => {
                    let due = journal.oldest().map(|came| came + time);
                    due.map(|due| due.saturating_duration_since(cx.now()))
                }
                None => None,
            };
            match wait.map(|wait| if self.is_passing() { Duration::ZERO } else { wait }) {
                None => changed.await,
                Some(Duration::ZERO) => return,
                // A change of the time, or another change that comes, is no reason to look again at once.
                Some(wait) => _ = select(changed, pin!(cx.sleep(wait))).await,
            }
        }
    }
}

/// The requests that make a disk what it is after some changes: the newest bytes of each place, neighbours together.
pub(super) fn newest(records: &[Record]) -> Vec<Request> {
    let mut index = Index::default();
    for (number, record) in (0..).zip(records).filter(|(_, record)| record.kind != Kind::Turn) {
        index.insert(&record.range, number);
    }
    let mut requests: Vec<Request> = Vec::new();
    for (range, number) in index.find(&(0..u64::MAX)) {
        let record = &records[number as usize];
        let len = range.end - range.start;
        let request = match record.kind {
            Kind::Write => {
                let from = (range.start - record.range.start) as usize;
                Request::write(range.start, record.data.slice(from..from + len as usize))
            }
            Kind::Zeroes | Kind::Turn => Request::new(Op::WriteZeroes, range.start, len),
            Kind::Unmap => Request::new(Op::WriteZeroes, range.start, len).with(Flags::MAY_UNMAP),
        };
        let joins = |last: &&mut Request| {
            last.op == Op::Write
                && request.op == Op::Write
                && last.end() == request.offset
                && last.len + len <= MERGE
        };
        match requests.last_mut().filter(joins) {
            Some(last) => {
                last.data = Data::concat([last.data.clone(), request.data]);
                last.len += len;
            }
            None => requests.push(request),
        }
    }
    requests
}
