//! Reads: from the journal, from lines, from below; each line once, whoever wants it.

use super::Cache;
use super::format::{HEADER, sum};
use super::journal::Known;
use super::lines::{Flight, Found, Lead, Look, Place, Slot};
use blockmason::{Answer, Class, Cx, Data, Error, Flags, Flow, Op, Origin, PoolBuf, Reply, Request, Result};
use futures::future::try_join_all;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The longest read below that brings lines, in bytes.
const FILL: u64 = 1 << 20;

/// Where the bytes of a part of a read come from.
enum Source {
    Here(Data),
    /// From this position of the ring on, in the record of that number.
    Ring(u64, u64, u64),
    Slot(u64, Slot, Found, Range<u64>),
    Coming(u64, Arc<Flight>, Range<u64>),
    /// These lines are to be read from below by this request, to find this range in them.
    Fill(Vec<Lead>, Range<u64>),
    /// Just read it.
    Below(Range<u64>),
}

impl Cache {
    pub(super) fn read<'a>(self: &'a Arc<Self>, req: Request, cx: Cx<'a>) -> Flow<'a> {
        let range = req.offset..req.end();
        if range.is_empty() {
            return cx.forward(0, req);
        }
        let size = cx.geometry().size;
        let advice = self.streams().read(&range, size);
        if !advice.ahead.is_empty() {
            self.prefetch(advice.ahead.clone(), cx);
        }
        if let Some(data) = self.at_hand(&range) {
            self.count(true);
            if !advice.keep {
                self.spent(&range);
            }
            return Flow::Now(Ok(Answer::Data(data)));
        }
        let keep = advice.keep && !self.is_broken();
        cx.later(&req.clone(), async move {
            let reply = self.read_later(req, keep, cx).await;
            if !keep {
                self.spent(&range);
            }
            reply
        })
    }

    fn count(&self, hit: bool) {
        let counter = if hit { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Lines that a stream which is not to be kept has read to their end are not needed any more.
    fn spent(&self, range: &Range<u64>) {
        let lines = self.lines().of(range).filter(|(_, within)| within.end == self.lines().size);
        lines.for_each(|(line, _)| self.lines().spent(line));
    }

    /// All of a range, if that can be had without waiting: it is in memory, or in the page cache of the SSD.
    fn at_hand(&self, range: &Range<u64>) -> Option<Data> {
        let (mut pieces, mut touched) = (Vec::with_capacity(1), Vec::with_capacity(1));
        for (part, known) in self.known(range) {
            match known {
                Known::Zeros => pieces.push(Data::zeros((part.end - part.start) as usize)),
                Known::Memory(data) => pieces.push(data),
                Known::Ring(at, number) => {
                    pieces.push(self.ssd.as_ref()?.ring_now(at, part.end - part.start)?);
                    self.journal().as_ref().filter(|journal| journal.has(number))?;
                }
                Known::Gap => {
                    for (line, within) in self.lines().of(&part) {
                        pieces.push(self.line_at_hand(line, &within)?);
                        touched.push((line, within));
                    }
                }
            }
        }
        touched.iter().for_each(|(line, within)| self.lines().touch(*line, within));
        Some(if pieces.len() == 1 { pieces.swap_remove(0) } else { Data::concat(pieces) })
    }

    fn line_at_hand(&self, line: u64, within: &Range<u64>) -> Option<Data> {
        let found = self.lines().peek(line, within)?;
        match &found.place {
            Place::Memory(data) => Some(data.slice(within.start as usize..within.end as usize)),
            // What was loaded has still to be compared with its checksum.
            Place::Slot(slot) if slot.proven && !self.is_broken() => {
                let data = self.ssd.as_ref()?.slot_now(*slot, within)?;
                self.lines().is_still(line, &found).then_some(data)
            }
            Place::Slot(_) => None,
        }
    }

    /// What the journal knows of a range.
    fn known(&self, range: &Range<u64>) -> Vec<(Range<u64>, Known)> {
        match &*self.journal() {
            Some(journal) if !journal.knows_nothing() => journal.find(range, HEADER),
            _ => vec![(range.clone(), Known::Gap)],
        }
    }

    async fn read_later(self: &Arc<Self>, req: Request, keep: bool, cx: Cx<'_>) -> Reply {
        // A read longer than the cache would drive out its own lines for ever: the second time it does without them.
        let mut again = false;
        loop {
            let sources = self.sources(&(req.offset..req.end()), keep, again);
            let miss =
                |source: &Source| matches!(source, Source::Coming(..) | Source::Fill(..) | Source::Below(..));
            if !std::mem::replace(&mut again, true) {
                self.count(!sources.iter().any(miss));
            }
            let pieces = sources.into_iter().map(|source| self.fetch(source, &req, cx));
            let pieces: Option<Vec<Data>> = try_join_all(pieces).await?.into_iter().collect();
            // Else something that was found had gone before it was read.
            if let Some(pieces) = pieces {
                return Ok(Answer::Data(Data::concat(pieces)));
            }
        }
    }

    /// Where the bytes of a range come from; `plain`, without lines. Every line that this request has to read from below is registered by then.
    fn sources(self: &Arc<Self>, range: &Range<u64>, keep: bool, plain: bool) -> Vec<Source> {
        let mut sources = Vec::new();
        for (part, known) in self.known(range) {
            let len = part.end - part.start;
            match known {
                Known::Zeros => sources.push(Source::Here(Data::zeros(len as usize))),
                Known::Memory(data) => sources.push(Source::Here(data)),
                Known::Ring(at, number) => sources.push(Source::Ring(at, len, number)),
                Known::Gap if plain => sources.push(Source::Below(part)),
                Known::Gap => self.sources_of_lines(&part, keep, &mut sources),
            }
        }
        sources
    }

    fn sources_of_lines(self: &Arc<Self>, range: &Range<u64>, keep: bool, sources: &mut Vec<Source>) {
        let size = self.lines().size;
        for (line, within) in self.lines().of(range) {
            let part = line * size + within.start..line * size + within.end;
            let found = match self.lines().look(line, &within) {
                Look::Here(found) => match found.place.clone() {
                    Place::Memory(data) => {
                        Source::Here(data.slice(within.start as usize..within.end as usize))
                    }
                    Place::Slot(slot) => Source::Slot(line, slot, found, within),
                },
                Look::Coming(flight) => Source::Coming(line, flight, within),
                Look::Missing if !keep => Source::Below(part),
                // Another one may have registered it in between; then nothing is kept of this read.
                Look::Missing => match self.lines().lead(line, size) {
                    Some(lead) => Source::Fill(vec![lead], part),
                    None => Source::Below(part),
                },
            };
            match (sources.last_mut(), found) {
                (Some(Source::Fill(leads, part)), Source::Fill(more, next))
                    if part.end == next.start && (leads.len() as u64 + 1) * size <= FILL.max(size) =>
                {
                    leads.extend(more);
                    part.end = next.end;
                }
                (Some(Source::Below(part)), Source::Below(next)) if part.end == next.start => {
                    part.end = next.end;
                }
                (_, found) => sources.push(found),
            }
        }
    }

    /// The bytes; None if they have gone since they were found.
    async fn fetch(self: &Arc<Self>, source: Source, req: &Request, cx: Cx<'_>) -> Result<Option<Data>> {
        match source {
            Source::Here(data) => Ok(Some(data)),
            Source::Ring(at, len, number) => {
                let read = self.ssd()?.ring(at, len, cx).await;
                if let Err(error) = &read {
                    self.broke(error, cx);
                }
                let there = self.journal().as_ref().is_some_and(|journal| journal.has(number));
                if there { read.map(Some) } else { Ok(None) }
            }
            Source::Slot(line, slot, found, within) => self.read_slot(line, slot, &found, within, cx).await,
            Source::Coming(line, flight, within) => {
                let Some(outcome) = flight.outcome().await else { return Ok(None) };
                let data = outcome.map_err(|error| error.at("read", line * self.lines().size))?;
                Ok(Some(data.slice(within.start as usize..within.end as usize)))
            }
            Source::Fill(leads, part) => self.fill(leads, part, req, cx).await.map(Some),
            Source::Below(part) => {
                let below = self.to_read(&part, req, cx);
                cx.forward(0, below).await?.into_data().map(Some)
            }
        }
    }

    /// A read below on behalf of another request.
    fn to_read(&self, range: &Range<u64>, parent: &Request, cx: Cx<'_>) -> Request {
        let read = Request { op: Op::Read, flags: Flags::NONE, data: Data::empty(), ..parent.clone() };
        cx.child(&Request { offset: range.start, len: range.end - range.start, ..read })
    }

    /// Reads lines that follow each other from below, and keeps them.
    async fn fill(
        self: &Arc<Self>,
        leads: Vec<Lead>,
        wanted: Range<u64>,
        req: &Request,
        cx: Cx<'_>,
    ) -> Result<Data> {
        let size = self.lines().size;
        let (Some(first), Some(last)) = (leads.first(), leads.last()) else { return Ok(Data::empty()) };
        let range = first.line * size..((last.line + 1) * size).min(cx.geometry().size);
        // After the lines have been registered: a change is among these, or it takes the flights out.
        let newer = match &*self.journal() {
            Some(journal) => journal.touching(&range),
            None => Vec::new(),
        };
        let read = cx.forward(0, self.to_read(&range, req, cx)).await.and_then(Answer::into_data);
        let data = match read {
            Ok(data) if data.len() as u64 == range.end - range.start => data,
            Ok(data) => return Err(Error::internal(format!("{} bytes answer a read", data.len()))),
            Err(error) => {
                leads.into_iter().for_each(|lead| lead.end(Err(error.clone())));
                return Err(error);
            }
        };
        for lead in leads {
            let start = lead.line * size;
            let piece = data.slice(
                (start - range.start) as usize..((start + size).min(range.end) - range.start) as usize,
            );
            let mut valid = self.lines().covered(&(0..piece.len() as u64));
            for (_, within) in
                newer.iter().flat_map(|newer| self.lines().of(newer)).filter(|(l, _)| *l == lead.line)
            {
                valid &= !self.lines().touched(&within);
            }
            let next = wanted.end.clamp(start, start + size) - start;
            self.keep(&lead, &piece, valid, next, cx).await;
            lead.end(Ok(piece));
        }
        Ok(data.slice((wanted.start - range.start) as usize..(wanted.end - range.start) as usize))
    }

    /// Puts a line into memory, or on the SSD.
    async fn keep(&self, lead: &Lead, bytes: &Data, valid: u128, next: u64, cx: Cx<'_>) {
        if valid == 0 {
            return;
        }
        let mut buf = PoolBuf::new(self.lines().size as usize);
        bytes.copy_to(&mut buf[..bytes.len()]);
        buf[bytes.len()..].fill(0);
        let data = buf.freeze();
        if self.ssd.is_none() {
            lead.install(Place::Memory(data), valid, next);
            return;
        }
        if self.is_broken() {
            return;
        }
        let Some(number) = self.lines().slot(lead.line) else { return };
        let slot = Slot { number, sum: sum(&data), proven: true };
        let written = self.write_slot(slot, data, cx).await;
        let kept = match &written {
            Ok(()) => lead.install(Place::Slot(slot), valid, next),
            Err(error) => {
                self.broke(error, cx);
                false
            }
        };
        if !kept {
            self.lines().give_back(lead.line, number);
        }
    }

    async fn write_slot(&self, slot: Slot, data: Data, cx: Cx<'_>) -> Result<()> {
        let ssd = self.ssd()?;
        let at = ssd.label()?.slot_at(slot.number);
        ssd.write(at, data, cx).await
    }

    /// Reads a line from the SSD. What cannot be read, or is not what was written there, is forgotten and read from below.
    async fn read_slot(
        &self,
        line: u64,
        slot: Slot,
        found: &Found,
        within: Range<u64>,
        cx: Cx<'_>,
    ) -> Result<Option<Data>> {
        let ssd = self.ssd()?;
        let whole = 0..self.lines().size;
        let asked = if slot.proven { within.clone() } else { whole };
        let data = match ssd.slot(slot, asked, cx).await {
            Ok(data) => data,
            Err(error) => {
                self.broke(&error, cx);
                self.lines().forget(line, found);
                return Ok(None);
            }
        };
        if !self.lines().is_still(line, found) {
            return Ok(None);
        }
        if slot.proven {
            return Ok(Some(data));
        }
        if sum(&data) != slot.sum {
            cx.notice(format!("line {line} of the cache is damaged, and read from below again"));
            self.lines().forget(line, found);
            return Ok(None);
        }
        self.lines().proven(line, found);
        Ok(Some(data.slice(within.start as usize..within.end as usize)))
    }

    /// Who reads what is not here yet of a range, in runs.
    fn leads(&self, range: &Range<u64>, end: u64) -> Vec<Vec<Lead>> {
        let size = self.lines().size;
        let range = range.start.min(end)..range.end.min(end);
        let mut runs: Vec<Vec<Lead>> = Vec::new();
        for (line, _) in self.lines().of(&range) {
            let whole = line * size..end.min((line + 1) * size);
            if self.journal().as_ref().is_some_and(|journal| journal.has_all(&whole)) {
                continue;
            }
            let Some(lead) = self.lines().lead(line, size.min(end - line * size)) else { continue };
            let goes_on = |run: &&mut Vec<Lead>| {
                run.last().is_some_and(|last| last.line + 1 == line) && (run.len() as u64 + 1) * size <= FILL
            };
            match runs.last_mut().filter(goes_on) {
                Some(run) => run.push(lead),
                None => runs.push(vec![lead]),
            }
        }
        runs
    }

    /// Nobody waits for it: whoever wants it later sees what is wrong.
    async fn fill_ahead(self: &Arc<Self>, run: Vec<Lead>, cx: Cx<'_>) -> Reply {
        let at = run.first().map_or(0, |lead| lead.line * self.lines().size);
        let read = Request { origin: Origin::Prefetch, class: Class::Background, ..Request::read(at, 0) };
        self.fill(run, at..at, &cx.child(&read), cx).await.map(|_| Answer::Done)
    }

    /// Reads what is not here yet of a range.
    pub(super) async fn fetch_ahead(self: &Arc<Self>, range: Range<u64>, cx: Cx<'_>) {
        for run in self.leads(&range, cx.geometry().size) {
            drop(self.fill_ahead(run, cx).await);
        }
    }

    /// The same, going on by itself.
    pub(super) fn prefetch(self: &Arc<Self>, range: Range<u64>, cx: Cx<'_>) {
        if self.is_broken() {
            return;
        }
        for run in self.leads(&range, cx.geometry().size) {
            let cache = self.clone();
            drop(cx.detach_with(move |cx| Flow::later(async move { cache.fill_ahead(run, cx).await })));
        }
    }
}
