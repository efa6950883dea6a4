//! Losses of power below a log that makes slots whole: a block is old or new, and never damaged.

use super::kit::{Bench, CATALOGUE, room, settle, share_as};
use blockmason::testing::{TestDisk, run};
use blockmason::{Data, Op, Reply, Request};
use std::ops::Range;
use tokio::sync::oneshot;

const BLOCKS: u64 = 40;

/// What a client knows of the blocks: each one's versions that may be there, oldest first. A block of version `n` is full
/// of `n`.
struct Versions(Vec<Vec<u8>>);

impl Versions {
    /// What was answered before a flush, which has been answered, is there.
    fn flushed(&mut self) {
        self.0.iter_mut().for_each(|versions| drop(versions.drain(..versions.len() - 1)));
    }

    /// Checks what is there after a loss of power, and goes on with that.
    fn check(&mut self, found: &[u8], place: &str) {
        for (block, (versions, found)) in self.0.iter_mut().zip(found.chunks(512)).enumerate() {
            let whole = found.iter().all(|byte| *byte == found[0]);
            assert!(
                whole && versions.contains(&found[0]),
                "{place}, block {block}: {versions:?}, {:?}",
                found[0]
            );
            *versions = vec![found[0]];
        }
    }
}

#[test]
fn a_loss_of_power_leaves_blocks_that_open() {
    let mut lost = 0;
    for seed in 0..100 {
        run(seed, async |host| {
            let bench = Bench::new(&host, 1, 512);
            let disks = [("D", room(BLOCKS, 512)), ("L", 128 << 10)].map(|(name, size)| {
                share_as(&host, name, &format!("(type volatile) (size {size}) (seed {seed})"))
            });
            let key = bench.path("a.key");
            let text = format!(
                "element X (type crypto) (key_file {}) (create yes) (block 512) element W (type wal) \
                 element D (type shared) element L (type shared) X -> W (W, out) -> D (W, log) -> L",
                key.display()
            );
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = Versions(vec![vec![0]; BLOCKS as usize]);
            for life in 1..5 {
                let disk = TestDisk::new(&host, CATALOGUE, &text, "X").await.unwrap();
                let found = disk.read(0, BLOCKS * 512).await.unwrap();
                let newest = model.0.iter().zip(found.chunks(512));
                lost += newest.filter(|(versions, found)| versions.last() != Some(&found[0])).count();
                model.check(&found, &format!("seed {seed}, life {life}"));
                // Each with the blocks that it changes.
                let mut sent: Vec<(Range<u64>, oneshot::Receiver<Reply>)> = Vec::new();
                for _ in 0..rng.usize(1..30) {
                    let at = rng.u64(0..BLOCKS);
                    let blocks = at..at + rng.u64(1..=(BLOCKS - at).min(12));
                    let flush = rng.u8(0..6) == 0;
                    // Nobody knows in which order overlapping ones are done.
                    let overlaps = |other: &Range<u64>| other.start < blocks.end && blocks.start < other.end;
                    if flush || sent.iter().any(|(other, _)| overlaps(other)) {
                        for (_, reply) in sent.drain(..) {
                            reply.await.unwrap().unwrap();
                        }
                    }
                    if flush {
                        disk.op(Op::Flush, 0, 0).await.unwrap();
                        model.flushed();
                    }
                    let (byte, len) = (rng.u8(1..), (blocks.end - at) * 512);
                    let (req, byte) = match rng.u8(0..5) {
                        0 => (Request::new(Op::WriteZeroes, at * 512, len), 0),
                        _ => (Request::write(at * 512, Data::copy_of(&vec![byte; len as usize])), byte),
                    };
                    let changed = &mut model.0[at as usize..blocks.end as usize];
                    changed.iter_mut().for_each(|versions| versions.push(byte));
                    // Some are under way when the power goes.
                    sent.push((blocks, disk.send(req)));
                    if rng.bool()
                        && let Some((_, reply)) = sent.pop()
                    {
                        reply.await.unwrap().unwrap();
                    }
                }
                let most = [1, 4, 40][rng.usize(0..3)];
                for _ in 0..rng.usize(0..most) {
                    tokio::task::yield_now().await;
                }
                disks.iter().for_each(|disk| drop(disk.call("cut", "").unwrap()));
                let _ = disk.disk.stop().await;
                settle().await;
                disks.iter().for_each(|disk| drop(disk.call("restore", "").unwrap()));
            }
        });
    }
    assert!(lost > 30, "only {lost} blocks lost a version: this tests little");
}
