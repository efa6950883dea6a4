//! This crate's own rings and connection.

use super::{Connection, Job, Opened, Queue};
use crate::device::{self, Device, Wishes};
use crate::memory::{Half, Memory, Seal};
use crate::ring::{Part, Ring};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// From one request's header to the next; the status lies behind the header.
const SLOT: u64 = 32;

pub(super) fn open(job: &Job) -> Result<Opened, String> {
    connect(job).map_err(|error| format!("cannot connect to {}: {error}", job.socket.display()))
}

fn connect(job: &Job) -> device::Result<Opened> {
    let size = (job.depth * 3).next_power_of_two().max(128) as u16;
    let rings = job.queues as u64 * (u64::from(size) * 32 + 4096 + SLOT * job.depth as u64);
    let half = rings.max((job.queues * job.depth * job.block) as u64).next_multiple_of(1 << 20);
    let mem = Memory::new(half, Seal::Shrink);
    // Touched once: a guest's memory is there, too, before it is measured.
    mem.write(crate::memory::HIGH, &vec![0x5a; half as usize]);
    let rings: Vec<Ring> = (0..job.queues).map(|_| Ring::new(&mem, size, true)).collect();
    let features =
        device::F_VERSION_1 | device::F_EVENT_IDX | device::F_PROTOCOL | device::F_MQ | device::F_FLUSH;
    let wishes = Wishes { features, ..Wishes::default() };
    let mut device = Device::new(mem.clone(), rings.iter().map(|ring| ring.place), wishes);
    device.connect(&job.socket)?;
    let queue = |(ring, vring): (Ring, &device::Vring)| {
        let queue = Blk {
            ring,
            kick: vring.kick.try_clone().unwrap(),
            call: vring.call.try_clone().unwrap(),
            heads: mem.take(Half::Low, SLOT * job.depth as u64, SLOT),
            data: mem.take(Half::High, (job.depth * job.block) as u64, 4096),
            mem: mem.clone(),
            buffers: vec![0; size.into()],
            block: job.block as u32,
            write: job.write,
        };
        Box::new(queue) as Box<dyn Queue>
    };
    let queues = rings.into_iter().zip(&device.vrings).map(queue).collect();
    Ok((Box::new(device), queues))
}

struct Blk {
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    mem: Arc<Memory>,
    /// Where headers begin.
    heads: u64,
    /// Where buffers begin.
    data: u64,
    /// The buffer of a head.
    buffers: Vec<usize>,
    block: u32,
    write: bool,
}

impl Queue for Blk {
    fn submit(&mut self, buffer: usize, offset: u64) {
        let head = self.heads + SLOT * buffer as u64;
        self.mem.set(head, u64::from(self.write));
        self.mem.set(head + 8, offset / 512);
        self.mem.set(head + 16, 0xff_u8);
        let data = self.data + u64::from(self.block) * buffer as u64;
        let parts = [
            Part { addr: head, len: 16, write: false },
            Part { addr: data, len: self.block, write: !self.write },
            Part { addr: head + 16, len: 1, write: true },
        ];
        let chain = self.ring.offer(&parts).unwrap();
        self.buffers[usize::from(chain)] = buffer;
    }

    fn tell(&mut self) -> bool {
        let needed = self.ring.needs_kick();
        if needed {
            self.kick.write(1).unwrap();
        }
        needed
    }

    fn next(&mut self) -> Option<(usize, bool)> {
        let (chain, _) = self.ring.used()?;
        let buffer = self.buffers[usize::from(chain)];
        Some((buffer, self.mem.get::<u8>(self.heads + SLOT * buffer as u64 + 16) == 0))
    }

    fn is_ready(&mut self) -> bool {
        self.ring.is_ready()
    }

    fn want_call(&mut self, wanted: bool) {
        // Without an event index that moves on, no call comes.
        if wanted {
            self.ring.arm();
        }
    }

    fn wait(&mut self) {
        assert!(crate::wait_for(&self.call, Some(crate::PATIENCE)), "the device does not call");
    }
}

impl Connection for Device {
    fn sectors(&self) -> Result<u64, String> {
        let config = self.config().map_err(|error| format!("no configuration space: {error}"))?;
        Ok(u64::from_le_bytes(config[..8].try_into().unwrap()))
    }

    fn close(self: Box<Self>) -> Result<(), String> {
        self.stop().map(drop).map_err(|error| format!("the queues do not stop: {error}"))
    }
}
