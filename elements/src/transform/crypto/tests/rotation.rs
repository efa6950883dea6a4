//! A new data key while guests go on.

use super::super::format::{COPIES, HEADER, Header};
use super::kit::{Bench, KEY_A, Oracle, call, get, place, tapped};
use blockmason::testing::{TestDisk, play_against_model, run};
use std::collections::BTreeSet;
use std::time::Duration;

async fn finish(disk: &TestDisk) {
    while get(disk, "rotation") != "none" {
        blockmason::rt::sleep(Duration::from_millis(1)).await;
    }
}

/// The ids of the keys that blocks have.
async fn keys(bench: &Bench) -> BTreeSet<u32> {
    let image = bench.image("Disk").await;
    let oracle = Oracle::new(&image, KEY_A);
    (0..oracle.blocks()).filter_map(|block| oracle.session(block)).map(|(_, key, _)| key).collect()
}

async fn header(bench: &Bench) -> Header {
    Header::decode(&bench.image("Disk").await[COPIES[0] as usize..][..HEADER]).unwrap()
}

#[test]
fn every_block_gets_the_new_key_and_the_old_one_is_forgotten() {
    run(1, async |host| {
        // More than is held at a time.
        let bench = Bench::new(&host, 700, 4096);
        let disk = bench.open("Disk", "").await;
        let mut bytes = vec![0; 600 * 4096];
        fastrand::Rng::with_seed(1).fill(&mut bytes);
        disk.write(0, &bytes).await.unwrap();
        assert_eq!(get(&disk, "rotation"), "none");
        for round in 2..4 {
            assert_eq!(call(&disk, "rotate", "").await, "");
            finish(&disk).await;
            assert_eq!(keys(&bench).await, BTreeSet::from([round]));
            let header = header(&bench).await;
            assert_eq!((header.newest(), header.keys.len()), (round, 1));
            assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
            assert_eq!(get(&disk, "sessions"), "1 of 4096", "those of the old key are free");
        }
        disk.disk.stop().await.unwrap();
        let disk = bench.open("Disk", "").await;
        assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
        assert!(disk.read(600 * 4096, 100 * 4096).await.unwrap().iter().all(|byte| *byte == 0));
    });
}

#[test]
fn guests_go_on_meanwhile() {
    for seed in 0..4 {
        run(seed, async |host| {
            let bench = Bench::new(&host, 600, 512);
            let disk = bench.open("Disk", "(block 512)").await;
            disk.write(0, &vec![7; 600 * 512]).await.unwrap();
            for _ in 0..3 {
                disk.disk.graph().call("X", "rotate", "").unwrap();
                play_against_model(&disk, seed, 60).await;
                finish(&disk).await;
                assert_eq!(get(&disk, "error"), "");
            }
            assert_eq!(keys(&bench).await, BTreeSet::from([4]));
        });
    }
}

/// The process dies at each request of a rotation.
#[test]
fn a_rotation_goes_on_after_a_crash() {
    for left in 0..24 {
        run(1, async |host| {
            let bench = Bench::new(&host, 5000, 512);
            let disk = bench.open("Disk", "(block 512)").await;
            let mut bytes = vec![0; 5000 * 512];
            fastrand::Rng::with_seed(left).fill(&mut bytes);
            disk.write(0, &bytes).await.unwrap();
            disk.op(blockmason::Op::Flush, 0, 0).await.unwrap();
            tapped(|tapped| tapped.changes_left = Some(left as usize));
            disk.disk.graph().call("X", "rotate", "").unwrap();
            for _ in 0..300 {
                blockmason::rt::sleep(Duration::from_micros(10)).await;
            }
            tapped(|tapped| tapped.changes_left = Some(0));
            let _ = disk.disk.stop().await;
            tapped(|tapped| tapped.changes_left = None);
            let disk = bench.open("Disk", "(block 512)").await;
            assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
            finish(&disk).await;
            assert!(disk.read(0, bytes.len() as u64).await.unwrap() == bytes);
            assert_eq!(keys(&bench).await.len(), 1);
            // The copies may differ until something is written.
            disk.write(0, &bytes[..512]).await.unwrap();
            assert_eq!(header(&bench).await.keys.len(), 1);
        });
    }
}

#[test]
fn a_block_that_cannot_be_read_keeps_the_old_key_until_it_is_written() {
    run(1, async |host| {
        let bench = Bench::new(&host, 16, 512);
        let disk = bench.open("Disk", "(block 512)").await;
        disk.write(0, &[1; 8192]).await.unwrap();
        let raw = bench.raw("Disk").await;
        raw.write(place(5, 512), &[3; 7]).await.unwrap();
        disk.disk.graph().call("X", "rotate", "").unwrap();
        while get(&disk, "error").is_empty() {
            blockmason::rt::sleep(Duration::from_millis(1)).await;
        }
        assert!(get(&disk, "error").contains("1 blocks cannot be read, the first is block 5"));
        assert_eq!(header(&bench).await.keys.len(), 2);
        assert!(disk.read(5 * 512, 512).await.is_err());
        assert_eq!(disk.read(0, 5 * 512).await.unwrap(), [1; 5 * 512]);
        disk.write(5 * 512, &[2; 512]).await.unwrap();
        assert_eq!(call(&disk, "rotate", "").await, "");
        finish(&disk).await;
        assert_eq!(keys(&bench).await, BTreeSet::from([2]));
    });
}
