//! The disk that it is; every byte that it stores; what it saves; damage and hostile bytes; crashes.

use super::codec::{Codec, HEAD};
use crate::compression::Algorithm;
use blockmason::describe::Catalogue;
use blockmason::testing::{self, CLIENT, SHARED, TestDisk, checked, play_against_model, run};
use blockmason::{Data, Element, Extent, Host, Kind, Op, Request, Result};
use std::sync::Arc;
use std::time::Duration;

static CATALOGUE: Catalogue = &[
    &super::TYPE,
    &CLIENT,
    &SHARED,
    &crate::fault::delay::TYPE,
    &crate::fault::error::TYPE,
    &crate::sink::mem::TYPE,
    &crate::sink::volatile::TYPE,
    &crate::transform::wal::TYPE,
];

/// [`testing::share`], of these types.
fn share(host: &Host, name: &str, text: &str) -> Arc<dyn Element> {
    testing::share(host, CATALOGUE, name, text)
}

const CLUSTER: u64 = 16384;
/// A slot of such a cluster, in units of 4k.
const SLOT: u64 = CLUSTER + 4096;
/// Where slots begin.
const START: u64 = 8192;

fn room(clusters: u64) -> u64 {
    START + clusters * SLOT
}

async fn serve(host: &Arc<Host>, params: &str) -> Result<TestDisk> {
    let text = format!("element X (type compress) (cluster 16k) {params} element D (type shared) X -> D");
    TestDisk::new(host, CATALOGUE, &text, "X").await
}

async fn raw(host: &Arc<Host>) -> TestDisk {
    TestDisk::new(host, CATALOGUE, "element D (type shared)", "D").await.unwrap()
}

fn get(disk: &TestDisk, handler: &str) -> String {
    disk.disk.graph().get("X", handler).unwrap()
}

fn events(host: &Host) -> Vec<String> {
    let news = host.events().follow(1024).take(1024);
    news.events.iter().map(|event| format!("{event:?}")).collect()
}

/// Bytes of a disk that are stored.
fn stored(extents: &[Extent]) -> u64 {
    extents.iter().filter(|extent| !extent.state.hole).map(|extent| extent.len).sum()
}

/// Bytes of which a part can be compressed away.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let words: Vec<Vec<u8>> =
        (0..200).map(|_| (0..rng.usize(2..9)).map(|_| rng.u8(b'a'..=b'z')).collect()).collect();
    let mut bytes = Vec::new();
    while bytes.len() < len {
        bytes.extend_from_slice(&words[rng.usize(0..words.len())]);
        bytes.push(b' ');
    }
    bytes.truncate(len);
    bytes
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

fn lz4(plain: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(plain.len())];
    let len = lz4_flex::block::compress_into(plain, &mut packed).unwrap();
    packed.truncate(len);
    packed
}

fn unlz4(packed: &[u8]) -> Vec<u8> {
    let mut plain = vec![0; CLUSTER as usize];
    let len = lz4_flex::block::decompress_into(packed, &mut plain).unwrap();
    plain.truncate(len);
    plain
}

/// Like the framework's own player, with data of which some can be compressed, some cannot, some is zeros.
async fn play(disk: &TestDisk, seed: u64, ops: usize) {
    let size = disk.size();
    let mut model = disk.read(0, size).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(seed);
    for step in 0..ops {
        let offset = rng.u64(0..size);
        let longest = [700, 20_000, 70_000][rng.usize(0..3)];
        let len = rng.u64(1..=(size - offset).min(longest));
        let range = offset as usize..(offset + len) as usize;
        let bytes = match rng.u8(0..4) {
            0 => noise(rng.u64(..), len as usize),
            1 => vec![0; len as usize],
            _ => text(rng.u64(..), len as usize),
        };
        match rng.u8(0..6) {
            0 => {
                disk.op(Op::WriteZeroes, offset, len).await.unwrap();
                model[range].fill(0);
            }
            1 => blockmason::rt::sleep(Duration::from_millis(rng.u64(0..3000))).await,
            2 => assert!(disk.read(offset, len).await.unwrap() == model[range], "seed {seed}, step {step}"),
            _ => {
                disk.write(offset, &bytes).await.unwrap();
                model[range].copy_from_slice(&bytes);
            }
        }
    }
    assert!(disk.read(0, size).await.unwrap() == model, "seed {seed}: the disk at the end");
}

#[test]
fn behaves_like_a_vector_before_and_after_a_restart() {
    for (seed, params) in
        [(0, ""), (1, "(algorithm zstd)"), (2, "(algorithm zstd) (level 7) (unit 512)"), (3, "(unit 8k)")]
    {
        run(seed, async |host| {
            share(&host, "D", "(type mem) (size 400k)");
            for round in 0..3 {
                let disk = serve(&host, &format!("{params} (create yes)")).await.unwrap();
                play_against_model(&disk, seed + 10 * round, 100).await;
                play(&disk, seed + 10 * round, 150).await;
                disk.disk.stop().await.unwrap();
            }
        });
    }
}

#[test]
fn what_was_compressed_in_another_way_is_read() {
    run(1, async |host| {
        share(&host, "D", "(type mem) (size 400k)");
        let bytes = text(1, 300_000);
        for params in ["(algorithm lz4)", "(algorithm zstd)", "(algorithm zstd) (level 19)", ""] {
            let disk = serve(&host, &format!("{params} (create yes)")).await.unwrap();
            if params == "(algorithm lz4)" {
                disk.write(0, &bytes).await.unwrap();
            }
            assert!(disk.read(0, 300_000).await.unwrap() == bytes);
            disk.write(50_000, &bytes[50_000..100_000]).await.unwrap();
            disk.disk.stop().await.unwrap();
        }
    });
}

#[test]
fn every_byte_is_stored_as_the_format_says() {
    for (params, form) in [("(algorithm lz4)", 2u32), ("(algorithm zstd)", 3)] {
        run(1, async |host| {
            share(&host, "D", &format!("(type mem) (size {})", room(4)));
            let disk = serve(&host, &format!("{params} (create yes)")).await.unwrap();
            let (soft, hard) = (text(1, CLUSTER as usize), noise(1, CLUSTER as usize));
            disk.write(CLUSTER, &soft).await.unwrap();
            disk.write(2 * CLUSTER, &hard).await.unwrap();
            let raw = raw(&host).await;
            let image = raw.read(0, raw.size()).await.unwrap();
            let label = &image[..512];
            assert_eq!(label[..16], *b"MASONZIP\x01\0\0\0\0\0\0\0");
            assert_eq!(
                label[32..48],
                [
                    (4 * CLUSTER).to_le_bytes().as_slice(),
                    &(CLUSTER as u32).to_le_bytes(),
                    &4096u32.to_le_bytes()
                ]
                .concat()
            );
            let id = &label[16..32];
            for (number, plain, form) in [(1u64, &soft, form), (2, &hard, 1)] {
                let slot = &image[(START + number * SLOT) as usize..][..SLOT as usize];
                assert_eq!(slot[..4], form.to_le_bytes());
                let len = u32::from_le_bytes([slot[4], slot[5], slot[6], slot[7]]) as usize;
                let contents = &slot[32..32 + len];
                let sum = crc32fast::hash(&[id, &number.to_le_bytes(), &slot[..8], contents].concat());
                assert_eq!(slot[8..12], sum.to_le_bytes());
                assert!(slot[12..32].iter().chain(&slot[32 + len..]).all(|byte| *byte == 0));
                let unpacked = match form {
                    1 => contents.to_vec(),
                    2 => unlz4(contents),
                    _ => zstd::bulk::decompress(contents, CLUSTER as usize).unwrap(),
                };
                assert!(&unpacked == plain, "{form}");
            }
            assert!(image[START as usize..(START + SLOT) as usize].iter().all(|byte| *byte == 0));
        });
    }
}

#[test]
fn room_is_saved_and_given_back() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(64)));
        let disk = serve(&host, "(algorithm zstd) (create yes)").await.unwrap();
        let below = raw(&host).await;
        let size = below.size();
        let used = async || stored(&below.extents(0, size).await.unwrap()) - 8192;
        let hard = noise(3, 32 * CLUSTER as usize);
        disk.write(0, &hard).await.unwrap();
        assert_eq!(used().await, 32 * SLOT, "what cannot be compressed takes a unit more");
        assert_eq!((get(&disk, "plain"), get(&disk, "waiting")), ("32".to_owned(), "0".to_owned()));
        // Shorter ones over them: their rests go once they are durable.
        let soft = text(3, 32 * CLUSTER as usize);
        disk.write(0, &soft).await.unwrap();
        assert_eq!((used().await, get(&disk, "waiting")), (32 * SLOT, "32".to_owned()));
        blockmason::rt::sleep(Duration::from_secs(3)).await;
        let now = used().await;
        assert!(now <= 32 * CLUSTER / 2, "{now}");
        assert_eq!((get(&disk, "waiting"), get(&disk, "trimmed")), ("0".to_owned(), "32".to_owned()));
        assert_eq!(get(&disk, "taken"), (64 * CLUSTER).to_string());
        assert_eq!(get(&disk, "stored").parse::<u64>().unwrap(), 32 * SLOT + now);
        // Zeros, however they come, take none.
        disk.write(0, &vec![0; 16 * CLUSTER as usize]).await.unwrap();
        disk.op(Op::Discard, 16 * CLUSTER, 16 * CLUSTER).await.unwrap();
        assert_eq!(used().await, 0);
        assert_eq!(disk.read(0, 32 * CLUSTER).await.unwrap(), vec![0; 32 * CLUSTER as usize]);
    });
}

/// A longer cluster over a shorter one, just when what the shorter one had left is to be discarded.
#[test]
fn what_is_written_again_is_not_discarded() {
    for wait in 0..12 {
        run(wait, async |host| {
            share(&host, "D", &format!("(type mem) (size {})", room(8)));
            let text_ = "element X (type compress) (cluster 16k) (create yes) element Y (type delay) (all 2ms) element D (type shared) X -> Y -> D";
            let disk = TestDisk::new(&host, CATALOGUE, text_, "X").await.unwrap();
            disk.write(0, &text(1, 4 * CLUSTER as usize)).await.unwrap();
            blockmason::rt::sleep(Duration::from_millis(1990 + wait)).await;
            let hard = noise(wait, 4 * CLUSTER as usize);
            disk.write(0, &hard).await.unwrap();
            blockmason::rt::sleep(Duration::from_secs(5)).await;
            assert!(disk.read(0, 4 * CLUSTER).await.unwrap() == hard, "{wait}");
            assert_eq!(get(&disk, "waiting"), "0");
        });
    }
}

#[test]
fn what_is_encrypted_above_is_said_once() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(600)));
        let disk = serve(&host, "(create yes)").await.unwrap();
        for at in 0..5 {
            disk.write(at * 100 * CLUSTER, &noise(at, 100 * CLUSTER as usize)).await.unwrap();
        }
        let said = events(&host);
        assert_eq!(
            said.iter().filter(|event| event.contains("is it encrypted above?")).count(),
            1,
            "{said:?}"
        );
    });
}

#[test]
fn damage_is_noticed_and_nothing_else_suffers() {
    run(1, async |host| {
        share(&host, "D", &format!("(type mem) (size {})", room(4)));
        let disk = serve(&host, "(create yes)").await.unwrap();
        let bytes = text(1, 3 * CLUSTER as usize);
        disk.write(0, &bytes).await.unwrap();
        let raw = raw(&host).await;
        let slot = START + SLOT;
        let head = raw.read(slot, HEAD as u64).await.unwrap();
        let len = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        for at in (0..HEAD as u64).chain((HEAD as u64..HEAD as u64 + len).step_by(37)) {
            let was = raw.read(slot + at, 1).await.unwrap();
            raw.write(slot + at, &[was[0] ^ 1 << (at % 8)]).await.unwrap();
            let error = disk.read(CLUSTER, 512).await.unwrap_err();
            assert!(error.kind() == Kind::Io && error.to_string().contains("block 1 "), "{error}");
            assert!(disk.read(0, CLUSTER).await.unwrap() == bytes[..CLUSTER as usize]);
            raw.write(slot + at, &was).await.unwrap();
        }
        // Another place.
        let other = raw.read(START, SLOT).await.unwrap();
        raw.write(slot, &other).await.unwrap();
        assert!(disk.read(CLUSTER, CLUSTER).await.is_err());
        disk.write(CLUSTER, &bytes[..CLUSTER as usize]).await.unwrap();
        assert!(disk.read(CLUSTER, CLUSTER).await.unwrap() == bytes[..CLUSTER as usize]);
    });
}

/// Whatever is stored, with a checksum that is right: an error, or a cluster, and no more memory than that.
#[test]
fn hostile_slots_are_bounded() {
    let codec =
        Codec { id: [7; 16], algorithm: Algorithm::Zstd, level: 1, cluster: CLUSTER as usize, unit: 4096 };
    let mut rng = fastrand::Rng::with_seed(1);
    let sealed = |form: u32, len: u32, contents: &[u8]| {
        let mut slot = vec![0; SLOT as usize];
        slot[HEAD..HEAD + contents.len()].copy_from_slice(contents);
        slot[..4].copy_from_slice(&form.to_le_bytes());
        slot[4..8].copy_from_slice(&len.to_le_bytes());
        let used = (HEAD + len as usize).min(slot.len());
        let sum =
            crc32fast::hash(&[&codec.id[..], &3u64.to_le_bytes(), &slot[..8], &slot[HEAD..used]].concat());
        slot[8..12].copy_from_slice(&sum.to_le_bytes());
        Data::from(slot)
    };
    let open = |slot: &Data| codec.open(3, slot).inspect(|plain| assert_eq!(plain.len() as u64, CLUSTER));
    // Bombs: much more, or less, than a cluster.
    for bytes in [1usize << 26, CLUSTER as usize + 1, CLUSTER as usize - 1, 0] {
        let plain = vec![1; bytes];
        for (form, bomb) in [(2, lz4(&plain)), (3, zstd::bulk::compress(&plain, 19).unwrap())] {
            if bomb.len() <= CLUSTER as usize {
                assert!(open(&sealed(form, bomb.len() as u32, &bomb)).is_none(), "{form}, {bytes}");
            }
        }
    }
    for form in [0, 4, u32::MAX] {
        assert!(open(&sealed(form, 10, &[1; 10])).is_none());
    }
    for len in [CLUSTER as u32 + 1, SLOT as u32, u32::MAX] {
        for form in 1..4 {
            assert!(open(&sealed(form, len, &[1; 10])).is_none());
        }
    }
    assert!(open(&sealed(1, CLUSTER as u32 - 1, &[1; 10])).is_none());
    // What was changed at random, and noise.
    let good =
        [lz4(&text(1, CLUSTER as usize)), zstd::bulk::compress(&text(1, CLUSTER as usize), 1).unwrap()];
    for (form, good) in (2..).zip(good) {
        assert!(open(&sealed(form, good.len() as u32, &good)).is_some());
        for _ in 0..2000 {
            let mut bad = if rng.bool() { good.clone() } else { noise(rng.u64(..), rng.usize(0..2000)) };
            for _ in 0..rng.usize(1..9).min(bad.len()) {
                let at = rng.usize(0..bad.len());
                bad[at] = rng.u8(..);
            }
            let _ = open(&sealed(form, bad.len() as u32, &bad));
        }
    }
}

#[test]
fn errors_of_the_disk_below_leave_the_old_or_the_new_cluster() {
    run(1, async |host| {
        let text_ = "element X (type compress) (cluster 16k) (create yes) element E (type error) (op write) (probability 0%) \
                     element D (type mem) (size 400k) X -> E -> D";
        let disk = TestDisk::new(&host, CATALOGUE, text_, "X").await.unwrap();
        let old = text(1, 8 * CLUSTER as usize);
        disk.write(0, &old).await.unwrap();
        disk.disk.graph().set("E", "probability", "50%").unwrap();
        let new = noise(1, 8 * CLUSTER as usize);
        assert_eq!(disk.write(0, &new).await.unwrap_err().kind(), Kind::Io);
        disk.disk.graph().set("E", "probability", "0%").unwrap();
        blockmason::rt::sleep(Duration::from_secs(5)).await;
        let found = disk.read(0, 8 * CLUSTER).await.unwrap();
        let cluster =
            |bytes: &[u8], ix: usize| bytes[ix * CLUSTER as usize..(ix + 1) * CLUSTER as usize].to_vec();
        let news = (0..8).filter(|ix| cluster(&found, *ix) == cluster(&new, *ix)).count();
        let olds = (0..8).filter(|ix| cluster(&found, *ix) == cluster(&old, *ix)).count();
        assert!(news + olds == 8 && news > 0 && olds > 0, "{news} {olds}");
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    run(1, async |host| {
        for (below, says) in [
            ("(type volatile) (size 1M)", "promises atomic writes of 0 bytes, and 20480 are needed"),
            ("(type mem) (size 20k)", "the smallest compressed one has 28672"),
        ] {
            let text = format!("element X (type compress) (cluster 16k) element D {below} X -> D");
            let error = TestDisk::new(&host, CATALOGUE, &text, "X").await.err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
        for (params, says) in [
            ("(level 3)", "lz4 has no levels"),
            ("(algorithm zstd) (level 20)", "from 1 to 19"),
            ("(cluster 8k)", "power of two from 16k to 4M"),
            ("(cluster 16k) (unit 16k)", "half a cluster at the most"),
        ] {
            let text = format!(
                "element C (type client) element X (type compress) {params} element D (type mem) (size 1M) C -> X -> D"
            );
            let error = checked(CATALOGUE, &text).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
        share(&host, "D", "(type mem) (size 400k)");
        serve(&host, "(create yes)").await.unwrap().write(0, &[1; 4096]).await.unwrap();
        let error = serve(&host, "(unit 8k)").await.unwrap().read(0, 512).await.unwrap_err();
        assert!(error.to_string().contains("made with (unit 4k)"), "{error}");
    });
}

/// A disk that orders nothing between two flushes, but writes what it writes as a whole: what is discarded may be gone and the
/// write before it not done.
mod lazy {
    use super::*;
    use blockmason::{Answer, Children, Cx, Flow, Geometry, Ops, Prepared};
    use std::sync::Mutex;

    pub(super) struct Lazy(Mutex<State>);

    #[derive(Default)]
    struct State {
        durable: Vec<u8>,
        now: Vec<u8>,
        /// Since the last flush, in order.
        changes: Vec<(u64, Vec<u8>)>,
    }

    impl Lazy {
        pub(super) fn new(size: usize) -> Arc<Lazy> {
            Arc::new(Lazy(Mutex::new(State {
                durable: vec![0; size],
                now: vec![0; size],
                changes: Vec::new(),
            })))
        }

        /// Any of the changes are there, and the others are not. What that is, for after the end of this process.
        pub(super) fn lose(&self, rng: &mut fastrand::Rng) -> Vec<u8> {
            let state = self.0.lock().unwrap();
            let mut left = state.durable.clone();
            for (at, bytes) in &state.changes {
                if rng.bool() {
                    left[*at as usize..*at as usize + bytes.len()].copy_from_slice(bytes);
                }
            }
            left
        }

        /// Starts again with what was left.
        pub(super) fn restore(&self, left: Vec<u8>) {
            *self.0.lock().unwrap() = State { now: left.clone(), durable: left, changes: Vec::new() };
        }
    }

    impl Element for Lazy {
        fn prepare(&self, _children: Children<'_>) -> Result<Prepared> {
            let size = self.0.lock().unwrap().now.len() as u64;
            let geometry =
                Geometry { ops: Ops { extents: false, ..Ops::ALL }, atomic: 1 << 20, ..Geometry::new(size) };
            Ok(Prepared::of(geometry))
        }

        fn submit<'a>(&'a self, req: Request, _cx: Cx<'a>) -> Flow<'a> {
            let mut state = self.0.lock().unwrap();
            let range = req.offset as usize..req.end() as usize;
            let bytes = match req.op {
                Op::Read => return Flow::Now(Ok(Answer::Data(Data::copy_of(&state.now[range])))),
                Op::Write => req.data.to_vec(),
                Op::WriteZeroes => vec![0; req.len as usize],
                // What is there afterwards is open.
                Op::Discard => vec![0xdd; req.len as usize],
                Op::Flush => {
                    state.durable = state.now.clone();
                    state.changes.clear();
                    return Flow::done();
                }
                Op::Cache | Op::Extents | Op::Control => return Flow::done(),
            };
            state.now[range].copy_from_slice(&bytes);
            state.changes.push((req.offset, bytes));
            if req.is_fua() {
                state.durable = state.now.clone();
                state.changes.clear();
            }
            Flow::done()
        }
    }
}

#[test]
fn a_loss_of_power_leaves_the_old_or_the_new_cluster() {
    let mut lost = 0;
    let mut trimmed = 0;
    for seed in 0..150 {
        run(seed, async |host| {
            let lazy = lazy::Lazy::new(room(12) as usize);
            testing::share_this("D", lazy.clone());
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = vec![vec![vec![0u8; CLUSTER as usize]]; 12];
            for life in 0..4 {
                let disk = serve(&host, "(create yes)").await.unwrap();
                for (at, versions) in model.iter_mut().enumerate() {
                    let found = disk.read(at as u64 * CLUSTER, CLUSTER).await;
                    let found = found
                        .unwrap_or_else(|error| panic!("seed {seed}, life {life}, cluster {at}: {error}"));
                    assert!(versions.contains(&found), "seed {seed}, life {life}, cluster {at}");
                    lost += usize::from(versions.last() != Some(&found));
                    *versions = vec![found];
                }
                for _ in 0..rng.usize(1..40) {
                    let at = rng.usize(0..12);
                    match rng.u8(0..8) {
                        0 => {
                            disk.op(Op::Flush, 0, 0).await.unwrap();
                            model.iter_mut().for_each(|versions| drop(versions.drain(..versions.len() - 1)));
                        }
                        1 => blockmason::rt::sleep(Duration::from_millis(rng.u64(0..4000))).await,
                        kind => {
                            let bytes = match kind {
                                2 => vec![0; CLUSTER as usize],
                                3 | 4 => noise(rng.u64(..), CLUSTER as usize),
                                _ => text(rng.u64(..), CLUSTER as usize),
                            };
                            disk.write(at as u64 * CLUSTER, &bytes).await.unwrap();
                            model[at].push(bytes);
                        }
                    }
                }
                trimmed += get(&disk, "trimmed").parse::<usize>().unwrap();
                let left = lazy.lose(&mut rng);
                // The process is gone, too: what it still does is undone.
                disk.disk.stop().await.unwrap();
                lazy.restore(left);
            }
        });
    }
    assert!(lost > 100 && trimmed > 100, "{lost} versions lost, {trimmed} trimmed: this tests little");
}

/// The same over a real log and disks that tear sectors.
#[test]
fn above_a_log_a_loss_of_power_leaves_the_old_or_the_new_cluster() {
    let mut lost = 0;
    for seed in 0..40 {
        run(seed, async |host| {
            let disks = [("D", room(8)), ("L", 512 << 10)].map(|(name, size)| {
                share(&host, name, &format!("(type volatile) (size {size}) (seed {seed})"))
            });
            let text_ = "element X (type compress) (create yes) (cluster 16k) element W (type wal) element D (type shared) \
                        element L (type shared) X -> W (W, out) -> D (W, log) -> L";
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = vec![vec![vec![0u8; CLUSTER as usize]]; 8];
            for life in 0..3 {
                let disk = TestDisk::new(&host, CATALOGUE, text_, "X").await.unwrap();
                for (at, versions) in model.iter_mut().enumerate() {
                    let found = disk.read(at as u64 * CLUSTER, CLUSTER).await.unwrap();
                    assert!(versions.contains(&found), "seed {seed}, life {life}, cluster {at}");
                    lost += usize::from(versions.last() != Some(&found));
                    *versions = vec![found];
                }
                let mut sent = Vec::new();
                for _ in 0..rng.usize(1..12) {
                    let at = rng.usize(0..8);
                    let bytes = if rng.bool() {
                        text(rng.u64(..), CLUSTER as usize)
                    } else {
                        noise(rng.u64(..), CLUSTER as usize)
                    };
                    sent.push(disk.send(Request::write(at as u64 * CLUSTER, Data::copy_of(&bytes))));
                    model[at].push(bytes);
                    if rng.u8(0..3) == 0 {
                        for reply in sent.drain(..) {
                            reply.await.unwrap().unwrap();
                        }
                    }
                }
                for _ in 0..rng.usize(0..60) {
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
    assert!(lost > 20, "only {lost} clusters lost a version: this tests little");
}
