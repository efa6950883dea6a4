//! Guests that change their rings while they are read, and front-ends that take memory away.

use crate::hostile_rings::{Parts, offer, parts};
use crate::two::Two;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, Shape};
use blockmason_vhost_tests::memory::{HIGH, Half, Memory};
use blockmason_vhost_tests::ring::{DESCRIPTOR, INDIRECT, NEXT, WRITE};
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
