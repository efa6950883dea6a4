//! Guests that write nonsense into their rings. A request gets an error, or the queue stops, or the connection ends,
//! with a line in the log; the daemon goes on, and so do its other guests.

use crate::protocol::slow;
use crate::two::{SECTORS, Two};
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, FLUSH, IOERR, OK, Request, Shape, UNSUPP};
use blockmason_vhost_tests::device::{USUAL, Wishes};
use blockmason_vhost_tests::memory::{HIGH, Half, LOW};
use blockmason_vhost_tests::ring::{DESCRIPTOR, INDIRECT, NEXT, Part, WRITE};

/// What a daemon may make of nonsense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    /// The request fails, and the queue goes on.
    Fails,
    /// The queue stops or the connection ends, and the log says why.
    Stops,
    /// Any of these; or it succeeds, where nothing forbids that.
    Anything,
}

type Deed = fn(&mut Blk);

/// Parts of a plain request at fixed places.
pub(crate) struct Parts {
    pub(crate) head: u64,
    pub(crate) data: u64,
    pub(crate) status: u64,
}

pub(crate) fn parts(blk: &Blk, kind: u32, sector: u64) -> Parts {
    let mem = &blk.device.mem;
    let head = mem.take(Half::Low, 32, 16);
    let data = mem.take(Half::High, 8192, 4096);
    mem.set(head, u64::from(kind));
    mem.set(head + 8, sector);
    mem.set(head + 16, 0xff_u8);
    Parts { head, data, status: head + 16 }
}

/// Makes a chain available.
pub(crate) fn offer(blk: &mut Blk, chain: &[(u64, u32, bool)]) {
    let chain: Vec<Part> = chain.iter().map(|&(addr, len, write)| Part { addr, len, write }).collect();
    blk.rings[0].offer(&chain).unwrap();
}

/// A read into these bytes.
fn read_into(blk: &mut Blk, addr: u64, len: u32) {
    let at = parts(blk, 0, 0);
    offer(blk, &[(at.head, 16, false), (addr, len, true), (at.status, 1, true)]);
}

/// Descriptor 0 is an indirect table of these, each with its own flags.
fn table(blk: &mut Blk, bytes: u32, rows: &[(u64, u32, u16, u16)]) {
    let at = blk.device.mem.take(Half::Low, DESCRIPTOR * rows.len().max(1) as u64, 16);
    for (ix, (addr, len, flags, next)) in (0..).zip(rows) {
        blk.rings[0].describe(at + DESCRIPTOR * ix, *addr, *len, *flags, *next);
    }
    single(blk, at, bytes, INDIRECT, 0);
}

/// Descriptor 0 is this, and it is available.
fn single(blk: &mut Blk, addr: u64, len: u32, flags: u16, next: u16) {
    blk.rings[0].set_descriptor(0, addr, len, flags, next);
    blk.rings[0].publish(0);
}

const DEEDS: &[(&str, Wanted, Deed)] = &[
    ("a descriptor that follows itself", Wanted::Stops, |blk| single(blk, LOW, 16, NEXT, 0)),
    ("two descriptors that follow each other", Wanted::Stops, |blk| {
        blk.rings[0].set_descriptor(1, LOW, 16, NEXT, 0);
        single(blk, LOW, 16, NEXT, 1);
    }),
    ("a chain that leaves the queue", Wanted::Stops, |blk| single(blk, LOW, 16, NEXT, 128)),
    ("a chain that leaves the queue by far", Wanted::Stops, |blk| single(blk, LOW, 16, NEXT, 0xffff)),
    ("a head that is none", Wanted::Stops, |blk| blk.rings[0].publish(128)),
    ("the head 65535", Wanted::Stops, |blk| blk.rings[0].publish(0xffff)),
    ("the available index jumps", Wanted::Stops, |blk| blk.rings[0].set_avail_idx(129)),
    ("the available index jumps by half its range", Wanted::Stops, |blk| blk.rings[0].set_avail_idx(0x8000)),
    ("the available index goes back", Wanted::Stops, |blk| blk.rings[0].set_avail_idx(0xffff)),
    ("data at address 0", Wanted::Anything, |blk| read_into(blk, 0, 4096)),
    ("data between the regions", Wanted::Anything, |blk| read_into(blk, HIGH - 4096, 4096)),
    ("data across a region's end", Wanted::Anything, |blk| {
        let end = LOW + blk.device.mem.half();
        read_into(blk, end - 512, 4096);
    }),
    ("data at the end of everything", Wanted::Anything, |blk| read_into(blk, u64::MAX - 511, 512)),
    ("data that goes round", Wanted::Anything, |blk| read_into(blk, u64::MAX - 100, 4096)),
    ("data of 4 GiB", Wanted::Anything, |blk| read_into(blk, HIGH, u32::MAX)),
    ("data of 100 MiB in few pages", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        let mut chain = vec![(at.head, 16, false)];
        chain.extend(vec![(HIGH, 1 << 20, true); 100]);
        chain.push((at.status, 1, true));
        offer(blk, &chain);
    }),
    ("a header outside", Wanted::Stops, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(64, 16, false), (at.data, 512, true), (at.status, 1, true)]);
    }),
    ("a status outside", Wanted::Stops, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, true), (64, 1, true)]);
    }),
    ("a header alone", Wanted::Stops, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 16, false)]);
    }),
    ("a status alone", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.status, 1, true)]);
    }),
    ("half a header", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 8, false), (at.status, 1, true)]);
    }),
    ("a status that may only be read", Wanted::Stops, |blk| {
        let at = parts(blk, 1, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, false), (at.status, 1, false)]);
    }),
    ("a status of no bytes", Wanted::Stops, |blk| {
        let at = parts(blk, 1, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, false), (at.status, 0, true)]);
    }),
    ("what is written lies before what is read", Wanted::Stops, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.status, 1, true), (at.head, 16, false)]);
    }),
    ("a read into what may only be read", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, false), (at.status, 1, true)]);
    }),
    ("a write from what may only be written", Wanted::Anything, |blk| {
        let at = parts(blk, 1, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, true), (at.status, 1, true)]);
    }),
    ("half a sector", Wanted::Fails, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 256, true), (at.status, 1, true)]);
    }),
    ("a sector and a byte", Wanted::Fails, |blk| {
        let at = parts(blk, 1, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 513, false), (at.status, 1, true)]);
    }),
    ("a sector past the end", Wanted::Fails, |blk| {
        let at = parts(blk, 0, SECTORS);
        offer(blk, &[(at.head, 16, false), (at.data, 512, true), (at.status, 1, true)]);
    }),
    ("a request across the end", Wanted::Fails, |blk| {
        let at = parts(blk, 1, SECTORS - 1);
        offer(blk, &[(at.head, 16, false), (at.data, 1024, false), (at.status, 1, true)]);
    }),
    ("the last sector there can be", Wanted::Fails, |blk| {
        let at = parts(blk, 1, u64::MAX);
        offer(blk, &[(at.head, 16, false), (at.data, 1024, false), (at.status, 1, true)]);
    }),
    ("a sector whose byte goes round", Wanted::Fails, |blk| {
        let at = parts(blk, 1, (1 << 55) + 8);
        offer(blk, &[(at.head, 16, false), (at.data, 1024, false), (at.status, 1, true)]);
    }),
    ("a request of no kind", Wanted::Fails, |blk| {
        let at = parts(blk, 12345, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 512, true), (at.status, 1, true)]);
    }),
    ("zeroing past the end", Wanted::Fails, |blk| {
        let at = parts(blk, 13, 0);
        blk.device.mem.set(at.data, SECTORS - 1);
        blk.device.mem.set(at.data + 8, 2_u32);
        offer(blk, &[(at.head, 16, false), (at.data, 16, false), (at.status, 1, true)]);
    }),
    ("discarding from the last sector there can be", Wanted::Fails, |blk| {
        let at = parts(blk, 11, 0);
        blk.device.mem.set(at.data, u64::MAX);
        blk.device.mem.set(at.data + 8, u32::MAX);
        offer(blk, &[(at.head, 16, false), (at.data, 16, false), (at.status, 1, true)]);
    }),
    ("half a range to discard", Wanted::Fails, |blk| {
        let at = parts(blk, 11, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 8, false), (at.status, 1, true)]);
    }),
    ("no range to discard", Wanted::Anything, |blk| {
        let at = parts(blk, 11, 0);
        offer(blk, &[(at.head, 16, false), (at.status, 1, true)]);
    }),
    ("a range of no sectors to zero", Wanted::Anything, |blk| {
        let at = parts(blk, 13, 0);
        offer(blk, &[(at.head, 16, false), (at.data, 16, false), (at.status, 1, true)]);
    }),
    ("a read of nothing", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        offer(blk, &[(at.head, 16, false), (at.status, 1, true)]);
    }),
    ("a write of nothing", Wanted::Anything, |blk| {
        let at = parts(blk, 1, SECTORS);
        offer(blk, &[(at.head, 16, false), (at.status, 1, true)]);
    }),
    ("many ranges to discard", Wanted::Fails, |blk| {
        let at = parts(blk, 11, 0);
        let mut chain = vec![(at.head, 16, false)];
        chain.extend([(at.data, 8192, false); 40]);
        chain.push((at.status, 1, true));
        offer(blk, &chain);
    }),
    ("a flag that discarding does not know", Wanted::Fails, |blk| {
        let at = parts(blk, 11, 0);
        blk.device.mem.set(at.data + 8, 1_u32);
        blk.device.mem.set(at.data + 12, 0x8000_u32);
        offer(blk, &[(at.head, 16, false), (at.data, 16, false), (at.status, 1, true)]);
    }),
    ("a table in a table", Wanted::Stops, |blk| table(blk, 16, &[(LOW, 16, INDIRECT, 0)])),
    ("a table and something after it", Wanted::Stops, |blk| {
        single(blk, LOW, 16, INDIRECT | NEXT, 1);
    }),
    ("a table of no bytes", Wanted::Stops, |blk| table(blk, 0, &[])),
    ("a table of a byte too many", Wanted::Stops, |blk| table(blk, 17, &[(LOW, 16, 0, 0), (LOW, 16, 0, 0)])),
    ("a table outside", Wanted::Stops, |blk| single(blk, 16, 64, INDIRECT, 0)),
    ("a table across a region's end", Wanted::Stops, |blk| {
        let end = LOW + blk.device.mem.half();
        single(blk, end - 16, 64, INDIRECT, 0);
    }),
    ("a table of a million entries", Wanted::Anything, |blk| single(blk, LOW, 16 << 20, INDIRECT, 0)),
    ("a table whose chain leaves it", Wanted::Stops, |blk| table(blk, 16, &[(LOW, 16, NEXT, 1)])),
    ("a table whose chain goes in a circle", Wanted::Stops, |blk| {
        table(blk, 32, &[(LOW, 16, NEXT, 1), (LOW, 16, NEXT, 0)]);
    }),
    ("a table that may only be written", Wanted::Anything, |blk| {
        single(blk, LOW, 48, INDIRECT | WRITE, 0);
    }),
    ("one head twice", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        let chain = [(at.head, 16, false), (at.data, 4096, true), (at.status, 1, true)];
        let chain = chain.map(|(addr, len, write)| Part { addr, len, write });
        let head = blk.rings[0].lay(&chain).unwrap();
        for _ in 0..100 {
            blk.rings[0].publish(head);
        }
    }),
    ("data that is the ring itself", Wanted::Anything, |blk| {
        let desc = blk.rings[0].place.desc;
        read_into(blk, desc, 4096);
    }),
    ("data that is the used ring", Wanted::Anything, |blk| {
        let used = blk.rings[0].place.used;
        read_into(blk, used, 512);
    }),
    ("a status in the used ring's index", Wanted::Anything, |blk| {
        let at = parts(blk, 0, 0);
        let used = blk.rings[0].place.used;
        offer(blk, &[(at.head, 16, false), (at.data, 512, true), (used + 2, 1, true)]);
    }),
];

#[test]
fn nonsense_in_a_ring() {
    let two = Two::new();
    for (what, wanted, deed) in DEEDS {
        check(&two, what, *wanted, *deed, USUAL);
    }
    two.finish();
}

/// Without indirect descriptors, one is nonsense.
#[test]
fn a_table_that_was_not_agreed_on() {
    let two = Two::new();
    let features = USUAL & !blockmason_vhost_tests::device::F_INDIRECT;
    check(
        &two,
        "a table without the feature",
        Wanted::Stops,
        |blk| {
            let at = parts(blk, 0, 0);
            let rows = [(at.head, 16, NEXT, 1), (at.data, 512, NEXT | WRITE, 2), (at.status, 1, WRITE, 0)];
            table(blk, 48, &rows);
        },
        features,
    );
    two.finish();
}

fn check(two: &Two, what: &str, wanted: Wanted, deed: Deed, features: u64) {
    let lines = || two.daemon.log().lines().count();
    let shape =
        Shape { data: 128 << 10, wishes: Wishes { features, ..Wishes::default() }, ..Shape::default() };
    let mut blk = Blk::connected(shape, &two.socket());
    let before = lines();
    deed(&mut blk);
    blk.device.kick_all();
    let mut seen = None;
    until(what, || {
        // A line alone may come before the request that it is about fails.
        seen = reaction(&blk, wanted != Wanted::Fails && lines() > before);
        seen.is_some()
    });
    let seen = seen.unwrap();
    if wanted != Wanted::Anything {
        assert_eq!(seen, wanted, "{what}\n{}", two.daemon.log());
    }
    if wanted == Wanted::Fails {
        let (head, _) = blk.rings[0].used().unwrap();
        let status = status_of(&blk, head);
        assert!(status == IOERR || status == UNSUPP, "{what}: status {status}");
        assert_eq!(blk.run(Request::read(0, 512)).status, OK, "{what}: the queue goes on");
    }
    blk.device.disconnect();
    two.is_well(what);
    let said = lines() - before;
    assert!(said <= 1, "{what}: {said} lines in the log\n{}", two.daemon.log());
    assert!(said == 1 || seen == Wanted::Fails, "{what}: the log does not say why\n{}", two.daemon.log());
}

/// A guest that offers one flush again and again while none is completed: what is in flight is bounded by the ring.
#[test]
fn more_in_flight_than_the_ring_has_room_for() {
    let daemon = slow();
    let mut blk = Blk::connected(Shape::default(), &daemon.socket());
    let at = parts(&blk, FLUSH, 0);
    let chain = [(at.head, 16, false), (at.status, 1, true)];
    let head = blk.rings[0].lay(&chain.map(|(addr, len, write)| Part { addr, len, write })).unwrap();
    let broken = (0..50).any(|_| {
        (0..64).for_each(|_| blk.rings[0].publish(head));
        blk.device.kick_all();
        let mut broken = false;
        until("everything is taken", || {
            broken = blk.device.vrings[0].err.read().is_ok();
            broken || blk.rings[0].asked_for() == blk.rings[0].avail_idx()
        });
        broken
    });
    assert!(broken, "there is no end to what is taken");
    assert!(daemon.log().contains("more requests in flight than the ring has room for"), "{}", daemon.log());
    blk.device.disconnect();
    let mut next = Blk::connected(Shape::default(), &daemon.socket());
    assert_eq!(next.run(Request::read(0, 512)).status, OK);
}

/// The byte at the end of a chain.
fn status_of(blk: &Blk, head: u16) -> u8 {
    let mut at = blk.rings[0].descriptor(head);
    while at.flags & NEXT != 0 {
        at = blk.rings[0].descriptor(at.next);
    }
    blk.device.mem.get(at.addr)
}

/// What has become of the first queue, if anything has.
fn reaction(blk: &Blk, said: bool) -> Option<Wanted> {
    if blk.rings[0].is_ready() {
        return Some(Wanted::Fails);
    }
    let broken = blk.device.vrings[0].err.read().is_ok();
    (broken || said || blk.device.has_ended()).then_some(Wanted::Stops)
}
