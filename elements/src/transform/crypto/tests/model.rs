//! The disk that it is, and every byte that it stores.

use super::super::format::{DATA, TABLE};
use super::kit::{Bench, CATALOGUE, KEY_A, Oracle, get, let_go, place, room, settle, tapped};
use blockmason::testing::{TestDisk, play_against_model, run};
use blockmason::{Connection, Data, Flags, Graph, Op, Request};
use futures::FutureExt;
use std::sync::Arc;

#[test]
fn behaves_like_a_vector_before_and_after_a_restart() {
    for (seed, params, block) in [
        (0, "", 4096),
        (1, "(block 512)", 512),
        (2, "(cipher aes-256-gcm-siv)", 4096),
        (3, "(cipher aes-256-gcm-siv) (block 64k)", 65536),
        (4, "(block 1k)", 1024),
    ] {
        run(seed, async |host| {
            let bench = Bench::new(&host, 300_000 / block, block);
            for round in 0..3 {
                let disk = bench.open("Disk", params).await;
                play_against_model(&disk, seed + 10 * round, 120).await;
                disk.disk.stop().await.unwrap();
            }
        });
    }
}

#[test]
fn behaves_like_a_vector_above_whole_blocks() {
    run(1, async |host| {
        let bench = Bench::new(&host, 1, 4096);
        let (key, size) = (bench.path("a.key"), room(60, 4096).next_multiple_of(4096));
        let text = format!(
            "element X (type crypto) (key_file {}) (create yes) element C (type coarse) \
             element M (type mem) (size {size}) X -> C -> M",
            key.display()
        );
        let disk = TestDisk::new(&host, CATALOGUE, &text, "X").await.unwrap();
        play_against_model(&disk, 1, 200).await;
    });
}

#[test]
fn every_byte_is_what_the_format_says() {
    for (params, block) in
        [("", 4096u64), ("(block 512)", 512), ("(cipher aes-256-gcm-siv)", 4096), ("(block 64k)", 65536)]
    {
        run(1, async |host| {
            let bench = Bench::new(&host, 40, block);
            let mut rng = fastrand::Rng::with_seed(7);
            let mut model = vec![0; 40 * block as usize];
            for _ in 0..3 {
                let disk = bench.open("Disk", params).await;
                for _ in 0..10 {
                    let at = rng.u64(0..40);
                    let mut bytes = vec![0; (rng.u64(1..=40 - at) * block) as usize];
                    rng.fill(&mut bytes);
                    disk.write(at * block, &bytes).await.unwrap();
                    model[(at * block) as usize..][..bytes.len()].copy_from_slice(&bytes);
                }
                let at = rng.u64(0..40) * block;
                disk.op(Op::WriteZeroes, at, block).await.unwrap();
                model[at as usize..][..block as usize].fill(0);
                disk.disk.stop().await.unwrap();
            }
            let image = bench.image("Disk").await;
            let oracle = Oracle::new(&image, KEY_A);
            for (number, plain) in (0..).zip(model.chunks(block as usize)) {
                assert!(oracle.expected(number, plain) == oracle.slot(number), "{params}: block {number}");
            }
        });
    }
}

#[test]
fn a_session_is_durable_before_its_first_block_and_a_reader_writes_nothing() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 4096);
        let disk = bench.open("Disk", "").await;
        disk.read(0, 16 * 4096).await.unwrap();
        disk.disk.stop().await.unwrap();
        let disk = bench.open("Disk", "").await;
        tapped(|tapped| tapped.log.clear());
        disk.read(0, 16 * 4096).await.unwrap();
        disk.op(Op::Flush, 0, 0).await.unwrap();
        disk.extents(0, 16 * 4096).await.unwrap();
        disk.op(Op::WriteZeroes, 0, 4096).await.unwrap();
        let changes = |log: &[(Op, u64, u64)]| -> Vec<_> {
            log.iter().copied().filter(|(op, ..)| matches!(op, Op::Write | Op::Flush)).collect()
        };
        let log = tapped(|tapped| std::mem::take(&mut tapped.log));
        assert_eq!(changes(&log), [(Op::Flush, 0, 0)], "no session is begun for that");
        let two = (disk.write(0, &[1; 8192]), disk.write(8192, &[1; 4096]));
        let (first, second) = futures::future::join(two.0, two.1).await;
        first.and(second).unwrap();
        let log = tapped(|tapped| std::mem::take(&mut tapped.log));
        let [entry, flush, writes @ ..] = &changes(&log)[..] else { panic!("{log:?}") };
        assert_eq!((*entry, *flush), ((Op::Write, TABLE, 512), (Op::Flush, 0, 0)));
        let slots = [(Op::Write, DATA, 2 * 4128), (Op::Write, DATA + 2 * 4128, 4128)];
        assert!(writes.len() == 2 && slots.iter().all(|slot| writes.contains(slot)), "{writes:?}");
        assert_eq!(get(&disk, "sessions"), "1 of 4096");
    });
}

#[test]
fn flags_and_operations_reach_the_disk_below_in_whole_slots() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 4096);
        let disk = bench.open("Disk", "").await;
        disk.write(0, &[1; 65536]).await.unwrap();
        for (op, wanted) in [
            (Op::Discard, Op::WriteZeroes),
            (Op::WriteZeroes, Op::WriteZeroes),
            (Op::Cache, Op::Cache),
            (Op::Read, Op::Read),
            (Op::Extents, Op::Extents),
        ] {
            tapped(|tapped| tapped.log.clear());
            disk.submit(Request::new(op, 8192, 12288).with(Flags::FUA)).await.unwrap();
            assert_eq!(tapped(|tapped| tapped.log.clone()), [(wanted, DATA + 2 * 4128, 3 * 4128)], "{op}");
        }
        assert_eq!(disk.read(8192, 12288).await.unwrap(), [0; 12288]);
        assert_eq!(disk.read(20480, 4096).await.unwrap(), [1; 4096]);
        let hole: Vec<_> = disk.extents(0, 65536).await.unwrap();
        assert!(hole.iter().all(|run| !run.state.zero || run.len < 12288), "pages are not slots: {hole:?}");
    });
}

#[test]
fn a_read_beside_a_write_waits_for_it_and_is_not_torn() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 4096);
        let disk = bench.open("Disk", "").await;
        disk.write(0, &[1; 16384]).await.unwrap();
        tapped(|tapped| tapped.hold = true);
        let mut write = disk.send(Request::write(4096, Data::copy_of(&[2; 8192])));
        settle().await;
        // The disk below has written half of it.
        let raw = bench.raw("Disk").await;
        let before = raw.read(place(1, 4096), 8256).await.unwrap();
        raw.write(place(1, 4096), &[9; 5000]).await.unwrap();
        let mut across = disk.send(Request::read(0, 16384));
        let mut within = disk.send(Request::read(8192, 512));
        let beside = disk.send(Request::read(12288, 4096));
        settle().await;
        assert!((&mut write).now_or_never().is_none() && (&mut across).now_or_never().is_none());
        assert!((&mut within).now_or_never().is_none());
        assert_eq!(beside.await.unwrap().unwrap().into_data().unwrap().to_vec(), [1; 4096]);
        assert_eq!(let_go(), 1);
        write.await.unwrap().unwrap();
        let found = across.await.unwrap().unwrap().into_data().unwrap().to_vec();
        assert_eq!(found, [[1u8; 4096], [2; 4096], [2; 4096], [1; 4096]].concat());
        assert_eq!(within.await.unwrap().unwrap().into_data().unwrap().to_vec(), [2; 512]);
        assert_ne!(raw.read(place(1, 4096), 8256).await.unwrap(), before);
    });
}

#[test]
fn a_payload_that_changes_meanwhile_is_encrypted_as_it_was() {
    run(1, async |host| {
        let bench = Bench::new(&host, 300, 4096);
        let disk = bench.open("Disk", "").await;
        // Longer than what is encrypted inline.
        let mut bytes = vec![0; 300 * 4096];
        fastrand::Rng::with_seed(3).fill(&mut bytes);
        disk.write(0, &bytes).await.unwrap();
        assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
        assert!(disk.read(4096, 200 * 4096 + 7).await.unwrap() == bytes[4096..201 * 4096 + 7]);
    });
}

#[test]
fn a_disk_that_tears_slots_is_refused() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 4096);
        let key = bench.path("a.key");
        let over = |below: &str| format!("element X (type crypto) (key_file {}) {below}", key.display());
        let file = format!("element F (type file) (path {}) (size 4M) X -> F", bench.path("x.img").display());
        for (below, wanted) in [
            (file.as_str(), "promises atomic writes of 0 bytes, and 4128 are needed"),
            ("element M (type mem) (size 1M) X -> M", "the smallest encrypted one has 2134048"),
        ] {
            let error = TestDisk::new(&host, CATALOGUE, &over(below), "X").await.err().unwrap().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    });
}

#[test]
fn graphs_that_replace_each_other_share_what_is_open() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 4096);
        let disk = bench.open("Disk", "").await;
        for byte in 1..4u64 {
            disk.write(byte * 4096, &[byte as u8; 4096]).await.unwrap();
            // The same instances, and a graph of their own.
            let now = disk.disk.graph();
            let instances: Vec<_> = now.instances().cloned().collect();
            let place = |name: &str| instances.iter().position(|found| found.name == name).unwrap();
            let edges = [("X", "T"), ("T", "Disk"), ("Client", "X")].map(|(from, to)| Connection {
                from: place(from),
                port: "out".to_owned(),
                to: place(to),
            });
            let next = Arc::new(Graph::assemble("test", &instances, &edges, host.shards()).unwrap());
            disk.disk.replace(next, &Default::default()).await.unwrap();
            assert_eq!(disk.read(byte * 4096, 4096).await.unwrap(), [byte as u8; 4096]);
            assert_eq!(get(&disk, "sessions"), "1 of 4096", "it is the same session");
        }
        let image = bench.image("Disk").await;
        let oracle = Oracle::new(&image, KEY_A);
        assert_eq!((1..4).map(|block| oracle.counter(block)).collect::<Vec<_>>(), [0, 1, 2]);
    });
}
