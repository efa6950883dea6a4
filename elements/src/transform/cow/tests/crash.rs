//! Processes that die and power that goes, at any request to either disk: while formatting, opening,
//! writing, flushing, committing, discarding.

use super::kit::{CATALOGUE, Fuse, Served, share};
use blockmason::testing::{TestDisk, run};
use blockmason::{Data, Element, Flags, Host, Op, Request};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

/// Six blocks of 4 KiB, the last one short.
const SIZE: u64 = 5 * 4096 + 700;

const GRAPH: &str = "
    element C (type cow) (block 4k)
    element PB (type plug)
    element PO (type plug)
    element B (type shared)
    element O (type shared)
    (C, base) -> PB -> B
    (C, overlay) -> PO -> O
";

type Sector = Vec<u8>;

/// What a guest may find, by sectors of 512 bytes.
struct Model {
    /// What has been answered.
    now: Vec<Sector>,
    /// What a loss of power may leave.
    legal: Vec<BTreeSet<Sector>>,
    /// What has been asked for and not been answered: the sectors, and what they become.
    asked: Vec<(usize, Sector)>,
    /// The power went since the disk was last looked at: what is there is durable.
    power: bool,
    /// Or something else that lets what was not flushed be lost.
    lost: bool,
}

fn sectors(bytes: &[u8]) -> Vec<Sector> {
    bytes.chunks(512).map(<[u8]>::to_vec).collect()
}

impl Model {
    fn new(bytes: &[u8]) -> Model {
        let now = sectors(bytes);
        let legal = now.iter().map(|sector| BTreeSet::from([sector.clone()])).collect();
        Model { now, legal, asked: Vec::new(), power: false, lost: false }
    }

    fn ask(&mut self, range: Range<u64>, byte: u8) {
        let mut bytes = self.now.concat();
        bytes[range.start as usize..range.end as usize].fill(byte);
        let touched = (range.start / 512) as usize..range.end.div_ceil(512) as usize;
        self.asked = sectors(&bytes).into_iter().enumerate().filter(|(ix, _)| touched.contains(ix)).collect();
    }

    fn answered(&mut self, durable: bool) {
        for (ix, sector) in std::mem::take(&mut self.asked) {
            if durable {
                self.legal[ix].clear();
            }
            self.legal[ix].insert(sector.clone());
            self.now[ix] = sector;
        }
    }

    fn flushed(&mut self) {
        self.legal = self.now.iter().map(|sector| BTreeSet::from([sector.clone()])).collect();
    }

    /// Holds what is found after crashes against what may be, and goes on from there.
    fn find(&mut self, found: &[u8], place: &str) {
        for (ix, sector) in &self.asked {
            self.legal[*ix].insert(sector.clone());
        }
        let asked: BTreeMap<_, _> = std::mem::take(&mut self.asked).into_iter().collect();
        for (ix, found) in sectors(found).into_iter().enumerate() {
            let right = if self.power || self.lost {
                self.legal[ix].contains(&found)
            } else {
                self.now[ix] == found || asked.get(&ix) == Some(&found)
            };
            let show = |sector: &Sector| format!("{}..{}", sector[0], sector[sector.len() - 1]);
            assert!(
                right,
                "{place}: sector {ix} is {}; it was {}, legal after a loss: {:?}",
                show(&found),
                show(&self.now[ix]),
                self.legal[ix].iter().map(show).collect::<Vec<_>>()
            );
            if self.power {
                self.legal[ix].clear();
            }
            self.legal[ix].insert(found.clone());
            self.now[ix] = found;
        }
        (self.power, self.lost) = (false, false);
    }
}

/// Two disks, and the guest's idea of them.
struct Story {
    host: Arc<Host>,
    sinks: [Arc<dyn Element>; 2],
    /// The base as it is.
    base: TestDisk,
    model: Model,
    rng: fastrand::Rng,
    byte: u8,
    seed: u64,
    /// The life before could not know the incarnation.
    mute: bool,
    /// How many lives ended in which state.
    ends: BTreeMap<String, u32>,
}

impl Story {
    async fn new(host: &Arc<Host>, seed: u64) -> Story {
        let base = share(host, "B", &format!("(type volatile) (size {SIZE}) (seed {seed})"));
        let overlay = share(host, "O", &format!("(type volatile) (size 40000) (seed {})", seed + 1));
        let image = TestDisk::new(host, CATALOGUE, "element B (type shared)", "B").await.unwrap();
        let bytes: Vec<u8> = (0..SIZE).map(|at| 200 + (at / 512) as u8).collect();
        image.write(0, &bytes).await.unwrap();
        image.op(Op::Flush, 0, 0).await.unwrap();
        Story {
            host: host.clone(),
            sinks: [base, overlay],
            base: image,
            model: Model::new(&bytes),
            rng: fastrand::Rng::with_seed(seed),
            byte: 0,
            seed,
            mute: true,
            ends: BTreeMap::new(),
        }
    }

    /// One process, from its start to its end.
    async fn live(&mut self, power: bool, mute: bool) {
        // Claims that were trusted for their incarnation are not any more.
        self.model.lost |= mute && !self.mute;
        self.mute = mute;
        let most = [8, 30, 150][self.rng.usize(0..3)];
        let fuse = Fuse::new(self.rng.u64(1..most), power, mute, &self.sinks);
        let served = Served::new(&self.host, GRAPH).await.unwrap();
        let place = format!("seed {}, power {power}, mute {mute}", self.seed);
        if let Ok(found) = served.disk.read(0, SIZE).await {
            self.model.find(&found, &place);
            let ops = self.rng.usize(0..60);
            for _ in 0..ops {
                if fuse.is_dead() || self.step(&served, &fuse).await.is_err() {
                    break;
                }
            }
            if let Ok(found) = served.disk.read(0, SIZE).await {
                assert!(found == self.model.now.concat(), "{place}: before the end");
            }
        }
        assert!(!served.disk.disk.graph().is_failed(), "{place}: a panic");
        let state = served.cow.get("state").unwrap_or("opening".to_owned());
        *self.ends.entry(state).or_default() += 1;
        fuse.blow();
        self.model.power |= power;
    }

    async fn step(&mut self, served: &Served, fuse: &Fuse) -> blockmason::Result<()> {
        self.byte = self.byte % 190 + 1;
        let offset = self.rng.u64(0..SIZE);
        let most = [600, 4096, 9000][self.rng.usize(0..3)];
        let len = self.rng.u64(1..=most.min(SIZE - offset));
        let fua = self.rng.u8(0..5) == 0;
        let flags = if fua { Flags::FUA } else { Flags::NONE };
        match self.rng.u8(0..22) {
            0..10 => {
                self.model.ask(offset..offset + len, self.byte);
                let data = Data::copy_of(&vec![self.byte; len as usize]);
                served.disk.submit(Request::write(offset, data).with(flags)).await?;
                self.model.answered(fua);
            }
            10..13 => {
                self.model.ask(offset..offset + len, 0);
                served.disk.submit(Request::new(Op::WriteZeroes, offset, len).with(flags)).await?;
                self.model.answered(fua);
            }
            13 => {
                // Whole sectors: what a discard does to parts of them is the disk's business.
                let (start, end) = (offset / 512 * 512, (offset + len).next_multiple_of(512).min(SIZE));
                self.model.ask(start..end, 0);
                served.disk.op(Op::Discard, start, end - start).await?;
                let found = served.disk.read(0, SIZE).await?;
                let asked = std::mem::take(&mut self.model.asked);
                for (ix, zeros) in asked {
                    let found = sectors(&found).swap_remove(ix);
                    assert!(found == zeros || found == self.model.now[ix], "a discard made up bytes");
                    self.model.legal[ix].extend([zeros, found.clone()]);
                    self.model.now[ix] = found;
                }
            }
            14..17 => {
                served.disk.op(Op::Flush, 0, 0).await?;
                self.model.flushed();
            }
            17 | 18 => {
                let read = served.disk.read(offset, len).await?;
                assert!(read == self.model.now.concat()[offset as usize..(offset + len) as usize]);
            }
            19 if self.rng.bool() => drop(served.cow.call("commit", "")),
            20 => return self.discard(served, fuse).await,
            _ => blockmason::rt::sleep(std::time::Duration::from_millis(self.rng.u64(0..3))).await,
        }
        Ok(())
    }

    async fn discard(&mut self, served: &Served, fuse: &Fuse) -> blockmason::Result<()> {
        let state = served.get("state");
        if state != "overlaying" && state != "committed" {
            return Ok(());
        }
        let base = sectors(&self.base.read(0, SIZE).await.unwrap());
        self.model.asked = base.iter().cloned().enumerate().collect();
        if served.cow.call("discard", "yes").is_err() {
            // A commit is just about to begin.
            self.model.asked.clear();
            return Ok(());
        }
        while served.get("state") != "overlaying" {
            if fuse.is_dead() {
                return Err(blockmason::Error::internal("dead"));
            }
            blockmason::rt::sleep(std::time::Duration::from_millis(1)).await;
        }
        if !served.get("error").is_empty() {
            return Err(blockmason::Error::internal("dead"));
        }
        self.model.answered(true);
        Ok(())
    }
}

fn many_lives(
    seeds: Range<u64>,
    power: impl Fn(&mut fastrand::Rng) -> bool,
    mute: impl Fn(&mut fastrand::Rng) -> bool,
) {
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for seed in seeds {
        run(seed, async |host| {
            let mut story = Story::new(&host, seed).await;
            for _ in 0..6 {
                let (power, mute) = (power(&mut story.rng), mute(&mut story.rng));
                story.live(power, mute).await;
            }
            story.ends.into_iter().for_each(|(state, count)| *ends.entry(state).or_default() += count);
        });
    }
    for state in ["opening", "overlaying", "committing", "committed"] {
        assert!(ends.get(state).is_some_and(|count| *count > 20), "too few ends while {state}: {ends:?}");
    }
}

#[test]
fn the_death_of_the_process_loses_nothing() {
    many_lives(0..400, |_| false, |_| false);
}

#[test]
fn after_a_loss_of_power_what_was_flushed_is_there_and_the_rest_is_old_or_new() {
    many_lives(1000..1800, |_| true, |_| false);
}

#[test]
fn both_kinds_of_crash_in_turn() {
    many_lives(2000..2800, fastrand::Rng::bool, |_| false);
}

#[test]
fn without_an_incarnation_nothing_is_lost_either() {
    many_lives(3000..3400, fastrand::Rng::bool, |_| true);
    many_lives(4000..4400, fastrand::Rng::bool, fastrand::Rng::bool);
}

/// The second block holds data of the overlay that a crash has made nobody's; used again, it is not seen.
#[test]
fn what_was_dropped_is_never_taken_for_data() {
    for seed in 0..100 {
        run(seed, async |host| {
            let mut story = Story::new(&host, seed).await;
            let start = async |power, story: &Story| {
                let fuse = Fuse::new(u64::MAX, power, false, &story.sinks);
                (Served::new(&story.host, GRAPH).await.unwrap(), fuse)
            };
            // Claimed and written, not flushed.
            let (served, fuse) = start(true, &story).await;
            served.disk.write(4096, &[66; 4096]).await.unwrap();
            fuse.blow();
            // Another power, in which nothing is written; then a process of the same one dies.
            let (served, fuse) = start(false, &story).await;
            story.model.power = true;
            let found = served.disk.read(0, SIZE).await.unwrap();
            assert!(found == story.model.now.concat(), "what was not flushed is the base");
            story.model.find(&found, "dropped");
            fuse.blow();
            let (served, fuse) = start(false, &story).await;
            assert!(served.disk.read(0, SIZE).await.unwrap() == found, "what was dropped is back");
            // Flushed, forgotten, and its neighbour in the same map sector flushed.
            served.disk.write(4096, &[77; 4096]).await.unwrap();
            served.disk.op(Op::Flush, 0, 0).await.unwrap();
            served.cow.call("discard", "yes").unwrap();
            served.reaches("overlaying").await;
            served.disk.write(8192, &[88; 4096]).await.unwrap();
            served.disk.op(Op::Flush, 0, 0).await.unwrap();
            fuse.blow();
            story.sinks.iter().for_each(|sink| drop(sink.call("lose_power", "").unwrap()));
            let (served, _) = start(false, &story).await;
            let mut expected = found;
            expected[8192..12_288].fill(88);
            assert!(served.disk.read(0, SIZE).await.unwrap() == expected, "what was forgotten is back");
        });
    }
}

#[test]
fn a_loss_of_power_under_a_running_overlay_is_noticed_before_anything_is_called_durable() {
    run(1, async |host| {
        let story = Story::new(&host, 1).await;
        Fuse::new(u64::MAX, false, false, &story.sinks);
        let served = Served::new(&host, GRAPH).await.unwrap();
        served.disk.write(0, &[1; 100]).await.unwrap();
        story.sinks[1].call("lose_power", "").unwrap();
        let error = served.disk.op(Op::Flush, 0, 0).await.unwrap_err().to_string();
        assert!(error.contains("lost its power"), "{error}");
        assert!(served.disk.write(0, &[1; 100]).await.is_err());
        let again = Served::new(&host, GRAPH).await.unwrap();
        assert!(again.disk.read(0, SIZE).await.unwrap() == story.model.now.concat());
        again.disk.write(0, &[1; 100]).await.unwrap();
    });
}
