//! What the vhost-user specification says of queues that come and go, of notes of what is in flight, and of
//! connections.

use crate::{Daemon, Sink};
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::device::{USUAL, Wishes};
use blockmason_vhost_tests::inflight::stride;
use blockmason_vhost_tests::model::{BLOCK, Load, contents};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

const SIZE: u64 = 2 << 20;

fn shape() -> Shape {
    Shape { queues: 2, size: 128, ..Shape::default() }
}

/// The notes are zeros for a guest that is new, one region a queue, in memory that cannot shrink.
#[test]
fn new_notes() {
    let daemon = Daemon::started(Sink::File(SIZE), 4);
    let mut blk = Blk::new(shape());
    blk.device.greet(&daemon.socket()).unwrap();
    let mut link = blk.device.link();
    link.set_features(blk.device.features()).unwrap();
    for (queues, size) in [(1_u16, 2_u16), (2, 128), (4, 256)] {
        let wanted = vhost::vhost_user::message::VhostUserInflight::new(0, 0, queues, size);
        let (about, file) = link.get_inflight_fd(&wanted).unwrap();
        let (bytes, offset) = (about.mmap_size, about.mmap_offset);
        assert!(
            bytes >= (usize::from(queues) * stride(size.into())) as u64,
            "{bytes} bytes for {queues} x {size}"
        );
        let seals = rustix::fs::fcntl_get_seals(&file).unwrap();
        assert!(seals.contains(rustix::fs::SealFlags::SHRINK), "the notes may shrink");
        let notes = blockmason_vhost_tests::inflight::Inflight::new(about, file.try_clone().unwrap());
        for queue in 0..usize::from(queues) {
            assert!(notes.heads(queue).is_empty());
            // Version 0 is "not used yet", 1 what is used; nothing else is.
            assert!(notes.header(queue).version <= 1);
        }
        assert!(offset + bytes <= file.metadata().unwrap().len());
    }
}

/// While a request is in flight it is noted, with its order; and no longer when it is used.
#[test]
fn what_is_in_flight_is_noted() {
    let daemon = slow();
    let mut blk = Blk::connected(Shape { queues: 1, ..shape() }, &daemon.socket());
    let mut heads: Vec<u16> = (0..8).map(|ix| blk.prepare(0, Request::read(ix * 8, 4096))).collect();
    // The order is not that of the descriptors.
    heads.reverse();
    heads.iter().for_each(|head| blk.rings[0].publish(*head));
    blk.kick(0);
    until("all are taken", || {
        blk.device.inflight.as_ref().unwrap().heads(0).len() == 8 || blk.rings[0].is_ready()
    });
    let notes = blk.device.inflight.as_ref().unwrap();
    assert_eq!(notes.heads(0), heads, "the order in which they were taken");
    (0..8).for_each(|_| assert_eq!(blk.next(0).status, OK));
    blk.device.stop().unwrap();
    let notes = blk.device.inflight.as_ref().unwrap();
    assert!(notes.heads(0).is_empty());
    assert_eq!(notes.header(0).used_idx, 8);
}

/// Memory that the front-end takes back is given back when nothing of it is in use.
#[test]
fn memory_that_is_taken_back() {
    for slots in [false, true] {
        let daemon = slow();
        let wishes = Wishes { slots, ..Wishes::default() };
        let mut blk = Blk::connected(Shape { queues: 1, wishes, ..shape() }, &daemon.socket());
        for ix in 0..4 {
            blk.submit(0, Request::read(ix * 8, 4096));
        }
        blk.kick(0);
        until("all are taken", || blk.device.inflight.as_ref().unwrap().heads(0).len() == 4);
        let (mut link, regions) = (blk.device.link(), blk.device.mem.regions());
        if slots {
            link.remove_mem_region(&regions[1]).unwrap();
        } else {
            link.set_mem_table(&regions[..1]).unwrap();
        }
        assert_eq!(blk.rings[0].used_idx(), 4, "memory is given back with requests in flight");
        (0..4).for_each(|_| assert_eq!(blk.next(0).status, OK));
    }
}

/// An export whose requests take a while.
pub(crate) fn slow() -> Daemon {
    let mut daemon = Daemon::new();
    daemon.running = Some(daemon.run(&format!(
        "element Guest (type vhost_user_blk) (listen unix:vm.sock)\n\
         element Slow (type delay) (all 300ms)\n\
         element Disk (type file) (path disk.img) (size {SIZE})\nGuest -> Slow -> Disk\n"
    )));
    daemon
}

/// GET_VRING_BASE is answered when nothing of the queue is in flight; what is offered afterwards waits.
#[test]
fn a_queue_that_stops() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    let blk = Blk::connected(shape(), &daemon.socket());
    let mut load = Load::new(blk, SIZE / BLOCK, 5);
    for round in 0..50 {
        load.fill();
        if round % 3 == 0 {
            load.collect();
        }
        let bases = load.blk.device.stop().unwrap();
        for (queue, base) in bases.iter().enumerate() {
            let used = load.blk.device.used_idx(queue);
            assert_eq!(*base, u32::from(used), "queue {queue} is answered for with requests in flight");
        }
        load.collect();
        let left = load.in_flight();
        // The base is where it goes on, for what it had not taken.
        for (queue, base) in bases.iter().enumerate() {
            load.blk.device.start_queue(queue, *base as u16).unwrap();
            load.blk.device.link().set_vring_enable(queue, true).unwrap();
        }
        load.blk.device.kick_all();
        assert_eq!(load.in_flight(), left);
    }
    load.drain();
    load.check_all();
}

/// A queue that was not enabled does nothing; what was offered is done when it is.
#[test]
fn a_queue_that_is_not_enabled() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    let mut blk = Blk::connected(shape(), &daemon.socket());
    blk.device.link().set_vring_enable(0, false).unwrap();
    blk.submit(0, Request::read(0, 512));
    blk.device.kick_all();
    // The other queue, and a message, have passed in the meantime.
    assert_eq!(blk.run_on(1, Request::read(0, 512)).status, OK);
    blk.device.config().unwrap();
    assert!(!blk.rings[0].is_ready(), "a queue that is not enabled has done something");
    blk.device.link().set_vring_enable(0, true).unwrap();
    assert_eq!(blk.next(0).status, OK);
}

/// The connection ends and comes back, with the daemon alive: as QEMU does with `reconnect`.
#[test]
fn a_connection_that_comes_back() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    let blk = Blk::connected(shape(), &daemon.socket());
    let mut load = Load::new(blk, SIZE / BLOCK, 6);
    for round in 0..60 {
        load.fill();
        if round % 2 == 0 {
            load.collect();
        }
        load.blk.device.disconnect();
        load.fill();
        load.blk.connect(&daemon.socket()).unwrap();
    }
    load.drain();
    load.check_all();
    load.blk.device.stop().unwrap();
    let notes = load.blk.device.inflight.as_ref().unwrap();
    assert_eq!((notes.heads(0), notes.heads(1)), (vec![], vec![]));
}

/// Memory region by region, and a front-end that keeps no notes.
#[test]
fn other_wishes() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    for (inflight, slots) in [(true, true), (false, true), (false, false)] {
        let wishes = Wishes { features: USUAL, inflight, slots };
        let mut blk = Blk::connected(Shape { wishes, ..shape() }, &daemon.socket());
        for queue in 0..2 {
            let request = Request::write(8, &contents(1, 4)).in_pieces(4);
            assert_eq!(blk.run_on(queue, request).status, OK);
        }
        blk.device.stop().unwrap();
    }
}

/// Regions of memory come and go.
#[test]
fn regions_come_and_go() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    let wishes = Wishes { slots: true, ..Wishes::default() };
    let mut blk = Blk::connected(Shape { wishes, ..shape() }, &daemon.socket());
    let more =
        blockmason_vhost_tests::memory::Memory::new(1 << 20, blockmason_vhost_tests::memory::Seal::Shrink);
    let mut link = blk.device.link();
    let mut region = more.regions()[1];
    for round in 0..100_u64 {
        region.guest_phys_addr = (1 << 40) + (round << 24);
        link.add_mem_region(&region).unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert_eq!(blk.run(Request::read(0, 4096)).status, OK);
        link.remove_mem_region(&region).unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    assert_eq!(blk.run(Request::read(0, 4096)).status, OK);
}

/// A second front-end does not disturb the first.
#[test]
fn two_front_ends() {
    let daemon = Daemon::started(Sink::File(SIZE), 2);
    let mut first = Blk::connected(shape(), &daemon.socket());
    first.write(0, &contents(0, 1));
    let mut second = Blk::new(shape());
    // It is refused, or waits its turn; it must not wait for ever afterwards.
    let socket = daemon.socket();
    let waiting = std::thread::spawn(move || {
        let outcome = second.connect(&socket);
        (second, outcome.is_ok())
    });
    for stamp in 2..200 {
        first.write(0, &contents(0, stamp));
        assert!(first.read(0, 4096) == contents(0, stamp));
    }
    first.write(0, &contents(0, 300));
    first.device.disconnect();
    let (mut second, connected) = waiting.join().unwrap();
    if !connected {
        second = Blk::connected(shape(), &daemon.socket());
    }
    assert!(second.read(0, 4096) == contents(0, 300));
}

/// The notes change in an order that leaves no instant at which a death would lose a request or complete it twice:
/// this side looks on while it happens. One request at a time, so it is known what must be where.
#[test]
fn notes_are_written_in_order() {
    // Slow enough to be seen in flight.
    let mut daemon = Daemon::new();
    let running = daemon.run(&format!(
        "element Guest (type vhost_user_blk) (listen unix:vm.sock)\nelement Slow (type delay) (read 200us)\n\
         element Disk (type null) (size {SIZE})\nGuest -> Slow -> Disk\n"
    ));
    daemon.running = Some(running);
    let mut blk = Blk::connected(Shape { queues: 1, ..shape() }, &daemon.socket());
    let (mut before, mut seen) = (None, 0_u32);
    for count in 1..=1_000_u16 {
        // Not the same head again: one with a table, and one without.
        let request = Request::read(u64::from(count % 64) * 8, 4096).in_pieces(1 + usize::from(count % 2));
        let head = blk.submit(0, request);
        blk.kick(0);
        let notes = blk.device.inflight.as_ref().unwrap();
        let mut taken = false;
        loop {
            let flag = notes.is_in_flight(0, head);
            let used = blk.rings[0].used_idx();
            if flag {
                taken = true;
            } else if taken && used != count {
                panic!("request {count} is noted as done, but the guest cannot see that yet");
            }
            if used == count {
                break;
            }
        }
        seen += u32::from(taken);
        let header = notes.header(0);
        assert_eq!(header.last_batch_head, head, "request {count} is used, but not in the list");
        if let Some(before) = before {
            assert_eq!(notes.entry(0, head).next, before, "what follows request {count} in the list");
        }
        until("it is noted as used", || notes.header(0).used_idx == count);
        assert!(!notes.entry(0, head).inflight, "request {count} is noted as used and as in flight");
        before = Some(head);
        assert_eq!(blk.next(0).status, OK);
    }
    assert!(seen > 100, "only {seen} requests were seen in flight");
}
