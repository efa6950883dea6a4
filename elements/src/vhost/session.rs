//! A front-end's session: its messages, in order, and the queues that they start and stop.
//!
//! Memory or a queue is taken away only when nothing of it is in flight; the answer to such a message waits for
//! that. Source: vhost-user, "Front-end message types".

pub(crate) mod carry;

use super::blk;
use super::device::{Claim, Device, LOG_ALL, PROTOCOL, PROTOCOL_FEATURES};
use super::inflight::Inflight;
use super::log::DirtyLog;
use super::memory::{MOST_REGIONS, Mapping, Memory};
use super::port::{Logs, Port};
use super::queue::{self, Command, Reporter, Rules, Start};
use super::ring::Ring;
use super::wire::{self, InflightArea, Message, RingAddress, protocol};
use blockmason::{Error, Result};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// A session's state, without its socket.
pub(crate) struct Session {
    device: Arc<Device>,
    number: u64,
    /// Agreed upon.
    features: u64,
    protocol: u64,
    memory: Arc<Memory>,
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<Inflight>>,
    vrings: Vec<Vring>,
    /// For messages of our own.
    channel: Option<OwnedFd>,
    claim: Option<Arc<Claim>>,
    news: Reporter,
}

/// What the front-end has said of a queue.
#[derive(Default)]
struct Vring {
    size: u16,
    address: Option<RingAddress>,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<Arc<OwnedFd>>,
    err: Option<Arc<OwnedFd>>,
    enabled: bool,
    running: Option<mpsc::UnboundedSender<Command>>,
}

impl Vring {
    /// Tells the queue, if it runs.
    fn tell(&self, command: Command) {
        if let Some(running) = &self.running {
            // One that has ended meanwhile needs to know nothing.
            let _ = running.send(command);
        }
    }

    /// Asks the queue, and waits for its answer. None if it does not run, or has ended by itself.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (answer, said) = oneshot::channel();
        self.running.as_ref()?.send(command(answer)).ok()?;
        said.await.ok()
    }
}

/// What a message is answered with.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) payload: Vec<u8>,
    pub(crate) fd: Option<OwnedFd>,
}

impl Answer {
    fn number(value: u64) -> Option<Answer> {
        Some(Answer { payload: value.to_ne_bytes().to_vec(), fd: None })
    }

    fn state(index: u32, value: u32) -> Option<Answer> {
        Some(Answer { payload: [index.to_ne_bytes(), value.to_ne_bytes()].concat(), fd: None })
    }
}

impl Session {
    pub(crate) fn new(device: &Arc<Device>, news: Reporter) -> Session {
        let queues = usize::from(device.terms().queues);
        Session {
            device: device.clone(),
            number: device.next_session(),
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            log: None,
            inflight: None,
            vrings: (0..queues).map(|_| Vring::default()).collect(),
            channel: None,
            claim: None,
            news,
        }
    }

    /// True if messages may ask to be acknowledged.
    pub(crate) fn acknowledges(&self) -> bool {
        self.protocol & protocol::REPLY_ACK != 0
    }

    /// True if a queue runs.
    pub(crate) fn runs(&self) -> bool {
        self.vrings.iter().any(|vring| vring.running.is_some())
    }

    /// A queue has ended by itself.
    pub(crate) fn ended(&mut self, index: usize) {
        if let Some(vring) = self.vrings.get_mut(index).filter(|vring| is_over(vring)) {
            vring.running = None;
        }
    }

    /// Does what a message asks for. The descriptors are those that came with it, as many as it takes.
    ///
    /// # Errors
    /// Why not: nothing has changed, unless a queue had to be stopped for it.
    pub(crate) async fn handle(&mut self, message: Message, mut fds: Vec<OwnedFd>) -> Result<Option<Answer>> {
        let fd = if fds.len() == 1 { fds.pop() } else { None };
        let needs = || Error::invalid("a descriptor was to come with the message");
        match message {
            Message::GetFeatures => {
                return Ok(Answer::number(self.device.features(&self.device.geometry()?)));
            }
            Message::SetFeatures(features) => self.set_features(features).await?,
            Message::SetOwner | Message::SetLogFd => {}
            Message::ResetOwner => self.vrings.iter_mut().for_each(|vring| {
                vring.enabled = false;
                vring.tell(Command::Enable(false));
            }),
            Message::SetMemTable(table) => {
                let fds = fds.into_iter().chain(fd);
                let memory = Memory::new(table.into_iter().zip(fds))?;
                self.change_memory(memory).await?;
            }
            Message::AddMemReg(place) => {
                let memory = self.memory.with(place, fd.ok_or_else(needs)?)?;
                self.change_memory(memory).await?;
            }
            Message::RemMemReg(place) => {
                let memory = self.memory.without(place)?;
                self.change_memory(memory).await?;
            }
            Message::SetLogBase { size, offset } => {
                let mapping = Mapping::new(File::from(fd.ok_or_else(needs)?), offset, size)?;
                self.log = Some(Arc::new(DirtyLog::new(mapping)));
                self.tell_logs().await;
                return Ok(Answer::number(0));
            }
            Message::SetVringNum { index, num } => self.set_num(index, num)?,
            Message::SetVringAddr { index, address } => self.set_address(index, address).await?,
            Message::SetVringBase { index, base } => {
                let base =
                    u16::try_from(base).map_err(|_| Error::invalid("a place past the end of a ring"))?;
                self.stopped(index)?.base = base;
            }
            Message::GetVringBase { index } => {
                let base = self.stop(index).await?;
                return Ok(Answer::state(index, u32::from(base)));
            }
            Message::SetVringKick { index, .. } => self.set_kick(index.into(), fd).await?,
            Message::SetVringCall { index, .. } => {
                let call = fd.map(event_counter).transpose()?.map(Arc::new);
                let vring = self.vring(index.into())?;
                vring.call = call.clone();
                vring.tell(Command::Call(call));
            }
            Message::SetVringErr { index, .. } => {
                let err = fd.map(event_counter).transpose()?.map(Arc::new);
                let vring = self.vring(index.into())?;
                vring.err = err.clone();
                vring.tell(Command::Err(err));
            }
            Message::GetProtocolFeatures => return Ok(Answer::number(PROTOCOL)),
            Message::SetProtocolFeatures(features) => {
                if features & !PROTOCOL != 0 {
                    return Err(Error::invalid(format!(
                        "features of the protocol that were not offered: {features:#x}"
                    )));
                }
                self.protocol = features;
            }
            Message::GetQueueNum => return Ok(Answer::number(self.vrings.len() as u64)),
            Message::SetVringEnable { index, enable } => {
                let vring = self.vring(index)?;
                vring.enabled = enable;
                vring.tell(Command::Enable(enable));
            }
            Message::SetBackendReqFd => self.channel = Some(fd.ok_or_else(needs)?),
            Message::GetConfig { offset, size, flags } => return self.config(offset, size, flags).map(Some),
            Message::SetConfig { offset, data } => self.set_config(offset, &data)?,
            Message::GetInflightFd(area) => return self.make_inflight(area).map(Some),
            Message::SetInflightFd(area) => {
                if self.runs() {
                    return Err(Error::invalid("the record of what is in flight, while queues run"));
                }
                let file = File::from(fd.ok_or_else(needs)?);
                self.inflight = Some(Arc::new(Inflight::open(area, file)?));
            }
            Message::ResetDevice => self.reset().await?,
            Message::GetMaxMemSlots => return Ok(Answer::number(MOST_REGIONS as u64)),
        }
        Ok(None)
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let queues = self.vrings.len();
        let vring = self.vrings.get_mut(index as usize);
        vring.ok_or_else(|| Error::invalid(format!("queue {index} of {queues}")))
    }

    /// A queue that does not run.
    fn stopped(&mut self, index: u32) -> Result<&mut Vring> {
        let vring = self.vring(index)?;
        if vring.running.is_some() {
            return Err(Error::invalid(format!("queue {index} cannot be set up while it runs")));
        }
        Ok(vring)
    }

    async fn set_features(&mut self, features: u64) -> Result<()> {
        let disk = self.device.geometry()?;
        let unknown = features & !self.device.features(&disk);
        if unknown != 0 {
            return Err(Error::invalid(format!("features that were not offered: {unknown:#x}")));
        }
        if self.runs() && (features ^ self.features) & !LOG_ALL != 0 {
            return Err(Error::invalid("other features, while queues run"));
        }
        self.features = features;
        self.tell_logs().await;
        Ok(())
    }

    fn set_num(&mut self, index: u32, num: u32) -> Result<()> {
        let most = self.device.terms().queue_size;
        let vring = self.stopped(index)?;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= most);
        let wrong =
            || Error::invalid(format!("a queue of {num} entries, not of a power of two up to {most}"));
        vring.size = size.ok_or_else(wrong)?;
        Ok(())
    }

    async fn set_address(&mut self, index: u32, address: RingAddress) -> Result<()> {
        let vring = self.vring(index)?;
        let place = |address: RingAddress| (address.desc, address.avail, address.used);
        if vring.running.is_some() && vring.address.map(place) != Some(place(address)) {
            let vring = &self.vrings[index as usize];
            move_to(vring, Ring::new(&self.memory, &address, vring.size)?).await;
        }
        self.vring(index)?.address = Some(address);
        self.tell_logs().await;
        Ok(())
    }

    fn ring(&self, vring: &Vring) -> Result<Ring> {
        ring_in(&self.memory, vring)
    }

    /// All queues stop for it; in flight is nothing that the old memory would be needed for.
    ///
    /// # Errors
    /// A queue that runs has its rings outside of it. Nothing has changed.
    async fn change_memory(&mut self, memory: Memory) -> Result<()> {
        let memory = Arc::new(memory);
        let ring = |vring: &Vring| vring.running.as_ref().map(|_| ring_in(&memory, vring)).transpose();
        let rings = self.vrings.iter().map(ring).collect::<Result<Vec<_>>>()?;
        self.memory = memory;
        for (vring, ring) in self.vrings.iter().zip(rings) {
            if let Some(ring) = ring {
                move_to(vring, ring).await;
            }
        }
        Ok(())
    }

    fn logs(&self, vring: &Vring) -> Logs {
        if self.features & LOG_ALL == 0 {
            return Logs::default();
        }
        let used = vring.address.filter(|address| address.flags & 1 != 0).map(|address| address.log);
        Logs { log: self.log.clone(), used }
    }

    /// When this returns, all queues go by the log as it is now. The front-end starts to copy memory, or lets the log
    /// before go, when its message is acknowledged: what a queue writes from then on must be in this one.
    async fn tell_logs(&self) {
        for vring in &self.vrings {
            // One that does not run is told when it starts.
            let _ = vring.ask(|done| Command::Logs(self.logs(vring), done)).await;
        }
    }

    async fn set_kick(&mut self, index: u32, fd: Option<OwnedFd>) -> Result<()> {
        let kick =
            fd.ok_or_else(|| Error::unsupported("a queue without kicks: they cannot be done without"))?;
        let kick = event_counter(kick)?;
        if self.vring(index)?.running.is_some() {
            self.vring(index)?.base = self.stop(index).await?;
        }
        self.vring(index)?.kick = Some(kick);
        self.start(index as usize, Vec::new()).await
    }

    /// Starts a queue. What its record says is in flight, or `again` where there is no record, is executed again before
    /// anything else.
    async fn start(&mut self, index: usize, again: Vec<u16>) -> Result<()> {
        let ring = self.ring(&self.vrings[index])?;
        let of_queue = |inflight: &Arc<Inflight>| inflight.queue(index as u16, ring.size());
        let tracked = self.inflight.as_ref().map(of_queue).transpose()?;
        if self.claim.is_none() {
            self.claim = Some(self.device.claim(self.number).await?);
        }
        if again.iter().any(|head| *head >= ring.size()) {
            return Err(Error::invalid("a request past the end of the ring"));
        }
        let Some(claim) = self.claim.clone() else { return Err(Error::internal("a claim was lost")) };
        let has = |feature: u32| self.features & blk::bit(feature) != 0;
        let vring = &self.vrings[index];
        let mut port = Port::new(ring, tracked, vring.base, has(VIRTIO_RING_F_EVENT_IDX));
        port.take_again(again);
        port.set_logs(self.logs(vring));
        port.set_call(vring.call.clone());
        if port.unfinished() > 0 {
            let (export, again) = (&self.device.source, port.unfinished());
            tracing::info!(export, queue = index, again, "requests that were in flight are executed again");
        }
        let kick = vring.kick.as_ref().map(OwnedFd::try_clone);
        let kick = kick.ok_or_else(|| Error::internal("a queue without kicks"))?;
        let start = Start {
            index,
            device: self.device.clone(),
            claim,
            port,
            kick: kick.map_err(|error| Error::io(error, "a descriptor cannot be copied"))?,
            err: vring.err.clone(),
            rules: Rules {
                indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
                flush: has(VIRTIO_BLK_F_FLUSH),
                poll: self.device.terms().poll,
            },
            enabled: vring.enabled || self.features & PROTOCOL_FEATURES == 0,
        };
        let (commands, queue) = mpsc::unbounded_channel();
        let news = self.news.clone();
        self.device.disk.host().spawn_stream(move || queue::run(start, queue, news))?;
        self.vrings[index].running = Some(commands);
        Ok(())
    }

    /// Stops a queue. Returns the place in the available ring that would have come next.
    async fn stop(&mut self, index: u32) -> Result<u16> {
        let vring = self.vring(index)?;
        if vring.running.is_none() {
            return Ok(vring.base);
        }
        let next = vring.ask(Command::Stop).await;
        vring.running = None;
        let next = match next {
            Some(next) => next,
            // It has ended by itself, and everything that it had taken is done.
            None => self.ring(&self.vrings[index as usize])?.used_idx(),
        };
        self.vring(index)?.base = next;
        if !self.runs() {
            self.claim = None;
        }
        Ok(next)
    }

    /// Stops all queues.
    pub(crate) async fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.stop(index as u32).await?;
        }
        Ok(())
    }

    async fn reset(&mut self) -> Result<()> {
        self.stop_all().await?;
        self.features = 0;
        // A driver that begins anew has offered nothing of what it says.
        self.inflight = None;
        self.vrings.iter_mut().for_each(|vring| *vring = Vring::default());
        Ok(())
    }

    fn config(&self, offset: u32, size: u32, flags: u32) -> Result<Answer> {
        let disk = self.device.geometry()?;
        let space = blk::config(&disk, self.vrings.len() as u16, !self.device.is_write_through());
        let part = space.get(offset as usize..(offset + size) as usize).unwrap_or_default();
        let mut payload = [offset, part.len() as u32, flags].map(u32::to_ne_bytes).concat();
        payload.extend_from_slice(part);
        Ok(Answer { payload, fd: None })
    }

    /// The driver may write one field: whether there is a volatile cache.
    fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        let at = blk::AT_WRITEBACK.checked_sub(offset as usize).and_then(|at| data.get(at));
        let write_back = match at {
            Some(0) => false,
            Some(1) => true,
            Some(_) => return Err(Error::invalid("a cache is on or off")),
            None => {
                return Err(Error::new(
                    blockmason::Kind::Denied,
                    "nothing else of the configuration can be set",
                ));
            }
        };
        if self.features & blk::bit(VIRTIO_BLK_F_CONFIG_WCE) == 0 {
            return Err(Error::invalid("the cache is set, which was not negotiated"));
        }
        self.device.set_write_back(write_back)
    }

    fn make_inflight(&mut self, wanted: InflightArea) -> Result<Answer> {
        let most = self.device.terms().queue_size;
        if usize::from(wanted.queues) > self.vrings.len() || wanted.queues == 0 {
            let (here, wanted) = (self.vrings.len(), wanted.queues);
            return Err(Error::invalid(format!(
                "{wanted} queues are wanted, and (queues {here}) are offered"
            )));
        }
        if wanted.entries > most {
            let entries = wanted.entries;
            return Err(Error::invalid(format!(
                "queues of {entries} are wanted, and (queue_size {most}) is the most"
            )));
        }
        let inflight = Inflight::create(wanted.queues, wanted.entries)?;
        let fd = inflight.mapping().file()?.try_clone_to_owned();
        let fd = fd.map_err(|error| Error::io(error, "a descriptor cannot be copied"))?;
        let payload = inflight.area().to_bytes();
        if !self.runs() {
            self.inflight = Some(Arc::new(inflight));
        }
        Ok(Answer { payload, fd: Some(fd) })
    }

    /// The disk has another size: the front-end reads the configuration again.
    pub(crate) fn config_changed(&self) {
        let Some(channel) = &self.channel else { return };
        if let Err(error) = super::socket::send_some(channel.as_fd(), &wire::config_changed(), None) {
            tracing::info!(
                export = self.device.source,
                "the virtual machine cannot be told of the new size: {error}"
            );
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.claim.iter().for_each(|claim| claim.disconnect());
    }
}

fn ring_in(memory: &Arc<Memory>, vring: &Vring) -> Result<Ring> {
    let address = vring.address.ok_or_else(|| Error::invalid("a queue without an address"))?;
    Ring::new(memory, &address, vring.size)
}

/// A queue goes on with other rings, or others' memory.
async fn move_to(vring: &Vring, ring: Ring) {
    if vring.ask(Command::Pause).await.is_some() {
        vring.tell(Command::Resume(Some(ring)));
    }
}

fn is_over(vring: &Vring) -> bool {
    vring.running.as_ref().is_some_and(mpsc::UnboundedSender::is_closed)
}

/// An event counter of the front-end's, that nobody can be made to wait for. Other descriptors are refused: what
/// writing to them means or costs is unknown.
fn event_counter(fd: OwnedFd) -> Result<OwnedFd> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if link.map_err(|error| Error::io(error, "a descriptor cannot be looked at"))?.as_os_str()
        != "anon_inode:[eventfd]"
    {
        return Err(Error::invalid("a descriptor for kicks or interrupts that is no eventfd"));
    }
    let flags = rustix::fs::fcntl_getfl(&fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK));
    flags.map_err(|errno| Error::os(errno, "a descriptor cannot be set up"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost::device::Terms;
    use blockmason::testing::{TestDisk, run};
    use std::time::Duration;

    fn device(disk: &TestDisk) -> Arc<Device> {
        let (queue_size, poll) = (8, Duration::ZERO);
        let terms = Terms { queues: 1, queue_size, serial: String::new(), read_only: false, poll };
        Arc::new(Device::new(disk.disk.clone(), "Client", terms, "/nonexistent/record".into()))
    }

    /// Otherwise a driver that begins anew would have executed what it has never offered.
    #[test]
    fn a_reset_forgets_what_was_in_flight() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, "element D (type null)", "D").await.unwrap();
            let mut session = Session::new(&device(&disk), mpsc::unbounded_channel().0);
            let area = InflightArea { size: 0, offset: 0, queues: 1, entries: 8 };
            session.handle(Message::GetInflightFd(area), Vec::new()).await.unwrap();
            assert!(session.inflight.is_some());
            session.handle(Message::ResetDevice, Vec::new()).await.unwrap();
            assert!(session.inflight.is_none());
        });
    }

    #[test]
    fn a_log_is_acknowledged_when_the_queues_go_by_it() {
        run(1, async |host| {
            let disk = TestDisk::new(&host, crate::ALL, "element D (type null)", "D").await.unwrap();
            let mut session = Session::new(&device(&disk), mpsc::unbounded_channel().0);
            let (running, mut queue) = mpsc::unbounded_channel();
            session.vrings[0].running = Some(running);
            let mut handled = std::pin::pin!(session.handle(Message::SetFeatures(LOG_ALL), Vec::new()));
            assert!(blockmason::rt::timeout(Duration::from_secs(100), handled.as_mut()).await.is_none());
            let Some(Command::Logs(_, done)) = queue.recv().await else { panic!("the queue was not told") };
            done.send(()).unwrap();
            assert!(handled.await.unwrap().is_none());
        });
    }
}
