//! The file or device of a cache on an SSD.

use super::format::{HEADER, Header, Kind, Label, Record, SECTOR, record_len};
use super::journal::{Entry, Tail, Ticket};
use super::lines::Slot;
use blockmason::io::FileIo;
use blockmason::request::Extra;
use blockmason::{Answer, Cx, Data, Error, Flow, Kind as ErrorKind, Op, Origin, Reply, Request, Result};
use futures::future::try_join_all;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Where the device is.
pub(super) enum Media {
    /// A file or a block device of this element's own, of so many bytes.
    Image(FileIo, u64),
    /// A disk behind a port of the graph, so that tests can cut its power.
    #[cfg(test)]
    Port(u64),
}

/// The device, and what is known of it once it has been opened.
pub(super) struct Ssd {
    pub(super) media: OnceLock<Media>,
    /// None until the cache has been opened.
    label: Mutex<Option<Arc<Label>>>,
    /// Labels are written one after the other.
    labelling: tokio::sync::Mutex<()>,
}

/// A request to the device.
fn to_device<'a>(media: &'a Media, req: Request, cx: Cx<'a>) -> Flow<'a> {
    match media {
        Media::Image(io, _) => match req.op {
            Op::Read => io.read(req, cx),
            Op::Write => io.write(req, cx),
            Op::Flush => cx.later(&req, io.sync(cx)),
            Op::Discard | Op::WriteZeroes | Op::Cache | Op::Extents | Op::Control => Flow::done(),
        },
        #[cfg(test)]
        Media::Port(_) => cx.forward(1, req),
    }
}

impl Ssd {
    pub(super) fn new() -> Ssd {
        Ssd { media: OnceLock::new(), label: Mutex::new(None), labelling: tokio::sync::Mutex::new(()) }
    }

    fn locked(&self) -> MutexGuard<'_, Option<Arc<Label>>> {
        // It is replaced as a whole.
        self.label.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn media(&self) -> Result<&Media> {
        self.media.get().ok_or_else(|| Error::internal("a request came before the cache was opened"))
    }

    /// The label as it was written last.
    pub(super) fn label(&self) -> Result<Arc<Label>> {
        self.locked().clone().ok_or_else(|| Error::internal("a request came before the cache was opened"))
    }

    pub(super) fn set_label(&self, label: Option<Label>) {
        *self.locked() = label.map(Arc::new);
    }

    async fn submit(&self, req: Request, cx: Cx<'_>) -> Reply {
        let mut req = cx.child(&req);
        (req.root, req.origin) = (req.id, Origin::Internal);
        to_device(self.media()?, req, cx).await
    }

    pub(super) async fn read(&self, at: u64, len: u64, cx: Cx<'_>) -> Result<Data> {
        let data = self.submit(Request::read(at, len), cx).await?.into_data()?;
        if data.len() as u64 != len {
            return Err(Error::internal(format!("{} bytes answer a read of {len}", data.len())));
        }
        Ok(data)
    }

    pub(super) async fn write(&self, at: u64, data: Data, cx: Cx<'_>) -> Result<()> {
        self.submit(Request::write(at, data), cx).await.map(drop)
    }

    pub(super) async fn sync(&self, cx: Cx<'_>) -> Result<()> {
        self.submit(Request::flush(), cx).await.map(drop)
    }

    /// Bytes of the ring.
    pub(super) async fn ring(&self, at: u64, len: u64, cx: Cx<'_>) -> Result<Data> {
        let label = self.label()?;
        let pieces = label.pieces(at, len).map(|piece| self.read(piece.start, piece.end - piece.start, cx));
        try_join_all(pieces).await.map(Data::concat)
    }

    /// Writes a record to its place.
    pub(super) async fn append(&self, ticket: Ticket, record: &Record, cx: Cx<'_>) -> Result<()> {
        let label = self.label()?;
        let bytes = record.encode(&label, ticket.number, ticket.life);
        let mut from = 0;
        let pieces: Vec<_> = label.pieces(ticket.at, bytes.len() as u64).collect();
        let writes = pieces.into_iter().map(|piece| {
            let len = (piece.end - piece.start) as usize;
            from += len;
            self.write(piece.start, bytes.slice(from - len..from), cx)
        });
        try_join_all(writes).await.map(drop)
    }

    /// The record that is expected at `tail`, if it is there and right, with its length; and not longer than `room`.
    pub(super) async fn find(&self, tail: Tail, room: u64, cx: Cx<'_>) -> Result<Option<(Record, u64)>> {
        if room < SECTOR {
            return Ok(None);
        }
        let label = self.label()?;
        let first = self.ring(tail.at, SECTOR, cx).await?;
        let Some(header) = Header::decode(&first.to_vec(), &label, tail) else { return Ok(None) };
        let len = record_len(header.payload);
        if len > room {
            return Ok(None);
        }
        let rest = self.ring(tail.at + SECTOR, len - SECTOR, cx).await?;
        let whole = Data::concat([first, rest]);
        let end = (HEADER + header.payload) as usize;
        Ok(header.with(whole.slice(HEADER as usize..end)).map(|record| (record, len)))
    }

    /// A record that has been written, or found, before.
    pub(super) async fn record(&self, number: u64, entry: &Entry, cx: Cx<'_>) -> Result<Record> {
        if entry.kind != Kind::Write {
            return Ok(Record { kind: entry.kind, range: entry.range.clone(), data: Data::empty() });
        }
        let tail = Tail { at: entry.at, number, life: entry.life };
        let found = self.find(tail, entry.size, cx).await?;
        let damaged = || Error::new(ErrorKind::Io, "a record of the cache is damaged");
        found.map(|(record, _)| record).ok_or_else(damaged)
    }

    /// The bytes of a slot.
    pub(super) async fn slot(&self, slot: Slot, within: Range<u64>, cx: Cx<'_>) -> Result<Data> {
        let at = self.label()?.slot_at(slot.number);
        self.read(at + within.start, within.end - within.start, cx).await
    }

    /// Bytes of a slot or of the ring, if they can be had without waiting: else they are read as ever.
    pub(super) fn slot_now(&self, slot: Slot, within: &Range<u64>) -> Option<Data> {
        let at = self.label().ok()?.slot_at(slot.number);
        self.read_now(at + within.start..at + within.end)
    }

    /// The same of the ring.
    pub(super) fn ring_now(&self, at: u64, len: u64) -> Option<Data> {
        let pieces = self.label().ok()?.pieces(at, len).map(|piece| self.read_now(piece));
        pieces.collect::<Option<Vec<Data>>>().map(Data::concat)
    }

    fn read_now(&self, range: Range<u64>) -> Option<Data> {
        match self.media.get()? {
            Media::Image(io, _) => io.read_now(range.start, range.end - range.start),
            #[cfg(test)]
            Media::Port(_) => None,
        }
    }

    /// Writes the next label; what it says is then durable.
    pub(super) async fn publish(&self, change: impl FnOnce(&mut Label), cx: Cx<'_>) -> Result<()> {
        let _alone = self.labelling.lock().await;
        let mut label = Label::clone(&*self.label()?);
        label.generation += 1;
        change(&mut label);
        self.write(label.place(), Data::copy_of(&label.encode()), cx).await?;
        self.sync(cx).await?;
        self.set_label(Some(label));
        Ok(())
    }

    /// A flush of the disk below is about to change its generation.
    pub(super) async fn before_flush(&self, cx: Cx<'_>) -> Result<()> {
        if self.label()?.text.is_empty() {
            return Ok(());
        }
        self.publish(|label| label.flushing = true, cx).await
    }

    /// The disk below has everything before `tail`, durably.
    pub(super) async fn after_flush(&self, tail: Tail, text: String, cx: Cx<'_>) -> Result<()> {
        let change = |label: &mut Label| {
            (label.tail, label.flushing, label.text) = (tail, false, text);
        };
        self.publish(change, cx).await
    }
}

impl Ssd {
    /// Remembers what the disk below is called after a flush, for when the cache is closed.
    pub(super) async fn remember(&self, cx: Cx<'_>) -> Result<()> {
        if self.label()?.text.is_empty() {
            return Ok(());
        }
        let text = generation(cx).await?.unwrap_or_default();
        if let Some(label) = &mut *self.locked() {
            Arc::make_mut(label).text = text;
        }
        Ok(())
    }
}

/// What the disk below calls its generation: it changes whenever the disk is written by anybody. None if it knows no such thing.
pub(super) async fn generation(cx: Cx<'_>) -> Result<Option<String>> {
    let text = ask_below("generation", "", cx).await?;
    Ok(text.map(|text| super::format::cut(&text).to_owned()).filter(|text| !text.is_empty()))
}

/// Whether the disk below was written since it called itself so, as far as it can tell: not at all (`same`), only through whoever
/// had it open then (`own`), or by `other`s. None if it knows no such thing.
pub(super) async fn since(text: &str, cx: Cx<'_>) -> Result<Option<String>> {
    ask_below("since", text, cx).await
}

/// Asks the disk below something. None if it does not know what that is.
pub(super) async fn ask_below(verb: &str, argument: &str, cx: Cx<'_>) -> Result<Option<String>> {
    let mut ask = Request { origin: Origin::Internal, ..Request::new(Op::Control, 0, 0) };
    let control = Some((verb.to_owned(), argument.to_owned()));
    ask.extra = Some(Box::new(Extra { control, ..Extra::default() }));
    match cx.forward(0, cx.child(&ask)).await {
        Ok(Answer::Text(text)) => Ok(Some(text)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}
