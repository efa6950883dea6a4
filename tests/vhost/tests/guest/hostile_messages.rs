//! Front-ends that send nonsense. The connection ends or the message fails; the daemon goes on, keeps no descriptor
//! of theirs, and serves its other guests all the while.

use crate::two::Two;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, Request, Shape};
use blockmason_vhost_tests::inflight::{Entry, Header, Inflight, stride};
use blockmason_vhost_tests::memory::{LOW, Memory, Seal};
use blockmason_vhost_tests::raw::{self, NEED_REPLY, Raw, VERSION};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD and CONFIGURE_MEM_SLOTS.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15;

/// What messages are sent with.
struct Kit {
    raw: Raw,
    mem: Arc<Memory>,
    event: OwnedFd,
    file: File,
    pipe: std::io::PipeReader,
}

impl Kit {
    fn fd(&self) -> BorrowedFd<'_> {
        self.mem.file().as_fd()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// A memory table of these regions: guest address, size, user address, offset.
    fn table(&self, count: u32, regions: &[[u64; 4]], fds: &[BorrowedFd]) {
        let mut body = [count, 0].map(u32::to_le_bytes).concat();
        body.extend(regions.iter().flatten().flat_map(|word| word.to_le_bytes()));
        self.raw.send(raw::SET_MEM_TABLE, &body, fds);
    }

    fn good_table(&self) {
        self.table(1, &[[LOW, self.mem.half(), 0x7000_0000, 0]], &[self.fd()]);
    }

    /// Two numbers, as most messages about queues have.
    fn state(&self, request: u32, index: u32, num: u32) {
        self.raw.send(request, &[index, num].map(u32::to_le_bytes).concat(), &[]);
    }

    fn addresses(&self, index: u32, flags: u32, addresses: [u64; 4]) {
        let mut body = [index, flags].map(u32::to_le_bytes).concat();
        body.extend(addresses.iter().flat_map(|word| word.to_le_bytes()));
        self.raw.send(raw::SET_VRING_ADDR, &body, &[]);
    }

    fn number(&self, request: u32, value: u64, fds: &[BorrowedFd]) {
        self.raw.send(request, &value.to_le_bytes(), fds);
    }

    fn log(&self, size: u64, offset: u64, fds: &[BorrowedFd]) {
        self.raw.send(raw::SET_LOG_BASE, &[size, offset].map(u64::to_le_bytes).concat(), fds);
    }

    fn inflight(&self, request: u32, size: u64, offset: u64, queues: u16, entries: u16, fds: &[BorrowedFd]) {
        let body =
            [&size.to_le_bytes()[..], &offset.to_le_bytes(), &queues.to_le_bytes(), &entries.to_le_bytes()];
        // The structure is padded to a multiple of eight bytes by some, and not by others.
        self.raw.send(request, &body.concat(), fds);
    }
}

type Deed = fn(&Kit);

const DEEDS: &[(&str, Deed)] = &[
    ("nothing", |_| {}),
    ("features that were not offered", |kit| kit.number(raw::SET_FEATURES, u64::MAX, &[])),
    ("protocol features that were not offered", |kit| kit.number(raw::SET_PROTOCOL_FEATURES, u64::MAX, &[])),
    ("features with a descriptor", |kit| kit.number(raw::SET_FEATURES, 1 << 32, &[kit.event()])),
    ("a question with fifty descriptors", |kit| {
        kit.raw.send(raw::GET_FEATURES, &[], &[kit.fd(); 50]);
    }),
    ("a queue of no descriptors", |kit| kit.state(raw::SET_VRING_NUM, 0, 0)),
    ("a queue of three descriptors", |kit| kit.state(raw::SET_VRING_NUM, 0, 3)),
    ("a queue of 65536 descriptors", |kit| kit.state(raw::SET_VRING_NUM, 0, 65536)),
    ("a queue of 4 billion descriptors", |kit| kit.state(raw::SET_VRING_NUM, 0, u32::MAX)),
    ("the size of a queue that is none", |kit| kit.state(raw::SET_VRING_NUM, 2, 64)),
    ("the base of a queue that is none", |kit| kit.state(raw::SET_VRING_BASE, u32::MAX, 0)),
    ("a base of 70000", |kit| kit.state(raw::SET_VRING_BASE, 0, 70000)),
    ("the base of a queue that never ran", |kit| kit.state(raw::GET_VRING_BASE, 1, 0)),
    ("the base of no queue", |kit| kit.state(raw::GET_VRING_BASE, 99, 0)),
    ("no queue is enabled", |kit| kit.state(raw::SET_VRING_ENABLE, 99, 1)),
    ("a queue is enabled seven times", |kit| kit.state(raw::SET_VRING_ENABLE, 0, 7)),
    ("a queue is enabled before it is anything", |kit| kit.state(raw::SET_VRING_ENABLE, 0, 1)),
    ("addresses before there is memory", |kit| {
        kit.state(raw::SET_VRING_NUM, 0, 64);
        kit.addresses(0, 0, [0x7000_0000, 0x7000_1000, 0x7000_2000, 0]);
    }),
    ("addresses outside", |kit| {
        kit.good_table();
        kit.state(raw::SET_VRING_NUM, 0, 64);
        kit.addresses(0, 0, [0x1000, 0x2000, 0x3000, 0]);
    }),
    ("addresses at the end of everything", |kit| {
        kit.good_table();
        kit.state(raw::SET_VRING_NUM, 0, 64);
        kit.addresses(0, 0, [u64::MAX - 15, u64::MAX - 3, u64::MAX - 1, 0]);
    }),
    ("a ring across the memory's end", |kit| {
        kit.good_table();
        kit.state(raw::SET_VRING_NUM, 0, 1024);
        let end = 0x7000_0000 + kit.mem.half();
        kit.addresses(0, 0, [0x7000_0000, end - 64, end - 64, 0]);
    }),
    ("a ring that is not aligned", |kit| {
        kit.good_table();
        kit.state(raw::SET_VRING_NUM, 0, 64);
        kit.addresses(0, 0, [0x7000_0001, 0x7000_1001, 0x7000_2001, 0]);
    }),
    ("a ring that is logged", |kit| {
        kit.good_table();
        kit.state(raw::SET_VRING_NUM, 0, 64);
        kit.addresses(0, u32::MAX, [0x7000_0000, 0x7000_1000, 0x7000_2000, u64::MAX]);
    }),
    ("a kick without a descriptor", |kit| kit.number(raw::SET_VRING_KICK, 0, &[])),
    ("a kick with two descriptors", |kit| {
        kit.number(raw::SET_VRING_KICK, 0, &[kit.event(), kit.event()]);
    }),
    ("a kick without a descriptor, and one", |kit| kit.number(raw::SET_VRING_KICK, 1 << 8, &[kit.event()])),
    ("a kick of no queue", |kit| kit.number(raw::SET_VRING_KICK, 9, &[kit.event()])),
    ("a kick that is polled", |kit| kit.number(raw::SET_VRING_KICK, 1 << 8, &[])),
    ("a kick that is a file", |kit| kit.number(raw::SET_VRING_KICK, 0, &[kit.file.as_fd()])),
    ("a kick that is a pipe", |kit| kit.number(raw::SET_VRING_KICK, 0, &[kit.pipe.as_fd()])),
    ("a call that is a file", |kit| {
        start(kit, kit.event(), kit.file.as_fd());
    }),
    ("a queue that runs with a file as its kick", |kit| {
        start(kit, kit.file.as_fd(), kit.event());
    }),
    ("a queue that runs with a pipe as its kick", |kit| {
        start(kit, kit.pipe.as_fd(), kit.event());
    }),
    ("no memory", |kit| kit.table(0, &[], &[])),
    ("memory of no bytes", |kit| kit.table(1, &[[LOW, 0, 0x7000_0000, 0]], &[kit.fd()])),
    ("memory without a descriptor", |kit| kit.table(1, &[[LOW, 4096, 0x7000_0000, 0]], &[])),
    ("memory with too many descriptors", |kit| {
        kit.table(1, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.fd(), kit.fd(), kit.fd()]);
    }),
    ("more regions than are there", |kit| kit.table(8, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.fd()])),
    ("4 billion regions", |kit| kit.table(u32::MAX, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.fd()])),
    ("sixty regions", |kit| {
        let regions: Vec<_> = (0..60).map(|ix| [LOW + ix * 4096, 4096, 0x7000_0000 + ix * 4096, 0]).collect();
        kit.table(60, &regions, &vec![kit.fd(); 60]);
    }),
    ("regions over each other", |kit| {
        let region = [LOW, 8192, 0x7000_0000, 0];
        kit.table(2, &[region, region], &[kit.fd(), kit.fd()]);
    }),
    ("memory that goes round", |kit| {
        kit.table(1, &[[u64::MAX - 4095, 8192, u64::MAX - 4095, 0]], &[kit.fd()]);
    }),
    ("memory of all bytes there are", |kit| kit.table(1, &[[0, u64::MAX, 0, 0]], &[kit.fd()])),
    ("more memory than the file has", |kit| {
        kit.table(1, &[[LOW, 1 << 40, 0x7000_0000, 0]], &[kit.fd()]);
    }),
    ("memory behind the file's end", |kit| {
        kit.table(1, &[[LOW, 4096, 0x7000_0000, 1 << 40]], &[kit.fd()]);
    }),
    ("memory whose offset goes round", |kit| {
        kit.table(1, &[[LOW, 8192, 0x7000_0000, u64::MAX - 4095]], &[kit.fd()]);
    }),
    ("memory at an odd offset", |kit| kit.table(1, &[[LOW, 4096, 0x7000_0000, 17]], &[kit.fd()])),
    ("memory that is a pipe", |kit| kit.table(1, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.pipe.as_fd()])),
    ("memory that is an event", |kit| kit.table(1, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.event()])),
    ("memory that may only be read", |kit| {
        kit.table(1, &[[LOW, 4096, 0x7000_0000, 0]], &[kit.file.as_fd()]);
    }),
    ("notes of no queues", |kit| kit.inflight(raw::GET_INFLIGHT_FD, 0, 0, 0, 0, &[])),
    ("notes of all queues there can be", |kit| {
        kit.inflight(raw::GET_INFLIGHT_FD, 0, 0, u16::MAX, u16::MAX, &[]);
    }),
    ("notes without a descriptor", |kit| kit.inflight(raw::SET_INFLIGHT_FD, 4096, 0, 2, 64, &[])),
    ("notes that are too small", |kit| kit.inflight(raw::SET_INFLIGHT_FD, 64, 0, 2, 64, &[kit.fd()])),
    ("notes behind the file's end", |kit| {
        kit.inflight(raw::SET_INFLIGHT_FD, 4096, 1 << 40, 2, 64, &[kit.fd()]);
    }),
    ("notes of all bytes there are", |kit| {
        kit.inflight(raw::SET_INFLIGHT_FD, u64::MAX, 0, 2, 64, &[kit.fd()]);
    }),
    ("notes that are a pipe", |kit| {
        kit.inflight(raw::SET_INFLIGHT_FD, 4096, 0, 2, 64, &[kit.pipe.as_fd()]);
    }),
    ("a log without a descriptor", |kit| kit.log(4096, 0, &[])),
    ("a log with two descriptors", |kit| kit.log(4096, 0, &[kit.fd(), kit.fd()])),
    ("a log of no bytes", |kit| kit.log(0, 0, &[kit.fd()])),
    ("a log behind the file's end", |kit| kit.log(4096, 1 << 40, &[kit.fd()])),
    ("a log across the file's end", |kit| kit.log(4096, 2 * kit.mem.half() - 4095, &[kit.fd()])),
    ("a log of all bytes there are", |kit| kit.log(u64::MAX, 0, &[kit.fd()])),
    ("a log that goes round", |kit| kit.log(u64::MAX - 4095, 8192, &[kit.fd()])),
    ("a log at an odd offset", |kit| kit.log(100, 17, &[kit.fd()])),
    ("a log that is a pipe", |kit| kit.log(4096, 0, &[kit.pipe.as_fd()])),
    ("a log that is an event", |kit| kit.log(4096, 0, &[kit.event()])),
    ("a log that may only be read", |kit| kit.log(4096, 0, &[kit.file.as_fd()])),
    ("half a log", |kit| kit.number(raw::SET_LOG_BASE, 4096, &[kit.fd()])),
    ("an event of a log", |kit| kit.raw.send(raw::SET_LOG_FD, &[], &[kit.event()])),
    ("an event of a log that is a file", |kit| kit.raw.send(raw::SET_LOG_FD, &[], &[kit.file.as_fd()])),
    ("an event of a log that is none", |kit| kit.raw.send(raw::SET_LOG_FD, &[], &[])),
    ("a channel without a descriptor", |kit| kit.raw.send(raw::SET_BACKEND_REQ_FD, &[], &[])),
    ("a channel that is a file", |kit| kit.raw.send(raw::SET_BACKEND_REQ_FD, &[], &[kit.file.as_fd()])),
    ("two channels", |kit| {
        kit.raw.send(raw::SET_BACKEND_REQ_FD, &[], &[kit.event(), kit.pipe.as_fd()]);
    }),
    ("memory that was never there is taken away", |kit| {
        kit.raw.send(raw::REM_MEM_REG, &[0, LOW, 4096, 0x7000_0000, 0].map(u64::to_le_bytes).concat(), &[]);
    }),
    ("memory in addition to itself", |kit| {
        let region = [0, LOW, 4096, 0x7000_0000, 0].map(u64::to_le_bytes).concat();
        kit.raw.send(raw::ADD_MEM_REG, &region, &[kit.fd()]);
        kit.raw.send(raw::ADD_MEM_REG, &region, &[kit.fd()]);
    }),
    ("the configuration space of 4 GiB", |kit| {
        kit.raw.send(raw::GET_CONFIG, &[0, u32::MAX, 0].map(u32::to_le_bytes).concat(), &[]);
    }),
    ("the configuration space behind its end", |kit| {
        let mut body = [0xffff_fff0, 64, 0_u32].map(u32::to_le_bytes).concat();
        body.extend([0; 64]);
        kit.raw.send(raw::GET_CONFIG, &body, &[]);
    }),
    ("a message of another version", |kit| message(kit, raw::GET_FEATURES, 2, 0, &[])),
    ("a message of no version", |kit| message(kit, raw::GET_FEATURES, 0, 0, &[])),
    ("a reply", |kit| message(kit, raw::GET_FEATURES, VERSION | raw::REPLY, 0, &[])),
    ("all flags", |kit| message(kit, raw::GET_FEATURES, !2, 0, &[])),
    ("request 0", |kit| message(kit, 0, VERSION, 0, &[])),
    ("request 999", |kit| message(kit, 999, VERSION | NEED_REPLY, 8, &[0; 8])),
    ("a message of 4 GiB", |kit| message(kit, raw::SET_FEATURES, VERSION, u32::MAX, &[0; 8])),
    ("a message of 5000 bytes", |kit| message(kit, raw::SET_FEATURES, VERSION, 5000, &[0; 5000])),
    ("a number of four bytes", |kit| message(kit, raw::SET_FEATURES, VERSION, 4, &[0; 4])),
    ("a number of twelve bytes", |kit| message(kit, raw::SET_FEATURES, VERSION, 12, &[0; 12])),
    ("a question with a payload", |kit| message(kit, raw::GET_FEATURES, VERSION, 8, &[0; 8])),
    ("half a header", |kit| kit.raw.bytes(&[1, 0, 0, 0, 1], &[])),
    ("half a header with a descriptor", |kit| kit.raw.bytes(&[5, 0, 0], &[kit.fd()])),
    ("half a payload", |kit| message(kit, raw::SET_FEATURES, VERSION, 8, &[0; 3])),
    ("half a payload with descriptors", |kit| {
        kit.raw.message(raw::SET_MEM_TABLE, VERSION, 40, &[1, 0, 0, 0], &[kit.fd(), kit.fd()]);
    }),
];

fn message(kit: &Kit, request: u32, flags: u32, size: u32, payload: &[u8]) {
    kit.raw.message(request, flags, size, payload, &[]);
}

/// A queue with everything, and these descriptors.
fn start(kit: &Kit, kick: BorrowedFd, call: BorrowedFd) {
    kit.number(raw::SET_FEATURES, 1 << 32 | 1 << 30, &[]);
    kit.good_table();
    kit.state(raw::SET_VRING_NUM, 0, 64);
    kit.state(raw::SET_VRING_BASE, 0, 0);
    kit.addresses(0, 0, [0x7000_0000, 0x7000_1000, 0x7000_2000, 0]);
    kit.number(raw::SET_VRING_KICK, 0, &[kick]);
    kit.number(raw::SET_VRING_CALL, 0, &[call]);
    kit.state(raw::SET_VRING_ENABLE, 0, 1);
    rustix::io::write(&kit.event, &1_u64.to_ne_bytes()).unwrap();
}

fn kit(two: &Two) -> Kit {
    Kit {
        raw: Raw::greeted(&two.socket(), PROTOCOL),
        mem: Memory::new(1 << 20, Seal::Shrink),
        event: rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap(),
        file: File::open("/proc/self/exe").unwrap(),
        pipe: std::io::pipe().unwrap().0,
    }
}

#[test]
fn nonsense_in_messages() {
    let two = Two::new();
    two.is_well("nothing");
    let descriptors = two.daemon.descriptors();
    for (what, deed) in DEEDS {
        let lines = two.daemon.log().lines().count();
        let kit = kit(&two);
        deed(&kit);
        // What the daemon has not closed by then ends with this side, when everything is read.
        kit.raw.finish();
        assert!(kit.raw.ended(), "{what}: the connection does not end\n{}", two.daemon.log());
        drop(kit);
        two.is_well(what);
        let said = two.daemon.log().lines().count() - lines;
        assert!(said <= 2, "{what}: {said} lines in the log\n{}", two.daemon.log());
    }
    let now = two.daemon.descriptors();
    // The last guest's connection may be on its way out.
    assert!(now <= descriptors + 12, "the daemon had {descriptors} descriptors and has {now}");
    two.finish();
}

/// Random bytes in messages of every kind, with and without descriptors.
#[test]
fn garbage() {
    let two = Two::new();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..200 {
        let kit = kit(&two);
        for _ in 0..rng.usize(1..12) {
            let mut payload = vec![0; *rng.choice(&[0, 8, 8, 8, 12, 20, 24, 40, 72, 200]).unwrap()];
            payload.iter_mut().for_each(|byte| *byte = if rng.bool() { rng.u8(..4) } else { rng.u8(..) });
            let fds = [kit.event(), kit.fd(), kit.pipe.as_fd()];
            let request = rng.u32(1..44);
            let flags = VERSION | if rng.bool() { NEED_REPLY } else { 0 };
            let fds = &fds[..if rng.bool() { rng.usize(..4) } else { 0 }];
            kit.raw.message(request, flags, payload.len() as u32, &payload, fds);
        }
        kit.raw.finish();
        assert!(kit.raw.ended());
    }
    two.is_well("garbage");
    two.finish();
}

/// Front-ends that say half of something, or nothing, and stay, hold nobody up.
#[test]
fn front_ends_that_stop_speaking() {
    let two = Two::new();
    let silent: Vec<Raw> = (0..8)
        .map(|ix| {
            let raw =
                if ix % 2 == 0 { Raw::connect(&two.socket()) } else { Raw::greeted(&two.socket(), PROTOCOL) };
            raw.bytes(&[1, 0, 0, 0, 1, 0][..ix % 7], &[]);
            raw
        })
        .collect();
    two.is_well("half a message");
    drop(silent);
    two.is_well("half a message, and the end");
    two.finish();
}

/// The memory table changes again and again while requests are in flight: each is done in the memory that it was
/// offered with, or fails.
#[test]
fn the_memory_table_changes_under_load() {
    let two = Two::new();
    let mut blk = Blk::connected(Shape { depth: 32, size: 256, ..Shape::default() }, &two.socket());
    let link = blk.device.link();
    let regions = blk.device.mem.regions();
    for round in 0..200_u64 {
        for ix in 0..16 {
            blk.submit(0, Request::read(ix * 8, 4096).in_pieces(4));
        }
        blk.kick(0);
        use vhost::VhostBackend;
        link.set_mem_table(&regions).unwrap_or_else(|error| panic!("round {round}: {error}"));
        for _ in 0..16 {
            assert_eq!(blk.next(0).status, 0, "round {round}");
        }
    }
    drop(link);
    blk.device.disconnect();
    two.is_well("other memory");
    two.finish();
}

/// Notes of what is in flight that nobody has written like that.
#[test]
fn notes_that_are_nonsense() {
    let two = Two::new();
    let mut rng = fastrand::Rng::with_seed(4);
    for round in 0..40 {
        let mut blk = Blk::connected(Shape::default(), &two.socket());
        blk.write(0, &[1; 512]);
        blk.device.stop().unwrap();
        blk.device.disconnect();
        let notes = blk.device.inflight.as_ref().unwrap();
        match round {
            0 => notes.fill(0xff),
            1 => notes.fill(1),
            _ => {
                let used_idx = if rng.bool() { blk.rings[0].used_idx() } else { rng.u16(..) };
                let header = Header { version: 1, entries: 128, last_batch_head: rng.u16(..200), used_idx };
                notes.set_header(0, header);
                for head in 0..128 {
                    let entry =
                        Entry { inflight: rng.u8(..8) == 0, next: rng.u16(..200), counter: rng.u64(..3) };
                    notes.set_entry(0, head, entry);
                }
            }
        }
        // Whether it is refused or served, and what becomes of it, is not the daemon's fault.
        if blk.connect(&two.socket()).is_ok() {
            blk.submit(0, Request::read(0, 512));
            blk.device.kick_all();
            let seen = || {
                blk.rings[0].is_ready() || blk.device.has_ended() || blk.device.vrings[0].err.read().is_ok()
            };
            until("the daemon has done something with the notes", seen);
        }
        blk.device.disconnect();
        two.is_well("notes that are nonsense");
    }
    two.finish();
}

/// Notes in memory that the front-end cuts off while the daemon writes them.
#[test]
fn notes_that_shrink() {
    let two = Two::new();
    for round in 0..5 {
        let mut blk = Blk::new(Shape::default());
        let bytes = stride(128).next_multiple_of(4096) as u64;
        let file =
            rustix::fs::memfd_create("notes", rustix::fs::MemfdFlags::ALLOW_SEALING).map(File::from).unwrap();
        file.set_len(bytes).unwrap();
        let about = vhost::vhost_user::message::VhostUserInflight::new(bytes, 0, 1, 128);
        blk.device.inflight = Some(Inflight::new(about, file.try_clone().unwrap()));
        if blk.connect(&two.socket()).is_ok() {
            for ix in 0..16 {
                if ix == 4 * round {
                    file.set_len(0).unwrap();
                }
                blk.submit(0, Request::read(ix * 8, 512));
                blk.device.kick_all();
            }
            let over = || {
                let used = blk.rings[0].used_idx() == 16;
                used || blk.device.has_ended() || blk.device.vrings[0].err.read().is_ok()
            };
            until("the daemon has seen the notes go", over);
        }
        blk.device.disconnect();
        two.is_well("notes that shrink");
    }
    two.finish();
}
