//! Logs of written pages that are too small, lie elsewhere, come and go, or are cut off, while requests are carried out.

use crate::two::Two;
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::device::{F_LOG_ALL, USUAL, Wishes};
use blockmason_vhost_tests::memory::LOW;
use blockmason_vhost_tests::raw;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// Bytes of the file that logs are parts of.
const FILE: u64 = 1 << 20;

/// Bytes of a log for all of the guest's memory, which ends a little above 4 GiB.
const WHOLE: u64 = 256 << 10;

/// A guest whose writes are to be logged.
fn logged(two: &Two) -> Blk {
    let wishes = Wishes { features: USUAL | F_LOG_ALL, ..Wishes::default() };
    let blk = Blk::connected(Shape { wishes, ..Shape::default() }, &two.socket());
    assert!(blk.device.features() & F_LOG_ALL != 0);
    blk
}

fn log_file() -> File {
    let file = File::from(rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(FILE).unwrap();
    file
}

/// Gives the device a log. Returns whether it has taken it.
fn set_log(blk: &Blk, file: &File, size: u64, offset: u64) -> bool {
    let (raw, body) = (blk.device.raw(), [size, offset].map(u64::to_le_bytes).concat());
    raw.send(raw::SET_LOG_BASE, &body, &[file.as_fd()]);
    raw.reply(raw::SET_LOG_BASE).is_some()
}

/// Says where the used ring is in the log.
fn set_log_address(blk: &Blk, log: u64) {
    let of = blk.device.addresses(blk.rings[0].place);
    let addresses = [of.desc_table_addr, of.used_ring_addr, of.avail_ring_addr, log];
    let body = [&[0, 0, 0, 0, 1, 0, 0, 0][..], &addresses.map(u64::to_le_bytes).concat()].concat();
    assert!(
        blk.device.raw().acknowledged(raw::SET_VRING_ADDR, &body, &[]),
        "a ring that is logged at {log:#x}"
    );
}

/// Some reads, which write into the guest's memory.
fn work(blk: &mut Blk) {
    for ix in 0..16 {
        blk.submit(0, Request::read(ix * 8, 4096).in_pieces(2));
    }
    blk.kick(0);
    (0..16).for_each(|_| assert_eq!(blk.next(0).status, OK));
}

/// Where the file is not zero: from the first such byte to the last.
fn written(file: &File) -> Option<(usize, usize)> {
    let mut bytes = vec![0; FILE as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let first = bytes.iter().position(|byte| *byte != 0)?;
    Some((first, bytes.iter().rposition(|byte| *byte != 0)?))
}

/// A log holds what it has room for, and nothing is written outside of it.
#[test]
fn logs_that_are_too_small() {
    let two = Two::new();
    let lines = two.daemon.log().lines().count();
    for (size, offset) in [(WHOLE, 0), (WHOLE, 4096), (64, 100), (1, 8191), (33, FILE - 33)] {
        let (mut blk, file) = (logged(&two), log_file());
        assert!(set_log(&blk, &file, size, offset), "{size} bytes at {offset} are refused");
        for log in [blk.rings[0].place.used, u64::MAX, u64::MAX - 4095, 1 << 40, 8 * 4096 * size] {
            set_log_address(&blk, log);
            work(&mut blk);
        }
        let log = offset as usize..(offset + size) as usize;
        match written(&file) {
            Some((first, last)) => {
                assert!(
                    log.contains(&first) && log.contains(&last),
                    "{first} to {last} are written of {log:?}"
                );
            }
            // The guest's memory starts behind what such a log has room for.
            None => assert!(size <= LOW / 4096 / 8, "nothing is written of {log:?}"),
        }
        blk.device.disconnect();
        two.is_well("a log that is too small");
    }
    assert_eq!(two.daemon.log().lines().count(), lines, "{}", two.daemon.log());
    two.finish();
}

/// A log that cannot be one ends the connection, with requests in flight or without; its guest comes back.
#[test]
fn logs_that_cannot_be() {
    let two = Two::new();
    two.is_well("nothing");
    let descriptors = two.daemon.descriptors();
    for (size, offset) in
        [(0, 0), (4096, FILE), (4096, FILE - 4095), (u64::MAX, 8), (8, u64::MAX), (u64::MAX, 0)]
    {
        let lines = two.daemon.log().lines().count();
        let (mut blk, file) = (logged(&two), log_file());
        assert!(set_log(&blk, &file, WHOLE, 0));
        for ix in 0..8 {
            blk.submit(0, Request::read(ix * 8, 4096));
        }
        blk.kick(0);
        assert!(!set_log(&blk, &file, size, offset), "{size} bytes at {offset} are a log");
        until("the connection ends", || blk.device.has_ended());
        blk.device.disconnect();
        blk.connect(&two.socket()).unwrap();
        (0..8).for_each(|_| assert_eq!(blk.next(0).status, OK));
        blk.device.disconnect();
        two.is_well("a log that cannot be");
        let said = two.daemon.log().lines().count() - lines;
        assert!(said <= 1, "{said} lines in the log\n{}", two.daemon.log());
    }
    // The last guests' connections may be on their way out.
    assert!(two.daemon.descriptors() <= descriptors + 12);
    two.finish();
}

/// Logs that come and go while requests are carried out, and with them whether there is a log at all.
#[test]
fn logs_that_come_and_go() {
    let two = Two::new();
    let lines = two.daemon.log().lines().count();
    let (mut blk, file, event) = (logged(&two), log_file(), rustix::event::EventfdFlags::NONBLOCK);
    let event = rustix::event::eventfd(0, event).unwrap();
    for round in 0..100 {
        for ix in 0..16 {
            blk.submit(0, Request::read(ix * 8, 4096).in_pieces(2));
        }
        blk.kick(0);
        assert!(set_log(&blk, &file, WHOLE >> (round % 8), round * 8));
        let features =
            if round % 3 == 0 { blk.device.features() & !F_LOG_ALL } else { blk.device.features() };
        let raw = blk.device.raw();
        assert!(raw.acknowledged(raw::SET_FEATURES, &features.to_le_bytes(), &[]));
        assert!(raw.acknowledged(raw::SET_LOG_FD, &[], &[event.as_fd()]));
        set_log_address(&blk, if round % 2 == 0 { u64::MAX } else { blk.rings[0].place.used });
        (0..16).for_each(|_| assert_eq!(blk.next(0).status, OK, "round {round}"));
    }
    assert!(written(&file).is_some());
    blk.device.disconnect();
    two.is_well("logs that come and go");
    assert_eq!(two.daemon.log().lines().count(), lines, "{}", two.daemon.log());
    two.finish();
}

/// A log that its owner cuts off while it is written: whoever has it is the worse for it, and nobody else.
#[test]
fn logs_that_shrink() {
    let two = Two::new();
    for round in 0..5 {
        let lines = two.daemon.log().lines().count();
        let (mut blk, file) = (logged(&two), log_file());
        assert!(set_log(&blk, &file, WHOLE, 4096));
        set_log_address(&blk, blk.rings[0].place.used);
        for ix in 0..16 {
            if ix == 3 * round {
                file.set_len(if round % 2 == 0 { 0 } else { 4096 }).unwrap();
            }
            blk.submit(0, Request::read(ix * 8, 4096));
            blk.kick(0);
        }
        until("the daemon has seen the log go", || {
            blk.rings[0].used_idx() == 16 || blk.device.has_ended() || blk.device.vrings[0].err.read().is_ok()
        });
        blk.device.disconnect();
        two.is_well("a log that shrinks");
        let said = two.daemon.log().lines().count() - lines;
        assert!(said <= 1, "{said} lines in the log\n{}", two.daemon.log());
    }
    two.finish();
}
