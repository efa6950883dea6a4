//! Guests that write nonsense into their rings. A request gets an error, or the queue stops, or the connection ends,
//! with a line in the log; the daemon goes on, and so do its other guests.

use crate::{Daemon, Running};
use blockmason_tests::mason::until;
use blockmason_vhost_tests::blk::{Blk, IOERR, OK, Request, Shape, UNSUPP};
use blockmason_vhost_tests::device::{USUAL, Wishes};
use blockmason_vhost_tests::memory::{HIGH, Half, LOW};
use blockmason_vhost_tests::model::{BLOCK, contents};
use blockmason_vhost_tests::ring::{DESCRIPTOR, INDIRECT, NEXT, Part, WRITE};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Sectors of the disks.
const SECTORS: u64 = 8192;

/// A daemon with an export for guests with bad manners, and one for a guest that works all the time.
pub(crate) struct Two {
    pub(crate) daemon: Daemon,
    bystander: Option<(Arc<AtomicBool>, JoinHandle<u64>)>,
}

impl Two {
    pub(crate) fn new() -> Two {
        let mut daemon = Daemon::new();
        let bytes = SECTORS * 512;
        let running = daemon.run(&format!(
            "element Evil (type vhost_user_blk) (listen unix:vm.sock) (queues 2)\n\
             element Good (type vhost_user_blk) (listen unix:good.sock) (queues 1)\n\
             element One (type file) (path disk.img) (size {bytes})\n\
             element Two (type file) (path good.img) (size {bytes})\n\
             Evil -> One\nGood -> Two\n"
        ));
        let Running::Mason(mut mason) = running else { unreachable!() };
        // The second export's.
        mason.line();
        daemon.running = Some(Running::Mason(mason));
        let good = crate::socket_in(daemon.home.path(), "good.sock");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || work(good, &stopped));
        Two { daemon, bystander: Some((stop, thread)) }
    }

    /// The bad guest's export.
    pub(crate) fn socket(&self) -> PathBuf {
        self.daemon.socket()
    }

    /// Serves a guest with good manners through the same export, and has said nothing about a panic.
    pub(crate) fn is_well(&self, after: &str) {
        assert!(self.daemon.is_alive(), "{after}: the daemon is dead\n{}", self.daemon.log());
        let mut blk = Blk::new(Shape::default());
        let connected = blk.connect(&self.socket());
        assert!(connected.is_ok(), "{after}: no guest can connect any more: {connected:?}");
        let data = contents(7, 77);
        blk.write(56, &data);
        assert!(blk.read(56, BLOCK as u32) == data, "{after}: a guest reads something else");
        let log = self.daemon.log();
        assert!(!log.contains("panicked"), "{after}: {log}");
        assert!(!self.bystander.as_ref().unwrap().1.is_finished(), "{after}: the other guest has failed");
    }

    pub(crate) fn finish(mut self) {
        let (stop, thread) = self.bystander.take().unwrap();
        stop.store(true, Ordering::Relaxed);
        match thread.join() {
            Ok(requests) => assert!(requests > 0, "the other guest was never served"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
        self.daemon.stop();
    }
}

/// The other guest. Returns how many requests it made.
fn work(socket: PathBuf, stop: &AtomicBool) -> u64 {
    let mut blk = Blk::connected(Shape::default(), &socket);
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        count += 1;
        let block = count % 512;
        let data = contents(block, count);
        blk.write(block * 8, &data);
        assert!(blk.read(block * 8, BLOCK as u32) == data, "the other guest reads something else");
    }
    count
}

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
struct Parts {
    head: u64,
    data: u64,
    status: u64,
}

fn parts(blk: &Blk, kind: u32, sector: u64) -> Parts {
    let mem = &blk.device.mem;
    let head = mem.take(Half::Low, 32, 16);
    let data = mem.take(Half::High, 8192, 4096);
    mem.set(head, u64::from(kind));
    mem.set(head + 8, sector);
    mem.set(head + 16, 0xff_u8);
    Parts { head, data, status: head + 16 }
}

fn offer(blk: &mut Blk, chain: &[(u64, u32, bool)]) {
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
    ("data of 1 GiB in few pages", Wanted::Anything, |blk| {
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
    let shape = Shape { data: 8192, wishes: Wishes { features, ..Wishes::default() }, ..Shape::default() };
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
fn flip(mem: &blockmason_vhost_tests::memory::Memory, desc: u64, at: &Parts, stop: &AtomicBool) {
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
