//! Recovery, checkpoints, and beginning anew after the log has failed.

use super::format::{HEADER, Header, Record, SECTOR, SLOT, Slot, Superblock};
use super::state::State;
use super::{Below, DISK, LOG, Log, own};
use blockmason::{Cx, Data, Error, Flags, Kind, Request, Result};

/// Bytes that are read at once of a device that may not be a log.
const LOOK: u64 = 1 << 20;

impl Log {
    /// Waits until the log has been recovered, by this caller if need be.
    pub(super) async fn recovered(&self, cx: Cx<'_>) -> Result<()> {
        while self.state().is_none() {
            self.maintain(cx).await?;
        }
        Ok(())
    }

    /// Does what is due: recovery, or a new beginning, or a checkpoint.
    pub(super) async fn maintain(&self, cx: Cx<'_>) -> Result<()> {
        let once = async || match self.with(|state| state.is_broken()) {
            None => self.recover(cx).await,
            Some(true) => self.begin_anew(cx).await,
            Some(false) => self.checkpoint(cx).await,
        };
        self.maintenance.run(once).await
    }

    /// Flushes the disk, and makes the room of what it covers free.
    async fn checkpoint(&self, cx: Cx<'_>) -> Result<()> {
        self.retry(cx).await?;
        let look = |state: &mut State| (state.log, state.first_needed());
        let Some((log, (tail, sequence))) = self.with(look) else { return Ok(()) };
        if tail == log.tail {
            return Ok(());
        }
        cx.forward(DISK, own(cx, Request::flush())).await?;
        let log = publish(Superblock { tail, sequence, ..log }, cx).await?;
        self.update(|state| state.log = log);
        Ok(())
    }

    /// After a record could not be written: applies all before it, and starts with an empty ring behind
    /// all that was reserved.
    async fn begin_anew(&self, cx: Cx<'_>) -> Result<()> {
        self.wait(|state| state.is_still().then_some(())).await;
        loop {
            self.retry(cx).await?;
            let emptied = |state: &mut State| match state.pending() {
                0 => Some(true),
                _ => state.first_failed().map(|_| false),
            };
            if self.wait(emptied).await {
                break;
            }
        }
        let look = |state: &mut State| (state.log, state.first_needed());
        let Some((log, (tail, sequence))) = self.with(look) else { return Ok(()) };
        cx.forward(DISK, own(cx, Request::flush())).await?;
        let log = publish(Superblock { tail, sequence, life: log.life + 1, ..log }, cx).await?;
        self.update(|state| state.begin_anew(log));
        tracing::info!("the log takes changes again");
        Ok(())
    }

    /// Writes to the disk what it refused before, in order.
    async fn retry(&self, cx: Cx<'_>) -> Result<()> {
        while let Some(record) = self.with(|state| state.first_failed()).flatten() {
            // As the first time: nothing goes to the disk before its record is durable.
            cx.forward(LOG, own(cx, Request::flush())).await?;
            let applied = cx.forward(DISK, own(cx, record.request())).await.map(drop);
            self.update(|state| state.applied(record.sequence, applied.clone()));
            applied?;
        }
        Ok(())
    }

    /// Brings the disk to where the log ends.
    async fn recover(&self, cx: Cx<'_>) -> Result<()> {
        let log = match find(cx).await? {
            Some(log) => log,
            None => self.new_log(cx).await?,
        };
        // What only caches hold must not be overtaken by what follows from it.
        cx.forward(LOG, own(cx, Request::flush())).await?;
        let mut end = Superblock { life: log.life + 1, ..log };
        while let Some(record) = read_record(&log, &end, cx).await? {
            end.tail += log.record(record.payload());
            end.sequence += 1;
            cx.forward(DISK, own(cx, record.request())).await?;
        }
        cx.forward(DISK, own(cx, Request::flush())).await?;
        let changes = end.sequence - log.sequence;
        // Nothing is in the ring, so that it may take what the device has grown by.
        let Below { disk, log: device } = cx.prepared();
        if let Some(now) = Superblock::new(0, *disk, device.size, log.block) {
            end.ring = now.ring;
        }
        let log = publish(end, cx).await?;
        if changes > 0 {
            tracing::info!(
                element = cx.name(),
                "{changes} changes were in the log and may not have been on the disk"
            );
        }
        *self.state() = Some(State::new(log));
        self.changed.notify_waiters();
        Ok(())
    }

    /// The superblock of a log that is still to be made.
    async fn new_log(&self, cx: Cx<'_>) -> Result<Superblock> {
        let Below { disk, log } = cx.prepared();
        let too_small = || Error::internal("the log has become too small since the graph was built");
        let new = Superblock::new(cx.rng(|rng| rng.u64(..)), *disk, log.size, u64::from(log.min_block));
        for at in (0..log.size).step_by(LOOK as usize).filter(|_| !self.format) {
            let data = read(cx, at, LOOK.min(log.size - at)).await?;
            if !data.is_zero() {
                let message = "the device below `log` is not empty and is no log, or a damaged one: \
                               (format yes) makes a new log of it, and its contents are lost";
                return Err(Error::invalid(message));
            }
        }
        new.ok_or_else(too_small)
    }
}

async fn read(cx: Cx<'_>, at: u64, len: u64) -> Result<Data> {
    let data = cx.forward(LOG, own(cx, Request::read(at, len))).await?.into_data()?;
    if data.len() as u64 != len {
        return Err(Error::internal(format!("{} bytes answer a read of {len}", data.len())));
    }
    Ok(data)
}

/// The superblock that counts; None if there is none.
async fn find(cx: Cx<'_>) -> Result<Option<Superblock>> {
    let Below { disk, log } = cx.prepared();
    let mut found: Option<Superblock> = None;
    for at in [0, SLOT] {
        match Superblock::decode(&read(cx, at, SECTOR as u64).await?.to_vec()) {
            Slot::Valid(other) => {
                found = found.filter(|known| known.generation > other.generation).or(Some(other));
            }
            Slot::Version(version) => {
                let message = format!("the log has version {version}, which is not known here");
                return Err(Error::new(Kind::Unsupported, message));
            }
            Slot::Other => {}
        }
    }
    let Some(found) = found else { return Ok(None) };
    if found.disk != *disk {
        let message = format!("the log belongs to a disk of {} bytes, not to one of {disk}", found.disk);
        return Err(Error::invalid(message));
    }
    if found.end() > log.size {
        let message = format!("the log has {} bytes, the device below `log` only {}", found.end(), log.size);
        return Err(Error::invalid(message));
    }
    Ok(Some(found))
}

/// Writes the next superblock; what it says is then durable.
async fn publish(log: Superblock, cx: Cx<'_>) -> Result<Superblock> {
    let log = Superblock { generation: log.generation + 1, ..log };
    let mut bytes = log.encode().to_vec();
    bytes.resize(SECTOR, 0);
    let write = Request::write(log.place(), Data::copy_of(&bytes)).with(Flags::FUA);
    cx.forward(LOG, own(cx, write)).await?;
    Ok(log)
}

/// The record at `end`, if there is a valid one.
async fn read_record(log: &Superblock, end: &Superblock, cx: Cx<'_>) -> Result<Option<Record>> {
    let room = log.ring - (end.tail - log.tail);
    if room < log.block {
        return Ok(None);
    }
    let block = ring(log, end.tail, log.block, cx).await?;
    let Some(header) = Header::decode(&block.to_vec(), log, end.sequence) else { return Ok(None) };
    let size = log.record(header.payload);
    if size > room {
        return Ok(None);
    }
    let rest = ring(log, end.tail + log.block, size - log.block, cx).await?;
    let whole = Data::concat([block, rest]);
    let payload = header.payload as usize;
    Ok(header.with(whole.slice(HEADER..HEADER + payload)))
}

/// Bytes of the ring.
async fn ring(log: &Superblock, at: u64, len: u64, cx: Cx<'_>) -> Result<Data> {
    let mut pieces = Vec::new();
    for piece in log.pieces(at, len) {
        pieces.push(read(cx, piece.start, piece.end - piece.start).await?);
    }
    Ok(Data::concat(pieces))
}
