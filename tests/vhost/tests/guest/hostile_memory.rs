//! Guests that change their rings while they are read, and front-ends that take memory away.

use crate::hostile_rings::{Parts, offer, parts};
use crate::two::Two;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::device::Wishes;
use blockmason_vhost_tests::memory::{HIGH, Half, Memory};
use blockmason_vhost_tests::raw;
use blockmason_vhost_tests::ring::{DESCRIPTOR, INDIRECT, NEXT, WRITE};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// A guest that changes descriptors while they are read: what was checked must be what is used.
#[test]
fn a_ring_that_changes_while_it_is_read() {
    let two = Two::new();
    let stop = AtomicBool::new(false);
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..20 {
        let mut blk = Blk::connected(Shape { data: 8192, ..Shape::default() }, &two.socket());
        let (place, mem) = (blk.rings[0].place, blk.device.mem.clone());
        let at = parts(&blk, 0, 0);
        std::thread::scope(|scope| {
            stop.store(false, Ordering::Relaxed);
            scope.spawn(|| flip(&mem, place.desc, &at, &stop));
            for _ in 0..300 {
                for _ in 0..rng.u16(1..8) {
                    blk.rings[0].publish(0);
                }
                blk.device.kick_all();
                std::thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
        blk.device.disconnect();
    }
    two.is_well("flipping descriptors");
    two.finish();
}

/// Turns a good chain into bad ones and back.
fn flip(mem: &Memory, desc: u64, at: &Parts, stop: &AtomicBool) {
    let mut rng = fastrand::Rng::with_seed(2);
    let put = |ix: u64, addr: u64, len: u32, flags: u16, next: u16| {
        mem.set(desc + DESCRIPTOR * ix, addr);
        mem.set(desc + DESCRIPTOR * ix + 8, len);
        mem.set(desc + DESCRIPTOR * ix + 12, flags);
        mem.set(desc + DESCRIPTOR * ix + 14, next);
    };
    while !stop.load(Ordering::Relaxed) {
        put(0, at.head, 16, NEXT, 1);
        put(1, at.data, 4096, NEXT | WRITE, 2);
        put(2, at.status, 1, WRITE, 0);
        match rng.u32(..6) {
            0 => put(1, u64::MAX - 10, 4096, NEXT | WRITE, 2),
            1 => put(1, at.data, u32::MAX, NEXT | WRITE, 2),
            2 => put(0, at.head, 16, NEXT, 0),
            3 => put(0, at.data, 4096, INDIRECT, 0),
            4 => put(2, 3, 1, WRITE, 0),
            _ => put(1, at.data, 4096, NEXT | WRITE, 0xfff0),
        }
    }
}

/// Memory that can be cut off under the daemon, and is.
#[test]
fn memory_that_shrinks() {
    let two = Two::new();
    for round in 0..5 {
        let mut blk =
            Blk::new(Shape { sealed: false, depth: 64, size: 256, data: 65536, ..Shape::default() });
        if blk.connect(&two.socket()).is_err() {
            // Not taking such memory is an answer, too.
            two.is_well("memory that is not sealed");
            continue;
        }
        // Only what lies in the region that stays is looked at afterwards.
        for request in 0..64 {
            if request == 32 + round {
                blk.device.mem.shrink();
            }
            let at = parts_low(&blk, request % 2);
            let write = request % 2 == 0;
            offer(&mut blk, &[(at.head, 16, false), (HIGH + 4096, 65536, write), (at.status, 1, true)]);
            blk.device.kick_all();
        }
        // It is answered, or the connection ends; a daemon that is dead or hangs does neither.
        until("the daemon has seen the memory go", || {
            blk.device.has_ended() || blk.rings[0].used_idx() == 64 || blk.device.vrings[0].err.read().is_ok()
        });
        blk.device.disconnect();
        two.is_well("memory that shrinks");
    }
    two.finish();
}

/// A header and a status in the lower region.
fn parts_low(blk: &Blk, kind: u32) -> Parts {
    let head = blk.device.mem.take(Half::Low, 32, 16);
    blk.device.mem.set(head, u64::from(kind));
    blk.device.mem.set(head + 8, 0_u64);
    blk.device.mem.set(head + 16, 0xff_u8);
    Parts { head, data: 0, status: head + 16 }
}

/// Regions of memory that come and go in orders that make no sense, one message at a time, while requests are carried
/// out. What is refused changes nothing; what takes the rings away ends the queue and nothing else.
#[test]
fn regions_in_odd_orders() {
    let two = Two::new();
    let mut rng = fastrand::Rng::with_seed(5);
    for round in 0..30 {
        let lines = two.daemon.log().lines().count();
        let wishes = Wishes { slots: true, ..Wishes::default() };
        let mut blk = Blk::connected(Shape { wishes, ..Shape::default() }, &two.socket());
        let raw = blk.device.raw();
        for _ in 0..20 {
            for ix in 0..4 {
                blk.submit(0, Request::read(ix * 8, 4096));
            }
            blk.device.kick_all();
            let (request, region, good) = odd_region(&mut rng, &blk.device.mem, round % 3 == 0);
            let fds = [blk.device.mem.file().as_fd()];
            let fds = if request == raw::ADD_MEM_REG { &fds[..] } else { &[] };
            let taken = raw.acknowledged(request, &region.map(u64::to_le_bytes).concat(), fds);
            assert!(good.is_none_or(|good| good == taken), "{request} of {region:x?}: {taken}");
            if good.is_none() {
                break;
            }
            (0..4).for_each(|_| assert_eq!(blk.next(0).status, OK));
        }
        drop(raw);
        blk.device.disconnect();
        two.is_well("regions in odd orders");
        let said = two.daemon.log().lines().count() - lines;
        assert!(said <= 1, "{said} lines in the log\n{}", two.daemon.log());
    }
    two.finish();
}

/// A message about a region, and whether it is to be taken; none where the guest's own memory goes.
fn odd_region(rng: &mut fastrand::Rng, mem: &Memory, fatal: bool) -> (u32, [u64; 5], Option<bool>) {
    let of = &mem.regions()[rng.usize(..2)];
    let (guest, size, user) = (of.guest_phys_addr, of.memory_size, of.userspace_addr);
    let region = |guest, size, user| [0, guest, size, user, of.mmap_offset];
    match rng.u32(..if fatal { 7 } else { 6 }) {
        0 => (raw::ADD_MEM_REG, region(guest, size, user), Some(false)),
        1 => (raw::ADD_MEM_REG, region(guest + size - 1, 4096, user + size), Some(false)),
        2 => (raw::REM_MEM_REG, region(guest, size, user + 4096), Some(false)),
        3 => (raw::REM_MEM_REG, region(guest, size - 4096, user), Some(false)),
        4 => (raw::REM_MEM_REG, region(guest + size, size, user + size), Some(false)),
        5 => (raw::ADD_MEM_REG, region(rng.u64(1 << 34..1 << 62), 4096, 1 << 40), Some(true)),
        _ => (raw::REM_MEM_REG, region(guest, size, user), None),
    }
}
