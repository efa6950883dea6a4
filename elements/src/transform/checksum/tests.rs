//! The disk that it is; every byte that it stores, by other means than the element's; damage, crashes, comparing.

use super::sum::TRAILER;
use blockmason::describe::{Catalogue, ElementType, Family};
use blockmason::testing::{self, SHARED, TestDisk, play_against_model, run};
use blockmason::{Cx, Data, Element, Flow, Host, Kind, Op, Request, Result};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

static CATALOGUE: Catalogue = &[
    &super::TYPE,
    &SHARED,
    &HALF,
    &crate::fault::delay::TYPE,
    &crate::fault::flip::TYPE,
    &crate::sink::file::TYPE,
    &crate::sink::mem::TYPE,
    &crate::sink::volatile::TYPE,
    &crate::transform::wal::TYPE,
];

thread_local! {
    static TEARS: RefCell<bool> = RefCell::default();
}

/// [`testing::share`], of these types.
fn share(host: &Host, name: &str, text: &str) -> Arc<dyn Element> {
    testing::share(host, CATALOGUE, name, text)
}

/// Writes half of what is written, and waits a while before the other half, when it is told to.
struct Half;

static HALF: ElementType =
    ElementType { name: "half", family: Family::Fault, build: |_| Ok(Arc::new(Half)), ..ElementType::BASE };

impl Element for Half {
    fn submit<'a>(&'a self, req: Request, cx: Cx<'a>) -> Flow<'a> {
        if req.op != Op::Write || !TEARS.with_borrow(|tears| *tears) {
            return cx.forward(0, req);
        }
        Flow::later(async move {
            let half = req.len / 2;
            cx.forward(0, cx.child(&req.part(0, half, req.offset))).await?;
            cx.sleep(Duration::from_millis(5)).await;
            cx.forward(0, cx.child(&req.part(half, req.len - half, req.offset + half))).await
        })
    }
}

/// Where slots begin.
const START: u64 = 8192;

fn room(blocks: u64, block: u64) -> u64 {
    START + blocks * (block + TRAILER as u64)
}

fn place(block: u64, len: u64) -> u64 {
    START + block * (len + TRAILER as u64)
}

async fn serve(host: &Arc<Host>, params: &str) -> Result<TestDisk> {
    let text = format!(
        "element X (type checksum) {params} element H (type half) element D (type shared) X -> H -> D"
    );
    TestDisk::new(host, CATALOGUE, &text, "X").await
}

async fn raw(host: &Arc<Host>) -> TestDisk {
    TestDisk::new(host, CATALOGUE, "element D (type shared)", "D").await.unwrap()
}

fn events(host: &Host) -> Vec<String> {
    let news = host.events().follow(1024).take(1024);
    news.events.iter().map(|event| format!("{event:?}")).collect()
}

fn get(disk: &TestDisk, handler: &str) -> String {
    disk.disk.graph().get("X", handler).unwrap()
}

#[test]
fn behaves_like_a_vector_before_and_after_a_restart() {
    for (seed, params, block) in [
        (0, "", 4096),
        (1, "(block 512)", 512),
        (2, "(sum blake3)", 4096),
        (3, "(sum blake3) (block 64k)", 65536),
    ] {
        run(seed, async |host| {
            share(&host, "D", &format!("(type mem) (size {})", room(300_000 / block, block)));
            for round in 0..3 {
                let disk = serve(&host, &format!("{params} (create yes)")).await.unwrap();
                play_against_model(&disk, seed + 10 * round, 150).await;
                disk.disk.stop().await.unwrap();
            }
        });
    }
}

/// CRC-32 (IEEE), bit by bit.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}

#[test]
fn every_byte_is_stored_as_the_format_says() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(8, 512)));
        let disk = serve(&host, "(create yes) (block 512)").await.unwrap();
        let mut bytes = vec![0; 1024];
        fastrand::Rng::with_seed(1).fill(&mut bytes);
        disk.write(1024, &bytes).await.unwrap();
        disk.write(3 * 512, &[]).await.unwrap();
        disk.op(Op::Discard, 3 * 512, 512).await.unwrap();
        let raw = raw(&host).await;
        let image = raw.read(0, raw.size()).await.unwrap();
        let label = &image[..512];
        assert_eq!(label, &image[4096..4608]);
        assert_eq!(label[..16], *b"MASONSUM\x01\0\0\0\0\0\0\0");
        let id = &label[16..32];
        assert_ne!(id, [0; 16]);
        assert_eq!(
            label[32..48],
            [(8u64 * 512).to_le_bytes().as_slice(), &512u32.to_le_bytes(), &1u32.to_le_bytes()].concat()
        );
        assert!(label[48..508].iter().all(|byte| *byte == 0));
        assert_eq!(label[508..], crc32(&label[..508]).to_le_bytes());
        let sum = crc32(&[id, &2u64.to_le_bytes(), &bytes[..512]].concat()).to_le_bytes();
        let slot = [&bytes[..512], &[1, 0, 0, 0], &sum, &[0; 8]].concat();
        assert_eq!(image[place(2, 512) as usize..][..528], slot);
        for hole in [0, 1, 3, 4] {
            assert!(image[place(hole, 512) as usize..][..528].iter().all(|byte| *byte == 0), "slot {hole}");
        }
    });
}

#[test]
fn a_flipped_bit_anywhere_in_a_slot_is_noticed() {
    for params in ["(block 512) (create yes)", "(block 512) (sum blake3) (create yes)"] {
        run(1, async |host| {
            share(&host, "D", &format!("(type mem) (size {})", room(8, 512)));
            let disk = serve(&host, params).await.unwrap();
            disk.write(0, &[7; 2048]).await.unwrap();
            let raw = raw(&host).await;
            for at in 0..528 {
                let place = place(2, 512) + at;
                let was = raw.read(place, 1).await.unwrap();
                raw.write(place, &[was[0] ^ 1 << (at % 8)]).await.unwrap();
                let error = disk.read(1024, 512).await.unwrap_err();
                assert!(error.kind() == Kind::Io && error.to_string().contains("block 2 "), "{error}");
                assert_eq!(disk.read(512, 512).await.unwrap(), [7; 512], "its neighbours are whole");
                assert!(disk.write(1025, &[1]).await.is_err(), "part of it cannot be completed");
                raw.write(place, &was).await.unwrap();
            }
            assert_eq!(disk.read(0, 2048).await.unwrap(), [7; 2048]);
            assert_eq!(get(&disk, "damaged"), (2 * 528).to_string());
            // A block that was never written; and one that is written as a whole.
            raw.write(place(5, 512) + 3, &[1]).await.unwrap();
            blockmason::rt::sleep(Duration::from_secs(11)).await;
            assert!(disk.read(5 * 512, 512).await.is_err());
            assert!(
                events(&host).iter().any(|event| event.contains("block 5 is not what was written there"))
            );
            disk.write(5 * 512, &[9; 512]).await.unwrap();
            assert_eq!(disk.read(5 * 512, 512).await.unwrap(), [9; 512]);
        });
    }
}

#[test]
fn a_block_of_another_place_or_disk_is_noticed() {
    run(1, async |host| {
        let size = format!("(type mem) (size {})", room(8, 512));
        let mut slots = Vec::new();
        for _ in 0..2 {
            share(&host, "D", &size);
            let disk = serve(&host, "(block 512) (create yes)").await.unwrap();
            disk.write(0, &[7; 1024]).await.unwrap();
            let raw = raw(&host).await;
            slots.push(raw.read(place(0, 512), 2 * 528).await.unwrap());
            let (a, b) = slots.last().unwrap().split_at(528);
            raw.write(place(0, 512), &[b, a].concat()).await.unwrap();
            for block in 0..2 {
                assert!(disk.read(block * 512, 512).await.is_err());
            }
            raw.write(place(0, 512), &slots[0]).await.unwrap();
            assert_eq!(
                disk.read(0, 512).await.is_ok(),
                slots.len() == 1,
                "a block of another disk is none of this one"
            );
        }
    });
}

#[test]
fn all_of_a_disk_is_compared_while_guests_go_on() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(2000, 4096)));
        let text = "element X (type checksum) (create yes) element Y (type delay) (all 1ms) element D (type shared) X -> Y -> D";
        let disk = TestDisk::new(&host, CATALOGUE, text, "X").await.unwrap();
        disk.write(0, &vec![7; 2000 * 4096]).await.unwrap();
        let raw = raw(&host).await;
        for block in (0..2000).step_by(100) {
            raw.write(place(block, 4096) + 1000, b"rot").await.unwrap();
        }
        let graph = disk.disk.graph();
        assert_eq!(get(&disk, "verified"), "none");
        graph.call("X", "verify", "").unwrap();
        assert!(graph.call("X", "verify", "").is_err(), "it is under way");
        let mut seen = Vec::new();
        while get(&disk, "verified") != "none" {
            // The guest reads and writes what is whole meanwhile.
            disk.write(1950 * 4096, &[8; 8192]).await.unwrap();
            assert_eq!(disk.read(1950 * 4096, 8192).await.unwrap(), [8; 8192]);
            seen.push(get(&disk, "verified"));
        }
        assert!(seen.len() > 3, "{seen:?}");
        assert_eq!(get(&disk, "found"), "20");
        let said = events(&host);
        let named = said.iter().filter(|event| event.contains("does not match its checksum")).count();
        assert_eq!(named, 1, "the first one at once");
        let end = "2000 blocks were compared with their checksums, 20 differ, the first are 0, 100, 200,";
        assert!(said.iter().any(|event| event.contains(end)), "{said:?}");
        graph.call("X", "verify", "").unwrap();
        graph.call("X", "verify", "stop").unwrap();
        assert_eq!(get(&disk, "verified"), "none");
    });
}

/// A read, and a comparison, of a block that is just being written sees the old or the new one.
#[test]
fn half_written_slots_are_seen_by_nobody() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(16, 4096)));
        let disk = serve(&host, "(create yes)").await.unwrap();
        disk.write(0, &[1; 65536]).await.unwrap();
        TEARS.set(true);
        disk.disk.graph().call("X", "verify", "").unwrap();
        let sent: Vec<_> =
            (0..16).map(|at| disk.send(Request::write(at * 4096, Data::copy_of(&[2; 4096])))).collect();
        blockmason::rt::sleep(Duration::from_millis(2)).await;
        let found = disk.read(0, 65536).await.unwrap();
        assert!(found.chunks(4096).all(|block| block == [1; 4096] || block == [2; 4096]));
        for reply in sent {
            reply.await.unwrap().unwrap();
        }
        while get(&disk, "verified") != "none" {
            blockmason::rt::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(get(&disk, "damaged"), "0");
        TEARS.set(false);
    });
}

#[test]
fn what_is_no_disk_of_this_kind_is_refused() {
    run(1, async |host| {
        let size = room(16, 4096);
        let refusal = async |params: &str| {
            let disk = serve(&host, params).await.unwrap();
            let error = disk.read(0, 512).await.unwrap_err().to_string();
            assert_eq!(get(&disk, "error").is_empty(), error.is_empty());
            disk.disk.stop().await.unwrap();
            error
        };
        share(&host, "D", &format!("(type mem) (size {size})"));
        assert!(refusal("").await.contains("(create yes) makes a checksum disk"));
        serve(&host, "(create yes)").await.unwrap().write(0, &[1; 4096]).await.unwrap();
        assert!(refusal("(block 512)").await.contains("has blocks of 4096 bytes"));
        assert!(refusal("(sum blake3)").await.contains("made with (sum crc32)"));
        // One copy of the label is lost: it is whole again. Both: nothing is overwritten.
        let raw = raw(&host).await;
        let label = raw.read(0, 512).await.unwrap();
        for at in [0, 4096] {
            raw.write(at, &[0; 512]).await.unwrap();
            let disk = serve(&host, "(create yes)").await.unwrap();
            assert_eq!(disk.read(0, 4096).await.unwrap(), [1; 4096]);
            assert_eq!(raw.read(at, 512).await.unwrap(), label);
        }
        raw.write(0, &[0; 512]).await.unwrap();
        raw.write(4096, &[0; 512]).await.unwrap();
        assert!(refusal("(create yes)").await.contains("it is lost"));
        raw.write(0, &[9; 512]).await.unwrap();
        assert!(refusal("(create yes)").await.contains("something else on the disk below"));
        for (below, says) in [
            ("(type volatile) (size 1M)", "promises atomic writes of 0 bytes, and 4112 are needed"),
            ("(type mem) (size 9k)", "the smallest checksum one has 12304"),
        ] {
            let text = format!("element X (type checksum) element D {below} X -> D");
            let error = TestDisk::new(&host, CATALOGUE, &text, "X").await.err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
    });
}

/// Below a log that makes slots whole a block is old or new after a loss of power, and never damaged.
#[test]
fn a_loss_of_power_leaves_blocks_that_match() {
    const BLOCKS: u64 = 40;
    let mut lost = 0;
    for seed in 0..60 {
        run(seed, async |host| {
            let disks = [("D", room(BLOCKS, 512)), ("L", 128 << 10)].map(|(name, size)| {
                share(&host, name, &format!("(type volatile) (size {size}) (seed {seed})"))
            });
            let text = "element X (type checksum) (create yes) (block 512) element W (type wal) element D (type shared) \
                        element L (type shared) X -> W (W, out) -> D (W, log) -> L";
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = vec![vec![0u8]; BLOCKS as usize];
            for life in 0..4 {
                let disk = TestDisk::new(&host, CATALOGUE, text, "X").await.unwrap();
                let found = disk.read(0, BLOCKS * 512).await.unwrap();
                for (at, (versions, found)) in model.iter_mut().zip(found.chunks(512)).enumerate() {
                    let whole = found.iter().all(|byte| *byte == found[0]) && versions.contains(&found[0]);
                    assert!(whole, "seed {seed}, life {life}, block {at}: {versions:?}, {}", found[0]);
                    lost += usize::from(versions.last() != Some(&found[0]));
                    *versions = vec![found[0]];
                }
                let mut sent = Vec::new();
                for _ in 0..rng.usize(1..20) {
                    let at = rng.u64(0..BLOCKS);
                    let (byte, len) = (rng.u8(1..), rng.u64(1..=(BLOCKS - at).min(12)));
                    let req = Request::write(at * 512, Data::copy_of(&vec![byte; len as usize * 512]));
                    // Nobody knows in which order overlapping ones are done.
                    model[at as usize..(at + len) as usize]
                        .iter_mut()
                        .for_each(|versions| versions.push(byte));
                    sent.push(disk.send(req));
                    if rng.u8(0..4) == 0 {
                        for reply in sent.drain(..) {
                            reply.await.unwrap().unwrap();
                        }
                        if rng.bool() {
                            disk.op(Op::Flush, 0, 0).await.unwrap();
                        }
                    }
                }
                for _ in 0..rng.usize(0..40) {
                    tokio::task::yield_now().await;
                }
                disks.iter().for_each(|disk| drop(disk.call("cut", "").unwrap()));
                let _ = disk.disk.stop().await;
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                disks.iter().for_each(|disk| drop(disk.call("restore", "").unwrap()));
            }
        });
    }
    assert!(lost > 30, "only {lost} blocks lost a version: this tests little");
}

/// A disk that lies at random: what is read is right, or an error.
#[test]
fn a_disk_that_flips_bits_is_never_believed() {
    run(1, async |host| {
        let text = "element X (type checksum) (create yes) (block 512) element F (type flip) (probability 0%) \
                    element D (type mem) (size 100k) X -> F -> D";
        let disk = TestDisk::new(&host, CATALOGUE, text, "X").await.unwrap();
        let mut bytes = vec![0; 65536];
        fastrand::Rng::with_seed(5).fill(&mut bytes);
        disk.write(0, &bytes).await.unwrap();
        disk.disk.graph().set("F", "probability", "30%").unwrap();
        let mut failed = 0;
        for ix in 0..500 {
            let (at, len) = (ix % 100 * 512, 4096);
            match disk.read(at, len).await {
                Ok(found) => assert!(found == bytes[at as usize..(at + len) as usize]),
                Err(error) => failed += usize::from(error.kind() == Kind::Io),
            }
        }
        assert!((50..300).contains(&failed), "{failed}");
    });
}
