//! Orders of events: all of them for one write of a guest, and random ones for many.

use super::world::{Moving, bytes, fresh, parked, pass, release, set, settle, world};
use blockmason::testing::run;
use blockmason::{Data, Host, Op, Ops, Request};
use futures::future::join_all;
use std::ops::Range;
use std::sync::Arc;

/// One run's choices: those of the run before up to where another one is due, then the first ones.
#[derive(Default)]
struct Choices {
    /// Each choice with how many there were.
    taken: Vec<(usize, usize)>,
    at: usize,
}

impl Choices {
    fn choose(&mut self, of: usize) -> usize {
        if self.at == self.taken.len() {
            self.taken.push((0, of));
        }
        let (choice, known) = self.taken[self.at];
        assert_eq!(known, of, "the run does not repeat");
        self.at += 1;
        choice
    }

    /// Moves on to the next run; false if there is none.
    fn next(&mut self) -> bool {
        self.at = 0;
        while let Some((choice, of)) = self.taken.pop() {
            if choice + 1 < of {
                self.taken.push((choice + 1, of));
                return true;
            }
        }
        false
    }
}

/// Something that may happen next.
#[derive(Clone, Debug)]
enum Event {
    Guest,
    /// A disk does something, well or not.
    Done(String, usize, bool),
    /// Time passes: a copier that waits for a leg holds its range.
    Time,
}

const SIZE: u64 = 8192;

/// Copies two granules and lets a guest write once meanwhile, in the order of `choices`.
async fn one_write(host: Arc<Host>, write: &Range<u64>, mut failures: usize, choices: &mut Choices) {
    fresh(Ops::NONE);
    set("Old", [1; SIZE as usize]);
    let moving = Moving::new(&host, &Moving::text("hand", SIZE, SIZE, ""), "T").await;
    let (mut guest, mut times, mut order) = (None, 1, Vec::new());
    loop {
        settle().await;
        let mut events: Vec<Event> = Vec::new();
        for (disk, ix, ..) in parked() {
            events.push(Event::Done(disk.clone(), ix, true));
            if failures > 0 {
                events.push(Event::Done(disk, ix, false));
            }
        }
        let idle = events.is_empty();
        if guest.is_none() {
            events.push(Event::Guest);
        }
        if !idle && times > 0 {
            events.push(Event::Time);
        }
        if events.is_empty() {
            if moving.get("state") == "clean" {
                break;
            }
            pass(50).await;
            continue;
        }
        let event = events.swap_remove(choices.choose(events.len()));
        order.push(event.clone());
        match event {
            Event::Guest => {
                let data = Data::copy_of(&vec![2; (write.end - write.start) as usize]);
                guest = Some(moving.disk.send(Request::write(write.start, data)));
            }
            Event::Done(disk, ix, well) => {
                failures -= usize::from(!well);
                release(&disk, ix, well);
            }
            Event::Time => {
                times -= 1;
                pass(150).await;
            }
        }
    }
    let (old, new) = (bytes("Old"), bytes("New"));
    assert!(old == new, "{order:?}");
    if guest.unwrap().await.unwrap().is_ok() {
        let mut expected = vec![1; SIZE as usize];
        expected[write.start as usize..write.end as usize].fill(2);
        assert!(old == expected, "an acknowledged write is lost: {order:?}");
    }
}

#[test]
fn one_write_of_a_guest_in_every_order_with_the_copier_whole_granules_and_parts() {
    for write in [0..4096, 100..200, 0..8192, 4000..4200] {
        for failures in 0..=1 {
            let (mut choices, mut runs) = (Choices::default(), 0);
            loop {
                run(1, async |host| one_write(host, &write, failures, &mut choices).await);
                runs += 1;
                if !choices.next() {
                    break;
                }
            }
            assert!(runs > 20, "{runs} orders were tried");
        }
    }
}

/// What a guest knows of a part of the disk: nothing where a write has failed.
struct Guest {
    part: Range<u64>,
    known: Vec<Option<u8>>,
    rng: fastrand::Rng,
}

impl Guest {
    fn change(&mut self) -> (Request, Vec<u8>) {
        let len = self.part.end - self.part.start;
        let offset = self.rng.u64(0..len);
        let len = if self.rng.bool() { len - offset } else { (len - offset).min(5000) };
        let len = self.rng.u64(1..=len);
        let mut bytes = vec![self.rng.u8(1..); len as usize];
        let at = self.part.start + offset;
        let req = match self.rng.u8(0..6) {
            0 | 1 => {
                bytes.fill(0);
                let op = if self.rng.bool() { Op::WriteZeroes } else { Op::Discard };
                Request::new(op, at, len)
            }
            _ => Request::write(at, Data::copy_of(&bytes)),
        };
        (req, bytes)
    }

    async fn play(&mut self, moving: &Moving, changes: usize) {
        for _ in 0..changes {
            let (req, bytes) = self.change();
            let at = (req.offset - self.part.start) as usize;
            let well = moving.disk.submit(req).await.is_ok();
            for (known, byte) in self.known[at..].iter_mut().zip(bytes) {
                *known = well.then_some(byte);
            }
            pass(self.rng.u64(0..8)).await;
        }
    }
}

/// An operator who cannot make up his mind.
async fn fidget(moving: &Moving, rng: &mut fastrand::Rng) {
    for _ in 0..10 {
        for _ in 0..rng.u64(0..30) {
            pass(1).await;
            assert_ne!(moving.get("state"), "differs", "{}", moving.get("progress"));
        }
        match rng.u8(0..5) {
            0 => moving.set("paused", if rng.bool() { "yes" } else { "no" }),
            1 => moving.set("depth", &rng.u8(1..9).to_string()),
            2 => moving.set("rate", ["unlimited", "1M/s", "10M/s"][rng.usize(0..3)]),
            3 => moving.call("verify"),
            _ => moving.call("retry"),
        }
    }
    moving.set("paused", "no");
    moving.set("rate", "unlimited");
}

async fn many_writes(host: Arc<Host>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    fresh([Ops::NONE, Ops::ALL, Ops { fast_zero: false, ..Ops::ALL }][rng.usize(0..3)]);
    let size = 200_000 + rng.u64(0..5000);
    let new = size + [0, 1, 100_000][rng.usize(0..3)];
    let content: Vec<u8> = (0..size).map(|at| if at / 10_000 % 3 == 0 { 0 } else { at as u8 | 1 }).collect();
    set("Old", content.clone());
    set("New", vec![7; new as usize]);
    for disk in ["Old", "New"] {
        let share = [0, 10, 30][rng.usize(0..3)];
        world(|world| world.failing.insert(disk.to_owned(), share));
    }
    let order = if rng.bool() { "up" } else { "down" };
    let text = Moving::text("slow", size, new, &format!("(chunk 64k) (order {order})"));
    let moving = Moving::new(&host, &text, "T").await;
    let part = |ix: u64| ix * size / 4..(ix + 1) * size / 4;
    let guest = |ix: u64| {
        let known =
            content[part(ix).start as usize..part(ix).end as usize].iter().map(|byte| Some(*byte)).collect();
        Guest { part: part(ix), known, rng: fastrand::Rng::with_seed(seed * 10 + ix) }
    };
    let mut guests: Vec<Guest> = (0..4).map(guest).collect();
    let changes = rng.usize(1..25);
    let playing = join_all(guests.iter_mut().map(|guest| guest.play(&moving, changes)));
    futures::future::join(playing, fidget(&moving, &mut rng)).await;
    world(|world| world.failing.clear());
    moving.call("retry");
    moving.landed().await;
    moving.until("clean").await;
    let (old, found) = (bytes("Old"), bytes("New"));
    let same = old.iter().zip(&found).position(|(a, b)| a != b);
    assert_eq!(same, None, "seed {seed}");
    for guest in guests {
        let old = &old[guest.part.start as usize..];
        let lost =
            guest.known.iter().zip(old).position(|(known, byte)| known.is_some_and(|known| known != *byte));
        assert_eq!(lost, None, "seed {seed}: an acknowledged write is lost in {:?}", guest.part);
    }
    let end = (size.next_multiple_of(4096) as usize).min(found.len());
    assert!(found[size as usize..end].iter().all(|byte| *byte == 0), "seed {seed}");
    assert!(found[end..].iter().all(|byte| *byte == 7), "seed {seed}: what lies behind is not its business");
    moving.verify().await;
}

#[test]
fn disks_are_alike_in_the_end_whatever_has_failed() {
    for seed in 0..250 {
        run(seed, async |host| many_writes(host, seed).await);
    }
}
