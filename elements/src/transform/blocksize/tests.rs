//! The disk that it is, in whole blocks; nothing that is lost, or answered too early.

use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::testing::{CLIENT, TestDisk, checked, play_against_model, run};
use blockmason::{Children, Cx, Data, Element, Flags, Flow, Geometry, Kind, Op, Prepared, Request, Result};
use futures::FutureExt;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

static CATALOGUE: Catalogue = &[
    &super::TYPE,
    &CLIENT,
    &TAP,
    &COARSE,
    &crate::fault::delay::TYPE,
    &crate::fault::error::TYPE,
    &crate::route::linear::TYPE,
    &crate::sink::mem::TYPE,
    &crate::sink::volatile::TYPE,
];

thread_local! {
    static SEEN: RefCell<Vec<(Op, u64, u64, Flags)>> = RefCell::default();
}

/// Writes down what reaches the disk below; panics at a certain place.
struct Tap;

static TAP: ElementType =
    ElementType { name: "tap", family: Family::Fault, build: |_| Ok(Arc::new(Tap)), ..ElementType::BASE };

/// Takes blocks of 4 KiB.
struct Coarse;

static COARSE: ElementType =
    ElementType { name: "coarse", build: |_| Ok(Arc::new(Coarse)), ..ElementType::BASE };

impl Element for Coarse {
    fn prepare(&self, children: Children<'_>) -> Result<Prepared> {
        Ok(Prepared::of(Geometry { min_block: 4096, ..children.single()?.above() }))
    }

    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        cx.forward(0, req)
    }
}

const TRAP: u64 = 666 << 10;

impl Element for Tap {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        assert!(req.op != Op::Write || req.offset != TRAP, "of a test");
        SEEN.with_borrow_mut(|seen| seen.push((req.op, req.offset, req.len, req.flags)));
        cx.forward(0, req)
    }
}

fn seen() -> Vec<(Op, u64, u64, Flags)> {
    SEEN.take()
}

fn writes() -> Vec<(u64, u64)> {
    seen().into_iter().filter(|it| it.0 == Op::Write).map(|(_, offset, len, _)| (offset, len)).collect()
}

/// A disk below `params`, on what `below` says.
async fn serve(host: &Arc<blockmason::Host>, params: &str, below: &str) -> TestDisk {
    let text =
        format!("element X (type blocksize) {params} element T (type tap) element D {below} X -> T -> D");
    SEEN.take();
    TestDisk::new(host, CATALOGUE, &text, "X").await.unwrap()
}

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

fn get(disk: &TestDisk, handler: &str) -> String {
    disk.disk.graph().get("X", handler).unwrap()
}

#[test]
fn behaves_like_a_vector_in_whole_blocks() {
    for (seed, params, block, most) in [
        (0, "(block 512)", 512, u64::MAX),
        (1, "(block 4k) (maximum 8k)", 4096, 8192),
        (2, "(block 16k) (gather 3ms)", 16384, u64::MAX),
        (3, "(preferred 16k) (gather 3ms)", 1, u64::MAX),
        (4, "(block 4k) (preferred 64k) (maximum 16k) (gather 1ms)", 4096, 16384),
        (5, "(block 128k) (gather 1ms)", 131072, u64::MAX),
    ] {
        run(seed, async |host| {
            // No multiple of any block.
            let disk = serve(&host, params, "(type mem) (size 70001)").await;
            play_against_model(&disk, seed, 400).await;
            for (op, offset, len, _) in seen().into_iter().filter(|it| it.0.has_range()) {
                let end = offset + len;
                let whole =
                    offset % block == 0 && (end % block == 0 || end == 70001) && (len <= most || !op.locks());
                assert!(whole, "{params}: {op} {offset}+{len}");
            }
        });
    }
}

#[test]
fn neighbours_in_one_block_lose_nothing_also_by_another_way() {
    for (seed, params) in
        [(1, "(block 4k)"), (2, "(block 4k) (gather 2ms)"), (3, "(block 4k) (preferred 64k) (gather 2ms)")]
    {
        run(seed, async |host| {
            // The second half of the address space leads to the same disk past the element.
            let text = format!(
                "element L (type linear) element X (type blocksize) {params} element Y (type delay) (all 1ms) (jitter 5ms) \
                 element D (type mem) (size 64k) (L, a) -> X -> Y (L, b) -> Y -> D"
            );
            let disk = TestDisk::new(&host, CATALOGUE, &text, "L").await.unwrap();
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut order: Vec<u64> = (0..128).collect();
            rng.shuffle(&mut order);
            let sent = order.iter().map(|at| {
                let past = if rng.bool() { 64 << 10 } else { 0 };
                disk.send(Request::write(past + at * 100, Data::copy_of(&[*at as u8 + 1; 100])))
            });
            for reply in sent.collect::<Vec<_>>() {
                reply.await.unwrap().unwrap();
            }
            let wanted: Vec<u8> = (0..128).flat_map(|at| [at as u8 + 1; 100]).collect();
            assert!(disk.read(0, 12800).await.unwrap() == wanted, "{params}");
        });
    }
}

#[test]
fn small_writes_side_by_side_are_one_and_none_is_answered_before_it() {
    run(1, async |host| {
        let disk = serve(&host, "(block 4k) (preferred 64k) (gather 10ms)", "(type mem) (size 1M)").await;
        let begun = blockmason::rt::now();
        let mut sent: Vec<_> = [3u64, 1, 0, 2, 9]
            .iter()
            .map(|at| disk.send(Request::write(at * 4096, Data::copy_of(&[*at as u8 + 1; 4096]))))
            .collect();
        settle().await;
        assert!(sent.iter_mut().all(|reply| reply.now_or_never().is_none()) && writes().is_empty());
        assert_eq!((get(&disk, "waiting"), get(&disk, "gathered")), ("5".to_owned(), "5".to_owned()));
        for reply in sent {
            reply.await.unwrap().unwrap();
        }
        let took = blockmason::rt::now() - begun;
        assert!((10..12).contains(&took.as_millis()), "{took:?}");
        assert_eq!(writes(), [(0, 16384), (9 * 4096, 4096)]);
        assert_eq!((get(&disk, "waiting"), get(&disk, "joined")), ("0".to_owned(), "2".to_owned()));
        assert_eq!(
            disk.read(0, 16384).await.unwrap(),
            [[1u8; 4096], [2; 4096], [3; 4096], [4; 4096]].concat()
        );
    });
}

#[test]
fn what_fills_a_piece_goes_at_once_and_so_does_what_a_flush_finds() {
    run(1, async |host| {
        let disk = serve(&host, "(preferred 16k) (gather 1s)", "(type mem) (size 1M)").await;
        let begun = blockmason::rt::now();
        let write = |at: u64, len: usize| disk.send(Request::write(at, Data::copy_of(&vec![7; len])));
        let sent: Vec<_> = (0..4).map(|at| write(at * 4096, 4096)).collect();
        for reply in sent {
            reply.await.unwrap().unwrap();
        }
        assert_eq!(writes(), [(0, 16384)]);
        let held = [write(100_000, 10), write(200_000, 10)];
        settle().await;
        disk.op(Op::Flush, 0, 0).await.unwrap();
        for reply in held {
            reply.await.unwrap().unwrap();
        }
        let mut let_go = writes();
        let_go.sort_unstable();
        assert_eq!(let_go, [(100_000, 10), (200_000, 10)]);
        // As long as a piece, and longer: never held.
        write(16384, 16384).await.unwrap().unwrap();
        write(50_000, 20_000).await.unwrap().unwrap();
        assert_eq!(writes(), [(16384, 16384), (50_000, 20_000)]);
        assert!(blockmason::rt::now() - begun < Duration::from_millis(100));
    });
}

#[test]
fn a_write_across_two_pieces_goes_with_both() {
    run(1, async |host| {
        let disk = serve(&host, "(preferred 4k) (gather 10ms)", "(type mem) (size 1M)").await;
        let sent = [(4000u64, 200usize), (4200, 100), (3900, 100)]
            .map(|(at, len)| disk.send(Request::write(at, Data::copy_of(&vec![at as u8; len]))));
        for reply in sent {
            reply.await.unwrap().unwrap();
        }
        let mut found = writes();
        found.sort_unstable();
        assert_eq!(found, [(3900, 196), (4096, 204)]);
        let wanted = [vec![3900u64 as u8; 100], vec![4000u64 as u8; 200], vec![4200u64 as u8; 100]].concat();
        assert_eq!(disk.read(3900, 400).await.unwrap(), wanted);
    });
}

#[test]
fn fua_holds_for_what_is_joined_and_waits_for_nobody() {
    run(1, async |host| {
        let disk = serve(&host, "(preferred 64k) (gather 1s)", "(type mem) (size 1M)").await;
        let begun = blockmason::rt::now();
        let fua = |at: u64| Request::write(at, Data::copy_of(&[1; 512])).with(Flags::FUA);
        disk.submit(fua(0)).await.unwrap();
        let held = disk.send(Request::write(512, Data::copy_of(&[2; 512])));
        settle().await;
        disk.submit(fua(1024)).await.unwrap();
        held.await.unwrap().unwrap();
        assert_eq!(seen(), [(Op::Write, 0, 512, Flags::FUA), (Op::Write, 512, 1024, Flags::FUA)]);
        assert!(blockmason::rt::now() - begun < Duration::from_millis(100));
    });
}

#[test]
fn what_others_write_of_themselves_is_not_held() {
    run(1, async |host| {
        let disk = serve(&host, "(preferred 64k) (gather 1s)", "(type mem) (size 1M)").await;
        let begun = blockmason::rt::now();
        for origin in
            blockmason::Origin::ALL.into_iter().filter(|origin| *origin != blockmason::Origin::Guest)
        {
            disk.submit(Request { origin, ..Request::write(0, Data::copy_of(&[1; 512])) }).await.unwrap();
        }
        assert!(blockmason::rt::now() - begun < Duration::from_millis(100));
    });
}

#[test]
fn an_error_is_that_of_all_who_were_joined() {
    run(1, async |host| {
        let text = "element X (type blocksize) (preferred 64k) (gather 5ms) element E (type error) (range 0-64k) (op write) \
                    element D (type mem) (size 1M) X -> E -> D";
        let disk = TestDisk::new(&host, CATALOGUE, text, "X").await.unwrap();
        let send = |at: u64| disk.send(Request::write(at, Data::copy_of(&[1; 512])));
        let (bad, good) = ([send(0), send(512), send(2048)], send(100_000));
        for reply in bad {
            assert_eq!(reply.await.unwrap().unwrap_err().kind(), Kind::Io);
        }
        good.await.unwrap().unwrap();
    });
}

/// Whoever led a group has failed: those who had joined it are told, and nobody waits for ever.
#[test]
fn those_who_wait_for_one_that_fails_are_answered() {
    run(1, async |host| {
        let disk = serve(&host, "(preferred 64k) (gather 5ms)", "(type mem) (size 1M)").await;
        let sent = [TRAP, TRAP + 512].map(|at| disk.send(Request::write(at, Data::copy_of(&[1; 512]))));
        for reply in sent {
            assert!(reply.await.unwrap().is_err());
        }
        assert_eq!(get(&disk, "waiting"), "0");
        assert!(disk.disk.graph().is_failed());
    });
}

#[test]
fn a_loss_of_power_takes_nothing_that_was_flushed() {
    let mut lost = 0;
    for seed in 0..60 {
        run(seed, async |host| {
            let below = format!("(type volatile) (size 64k) (seed {seed})");
            let disk = serve(&host, "(block 4k) (preferred 16k) (gather 2ms)", &below).await;
            let mut rng = fastrand::Rng::with_seed(seed);
            // Each slot of 256 bytes with the bytes that it may be full of: what was flushed, and what came after.
            let mut model = vec![vec![0u8]; 256];
            for _ in 0..4 {
                let mut sent = Vec::new();
                let mut touched: Vec<u64> = (0..256).collect();
                rng.shuffle(&mut touched);
                for at in &touched[..rng.usize(1..80)] {
                    let byte = rng.u8(1..);
                    model[*at as usize].push(byte);
                    let mut req = Request::write(at * 256, Data::copy_of(&[byte; 256]));
                    let fua = rng.u8(0..8) == 0;
                    if fua {
                        req = req.with(Flags::FUA);
                    }
                    sent.push((*at as usize, fua, disk.send(req)));
                }
                if rng.bool() {
                    for (at, fua, reply) in sent {
                        reply.await.unwrap().unwrap();
                        if fua {
                            model[at].drain(..1);
                        }
                    }
                    if rng.bool() {
                        disk.op(Op::Flush, 0, 0).await.unwrap();
                        model.iter_mut().for_each(|versions| drop(versions.drain(..versions.len() - 1)));
                    }
                } else {
                    for _ in 0..rng.usize(0..30) {
                        tokio::task::yield_now().await;
                    }
                }
                disk.disk.graph().call("D", "cut", "").unwrap();
                blockmason::rt::sleep(Duration::from_millis(20)).await;
                disk.disk.graph().call("D", "restore", "").unwrap();
                let found = disk.read(0, 65536).await.unwrap();
                for (at, (versions, found)) in model.iter_mut().zip(found.chunks(256)).enumerate() {
                    let whole = found.iter().all(|byte| *byte == found[0]);
                    assert!(
                        whole && versions.contains(&found[0]),
                        "seed {seed}, slot {at}: {versions:?}, {}",
                        found[0]
                    );
                    lost += usize::from(versions.last() != Some(&found[0]));
                    *versions = vec![found[0]];
                }
            }
        });
    }
    assert!(lost > 100, "only {lost} lost a version: this tests little");
}

#[test]
fn what_guests_and_those_above_are_told() {
    run(1, async |host| {
        for (params, below, preferred) in [
            ("", "(type mem) (size 1M)", 4096),
            ("(block 64k)", "(type mem) (size 1M)", 65536),
            ("(preferred 1M)", "(type mem) (size 1M)", 1 << 20),
            ("", "(type volatile) (size 1M)", 4096),
        ] {
            let disk = serve(&host, params, below).await;
            let graph = disk.disk.graph();
            let geometry = graph.geometry(graph.node("X").unwrap());
            assert_eq!((geometry.min_block, geometry.preferred_block), (1, preferred), "{params} {below}");
            let base = graph.geometry(graph.node("D").unwrap());
            let around = if params.contains("block") { 2 * 65536 } else { 0 };
            if base.atomic > 0 {
                assert_eq!(
                    u64::from(geometry.atomic),
                    u64::from(base.atomic.min(64 << 20)) - around,
                    "{params}"
                );
            }
        }
    });
}

#[test]
fn sizes_that_do_not_fit_together() {
    run(1, async |host| {
        for (params, says) in [
            ("(block 100)", "power of two from 512"),
            ("(block 64k) (preferred 4k)", "less than `block`"),
            ("(block 64k) (maximum 4k)", "less than `block`"),
            ("(gather 2s)", "a second at the most"),
        ] {
            let text = format!(
                "element C (type client) element X (type blocksize) {params} element D (type mem) (size 1M) C -> X -> D"
            );
            let error = checked(CATALOGUE, &text).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
        // What the disk below asks for is known only once it is there.
        let text = "element X (type blocksize) (preferred 512) element B (type coarse) element D (type mem) (size 1M) X -> B -> D";
        let error = TestDisk::new(&host, CATALOGUE, text, "X").await.err().unwrap().to_string();
        assert!(error.contains("it would prefer 512") && error.contains("a block has 4096"), "{error}");
        let disk = serve(&host, "", "(type mem) (size 1M)").await;
        let graph = disk.disk.graph();
        assert_eq!(get(&disk, "gather"), "0s");
        graph.set("X", "gather", "3ms").unwrap();
        assert_eq!(get(&disk, "gather"), "3ms");
        assert!(graph.set("X", "gather", "2s").is_err() && graph.set("X", "waiting", "1").is_err());
    });
}
