//! The rings and the connection of the crate `virtio-driver`.

use super::{Connection, Job, Opened, Queue};
use crate::device;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkQueue, VirtioBlkReqBuf, VirtioTransport,
};
use vm_memory::{FileOffset, MmapRegion};

type Transport = VhostUser<VirtioBlkConfig, VirtioBlkReqBuf>;

pub(super) fn open(job: &Job) -> Result<Opened, String> {
    connect(job).map_err(|error| format!("cannot connect to {}: {error}", job.socket.display()))
}

fn connect(job: &Job) -> std::io::Result<Opened> {
    let wanted = device::F_VERSION_1 | device::F_EVENT_IDX | device::F_MQ | device::F_FLUSH;
    let mut transport = Transport::new(&job.socket.to_string_lossy(), wanted)?;
    // Header, data and status are a descriptor each.
    let size = (job.depth * 3).next_power_of_two().max(128) as u16;
    let rings = VirtioBlkQueue::setup_queues(&mut transport, job.queues, size)?;
    let memory = Arc::new(Buffers::new(job.queues * job.depth * job.block)?);
    transport.map_mem_region(memory.start() as usize, memory.0.size(), memory.fd(), 0)?;
    let queues = rings.into_iter().enumerate().map(|(ix, ring)| {
        let queue = Blk {
            ring,
            notifier: transport.get_submission_notifier(ix),
            call: transport.get_completion_fd(ix),
            memory: memory.clone(),
            first: ix * job.depth * job.block,
            block: job.block,
            write: job.write,
        };
        Box::new(queue) as Box<dyn Queue>
    });
    let queues = queues.collect();
    Ok((Box::new(transport), queues))
}

/// A sealed memfd, touched once: a guest's memory is there, too, before it is measured.
struct Buffers(MmapRegion<()>);

impl Buffers {
    fn new(bytes: usize) -> std::io::Result<Buffers> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        let bytes = bytes.next_multiple_of(4096);
        file.set_len(bytes as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::SEAL)?;
        let map = MmapRegion::from_file(FileOffset::new(file, 0), bytes).map_err(std::io::Error::other)?;
        let slice = vm_memory::VolatileMemory::as_volatile_slice(&map);
        slice.copy_from(&vec![0x5a_u8; bytes]);
        Ok(Buffers(map))
    }

    fn start(&self) -> *mut u8 {
        self.0.as_ptr()
    }

    fn fd(&self) -> i32 {
        self.0.file_offset().unwrap().file().as_raw_fd()
    }
}

struct Blk {
    ring: VirtioBlkQueue<'static, usize>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    memory: Arc<Buffers>,
    /// Where in the memory the first buffer is.
    first: usize,
    block: usize,
    write: bool,
}

impl Queue for Blk {
    fn submit(&mut self, buffer: usize, offset: u64) {
        let start = self.memory.start().wrapping_add(self.first + buffer * self.block);
        // SAFETY: the buffer lies in the mapping, which lives as long as this queue; no other request has it.
        let queued = unsafe {
            match self.write {
                true => self.ring.write_raw(offset, start, self.block, buffer),
                false => self.ring.read_raw(offset, start, self.block, buffer),
            }
        };
        queued.unwrap();
    }

    fn tell(&mut self) -> bool {
        let needed = self.ring.avail_notif_needed();
        if needed {
            self.notifier.notify().unwrap();
        }
        needed
    }

    fn next(&mut self) -> Option<(usize, bool)> {
        self.ring.completions().next().map(|done| (done.context, done.ret == 0))
    }

    fn is_ready(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    fn want_call(&mut self, wanted: bool) {
        self.ring.set_used_notif_enabled(wanted);
    }

    fn wait(&mut self) {
        assert!(crate::wait_for(&*self.call, Some(crate::PATIENCE)), "the device does not call");
    }
}

impl Connection for Transport {
    fn sectors(&self) -> Result<u64, String> {
        let config = self.get_config().map_err(|error| format!("no configuration space: {error}"))?;
        Ok(config.capacity.to_native())
    }

    fn close(self: Box<Self>) -> Result<(), String> {
        Ok(())
    }
}
