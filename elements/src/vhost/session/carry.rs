//! A session on its way to another process: nothing of it is in flight, and both have the guest's memory mapped.

use super::super::device::{Device, MOST_QUEUES};
use super::super::inflight::Inflight;
use super::super::log::DirtyLog;
use super::super::memory::{Mapping, Memory};
use super::super::queue::{Command, Position, Reporter};
use super::super::wire::{InflightArea, MemoryRegion, RingAddress};
use super::{Session, Vring, event_counter};
use blockmason::luggage::Descriptors;
use blockmason::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What a front-end has said so far, and where its queues are. Descriptors by their place.
#[derive(Serialize, Deserialize)]
pub(crate) struct Written {
    features: u64,
    protocol: u64,
    memory: Vec<Region>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    log: Option<Log>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inflight: Option<Record>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channel: Option<usize>,
    queues: Vec<Queue>,
}

#[derive(Serialize, Deserialize)]
struct Region {
    #[serde(flatten)]
    place: MemoryRegion,
    file: usize,
}

#[derive(Serialize, Deserialize)]
struct Log {
    offset: u64,
    size: u64,
    file: usize,
}

#[derive(Serialize, Deserialize)]
struct Record {
    #[serde(flatten)]
    area: InflightArea,
    file: usize,
}

#[derive(Serialize, Deserialize)]
struct Queue {
    size: u16,
    address: Option<RingAddress>,
    base: u16,
    kick: Option<usize>,
    call: Option<usize>,
    err: Option<usize>,
    enabled: bool,
    /// Of one that runs.
    running: Option<Position>,
}

impl Session {
    /// What another process needs to go on; None if there is no going on. Called between two messages, behind a
    /// closed gate.
    ///
    /// # Errors
    /// [`Kind::Busy`] if something is in flight; there are no descriptors left.
    pub(crate) async fn carry(&self, fds: &mut Descriptors) -> Result<Option<Written>> {
        if self.has_lost_memory() {
            return Ok(None);
        }
        let memory = self.memory.regions().iter();
        let memory =
            memory.map(|region| Ok(Region { place: region.place, file: fds.put(region.mapping.file()?)? }));
        let memory = memory.collect::<Result<_>>()?;
        let log = self.log.as_ref().map(|log| {
            let mapping = log.mapping();
            let (offset, size) = (mapping.offset(), mapping.len() as u64);
            Ok::<_, Error>(Log { offset, size, file: fds.put(mapping.file()?)? })
        });
        let inflight = self.inflight.as_ref().map(|inflight| {
            Ok::<_, Error>(Record { area: inflight.area(), file: fds.put(inflight.mapping().file()?)? })
        });
        let (log, inflight) = (log.transpose()?, inflight.transpose()?);
        let channel = self.channel.as_ref().map(|channel| fds.put(channel)).transpose()?;
        let mut queues = Vec::new();
        for vring in &self.vrings {
            queues.push(self.carry_queue(vring, fds).await?);
        }
        let (features, protocol) = (self.features, self.protocol);
        Ok(Some(Written { features, protocol, memory, log, inflight, channel, queues }))
    }

    fn has_lost_memory(&self) -> bool {
        self.memory.is_lost()
            || self.log.as_ref().is_some_and(|log| log.mapping().is_lost())
            || self.inflight.as_ref().is_some_and(|inflight| inflight.mapping().is_lost())
    }

    async fn carry_queue(&self, vring: &Vring, fds: &mut Descriptors) -> Result<Queue> {
        let mut put = |fd: Option<&OwnedFd>| fd.map(|fd| fds.put(fd)).transpose();
        let (kick, call) = (put(vring.kick.as_ref())?, put(vring.call.as_deref())?);
        let mut queue = Queue {
            size: vring.size,
            address: vring.address,
            base: vring.base,
            kick,
            call,
            err: put(vring.err.as_deref())?,
            enabled: vring.enabled,
            running: None,
        };
        if vring.running.is_some() {
            match vring.ask(Command::Carry).await {
                Some(Some(position)) => queue.running = Some(position),
                Some(None) => return Err(Error::new(Kind::Busy, "a guest's requests are in flight")),
                // It has ended by itself, and everything that it had taken is done.
                None => queue.base = self.ring(vring)?.used_idx(),
            }
        }
        Ok(queue)
    }

    /// A session that another process has served so far. Its queues wait at the gate.
    ///
    /// # Errors
    /// It contradicts itself, or its memory has been taken away.
    pub(crate) async fn resume(
        device: &Arc<Device>,
        news: Reporter,
        written: Written,
        fds: &mut Descriptors,
    ) -> Result<Session> {
        let mut session = Session::new(device, news);
        if written.queues.len() > usize::from(MOST_QUEUES) {
            return Err(Error::invalid("a front-end was handed over with more queues than one may have"));
        }
        // As many as it was offered when it came.
        session.vrings = written.queues.iter().map(|_| Vring::default()).collect();
        session.features = written.features;
        session.protocol = written.protocol;
        let regions = written.memory.into_iter().map(|region| Ok((region.place, fds.take(region.file)?)));
        session.memory = Arc::new(Memory::new(regions.collect::<Result<Vec<_>>>()?)?);
        if let Some(Log { offset, size, file }) = written.log {
            session.log =
                Some(Arc::new(DirtyLog::new(Mapping::new(File::from(fds.take(file)?), offset, size)?)));
        }
        if let Some(Record { area, file }) = written.inflight {
            session.inflight = Some(Arc::new(Inflight::open(area, File::from(fds.take(file)?))?));
        }
        session.channel = written.channel.map(|place| fds.take(place)).transpose()?;
        for (index, queue) in written.queues.into_iter().enumerate() {
            let mut counter =
                |place: Option<usize>| place.map(|place| event_counter(fds.take(place)?)).transpose();
            session.vrings[index] = Vring {
                size: queue.size,
                address: queue.address,
                base: queue.running.as_ref().map_or(queue.base, |position| position.next),
                kick: counter(queue.kick)?,
                call: counter(queue.call)?.map(Arc::new),
                err: counter(queue.err)?.map(Arc::new),
                enabled: queue.enabled,
                running: None,
            };
            // One that makes no sense is not begun again: the front-end finds it as if it had ended.
            if let Some(position) = queue.running.filter(|position| !position.broken) {
                session.start(index, position.again).await?;
            }
        }
        Ok(session)
    }
}
