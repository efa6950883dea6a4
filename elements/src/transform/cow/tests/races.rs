//! Every order in which the disks below may answer: two writes to one block, a read beside a copy, guests
//! beside a commit.

use super::kit::{CATALOGUE, Served, held, release, share};
use blockmason::testing::{TestDisk, run};
use blockmason::{Data, Op, Request};

const GRAPH: &str = "
    element C (type cow) (block 4k)
    element HB (type hold)
    element HO (type hold)
    element B (type shared)
    element O (type shared)
    (C, base) -> HB -> B
    (C, overlay) -> HO -> O
";

/// What the base reads as.
const IMAGE: u8 = 9;

/// Decides which of the held requests goes next.
struct Order {
    choices: Vec<usize>,
    /// How many there were to choose from at each choice.
    widths: Vec<usize>,
}

impl Order {
    fn choose(&mut self, width: usize) -> usize {
        if self.choices.len() == self.widths.len() {
            self.choices.push(0);
        }
        self.widths.push(width);
        self.choices[self.widths.len() - 1]
    }

    /// The next order, if there is another.
    fn next(mut self) -> Option<Order> {
        while let Some(last) = self.choices.pop() {
            let width = self.widths.pop()?;
            if last + 1 < width {
                self.choices.push(last + 1);
                self.widths.clear();
                return Some(self);
            }
        }
        None
    }
}

/// A cow over an image, opened, and the image by itself.
async fn opened(host: &std::sync::Arc<blockmason::Host>) -> (Served, TestDisk) {
    share(host, "B", "(type mem) (size 20000)");
    share(host, "O", "(type mem) (size 64k)");
    let base = TestDisk::new(host, CATALOGUE, "element B (type shared)", "B").await.unwrap();
    base.write(0, &[IMAGE; 20_000]).await.unwrap();
    let served = Served::new(host, GRAPH).await.unwrap();
    drain(0, async || served.cow.get("state").is_ok()).await;
    (served, base)
}

/// Lets everything go, the first first, until `done`.
async fn drain(at_least: usize, mut done: impl AsyncFnMut() -> bool) {
    let mut released = 0;
    loop {
        match held().await {
            0 if done().await && released >= at_least => return,
            0 => blockmason::rt::sleep(std::time::Duration::from_millis(1)).await,
            _ => {
                release(0);
                released += 1;
            }
        }
    }
}

/// Plays requests that are sent at once, in all orders; `check` looks at what they answered and at the
/// disk afterwards. Returns how many orders there are.
fn in_all_orders(prepare: &[(u64, u64)], requests: &[Request], check: impl Fn(&[Vec<u8>], Vec<u8>)) -> usize {
    let mut next = Some(Order { choices: Vec::new(), widths: Vec::new() });
    let mut count = 0;
    while let Some(mut order) = next {
        count += 1;
        order = run(1, async |host| {
            let (served, base) = opened(&host).await;
            for (offset, len) in prepare {
                let write = served.disk.send(Request::write(*offset, Data::copy_of(&vec![7; *len as usize])));
                drain(1, async || true).await;
                write.await.unwrap().unwrap();
            }
            let replies: Vec<_> = requests.iter().map(|req| served.disk.send(req.clone())).collect();
            loop {
                match held().await {
                    0 => break,
                    width => drop(release(order.choose(width))),
                }
            }
            let mut read = Vec::new();
            for reply in replies {
                if let blockmason::Answer::Data(data) = reply.await.unwrap().unwrap() {
                    read.push(data.to_vec());
                }
            }
            let whole = served.disk.send(Request::read(0, 20_000));
            drain(1, async || true).await;
            check(&read, whole.await.unwrap().unwrap().into_data().unwrap().to_vec());
            assert_eq!(base.read(0, 20_000).await.unwrap(), [IMAGE; 20_000]);
            order
        });
        next = order.next();
    }
    count
}

fn write(offset: u64, len: usize, byte: u8) -> Request {
    Request::write(offset, Data::copy_of(&vec![byte; len]))
}

#[test]
fn two_partial_writes_of_one_block_both_stay() {
    let requests = [write(100, 200, 1), write(1000, 200, 2), Request::read(0, 4096)];
    let count = in_all_orders(&[], &requests, |read, whole| {
        let mut expected = vec![IMAGE; 20_000];
        expected[100..300].fill(1);
        expected[1000..1200].fill(2);
        assert!(whole == expected, "a write is lost");
        for (ix, byte) in read[0].iter().enumerate() {
            assert!(*byte == IMAGE || *byte == expected[ix], "byte {ix} was never {byte}");
        }
    });
    assert!(count > 10, "{count} orders");
}

#[test]
fn a_partial_write_of_zeros_beside_writes_across_blocks() {
    let mut zeroes = Request::new(Op::WriteZeroes, 3000, 7000);
    zeroes.flags = blockmason::Flags::MAY_UNMAP;
    let requests = [zeroes, write(2000, 1000, 1), write(10_000, 3000, 2)];
    let count = in_all_orders(&[(8192, 10)], &requests, |_, whole| {
        let mut expected = vec![IMAGE; 20_000];
        expected[8192..8202].fill(7);
        expected[2000..3000].fill(1);
        expected[3000..10_000].fill(0);
        expected[10_000..13_000].fill(2);
        assert!(whole == expected, "a change is lost");
    });
    assert!(count > 3, "{count} orders: they hold blocks in common");
}

#[test]
fn a_read_beside_a_copy_sees_the_block_whole() {
    let requests = [write(4096, 10, 1), Request::read(4000, 6000), Request::read(4106, 4000)];
    let count = in_all_orders(&[], &requests, |read, _| {
        assert!(read[0].iter().enumerate().all(|(ix, byte)| *byte == IMAGE || (96..106).contains(&ix)));
        assert!(read[1].iter().all(|byte| *byte == IMAGE), "what was only copied has changed");
    });
    assert!(count > 5, "{count} orders");
}

/// A commit beside guests, in an order from a seed.
async fn merge_beside_guests(host: &std::sync::Arc<blockmason::Host>, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (served, base) = opened(host).await;
    let mut model = vec![IMAGE; 20_000];
    let put = |model: &mut Vec<u8>, at: usize, len: usize, byte: u8| {
        model[at..at + len].fill(byte);
        served.disk.send(write(at as u64, len, byte))
    };
    for (at, len, byte) in [(0, 4096, 1), (5000, 100, 2), (16_384, 3616, 3)] {
        let written = put(&mut model, at, len, byte);
        drain(1, async || true).await;
        written.await.unwrap().unwrap();
    }
    served.cow.set("merge_rate", "4M/s").unwrap();
    served.cow.call("commit", "").unwrap();
    let mut waiting = Vec::new();
    let mut bytes = 10..60u8;
    loop {
        // A write when the one before to the same bytes has been answered: their order is known.
        if rng.u8(0..3) == 0
            && let Some(byte) = bytes.next()
        {
            let at = [0, 2000, 5000, 9000, 12_288, 17_000][rng.usize(0..6)];
            waiting.retain_mut(|(_, reply): &mut (usize, tokio::sync::oneshot::Receiver<_>)| {
                reply.try_recv().map(|reply: blockmason::Reply| reply.unwrap()).is_err()
            });
            if waiting.iter().all(|(busy, _)| *busy != at) {
                waiting.push((at, put(&mut model, at, 1 + rng.usize(0..1500), byte)));
            }
        }
        match held().await {
            0 if served.get("state") == "committed" && bytes.is_empty() => break,
            0 => blockmason::rt::sleep(std::time::Duration::from_millis(1)).await,
            width => drop(release(rng.usize(0..width))),
        }
    }
    for (_, reply) in waiting {
        if let Ok(reply) = reply.await {
            reply.unwrap();
        }
    }
    let whole = served.disk.send(Request::read(0, 20_000));
    drain(1, async || true).await;
    assert!(whole.await.unwrap().unwrap().into_data().unwrap().to_vec() == model, "seed {seed}: the disk");
    assert!(base.read(0, 20_000).await.unwrap() == model, "seed {seed}: the base");
    assert_eq!(served.get("blocks"), "0");
}

#[test]
fn a_commit_beside_guests_loses_nothing() {
    for seed in 0..400 {
        run(seed, async |host| merge_beside_guests(&host, seed).await);
    }
}
