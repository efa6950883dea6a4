//! What a daemon that was killed at each instant of a request's way would have left, laid out by the front-end, which
//! owns the rings and the notes of what is in flight; and what the next daemon makes of it. The order of the way is
//! that of the specification ("Inflight I/O tracking", split virtqueue).

use crate::{Daemon, Sink};
use blockmason_vhost_tests::blk::{Blk, OK, Request, Shape};
use blockmason_vhost_tests::inflight::{Entry, Header};
use blockmason_vhost_tests::model::{BLOCK, contents};
use std::collections::BTreeSet;

const SECTORS: u64 = BLOCK / 512;
const SIZE: u64 = 1 << 20;

/// A guest whose daemon has died with nothing in flight, after some requests.
struct Dead {
    daemon: Daemon,
    blk: Blk,
    queue: usize,
    /// The index of the used ring then.
    idx: u16,
    /// What was in flight when the daemon "died".
    waiting: BTreeSet<u16>,
    counter: u64,
    /// What the next daemon is started on.
    sink: Sink,
}

impl Dead {
    /// The index begins near its end, so that it passes 65535 in the middle of what follows.
    fn new(queue: usize) -> Dead {
        let mut daemon = Daemon::started(Sink::File(SIZE), 2);
        let mut blk = Blk::new(Shape { queues: 2, size: 64, ..Shape::default() });
        blk.start_at(0xfffc);
        blk.connect(&daemon.socket()).unwrap();
        for block in 0..2 {
            let request = Request::write(block * SECTORS, &contents(block, 1));
            assert_eq!(blk.run_on(queue, request).status, OK);
        }
        let idx = blk.rings[queue].used_idx();
        assert_eq!(idx, 0xfffe);
        // Else it might die before it has noted that these are done.
        blk.device.stop().unwrap();
        daemon.kill();
        blk.device.disconnect();
        let dead =
            Dead { daemon, blk, queue, idx, waiting: BTreeSet::new(), counter: 1000, sink: Sink::File(SIZE) };
        assert!(dead.inflight().heads(queue).is_empty(), "something is noted as in flight that is done");
        let header = dead.inflight().header(queue);
        assert_eq!((header.version, header.entries, header.used_idx), (1, 64, idx), "the notes' header");
        dead
    }

    fn inflight(&self) -> &blockmason_vhost_tests::inflight::Inflight {
        self.blk.device.inflight.as_ref().unwrap()
    }

    /// The guest offers a write of this stamp to a block.
    fn offer(&mut self, block: u64, stamp: u64) -> u16 {
        let head = self.blk.submit(self.queue, Request::write(block * SECTORS, &contents(block, stamp)));
        self.waiting.insert(head);
        head
    }

    /// The daemon takes a head from the available ring: it notes that, with the order.
    fn take(&mut self, head: u16) {
        let next = self.inflight().entry(self.queue, head).next;
        self.inflight().set_entry(self.queue, head, Entry { inflight: true, next, counter: self.counter });
        self.counter += 1;
    }

    /// The daemon puts a head into the used ring, and into the list of the batch; nobody sees that yet.
    fn put(&self, at: u16, head: u16) {
        self.blk.rings[self.queue].set_used_element(self.idx.wrapping_add(at), head, 1);
        let entry = self.inflight().entry(self.queue, head);
        let header = self.inflight().header(self.queue);
        self.inflight().set_entry(self.queue, head, Entry { next: header.last_batch_head, ..entry });
        self.inflight().set_header(self.queue, Header { last_batch_head: head, ..header });
    }

    /// The daemon shows the guest that so many are used; the guest takes them at once.
    fn show(&mut self, count: u16, status_of: &[u16]) {
        for head in status_of {
            self.blk.set_status(self.queue, *head, OK);
        }
        self.blk.rings[self.queue].set_used_idx(self.idx.wrapping_add(count));
        while let Some(done) = self.blk.collect(self.queue) {
            assert!(self.waiting.remove(&done.head));
        }
    }

    /// The daemon notes that a head is done.
    fn clear(&self, head: u16) {
        let entry = self.inflight().entry(self.queue, head);
        self.inflight().set_entry(self.queue, head, Entry { inflight: false, ..entry });
    }

    /// The write has reached the image.
    fn carry_out(&self, block: u64, stamp: u64) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(self.daemon.home.path().join("disk.img"));
        file.unwrap().write_all_at(&contents(block, stamp), block * BLOCK).unwrap();
    }

    /// The next daemon starts. All that waits is completed once, nothing else is, blocks hold these stamps, and the
    /// queue goes on.
    fn revive(self, holds: &[(u64, u64)]) {
        self.revive_and(holds, || {});
    }

    /// As [`revive`](Self::revive); looks at something in the end.
    fn revive_and(mut self, holds: &[(u64, u64)], look: impl Fn()) {
        let queue = self.queue;
        self.daemon.start(self.sink, 2);
        self.blk.connect(&self.daemon.socket()).unwrap();
        let waiting = std::mem::take(&mut self.waiting);
        let mut done = BTreeSet::new();
        for _ in &waiting {
            let request = self.blk.next(queue);
            assert_eq!(request.status, OK);
            assert!(done.insert(request.head), "head {} is completed twice", request.head);
        }
        assert_eq!(done, waiting);
        let offered = self.blk.rings[queue].avail_idx();
        for (block, stamp) in holds {
            let done = self.blk.run_on(queue, Request::read(block * SECTORS, BLOCK as u32));
            assert!(done.data == contents(*block, *stamp), "block {block} does not hold stamp {stamp}");
        }
        // More entries than the ring has: a head that is taken too often or not at all would show.
        for block in 100..180 {
            let request = Request::write(block * SECTORS, &contents(block, 9));
            assert_eq!(self.blk.run_on(queue, request).status, OK);
        }
        let bases = self.blk.device.stop().unwrap();
        let used = offered.wrapping_add(holds.len() as u16).wrapping_add(80);
        assert_eq!(bases[queue], u32::from(used), "the base after everything");
        assert_eq!(self.blk.rings[queue].used_idx(), used, "the used index after everything");
        assert!(self.inflight().heads(queue).is_empty(), "something is noted as in flight that is done");
        self.daemon.stop();
        look();
    }
}

fn on_both_queues(test: impl Fn(Dead)) {
    for queue in 0..2 {
        test(Dead::new(queue));
    }
}

#[test]
fn before_anything_was_taken() {
    on_both_queues(|mut dead| {
        for block in 10..15 {
            dead.offer(block, 5);
        }
        dead.revive(&[(0, 1), (10, 5), (14, 5)]);
    });
}

/// The order was noted, but not that it is in flight.
#[test]
fn while_it_was_noted_as_taken() {
    on_both_queues(|mut dead| {
        let head = dead.offer(10, 5);
        dead.take(head);
        dead.clear(head);
        dead.revive(&[(10, 5)]);
    });
}

#[test]
fn after_it_was_taken() {
    on_both_queues(|mut dead| {
        for block in 10..14 {
            let head = dead.offer(block, 5);
            dead.take(head);
        }
        dead.revive(&[(10, 5), (11, 5), (12, 5), (13, 5)]);
    });
}

/// What was not taken comes after what was.
#[test]
fn after_some_were_taken() {
    on_both_queues(|mut dead| {
        let heads: Vec<u16> = (10..16).map(|block| dead.offer(block, 5)).collect();
        dead.take(heads[0]);
        dead.take(heads[1]);
        dead.revive(&[(10, 5), (11, 5), (15, 5)]);
    });
}

#[test]
fn after_it_was_carried_out() {
    on_both_queues(|mut dead| {
        let head = dead.offer(10, 5);
        dead.take(head);
        dead.carry_out(10, 5);
        dead.blk.set_status(dead.queue, head, OK);
        dead.revive(&[(10, 5)]);
    });
}

/// The element is in the used ring, but the guest has not seen it: it is done again.
#[test]
fn after_the_used_element() {
    on_both_queues(|mut dead| {
        let heads = [dead.offer(10, 5), dead.offer(11, 5)];
        dead.take(heads[0]);
        dead.take(heads[1]);
        dead.carry_out(11, 5);
        dead.put(0, heads[1]);
        dead.revive(&[(10, 5), (11, 5)]);
    });
}

/// The guest has seen it, and offers the same head again for other data: the first request must not be done again
/// over the second, nor be completed for it.
#[test]
fn between_the_used_index_and_the_note() {
    on_both_queues(|mut dead| {
        let head = dead.offer(10, 5);
        dead.take(head);
        dead.carry_out(10, 5);
        dead.put(0, head);
        dead.show(1, &[head]);
        assert_eq!(dead.offer(10, 6), head, "the guest takes the descriptor that is free");
        dead.revive(&[(10, 6)]);
    });
}

/// As before, but nothing is offered any more: the queue must be silent.
#[test]
fn between_the_used_index_and_the_note_of_the_last_request() {
    on_both_queues(|mut dead| {
        let head = dead.offer(10, 5);
        dead.take(head);
        // The image does not have it, which a real daemon's would: so it shows if it is done.
        dead.put(0, head);
        dead.show(1, &[head]);
        dead.revive(&[(10, 0)]);
    });
}

/// Some of a batch's notes were cleared.
#[test]
fn in_the_middle_of_clearing_a_batch() {
    for cleared in 0..=3 {
        on_both_queues(|mut dead| {
            let heads: Vec<u16> = (10..13).map(|block| dead.offer(block, 5)).collect();
            for (ix, head) in (0..).zip(&heads) {
                dead.take(*head);
                dead.put(ix, *head);
            }
            dead.show(3, &heads);
            heads[..cleared].iter().for_each(|head| dead.clear(*head));
            dead.revive(&[(10, 0), (11, 0), (12, 0)]);
        });
    }
}

/// Only as many as the index says are of the last batch: the list goes on into older ones, whose heads may be in flight
/// again.
#[test]
fn the_list_is_longer_than_the_batch() {
    on_both_queues(|mut dead| {
        // An older batch had the head that is in flight now.
        let again = dead.offer(20, 5);
        let header = dead.inflight().header(dead.queue);
        dead.inflight().set_header(dead.queue, Header { last_batch_head: again, ..header });
        let heads: Vec<u16> = (10..12).map(|block| dead.offer(block, 5)).collect();
        dead.take(again);
        for (ix, head) in (0..).zip(&heads) {
            dead.take(*head);
            dead.put(ix, *head);
        }
        dead.show(2, &heads);
        dead.revive(&[(10, 0), (11, 0), (20, 5)]);
    });
}

/// What was used is not the oldest: the next head to take lies after all that was taken, not at the used index.
#[test]
fn used_out_of_order() {
    on_both_queues(|mut dead| {
        let heads: Vec<u16> = (10..15).map(|block| dead.offer(block, 5)).collect();
        heads.iter().for_each(|head| dead.take(*head));
        for (ix, done) in [4, 2, 3].into_iter().enumerate() {
            dead.put(ix as u16, heads[done]);
        }
        dead.show(3, &[heads[4], heads[2], heads[3]]);
        [4, 2, 3].into_iter().for_each(|done| dead.clear(heads[done]));
        let header = dead.inflight().header(dead.queue);
        let used_idx = dead.idx.wrapping_add(3);
        dead.inflight().set_header(dead.queue, Header { used_idx, ..header });
        dead.offer(16, 7);
        dead.revive(&[(10, 5), (11, 5), (12, 0), (16, 7)]);
    });
}

/// The old one is still in flight after its place in the available ring was taken by another.
#[test]
fn the_available_ring_has_gone_round() {
    on_both_queues(|mut dead| {
        let old = dead.offer(10, 5);
        dead.take(old);
        for round in 0..70_u16 {
            let head = dead.offer(11, 6);
            dead.take(head);
            dead.put(round, head);
            dead.show(round + 1, &[head]);
            dead.clear(head);
            let header = dead.inflight().header(dead.queue);
            let used_idx = dead.idx.wrapping_add(round + 1);
            dead.inflight().set_header(dead.queue, Header { used_idx, ..header });
        }
        dead.offer(12, 7);
        dead.revive(&[(10, 5), (11, 0), (12, 7)]);
    });
}

/// What was taken first goes first.
#[test]
fn in_the_order_in_which_they_were_taken() {
    on_both_queues(|mut dead| {
        let mut heads: Vec<(u64, u16)> = (10..20).map(|block| (block, dead.offer(block, 5))).collect();
        // The order of heads says nothing, the counter does.
        fastrand::Rng::with_seed(1).shuffle(&mut heads);
        heads.iter().for_each(|(_, head)| dead.take(*head));
        let order: Vec<u16> = heads.iter().map(|(_, head)| *head).collect();
        assert_eq!(dead.inflight().heads(dead.queue), order);
        let wanted: Vec<u64> = heads.iter().map(|(block, _)| block * BLOCK).collect();
        dead.sink = Sink::Logged(SIZE);
        let log = dead.daemon.home.path().join("requests.log");
        dead.revive_and(&[(10, 5), (19, 5)], || {
            let text = std::fs::read_to_string(&log).unwrap();
            // Numbered as they come, logged as they are answered.
            let mut lines: Vec<(u64, u64)> = text.lines().filter_map(write_of).collect();
            lines.sort_unstable();
            let found: Vec<u64> = lines.iter().map(|(_, offset)| *offset).take(10).collect();
            assert_eq!(found, wanted, "{text}");
        });
    });
}

/// The number and the offset of a write, from its line.
fn write_of(line: &str) -> Option<(u64, u64)> {
    let words: Vec<&str> = line.split(' ').collect();
    (words[3] == "write").then(|| (words[1].parse().unwrap(), words[4].parse().unwrap()))
}

/// The guest has rebooted: new notes, an old index in the ring.
#[test]
fn notes_that_are_new() {
    on_both_queues(|mut dead| {
        dead.offer(10, 5);
        dead.inflight().fill(0);
        dead.revive(&[(10, 5)]);
    });
}
