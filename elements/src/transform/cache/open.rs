//! Opens a cache on an SSD, and closes it.

use super::clean::{LONGEST, PATIENCE};
use super::format::{EMPTY, ENTRY, Found, Label, PLACE, SECTOR, decode_entry, encode_entry};
use super::journal::{Journal, Standing, Tail};
use super::lines::{Lines, Slot};
use super::params::{Mode, Stale};
use super::ssd::{Media, Ssd, generation, since};
use super::{Cache, lock};
use blockmason::io::{Access, FileIo, FileOptions, Image, Opened, Registry};
use blockmason::{Cx, Data, Error, Kind as ErrorKind, Result};
use futures::future::{Either, select};
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// What must be zero for a device to become a cache, in bytes.
const BLANK: u64 = 64 << 10;

/// How much of a table is read at once, in bytes; whole entries.
const TABLE: u64 = 1 << 20;

/// The caches that this process has open: each once, whatever graphs come and go.
static OPEN: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

/// A place in that list.
pub(super) struct Held((u64, u64));

impl Held {
    fn of(image: &Image) -> Result<Held> {
        let path = image.path();
        let failed = |error| Error::io(error, "the cache cannot be looked at").with_path(path);
        let found = path.metadata().map_err(failed)?;
        let id = if found.rdev() == 0 { (found.dev(), found.ino()) } else { (0, found.rdev()) };
        if lock(&OPEN).insert(id) {
            return Ok(Held(id));
        }
        Err(Error::new(ErrorKind::Busy, "another cache has it open").with_path(path))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        lock(&OPEN).remove(&self.0);
    }
}

fn open_image(path: &Path, graph: &str) -> Result<(FileIo, u64)> {
    let image = Registry::of_process().open(path, Access { write: true, direct: false }, graph)?;
    let refused = |errno, what: &'static str| Error::os(errno, what).with_path(path);
    let stat = rustix::fs::fstat(image.file()).map_err(|e| refused(e, "it cannot be looked at"))?;
    let (size, device) = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => (stat.st_size as u64, false),
        FileType::BlockDevice => {
            let end = rustix::fs::seek(image.file(), SeekFrom::End(0));
            (end.map_err(|e| refused(e, "its size cannot be found out"))?, true)
        }
        _ => return Err(Error::invalid("it is neither a file nor a block device").with_path(path)),
    };
    Ok((FileIo::new(image, FileOptions { size, direct: false, device }), size))
}

/// Makes a file of that size with all its room set aside, unless there is something already.
fn create(path: &Path, size: u64) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let refused = |errno, what: &'static str| Error::os(errno, what).with_path(path);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, rustix::fs::Mode::from_raw_mode(0o600))
        .map_err(|errno| refused(errno, "it cannot be created"))?;
    let made = rustix::fs::ftruncate(&file, size).and_then(|()| {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size) {
            // A file system that has no such promise to make.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
            done => done,
        }
    });
    made.map_err(|errno| {
        // Half made, it would pass for a small cache the next time.
        let _ = rustix::fs::unlink(path);
        refused(errno, "there is no room for a cache of that size")
    })
}

impl Cache {
    /// Opens the file if there is one. What there is not is made when the graph is handed over to.
    pub(super) fn find_ssd(&self) -> Result<()> {
        let (Some(ssd), Some(path)) = (&self.ssd, &self.params.path) else { return Ok(()) };
        let size = self.params.size.map(|size| size.0);
        let mut ring = size.map(|size| self.ring(size));
        if path.0.exists() {
            let (io, size) = open_image(&path.0, &self.graph)?;
            ring = Some(found_ring(&io).unwrap_or_else(|| self.ring(size)));
            let _ = ssd.media.set(Media::Image(io, size));
        } else if size.is_none() {
            return Err(
                Error::invalid("there is no such file: give it a `size` and it is made").with_path(&path.0)
            );
        }
        let longest = Label { ring: ring.unwrap_or(0), ..Label::unknown() }.payload();
        self.longest.store(longest, Ordering::Relaxed);
        Ok(())
    }

    /// Bytes of the ring of a new cache of `size` bytes.
    fn ring(&self, size: u64) -> u64 {
        let usual = if self.params.mode == Mode::Back { size / 2 } else { 0 };
        self.params.log.map_or(usual, |log| log.0).max(super::format::RING) / SECTOR * SECTOR
    }

    pub(super) fn make_ssd(&self) -> Result<()> {
        let (Some(ssd), Some(path), Some(size)) = (&self.ssd, &self.params.path, self.params.size) else {
            return Ok(());
        };
        if ssd.media.get().is_none() {
            create(&path.0, size.0)?;
            let (io, size) = open_image(&path.0, &self.graph)?;
            let _ = ssd.media.set(Media::Image(io, size));
        }
        Ok(())
    }

    pub(super) fn file(&self) -> Option<Opened> {
        match self.ssd.as_ref()?.media.get()? {
            Media::Image(io, size) => Opened::of(io.image().path(), io.image().file(), *size).ok(),
            #[cfg(test)]
            Media::Port(_) => None,
        }
    }

    /// Waits until the cache is open, by this caller if need be.
    pub(super) async fn opened(&self, cx: Cx<'_>) -> Result<()> {
        while !self.is_open.load(Ordering::Acquire) {
            self.opening.run(async || self.open_once(cx).await).await?;
        }
        Ok(())
    }

    /// Opens the cache, and tries again as long as that fails. False if the graph closes before.
    pub(super) async fn keep_opening(&self, cx: Cx<'_>) -> bool {
        let mut closing = pin!(cx.closing());
        let (mut patience, mut told) = (PATIENCE, false);
        while let Err(error) = self.opened(cx).await {
            *lock(&self.error) = error.to_string();
            if !std::mem::replace(&mut told, true) {
                cx.notice(format!("the cache cannot be opened: {error}"));
            }
            let Either::Right(((), rest)) = select(closing, pin!(cx.sleep(patience))).await else {
                return false;
            };
            closing = rest;
            patience = LONGEST.min(2 * patience);
        }
        lock(&self.error).clear();
        true
    }

    async fn open_once(&self, cx: Cx<'_>) -> Result<()> {
        if self.is_open.load(Ordering::Acquire) {
            return Ok(());
        }
        let (ssd, disk) = (self.ssd()?, cx.geometry().size);
        let size = match ssd.media()? {
            Media::Image(io, size) => {
                if lock(&self.held).is_none() {
                    let held = Held::of(io.image())?;
                    *lock(&self.held) = Some(held);
                }
                *size
            }
            #[cfg(test)]
            Media::Port(size) => *size,
        };
        let label = match find(ssd, disk, size, cx).await? {
            Some(label) => label,
            None => self.new_label(disk, size, cx).await?,
        };
        ssd.set_label(Some(label.clone()));
        self.longest.store(label.payload(), Ordering::Relaxed);
        self.is_alone(cx).await?;
        let mut journal = self.replay(&label, cx).await?;
        let text = generation(cx).await?.unwrap_or_default();
        let stale = is_stale(&label, &text, cx).await?;
        if stale && journal.is_dirty() {
            self.decide(&mut journal)?;
        }
        let lines = match self.lines.get() {
            Some(lines) => lines.clone(),
            None => {
                let lines = Arc::new(Lines::new(label.line, label.slots as usize, true));
                if !stale {
                    load(ssd, &label, &lines, cx).await?;
                }
                lines
            }
        };
        let tail = if journal.is_dirty() { label.tail } else { journal.head() };
        ssd.publish(
            |label| (label.table, label.flushing, label.text, label.tail) = (None, false, text, tail),
            cx,
        )
        .await?;
        let _ = self.lines.set(lines);
        journal.needs_turn();
        if self.params.mode == Mode::Through {
            journal.standing = Standing::Passing;
        }
        let keeps = self.params.mode == Mode::Back || journal.is_dirty();
        *self.journal() = keeps.then_some(journal);
        self.is_open.store(true, Ordering::Release);
        self.changed.notify_waiters();
        Ok(())
    }

    /// What becomes of changes for a disk that somebody else has written.
    fn decide(&self, journal: &mut Journal) -> Result<()> {
        match self.params.stale {
            Stale::Replay => {}
            Stale::Discard => *journal = self.empty(journal.head()),
            Stale::Refuse => {
                let message = format!(
                    "somebody else has written the disk below since this cache last did, and {} bytes of changes are \
                     only here: `(stale discard)` forgets them, `(stale replay)` writes them over what is there",
                    journal.dirty()
                );
                return Err(Error::new(ErrorKind::Denied, message));
            }
        }
        Ok(())
    }

    fn empty(&self, tail: Tail) -> Journal {
        let ring = self.ssd.as_ref().and_then(|ssd| ssd.label().ok()).map_or(0, |label| label.ring);
        Journal::new(ring, self.params.dirty.map_or(u64::MAX, |dirty| dirty.0), tail)
    }

    /// The changes in the ring, up to the first that is not right.
    async fn replay(&self, label: &Label, cx: Cx<'_>) -> Result<Journal> {
        let ssd = self.ssd()?;
        // What only the machine's caches hold must not be overtaken by what follows from it.
        ssd.sync(cx).await?;
        let mut journal = self.empty(label.tail);
        while let Some((record, len)) = ssd.find(journal.head(), label.ring - journal.used(), cx).await? {
            journal.found(record.kind, record.range, len, cx.now());
        }
        Ok(journal)
    }

    /// The label of a cache that is still to be made.
    async fn new_label(&self, disk: u64, size: u64, cx: Cx<'_>) -> Result<Label> {
        if !self.ssd()?.read(0, BLANK.min(size), cx).await?.is_zero() {
            let message = "it is no cache, or a damaged one, and not empty: zero its first 64 KiB if it may be overwritten";
            return Err(Error::new(ErrorKind::Denied, message));
        }
        let (id, life) = cx.rng(|rng| (rng.u64(..), rng.u64(..)));
        Label::new(id, life, disk, size, self.params.line(), self.ring(size)).ok_or_else(|| {
            let message = format!("a cache of {size} bytes has no room for eight lines beside its log");
            Error::invalid(message)
        })
    }

    /// Writes down which lines there are, so that the next open finds them. Nothing is in flight.
    pub(super) fn close(&self) {
        // What is in memory is open as long as it lives.
        if self.ssd.is_none() {
            return;
        }
        if self.is_open.swap(false, Ordering::AcqRel)
            && !self.is_broken()
            && let Err(error) = self.write_table()
        {
            tracing::warn!("the cache is cold at the next start: {error}");
        }
        *lock(&self.held) = None;
    }

    fn write_table(&self) -> Result<()> {
        let ssd = self.ssd()?;
        let io = match ssd.media()? {
            Media::Image(io, _) => io,
            #[cfg(test)]
            Media::Port(_) => return Ok(()),
        };
        if io.image().has_failed() {
            return Err(Error::new(ErrorKind::Io, "a flush has failed before"));
        }
        let mut label = Label::clone(&*ssd.label()?);
        let mut table = vec![0; label.table_len() as usize];
        table.as_chunks_mut().0.fill(encode_entry(EMPTY, 0, 0));
        for (line, valid, slot) in self.lines().slots() {
            let from = slot.number as usize * ENTRY as usize;
            table[from..from + ENTRY as usize].copy_from_slice(&encode_entry(line, valid, slot.sum));
        }
        let file = io.image().file();
        let failed = |errno| Error::os(errno, "its table cannot be written").with_path(io.image().path());
        let write = |at: u64, bytes: &[u8]| -> Result<()> {
            let mut done = 0;
            while done < bytes.len() {
                match rustix::io::pwrite(file, &bytes[done..], at + done as u64) {
                    Ok(0) => return Err(failed(Errno::NOSPC)),
                    Ok(count) => done += count,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            rustix::fs::fdatasync(file).map_err(failed)
        };
        write(label.table_at(), &table)?;
        label.generation += 1;
        label.table = Some(crc32fast::hash(&table));
        write(label.place(), &label.encode())?;
        ssd.set_label(Some(label));
        Ok(())
    }
}

/// Bytes of the ring of a cache that exists.
fn found_ring(io: &FileIo) -> Option<u64> {
    let mut bytes = [0; SECTOR as usize];
    [0, PLACE].into_iter().find_map(|at| {
        rustix::io::pread(io.image().file(), &mut bytes[..], at).ok()?;
        match Label::decode(&bytes) {
            Found::Valid(label) => Some(label.ring),
            Found::Version(_) | Found::Other => None,
        }
    })
}

/// The label that counts; None if there is none.
async fn find(ssd: &Ssd, disk: u64, size: u64, cx: Cx<'_>) -> Result<Option<Label>> {
    let mut found: Option<Label> = None;
    for at in [0, PLACE] {
        if size < at + SECTOR {
            continue;
        }
        match Label::decode(&ssd.read(at, SECTOR, cx).await?.to_vec()) {
            Found::Valid(other) => {
                found = found.filter(|known| known.generation > other.generation).or(Some(other));
            }
            Found::Version(version) => {
                let message = format!("the cache has version {version}, which is not known here");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            Found::Other => {}
        }
    }
    let Some(mut found) = found else { return Ok(None) };
    // A disk that has grown was written by whoever has made it grow: where it says its generation, that is noticed as ever.
    if found.disk < disk && !found.text.is_empty() {
        found.disk = disk;
    }
    if found.disk != disk {
        let message = format!("the cache belongs to a disk of {} bytes, not to one of {disk}", found.disk);
        return Err(Error::invalid(message));
    }
    if found.end() > size {
        let message = format!("the cache has {} bytes, what it is on only {size}", found.end());
        return Err(Error::invalid(message));
    }
    Ok(Some(found))
}

/// True if somebody else has written the disk below since this cache last has. A disk that cannot tell who has is trusted where
/// the cache died while it was about to flush there.
async fn is_stale(label: &Label, text: &str, cx: Cx<'_>) -> Result<bool> {
    if label.text.is_empty() {
        return Ok(false);
    }
    match since(&label.text, cx).await?.as_deref() {
        Some(since) => Ok(since == "other"),
        None => Ok(text != label.text && !label.flushing),
    }
}

/// Takes the lines that were there when the cache was closed.
async fn load(ssd: &Ssd, label: &Label, lines: &Lines, cx: Cx<'_>) -> Result<()> {
    let Some(sum) = label.table else { return Ok(()) };
    let mut pieces = Vec::new();
    for at in (0..label.table_len()).step_by(TABLE as usize) {
        let len = TABLE.min(label.table_len() - at);
        pieces.push(ssd.read(label.table_at() + at, len, cx).await?);
    }
    if super::format::sum(&Data::concat(pieces.clone())) != sum {
        cx.notice("the table of the cache is damaged: it starts empty");
        return Ok(());
    }
    let mut number = 0;
    for piece in pieces {
        for entry in piece.to_vec().as_chunks().0 {
            if let Some((line, valid, sum)) = decode_entry(entry) {
                lines.load(line, valid, Slot { number, sum, proven: false });
            }
            number += 1;
        }
    }
    Ok(())
}
