//! What the virtio specification (1.2, section 5.2) says of a block device.

use crate::{Daemon, Sink, is_peer};
use blockmason_tests::control::Control;
use blockmason_vhost_tests::blk::{
    Blk, DISCARD, FLUSH, GET_ID, IOERR, OK, Request, Shape, UNSUPP, WRITE_ZEROES,
};
use blockmason_vhost_tests::device::{
    F_CONFIG_WCE, F_DISCARD, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_MQ, F_VERSION_1, F_WRITE_ZEROES, USUAL,
    Wishes,
};
use blockmason_vhost_tests::memory::Half;
use blockmason_vhost_tests::model::contents;
use blockmason_vhost_tests::ring::Part;
use serde_json::json;

const SIZE: u64 = 8 << 20;

/// The offset of `writeback` in the configuration space.
const WRITEBACK: u32 = 32;

fn disk(sink: Sink) -> (Daemon, Blk) {
    let daemon = Daemon::started(sink, 2);
    // The peer keeps no notes of what is in flight.
    let shape = Shape { queues: 2, size: 256, data: 256 << 10, ..Shape::default() };
    let blk = Blk::connected(shape, &daemon.socket());
    (daemon, blk)
}

fn with(features: u64) -> Shape {
    Shape { wishes: Wishes { features, ..Wishes::default() }, ..Shape::default() }
}

fn number(config: &[u8], offset: usize, bytes: usize) -> u64 {
    let mut word = [0; 8];
    word[..bytes].copy_from_slice(&config[offset..offset + bytes]);
    u64::from_le_bytes(word)
}

#[test]
fn the_configuration_space() {
    let (_daemon, blk) = disk(Sink::File(SIZE));
    let wanted =
        F_VERSION_1 | F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_INDIRECT | F_EVENT_IDX | F_CONFIG_WCE;
    assert_eq!(wanted & !blk.device.features(), 0, "these features are not offered");
    let config = blk.device.config().unwrap();
    assert_eq!(number(&config, 0, 8), SIZE / 512, "capacity");
    let segments = number(&config, 12, 4);
    assert!((1..=254).contains(&segments), "seg_max is {segments}: with header and status that is no chain");
    let block = number(&config, 20, 4);
    assert!(block >= 512 && block.is_power_of_two(), "blk_size is {block}");
    assert_eq!(number(&config, WRITEBACK as usize, 1), 1, "writeback");
    assert_eq!(number(&config, 34, 2), 2, "num_queues");
    for (name, offset) in [("discard", 36), ("write zeroes", 48)] {
        assert!(number(&config, offset, 4) >= 8, "max sectors of {name}");
        assert!(number(&config, offset + 4, 4) >= 1, "max segments of {name}");
    }
    assert!(number(&config, 44, 4) >= 1, "discard_sector_alignment");
    // Parts of it are the same as the whole.
    let mut link = blk.device.link();
    for (offset, size) in [(0, 8), (34, 2), (20, 40), (59, 1)] {
        use vhost::vhost_user::VhostUserFrontend;
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
        let zeros = vec![0; size as usize];
        let part = link.get_config(offset, size, flags, &zeros).unwrap().1;
        assert_eq!(part, config[offset as usize..][..size as usize], "{size} bytes at {offset}");
    }
}

#[test]
fn reads_and_writes() {
    let (_daemon, mut blk) = disk(Sink::File(SIZE));
    for pieces in [1, 2, 5, 32] {
        let data: Vec<u8> = (0..16).flat_map(|block| contents(block, pieces)).collect();
        let request = Request::write(8, &data).in_pieces(pieces as usize);
        let done = blk.run(request);
        assert_eq!((done.status, done.written), (OK, 1), "in {pieces} pieces");
        let done = blk.run_on(1, Request::read(8, 65536).in_pieces(pieces as usize));
        assert_eq!((done.status, done.written), (OK, 65537), "in {pieces} pieces");
        assert!(done.data == data, "in {pieces} pieces");
    }
    // Sectors, not blocks.
    blk.write(9, &[1; 512]);
    assert_eq!(blk.read(9, 512), [1; 512]);
    assert_eq!(blk.run(Request::read(SIZE / 512 - 1, 512)).status, OK);
    assert_eq!(blk.run(Request::read(SIZE / 512, 512)).status, IOERR);
    let done = blk.run(Request::of(FLUSH, 0));
    assert_eq!((done.status, done.written), (OK, 1));
}

/// With VIRTIO_F_VERSION_1 a device makes no assumptions about where a descriptor begins and ends.
#[test]
fn any_layout() {
    let (_daemon, mut blk) = disk(Sink::File(SIZE));
    blk.write(0, &contents(0, 3));
    let mem = blk.device.mem.clone();
    let at = mem.take(Half::Low, 8192, 4096);
    let part = |offset, len, write| Part { addr: at + offset, len, write };
    // The header in three pieces; the status behind the data, in the same descriptor.
    let reading = [
        part(0, 4, false),
        part(4, 8, false),
        part(12, 4, false),
        part(512, 100, true),
        part(612, 3997, true),
    ];
    for indirect in [false, true] {
        mem.write(at, &[0; 8192]);
        mem.set(at + 512 + 4096, 0xff_u8);
        let table = mem.take(Half::Low, 16 * 8, 16);
        let ring = &mut blk.rings[0];
        if indirect {
            ring.offer_indirect(&reading, table)
        } else {
            ring.offer(&reading)
        };
        blk.device.kick_all();
        assert!(blk.wait(0));
        assert_eq!(blk.rings[0].used().unwrap().1, 4097, "the used length");
        let mut found = vec![0; 4097];
        mem.read(at + 512, &mut found);
        assert_eq!(found.pop(), Some(OK));
        assert!(found == contents(0, 3));
    }
    // Data right behind the header.
    mem.set(at, 1_u64);
    mem.set(at + 8, 8_u64);
    mem.write(at + 16, &contents(1, 4));
    mem.set(at + 5000, 0xff_u8);
    blk.rings[0].offer(&[part(0, 1000, false), part(1000, 16 + 4096 - 1000, false), part(5000, 1, true)]);
    blk.device.kick_all();
    assert!(blk.wait(0));
    blk.rings[0].used().unwrap();
    assert_eq!(mem.get::<u8>(at + 5000), OK);
    assert!(blk.read(8, 4096) == contents(1, 4));
}

/// Every way of laying out a ring that can be agreed on.
#[test]
fn with_and_without_ring_features() {
    let daemon = Daemon::started(Sink::File(SIZE), 1);
    for left_out in [0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX] {
        let mut blk = Blk::connected(with(USUAL & !left_out), &daemon.socket());
        // The ring goes round several times.
        for round in 0..200 {
            for ix in 0..8 {
                let block = round % 100 * 8 + ix;
                blk.submit(0, Request::write(block * 8, &contents(block, round + 1)).in_pieces(3));
            }
            blk.kick(0);
            for _ in 0..8 {
                assert_eq!(blk.next(0).status, OK);
            }
        }
        assert!(blk.read(8 * 8, 4096) == contents(8, 102), "without {left_out:#x}");
        blk.device.stop().unwrap();
    }
}

#[test]
fn get_id() {
    let (_daemon, mut blk) = disk(Sink::File(SIZE));
    let done = blk.run(Request { into: 20, ..Request::of(GET_ID, 0) });
    assert_eq!((done.status, done.written), (OK, 21));
    let id: Vec<u8> = done.data.iter().copied().take_while(|byte| *byte != 0).collect();
    assert!(id.iter().all(u8::is_ascii), "{id:?}");
    assert!(done.data[id.len()..].iter().all(|byte| *byte == 0), "it is padded with zeros");
    assert_eq!(blk.run(Request { into: 20, ..Request::of(GET_ID, 0) }).data, done.data);
}

#[test]
fn a_type_that_is_unknown() {
    let (_daemon, mut blk) = disk(Sink::File(SIZE));
    for kind in [2, 3, 5, 7, 100, u32::MAX] {
        let done = blk.run(Request { into: 512, ..Request::of(kind, 0) });
        assert_eq!(done.status, UNSUPP, "type {kind}");
    }
}

#[test]
fn zeroing_and_discarding() {
    let (daemon, mut blk) = disk(Sink::File(SIZE));
    let config = blk.device.config().unwrap();
    for (kind, segments) in [(WRITE_ZEROES, number(&config, 52, 4)), (DISCARD, number(&config, 40, 4))] {
        let segments = segments.min(16);
        for flags in [0, 1] {
            let data: Vec<u8> = (0..64).flat_map(|block| contents(block, 9)).collect();
            blk.write(0, &data);
            // Every second block, the last one first; with a range of nothing where there is room for it.
            let mut ranges: Vec<_> = (0..segments).map(|ix| ((segments - 1 - ix) * 16, 8, flags)).collect();
            if segments > 2 {
                ranges[1].1 = 0;
            }
            let done = blk.run(Request::ranges(kind, &ranges));
            if kind == DISCARD && flags == 1 {
                assert_eq!(done.status, UNSUPP, "a discard with the flag `unmap`");
                continue;
            }
            assert_eq!((done.status, done.written), (OK, 1), "type {kind}, flags {flags}");
            let found = blk.read(0, 64 * 4096);
            for block in 0..64_u64 {
                let is = &found[block as usize * 4096..][..4096];
                let touched = ranges.iter().any(|(sector, count, _)| *sector == block * 8 && *count > 0);
                let zeros = is.iter().all(|byte| *byte == 0);
                let same = is == contents(block, 9);
                // What was discarded may hold anything.
                let well = if touched { zeros || kind == DISCARD } else { same };
                assert!(well, "type {kind}, flags {flags}, {segments} segments: block {block}");
            }
        }
    }
    drop(blk);
    drop(daemon);
}

#[test]
fn zeroing_what_cannot_be() {
    let (_daemon, mut blk) = disk(Sink::File(SIZE));
    blk.write(SIZE / 512 - 8, &contents(1, 1));
    for kind in [WRITE_ZEROES, DISCARD] {
        let end = SIZE / 512;
        assert_eq!(
            blk.run(Request::ranges(kind, &[(0, 8, 0x10)])).status,
            UNSUPP,
            "type {kind}: an unknown flag"
        );
        for range in [(end, 1, 0), (end - 8, 9, 0), (u64::MAX - 3, 8, 0), (1 << 60, 8, 0)] {
            let done = blk.run(Request::ranges(kind, &[range]));
            assert_eq!(done.status, IOERR, "type {kind}: {range:?}");
        }
        let config = blk.device.config().unwrap();
        let most = number(&config, if kind == DISCARD { 40 } else { 52 }, 4);
        if most < 4096 {
            let ranges: Vec<_> = (0..=most).map(|ix| (ix * 8, 1, 0)).collect();
            let status = blk.run(Request::ranges(kind, &ranges)).status;
            assert_ne!(status, OK, "type {kind}: {} segments of {most}", most + 1);
        }
    }
    assert!(blk.read(SIZE / 512 - 8, 4096) == contents(1, 1));
}

/// A guest that agrees on nothing for flushes, or turns the cache off, finds every write durable when it completes.
#[test]
fn writes_are_durable_without_a_cache() {
    if is_peer() {
        return;
    }
    for (what, features, cache) in [
        ("a cache, as agreed", USUAL, None),
        ("the cache off", USUAL, Some(0)),
        ("the cache on again", USUAL, Some(1)),
        ("no word of flushes", USUAL & !(F_FLUSH | F_CONFIG_WCE), None),
    ] {
        let volatile = what == "a cache, as agreed" || cache == Some(1);
        let (mut daemon, control) = over_volatile();
        let mut blk = Blk::connected(with(features), &daemon.socket());
        if let Some(cache) = cache {
            blk.device.set_config(WRITEBACK, &[0]).unwrap();
            blk.device.set_config(WRITEBACK, &[cache]).unwrap();
            let config = blk.device.config().unwrap();
            assert_eq!(config[WRITEBACK as usize], cache, "{what}: it reads as it was set");
        }
        blk.write(0, &contents(0, 1));
        let unflushed = unflushed(control);
        assert_eq!(unflushed > 0, volatile, "{what}: {unflushed} sectors are not durable");
        let mut blk = zero_and_flush(blk);
        assert!(blk.read(0, 4096) == contents(0, 1));
        drop(blk);
        daemon.stop();
    }
}

/// Zeroes something, flushes where that was agreed on; returns the disk.
fn zero_and_flush(mut blk: Blk) -> Blk {
    assert_eq!(blk.run(Request::ranges(WRITE_ZEROES, &[(64, 8, 0)])).status, OK);
    if blk.device.features() & F_FLUSH != 0 {
        assert_eq!(blk.run(Request::of(FLUSH, 0)).status, OK);
    }
    blk
}

/// A flush makes durable what completed before it.
#[test]
fn flushes() {
    if is_peer() {
        return;
    }
    let (mut daemon, control) = over_volatile();
    let mut blk = Blk::connected(with(USUAL), &daemon.socket());
    blk.write(0, &contents(0, 1));
    blk = zero_and_flush(blk);
    assert_eq!(unflushed(control), 0, "sectors that are not durable");
    drop(blk);
    daemon.stop();
}

/// An export over a disk that says what it would lose.
fn over_volatile() -> (Daemon, std::path::PathBuf) {
    let mut daemon = Daemon::new();
    let running = daemon.run(
        "element Guest (type vhost_user_blk) (listen unix:vm.sock)\n\
         element Disk (type volatile) (size 1M) (lossy yes)\nGuest -> Disk\n",
    );
    daemon.running = Some(running);
    let control = daemon.home.path().join("c.sock");
    (daemon, control)
}

fn unflushed(control: std::path::PathBuf) -> u64 {
    let (status, said) =
        Control::connect(&control).ask("GET", "/v1/graphs/vm/elements/Disk/handlers/unflushed", &json!(null));
    assert_eq!(status, 200, "{said}");
    said["value"].as_str().unwrap_or_else(|| panic!("{said}")).parse().unwrap()
}
