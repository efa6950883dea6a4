//! The front-end's side of a vhost-user connection. What belongs to the guest (memory, rings, the notes of what is
//! in flight) outlives the connection and the back-end; on every connection they are sent as QEMU sends them, in
//! its order.

use crate::inflight::Inflight;
use crate::memory::Memory;
use crate::raw::Raw;
use crate::ring::Place;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// VIRTIO_BLK_F_FLUSH.
pub const F_FLUSH: u64 = 1 << 9;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub const F_CONFIG_WCE: u64 = 1 << 11;
/// VIRTIO_BLK_F_MQ.
pub const F_MQ: u64 = 1 << 12;
/// VIRTIO_BLK_F_DISCARD.
pub const F_DISCARD: u64 = 1 << 13;
/// VIRTIO_BLK_F_WRITE_ZEROES.
pub const F_WRITE_ZEROES: u64 = 1 << 14;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// What a Linux guest in QEMU asks for.
pub const USUAL: u64 = F_FLUSH
    | F_CONFIG_WCE
    | F_MQ
    | F_DISCARD
    | F_WRITE_ZEROES
    | F_INDIRECT
    | F_EVENT_IDX
    | F_PROTOCOL
    | F_VERSION_1;

/// Bytes of the configuration space that virtio 1.2 gives a block device with discard and write zeroes.
pub const CONFIG_BYTES: u32 = 60;

/// A queue as the connection knows it.
pub struct Vring {
    /// Where it lies.
    pub place: Place,
    /// Tells the device that something is available.
    pub kick: EventFd,
    /// Tells the guest that something is used.
    pub call: EventFd,
    /// Tells the guest that the queue is broken.
    pub err: EventFd,
}

/// How a [`Device`] connects.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    /// Virtio features; those that are not offered are left out.
    pub features: u64,
    /// Whether notes of what is in flight are kept.
    pub inflight: bool,
    /// Whether memory is sent region by region (ADD_MEM_REG), as new QEMUs do where they can.
    pub slots: bool,
}

impl Default for Wishes {
    fn default() -> Wishes {
        Wishes { features: USUAL, inflight: true, slots: false }
    }
}

/// A device's front-end.
pub struct Device {
    /// The guest's memory.
    pub mem: Arc<Memory>,
    /// Its queues.
    pub vrings: Vec<Vring>,
    /// What is in flight; kept from the first connection on.
    pub inflight: Option<Inflight>,
    /// How it connects.
    pub wishes: Wishes,
    link: Option<Frontend>,
    /// The connection's socket again, to see it end.
    stream: Option<UnixStream>,
    features: u64,
    protocol: Protocol,
}

/// What can go wrong with a message.
pub type Result<T> = vhost::Result<T>;

impl Device {
    /// A device that is not connected.
    pub fn new(mem: Arc<Memory>, places: impl IntoIterator<Item = Place>, wishes: Wishes) -> Device {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let vring = |place| Vring { place, kick: event(), call: event(), err: event() };
        let vrings = places.into_iter().map(vring).collect();
        let protocol = Protocol::empty();
        Device { mem, vrings, inflight: None, wishes, link: None, stream: None, features: 0, protocol }
    }

    /// Connects and starts all queues.
    pub fn connect(&mut self, socket: &Path) -> Result<()> {
        self.greet(socket)?;
        self.start()
    }

    /// Connects, and goes as far as QEMU does before the guest's driver has loaded.
    pub fn greet(&mut self, socket: &Path) -> Result<()> {
        let stream = UnixStream::connect(socket).map_err(|error| {
            vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::SocketConnect(error))
        })?;
        let patience = Some(crate::PATIENCE);
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        self.stream = Some(stream.try_clone().unwrap());
        let mut link = Frontend::from_stream(stream, self.vrings.len() as u64);
        let offered = link.get_features()?;
        let mut wanted = Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG;
        wanted.set(Protocol::INFLIGHT_SHMFD, self.wishes.inflight);
        wanted.set(Protocol::CONFIGURE_MEM_SLOTS, self.wishes.slots);
        self.protocol = link.get_protocol_features()? & wanted;
        link.set_protocol_features(self.protocol)?;
        if self.protocol.contains(Protocol::REPLY_ACK) {
            link.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if self.protocol.contains(Protocol::MQ) {
            let queues = link.get_queue_num()?;
            assert!(queues >= self.vrings.len() as u64, "the back-end has only {queues} queues");
        }
        if self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            assert!(link.get_max_mem_slots()? >= 2);
        }
        link.set_owner()?;
        self.features = link.get_features()? & self.wishes.features;
        assert_eq!(offered & self.wishes.features, self.features, "the features have changed");
        for (ix, vring) in self.vrings.iter().enumerate() {
            link.set_vring_call(ix, &vring.call)?;
        }
        self.link = Some(link);
        Ok(())
    }

    /// Starts all queues, from where the used ring says that the device was.
    pub fn start(&mut self) -> Result<()> {
        self.send_inflight()?;
        let mut link = self.link();
        link.set_features(self.features)?;
        let regions = self.mem.regions();
        if self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            for region in &regions {
                link.add_mem_region(region)?;
            }
        } else {
            link.set_mem_table(&regions)?;
        }
        for queue in 0..self.vrings.len() {
            self.start_queue(queue, self.used_idx(queue))?;
        }
        for queue in 0..self.vrings.len() {
            link.set_vring_enable(queue, true)?;
        }
        self.kick_all();
        Ok(())
    }

    /// Sends all that a queue needs but its permission to run.
    pub fn start_queue(&self, queue: usize, base: u16) -> Result<()> {
        let (link, vring) = (self.link(), &self.vrings[queue]);
        link.set_vring_num(queue, vring.place.size)?;
        link.set_vring_base(queue, base)?;
        link.set_vring_addr(queue, &self.addresses(vring.place))?;
        link.set_vring_kick(queue, &vring.kick)?;
        link.set_vring_call(queue, &vring.call)?;
        link.set_vring_err(queue, &vring.err)
    }

    fn send_inflight(&mut self) -> Result<()> {
        if !self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let mut link = self.link();
        if self.inflight.is_none() {
            link.set_features(self.features)?;
            let (queues, size) = (self.vrings.len() as u16, self.vrings[0].place.size);
            let (about, file) = link.get_inflight_fd(&VhostUserInflight::new(0, 0, queues, size))?;
            let (got_queues, got_size) = (about.num_queues, about.queue_size);
            assert_eq!((got_queues, got_size), (queues, size), "the reply is of another shape");
            self.inflight = Some(Inflight::new(about, file));
        }
        let inflight = self.inflight.as_ref().unwrap();
        link.set_inflight_fd(inflight.about(), inflight.fd())
    }

    /// Takes all queues back, as a guest does that reboots or is paused. Returns their bases.
    pub fn stop(&self) -> Result<Vec<u32>> {
        let mut link = self.link();
        (0..self.vrings.len())
            .map(|queue| {
                link.set_vring_enable(queue, false)?;
                link.get_vring_base(queue)
            })
            .collect()
    }

    /// The connection; panics when there is none.
    pub fn link(&self) -> Frontend {
        self.link.clone().expect("the device is not connected")
    }

    /// The connection, to send what the one above does not.
    pub fn raw(&self) -> Raw {
        let stream = self.stream.as_ref().expect("the device was connected");
        Raw::from(stream.try_clone().unwrap())
    }

    /// Whether there is a connection, as far as this side knows.
    pub fn is_connected(&self) -> bool {
        self.link.is_some()
    }

    /// Ends the connection without a word.
    pub fn disconnect(&mut self) {
        (self.link, self.stream) = (None, None);
    }

    /// Whether the back-end has closed the connection.
    pub fn has_ended(&self) -> bool {
        use rustix::net::{RecvFlags, recv};
        let stream = self.stream.as_ref().expect("the device was connected");
        match recv(stream, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, count)) => count == 0,
            Err(error) => error != rustix::io::Errno::AGAIN,
        }
    }

    /// The features that were agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features that were agreed on.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The configuration space.
    pub fn config(&self) -> Result<Vec<u8>> {
        let flags = VhostUserConfigFlags::empty();
        let zeros = [0; CONFIG_BYTES as usize];
        Ok(self.link().get_config(0, CONFIG_BYTES, flags, &zeros)?.1)
    }

    /// Sets bytes of the configuration space.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        self.link().set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
    }

    /// Tells the device to look at all queues.
    pub fn kick_all(&self) {
        for vring in &self.vrings {
            vring.kick.write(1).unwrap();
        }
    }

    /// The index of a used ring.
    pub fn used_idx(&self, queue: usize) -> u16 {
        self.mem.load(self.vrings[queue].place.used + 2)
    }

    /// A ring's addresses as `SET_VRING_ADDR` has them.
    pub fn addresses(&self, place: Place) -> VringConfigData {
        VringConfigData {
            queue_max_size: place.size,
            queue_size: place.size,
            flags: 0,
            desc_table_addr: self.mem.host(place.desc),
            used_ring_addr: self.mem.host(place.used),
            avail_ring_addr: self.mem.host(place.avail),
            log_addr: None,
        }
    }
}
